"""Section 4 of kapow.py: request heads, bodies, forms, cookies. No sockets."""

import errno
import threading
import time

import h11
import pytest
from hypothesis import given, settings, strategies as st

import kapow


def head(text, version="HTTP/1.1"):
    """Parse a head given as its target and header lines."""
    target, *lines = text.split("\n")
    return kapow.RequestHead("\r\n".join([f"GET {target} {version}", *lines]).encode("latin-1"))


@pytest.mark.parametrize("target, path, query, host", [
    ("/", "/", b"", b"h"),
    ("/a%20b?x=%20", "/a b", b"x=%20", b"h"),
    ("/a%2Fb", "/a/b", b"", b"h"),
    ("//a/../b/.", "//a/../b/.", b"", b"h"),
    ("/caf%C3%A9", "/café", b"", b"h"),
    ("/%ff", "/\udcff", b"", b"h"),
    ("/100%", "/100%", b"", b"h"),
    ("/%zz", "/%zz", b"", b"h"),
    ("/a?b?c", "/a", b"b?c", b"h"),
    ("http://other:81/x?y", "/x", b"y", b"other:81"),
    ("http://other", "/", b"", b"other"),
    ("HTTPS://other?y", "/", b"y", b"other"),
])
def test_target(target, path, query, host):
    parsed = head(f"{target}\nHost: h")
    assert (parsed.path, parsed.query, parsed.host) == (path, query, host)
    assert parsed.target == target.encode("latin-1")


@pytest.mark.parametrize("lines, length, keep_alive", [
    ("Host: h", 0, True),
    ("Host: h\nConnection: close", 0, False),
    ("Host: h\nConnection: x, Close", 0, False),
    ("Host: h\nContent-Length: 7", 7, True),
    ("Host: h\nContent-Length: 7\nContent-Length: 7", 7, True),
    ("Host: h\nContent-Length: 7, 7", 7, True),
    ("Host: h\nTransfer-Encoding: Chunked", None, True),
])
def test_framing(lines, length, keep_alive):
    parsed = head(f"/\n{lines}")
    assert (parsed.length, parsed.keep_alive) == (length, keep_alive)


@pytest.mark.parametrize("lines, keep_alive", [
    ("", False), ("Connection: keep-alive", True), ("Connection: close", False),
    ("Transfer-Encoding: chunked\nConnection: keep-alive", False),
])
def test_http_1_0(lines, keep_alive):
    assert head("\n".join(filter(None, ["/", lines])), "HTTP/1.0").keep_alive == keep_alive


GOOD = b"GET / HTTP/1.1\r\nHost: h"


@pytest.mark.parametrize("data, status", [
    (b"", 400), (b"GET", 400), (b"GET /", 400), (b"GET  / HTTP/1.1\r\nHost: h", 400),
    (b"GET / HTTP/1.1 \r\nHost: h", 400), (b" GET / HTTP/1.1\r\nHost: h", 400),
    (b"GET / http/1.1\r\nHost: h", 400), (b"GET / HTTP/1\r\nHost: h", 400),
    (b"GET / HTTP/11.1\r\nHost: h", 400), (b"G@T / HTTP/1.1\r\nHost: h", 400),
    (b"GET /\x00 HTTP/1.1\r\nHost: h", 400), (b"GET /a#b HTTP/1.1\r\nHost: h", 400),
    (b"GET x HTTP/1.1\r\nHost: h", 400), (b"GET * HTTP/1.1\r\nHost: h", 400),
    (b"CONNECT h:80 HTTP/1.1\r\nHost: h", 400), (b"GET ftp://h/ HTTP/1.1\r\nHost: h", 400),
    (b"GET http://a b/ HTTP/1.1\r\nHost: h", 400), (b"GET http://a@b/ HTTP/1.1\r\nHost: h", 400),
    (b"GET / HTTP/0.9\r\nHost: h", 505), (b"GET / HTTP/2.0\r\nHost: h", 505),
    (b"GET / HTTP/1.1", 400), (GOOD + b"\r\nHost: h", 400),
    (b"GET / HTTP/1.1\r\nHost: a b", 400), (b"GET / HTTP/1.1\r\nHost: a/b", 400),
    (b"GET / HTTP/1.0\r\nHost: a\r\nHost: b", 400),
    (GOOD + b"\r\nX : y", 400), (GOOD + b"\r\n X: y", 400), (GOOD + b"\r\nX", 400),
    (GOOD + b"\r\n: y", 400), (GOOD + b"\r\nX: a\rb", 400), (GOOD + b"\r\nX: a\nb", 400),
    (GOOD + b"\r\nX: a\x00b", 400), (GOOD + b"\r\nX: a\x7fb", 400), (GOOD + b"\r\nX(: y", 400),
    (GOOD + b"\r\nX: y\r\n z", 400), (GOOD + b"\r\n", 400),
    (GOOD + b"\r\nContent-Length: 1\r\nContent-Length: 2", 400),
    (GOOD + b"\r\nContent-Length: 1, 2", 400), (GOOD + b"\r\nContent-Length: -1", 400),
    (GOOD + b"\r\nContent-Length: +1", 400), (GOOD + b"\r\nContent-Length: 0x1", 400),
    (GOOD + b"\r\nContent-Length: 1_0", 400), (GOOD + b"\r\nContent-Length:", 400),
    (GOOD + b"\r\nContent-Length: 1,", 400), (GOOD + b"\r\nContent-Length: \xb2", 400),
    (GOOD + b"\r\nContent-Length: " + b"9" * 41, 400),
    (GOOD + b"\r\nContent-Length: 1\r\nTransfer-Encoding: chunked", 400),
    (GOOD + b"\r\nContent-Length:\r\nTransfer-Encoding: chunked", 400),
    (GOOD + b"\r\nTransfer-Encoding: gzip", 400),
    (GOOD + b"\r\nTransfer-Encoding: gzip, chunked", 501),
    (GOOD + b"\r\nTransfer-Encoding: chunked, gzip", 400),
    (GOOD + b"\r\nTransfer-Encoding: chunked, chunked", 400),
    (GOOD + b"\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked", 400),
    (GOOD + b"\r\nTransfer-Encoding:", 400), (GOOD + b"\r\nTransfer-Encoding: xchunked", 400),
    (GOOD + b"\r\nTransfer-Encoding: \x0bchunked", 400),
    (GOOD + b"\r\nX: y" * 100, 431),
])
def test_head_refused(data, status):
    with pytest.raises(kapow.ProtocolError) as caught:
        kapow.RequestHead(data)
    assert caught.value.status == status


def test_head_at_its_limits():
    assert len(kapow.RequestHead(GOOD + b"\r\nX: y" * 99).fields) == 100
    assert head("/\nHost: h\nX:  a b \t").values(b"x") == [b"a b"]
    assert head("/\nHost: h\nX:").values(b"X") == [b""]
    assert head("/\nHost: h\nX: \xe9").values(b"X") == [b"\xe9"]
    assert head("/\nHost:").host == b""
    assert head("/\nHost: [::1]:80").host == b"[::1]:80"


@pytest.mark.parametrize("buffer, end", [
    (b"", None), (b"GET", None), (b"GET / HTTP/1.1\r\n", None), (b"GET / HTTP/1.1\r\n\r", None),
    (b"GET / HTTP/1.1\r\n\r\n", 18), (b"GET / HTTP/1.1\r\n\r\nmore", 18),
    (b"GET /" + b"x" * 8186 + b"\r\n", None), (b"GET /" + b"x" * 8187 + b"\r", None), (b"\r", None),
    (b"GET / HTTP/1.1\r\n" + b"x" * 65536 + b"\r\n\r", None),
    (b"GET / HTTP/1.1\r\n" + b"x" * 65536 + b"\r\n\r\n", 16 + 65536 + 4),
])
def test_find_head(buffer, end):
    assert kapow.find_head(bytearray(buffer)) == end


@pytest.mark.parametrize("buffer, status", [
    (b"\x16\x03\x01", 400), (b" ", 400), (b"GET / HTTP/1.1\n", 400), (b"GET / HTTP/1.1\n\n", 400),
    (b"GET / HTTP/1.1\r\nHost: h\n\n", 400),
    (b"GET /" + b"x" * 8190, 414), (b"GET /" + b"x" * 8190 + b" HTTP/1.1\r\n\r\n", 414),
    (b"GET / HTTP/1.1\r\nX: " + b"x" * 65537, 431),
    (b"GET / HTTP/1.1\r\nX: " + b"x" * 65536 + b"\r\n\r\n", 431),
])
def test_find_head_refused(buffer, status):
    with pytest.raises(kapow.ProtocolError) as caught:
        kapow.find_head(bytearray(buffer))
    assert caught.value.status == status


def reader(data, length=None, step=7, limit=None):
    """Return a BodyReader of `data` that comes in pieces of `step` bytes, and its buffer."""
    pieces = iter([data[place:place + step] for place in range(0, len(data), step)])
    framing = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    message = head(f"/\nHost: h\n{framing}")
    buffer = bytearray()
    return kapow.BodyReader(message, buffer, lambda: next(pieces, b""), limit), buffer


CHUNKED = b"5\r\nhello\r\n1;a=b\r\n \r\n5 ; x=\"y\"\r\nworld\r\n0\r\nT: x\r\n\r\n"


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_chunked(step):
    body, buffer = reader(CHUNKED + b"GET", step=step)
    assert b"".join(iter(body.read, b"")) == b"hello world"
    assert body.done and b"GET".startswith(buffer)


@pytest.mark.parametrize("data, status", [
    (b"5\r\nhel", 400), (b"", 400), (b"5\r\nhello\r\n", 400), (b"5\nhello\r\n0\r\n\r\n", 400),
    (b"g\r\n", 400), (b"-1\r\n", 400), (b"0x5\r\n", 400), (b" 5\r\n", 400), (b"5 \r\n", 400),
    (b"\r\n", 400), (b"5\r\nhelloX\r\n", 400), (b"5\r\nhello\n0\r\n\r\n", 400),
    (b"11111111111111111\r\n", 400), (b"5;a\x00\r\n", 400), (b"5;" + b"x" * 5000, 400),
    (b"5;" + b"x" * 4095 + b"\r\n", 400), (b"0\r\nbad\r\n\r\n", 400), (b"0\r\nT: x\n\r\n", 400),
    (b"0\r\n" + b"T: x\r\n" * 101 + b"\r\n", 431), (b"0\r\nT: " + b"x" * 70000, 431),
])
@pytest.mark.parametrize("step", [1, 1000])
def test_chunked_refused(data, status, step):
    body, _ = reader(data, step=step)
    with pytest.raises(kapow.ProtocolError) as caught:
        while body.read():
            pass
    assert caught.value.status == status


@pytest.mark.parametrize("length", [0, 1, 5, 20])
def test_length(length):
    body, buffer = reader(b"x" * length + b"GET", length, step=4)
    assert b"".join(iter(body.read, b"")) == b"x" * length
    assert body.done and b"GET".startswith(buffer)


def test_body_limits():
    with pytest.raises(kapow.ProtocolError) as caught:
        reader(b"", 11, limit=10)
    assert caught.value.status == 413
    body, _ = reader(b"a\r\n" + b"x" * 10 + b"\r\n1\r\nx\r\n0\r\n\r\n", limit=10, step=3)
    with pytest.raises(kapow.ProtocolError) as caught:
        while body.read():
            pass
    assert (caught.value.status, body.received) == (413, 10)      # where the chunk is announced
    body, _ = reader(b"x" * 10, 10, limit=10)
    assert body.read_all(10) == b"x" * 10


@settings(deadline=None, derandomize=True)
@given(st.lists(st.binary(min_size=1, max_size=50), max_size=8), st.integers(1, 40))
def test_chunked_as_h11_writes_it(pieces, step):
    peer = h11.Connection(h11.CLIENT)
    peer.send(h11.Request(method="POST", target="/", headers=[
        ("Host", "h"), ("Transfer-Encoding", "chunked")]))
    data = b"".join([peer.send(h11.Data(data=piece)) for piece in pieces])
    body, _ = reader(data + peer.send(h11.EndOfMessage()), step=step)
    assert b"".join(iter(body.read, b"")) == b"".join(pieces)



def response(lines, method="GET"):
    """Parse a response head given as its lines."""
    return kapow.ResponseHead(lines.replace("\n", "\r\n").encode("latin-1"), method)


@pytest.mark.parametrize("lines, status, reason, length, keep_alive", [
    ("HTTP/1.1 200 OK\nContent-Length: 5", 200, "OK", 5, True),
    ("HTTP/1.1 200 \nContent-Length: 05", 200, "", 5, True),
    ("HTTP/1.1 200\nContent-Length: 0", 200, "", 0, True),
    ("HTTP/1.1 404 Not  Found\t\xe9\nContent-Length: 3, 3", 404, "Not  Found\t\xe9", 3, True),
    ("HTTP/1.1 999 x\nTransfer-Encoding: Chunked", 999, "x", None, True),
    ("HTTP/1.1 200 OK\nTransfer-Encoding: chunked\nConnection: x, Close", 200, "OK", None, False),
    ("HTTP/1.1 200 OK", 200, "OK", None, False),
    ("HTTP/1.0 200 OK\nContent-Length: 5", 200, "OK", 5, False),
    ("HTTP/1.0 200 OK\nContent-Length: 5\nConnection: Keep-Alive", 200, "OK", 5, True),
    ("HTTP/1.0 200 OK\nConnection: keep-alive", 200, "OK", None, False),
    ("HTTP/1.1 204 No", 204, "No", None, True), ("HTTP/1.1 304 No\nContent-Length: 9", 304, "No", 9, True),
    ("HTTP/1.1 100 Continue", 100, "Continue", None, True),
])
def test_response_head(lines, status, reason, length, keep_alive):
    parsed = response(lines)
    assert (parsed.status, parsed.reason, parsed.length, parsed.keep_alive) == (
        status, reason, length, keep_alive)


@pytest.mark.parametrize("lines", [
    "", "HTTP/1.1", "HTTP/1.1 ", "HTTP/1.1 20", "HTTP/1.1 2000 OK", "HTTP/1.1  200 OK",
    "HTTP/1.1\t200 OK", "http/1.1 200 OK", "HTTP/2.0 200 OK", "HTTP/0.9 200 OK", "HTTP/11 200 OK",
    "HTTP/1.1 000 OK", "HTTP/1.1 099 OK", "HTTP/1.1 2x0 OK", "HTTP/1.1 200OK", " HTTP/1.1 200 OK",
    "HTTP/1.1 200 O\0K", "HTTP/1.1 200 O\x7fK", "GET / HTTP/1.1", "HTTP/1.1 \xb200 OK",
    "HTTP/1.1 200 OK\n X: y", "HTTP/1.1 200 OK\nX", "HTTP/1.1 200 OK\n: y",
    "HTTP/1.1 200 OK\nX: a\0b", "HTTP/1.1 200 OK\nContent-Length: -1",
    "HTTP/1.1 200 OK\nContent-Length: 1\nContent-Length: 2", "HTTP/1.1 200 OK\nContent-Length:",
    "HTTP/1.1 200 OK\nContent-Length: 1\nTransfer-Encoding: chunked",
    "HTTP/1.1 200 OK\nTransfer-Encoding: gzip, chunked", "HTTP/1.1 200 OK\nTransfer-Encoding: chunked, chunked",
])
def test_response_head_refused(lines):
    with pytest.raises(kapow.ProtocolError):
        response(lines)


def response_body(lines, data, step=7, method="GET"):
    """Return a BodyReader of the response, whose body comes in pieces of `step` bytes, and its buffer."""
    pieces = iter([data[place:place + step] for place in range(0, len(data), step)])
    buffer = bytearray()
    return kapow.BodyReader(response(lines, method), buffer, lambda: next(pieces, b"")), buffer


@pytest.mark.parametrize("lines, data, body", [
    ("Content-Length: 5", b"hello", b"hello"), ("Content-Length: 0", b"", b""),
    ("Transfer-Encoding: chunked", CHUNKED, b"hello world"), ("X: y", b"hello", b"hello"), ("X: y", b"", b""),
])
@pytest.mark.parametrize("step", [1, 3, 1000])
def test_response_body(lines, data, body, step):
    reading, buffer = response_body("HTTP/1.1 200 OK\n" + lines, data, step)
    assert b"".join(iter(reading.read, b"")) == body
    assert reading.done and buffer == b""


@pytest.mark.parametrize("line, method", [
    ("HTTP/1.1 200 OK", "HEAD"), ("HTTP/1.1 204 No", "GET"), ("HTTP/1.1 304 No", "GET"),
    ("HTTP/1.1 103 Early", "GET")])
@pytest.mark.parametrize("framing", ["Content-Length: 5", "Transfer-Encoding: chunked", "X: y"])
def test_response_without_a_body(line, method, framing):
    """Whatever its header says of one (RFC 9112 section 6.3)."""
    reading, _ = response_body(f"{line}\n{framing}", b"next", method=method)
    assert reading.done and reading.read() == b""
    assert response(f"{line}\n{framing}", method).keep_alive


@pytest.mark.parametrize("lines, data", [
    ("Content-Length: 9", b"short"), ("Content-Length: 9", b""),
    ("Transfer-Encoding: chunked", CHUNKED[:-1]), ("Transfer-Encoding: chunked", b""),
    ("Transfer-Encoding: chunked", b"5\r\nhello\r\n"),
])
def test_response_body_cut_short(lines, data):
    reading, _ = response_body("HTTP/1.1 200 OK\n" + lines, data)
    with pytest.raises(kapow.PeerLeft):
        b"".join(iter(reading.read, b""))
    assert not reading.done


def request_body(data, step=7):
    """Return a RequestBody of `data`, coming in pieces of `step` bytes."""
    return kapow.RequestBody(reader(data, len(data), step)[0], hang_ups=[pytest.fail])


def test_request_body_again_and_again():
    body = request_body(b"0123456789" * 30)
    assert b"".join(body.pieces()) == b"".join(body.pieces()) == b"0123456789" * 30
    assert body.read_at(299) == b"9"
    assert body.read_at(300) == body.read_at(400) == b""
    body.close()
    with pytest.raises(kapow.ProtocolError):
        body.read_at(0)


def test_request_body_of_many_readers():
    data = bytes(range(256)) * 8000      # more than is kept in memory
    body = request_body(data, 30000)
    results = []
    threads = [threading.Thread(target=lambda: results.append(b"".join(body.pieces())))
               for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [data] * 6
    body.close()


def test_request_body_failure_is_told_once():
    failures = []
    body = kapow.RequestBody(reader(b"short", 10)[0], failures.append, hang_ups=[pytest.fail])
    for _ in range(2):
        with pytest.raises(kapow.ProtocolError):
            for _ in body.pieces():
                pass
    assert [error.status for error in failures] == [400]


def fields(body_fields):
    """Return FormFields as (name, filename, value)."""
    return [(field.name, field.filename, b"".join(field.pieces()))
            for field in body_fields if field is not None]


@pytest.mark.parametrize("query, pairs", [
    (b"", []), (b"&&", []), (b"a", [(b"a", b"")]), (b"a=", [(b"a", b"")]), (b"=b", [(b"", b"b")]),
    (b"a=1&a=2", [(b"a", b"1"), (b"a", b"2")]), (b"a=b=c", [(b"a", b"b=c")]),
    (b"a+b=%26%3d+", [(b"a b", b"&= ")]), (b"a=%ff%00", [(b"a", b"\xff\0")]),
    (b"a=%&b=%4", [(b"a", b"%"), (b"b", b"%4")]), (b"a;b=1", [(b"a;b", b"1")]),
])
@pytest.mark.parametrize("step", [1, 5, 1000])
def test_urlencoded(query, pairs, step):
    assert kapow.parse_query(query) == pairs
    parsed = fields(kapow.parse_urlencoded(request_body(query, step)))
    assert [(name, value) for name, _, value in parsed] == pairs


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.text(), st.text())), st.integers(1, 20))
def test_urlencoded_round_trip(pairs, step):
    from urllib.parse import urlencode
    wanted = [(name.encode(), value.encode()) for name, value in pairs]
    parsed = fields(kapow.parse_urlencoded(request_body(urlencode(wanted).encode(), step)))
    assert [(name, value) for name, _, value in parsed] == wanted


def test_urlencoded_value_across_pieces():
    value = b"%41" * 100_000
    parsed = fields(kapow.parse_urlencoded(request_body(b"a=" + value + b"&b=2", 65536)))
    assert parsed == [(b"a", None, b"A" * 100_000), (b"b", None, b"2")]


MULTIPART = (b'preamble\r\n--B\r\nContent-Disposition: form-data; name="a"\r\n\r\n'
             b"v1\r\n--Bx\r\n--\r\n\r\n--B \t\r\n"
             b'Content-Type: text/plain\r\ncontent-disposition: FORM-DATA; filename="x.txt"; '
             b'name=f\r\n\r\n\r\n--B\r\n\r\nno header\r\n--B\r\nContent-Disposition: form-data; '
             b'name="e"\r\n\r\n\r\n--B--\r\nepilogue\r\n--B\r\n')


@pytest.mark.parametrize("step", [1, 2, 3, 5, 11, 1000])
def test_multipart(step):
    assert fields(kapow.parse_multipart(request_body(MULTIPART, step), b"B")) == [
        (b"a", None, b"v1\r\n--Bx\r\n--\r\n"), (b"f", b"x.txt", b""), (b"e", None, b"")]


@pytest.mark.parametrize("data", [
    b"", b"--", b"--B", b"--B\r\n", b"--B\r\nContent-Disposition: form-data; name=x\r\n",
    b"--B\r\nContent-Disposition: form-data; name=x\r\n\r\nno end", b"\x00" * 100,
])
def test_multipart_broken(data):
    with pytest.raises(kapow.ApiError) as caught:
        fields(kapow.parse_multipart(request_body(data), b"B"))
    assert caught.value.status == 400


@pytest.mark.parametrize("disposition, filename", [
    (b'filename="a.txt"', b"a.txt"), (b"filename=a.txt", b"a.txt"), (b'filename=""', b""),
    (b'filename="a \\"b\\".txt"', b'a "b".txt'), (b'filename="a%22b%0D%0A%20"', b'a"b\r\n%20'),
    (b'filename="/etc/passwd"', b"passwd"), (b'filename="..\\\\..\\\\x"', b"x"),
    (b'filename="C:\\dir\\x.txt"', b"x.txt"), (b'filename=".."', b""), (b'filename="a/"', b""),
    (b'filename="a/.."', b""), (b'filename="a;b=c.txt"', b"a;b=c.txt"),
    (b"filename*=UTF-8''na%C3%AFve.txt", "naïve.txt".encode()),
    (b"filename=\"x\"; filename*=UTF-8''y", b"y"),
    (b"filename*=iso-8859-1''na%EFve", "naïve".encode()),
    (b"filename*=UTF-8''..%2F..%2Fx", b"x"), (b"filename*=bad; filename=ok", b"ok"),
    ("filename=\"naïve\"".encode(), "naïve".encode()), (b"x=y", None),
])
def test_filename(disposition, filename):
    data = b'--B\r\nContent-Disposition: form-data; name="f"; ' + disposition + b"\r\n\r\nv\r\n--B--"
    assert fields(kapow.parse_multipart(request_body(data), b"B")) == [(b"f", filename, b"v")]


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.binary(max_size=40), st.booleans()), max_size=5), st.integers(1, 60))
def test_multipart_round_trip(parts, step):
    """urllib3 writes what we read."""
    from urllib3.fields import RequestField
    from urllib3.filepost import encode_multipart_formdata
    made = [RequestField(f"n{place}", value, f"f {place}" if is_file else None)
            for place, (value, is_file) in enumerate(parts)]
    for field in made:
        field.make_multipart()
    data, content_type = encode_multipart_formdata(made)
    _, parameters = kapow.parse_parameters(content_type.encode())
    assert fields(kapow.parse_multipart(request_body(data, step), parameters[b"boundary"])) == [
        (b"n%d" % place, b"f %d" % place if is_file else None, value)
        for place, (value, is_file) in enumerate(parts)]


def test_too_many_fields():
    message = kapow.RequestHead(GOOD + b"\r\nContent-Type: application/x-www-form-urlencoded")
    request = kapow.UserRequest(message, request_body(b"a&" * 10_001, 65536), "::1")
    with pytest.raises(kapow.ApiError) as caught:
        request.form()
    assert caught.value.status == 413


@pytest.mark.parametrize("lines, pairs", [
    ("Cookie: a=1", [(b"a", b"1")]),
    ("Cookie: a=1; b=2;c=x=y", [(b"a", b"1"), (b"b", b"2"), (b"c", b"x=y")]),
    ("Cookie: a=\nCookie: A=2", [(b"a", b""), (b"A", b"2")]),
    ("Cookie: nonsense; =x", [(b"", b"x")]),
    ("X: y", []),
])
def test_cookies(lines, pairs):
    assert kapow.UserRequest(head(f"/\nHost: h\n{lines}"), None, "::1").cookies() == pairs


@pytest.mark.parametrize("data, whole, kind", [
    (b"hello", True, "text/plain; charset=utf-8"),
    ("naïve".encode(), True, "text/plain; charset=utf-8"),
    ("naï".encode()[:-1], False, "text/plain; charset=utf-8"),
    ("naï".encode()[:-1], True, "application/octet-stream"),
    (b"\xff", False, "application/octet-stream"),
    (b"a\0b", True, "application/octet-stream"),
    (b"\x1b[1m", True, "text/plain; charset=utf-8"),
    (b"<!DOCTYPE html><p>", True, "text/html; charset=utf-8"),
    (b"\n  <HTML lang=en>", True, "text/html; charset=utf-8"),
    (b"<html>\xff", True, "application/octet-stream"),
    (b"<htmlx>", True, "text/plain; charset=utf-8"),
    (b"see <html>", True, "text/plain; charset=utf-8"),
    (b"<?xml version='1.0'?>", True, "text/plain; charset=utf-8"),
])
def test_sniff(data, whole, kind):
    assert kapow.sniff_content_type(data, whole) == kind


def test_printable():
    assert kapow.printable(b"a\n\x1b[0m\x7f\xff\xc2\x85") == "a\\x0a\\x1b[0m\\x7f\\xff\\x85"
    assert "\u2028" not in kapow.printable("a\u2028b".encode())


@pytest.mark.parametrize("value, parameters", [
    (b"a/b", {}), (b"a/b;", {}), (b"a/b; c=d;E = f ;;g=", {b"c": b"d", b"e": b"f", b"g": b""}),
    (b'a; b="c;d\\"e\\\\"; f=g', {b"b": b'c;d"e\\', b"f": b"g"}), (b'a; b="c', {b"b": b'"c'}),
    (b"a; nonsense; b=c", {b"b": b"c"}), (b"a; b=c; b=d", {b"b": b"c"}), (b'a; b="c" d; e=f', {b"b": b"c", b"e": b"f"}),
])
def test_parameters(value, parameters):
    assert kapow.parse_parameters(value)[1] == parameters


@pytest.mark.parametrize("value", [b"a" * 60000, b"a=" * 30000, b'a="' * 20000, b" " * 60000, b";" * 60000,
                                   b'"' * 60000, b'a="\\' * 15000])
def test_parameters_take_no_longer_than_they_are_long(value):
    """A header that takes quadratic time would stop the whole server for half a minute."""
    begun = time.thread_time()
    kapow.parse_parameters(b"x; " + value)
    assert time.thread_time() - begun < 5


def test_names_are_limited():
    for body in (b"n" * 65000 + b"&", b"n" * 70000 + b"=1&"):
        message = kapow.RequestHead(GOOD + b"\r\nContent-Type: application/x-www-form-urlencoded")
        request = kapow.UserRequest(message, request_body(body * 20, 65536), "::1")
        with pytest.raises(kapow.ApiError) as caught:
            request.form()
        assert caught.value.status == 413


def test_spool_without_room_keeps_what_it_has(monkeypatch):
    def no_room(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")
    spool = kapow.Spool(limit=10)
    spool.append(b"12345678")
    monkeypatch.setattr(kapow.os, "pwrite", no_room)
    with pytest.raises(OSError):
        spool.append(b"9012")
    assert (spool.length, spool.read_at(0, 100)) == (8, b"12345678")
    monkeypatch.undo()
    spool.append(b"9012")
    assert (spool.length, spool.read_at(0, 100)) == (12, b"123456789012")
    spool.close()
