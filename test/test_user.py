"""The user interface on the wire: routing, framing, persistence, refused requests."""

import json
import re
import socket

import pytest

from conftest import read_all, wait_until

STREAM = "for i in 1 2 3; do echo $i | kapow set /response/stream; done"


def exchange(server, path, *headers, method="GET", version="HTTP/1.1", body=b""):
    """Send one request; return (head, body) bytes, all that came until the server closed."""
    lines = [f"{method} {path} {version}", "Host: h", *headers]
    answer = server.raw("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
    head, _, rest = answer.partition(b"\r\n\r\n")
    return head, rest


def test_content_length_for_what_was_held_back(server):
    path = server.route("head -c 65536 /dev/zero | tr '\\0' x | kapow set /response/body")
    reply = server.get(path)
    assert reply.headers["Content-Length"] == "65536"
    assert reply.headers["Transfer-Encoding"] is None
    assert reply.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert reply.body == b"x" * 65536


def test_chunks_for_more(server):
    path = server.route("head -c 300000 /dev/zero | kapow set /response/body")
    reply = server.get(path)
    assert reply.headers["Content-Length"] is None
    assert reply.headers["Transfer-Encoding"] == "chunked"
    assert reply.headers["Content-Type"] == "application/octet-stream"
    assert reply.body == bytes(300000)


def test_stream(server):
    head, body = exchange(server, server.route(STREAM), "Connection: close")
    assert b"Transfer-Encoding: chunked" in head
    assert body == b"2\r\n1\n\r\n2\r\n2\n\r\n2\r\n3\n\r\n0\r\n\r\n"


def test_stream_is_sent_at_once(server):
    with server.handler() as handler:
        handler.put("/response/stream", b"now")
        assert handler.put("/response/status", b"404").json() == {"reason": "Response Already Started"}
        reply = handler.put("/response/body", b"x")
        assert (reply.status, reply.reason) == (409, "Body And Stream Are Exclusive")


def test_http_1_0_gets_no_chunks(server):
    head, body = exchange(server, server.route(STREAM), version="HTTP/1.0")
    assert (b"Transfer-Encoding" in head, b"Connection: close" in head) == (False, True)
    assert (head.split()[0], body) == (b"HTTP/1.1", b"1\n2\n3\n")


def test_http_1_0_keeps_a_connection_that_it_asks_for(server):
    path = server.route("kapow set /response/body x")
    with server.connect() as sock:
        for last in (False, True):
            sock.sendall(f"GET {path} HTTP/1.0\r\n".encode()
                         + (b"" if last else b"Connection: keep-alive\r\n") + b"\r\n")
            data = read_all(sock) if last else sock.recv(65536)
            assert data.endswith(b"\r\n\r\nx")
            assert (b"Connection: close" if last else b"Connection: keep-alive") in data


@pytest.mark.parametrize("failure", ["exit 3", "kill -KILL $$"])
def test_failed_stream_is_cut(server, failure):
    head, body = exchange(server, server.route(f"{STREAM}; {failure}"))
    assert head.startswith(b"HTTP/1.1 200")
    assert body == b"2\r\n1\n\r\n2\r\n2\n\r\n2\r\n3\n\r\n"


def test_failed_stream_to_http_1_0_is_reset(server):
    path = server.route(f"{STREAM}; exit 3")
    with server.connect() as sock:
        sock.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        with pytest.raises(ConnectionResetError):
            while sock.recv(65536):
                pass


def test_stream_ended_by_a_clean_signal_is_whole(server):
    _, body = exchange(server, server.route(f"{STREAM}; kill -TERM $$"), "Connection: close")
    assert body.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("length, sent", [(5, b"hello"), (3, b"hel"), (9, b"hello")])
@pytest.mark.parametrize("resource", ["body", "stream"])
def test_own_content_length(server, length, sent, resource):
    path = server.route(f"kapow set /response/headers/content-length {length}; "
                        f"printf hello | kapow set /response/{resource}")
    head, body = exchange(server, path, "Connection: close")
    assert f"content-length: {length}\r\n".encode() in head + b"\r\n"
    assert head.lower().count(b"content-length") == 1 and b"Transfer-Encoding" not in head
    assert body == sent
    if length != 5:
        server.wait_log(f"wrote {'more' if length < 5 else 'less'} than the Content-Length")


@pytest.mark.parametrize("status", [204, 205, 304])
def test_statuses_without_body(server, status):
    path = server.route(f"kapow set /response/status {status}; kapow set /response/body x; "
                        "kapow set /response/headers/Content-Length 1")
    head, body = exchange(server, path, "Connection: close")
    assert body == b"" and b"Content-Type" not in head
    assert [line for line in head.split(b"\r\n") if line.startswith(b"Content-Length")] == {
        204: [], 205: [b"Content-Length: 0"], 304: [b"Content-Length: 1"]}[status]


def test_head(server):
    path = server.route("kapow set /response/body hello")
    head, body = exchange(server, path, "Connection: close", method="HEAD")
    assert body == b"" and b"Content-Length: 5" in head and b"text/plain" in head
    head, body = exchange(server, server.route(STREAM), "Connection: close", method="HEAD")
    assert body == b"" and b"Transfer-Encoding: chunked" in head


def test_no_body_has_no_type(server):
    reply = server.get(server.route(":"))
    assert (reply.headers["Content-Length"], reply.headers["Content-Type"]) == ("0", None)
    assert reply.headers["Date"].endswith(" GMT") and reply.headers["Server"]


def test_html(server):
    reply = server.get(server.route("echo '<!doctype html><p>x' | kapow set /response/body"))
    assert reply.headers["Content-Type"] == "text/html; charset=utf-8"


@pytest.mark.parametrize("method, path, status, allow", [
    ("GET", "/none", 404, None), ("OPTIONS", "/none", 404, None), ("POST", "/it", 405, "GET, HEAD, OPTIONS"),
    ("get", "/it", 405, "GET, HEAD, OPTIONS"), ("OPTIONS", "/it", 204, "GET, HEAD, OPTIONS"),
    ("GET", "/i%74", 200, None), ("GET", "/it/", 404, None), ("GET", "//it", 404, None),
    ("GET", "/x/../it", 404, None), ("GET", "/a%2Fb", 200, None), ("BREW", "/brew", 200, None),
])
def test_routing(server, method, path, status, allow):
    for pattern in ("/it", "/a/b"):
        server.route(pattern=pattern)
    server.route(pattern="/brew", method="BREW")
    reply = server.request(method, path)
    assert (reply.status, reply.headers["Allow"]) == (status, allow)
    if status >= 400:
        assert reply.json() == {"reason": reply.reason}


def test_keep_alive_and_pipelining(server):
    path = server.route("kapow get /request/body | kapow set /response/body", "POST")
    one = f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n".encode()
    with server.connect() as sock:
        sock.sendall(one + b"\r\n1\r\n" + one + b"\r\n2GET /none HTTP/1.1\r\nHost: h\r\n\r\n"
                     + one + b"Connection: close\r\n\r\n3")
        answer = read_all(sock)
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"200", b"404", b"200"]
    assert re.findall(rb"\r\n\r\n([123])", answer) == [b"1", b"2", b"3"]


def test_unread_body_is_skipped(server):
    path = server.route(":", "POST")
    with server.connect() as sock:
        sock.sendall(f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000\r\n\r\n".encode()
                     + bytes(1000000) + b"GET /none HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        answer = read_all(sock)
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"404"]


def test_large_unread_body_ends_the_connection(server):
    path = server.route(":", "POST")
    head, _ = exchange(server, path, "Content-Length: 10000000", method="POST", body=bytes(100000))
    assert head.startswith(b"HTTP/1.1 200") and b"Connection: close" in head


def test_expect_continue(server):
    path = server.route("kapow get /request/body | kapow set /response/body", "POST")
    head = f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\nExpect: 100-continue\r\n".encode()
    with server.connect() as sock:
        sock.sendall(head + b"Connection: close\r\n\r\n")
        assert sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"hi")
        assert read_all(sock).endswith(b"\r\n\r\nhi")


def test_body_never_wanted_is_never_asked_for(server):
    path = server.route("kapow set /response/body no", "POST")
    head, body = exchange(server, path, "Content-Length: 2", "Expect: 100-continue", method="POST")
    assert head.startswith(b"HTTP/1.1 200") and b"Connection: close" in head and body == b"no"


@pytest.mark.parametrize("data, status", [
    (b"nonsense\r\n\r\n", 400), (b"GET / HTTP/1.1\r\n\r\n", 400), (b"GET / HTTP/2.0\r\n\r\n", 505),
    (b"GET / HTTP/1.1\n\n", 400), (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: h\r\n\r\n", 414),
    (b"GET / HTTP/1.1\r\nHost: h\r\n" + b"X: y\r\n" * 100 + b"\r\n", 431),
    (b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
    (b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    (b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip\r\n\r\n", 400),
    (b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
    (b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 9999999999\r\n\r\n", 413),
])
@pytest.mark.parametrize("name", ["user", "data"])
def test_refused(server, data, status, name):
    answer = server.raw(data + b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n", name)
    if name == "data" and status in (413, 414):      # which takes any body, and longer lines
        status = 404
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer
    if status != 404:
        assert b"\r\nConnection: close" in head and answer.count(b"HTTP/1.1 ") == 1
        reason = json.loads(body)["reason"]
        assert head.split(b"\r\n")[0] == f"HTTP/1.1 {status} {reason}".encode()


@pytest.mark.parametrize("body", [b"5\r\nhel", b"zz\r\n", b"5\r\nhelloX"])
def test_broken_body(server, body):
    """400 if nothing was sent, and whoever reads the body sees a failure."""
    out = server.directory / "out"
    out.unlink(missing_ok=True)
    path = server.route(f"kapow get /request/body > /dev/null; echo $? > {out}.new; mv {out}.new {out}; "
                        "sleep 1000", "POST")
    with server.connect() as sock:
        sock.sendall(f"POST {path} HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        wait_until(server.children, "the program")
        sock.sendall(body)
        if body == b"5\r\nhel":
            sock.shutdown(socket.SHUT_WR)
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 400 ") or body == b"5\r\nhel"
    wait_until(lambda: not server.children(), "the end of the program")
    assert not out.exists() or out.read_text() == "1\n"


def test_max_body(start_server):
    server = start_server("--max-body", "1KiB")
    path = server.route("kapow get /request/body > /dev/null; kapow set /response/body fine", "POST")
    assert server.request("POST", path, bytes(1024)).body == b"fine"
    reply = server.request("POST", path, bytes(1025))
    assert (reply.status, reply.json()) == (413, {"reason": "Content Too Large"})
    reply = server.request("POST", path, iter([bytes(1000), bytes(25)]))
    assert (reply.status, reply.json()) == (413, {"reason": "Content Too Large"})
    assert server.request("POST", path, iter([bytes(1000), bytes(24)])).body == b"fine"
