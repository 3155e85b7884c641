"""The service of the example service-python: counters, kept in memory.

    POST /counters/NAME     adds one to a counter, and says what it is then
    GET /counters/NAME      says what it is
"""

import json
import os
import socketserver
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler

MOST_COUNTERS = 1000        # their names come from strangers, and memory has an end

MANIFEST = {
    "name": "counters",
    "version": "1",
    "routes": [
        {"method": "GET", "url_pattern": "/counters/{name:[0-9A-Za-z]{1,40}}", "handler": "show"},
        {"method": "POST", "url_pattern": "/counters/{name:[0-9A-Za-z]{1,40}}", "handler": "add"},
    ],
}

lock = threading.Lock()     # each connection has a thread
counters = {}               # name -> number


class Conversation(BaseHTTPRequestHandler):
    """One connection of the server's, used for one request after another."""

    protocol_version = "HTTP/1.1"       # which keeps the connection

    def do_GET(self):
        # Kapow! says in this header which route it was; what a client sends
        # under its name does not come here.
        handler = self.headers["Kapow-Handler"]
        if handler == "show":
            self.show()
        elif handler is None and self.path == "/_kapow/manifest":
            self.answer(200, json.dumps(MANIFEST), "application/json")
        else:
            self.answer(404, "There is no such handler.\n")

    do_HEAD = do_GET

    def do_POST(self):
        if self.headers["Kapow-Handler"] == "add":
            self.add()
        else:
            self.answer(404, "There is no such handler.\n")

    def show(self):
        with lock:
            count = counters.get(self.match("name"))
        if count is None:
            self.answer(404, "There is no such counter.\n")
        else:
            self.answer(200, f"{count}\n")

    def add(self):
        name = self.match("name")
        with lock:
            room = name in counters or len(counters) < MOST_COUNTERS
            if room:
                counters[name] = count = counters.get(name, 0) + 1
        if room:
            self.answer(200, f"{count}\n")
        else:
            self.answer(507, "There are too many counters.\n")

    def match(self, name):
        """Return what stood for {name} in the URL."""
        return urllib.parse.unquote(self.headers["Kapow-Match-" + name])

    def answer(self, status, text, content_type="text/plain; charset=utf-8"):
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            # Nobody has read the body, so no request can follow it.
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        """Log nothing: Kapow! has an access log."""


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 128


with Server(os.environ["KAPOW_SERVICE_SOCKET"], Conversation) as server:
    server.serve_forever()
