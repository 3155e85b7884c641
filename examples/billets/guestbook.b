#!/bin/bash
# guestbook: visitors write, and all read it. It is kept in BILLET_DATA.
#
#   $ kapow server --billets examples/billets
#
#   $ curl -d name=Ada --data-urlencode 'text=1 < 2 & all is well' \
#         http://localhost:8080/guestbook/sign
#   $ curl http://localhost:8080/guestbook
#   <!DOCTYPE html>
#   ...
#   <p><b>Ada</b>: 1 &lt; 2 &amp; all is well</p>
#   $ curl -w '%{http_code}\n' -d name=Ada http://localhost:8080/guestbook/sign
#   A name and a text, please, and not too long.
#   400

# What it makes lasts: it runs once, not for each request.
billet.setup() {
    need flock || die 'flock is not installed'
    mkdir -p -- "$BILLET_DATA" && touch -- "$BILLET_DATA/entries"
}

# A field of the form, on one line, without control characters.
field() {
    kapow get "/request/form/$1" 2>/dev/null | tr '\n' ' ' | tr -d '\000-\037'
}

# The text, with nothing in it that HTML takes for its own.
escaped() {
    printf '%s\n' "$1" | sed 's/&/\&amp;/g; s/</\&lt;/g; s/>/\&gt;/g; s/"/\&quot;/g'
}

billet:() {
    if ((${#BILLET_TRAIL[@]} > 1)); then
        http_error 404 'There is nothing here.'
        return
    fi
    http_header Content-Type 'text/html; charset=utf-8'
    http_body
    cat <<PAGE
<!DOCTYPE html>
<title>Guest book</title>
<h1>Guest book</h1>
<form method="post" action="$(billet_url sign)">
<input name="name" placeholder="your name" required maxlength="40">
<input name="text" placeholder="what you say" required maxlength="500" size="60">
<button>Sign</button>
</form>
PAGE
    cat -- "$BILLET_DATA/entries"
}

billet:sign() {
    local name text
    if [[ $REQUEST_METHOD != POST ]]; then
        http_response 405
        http_header Allow POST
        return
    fi
    name=$(field name)
    text=$(field text)
    if [[ ! $name || ! $text ]] || ((${#name} > 200 || ${#text} > 2000)); then
        http_error 400 'A name and a text, please, and not too long.'
        return
    fi
    {
        flock 9         # others may be writing
        printf '<p><b>%s</b>: %s</p>\n' "$(escaped "$name")" "$(escaped "$text")" >&9
    } 9>>"$BILLET_DATA/entries"
    http_redirect "$(billet_url '')" 303
}
