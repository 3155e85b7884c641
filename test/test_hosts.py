"""Two servers behind HAProxy, as examples/haproxy has them, restarted one after the other
under load by examples/haproxy/rolling-restart: no request fails.
"""

import contextlib
import csv
import http.client
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import threading

import pytest

from conftest import DEADLINE, ROOT, Server, wait_until
from test_examples import client_environment

EXAMPLE = ROOT / "examples" / "haproxy"
NAMES = ("one", "two")      # of the servers in haproxy.cfg
ROUNDS = 10                 # each restarts every server
INTERVAL = "50ms"           # between HAProxy's checks; what the example has would take longer
PAUSE = 0.05                # seconds between requests of a client: load, and no flood

ROUTES = [
    {"method": "GET", "url_pattern": "/word", "command": "kapow set /response/body word"},
    {"method": "POST", "url_pattern": "/echo",
     "command": "kapow get /request/body | kapow set /response/body"},
    {"method": "GET", "url_pattern": "/slow",
     "command": "sleep 0.2; kapow set /response/body slow"},
]

needs_haproxy = pytest.mark.skipif(not shutil.which("haproxy"), reason="haproxy is not installed")


def hold_port():
    """Return a socket that keeps a free port of the loopback for one who restarts there.

    It does not listen, and so is in nobody's way who sets SO_REUSEADDR.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
    sock.bind(("127.0.0.1", 0))
    return sock


def address(sock):
    return "{}:{}".format(*sock.getsockname())


class Host:
    """A server that is started anew at the same addresses, sockets of hold_port()."""

    def __init__(self, directory):
        self._directory = directory
        self._directory.mkdir()
        self.user, self.status = hold_port(), hold_port()
        self._init = directory / "init"
        self._init.write_text("#!/bin/sh\n")
        self._init.chmod(0o755)
        (directory / "routes").write_text(json.dumps(ROUTES))
        self.starts = 0
        self.start()

    def start(self):
        place = self._directory / str(self.starts)
        place.mkdir()
        self.starts += 1
        self.server = Server(place, "--bind", address(self.user), "--status-bind", address(self.status),
                             "--routes", self._directory / "routes", init=[self._init], wait=False,
                             access_log=subprocess.DEVNULL)

    def restart(self):
        assert self.server.stop() == 0
        assert not [line for line in self.server.log if "Traceback" in line]
        self.server.check_gone()
        self.start()

    def close(self):
        self.server.stop()
        self.user.close()
        self.status.close()


class Operator(http.server.ThreadingHTTPServer):
    """Who restarts hosts when rolling-restart says so: POST /PORT, that of the status."""

    def __init__(self, hosts):
        self.hosts = {host.status.getsockname()[1]: host for host in hosts}
        super().__init__(("127.0.0.1", 0), OperatorConversation)
        self._thread = threading.Thread(target=self.serve_forever)
        self._thread.start()

    @property
    def command(self):
        """What -c of rolling-restart is to be."""
        return f'curl -fsS --noproxy "*" -X POST "http://127.0.0.1:{self.server_port}/$2"'

    def close(self):
        self.shutdown()
        self._thread.join()
        self.server_close()


class OperatorConversation(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        try:
            self.server.hosts[int(self.path[1:])].restart()
            self.send_response(204)
        except BaseException as error:
            self.send_response(500, repr(error).encode("ascii", "replace").decode())
            raise
        finally:
            self.end_headers()

    def log_message(self, *args):
        pass


def make_configuration(hosts, users, stats):
    """Return the example's text with other addresses, a log that can be read, and quicker checks.

    `users` and `stats` are the descriptors of listening sockets.
    """
    text = (EXAMPLE / "haproxy.cfg").read_text()

    def change(pattern, new):
        nonlocal text
        text, count = re.subn(rf"(?m)^(\s*){pattern}$", rf"\g<1>{new}", text)
        assert count == 1, pattern
    change("bind :80", f"bind fd@{users}")
    change("bind 127.0.0.1:8404", f"bind fd@{stats}")
    change("log /dev/log local0", "log stdout format raw local0")
    change("user haproxy", "")
    change("group haproxy", "")
    change("default-server check port 8083 inter 500ms fall 1 rise 1",
           f"default-server check inter {INTERVAL} fall 1 rise 1")
    for name, host in zip(NAMES, hosts):
        change(rf"server {name} \S+",
               f"server {name} {address(host.user)} port {host.status.getsockname()[1]}")
    return text


class Balancer:
    """HAProxy with a configuration: `log` is the file of what it says."""

    def __init__(self, directory, hosts, configure=lambda text: text):
        """`configure(text)` returns another text of its configuration."""
        self._users, self._stats = (socket.create_server(("127.0.0.1", 0), backlog=1024)
                                    for _ in range(2))
        fds = self._users.fileno(), self._stats.fileno()
        path = directory / "haproxy.cfg"
        path.write_text(configure(make_configuration(hosts, *fds)))
        self.log = directory / "haproxy.log"
        with open(self.log, "w") as log:
            self._process = subprocess.Popen(["haproxy", "-db", "-f", str(path)], pass_fds=fds,
                                             stdin=subprocess.DEVNULL, stdout=log,
                                             stderr=subprocess.STDOUT)

    @property
    def port(self):
        return self._users.getsockname()[1]

    @property
    def stats_url(self):
        return f"http://{address(self._stats)}/stats"

    def servers(self):
        """Return what it says of the servers, {name: {column: text}}."""
        assert self._process.poll() is None, self.log.read_text()
        connection = http.client.HTTPConnection(*self._stats.getsockname(), timeout=DEADLINE)
        with contextlib.closing(connection):
            connection.request("GET", "/stats;csv")
            lines = connection.getresponse().read().decode().lstrip("# ").splitlines()
        return {row["svname"]: row for row in csv.DictReader(lines)
                if row["svname"] not in ("FRONTEND", "BACKEND")}

    def wait_up(self):
        wait_until(lambda: all(server["status"] == "UP" for server in self.servers().values()),
                   "all servers being up")

    def close(self):
        self._process.terminate()
        self._process.wait(DEADLINE)
        self._users.close()
        self._stats.close()


class Client(threading.Thread):
    """Makes one request after the other until stop(): `done` of them, `failures` a list of str."""

    def __init__(self, port, path, keep_alive, pause=PAUSE, answer=None):
        """`answer` is the body that is expected, by default what ROUTES lead to."""
        super().__init__(name=f"{path} {'kept' if keep_alive else 'alone'}")
        self._port, self._path, self._keep_alive, self._pause = port, path, keep_alive, pause
        self._answer = answer or path[1:].encode()
        self._ended = threading.Event()
        self.done, self.failures = 0, []
        self.start()

    def run(self):
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=DEADLINE)
        while not self._ended.wait(self._pause):
            try:
                wrong = self._ask(connection)
            except (OSError, http.client.HTTPException) as error:
                wrong = repr(error)
                connection.close()
            if wrong:
                self.failures.append(f"{self.name}, request {self.done}: {wrong}")
            self.done += 1
        connection.close()

    def _ask(self, connection):
        """Make one request; return what is wrong with its answer, if anything is."""
        if self._path == "/echo":
            method, body = "POST", str(self.done).encode()
        else:
            method, body = "GET", None
        connection.request(method, self._path, body,
                           {} if self._keep_alive else {"Connection": "close"})
        response = connection.getresponse()
        found = response.status, response.read()
        return None if found == (200, body or self._answer) else repr(found)

    def stop(self):
        self._ended.set()
        self.join(DEADLINE)
        assert not self.is_alive()


def is_ready(host):
    """Tell whether /readyz of a Host says so."""
    connection = http.client.HTTPConnection(*host.status.getsockname(), timeout=DEADLINE)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    return False


class Site:
    """Two hosts behind a balancer, to be closed."""

    def __init__(self, directory, configure=lambda text: text):
        self._directory = directory
        with contextlib.ExitStack() as stack:
            self.hosts = []
            # Closed last, as the servers wait for it to have seen that they end.
            closing = stack.enter_context(contextlib.ExitStack())
            for name in NAMES:
                self.hosts.append(Host(directory / name))
                stack.callback(self.hosts[-1].close)
            # Or the balancer would see one that starts as one that ends.
            wait_until(lambda: all(map(is_ready, self.hosts)), "all servers being ready")
            self.balancer = Balancer(directory, self.hosts, configure)
            closing.callback(self.balancer.close)
            self._operator = Operator(self.hosts)
            stack.callback(self._operator.close)
            self.balancer.wait_up()
            self._stack = stack.pop_all()

    def roll(self, rounds, *options):
        """Restart every host, `rounds` times, with rolling-restart; return the CompletedProcess."""
        return subprocess.run(
            ["sh", EXAMPLE / "rolling-restart", "-b", self.balancer.stats_url,
             "-c", self._operator.command, *options,
             *rounds * [address(host.status) for host in self.hosts]],
            env=client_environment(self._directory), stdin=subprocess.DEVNULL, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=rounds * DEADLINE)

    def close(self):
        self._stack.close()


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path)
    yield made
    made.close()


@needs_haproxy
def test_rolling_restart_loses_no_request(site):
    """Kept and new connections, GET and POST, short handlers and long ones."""
    port = site.balancer.port
    clients = [Client(port, path, kept) for path in ("/word", "/echo") for kept in (True, False)]
    clients.append(Client(port, "/slow", True))
    try:
        done = site.roll(ROUNDS)
    finally:
        for client in clients:
            client.stop()
    said = site.balancer.log.read_text()
    assert done.returncode == 0, done.stdout
    assert [failure for client in clients for failure in client.failures] == [], said[-20000:]
    assert all(client.done > ROUNDS for client in clients)
    assert [host.starts for host in site.hosts] == [1 + ROUNDS, 1 + ROUNDS]
    # The balancer knew of each end before it came.
    assert len(re.findall(r"(?m)^Server kapow/.* is DOWN, reason: Layer7 wrong status, code: 503",
                          said)) == 2 * ROUNDS
    assert all(int(server["wretr"]) == 0 for server in site.balancer.servers().values())


@needs_haproxy
def test_rolling_restart_stops_at_the_first_that_is_not_well(site):
    """The other servers stay as they are."""
    one, two = site.hosts
    one._init.write_text("#!/bin/sh\nexec sleep 600\n")         # never ready
    site.balancer.wait_up()
    done = site.roll(1, "-t", "3")
    assert (done.returncode, one.starts, two.starts) == (1, 2, 1)
    assert done.stdout == (
        f"{address(one.status)} restarts\nrolling-restart: after 3 s {address(one.status)} is not "
        "ready; nothing more is restarted\n")
    # It does not begin where one is down, nor go on where one cannot be restarted.
    done = site.roll(1, "-t", "1")
    assert (done.returncode, one.starts, two.starts) == (1, 2, 1)
    assert "after 1 s not all servers are up for HAProxy" in done.stdout
    one._init.write_text("#!/bin/sh\n")
    one.restart()
    site.balancer.wait_up()
    done = site.roll(1, "-c", "echo \"$1 $2\"; false")
    assert (done.returncode, one.starts, two.starts) == (1, 3, 1)
    host, port = one.status.getsockname()
    assert f"\n{host} {port}\nrolling-restart: {address(one.status)} could not" in done.stdout


@pytest.mark.parametrize("arguments", [(), ("-x", "host:1"), ("-t",), ("host:1", "host"), (":1",)])
def test_rolling_restart_usage(arguments):
    done = subprocess.run(["sh", EXAMPLE / "rolling-restart", *arguments], timeout=DEADLINE,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("usage: rolling-restart [-b URL] [-c COMMAND] [-t SECONDS] "
                                "HOST:PORT...\n")


@needs_haproxy
def test_configuration_is_valid(tmp_path):
    """HAProxy takes the example as it is, but for the user that its Debian package makes."""
    text = re.sub(r"(?m)^ +(user|group) haproxy$", "", (EXAMPLE / "haproxy.cfg").read_text())
    (tmp_path / "haproxy.cfg").write_text(text)
    done = subprocess.run(["haproxy", "-c", "-f", tmp_path / "haproxy.cfg"], timeout=DEADLINE,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0 and not re.search("WARNING|ALERT", done.stdout), done.stdout


SCRIPTS = [ROOT / "examples" / name for name in
           ("haproxy/rolling-restart", "systemd/routes", "container/routes")]


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_scripts_are_clean():
    # SC2016: the $1 of -c is for the shell that runs it.
    done = subprocess.run(["shellcheck", "-e", "SC2016", *SCRIPTS], timeout=DEADLINE,
                          stdout=subprocess.PIPE)
    assert done.stdout == b""
    assert all(os.access(path, os.X_OK) for path in SCRIPTS)
