"""Every resource of the contract, through the data interface of a real server."""

import http.client
import json
import socket

import pytest

from conftest import DEADLINE, read_all

FORM = {"Content-Type": "application/x-www-form-urlencoded"}
MULTIPART = {"Content-Type": 'multipart/form-data; boundary="b b"'}
MULTIPART_BODY = b"".join(
    b'--b b\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n' % pair for pair in [
        (b'name="f"; filename="../a.txt"', b"one\r\ntwo"), (b'name="t"', b"text"),
        (b'name="f"; filename="b.bin"', b"\x00\xff"), (b'name="t"', b"again"),
        (b'name="e"; filename=""', b"")]) + b"--b b--\r\n"


def check(reply, status, body=None, reason=None):
    """Compare a Reply of the data interface with what it should be."""
    assert reply.status == status, reply.body
    if reason is not None:
        assert reply.reason == reason
        assert reply.headers["Content-Type"] == "application/json"
        assert reply.json()["reason"] == reason
    if body is not None:
        assert reply.body == body
        assert reply.headers["Content-Type"] == "application/octet-stream"


# (path, value) in plain_request(). Also read over the channel, by test_channel.py.
READS = [
    ("/request/method", b"GET"), ("/request/version", b"HTTP/1.1"),
    ("/request/host", b"example.org"), ("/request/remote", b"127.0.0.1"),
    ("/request/path", b"/x/a b/y\xc3\xa9\xff"),
    ("/request/url", b"/x/a%20b/y%C3%A9%FF?q=1&q=2&r=&s%2Ft=%00%0a%25&t+u=v"),
    ("/request/matches/name", b"a b"), ("/request/matches/caf%C3%A9", b"y\xc3\xa9\xff"),
    ("/request/matches", b"name\ncaf\xc3\xa9\n"),
    ("/request/params/q", b"1"), ("/request/params/q/0", b"1"), ("/request/params/q/1", b"2"),
    ("/request/params/q/01", b"2"),
    ("/request/params/r", b""), ("/request/params/s%2Ft", b"\0\n%"), ("/request/params/t%20u", b"v"),
    ("/request/params", b"q\nr\ns/t\nt u\n"),
    ("/request/headers/x-a", b"1"), ("/request/headers/X-A/1", b"2"),
    ("/request/headers/HOST", b"example.org"), ("/request/headers/x-raw", b"\xe9"),
    ("/request/headers", b"Accept-Encoding\nHost\nX-A\nX-Raw\nCookie\n"),
    ("/request/cookies/c", b"1"), ("/request/cookies/C", b"2"), ("/request/cookies", b"c\nC\n"),
    ("/request/form", b""), ("/request/files", b""), ("/request/body", b""),
]


@pytest.mark.parametrize("path, value", READS)
def test_read(server, path, value):
    with plain_request(server) as handler:
        check(handler.get(path), 200, value)


PLAIN_PATTERN = "/x/{name}/{café:.*}"
PLAIN_TARGET = "/x/a%20b/y%C3%A9%FF?q=1&q=2&r=&s%2Ft=%00%0a%25&t+u=v"


def plain_request(server):
    """A waiting handler whose request has a little of everything but a body."""
    return server.handler(pattern=PLAIN_PATTERN, target=PLAIN_TARGET, headers=plain_headers())


def plain_headers():
    """The headers of plain_request()."""
    return Headers([("Host", "example.org"), ("X-A", "1"), ("x-a", "2"), ("X-Raw", b"\xe9"),
                    ("Cookie", "c=1; C=2; c=3")])


class Headers(list):
    """Header pairs, for http.client in the place of a dict: names may be repeated."""

    def items(self):
        return list.__iter__(self)

    def __iter__(self):
        return (name for name, _ in self.items())


READS_REFUSED = [
    ("/request/params/none", 404, "Resource Item Not Found"),
    ("/request/params/Q", 404, "Resource Item Not Found"),
    ("/request/params/q/2", 404, "Resource Item Not Found"),
    ("/request/params/", 404, "Resource Item Not Found"),
    ("/request/headers/none", 404, "Resource Item Not Found"),
    ("/request/headers/x-a/2", 404, "Resource Item Not Found"),
    ("/request/cookies/none", 404, "Resource Item Not Found"),
    ("/request/matches/none", 404, "Resource Item Not Found"),
    ("/request/form/none", 404, "Resource Item Not Found"),
    ("/request/files/none/content", 404, "Resource Item Not Found"),
    ("/request/files/none/filename", 404, "Resource Item Not Found"),
    ("/ssl/client/i/dn", 404, "Resource Item Not Found"),
    ("", 400, "Invalid Resource Path"), ("/", 400, "Invalid Resource Path"),
    ("/none", 400, "Invalid Resource Path"), ("/request", 400, "Invalid Resource Path"),
    ("/request/none", 400, "Invalid Resource Path"),
    ("/request/method/", 400, "Invalid Resource Path"),
    ("/request/method/x", 400, "Invalid Resource Path"),
    ("//request/method", 400, "Invalid Resource Path"),
    ("/request/params/q/x", 400, "Invalid Resource Path"),
    ("/request/params/q/-1", 400, "Invalid Resource Path"),
    ("/request/params/q/", 400, "Invalid Resource Path"),
    ("/request/params/q/1/2", 400, "Invalid Resource Path"),
    ("/request/cookies/c/0", 400, "Invalid Resource Path"),
    ("/request/files/f", 400, "Invalid Resource Path"),
    ("/request/files/f/other", 400, "Invalid Resource Path"),
    ("/response/status", 400, "Invalid Resource Path"),
    ("/response/body", 400, "Invalid Resource Path"),
    ("/response/headers/X", 400, "Invalid Resource Path"),
    ("/server/log", 400, "Invalid Resource Path"),
]


@pytest.mark.parametrize("path, status, reason", READS_REFUSED)
def test_read_refused(server, path, status, reason):
    with plain_request(server) as handler:
        check(handler.get(path), status, reason=reason)


WRITES_REFUSED = [
    ("/request/method", b"PUT", 400, "Invalid Resource Path"),
    ("/request/body", b"x", 400, "Invalid Resource Path"),
    ("/route/id", b"x", 400, "Invalid Resource Path"),
    ("/none", b"x", 400, "Invalid Resource Path"),
    ("/response/headers", b"x", 400, "Invalid Resource Path"),
    ("/response/headers/X/0", b"x", 400, "Invalid Resource Path"),
    ("/response/status", b"", 422, "Non Integer Value"),
    ("/response/status", b"two", 422, "Non Integer Value"),
    ("/response/status", b"404\n\n", 422, "Non Integer Value"),
    ("/response/status", b"20", 400, "Invalid Status Code"),
    ("/response/status", b"1000", 400, "Invalid Status Code"),
    ("/response/headers/a%20b", b"x", 400, "Invalid Header"),
    ("/response/headers/", b"x", 400, "Invalid Header"),
    ("/response/headers/X", b"a\r\nY: b", 400, "Invalid Header"),
    ("/response/headers/X%0D%0AY", b"a", 400, "Invalid Header"),
    ("/response/headers/X", b"a\0", 400, "Invalid Header"),
    ("/response/headers/Connection", b"close", 400, "Invalid Header"),
    ("/response/cookies/a%3Bb", b"x", 400, "Invalid Header"),
    ("/response/cookies/a", b"x\ny", 400, "Invalid Header"),
    ("/response/headers/X", b"x" * 70000, 413, "Content Too Large"),
]


@pytest.mark.parametrize("path, value, status, reason", WRITES_REFUSED)
def test_write_refused(server, path, value, status, reason):
    with server.handler() as handler:
        check(handler.put(path, value), status, reason=reason)
        assert handler.finish().status == 200


def test_handler_not_found_comes_first(server):
    path = "/handlers/00000000-0000-0000-0000-000000000000"
    for method, resource in (("GET", "/request/method"), ("GET", "/nonsense"), ("POST", "/x"),
                             ("PUT", "/response/body")):
        check(data_call(server, method, path + resource), 404, reason="Handler ID Not Found")
    for other in ("/", "/handlers", "/handlers/", "/handlers//request/method", "/routes"):
        check(data_call(server, "GET", other), 404, reason="Handler ID Not Found")


def data_call(server, method, path):
    """Call the data interface; return a Reply."""
    from conftest import Reply
    connection = http.client.HTTPConnection("127.0.0.1", server.port("data"), timeout=DEADLINE)
    connection.request(method, path)
    reply = Reply(connection.getresponse())
    connection.close()
    return reply


def test_dead_handler(server):
    with server.handler() as handler:
        assert handler.get("/request/method").status == 200
    check(handler.get("/request/method"), 404, reason="Handler ID Not Found")
    check(handler.put("/response/body", b"x"), 404, reason="Handler ID Not Found")


def test_other_methods(server):
    with server.handler() as handler:
        for method in ("POST", "DELETE", "HEAD", "PATCH", "BREW"):
            reply = handler.resource(method, "/request/method")
            assert (reply.status, reply.headers["Allow"]) == (405, "GET, PUT")


def test_writes(server):
    with server.handler() as handler:
        for path, value in (("/response/status", b"418\n"), ("/response/headers/X-A", b"1\n"),
                            ("/response/headers/x-a", b"2\r\n"), ("/response/cookies/c", b"v; Path=/\n"),
                            ("/response/body", b"a\n"), ("/response/body", b""),
                            ("/response/body", b"\xff\0b\n")):
            reply = handler.put(path, value)
            assert (reply.status, reply.body) == (200, b"")
        reply = handler.finish()
    assert (reply.status, reply.reason, reply.body) == (418, "I'm a Teapot", b"a\n\xff\0b\n")
    assert reply.headers.get_all("X-A") == ["1", "2"]
    assert reply.headers["Set-Cookie"] == "c=v; Path=/"
    assert reply.headers["Content-Type"] == "application/octet-stream"


def test_server_headers_are_replaced_once(server):
    with server.handler() as handler:
        for name in ("Content-Type", "Server", "Date"):
            handler.put(f"/response/headers/{name}", b"mine")
        handler.put("/response/headers/server", b"more")
        handler.put("/response/body", b"x")
        reply = handler.finish()
    assert reply.headers.get_all("Content-Type") == ["mine"]
    assert reply.headers.get_all("Date") == ["mine"]
    assert reply.headers.get_all("Server") == ["mine", "more"]


def test_route_id(server):
    with server.handler() as handler:
        routes = server.control("GET", "/routes").json()
        check(handler.get("/route/id"), 200, routes[0]["id"].encode())


@pytest.mark.parametrize("method", ["POST", "PUT", "GET", "BREW"])
def test_urlencoded_form(server, method):
    body = b"a=1&b=%20+x&a=2&n%0al%25=\xff"
    with server.handler(method, body=body, headers=FORM) as handler:
        check(handler.get("/request/form/a"), 200, b"1")
        check(handler.get("/request/form/a/1"), 200, b"2")
        check(handler.get("/request/form/b"), 200, b"  x")
        check(handler.get("/request/form/n%0Al%25"), 200, b"\xff")
        check(handler.get("/request/form"), 200, b"a\nb\nn%0Al%25\n")
        check(handler.get("/request/form/a/2"), 404, reason="Resource Item Not Found")
        check(handler.get("/request/files"), 200, b"")
        check(handler.get("/request/body"), 200, body)
        check(handler.get("/request/body"), 200, body)


def test_multipart_form(server):
    with server.handler("POST", body=MULTIPART_BODY, headers=MULTIPART) as handler:
        check(handler.get("/request/body"), 200, MULTIPART_BODY)
        for path, value in (("form/t", b"text"), ("form/t/1", b"again"), ("form", b"t\n"),
                            ("files", b"f\ne\n"), ("files/f/filename", b"a.txt"),
                            ("files/f/content", b"one\r\ntwo"), ("files/f/0/content", b"one\r\ntwo"),
                            ("files/f/1/filename", b"b.bin"), ("files/f/1/content", b"\x00\xff"),
                            ("files/e/filename", b""), ("files/e/content", b"")):
            check(handler.get("/request/" + path), 200, value)
        check(handler.get("/request/form/f"), 404, reason="Resource Item Not Found")
        check(handler.get("/request/files/t/content"), 404, reason="Resource Item Not Found")
        check(handler.get("/request/body"), 200, MULTIPART_BODY)


def test_log(server):
    with server.handler() as handler:
        assert handler.put("/server/log", b"plain\n").status == 200
        request_id = handler.get("/request/id").body.decode()
        assert handler.put("/server/log/my%20app", b"two\nlines\x1b[0m\xff").status == 200
        server.wait_log(f"{request_id} plain$")
        server.wait_log(rf"{request_id} my app: two\\x0alines\\x1b\[0m\\xff$")


def test_body_is_streamed_as_it_comes(server):
    """A reader gets the first part of a body whose second part was not sent yet."""
    path = server.route("kapow get /request/body | while read line; do "
                        'echo "got $line" | kapow set /response/stream; done', "POST")
    with server.connect() as sock:
        sock.sendall(f"POST {path} HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n"
                     "Connection: close\r\n\r\n4\r\none\n\r\n".encode())
        assert read_until(sock, b"got one\n")
        sock.sendall(b"4\r\ntwo\n\r\n0\r\n\r\n")
        rest = read_all(sock)
    assert b"got two\n" in rest and rest.endswith(b"0\r\n\r\n")


def read_until(sock, what):
    """Receive until `what` is there; return all."""
    data = b""
    while what not in data:
        more = sock.recv(65536)
        assert more, data
        data += more
    return data


def test_data_interface_pipelines(server):
    with server.handler(target="?a=1") as handler, server.connect("data") as sock:
        ask = f"GET /handlers/{handler.id}/request/params/a HTTP/1.1\r\nHost: h\r\n"
        put = f"PUT /handlers/{handler.id}/response/body HTTP/1.1\r\nHost: h\r\n"
        sock.sendall(f"{ask}\r\n{put}Content-Length: 2\r\n\r\nhi{ask}Connection: close\r\n\r\n".encode())
        answer = read_all(sock)
        assert answer.count(b"HTTP/1.1 200 OK\r\n") == 3 and answer.endswith(b"1")
        assert handler.finish().body == b"hi"


def test_expect_continue(server):
    with server.handler() as handler, server.connect("data") as sock:
        sock.sendall(f"PUT /handlers/{handler.id}/response/body HTTP/1.1\r\nHost: h\r\n"
                     "Expect: 100-continue\r\nContent-Length: 2\r\n\r\n".encode())
        assert read_until(sock, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"hi")
        assert read_until(sock, b"\r\n\r\n").startswith(b"HTTP/1.1 200")
        assert handler.finish().body == b"hi"


def test_write_that_breaks_off_ends(server):
    """A `kapow set` that dies in its middle does not hold the response open."""
    with server.handler() as handler:
        with server.connect("data") as sock:
            sock.sendall(f"PUT /handlers/{handler.id}/response/body HTTP/1.1\r\nHost: h\r\n"
                         "Content-Length: 100\r\n\r\npart".encode())
            sock.shutdown(socket.SHUT_WR)
            assert json.loads(read_all(sock).partition(b"\r\n\r\n")[2])["reason"] == "Bad Request"
        assert handler.finish().body == b"part"
