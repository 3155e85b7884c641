"""What others start the server with: systemd's units, and a container whose process 1 it is.

Neither systemd nor Docker need run here. The server is started as they would,
with the sockets, the environment and the command line that the examples say.
"""

import concurrent.futures
import contextlib
import http.client
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile

import pytest

import kapow
from conftest import DEADLINE, KAPOW, KAPOWCTL, ROOT, wait_until, write_starter
from test_hosts import Client

UNITS = ROOT / "examples" / "systemd"
CONTAINER = ROOT / "examples" / "container"
EXPOSURE = 15       # tenths, of 100: what systemd-analyze security may find open
INSTALLED = "/opt/kapow/bin/kapow"

needs_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"),
                                   reason="systemd-analyze is not installed")


def read_unit(name):
    """Return what the unit file says, {directive: [values]}."""
    found = {}
    for line in (UNITS / name).read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


SERVICE = read_unit("kapow.service")
SOCKETS = [read_unit(path.name) for path in sorted(UNITS.glob("*.socket"))]


def address_of(unit):
    """Return HOST:PORT, where the socket unit listens."""
    return unit["ListenStream"][0]


# The units as systemd sees them.


@pytest.fixture
def units(tmp_path):
    """A directory with the units, whose program is one that is installed here."""
    for path in UNITS.glob("kapow*"):
        (tmp_path / path.name).write_text(path.read_text().replace(INSTALLED, sys.executable))
    return tmp_path


def analyze(*arguments):
    """Run systemd-analyze; return (exit status, what it said)."""
    done = subprocess.run(["systemd-analyze", *arguments], timeout=DEADLINE, text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env={**os.environ, "LC_ALL": "C"})
    return done.returncode, done.stdout


@needs_systemd
def test_units_are_valid(units):
    assert analyze("verify", "--man=no", *sorted(units.iterdir())) == (0, "")


@needs_systemd
def test_service_is_confined(units):
    status, said = analyze("security", "--no-pager", "--offline=true", f"--threshold={EXPOSURE}",
                           units / "kapow.service")
    if "unrecognized option" in said:
        pytest.skip("this systemd-analyze looks at no unit files")
    assert status == 0, said


def test_units_fit_the_server():
    """What stands in the units and in the server alike."""
    assert {unit["FileDescriptorName"][0]: address_of(unit) for unit in SOCKETS} == {
        "user": kapow.USER_ADDRESS, "status": "127.0.0.1:8083"}
    assert all(unit["Service"] == ["kapow.service"] for unit in SOCKETS)
    user, = [unit for unit in SOCKETS if unit["FileDescriptorName"] == ["user"]]
    assert user["Backlog"] == [str(kapow.BACKLOG)]
    names = " ".join(sorted((path.name for path in UNITS.glob("*.socket")), reverse=True))
    assert SERVICE["Requires"] == SERVICE["Also"] == [names]
    longest = kapow.GRACE + kapow.KILL_DELAY
    services = kapow.STOP_TIME + kapow.KILL_DELAY
    assert int(SERVICE["TimeoutStopSec"][0]) >= longest + services + kapow.TELL_TIME
    assert int(SERVICE["TasksMax"][0]) > 4 * kapow.MAX_HANDLERS + kapow.MAX_QUEUE
    assert SERVICE["ExecReload"] == ["kill -HUP $MAINPID"]


# The server as systemd starts it.


class Manager:
    """What systemd does for kapow.service: holds its sockets, starts it, hears what it says.

    `sockets` is {FileDescriptorName: socket}, `state` the directory of StateDirectory=.
    """

    def __init__(self, directory, start_server):
        self._directory, self._start_server = directory, start_server
        self.runtime, self.state = directory / "run", directory / "state"
        self.runtime.mkdir()
        self.state.mkdir()
        (self.runtime / SERVICE["RuntimeDirectory"][0]).mkdir()
        (self.runtime / SERVICE["RuntimeDirectory"][0]).chmod(
            int(SERVICE["RuntimeDirectoryMode"][0], 8))
        self.sockets = {unit["FileDescriptorName"][0]: socket.create_server(("127.0.0.1", 0))
                        for unit in SOCKETS}
        self._notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notices.bind(str(directory / "notify"))
        self._handover = socket.socket(socket.AF_UNIX)
        self._handover.bind(str(directory / "handover"))
        self._handover.listen()
        for sock in (self._notices, self._handover):
            sock.settimeout(DEADLINE)

    def _expand(self, text):
        return text.replace("%t", str(self.runtime))

    def environment(self):
        """Return what EnvironmentFile= and Environment= say, and systemd itself."""
        lines = (UNITS / "environment").read_text().splitlines()
        pairs = [line for line in lines if not line.startswith("#")] + SERVICE["Environment"]
        return {**dict(self._expand(pair).split("=", 1) for pair in pairs),
                "STATE_DIRECTORY": str(self.state), "NOTIFY_SOCKET": self._notices.getsockname()}

    def start(self, *more, init=(UNITS / "routes",)):
        """Start the server as ExecStart= says, with `more` options and the sockets; return it."""
        program, command, *options, routes = shlex.split(self._expand(SERVICE["ExecStart"][0]))
        assert (program, command, routes) == (INSTALLED, "server", "/etc/kapow/routes")
        starter = write_starter(self._directory / "starter", f"""
import socket
handover = socket.socket(socket.AF_UNIX)
handover.connect({self._handover.getsockname()!r})
fds = socket.recv_fds(handover, 1, {len(self.sockets)})[1]
for place, fd in enumerate(fds, 3):     # each is above its place: 3 is the handover's
    os.dup2(fd, place)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)),
                  LISTEN_FDNAMES={":".join(self.sockets)!r})
""")
        server = self._start_server(*options, *more, init=init, script=starter, wait=False,
                                    environment=self.environment())
        with self._handover.accept()[0] as peer:
            socket.send_fds(peer, [b"-"], [sock.fileno() for sock in self.sockets.values()])
        return server

    def hear(self):
        """Return the next thing that the server says, {variable: value}."""
        return dict(line.split("=", 1) for line in self._notices.recv(4096).decode().splitlines())

    def close(self):
        for sock in (self._notices, self._handover, *self.sockets.values()):
            sock.close()


@pytest.fixture
def manager(start_server):
    # The path of a Unix socket is short, the one of tmp_path may not be.
    with tempfile.TemporaryDirectory(prefix="kapow-") as directory, \
            contextlib.closing(Manager(pathlib.Path(directory), start_server)) as made:
        yield made


def test_service(manager):
    """Start, routes, kapowctl from a terminal, reload, stop."""
    server = manager.start()
    assert manager.hear() == {"READY": "1"}
    assert server.get("/hello/Ada").body == b"Hello, Ada!\n"
    assert server.get("/host").body.decode() == f"{os.uname().nodename}\n"
    for note in (b"one\n", b"two\n"):
        assert server.request("POST", "/notes", note).status == 204
    assert (manager.state / "notes").read_bytes() == b"one\ntwo\n"
    assert server.wait_log("data interface: (.*)").group(1) == f"unix:{manager.runtime}/kapow/data"
    connection = http.client.HTTPConnection(*manager.sockets["status"].getsockname(), timeout=DEADLINE)
    with contextlib.closing(connection):
        connection.request("GET", "/readyz")
        assert connection.getresponse().read() == b"ready\n"

    terminal = {**os.environ, "XDG_RUNTIME_DIR": str(manager.runtime)}
    done = subprocess.run([sys.executable, str(KAPOWCTL), "route", "list"], env=terminal,
                          timeout=DEADLINE, stdout=subprocess.PIPE, check=True)
    assert [route["url_pattern"] for route in json.loads(done.stdout)] == [
        "/host", "/hello/{name}", "/notes"]

    server.process.send_signal(signal.SIGHUP)
    reloading = manager.hear()
    assert reloading.pop("MONOTONIC_USEC").isdigit() and reloading == {"RELOADING": "1"}
    assert manager.hear() == {"READY": "1", "STATUS": "reloaded"}
    assert server.get("/hello/Grace").body == b"Hello, Grace!\n"
    assert server.stop() == 0
    assert manager.hear() == {"STOPPING": "1"}
    assert os.listdir(manager.runtime / "kapow") == []


def test_restart_of_the_service_refuses_nobody(manager):
    """Clients wait in the sockets' queues, which are systemd's, until the routes are there."""
    server = manager.start()
    assert manager.hear() == {"READY": "1"}
    # A kept connection may end just when its client makes a request, which makes it again then.
    port = manager.sockets["user"].getsockname()[1]
    answer = f"{os.uname().nodename}\n".encode()
    clients = [Client(port, "/host", keep_alive=False, answer=answer) for _ in range(3)]
    try:
        for _ in range(3):
            assert server.stop() == 0
            assert manager.hear() == {"STOPPING": "1"}
            done = [client.done for client in clients]
            server = manager.start()
            assert manager.hear() == {"READY": "1"}
            wait_until(lambda: all(client.done > before + 1
                                   for client, before in zip(clients, done)), "more answers")
    finally:
        for client in clients:
            client.stop()
    assert [failure for client in clients for failure in client.failures] == []


# The container.


def read_dockerfile():
    """Return the instructions of the Dockerfile, [(name, text)]."""
    text = re.sub(r"(?m)^#.*\n", "", (CONTAINER / "Dockerfile").read_text()).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


DOCKERFILE = read_dockerfile()


def instruction(name):
    """Return the text of the only instruction `name`."""
    text, = [text for found, text in DOCKERFILE if found == name]
    return text


def copies():
    """Return {path in the container: path here} of what COPY brings."""
    found = {}
    for *sources, target in [text.split() for name, text in DOCKERFILE if name == "COPY"]:
        for source in sources:
            place = target + pathlib.Path(source).name if target.endswith("/") else target
            found[place] = ROOT / source
    assert len(found) == 3
    return found


def test_dockerfile():
    """What can be told without an engine."""
    assert DOCKERFILE[0][0] == "FROM"
    assert re.fullmatch(r"debian:\d+-slim", instruction("FROM"))
    assert {name for name, _ in DOCKERFILE} <= {"FROM", "RUN", "COPY", "USER", "WORKDIR", "EXPOSE",
                                                "ENTRYPOINT", "CMD", "STOPSIGNAL", "HEALTHCHECK"}
    assert all(path.is_file() for path in copies().values())
    for script in [text for name, text in DOCKERFILE if name == "RUN"]:
        assert subprocess.run(["sh", "-n", "-c", script], timeout=DEADLINE).returncode == 0
    ignored = [line for line in (CONTAINER / "Dockerfile.dockerignore").read_text().splitlines()
               if not line.startswith("#")]
    assert ignored == ["*", *(f"!{path.relative_to(ROOT)}" for path in copies().values())]
    user, group = instruction("USER").split(":")
    assert int(user) and int(group)
    assert instruction("STOPSIGNAL") == "SIGTERM"
    program, script, command, *options = json.loads(instruction("ENTRYPOINT"))
    programs = json.loads(instruction("CMD"))
    assert (program, command) == ("/usr/bin/python3", "server")
    assert {script, *programs} < set(copies())
    parsed = kapow.make_server_parser().parse_args(options + programs)
    assert instruction("EXPOSE").split() == [str(parsed.bind.port), str(parsed.status_bind.port)]


def test_health_check_of_the_container(start_server):
    """It is content with a server that lives, and with nothing else."""
    server = start_server("--status-bind", "127.0.0.1:0")
    *_, python, isolated, bare, option, script = json.loads(
        instruction("HEALTHCHECK").partition("CMD")[2])
    assert (python, isolated, bare, option) == ("/usr/bin/python3", "-I", "-S", "-c")

    def check(port):
        changed = script.replace("8083", str(port))
        assert changed != script
        return subprocess.run([sys.executable, "-I", "-S", "-c", changed], timeout=DEADLINE,
                              stderr=subprocess.DEVNULL).returncode
    port = server.port("status")
    assert check(port) == 0
    assert check(server.port("user")) == 1      # 404
    assert server.stop() == 0
    assert check(port) == 1


# Orphans come to process 1 and to a child subreaper.

LEAVERS = {
    "plain": "true &",
    "double": "(sh -c 'exit 3' & exit 4)",
    "session": "(setsid sh -c 'exit 5' & exit 6)",
    "late": "(setsid sh -c 'sleep 0.1; exit 7' > /dev/null 2>&1 &)",
    "killed": "(setsid sh -c 'kill -9 $$' &)",
    "many": "for i in 1 2 3 4 5 6 7 8; do (setsid true & true & exit 8); done",
}

ORPHANS_ROUTES = [
    {"method": "GET", "url_pattern": f"/{name}/{{status:[0-9]+}}",
     "command": f"{leave}\nexit $(kapow get /request/matches/status)"}
    for name, leave in LEAVERS.items()]


def children(pid):
    """Return {pid: state} of the children of the process."""
    found = {}
    with contextlib.suppress(OSError):
        for task in pathlib.Path("/proc", str(pid), "task").iterdir():
            for child in (task / "children").read_text().split():
                with contextlib.suppress(OSError):
                    line = pathlib.Path("/proc", child, "stat").read_text()
                    found[int(child)] = line.rpartition(")")[2].split()[0]
    return found


class Adopter:
    """A server that orphans come to; `pid` is its process id as we see it."""

    def __init__(self, server, is_first):
        self.server = server
        if is_first:            # a child of unshare(1), whose exit status is its own
            self.pid, = wait_until(lambda: children(server.process.pid), "the namespace's process 1")
        else:
            self.pid = server.process.pid

    def signal(self, signum):
        os.kill(self.pid, signum)

    def stop(self):
        """End the server; return its exit status."""
        if self.server.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGTERM)
        try:
            return self.server.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            raise


@pytest.fixture(params=["process-1", "subreaper"])
def adopter(request, tmp_path, start_server):
    """An Adopter with ORPHANS_ROUTES, ready; its init program fails, after it left an orphan."""
    (tmp_path / "routes").write_text(json.dumps(ORPHANS_ROUTES))
    init = tmp_path / "init"
    init.write_text("#!/bin/sh\n(setsid sh -c 'exit 1' &)\n[ ! -e fine ] || exit 0\nexit 3\n")
    init.chmod(0o755)
    options = {}
    if request.param == "process-1":
        namespace = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        if not shutil.which("unshare"):
            pytest.skip("unshare is not installed")
        tried = subprocess.run([*namespace, "true"], timeout=DEADLINE, stderr=subprocess.PIPE)
        if tried.returncode:
            pytest.skip(tried.stderr.decode().strip())
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nexec {shlex.join(namespace)} {shlex.quote(sys.executable)} "$@"\n')
        python.chmod(0o755)
        options["python"] = str(python)
    else:
        # PR_SET_CHILD_SUBREAPER
        options["script"] = write_starter(
            tmp_path / "starter", "import ctypes\nassert ctypes.CDLL(None).prctl(36, 1) == 0")
    server = start_server("--status-bind", "127.0.0.1:0", "--routes", tmp_path / "routes",
                          init=[init], cwd=tmp_path, wait=False, **options)
    made = Adopter(server, request.param == "process-1")
    server.wait_log("init exited with status 3")
    yield made
    assert made.stop() == 0


def ask(server, target):
    """Return the status of the answer to a GET."""
    return server.get(target).status


def test_orphans_are_reaped(adopter):
    """However they came about, and nothing but them: exit statuses are as they were."""
    targets = [f"/{name}/{status}" for name in LEAVERS for status in (0, 9, 0, 1)] * 8
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda target: ask(adopter.server, target), targets))
    wrong = [(target, status) for target, status in zip(targets, found)
             if status != (200 if target.endswith("/0") else 500)]
    assert wrong == []
    wait_until(lambda: not children(adopter.pid), "the end of all orphans")


def test_stop_and_reload_where_orphans_come(adopter):
    """SIGHUP and SIGTERM do what they do elsewhere; process 1 gets no other signal."""
    server = adopter.server
    adopter.signal(signal.SIGHUP)
    server.wait_log("the server did not reload, .*init exited with status 3")
    (server.directory.parent / "fine").touch()
    adopter.signal(signal.SIGHUP)
    server.wait_log("the server has reloaded")
    assert ask(server, "/many/0") == 200
    wait_until(lambda: not children(adopter.pid), "the end of all orphans")
    assert adopter.stop() == 0
