"""Addresses in the file system, unix:/path, of the user and the data interface."""

import contextlib
import functools
import os
import pathlib
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys

import pytest

from conftest import DEADLINE, KAPOWCTL, read_all, wait_until, write_starter
from operating import (UnixServer, read_response, trusting, unix_connect, unix_request,
                       wait_handlers, write_pair)
from test_server import FREE, fails


@pytest.fixture(scope="module")
def module_server(tmp_path_factory):
    """In place of conftest's: a server on Unix sockets."""
    server = UnixServer(tmp_path_factory.mktemp("server"))
    yield server
    assert server.stop() == 0
    server.check_gone()
    assert not any(path.exists() for path in server.paths.values())


@pytest.fixture
def start_unix(start_server):
    """As start_server, for a UnixServer."""
    return functools.partial(start_server, kind=UnixServer)


def mode(path):
    return stat.S_IMODE(os.lstat(path).st_mode)


def stale_socket(path):
    """Leave a socket's file at `path`."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


# Starting and stopping.

@pytest.mark.parametrize("umask", [0, 0o137])
def test_modes_and_stale_files(start_unix, tmp_path, umask):
    """0666 less the umask for users, 0600 for data; files that nobody listens at are replaced."""
    paths = [tmp_path / "user", tmp_path / "data"]
    for path in paths:
        stale_socket(path)
    starter = write_starter(tmp_path / "start.py", f"os.umask({umask})")
    server = start_unix("--bind", f"unix:{paths[0]}", "--data-bind", f"unix:{paths[1]}",
                        script=starter, wait=False)
    server.wait_log(f"user interface: unix:{paths[0]}$")
    server.wait_log(f"data interface: unix:{paths[1]}$")
    assert [mode(path) for path in paths] == [0o666 & ~umask, 0o600]
    # And the server's umask is as it was.
    status = pathlib.Path(f"/proc/{server.process.pid}/status").read_text()
    assert int(status.split("Umask:")[1].split()[0], 8) == umask
    server.wait_log(" ready: ")
    assert unix_request(paths[0], "GET", "/none").status == 404
    assert server.stop() == 0
    assert not any(path.exists() for path in paths)


def test_after_a_kill_it_starts_again(start_unix, tmp_path):
    first = start_unix(wait=False)
    first.wait_log("user interface: ")
    first.stop(signal.SIGKILL)
    assert first.paths["user"].exists()
    second = start_unix("--bind", f"unix:{first.paths['user']}", wait=False)
    second.wait_log("user interface: ")
    second.wait_log(" ready: ")
    assert unix_request(first.paths["user"], "GET", "/none").status == 404
    assert second.stop() == 0
    assert not first.paths["user"].exists()
    # What a killed server cannot remove, and the next one looks for elsewhere.
    for path in [*first.tmp.iterdir()]:
        shutil.rmtree(path)
    for path in first.runtime.glob("kapow/control-*"):
        path.unlink()


def refused(option, address, *words):
    """Fail unless the server ends with status 1 and one sentence that has the words."""
    line = fails(*FREE, option, address)
    name = {"--bind": "user", "--data-bind": "data"}[option]
    assert f"ERROR the {name} interface cannot listen on {address}: " in line
    assert all(word in line for word in words), line


@pytest.mark.parametrize("option, backlog", [("--bind", 10), ("--data-bind", 0)])
def test_living_one(tmp_path, option, backlog):
    """It goes on, also when its queue is full."""
    path = tmp_path / "living"
    with contextlib.ExitStack() as stack:
        living = stack.enter_context(socket.socket(socket.AF_UNIX))
        living.bind(str(path))
        living.listen(backlog)
        if not backlog:
            stack.enter_context(unix_connect(path))
        before = os.lstat(path).st_ino
        refused(option, f"unix:{path}", "another program")
        assert os.lstat(path).st_ino == before
        if backlog:
            stack.enter_context(unix_connect(path)).sendall(b"x")
            for _ in range(2):      # the server may have looked who is there
                sock, _ = living.accept()
                if sock.recv(1):
                    break
            else:
                pytest.fail("the living one is not reached any more")


def test_second_server_leaves_the_first_alone(server):
    path = server.paths["user"]
    refused("--bind", f"unix:{path}", "another program")
    assert server.get(server.route("kapow set /response/body x")).body == b"x"


def test_something_else_in_the_way(tmp_path):
    path = tmp_path / "file"
    path.write_text("precious")
    refused("--bind", f"unix:{path}", "no socket")
    assert path.read_text() == "precious"
    stale_socket(tmp_path / "stale")
    link = tmp_path / "link"
    link.symlink_to("stale")
    refused("--data-bind", f"unix:{link}", "no socket")
    assert link.is_symlink() and (tmp_path / "stale").exists()
    refused("--bind", f"unix:{tmp_path}", "no socket")
    refused("--bind", f"unix:{tmp_path}/none/sock", "No such file")
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "stale"]


@pytest.mark.parametrize("option, address, words", [
    ("--bind", "unix:relative", ["whole path"]), ("--bind", "unix:", ["whole path"]),
    ("--data-bind", "unix:" + "/x" * 54, ["longer"]), ("--control-bind", "unix:/x", []),
    ("--status-bind", "unix:/x", []), ("--control-reachable-addr", "unix:/x", [])])
def test_wrong_usage(option, address, words):
    line = fails(*FREE, option, address, status=2)
    assert option in line and all(word in line for word in words)


def test_longest_path(tmp_path):
    """107 bytes are what the kernel takes."""
    directory = tmp_path
    while len(os.fsencode(directory)) < 96:
        directory = directory / ("x" * min(50, 96 - len(os.fsencode(directory))))
        directory.mkdir()
    path = f"{directory}/".ljust(107, "s")
    if len(os.fsencode(path)) != 107:
        pytest.skip("the directory for tests has too long a name")
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(path)
        taken.listen()
        refused("--bind", f"unix:{path}", "another program")


def test_not_another_s_file_is_removed(start_unix):
    server = start_unix(wait=False)
    server.wait_log("user interface: ")
    server.paths["user"].unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(server.paths["user"]))
        server.paths["data"].unlink()
        assert server.stop() == 0
        assert server.paths["user"].exists() and not server.paths["data"].exists()
    server.check_gone()


def test_failed_start_leaves_no_socket(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        line = fails(*FREE, "--data-bind", f"unix:{tmp_path}/data", "--bind", address)
    assert f"cannot listen on {address}" in line
    assert os.listdir(tmp_path) == []


# Requests.

def test_curl(server):
    path = server.route("kapow get /request/host | kapow set /response/body")
    done = subprocess.run(["curl", "-sS", "--unix-socket", str(server.paths["user"]),
                           f"http://example.test{path}"], capture_output=True, timeout=DEADLINE)
    assert (done.returncode, done.stdout) == (0, b"example.test")


def test_url_in_the_environment(server):
    url = f"unix:{server.paths['data']}"
    path = server.route('kapow set /response/body "$KAPOW_DATA_URL $KAPOW_DATAAPI_URL"')
    assert server.get(path).body == f"{url} {url}".encode()
    assert server.init_environment["KAPOW_DATA_URL"] == url
    server.wait_log(f"user interface: unix:{server.paths['user']}$")


READ_AND_WRITE = "kapow get /request/body | kapow set /response/body"


@pytest.mark.parametrize("command", [
    READ_AND_WRITE,
    f"sh -c {shlex.quote(READ_AND_WRITE)}",
    f"env {shlex.quote(sys.executable)} {shlex.quote(str(KAPOWCTL))} get /request/body | "
    "kapowctl set /response/body",
    "exec 3<&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&-; " + READ_AND_WRITE,
    "request /body | response /body",
    f"{shlex.quote(sys.executable)} -c 'import subprocess as s; "
    's.run(["kapow", "set", "/response/body"], check=True, '
    'input=s.run(["kapow", "get", "/request/body"], check=True, stdout=s.PIPE).stdout)\'',
    'curl -sS --unix-socket "${KAPOW_DATA_URL#unix:}" '
    '"http://h/handlers/$KAPOW_HANDLER_ID/request/body" | '
    'curl -sS --unix-socket "${KAPOW_DATA_URL#unix:}" -T - '
    '"http://h/handlers/$KAPOW_HANDLER_ID/response/body"',
])
def test_programs_reach_the_data_interface(server, command):
    path = server.route(command, "POST")
    assert server.request("POST", path, b"b\0\n").body == b"b\0\n"


@pytest.mark.parametrize("entrypoint", ["/bin/bash -c", "/bin/sh -c", "busybox sh -c"])
def test_other_shells_and_a_url_that_was_there(start_unix, tmp_path, entrypoint):
    """A URL in the server's own environment is used, and then nothing is inherited."""
    if not shutil.which(entrypoint.split()[0]):
        pytest.skip(f"{entrypoint} is not here")
    server = start_unix("--data-bind", f"unix:{tmp_path}/data",
                        environment={"KAPOW_DATA_URL": f"unix:{tmp_path}/./data"})
    path = server.route('kapow set /response/headers/URL "$KAPOW_DATA_URL"; ' + READ_AND_WRITE,
                        "POST", entrypoint=entrypoint)
    reply = server.request("POST", path, b"body")
    assert (reply.body, reply.headers["URL"]) == (b"body", f"unix:{tmp_path}/./data")


def test_errors_of_the_client(server):
    done = server.ctl("get", "--handler", "x", "/request/method")
    assert (done.returncode, done.stderr) == (1, b"kapowctl: /request/method: Handler ID Not Found\n")
    for url in ("unix:/no/such/socket", f"unix:{'/x' * 100}", "unix:"):
        done = server.ctl("get", "--handler", "x", "--data-url", url, "/request/method")
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
        assert url.encode() in done.stderr
    path = server.route("kapow get /request/params/none || kapow set /response/status 404")
    assert server.get(path).status == 404


def test_remote_and_log(server):
    path = server.route("kapow get /request/remote | kapow set /response/body")
    assert server.get(path).body == b"unix:"
    server.wait_access(rf'^unix: \S{{16}} - \[.*\] "GET {path} HTTP/1\.1" 200 5 "-" "-" ')
    with server.handler():
        assert [handler["client"] for handler in wait_handlers(server)] == ["unix:"]


def test_connections_are_kept(server):
    path = server.route("kapow get /request/params/x | kapow set /response/body")
    with server.connect() as sock, sock.makefile("rb") as file:
        for _ in range(2):
            sock.sendall(b"".join(f"GET {path}?x={number} HTTP/1.1\r\nHost: h\r\n\r\n".encode()
                                  for number in range(3)))
            assert [read_response(file).body for _ in range(3)] == [b"0", b"1", b"2"]


def test_big_bodies(server):
    path = server.route(READ_AND_WRITE, "PUT")
    body = os.urandom(8 << 20)
    (server.directory / "body").write_bytes(body)
    for source in ("body", "-"):        # with Content-Length, and chunked
        done = subprocess.run(["curl", "-sS", "-T", source, "--unix-socket",
                               str(server.paths["user"]), f"http://h{path}"], input=body,
                              cwd=server.directory, capture_output=True, timeout=DEADLINE)
        assert (done.returncode, done.stderr, done.stdout == body) == (0, b"", True)


def test_client_that_leaves(server):
    path = server.route("exec sleep 1000")
    with server.connect() as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        wait_handlers(server)
    wait_until(lambda: not server.children(), "the end of the program")


def test_half_a_request(server):
    with server.connect() as sock:
        sock.sendall(b"nonsense\r\n\r\n")
        assert read_all(sock).startswith(b"HTTP/1.1 400 ")


def test_tls(start_unix, tmp_path):
    cert, key = write_pair(tmp_path)
    server = start_unix("--certfile", cert, "--keyfile", key)
    path = server.route("kapow set /response/body secret")
    with trusting(cert).wrap_socket(server.connect(), server_hostname="127.0.0.1") as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
        assert read_all(sock).endswith(b"\r\n\r\nsecret")
    # And one who does not speak TLS harms nobody.
    with server.connect() as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        assert b"HTTP/1.1 2" not in read_all(sock)
