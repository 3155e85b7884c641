"""The server's own directories: who may read them, who removes them, and what then."""

import fcntl
import json
import os
import pathlib
import shutil
import signal
import stat
import subprocess

import pytest

import kapow
import services
from conftest import DEADLINE, KAPOW, KAPOWCTL, Server, wait_until, write_starter

GET = "kapow get /request/method | kapow set /response/body"


def directories(server):
    """Return the paths of the private and of the public directory."""
    private, public, *_ = server.init_environment["PATH"].split(os.pathsep)
    return pathlib.Path(private), pathlib.Path(public)


def modes(directory):
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}


def test_modes(server):
    """One is this user's alone, the other is for programs that become another user."""
    private, public = directories(server)
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert set(modes(private).values()) == {0o700}
    assert stat.S_IMODE(public.stat().st_mode) == 0o755
    assert set(modes(public).values()) == {0o755}
    assert set(modes(private)) == set(modes(public)) >= {*kapow.TOOLS, "kapow.sh", "kapowctl.pyc"}
    for directory in (private, public):
        assert b"credential" not in b"".join(path.read_bytes() for path in directory.iterdir()
                                             if path.suffix != ".pyc")


def test_mode_does_not_come_of_the_umask(start_server, tmp_path):
    starter = write_starter(tmp_path / "start.py", "os.umask(0o077)")
    server = start_server(script=starter)
    assert set(modes(directories(server)[1]).values()) == {0o755}


def test_they_are_locked(server):
    """A cleaner that asks for the lock, as systemd-tmpfiles does, leaves them alone."""
    for directory in directories(server):
        fd = os.open(directory, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(fd)


@pytest.mark.parametrize("what", ["directories", "library", "everything in them"])
def test_cleaner(start_server, what):
    """A cleaner that does not ask: routes work again, and init programs, within 10 s."""
    server = start_server()
    path = server.route(GET)
    assert server.get(path).body == b"GET"
    for directory in directories(server):
        if what == "directories":
            shutil.rmtree(directory)
        for file in directory.glob("kapow.sh" if what == "library" else "*"):
            file.unlink()
    wait_until(lambda: server.get(path).body == b"GET", "the route working again")
    wait_until(lambda: all((directory / kapow.OwnDirectory.MARKER).exists()
                           for directory in directories(server)), "both directories")
    for directory in directories(server):
        server.wait_log(f"WARNING {directory} was removed, or something in it, and is there again")
    assert server.ctl("route", "list").returncode == 0
    assert len([line for line in server.log if "is there again" in line]) == 2


def test_path_that_another_takes(start_server):
    """What cannot be written again is said once."""
    server = start_server()
    private, _ = directories(server)
    shutil.rmtree(private)
    private.write_text("")
    server.wait_log("ERROR what was removed cannot be written again: ")
    private.unlink()
    server.wait_log(f"{private} was removed, or something in it, and is there again")
    assert len([line for line in server.log if "cannot be written again" in line]) == 1


def test_file_for_other_terminals_comes_back(start_server):
    server = start_server()
    left = server.runtime / "kapow" / f"control-{server.process.pid}.json"
    before = left.read_text()
    left.unlink()
    wait_until(left.exists, "the file")
    assert (left.read_text(), stat.S_IMODE(left.stat().st_mode)) == (before, 0o600)


def test_service_that_loses_its_socket(start_server):
    server = start_server()
    puppet = services.Puppet(server, "puppet")
    socket = puppet.socket_path()
    puppet.take_calls(socket)
    services.wait_state(server, "puppet")
    server.route(pattern="/", service="puppet")
    assert server.get("/").body == b"hello"
    os.unlink(socket)
    server.wait_log("the service puppet lost its socket, which was removed, and is restarted")
    puppet.take_calls(puppet.socket_path())
    wait_until(lambda: server.get("/").status == 200, "the service answering again")
    puppet.close()
    server.remove_services()


# What killed servers leave.


def kill(server):
    """Kill a server as nothing but SIGKILL can; return what it left."""
    server.process.kill()
    server.process.wait(DEADLINE)
    left = directories(server)
    assert all(path.is_dir() for path in left)
    return left


def test_next_server_removes_what_a_killed_one_left(start_server, tmp_path):
    first = start_server()
    left = kill(first)
    first.stop()
    own = first.tmp / "kapow-releases"
    own.mkdir()
    forged = first.tmp / "kapow-forged"
    forged.mkdir()
    (forged / kapow.OwnDirectory.MARKER).symlink_to("/dev/null")
    environment = {"TMPDIR": str(first.tmp), "XDG_RUNTIME_DIR": str(first.runtime)}
    running = start_server(environment=environment)
    assert not any(path.exists() for path in left)
    assert own.is_dir() and forged.is_dir()
    third = start_server(environment=environment)
    assert all(path.is_dir() for path in directories(running))
    for server in (running, third):
        assert server.stop() == 0
    for path in (own, forged):
        shutil.rmtree(path)
    assert list(first.tmp.iterdir()) == []


# Programs that become another user.

NOBODY = "setpriv --reuid=nobody --regid=nogroup --clear-groups"


@pytest.fixture
def open_path():
    """A directory that any user can enter."""
    path = pathlib.Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.mark.skipif(os.getuid() != 0 or not os.path.exists("/usr/bin/python3"),
                    reason="only root can become another user")
@pytest.mark.parametrize("shell", ["/bin/sh -c", "bash -c"])
def test_another_user(open_path, shell):
    """Two files that were copied, and a program that is another user: over the data interface."""
    for script in (KAPOW, KAPOWCTL):
        shutil.copy(script, open_path)
    command = ("id -un; kapow get /request/params/a; kapow get /request/body; "
               "request params/a; kapowctl get /request/params/a")
    routes = [{"method": "POST", "url_pattern": "/", "entrypoint": f"{NOBODY} {shell}",
               "command": f"{{ {command}; }} | kapow set /response/body; kapow set /response/status 201"},
              {"method": "POST", "url_pattern": "/script", "entrypoint": NOBODY + " /bin/sh",
               "command": str(open_path / "script")}]
    (open_path / "script").write_text("kapow get /request/params/a | kapow set /response/body\n")
    (open_path / "routes.json").write_text(json.dumps(routes))
    server = Server(open_path, "--routes", open_path / "routes.json", script=open_path / KAPOW.name,
                    python="/usr/bin/python3", wait=False)
    server.tmp.chmod(0o755)
    try:
        server.wait_log("user interface")
        reply = server.request("POST", "/?a=A", b"body")
        assert (reply.status, reply.body) == (201, b"nobody\nAbodyAA")
        assert server.request("POST", "/script?a=A").body == b"A"
    finally:
        assert server.stop(signal.SIGTERM) == 0
    server.check_gone()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory to another user")
def test_neighbour_who_takes_the_path(start_server):
    """What another user puts there, when a cleaner was at it, is not run; nothing of his is removed."""
    server = start_server()
    path = server.route(GET)
    assert server.get(path).body == b"GET"
    ran = server.directory / "ran"
    for directory in directories(server):
        names = [file.name for file in directory.iterdir() if file.is_file()]
        shutil.rmtree(directory)
        directory.mkdir(0o755)
        for name in names:
            (directory / name).write_text(f"#!/bin/sh\necho x >> {ran}\n")
            (directory / name).chmod(0o755)
        os.chown(directory, 65534, 65534)
    assert server.get(path).status == 500
    server.wait_log("ERROR what was removed cannot be written again: .* another user has taken its path")
    assert server.get(path).status == 500
    server.wait_log("cannot run /bin/sh: .*, where its commands are, was removed, and is another's or not there")
    assert not ran.exists()
    for directory in directories(server):
        assert directory.stat().st_uid == 65534
        shutil.rmtree(directory)
    wait_until(lambda: server.get(path).body == b"GET", "the route working again")
