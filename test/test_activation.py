"""Under a service manager: sockets that it hands over, and what it is told."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from conftest import DEADLINE, KAPOW, read_all, wait_until, write_starter
from operating import BusyServer, read_response, script, unix_connect, unix_request
from test_server import FREE


def tcp():
    """Return a socket that listens on a port of the loopback."""
    return socket.create_server(("127.0.0.1", 0))


def unix(path):
    """Return a Unix socket that listens at `path`."""
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    return sock


def handing_over(directory, socks, names=None, pid=None, count=None, command=None):
    """Return what makes a Server, or Popen, one that is started with `socks` by a manager.

    As a service manager does, from descriptor 3 on; `names` as FileDescriptorName=.
    """
    numbers = [sock.fileno() for sock in socks]
    said = {"LISTEN_FDS": str(len(socks) if count is None else count)}
    if names is not None:
        said["LISTEN_FDNAMES"] = names
    starter = write_starter(
        directory / f"manager-{time.monotonic_ns()}.py",
        "import fcntl\n"
        f"aside = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in {numbers!r}]\n"
        "for place, fd in enumerate(aside, 3):\n"
        "    os.dup2(fd, place)\n"
        "    os.close(fd)\n"
        f"for fd in {numbers!r}:\n"
        f"    if fd >= 3 + {len(socks)}:\n"
        "        os.close(fd)\n"
        f"os.environ.update({said!r}, LISTEN_PID={'str(os.getpid())' if pid is None else repr(pid)})",
        *([command] if command else []))
    return {"script": starter, "pass_fds": numbers}


def ask(sock_or_port, path="/healthz", method="GET"):
    """Return the Reply of a request to a port of the loopback, or where a socket listens."""
    port = sock_or_port if isinstance(sock_or_port, int) else sock_or_port.getsockname()[1]
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as sock:
        sock.sendall(f"{method} {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
        with sock.makefile("rb") as file:
            return read_response(file)


LOOK = ("{ env; for file in /proc/self/fd/*; do readlink $file; done; } | "
        "kapow set /response/body")


@pytest.fixture
def socks():
    """A function that keeps sockets until the end of the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *made: [stack.enter_context(sock) for sock in made]


def test_all_by_name(start_server, tmp_path, socks):
    names = ["status", "data", "user", "control"]
    given = dict(zip(names, socks(*(tcp() for _ in names))))
    server = start_server(**handing_over(tmp_path, given.values(), ":".join(names)))
    for name, sock in given.items():
        assert server.port(name) == sock.getsockname()[1]
    assert server.init_environment["KAPOW_CONTROL_URL"] == (
        f"https://127.0.0.1:{given['control'].getsockname()[1]}")
    assert server.init_environment["KAPOW_DATA_URL"] == (
        f"http://127.0.0.1:{given['data'].getsockname()[1]}")
    assert (ask(given["status"]).status, ask(given["user"], "/none").status) == (200, 404)
    # Children see nothing of it.
    seen = server.get(server.route(LOOK)).body.decode()
    assert "KAPOW_HANDLER_ID=" in seen
    assert "LISTEN_" not in seen and "socket:" not in seen
    assert not [name for name in server.init_environment if name.startswith("LISTEN_")]
    assert server.stop() == 0


def test_order_without_names(start_server, tmp_path, socks):
    given = socks(*(tcp() for _ in range(2)))
    server = start_server(**handing_over(tmp_path, given))
    assert [server.port(name) for name in ("user", "control")] == [
        sock.getsockname()[1] for sock in given]
    assert not [line for line in server.log if "status interface" in line]


def test_unix_sockets(start_server, tmp_path, socks):
    """For users and programs; the files are the manager's and stay."""
    paths = [tmp_path / "user", tmp_path / "data"]
    server = start_server(**handing_over(tmp_path, socks(*map(unix, paths)), "user:data"))
    server.wait_log(f"user interface: unix:{paths[0]}$")
    assert server.init_environment["KAPOW_DATA_URL"] == f"unix:{paths[1]}"
    path = server.route("kapow get /request/method | sh -c 'kapow set /response/body'")
    assert unix_request(paths[0], "GET", path).body == b"GET"
    assert server.stop() == 0
    assert all(path.exists() for path in paths)


def refused(directory, socks, *words, **options):
    """Fail unless the server ends with status 1 and one sentence that has the words."""
    made = handing_over(directory, socks, **options)
    done = subprocess.run([sys.executable, str(made["script"]), "server", *FREE],
                          pass_fds=made["pass_fds"], capture_output=True, text=True,
                          timeout=DEADLINE / 3)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1), done.stderr
    assert " ERROR " in done.stderr and all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize("names, words", [
    ("web", ["3", "web", "user, control, data, status"]), ("user:user", ["4", "user", "once"]),
    ("user:", ["4"]), ("User", ["User"])])
def test_names_refused(tmp_path, socks, names, words):
    refused(tmp_path, socks(*(tcp() for _ in names.split(":"))), *words, names=names)


def test_more_sockets_than_names(tmp_path, socks):
    """A mistake like the others, not one to be overlooked."""
    refused(tmp_path, socks(tcp(), tcp()), names="user")


def test_descriptors_refused(tmp_path, socks):
    silent = socket.socket()
    silent.bind(("127.0.0.1", 0))
    udp = socket.socket(type=socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    packets = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    packets.bind(str(tmp_path / "packets"))
    packets.listen()
    first, second = socket.socketpair()
    for made in (silent, udp, packets, first):
        refused(tmp_path, socks(made), "3", "user", names="user")
    second.close()
    with open(tmp_path / "file", "w") as file:
        refused(tmp_path, [file], "3", "user", "socket", names="user")
    for name in ("control", "status"):
        refused(tmp_path, socks(unix(tmp_path / name)), name, names=name)
    refused(tmp_path, [], "3", "user", "Bad file descriptor", names="user", count=1)


@pytest.mark.parametrize("pid, count", [("1", 1), ("", 1), ("nonsense", 1), (None, "x"), (None, 0)])
def test_not_for_us(start_server, tmp_path, socks, pid, count):
    """The descriptors are another's, or none; the server binds what its options say."""
    [given] = socks(tcp())
    server = start_server(wait=False, **handing_over(tmp_path, [given], "user", pid, count))
    assert server.port("user") != given.getsockname()[1]
    assert server.stop() == 0


def test_clients_came_before_the_start(start_server, tmp_path, socks):
    [given] = socks(tcp())
    init = script(tmp_path / "init", "kapow route add /x -c 'kapow set /response/body x'")
    (early,) = socks(socket.create_connection(given.getsockname(), timeout=DEADLINE))
    server = start_server(init=[init], **handing_over(tmp_path, [given], "user"))
    early.sendall(b"GET /x HTTP/1.0\r\n\r\n")
    assert read_all(early).endswith(b"\r\n\r\nx")
    assert server.stop() == 0


def test_no_client_is_refused_between_two_servers(start_server, tmp_path, socks):
    """The socket is the manager's: who comes while no server runs waits for the next."""
    [given] = socks(tcp())
    routes = tmp_path / "routes.json"
    routes.write_text('[{"method": "GET", "url_pattern": "/", "command": ""}]')
    stop, statuses = threading.Event(), []

    def hammer():
        while not stop.is_set():
            statuses.append(ask(given, "/").status)
    first = start_server("--routes", routes, wait=False, **handing_over(tmp_path, [given], "user"))
    threads = [threading.Thread(target=hammer) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: len(statuses) > 10, "answers")
        assert first.stop() == 0
        (waiting,) = socks(socket.create_connection(given.getsockname(), timeout=DEADLINE))
        waiting.sendall(b"GET / HTTP/1.0\r\n\r\n")
        before = len(statuses)
        start_server("--routes", routes, wait=False, **handing_over(tmp_path, [given], "user"))
        assert read_all(waiting).startswith(b"HTTP/1.1 200 ")
        wait_until(lambda: len(statuses) > before + 10, "answers of the second")
    finally:
        stop.set()
        for thread in threads:
            thread.join(DEADLINE)
    assert set(statuses) == {200}


@pytest.mark.skipif(not shutil.which("systemd-socket-activate"), reason="systemd is not here")
@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_systemd_socket_activate(start_server, tmp_path, kind):
    """The server starts with its first client, which waits for it."""
    if kind == "tcp":
        with tcp() as free:
            port = free.getsockname()[1]
        address = f"127.0.0.1:{port}"
    else:
        address = str(tmp_path / "socket")
    keep = [part for name in ("KAPOW_TEST", "TMPDIR", "XDG_RUNTIME_DIR") for part in ("-E", name)]
    activator = write_starter(tmp_path / "activate.py", command=(
        "/usr/bin/env", "systemd-socket-activate", "-l", address, "--fdname=user", *keep,
        sys.executable, "-u", str(KAPOW)))
    server = start_server(script=activator, wait=False)
    server.wait_log("Listening on ")
    with (unix_connect(address) if kind == "unix" else
          socket.create_connection(("127.0.0.1", port), timeout=DEADLINE)) as sock:
        sock.sendall(b"GET /none HTTP/1.0\r\n\r\n")
        assert read_all(sock).startswith(b"HTTP/1.1 404 ")
    server.wait_log("user interface: " + (f"http://{address}$" if kind == "tcp" else "unix:"))
    assert server.stop() == 0


# What the manager is told.

class Manager:
    """A service manager that only listens, at `address`."""

    def __init__(self, address):
        self.address = address
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.settimeout(DEADLINE)
        self.sock.bind("\0" + address[1:] if address.startswith("@") else address)

    def hear(self):
        """Return the next message."""
        return self.sock.recv(4096).decode()

    def hears_nothing(self):
        """Whether no message waits."""
        self.sock.setblocking(False)
        try:
            return not self.sock.recv(4096)
        except BlockingIOError:
            return True
        finally:
            self.sock.settimeout(DEADLINE)


@pytest.mark.parametrize("abstract", [False, True])
def test_messages(start_server, tmp_path, socks, abstract):
    manager = Manager(f"@{tmp_path.name}-{os.getpid()}" if abstract else str(tmp_path / "notify"))
    socks(manager.sock)
    fifo, routes = tmp_path / "fifo", tmp_path / "routes.json"
    os.mkfifo(fifo)
    routes.write_text("[]")
    init = script(tmp_path / "init", f"read line < {fifo}; exit $line")
    server = start_server("--routes", routes, init=[init], kind=BusyServer,
                          environment={"NOTIFY_SOCKET": manager.address})
    # All listen and the other init program has ended, but not this one.
    assert manager.hears_nothing()
    assert "NOTIFY_SOCKET" not in server.init_environment
    assert "NOTIFY_SOCKET" not in server.get(server.route(LOOK)).body.decode()
    fifo.write_text("1\n")          # which is no success, but an end
    ready, outcome = manager.hear().splitlines()
    assert ready == "READY=1" and re.fullmatch("STATUS=the init program .*/init exited with status 1", outcome)
    before = time.monotonic_ns() // 1000
    for good in (True, False):
        if good:
            threading.Thread(target=lambda: fifo.write_text("0\n")).start()
        else:
            routes.write_text("{")
        server.process.send_signal(signal.SIGHUP)
        said = re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=([0-9]+)\n?", manager.hear())
        assert before <= int(said.group(1)) <= time.monotonic_ns() // 1000
        ready, outcome = manager.hear().splitlines()
        assert ready == "READY=1"
        assert outcome.startswith("STATUS=reloaded" if good else "STATUS=did not reload: cannot use ")
        server.wait_log("the server has reloaded" if good else "the server did not reload")
    with server.handler():
        server.process.send_signal(signal.SIGTERM)
        assert manager.hear() == "STOPPING=1"
    assert server.stop() == 0
    assert manager.hears_nothing()


@pytest.mark.parametrize("address", ["/no/such/socket", "relative", "vsock:2:1", "@", "/" + "x" * 200])
def test_manager_that_cannot_be_told(start_server, address):
    server = start_server(environment={"NOTIFY_SOCKET": address})
    assert server.stop() == 0
    assert not [line for line in server.log if "Traceback" in line]


def test_stopped_before_it_was_ready(start_server, tmp_path, socks):
    """READY=1 never comes after STOPPING=1."""
    manager = Manager(str(tmp_path / "notify"))
    socks(manager.sock)
    init = script(tmp_path / "init", "exec sleep 1000")
    server = start_server(init=[init], kind=BusyServer, environment={"NOTIFY_SOCKET": manager.address})
    assert server.stop() == 0
    assert manager.hear() == "STOPPING=1"
    assert manager.hears_nothing()
