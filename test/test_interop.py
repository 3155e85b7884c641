"""What other programs send that RFC 9110, 9112 and 3875 have us understand. A case is a line."""

import contextlib
import json
import os
import pathlib
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import time
import uuid

import pytest
from hypothesis import given, settings, strategies as st

import kapow
from conftest import DEADLINE, KAPOW, Server, installed, read_all, wait_until
from services import BAD_GATEWAY, Puppet, answer, read_head, read_until, remove, say, wait_line
from test_messages import head


@pytest.fixture(scope="module")
def module_server(tmp_path_factory):
    """A server with a directory of billets, and a puppet with a route for each path below /p/."""
    directory = tmp_path_factory.mktemp("server")
    (directory / "billets").mkdir()
    server = Server(directory, "--billets", "billets")
    server.puppet = Puppet(server, "puppet").listen()
    for method in ("GET", "POST"):
        server.route(service="puppet", pattern="/p/{any:.*}", method=method)
    yield server
    assert server.control("PUT", "/routes", []).status_code == 200
    remove(server, "puppet")
    server.puppet.close()
    server.check_idle()
    assert server.stop() == 0
    server.check_gone()


@pytest.fixture
def server(module_server):
    """The module's server; after each test no request is left and no traceback was logged."""
    first = len(module_server.log)
    yield module_server
    wait_until(lambda: module_server.usage()[1] <= module_server.idle[1], "the end of all requests")
    assert not [line for line in module_server.log[first:] if "Traceback" in line]


@pytest.fixture
def puppet(server):
    """The puppet, without a connection; it says hello again after the test."""
    server.puppet.hang_up()
    server.puppet.heads.clear()
    yield server.puppet
    server.puppet.act = say(answer(b"hello"))


def launcher(server, text):
    """Write a launcher, a shell script that speaks CGI; return its path on the server."""
    name = uuid.uuid4().hex
    path = server.directory / "billets" / f"{name}.b"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return f"/{name}"


# The host of a request (RFC 9112 section 3.2.2).

@pytest.mark.parametrize("target, lines, fields", [
    ("http://target:81/x", "Host: other", [(b"Host", b"target:81")]),
    ("http://target", "X: y\nhOST: other\nZ: z", [(b"X", b"y"), (b"hOST", b"target"), (b"Z", b"z")]),
    ("HTTPS://target/?q", "Host:", [(b"Host", b"target")]),
    ("http://[::1]:81/", "Host: other", [(b"Host", b"[::1]:81")]),
    ("/x", "Host: other", [(b"Host", b"other")]),
])
def test_host_of_the_target(target, lines, fields):
    parsed = head(f"{target}\n{lines}")
    host = dict((name.lower(), value) for name, value in fields)[b"host"]
    assert (parsed.host, parsed.fields, parsed.values(b"HOST")) == (host, fields, [host])
    assert parsed.target == target.encode()


def test_host_of_the_target_without_a_header():
    parsed = head("http://target/\nX: y", "HTTP/1.0")
    assert (parsed.host, parsed.fields) == (b"target", [(b"Host", b"target"), (b"X", b"y")])


@pytest.mark.parametrize("lines", [
    "http://target/", "http://target/\nHost: a\nHost: b", "http://target/\nHost: a b", "http:///x\nHost: h",
    "http://:81/x\nHost: h", "http://a@b/\nHost: h", "http://?x\nHost: h",
])
def test_host_refused(lines):
    with pytest.raises(kapow.ProtocolError) as caught:
        head(lines)
    assert caught.value.status == 400


def ask_absolutely(server, path):
    """Ask for a path with a target in absolute-form and another Host; return the body."""
    got = server.raw(f"GET http://target:81{path} HTTP/1.1\r\nHost: other\r\nConnection: close\r\n\r\n".encode())
    assert got.startswith(b"HTTP/1.1 200 "), got
    return got.partition(b"\r\n\r\n")[2]


def test_host_of_the_target_everywhere(server, puppet):
    path = server.route("for name in host headers/Host headers/host/0 headers; do kapow get /request/$name; "
                        "echo; done | kapow set /response/body")
    assert ask_absolutely(server, path).split() == [b"target:81"] * 3 + [b"Host", b"Connection"]
    path = launcher(server, "printf 'Content-Type: a/b\\n\\n%s %s' \"$HTTP_HOST\" \"$SERVER_NAME\"")
    assert ask_absolutely(server, path) == b"target:81 target"
    assert ask_absolutely(server, "/p/x") == b"hello"
    lines = puppet.heads[-1].split(b"\r\n")
    assert [line for line in lines if b"ost: " in line] == [b"Host: target:81", b"X-Forwarded-Host: target:81"]
    assert lines[0] == b"GET /p/x HTTP/1.1"


# Redirects of CGI programs (RFC 3875 section 6.2).

@pytest.mark.parametrize("location", ["é", "%C3%A9"])
def test_local_redirect_is_encoded_once(server, location):
    there = f"/{uuid.uuid4().hex}"
    server.route("kapow get /request/matches/name | kapow set /response/body", pattern=there + "/{name}")
    path = launcher(server, f"printf '%s\\n\\n' 'Location: {there}/{location}'")
    reply = server.get(path)
    assert (reply.status, reply.body) == (200, "é".encode())


@pytest.mark.parametrize("text, status, fields, body", [
    ("Location: ROUTE", 200, {"location": None}, b"route"),
    ("location:ROUTE\\r", 200, {"location": None}, b"route"),
    ("Location: ROUTE\\nConnection: close", 200, {"location": None}, b"route"),
    ("Location: ROUTE\\nContent-Type: a/b", 302, {"location": "ROUTE", "content-type": "a/b"}, b""),
    ("Set-Cookie: a=b\\nLocation: ROUTE", 302, {"location": "ROUTE", "set-cookie": "a=b"}, b""),
    ("Location: ROUTE\\nLocation: ROUTE", 302, {"location": "ROUTE"}, b""),
    ("Location: ROUTE\\n\\nmoved", 302, {"location": "ROUTE"}, b"moved\n\n"),
    ("Status: 303\\nLocation: ROUTE", 303, {"location": "ROUTE"}, b""),
    ("Location: //hostROUTE", 302, {"location": "//hostROUTE"}, b""),
    ("Location: http://hostROUTE", 302, {"location": "http://hostROUTE"}, b""),
])
def test_location(server, text, status, fields, body):
    """Only a Location on its own is a local redirect."""
    route = server.route("kapow set /response/body route")
    reply = server.get(launcher(server, f"printf '{text}\\n\\n'".replace("ROUTE", route)))
    wanted = {name: value and value.replace("ROUTE", route) for name, value in fields.items()}
    assert (reply.status, reply.body) == (status, body)
    assert {name: reply.headers[name] for name in fields} == wanted


@pytest.mark.parametrize("before, status, field", [
    ("cookies/a b", 302, ("Set-Cookie", "a=b")), ("headers/X-One y", 302, ("X-One", "y")),
    ("status 307", 307, ("X-One", None)),
])
@pytest.mark.parametrize("after", ["", "; sleep 0.1; printf body"])
def test_location_after_other_words(server, before, status, field, after):
    """What the program has set is not lost for a local redirect."""
    route = server.route("kapow set /response/body route")
    path = launcher(server, f"kapow set /response/{before}; printf 'Location: {route}\\n\\n'{after}")
    reply = server.get(path)
    assert (reply.status, reply.body) == (status, b"body" if after else b"")
    assert (reply.headers["Location"], reply.headers[field[0]]) == (route, field[1])


# What has an end: handshakes and interim responses.

@pytest.mark.skipif(not hasattr(ssl, "OP_NO_RENEGOTIATION"), reason="OpenSSL has no such option")
def test_no_renegotiation():
    for context in (kapow.server_context(), kapow.Credentials("localhost").tls_context()):
        assert context.options & ssl.OP_NO_RENEGOTIATION


@pytest.mark.parametrize("count, status, body", [(0, 200, b"hello"), (100, 200, b"hello"), (101, 502, BAD_GATEWAY)])
def test_interim_responses(server, puppet, count, status, body):
    interim = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
    puppet.act = say(interim * count + answer(b"hello"))
    first = len(server.log)
    reply = server.get("/p/x")
    assert (reply.status, reply.body) == (status, body)
    if status == 502:
        wait_line(server, first, "sends interim responses without end")


# Headers alone are no answer.

HEADERS = ("Access-Control-Allow-Origin", "Set-Cookie", "Server")
KEPT = ("kapow set /response/headers/Access-Control-Allow-Origin '*'; kapow set /response/cookies/a b; "
        "kapow set /response/headers/Server mine")
DESCRIBING = ("Content-Type", "content-length", "Content-Encoding", "Content-Language", "Content-Location",
              "Content-Range", "Content-Disposition", "ETag", "LAST-MODIFIED")
DROPPED = "; ".join(f"kapow set /response/headers/{name} 5" for name in DESCRIBING)
ERROR = b'{"reason": "Internal Server Error"}'


@pytest.mark.parametrize("end, status, body", [
    ("exit 3", 500, ERROR), ("kill -KILL $$", 500, ERROR), ("exit", 200, b""), ("kill -TERM $$", 200, b""),
    ("kapow set /response/status 403; exit 3", 403, b""), ("kapow set /response/body no; exit 3", 200, b"no"),
    ("printf '' | kapow set /response/body; exit 3", 500, ERROR),
])
def test_failure_with_headers(server, end, status, body):
    reply = server.get(server.route(f"{KEPT}; {end}"))
    assert (reply.status, reply.body) == (status, body)
    assert [reply.headers.get_all(name) for name in HEADERS] == [["*"], ["a=b"], ["mine"]]
    assert reply.headers["Content-Type"] == ("application/json" if status == 500 else
                                             "text/plain; charset=utf-8" if body else None)


def test_failure_with_headers_of_a_body(server):
    path = server.route(f"{KEPT}; {DROPPED}; exit 3")
    for method in ("GET", "HEAD"):
        reply = server.request(method, path)
        assert (reply.status, reply.body) == (500, ERROR if method == "GET" else b"")
        assert [reply.headers.get_all(name) for name in HEADERS] == [["*"], ["a=b"], ["mine"]]
        assert {name.lower(): reply.headers.get_all(name) for name in DESCRIBING if reply.headers[name]} == {
            "content-type": ["application/json"], "content-length": [str(len(ERROR))]}


@pytest.mark.parametrize("text, status", [("exit 3", 500), ("exit", 200), ("echo rubbish", 502)])
def test_failed_launcher_with_headers(server, text, status):
    reply = server.get(launcher(server, f"{KEPT}; {text}"))
    assert (reply.status, reply.headers["Set-Cookie"]) == (status, "a=b")


# Upgrade is an offer, which may be ignored (RFC 9110 section 7.8).

@pytest.mark.parametrize("lines", [
    "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA",
    "Upgrade: h2c", "Upgrade:", "Upgrade: TLS/1.2, x\r\nupgrade: y\r\nConnection: upgrade",
    "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13",
])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_upgrade_is_ignored(server, puppet, lines, method):
    body = "Content-Length: 1\r\n\r\nx" if method == "POST" else "\r\n"
    with server.connect() as sock:
        for _ in range(2):                  # on a connection that is kept
            sock.sendall(f"{method} /p/x HTTP/1.1\r\nHost: h\r\n{lines}\r\n{body}".encode())
            got = read_head(sock)
            assert got[0].startswith(b"HTTP/1.1 200 ")
            read_until(sock, b"hello", got[1])
    assert len(puppet.heads) == 2
    for sent in puppet.heads:
        assert not {b"upgrade", b"connection", b"http2-settings"} & {
            line.partition(b":")[0].lower() for line in sent.split(b"\r\n")}


# Transfer codings of requests (RFC 9112 section 6.3).

@pytest.mark.parametrize("values, status", [
    (["chunked"], None), (["CHUNKED"], None), ([" \tChunked\t "], None),
    (["gzip"], 400), (["identity"], 400), (["chunked, gzip"], 400), (["chunked", "gzip"], 400),
    (["gzip, identity"], 400), (["chunkedx"], 400), (["chunked;a=b"], 400), (['"chunked"'], 400),
    (["gzip chunked"], 400), (["gzip, chunked"], 501), (["gzip", "chunked"], 501), (["GZip , Chunked"], 501),
    (["gzip;q=1, deflate", "chunked"], 501), (["identity, chunked"], 501), (["chunked, chunked"], 400),
    (["chunked", "chunked"], 400), (["gzip, chunked, chunked"], 400), (["chunked, gzip, chunked"], 400),
    ([""], 400), ([","], 400), (["chunked,"], 400), ([",chunked"], 400), (["chunked", ""], 400),
    (["", "chunked"], 400), (["gzip,,chunked"], 400), (["gzip,"], 400),
])
@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
def test_transfer_codings(values, status, version):
    text = "\n".join(["/", "Host: h", *(f"Transfer-Encoding: {value}" for value in values)])
    if status is None:
        assert head(text, version).length is None
        return
    with pytest.raises(kapow.ProtocolError) as caught:
        head(text, version)
    assert caught.value.status == status


# What is forgiven in the response of a service, and in no request.

HELLO = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX: y\r\n\r\nhello"
CHUNKS = b"HTTP/1.1 200 OK\r\nX: y\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("data, lines, body", [
    (HELLO.replace(b":", b" :"), [b"Content-Length: 5", b"X: y"], b"hello"),
    (HELLO.replace(b":", b"\t :\t"), [b"Content-Length: 5", b"X: y"], b"hello"),
    (HELLO.replace(b"\r\n", b"\n"), [b"Content-Length: 5", b"X: y"], b"hello"),
    (HELLO.replace(b"OK\r\n", b"OK\n"), [b"Content-Length: 5", b"X: y"], b"hello"),
    (HELLO.replace(b"\r\n\r\n", b"\r\n\n"), [b"Content-Length: 5", b"X: y"], b"hello"),
    (HELLO.replace(b"\r\n\r\nhello", b"\n\n\r\n\r\nx"), [b"Content-Length: 5", b"X: y"], b"\r\n\r\nx"),
    (HELLO.replace(b"X: y\r\n", b"X: y\r\n" * 5000), [b"Content-Length: 5", *[b"X: y"] * 5000], b"hello"),
    (CHUNKS + b"5 \r\nhello\r\n0\t \r\n\r\n", [b"Transfer-Encoding: chunked", b"X: y"], b"hello"),
    (CHUNKS + b"5;a=b \r\nhello\r\n0 ;c\r\nT : x\r\n\r\n", [b"Transfer-Encoding: chunked", b"X: y"], b"hello"),
    (CHUNKS.replace(b"\r\n", b"\n") + b"5\nhello\n0\nT: x\n\n", [b"Transfer-Encoding: chunked", b"X: y"],
     b"hello"),
    (CHUNKS + b"2\n\n\n\n3\r\n\r\nx\r\n0\n\r\n", [b"Transfer-Encoding: chunked", b"X: y"], b"\n\n\r\nx"),
    (CHUNKS + b"5\r\nhello\r\n0\r\n" + b"T: x\r\n" * 101 + b"\r\n",
     [b"Transfer-Encoding: chunked", b"X: y"], b"hello"),
    (CHUNKS.replace(b"X: y", b"Transfer-Encoding :\tchunked", 1).replace(b"Transfer-Encoding: chunked\r\n", b"")
     + b"5\r\nhello\r\n0\r\n\r\n", [b"Transfer-Encoding: chunked"], b"hello"),
])
@pytest.mark.parametrize("whole", [True, False])
def test_forgiven_response(server, puppet, data, lines, body, whole):
    """What the client gets is what was understood, written as it should be."""
    step = len(data) if whole else max(len(data) // 300, 1)

    def act(sock, head, rest):
        for place in range(0, len(data), step):
            sock.sendall(data[place:place + step])
        return True
    puppet.act = act
    with server.connect() as sock:
        for _ in range(2):                  # on connections that are kept, both of them
            sock.sendall(b"GET /p/x HTTP/1.1\r\nHost: h\r\n\r\n")
            got, rest = read_head(sock)
            seen = got.split(b"\r\n")
            assert seen[0] == b"HTTP/1.1 200 OK" and b"\n" not in got.replace(b"\r\n", b"")
            assert sorted(line for line in seen[1:-2] if not line.startswith((b"Date: ", b"Server: "))) == lines
            if b"Content-Length: 5" in lines:
                assert read_until(sock, body, rest) == body
            else:
                assert unchunk(read_until(sock, b"\r\n0\r\n\r\n", rest)) == body


def unchunk(data):
    """Return the body in well-formed chunks."""
    buffer, framing = bytearray(data), kapow.ChunkedFraming()
    body = framing.decode(buffer)
    assert framing.done and not buffer
    return body


@pytest.mark.parametrize("data", [
    HELLO.replace(b"X: y", b" X: y"), HELLO.replace(b"X: y", b"X y: z"), HELLO.replace(b"X: y", b" : y"),
    HELLO.replace(b"X: y", b"X: y\r\n z"), HELLO.replace(b"X: y", b"X: y\r"), HELLO.replace(b"X: y", b"X: a\rb"),
    HELLO.replace(b"OK", b"OK\r"), HELLO.replace(b"X: y", b"Content-Length : 6"),
    HELLO.replace(b"X: y", b"Transfer-Encoding : chunked"), b"\n" + HELLO, b"\r\n" + HELLO,
    HELLO.replace(b"X: y", b"X: " + b"y" * 66000), CHUNKS + b" 5\r\nhello\r\n0\r\n\r\n",
    CHUNKS + b"5 5\r\nhello\r\n0\r\n\r\n", CHUNKS + b"5\r\nhello\r0\r\n\r\n", CHUNKS + b"4\r\nhello\r\n0\r\n\r\n",
    CHUNKS + b"\n5\nhello\n0\n\n", CHUNKS + b"5\r\r\nhello\r\n0\r\n\r\n",
    CHUNKS + b"0\r\n" + b"T: x\r\n" * 12000 + b"\r\n",
])
def test_not_forgiven(data):
    with pytest.raises(kapow.ProtocolError) as caught:
        understand_response(data)
    assert not isinstance(caught.value, kapow.PeerLeft)


def understand_response(data):
    """Return (status, reason, fields, body, what is left) of a response."""
    buffer = bytearray(data)
    parsed = kapow.ResponseHead(kapow.take_response_head(buffer), "GET")
    body = b"".join(iter(kapow.BodyReader(parsed, buffer, lambda: b"").read, b""))
    return parsed.status, parsed.reason, parsed.fields, body, bytes(buffer)


@pytest.mark.parametrize("data", [
    b"GET / HTTP/1.1\nHost: h\n\n", b"GET / HTTP/1.1\r\nHost: h\n\r\n", b"GET / HTTP/1.1\r\nHost : h\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: h\r\nX : y\r\n\r\n", b"GET / HTTP/1.1\r\nHost: h\r\n" + b"X: y\r\n" * 100 + b"\r\n",
    *(b"POST /body HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" + body for body in (
        b"5 \r\nhello\r\n0\r\n\r\n", b"5\nhello\r\n0\r\n\r\n", b"5\r\nhello\n0\r\n\r\n",
        b"5\r\nhello\r\n0\r\nT : x\r\n\r\n", b"5\r\nhello\r\n0\r\nT: x\n\r\n",
        b"0\r\n" + b"T: x\r\n" * 101 + b"\r\n")),
])
def test_requests_are_not_forgiven(server, data):
    server.route("kapow get /request/body > /dev/null", "POST", "/body")
    assert server.raw(data).partition(b"\r\n")[0] in (
        b"HTTP/1.1 400 Bad Request", b"HTTP/1.1 431 Request Header Fields Too Large")


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.lists(st.binary(max_size=9).map(lambda data: b"%x\r\n%b\r\n" % (len(data), data) if data else b"")),
       st.lists(st.tuples(st.sampled_from([b"X", b"Y-Z"]), st.sampled_from([b"", b"a b", b"\xe9"])), max_size=3),
       st.randoms(use_true_random=False))
def test_loosely_written_responses(chunks, fields, choice):
    """They are understood as those that are written as they should be."""
    def end():
        return choice.choice([b"\r\n", b"\n", b"\r\n"])
    strict = loose = b""
    for line in [b"HTTP/1.1 200 OK", *fields, (b"Transfer-Encoding", b"chunked"), b""]:
        name, value = line if isinstance(line, tuple) else (line, None)
        blanks = choice.choice([b"", b" ", b"\t \t"])
        strict += (name if value is None else b"%b: %b" % (name, value)) + b"\r\n"
        loose += (name if value is None else b"%b%b:%b%b" % (name, blanks, value, blanks)) + end()
    for data in [*chunks, b"0\r\n\r\n"]:
        strict += data
        size, _, content = data.partition(b"\r\n")
        if data:
            loose += size + choice.choice([b"", b" ", b"\t"]) + end() + content[:-2] + end()
    assert understand_response(loose + b"next") == understand_response(strict + b"next")


# Conditions and ranges of files (RFC 9110 sections 13 and 14).

BEFORE, AFTER = "Sun, 06 Nov 1994 08:49:36 GMT", "Sun, 06 Nov 1994 08:49:38 GMT"
THEN = "Sun, 06 Nov 1994 08:49:37 GMT"


@pytest.fixture(scope="module")
def static_file(module_server):
    """The path and the entity tag of a file of ten digits, modified THEN."""
    path = launcher(module_server, "exit 1")
    file = module_server.directory / "billets" / path[1:] / "rsrc" / "digits.txt"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"0123456789")
    os.utime(file, (784111777, 784111777))
    target = f"{path}/rsrc/digits.txt"
    reply = module_server.get(target)
    assert (reply.status, reply.headers["Last-Modified"]) == (200, THEN)
    return target, reply.headers["ETag"]


@pytest.mark.parametrize("value, status, body", [
    ("bytes=0-99999999999999999999", 206, b"0123456789"), ("bytes=5-" + "9" * 1000, 206, b"56789"),
    ("BYTES=1-2", 206, b"12"), ("Bytes=-3", 206, b"789"), ("bytes=-" + "9" * 20, 206, b"0123456789"),
    ("bytes=0000000000000000000000000001-2", 206, b"12"), ("bytes=9-9", 206, b"9"), ("bytes=9-", 206, b"9"),
    ("bytes=" + "9" * 20 + "-", 416, None), ("bytes=10-" + "9" * 20, 416, None), ("bytes=-0", 416, None),
    ("bytes=" + "9" * 21 + "-" + "9" * 20, 200, b"0123456789"), ("bytes=0-" + "9" * 5000, 200, b"0123456789"),
    ("bytes=3-2", 200, b"0123456789"), ("bits=0-1", 200, b"0123456789"), ("bytes=0-1,3-4", 200, b"0123456789"),
])
def test_range(server, static_file, value, status, body):
    reply = server.get(static_file[0], Range=value)
    assert (reply.status, body in (None, reply.body)) == (status, True)
    if status == 206:
        first = body[0] - ord("0")
        assert reply.headers["Content-Range"] == f"bytes {first}-{first + len(body) - 1}/10"


@pytest.mark.parametrize("lines, status", [
    (["If-Match: TAG"], 200), (["If-Match: *"], 200), (['If-Match: "x", TAG'], 200),
    (['If-Match: "x"', "if-match: TAG"], 200), (['If-Match: "x"'], 412), (["If-Match: W/TAG"], 412),
    (["If-Match:"], 412), (['If-Match: "x"', 'If-Match: "y"'], 412),
    ([f"If-Unmodified-Since: {THEN}"], 200), ([f"If-Unmodified-Since: {AFTER}"], 200),
    ([f"If-Unmodified-Since: {BEFORE}"], 412), (["If-Unmodified-Since: yesterday"], 200),
    (["If-Match: TAG", f"If-Unmodified-Since: {BEFORE}"], 200),
    (['If-Match: "x"', f"If-Unmodified-Since: {THEN}"], 412),
    (['If-Match: "x"', "If-None-Match: TAG"], 412), (["If-Match: TAG", "If-None-Match: TAG"], 304),
    ([f"If-Unmodified-Since: {BEFORE}", f"If-Modified-Since: {THEN}"], 412),
    ([f"If-Unmodified-Since: {THEN}", f"If-Modified-Since: {THEN}"], 304),
    (['If-Match: "x"', "Range: bytes=1-2"], 412), (["If-Match: TAG", "Range: bytes=1-2"], 206),
    (["If-Match: TAG", "If-Range: TAG", "Range: bytes=1-2"], 206),
    (["If-Match: TAG", 'If-Range: "x"', "Range: bytes=1-2"], 200),
    ([f"If-Unmodified-Since: {BEFORE}", "Range: bytes=20-"], 412),
    ([f"If-Unmodified-Since: {THEN}", "Range: bytes=20-"], 416),
])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_conditions(server, static_file, lines, status, method):
    target, tag = static_file
    status = 200 if method == "HEAD" and status in (206, 416) else status
    text = "\r\n".join([f"{method} {target} HTTP/1.1", "Host: h", "Connection: close", *lines, "", ""])
    got, _, body = server.raw(text.replace("TAG", tag).encode()).partition(b"\r\n\r\n")
    assert int(got.split(b" ")[1]) == status
    wanted = {200: b"0123456789", 206: b"12", 304: b"", 412: b'{"reason": "Precondition Failed"}'}
    assert body == (b"" if method == "HEAD" else wanted.get(status, body))


# Plain HTTP where HTTPS is served.

@pytest.fixture
def https_server(start_server, tmp_path):
    """A server of the test's own with HTTPS, and a context for its clients."""
    certificate, key = kapow.make_certificate("test", "localhost")
    for name, text in (("server.crt", certificate), ("server.key", key)):
        (tmp_path / name).write_text(text)
    server = start_server("--certfile", tmp_path / "server.crt", "--keyfile", tmp_path / "server.key")
    return server, ssl.create_default_context(cadata=certificate)


def count_plain(server):
    """Return how many lines of the log are about plain HTTP."""
    return sum("and got plain HTTP from 127.0.0.1" in line for line in server.log)


PLAIN = [
    b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", b"HEAD / HTTP/1.1\r\nHost: h\r\n\r\n", b"OPTIONS * HTTP/1.0\r\n\r\n",
    b"\r\nGET /x?y HTTP/1.1\r\nHost: h\r\n\r\n", b"brew-1 /pot HTTP/1.1\r\nHost: h\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhel",
    b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 99999999999\r\nExpect: 100-continue\r\n\r\n",
    b"PUT / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" + b"5\r\nhello\r\n" * 20000,
    b"GET / HTTP/1.1\r\nHost: h\r\n\r\nGET /next HTTP/1.1\r\nHost: h\r\n\r\n",
]


def test_plain_http_where_https_is_served(https_server):
    server, context = https_server
    path = server.route("kapow set /response/body hello")
    for name in ("user", "control"):
        for data in PLAIN:
            with server.connect(name) as sock:
                for piece in (data[:1], data[1:7], data[7:]):
                    sock.sendall(piece)
                got, _, body = read_all(sock).partition(b"\r\n\r\n")
            assert got.startswith(b"HTTP/1.1 400 Bad Request\r\n") and b"\r\nConnection: close" in got, data
            if data.startswith(b"HEAD"):
                assert body == b""
            else:
                assert json.loads(body) == {"reason": "Bad Request", "error": kapow.TAKES_HTTPS}
    with server.connect() as sock, context.wrap_socket(sock, server_hostname="localhost") as tls:
        tls.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
        assert read_all(tls).endswith(b"\r\n\r\nhello")
    server.wait_access(r'"brew-1 /pot HTTP/1.1" 400 ')
    wait_until(lambda: count_plain(server) >= 2 * len(PLAIN), "a line of the log for each")
    assert count_plain(server) == 2 * len(PLAIN)
    assert not [line for line in server.log if "Traceback" in line or "unexpected" in line]


GARBAGE = [
    b"SSH-2.0-OpenSSH_9.2\r\n", b"EHLO h\r\n", b"GET /\r\n", b"\0\0\0", b"GET / HTTP/1.1", b"", b"\r\n", b"\x80\x01",
    b"\x16\x03\x01GET / HTTP/1.1\r\n\r\n", b"x" * 9000, b"GET / http/1.1\r\nHost: h\r\n\r\n",
]


def test_other_bytes_where_https_is_served(https_server):
    server, _ = https_server
    for data in GARBAGE:
        with server.connect() as sock:
            sock.sendall(data)
            with contextlib.suppress(OSError):      # the server may have reset it by now
                sock.shutdown(socket.SHUT_WR)
            assert b"HTTP" not in read_all(sock), data
    assert count_plain(server) == 0 and not [line for line in server.log if "Traceback" in line]


def test_plain_http_in_time():
    """Whoever neither shakes hands nor says a request line has the time of a handshake."""
    for data in (b"", b"GET / HT"):
        with contextlib.ExitStack() as stack:
            ours, theirs = map(stack.enter_context, socket.socketpair())
            theirs.sendall(data)
            with pytest.raises(TimeoutError):
                kapow.take_plain_request(ours, time.monotonic() + 0.05)


# What is accepted can be run: one argument of a program has its limit.

ARGUMENT = 131_071
IN_A_SHELL = 130_047


@pytest.mark.parametrize("command, size, body", [
    ("true #", ARGUMENT, b""), ("kapow set /response/body hello #", IN_A_SHELL, b"hello"),
])
@pytest.mark.parametrize("letter", ["x", "é"])
def test_longest_command(server, command, size, body, letter):
    filler = letter * ((size - len(command)) // len(letter.encode()))
    command += filler + "x" * (size - len((command + filler).encode()))
    reply = server.get(server.route(command))
    assert (reply.status, reply.body) == (200, body)
    answer = server.control("POST", "/routes", {"method": "GET", "url_pattern": "/x", "command": command + "x"})
    assert (answer.status_code, answer.json()["reason"], answer.json()["field"]) == (422, "Invalid Route", "command")
    assert f"longer than {size} bytes" in answer.json()["error"]


def test_longest_word_of_an_entrypoint(server):
    reply = server.get(server.route(entrypoint="/bin/true " + "x" * ARGUMENT))
    assert (reply.status, reply.body) == (200, b"")
    for document in ({"entrypoint": "/bin/true " + "x" * (ARGUMENT + 1)}, {"entrypoint": "x" * (ARGUMENT + 1)}):
        for method, body in (("POST", 0), ("PUT", 0), ("PUT", [0])):
            route = {"method": "GET", "url_pattern": "/x", **document}
            answer = server.control(method, "/routes", [route] if body else route)
            assert (answer.status_code, answer.json()["field"]) == (422, "entrypoint")


def test_longest_command_of_a_service(server):
    text = "exec sleep 1000 #"
    command = ["/bin/sh", "-c", text + "x" * (ARGUMENT - len(text))]
    for more, status in (("x", 422), ("", 201)):
        answer = server.control("POST", "/services", {"name": "long", "command": [*command[:2], command[2] + more]})
        assert answer.status_code == status, answer.text
        assert status == 201 or answer.json()["field"] == "command"
    server.wait_log("the service long: process [0-9]+ started")
    remove(server, "long")


def test_command_of_a_file_is_too_long(tmp_path):
    path = tmp_path / "routes.json"
    path.write_text(json.dumps([{"method": "GET", "url_pattern": "/x", "command": "x" * (ARGUMENT + 1)}]))
    with pytest.raises(kapow.StartError) as caught:
        kapow.load_routes(str(path))
    assert "Invalid Route, item 0, field command: it is longer than 131071 bytes" in str(caught.value)


def test_library_in_a_long_directory():
    """It is left out rather than make a command that was accepted too long."""
    route = kapow.Route("GET", "/x", command="kapow set /response/body x")
    for path, before in (("/d/kapow.sh", ". /d/kapow.sh; "), ("/" + "d" * 1017 + "/x", f". /{'d' * 1017}/x; "),
                         ("/" + "d" * 1018 + "/x", "")):
        launcher = kapow.Launcher(None, None, 0, channel=object(), library=path)
        assert launcher._argv(route) == ["/bin/sh", "-c", before + route.command]


# What people give to `kapow server`.

@pytest.mark.parametrize("text, address", [
    ("9000", "0.0.0.0:9000"), (":9000", "0.0.0.0:9000"), (":0", "0.0.0.0:0"), ("0", "0.0.0.0:0"),
    ("h:1", "h:1"), ("[::]:1", "[::]:1"), ("unix:/9000", "unix:/9000"),
])
@pytest.mark.parametrize("option", ["bind", "control_bind", "data_bind", "status_bind"])
def test_port_alone(option, text, address):
    if text.startswith("unix:") and option in ("control_bind", "status_bind"):
        return
    options = kapow.parse_server_options(["--" + option.replace("_", "-"), text])
    assert str(getattr(options, option)) == address


@pytest.mark.parametrize("text", ["", ":", "::1", "65536", ":65536", "123456", "x", ":x", "1:2:3", " 80", "80 ",
                                  "\u0663"])
def test_no_port_alone(text):
    with pytest.raises(ValueError) as caught:
        kapow.Address.parse_listening(text)
    assert "HOST:PORT" in str(caught.value) or "over 65535" in str(caught.value)


def run_server(*arguments, cwd):
    """Run a server that does not start; return its exit status and what it says."""
    done = subprocess.run([*installed(KAPOW), "server", "--bind", "127.0.0.1:0", *arguments], cwd=cwd,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE)
    return done.returncode, done.stderr


@pytest.mark.parametrize("name", ["site", "./site", "site/", "."])
def test_directory_is_no_init_program(tmp_path, name):
    (tmp_path / "site").mkdir()
    status, said = run_server(name, cwd=tmp_path)
    assert (status, len(said.splitlines())) == (1, 1)
    assert f"cannot start the init program {name}: it is a directory; --billets " in said


def test_directory_of_the_name_of_a_program(tmp_path, monkeypatch):
    """What is on PATH is found beside it, as before."""
    (tmp_path / "true").mkdir()
    monkeypatch.chdir(tmp_path)
    assert kapow.find_program("true").endswith("/true")


NOTHING = "nothing is served yet, as there are no routes"


def test_server_without_anything_says_so(start_server):
    server = start_server(wait=False)
    line = server.wait_log(f"{NOTHING}; this adds one: (kapow route add .*)$").group(1)
    environment = {**server.environment, "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
    add = shlex.join(installed(KAPOW)) + line.removeprefix("kapow")
    done = subprocess.run(["/bin/sh", "-c", add], env=environment, capture_output=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr
    assert server.get("/hello").body == b"Hello\n"
    server.process.send_signal(signal.SIGHUP)
    server.wait_log("the server has reloaded")
    assert sum(NOTHING in line for line in server.log) == 1


@pytest.mark.parametrize("kind", ["routes", "billets", "init"])
def test_server_with_something_says_nothing(start_server, tmp_path, kind):
    (tmp_path / "routes.json").write_text('[{"method": "GET", "url_pattern": "/x"}]')
    more = {"routes": ["--routes", tmp_path / "routes.json"], "billets": ["--billets", tmp_path], "init": []}
    server = start_server(*more[kind], wait=kind == "init")
    server.wait_log("user interface: ")
    server.stop()
    assert not [line for line in server.log if NOTHING in line]


# HEAD without a route of its own (section 4 of the contract).

@pytest.mark.parametrize("routes, chosen", [
    (["GET /{a}", "GET /{b}"], 0), (["GET /y", "GET /{a}", "GET /x", "GET /{b}"], 1),
    (["POST /x", "GET /x", "GET /{a}"], 1),
    (["GET /x", "HEAD /{a}", "GET /{b}"], 1), (["GET /x", "HEAD /y", "GET /{b}"], 0), (["HEAD /x", "HEAD /{a}"], 0),
])
def test_head_takes_the_first_route_that_fits(routes, chosen):
    table = kapow.RouteTable([kapow.Route(*route.split(" ")) for route in routes])
    assert table.match("HEAD", "/x")[0] is table.snapshot()[chosen]


def test_head_is_answered_as_get(server):
    """By the same of two routes, as the header shows that each of them sets."""
    path = f"/{uuid.uuid4().hex}"
    for place in range(2):
        server.route(f"kapow set /response/headers/X-Place {place}; kapow set /response/body 12345", pattern=path)
    for method, body in (("GET", b"12345"), ("HEAD", b"")):
        reply = server.request(method, path)
        assert (reply.status, reply.headers["X-Place"], reply.body) == (200, "0", body)
        assert reply.headers["Content-Length"] == "5"
