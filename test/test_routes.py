"""Section 3 of kapow.py: URL patterns, routes and their table."""

import threading

import pytest

import kapow


def match(pattern, path):
    """Return what `pattern` makes of `path`: {name: text}, or None."""
    return kapow.Route("GET", pattern).match(path)


@pytest.mark.parametrize("pattern, path, expected", [
    ("/", "/", {}),
    ("/", "/x", None),
    ("/a/b", "/a/b", {}),
    ("/a/b", "/a/b/", None),
    ("/a.c", "/abc", None),
    ("/a+(b)*[c]^$|?", "/a+(b)*[c]^$|?", {}),
    ("/{name}", "/x", {"name": "x"}),
    ("/{name}", "/", None),
    ("/{name}", "/x/y", None),
    ("/{name}", "/\udcff", {"name": "\udcff"}),
    ("/{name}", "/a\nb", {"name": "a\nb"}),
    ("/{a}/{b}", "/1/2", {"a": "1", "b": "2"}),
    ("/{a}-{b}", "/1-2-3", {"a": "1-2", "b": "3"}),
    ("/{a}{b}", "/123", {"a": "12", "b": "3"}),
    ("/x{a}y", "/xy", None),
    ("/{path:.*}", "/", {"path": ""}),
    ("/{path:.*}", "/a/b", {"path": "a/b"}),
    ("/{n:[0-9]+}", "/12", {"n": "12"}),
    ("/{n:[0-9]+}", "/1x", None),
    ("/{n:[0-9]{3}}", "/123", {"n": "123"}),
    ("/{n:[0-9]{3}}/{m}", "/123/x", {"n": "123", "m": "x"}),
    ("/{n:a|b}", "/b", {"n": "b"}),
    ("/{n:a|b}c", "/a", None),
    ("/{n:(a)(b)}/{m:(c)}", "/ab/c", {"n": "ab", "m": "c"}),
    ("/{n:(?i:x)}", "/X", {"n": "X"}),
    ("/{n:(?P<q>['\"]).*(?P=q)}", "/'x'", {"n": "'x'"}),
    ("/{n:x?}", "/", {"n": ""}),
    ("/{user-name}", "/x", {"user-name": "x"}),
    ("/{größe}", "/7", {"größe": "7"}),
    ("/{n:a:b}", "/a:b", {"n": "a:b"}),
    ("//{x}", "//y", {"x": "y"}),
    ("/../{x}", "/../y", {"x": "y"}),
])
def test_pattern(pattern, path, expected):
    assert match(pattern, path) == expected


@pytest.mark.parametrize("pattern, word", [
    ("", "begins with"), ("x", "begins with"), ("{x}", "begins with"),
    ("/{", "never closed"), ("/{x", "never closed"), ("/{x:[0-9]{3}", "never closed"),
    ("/}", "closes nothing"), ("/{x}}", "closes nothing"),
    ("/{}", "no name"), ("/{:x}", "no name"),
    ("/{x}/{x}", "twice"), ("/{x}/{x:.*}", "twice"),
    ("/{x:(}", "broken"), ("/{x:[}", "broken"), ("/{x:*}", "broken"), ("/{x:a)(b}", "broken"),
    ("/{x:(?i)y}", "flags"), ("/{x:(?x)y}", "flags"), ("/{x:(a)\\1}", "by number"),
    ("/{x:(a)?(?(1)b|c)}", "by number"), ("/{a{b}}", "brace"), ("/\ud800", "no request"),
    ("/{x:(?P<q>a)}/{y:(?P<q>a)}", "hold together"),
])
def test_pattern_refused(pattern, word):
    with pytest.raises(kapow.ApiError) as caught:
        kapow.Route("GET", pattern)
    assert (caught.value.reason, caught.value.status) == ("Invalid Route", 422)
    assert caught.value.details["field"] == "url_pattern"
    assert word in caught.value.details["error"]


@pytest.mark.parametrize("document, field", [
    ([], None), ("x", None), (None, None), (7, None),
    ({}, "method"),
    ({"method": "GET"}, "url_pattern"),
    ({"url_pattern": "/"}, "method"),
    ({"method": None, "url_pattern": "/"}, "method"),
    ({"method": "GET", "url_pattern": None}, "url_pattern"),
    ({"method": 1, "url_pattern": "/"}, "method"),
    ({"method": "", "url_pattern": "/"}, "method"),
    ({"method": "G T", "url_pattern": "/"}, "method"),
    ({"method": "GET\n", "url_pattern": "/"}, "method"),
    ({"method": "GET", "url_pattern": ["/"]}, "url_pattern"),
    ({"method": "GET", "url_pattern": "/", "entrypoint": 1}, "entrypoint"),
    ({"method": "GET", "url_pattern": "/", "entrypoint": "sh '"}, "entrypoint"),
    ({"method": "GET", "url_pattern": "/", "entrypoint": "  "}, "entrypoint"),
    ({"method": "GET", "url_pattern": "/", "entrypoint": "a\0b"}, "entrypoint"),
    ({"method": "GET", "url_pattern": "/", "command": {}}, "command"),
    ({"method": "GET", "url_pattern": "/", "command": "a\0b"}, "command"),
    ({"method": "GET", "url_pattern": "/", "command": "\ud800"}, "command"),
    ({"method": "GET", "url_pattern": "/", "index": "0"}, "index"),
    ({"method": "GET", "url_pattern": "/", "index": 1.0}, "index"),
    ({"method": "GET", "url_pattern": "/", "index": True}, "index"),
    ({"method": "GET", "url_pattern": "/", "id": 7}, "id"),
    ({"method": "GET", "url_pattern": "/", "colour": "red"}, "colour"),
])
def test_route_refused(document, field):
    with pytest.raises(kapow.ApiError) as caught:
        kapow.Route.from_json(document)
    assert caught.value.reason == "Invalid Route"
    assert caught.value.details["field"] == field


@pytest.mark.parametrize("keys, argv", [
    ({}, ["/bin/sh", "-c", ""]),
    ({"entrypoint": None, "command": None}, ["/bin/sh", "-c", ""]),
    ({"entrypoint": ""}, ["/bin/sh", "-c", ""]),
    ({"command": "a b"}, ["/bin/sh", "-c", "a b"]),
    ({"entrypoint": "/bin/sh -c", "command": ""}, ["/bin/sh", "-c", ""]),
    ({"entrypoint": "cat"}, ["cat"]),
    ({"entrypoint": "cat", "command": "a b"}, ["cat", "a b"]),
    ({"entrypoint": "'my prog' -x \"a b\""}, ["my prog", "-x", "a b"]),
])
def test_argv(keys, argv):
    route = kapow.Route.from_json({"method": "GET", "url_pattern": "/", **keys})
    assert route.argv == argv


def test_defaults_are_shown():
    route = kapow.Route.from_json({"method": "get", "url_pattern": "/x", "id": "mine", "index": 7})
    shown = route.to_json(3)
    assert shown.pop("id") == route.id != "mine"
    assert shown == {"method": "get", "url_pattern": "/x", "entrypoint": "/bin/sh -c",
                     "command": "", "index": 3}


def table(*routes):
    """Return a RouteTable of (method, pattern) pairs."""
    made = kapow.RouteTable()
    for method, pattern in routes:
        made.append(kapow.Route(method, pattern))
    return made


def patterns(routes):
    return [route.url_pattern for route in routes.snapshot()]


@pytest.mark.parametrize("index, place", [(-5, 0), (0, 0), (1, 1), (2, 2), (9, 2)])
def test_insert(index, place):
    routes = table(("GET", "/a"), ("GET", "/b"))
    assert routes.insert(kapow.Route("GET", "/new"), index) == place
    assert patterns(routes).index("/new") == place
    assert [name for name in patterns(routes) if name != "/new"] == ["/a", "/b"]


def test_find_and_remove():
    routes = table(("GET", "/a"), ("GET", "/b"))
    second = routes.snapshot()[1]
    assert routes.find(second.id) == (1, second)
    routes.remove(second.id)
    assert patterns(routes) == ["/a"]
    for call in (routes.find, routes.remove):
        with pytest.raises(kapow.ApiError, match="Route Not Found"):
            call(second.id)


def test_snapshot_never_changes():
    routes = table(("GET", "/a"))
    before = routes.snapshot()
    routes.replace([])
    routes.append(kapow.Route("GET", "/b"))
    assert [route.url_pattern for route in before] == ["/a"]


def test_first_match_wins():
    routes = table(("POST", "/{any:.*}"), ("GET", "/x"), ("GET", "/{any:.*}"))
    assert routes.match("GET", "/x")[0].url_pattern == "/x"
    assert routes.match("GET", "/y") == (routes.snapshot()[2], {"any": "y"})


@pytest.mark.parametrize("method, path, answer", [
    ("GET", "/none", (404, None)),
    ("OPTIONS", "/none", (404, None)),
    ("HEAD", "/none", (404, None)),
    ("POST", "/get", (405, "GET, HEAD, OPTIONS")),
    ("get", "/get", (405, "GET, HEAD, OPTIONS")),
    ("OPTIONS", "/get", (204, "GET, HEAD, OPTIONS")),
    ("GET", "/post", (405, "POST, OPTIONS")),
    ("HEAD", "/post", (405, "POST, OPTIONS")),
    ("PUT", "/both", (405, "GET, POST, HEAD, OPTIONS")),
    ("OPTIONS", "*", (204, "GET, POST, OPTIONS, HEAD")),
])
def test_no_match(method, path, answer):
    routes = table(("GET", "/get"), ("POST", "/post"), ("GET", "/both"), ("POST", "/both"),
                   ("GET", "/both"), ("OPTIONS", "/own"))
    with pytest.raises(kapow.ApiError) as caught:
        routes.match(method, path)
    allow = dict(caught.value.headers).get("Allow")
    assert caught.value.status == answer[0]
    assert (allow and set(allow.split(", "))) == (answer[1] and set(answer[1].split(", ")))
    assert allow is None or len(allow.split(", ")) == len(set(allow.split(", ")))


def test_head_and_options():
    routes = table(("GET", "/x"), ("HEAD", "/x"), ("GET", "/y"), ("OPTIONS", "/y"))
    assert routes.match("HEAD", "/x")[0].method == "HEAD"
    assert routes.match("HEAD", "/y")[0].method == "GET"
    assert routes.match("OPTIONS", "/y")[0].method == "OPTIONS"


def test_many_writers_lose_nothing():
    routes = kapow.RouteTable()

    def work(number):
        for count in range(50):
            routes.insert(kapow.Route("GET", f"/{number}/{count}"), number)
            gone = kapow.Route("GET", "/gone")
            routes.append(gone)
            routes.remove(gone.id)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(patterns(routes))) == len(patterns(routes)) == 400
