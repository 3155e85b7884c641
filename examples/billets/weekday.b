#!/usr/bin/env python3
# weekday: says which day of the week a day is. It is no Bash, so it is run as
# a CGI program.
#
#   $ kapow server --billets examples/billets
#
#   $ curl 'http://localhost:8080/weekday?date=2024-02-29'
#   2024-02-29 is a Thursday.
#   $ curl -w '%{http_code}\n' 'http://localhost:8080/weekday?date=2023-02-29'
#   A date, please, as in ?date=2024-02-29
#   400
import datetime
import os
import urllib.parse


def answer():
    """Return (status, text)."""
    try:
        query = urllib.parse.parse_qs(os.environ["QUERY_STRING"], max_num_fields=10)
        day = datetime.date.fromisoformat(query["date"][0])
    except (KeyError, ValueError):
        return "400 Bad Request", "A date, please, as in ?date=2024-02-29\n"
    return "200 OK", f"{day} is a {day:%A}.\n"


status, text = answer()
print(f"Status: {status}\nContent-Type: text/plain; charset=utf-8\n\n{text}", end="")
