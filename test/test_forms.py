"""Forms: how their values are framed on the wire, what is refused, and what names and files are called."""

import http.client
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.parse

import pytest

import kapow
from conftest import DEADLINE, KAPOW, wait_until

URLENCODED = {"Content-Type": "application/x-www-form-urlencoded"}


def pieces_of(value, size):
    """Return `value` cut into pieces of `size` bytes."""
    return [value[start:start + size] for start in range(0, len(value), size)]


def dechunk(data):
    """Return (body, what comes behind its last chunk) of a chunked body, read by the letter of the RFC."""
    body = b""
    while True:
        size, _, data = data.partition(b"\r\n")
        size = int(size, 16)
        if size == 0:
            assert data.startswith(b"\r\n")         # no trailers
            return body, data[2:]
        body, data = body + data[:size], data[size:]
        assert data.startswith(b"\r\n")
        data = data[2:]


# As they stand in the form, and what they mean. Values are read in pieces of 64 KiB.
VALUES = [
    (b"bar", b"bar"), (b"", b""), (b"%", b"%"), (b"%4", b"%4"), (b"+", b" "), (b"%25%", b"%%"),
    *((b"A" * size + end, b"A" * size + end) for size in (65533, 65534, 65535, 65536, 65537, 131072)
      for end in (b"", b"%", b"%4", b"%%")),
    *((b"A" * size + b"%42C", b"A" * size + b"BC") for size in (65533, 65534, 65535, 65536)),
    (b"%42" * 65536, b"B" * 65536),
]
SHORT_VALUES = [pair for pair in VALUES if len(pair[0]) < 10]


@pytest.mark.parametrize("raw, value", VALUES)
@pytest.mark.parametrize("size", [1, 2, 3, 65536])
def test_decoded_pieces(raw, value, size):
    """No piece is empty, and none is lost, however an escape is cut."""
    if size < 65536:
        raw = raw[-20:]
        value = urllib.parse.unquote_to_bytes(raw.replace(b"+", b" "))
    decoded = list(kapow.unquote_pieces(pieces_of(raw, size)))
    assert b"" not in decoded
    assert b"".join(decoded) == value


@pytest.mark.parametrize("pieces", [[], [b""], [b"", b"a", b"", b"bc", b""], [b"x" * 70000]])
def test_frame(pieces):
    """No producer of pieces can end a chunked body before its end."""
    whole = b"".join(pieces)
    assert dechunk(b"".join(kapow.frame(pieces, True)) + b"next") == (whole, b"next")
    assert b"".join(kapow.frame(pieces, False)) == whole
    assert kapow.chunk(b"") == b""


def test_frame_of_what_fails():
    """Pieces that break off have no last chunk."""
    def pieces():
        yield b"a"
        raise kapow.PeerLeft()
    framed = kapow.frame(pieces(), True)
    assert next(framed) == b"1\r\na\r\n"
    with pytest.raises(kapow.PeerLeft):
        next(framed)
    assert list(framed) == []


@pytest.fixture
def form(server):
    """A function that starts a handler of a form (a with statement) and has its values as fields vN."""
    def start(values=VALUES):
        body = b"&".join(b"v%d=%b" % (place, raw) for place, (raw, _) in enumerate(values))
        return server.handler("POST", body=body, headers=URLENCODED)
    return start


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_values_on_the_wire(server, form, version):
    """All values, asked for in one go: each response ends once, and the next one begins there."""
    with form() as handler:
        asked = [b"GET /handlers/%b/request/form/v%d HTTP/%b\r\nHost: h\r\n" % (
            handler.id.encode(), place, version) for place in range(len(VALUES))]
        if version == b"1.0":
            for line, (_, value) in zip(asked, VALUES):
                head, _, body = server.raw(line + b"\r\n", "data").partition(b"\r\n\r\n")
                assert b" 200 " in head and b"chunked" not in head and body == value
            return
        data = server.raw(b"\r\n".join(asked) + b"Connection: close\r\n\r\n", "data")
        for _, value in VALUES:
            head, _, data = data.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ") and b"Transfer-Encoding: chunked" in head
            body, data = dechunk(data)
            assert body == value
        assert data == b""


def test_values_on_a_kept_connection(server, form):
    """http.client keeps its connection from one value to the next."""
    with form() as handler:
        connection = http.client.HTTPConnection("127.0.0.1", server.port("data"), timeout=DEADLINE)
        for _ in range(10):
            for place, (_, value) in enumerate(SHORT_VALUES):
                connection.request("GET", f"/handlers/{handler.id}/request/form/v{place}")
                response = connection.getresponse()
                assert (response.status, response.read()) == (200, value)
        connection.close()


NODE = """
const http = require("http");
const [port, id, count] = process.argv.slice(1);
const agent = new http.Agent({keepAlive: true, maxSockets: 1});
const values = [];
function ask(place) {
    if (place == count) return console.log(JSON.stringify(values));
    http.get({port, agent, path: `/handlers/${id}/request/form/v${place}`}, response => {
        let value = "";
        response.setEncoding("latin1");
        response.on("data", data => value += data);
        response.on("end", () => { values.push(value); ask(place + 1); });
    });
}
ask(0);
"""


@pytest.mark.skipif(not shutil.which("node"), reason="no node")
def test_values_for_node(server, form):
    """Node's parser takes a second last chunk for a broken response."""
    with form() as handler:
        done = subprocess.run(["node", "-e", NODE, str(server.port("data")), handler.id, str(len(VALUES))],
                              capture_output=True, timeout=DEADLINE, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == [value.decode("latin-1") for _, value in VALUES]


# A service that answers with the body that it was sent, and how that was framed.
ECHO = """
import http.server, os, socket, socketserver
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def address_string(self):
        return "user"
    def log_message(self, *arguments):
        pass
    def do_GET(self):
        self.send_error(404)
    def do_POST(self):
        raw = b""
        while not raw.endswith(b"0\\r\\n\\r\\n"):
            raw += self.rfile.read1(65536)
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)
class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
Server(os.environ["KAPOW_SERVICE_SOCKET"], Handler).serve_forever()
"""


def test_body_that_a_service_is_sent(server):
    """What is passed on of a chunked body ends once too."""
    assert server.control("POST", "/services", {
        "name": "echo", "command": [sys.executable, "-c", ECHO]}).status_code == 201
    try:
        assert server.control("POST", "/services/echo/restart").status_code == 200
        path = server.route(method="POST", service="echo")
        body = [b"one", b"B" * 70000, b"two"]
        reply = server.request("POST", path, iter(body))
        assert reply.status == 200 and dechunk(reply.body) == (b"".join(body), b"")
    finally:
        server.remove_services()


def part(name=b"a", content=b"1", more=b""):
    """Return the header and content of a part of a form."""
    return b'Content-Disposition: form-data; name="%b"%b\r\n\r\n%b' % (name, more, content)


def multipart(*parts, end=b"--B--\r\n"):
    """Return a multipart body."""
    return b"".join(b"--B\r\n%b\r\n" % data for data in parts) + end


WHOLE = multipart(part(), part(b"b", b"2", b'; filename="f"'))
# Multipart bodies that are no whole form, and the status.
BROKEN = {
    "nothing": (b"", 400), "no delimiter": (b"a=1&b=2", 400),
    "another boundary": (WHOLE.replace(b"--B", b"--C"), 400),
    "no closing delimiter": (multipart(part(), end=b""), 400),
    "the closing delimiter of the next lower kind": (multipart(part(), end=b"--B\r\n"), 400),
    "the same at the end": (multipart(part(), end=b"--B"), 400),
    "half a closing delimiter": (multipart(part(), end=b"--B-"), 400),
    "a cut content": (multipart(part(), part(b"b"))[:-12], 400),
    "a cut header": (multipart(part(), end=b"--B\r\n" + part(b"b")[:20]), 400),
    "a header without its empty line": (multipart(part(), b"Content-Disposition: form-data", end=b""), 400),
    "a part within a header": (multipart(b'Content-Disposition: form-data; name="a"', part(b"b", b"2")), 400),
    "the end within a header": (multipart(b'Content-Disposition: form-data; name="a"', end=b"--B--\r\n\r\n\r\n"
                                          b"--B--"), 400),
    "a header that is none": (multipart(b"nonsense\r\n" + part(), part(b"b")), 400),
    "blanks without end": (multipart(part(), b"x", part(b"b")).replace(b"--B\r\nx", b"--B%b\r\n\r\n" % (
        b" " * 1025)), 400),
    "a long header": (multipart(part(), part(b"b", more=b"; x=" + b"y" * 16384)), 413),
    "a long name": (multipart(part(), part(b"b" * 17000)), 413),
    "many parts": (multipart(*[part()] * 10001), 413),
    "many parts without a name": (multipart(*[b"X: y\r\n\r\n1"] * 10001), 413),
    "long names": (multipart(*[part(b"b" * 16000, b"")] * 66), 413),
    "bare CR": (WHOLE.replace(b"\r\n", b"\r"), 400),
}


def parse(data, boundary=b"B", step=65536):
    """Return the form of a multipart body that comes in pieces of `step` bytes, as (name, filename, value)."""
    return user_request(data, b"multipart/form-data; boundary=" + boundary, step)


def user_request(data, content_type, step=65536):
    """Return the fields of a request's form, as UserRequest has them."""
    head = kapow.RequestHead(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\nContent-Type: %b" % (
        len(data), content_type))
    pieces = iter(pieces_of(data, step))
    reader = kapow.BodyReader(head, bytearray(), lambda: next(pieces, b""))
    request = kapow.UserRequest(head, kapow.RequestBody(reader), "::1")
    return [(field.name, field.filename, b"".join(field.pieces())) for field in request.form()]


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("step", [1, 7, 65536])
def test_broken_form(kind, step):
    """No field of what is no whole form is there, and the status says whose fault it is."""
    data, status = BROKEN[kind]
    with pytest.raises(kapow.ApiError) as caught:
        parse(data, step=step if len(data) < 20000 else 65536)
    assert (caught.value.status, caught.value.reason) == (
        status, {400: "Bad Request", 413: "Content Too Large"}[status])


@pytest.mark.parametrize("cut", range(1, len(WHOLE) - 1))
def test_form_cut_anywhere(cut):
    """Two bytes behind the closing delimiter may be lacking, and no other."""
    if cut >= len(WHOLE) - 2:
        assert parse(WHOLE[:cut]) == parse(WHOLE)
        return
    with pytest.raises(kapow.ApiError) as caught:
        parse(WHOLE[:cut])
    assert caught.value.status == 400


@pytest.mark.parametrize("data, wanted", [
    (b"--B--", []), (b"--B--\r\nepilogue", []), (b"preamble\r\n--B--", []),
    (multipart(part(), part(b"b", b"2", b"; x=" + b"y" * 16200)), [(b"a", None, b"1"), (b"b", None, b"2")]),
    (multipart(*[part()] * 10000), [(b"a", None, b"1")] * 10000),
    (multipart(part(content=b"\r\n--Bx\r\n--B x\r\n--b--")), [(b"a", None, b"\r\n--Bx\r\n--B x\r\n--b--")]),
    (multipart(b"\r\nwithout a header", part()), [(b"a", None, b"1")]),
    (multipart(b"Content-Disposition: attachment; name=x\r\n\r\n", part()), [(b"a", None, b"1")]),
    (multipart(part().replace(b"; name", b";\r\n\tname")), [(b"a", None, b"1")]),
    # The line break of an empty content may be that of its delimiter.
    (b"--B\r\n" + part(content=b"") + b"--B\r\n" + part(b"b") + b"\r\n--B--",
     [(b"a", None, b""), (b"b", None, b"1")]),
    (b"--B" + b" " * 1000 + b"\t\r\n" + part() + b"\r\n--B--", [(b"a", None, b"1")]),
], ids=range(11))
@pytest.mark.parametrize("step", [1, 7, 65536])
def test_whole_form(data, wanted, step):
    """What is unusual and right."""
    assert parse(data, step=step if len(data) < 20000 else 65536) == wanted


@pytest.mark.parametrize("step", [1, 7, 65536])
@pytest.mark.parametrize("kind", [kind for kind in BROKEN if "CR" not in kind])
def test_bare_line_feeds(kind, step):
    """A form whose lines end in LF alone, as one that a script has printed, is a form; or broken as others."""
    whole = WHOLE.replace(b"\r\n", b"\n")
    for data in (whole, b"preamble\n" + whole, b"preamble\r\n" + whole, whole[:-1]):
        assert parse(data, step=step) == [(b"a", None, b"1"), (b"b", b"f", b"2")]
    data, status = BROKEN[kind]
    with pytest.raises(kapow.ApiError) as caught:
        parse(data.replace(b"\r\n", b"\n"), step=step if len(data) < 20000 else 65536)
    assert caught.value.status == status


@pytest.mark.parametrize("step", [1, 7, 65536])
def test_line_ends_in_content(step):
    """Where lines end in CRLF, LF is content, and CR where they end in LF."""
    content = b"\n--B\n\r--B--\r\r\n-\n\n"
    assert parse(multipart(part(content=content)), step=step) == [(b"a", None, content)]
    content = b"\r\r\n--Bx\r--B--\r\n\r\n\r"
    data = multipart(part(content=b"@")).replace(b"\r\n", b"\n").replace(b"@", content)
    assert parse(data, step=step) == [(b"a", None, content)]


FORM_PATHS = ["form", "form/a", "form/a/0", "form/none", "files", "files/b/filename", "files/b/content",
              "files/none/content", "files/b/0/content"]


@pytest.mark.parametrize("content_type", ["multipart/form-data; boundary=B", "multipart/form-data",
                                          'multipart/form-data; boundary=""'])
@pytest.mark.parametrize("kind", ["no closing delimiter", "a long name", "many parts", "nothing"])
def test_broken_form_of_a_request(server, kind, content_type):
    """Every form and file resource of it fails, each time; the body can be read."""
    body, status = BROKEN[kind]
    if "boundary=B" not in content_type:
        status = 400
    reason = {400: "Bad Request", 413: "Content Too Large"}[status]
    with server.handler("POST", body=body, headers={"Content-Type": content_type}) as handler:
        for path in FORM_PATHS * 2:
            reply = handler.get("/request/" + path)
            assert (reply.status, reply.reason, reply.json()) == (status, reason, {"reason": reason}), path
        assert handler.get("/request/body").body == body
        assert handler.get("/request/forms").status == 400
        assert handler.get("/request/forms").json() == {"reason": "Invalid Resource Path"}


def test_broken_form_for_a_shell(server):
    """`kapow get` says so, over the channel too, and exits 1: a field that is not there reads otherwise."""
    path = server.route("for path in form form/a files/b/filename form/a; do kapow get /request/$path 2>&1; "
                        "echo $?; done | kapow set /response/body", "POST")
    kind = {"Content-Type": "multipart/form-data; boundary=B"}
    reply = server.request("POST", path, BROKEN["no closing delimiter"][0], kind)
    assert re.fullmatch(rb"(kapow\w*: [^\n]*Bad Request\n1\n){4}", reply.body), reply.body
    reply = server.request("POST", path, multipart(part(b"c")), kind)
    assert re.fullmatch(rb"c\n0\n(kapow\w*: [^\n]*Resource Item Not Found\n1\n){3}", reply.body), reply.body


def test_request_without_a_body(server):
    """What has no body was not cut: it has no form."""
    with server.handler("GET", headers={"Content-Type": "multipart/form-data; boundary=B"}) as handler:
        assert (handler.get("/request/form").status, handler.get("/request/form").body) == (200, b"")
        assert handler.get("/request/form/a").json() == {"reason": "Resource Item Not Found"}


NAIVE = "naïve".encode()


# Parameters of a part's Content-Disposition, and what the part is called.
@pytest.mark.parametrize("parameters, name, filename", [
    # Browsers send a backslash as it is, also at the end, and '"' as %22.
    (b'name="test\\"', b"test\\", None), (b'name="\\"', b"\\", None), (b'name="a\\b"', b"a\\b", None),
    (b'name="test\\"; filename="x"', b"test\\", b"x"), (b'name="test\\" ;filename=""', b"test\\", b""),
    (b'name="a\\"; filename="b\\c\\d"', b"a\\", b"d"), (b'name="a\\\\\\"', b"a\\\\", None),
    (b'name="a%22b%0d%0Ac%25"', b'a"b\r\nc%25', None), (b'filename="%22"; name=a', b"a", b'"'),
    # curl and others escape both.
    (b'name="a\\\\"', b"a\\", None), (b'name="a\\"b"', b'a"b', None), (b'name="a\\""', b'a"', None),
    (b'name="a\\"; b"', b'a"; b', None), (b'name="\\"; x="; filename="y"', b'"; x=', b"y"),
    # What stands behind the quotes does not count.
    (b'name=a; filename="payload.jpg".html', b"a", b"payload.jpg"), (b'name="a"b; filename="c"', b"a", b"c"),
    (b'filename="p\\"q".html; name=a', b"a", b'p"q'), (b'name="" x; filename=""y', b"", b""),
    # RFC 8187.
    (b"name*=utf-8''na%C3%AFve", NAIVE, None), (b"name*=UTF-8'en'na%C3%AFve; name=other", NAIVE, None),
    (b"name=x; name*=iso-8859-1''na%EFve", NAIVE, None), (b"name*=bad; name=ok", b"ok", None),
    (b"name=a; filename*=utf-8''na%C3%AFve", b"a", NAIVE), (b"name*=utf-8''a%22; filename=b", b'a"', b"b"),
    (b"name*=''plain", b"plain", None), (b"name*=\"utf-8''a%20b\"", b"a b", None),
    # RFC 2231.
    (b'name=a; filename*0="long"; filename*1="name.txt"', b"a", b"longname.txt"),
    (b'name=a; filename*1="name.txt"; filename*0="long"; filename*2=""', b"a", b"longname.txt"),
    (b"name=a; filename*0*=utf-8''na%C3; filename*1*=%AF; filename*2=v%65.txt", b"a", "naïv%65.txt".encode()),
    (b"name=a; filename*0*=iso-8859-1'fr'%EF; filename*1=.; filename*2*=%EF", b"a", "ï.ï".encode()),
    (b"name=a; filename*0*=b%20c", b"a", b"b c"), (b"name=a; filename*0=b; filename*2=c", b"a", b"b"),
    (b"name=a; filename*0=dir/b; filename*1=../../c", b"a", b"c"), (b"name=a; filename*1=b", b"a", None),
    (b"name*0=a; name*1=b; filename=c", b"ab", b"c"), (b"name*0*=utf-8''na%C3%AFve", NAIVE, None),
    (b"name=a; filename*0=sections; filename=plain", b"a", b"sections"),
    (b"name=a; filename*=utf-8''star; filename*0=sections; filename=plain", b"a", b"star"),
    (b"NAME=a; FileName=b", b"a", b"b"), (b"name = a ; filename = b ", b"a", b"b"), (b"name=", b"", None),
])
def test_names(parameters, name, filename):
    data = multipart(b"Content-Disposition: form-data; %b\r\n\r\nv" % parameters)
    assert parse(data) == [(name, filename, b"v")]


# Each unit again and again, as long as a header may be.
@pytest.mark.parametrize("unit", [b'a="\\";', b'"\\" ', b'a="\\"', b'a="b"c', b'="\\\\', b'a="b\\" ', b'\\"\t',
                                  b'a="";', b'a=b" ;'])
def test_parameters_take_no_longer_than_they_are_long(unit):
    """Quadratic time would be minutes."""
    for value in (unit * (60000 // len(unit)), b'a="' + unit * (60000 // len(unit)),
                  b'a="' + unit * (60000 // len(unit)) + b'"x'):
        begun = time.thread_time()
        kapow.parse_parameters(b"x; " + value)
        assert time.thread_time() - begun < 2


def test_many_sections_take_no_longer_than_they_are_long():
    sections = {b"filename*%d" % number: b"x" for number in range(5000)}
    assert kapow.part_filename(sections) == b"x" * 5000


class Counted:
    """Counts, and can hold up, the parsing of urlencoded forms."""

    def __init__(self, monkeypatch):
        self.begun = 0
        self._parse = kapow.parse_urlencoded
        monkeypatch.setattr(kapow, "parse_urlencoded", self.parse)

    def parse(self, body):
        self.begun += 1
        return self._parse(body)


@pytest.fixture
def counted(monkeypatch):
    return Counted(monkeypatch)


def make_form(data, receive=None):
    """Return the Form of an urlencoded body, which comes from `receive()` if that is given."""
    head = kapow.RequestHead(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n"
                             b"Content-Type: application/x-www-form-urlencoded" % len(data))
    pieces = iter([data])
    reader = kapow.BodyReader(head, bytearray(), receive or (lambda: next(pieces, b"")))
    return kapow.UserRequest(head, kapow.RequestBody(reader), "::1").form


def test_form_is_remembered(counted):
    form = make_form(b"a=1&b=2&a=3")
    assert not form.is_parsed
    assert [field.name for field in form()] == [b"a", b"b", b"a"]
    assert form.is_parsed and form() is form() and form.parse()
    assert list(form.named(files=False)) == [b"a", b"b"] and form.named(files=True) == {}
    assert [b"".join(field.pieces()) for field in form.named(files=False)[b"a"]] == [b"1", b"3"]
    assert counted.begun == 1


def test_refusal_is_remembered(counted):
    form = make_form(b"a&" * 10001)
    for ask in (form, form, lambda: form.named(files=True)):
        with pytest.raises(kapow.ApiError) as caught:
            ask()
        assert (caught.value.status, caught.value.reason) == (413, "Content Too Large")
    assert form.is_parsed and counted.begun == 1


@pytest.mark.parametrize("rest, kinds", [(b"2&c=3", [list] * 4), (b"", [kapow.PeerLeft] * 4)])
def test_form_that_many_ask_for(counted, rest, kinds):
    """One of them waits for the client, with no lock held, and parses; the others get the same."""
    asked, go, results = threading.Semaphore(0), threading.Event(), []
    pieces = iter([b"a=1&b=", rest])

    def receive():
        asked.release()
        assert go.wait(DEADLINE)
        return next(pieces, b"")

    form = make_form(b"a=1&b=2&c=3", receive)

    def ask():
        try:
            results.append(form())
        except kapow.ProtocolError as error:
            results.append(error)

    threads = [threading.Thread(target=ask) for _ in kinds]
    for thread in threads:
        thread.start()
    assert asked.acquire(timeout=DEADLINE)
    assert not form.is_parsed and not form.parse(wait=False)        # neither waits
    assert counted.begun == 1
    go.set()
    for thread in threads:
        thread.join(DEADLINE)
    assert [type(result) for result in results] == kinds
    if rest:
        assert counted.begun == 1 and all(result is results[0] for result in results)
        assert [b"".join(field.pieces()) for field in results[0]] == [b"1", b"2", b"3"]


def test_many_fields_are_found_at_once():
    """10,000 look-ups among 10,000 fields: one by one it would be 100 million comparisons."""
    class Handler:
        class request:
            form = make_form(b"&".join(b"f%d=%d" % (number, number) for number in range(10000)))
    begun = time.thread_time()
    for number in range(10000):
        assert b"".join(kapow.get_form(Handler, b"f%d" % number).pieces) == b"%d" % number
    assert time.thread_time() - begun < 1.5


# A server whose urlencoded forms are not parsed while a file is there, and which notes who parses them.
HOLDING = """
import os, sys, threading, time
sys.path.insert(0, {root!r})
import kapow
directory, parse, start = {directory!r}, kapow.parse_urlencoded, threading.Thread.start
def note(name, text):
    with open(directory + "/" + name, "a") as file:
        file.write(text + "\\n")
def hold(body):
    note("parsers", threading.current_thread().name)
    while os.path.exists(directory + "/hold"):
        time.sleep(0.01)
    return parse(body)
def refuse(thread):
    if thread.name == "form" and os.path.exists(directory + "/refuse"):
        raise RuntimeError("can't start new thread")
    start(thread)
    note("started", thread.name)
kapow.parse_urlencoded, threading.Thread.start = hold, refuse
kapow.LOST_TIME = 0
sys.exit(kapow.main())
"""


class Holding:
    """A Server with the files that HOLDING looks for."""

    def __init__(self, start_server, directory):
        self._directory = directory
        script = directory / "holding.py"
        script.write_text(HOLDING.format(root=str(KAPOW.parent), directory=str(directory)))
        self.server = start_server("--grace", "1", script=script)

    def touch(self, name):
        (self._directory / name).touch()

    def remove(self, name):
        (self._directory / name).unlink()

    def parsers(self, name="parsers"):
        """Return the names of the threads that have begun to parse, each time the same, or "started"."""
        path = self._directory / name
        return path.read_text().split("\n")[:-1] if path.exists() else []

    def begin(self, path, body):
        """Make a request in a thread; return that and a list for its Reply."""
        replies = []
        thread = threading.Thread(target=lambda: replies.append(
            self.server.request("POST", path, body, URLENCODED)))
        thread.start()
        return thread, replies


@pytest.fixture
def holding(start_server, tmp_path):
    made = Holding(start_server, tmp_path)
    yield made
    if made.server.process.poll() is None:
        made.server.check_idle()


LARGE = b"a=1&b=" + b"x" * 3000
BOTH = ("kapow get /request/form/a >a & kapow get /request/form >names; wait; "
        "cat a names | kapow set /response/body; kapow get /request/form/a | kapow set /response/body; rm a names")


@pytest.mark.skipif(not kapow.can_have_channels(), reason="no channels")
def test_form_is_parsed_apart(holding):
    """While a large form is parsed the watcher serves others; then all answers come, and one thread parsed."""
    server = holding.server
    path, other = server.route(BOTH, "POST"), server.route(
        "kapow get /request/method | kapow set /response/body")
    holding.touch("hold")
    thread, replies = holding.begin(path, LARGE)
    wait_until(holding.parsers, "a parser")
    for _ in range(3):
        assert server.get(other).body == b"GET"
    assert not replies
    holding.remove("hold")
    thread.join(DEADLINE)
    assert [reply.body for reply in replies] == [b"1a\nb\n1"]
    assert holding.parsers() == ["form"]


@pytest.mark.skipif(not kapow.can_have_channels(), reason="no channels")
@pytest.mark.parametrize("body, answers, parsers", [
    (b"a=1&b=2", b"1a\nb\n1", ["watcher"]), (LARGE, b"1a\nb\n1", ["form"]),
    (b"a&" * 10001, b"", ["form"]), (b"c=" + b"y" * 60000, b"c\n", ["form"])])
def test_form_is_parsed_once(holding, body, answers, parsers):
    """Also when it is over a limit; the watcher itself parses what is small."""
    reply = holding.server.request("POST", holding.server.route(BOTH, "POST"), body, URLENCODED)
    assert (reply.status, reply.body) == (200, answers)
    assert holding.parsers() == parsers


@pytest.mark.skipif(not kapow.can_have_channels(), reason="no channels")
def test_no_thread_for_a_form(holding):
    """Then the caller asks the data interface, whose thread parses."""
    holding.touch("refuse")
    reply = holding.server.request("POST", holding.server.route(BOTH, "POST"), LARGE, URLENCODED)
    assert reply.body == b"1a\nb\n1"
    [parser] = holding.parsers()
    assert parser not in ("form", "watcher")


@pytest.mark.skipif(not kapow.can_have_channels(), reason="no channels")
def test_handler_that_is_killed_while_its_form_is_parsed(holding):
    """The answer goes to nobody else: slots that wait for one are not lent again."""
    server = holding.server
    path, other = server.route(BOTH, "POST"), server.route(
        "kapow get /request/params/n | kapow set /response/body")
    holding.touch("hold")
    thread, replies = holding.begin(path, LARGE)
    wait_until(lambda: holding.parsers("started").count("form") == 2, "two parsers, one waits for the other")
    [handler] = server.control("GET", "/handlers").json()
    assert server.control("DELETE", f"/handlers/{handler['id']}").status_code == 204
    thread.join(DEADLINE)
    assert [reply.status for reply in replies] == [503]
    for number in range(5):
        assert server.get(f"{other}?n={number}").body == b"%d" % number
    holding.remove("hold")
    wait_until(lambda: server.usage()[1] <= server.idle[1], "the end of the parsers")
    for number in range(20):
        assert server.get(f"{other}?n={number}").body == b"%d" % number


@pytest.mark.skipif(not kapow.can_have_channels(), reason="no channels")
def test_caller_that_outlives_its_handler(holding):
    """It gets one answer, that of a handler that has ended."""
    server = holding.server
    path = server.route("(kapow get /request/form; echo status $?) >late 2>&1 & "
                        "while ! [ -s parsers ]; do sleep 0.01; done".replace(
                            "parsers", str(holding.server.directory.parent / "parsers")), "POST")
    holding.touch("hold")
    reply = server.request("POST", path, LARGE, URLENCODED)
    assert (reply.status, reply.body) == (200, b"")
    holding.remove("hold")
    late = server.directory / "late"
    wait_until(lambda: late.read_text().endswith("status 1\n"), late.read_text)
    assert re.fullmatch(r"kapow\w*: [^\n]*Handler ID Not Found\nstatus 1\n", late.read_text())


@pytest.mark.skipif(not kapow.can_have_channels(), reason="no channels")
def test_stop_while_a_form_is_parsed(holding):
    """The stop waits for the thread that parses, which uses what the stop closes."""
    server = holding.server
    holding.touch("hold")
    thread, replies = holding.begin(server.route(BOTH, "POST"), LARGE)
    wait_until(holding.parsers, "a parser")
    server.process.send_signal(signal.SIGTERM)
    thread.join(DEADLINE)
    with pytest.raises(subprocess.TimeoutExpired):
        server.process.wait(4)
    holding.remove("hold")
    assert server.stop() == 0
    assert not [line for line in server.log if "Traceback" in line or "unexpected" in line]
