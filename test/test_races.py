"""What happens once in a million: threads that meet at a bad moment, under the schedule of seeds.

Each scenario is run with the seeds of --schedule-seeds, 2 unless said otherwise, from
--schedule-first on; see schedule.py. By hand: --schedule-seeds 200 -n 2.
"""

import ast
import concurrent.futures
import contextlib
import fcntl
import functools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import pytest

import kapow
import mixed
import services
from conftest import DEADLINE, KAPOW, ROOT, Server, read_all, wait_until
from operating import dump_json, wait_handlers


def pytest_generate_tests(metafunc):
    """Run what wants a `seed` with several."""
    first, count = map(metafunc.config.getoption, ("--schedule-first", "--schedule-seeds"))
    for name in {"seed", "disturbed"}.intersection(metafunc.fixturenames):
        metafunc.parametrize(name, range(first, first + count), indirect=name == "disturbed",
                             scope="module")


def get(path, *fields):
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: h", *fields, "\r\n"]).encode()


def check_log(server):
    """Fail if the log tells of an error that nobody expected."""
    assert not [line for line in server.log if "Traceback" in line or "unexpected" in line]


# The instrument itself.

def scheduled(code, seed="1"):
    """Run Python code behind schedule.install() as a program named kapow.py; return its stderr."""
    text = ("import os, socket, sys, threading, time\n"
            "import schedule\nschedule.install()\n"
            f"exec(compile({code!r}, 'kapow.py', 'exec'))")
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT / "test", capture_output=True, text=True,
                          env={**os.environ, "KAPOW_TEST_SCHEDULE": seed}, timeout=DEADLINE)
    return done.stderr


def on_loop(statement):
    return ("a, b = socket.socketpair()\n"
            "r, w = os.pipe()\n"
            "b.send(b'x'), os.write(w, b'x')\n"
            "def look():\n"
            f"    {statement}\n"
            "thread = threading.Thread(target=look, name=NAME)\n"
            "thread.start(), thread.join()\n")


BLOCKING = {"recv": "a.recv(1)", "timeout": "a.settimeout(1); a.recv(1, socket.MSG_DONTWAIT)",
            "sendall": "a.sendall(b'x')", "read": "os.read(r, 1)", "write": "os.write(w, b'x')",
            "sleep": "time.sleep(0.001)", "wait": "threading.Event().wait(0.001)",
            "poll": "import select; select.poll().poll(1)",
            "Popen": "import subprocess; subprocess.Popen(['true']).wait()"}
OTHERS = {"recv": "a.recv(1, socket.MSG_DONTWAIT)", "nonblocking": "a.setblocking(False); a.recv(1)",
          "read": "os.set_blocking(r, False); os.read(r, 1)", "yield": "time.sleep(0)",
          "file": "os.read(os.open('/etc/passwd', os.O_RDONLY), 1)", "set": "threading.Event().set()",
          "poll": "import select; select.poll().poll(0)", "lock": "threading.RLock().acquire()"}


@pytest.mark.parametrize("statement", BLOCKING.values(), ids=BLOCKING)
def test_what_blocks_on_the_loop_is_said(statement):
    assert "unexpected" not in scheduled(on_loop(statement).replace("NAME", "'other'"))
    assert "unexpected: the thread of the event loop may block" in scheduled(
        on_loop(statement).replace("NAME", "'watcher'"))


def test_what_does_not_block_is_fine():
    for statement in OTHERS.values():
        assert scheduled(on_loop(statement).replace("NAME", "'watcher'")) == ""


ORDER = """
order, threads = [], []
def note(name, lock=threading.Lock()):
    for _ in range(3):
        with lock:
            order.append(name)
        time.sleep(0)
threads = [threading.Thread(target=note, args=(name,)) for name in "abcdef"]
for thread in threads: thread.start()
for thread in threads: thread.join()
sys.stderr.write("".join(order))
"""


def test_seeds_differ():
    """Nothing is certain between threads, but that they come in many orders is."""
    assert len({scheduled(ORDER, str(seed)) for seed in range(8)}) > 1


def test_every_condition_leaves_the_turn():
    """threading.Condition itself does not."""
    used = [node for node in ast.walk(ast.parse(KAPOW.read_text()))
            if isinstance(node, ast.Attribute) and node.attr == "Condition"]
    assert len(used) == 1           # the base of kapow.Condition


def test_who_waits_has_not_the_turn():
    condition = kapow.Condition()
    kapow.TURN.take()
    with condition:
        condition.wait_for(lambda: True)
        assert kapow.TURN._held         # there was nothing to wait for
        condition.wait_for(lambda: False, 0.001)
        assert not kapow.TURN._held


TURN = """
import types
kapow = sys.modules["kapow"] = types.ModuleType("kapow")
kapow.TURN = types.SimpleNamespace(_held=True)
a, b = socket.socketpair()
b.send(b"x", socket.MSG_DONTWAIT)
STATEMENT
"""


@pytest.mark.parametrize("statement", ["a.recv(1)", "threading.Condition().acquire(); os.stat('/')",
                                       "open('/etc/passwd')", "time.sleep(0.001)"])
def test_what_blocks_with_the_turn_is_said(statement):
    assert "unexpected: a thread that has the Turn" in scheduled(TURN.replace("STATEMENT", statement))


def test_lock_with_the_turn_is_fine():
    assert scheduled(TURN.replace("STATEMENT", "threading.Lock().acquire()")) == ""


# Locales of another encoding.

@pytest.fixture(scope="module")
def latin(tmp_path_factory):
    """The environment of a locale of ISO-8859-15; of ASCII where none can be made."""
    directory = tmp_path_factory.mktemp("locales")
    made = shutil.which("localedef") and subprocess.run(
        ["localedef", "-i", "en_US", "-f", "ISO-8859-15", directory / "en_US.ISO-8859-15"],
        capture_output=True).returncode == 0
    if not made:
        return {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    return {"LOCPATH": str(directory), "LC_ALL": "en_US.ISO-8859-15"}


def test_requests_in_a_locale_of_8_bits(start_server, tmp_path, latin):
    """What is not of the locale, or other bytes there, arrives in UTF-8; the latch of a setup goes on."""
    billets = tmp_path / "billets"
    (billets / "caf\u00e9" / "rsrc").mkdir(parents=True)
    for name in ("hi", "caf\u00e9"):
        (billets / f"{name}.b").write_text(
            "#!/bin/bash\nbillet.setup() { :; }\nbillet:() { http_body; printf %s \"$BILLET_PATH\"; }\n")
        (billets / f"{name}.b").chmod(0o755)
    (billets / "caf\u00e9" / "rsrc" / "na\u00efve").write_text("file")
    routes = dump_json(tmp_path / "routes.json", [
        {"method": "GET", "url_pattern": "/euro",
         "command": "printf '\u20ac' | kapow set /response/body; kapow set /server/log '\u20ac \u4e16'"},
        {"method": "GET", "url_pattern": "/m/{x}",
         "command": "kapow get /request/matches/x | kapow set /response/body"}])
    server = start_server("--billets", billets, "--routes", routes, environment=latin)
    for _ in range(2):
        assert server.get("/hi/%E2%82%AC%FF").body == b"/\xe2\x82\xac\xff"
    assert server.get("/caf%C3%A9/x").body == b"/x"
    assert server.get("/caf%C3%A9/rsrc/na%C3%AFve").body == b"file"
    assert server.get("/euro").body == "\u20ac".encode()
    assert server.get("/m/%E2%82%AC").body == "\u20ac".encode()
    server.wait_log("\u20ac \u4e16")
    check_log(server)


def test_setup_is_released_whatever_fails(tmp_path):
    """An error that nobody expected, in the start of a launcher, leaves no latch behind."""
    (tmp_path / "x.b").write_text("#!/bin/bash\n")
    (tmp_path / "x.b").chmod(0o755)
    body = types.SimpleNamespace(length=0, interrupt=None, ask=lambda: False)
    request = types.SimpleNamespace(body=body, cgi_variables=dict)
    billet = kapow.Billet("x", str(tmp_path), "/x", "")
    handler, setups = kapow.Handler(request, billet, {}), kapow.Setups()

    def spawn(*arguments, **options):
        raise ZeroDivisionError
    answer = kapow.BilletAnswer(handler, types.SimpleNamespace(spawn=spawn), None, setups, ["bash"])
    with pytest.raises(ZeroDivisionError):
        answer.next_step()
    answer.close()
    assert handler.exited
    assert setups.begin(billet, lambda: False) is not None


# Programs whose start goes wrong in its second half.

class NoWatcher:
    """A Watcher that can watch nothing: there is no pidfd and no thread to be had."""

    def on_exit(self, pid, callback):
        raise RuntimeError("can't start new thread")

    def calling_later(self, seconds, callback):
        return contextlib.nullcontext()


@pytest.fixture
def unlucky(tmp_path):
    """(Surroundings, Spawner) of a NoWatcher."""
    watcher = NoWatcher()
    spawner = kapow.Spawner(watcher, kapow.Reaper(watcher), dict(os.environ))
    before = kapow.child_pids()
    directory = kapow.OwnDirectory(tmp_path)
    yield kapow.Surroundings(directory, watcher, spawner), spawner
    directory.close()
    assert kapow.child_pids() == before
    assert not spawner._reaper._ours
    spawner.close()


def test_program_that_cannot_be_watched_is_killed(unlucky):
    with pytest.raises(RuntimeError):
        unlucky[1].spawn(["/bin/sleep", "1000"], {}, "x", None, None)


def test_service_that_cannot_be_watched_is_killed(unlucky):
    supervisor = kapow.Supervisor("/bin/sleep", "1000", surroundings=unlucky[0])
    with pytest.raises(kapow.FailedToStartProcess) as failure:
        supervisor.start()
    assert failure.value.cause == "cannot run /bin/sleep: can't start new thread"
    assert supervisor.state == "stopped"


def test_reload_with_an_unexpected_error(start_server, tmp_path):
    """It is a line in the log, and the server goes on as it was."""
    program = tmp_path / "broken.py"
    program.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport kapow\n"
                       "def fail(server, configuration): raise ZeroDivisionError('x')\n"
                       "kapow.Server._set_up = fail\nsys.exit(kapow.main())\n")
    server = start_server(script=program)
    path = server.route("kapow set /response/body x")
    for _ in range(2):
        seen = len(server.log)
        server.process.send_signal(signal.SIGHUP)
        services.wait_line(server, seen, r"ERROR the server did not reload, and all is as it was: "
                                         r"unexpected, ZeroDivisionError\('x'\)$")
        assert server.get(path).body == b"x"
    assert server.stop() == 0
    assert "Traceback" not in "\n".join(server.log)


# Routes and their services.

def test_service_stays_while_a_route_comes():
    """Who adds a route of a service holds that until the route is there."""
    table = kapow.RouteTable()
    table_services = kapow.Services(table, None, None, 0)
    table_services._services["x"] = types.SimpleNamespace(name="x")
    route = kapow.Route("GET", "/x", service="x")
    reasons = []

    def remove():
        try:
            table_services.remove("x")
        except kapow.ApiError as error:
            reasons.append(error.reason)
    removing = threading.Thread(target=remove)
    with table_services.holding([route]):
        removing.start()
        removing.join(0.1)
        assert removing.is_alive()
        table.append(route)
    removing.join(DEADLINE)
    assert reasons == ["Service In Use"]
    assert [kept.service for kept in table.snapshot()] == ["x"] == list(table_services._services)


# Files that others may lock, or replace.

def test_pid_file_is_written_when_all_listen(start_server, tmp_path):
    """Not by a server that cannot listen; nor does that remove another's."""
    pid_file = tmp_path / "pid"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = start_server("--pid-file", pid_file, "--bind", f"127.0.0.1:{taken.getsockname()[1]}",
                              wait=False)
        assert server.process.wait(DEADLINE) == 1
    assert not pid_file.exists()
    assert list(tmp_path.glob("pid*")) == []


def test_pid_file_of_another_server_stays(start_server, tmp_path):
    pid_file = tmp_path / "pid"
    server = start_server("--pid-file", pid_file)
    assert pid_file.read_text() == f"{server.process.pid}\n"
    assert pid_file.stat().st_mode & 0o777 == 0o600
    (tmp_path / "new").write_text("another's\n")
    (tmp_path / "new").rename(pid_file)
    assert server.stop() == 0
    assert pid_file.read_text() == "another's\n"


def test_stale_pid_file_that_another_holds_is_replaced(start_server, tmp_path):
    """As those of older servers could be, which others may read, and so lock."""
    pid_file = tmp_path / "pid"
    pid_file.write_text("999999999\n")
    pid_file.chmod(0o644)
    with open(pid_file) as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        server = start_server("--pid-file", pid_file)
        assert pid_file.read_text() == f"{server.process.pid}\n"
        assert server.stop() == 0
    assert list(tmp_path.glob("pid*")) == []


def test_stale_pid_file_is_one_servers(tmp_path):
    """Where nobody else can lock it, its lock means that a server is about to replace it."""
    pid_file = tmp_path / "pid"
    pid_file.write_text("999999999\n")
    pid_file.chmod(0o600)
    with open(pid_file) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(kapow.StartError) as error:
            kapow.PidFile(str(pid_file)).write()
    assert str(error.value) == f"cannot write the pid file {pid_file}: another server is about to start"
    assert list(tmp_path.iterdir()) == [pid_file]


def test_locked_directory_of_a_socket(tmp_path, monkeypatch):
    """Another user can lock it; the server says so soon, and does not wait for ever."""
    monkeypatch.setattr(kapow, "LOCK_TIME", 0.2)
    address = kapow.UnixAddress(str(tmp_path / "sock"), 0o600)
    directory = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_SH)
    with pytest.raises(kapow.StartError) as error:
        kapow.Interface("user", address, None, None, None)
    assert str(error.value) == (f"the user interface cannot listen on unix:{tmp_path}/sock: another "
                                f"program has kept its directory, {tmp_path}, locked for 0.2 s")
    releasing = threading.Timer(0.1, os.close, [directory])
    releasing.start()
    address.listen().close()
    releasing.join()


# Deadlines and spools.

@pytest.fixture
def watcher():
    watcher = kapow.Watcher("test")
    watcher.start()
    yield watcher
    watcher.stop(5)         # where a test failed it may have deadlines left


def test_deadline_that_was_cancelled_does_not_come(watcher):
    called, over = [], threading.Event()
    deadline = watcher.call_later(0.05, lambda: called.append(1))
    watcher.cancel(deadline)
    last = watcher.call_later(0.1, over.set)
    assert over.wait(DEADLINE)
    assert called == []
    watcher.cancel(last)        # too late: it must not count as one that is left in the heap
    assert (watcher._deadlines, watcher._cancelled) == ([], 0)


def test_cancelled_deadlines_take_no_memory(watcher):
    """A server of long timeouts has one for each request, far in the future."""
    kept = watcher.call_later(1000, list)
    for _ in range(5000):
        watcher.cancel(watcher.call_later(1000, list))
        assert len(watcher._deadlines) < 300
    watcher.cancel(kept)


def test_writes_that_had_their_turn_leave_memory_to_the_next():
    """Of the spools of a response so much is in memory, and the rest in files."""
    draft = kapow.Draft()
    first, second = draft.begin_write("body"), draft.begin_write("body")
    draft.append(second, bytes(kapow.MEMORY_LIMIT))
    assert draft.begin_write("body")._spool._limit == 0
    draft.end_write(first)
    draft.end_write(second)
    assert draft.begin_write("body")._spool._limit == kapow.MEMORY_LIMIT


# Servers that are disturbed.

class Disturbed(Server):
    """A server under a seed's schedule, with a file of routes and a directory of billets."""

    def __init__(self, directory, seed, **options):
        self.routes = dump_json(directory / "routes.json", [])
        self.billets = directory / "billets"
        self.billets.mkdir()
        super().__init__(directory, "--routes", self.routes, "--billets", self.billets, seed=seed,
                         **options)


@pytest.fixture(scope="module")
def disturbed(request, tmp_path_factory):
    """A Disturbed server for the scenarios that leave it as it was; `seed` is its parameter."""
    server = Disturbed(tmp_path_factory.mktemp("disturbed"), request.param)
    yield server
    assert server.stop() == 0
    server.check_gone()
    check_log(server)


def at_once(*calls):
    """Call functions at the same time, each on a thread; raise what one of them raised."""
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        for done in [pool.submit(call) for call in calls]:
            done.result(DEADLINE)


def leave(server, data, rng):
    """Send a request, and close the connection at some moment."""
    with server.connect() as sock:
        sock.sendall(data)
        time.sleep(rng.random() * 0.05)
        if rng.random() < 0.5:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def leaving(server, path, count=10, seed=0):
    """Return a function that has `count` clients leave, one after another."""
    def leave_all(rng=random.Random(seed)):
        for _ in range(count):
            leave(server, get(path), rng)
    return leave_all


def test_calls_over_the_channel(disturbed):
    path = disturbed.route('kapow get /request/params/x | kapow set /response/body; '
                           'kapow set /response/headers/X-Name "$(kapow get /request/matches/name)"',
                           pattern="/channel/{name}").replace("{name}", "")

    def ask(name):
        for number in range(4):
            reply = disturbed.get(f"{path}{name}?x={name}-{number}")
            assert (reply.status, reply.body) == (200, f"{name}-{number}".encode())
            assert reply.headers["X-Name"] == name
    at_once(*(functools.partial(ask, name) for name in "abcd"),
            leaving(disturbed, path + "gone?x=1"))
    disturbed.check_idle()


def test_billets_that_are_set_up(disturbed):
    """Of many that ask at once, and some that leave, one sets the context up."""
    launcher = disturbed.billets / "races.b"
    launcher.write_text("#!/bin/bash\nbillet.setup() { sleep 0.05; echo x >>\"$BILLET_BASE/setups\"; }\n"
                        "billet:() { http_body; echo hello; }\n")
    launcher.chmod(0o755)

    (disturbed.billets / "races" / "rsrc").mkdir(parents=True, exist_ok=True)
    (disturbed.billets / "races" / "rsrc" / "file").write_bytes(bytes(200_000))

    def ask():
        for _ in range(3):
            reply = disturbed.get("/races")
            assert (reply.status, reply.body) == (200, b"hello\n")
            assert disturbed.get("/races/rsrc/file").body == bytes(200_000)
    at_once(*[ask] * 4, leaving(disturbed, "/races", 5))
    disturbed.check_idle()
    launcher.unlink()


def test_reloads_under_load(disturbed):
    """While the table is replaced every request finds one of them."""
    def write(word):
        dump_json(disturbed.routes, [{"method": "GET", "url_pattern": "/word",
                                      "command": f"kapow set /response/body {word}"}])

    def reload(word):
        write(word)
        seen = len(disturbed.log)
        disturbed.process.send_signal(signal.SIGHUP)
        services.wait_line(disturbed, seen, "the server has reloaded|did not reload")

    def ask():
        while not over.is_set():
            assert disturbed.get("/word").body in (b"one", b"two")
    reload("one")
    over = threading.Event()

    def reload_all():
        try:
            for word in ("two", "one", "two"):
                reload(word)
                assert disturbed.get("/word").body == word.encode()
        finally:
            over.set()
    at_once(ask, ask, reload_all)
    disturbed.check_idle()


# A service whose manifest has a route of its pid; it is deaf to SIGTERM for a moment, and
# slow to begin.
SLOW_SERVICE = r"""
import json, os, signal, socket, threading, time

signal.signal(signal.SIGTERM, lambda *_: threading.Timer(0.3, os._exit, [0]).start())
listener = socket.socket(socket.AF_UNIX)
listener.bind(os.environ["KAPOW_SERVICE_SOCKET"])
listener.listen(50)
while True:
    sock, _ = listener.accept()
    with sock:
        head = sock.recv(65536)
        body = json.dumps({"pid": os.getpid(), "routes": [
            {"method": "GET", "url_pattern": f"/pid/{os.getpid()}"}]}).encode()
        sock.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"
                     % (len(body), body))
"""


def check_manifest(server, name):
    """Fail unless the manifest and the routes of a service are those of the process that serves."""
    shown = services.wait_state(server, name)
    patterns = [route["url_pattern"] for route in server.control("GET", "/routes").json()]
    assert shown["manifest"]["pid"] == shown["pid"]
    assert patterns == [f"/pid/{shown['pid']}"]
    assert server.get(patterns[0]).json()["pid"] == shown["pid"]


def test_services_that_change(disturbed):
    """Started, restarted and stopped by several at once: what serves in the end has its own routes."""
    assert disturbed.control("PUT", "/routes", []).status_code == 200
    services.add(disturbed, "races", sys.executable, "-ISc", SLOW_SERVICE, routes=True)
    for _ in range(2):
        answer = services.call(disturbed, "races", "restart")
        assert answer.status_code == 200, answer.text
    check_manifest(disturbed, "races")

    def command(*actions):
        for action in actions:
            assert services.call(disturbed, "races", action).status_code in (200, 502)
    at_once(lambda: command("restart", "stop", "start"), lambda: command("stop", "start", "restart"))
    command("start")
    check_manifest(disturbed, "races")
    services.remove(disturbed, "races")
    assert disturbed.control("GET", "/routes").json() == []
    disturbed.check_idle()


# Its process goes on when it is to end, for as long as there is the file $0.deaf.
DEAF = ('echo "$KAPOW_SERVICE_SOCKET" > "$0.new"; mv "$0.new" "$0"; '
        'trap "while [ -e \\"$0.deaf\\" ]; do sleep 0.05; done; exit" TERM; '
        ': >"$0.deaf"; while :; do sleep 0.05; done')


class DeafPuppet(services.Puppet):
    """A Puppet whose first process does not end before hear(), and has not given its manifest."""

    PROGRAM = DEAF

    def begin(self):
        """Return the connection on which the server waits for the first process's manifest."""
        self.deaf = self._note.with_name(self._note.name + ".deaf")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.socket_path())
            listener.listen()
            sock, _ = listener.accept()
        services.read_head(sock)
        wait_until(self.deaf.exists, "the trap")
        return sock

    def give(self, sock, document):
        """Answer the first process's manifest, and have it end."""
        seen = len(self.server.log)
        with sock:
            sock.sendall(services.manifest(document))
            read_all(sock)
        self.deaf.unlink()
        services.wait_line(self.server, seen, f"the service {self.name}: (died|exited)")


def put_open(server, handler_id):
    """Begin a write to a handler's body; return its connection, with the write open."""
    sock = server.connect("data")
    sock.sendall(f"PUT /handlers/{handler_id}/response/body HTTP/1.1\r\nHost: h\r\n"
                 "Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
    assert services.read_until(sock, b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
    return sock


def test_open_write_to_a_services_answer_holds_nobody_up(server):
    """The service has answered; who waits for the write must let others be answered."""
    puppet = services.Puppet(server, "open").listen()
    wanted = threading.Event()

    def act(sock, head, rest):
        wanted.wait(DEADLINE)
        sock.sendall(services.answer(b"hello"))
        return True
    puppet.act = act
    server.route(pattern="/service", service="open")
    other = server.route("kapow set /response/body other")
    with server.connect() as asking:
        asking.sendall(get("/service"))
        with put_open(server, wait_handlers(server)[0]["id"]) as writing:
            wanted.set()
            assert services.read_until(asking, b"hello").endswith(b"hello")
            for _ in range(3):
                assert server.get(other).body == b"other"
            writing.sendall(b"0\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):     # the handler may be over first
                writing.recv(65536)
    server.control("PUT", "/routes", [])
    puppet.close()
    services.remove(server, "open")


def manifest_of(word):
    return {"name": word, "routes": [{"method": "GET", "url_pattern": f"/{word}"}]}


def shown_manifest(server, name):
    """Return (the name in the manifest, the patterns of the routes)."""
    return ((services.state(server, name)["manifest"] or {}).get("name"),
            [route["url_pattern"] for route in server.control("GET", "/routes").json()])


def test_late_manifest_of_a_process_that_was_replaced(server):
    puppet = DeafPuppet(server, "replaced", routes=True)
    sock = puppet.begin()
    puppet.manifest = services.manifest(manifest_of("new"))

    def restart():
        assert services.call(server, "replaced", "restart").status_code == 200
    at_once(restart, lambda: puppet.take_calls(puppet.socket_path()))
    assert shown_manifest(server, "replaced") == ("new", ["/new"])
    puppet.give(sock, manifest_of("old"))
    assert shown_manifest(server, "replaced") == ("new", ["/new"])
    puppet.deaf.unlink(missing_ok=True)
    services.remove(server, "replaced")
    puppet.close()


def test_late_manifest_of_a_process_that_was_stopped(server):
    puppet = DeafPuppet(server, "stopped", routes=True)
    sock = puppet.begin()
    at_once(lambda: services.call(server, "stopped", "stop"),
            lambda: services.wait_state(server, "stopped", "stopping"),
            lambda: (services.wait_state(server, "stopped", "stopping"),
                     puppet.give(sock, manifest_of("old"))))
    services.wait_state(server, "stopped", "stopped")
    assert shown_manifest(server, "stopped") == (None, [])
    services.remove(server, "stopped")


def read_answer(sock):
    """Read an answer of no body."""
    data = services.read_until(sock, b"\r\n\r\n")
    assert b"\r\nContent-Length: 0\r\n" in data


def test_clients_that_leave_at_a_stop(start_server, tmp_path, seed):
    leave_at_stop(start_server, tmp_path, seed)


def test_clients_that_leave_when_idle_ones_are_ended(start_server, tmp_path):
    leave_at_stop(start_server, tmp_path, "1 _end_idle")


def leave_at_stop(start_server, tmp_path, seed):
    """A handler that runs is waited for, whatever the others do."""
    started = tmp_path / "started"
    server = start_server(kind=Disturbed, seed=seed)
    server.route(pattern="/idle")
    server.route(f"echo >{started}; sleep 0.5; kapow set /response/body done", pattern="/busy")
    rng = random.Random(seed)
    idle = [server.connect() for _ in range(30)]
    for sock in idle[:20]:
        sock.sendall(get("/idle"))
        read_answer(sock)
    with server.connect() as busy:
        busy.sendall(get("/busy"))
        wait_until(started.exists, "the handler")
        server.process.send_signal(signal.SIGTERM)
        time.sleep(rng.uniform(0.05, 0.15))
        rng.shuffle(idle)
        for sock in idle:
            sock.close()
            time.sleep(rng.random() * 0.02)
        assert read_all(busy).endswith(b"\r\n\r\ndone")
    assert server.process.wait(DEADLINE) == 0
    check_log(server)


def test_visitors_of_all_kinds_at_a_stop(start_server, tmp_path):
    """They leave at random moments, before, in and after it; who waits for an answer gets it."""
    started = tmp_path / "started"
    server = start_server(kind=Disturbed, seed=1)
    mixed.add_routes(server)
    server.route(f"echo >{started}; sleep 1; kapow set /response/body done", pattern="/busy")
    with server.connect() as busy, concurrent.futures.ThreadPoolExecutor(8) as pool:
        visits = [pool.submit(mixed.leave_until_gone, server, seed) for seed in range(8)]
        busy.sendall(get("/busy"))
        wait_until(started.exists, "the handler")
        server.process.send_signal(signal.SIGTERM)
        assert read_all(busy).endswith(b"\r\n\r\ndone")
        assert sum(visit.result(DEADLINE) for visit in visits) > 0
    assert server.process.wait(DEADLINE) == 0
    check_log(server)


def test_bodies_with_two_readers(disturbed):
    """Over the channel and over HTTP, from clients that dribble: the loop never waits for a client."""
    disturbed.route("kapow get /request/body >/dev/null & "
                    "curl -s $KAPOW_DATA_URL/handlers/$KAPOW_HANDLER_ID/request/body >/dev/null; wait; "
                    "kapow get /request/body | kapow set /response/body", method="POST",
                    pattern="/two")

    def dribble():
        with disturbed.connect() as sock:
            sock.sendall(b"POST /two HTTP/1.1\r\nHost: h\r\nConnection: close\r\n"
                         b"Content-Length: 2000\r\n\r\n")
            for _ in range(20):
                sock.sendall(b"x" * 100)
                time.sleep(0.005)
            assert read_all(sock).endswith(b"\r\n\r\n" + b"x" * 2000)
    at_once(dribble, dribble, dribble)
    disturbed.check_idle()
