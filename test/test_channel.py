"""`kapow get` and `kapow set` over a handler's channel, and over the data interface: one meaning.

Each way to call is a word of WAYS. How many clients a call started, which none
does over the channel, is counted by the client itself: see count_clients().
"""

import collections
import contextlib
import fcntl
import itertools
import os
import pathlib
import py_compile
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import types
import uuid

import pytest

import kapow

from conftest import DEADLINE, KAPOWCTL, Server, read_all, wait_until, write_starter
from test_handlers import refuses
from test_resources import (FORM, MULTIPART, MULTIPART_BODY, PLAIN_PATTERN, PLAIN_TARGET, READS,
                            READS_REFUSED, WRITES_REFUSED, plain_headers, read_until)

SHELLS = {"dash": "dash -c", "bash": "env LC_ALL=C.UTF-8 bash -c", "busybox": "busybox sh -c"}
SHELLS = {name: entrypoint for name, entrypoint in SHELLS.items() if shutil.which(name)}

# Way to call -> (entrypoint, what the command does first, the words that call, whether over
# the channel).
WAYS = {
    **{name: (entrypoint, "", "kapow", True) for name, entrypoint in SHELLS.items()},
    "script": ("/bin/sh -c", "", "env kapow", True),
    "dot": ("/bin/sh -ec", '. "$(dirname "$(command -v kapow)")/kapow.sh"; set +e', "kapow", True),
    "unset": ("/bin/sh -c", "unset KAPOW_CHANNEL", "kapow", False),
    "data": ("/bin/sh -c", "", "env -u KAPOW_CHANNEL kapow", False),
}
MOST_WAYS = [way for way in WAYS if way not in ("dot", "unset")]

MISSING = "Resource Item Not Found"
BAD = "Bad Request"
LARGE = "Content Too Large"
STARTED = "Response Already Started"
EXCLUSIVE = "Body And Stream Are Exclusive"
NO_HANDLER = "Handler ID Not Found"


def library(server):
    """Return the path of the library, which is in the second directory on the PATH."""
    return pathlib.Path(server.init_environment["PATH"].split(os.pathsep)[1], "kapow.sh")


def count_clients(server):
    """Have each client that starts in the channel's place leave a byte in the file $COUNT."""
    compiled = library(server).with_name("kapowctl.pyc")
    compiled.rename(compiled.with_name("counted.pyc"))
    source = server.directory / "counting.py"
    source.write_text(textwrap.dedent("""\
        import marshal, os, sys
        if "COUNT" in os.environ:
            _fd = os.open(os.environ["COUNT"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            os.write(_fd, b"x")
            os.close(_fd)
        with open(os.path.dirname(sys.argv[0]) + "/counted.pyc", "rb") as _file:
            _file.seek(16)
            _code = marshal.load(_file)
        exec(_code)
        """))
    py_compile.compile(str(source), str(compiled), doraise=True)


@pytest.fixture(scope="module")
def module_server(tmp_path_factory):
    """As in conftest.py, with its clients counted."""
    server = Server(tmp_path_factory.mktemp("channel"))
    count_clients(server)
    yield server
    assert server.stop() == 0
    server.check_gone()


def size(path):
    """Return the size of a file, 0 when there is none."""
    return path.stat().st_size if path.exists() else 0


class Counter:
    """Counts the clients of one command: `export`, shell text, goes before it."""

    def __init__(self, server):
        self._path = server.directory / f"{uuid.uuid4().hex}.clients"
        self.export = f"export COUNT={self._path}\n"

    @property
    def clients(self):
        return size(self._path)


@pytest.fixture
def counter(server):
    return Counter(server)


class Gate:
    """A pipe with a name, `path`, that the test holds open; a program reads a line or its bytes."""

    def __init__(self, directory):
        self.path = directory / uuid.uuid4().hex
        os.mkfifo(self.path)
        self._fd = os.open(self.path, os.O_RDWR)

    def open(self, data=b"\n"):
        os.write(self._fd, data)

    def close(self):
        """End the input of whoever reads."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


@pytest.fixture
def gate(server):
    """A function that makes Gates."""
    gates = []

    def make():
        gates.append(Gate(server.directory))
        return gates[-1]

    yield make
    for made in gates:
        made.close()


# ---------------------------------------------------------------------------
# Resources and responses, every way
# ---------------------------------------------------------------------------

# Shell text (bytes) in which $K calls, and what it is to write to standard output and standard
# error, return, and how many clients it may start over the channel: a number or several.
Case = collections.namedtuple("Case", "text out err status clients", defaults=(b"", "", 0, 0))


def refused(text, reason, clients=0):
    """A Case whose only call fails with `reason`, of the resource that it names."""
    return Case(text, b"", f"kapowctl: {resource_of(text, '$K')}: {reason}\n", 1, clients)


def resource_of(text, command):
    """Return the resource of the call of `command` in shell text (bytes), as messages have it."""
    words = shlex.split(os.fsdecode(text))
    words = words[words.index(command) + 2:]
    resource = next(word for place, word in enumerate(words)
                    if word[:1] != "-" and words[place - 1:place] != ["--handler"])
    resource = resource if resource.startswith("/") else "/" + resource
    return re.sub(r"[\x00-\x1f\x7f]", "?", resource)


def quote(value):
    """Quote bytes for a shell."""
    return b"'" + value.replace(b"'", b"'\\''") + b"'"


class Run:
    """Runs Cases in one handler, one after the other."""

    def __init__(self, server, way, cases):
        """`cases` is {id: Case}."""
        self._server, self._way, self._cases = server, way, cases
        entrypoint, prepare, words, self._fast = WAYS[way]
        self._directory = server.directory / uuid.uuid4().hex
        self._directory.mkdir()
        pieces = [f"{prepare}\nK='{words}'\ncd {self._directory}\n".encode()]
        for number, case in enumerate(cases.values()):
            pieces.append(b"export COUNT=%d.clients\n{ %b\n} >%d.out 2>%d.err\necho $? >%d.status\n"
                          % (number, case.text, number, number, number))
        (self._directory / "script").write_bytes(b"".join(pieces))
        self.more = {"command": f". {self._directory}/script # kapow", "entrypoint": entrypoint}

    def ask(self, method="GET", target="", body=None, headers=None, pattern=None):
        """Make the request that runs them; return the Reply. All must be as their Cases say."""
        path = self._server.route(method=method, pattern=pattern, **self.more)
        reply = self._server.request(method, target if pattern else path + target, body, headers or {})
        self.check()
        return reply

    def check(self):
        """Compare what was found with what the Cases say."""
        wrong = {}
        for number, (name, case) in enumerate(self._cases.items()):
            found, wanted = self._found(number), self._wanted(case)
            if found[:3] != wanted[:3] or found[3] not in wanted[3]:
                wrong[name] = [tuple(map(shorten, found)), tuple(map(shorten, wanted))]
        assert not wrong, f"{self._way}: found, and wanted: " + "\n".join(
            f"{name!r}: {pair[0]}\n    {pair[1]}" for name, pair in wrong.items())

    def _found(self, number):
        out, err, status = (self._directory / f"{number}.{suffix}"
                            for suffix in ("out", "err", "status"))
        if not size(status):
            return "not run", "", 0, 0
        return (out.read_bytes(), err.read_text(), int(status.read_text()),
                size(self._directory / f"{number}.clients"))

    def _wanted(self, case):
        clients = case.clients if self._fast else case.text.count(b"$K")
        return case.out, case.err, case.status, clients if isinstance(clients, range) else [clients]


def shorten(value):
    """Return something that can be read, of a value of any length."""
    text = repr(value)
    return value if len(text) < 200 else f"{text[:150]}... ({len(value)})"


def get(path, *expected):
    return Case(b"$K get " + quote(path), *expected)


def is_local(path):
    """Whether the shell takes a path, which begins with a slash."""
    return 0 if path.startswith("/") else 1


# Every byte that a name can hold; NUL, / and % percent-encoded as they must be.
NAMES = {bytes(raw): b"".join(b"%%%02X" % byte if byte in b"\0/%" else bytes([byte]) for byte in raw)
         for raw in (range(start, start + 32) for start in range(0, 256, 32))}


def test_names_cover_all_bytes():
    assert b"".join(NAMES) == bytes(range(256))


@pytest.mark.parametrize("way", WAYS)
def test_read(server, way):
    cases = {f"{path} {value}": get(path.encode(), value) for path, value in READS}
    cases.update({path: refused(b"$K get " + quote(path.encode()), reason, is_local(path))
                  for path, _, reason in READS_REFUSED})
    cases.update({
        "no slash": Case(b"$K get request/method", b"GET", clients=1),
        "--": Case(b"$K get -- /request/method", b"GET", clients=1),
        "id": refused(b"KAPOW_HANDLER_ID=x $K get /request/method", "Handler ID Not Found", 1),
        "id kept": Case(b"$K get /request/method", b"GET"),
        "raw": get("/request/matches/café".encode(), b"y\xc3\xa9\xff"),
        "space": get(b"/request/params/t u", b"v"),
        "unread": Case(b"printf 'a\nb\n' | { read x; $K get /request/method; cat; }", b"GETb\n"),
        "substituted": Case(b'x=$($K get /request/params/s%2Ft | tr "\\0" z); echo "$x"', b"z\n%\n"),
        "status": refused(b"! $K get /request/params/none", MISSING)._replace(status=0),
        "option": refused(b"$K get --handler x /request/method", "Handler ID Not Found", 1),
    })
    reply = Run(server, way, cases).ask(
        target=PLAIN_TARGET, pattern=PLAIN_PATTERN, headers=plain_headers())
    assert reply.status == 200


@pytest.mark.parametrize("way", MOST_WAYS)
def test_names(server, way):
    """A name holds any byte; what an address of HTTP would take for something else too."""
    query = "&".join(f"{http_quote(name)}={http_quote(name)}" for name in NAMES)
    cases = {repr(name): get(b"/request/params/" + path, name) for name, path in NAMES.items()}
    for name in b"a\nb", b"?", b"#", b"a?b#c", b";x", b"a%zb", b"..", b"-x", b"*", b"\\0101", b"%s":
        cases[repr(name)] = get(b"/request/params/" + name, b"=" + name)
        query += f"&{http_quote(name)}={http_quote(b'=' + name)}"
    # A call is a line.
    cases = {name: case._replace(clients=int(r"\n" in name)) for name, case in cases.items()}
    Run(server, way, cases).ask(target="?" + query)


def http_quote(raw):
    """Percent-encode all bytes."""
    return "".join(f"%{byte:02X}" for byte in raw)


@pytest.mark.parametrize("way", MOST_WAYS)
def test_long_values(server, way):
    """Of headers, on both sides of what is one line for a shell and of a pipe's atomic write."""
    lengths = [999, 1000, 1001, 2047, 2048, 2049, 4095, 4096, 4097, 8192, 20000]
    headers = {f"X{length}": (bytes(range(33, 127)) * 300)[:length] for length in lengths}
    headers["Raw"] = bytes(range(128, 256)) * 60
    cases = {name: get(b"/request/headers/" + name.encode(), value) for name, value in headers.items()}
    cases["half"] = Case(b"$K get /request/headers/X20000 | head -c 1", b"!")
    cases["after"] = get(b"/request/headers/X20000", headers["X20000"])
    Run(server, way, cases).ask(headers=headers)


@pytest.mark.parametrize("length", [3000, 9000, 40000, 70000, 130000])
def test_long_name(server, length):
    """A name that is longer than a call over a pipe can be is answered all the same."""
    command = (f'name=$(head -c {length} /dev/zero | tr "\\0" a); '
               "kapow get /request/params/$name 2>&1 | kapow set /response/body")
    reply = server.get(server.route(command, timeout=5))
    assert reply.status == 200
    assert reply.body.decode().endswith(f"a: {MISSING}\n") or length > 60000


@pytest.mark.parametrize("way", MOST_WAYS)
def test_write_refused(server, way):
    """Each error, the value an argument and on standard input."""
    cases = {}
    for number, (path, value, _, reason) in enumerate(WRITES_REFUSED):
        path = quote(path.encode())
        if b"\0" not in value:
            cases[f"{number} {reason} argument"] = refused(
                b"$K set -- %b %b" % (path, quote(value)), reason)
        cases[f"{number} {reason} input"] = refused(
            b"%b | $K set %b" % (printing(value), path), reason)
    cases["id"] = refused(b"KAPOW_HANDLER_ID=x $K set /response/status x", "Handler ID Not Found", 1)
    reply = Run(server, way, cases).ask()
    assert (reply.status, reply.body) == (200, b"")


def printing(value):
    """Return shell text that prints bytes, of which printf(1) has an escape for each."""
    if len(value) > 1000:
        return b"head -c %d /dev/zero | tr '\\0' x" % len(value)
    return b"printf %b" % quote(b"".join(b"\\%03o" % byte for byte in value))


VALUES = {
    "plain": b"plain", "empty": b"", "newline": b"\n", "newlines": b"a\n\nb\n\n\n", "cr": b"a\r\nb\r",
    "backslashes": b"a\\nb\\\\c\\0101\\x41\\c\\", "percent": b"%s%d%%%n%", "utf8": "é€😀".encode(),
    "invalid": b"\xff\xc3\xe2\x82", "spaces": b"  a  b\t ", "quotes": b"'\"`$HOME`$(id)", "glob": b"* [a] ?",
    "dash": b"-x", "dashes": b"--", "one dash": b"-", "help": b"--help", "controls": bytes(range(1, 32)),
    "999": b"a" * 999, "1000": b"b" * 1000, "1001": b"c" * 1001, "utf8 999": "é".encode() * 980,
    "4095": b"d" * 4095, "4096": b"e" * 4096, "4097": b"f" * 4097, "lines": b"0123456789\n" * 600,
    "all": bytes(range(256)), "NUL": b"\0", "60k": b"g" * 60_000, "300k": bytes(range(256)) * 1200,
    "1M": b"0123456789abcde\n" * 70_000,
}


@pytest.mark.parametrize("way", MOST_WAYS)
def test_body(server, way):
    """Values of all kinds, as arguments, through pipes and from files, in order."""
    directory = server.directory / uuid.uuid4().hex
    directory.mkdir()
    cases, wanted = {}, {}
    for name, value in VALUES.items():
        if b"\0" not in value and len(value) < 10000:
            text = b"$K set -- /response/body " + quote(value)
            cases[f"{name} argument"] = Case(text)
            wanted[f"{name} argument"] = value
    for name, value in VALUES.items():
        (directory / name).write_bytes(value)
        path = quote(os.fsencode(directory / name))
        cases[f"{name} pipe"] = Case(b"cat %b | $K set /response/body" % path)
        cases[f"{name} file"] = Case(b"$K set /response/body < %b" % path)
        wanted[f"{name} pipe"] = wanted[f"{name} file"] = value
    cases["nothing"] = Case(b"$K set /response/body </dev/null", clients=1)
    body = Run(server, way, cases).ask().body
    for name, value in wanted.items():
        assert body.startswith(value), (name, shorten(body))
        body = body[len(value):]
    assert body == b""


@pytest.mark.parametrize("way", MOST_WAYS)
def test_response(server, way):
    """Status, headers, cookies and log lines, the value an argument and on standard input."""
    cases = {number: Case(text) for number, text in enumerate([
        b"$K set /response/status 201", b"echo 418 | $K set /response/status",
        b"$K set /response/headers/X-A 1", b"$K set /response/headers/X-A '2\n'",
        b"echo ' 3' | $K set /response/headers/x-a", b"$K set /response/headers/X-A ''",
        b"$K set -- /response/headers/X-A --", b"$K set /response/headers/X%2DB 'a  b'",
        b"$K set /response/headers/Content-Type text/x; $K set /response/headers/Server 'a%sb\\n'",
        b"$K set /response/headers/X-Long %b" % (b"l" * 5000),
        b"$K set /response/cookies/c 'v; Path=/'", b"printf 'w\n' | $K set /response/cookies/d",
        b"$K set /server/log 'log \\101 %s\n'", b"printf 'two\nlines' | $K set '/server/log/a b'",
        b"$K set /response/body 'not \\n'", b"echo dropped | $K set /response/body",
        b"echo 404 | $K set /response/status", b"$K set /response/status '418\n'"])}
    log = len(server.log)
    reply = Run(server, way, cases).ask()
    assert (reply.status, reply.body) == (418, b"not \\ndropped\n")
    assert reply.headers.get_all("X-A") == ["1", "2", "3", "", "--"]
    assert reply.headers.get_all("Set-Cookie") == ["c=v; Path=/", "d=w"]
    assert (reply.headers["X-B"], reply.headers["Content-Type"]) == ("a  b", "text/x")
    assert (reply.headers["Server"], reply.headers["X-Long"]) == ("a%sb\\n", "l" * 5000)
    text = "\n".join(server.log[log:])
    assert re.search(r"[0-9a-f]{12} log \\101 %s$", text, re.M)
    assert re.search(r"[0-9a-f]{12} a b: two\\x0alines$", text, re.M)


LATE = [(b"$K set /response/status 404", STARTED), (b"echo 404 | $K set /response/status", STARTED),
        (b"$K set /response/headers/X y", STARTED), (b"$K set /response/cookies/X y", STARTED),
        (b"echo y | $K set /response/headers/X", STARTED)]


@pytest.mark.parametrize("way", ["dash", "bash", "busybox", "data"])
@pytest.mark.parametrize("mode, other, first", [
    ("body", "stream", b"head -c 70000 /dev/zero | $K set /response/body"),
    ("stream", "body", b"$K set /response/stream x"),
    ("stream", "body", b"echo x | $K set /response/stream")], ids=["body", "stream", "poured"])
def test_conflicts(server, way, mode, other, first):
    """After the head was sent, and between body and stream."""
    mode, other = mode.encode(), other.encode()
    cases = {"first": Case(first)}
    cases.update({text: refused(text, reason) for text, reason in [
        *LATE, (b"$K set /response/%b x" % other, EXCLUSIVE),
        (b"echo x | $K set /response/%b" % other, EXCLUSIVE)]})
    if WAYS[way][3]:        # else the server waits, for two seconds, whether the client has heard it
        cases["yes"] = refused(b"yes | $K set /response/%b" % other, EXCLUSIVE)
    cases["more"] = Case(b"echo end | $K set /response/%b" % mode)
    reply = Run(server, way, cases).ask()
    assert reply.status == 200 and reply.body.endswith(b"end\n")


BODY = bytes(range(256)) * 250                  # 64,000
BODIES = {
    "form": (b"a=1&b=%20+x&a=2&n%0al%25=\xff&e=", FORM, {
        "form/a": b"1", "form/a/1": b"2", "form/b": b"  x", "form/n%0Al%25": b"\xff", "form/e": b"",
        "form": b"a\nb\nn%0Al%25\ne\n", "form/a/2": MISSING, "files": b"",
        "body": b"a=1&b=%20+x&a=2&n%0al%25=\xff&e="}, 0),
    "multipart": (MULTIPART_BODY, MULTIPART, {
        "form/t": b"text", "form/t/1": b"again", "form": b"t\n", "files": b"f\ne\n",
        "files/f/filename": b"a.txt", "files/f/content": b"one\r\ntwo", "files/f/0/content": b"one\r\ntwo",
        "files/f/1/filename": b"b.bin", "files/f/1/content": b"\0\xff", "files/e/filename": b"",
        "files/e/content": b"", "form/f": MISSING, "files/t/content": MISSING, "body": MULTIPART_BODY}, 0),
    "64k": (BODY, {}, {"body": BODY, "form": b"", "files": b""}, 0),
    "300k": (BODY * 5, {}, {"body": BODY * 5, "form": b""}, range(2)),
    "large": (BODY * 15, {}, {"body": BODY * 15}, range(2)),
    "too large": (BODY * 17, {}, {"body": BODY * 17}, 1),
    "long form": (b"a=1&b=" + b"x" * 70000, FORM, {"form/a": b"1", "form/b": b"x" * 70000}, 1),
    "form parsed apart": (b"a=1&b=" + b"x" * 3000, FORM, {
        "form/a": b"1", "form/b": b"x" * 3000, "form": b"a\nb\n", "form/c": MISSING, "files": b""}, 0),
    "form over a limit": (b"a&" * 10001, FORM, {"form/a": LARGE, "files": LARGE, "body": b"a&" * 10001}, 0),
    "broken": (b"no boundary", {"Content-Type": "multipart/form-data"}, {
        "form": BAD, "files/f/content": BAD, "body": b"no boundary"}, 0),
    "chunked": ([b"one", BODY, b"two"], {}, {"body": b"one" + BODY + b"two"}, range(2)),
    "chunked form": ([b"a=", b"1&b", b"=2"], FORM, {"form/b": b"2", "form": b"a\nb\n"}, range(2)),
}


@pytest.mark.parametrize("way", ["dash", "script", "data"])
@pytest.mark.parametrize("kind", BODIES)
def test_request_body(server, way, kind):
    """Bodies of all kinds; when it is here a body that fits is read over the channel, twice."""
    body, headers, values, clients = BODIES[kind]
    # The first reader may find that the body is still coming.
    cases = {"first": Case(b"$K get /request/body | wc -c", b"%d\n" % sum(map(len, body))
                           if isinstance(body, list) else b"%d\n" % len(body), clients=range(2))}
    for path, value in itertools.chain(values.items(), [("body", values.get("body"))]):
        if value is None:
            continue
        name, path = f"{len(cases)} {path}", b"/request/" + path.encode()
        cases[name] = (get(path, value)._replace(clients=clients) if isinstance(value, bytes)
                       else refused(b"$K get " + path, value, clients))
    Run(server, way, cases).ask("POST", body=iter(body) if isinstance(body, list) else body,
                                headers=headers)


@pytest.mark.parametrize("way", ["dash", "bash", "busybox", "script", "data"])
@pytest.mark.parametrize("expect", [b"", b"Expect: 100-continue\r\n"], ids=["", "expect"])
def test_body_under_way(server, way, expect):
    """A reader gets what there is of a body that is still coming, and waits for the rest."""
    run = Run(server, way, {
        "lines": Case(b"$K get /request/body | while read x; do echo \"got $x\" | $K set "
                      b"/response/stream; done", clients=range(1, 4)),
        "again": Case(b"$K get /request/body", b"one\ntwo\n")})
    path = server.route(method="POST", **run.more)
    with server.connect() as sock:
        sock.sendall(f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: 8\r\nConnection: close\r\n"
                     .encode() + expect + b"\r\n")
        if expect:
            read_until(sock, b"100 Continue\r\n\r\n")
        sock.sendall(b"one\n")
        assert read_until(sock, b"got one\n")
        sock.sendall(b"two\n")
        assert read_all(sock).endswith(b"0\r\n\r\n")
    if WAYS[way][3]:
        run.check()


def test_body_that_came_later(server, counter, gate):
    """What is here when it is asked for needs no client, whenever it came."""
    go = gate()
    path = server.route(f"{counter.export}kapow set /response/stream begun; read x <{go.path}; "
                        "kapow get /request/body | kapow set /response/stream", "POST")
    with server.connect() as sock:
        sock.sendall(f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: 8\r\n"
                     "Connection: close\r\n\r\n".encode())
        data = read_until(sock, b"begun")
        sock.sendall(b"one\ntwo\n")
        go.open()
        assert unchunk(data + read_all(sock)) == b"begunone\ntwo\n"
    assert counter.clients == 0


@pytest.mark.parametrize("way", ["dash", "data"])
def test_body_cut_short(server, way):
    """A body that ends short is a failure for its reader, not an end."""
    out = server.directory / uuid.uuid4().hex
    path = server.route(f"trap '' TERM; echo >{out}.ready; {WAYS[way][2]} get /request/body >/dev/null; "
                        f"echo $? >{out}.new; mv {out}.new {out}", "POST")
    with server.connect() as sock:
        sock.sendall(f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\nhalf".encode())
        wait_until(pathlib.Path(f"{out}.ready").exists, "the program")
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock).startswith(b"HTTP/1.1 400 ")
    wait_until(out.exists, "the reader's end")
    assert out.read_text() == "1\n"


# ---------------------------------------------------------------------------
# Callers
# ---------------------------------------------------------------------------

PYTHON = """
import subprocess
value = subprocess.run(["kapow", "get", "/request/params/a"], check=True, capture_output=True, close_fds=CLOSE)
subprocess.run(["kapow", "set", "/response/body"], check=True, input=value.stdout, close_fds=CLOSE)
subprocess.run(["kapow", "set", "/response/body", "\\nB\\n"], check=True, close_fds=CLOSE)
"""
PERL = "my $v = `kapow get /request/params/a`; open(my $p, '|-', 'kapow', 'set', '/response/body') or die; " \
       "print $p $v; close $p or die; system('kapow', 'set', '/response/body', \"\\nB\\n\") == 0 or die"

# id: (entrypoint or None, command, body, clients). The query is ?a=A+%25&long=bbb...
CALLERS = {
    "python": (f"{sys.executable} -c", PYTHON.replace("CLOSE", "True"), b"A %\nB\n", 0),
    "python-inherit": (f"{sys.executable} -c", PYTHON.replace("CLOSE", "False"), b"A %\nB\n", 0),
    "perl": ("perl -e", PERL, b"A %\nB\n", 0),
    "subshell": (None, "(kapow get /request/params/a | (kapow set /response/body)); "
                 "( (kapow set /response/body x) )", b"A %x", 0),
    "stages": (None, "kapow get /request/params/a | tr A B | kapow set /response/body", b"B %", 0),
    "long": (None, "kapow get /request/params/long | tr b c | kapow set /response/body", b"c" * 5000, 0),
    "substitution": (None, 'kapow set /response/body "$(kapow get /request/params/a)"', b"A %", 0),
    "nested": (None, "kapow set /response/body \"$(sh -c 'kapow get /request/params/a')\"", b"A %", 0),
    "xargs": (None, "printf '%s\\n' 1 2 3 | xargs -n 1 kapow set /response/body", b"123", 0),
    "find": (None, "find / -maxdepth 0 -exec kapow set /response/body {} +", b"/", 0),
    "exec": (None, "exec kapow set /response/body x", b"x", 0),
    "env": (None, "env kapow set /response/body x; command kapowctl set /response/body y", b"xy", 0),
    "older": (None, "request /params/a | response /body; response body z", b"A %z", 0),
    "kapowctl": (None, "kapowctl get /request/params/a | kapowctl set /response/body", b"A %", 0),
    "heredoc": (None, "kapow set /response/body <<E\nline\n$(kapow get /request/params/a)\nE\n",
                b"line\nA %\n", 0),
    "eu": (None, "set -eu; kapow get /request/params/a | kapow set /response/body; "
           "kapow get /request/params/none || kapow set /response/body x; "
           "kapow get /request/params/none; kapow set /response/body never", b"A %x", 0),
    "x": (None, "set -x; kapow get /request/params/a | kapow set /response/body; "
          "kapow set /response/body y", b"A %y", 0),
    "a": (None, "set -a; kapow get /request/params/a | kapow set /response/body; env true && "
          "kapow set /response/body y", b"A %y", 0),
    "C": (None, "set -C; kapow get /request/params/a | kapow set /response/body; "
          "kapow set /response/body y; kapow get /request/params/long | wc -c "
          "| kapow set /response/body", b"A %y5000\n", 0),
    "f": (None, "set -f; kapow get /request/params/a | kapow set /response/body; "
          "kapow set /response/body y", b"A %y", range(4)),
    "u": (None, "set -u; kapow set /response/body \"$(kapow get /request/params/a)\"; "
          "kapowctl; kapow set /response/body y", b"A %y", 0),
    "exit-trap": (None, "trap 'kapow set /response/body bye' EXIT; kapow set /response/body x", b"xbye", 0),
    "job": (None, "kapow set /response/body x & wait $!; kapow set /response/body $?", b"x0", 0),
    "dot": (f"{sys.executable} -c", "import subprocess; subprocess.run(['dash', '-c', '"
            '. "$(dirname "$(command -v kapow)")/kapow.sh"; kapow get /request/params/a '
            "| kapow set /response/body'], close_fds=False)", b"A %", 0),
    "fd9": (None, "exec 9<&1; echo x | kapow set /response/body; [ -c /dev/fd/9 ] && "
            "kapow set /response/body y", b"x\ny", 0),
    "fds": (None, "for n in 3 4 5 6 7 8 9; do eval \"exec $n>/tmp/none-$$\"; done; rm /tmp/none-$$; "
            "kapow get /request/params/a | kapow set /response/body; cat <&9 | wc -c "
            "| kapow set /response/body", b"A %0\n", 0),
    "close": (f"{sys.executable} -c", "import os; os.closerange(3, 1000); os.execvp('sh', ['sh', '-c', "
              "'kapow get /request/params/a | kapow set /response/body'])", b"A %", 0),
    "chdir": (None, "cd /; kapow get /request/params/a | kapow set /response/body", b"A %", 0),
    "stdin-closed": (None, "kapow set /response/body x <&-; kapow get /request/params/a <&- "
                     "| kapow set /response/body", b"xA %", 0),
    "own-names": (None, "slot=1 answer=2 rest=3; kapow set /response/body x; "
                  "kapow set /response/body $slot$answer$rest", b"x123", 0),
}


@pytest.mark.parametrize("name", CALLERS)
def test_caller(server, counter, name):
    """Whoever calls, however."""
    entrypoint, command, body, clients = CALLERS[name]
    if entrypoint and not shutil.which(entrypoint.split()[0]):
        pytest.skip(f"{entrypoint.split()[0]} is not here")
    if entrypoint is None:
        for shell in SHELLS.values():
            check_caller(server, shell, counter.export + command, body)
    else:
        check_caller(server, f"env {counter.export.split()[1]} {entrypoint}", command, body)
    assert counter.clients in (clients if isinstance(clients, range) else [clients])


def check_caller(server, entrypoint, command, body):
    reply = server.get(server.route(command, entrypoint=entrypoint, timeout=10)
                       + "?a=A+%25&long=" + "b" * 5000)
    assert (reply.status, reply.body) == (200, body), entrypoint


@pytest.mark.skipif("bash" not in SHELLS, reason="bash is not here")
@pytest.mark.parametrize("command", [
    "kapow set /response/body < <(kapow get /request/params/a)",
    "kapow get /request/params/a > >(kapow set /response/body); wait $!",
    "kapow set /response/body <<< $(kapow get /request/params/a)",
    "set -euo pipefail; kapow get /request/params/a | kapow set /response/body",
    "shopt -s lastpipe; kapow get /request/params/a | read x; kapow set /response/body \"$x\"",
    "coproc kapow get /request/params/a; kapow set /response/body <&${COPROC[0]}",
    "export -f $(declare -F | cut -d' ' -f3); bash -c 'kapow get /request/params/a | kapow set /response/body'",
    "shopt -s failglob nocasematch; IFS=/; kapow get /request/params/a | kapow set /response/body",
], ids=["in", "out", "string", "pipefail", "lastpipe", "coproc", "export", "shopt"])
def test_bash(server, counter, command):
    reply = server.get(server.route(counter.export + command, entrypoint="bash -c", timeout=10) + "?a=A")
    assert (reply.status, reply.body.rstrip(b"\n"), counter.clients) == (200, b"A", 0)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("separators", ["/", "", "0", "1", "k", "=", "' '", '"$(printf "\\nx")"'],
                         ids=["slash", "none", "0", "1", "k", "equals", "space", "newline"])
def test_changed_ifs(server, counter, shell, separators):
    """And nothing is said on standard error."""
    err = server.directory / uuid.uuid4().hex
    command = (f"{counter.export}exec 2>{err}; IFS={separators}\nkapow set /response/body 1234567890123\n"
               "kapow get /request/params/a | kapow set /response/body\n"
               f"kapow set /response/body \"$(head -c 1100 /dev/zero | tr '\\0' x)\"\n")
    reply = server.get(server.route(command, entrypoint=SHELLS[shell], timeout=10) + "?a=A0k1=/+x")
    assert (reply.body, err.read_text(), counter.clients) == (
        b"1234567890123A0k1=/ x" + b"x" * 1100, "", 0)


@pytest.mark.parametrize("name", ["printf", "echo", "head", "cat", "read", "test"])
def test_functions_of_the_same_name(server, name):
    """A command may have functions of its own, say head() for the top of a page."""
    path = server.route(f"{name}() {{ command true; }}\nkapow get /request/params/a > {server.directory}/own\n"
                        "kapow set /response/body x\nkapow get /request/params/long | wc -c >&2\n"
                        "kapow set /response/body < /proc/self/comm", entrypoint="bash -c", timeout=3)
    reply = server.get(path + "?a=A&long=" + "b" * 5000)
    assert (reply.status, reply.body[:1], (server.directory / "own").read_bytes()) == (200, b"x", b"A")
    server.wait_log("^5000$")


@pytest.mark.parametrize("shell", SHELLS)
def test_path_without_programs(server, shell):
    """A command may change its PATH."""
    path = server.route("P=$PATH; PATH=/none; kapow get /request/params/long >$TMPDIR/../none; s=$?; "
                        "PATH=$P; kapow set /response/body $s; wc -c <$TMPDIR/../none | kapow set /response/body",
                        entrypoint=SHELLS[shell], timeout=5)
    assert server.get(path + "?long=" + "b" * 5000).body.split() == [b"05000"]


def test_streams_that_cannot_be_written(server):
    """What is said and returned is the same both ways."""
    found = {}
    for way in ("dash", "bash", "busybox", "script", "data"):
        entrypoint, _, words, _ = WAYS[way]
        out = server.directory / uuid.uuid4().hex
        text = "".join(f"{words} get /request/params/{name} {to} 2>>{out}; echo {name} $? >>{out}\n"
                       for name in ("a", "long") for to in (">/dev/full", ">&-"))
        server.get(server.route(text, entrypoint=entrypoint) + "?a=A&long=" + "b" * 5000)
        found[way] = [re.sub(r"^.*: ", "", line).lower() for line in out.read_text().splitlines()]
    # The words differ with the shell, not the number of lines nor the status.
    shapes = {way: [line if line.startswith(("a ", "long ")) else "..." for line in lines]
              for way, lines in found.items()}
    assert set(map(str, shapes.values())) == {str(shapes["data"])}, found


@pytest.mark.parametrize("shell", SHELLS)
def test_many_at_once(server, shell):
    """More calls than there are slots: each has its own answer, and those after them are fast."""
    directory = server.directory / uuid.uuid4().hex
    directory.mkdir()
    params = {f"p{number}": f"{number}" * (1 if number % 2 else 3000) for number in range(12)}
    calls = "\n".join(f"kapow get /request/headers/{name} >{name} || echo bad >>wrong &\n"
                      f"kapow set /response/headers/X-{name} {name} || echo bad >>wrong &\n"
                      f"echo {name} | kapow set /response/body || echo bad >>wrong &"
                      for name in params)
    path = server.route(f"cd {directory}\n{calls}\nwait", "GET", entrypoint=SHELLS[shell], timeout=20)
    reply = server.get(path, **params)
    assert reply.status == 200 and not (directory / "wrong").exists()
    assert {name: (directory / name).read_text() for name in params} == params
    assert sorted(reply.body.decode().split()) == sorted(params)
    assert sorted(value for name, value in reply.headers.items() if name.startswith("X-p")) == sorted(params)


@pytest.mark.parametrize("shell", SHELLS)
def test_slots_survive(server, counter, shell):
    """Calls at the same time do not wear the channel out."""
    command = ("i=0; while [ $i -lt 100 ]; do i=$((i+1)); kapow get /request/params/a >/dev/null & "
               "kapow get /request/params/a | kapow set /response/body; wait; done\n"
               f"{counter.export}kapow get /request/params/a | kapow set /response/body")
    reply = server.get(server.route(command, entrypoint=SHELLS[shell], timeout=20) + "?a=A")
    assert (reply.body, counter.clients) == (b"A" * 101, 0)


@pytest.mark.parametrize("shell", SHELLS)
def test_reader_that_stops(server, counter, shell):
    """Of a long value only the beginning is wanted; the next handler has a whole channel again."""
    command = ("for i in 1 2 3; do kapow get /request/body | head -c 1 >/dev/null; done\n"
               f"{counter.export}kapow get /request/params/a | kapow set /response/body")
    path = server.route(command, "POST", entrypoint=SHELLS[shell], timeout=5)
    reply = server.request("POST", path + "?a=A", b"x" * 500_000)
    assert reply.body == b"A"
    started = counter.clients
    path = server.route(f"{counter.export}kapow get /request/params/a | kapow set /response/body")
    assert (server.get(path + "?a=A").body, counter.clients) == (b"A", started)


@pytest.mark.parametrize("shell", [shell for shell in SHELLS if shell != "busybox"])
def test_trap_that_calls(server, shell):
    """A trap that fires within a call and calls itself disturbs neither.

    The next signal comes when the last one was dealt with: on a slow machine they would
    otherwise leave the shell no time for anything else.
    In BusyBox 1.35, on a busy machine, it sometimes does: kapow(7) says so.
    """
    directory = server.directory / uuid.uuid4().hex
    directory.mkdir()
    (directory / "A").write_text("A")
    (directory / "TTT").write_text("TTT")
    command = f"""cd {directory}; 
        trap 'kapow get /request/params/t >t; cmp t TTT >>wrong; : >done' USR1
        ( while kill -USR1 $$ 2>/dev/null; do
            until rm done 2>/dev/null; do sleep 0.001; kill -0 $$ || exit; done; sleep 0.01
        done ) & killer=$!
        i=0; while [ $i -lt 25 ]; do i=$((i+1))
        kapow get /request/params/a >a || echo "get $?" >>wrong
        cmp a A >>wrong
        kapow set /response/headers/X $i 2>>wrong || echo "set $?" >>wrong
        done; trap '' USR1; kill $killer"""
    reply = server.get(server.route(command, entrypoint=SHELLS[shell], timeout=20) + "?a=A&t=TTT")
    wrong = (directory / "wrong").read_text() if (directory / "wrong").exists() else ""
    assert wrong == ""
    assert reply.headers.get_all("X") == [str(number) for number in range(1, 26)]


@pytest.mark.parametrize("shell", SHELLS)
def test_traps_within_a_pour(server, counter, shell):
    """However many signals the caller takes while it waits, its value comes whole and in order."""
    command = (f"{counter.export}trap : USR1\n"
               "{ i=0; while [ $i -lt 40 ]; do i=$((i+1)); echo $i; kill -USR1 $$; "
               "read x < /proc/self/stat; sleep 0.01; done; } >$FIFO & kapow set /response/body <$FIFO")
    fifo = server.directory / uuid.uuid4().hex
    os.mkfifo(fifo)
    reply = server.get(server.route(f"FIFO={fifo}\n{command}", entrypoint=SHELLS[shell], timeout=20))
    assert (reply.body.split(), counter.clients) == ([b"%d" % number for number in range(1, 41)], 0)


def python_for_all():
    """Return an interpreter that another user can run too, None where there is none."""
    for python in (sys.executable, "/usr/bin/python3"):
        if shutil.which("setpriv") and os.geteuid() == 0 and subprocess.run(
                ["setpriv", "--reuid", "65534", "--clear-groups", "sh", "-c", f"{python} -c ''"],
                capture_output=True).returncode == 0:
            return python
    return None


@pytest.mark.parametrize("shell", SHELLS)
def test_another_user(server, shell):
    """A program that has changed its user may not open the pipes, and does without."""
    python = python_for_all()
    if python is None:
        pytest.skip("no way to be another user")
    with tempfile.TemporaryDirectory() as directory:
        copy = pathlib.Path(directory, "kapow.sh")
        client = shutil.copy(KAPOWCTL, directory)
        copy.write_text(re.sub(r"\S+ -I -S \S+", f"{python} {client}", library(server).read_text()))
        for path in (pathlib.Path(directory), copy, pathlib.Path(client)):
            path.chmod(0o755)
        command = (f"cd /; setpriv --reuid 65534 --clear-groups {SHELLS[shell]} '. {copy}; exec 2>&1; "
                   "x=$(id -u); kapow set /response/body $x; kapow get /request/params/a "
                   "| kapow set /response/body; kapow get /request/params/b 2>&1 | kapow set /response/body; "
                   "kapow set -- /response/body -x; kapow set /response/body "
                   "\"$(printf \"a\\nb\")\"'")
        reply = server.get(server.route(command, timeout=10) + "?a=A")
    assert reply.body.decode() == f"65534Akapowctl: /request/params/b: {MISSING}\n-xa\nb"


# ---------------------------------------------------------------------------
# Order, streams and ends
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("first, second", [("dash", "dash"), ("bash", "bash"), ("dash", "data"), ("data", "dash"),
                                           ("script", "busybox")])
def test_order_of_begin(server, gate, first, second):
    """A write that began first is first, whole, and a later one does not wait for it."""
    begun, done = gate(), gate()
    entrypoint = SHELLS.get(second if second in SHELLS else first, "/bin/sh -c")
    command = (f"{{ echo a1; read x <{done.path}; head -c 200000 /dev/zero; echo a2; }} "
               f"| {WAYS[first][2]} set /response/stream &\nread x <{begun.path}\n"
               f"head -c 200000 /dev/zero | tr '\\0' b | {WAYS[second][2]} set /response/stream\n"
               f"{WAYS[second][2]} set /response/stream c\necho >{done.path}; wait")
    path = server.route(command, entrypoint=entrypoint, timeout=20)
    with server.connect() as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
        data = read_until(sock, b"a1\n")
        begun.open()
        body = unchunk(data + read_all(sock))
    assert body == b"a1\n" + bytes(200000) + b"a2\n" + b"b" * 200000 + b"c"


def unchunk(response):
    """Return the body of the bytes of a chunked response; it must be whole."""
    rest, body = response.partition(b"\r\n\r\n")[2], b""
    while True:
        length, _, rest = rest.partition(b"\r\n")
        assert length
        body += rest[:int(length, 16)]
        if not int(length, 16):
            return body
        rest = rest[int(length, 16) + 2:]


@pytest.mark.parametrize("shell", SHELLS)
def test_stream_arrives_at_once(server, counter, gate, shell):
    """While the program runs, and while a pour is in its middle."""
    steps = [gate() for _ in range(3)]
    first, second, third = (step.path for step in steps)
    path = server.route(f"{counter.export}kapow set /response/stream one; read x <{first}; "
                        f"{{ echo two; read x <{second}; echo three; }} | kapow set /response/stream; "
                        f"read x <{third}", entrypoint=SHELLS[shell], timeout=20)
    with server.connect() as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
        for step, words in zip(steps, (b"one", b"two\n", b"three\n")):
            assert read_until(sock, words)
            step.open()
        assert read_all(sock).endswith(b"0\r\n\r\n")
    assert counter.clients == 0


def test_slow_client_slows_the_program(server, counter):
    """And what the server keeps for it is bounded, in memory and on disk."""
    path = server.route(f"{counter.export}exec yes 0123456789 | kapow set /response/stream")
    before = memory(server)
    with server.connect() as sock:
        # Else the system may make it as large as 32 MiB while it is read.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        assert sock.recv(1000)
        [writer] = wait_until(lambda: named(server, "yes"), "yes")
        written = still(lambda: bytes_written(writer))
        assert written < 30_000_000             # what sockets hold is the system's affair
        received = 0
        while received < written + 10_000_000:
            received += len(sock.recv(1 << 20))
        assert still(lambda: bytes_written(writer)) - received < 30_000_000
        assert memory(server) - before < 20_000_000
        assert not any("(deleted)" in os.readlink(link) for link in open_files(server))
    assert counter.clients == 0


def named(server, name):
    """Return the pids of the server's children that run the program `name`."""
    return [pid for pid in server.children()
            if pathlib.Path("/proc", str(pid), "comm").read_text().strip() == name]


def bytes_written(pid):
    """Return the number of bytes that a process has written."""
    return int(re.search(r"wchar: (\d+)", pathlib.Path("/proc", str(pid), "io").read_text()).group(1))


def still(look):
    """Wait until `look()` comes to a stand, and return its value."""
    seen = collections.deque(maxlen=15)

    def settled():
        seen.append(look())
        return len(seen) == 15 and len(set(seen)) == 1
    wait_until(settled, "a stand")
    return seen[0]


def memory(server):
    """Return the bytes of memory that the server holds."""
    status = pathlib.Path("/proc", str(server.process.pid), "status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status).group(1)) * 1024


def open_files(server):
    return list(pathlib.Path("/proc", str(server.process.pid), "fd").iterdir())


def test_background_write_holds_the_response(server, counter, gate):
    """One that is in its middle when the program exits is waited for."""
    value, go = gate(), gate()
    path = server.route(f"{counter.export}kapow set /response/stream <{value.path} & read x <{go.path}")
    with server.connect() as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
        value.open(b"begun\n")
        data = read_until(sock, b"begun\n")
        go.open()
        [_] = wait_until(lambda: len(server.children()) == 1 and server.children(), "the exit")
        value.open(b"last\n")
        data += read_until(sock, b"last\n")
        value.close()
        assert unchunk(data + read_all(sock)) == b"begun\nlast\n"
    assert counter.clients == 0


@pytest.mark.parametrize("shell", SHELLS)
def test_after_the_end(server, gate, shell):
    """A background job that calls when its handler has ended is told so, each time, and no more."""
    go, out = gate(), server.directory / uuid.uuid4().hex
    out.mkdir()
    calls = ["kapow get /request/method", "kapow set /response/body late", "kapow set /server/log late",
             "echo late | kapow set /response/body", "env kapow get /request/method",
             "kapow set /response/body < /proc/version"]
    text = "".join(f"{call} >{number} 2>&1; echo $? >>{number}\n" for number, call in enumerate(calls))
    path = server.route(f"cd {out}\n( read x <{go.path}\n{text} echo >end ) &\nkapow set /response/body x",
                        entrypoint=SHELLS[shell])
    assert server.get(path).body == b"x"
    go.open()
    wait_until((out / "end").exists, "the end of the job")
    assert {call: (out / f"{number}").read_text() for number, call in enumerate(calls)} == {
        call: f"kapowctl: {resource_of(call.encode(), 'kapow')}: {NO_HANDLER}\n1\n" for call in calls}


@pytest.mark.parametrize("how", ["timeout", "kill", "KILL", "background"])
def test_killed_pour(server, counter, gate, how):
    """A caller that dies in the middle ends its write, and those that come after it go on."""
    value, go = gate(), gate()
    pour = f"kapow set /response/stream <{value.path}"
    text = {"timeout": f"timeout 0.2 {pour}; [ $? = 124 ]",
            "kill": f"{pour} & read x <{go.path}; kill $!; wait $!; [ $? = 143 ]",
            "KILL": f"env {pour} & read x <{go.path}; kill -KILL $!; wait $!; [ $? = 137 ]",
            "background": f"cat {value.path} | kapow set /response/stream & read x <{go.path}; kill $!"}[how]
    path = server.route(f"{counter.export}{text} && kapow set /response/stream two; "
                        "echo three | kapow set /response/stream", timeout=20)
    with server.connect() as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
        value.open(b"one\n")
        data = read_until(sock, b"one\n")
        go.open()
        data += read_until(sock, b"three\n")
        value.close()
        assert unchunk(data + read_all(sock)) == b"one\ntwothree\n"
    # A write that comes before the death is seen is made over the data interface.
    assert counter.clients <= 1


@pytest.mark.parametrize("command", [
    "yes | kapow set /response/stream", "while :; do kapow set /response/stream x; done",
    "kapow set /response/stream x; kapow set /response/stream <$FIFO",
    "kapow set /response/stream x; sleep 1000 | kapow set /response/stream",
    "kapow set /response/stream x; yes 200 | kapow set /response/status; sleep 1000",
], ids=["yes", "loop", "fifo", "sleep", "status"])
def test_lost_client(server, gate, command):
    """Ends all that its handler runs, whatever call that is in."""
    path = server.route(f"FIFO={gate().path}; {command}")
    with server.connect() as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        assert sock.recv(1000)
    wait_until(lambda: not server.children(), "the end of the group")


def test_pour_that_got_away(server, gate):
    """One whose process left the group is told when the handler has ended."""
    value, out = gate(), server.directory / uuid.uuid4().hex
    path = server.route(f"setsid sh -c 'kapow set /response/stream <{value.path} 2>{out}.new; echo $? >>{out}.new; "
                        f"mv {out}.new {out}' & sleep 1000")
    with server.connect() as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        value.open(b"one\n")
        assert read_until(sock, b"one\n")
    server.wait_access(rf'"GET {path} HTTP/1.1" 200 ')
    value.close()
    wait_until(out.exists, "the end of the pour")
    said = out.read_text()          # by the client: it is in a session of its own
    assert said.startswith("kapowctl: ") and said.endswith(": the handler has ended\n1\n")


@pytest.mark.parametrize("command, answer", [
    ("kapow set /response/body <$FIFO", b"HTTP/1.1 504 "),
    ("yes | kapow set /response/stream", b"HTTP/1.1 200 "),
    ("kapow set /response/stream x; kapow set /response/status <$FIFO", b"HTTP/1.1 200 "),
    ("trap '' TERM; kapow get /request/method; kapow set /response/body <$FIFO", b"HTTP/1.1 504 "),
], ids=["body", "yes", "status", "trap"])
def test_timeout(server, gate, command, answer):
    fifo = gate()
    path = server.route(f"FIFO={fifo.path}; {command}", timeout=0.3)
    data = server.raw(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
    assert data.startswith(answer) and not data.endswith(b"0\r\n\r\n")
    fifo.close()
    wait_until(lambda: not server.children(), "the end of the group")


def test_stop_lets_handlers_call(start_server):
    """Over the channel as before, to the end of their time."""
    server = start_server()
    count_clients(server)
    counter, go = Counter(server), Gate(server.directory)
    path = server.route(f"{counter.export}kapow set /response/stream begun; read x <{go.path}; "
                        "kapow get /request/method | kapow set /response/stream")
    with server.connect() as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        data = read_until(sock, b"begun")
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: refuses(server), "the end of accepting")
        go.open()
        assert unchunk(data + read_all(sock)) == b"begunGET"
    assert server.process.wait(DEADLINE) == 0
    go.close()
    assert counter.clients == 0


def test_stop_ends_pours(start_server):
    server = start_server("--grace", "0.2")
    gates = [Gate(server.directory) for _ in range(2)]
    path = server.route(f"kapow set /response/stream <{gates[0].path} & kapow set /response/status <{gates[1].path}")
    with server.connect() as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        gates[0].open(b"one\n")
        assert read_until(sock, b"one\n")
        assert server.stop() == 0
        assert not read_all(sock).endswith(b"0\r\n\r\n")
    for made in gates:
        made.close()


# ---------------------------------------------------------------------------
# Abuse
# ---------------------------------------------------------------------------

# Python programs; `calls` is the pipe for calls open for writing, `slots` and `answers` the paths
# of the others, PID is of the program, ready() is to be called when all is done.
ABUSE_START = r"""
import os, subprocess, sys, time
files, *numbers, handler_id, url = os.environ["KAPOW_CHANNEL"].split()
calls, *pipes = [f"{files}/{number}" for number in numbers]
slots, answers, calls = pipes[::2], pipes[1::2], os.open(calls, os.O_WRONLY)
PID = b"%d" % os.getpid()
def write(data):
    while data:
        data = data[os.write(calls, data[:4096]):]
def call(verb, path, value=b"", slot=numbers[2], handler_id=handler_id):
    number = b"%b.1" % handler_id[:8].encode()
    return b"\0%b %b %b %b\0%b\0%b\0\n" % (handler_id.encode(), slot.encode(), number, verb, path, value)
def pour(path, source, times=1):
    os.dup2(source, 9)
    write(call(b"pour", path, PID) * times)
def ready():
    open(READY + ".new", "w").close(); os.rename(READY + ".new", READY)
"""
GET = r"call(b'get', b'/request/method')"
ABUSES = {
    "junk": "write(os.urandom(1000000)); write(b'x' * 1000000)",
    "nul": "write(bytes(300000)); write(b'\\0get\\0' * 50000)",
    "partial": f"write({GET}[:-5])",
    "partials": "write(call(b'set', b'/response/body', b'x' * 500000))",
    "verbs": "write((call(b'pour', b'/request/method', b'x') + call(b'put', b'/x') + call(b'get', b'x')) * 1000)",
    "others": "write(b''.join(call(b'get', b'/request/method', b'', str(slot)) for slot in range(200)))",
    "dead": "write(call(b'get', b'/request/method', b'', numbers[2], handler_id[::-1]))",
    "unread": f"write({GET} * 30000)",
    "unread-long": "write(call(b'get', b'/request/params/long') * 3000)",
    "unread-set": "write(call(b'set', b'/response/body', b'x') * 30000)",
    "pids": "write(b''.join(call(b'pour', b'/response/body', pid) for pid in (b'0', b'1', b'-1', b'', b'self', "
            "b'9' * 300, b'../1', b'1/task/1', b'%d' % os.getppid(), PID) for _ in range(100)))",
    "own-answers": "pour(b'/response/body', os.open(answers[0], os.O_RDONLY)); "
                   "write(call(b'get', b'/request/params/long', b'', numbers[4]) * 100)",
    "pours": "pour(b'/response/body', os.pipe()[0], 300)",
    "log-pours": "pour(b'/server/log', os.pipe()[0], 300)",
    "slots": "open(slots[0], 'wb', 0).write(b'\\n' * 5000); "
             "subprocess.run(['kapow', 'get', '/request/method'])",
    "slot-flood": "slot = os.open(slots[1], os.O_WRONLY | os.O_NONBLOCK)\n"
                  "try:\n    while True: os.write(slot, b'1\\n' * 2000)\nexcept BlockingIOError: pass",
}


@pytest.fixture
def abuser(server):
    """A function that asks for an abuser's route on a socket and returns when it has done its worst."""
    with contextlib.ExitStack() as stack:
        def start(code, server=server, wait="time.sleep(1000)"):
            ready = server.directory / uuid.uuid4().hex
            path = server.route(f"READY = {str(ready)!r}\n{ABUSE_START}\n{code}\nready()\n{wait}",
                                entrypoint=f"{sys.executable} -c")
            sock = stack.enter_context(server.connect())
            sock.sendall(f"GET {path}?long={'b' * 5000} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
            wait_until(ready.exists, "the abuse")
            return sock
        yield start


@pytest.mark.parametrize("name", ABUSES)
def test_abuse(server, counter, abuser, name):
    """Harms nobody else, neither while the abuser lives nor afterwards."""
    path = server.route(f"{counter.export}kapow get /request/params/a | kapow set /response/body")
    sock = abuser(ABUSES[name])
    assert server.get(path + "?a=A").body == b"A"
    sock.close()
    wait_until(lambda: not server.children(), "the abuser's end")
    assert (server.get(path + "?a=A").body, counter.clients) == (b"A", 0)


@pytest.mark.parametrize("name", ["partial", "unread-long", "pours", "log-pours", "own-answers"])
def test_abuser_that_exits(server, abuser, name):
    """Its handler ends, whatever it left behind."""
    sock = abuser(ABUSES[name], wait="")
    assert read_until(sock, b"HTTP/1.1 200 ")


def test_abuse_while_it_goes_on(server, counter, abuser):
    """A flood that does not end leaves time for others."""
    path = server.route(f"{counter.export}kapow get /request/params/a | kapow set /response/body")
    sockets = [abuser("", wait=f"while True: write({GET} * 100)"),
               abuser("", wait="while True: write(call(b'set', b'/response/headers/X', b'y') * 100)"),
               abuser("", wait="while True: write(b'junk' * 1000)")]
    for _ in range(8):
        assert server.get(path + "?a=A").body == b"A"
    for sock in sockets:
        sock.close()
    wait_until(lambda: not server.children(), "the abusers' end")
    assert counter.clients == 0


def test_pours_that_take_all_files(start_server, tmp_path, abuser):
    """A handler that has more pours opened than it has slots does not take the files of others."""
    starter = write_starter(tmp_path / "few.py", "resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))")
    server = start_server(script=starter)
    path = server.route("kapow get /request/params/a | kapow set /response/body", timeout=5)
    sock = abuser(ABUSES["pours"], server)
    assert server.get(path + "?a=A").body == b"A"
    sock.close()


def test_programs_inherit_nothing(server):
    path = server.route("ls /proc/self/fd | kapow set /response/body")
    assert server.get(path).body.split() == [b"0", b"1", b"2", b"3"]       # 3 is what ls reads


# ---------------------------------------------------------------------------
# The shell library
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("trouble", ["echo ${TAG?is not set}", "if TAG; done", "TAG", 'echo "TAG'],
                         ids=["unset", "syntax", "unknown", "quote"])
def test_line_numbers(server, shell, trouble):
    """What a shell says about line 3 of a command is what it says without the library."""
    directory = server.directory / uuid.uuid4().hex
    directory.mkdir()
    (directory / "quiet").write_text(f'exec "$@" 2>{directory}/said\n')
    said = []
    for first in ("kapow --version >/dev/null", "true # another"):
        server.get(server.route(f"{first}\n:\n{trouble}\n",
                                entrypoint=f"sh {directory}/quiet {SHELLS[shell]}"))
        said.append((directory / "said").read_text())
    assert said[0] == said[1] != ""


@pytest.mark.parametrize("shell", SHELLS)
def test_library_parses(server, shell):
    done = subprocess.run([*SHELLS[shell].split()[:-1], "-n", library(server)], capture_output=True,
                          text=True, timeout=DEADLINE)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not here")
def test_library_is_clean(server):
    done = subprocess.run(["shellcheck", "--shell", "dash", library(server)], capture_output=True,
                          text=True, timeout=DEADLINE)
    assert done.stdout == ""


@pytest.mark.parametrize("words, status", [
    ("get", 2), ("set", 2), ("get a b", 2), ("set a b c", 2), ("", 0), ("get:/request/method /request/path", 2),
    ("set:/response/body x", 2), ("get --help", 0), ("set --nonsense /response/body", 2)])
def test_usage(server, words, status):
    path = server.route(f"kapowctl {words}; kapow set /response/body $?")
    assert server.get(path).body == b"%d" % status


HEADS = {
    "head": "head() { command head -c 10; }",
    "cat": "cat() { echo forged; }",
    "all": "head() { :; }; cat() { :; }; tr() { :; }; sleep() { :; }; echo() { :; }; printf() { :; }",
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("shell", SHELLS)
def test_functions_of_the_program(server, shell, name):
    """A function that bears the name of a program spoils no value."""
    command = (f"{HEADS[name]}\nkapow get /request/params/long >long; kapow get /request/params/a >a\n"
               "kapow set /response/body <long; kapow set /response/body <a")
    path = server.route(command, entrypoint=SHELLS[shell])
    assert server.get(path + "?a=A&long=" + "b" * 5000).body == b"b" * 5000 + b"A"


@pytest.mark.parametrize("shell", SHELLS)
def test_head_that_reads_too_little(server, shell, counter, tmp_path):
    """What it leaves is no answer to the next call, whatever the client put there."""
    head = tmp_path / "head"
    head.write_text("#!/bin/sh\nexec dd bs=1 count=100 2>/dev/null\n")
    head.chmod(0o755)
    command = (f"PATH={tmp_path}:$PATH; kapow get /request/params/long >/dev/null; echo $?\n"
               "for i in 1 2 3 4 5; do kapow get /ssl/client/i/dn && echo forged; done\n"
               "kapow get /request/params/a")
    forged = "".join(f"%0A{letter}.{serial}:=forged%0A=forged%0A" for serial in range(1, 40)
                     for letter in ("00000000", ""))
    path = server.route(f"{{ {command}\n}} | kapow set /response/body", entrypoint=SHELLS[shell])
    lines = server.get(path + "?a=A&long=" + forged + "b" * 3000).body.decode().split("\n")
    assert lines == ["1", "A"]


@pytest.mark.parametrize("stale", ["00000000.1:=forged", "=forged", "", "forged"])
@pytest.mark.parametrize("shell", SHELLS)
def test_answer_to_another_call(server, shell, stale):
    """It is not taken, and not left for the next call either."""
    command = (f"set -- $KAPOW_CHANNEL; printf '%s\\n' '{stale}' >$1/$4\n"
               "for i in 1 2 3; do kapow get /request/params/a >>got; done; kapow set /response/body <got")
    path = server.route(f"cd $(mktemp -d {server.directory}/XXXXXX)\n{command}", entrypoint=SHELLS[shell])
    assert server.get(path + "?a=A").body == b"AAA"


@pytest.mark.parametrize("characters", [":", "=", "a", "0123456789", "", " ", ":+!#?=."])
@pytest.mark.parametrize("readonly", ["", "readonly IFS; "])
@pytest.mark.parametrize("shell", SHELLS)
def test_field_separators(server, shell, readonly, characters):
    command = (f"IFS='{characters}'; {readonly}kapow set /response/body ' =x= '\n"
               "kapow get /request/params/a | kapow set /response/body\n"
               "kapow get /request/params/none 2>/dev/null || kapow set /response/body none")
    path = server.route(command, entrypoint=SHELLS[shell])
    assert server.get(path + "?a=%20=a:b=%20%20").body == b" =x=  =a:b=  none"


# ---------------------------------------------------------------------------
# Slots, without a server
# ---------------------------------------------------------------------------


@pytest.fixture
def slot():
    made = kapow.Slot()
    yield made
    made.close()


def take(slot):
    """Take the newline, as a caller does; return whether it was there."""
    with open(f"/proc/self/fd/{slot.free}", "rb", 0) as free:
        return free.read(1) == b"\n"


def test_slot_is_taken_once(slot):
    assert (take(slot), take(slot)) == (True, False)


def test_slot_comes_back_as_new(slot):
    """Also after an answer that made its pipe larger."""
    assert take(slot) and not slot.is_clean()
    slot.make_room(500_000)
    slot.answer(b"1", b"x" * 500_000)
    assert not slot.is_clean()
    slot.renew()
    assert slot.is_clean() and take(slot)
    assert fcntl.fcntl(slot.answers, 1032) == kapow.PIPE_SIZE       # F_GETPIPE_SZ


@pytest.mark.parametrize("what", [b"", b"\n\n", b"x\n"])
def test_slot_that_was_spoilt_without_a_call(slot, what):
    """A program can write there, or read, without a call that the server sees."""
    take(slot)
    with open(f"/proc/self/fd/{slot.free}", "wb", 0) as free:
        free.write(what)
    assert not slot.is_clean()
    slot.renew()
    assert slot.is_clean()
    slot.used = True
    slot.answer(b"1", b"x")
    assert not slot.is_clean()


def test_handler_without_slots_gives_none_back():
    """There are no more to be lent than the limit says, and those are lent again."""
    watcher = kapow.Watcher("test")
    channel = kapow.Channel(watcher, kapow.HandlerTable(), 1)
    first, second = (types.SimpleNamespace(id="x", slots=()) for _ in range(2))
    assert channel.lend(first) and not channel.lend(second)
    channel.give_back(second)
    assert not channel.lend(second)
    channel.give_back(first)
    assert channel.lend(second)
    watcher.start()
    watcher.stop()
    channel.close()


def test_programs_are_kept_where_they_can_run(monkeypatch):
    """Not on a file system that is mounted with noexec, unless all are."""
    usual = tempfile.gettempdir()
    noexec = {usual}
    monkeypatch.setattr(os, "statvfs", lambda path: types.SimpleNamespace(
        f_flag=os.ST_NOEXEC if path in noexec else 0))
    assert kapow.directory_for_programs() == "/var/tmp"
    noexec |= {"/var/tmp", "/dev/shm"}
    assert kapow.directory_for_programs() == usual
