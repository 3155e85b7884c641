"""Requests that a service answers: what goes over, what comes back, and what goes wrong on the way.

One server for all tests, with a puppet, whose socket the tests themselves
listen on, and one real service in each runtime.
"""

import concurrent.futures
import contextlib
import http.client
import json
import os
import pathlib
import re
import socket
import sys
import threading
import uuid

import pytest

from conftest import DEADLINE, Reply, Server, read_all, wait_until
from services import (BAD_GATEWAY, RUNTIMES, UNAVAILABLE, Puppet, add, answer, call,
                      lines, peak, read_head, read_until, remove, reset_peak, runtime_command, say,
                      state, wait_state)


# Those of the puppet's routes /p/..., which are made once.
METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "BREW")


@pytest.fixture(scope="module")
def module_server(tmp_path_factory):
    """A server with a puppet and the runtimes; it must be idle again without them."""
    server = Server(tmp_path_factory.mktemp("server"))
    server.missing, server.seen = set(), 0
    for runtime in RUNTIMES:
        command = runtime_command(server.directory, runtime)
        if command is None:
            server.missing.add(runtime)
        else:
            add(server, runtime, *command)
            for method in ("GET", "POST", "HEAD", "PATCH"):
                server.route(service=runtime, pattern=f"/{{kind}}/at-{runtime}/{{more:.*}}",
                             method=method)
    server.puppet = Puppet(server, "puppet").listen()
    for method in METHODS:
        server.route(service="puppet", pattern="/p/{any:.*}", method=method)
    for runtime in set(RUNTIMES) - server.missing:
        wait_state(server, runtime)
    yield server
    assert server.control("PUT", "/routes", []).status_code == 200
    for service in server.control("GET", "/services").json():
        remove(server, service["name"])
    server.puppet.close()
    server.check_idle()
    assert server.stop() == 0
    server.check_gone()


@pytest.fixture
def server(module_server):
    """The module's server; after each test no request is left and no traceback was logged."""
    yield module_server
    wait_until(lambda: module_server.usage()[1] <= module_server.idle[1],
               "the end of all requests")
    seen, module_server.seen = module_server.seen, len(module_server.log)
    assert not [line for line in module_server.log[seen:]
                if "Traceback" in line or "unexpected" in line]


@pytest.fixture
def puppet(server):
    """The puppet, without a connection; it says hello again after the test."""
    server.puppet.hang_up()
    server.puppet.heads.clear()
    server.puppet.connections = 0
    yield server.puppet
    server.puppet.act = say(answer(b"hello"))


def fresh(server, act=None, **more):
    """Have the puppet act so; return a path that leads to it and is of no other test.

    With a route of its own if `more` says what that is to be like.
    """
    server.puppet.act = act or server.puppet.act
    return server.route(service="puppet", **more) if more else f"/p/{uuid.uuid4().hex}"


@contextlib.contextmanager
def client(server):
    """Give a function that makes requests on one connection, for a with statement.

    When one begins, the last is over and its connection to the service given back.
    """
    connection = http.client.HTTPConnection("127.0.0.1", server.port("user"), timeout=DEADLINE)

    def ask(method, path, body=None):
        connection.request(method, path, body)
        return Reply(connection.getresponse())
    try:
        yield ask
    finally:
        connection.close()


def get(path, version="1.1", method="GET", more=""):
    """Return the bytes of a request without a body that asks for the connection's end."""
    return f"{method} {path} HTTP/{version}\r\nHost: h\r\nConnection: close\r\n{more}\r\n".encode()


# What goes over.

def test_request_goes_over_as_it_came(server, puppet):
    path = fresh(server, method="BREW", pattern="/as%it//{rest:.*}")
    target = "/as%25it//a%2Fb/../%c3%A9%ff%00?x=%20&y=a+b?&&="
    server.raw(f"BREW {target} HTTP/1.1\r\nHost: Example:81\r\nX-Case: A\r\nx-CASE: b\t c\r\n"
               "Cookie: a=b\r\nUser-Agent: u\r\nConnection: close\r\nX-Latin: \xe9\r\n\r\n"
               .encode("latin-1"))
    head, = puppet.heads
    assert path and head.startswith(f"BREW {target} HTTP/1.1\r\n".encode())
    route_id = server.control("GET", "/routes").json()[-1]["id"]
    assert lines(head) == sorted([
        "Host: Example:81", "X-Case: A", "x-CASE: b\t c", "Cookie: a=b", "User-Agent: u",
        "X-Latin: \xe9", f"Kapow-Handler: {route_id}", "X-Forwarded-For: 127.0.0.1",
        "X-Forwarded-Proto: http", "X-Forwarded-Host: Example:81",
        "Kapow-Match-rest: a%2Fb%2F..%2F%C3%A9%FF%00"])


def test_matches(server, puppet):
    fresh(server, pattern="/match/{first}-{second}/{third:x?}")
    server.get("/match/a%20b%25-%E2%82%AC:;/")
    assert [line for line in lines(puppet.heads[0]) if "Match" in line] == [
        "Kapow-Match-first: a%20b%25", "Kapow-Match-second: %E2%82%AC%3A%3B", "Kapow-Match-third: "]


def test_handler_names_the_route(server, puppet):
    path = fresh(server, handler="cat.feed (v2)")
    server.get(path)
    assert "Kapow-Handler: cat.feed (v2)" in lines(puppet.heads[0])
    assert [line for line in lines(puppet.heads[0]) if "kapow" in line.lower()] == [
        "Kapow-Handler: cat.feed (v2)"]


@pytest.mark.parametrize("name", [
    "Kapow-Handler", "kapow_handler", "KAPOW-HANDLER", "Kapow_Handler", "Kapow-Match-Name",
    "Kapow_Match_x", "kapow-match-", "KAPOW_MATCH-x", "X-Forwarded-For", "x_forwarded_for",
    "X-Forwarded_Proto", "X-FORWARDED-HOST", "X_Forwarded-Host"])
def test_what_the_client_says_under_our_names_is_dropped(server, puppet, name):
    server.raw(get(fresh(server), more=f"{name}: evil\r\nX-Good: 1\r\n"))
    assert b"evil" not in puppet.heads[0] and b"X-Good: 1" in puppet.heads[0]


@pytest.mark.parametrize("more, dropped", [
    ("Keep-Alive: dropped", ["Keep-Alive"]), ("TE: trailers", ["TE"]),
    ("Proxy-Connection: dropped", ["Proxy-Connection"]), ("Trailer: X-Dropped", ["Trailer"]),
    ("Connection: x-one, X-Two\r\nX-One: dropped\r\nx-two: dropped", ["X-One", "X-Two"]),
    ("Connection: x-forwarded-for, kapow-handler, host", []),
])
def test_hop_by_hop_headers_stay_here(server, puppet, more, dropped):
    server.raw(get(fresh(server), more=more + "\r\nX-Good: 1\r\n"))
    names = [line.partition(":")[0].lower() for line in lines(puppet.heads[0])]
    assert sorted(names) == sorted(["host", "x-good", "kapow-handler", "kapow-match-any",
                                    "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host"])
    assert not set(names) & {name.lower() for name in dropped}


@pytest.mark.parametrize("data, framing, body", [
    ("Content-Length: 5\r\n\r\nhello", "Content-Length: 5", b"hello"),
    ("Content-Length: 5, 5\r\n\r\nhello", "Content-Length: 5", b"hello"),
    ("Content-Length: 0\r\n\r\n", "Content-Length: 0", b""),
    ("\r\n", None, b""),
    ("Transfer-Encoding: chunked\r\n\r\n3;x=y\r\nhel\r\n2\r\nlo\r\n0\r\nX: y\r\n\r\n",
     "Transfer-Encoding: chunked", b"hello"),
    ("Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "Transfer-Encoding: chunked", b""),
    ("Connection: content-length\r\nContent-Length: 5\r\n\r\nhello", "Content-Length: 5", b"hello"),
])
def test_body_goes_over(server, puppet, data, framing, body):
    got = []

    def act(sock, head, rest):
        if b"chunked" in head:
            rest = read_until(sock, b"0\r\n\r\n", rest)
            got.append(dechunk(rest))
        else:
            size = int(re.search(rb"Content-Length: (\d+)|$", head).group(1) or 0)
            while len(rest) < size:
                rest += sock.recv(100)
            got.append(rest)
        sock.sendall(answer(b"taken"))
        return True

    path = fresh(server, act)
    reply = server.raw(f"POST {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n{data}".encode())
    assert reply.endswith(b"taken") and got == [body]
    found = [line for line in lines(puppet.heads[0])
             if line.startswith(("Content-Length", "Transfer-Encoding"))]
    assert found == ([framing] if framing else [])


def dechunk(data):
    """Return the body that `data` holds in chunks, which must be whole."""
    body = b""
    while True:
        size, _, data = data.partition(b"\r\n")
        size = int(size, 16)
        if size == 0:
            assert data == b"\r\n"
            return body
        body, data = body + data[:size], data[size:]
        assert data.startswith(b"\r\n")
        data = data[2:]


def test_http_1_0_client_without_host(server, puppet):
    path = fresh(server)
    reply = server.raw(f"GET {path} HTTP/1.0\r\n\r\n".encode())
    assert reply.startswith(b"HTTP/1.1 200 OK\r\n") and reply.endswith(b"\r\n\r\nhello")
    assert puppet.heads[0].startswith(f"GET {path} HTTP/1.1\r\n".encode())
    assert "Host: " in lines(puppet.heads[0])


def test_head_and_options_find_the_routes_they_find_anywhere(server, puppet):
    path = fresh(server, say(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"), handler="h")
    assert server.request("HEAD", path).headers["Content-Length"] == "5"
    assert puppet.heads[0].startswith(b"HEAD ")
    assert server.request("OPTIONS", path).status == 204
    assert server.request("POST", path).status == 405
    assert len(puppet.heads) == 1


# What comes back.

@pytest.mark.parametrize("sent, line, fields, body", [
    (b"200 OK\r\nContent-Length: 5\r\nX: y\r\n\r\nhello", "200 OK",
     ["Content-Length: 5", "X: y"], b"hello"),
    (b"200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: T\r\n\r\n3;a=b\r\nhel\r\n2\r\nlo\r\n0\r\nT: x\r\n\r\n",
     "200 OK", ["Transfer-Encoding: chunked"], b"hello"),
    (b"200 OK\r\n\r\nhello", "200 OK", ["Transfer-Encoding: chunked"], b"hello"),
    (b"200 OK\r\n\r\n", "200 OK", ["Transfer-Encoding: chunked"], b""),
    (b"200 OK\r\nContent-Length: 0\r\n\r\n", "200 OK", ["Content-Length: 0"], b""),
    (b"204 No Content\r\nX: y\r\n\r\n", "204 No Content", ["X: y"], b""),
    (b"204 No Content\r\nContent-Length: 0\r\n\r\n", "204 No Content", [], b""),
    (b"304 Not Modified\r\nETag: \"e\"\r\nContent-Length: 9\r\n\r\n", "304 Not Modified",
     ['ETag: "e"', "Content-Length: 9"], b""),
    (b"299 My Own: Phrase\r\nContent-Length: 0\r\n\r\n", "299 My Own: Phrase",
     ["Content-Length: 0"], b""),
    (b"599 \r\nContent-Length: 0\r\n\r\n", "599 ", ["Content-Length: 0"], b""),
    (b"404\r\nContent-Length: 0\r\n\r\n", "404 ", ["Content-Length: 0"], b""),
    (b"200 OK\r\nSet-Cookie: a\r\nset-cookie: b\r\nX-Latin: \xe9\r\nContent-Length: 0\r\n\r\n",
     "200 OK", ["Set-Cookie: a", "set-cookie: b", "X-Latin: \xe9", "Content-Length: 0"], b""),
    (b"200 OK\r\nConnection: x-hop\r\nX-Hop: d\r\nKeep-Alive: timeout=5\r\nProxy-Connection: d\r\n"
     b"Upgrade: d\r\nTE: d\r\nContent-Length: 1\r\n\r\nx", "200 OK", ["Content-Length: 1"], b"x"),
    (b"200 OK\r\nDate: then\r\nServer: mine\r\nContent-Length: 1\r\n\r\nx", "200 OK",
     ["Date: then", "Server: mine", "Content-Length: 1"], b"x"),
    (b"200 OK\r\nContent-Length: 1, 1\r\n\r\nx", "200 OK", ["Content-Length: 1"], b"x"),
    (b"200 OK\r\nContent-Length: 6\r\n\r\n<html>", "200 OK", ["Content-Length: 6"], b"<html>"),
    (b"103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n"
     b"Content-Length: 1\r\n\r\nx", "200 OK", ["Content-Length: 1"], b"x"),
])
@pytest.mark.parametrize("whole", [True, False])
def test_response_comes_back(server, puppet, sent, line, fields, body, whole):
    def act(sock, head, rest):
        data = b"HTTP/1.1 " + sent
        for place in range(0, len(data), len(data) if whole else len(data) // 3 + 1):
            sock.sendall(data[place:place + (len(data) if whole else len(data) // 3 + 1)])
        return False

    reply = server.raw(get(fresh(server, act)))
    head, _, rest = reply.partition(b"\r\n\r\n")
    assert head.split(b"\r\n")[0].decode("latin-1") == "HTTP/1.1 " + line
    shown = [field for field in lines(head + b"\r\n\r\n") if field != "Connection: close"]
    if not any(field.startswith("Date: then") for field in fields):
        shown = [field for field in shown if not field.startswith(("Date: ", "Server: Kapow"))]
    assert sorted(shown) == sorted(fields)
    assert (dechunk(rest) if "Transfer-Encoding: chunked" in fields else rest) == body


@pytest.mark.parametrize("sent, body", [
    (b"Transfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n", b"hello"),
    (b"\r\nhello", b"hello"), (b"Content-Length: 5\r\n\r\nhello", b"hello"),
])
def test_http_1_0_clients_get_no_chunks(server, puppet, sent, body):
    path = fresh(server, say(b"HTTP/1.1 200 OK\r\n" + sent, keep=False))
    reply = server.raw(get(path, "1.0"))
    assert b"Transfer-Encoding" not in reply and reply.endswith(b"\r\n\r\n" + body)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_http_1_0_services(server, puppet, version):
    path = fresh(server, say(b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello"))
    for _ in range(2):
        assert server.raw(get(path, version)).endswith(b"\r\n\r\nhello")
    # Such a connection is not kept, whoever closes it.
    assert puppet.connections == 2


def test_head_of_each_framing(server, puppet):
    for fields in (b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b""):
        path = fresh(server, say(b"HTTP/1.1 200 OK\r\nX: y\r\n" + fields + b"\r\n"))
        with server.connect() as sock:
            for _ in range(2):          # the second shows that no byte of a body came
                sock.sendall(f"HEAD {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
                head, rest = read_head(sock)
                assert b"X: y" in head and rest == b""
                assert (b"Content-Length: 5" in head) == (b"Content-Length" in fields)


# What goes wrong.

@pytest.mark.parametrize("sent", [
    b"", b"garbage\r\n\r\n", b"\x16\x03\x01\x02", b"HTTP/1.1 2", b"HTTP/1.1 200 OK\r\nX: y\r\n",
    b"HTTP/2 200 OK\r\n\r\n", b"HTTP/1.1 20 OK\r\n\r\n", b"ICY 200 OK\r\n\r\n",
    b"HTTP/1.1 200 OK\rContent-Length: 0\r\r", b"HTTP/1.1 200 OK\r\n X: y\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n folded\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: a\0b\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nx",
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70000,
    b"HTTP/1.1 200 " + b"x" * 10000, b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 11000 + b"\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nshort\r\nzz\r\n",
])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_garbage_is_502(server, puppet, sent, method):
    path = fresh(server, say(sent, keep=False))
    reply = server.request(method, path)
    assert (reply.status, reply.reason, reply.body) == (502, "Bad Gateway", BAD_GATEWAY)
    assert reply.headers["Content-Type"] == "application/json"
    assert len(puppet.heads) == 1
    request_id = server.wait_access(rf' (\S+) - .*"{method} {path} HTTP/1.1" 502 25 ').group(1)
    server.wait_log(rf"ERROR {request_id} the service puppet failed: it ")
    # It goes on.
    puppet.act = say(answer(b"hello"))
    assert server.request(method, path).body == b"hello"


@pytest.mark.parametrize("framing, sent", [
    (b"Content-Length: 10\r\n", b"short"), (b"Transfer-Encoding: chunked\r\n", b"5\r\nshort\r\n"),
    (b"Transfer-Encoding: chunked\r\n", b"9\r\nshort"),
])
def test_half_a_response_is_cut(server, puppet, framing, sent):
    path = fresh(server, say(b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n" + sent, keep=False))
    reply = server.raw(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
    assert reply.startswith(b"HTTP/1.1 200 ") and b"short" in reply
    assert not reply.endswith(b"0\r\n\r\n")
    request_id = server.wait_access(rf' (\S+) - .*"GET {path} HTTP/1.1" 200 ').group(1)
    server.wait_log(rf"ERROR {request_id} the service puppet failed: it ")


def test_more_than_announced_is_dropped(server, puppet):
    path = fresh(server, say(answer(b"hello") + b"HTTP/1.1 200 OK\r\n\r\nevil"))
    with client(server) as ask:
        for count in (1, 2):
            assert ask("GET", path).body == b"hello"
            assert puppet.connections == count      # the connection was not used again
    server.wait_log("WARNING the service puppet sent more than it announced")


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_late_bytes_are_nobodys_response(server, puppet, method):
    """What comes on an idle connection is no answer to the next request there."""
    socks = []

    def act(sock, head, rest):
        socks.append(sock)
        sock.sendall(answer(b"hello"))
        return True

    path = fresh(server, act)
    with client(server) as ask:
        assert ask(method, path).body == b"hello"
        assert ask("GET", "/none").status == 404        # by now the connection is idle
        socks[0].sendall(answer(b"evil"))
        assert ask(method, path).body == b"hello"
    assert puppet.connections == 2


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("service", ["stopped", "gone"])
def test_unavailable(server, service, version):
    add(server, service, "/bin/sh", "-c", "exec sleep 1000")
    path = server.route(service=service)
    route_id = server.control("GET", "/routes").json()[-1]["id"]
    if service == "stopped":
        assert call(server, service, "stop").json()["state"] == "stopped"
    reply = server.raw(get(path, version))
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n") and body == UNAVAILABLE
    fields = [line for line in lines(head + b"\r\n\r\n") if not line.startswith(("Date", "Server"))]
    assert fields == ["Connection: close", f"Content-Length: {len(UNAVAILABLE)}",
                      "Content-Type: application/json"]
    head = server.request("HEAD", path)
    assert (head.status, head.body) == (503, b"")
    server.wait_access(rf'"GET {path} HTTP/{version}" 503 {len(UNAVAILABLE)} ')
    assert server.control("DELETE", f"/routes/{route_id}").status_code == 204
    remove(server, service)


def test_unavailable_takes_no_body(server):
    """Who waits to be told to send it, is told the other thing."""
    add(server, "silent", "sleep", "1000")
    path = server.route(service="silent", method="POST")
    route_id = server.control("GET", "/routes").json()[-1]["id"]
    reply = server.raw(f"POST {path} HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\n"
                       "Content-Length: 5\r\n\r\n".encode())
    assert reply.startswith(b"HTTP/1.1 503 ") and reply.endswith(UNAVAILABLE)
    # A connection whose body has come can be used again.
    with server.connect() as sock:
        for _ in range(2):
            sock.sendall(f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello".encode())
            head, rest = read_head(sock)
            assert read_until(sock, UNAVAILABLE, rest) == UNAVAILABLE and b" 503 " in head
    server.control("DELETE", f"/routes/{route_id}")
    remove(server, "silent")


def test_unknown_service(start_server, tmp_path):
    """A file of routes may name one that comes later."""
    (tmp_path / "routes").write_text(json.dumps([
        {"method": "GET", "url_pattern": "/later", "service": "later"}]))
    server = start_server("--routes", tmp_path / "routes")
    reply = server.get("/later")
    assert (reply.status, reply.body) == (503, UNAVAILABLE)
    puppet = Puppet(server, "later").listen()
    assert server.get("/later").body == b"hello"
    # Services that run end with their server, within the ordinary time.
    assert server.stop() == 0
    puppet.close()


# Connections.

def test_one_connection_for_one_request_after_another(server, puppet):
    def act(sock, head, rest):
        while b"Content-Length: 1" in head and not rest:
            rest += sock.recv(1)
        sock.sendall(answer(b"hello"))
        return True

    path = fresh(server, act)
    with server.connect() as sock:
        for count in range(20):
            method, more = ("GET", "\r\n") if count % 2 else ("POST", "Content-Length: 1\r\n\r\nx")
            sock.sendall(f"{method} {path} HTTP/1.1\r\nHost: h\r\n{more}".encode())
            assert read_until(sock, b"\r\n\r\nhello").endswith(b"hello")
    assert puppet.connections == 1 and len(puppet.heads) == 20


def test_one_request_at_a_time_on_a_connection(server, puppet):
    busy, most, lock = set(), [], threading.Lock()
    barrier = threading.Barrier(4)

    def act(sock, head, rest):
        with lock:
            assert sock not in busy
            busy.add(sock)
            most.append(len(busy))
        barrier.wait(DEADLINE)      # four are asked at once
        with lock:
            busy.discard(sock)
        assert rest == b""
        sock.sendall(answer(re.search(rb"n=(\d+)", head).group(1)))
        return True

    path = fresh(server, act)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        bodies = list(pool.map(lambda number: server.get(f"{path}?n={number}").body, range(12)))
    assert bodies == [b"%d" % number for number in range(12)]
    assert max(most) == 4


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "POST", "PATCH"])
def test_stale_connection_is_replaced(server, puppet, method):
    """A service that closes each connection when it is idle, without saying so before."""
    body = None if method in ("GET", "HEAD") else b"body"
    closed = threading.Semaphore(0)

    def act(sock, head, rest):
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        sock.shutdown(socket.SHUT_RDWR)
        closed.release()
        return False

    path = fresh(server, act)
    for _ in range(5):
        assert server.request(method, path, body).status == 200
        assert closed.acquire(timeout=DEADLINE)
    assert len(puppet.heads) == 5


@pytest.mark.parametrize("method, times", [("GET", 2), ("PUT", 2), ("DELETE", 2), ("HEAD", 2),
                                           ("OPTIONS", 2), ("POST", 1), ("PATCH", 1), ("BREW", 1)])
def test_only_what_may_be_repeated_is_sent_twice(server, puppet, method, times):
    """The service closes a connection that was used before, at the second request, unanswered."""
    used = set()

    def act(sock, head, rest):
        if sock in used:
            return False
        used.add(sock)
        sock.sendall(answer())
        return True

    path = fresh(server, act)
    with client(server) as ask:
        assert ask(method, path).status == 200
        status = ask(method, path).status
    assert (status, len(puppet.heads)) == ((200, 3) if times == 2 else (502, 2))


def test_nothing_is_sent_again_once_an_answer_began(server, puppet):
    path = fresh(server)
    with client(server) as ask:
        ask("GET", path)
        puppet.act = say(b"HTTP/1.1 2", keep=False)
        assert ask("GET", path).status == 502
    assert len(puppet.heads) == 2


def test_body_that_is_streamed_is_sent_once(server, puppet):
    """A PUT may be repeated, but its body is gone."""
    path = fresh(server)
    with client(server) as ask:
        ask("PUT", path, b"x")
        puppet.act = lambda sock, head, rest: False
        assert ask("PUT", path, iter([b"x" * 100])).status == 502
    assert len(puppet.heads) == 2


# Bodies on the way.

@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_streams_both_ways_at_once(server, puppet, framing):
    """What the client has sent is answered before it sends more."""
    def act(sock, head, rest):
        sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for word in (b"one", b"two"):
            while word not in rest:
                rest += sock.recv(100)
            sock.sendall(b"5\r\n<%b>\r\n" % word)
        while not rest.endswith(b"0\r\n\r\n" if framing == "chunked" else b"two"):
            rest += sock.recv(100)
        sock.sendall(b"0\r\n\r\n")
        return True

    path = fresh(server, act)
    fields = "Transfer-Encoding: chunked" if framing == "chunked" else "Content-Length: 6"
    with server.connect() as sock:
        sock.sendall(f"POST {path} HTTP/1.1\r\nHost: h\r\n{fields}\r\n\r\n".encode())
        received = b""
        for word in (b"one", b"two"):
            sock.sendall(b"3\r\n%b\r\n" % word if framing == "chunked" else word)
            received = read_until(sock, b"<%b>\r\n" % word, received)
            assert b"<%b>\r\n" % word in received
        if framing == "chunked":
            sock.sendall(b"0\r\n\r\n")
        assert read_until(sock, b"0\r\n\r\n", received).endswith(b"0\r\n\r\n")
        # And the connection goes on.
        sock.sendall(b"GET /none HTTP/1.1\r\nHost: h\r\n\r\n")
        assert read_head(sock)[0].startswith(b"HTTP/1.1 404 ")
    server.wait_access(rf'"POST {path} HTTP/1.1" 200 10 ')


def test_first_bytes_do_not_wait_for_more(server, puppet):
    send, end = threading.Event(), threading.Event()

    def act(sock, head, rest):
        sock.sendall(b"HTTP/1.1 200 OK\r\nX: y\r\n\r\n")
        send.wait(DEADLINE)
        sock.sendall(b"x")
        end.wait(DEADLINE)
        return False

    path = fresh(server, act)
    with server.connect() as sock:
        sock.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        head, rest = read_head(sock)
        assert b"X: y" in head and rest == b""
        send.set()
        assert sock.recv(10) == b"x"
        end.set()
        assert sock.recv(10) == b""


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_100_mb_in_constant_memory(server, framing):
    """Echoed by Node, or by Python where that is missing, while they are still being sent."""
    runtime = "python" if "node" in server.missing or framing == "length" else "node"
    size, piece = 100_000_000, bytes(range(256)) * 4096
    resident = reset_peak(server)

    def pieces():
        left = size
        while left:
            data = piece[:left]
            left -= len(data)
            yield data

    connection = http.client.HTTPConnection("127.0.0.1", server.port("user"), timeout=DEADLINE)
    headers = {"Content-Length": str(size)} if framing == "length" else {"Transfer-Encoding": "chunked"}
    sender = threading.Thread(target=lambda: connection.request(
        "POST", f"/stream/at-{runtime}/", pieces(), headers, encode_chunked=framing == "chunked"))
    sock = server.connect()
    connection.sock = sock
    sender.start()
    response = http.client.HTTPResponse(sock, method="POST")
    response.begin()
    received = 0
    while data := response.read(1 << 20):
        place = received % len(piece)
        assert data == (piece + piece)[place:place + len(data)]
        received += len(data)
    sender.join(DEADLINE)
    response.close()
    connection.close()
    assert received == size
    assert peak(server) - resident < 20_000, "kB more than before"


def test_expect_continue(server, puppet):
    def act(sock, head, rest):
        while len(rest) < 5:
            rest += sock.recv(10)
        sock.sendall(answer(rest))
        return True

    path = fresh(server, act)
    with server.connect() as sock:
        sock.sendall(f"POST {path} HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\n"
                     "Content-Length: 5\r\n\r\n".encode())
        assert read_head(sock) == (b"HTTP/1.1 100 Continue\r\n\r\n", b"")
        sock.sendall(b"hello")
        assert read_until(sock, b"hello").startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"xpect" not in puppet.heads[0]


def unread(sock):
    """Return how many bytes that `sock` has sent its peer on this machine has not read."""
    def key(address):
        return "%08X:%04X" % (int.from_bytes(socket.inet_aton(address[0]), sys.byteorder),
                              address[1])
    ends = [key(sock.getpeername()), key(sock.getsockname())]
    rows = map(str.split, pathlib.Path("/proc/net/tcp").read_text().splitlines())
    return next(int(row[4].partition(":")[2], 16) for row in rows if row[1:3] == ends)


@pytest.mark.parametrize("sent", [b"hello", b"hel"])
def test_expect_continue_that_is_not_waited_for(server, puppet, sent):
    """The body comes while the request is in the queue: it is asked for if it is not whole."""
    go_on = threading.Event()

    def act(sock, head, rest):
        go_on.wait(DEADLINE)
        while b"Content-Length" in head and len(rest) < 5:
            rest += sock.recv(10)
        sock.sendall(answer(b"<%b>" % rest))
        return True

    path = fresh(server, act, max_handlers=1, method="POST")
    with server.connect() as first, server.connect() as sock:
        first.sendall(f"POST {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        wait_until(lambda: puppet.heads, "the request")
        sock.sendall(f"POST {path} HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\n"
                     "Content-Length: 5\r\nConnection: close\r\n\r\n".encode())
        wait_until(lambda: unread(sock) == 0, "the head being read")
        sock.sendall(sent)
        go_on.set()
        if len(sent) < 5:
            assert read_head(sock) == (b"HTTP/1.1 100 Continue\r\n\r\n", b"")
            sock.sendall(b"hello"[len(sent):])
        reply = read_all(sock)
        assert reply.startswith(b"HTTP/1.1 200 OK\r\n") and reply.endswith(b"<hello>")


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("keep", [True, False])
def test_early_answer_to_a_large_upload(server, puppet, framing, keep):
    """The service refuses what it has not read; the client is told, and the rest is not waited for."""
    path = fresh(server, say(answer(b"too large", b"413 Content Too Large"), keep))
    fields = "Transfer-Encoding: chunked" if framing == "chunked" else "Content-Length: 500000000"
    with server.connect() as sock:
        sock.sendall(f"POST {path} HTTP/1.1\r\nHost: h\r\n{fields}\r\n\r\n".encode())
        if framing == "chunked":
            sock.sendall(b"5000000\r\n")
        sock.sendall(b"x" * 1_000_000)
        head, rest = read_head(sock)
        assert head.startswith(b"HTTP/1.1 413 Content Too Large\r\n")
        assert read_until(sock, b"too large", rest) == b"too large"
    puppet.act = say(answer(b"hello"))
    assert server.request("POST", path).body == b"hello"


@pytest.mark.parametrize("framing, sent, last", [
    ("Content-Length: 10", b"hello", b""), ("Transfer-Encoding: chunked", b"5\r\nhello\r\n", b""),
    ("Transfer-Encoding: chunked", b"5\r\nhello\r\n", b"zz\r\n")])
def test_broken_upload(server, puppet, framing, sent, last):
    """The service sees no end of a body that had none; the client is told if it listens."""
    got = []

    def act(sock, head, rest):
        got.append(rest)
        while data := sock.recv(1000):
            got.append(data)
        got.append(None)
        return False

    path = fresh(server, act)
    with server.connect() as sock:
        sock.sendall(f"POST {path} HTTP/1.1\r\nHost: h\r\n{framing}\r\n\r\n".encode() + sent)
        wait_until(lambda: b"".join(got) == sent, "the beginning of the body")
        sock.sendall(last)
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock).startswith(b"HTTP/1.1 400 ")
    wait_until(lambda: got[-1] is None, "the end of the service's connection")
    assert b"".join(got[:-1]) == sent


def test_max_body(start_server):
    server = start_server("--max-body", "10")
    puppet = Puppet(server, "puppet").listen()
    got = []

    def act(sock, head, rest):
        got.append(read_until(sock, b"0\r\n\r\n", rest))
        return False

    puppet.act = act
    path = server.route(service="puppet", method="POST")
    assert server.request("POST", path, b"x" * 11).status == 413
    assert puppet.heads == []
    assert server.request("POST", path, iter([b"x" * 6, b"y" * 6])).status == 413
    wait_until(lambda: got, "the end of the service's connection")
    assert not got[0].endswith(b"0\r\n\r\n")
    puppet.close()


# Clients that leave, and time.

def closed_event(puppet, first=b""):
    """Have the puppet say `first` and wait; return an Event that is set when it was hung up on."""
    event = threading.Event()

    def act(sock, head, rest):
        sock.sendall(first)
        while sock.recv(1000):
            pass
        event.set()
        return False

    puppet.act = act
    return event


STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"


@pytest.mark.parametrize("first", [b"", STREAM])
@pytest.mark.parametrize("body", ["\r\n", "Content-Length: 5\r\n\r\nhello",
                                  "Content-Length: 50\r\n\r\nhello"])
def test_lost_client_ends_the_connection_to_the_service(server, puppet, first, body):
    closed = closed_event(puppet, first)
    pid = state(server, "puppet")["pid"]
    path = fresh(server, puppet.act)
    with server.connect() as sock:
        sock.sendall(f"POST {path} HTTP/1.1\r\nHost: h\r\n{body}".encode())
        wait_until(lambda: puppet.heads, "the request")
        if first:
            assert sock.recv(1000)
        assert not closed.is_set()
    assert closed.wait(DEADLINE)
    server.wait_access(rf'"POST {path} HTTP/1.1" {"200" if first else "4(99|00)"} ')
    shown = state(server, "puppet")
    assert (shown["pid"], shown["state"]) == (pid, "available")


@pytest.mark.parametrize("first", [b"", STREAM])
def test_timeout(server, puppet, first):
    closed = closed_event(puppet, first)
    pid = state(server, "puppet")["pid"]
    path = fresh(server, puppet.act, timeout=0.2)
    reply = server.raw(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
    if first:
        assert reply.startswith(b"HTTP/1.1 200 ") and reply.endswith(b"1\r\nx\r\n")
    else:
        assert reply.startswith(b"HTTP/1.1 504 Gateway Timeout\r\n")
        assert reply.endswith(b'{"reason": "Gateway Timeout"}')
    assert closed.wait(DEADLINE)
    shown = state(server, "puppet")
    assert (shown["pid"], shown["state"]) == (pid, "available")


def test_timeout_while_the_client_still_sends(server, puppet):
    closed = closed_event(puppet)
    path = fresh(server, puppet.act, timeout=0.2, method="POST")
    with server.connect() as sock:
        sock.sendall(f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\nhalf".encode())
        assert read_head(sock)[0].startswith(b"HTTP/1.1 504 ")
    assert closed.wait(DEADLINE)


def test_timeout_of_a_service_that_reads_nothing(server, puppet):
    """The thread that sends the body is stuck; its time ends all the same."""
    over = threading.Event()

    def act(sock, head, rest):
        over.wait(DEADLINE)
        return False

    path = fresh(server, act, timeout=0.3, method="POST")
    with server.connect() as sock:
        sock.settimeout(DEADLINE)
        sock.sendall(f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: 50000000\r\n\r\n".encode())
        sender = threading.Thread(target=send_quietly, args=(sock, b"x" * 50_000_000))
        sender.start()
        assert read_head(sock)[0].startswith(b"HTTP/1.1 504 ")
    sender.join(DEADLINE)
    over.set()
    assert not sender.is_alive()


def send_quietly(sock, data):
    """Send until the peer has had enough."""
    try:
        sock.sendall(data)
    except OSError:
        pass


def test_keep_lets_the_service_finish(server, puppet):
    go_on, done = threading.Event(), []

    def act(sock, head, rest):
        go_on.wait(DEADLINE)
        sock.sendall(answer(b"x" * 100_000))
        sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            sock.recv(1)                # it is not hung up on
        sock.settimeout(DEADLINE)
        done.append(True)
        return True

    path = fresh(server, act, disconnect="keep")
    with server.connect() as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        wait_until(lambda: puppet.heads, "the request")
    assert server.get("/none").status == 404        # the client is gone by now
    go_on.set()
    server.wait_access(rf'"GET {path} HTTP/1.1" (499|200) ')
    wait_until(lambda: done, "the end of the work")


def test_keep_does_not_wait_for_a_body_that_never_comes(server, puppet):
    """The service is told: it sees the connection's end within the body."""
    closed = closed_event(puppet)
    path = fresh(server, puppet.act, disconnect="keep", method="POST")
    with server.connect() as sock:
        sock.sendall(f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: 50\r\n\r\nhalf".encode())
        wait_until(lambda: puppet.heads, "the request")
    hung_up = closed.wait(2)
    puppet.hang_up()            # else this handler would be in the way of the other tests
    assert hung_up


def test_queue_and_limits_are_those_of_any_route(server, puppet):
    go_on = threading.Event()

    def act(sock, head, rest):
        go_on.wait(DEADLINE)
        sock.sendall(answer(b"hello"))
        return True

    path = fresh(server, act, max_handlers=1, max_queue=0)
    with server.connect() as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
        wait_until(lambda: puppet.heads, "the request")
        reply = server.get(path)
        assert (reply.status, reply.headers["Retry-After"]) == (503, "1")
        assert reply.body != UNAVAILABLE
        go_on.set()
        assert read_all(sock).endswith(b"hello")


def test_access_log(server, puppet):
    path = fresh(server, say(answer(b"hello", b"201 Created")))
    server.get(path + "?x=%22", **{"User-Agent": "u", "Referer": "r"})
    line = server.wait_access(rf".* {path}.*").group()
    assert re.fullmatch(rf'127\.0\.0\.1 [0-9a-f]{{16}} - \[.*\] "GET {path}\?x=%22 HTTP/1.1" '
                        r'201 5 "r" "u" \d+\.\d{3} "/p/\{any:\.\*\}"', line)


def test_pipelined_requests(server, puppet):
    def act(sock, head, rest):
        sock.sendall(answer(re.search(rb"n=(\d+)", head).group(1) + b";"))
        return True

    path = fresh(server, act)
    with server.connect() as sock:
        sock.sendall(b"".join(f"GET {path}?n={number} HTTP/1.1\r\nHost: h\r\n\r\n".encode()
                              for number in range(5)) + b"GET /none HTTP/1.0\r\n\r\n")
        assert re.findall(rb"(\d+);", read_all(sock)) == [b"0", b"1", b"2", b"3", b"4"]


# The real ones.

@pytest.fixture(params=RUNTIMES)
def runtime(server, request):
    if request.param in server.missing:
        pytest.skip(f"{request.param} is not installed")
    return request.param


def test_runtime_echo(server, runtime):
    reply = server.request("POST", f"/echo/at-{runtime}/%20?q=%20", b"caf\xc3\xa9",
                           {"X-One": "1", "Kapow_Match_kind": "evil", "X-Forwarded-For": "evil"})
    assert (reply.status, reply.headers["X-Runtime"]) == (200, runtime.partition("-")[0])
    seen = reply.json()
    assert (seen["method"], seen["target"]) == ("POST", f"/echo/at-{runtime}/%20?q=%20")
    assert seen["body"] == "caf\xc3\xa9"
    headers = {name.lower(): value for name, value in seen["headers"]}
    assert headers["x-one"] == "1" and headers["x-forwarded-for"] == "127.0.0.1"
    assert headers["kapow-match-kind"] == "echo" and headers["kapow-match-more"] == "%20"
    assert "evil" not in headers.values()


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_runtime_bodies(server, runtime, framing):
    body = os.urandom(300_000)
    data = body if framing == "length" else iter([body[:100_000], body[100_000:]])
    reply = server.request("POST", f"/stream/at-{runtime}/", data)
    assert (reply.status, reply.body) == (200, body)


def test_runtime_responses(server, runtime):
    for kind in ("length", "chunked", "close"):
        reply = server.get(f"/{kind}/at-{runtime}/")
        assert (reply.status, reply.body) == (200, b"x" * 100_000)
    for status in (204, 304, 404):
        reply = server.get(f"/status/at-{runtime}/{status}")
        assert (reply.status, reply.body) == (status, b"")


def test_runtime_head(server, runtime):
    reply = server.request("HEAD", f"/echo/at-{runtime}/")
    assert (reply.status, reply.body) == (200, b"")
    assert reply.headers["X-Runtime"]


def test_runtime_many_at_once(server, runtime):
    def ask(number):
        reply = server.request("POST" if number % 2 else "GET", f"/echo/at-{runtime}/?n={number}",
                               b"%d" % number if number % 2 else None)
        return reply.status, reply.json()["target"], reply.json()["body"]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(ask, range(60)))
    assert replies == [(200, f"/echo/at-{runtime}/?n={number}", str(number) if number % 2 else "")
                       for number in range(60)]


# The control interface and the client.

def check(reply, status, reason):
    """Compare an error with what it should be."""
    assert (reply.status_code, reply.reason) == (status, reason), reply.text
    assert reply.headers["Content-Type"] == "application/json"
    assert reply.json()["reason"] == reason


def test_add_show_remove(server):
    shown = add(server, "one", "sleep", "1000", routes=False)
    assert set(shown) == {"name", "command", "state", "pid", "restarts", "manifest"}
    assert shown == {"name": "one", "command": ["sleep", "1000"], "state": "starting",
                     "pid": shown["pid"], "restarts": 0, "manifest": None}
    assert isinstance(shown["pid"], int)
    assert state(server, "one") == shown
    assert server.control("GET", "/services").json()[-1] == shown
    answer_ = call(server, "one", "start")
    assert (answer_.status_code, answer_.json()) == (200, shown)
    stopped = {**shown, "state": "stopped", "pid": None}
    for _ in range(2):
        answer_ = call(server, "one", "stop")
        assert (answer_.status_code, answer_.json()) == (200, stopped)
    again = call(server, "one", "start").json()
    assert again["pid"] not in (None, shown["pid"]) and again["restarts"] == 0
    remove(server, "one")
    assert "one" not in [item["name"] for item in server.control("GET", "/services").json()]
    assert not pathlib.Path(f"/proc/{again['pid']}").exists()


def test_names(server):
    for name in ("a", "_", "0.@-_z", "x" * 64, "start"):
        add(server, name, "sleep", "1000")
        assert state(server, name)["name"] == name
        check(server.control("POST", "/services", {"name": name, "command": ["true"]}), 409,
              "Service Exists")
        remove(server, name)


@pytest.mark.parametrize("document, field", [
    ([], None), (None, None), ("x", None), (1, None), ({}, "name"), ({"name": "a"}, "command"),
    ({"command": ["true"]}, "name"), ({"name": "", "command": ["true"]}, "name"),
    ({"name": "x" * 65, "command": ["true"]}, "name"), ({"name": "-a", "command": ["true"]}, "name"),
    ({"name": ".a", "command": ["true"]}, "name"), ({"name": "a/b", "command": ["true"]}, "name"),
    ({"name": "a b", "command": ["true"]}, "name"), ({"name": "é", "command": ["true"]}, "name"),
    ({"name": "a\n", "command": ["true"]}, "name"), ({"name": 1, "command": ["true"]}, "name"),
    ({"name": "a", "command": []}, "command"), ({"name": "a", "command": "true"}, "command"),
    ({"name": "a", "command": [""]}, "command"), ({"name": "a", "command": ["x", 1]}, "command"),
    ({"name": "a", "command": [["x"]]}, "command"), ({"name": "a", "command": [None]}, "command"),
    ({"name": "a", "command": ["a\0b"]}, "command"), ({"name": "a", "command": ["\ud800"]}, "command"),
    ({"name": "a", "command": ["true"], "routes": 1}, "routes"),
    ({"name": "a", "command": ["true"], "routes": "yes"}, "routes"),
    ({"name": "a", "command": ["true"], "state": "stopped"}, "state"),
])
def test_invalid_service(server, document, field):
    before = server.control("GET", "/services").json()
    reply = server.control("POST", "/services", data=json.dumps(document))
    check(reply, 422, "Invalid Service")
    assert reply.json().get("field") == field and reply.json()["error"]
    assert len(server.control("GET", "/services").json()) == len(before)


def test_malformed(server):
    for path in ("/services", "/services/puppet/signal"):
        for data in (b"", b"{", b"nonsense", b"\xff", b"{}{}"):
            check(server.control("POST", path, data=data), 400, "Malformed JSON")


@pytest.mark.parametrize("method, path, status, allow", [
    ("PUT", "/services", 405, "GET, POST"), ("DELETE", "/services", 405, "GET, POST"),
    ("POST", "/services/puppet", 405, "GET, DELETE"), ("GET", "/services/puppet/start", 405, "POST"),
    ("GET", "/services/puppet/signal", 405, "POST"), ("POST", "/services/puppet/kill", 404, None),
    ("GET", "/services/", 404, None), ("POST", "/services/puppet/start/", 404, None),
])
def test_other_calls(server, method, path, status, allow):
    reply = server.control(method, path)
    check(reply, status, "Not Found" if status == 404 else "Method Not Allowed")
    assert reply.headers.get("Allow") == allow


@pytest.mark.parametrize("method, path", [
    ("GET", ""), ("DELETE", ""), ("POST", "/start"), ("POST", "/stop"), ("POST", "/restart"),
    ("POST", "/signal")])
@pytest.mark.parametrize("name", ["none", "a%2Fb", "%00", "%ff"])
def test_service_not_found(server, method, path, name):
    document = {"signal": "HUP"} if path == "/signal" else None
    check(server.control(method, f"/services/{name}{path}", document), 404, "Service Not Found")


def test_service_in_use(server):
    add(server, "used", "sleep", "1000")
    patterns = [server.route(service="used"), server.route(service="used", handler="h")]
    server.route(service="puppet")
    reply = server.control("DELETE", "/services/used")
    check(reply, 409, "Service In Use")
    users = [route for route in server.control("GET", "/routes").json()
             if route.get("service") == "used"]
    assert reply.json()["routes"] == users
    assert [route["url_pattern"] for route in users] == patterns
    assert state(server, "used")["state"] == "starting"
    for route in users:
        assert server.control("DELETE", "/routes/" + route["id"]).status_code == 204
    remove(server, "used")


def test_routes_name_services(server):
    document = {"method": "GET", "url_pattern": "/x", "service": "puppet"}
    shown = server.control("POST", "/routes", document).json()
    assert {key: shown[key] for key in (*document, "entrypoint", "command")} == {
        **document, "entrypoint": "", "command": ""}
    assert "handler" not in shown
    put = server.control("PUT", "/routes", {**document, "handler": "h"}).json()
    assert (put["service"], put["handler"]) == ("puppet", "h")
    for route in (shown, put):
        server.control("DELETE", "/routes/" + route["id"])


@pytest.mark.parametrize("more, field", [
    ({"service": "none"}, "service"), ({"service": ""}, "service"), ({"service": 1}, "service"),
    ({"service": "puppet", "command": "x"}, "command"),
    ({"service": "puppet", "entrypoint": "/bin/sh"}, "entrypoint"), ({"handler": "h"}, "handler"),
    ({"service": "puppet", "handler": "a\nb"}, "handler"),
    ({"service": "puppet", "handler": "é"}, "handler"), ({"service": "puppet", "handler": 1}, "handler"),
])
def test_invalid_routes(server, more, field):
    before = server.control("GET", "/routes").json()
    route = {"method": "GET", "url_pattern": "/x", **more}
    for method, document in (("POST", route), ("PUT", route), ("PUT", [route])):
        reply = server.control(method, "/routes", document)
        check(reply, 422, "Invalid Route")
        assert reply.json()["field"] == field
    assert server.control("GET", "/routes").json() == before


@pytest.mark.parametrize("document", [
    {}, [], "HUP", {"signal": None}, {"signal": 1}, {"signal": ""}, {"signal": "NONE"},
    {"signal": "SIG"}, {"signal": "SIGSIGHUP"}, {"signal": "1"}, {"signal": ["HUP"]}])
def test_invalid_signal(server, document):
    check(call(server, "puppet", "signal", document), 422, "Invalid Signal")
    assert state(server, "puppet")["state"] == "available"


def test_signal(server):
    caught = server.directory / uuid.uuid4().hex
    add(server, "trapping", "/bin/sh", "-c",
        f"trap 'echo caught >> {caught}' HUP; echo > {caught}; while :; do sleep 0.01; done")
    wait_until(caught.exists, "the trap")
    for count, name in enumerate(("HUP", "SIGHUP", "hup"), 1):
        reply = call(server, "trapping", "signal", {"signal": name})
        assert (reply.status_code, reply.json()) == (200, state(server, "trapping"))
        wait_until(lambda: caught.read_text().count("caught") == count, "the signal")
    call(server, "trapping", "stop")
    check(call(server, "trapping", "signal", {"signal": "HUP"}), 409, "Service Not Running")
    remove(server, "trapping")


def test_ctl(server):
    """Every command, against the control interface."""
    def ctl(*arguments, status=0):
        done = server.ctl("service", *arguments)
        assert done.returncode == status, done.stderr
        return done.stdout.decode() if status == 0 else done.stderr.decode()

    added = json.loads(ctl("add", "ctl", "--", "sleep", "--", "1000"))
    assert added["command"] == ["sleep", "--", "1000"]
    assert added == state(server, "ctl")
    assert json.loads(ctl("list", "ctl")) == added
    assert json.loads(ctl("list", "-o", "json"))[-1] == added
    table = ctl("list", "-o", "table").splitlines()
    assert table[0].split()[:2] == ["NAME", "STATE"] and table[-1].split()[:2] == ["ctl", "starting"]
    assert ctl("signal", "ctl", "CONT") == ""
    assert json.loads(ctl("stop", "ctl"))["state"] == "stopped"
    done = server.ctl("route", "add", "/ctl", "--service", "ctl", "--handler", "h")
    route = json.loads(done.stdout)
    assert (route["service"], route["handler"]) == ("ctl", "h")
    server.control("DELETE", "/routes/" + route["id"])
    assert ctl("remove", "ctl") == ""
    assert ctl("restart", "ctl", status=1) == "kapowctl: service ctl: Service Not Found\n"
    ctl("add", "ctl", status=2)
