"""The life of services: states, manifests, deaths, restarts, the end."""

import contextlib
import fcntl
import http.client
import json
import os
import pathlib
import re
import signal
import socket
import sys
import termios
import threading

import pytest

from conftest import DEADLINE, KAPOWCTL, Server, read_all, wait_until
from services import (BAD_GATEWAY, NO_MANIFEST, PYTHON, UNAVAILABLE, Puppet, add, answer, call,
                      lines, manifest, read_head, remove, runtime_command, say, state, wait_line,
                      wait_state)
from test_handlers import alive


@pytest.fixture
def server(module_server):
    """The module's server without routes and services; it must be idle again after the test."""
    yield module_server
    assert module_server.control("PUT", "/routes", []).status_code == 200
    for service in module_server.control("GET", "/services").json():
        remove(module_server, service["name"])
    module_server.check_idle()


@pytest.fixture
def make_puppet(server):
    """A function that makes Puppets, which listen no more after the test."""
    puppets = []

    def make(name="puppet", **more):
        puppets.append(Puppet(server, name, **more))
        return puppets[-1]

    yield make
    for puppet in puppets:
        puppet.close()


def kill(pid):
    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def unread_log(server):
    """Let nobody read the log of a Server, whose pipe is full, for a with statement."""
    log = os.open(f"/proc/{server.process.pid}/fd/2", os.O_WRONLY | os.O_NONBLOCK)
    try:
        with server._news:          # which its reader wants for each line
            os.write(log, b"the last line that is read\n")
            wait_until(lambda: fcntl.ioctl(log, termios.FIONREAD, b"\0" * 4) == b"\0" * 4,
                       "the reader")
            for size in (4096, 1):
                with contextlib.suppress(BlockingIOError):
                    while True:
                        os.write(log, b"x" * size)
            yield
    finally:
        os.close(log)


# States.

def test_states(server, make_puppet):
    """All five of them, what each answers, and what the log says of it."""
    puppet = make_puppet()
    path = server.route(service="puppet")
    starting = state(server, "puppet")
    assert (starting["state"], starting["restarts"]) == ("starting", 0)
    assert server.get(path).body == UNAVAILABLE
    server.wait_log(rf"INFO the service puppet: process {starting['pid']} started$")
    puppet.listen()
    server.wait_log("INFO the service puppet is available$")
    assert state(server, "puppet") == {**starting, "state": "available"}
    assert server.get(path).body == b"hello"
    puppet.close()
    kill(starting["pid"])
    server.wait_log("ERROR the service puppet: died of SIGKILL; it is started again in 0.1 s$")
    assert server.get(path).body == UNAVAILABLE
    again = wait_until(lambda: (shown := state(server, "puppet"))["pid"] and shown, "a new process")
    assert again["state"] == "starting" and again["pid"] != starting["pid"] and again["restarts"] == 1
    puppet.listen()
    assert server.get(path).body == b"hello"

    go_on = threading.Event()
    puppet.act = lambda sock, head, rest: go_on.wait(DEADLINE) and say(answer(b"last"))(sock, head, rest)
    with server.connect() as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
        wait_until(lambda: len(puppet.heads) == 3, "the request")
        stopper = threading.Thread(target=call, args=(server, "puppet", "stop"))
        stopper.start()
        stopping = wait_state(server, "puppet", "stopping")
        assert stopping["pid"] == again["pid"]      # which lives while a request is under way
        assert server.get(path).body == UNAVAILABLE
        go_on.set()
        assert read_all(sock).endswith(b"last")
    stopper.join(DEADLINE)
    stopped = state(server, "puppet")
    assert (stopped["state"], stopped["pid"], stopped["restarts"]) == ("stopped", None, 1)
    assert not alive(again["pid"])
    assert server.get(path).body == UNAVAILABLE
    # The next start counts anew neither way.
    assert call(server, "puppet", "start").json()["restarts"] == 1
    puppet.listen()
    puppet.act = say(answer(b"hello"))
    assert server.get(path).body == b"hello"


def test_environment(server):
    dump = server.directory / "environment"
    add(server, "env", "/bin/sh", "-c", f'env -0 > {dump}.new; pwd -P > {dump}.pwd; echo "$0" "$@" '
        f'> {dump}.args; mv {dump}.new {dump}; exec sleep 1000', "a b", "c$d", "")
    wait_until(dump.exists, "the environment")
    environment = dict(item.split("=", 1) for item in dump.read_text().rstrip("\0").split("\0"))
    path = environment.pop("KAPOW_SERVICE_SOCKET")
    assert environment.pop("FOLD_SOCK_ADDR") == path
    directory = pathlib.Path(path).parent
    assert directory.stat().st_mode & 0o777 == 0o700 and directory.parent == server.tmp
    # And beside them the server's own, no more; the shell adds the rest.
    shell = ("PWD", "SHLVL", "_", "OLDPWD")
    assert {name: value for name, value in environment.items() if name not in shell} == {
        name: value for name, value in server.environment.items() if name not in shell}
    assert (server.directory / "environment.pwd").read_text().rstrip() == str(server.directory)
    assert (server.directory / "environment.args").read_text() == "a b c$d \n"
    dump.unlink()
    call(server, "env", "stop")
    call(server, "env", "start")
    wait_until(dump.exists, "the environment")
    assert f"KAPOW_SERVICE_SOCKET={path}\0" not in dump.read_text()
    dump.unlink()


def test_environment_without_credentials(start_server):
    """A server that was itself started by an init program of another passes none of that on."""
    secrets = {name: "secret" for name in ("KAPOW_CONTROL_SERVER_CERT", "KAPOW_CONTROL_CLIENT_CERT",
                                           "KAPOW_CONTROL_CLIENT_KEY")}
    server = start_server(environment={**secrets, "KAPOW_CHANNEL": "secret", "KAPOW_KEPT": "kept"})
    dump = server.directory / "environment"
    add(server, "env", "/bin/sh", "-c", f"env > {dump}.new; mv {dump}.new {dump}; exec sleep 1000")
    wait_until(dump.exists, "the environment")
    assert "secret" not in dump.read_text() and "KAPOW_KEPT=kept\n" in dump.read_text()


def test_logs(server):
    add(server, "talker", "/bin/sh", "-c", "echo out; echo err >&2; printf 'a\\033b\\nno end'; exit 3")
    server.wait_log("INFO talker stdout: out$")
    server.wait_log("INFO talker stderr: err$")
    server.wait_log(r"talker stdout: a\\x1bb$")
    server.wait_log("talker stdout: no end$")
    server.wait_log("ERROR the service talker: exited with status 3; it is started again in 0.1 s$")


def test_init_program_adds_services(start_server, tmp_path):
    (tmp_path / "services.py").write_text(PYTHON)
    init = tmp_path / "init"
    init.write_text("#!/bin/sh\n"
                    f"kapow service add hello -- {sys.executable} -I -S {tmp_path}/services.py HTTP/1.1\n"
                    "kapow route add /echo --service hello\nkapow service list -o table >&2\n")
    init.chmod(0o755)
    server = start_server(init=[init])
    wait_state(server, "hello")
    assert server.get("/echo?x").json()["target"] == "/echo?x"
    server.wait_log("^hello ")
    assert KAPOWCTL.exists()
    # SIGTERM ends all, and nothing is left: the fixture looks.
    assert server.stop() == 0


# Manifests.

def cats(*patterns, **more):
    return {"name": "cats", "version": "1", "routes": [
        {"method": "GET", "url_pattern": pattern, "handler": f"on {pattern}"} for pattern in patterns],
        **more}


def patterns(server):
    return [(route["method"], route["url_pattern"], route.get("service"), route.get("handler"))
            for route in server.control("GET", "/routes").json()]


def test_manifest(server, make_puppet):
    """Shown; its routes added, exchanged at a restart, and taken away."""
    first = server.route("true")
    puppet = make_puppet(routes=True)
    puppet.manifest = manifest(cats("/cats/{name}", "/cats", other=[1, None]))
    puppet.listen()
    assert state(server, "puppet")["manifest"] == cats("/cats/{name}", "/cats", other=[1, None])
    last = server.route("true")
    own = [("GET", "/cats/{name}", "puppet", "on /cats/{name}"), ("GET", "/cats", "puppet", "on /cats")]
    assert patterns(server) == [("GET", first, None, None), *own, ("GET", last, None, None)]
    assert server.get("/cats/tom").body == b"hello"
    assert {"Kapow-Handler: on /cats/{name}", "Kapow-Match-name: tom"} <= set(lines(puppet.heads[0]))

    before = [route["id"] for route in server.control("GET", "/routes").json()]
    restart(server, puppet)         # with the same one: nothing changes
    assert [route["id"] for route in server.control("GET", "/routes").json()] == before

    puppet.manifest = manifest(cats("/dogs"))
    restart(server, puppet)
    assert patterns(server) == [("GET", first, None, None), ("GET", "/dogs", "puppet", "on /dogs"),
                                ("GET", last, None, None)]
    assert server.get("/dogs").body == b"hello" and server.get("/cats").status == 404
    assert state(server, "puppet")["manifest"] == cats("/dogs")

    puppet.manifest = NO_MANIFEST
    restart(server, puppet)
    assert patterns(server) == [("GET", first, None, None), ("GET", last, None, None)]
    assert state(server, "puppet")["manifest"] is None

    puppet.manifest = manifest(cats("/cats"))
    restart(server, puppet)
    assert len(patterns(server)) == 3
    # The routes of its manifest do not keep it.
    remove(server, "puppet")
    assert patterns(server) == [("GET", first, None, None), ("GET", last, None, None)]


def restart(server, puppet, status=200):
    """Restart a puppet, which listens for its new process; return the answer as JSON."""
    answers = []
    thread = threading.Thread(target=lambda: answers.append(call(server, puppet.name, "restart")))
    thread.start()
    puppet.take_calls(puppet.socket_path())
    thread.join(DEADLINE)
    assert answers[0].status_code == status, answers[0].text
    return answers[0].json()


def test_manifest_without_routes_wanted(server, make_puppet):
    puppet = make_puppet()
    puppet.manifest = manifest(cats("/cats"))
    puppet.listen()
    assert state(server, "puppet")["manifest"] == cats("/cats")
    assert patterns(server) == []


def test_manifest_request(server, make_puppet):
    """It is one that any framework takes."""
    seen = []
    puppet = make_puppet()
    path = puppet.socket_path()
    puppet.manifest = b""
    real = puppet._serve

    def serve(sock):
        head, _ = read_head(sock)
        seen.append(head)
        sock.sendall(NO_MANIFEST)
        real(sock)
    puppet._serve = serve
    puppet.take_calls(path)
    wait_state(server, "puppet")
    assert seen[0].startswith(b"GET /_kapow/manifest HTTP/1.1\r\n") and b"\r\nHost: " in seen[0]


@pytest.mark.parametrize("said, log", [
    (manifest(b"{"), "no JSON"), (manifest(b"[]"), "no JSON object"), (manifest(b"\xff"), "no JSON"),
    (manifest(b""), "no JSON"), (manifest({}, b"500 Oops"), "500"), (manifest({}, b"301 Moved"), "301"),
    (b"garbage\r\n\r\n", "no HTTP"), (manifest(b"[" * 100000), "no JSON"),
    (b"HTTP/1.1 200 OK\r\n\r\n" + b" " * (1024 * 1024 + 1), "too "), (b"", "ended without"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", "cut"),
])
def test_bad_manifest(server, make_puppet, said, log):
    """Whatever it is, the service serves."""
    puppet = make_puppet(routes=True)
    puppet.manifest = said
    real = puppet._serve

    def serve_once(sock):
        puppet._serve = real
        head, _ = read_head(sock)
        try:
            sock.sendall(said)
        except OSError:
            pass                    # it had enough
        sock.close()
    puppet._serve = serve_once
    seen = len(server.log)
    puppet.listen()
    wait_line(server, seen, f"WARNING the service puppet has no .*manifest.*: .*{log}")
    assert state(server, "puppet")["manifest"] is None and patterns(server) == []
    assert server.get(server.route(service="puppet")).body == b"hello"


@pytest.mark.parametrize("routes", [
    {}, "x", [1], [{}], [{"method": "GET"}], [{"method": "GET", "url_pattern": "x"}],
    [{"method": "GET", "url_pattern": "/{"}], [{"method": "G T", "url_pattern": "/x"}],
    [{"method": "GET", "url_pattern": "/x", "handler": "a\nb"}],
    [{"method": "GET", "url_pattern": "/x", "handler": 1}],
    [{"method": "GET", "url_pattern": "/fine"}, {"method": 1, "url_pattern": "/x"}],
])
def test_bad_routes_of_a_manifest(server, make_puppet, routes):
    """None of them is used, the log says why, the service serves."""
    puppet = make_puppet(routes=True)
    puppet.manifest = manifest({"routes": routes})
    seen = len(server.log)
    puppet.listen()
    wait_line(server, seen, "ERROR the service puppet has a manifest whose routes are not used: ")
    assert state(server, "puppet")["manifest"] == {"routes": routes} and patterns(server) == []
    assert server.get(server.route(service="puppet")).body == b"hello"


def test_manifest_route_without_handler(server, make_puppet):
    puppet = make_puppet(routes=True)
    puppet.manifest = manifest({"routes": [{"method": "GET", "url_pattern": "/x", "unknown": 1}]})
    puppet.listen()
    server.get("/x")
    route, = server.control("GET", "/routes").json()
    assert f"Kapow-Handler: {route['id']}" in lines(puppet.heads[0])


def test_table_written_back_keeps_what_is_of_a_manifest(server, make_puppet):
    """GET /routes, PUT /routes: a restart does not double them, and the service can be removed."""
    puppet = make_puppet(routes=True)
    puppet.manifest = manifest(cats("/cats"))
    puppet.listen()
    shown = server.control("GET", "/routes").json()
    assert server.control("PUT", "/routes", shown).status_code == 200
    restart(server, puppet)
    assert [route["url_pattern"] for route in server.control("GET", "/routes").json()] == ["/cats"]


# Deaths.

def test_backoff(server):
    """Doubled each time, and counted; a start that is asked for does not wait for it."""
    shown = add(server, "dying", "/bin/sh", "-c", "exit 3")
    assert shown["state"] in ("starting", "backoff")
    path = server.route(service="dying")
    for seconds in ("0.1", "0.2", "0.4"):
        server.wait_log(f"ERROR the service dying: exited with status 3; it is started again in {seconds} s$")
        assert server.get(path).body == UNAVAILABLE
    shown = state(server, "dying")
    assert shown["restarts"] >= 2
    answer_ = call(server, "dying", "stop")
    assert answer_.json()["state"] == "stopped"
    restarts = answer_.json()["restarts"]
    seen = len(server.log)
    call(server, "dying", "start")
    # Stopped and started, it begins with the shortest time.
    wait_line(server, seen, "ERROR the service dying: .* started again in 0.1 s$")
    call(server, "dying", "stop")
    assert state(server, "dying")["restarts"] <= restarts + 1


def test_program_is_missing(server, tmp_path):
    for name, program, why in (("none", "/no/such/program", "No such file or directory"),
                               ("dir", "/", "Permission denied"),
                               ("path", "no-such-program-at-all", "No such file or directory")):
        shown = add(server, name, program)
        assert (shown["state"], shown["pid"]) == ("backoff", None) or shown["restarts"]
        server.wait_log(rf"ERROR the service {name}: cannot run {program}: {why}; it is started again")
        reply = call(server, name, "restart")
        assert (reply.status_code, reply.reason) == (502, "Bad Gateway")
        assert reply.json()["error"] == f"cannot run {program}: {why}"
        assert call(server, name, "signal", {"signal": "HUP"}).reason == "Service Not Running"


def python_service(server, tmp_path, name="hello"):
    """Add the Python service; return it once it is available."""
    add(server, name, *runtime_command(tmp_path, "python"))
    return wait_state(server, name)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_death_within_a_request_is_502(server, make_puppet, kept, method):
    """Also on a connection that was used before."""
    puppet = make_puppet().listen()
    path = server.route(service="puppet", method=method)

    def act(sock, head, rest):
        """Die as a process does: all its files are closed at once."""
        puppet.close()
        kill(state(server, "puppet")["pid"])
        return False

    with contextlib.closing(http.client.HTTPConnection(
            "127.0.0.1", server.port("user"), timeout=DEADLINE)) as connection:
        if kept:
            connection.request(method, path)
            assert connection.getresponse().read() == b"hello"
        puppet.act = act
        connection.request(method, path)
        response = connection.getresponse()
        assert (response.status, response.read()) == (502, BAD_GATEWAY)
    puppet.listen()


def test_death_within_a_response_cuts_it(server, make_puppet):
    """Also one that ends with its connection: it must not look whole."""
    puppet = make_puppet().listen()
    path = server.route(service="puppet")

    def act(sock, head, rest):
        sock.sendall(b"HTTP/1.1 200 OK\r\n\r\nhalf")
        go_on.wait(DEADLINE)
        pid = state(server, "puppet")["pid"]
        kill(pid)
        wait_until(lambda: not alive(pid), "the death")
        return False

    go_on = threading.Event()
    puppet.act = act
    with server.connect() as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        head, rest = read_head(sock)
        go_on.set()
        assert b"chunked" in head and (rest + read_all(sock)).endswith(b"\r\nhalf\r\n")


def test_kill_leaves_nothing_of_the_group(server, tmp_path):
    """What a dead service has left of its group ends, its socket's file is gone, and it comes back."""
    pids = tmp_path / "pids"
    add(server, "group", "/bin/sh", "-c", 'sleep 1000 & echo $$ $! > "$0.new"; mv "$0.new" "$0"; wait', pids)
    shell, child = map(int, wait_until(lambda: pids.exists() and pids.read_text(), "pids").split())
    pids.unlink()
    kill(shell)
    wait_until(lambda: not alive(child), "the child's end")
    again = [int(pid) for pid in wait_until(lambda: pids.exists() and pids.read_text(), "pids").split()]
    call(server, "group", "stop")
    wait_until(lambda: not any(map(alive, again)), "the end of the group")


def test_real_service_comes_back(server, tmp_path):
    shown = python_service(server, tmp_path)
    path = server.route(service="hello", pattern="/echo")
    assert server.get(path).status == 200
    sockets = list(server.tmp.rglob("*.sock"))
    kill(shown["pid"])
    wait_until(lambda: state(server, "hello")["restarts"] == 1, "the restart")
    again = wait_state(server, "hello")
    assert again["pid"] != shown["pid"] and server.get(path).status == 200
    assert len(list(server.tmp.rglob("*.sock"))) == len(sockets) == 1
    call(server, "hello", "stop")
    assert list(server.tmp.rglob("*.sock")) == []


def test_log_that_is_not_read(start_server, tmp_path):
    """Other requests are answered, a dead service is noticed, and SIGTERM ends the server."""
    (tmp_path / "routes").write_text(json.dumps([
        {"method": "GET", "url_pattern": "/unknown", "service": "unknown"},
        {"method": "GET", "url_pattern": "/program", "command": "kapow set /response/body ran"}]))
    server = start_server("--routes", tmp_path / "routes")
    puppet = Puppet(server, "puppet").listen()
    path, pid = server.route(service="puppet"), state(server, "puppet")["pid"]
    with server.connect() as sock:
        with unread_log(server):
            sock.sendall(b"GET /unknown HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
            for _ in range(10):
                assert server.get(path).body == b"hello" and server.get("/none").status == 404
        assert read_all(sock).endswith(UNAVAILABLE)
    with unread_log(server):
        puppet.close()
        puppet.hang_up()
        kill(pid)
        wait_until(lambda: state(server, "puppet")["pid"] not in (None, pid), "the new process")
        assert server.get("/program").body == b"ran"
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(DEADLINE) == 0


@pytest.mark.parametrize("more", [{"timeout": 0.1}, {}])
def test_full_queue_takes_no_service_away(server, make_puppet, more):
    """Not when a request's time ends there, and not when its client leaves."""
    puppet = make_puppet()
    address = puppet.socket_path()
    route = server.route(service="puppet", **more)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(address)
        listener.listen(0)
        listener.settimeout(DEADLINE)
        with listener.accept()[0] as sock:
            read_head(sock)
            sock.sendall(NO_MANIFEST)
            wait_state(server, "puppet")
        with contextlib.suppress(BlockingIOError):
            while True:
                sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                sock.setblocking(False)
                sock.connect(address)
        if more:
            assert server.get(route).status == 504
        else:
            with server.connect() as sock:
                sock.sendall(f"GET {route} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
            server.wait_access(rf'"GET {route} HTTP/1.1" 499 ')
        assert state(server, "puppet")["state"] == "available"


def test_socket_that_is_closed_while_the_process_lives(server, make_puppet):
    """The process is up, its connection is not: 503 until it listens again."""
    puppet = make_puppet()
    path = puppet.socket_path()
    puppet.take_calls(path)
    wait_state(server, "puppet")
    puppet.hang_up()
    puppet.close()
    route = server.route(service="puppet")
    assert server.get(route).body == UNAVAILABLE
    assert state(server, "puppet")["state"] == "starting"
    os.unlink(path)
    puppet.take_calls(path)
    wait_state(server, "puppet")
    assert server.get(route).body == b"hello"


# Restarts.

def test_restart(server, make_puppet):
    """The new process serves before the old one is gone, which finishes what it had begun."""
    puppet = make_puppet().listen()
    old = state(server, "puppet")
    path = server.route(service="puppet")
    go_on = threading.Event()
    puppet.act = lambda sock, head, rest: go_on.wait(DEADLINE) and say(answer(b"old"))(sock, head, rest)
    with server.connect() as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
        wait_until(lambda: puppet.heads, "the request")
        new = restart(server, puppet)
        assert new == {**old, "pid": new["pid"], "restarts": 1} and new["pid"] != old["pid"]
        server.wait_log("INFO the service puppet is available, with its new process$")
        assert alive(old["pid"])
        puppet.act = say(answer(b"new"))
        assert server.get(path).body == b"new"
        go_on.set()
        assert read_all(sock).endswith(b"old")
    wait_until(lambda: not alive(old["pid"]), "the end of the old one")
    assert state(server, "puppet") == new


def test_restart_of_one_that_is_stopped(server, make_puppet):
    puppet = make_puppet().listen()
    call(server, "puppet", "stop")
    shown = restart(server, puppet)
    assert (shown["state"], shown["restarts"]) == ("available", 0)


def test_restart_that_overtakes_a_start(server, make_puppet):
    """What was said of the start does not hold for the process that came up: it comes back."""
    puppet = make_puppet().listen()
    call(server, "puppet", "stop")
    threads = []
    for _ in range(2):              # the first starts, and waits for a socket
        threads.append(threading.Thread(target=call, args=(server, "puppet", "restart")))
        threads[-1].start()
        path = puppet.socket_path()
    puppet.take_calls(path)
    for thread in threads:
        thread.join(DEADLINE)
    shown = state(server, "puppet")
    assert (shown["state"], shown["restarts"]) == ("available", 1)
    kill(shown["pid"])
    wait_until(lambda: state(server, "puppet")["restarts"] == 2, "the next start")
    puppet.listen()
    assert server.get(server.route(service="puppet")).body == b"hello"


def test_restart_that_fails_leaves_the_old_one(server, tmp_path):
    """Also its manifest and its routes."""
    flag = tmp_path / "fail"
    add(server, "hello", "/bin/sh", "-c", 'if test -e "$0"; then exit 7; fi; exec "$@"', flag,
        *runtime_command(tmp_path, "python"))
    old = wait_state(server, "hello")
    flag.touch()
    reply = call(server, "hello", "restart")
    assert (reply.status_code, reply.reason) == (502, "Bad Gateway")
    assert reply.json() == {"reason": "Bad Gateway", "error": "exited with status 7"}
    assert state(server, "hello") == old
    done = server.ctl("service", "restart", "hello")
    assert done.returncode == 1 and done.stderr == b"kapowctl: service hello: Bad Gateway: exited with status 7\n"
    assert server.get(server.route(service="hello", pattern="/echo")).status == 200
    assert len(list(server.tmp.rglob("*.sock"))) == 1


def test_restart_under_load(server, tmp_path):
    """Four threads ask, five times it is restarted: no request is lost."""
    python_service(server, tmp_path)
    for method in ("GET", "POST"):
        server.route(service="hello", pattern="/echo", method=method)
    over, failures, counts = threading.Event(), [], []

    def ask(number):
        connection = http.client.HTTPConnection("127.0.0.1", server.port("user"), timeout=DEADLINE)
        count = 0
        while not over.is_set():
            count += 1
            method = "POST" if count % 2 else "GET"
            connection.request(method, f"/echo?{number}-{count}", b"body" if count % 2 else None)
            response = connection.getresponse()
            data = response.read()
            if response.status != 200 or json.loads(data)["target"] != f"/echo?{number}-{count}":
                failures.append((method, response.status, data))
        connection.close()
        counts.append(count)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        for count in range(1, 6):
            shown = call(server, "hello", "restart")
            assert (shown.status_code, shown.json()["restarts"]) == (200, count), shown.text
    finally:
        over.set()
        for thread in threads:
            thread.join(DEADLINE)
    assert failures == [] and min(counts) > 5


def test_restarts_at_once(server, tmp_path):
    """They come one after another, and only one process is left."""
    python_service(server, tmp_path)
    replies = []
    threads = [threading.Thread(target=lambda: replies.append(call(server, "hello", "restart")))
               for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert [reply.status_code for reply in replies] == [200] * 3
    shown = state(server, "hello")
    assert (shown["state"], shown["restarts"]) == ("available", 3)
    wait_until(lambda: server.children() == [shown["pid"]], "the end of the others")


def test_stop_while_it_restarts(server, make_puppet):
    """Stopped is stopped; the restart fails, and none of its processes stays."""
    puppet = make_puppet().listen()
    replies = []
    thread = threading.Thread(target=lambda: replies.append(call(server, "puppet", "restart")))
    thread.start()
    path = puppet.socket_path()         # of the new process, for which nobody listens yet
    assert call(server, "puppet", "stop").json()["state"] == "stopped"
    puppet.take_calls(path)
    thread.join(DEADLINE)
    assert replies[0].status_code == 502
    assert state(server, "puppet")["state"] == "stopped"
    wait_until(lambda: not server.children(), "the end of both processes")


# The end.

def test_grace(start_server):
    """A request that is under way when it is over fails; one that is not waits for nothing."""
    server = start_server("--grace", "0.3")
    puppet = Puppet(server, "puppet").listen()
    path = server.route(service="puppet")
    pid = state(server, "puppet")["pid"]

    def act(sock, head, rest):
        wait_until(lambda: not alive(pid), "the end of the process")
        return False

    puppet.act = act
    with server.connect() as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
        wait_until(lambda: puppet.heads, "the request")
        assert call(server, "puppet", "stop").json()["state"] == "stopped"
        assert read_all(sock).startswith(b"HTTP/1.1 502 ")
    puppet.close()


def test_server_that_stops_lets_a_request_finish(start_server):
    server = start_server()
    puppet = Puppet(server, "puppet").listen()
    add(server, "other", "sleep", "1000")
    path = server.route(service="puppet")
    go_on = threading.Event()
    puppet.act = lambda sock, head, rest: go_on.wait(DEADLINE) and say(answer(b"last"))(sock, head, rest)
    with server.connect() as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        wait_until(lambda: puppet.heads, "the request")
        pid = state(server, "puppet")["pid"]
        server.process.send_signal(signal.SIGTERM)
        with server.connect("data") as data:        # once it stops this is still answered
            data.sendall(b"GET /x HTTP/1.0\r\n\r\n")
            assert read_all(data)
        assert alive(pid)
        go_on.set()
        assert read_all(sock).endswith(b"last")
    assert server.process.wait(DEADLINE) == 0
    puppet.close()


@pytest.mark.parametrize("what", ["starting", "backoff", "restarting"])
def test_server_stops_in_any_state(start_server, what):
    server = start_server()
    if what == "backoff":
        add(server, "it", "/no/such/program")
    else:
        puppet = Puppet(server, "it")
    if what == "restarting":
        puppet.listen()
        threading.Thread(target=call_quietly, args=(server, "it", "restart"), daemon=True).start()
        puppet.socket_path()
        puppet.close()
    assert server.stop() == 0
    assert not [line for line in server.log if "Traceback" in line]


def call_quietly(*arguments):
    """Make a control call that the end of the server may cut."""
    try:
        call(*arguments)
    except OSError:
        pass


def test_long_directory(tmp_path):
    """A socket's path has 107 bytes; the server finds a place, and leaves nothing there."""
    deep = tmp_path / ("x" * 60) / ("y" * 60)
    deep.mkdir(parents=True)
    server = Server(deep)
    try:
        puppet = Puppet(server, "puppet").listen()
        path = pathlib.Path(puppet._listeners[0].getsockname())
        assert len(str(path)) <= 107 and deep not in path.parents
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert server.get(server.route(service="puppet")).body == b"hello"
        puppet.close()
    finally:
        assert server.stop() == 0
    server.check_gone()
    assert not path.parent.exists()


def test_one_that_never_answers_serves_all_the_same(server, make_puppet):
    """Its manifest is waited for, 3 s; then there is none."""
    puppet = make_puppet(routes=True)
    silent = threading.Event()
    real = puppet._serve

    def serve(sock):
        puppet._serve = real
        while sock.recv(1000):
            pass
        silent.set()
        sock.close()

    puppet._serve = serve
    puppet.take_calls(puppet.socket_path())
    assert server.get(server.route(service="puppet")).body == UNAVAILABLE
    assert state(server, "puppet")["state"] == "starting"
    server.wait_log("WARNING the service puppet has no .*manifest.*: [a-z ]* in 3 s$")
    assert silent.wait(DEADLINE)
    assert wait_state(server, "puppet")["manifest"] is None
    assert re.fullmatch("hello", server.get(server.control("GET", "/routes").json()[0]["url_pattern"])
                        .body.decode())
