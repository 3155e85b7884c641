"""What clients may send, made up: by hypothesis against other implementations, by seed against a server.

The property everywhere: what kapow takes, the other implementation takes too,
and understands the same. Where kapow is stricter it may refuse.
"""

import concurrent.futures
import io
import random
import re
import socket

import h11
import pytest
from hypothesis import given, settings, strategies as st
from werkzeug.formparser import MultiPartParser

import kapow
from conftest import DEADLINE, read_all, wait_until
from test_messages import fields, reader, request_body

# The same examples in every run; more of them is a campaign, by hand.
COMMON = settings(deadline=None, max_examples=400, derandomize=True)

LINES = [b"GET / HTTP/1.1", b"POST /a%20b?c=d HTTP/1.1", b"GET /x HTTP/1.0", b"OPTIONS * HTTP/1.1",
         b"GET http://h/x HTTP/1.1", b"brew //a/../b HTTP/1.1", b"GET / HTTP/1.2"]
FIELDS = [b"Host: h", b"Host: h:80", b"host:", b"Content-Length: 5", b"Content-Length: 5, 5",
          b"content-length: 05", b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked",
          b"Connection: close", b"Connection: keep-alive, x", b"Expect: 100-continue", b"X: a\tb",
          b"X:\xe9", b"Cookie: a=b; c", b"X-Empty:", b"X:  y  "]
NOISE = st.sampled_from([b"\r", b"\n", b"\r\n", b" ", b"\t", b":", b"\0", b"\x0b", b",", b";", b"\x80",
                         b"chunked", b"0", b"HTTP/1.1", b"\r\n ", b"Content-Length: 1\r\n", b'"', b"%"])


@st.composite
def heads(draw):
    """A request head, mostly sound."""
    lines = [draw(st.sampled_from(LINES)), *draw(st.lists(st.sampled_from(FIELDS), max_size=4))]
    if draw(st.booleans()):
        lines.insert(1, b"Host: h")
    data = b"\r\n".join(lines)
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        place = draw(st.integers(0, len(data)))
        cut = draw(st.integers(0, 2))
        data = data[:place] + draw(NOISE) + data[place + cut:]
    return data


def understood_by_h11(data):
    """Return (method, target, fields, whether the body is chunked or its length), or None."""
    peer = h11.Connection(h11.SERVER, max_incomplete_event_size=100_000)
    try:
        peer.receive_data(data)
        event = peer.next_event()
    except h11.RemoteProtocolError:
        return None
    if not isinstance(event, h11.Request):
        return None
    names = dict(event.headers)
    length = None if b"transfer-encoding" in names else int(names.get(b"content-length", 0))
    return event.method, event.target, [(name, value) for name, value in event.headers], length


def understood_by_kapow(data):
    """The same of kapow."""
    try:
        end = kapow.find_head(bytearray(data))
        head = kapow.RequestHead(data[:end - 4]) if end == len(data) else None
    except kapow.ProtocolError:
        return None
    if head is None:
        return None
    # h11 makes one of equal lengths.
    seen = [(name.lower(), value.split(b",")[0].strip() if name.lower() == b"content-length" else value)
            for name, value in head.fields]
    first = [pair for place, pair in enumerate(seen)
             if pair[0] != b"content-length" or pair not in seen[:place]]
    return head.method.encode(), head.target, first, head.length


@COMMON
@given(heads())
def test_heads_against_h11(data):
    ours = understood_by_kapow(data + b"\r\n\r\n")
    if ours is not None and max(ours[1]) < 0x80:        # h11 takes no raw bytes in a target
        theirs = understood_by_h11(data + b"\r\n\r\n")
        assert theirs is not None, data
        method, target, pairs, length = theirs
        assert (method, target, length) == (ours[0], ours[1], ours[3])
        assert [name for name, _ in pairs] == [name for name, _ in ours[2]]
        theirs, seen = dict(pairs), {name: value.lower() if name == b"transfer-encoding" else value
                                     for name, value in ours[2]}
        if not target.startswith((b"/", b"*")):         # the target's host is ours
            theirs.pop(b"host", None)
            seen.pop(b"host")
        assert seen == theirs


@st.composite
def chunked_bodies(draw):
    """A chunked body, mostly sound."""
    data = b""
    for piece in draw(st.lists(st.binary(min_size=1, max_size=20), max_size=4)):
        # RFC 9112 has us take blanks before the semicolon, which h11 refuses.
        extension = draw(st.sampled_from([b"", b"", b";a", b"; a=b", b';a="b c"']))
        data += b"%x%b\r\n%b\r\n" % (len(piece), extension, piece)
    data += b"0\r\n" + draw(st.sampled_from([b"", b"", b"T: x\r\n", b"T: x\r\nU: y\r\n"])) + b"\r\n"
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        place = draw(st.integers(0, len(data)))
        data = data[:place] + draw(NOISE) + data[place + draw(st.integers(0, 2)):]
    return data


def chunks_by_h11(data):
    """Return (the decoded body, what is left over), None when it is refused or not whole."""
    peer = h11.Connection(h11.SERVER)
    peer.receive_data(b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" + data)
    peer.next_event()
    body = b""
    while True:
        try:
            event = peer.next_event()
        except h11.RemoteProtocolError:
            return None
        if isinstance(event, h11.EndOfMessage):
            return body, peer.trailing_data[0]
        if not isinstance(event, h11.Data):
            return None
        body += event.data


@COMMON
@given(chunked_bodies(), st.integers(1, 30))
def test_chunks_against_h11(data, step):
    body, buffer = reader(data, step=step)
    try:
        decoded = b"".join(iter(body.read, b""))
    except kapow.ProtocolError:
        return
    if re.search(rb"[ \t];", data):
        return
    theirs = chunks_by_h11(data)
    assert theirs is not None, data
    assert theirs[0] == decoded
    assert theirs[1].startswith(buffer)



STATUS_LINES = [b"HTTP/1.1 200 OK", b"HTTP/1.1 404", b"HTTP/1.1 299 ", b"HTTP/1.0 200 OK",
                b"HTTP/1.1 204 No Content", b"HTTP/1.1 304 x", b"HTTP/1.1 500 a: b\xe9"]


@st.composite
def responses(draw):
    """A response with its body, mostly sound."""
    head = b"\r\n".join([draw(st.sampled_from(STATUS_LINES)),
                         *draw(st.lists(st.sampled_from(FIELDS), max_size=3))])
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        place = draw(st.integers(0, len(head)))
        head = head[:place] + draw(NOISE) + head[place + draw(st.integers(0, 2)):]
    return head + b"\r\n\r\n" + draw(st.sampled_from([b"", b"hello", b"hello!", b"hel"]) | chunked_bodies())


def response_by_h11(data, method):
    """Return (status, reason, fields, body), None when it is refused or not whole."""
    peer = h11.Connection(h11.CLIENT)
    peer.send(h11.Request(method=method, target="/", headers=[("Host", "h")]))
    peer.send(h11.EndOfMessage())
    body = b""
    try:
        peer.receive_data(data)
        head = peer.next_event()
        if not isinstance(head, h11.Response):
            return None
        while isinstance(event := peer.next_event(), h11.Data):
            body += event.data
        if event is h11.NEED_DATA:
            peer.receive_data(b"")      # the end of the connection
            event = peer.next_event()
    except h11.RemoteProtocolError:
        return None
    if not isinstance(event, h11.EndOfMessage):
        return None
    return head.status_code, head.reason, [name for name, _ in head.headers], body


class StrictHead(kapow.ResponseHead):
    """Without what kapow forgives and h11 does not."""

    lenient = False


def response_by_kapow(data, method, step):
    """The same of kapow."""
    try:
        end = kapow.find_head(bytearray(data))
        if end is None:
            return None
        head = StrictHead(data[:end - 4], method)
        pieces = iter([data[place:place + step] for place in range(end, len(data), step)])
        body = b"".join(iter(kapow.BodyReader(head, bytearray(), lambda: next(pieces, b"")).read, b""))
    except kapow.ProtocolError:
        return None
    return head.status, head.reason.encode("latin-1"), [name.lower() for name, _ in head.fields], body


@COMMON
@given(responses(), st.sampled_from(["GET", "HEAD", "POST"]), st.integers(1, 30))
def test_responses_against_h11(data, method, step):
    ours = response_by_kapow(data, method, step)
    # RFC 9112 has us take blanks before the semicolon of a chunk, which h11 refuses.
    if ours is None or ours[0] < 200 or re.search(rb"[ \t];", data):
        return
    theirs = response_by_h11(data, method)
    assert theirs is not None, data
    assert theirs[0] == ours[0] and theirs[3] == ours[3]
    assert theirs[1].strip() == ours[1].strip()
    assert sorted(set(theirs[2])) == sorted(set(ours[2]))


PART_BYTES = st.lists(st.sampled_from([b"\r\n", b"--B", b"\r\n--B", b"\r\n--", b"--", b"-", b"B", b"\r",
                                       b"\n", b"x", b"\0\xff", b"\r\n--BB", b" "]), max_size=8).map(b"".join)
NAMES = st.sampled_from([b"a", b"b c", b"n;x", b"\xc3\xa9"])
# Without '/', '\\', '"' and '%', on which browsers and libraries differ.
FILENAMES = st.one_of(st.none(), st.sampled_from([b"f.txt", b"a b", b"x;y=z.bin", b"\xc3\xa9.txt"]))


@COMMON
@given(st.lists(st.tuples(NAMES, FILENAMES, PART_BYTES), max_size=4), st.integers(1, 50))
def test_multipart_against_werkzeug(parts, step):
    # A lone CR or LF makes a delimiter for werkzeug, which RFC 2046 does not have.
    parts = [part for part in parts if not re.search(rb"(\A|[\r\n])--B", part[2])]
    data = b""
    for name, filename, content in parts:
        data += b'--B\r\nContent-Disposition: form-data; name="%b"' % name
        data += b"" if filename is None else b'; filename="%b"' % filename
        data += b"\r\n\r\n%b\r\n" % content
    data += b"--B--\r\n"
    form, files = MultiPartParser().parse(io.BytesIO(data), b"B", len(data))
    ours = fields(kapow.parse_multipart(request_body(data, step), b"B"))
    plain, uploads = {}, {}
    for name, filename, value in ours:
        if filename is None:
            plain.setdefault(name.decode(), []).append(value.decode("utf-8", "replace"))
        else:
            uploads.setdefault(name.decode(), []).append((filename.decode(), value))
    assert plain == {name: form.getlist(name) for name in form}
    assert uploads == {name: [(file.filename, file.read()) for file in files.getlist(name)]
                       for name in files}


@COMMON
@given(st.binary(max_size=200), st.integers(1, 20))
def test_any_bytes_end_in_an_answer_or_a_refusal(data, step):
    """No parser of section 4 raises anything but ProtocolError, those of forms ApiError 400."""
    for call in (lambda: kapow.find_head(bytearray(data)), lambda: kapow.RequestHead(data),
                 lambda: kapow.take_response_head(bytearray(data)),
                 lambda: kapow.ResponseHead(b"HTTP/1.1 200 OK\n" + data, "GET"),
                 lambda: kapow.ChunkedFraming(lenient=True).decode(bytearray(data)),
                 lambda: b"".join(iter(reader(data, step=step)[0].read, b""))):
        try:
            call()
        except kapow.ProtocolError:
            pass
    for body in (data, b"--B\r\n" + data + b"\r\n--B--"):
        fields(kapow.parse_urlencoded(request_body(body, step)))
        try:
            fields(kapow.parse_multipart(request_body(body, step), b"B"))
        except kapow.ApiError as error:
            assert error.status == 400
    kapow.parse_query(data)
    kapow.parse_parameters(data)
    kapow.part_filename({b"filename*": data})


MULTIPART = (b'--B\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--B\r\nContent-Disposition: '
             b'form-data; name="f"; filename="x"\r\n\r\ncontent\r\n--B--\r\n')
REQUESTS = [
    b"GET /fuzz HTTP/1.1\r\nHost: h\r\n\r\n",
    b"GET /fuzz?a=1&b=%20 HTTP/1.1\r\nHost: h\r\nCookie: a=b\r\nConnection: close\r\n\r\n",
    b"HEAD /fuzz HTTP/1.0\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n",
    b"POST /form HTTP/1.1\r\nHost: h\r\nContent-Type: application/x-www-form-urlencoded\r\n"
    b"Content-Length: 7\r\n\r\na=1&b=2",
    b"POST /form HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nT: x\r\n\r\n",
    b"POST /form HTTP/1.1\r\nHost: h\r\nContent-Type: multipart/form-data; boundary=B\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(MULTIPART), MULTIPART),
    b"POST /form HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc",
]
PIECES = [b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"%", b"/", b"?", b"\xff", b"HTTP/9.9",
          b"Host: x\r\n", b"Content-Length: 99\r\n", b"Content-Length: -1\r\n", b"Expect: x\r\n",
          b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n", b"ffffffffffffffffff", b"0\r\n\r\n",
          b"A" * 9000, b"X: y\r\n" * 101, b"--B", b"{}", b"\x16\x03\x01"]


def mutate(rng):
    """Return a valid request, or two in a row, with some bytes changed."""
    data = b"".join(rng.choice(REQUESTS) for _ in range(rng.choice([1, 1, 1, 2])))
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(data) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            data = data[:place] + rng.choice(PIECES) + data[place:]
        elif kind == 1:
            data = data[:place] + data[place + rng.randint(1, 10):]
        elif kind == 2:
            data = data[:place] + bytes([rng.randrange(256)]) + data[place + 1:]
        else:
            data = data[:place]
    return data


def send_mutations(port, seed, count):
    """Send mutated requests, each on a connection of its own; return how often there was an answer."""
    rng, answers = random.Random(seed), 0
    for _ in range(count):
        data = mutate(rng)
        with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as sock:
            try:
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass
            answer = read_all(sock)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 "), (data, answer)
        answers += bool(answer)
    return answers


@pytest.mark.parametrize("name", ["user", "data"])
def test_mutations(server, name):
    """10,000 of them leave the server alive, silent about them, and no larger."""
    server.control("PUT", "/routes", [
        {"method": "GET", "url_pattern": "/fuzz", "entrypoint": "/bin/true"},
        {"method": "POST", "url_pattern": "/form", "entrypoint": "/bin/true"}])
    port, count = server.port(name), 2000 if name == "user" else 500
    before = None
    for rounds in range(2):
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(send_mutations, [port] * 4, range(rounds * 4, rounds * 4 + 4),
                                    [count // 2] * 4))
        assert min(answers) > count // 8
        # The first round fills what is kept for good: imports, caches, thread stacks.
        after = resident(server)
        assert before is None or after < before * 1.2, (before, after)
        before = after
    reply = server.get("/fuzz")
    assert reply.status == 200
    wait_until(lambda: not server.children(), "the programs' end")


def resident(server):
    """Return the server's resident memory in kB."""
    with open(f"/proc/{server.process.pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
