"""Services for the tests: a puppet whose strings a test holds, and real ones in three runtimes."""

import contextlib
import json
import pathlib
import re
import shutil
import socket
import sys
import threading
import uuid

from conftest import DEADLINE, wait_until

UNAVAILABLE = (b'{"title": "Cannot service request",'
               b'"detail":"The application is not running. Please check the logs."}')
BAD_GATEWAY = b'{"reason": "Bad Gateway"}'
NO_MANIFEST = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"


def state(server, name):
    """Return the service as the control interface shows it."""
    answer = server.control("GET", f"/services/{name}")
    assert answer.status_code == 200, answer.text
    return answer.json()


def wait_state(server, name, wanted="available"):
    """Wait until a service has the state; return it as JSON."""
    def look():
        shown = state(server, name)
        return shown if shown["state"] == wanted else None
    return wait_until(look, f"{name} being {wanted}")


def add(server, name, *command, **more):
    """Add a service; return it as JSON."""
    answer = server.control("POST", "/services",
                            {"name": name, "command": list(map(str, command)), **more})
    assert answer.status_code == 201, answer.text
    return answer.json()


def remove(server, name):
    """Remove a service that no route uses."""
    answer = server.control("DELETE", f"/services/{name}")
    assert (answer.status_code, answer.content) == (204, b""), answer.text


def call(server, name, action, document=None):
    """Do an action with a service; return requests' Response."""
    return server.control("POST", f"/services/{name}/{action}", document)


def wait_line(server, seen, pattern):
    """Wait for a line of the log behind the first `seen` that has the regular expression."""
    wait_until(lambda: any(re.search(pattern, line) for line in server.log[seen:]),
               f"a line with {pattern!r}")


def peak(server):
    """Return the largest resident memory in kB that the server has had since reset_peak()."""
    with open(f"/proc/{server.process.pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def reset_peak(server):
    """Begin to measure anew; return what is resident now, in kB."""
    pathlib.Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")
    return peak(server)


def say(data, keep=True):
    """Return an act for a Puppet: answer `data`, keep the connection or close it."""
    def act(sock, head, rest):
        sock.sendall(data)
        return keep
    return act


def answer(body=b"", status=b"200 OK"):
    """Return a small response."""
    return b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


class Puppet:
    """A service whose process only sleeps: the test itself listens on its socket.

    So a test sees each byte and decides when which comes back: `act(sock, head,
    rest)` is called for each request but the manifest's, with the socket, the head
    in bytes and what came behind it; it returns whether to keep the connection.
    """

    # What the process runs; it tells its socket in the file $0.
    PROGRAM = 'echo "$KAPOW_SERVICE_SOCKET" > "$0.new"; mv "$0.new" "$0"; exec sleep 1000'

    def __init__(self, server, name, **more):
        self.server, self.name = server, name
        self.manifest = NO_MANIFEST
        self.act = say(answer(b"hello"))
        self.heads = []             # of the requests that came, but the manifest's
        self.connections = 0        # that brought one
        self._note = server.directory / uuid.uuid4().hex
        self._listeners = []
        self._socks = set()         # that are connected
        add(server, name, "/bin/sh", "-c", self.PROGRAM, self._note, **more)

    def socket_path(self):
        """Return the path that the newest process was given, once; wait for it."""
        wait_until(self._note.exists, f"the process of {self.name}")
        path = self._note.read_text().rstrip("\n")
        self._note.unlink()
        return path

    def listen(self):
        """Listen for the newest process, and wait until the server has seen that."""
        self.take_calls(self.socket_path())
        wait_state(self.server, self.name)
        return self

    def take_calls(self, path):
        """Listen on `path`."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(64)
        self._listeners.append(listener)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def close(self):
        """Listen no more."""
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self._listeners.clear()

    def hang_up(self):
        """Close all connections, as a service may that are idle."""
        for sock in list(self._socks):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener):
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                sock.settimeout(DEADLINE)
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock):
        counted = False
        self._socks.add(sock)
        with sock, contextlib.suppress(OSError):
            while True:
                head, rest = read_head(sock)
                if not head:
                    break
                if b" /_kapow/manifest " in head:
                    sock.sendall(self.manifest)
                    continue
                self.connections += not counted
                counted = True
                self.heads.append(head)
                if not self.act(sock, head, rest):
                    break
        self._socks.discard(sock)


def read_head(sock):
    """Return (the head of the next message with its empty line, what came behind it)."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(65536)
        if not more:
            return b"", data
        data += more
    head, end, rest = data.partition(b"\r\n\r\n")
    return head + end, rest


def read_until(sock, end, data=b""):
    """Return what a socket receives until `end` is in it, or to its close."""
    while end not in data:
        more = sock.recv(65536)
        if not more:
            break
        data += more
    return data


def lines(head):
    """Return the header lines of a head as a sorted list, without the first line."""
    return sorted(head.decode("latin-1").split("\r\n")[1:-2])


# The same program in each runtime: /echo tells the request in JSON, /stream sends the
# body back as it comes, /status/x/NNN has that status, /length, /chunked and /close a
# body of 100,000 bytes framed so.

PYTHON = r'''
import http.server, json, os, socketserver, sys

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = sys.argv[1]

    def log_message(self, *arguments):
        pass

    def pieces(self):
        if self.headers.get("Transfer-Encoding"):
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            data = self.rfile.read1(min(left, 65536))
            left -= len(data)
            yield data

    def answer(self, body, *headers, status=200, length=True):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(body)

    def chunked(self, pieces):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for data in pieces:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.write(b"0\r\n\r\n")

    def serve(self):
        path = self.path.partition("?")[0]
        kind = path.split("/")[1]
        if kind == "stream":
            return self.chunked(self.pieces())
        body = b"".join(self.pieces())
        if kind == "echo":
            self.answer(json.dumps({
                "method": self.command, "target": self.path, "headers": self.headers.items(),
                "body": body.decode("latin-1")}).encode(), ("X-Runtime", "python"))
        elif kind == "status":
            self.answer(b"", status=int(path.split("/")[3]),
                        length=path.endswith("/404"))
        elif kind == "chunked":
            self.chunked([b"x" * 50000] * 2)
        elif kind == "close":
            self.close_connection = True
            self.answer(b"x" * 100000, ("Connection", "close"), length=False)
        elif kind == "_kapow":
            self.answer(b"", status=404)
        else:
            self.answer(b"x" * 100000)

    def __getattr__(self, name):
        if name.startswith("do_"):
            return self.serve
        raise AttributeError(name)

class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

Server(os.environ["KAPOW_SERVICE_SOCKET"], Handler).serve_forever()
'''

WSGI = r'''
import json

def application(environ, start_response):
    path = environ["RAW_URI"].partition("?")[0]
    kind = path.split("/")[1]
    body = environ["wsgi.input"]
    if kind == "stream":
        start_response("200 OK", [])
        return iter(lambda: body.read(65536), b"")
    data = body.read()
    if kind == "echo":
        headers = [(name[5:].replace("_", "-"), value) for name, value in environ.items()
                   if name.startswith("HTTP_")]
        answer = json.dumps({"method": environ["REQUEST_METHOD"], "target": environ["RAW_URI"],
                             "headers": headers, "body": data.decode("latin-1")}).encode()
        start_response("200 OK", [("Content-Length", str(len(answer))), ("X-Runtime", "gunicorn")])
        return [answer]
    if kind == "status":
        start_response(path.split("/")[3] + " Status", [])
        return []
    if kind == "_kapow":
        start_response("404 Not Found", [("Content-Length", "0")])
        return []
    fields = {"length": [("Content-Length", "100000")], "close": [("Connection", "close")]}
    start_response("200 OK", fields.get(kind, []))
    return [b"x" * 50000, b"x" * 50000]
'''

NODE = r'''
const http = require("http");

http.createServer((request, response) => {
    const path = request.url.split("?")[0];
    const kind = path.split("/")[1];
    if (kind === "stream") {
        request.pipe(response);
        return;
    }
    const pieces = [];
    request.on("data", piece => pieces.push(piece));
    request.on("end", () => {
        if (kind === "echo") {
            const headers = [];
            for (let place = 0; place < request.rawHeaders.length; place += 2) {
                headers.push([request.rawHeaders[place], request.rawHeaders[place + 1]]);
            }
            response.setHeader("X-Runtime", "node");
            response.end(JSON.stringify({
                method: request.method, target: request.url, headers: headers,
                body: Buffer.concat(pieces).toString("latin1")}));
        } else if (kind === "status") {
            response.statusCode = Number(path.split("/")[3]);
            response.end();
        } else if (kind === "_kapow") {
            response.statusCode = 404;
            response.end();
        } else {
            if (kind === "length") response.setHeader("Content-Length", 100000);
            if (kind === "close") {
                response.useChunkedEncodingByDefault = false;
                response.setHeader("Connection", "close");
            }
            response.write(Buffer.alloc(50000, "x"));
            response.end(Buffer.alloc(50000, "x"));
        }
    });
}).listen(process.env.KAPOW_SERVICE_SOCKET);
'''

RUNTIMES = ("python", "python-1.0", "gunicorn", "node")


def runtime_command(directory, runtime):
    """Write the program of a runtime to `directory`; return its command, None where it is missing."""
    if runtime.startswith("python"):
        (directory / "service.py").write_text(PYTHON)
        version = "HTTP/1.0" if runtime.endswith("1.0") else "HTTP/1.1"
        return [sys.executable, "-I", "-S", str(directory / "service.py"), version]
    if runtime == "gunicorn":
        (directory / "wsgi_service.py").write_text(WSGI)
        return ["/bin/sh", "-c", 'exec "$0" -m gunicorn --chdir "$1" --worker-class gthread '
                '--threads 8 --bind "unix:$KAPOW_SERVICE_SOCKET" wsgi_service',
                sys.executable, str(directory)]
    node = shutil.which("node") or shutil.which("nodejs")
    (directory / "service.js").write_text(NODE)
    return node and [node, str(directory / "service.js")]


def manifest(document, status=b"200 OK"):
    """Return the response that gives a manifest, JSON or bytes."""
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    return answer(data, status)
