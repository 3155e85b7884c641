"""What the server says of itself and of its requests: ids, logs, readiness, hints."""

import json
import logging
import os
import re
import signal
import time

import pytest

import kapow
from conftest import DEADLINE, read_all, wait_until, write_starter
from operating import BusyServer, dump_json, handlers, script
from test_status import BusyStatusServer, StatusServer

REQUEST_ID = "[0-9a-f]{16}"


# Request ids.

def test_request_id_is_no_part_of_the_handler_id():
    ids = {kapow.make_request_id() for _ in range(1000)}
    assert len(ids) == 1000 and all(re.fullmatch(REQUEST_ID, name) for name in ids)
    handler = kapow.Handler(None, None, {})
    assert re.fullmatch(REQUEST_ID, handler.request_id)
    assert handler.request_id[:8] not in handler.id and handler.id[:8] not in handler.request_id


TALKS = ("kapow set /server/log said; echo printed; echo warned >&2; "
         "kapow set /response/headers/Content-Length 1; kapow set /response/body two; "
         "kapow get /request/id >{ids}; echo $KAPOW_HANDLER_ID >>{ids}; cd /; exec {last}")


def test_no_log_line_has_the_handler_id(start_server, tmp_path):
    """Not even with --debug; and each line about a request begins with the id of that."""
    server = start_server("--debug")
    request_ids = set()
    for number, last in enumerate(("true", "/dev/null")):
        ids = tmp_path / f"ids-{number}"
        path = server.route(TALKS.format(ids=ids, last=last))
        server.get(path)
        request_id = server.wait_access(rf' ({REQUEST_ID}) - \[.*"GET {path} ').group(1)
        assert ids.read_text().startswith(request_id)
        handler_id = ids.read_text()[len(request_id):].strip()
        assert len(handler_id) == 36
        for said in ("said", "stdout: printed", "stderr: warned",
                     "wrote more than the Content-Length it set"):
            server.wait_log(rf"INFO {request_id} {said}$|WARNING {request_id} {said}$")
        assert not [line for line in server.log + server.access if handler_id in line]
        request_ids.add(request_id)
    assert len(request_ids) == 2
    path = server.route("", entrypoint="/nonexistent")
    server.get(path)
    request_id = server.wait_access(rf' ({REQUEST_ID}) - \[.*"GET {path} ').group(1)
    server.wait_log(rf"ERROR {request_id} GET /\S+ cannot run /nonexistent: ")
    assert server.stop() == 0


@pytest.mark.parametrize("request_text", [
    b"GET /nowhere HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n", b"GET / HTTP/3.0\r\n\r\n", b"\x16\x03"])
def test_requests_without_a_route_have_an_id(start_server, request_text):
    server = start_server("--debug")
    server.raw(request_text)
    request_id = server.wait_access(rf"^127.0.0.1 ({REQUEST_ID}) - ").group(1)
    if b"nowhere" not in request_text:
        server.wait_log(rf"DEBUG {request_id} user interface: ")
    assert server.stop() == 0


def test_each_request_of_a_connection_has_its_own_id(server):
    path = server.route("kapow get /request/id | kapow set /response/body")
    ask = f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n"
    said = server.raw((ask + ask.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n")).encode())
    ids = re.findall(rf"\r\n\r\n({REQUEST_ID})".encode(), said)
    assert len(set(ids)) == 2


def test_handlers_are_killed_by_request_id_too(server):
    with server.handler() as handler:
        [shown] = wait_until(lambda: [item for item in handlers(server) if item["pid"]], "its pid")
        assert shown["request_id"] == handler.get("/request/id").body.decode()
        listed = server.ctl("handler", "list", "-o", "table").stdout.decode()
        assert shown["request_id"] in listed and "REQUEST_ID" in listed
        done = server.ctl("handler", "kill", shown["request_id"])
        assert (done.returncode, done.stderr) == (0, b"")
        wait_until(lambda: handler.reply, "the answer")
        assert handler.reply.status == 503


def test_request_id_of_several_handlers_names_none():
    table = kapow.HandlerTable()
    first, second = (kapow.Handler(None, None, {}, request_id="twice") for _ in range(2))
    with table.holding(first):
        assert table.find_any("twice") is table.find_any(first.id) is first
        with table.holding(second):
            with pytest.raises(kapow.ApiError, match="Request ID Not Unique") as raised:
                table.find_any("twice")
            assert raised.value.status == 409
            assert table.find_any(second.id) is second
        second.close()
    with pytest.raises(kapow.ApiError, match="Handler ID Not Found"):
        table.find_any("twice")


# The first init programs.

@pytest.fixture
def waiting_init(tmp_path):
    """An init program that waits, and a function that lets it end with a status."""
    fifo = tmp_path / "init.fifo"
    os.mkfifo(fifo)
    program = script(tmp_path / "waits", f"read status < {fifo}; exit $status")
    return program, lambda status: fifo.write_text(f"{status}\n")


def wait_for(server, path, status):
    """Ask the status interface until it answers `status`; return the Reply."""
    return wait_until(lambda: (reply := server.status(path)).status == status and reply, status)


def test_not_found_only_when_ready(start_server, waiting_init, tmp_path):
    """Before, the route may be about to come: 404 and 405 would be wrong."""
    init, end = waiting_init
    server = start_server(init=[init], kind=BusyStatusServer)
    server.route("", pattern="/there")
    assert server.get("/there").status == 200
    for method, path in (("GET", "/none"), ("PUT", "/there")):
        reply = server.request(method, path)
        assert (reply.status, reply.headers["Retry-After"]) == (503, "1")
    assert not [line for line in server.log if "ready: " in line]
    end(0)
    server.wait_log(rf"INFO ready: 1 route, http://127.0.0.1:{server.port('user')}$")
    assert server.get("/none").status == 404
    assert server.request("PUT", "/there").status == 405
    assert wait_for(server, "/readyz", 200).body == b"ready\n"
    assert server.stop() == 0
    assert len([line for line in server.log if "ready: " in line]) == 1


def test_not_found_while_billets_are_asked(start_server, waiting_init, tmp_path):
    init, end = waiting_init
    (tmp_path / "x.b").write_text('#!/bin/sh\nprintf "Content-Type: text/plain\\\\n\\\\nhere\\\\n"\n')
    (tmp_path / "x.b").chmod(0o755)
    server = start_server("--billets", tmp_path, init=[init], kind=BusyServer)
    assert server.get("/x").body == b"here\n"
    assert server.get("/y").status == 503
    end(0)
    server.wait_log(" ready: 0 routes, ")
    assert server.get("/y").status == 404
    assert server.stop() == 0


def test_stop_before_the_first_init_programs_have_exited(start_server, waiting_init):
    server = start_server(init=[waiting_init[0]], kind=BusyServer)
    with server.connect() as sock:
        with server.handler() as handler:
            server.process.send_signal(signal.SIGTERM)
            sock.sendall(b"GET /none HTTP/1.1\r\nHost: h\r\n\r\n")
            assert sock.recv(100).startswith(b"HTTP/1.1 503 ")
            handler.finish()
    assert server.stop() == 0
    assert not [line for line in server.log if "ready: " in line]


def test_failed_init_program_is_not_ready_until_a_reload_succeeds(start_server, tmp_path):
    init = script(tmp_path / "init", "exit 3")
    server = start_server(init=[init], kind=StatusServer)
    reply = wait_until(lambda: (reply := server.status("/readyz")).body != b"starting\n" and reply, "an end")
    why = f"the init program {init} exited with status 3"
    assert (reply.status, reply.body.decode()) == (503, why + "\n")
    server.wait_log(rf"WARNING not ready, since {why}: 0 routes, http://127.0.0.1:\d+$")
    assert server.get("/none").status == 404
    server.process.send_signal(signal.SIGHUP)       # which fails
    server.wait_log("the server did not reload")
    assert server.status("/readyz").status == 503
    script(init, "exit 0")
    server.process.send_signal(signal.SIGHUP)
    server.wait_log("the server has reloaded")
    assert wait_for(server, "/readyz", 200).body == b"ready\n"
    assert server.stop() == 0


# Programs that fail.

@pytest.mark.parametrize("command, how", [
    ("exit 3", "exited with status 3"), ("kill -KILL $$", "died of SIGKILL"),
    ("kapow set /response/status 404; exit 1", "exited with status 1"),
    ("kapow set /response/headers/X y; kill -SEGV $$", "died of SIGSEGV")])
@pytest.mark.parametrize("stdout", [False, True])
def test_failure_leaves_a_line(start_server, command, how, stdout):
    server = start_server(*["--debug"] * stdout)
    server.route(command, "POST", pattern="/{any:(?s:.*)}")
    server.request("POST", "/a%20b%0A%1b%ff?query")
    request_id = server.wait_access(rf" ({REQUEST_ID}) - ").group(1)
    server.wait_log(rf"ERROR {request_id} POST /a b\\x0a\\x1b\\xff {how}$")
    assert server.stop() == 0
    assert len([line for line in server.log if how in line and "ERROR" in line]) == 1


@pytest.mark.parametrize("command", [":", "kill -HUP $$", "kill -INT $$", "kill -TERM $$", "kill -PIPE $$"])
def test_what_is_no_failure_leaves_no_line(start_server, command):
    server = start_server()
    server.get(server.route(command))
    assert server.stop() == 0
    assert not [line for line in server.log if "ERROR" in line]


def test_what_the_server_kills_leaves_no_line(start_server):
    """An operator, or a client that left; a timeout does, if the program fails of it."""
    server = start_server()
    stays = "trap 'exit 9' TERM; kapow set /response/stream x; sleep 1000 & wait"
    path = server.route(stays, timeout=0.3)
    assert server.raw(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode()).endswith(b"1\r\nx\r\n")
    server.wait_log(rf"ERROR {REQUEST_ID} GET {path} exited with status 9$")
    path = server.route(stays)
    for end in ("operator", "client"):
        with server.connect() as sock:
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
            assert sock.recv(10)
            [shown] = wait_until(lambda: handlers(server), "the handler")
            if end == "operator":
                assert server.control("DELETE", f"/handlers/{shown['id']}").status_code == 204
                read_all(sock)
        wait_until(lambda: not handlers(server), "its end")
    assert server.stop() == 0
    assert len([line for line in server.log if "ERROR" in line]) == 1


def test_launcher_that_fails_leaves_a_line(start_server, tmp_path):
    (tmp_path / "cgi.b").write_text("#!/bin/sh\nexit 4\n")
    (tmp_path / "bash.b").write_text("#!/usr/bin/env bash\nbillet:() { http_body; return 5; }\n")
    for name, status in (("cgi", 4), ("bash", 5)):
        (tmp_path / f"{name}.b").chmod(0o755)
    server = start_server("--billets", tmp_path)
    for name, status in (("cgi", 4), ("bash", 5)):
        server.raw(f"GET /{name} HTTP/1.0\r\n\r\n".encode())
        server.wait_log(rf"ERROR {REQUEST_ID} GET /{name} exited with status {status}$")
    assert server.stop() == 0


# The journal.

JOURNAL = """
found = os.fstat(2)
os.environ["JOURNAL_STREAM"] = f"{found.st_dev}:{found.st_ino}"
"""


def test_lines_for_journald_have_priorities(start_server, tmp_path):
    """And no time stamps; what a program writes is one line as well."""
    starter = write_starter(tmp_path / "journal.py", JOURNAL)
    server = start_server("--debug", script=starter)
    server.get(server.route("printf 'a\\nb\\n'; exit 3"))
    server.raw(b"nonsense\r\n\r\n")
    server.wait_log(rf"^<6>INFO user interface: http://127.0.0.1:\d+$")
    server.wait_log(rf"^<3>ERROR {REQUEST_ID} GET /\S+ exited with status 3$")
    server.wait_log(rf"^<6>INFO {REQUEST_ID} stdout: b$")
    server.wait_log(rf"^<7>DEBUG {REQUEST_ID} user interface: ")
    server.process.send_signal(signal.SIGHUP)
    server.wait_log("^<6>INFO the server has reloaded$")
    assert server.stop() == 0
    assert not [line for line in server.log if not re.match("<[3-7]>[A-Z]+ ", line)]


def test_other_files_than_the_journal_have_time_stamps(start_server):
    server = start_server(environment={"JOURNAL_STREAM": "1:2"})
    assert server.stop() == 0
    assert not [line for line in server.log if not re.match(r"\d{4}-\d\d-\d\d ", line)]


def test_each_line_of_a_record_has_a_priority(monkeypatch):
    monkeypatch.setattr(kapow, "writes_to_journal", lambda: True)
    levels = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 3}
    for name, priority in levels.items():
        record = logging.makeLogRecord({"msg": "a\nb", "levelname": name, "levelno": getattr(logging, name)})
        assert kapow.LogFormatter().format(record) == f"<{priority}>{name} a\n<{priority}>b"


# The access log.

def test_access_log_has_seconds_and_route(server):
    """The pattern is what its route says, escaped; the seconds begin with the request's first byte."""
    server.route("kapow set /response/body x", pattern='/say/{what:[a"]+}/{n}')
    with server.connect() as sock:
        sock.sendall(b"GET /say/a/1 HTTP/1.1\r\n")
        time.sleep(1)               # the server has the first byte long before the end of it
        sock.sendall(b"Host: h\r\nConnection: close\r\n\r\n")
        assert read_all(sock).endswith(b"x")
    found = server.wait_access(r'"GET /say/a/1 HTTP/1.1" 200 1 "-" "-" (\d+\.\d{3}) (".*")$')
    assert 0.2 <= float(found.group(1)) < DEADLINE      # and not the time since the last byte
    assert found.group(2) == r'"/say/{what:[a\x22]+}/{n}"'


@pytest.mark.parametrize("method, path, status", [
    ("GET", "/none", 404), ("PUT", "/only-get", 405), ("OPTIONS", "/only-get", 204)])
def test_access_log_without_a_route(server, method, path, status):
    server.route(pattern="/only-get")
    assert server.request(method, path).status == status
    server.wait_access(rf'"{method} {path} HTTP/1.1" {status} \d+ "-" "-" \d+\.\d{{3}} "-"$')


def test_access_log_of_a_head_that_never_came(server):
    server.raw(b"nonsense\r\n\r\n")
    server.wait_access(r'"nonsense" 400 \d+ "-" "-" \d+\.\d{3} "-"$')


# The queue.

def test_queue_time(start_server):
    """The server's, and that of a route in its place, longer or shorter."""
    server = start_server("--max-handlers", "1", "--queue-time", "0.1")
    patient = server.route("kapow set /response/body x", queue_time=2 * DEADLINE)
    with server.handler() as handler:
        for path in (server.route(""), server.route("", queue_time=0)):
            reply = server.get(path)
            assert (reply.status, reply.headers["Retry-After"]) == (503, "1")
        with server.connect() as sock:
            sock.sendall(f"GET {patient} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
            assert server.get(server.route("")).status == 503
            handler.finish()
            assert read_all(sock).endswith(b"\r\n\r\nx")
    assert server.stop() == 0


# Shells that trace.

TRACED = """
set -x
value=$(kapow get /request/params/a)
kapow set /response/headers/X "$value"
kapowctl get /request/headers/Host
kapow set /response/body <<END
$value
END
kapow get /request/params/none || fails=$?
case $-$fails in *x*1) : "still traces" ;; esac
set +x
kapow get /request/params/a
case $- in *x*) echo "traces again" >&2 ;; esac
"""


@pytest.mark.parametrize("options", ["", "set -eu; "])
@pytest.mark.parametrize("entrypoint", ["dash -c", "bash -c", "busybox ash -c", "bash --posix -c"])
def test_trace_of_a_call_is_short(server, tmp_path, entrypoint, options):
    """At most three lines for each, and it goes on afterwards.

    No pipeline is in it: the traces of two shells at once may cut each other's lines.
    """
    trace = tmp_path / "trace"
    path = server.route(f"exec 2>{trace} >/dev/null\n{options}{TRACED}", entrypoint=entrypoint)
    reply = server.get(path + "?a=value")
    assert (reply.status, reply.body, reply.headers["X"]) == (200, b"value\n", "value")
    text = trace.read_text()
    lines = [line for line in text.splitlines() if line.startswith("+")]
    assert not [line for line in lines if "_kapow" in line]
    assert len([line for line in lines if "case $- in" in line]) <= 5
    assert len([line for line in lines if "kapow" in line]) == 5
    assert len(lines) <= 5 * 2 + 8 and "still traces" in text and "traces again" not in text
    assert "kapowctl: /request/params/none: Resource Item Not Found" in text


# Hints.

CRLF = "its first line ends with CR and LF: save it with LF line ends"


def broken_programs(directory):
    """Return {path of a program that cannot be started: the remedy that a message names}."""
    texts = {"crlf": (b"#!/bin/sh\r\nexit\r\n", 0o755, CRLF),
             "bit": (b"#!/bin/sh\n", 0o644, r"make it executable: chmod \+x "),
             "lost": (b"#!/no/such/interpreter\n", 0o755, "the interpreter that its first line names is not there"),
             "plain": (b"\x01\x02\n", 0o755, "its first line must name an interpreter, as #!/bin/sh does")}
    found = {}
    for name, (text, mode, remedy) in texts.items():
        path = directory / f"{name}.b"
        path.write_bytes(text)
        path.chmod(mode)
        found[path] = remedy
    return found


def test_hint_for_an_entrypoint(server, tmp_path):
    for path, remedy in broken_programs(tmp_path).items():
        assert server.get(server.route(entrypoint=str(path))).status == 500
        server.wait_log(rf"ERROR {REQUEST_ID} GET /\S+ cannot run {path}: .*; {remedy}")


def test_hint_for_an_entrypoint_of_the_path(start_server, tmp_path):
    [crlf, *_] = broken_programs(tmp_path)
    server = start_server(environment={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert server.get(server.route(entrypoint=crlf.name)).status == 500
    server.wait_log(f"cannot run {crlf.name}: .*; {CRLF}")
    assert server.stop() == 0


def test_hint_for_a_launcher(start_server, tmp_path):
    server = start_server("--billets", tmp_path)
    for path, remedy in broken_programs(tmp_path).items():
        if path.stem != "bit":              # which is how a launcher is switched off
            assert server.get(f"/{path.stem}").status == 500
            server.wait_log(f"cannot run {path}: .*; {remedy}")
    assert server.stop() == 0


def test_hint_for_a_service(server, tmp_path):
    for path, remedy in broken_programs(tmp_path).items():
        assert server.control("POST", "/services", {"name": path.stem, "command": [str(path)]}).status_code == 201
        server.wait_log(f"the service {path.stem}: cannot run {path}: .*; {remedy}")
    server.remove_services()


def test_hint_for_an_init_program(start_server, tmp_path):
    for path, remedy in broken_programs(tmp_path).items():
        server = start_server(init=[path], wait=False)
        assert server.process.wait(DEADLINE) == 1
        server.wait_log(f"ERROR cannot start the init program {path}: .*; {remedy}")
    program = tmp_path / "env"
    program.write_bytes(b"#!/usr/bin/env sh\r\n")
    program.chmod(0o755)
    server = start_server(init=[program])
    server.wait_log(f"ERROR the init program {program} exited with status 127; {CRLF}")
    assert server.stop() == 0


PATTERNS = {"/p/*": "'*' stands for itself; write {rest:.*} for the rest of a path",
            "/p*q": "'*' stands for itself; write {rest:.*} for the rest of a path",
            "/p/:id": "':id' stands for itself; write {id} for any part between slashes",
            "/p/:user_id/x": "':user_id' stands for itself; write {user_id} for any part between slashes",
            "/p/<id>": "'<id>' stands for itself; write {id} for any part between slashes",
            "/p/<int:id>": "'<int:id>' stands for itself; write {id} for any part between slashes",
            "/{a:.*}/{b:[:<*]}/p:q/x:/12:30": None, "/": None}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_hint_for_a_pattern_of_another_server(server, tmp_path, pattern):
    """It is added all the same."""
    hint = PATTERNS[pattern]
    done = server.ctl("route", "add", pattern)
    assert done.returncode == 0 and "hint" not in json.loads(done.stdout)
    assert done.stderr.decode() == (f"kapowctl: warning: the route GET {pattern}: {hint}\n" if hint else "")
    route = {"method": "PUT", "url_pattern": pattern}
    assert server.control("POST", "/routes", route).json().get("hint") == hint
    assert not [shown for shown in server.control("GET", "/routes").json() if "hint" in shown]


def test_hint_for_a_pattern_in_a_file(start_server, tmp_path):
    routes = dump_json(tmp_path / "routes", [{"method": "GET", "url_pattern": "/p/:id"},
                                             {"method": "GET", "url_pattern": "/p/{id}"}])
    server = start_server("--routes", routes)
    server.wait_log(f"WARNING {routes}: the route GET /p/:id: {PATTERNS['/p/:id']}$")
    assert server.stop() == 0
    assert len([line for line in server.log if "WARNING" in line]) == 1


SILENCE = "has set nothing of the response: what the program of"


def test_silent_program_is_told_once_that_it_says_nothing(start_server):
    server = start_server()
    first, second = (server.route("echo hello", "POST") for _ in range(2))
    for path in (first, first, second, first):
        assert server.request("POST", path).body == b""
    for command in ("echo x; exit 1", "kapow set /response/status 204", "kapow set /response/body ''",
                    "kapow set /response/headers/X y", "echo | kapow set /response/stream",
                    "env -u KAPOW_CHANNEL kapow set /response/body x"):
        server.get(server.route(command))
    server.raw(f"GET {server.route('sleep 1000', timeout=0.1)} HTTP/1.0\r\n\r\n".encode())
    assert server.stop() == 0
    found = [line for line in server.log if SILENCE in line]
    assert len(found) == 2
    assert re.search(rf"INFO {REQUEST_ID} {SILENCE} POST {first} prints is not it, "
                     "pipe that into kapow set /response/body$", found[0])
    assert f" POST {second} " in found[1]


# What --debug tells.

CALLS = """
kapow get /request/params/a
kapow get /request/params/none%1b
kapow set /response/status 201
kapow set /response/status secret
printf secret | kapow set /response/headers/X
printf s | kapow set /response/status
kapow get /nonsense
kapow set /response/body secret"""


@pytest.mark.parametrize("way", ["channel", "data"])
def test_debug_tells_what_a_handler_does(start_server, way):
    """Its program, each resource with the reason of a refusal, its exit and seconds; no value."""
    server = start_server("--debug")
    command = ("unset KAPOW_CHANNEL" if way == "data" else ":") + CALLS + "\nsleep 0.1; exit 3"
    path = server.route(command)
    assert server.get(path + "?a=secret").status == 201
    request_id = server.wait_access(rf" ({REQUEST_ID}) - ").group(1)
    found = server.wait_log(rf"DEBUG {request_id} exited with status 3 after (\d+\.\d{{3}}) s$")
    assert 0.1 <= float(found.group(1)) < DEADLINE
    assert server.stop() == 0
    said = [line.partition(f" DEBUG {request_id} ")[2] for line in server.log if f"DEBUG {request_id}" in line]
    assert said[0].startswith("runs /bin/sh -c '" + command.split("\n")[0] + r"\x0akapow get")
    assert said[1:-1] == [
        "get /request/params/a", "get /request/params/none%1b: Resource Item Not Found",
        "set /response/status", "set /response/status: Non Integer Value",
        "set /response/headers/X",
        "set /response/status: Non Integer Value", "get /nonsense: Invalid Resource Path",
        "set /response/body"]
    assert not [line for line in said[1:] if "secret" in line]
    assert not [line for line in server.log if SILENCE in line]


def test_debug_tells_why_no_route_answers(start_server):
    server = start_server("--debug")
    path = server.route("")
    server.get("/none")
    server.request("PUT", path)
    for reason in ("Not Found", "Method Not Allowed"):
        server.wait_log(rf"DEBUG {REQUEST_ID} user interface: {reason}$")
    assert server.stop() == 0


def test_no_debugging_without_the_option(server):
    server.get(server.route("kapow get /request/method | kapow set /response/body"))
    assert not [line for line in server.log if "DEBUG" in line]
