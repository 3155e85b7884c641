"""Section 3 of kapow.py: URL patterns, routes and their table."""

import functools
import random
import re
import threading
import time

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
    ("/{n:(?P<q>a)}/{m:(?P<q>b)}", "/a/b", {"n": "a", "m": "b"}),
    ("/{n:a|ab}{m}", "/abc", {"n": "a", "m": "bc"}),
    ("/{n:ab|a}{m}", "/abc", {"n": "ab", "m": "c"}),
    ("/{n:^[0-9]+$}", "/12", {"n": "12"}),
    ("/{n:\\A[0-9]+\\Z}x", "/12x", {"n": "12"}),
    ("/{n:a*?}{m:.*}", "/aab", {"n": "", "m": "aab"}),
    ("/{n:.}", "/\n", None),
    ("/{n:(?s:.)}", "/\n", {"n": "\n"}),
    ("/{n:[^0-9]+}", "/a\nb", {"n": "a\nb"}),
    ("/{n:\\w\\W\\s\\S\\d\\D}", "/é- é1x", {"n": "é- é1x"}),
    ("/{n:(?a:\\w)}", "/é", None),
    ("/{n:(?a:(?u:\\w))}", "/é", {"n": "é"}),
    ("/{n:(?:){4000000000}a}", "/a", {"n": "a"}),
    ("/{n:(?:(?:){60000}){60000}a(?:){0,60000}(?:)*}", "/a", {"n": "a"}),
    ("/{n:[]^-]+}", "/]^-", {"n": "]^-"}),
    ("/{n:(?i:straße)}", "/STRASSE", None),
    ("/{n:(?i:[k-m]+)}", "/KlM", {"n": "KlM"}),
    ("/{n:x{2,3}}", "/xxxx", None),
    ("/{n:x{2,3}}", "/xxx", {"n": "xxx"}),
    ("/a{n}b", "/ab", None),
    ("/ab{n:.*}ba", "/aba", None),
    ("/{y}-{m}-{d}", "/2026-11-28", {"y": "2026", "m": "11", "d": "28"}),
    ("/{y}-{m}-{d}", "/1-2-3-4", {"y": "1-2", "m": "3", "d": "4"}),
    ("/p/{name}.{ext}", "/p/a.tar.gz", {"name": "a.tar", "ext": "gz"}),
    ("/{path:.*}/{file:[^/]+}", "/a/b/c", {"path": "a/b", "file": "c"}),
    ("/{path:.*}/{file:.*}", "/a/b/", {"path": "a/b", "file": ""}),
    ("/{f:(csv|json)}", "/json", {"f": "json"}),
    ("/{s:[a-z0-9-]{1,64}}", "/" + "x" * 64, {"s": "x" * 64}),
    ("/{s:[a-z0-9-]{1,64}}", "/" + "x" * 65, None),
    ("/{d:\\d{4}-\\d\\d-\\d\\d}", "/2026-11-28", {"d": "2026-11-28"}),
    ("/{u:[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}}",
     "/123e4567-e89b-12d3-a456-426614174000", {"u": "123e4567-e89b-12d3-a456-426614174000"}),
    ("/{lang:(?:en|de)(?:-[A-Z]{2})?}/x", "/de-AT/x", {"lang": "de-AT"}),
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
    ("/{x:(?i)y}", "flags"), ("/{x:(?x)y}", "flags"), ("/{a{b}}", "brace"), ("/\ud800", "no request"),
    ("/{x:(a)\\1}", "{x} is not taken: it has a reference back"),
    ("/{x:(?P<q>a)(?P=q)}", "a reference back"), ("/{x:(a)?(?(1)b|c)}", "a condition"),
    ("/{x:(?!a)b}", "a look-around"), ("/{x:(?<=a)b}", "a look-around"), ("/{x:(^a)}", "an anchor"),
    ("/{x:a$b}", "an anchor"), ("/{x:\\bx}", "word boundary"),
    ("/{x:a{1501}}", "1501 characters"), ("/{x:(a{1,100}){1,100}}", "too long"),
    ("/{x:(?:a?){300}}", "repeats, options"), ("/{x:((((a{9}){9}){9}){9}){9}}", "too long"),
    ("/{x:(?:){4000000000}(?:a?){300}}", "repeats, options"), ("/{x:" + "(?:" * 300 + ")*?" * 300 + "}", "is not taken"),
    ("/{a}/{x:[%s]}" % "".join(chr(0x10000 + 2 * code) for code in range(5000)), "too large"),
    ("/{x:\\d{8000}}/{b}", "{x} is not taken: with its repeats"), ("/{a:.}/{x:\\d{1600}}", "{x} could"),
    ("/{x:(?!)}", "a look-around"), ("/{x:(?=)}", "a look-around"),
    ("/{x:%s}" % "".join(f"[a{chr(code)}]" for code in range(300, 340)), "40 different sets"),
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


# Patterns that a backtracking matcher needs long for, with a path that shows it.
N = 8 * 1024 - 1


@pytest.mark.parametrize("pattern, path", [
    ("/{y}-{m}-{d}", "/" + "-" * N),
    ("/{a}{b}{c}{d}{e}", "/" + "x" * N + "/"),
    ("/p/{name}.{ext}", "/p/" + "." * N + "/"),
    ("/{a}" + "a" * 4000, "/" + "a" * N + "b"),
    ("/{a}" + "a" * 4000 + "/x", "/" + "a" * N + "/x"),
    ("/r/{path:.*}/{file:.*}", "/r" + "/" * N + "\n"),
    ("/re/{x:(a+)+}", "/re/" + "a" * N + "b"),
    ("/re/{x:(a+)+}b", "/re/" + "a" * N + "b"),
    ("/{x:(a|a)*}", "/" + "a" * N + "b"),
    ("/{x:(a|aa)+}", "/" + "a" * N),
    ("/{x:(a*)*b}", "/" + "a" * N),
    ("/{x:(.*a){20}}", "/" + "a" * N),
    ("/{x:([a-z]+[0-9]*)*!?}", "/" + "a1" * (N // 2)),
    ("/{x:.*}{y:.*}{z:.*}!", "/" + "a" * N),
    ("/{x:(" + "|".join(f"[a-z]{{{n},{n + 9}}}" for n in range(1, 30)) + ")*}", "/" + "q" * N),
    ("/{x:(?:" + "".join(f"[a-{chr(code)}]" for code in range(ord("b"), ord("z"))) + ")*}",
     "/" + "".join(map(chr, range(0x100, 0x100 + N // 3)))),
])
def test_matching_takes_no_time(pattern, path):
    """No pattern that is accepted takes over 50 ms of CPU on a path of 8 KiB."""
    route = kapow.Route("GET", pattern)
    assert min(seconds_of(lambda: route.match(path)) for _ in range(3)) < 0.05


def seconds_of(call):
    """Return the seconds of CPU that `call()` takes this thread."""
    begin = time.thread_time()
    call()
    return time.thread_time() - begin


class Patterns:
    """Random patterns, and paths near to what they match."""

    ATOMS = ("a", "b", "-", "/", "[ab]", "[^/]", "[^a]", ".", r"\w", r"\d", "(?i:A)")
    REPEATS = ("*", "+", "?", "{2}", "{1,3}", "{0,2}", "*?", "+?", "??", "{1,}")

    def __init__(self, seed):
        self.random = random.Random(seed)

    def atom(self, depth):
        choice = self.random.random()
        if depth == 0 or choice < 0.4:
            return self.random.choice(self.ATOMS)
        if choice < 0.6:
            return f"({self.alternatives(depth - 1)})"
        # What is repeated is never empty: what `re` makes of an empty turn is its own affair.
        return f"(?:{self.random.choice(self.ATOMS)}{self.atom(depth - 1)}){self.random.choice(self.REPEATS)}"

    def alternatives(self, depth):
        return "|".join("".join(self.atom(depth) for _ in range(self.random.randint(1, 3)))
                        for _ in range(self.random.choice((1, 1, 2, 3))))

    def pattern(self):
        parts = ["/"]
        for number in range(self.random.randint(1, 3)):
            regex = "" if self.random.random() < 0.4 else ":" + self.alternatives(2)
            parts.append(f"{{p{number}{regex}}}{self.random.choice(('', '/', '-', '.', 'a', '/x/'))}")
        return "".join(parts)

    def path(self, length):
        return "/" + "".join(self.random.choice("aab-/.x1") for _ in range(length))


def as_regex(pattern):
    """Return the regular expression that `pattern` means."""
    literals, placeholders = kapow.parse_pattern(pattern)
    groups = [f"(?P<{name}>{regex or '[^/]+'})" for name, regex in placeholders.items()]
    return re.compile(functools.reduce(lambda left, pair: left + pair[0] + re.escape(pair[1]),
                                       zip(groups, literals[1:]), re.escape(literals[0])))


def test_patterns_mean_what_re_says():
    """The module `re` is the oracle, on paths so short that it has no chance to be slow."""
    patterns = Patterns(2026)
    matched = 0
    for _ in range(1000):
        pattern = patterns.pattern()
        route = kapow.Route("GET", pattern)
        expression = as_regex(pattern)
        for length in (0, 1, 2, 3, 5, 8):
            path = patterns.path(length)
            found = expression.fullmatch(path)
            expected = found and {name: found.group(name) for name in kapow.parse_pattern(pattern)[1]}
            assert route.match(path) == expected, (pattern, path)
            matched += found is not None
    assert matched > 100


def test_random_patterns_take_no_time():
    patterns = Patterns(13)
    for _ in range(60):
        pattern = patterns.pattern()
        route = kapow.Route("GET", pattern)
        for path in (patterns.path(N), "/" + patterns.path(4) * (N // 5), "/" + "a" * N):
            assert min(seconds_of(lambda: route.match(path[:N])) for _ in range(2)) < 0.05, pattern
