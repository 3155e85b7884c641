"""What the tests share: servers as processes of their own, and a look at what they leave.

Every server listens on free ports of the loopback and reads its own log to
learn them. Nothing here waits for a time: it waits for events, up to DEADLINE.
"""

import contextlib
import http.client
import json
import os
import pathlib
import py_compile
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid

import pytest
import requests

import schedule

ROOT = pathlib.Path(__file__).resolve().parent.parent
KAPOW = ROOT / "kapow.py"
KAPOWCTL = ROOT / "kapowctl.py"
DEADLINE = 30       # seconds; what takes longer has failed

# For modules that test the sections of kapow.py without a process.
sys.path.insert(0, str(ROOT))

CREDENTIALS = ("KAPOW_CONTROL_SERVER_CERT", "KAPOW_CONTROL_CLIENT_CERT",
               "KAPOW_CONTROL_CLIENT_KEY")


def pytest_addoption(parser):
    """Take the options of the seeded schedule, see schedule.py."""
    parser.addoption("--schedule", metavar="SEED", help="disturb the threads of all servers under test")
    parser.addoption("--schedule-seeds", metavar="N", type=int, default=2,
                     help="how many seeds each scenario of test_races.py is run with")
    parser.addoption("--schedule-first", metavar="SEED", type=int, default=1,
                     help="the first of these seeds")


def pytest_configure(config):
    """Compile both programs once, for all that installed() starts; workers find that done."""
    if config.getoption("--schedule"):
        os.environ[schedule.SEED] = config.getoption("--schedule")
    if not hasattr(config, "workerinput"):
        for script in (KAPOW, KAPOWCTL):
            py_compile.compile(str(script), doraise=True)


# The modules that take longest, in order: begun last, one of them would run alone at the end.
LONGEST = ("test_channel", "test_hosts", "test_examples", "test_man", "test_limits", "test_units",
           "test_readme", "test_commands", "test_service_life", "test_reload", "test_server",
           "test_billets", "test_services", "test_operate", "test_activation", "test_fuzz")


def pytest_collection_modifyitems(items):
    """Begin with the modules that are LONGEST."""
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


def installed(script, scheduled=None):
    """Return the words that run KAPOW or KAPOWCTL as the command does that pip would install.

    Python compiles a script at each start, which takes longer than the rest of
    the start, but not a module. With `scheduled`, by default if there is a seed for
    schedule.py in the environment, that disturbs KAPOW.
    """
    if scheduled is None:
        scheduled = schedule.SEED in os.environ
    prepare = ""
    if scheduled and script == KAPOW:
        prepare = f"sys.path[0] = {str(ROOT / 'test')!r}; import schedule; schedule.install(); "
    return [sys.executable, "-c", f"import sys; {prepare}sys.path[0] = {str(ROOT)!r}; "
                                  f"import {script.stem}; sys.exit({script.stem}.main())"]


def wait_until(condition, what):
    """Wait until `condition()` is true and return its value; fail after DEADLINE.

    `what` is text that says what did not come, or a function that returns it.
    """
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    pytest.fail(f"it did not come: {what() if callable(what) else what}")


def processes_with(marker):
    """Return the pids of living processes in whose environment bytes `marker` stands."""
    return [int(entry) for entry in os.listdir("/proc")
            if entry.isdigit() and marker in read_environment(entry)]


def read_environment(pid):
    """Return the environment of a process as bytes, empty when it is dead, a zombie too.

    Every check after a test reads those of all processes: hence the plain calls.
    """
    try:
        with open(f"/proc/{pid}/environ", "rb", buffering=0) as file:
            return file.read()
    except OSError:
        return b""


def write_starter(path, preparation="", command=(sys.executable, str(KAPOW))):
    """Write a Python script that runs `preparation` and becomes `command`; return its path."""
    path.write_text(f"import os, resource, signal, sys\n{preparation}\n"
                    f"os.execv({command[0]!r}, {list(command)!r} + sys.argv[1:])\n")
    return path


class Reply:
    """A response: `status` int, `reason` str, `headers` http.client.HTTPMessage, `body` bytes."""

    def __init__(self, response):
        self.status, self.reason = response.status, response.reason
        self.headers = response.headers
        self.body = response.read()

    def json(self):
        return json.loads(self.body)


class Server:
    """A `kapow server` in a process of its own, its log read as it comes."""

    def __init__(self, directory, *arguments, init=(), environment=None, script=None,
                 python=sys.executable, wait=True, access_log=subprocess.PIPE, cwd=None, pass_fds=(),
                 seed=None):
        """With another `access_log` than a pipe, as for Popen, `access` stays empty.

        `script` is what `python` runs, kapow as it is installed() if it is None, with
        its threads disturbed as schedule.py does it with `seed`, if that is given.
        `cwd` is the server's current directory, `directory` if it is None.
        """
        seed = os.environ.get(schedule.SEED) if seed is None else str(seed)
        self.directory = directory
        self.tmp = directory / "tmp"
        self.tmp.mkdir()
        self.runtime = directory / "runtime"    # where it leaves what kapowctl finds it by
        self.runtime.mkdir(mode=0o700)
        self.marker = uuid.uuid4().hex
        self.dump = directory / "init-environment"
        self.log, self.access = [], []
        self._checked = 0           # lines of the log that check_idle() has seen
        self._news = threading.Condition()
        clean = {name: value for name, value in os.environ.items() if not name.startswith("KAPOW_")}
        self.environment = {**clean, "TMPDIR": str(self.tmp), "KAPOW_TEST": self.marker,
                            "XDG_RUNTIME_DIR": str(self.runtime), **(environment or {})}
        if seed is not None:
            self.environment[schedule.SEED] = seed
        # Listed last, so that a test may give another address.
        addresses = [part for name in ("--bind", "--control-bind", "--data-bind")
                     if name not in arguments for part in (name, "127.0.0.1:0")]
        programs = [str(program) for program in init]
        if wait:
            programs.append(str(self._write_dumper()))
        self.process = subprocess.Popen(
            [python, "-u", *([str(script)] if script else installed(KAPOW, seed is not None)[1:]), "server",
             *addresses, *map(str, arguments), *programs],
            env=self.environment, cwd=cwd or directory, stdin=subprocess.DEVNULL,
            stdout=access_log, stderr=subprocess.PIPE, pass_fds=pass_fds)
        streams = [(stream, lines) for stream, lines in (
            (self.process.stderr, self.log), (self.process.stdout, self.access)) if stream]
        self._reading = len(streams)        # that have not ended
        self._readers = [threading.Thread(target=self._read, args=pair, daemon=True) for pair in streams]
        for reader in self._readers:
            reader.start()
        if wait:
            try:
                self._wait_ready()
            except BaseException:
                self.stop()
                raise

    def _write_dumper(self):
        """Write the init program that hands its environment to the tests."""
        path = self.directory / "dump-environment"
        path.write_text(f"#!{sys.executable} -IS\nimport json, os\n"
                        f"with open({str(self.dump) + '.new'!r}, 'w') as file:\n"
                        "    json.dump(dict(os.environ), file)\n"
                        f"os.rename({str(self.dump) + '.new'!r}, {str(self.dump)!r})\n")
        path.chmod(0o755)
        return path

    def _read(self, stream, lines):
        for line in stream:
            with self._news:
                lines.append(line.decode("utf-8", "replace").rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._reading -= 1
            self._news.notify_all()

    def _wait_ready(self):
        self.wait_log("user interface: ")
        wait_until(lambda: self.dump.exists() or self.process.poll() is not None, "an init program")
        if not self.dump.exists():
            pytest.fail("the server ended: " + "\n".join(self.log))
        self.init_environment = json.loads(self.dump.read_text())
        self.session = self._control_session()
        if self.init_environment["KAPOW_CONTROL_URL"].endswith(f":{self.port('control')}"):
            self.services()         # on the connection that is kept, which belongs to an idle server
        self.idle = wait_until(self._settled, "the server being idle")

    def _settled(self):
        """Return (open files, threads) once no child is left, or only services that answer."""
        children = set(self.children())
        if children and not self._are_services(children):
            return None
        return self.usage()

    def services(self):
        """Return the services, as the control interface shows them."""
        return self.control("GET", "/services").json()

    def _are_services(self, children):
        return (children <= set(processes_with(b"KAPOW_SERVICE_SOCKET="))
                and all(service["state"] == "available" for service in self.services()))

    def remove_services(self):
        """Remove all services and all routes."""
        assert self.control("PUT", "/routes", []).status_code == 200
        for service in self.services():
            assert self.control("DELETE", f"/services/{service['name']}").status_code == 204

    def usage(self):
        """Return (number of open files that come and go, number of threads) of the server."""
        proc = pathlib.Path("/proc", str(self.process.pid))
        return len(self._own_files(proc / "fd")), len(os.listdir(proc / "task"))

    def _own_files(self, directory):
        """Return the open files, without the slots of the channel: they are kept for later."""
        files = []
        for entry in os.scandir(directory):
            with contextlib.suppress(OSError):
                opened = os.readlink(entry.path), entry.stat(follow_symlinks=False).st_mode & 0o600
                files.append(opened)
        slots = sum(1 for name, mode in files if name.startswith("pipe:") and mode == 0o600)
        return files[2 * slots:]

    def children(self):
        """Return the pids of processes that came of the server and live."""
        return [pid for pid in processes_with(self.marker.encode()) if pid != self.process.pid]

    def wait_log(self, pattern, lines=None):
        """Wait for a line of the log that has the regular expression; return its match."""
        lines = self.log if lines is None else lines

        def look():
            return next(filter(None, (re.search(pattern, line) for line in list(lines))), None)
        with self._news:
            self._news.wait_for(lambda: look() or self._reading == 0, DEADLINE)
        found = look()
        if not found:
            pytest.fail(f"no line with {pattern!r} in:\n" + "\n".join(lines + self.log))
        return found

    def wait_access(self, pattern):
        """As wait_log, in the access log."""
        return self.wait_log(pattern, self.access)

    def port(self, name):
        """Return the port of the interface `name`."""
        return int(self.wait_log(rf"{name} interface: \w+://.*:(\d+)$").group(1))

    # The user interface.

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port('user')}"

    def request(self, method, path, body=None, headers=None):
        """Make one request on a connection of its own; return the Reply."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port("user"), timeout=DEADLINE)
        try:
            connection.request(method, path, body, headers or {})
            return Reply(connection.getresponse())
        finally:
            connection.close()

    def get(self, path, **headers):
        return self.request("GET", path, headers=headers)

    def raw(self, data, name="user"):
        """Send bytes, return all that comes until the server closes."""
        with self.connect(name) as sock:
            sock.sendall(data)
            return read_all(sock)

    def connect(self, name="user"):
        """Return a socket connected to the interface `name`."""
        return socket.create_connection(("127.0.0.1", self.port(name)), timeout=DEADLINE)

    # The control interface.

    def _control_session(self):
        paths = []
        for name in CREDENTIALS:
            path = self.directory / name
            path.touch(mode=0o600)
            path.write_text(self.init_environment[name])
            paths.append(str(path))
        session = requests.Session()
        session.trust_env = False
        session.verify, session.cert = paths[0], tuple(paths[1:])
        session.mount("https://", requests.adapters.HTTPAdapter(pool_connections=1, pool_maxsize=1))
        return session

    def control(self, method, path, document=None, data=None):
        """Call the control interface; return requests' Response.

        One connection is kept, as a handshake for each call would be most of the
        work of many tests; calls at the same time have connections of their own.
        """
        if document is not None:
            data = json.dumps(document)
        return self.session.request(method, self.init_environment["KAPOW_CONTROL_URL"] + path,
                                    data=data, timeout=DEADLINE)

    def route(self, command="", method="GET", pattern=None, **more):
        """Add a route, at a fresh path unless `pattern` is given; return its path."""
        pattern = pattern or f"/{uuid.uuid4().hex}"
        answer = self.control("POST", "/routes", {"method": method, "url_pattern": pattern,
                                                  "command": command, **more})
        assert answer.status_code == 201, answer.text
        return pattern

    def ctl(self, *arguments, **options):
        """Run kapowctl with an init program's environment; return the CompletedProcess."""
        return subprocess.run([*installed(KAPOWCTL), *arguments],
                              env={**self.init_environment, **options.pop("environment", {})},
                              capture_output=True, timeout=DEADLINE, **options)

    # A handler that waits, its resources open to the test.

    @contextlib.contextmanager
    def handler(self, method="GET", target="", body=None, headers=None, pattern=None):
        """Give a Waiting handler for a with statement; its program exits at the end."""
        fifo = self.directory / uuid.uuid4().hex
        os.mkfifo(fifo)
        dump = pathlib.Path(f"{fifo}.id")
        path = self.route(f'echo "$KAPOW_HANDLER_ID" > {dump}.new; mv {dump}.new {dump}; '
                          f'read status < {fifo}; exit "$status"', method, pattern)
        waiting = Waiting(self, fifo, dump, path + target if pattern is None else target,
                          method, body, headers or {})
        try:
            yield waiting
        finally:
            waiting.finish()

    # The end.

    def stop(self, signum=signal.SIGTERM):
        """End the server; return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signum)
        status = self.process.wait(DEADLINE)
        for reader in self._readers:
            reader.join(DEADLINE)
        for stream in filter(None, (self.process.stdout, self.process.stderr)):
            stream.close()
        if hasattr(self, "session"):
            self.session.close()
        return status

    def check_idle(self):
        """Fail unless the server has come back to the files, threads and children it had idle."""
        # Fewer is no leak: it may have had a client when it was counted first.
        wait_until(lambda: not self.children() and self.usage() <= self.idle
                   and self.usage()[1] <= self.idle[1],
                   lambda: f"idle again: {self.usage()} is not {self.idle}, children {self.children()}")
        checked, self._checked = self._checked, len(self.log)
        assert not [line for line in self.log[checked:] if "Traceback" in line or "unexpected" in line]

    def check_gone(self):
        """Fail unless the server has left no process and no file."""
        wait_until(lambda: not processes_with(self.marker.encode()), "the end of all processes")
        assert list(self.tmp.iterdir()) == []
        assert not list(self.runtime.glob("kapow/control-*"))


class Waiting:
    """A request whose program waits: `id` is its handler's, `reply` comes at its end."""

    def __init__(self, server, fifo, dump, target, method, body, headers):
        self.server, self._fifo = server, fifo
        self.reply = self.error = None
        self._thread = threading.Thread(target=self._ask, args=(method, target, body, headers))
        self._thread.start()
        wait_until(lambda: dump.exists() or not self._thread.is_alive(), "the handler's start")
        self.id = dump.read_text().strip()

    def _ask(self, method, target, body, headers):
        try:
            self.reply = self.server.request(method, target, body, headers)
        except (OSError, http.client.HTTPException) as error:
            self.error = error

    def resource(self, method, path, value=None, headers=None):
        """Call the data interface; `path` is such as "/request/method"."""
        port = self.server.port("data")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
        try:
            connection.request(method, f"/handlers/{self.id}{path}", value, headers or {})
            return Reply(connection.getresponse())
        finally:
            connection.close()

    def get(self, path):
        return self.resource("GET", path)

    def put(self, path, value):
        return self.resource("PUT", path, value)

    def finish(self, status=0):
        """Let the program exit with `status`; return the Reply."""
        if self._fifo.exists():
            fd = os.open(self._fifo, os.O_RDWR)     # which waits for no reader
            os.write(fd, b"%d\n" % status)
            self._thread.join(DEADLINE)
            os.close(fd)
            self._fifo.unlink()
        assert not self._thread.is_alive()
        return self.reply


def read_all(sock):
    """Return what a socket receives until its end, or until it is reset."""
    pieces = []
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(65536):
            pieces.append(data)
    return b"".join(pieces)


@pytest.fixture(autouse=True, scope="session")
def runtime_directory(tmp_path_factory):
    """No test leaves a file for kapowctl where one of this machine's user finds it."""
    directory = tmp_path_factory.mktemp("runtime")
    directory.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(directory))
        yield
    assert not list(directory.glob("kapow/control-*"))


@pytest.fixture
def start_server(tmp_path):
    """A function that starts a Server; those still running are stopped, and looked after."""
    servers = []

    def start(*arguments, kind=Server, **options):
        directory = tmp_path / f"server-{len(servers)}"
        directory.mkdir()
        servers.append(kind(directory, *arguments, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
        server.check_gone()


@pytest.fixture(scope="module")
def module_server(tmp_path_factory):
    """One server for the tests of a module."""
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    assert server.stop() == 0
    server.check_gone()


@pytest.fixture
def server(module_server):
    """The module's server, with an empty route table; it must be idle again after the test."""
    assert module_server.control("PUT", "/routes", []).status_code == 200
    yield module_server
    module_server.check_idle()


@pytest.fixture(scope="session")
def lone_copy(tmp_path_factory):
    """A function that copies one script alone into an empty directory."""
    def copy(script):
        directory = tmp_path_factory.mktemp("alone")
        return pathlib.Path(shutil.copy(script, directory))
    return copy
