"""For the tests of what operators do: Unix sockets, certificates, requests that wait to be answered."""

import contextlib
import http.client
import json
import socket
import ssl
import subprocess
import sys

import kapow
from conftest import DEADLINE, KAPOW, KAPOWCTL, Reply, Server, wait_until


class UnixConnection(http.client.HTTPConnection):
    """A connection to the Unix socket `path`."""

    def __init__(self, path):
        super().__init__("localhost", timeout=DEADLINE)
        self._path = str(path)

    def connect(self):
        self.sock = unix_connect(self._path)


def unix_connect(path):
    """Return a socket that is connected to the Unix socket `path`."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(DEADLINE)
    sock.connect(str(path))
    return sock


def unix_request(path, method, target, body=None, headers=None):
    """Make one request on a connection of its own; return the Reply."""
    with contextlib.closing(UnixConnection(path)) as connection:
        connection.request(method, target, body, headers or {})
        return Reply(connection.getresponse())


class UnixServer(Server):
    """A Server whose user and data interfaces are Unix sockets; `paths` are {name: path}."""

    def __init__(self, directory, *arguments, **options):
        self.paths = {name: directory / f"{name}.sock" for name in ("user", "data")}
        super().__init__(directory, "--bind", f"unix:{self.paths['user']}",
                         "--data-bind", f"unix:{self.paths['data']}", *arguments, **options)

    def request(self, method, path, body=None, headers=None):
        """As in Server."""
        return unix_request(self.paths["user"], method, path, body, headers)

    def connect(self, name="user"):
        """As in Server."""
        return unix_connect(self.paths[name])


class BusyServer(Server):
    """A Server that is not idle after its start: init programs still run."""

    def _settled(self):
        return self.usage()


def write_pair(directory, name="tls"):
    """Write a certificate for 127.0.0.1 and its key, new ones each time; return their paths."""
    pair = directory / f"{name}.crt", directory / f"{name}.key"
    for path, text in zip(pair, kapow.make_certificate("test", "127.0.0.1")):
        path.write_text(text)
    return pair


def trusting(cert):
    """Return a TLS context for clients that trusts the certificate in the file `cert` alone."""
    return ssl.create_default_context(cafile=str(cert))


def script(path, text):
    """Write an executable shell script, in place of one that may run; return its path."""
    new = path.with_name(path.name + ".new")
    new.write_text(f"#!/bin/sh\n{text}\n")
    new.chmod(0o755)
    return new.rename(path)


def ctl(*arguments, environment, **options):
    """Run kapowctl with `environment` alone; return (exit status, stdout, stderr)."""
    done = subprocess.run([sys.executable, str(KAPOWCTL), *map(str, arguments)], env=environment,
                          capture_output=True, text=True, timeout=DEADLINE, **options)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def plain_environment(server):
    """Return the environment of another terminal of the user who runs `server`."""
    return {"PATH": server.environment["PATH"], "XDG_RUNTIME_DIR": str(server.runtime)}


def start_process(arguments, **options):
    """Start a `kapow server` that is not a Server of conftest; return its Popen."""
    return subprocess.Popen([sys.executable, str(KAPOW), "server", *map(str, arguments)],
                            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, **options)


def handlers(server):
    """Return the handlers that run, as the control interface shows them."""
    return server.control("GET", "/handlers").json()


def wait_handlers(server, count=1):
    """Wait until `count` handlers run; return them."""
    def look():
        found = handlers(server)
        return len(found) == count and (found or True)
    return wait_until(look, f"{count} handlers")


def read_response(file, method="GET"):
    """Return the Reply to one request of a connection's `makefile("rb")`, and leave it open."""
    response = http.client.HTTPResponse(_Given(file), method=method)
    response.begin()
    return Reply(response)


class _Given:
    """What HTTPResponse takes for a socket, and does not close."""

    def __init__(self, file):
        self._file = file

    def makefile(self, mode):
        return _Open(self._file)


class _Open:
    """A file that close() leaves open."""

    def __init__(self, file):
        self._file = file

    def __getattr__(self, name):
        return getattr(self._file, name)

    def close(self):
        pass


def dump_json(path, document):
    """Write a document to a file; return its path."""
    path.write_text(json.dumps(document))
    return path
