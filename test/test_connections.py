"""Connections, open files, memory and standard output when there are too few of them."""

import contextlib
import http.client
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time

import pytest

import kapow
from conftest import DEADLINE, KAPOW, Server, read_all, wait_until, write_starter

GET = "kapow get /request/method | kapow set /response/body"
ASK = b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n"


def ask(sock, path="/none"):
    """Make a request on a connection that is kept; return the status, None if it was closed."""
    try:
        sock.sendall(ASK % path.encode())
        head = b""
        while b"\r\n\r\n" not in head:
            data = sock.recv(65536)
            if not data:
                return None
            head += data
    except OSError:
        return None
    return int(head.split()[1])


@contextlib.contextmanager
def connections(server, count, name="user", used=True):
    """Context manager: `count` connections, which made a request if `used`, and are idle."""
    with contextlib.ExitStack() as stack:
        socks = []
        for _ in range(count):
            socks.append(stack.enter_context(server.connect(name)))
            if used:
                assert ask(socks[-1]) == 404
        yield socks


def is_closed(sock):
    """Return True if the server has ended a connection on which nothing is due."""
    sock.settimeout(0)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
    finally:
        sock.settimeout(DEADLINE)


def test_longest_idle_goes(start_server):
    server = start_server("--max-connections", "5")
    with connections(server, 5) as socks:
        assert ask(socks[0]) == 404             # now the second has waited longest
        with server.connect() as sixth:
            assert ask(sixth) == 404
            wait_until(lambda: is_closed(socks[1]), "the end of the longest idle one")
            assert not any(map(is_closed, [socks[0], *socks[2:], sixth]))
            assert [ask(sock) for sock in (socks[0], *socks[2:], sixth)] == [404] * 5


def test_fresh_connections_are_idle(start_server):
    server = start_server("--max-connections", "5")
    with connections(server, 5, used=False) as socks:
        assert server.get("/none").status == 404
        wait_until(lambda: is_closed(socks[0]), "the end of the longest idle one")
        assert not is_closed(socks[-1])


def test_half_a_head_is_idle(start_server):
    server = start_server("--max-connections", "5")
    with connections(server, 5, used=False) as socks:
        for sock in socks:
            sock.sendall(b"GET / HTTP/1.1\r\n")
        assert server.get("/none").status == 404
        wait_until(lambda: any(map(is_closed, socks)), "the end of one")


def test_busy_ones_stay(start_server):
    server = start_server("--max-connections", "3")
    gate = server.directory / "gate"
    path = server.route(f"until [ -e {gate} ]; do sleep 0.02; done; kapow set /response/body done")
    with connections(server, 3, used=False) as socks:
        for sock in socks:
            sock.sendall(ASK % path.encode())
        wait_until(lambda: len(server.control("GET", "/handlers").json()) == 3, "three handlers")
        for _ in range(20):
            with pytest.raises((OSError, http.client.HTTPException)):
                server.get("/none")
        gate.touch()
        assert all(sock.recv(12) == b"HTTP/1.1 200" for sock in socks)
    refusals = [line for line in server.log if "refuses a client: 3 connections, and none is idle" in line]
    assert 1 <= len(refusals) < 20


def test_tls_too(start_server, tmp_path):
    certificate, key = kapow.make_certificate("localhost", "localhost")
    (tmp_path / "cert").write_text(certificate)
    (tmp_path / "key").write_text(key)
    server = start_server("--max-connections", "2", "--certfile", tmp_path / "cert", "--keyfile",
                          tmp_path / "key", kind=TlsServer)
    with contextlib.ExitStack() as stack:
        first, second, third = (stack.enter_context(server.connect()) for _ in range(3))
        assert ask(third) == 404
        wait_until(lambda: ask(first) is None, "the end of the longest idle one")
        assert ask(third) == 404


PATIENT = """
import sys
sys.path.insert(0, {!r})
import kapow
kapow.HEAD_TIME = 1000
sys.exit(kapow.main())
"""


def test_handshake_is_idle(start_server, tmp_path):
    """Who does not come to the end of it gives way, before his time is up."""
    certificate, key = kapow.make_certificate("localhost", "localhost")
    (tmp_path / "cert").write_text(certificate)
    (tmp_path / "key").write_text(key)
    (tmp_path / "patient.py").write_text(PATIENT.format(str(KAPOW.parent)))
    server = start_server("--max-connections", "3", "--certfile", tmp_path / "cert", "--keyfile",
                          tmp_path / "key", kind=TlsServer, script=tmp_path / "patient.py")
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(Server.connect(server)) for _ in range(3)]
        for sock in socks:
            sock.sendall(b"\x16\x03\x01\x02\x00")       # of a ClientHello
        server.connect().close()
        wait_until(lambda: is_closed(socks[0]), "the end of the oldest")
        assert not is_closed(socks[2])


class TlsServer(Server):
    """A server whose users come over TLS."""

    def connect(self, name="user"):
        import ssl
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        sock = context.wrap_socket(super().connect(name))
        assert ask(sock) == 404
        return sock


LIMITED = "resource.setrlimit(resource.RLIMIT_NOFILE, ({0}, {0}))"


def test_descriptors_are_kept_for_operators(start_server, tmp_path):
    """1,500 idle clients and a limit of 1,000 files: all interfaces answer, and so do routes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8000), hard))
    starter = write_starter(tmp_path / "start.py", LIMITED.format(1000))
    server = start_server("--status-bind", "127.0.0.1:0", script=starter)
    server.wait_log("WARNING the limit of open files, 1000, is enough for 50 handlers at once")
    path = server.route(GET)
    with connections(server, 1500, used=False), connections(server, 300, "data", used=False), \
            connections(server, 100, "control", used=False), \
            connections(server, 100, "status", used=False):
        assert server.get(path).body == b"GET"
        assert server.raw(b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
                          "status").startswith(b"HTTP/1.1 200 ")
        assert server.ctl("route", "list").returncode == 0
        with server.handler() as waiting:
            assert waiting.get("/request/method").body == b"GET"
        threads = [threading.Thread(target=lambda: results.append(server.get(path).body))
                   for _ in range(60)]
        results = []
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [b"GET"] * 60
    assert len([line for line in server.log if "ERROR" in line]) < 20


@pytest.mark.parametrize("limit, told", [(100, "the limit of open files is 100, and the server needs 208"),
                                         (207, "the server needs 208")])
def test_too_few_files_to_begin(tmp_path, limit, told):
    starter = write_starter(tmp_path / "start.py", LIMITED.format(limit))
    done = run_until_exit([sys.executable, starter])
    assert done.returncode == 1
    assert told in done.stderr and len(done.stderr.splitlines()) == 1


def run_until_exit(words, seconds=DEADLINE):
    """Run a server that is expected to end by itself; return the CompletedProcess."""
    return subprocess.run([*map(str, words), "server", "--bind", "127.0.0.1:0", "--control-bind",
                           "127.0.0.1:0", "--data-bind", "127.0.0.1:0"], capture_output=True,
                          text=True, timeout=seconds)


@pytest.mark.parametrize("mebibytes", [60, 90, 120, 150, 200, 300])
def test_little_memory(tmp_path, mebibytes):
    """It runs, or says in a sentence that it cannot. No traceback, nothing left running."""
    starter = write_starter(tmp_path / "start.py",
                            f"resource.setrlimit(resource.RLIMIT_AS, ({mebibytes} << 20,) * 2)")
    process = subprocess.Popen(
        [sys.executable, starter, "server", "--bind", "127.0.0.1:0", "--control-bind", "127.0.0.1:0",
         "--data-bind", "127.0.0.1:0"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    lines = []
    killer = threading.Timer(DEADLINE, process.kill)
    killer.start()
    for line in process.stderr:
        lines.append(line)
        if "ready: " in line:
            process.terminate()
    assert process.wait(DEADLINE) in (0, 1)
    killer.cancel()
    process.stderr.close()
    text = "".join(lines)
    assert "Traceback" not in text and "please report" not in text, text
    if process.returncode == 1:
        assert "memory" in lines[-1] or "thread" in lines[-1] or "map" in lines[-1], text


def test_too_many_threads(start_server, tmp_path):
    """When no thread can be had a client is dropped, others go on, and the log is not flooded."""
    starter = write_starter(tmp_path / "start.py",
                            "resource.setrlimit(resource.RLIMIT_AS, (600 << 20,) * 2)")
    server = start_server(script=starter)
    path = server.route(GET)
    with connections(server, 300, used=False):
        wait_until(lambda: any("drops a client" in line for line in server.log), "a dropped client")
        wait_until(lambda: answers(server, path), "an answer")
    assert server.get(path).body == b"GET"
    assert len([line for line in server.log if "drops a client" in line]) < 10


def answers(server, path):
    """Return True if the server answers a request now."""
    try:
        return server.get(path).status == 200
    except (OSError, http.client.HTTPException):
        return False


# The data interface outside the life of a handler.

IMPATIENT = """
import sys
sys.path.insert(0, {!r})
import kapow
kapow.IDLE_TIME = kapow.DRAIN_TIME = 1
sys.exit(kapow.main())
"""


@pytest.mark.parametrize("request_head", [
    b"GET /handlers/none/request/body HTTP/1.1\r\nHost: h\r\n\r\n",
    b"PUT /handlers/none/response/body HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000\r\n\r\n",
    b"PUT /handlers/none/response/body HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"])
def test_nobody_stays_for_a_handler_that_is_not_there(start_server, tmp_path, request_head):
    """The usual times hold: 1 s in this server. Nor does one that sends a byte now and then."""
    script = tmp_path / "impatient.py"
    script.write_text(IMPATIENT.format(str(KAPOW.parent)))
    server = start_server(script=script)
    with server.connect("data") as silent, server.connect("data") as busy:
        with server.handler() as waiting:
            for sock in (silent, busy):         # before, they had one that is there
                sock.sendall(b"GET /handlers/%b/request/method HTTP/1.1\r\nHost: h\r\n\r\n"
                             % waiting.id.encode())
                assert sock.recv(12) == b"HTTP/1.1 200"
                while not sock.recv(4096).endswith(b"GET"):
                    pass
        for sock in (silent, busy):
            sock.sendall(request_head)
            assert sock.recv(12) == b"HTTP/1.1 404"
        assert read_all(silent).endswith(b"}")
        with contextlib.suppress(OSError):
            for _ in range(1000):
                busy.sendall(b"1\r\nx\r\n" if b"chunked" in request_head else b"x")
                time.sleep(0.02)
        with pytest.raises(OSError):
            for _ in range(1000):
                busy.sendall(b"x" * 1000)
                time.sleep(0.01)


def test_programs_may_pause(start_server, tmp_path):
    """While its handler lives a program may be silent for longer than others."""
    script = tmp_path / "impatient.py"
    script.write_text(IMPATIENT.format(str(KAPOW.parent)))
    server = start_server(script=script)
    path = server.route('{ echo a; sleep 2.5; echo b; } | curl -sS -T - '
                        '"$KAPOW_DATA_URL/handlers/$KAPOW_HANDLER_ID/response/body"')
    assert server.get(path).body == b"a\nb\n"


# Standard output that nobody reads.


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_access_log_that_nobody_reads(start_server, kind):
    """Requests are answered, no thread waits, the rest is counted, and a stop takes no longer."""
    if kind == "pipe":
        reader, writer = os.pipe()
    else:
        reader, writer = (end.detach() for end in socket.socketpair())
    server = start_server(access_log=writer)
    os.close(writer)
    before = server.usage()[1]
    agent = {"User-Agent": "x" * 60_000}
    connection = http.client.HTTPConnection("127.0.0.1", server.port("user"), timeout=DEADLINE)
    for _ in range(60):
        connection.request("GET", "/none", headers=agent)
        assert connection.getresponse().read() == b'{"reason": "Not Found"}'
    connection.close()
    wait_until(lambda: server.usage()[1] <= before, "as many threads as before")
    if kind == "pipe":
        data = os.read(reader, 1 << 20)
        wait_until(lambda: data_of(reader, 1 << 20), "more of the log")
        while data_of(reader, 1 << 20):
            pass
        found = server.wait_log(r"WARNING (\d+) lines of the access log were dropped")
        assert 30 < int(found.group(1)) < 60
        assert data.startswith(b"127.0.0.1 ")
        assert server.get("/after").status == 404
        wait_until(lambda: b"/after" in data_of(reader, 1 << 20), "the next line")
    begin = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - begin < 8
    if kind == "socket":
        assert any("lines of the access log were dropped" in line for line in server.log)
    os.close(reader)


def data_of(reader, size):
    """Return what is in a pipe after a moment, b"" if nothing is."""
    time.sleep(0.2)
    os.set_blocking(reader, False)
    try:
        return os.read(reader, size)
    except BlockingIOError:
        return b""
    finally:
        os.set_blocking(reader, True)


def test_access_log_lines_are_whole(start_server):
    """A slow reader gets each line once, in order for each client, none cut."""
    reader, writer = os.pipe()
    server = start_server(access_log=writer)
    os.close(writer)
    lines = []
    thread = threading.Thread(target=read_slowly, args=(reader, lines))
    thread.start()
    agent = {"User-Agent": "y" * 3000}
    for number in range(200):
        assert server.request("GET", f"/{number}", headers=agent).status == 404
    assert server.stop() == 0
    thread.join()
    numbers = [int(re.search(rb"GET /(\d+) ", line).group(1)) for line in lines]
    assert numbers == list(range(200))
    assert all(b"y" * 3000 + b'" 0.' in line for line in lines)


def read_slowly(reader, lines):
    """Read a pipe to its end in small pieces, and close it."""
    with open(reader, "rb", buffering=0) as file:
        data = b""
        while piece := file.read(5000):
            data += piece
            time.sleep(0.002)
        lines.extend(data.splitlines())


def test_many_that_end_at_once(start_server):
    """Thousands of connections that end together do not keep another request waiting."""
    server = start_server()
    path = server.route(GET)
    with connections(server, 1000, used=False):
        pass
    assert server.get(path).body == b"GET"
    wait_until(lambda: server.usage()[1] <= server.idle[1], "the end of their threads")
