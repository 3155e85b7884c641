"""Forms: how their values are framed on the wire, what is refused, and what names and files are called."""

import http.client
import json
import shutil
import subprocess
import sys
import urllib.parse

import pytest

import kapow
from conftest import DEADLINE

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
