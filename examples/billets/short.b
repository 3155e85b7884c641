#!/bin/bash
# short: makes short addresses of long ones, and leads from those to these.
#
#   $ kapow server --billets examples/billets
#
#   $ curl -d https://example.org/a/long/one http://localhost:8080/short
#   http://localhost:8080/short/44fe6ef820
#   $ curl -o /dev/null -w '%{http_code} %{redirect_url}\n' http://localhost:8080/short/44fe6ef820
#   302 https://example.org/a/long/one
#   $ curl -w '%{http_code}\n' -d javascript:alert http://localhost:8080/short
#   An http or https URL of up to 2000 characters, please.
#   400
#
# It leads wherever its users say: do not let strangers make addresses.

LC_ALL=C        # [!-~] is what is printable in ASCII

billet.setup() {
    mkdir -p -- "$BILLET_DATA" "$BILLET_TEMP"
}

# An address is a file whose name is the code and which holds the URL.
add() {
    local url hash new
    IFS= read -r -d '' -n 2002 url
    url=${url%$'\n'}
    if ((${#url} > 2000)) || [[ ! $url =~ ^https?://[!-~]+$ ]]; then
        http_error 400 'An http or https URL of up to 2000 characters, please.'
        return
    fi
    hash=$(printf '%s' "$url" | sha256sum)
    hash=${hash:0:10}
    if [[ ! -e $BILLET_DATA/$hash ]]; then      # it comes there in one step, or not at all
        new=$(mktemp -- "$BILLET_TEMP/XXXXXXXX") && printf '%s' "$url" > "$new" &&
            mv -n -- "$new" "$BILLET_DATA/$hash"
    fi
    if [[ $(< "$BILLET_DATA/$hash") != "$url" ]]; then
        http_error 409 'Another URL has its address.'
        return
    fi
    http_response 201
    http_header Content-Type 'text/plain; charset=utf-8'
    http_body
    printf 'http%s://%s%s\n' "${HTTPS:+s}" "$HTTP_HOST" "$(billet_url "$hash")"
}

billet:() {
    local code=${BILLET_TRAIL[1]-}
    if [[ $REQUEST_METHOD == POST && ! $code ]]; then
        add
    elif [[ ${#BILLET_TRAIL[@]} == 2 && $code =~ ^[0-9a-f]{10}$ && -f $BILLET_DATA/$code ]]; then
        http_redirect "$(< "$BILLET_DATA/$code")"
    else
        http_error 404 'There is no such address.'
    fi
}
