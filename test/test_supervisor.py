"""kapow.Supervisor, the library: the program of another makes it, without a server."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading

import pytest

import kapow
from conftest import DEADLINE, KAPOW, processes_with, wait_until
from services import BAD_GATEWAY, PYTHON, UNAVAILABLE
from test_handlers import alive

# A service that speaks as the test wants: the path is the Python expression of what it
# sends, with the head as `head`; then it closes the connection.
SPEAKER = r'''
import json, os, signal, socket, sys, threading, urllib.parse

def serve(sock):
    with sock:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            data = sock.recv(1)
            if not data:
                return
            head += data
        if b" /_kapow/manifest " in head:
            said = json.dumps({"name": "speaker", "pid": os.getpid()}).encode()
            said = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(said), said)
        else:
            expression = head.split(b" ")[1].partition(b"?")[0][1:].decode()
            said = eval(urllib.parse.unquote(expression))
        sock.sendall(said)

signal.signal(signal.SIGUSR1, lambda *_: os._exit(5))
listener = socket.socket(socket.AF_UNIX)
listener.bind(os.environ["KAPOW_SERVICE_SOCKET"])
listener.listen(50)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
'''


# A service that serves one connection until that ends, and only then the next. It answers
# its first request but the manifest's when another client is at its door.
SINGLE = r'''
import os, select, socket

listener = socket.socket(socket.AF_UNIX)
listener.bind(os.environ["KAPOW_SERVICE_SOCKET"])
listener.listen(50)
doors = [listener]
while True:
    sock, _ = listener.accept()
    while head := sock.recv(65536):
        if b" /_kapow/manifest " in head:
            sock.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            continue
        if doors:
            select.select(doors, [], [])
            doors.clear()
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
    sock.close()
'''

# A fork of the program, which ends; the service stays.
FORK = """
import os, signal
pid = os.fork()
if pid == 0:
    signal.alarm(20)            # for one that does not end
    sys.exit()
assert os.waitpid(pid, 0)[1] == 0
assert supervisor.do_request(kapow.Request('GET', '/head')).status == 502
assert (supervisor.state, supervisor.restarts) == ("available", 0)
"""


@pytest.fixture
def make(tmp_path):
    """A function that makes a Supervisor; all are stopped at the end."""
    made = []

    def make_one(command, *args):
        made.append(kapow.Supervisor(command, *args))
        return made[-1]
    yield make_one
    for supervisor in made:
        supervisor.stop(0)
        assert (supervisor.state, supervisor.pid) == ("stopped", None)


@pytest.fixture
def echo(make, tmp_path):
    """The Python service, started."""
    (tmp_path / "service.py").write_text(PYTHON)
    supervisor = make(sys.executable, "-I", "-S", str(tmp_path / "service.py"), "HTTP/1.1")
    assert supervisor.start() is None
    return supervisor


@pytest.fixture
def speaker(make, tmp_path):
    """A service that says what it is asked to say, not started."""
    (tmp_path / "speaker.py").write_text(SPEAKER)
    return make(sys.executable, "-I", "-S", str(tmp_path / "speaker.py"))


def speak(supervisor, expression, **more):
    return supervisor.do_request(kapow.Request("GET", "/" + expression, **more))


def test_request_and_response(echo):
    response = echo.do_request(kapow.Request(
        "POST", "/echo/a b/%2F", "cats.feed", {"X-One": ["1", "2"], "Host": ["cats"]}, b"caf\xc3\xa9",
        {"name": "a/b é", "x": ""}, {"q": ["1 2", "&"], "é": ["="]}))
    assert (response.status, response.headers["X-Runtime"]) == (200, ["python"])
    seen = kapow.json.loads(response.body)
    assert (seen["method"], seen["body"]) == ("POST", "caf\xc3\xa9")
    assert seen["target"] == "/echo/a%20b/%2F?q=1+2&q=%26&%C3%A9=%3D"
    headers = sorted((name.lower(), value) for name, value in seen["headers"])
    assert headers == sorted([("host", "cats"), ("x-one", "1"), ("x-one", "2"),
                              ("content-length", "5"), ("kapow-handler", "cats.feed"),
                              ("kapow-match-name", "a%2Fb%20%C3%A9"), ("kapow-match-x", "")])


def test_defaults(echo):
    request = kapow.Request("GET", "/echo")
    assert (request.handler, request.headers, request.body) == ("", {}, b"")
    assert (request.path_params, request.query_params) == ({}, {})
    seen = kapow.json.loads(echo.do_request(request).body)
    names = [name.lower() for name, _ in seen["headers"]]
    assert (seen["target"], names) == ("/echo", ["host"])
    # A body of nothing is said to be one where it means something (RFC 9110 section 8.6).
    seen = kapow.json.loads(echo.do_request(kapow.Request("POST", "/echo")).body)
    assert ["content-length", "0"] in [[name.lower(), value] for name, value in seen["headers"]]


@pytest.mark.parametrize("name", ["Kapow-Handler", "kapow_handler", "Kapow-Match-Name"])
def test_what_headers_say_under_our_names_is_dropped(echo, name):
    response = echo.do_request(kapow.Request("GET", "/echo", "h", {name: ["evil"]}))
    assert b"evil" not in response.body


def test_headers_of_the_connection_are_ours(echo):
    response = echo.do_request(kapow.Request("POST", "/echo", "", {
        "Connection": ["close"], "Transfer-Encoding": ["chunked"], "Content-Length": ["99"],
        "Upgrade": ["x"]}, b"hello"))
    seen = kapow.json.loads(response.body)
    assert seen["body"] == "hello"
    assert {name.lower() for name, _ in seen["headers"]} == {"host", "content-length"}


def test_length_without_a_body(echo):
    """The service is not left waiting for what never comes."""
    replies = []
    thread = threading.Thread(daemon=True, target=lambda: replies.append(echo.do_request(
        kapow.Request("GET", "/echo", "", {"Content-Length": ["5"]}))))
    thread.start()
    thread.join(2)
    assert replies and replies[0].status == 200


@pytest.mark.parametrize("more", [
    {"http_method": "G T"}, {"http_method": ""}, {"http_method": "É"}, {"path": "x"}, {"path": ""},
    {"headers": {"a b": ["x"]}}, {"headers": {"a": ["x\r\ny: z"]}}, {"headers": {"": ["x"]}},
    {"headers": {"a": ["\u20ac"]}}, {"handler": "a\r\nb"}, {"path": "/\ud800"},
])
def test_what_http_forbids(echo, more):
    with pytest.raises(ValueError):
        echo.do_request(kapow.Request(**{"http_method": "GET", "path": "/echo", **more}))
    assert echo.do_request(kapow.Request("GET", "/echo")).status == 200


def test_response_headers_are_lists(speaker):
    speaker.start()
    response = speak(speaker, r"b'HTTP/1.1 299 X\r\nA: 1\r\nb: \xe9\r\nA: 2\r\n\r\nbody'")
    assert (response.status, response.body) == (299, b"body")
    assert response.headers == {"A": ["1", "2"], "b": ["\xe9"]}


@pytest.mark.parametrize("said", [r"b''", r"b'garbage\r\n\r\n'", r"b'HTTP/1.1 200'",
                                  r"b'HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort'",
                                  "os._exit(1)"])
def test_failure_is_502(speaker, said):
    speaker.start()
    response = speak(speaker, said)
    assert (response.status, response.body) == (502, BAD_GATEWAY)
    assert response.headers == {"Content-Type": ["application/json"]}


def test_states(speaker):
    """Stopped, started, dead and come back; start and stop do nothing where there is nothing to do."""
    hello = r"b'HTTP/1.1 200 OK\r\n\r\nhello'"

    def unavailable():
        response = speak(speaker, hello)
        return (response.status, response.headers, response.body) == (
            503, {"Content-Type": ["application/json"]}, UNAVAILABLE)

    assert (speaker.state, speaker.pid, speaker.get_manifest()) == ("stopped", None, None)
    assert unavailable()
    speaker.stop()
    with pytest.raises(kapow.FailedToSignalProcess):
        speaker.signal(signal.SIGHUP)
    speaker.start()
    pid = speaker.pid
    assert speaker.state == "available" and speak(speaker, hello).body == b"hello"
    assert speaker.get_manifest() == {"name": "speaker", "pid": pid}
    speaker.start()
    assert speaker.pid == pid
    speaker.signal(signal.SIGUSR1)
    wait_until(lambda: speaker.state != "available", "the death")
    assert unavailable()
    wait_until(lambda: speaker.state == "available", "the restart")
    assert (speaker.pid != pid, speaker.restarts) == (True, 1)
    pid = speaker.pid
    speaker.restart()
    assert (speaker.state, speaker.pid != pid, speaker.restarts) == ("available", True, 2)
    assert speaker.get_manifest()["pid"] == speaker.pid
    pid = speaker.pid
    for _ in range(2):
        speaker.stop()
        assert (speaker.state, speaker.pid) == ("stopped", None) and not alive(pid)
    assert unavailable()
    speaker.restart()
    assert speaker.state == "available" and speak(speaker, hello).body == b"hello"


def test_signals_that_are_none(speaker):
    speaker.start()
    for signum in (-1, 0x7fffffff, 1000):
        with pytest.raises(kapow.FailedToSignalProcess) as caught:
            speaker.signal(signum)
        assert str(caught.value) == "failed to signal subprocess" and caught.value.cause
    assert speaker.state == "available"


def test_errors():
    for kind, text in ((kapow.FailedToStartProcess, "failed to start subprocess"),
                       (kapow.FailedToStopProcess, "failed to stop subprocess"),
                       (kapow.FailedToSignalProcess, "failed to signal subprocess")):
        error = kind("why")
        assert (str(error), error.cause) == (text, "why")
        assert issubclass(kind, kapow.SupervisorError)


@pytest.mark.parametrize("command, cause", [
    (["/no/such/program"], "cannot run /no/such/program: No such file or directory"),
    (["/bin/sh", "-c", "exit 3"], "exited with status 3"),
    (["/bin/sh", "-c", "kill -SEGV $$"], "died of SIGSEGV"),
])
def test_start_that_fails(make, command, cause):
    """Is told at once, and then it is stopped."""
    supervisor = make(*command)
    with pytest.raises(kapow.FailedToStartProcess) as caught:
        supervisor.start()
    assert (str(caught.value), caught.value.cause) == ("failed to start subprocess", cause)
    assert supervisor.state == "stopped"


@pytest.mark.parametrize("command", [
    ("sleep", 5), ("sleep", None), ("a\0b",), ("sleep", "a\0b"), ("sleep", "\ud800"), ("",),
    (b"sleep",)])
def test_what_is_no_command(command):
    """Is refused before anything is started with it."""
    with pytest.raises(ValueError):
        kapow.Supervisor(*command)


def test_removed_service_is_never_started_again():
    """Nor by a call that had found it before."""
    services = kapow.Services(kapow.RouteTable(), kapow.own_surroundings(), None, 0)
    supervisor = services.add({"name": "gone", "command": ["sleep", "1000"]}).supervisor
    services.remove("gone")
    try:
        for command in (supervisor.begin, supervisor.start, supervisor.restart):
            with pytest.raises(kapow.FailedToStartProcess) as caught:
                command()
            assert caught.value.cause == "it was removed"
            assert (supervisor.state, supervisor.pid) == ("stopped", None)
    finally:
        supervisor.stop(0)


def test_stop_with_a_start_right_behind_it(make, monkeypatch):
    """It waits for the end of its process, not for a state that may have passed."""
    supervisor = make("sleep", "1000")
    supervisor.begin()
    pid, become = supervisor.pid, supervisor._become

    def start_again(state):
        become(state)
        if state == "stopped":
            supervisor.begin()

    with monkeypatch.context() as patch:
        patch.setattr(supervisor, "_become", start_again)
        supervisor.stop(0)
    assert not alive(pid) and supervisor.pid not in (None, pid)


def test_two_stops_forget_both_their_deadlines(make):
    """Else the end of the server would wait for one."""
    supervisor = make("sleep", "1000")
    watcher = kapow.own_surroundings().watcher
    before = [entry for entry in watcher._deadlines if entry[2] is not None]
    supervisor.begin()
    instance = supervisor._instance
    instance.enter()                # a request is under way
    for _ in range(2):
        supervisor.begin_to_stop(1000)
    assert supervisor.state == "stopping"
    instance.leave()
    wait_until(lambda: supervisor.state == "stopped", "the end")
    wait_until(lambda: [entry for entry in watcher._deadlines
                        if entry[2] is not None and entry not in before] == [], "no deadline")


def test_one_connection_at_a_time(make, monkeypatch, tmp_path):
    """Such a service gets its idle connection closed when a request waits at its door."""
    monkeypatch.setattr(kapow, "STUCK_TIME", 0.1, raising=False)
    (tmp_path / "single.py").write_text(SINGLE)
    supervisor = make(sys.executable, "-I", "-S", str(tmp_path / "single.py"))
    supervisor.start()
    replies = []
    threads = [threading.Thread(daemon=True, target=lambda: replies.append(
        supervisor.do_request(kapow.Request("GET", "/")))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert [reply.body for reply in replies] == [b"hello"] * 2


def test_program_that_never_listens(make, monkeypatch):
    monkeypatch.setattr(kapow, "START_TIME", 0.3)
    supervisor = make("sleep", "1000")
    with pytest.raises(kapow.FailedToStartProcess) as caught:
        supervisor.start()
    assert caught.value.cause == "it does not answer on its socket"
    assert (supervisor.state, supervisor.pid) == ("stopped", None)


def test_restart_that_never_listens(make, monkeypatch, tmp_path):
    """The old one stays, the new one ends."""
    (tmp_path / "speaker.py").write_text(SPEAKER)
    note = tmp_path / "pid"
    supervisor = make("/bin/sh", "-c", 'if test -e "$0"; then echo $$ > "$0"; exec sleep 1000; fi; '
                      'touch "$0"; exec "$1" -I -S "$2"', str(note), sys.executable,
                      str(tmp_path / "speaker.py"))
    supervisor.start()
    pid = supervisor.pid
    monkeypatch.setattr(kapow, "START_TIME", 0.5)
    with pytest.raises(kapow.FailedToStartProcess) as caught:
        supervisor.restart()
    assert caught.value.cause
    assert (supervisor.state, supervisor.pid, supervisor.restarts) == ("available", pid, 0)
    wait_until(lambda: not alive(int(note.read_text())), "the end of the new one")


def test_program_that_ignores_sigterm_is_killed(make, monkeypatch, tmp_path):
    monkeypatch.setattr(kapow, "STOP_TIME", 0.2)
    (tmp_path / "speaker.py").write_text(SPEAKER)
    supervisor = make("/bin/sh", "-c", 'trap "" TERM; exec "$0" -I -S "$1"', sys.executable,
                      str(tmp_path / "speaker.py"))
    supervisor.start()
    pid = supervisor.pid
    supervisor.stop()
    assert supervisor.state == "stopped" and not alive(pid)


def test_manifest_that_never_comes(make, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(kapow, "MANIFEST_TIME", 0.2)
    (tmp_path / "mute.py").write_text(
        "import os, socket, time\nlistener = socket.socket(socket.AF_UNIX)\n"
        "listener.bind(os.environ['KAPOW_SERVICE_SOCKET'])\nlistener.listen()\ntime.sleep(1000)\n")
    supervisor = make(sys.executable, "-I", "-S", str(tmp_path / "mute.py"))
    with caplog.at_level(logging.WARNING, "kapow"):
        supervisor.start()
    assert (supervisor.state, supervisor.get_manifest()) == ("available", None)
    assert "manifest" in caplog.text


def test_many_threads(echo):
    """Requests, restarts and the odd start from many threads: no request fails."""
    over, failures = threading.Event(), []

    def ask(number):
        count = 0
        while not over.is_set():
            count += 1
            response = echo.do_request(kapow.Request("GET", f"/echo/{number}/{count}"))
            if (response.status != 200
                    or kapow.json.loads(response.body)["target"] != f"/echo/{number}/{count}"):
                failures.append(response.body)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        restarters = [threading.Thread(target=echo.restart) for _ in range(2)]
        for thread in restarters:
            thread.start()
        echo.start()
        for thread in restarters:
            thread.join(DEADLINE)
    finally:
        over.set()
        for thread in threads:
            thread.join(DEADLINE)
    assert failures == [] and echo.restarts == 2


def test_logs(make, caplog):
    with caplog.at_level(logging.INFO, "kapow"):
        with contextlib.suppress(kapow.FailedToStartProcess):
            make("/bin/sh", "-c", "echo out; echo err >&2; exit 1").start()
        wait_until(lambda: {"sh stdout: out", "sh stderr: err"} <= set(caplog.messages), "its lines")


@pytest.mark.parametrize("end", ["", "supervisor.stop()", "raise SystemExit(3)", FORK])
def test_program_that_ends(tmp_path, end):
    """It leaves no process and no file, whether it stops its services or not, and it does end."""
    (tmp_path / "speaker.py").write_text(SPEAKER)
    (tmp_path / "tmp").mkdir()
    script = tmp_path / "program.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(KAPOW.parent)!r})\nimport kapow\n"
        f"supervisor = kapow.Supervisor(sys.executable, '-I', '-S', {str(tmp_path / 'speaker.py')!r})\n"
        "supervisor.start()\n"
        "print(supervisor.do_request(kapow.Request('GET', '/head')).status, flush=True)\n" + end)
    marker = f"KAPOW_TEST_LIBRARY={tmp_path}"
    done = subprocess.run([sys.executable, script], capture_output=True, timeout=DEADLINE, env={
        **os.environ, "TMPDIR": str(tmp_path / "tmp"), "KAPOW_TEST_LIBRARY": str(tmp_path)})
    assert done.returncode == (3 if "3" in end else 0), done.stderr
    assert done.stdout == b"502\n" and b"Traceback" not in done.stderr
    wait_until(lambda: not processes_with(marker.encode()), "the end of the service")
    assert list((tmp_path / "tmp").iterdir()) == []
