#!/bin/bash
# start: a page of plain files. Its name is in the file `default`, so it has
# the addresses that no other launcher has, `/` first of all.
#
#   $ kapow server --billets examples/billets
#
#   $ curl -L http://localhost:8080/
#   <!DOCTYPE html>
#   ...
#   $ curl -o /dev/null -w '%{http_code} %{content_type}\n' http://localhost:8080/rsrc/style.css
#   200 text/css; charset=utf-8
#   $ curl -w '%{http_code}\n' http://localhost:8080/there/is/none
#   There is nothing here.
#   404

billet:() {
    if ((${#BILLET_TRAIL[@]} == 1)); then
        http_redirect "$(billet_url rsrc/index.html)"
    else
        http_error 404 'There is nothing here.'
    fi
}
