"""An operator at another terminal: handlers, tables from files, and how kapowctl finds a server."""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import signal
import socket
import stat
import subprocess
import sys
import threading

import pytest

import kapowctl
import services
from conftest import CREDENTIALS, DEADLINE, KAPOW, read_all, wait_until, write_starter
from operating import (BusyServer, ctl, dump_json, handlers, plain_environment, script,
                       start_process, wait_handlers)

HELD_BACK = ("kapow set /response/status 201; kapow set /response/headers/X y; "
             "kapow set /response/body held; ")


def kill(server, handler_id):
    """End a handler; return requests' Response."""
    return server.control("DELETE", f"/handlers/{handler_id}")


@contextlib.contextmanager
def asked(server, path, method="GET"):
    """Send a request; give the socket, once its handler runs, and the handler as it is shown."""
    with server.connect() as sock:
        sock.sendall(f"{method} {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
        [handler] = wait_handlers(server)
        yield sock, handler


# Handlers.

def test_handlers_are_listed(server):
    assert handlers(server) == []
    with server.handler(method="PUT", pattern="/{name}", target="/a%20b?q=1") as handler:
        [shown] = wait_until(lambda: [item for item in handlers(server) if item["pid"]], "its pid")
        route = server.control("GET", "/routes").json()[0]
        assert isinstance(shown["age"], (int, float))
        assert os.getpgid(shown["pid"]) == shown["pid"]
        assert shown == {"id": handler.id, "request_id": handler.get("/request/id").body.decode(),
                         "route_id": route["id"], "method": "PUT", "path": "/a b",
                         "client": "127.0.0.1", "pid": shown["pid"], "age": shown["age"]}
        wait_until(lambda: handlers(server)[0]["age"] > shown["age"] >= 0, "its growing older")
        answer = server.control("GET", "/handlers")
        assert answer.headers["Content-Type"] == "application/json"
        table = server.ctl("handler", "list", "-o", "table").stdout.decode()
        assert all(word in table for word in (handler.id, "PUT", "/a b", "127.0.0.1"))
        [listed] = json.loads(server.ctl("handler", "list").stdout)
        assert listed["id"] == handler.id
    assert handlers(server) == []
    assert server.ctl("handler", "list").stdout == b"[]\n"


def test_path_that_is_no_text(server):
    with server.handler(pattern="/{name}", target="/%FF%1B%0A%22"):
        [shown] = wait_handlers(server)
        assert shown["path"] == "/\ufffd\x1b\n\""
        listed = server.ctl("handler", "list", "-o", "table").stdout
        assert len(listed.splitlines()) == 2 and b"\x1b" not in listed


@pytest.mark.parametrize("handler_id", ["x", "00000000-0000-4000-8000-000000000000", "%2e%2e", "a%2Fb"])
def test_no_such_handler(server, handler_id):
    answer = kill(server, handler_id)
    assert (answer.status_code, answer.reason, answer.json()) == (
        404, "Handler ID Not Found", {"reason": "Handler ID Not Found"})
    if handler_id == "x":
        done = server.ctl("handler", "kill", handler_id)
        assert (done.returncode, done.stdout, done.stderr) == (
            1, b"", b"kapowctl: handler x: Handler ID Not Found\n")


@pytest.mark.parametrize("more", [{}, {"disconnect": "keep"}, {"timeout": 500}])
def test_kill_before_the_head_was_sent(server, more):
    """What was held back is dropped, and the program's whole group ends."""
    mark = server.directory / f"mark-{len(server.log)}-{len(more)}"
    path = server.route(f"{HELD_BACK} sleep 1000 & sleep 1000 & : > {mark}; wait", **more)
    with asked(server, path) as (sock, handler):
        wait_until(mark.exists, "the program")
        answer = kill(server, handler["id"])
        assert (answer.status_code, answer.content) == (204, b"")
        said = read_all(sock)
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ") and body == b'{"reason": "Service Unavailable"}'
    assert b"X: y" not in head and b"Content-Type: application/json" in head
    wait_until(lambda: not server.children(), "the end of the program")
    server.wait_access(rf'{handler["request_id"]} - \[.*\] "GET {path} HTTP/1.1" 503 ')
    assert kill(server, handler["id"]).status_code == 404


def test_kill_after_the_head_was_sent(server):
    path = server.route("echo begun | kapow set /response/stream; exec sleep 1000")
    with asked(server, path) as (sock, handler), sock.makefile("rb") as file:
        assert b" 200 " in file.readline()
        while file.readline() != b"6\r\n":
            pass
        assert file.readline() == b"begun\n"
        done = server.ctl("handler", "kill", handler["id"])
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        assert file.read() == b"\r\n"           # and no last chunk


def test_killed_twice_and_its_connection(server):
    """Killing it again while it ends is no error of anybody's; the group gets SIGTERM first."""
    mark = server.directory / "trapped"
    path = server.route(f"trap 'echo TERM > {mark}; kill $!; exit' TERM; "
                        f"sleep 1000 & : > {mark}.here; wait")
    with asked(server, path) as (sock, handler):
        wait_until(pathlib.Path(f"{mark}.here").exists, "the program")
        assert kill(server, handler["id"]).status_code == 204
        assert kill(server, handler["id"]).status_code in (204, 404)
        assert read_all(sock).startswith(b"HTTP/1.1 503 ")
    wait_until(lambda: mark.exists() and mark.read_text() == "TERM\n", "the trap")


def test_kill_spares_the_others(server):
    with server.handler() as first, server.handler() as second:
        assert {item["id"] for item in wait_handlers(server, 2)} == {first.id, second.id}
        assert kill(server, first.id).status_code == 204
        wait_handlers(server, 1)
        assert second.get("/request/method").body == b"GET"
        assert second.finish().status == 200
        assert first.get("/request/method").status == 404
        wait_until(lambda: first.reply, "the reply of the first")
        assert first.reply.status == 503


def test_kill_while_the_body_comes(server):
    path = server.route("kapow get /request/body > /dev/null; exec sleep 1000", "POST")
    with server.connect() as sock:
        sock.sendall(f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\nhalf".encode())
        [handler] = wait_handlers(server)
        assert kill(server, handler["id"]).status_code == 204
        assert read_all(sock).startswith(b"HTTP/1.1 503 ")


def test_service_is_not_killed(server):
    """Only the request ends; there is no process of the handler's."""
    puppet = services.Puppet(server, "puppet")
    with contextlib.ExitStack() as stack:
        stack.callback(services.remove, server, "puppet")
        stack.callback(server.control, "PUT", "/routes", [])
        stack.callback(puppet.close)
        puppet.listen()
        go, left = threading.Event(), threading.Event()

        def act(sock, head, rest):
            go.wait(DEADLINE)
            if not sock.recv(1):
                left.set()
            return False
        puppet.act = act
        path = server.route(service="puppet")
        pid = services.state(server, "puppet")["pid"]
        with asked(server, path) as (sock, handler):
            assert handler["pid"] is None
            assert kill(server, handler["id"]).status_code == 204
            go.set()
            assert read_all(sock).startswith(b"HTTP/1.1 503 ")
        assert left.wait(DEADLINE)
        assert services.state(server, "puppet")["pid"] == pid


def test_billet_is_killed(start_server, tmp_path):
    script(tmp_path / "slow.b", "exec sleep 1000")
    server = start_server("--billets", tmp_path)
    with asked(server, "/slow/x") as (sock, handler):
        assert (handler["route_id"], handler["path"]) == ("slow.b", "/slow/x")
        wait_until(lambda: handlers(server)[0]["pid"] in server.children(), "the program")
        assert kill(server, handler["id"]).status_code == 204
        assert read_all(sock).startswith(b"HTTP/1.1 503 ")
    wait_until(lambda: not server.children(), "the end of the program")


# Tables from files.

def entry(pattern, command="", **more):
    return {"method": "GET", "url_pattern": pattern, "command": command, **more}


def table(server):
    return server.control("GET", "/routes").json()


def bare(routes):
    """Return routes without what the server gives them."""
    return [{name: value for name, value in route.items() if name not in ("id", "index")}
            for route in routes]


def test_apply_is_the_inverse_of_list(server, tmp_path):
    server.route("a 'b' \"c\"\n\\d", pattern="/{x:[a-z]+}/ü", timeout=1.5, max_handlers=3)
    server.route("x" * 10000, "POST", pattern="/b", entrypoint="/bin/bash -c", disconnect="keep")
    before = bare(table(server))
    listed = server.ctl("route", "list", "-o", "json").stdout
    (tmp_path / "file").write_bytes(listed)
    for source, options in ((str(tmp_path / "file"), {}), ("-", {"input": listed})):
        server.control("PUT", "/routes", [entry("/other")])
        done = server.ctl("route", "apply", source, **options)
        assert (done.returncode, done.stderr) == (0, b"")
        assert json.loads(done.stdout) == table(server)
        assert bare(table(server)) == before
    assert server.ctl("route", "apply", "-o", "table", str(tmp_path / "file")).stdout.startswith(
        b"INDEX")
    assert server.ctl("route", "apply", "-", input=b"[]").returncode == 0
    assert table(server) == []


def dry_run(server, routes, *options):
    """Return what a dry run says, as (change, from, to, pattern); nothing may change."""
    before = table(server)
    done = server.ctl("route", "apply", "--dry-run", *options, "-", input=json.dumps(routes).encode())
    assert (done.returncode, done.stderr) == (0, b"")
    assert table(server) == before
    return [(step["change"], step["from"], step["to"], step["url_pattern"])
            for step in json.loads(done.stdout)]


# `before` is always abc.
@pytest.mark.parametrize("after, steps", [
    ("abc", []), ("bca", [("moved", 0, 2, "/a")]),
    ("", [("removed", place, None, f"/{name}") for place, name in enumerate("abc")]),
    ("abcd", [("added", None, 3, "/d")]), ("dabc", [("added", None, 0, "/d")]),
    ("ac", [("removed", 1, None, "/b")]), ("bc", [("removed", 0, None, "/a")]),
    ("adc", [("added", None, 1, "/d"), ("removed", 1, None, "/b")]),
    ("aabc", [("added", None, 1, "/a")])])
def test_changes(after, steps):
    before, after_all = ([entry(f"/{name}", name, id=str(place), index=place)
                          for place, name in enumerate(names)] for names in ("abc", after))
    said = [(step["change"], step["from"], step["to"], step["url_pattern"])
            for step in kapowctl.changes(before, after_all)]
    if after == "aabc":         # which of two equal ones is the new one nobody can say
        assert [(step[0], step[3]) for step in said] == [("added", "/a")]
    else:
        assert sorted(said, key=str) == sorted(steps, key=str)


def test_dry_run(server):
    for name in "abc":
        server.route(name, pattern=f"/{name}")
    said = dry_run(server, [entry(f"/{name}", name) for name in "cba"])
    assert {step[0] for step in said} == {"moved"} and len(said) == 2
    # The same pattern with another command is another route.
    assert sorted(dry_run(server, [entry("/a", "other"), *(entry(f"/{name}", name) for name in "bc")]),
                  ) == [("added", None, 0, "/a"), ("removed", 0, None, "/a")]
    # What is the default is not a change.
    assert dry_run(server, [entry(f"/{name}", name, entrypoint="/bin/sh -c", index=7, id="x")
                            for name in "abc"]) == []


def test_dry_run_as_a_table(server):
    server.route("a", pattern="/a")
    done = server.ctl("route", "apply", "--dry-run", "-o", "table", "-",
                      input=json.dumps([entry("/b")]).encode())
    assert sorted(line.split()[0] for line in done.stdout.decode().splitlines()) == [
        "CHANGE", "added", "removed"]


@pytest.mark.parametrize("text, word", [
    (b"{", "no JSON"), (b"", "no JSON"), (b"\xff", "no JSON"), (b"[" * 100000, "no JSON"),
    (b"{}", "array"), (b'"x"', "array"), (b"null", "array")])
def test_files_that_are_no_table(tmp_path, text, word):
    (tmp_path / "file").write_bytes(text)
    with pytest.raises(kapowctl.Refused, match=f"{tmp_path}/file .*{word}"):
        kapowctl.read_routes(str(tmp_path / "file"))


@pytest.mark.parametrize("text, words", [
    (b"{", ["-", "no JSON"]), (b'[{"method": "GET"}]', ["Invalid Route", "url_pattern"]),
    (b'[{"method": "GET", "url_pattern": "/a"}, {"method": "GET", "url_pattern": "/{"}]',
     ["Invalid Route", "never closed"]),
    (b'[{"method": "GET", "url_pattern": "/a", "service": "none"}]', ["none"]),
    (b'[{"url_pattern": "/' + b"x" * (1 << 20) + b'"}]', ["Content Too Large"]),
])
def test_apply_refuses(server, text, words):
    server.route(pattern="/stays")
    before = table(server)
    for options in ([], ["--dry-run"]):
        done = server.ctl("route", "apply", *options, "-", input=text)
        assert (done.returncode, done.stdout) == (1, b"")
        said = done.stderr.decode()
        assert len(said.splitlines()) == 1 and said.startswith("kapowctl: ")
        assert all(word in said for word in words), said
    assert table(server) == before


def test_apply_cannot_read(server, tmp_path):
    for path in (tmp_path / "none", tmp_path):
        done = server.ctl("route", "apply", str(path))
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
        assert str(path).encode() in done.stderr
    assert server.ctl("route", "apply").returncode == 2


def test_dry_run_of_the_control_interface(server):
    server.route(pattern="/stays")
    before = table(server)
    answer = server.control("PUT", "/routes?dry-run", [entry("/new")])
    assert answer.status_code == 200
    assert [item["url_pattern"] for item in answer.json()] == ["/new"]
    refused = server.control("PUT", "/routes?dry-run", [entry("/{")])
    assert (refused.status_code, refused.json()["reason"]) == (422, "Invalid Route")
    assert table(server) == before
    # Of one route too, nothing is changed by a dry run.
    server.control("PUT", "/routes?dry-run", entry("/one"))
    assert table(server) == before


# How kapowctl finds the server.

def control_files(server):
    return list(server.runtime.glob("kapow/*"))


def test_credentials_file(server):
    [path] = control_files(server)
    assert path.name == f"control-{server.process.pid}.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert json.loads(path.read_text()) == {
        name: server.init_environment[name] for name in ("KAPOW_CONTROL_URL", *CREDENTIALS)}
    with open(path) as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_umask_does_not_matter(start_server, tmp_path):
    for number, mask in enumerate((0, 0o777)):
        starter = write_starter(tmp_path / f"start-{number}.py", f"os.umask({mask})")
        server = start_server(script=starter, wait=False)
        server.wait_log("user interface: ")
        [path] = control_files(server)
        assert stat.S_IMODE(path.stat().st_mode) in (0o600, 0o600 & ~mask)
        assert stat.S_IMODE(path.parent.stat().st_mode) in (0o700, 0o700 & ~mask)
        assert server.stop() == 0


def test_from_another_terminal(server):
    environment = plain_environment(server)
    assert ctl("route", "add", "/x", environment=environment)[0] == 0
    status, listed, said = ctl("route", "list", environment=environment)
    assert (status, said) == (0, "") and json.loads(listed) == table(server)
    url = server.init_environment["KAPOW_CONTROL_URL"]
    for more in ({"KAPOW_CONTROL_URL": url}, {"KAPOW_CONTROLAPI_URL": url + "/"}):
        assert ctl("handler", "list", environment={**environment, **more}) == (0, "[]\n", "")
    for end in ("", "/"):
        assert ctl("service", "list", "--control-url", url + end, environment=environment) == (
            0, "[]\n", "")
    assert ctl("route", "list", "--control-url", "https://127.0.0.1:1", environment=environment)[0] == 1


def test_the_server_s_other_name(server):
    """kapow hands over to kapowctl."""
    done = subprocess.run([sys.executable, str(KAPOW), "handler", "list"], timeout=DEADLINE,
                          env=plain_environment(server), capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"[]\n", b"")


def test_handlers_are_not_given_credentials(server):
    """Nor may they take those that lie there for the user."""
    path = server.route("kapowctl route list 2>&1 | kapow set /response/body; "
                        "kapowctl handler list || kapow set /response/status 403")
    reply = server.get(path)
    assert reply.status == 403
    assert b"KAPOW_CONTROL_SERVER_CERT is not set" in reply.body
    environment = {**plain_environment(server), "KAPOW_HANDLER_ID": "x"}
    status, _, said = ctl("route", "list", environment=environment)
    assert (status, len(said.splitlines())) == (1, 1)


def test_no_server(tmp_path):
    environment = {"PATH": os.environ["PATH"], "XDG_RUNTIME_DIR": str(tmp_path)}
    status, out, said = ctl("route", "list", environment=environment)
    assert (status, out, len(said.splitlines())) == (1, "", 1)
    assert str(tmp_path) in said
    assert os.listdir(tmp_path) == []


def test_several_servers(start_server, tmp_path):
    """They are listed; each can be named, and a killed one is in nobody's way."""
    runtime = tmp_path / "shared"
    runtime.mkdir(mode=0o700)
    first, second = (start_server(kind=BusyServer, environment={"XDG_RUNTIME_DIR": str(runtime)})
                     for _ in range(2))
    environment = {**plain_environment(first), "XDG_RUNTIME_DIR": str(runtime)}
    urls = [server.init_environment["KAPOW_CONTROL_URL"] for server in (first, second)]
    status, out, said = ctl("route", "list", environment=environment)
    assert (status, out) == (2, "")
    assert all(url in said for url in urls)
    second.route(pattern="/second")
    for url, patterns in zip(urls, ([], ["/second"])):
        _, out, _ = ctl("route", "list", "--control-url", url, environment=environment)
        assert [item["url_pattern"] for item in json.loads(out)] == patterns

    first.stop(signal.SIGKILL)
    left = runtime / "kapow" / f"control-{first.process.pid}.json"
    assert left.exists()
    _, out, _ = ctl("route", "list", environment=environment)
    assert [item["url_pattern"] for item in json.loads(out)] == ["/second"]
    status, _, said = ctl("route", "list", "--control-url", urls[0], environment=environment)
    assert status == 1 and urls[0] in said
    # The next one to start tidies up.
    (runtime / "kapow" / "control-note.txt").write_text("not a server's")
    third = start_server(kind=BusyServer, environment={"XDG_RUNTIME_DIR": str(runtime)})
    assert not left.exists()
    assert {path.name for path in runtime.glob("kapow/*")} == {
        "control-note.txt", *(f"control-{server.process.pid}.json" for server in (second, third))}
    for server in (second, third):
        assert server.stop() == 0
    assert [path.name for path in runtime.glob("kapow/*")] == ["control-note.txt"]
    # What a killed server cannot remove.
    subprocess.run(["rm", "-r", *map(str, first.tmp.iterdir())], check=True)


def test_server_that_takes_no_connection(tmp_path, server):
    """A locked file alone is no server: where it says that it listens, nobody does."""
    directory = tmp_path / "kapow"
    directory.mkdir(mode=0o700)
    [own] = control_files(server)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        path = dump_json(directory / "control-1.json", {
            **json.loads(own.read_text()),
            "KAPOW_CONTROL_URL": f"https://127.0.0.1:{closed.getsockname()[1]}"})
        path.chmod(0o600)
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            environment = {**plain_environment(server), "XDG_RUNTIME_DIR": str(tmp_path)}
            assert ctl("route", "list", environment=environment)[0] == 1


@pytest.mark.parametrize("spoil", ["mode", "link", "nonsense", "array", "owner", "directory", "text"])
def test_files_that_are_not_trusted(tmp_path, server, spoil):
    """A locked file that somebody else could have written is not used, nor is it an error."""
    if spoil == "owner" and os.geteuid():
        pytest.skip("only root can give files away")
    directory = tmp_path / "kapow"
    directory.mkdir(mode=0o700)
    path = directory / "control-1.json"
    path.touch(mode=0o600)
    path.write_bytes(control_files(server)[0].read_bytes())
    if spoil == "mode":
        path.chmod(0o644)
    elif spoil == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    elif spoil == "nonsense":
        path.write_bytes(b"\xff{")
    elif spoil == "array":
        path.write_text("[]")
    elif spoil == "text":
        path.write_text('{"KAPOW_CONTROL_URL": 7}')
    elif spoil == "owner":
        os.chown(path, 1, -1)
    else:
        directory.chmod(0o755)
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        environment = {**plain_environment(server), "XDG_RUNTIME_DIR": str(tmp_path)}
        status, out, said = ctl("route", "list", environment=environment)
    assert (status, out, len(said.splitlines())) == (1, "", 1), said


@pytest.mark.parametrize("spoil", ["mode", "link", "file", "owner", "none"])
def test_directory_that_is_not_private(start_server, tmp_path, spoil):
    """The server says so and goes on, and leaves nothing there."""
    if spoil == "owner" and os.geteuid():
        pytest.skip("only root can give directories away")
    runtime = tmp_path / "runtime"
    directory = runtime / "kapow"
    if spoil == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        runtime.mkdir()
        directory.symlink_to(tmp_path / "elsewhere")
    elif spoil == "file":
        runtime.mkdir()
        directory.touch(mode=0o700)
    elif spoil == "none":
        runtime.touch()
    else:
        directory.mkdir(mode=0o700, parents=True)
        if spoil == "mode":
            directory.chmod(0o750)
        else:
            os.chown(directory, 1, -1)
    server = start_server(environment={"XDG_RUNTIME_DIR": str(runtime)})
    [warning] = [line for line in server.log if "WARNING" in line]
    assert "kapowctl in other terminals will not find this server" in warning
    assert not list(tmp_path.rglob("control-*"))
    if spoil in ("mode", "owner", "link"):
        status, _, said = ctl("route", "list", environment={
            "PATH": os.environ["PATH"], "XDG_RUNTIME_DIR": str(runtime)})
        assert (status, len(said.splitlines())) == (1, 1)
        assert f"{directory} is not this user's alone" in said
    assert server.stop() == 0


def test_file_is_gone_after_a_failed_start(tmp_path):
    init = script(tmp_path / "init", ":")
    init.write_text("#!/no/such/interpreter\n")
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    addresses = [part for name in ("--bind", "--control-bind", "--data-bind")
                 for part in (name, "127.0.0.1:0")]
    process = start_process([*addresses, init], stderr=subprocess.PIPE,
                            env={**os.environ, "XDG_RUNTIME_DIR": str(runtime)})
    with process.stderr as log:
        assert b"cannot start the init program" in log.read()
    assert process.wait(DEADLINE) == 1
    assert list(runtime.glob("kapow/*")) == []


def test_reachable_address_is_what_is_left(start_server):
    server = start_server("--control-reachable-addr", "localhost:0", wait=False)
    server.wait_log("user interface: ")
    [path] = control_files(server)
    url = json.loads(path.read_text())["KAPOW_CONTROL_URL"]
    assert re.fullmatch(r"https://localhost:[1-9][0-9]*", url)
    assert ctl("route", "list", environment=plain_environment(server)) == (0, "[]\n", "")
    assert server.stop() == 0
