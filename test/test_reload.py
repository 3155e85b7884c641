"""SIGHUP: all is set up anew and takes the old one's place in one step, or all stays as it was."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import sys
import threading

import pytest

from conftest import DEADLINE, Server, wait_until
from operating import BusyServer, dump_json, read_response, script, trusting, write_pair
from services import add, wait_state
from test_activation import handing_over, tcp

# Posts documents to the control interface: `post /routes JSON`, in a fifth of kapow's time.
POST = r"""
import http.client, os, ssl, sys, tempfile, urllib.parse

context = ssl.create_default_context(cadata=os.environ["KAPOW_CONTROL_SERVER_CERT"])
with tempfile.NamedTemporaryFile("w") as file:
    file.write(os.environ["KAPOW_CONTROL_CLIENT_CERT"] + os.environ["KAPOW_CONTROL_CLIENT_KEY"])
    file.flush()
    context.load_cert_chain(file.name)
url = urllib.parse.urlsplit(os.environ["KAPOW_CONTROL_URL"])
connection = http.client.HTTPSConnection(url.hostname, url.port, context=context)
for path, document in zip(sys.argv[1::2], sys.argv[2::2]):
    connection.request("POST", url.path + path, document)
    answer = connection.getresponse()
    answer.read()
    if answer.status != 201:
        sys.exit(1)
"""


def post(*calls):
    """Return the command of a shell that posts documents; `calls` are (path, document)."""
    words = [word for path, document in calls for word in (path, json.dumps(document))]
    return shlex.join([sys.executable, "-I", "-S", "-c", POST, *words])


def route(pattern, **more):
    return {"method": "GET", "url_pattern": pattern, **more}


def put(pattern, text=None, **more):
    """Return the command that adds a route, which answers `text`."""
    command = "" if text is None else f"kapow set /response/body {text}"
    return post(("/routes", route(pattern, command=command, **more)))


RELOADS = r" INFO the server reloads$"
RELOADED = r" INFO the server has reloaded$"
KEPT = r" ERROR the server did not reload, and all is as it was: (.*)$"


class ReloadServer(Server):
    """A Server with a file of routes and two init programs that a test can rewrite."""

    def __init__(self, directory, *arguments, **options):
        self.files = directory
        self.routes_file = dump_json(directory / "routes.json", [])
        self.programs = [script(directory / name, ":") for name in ("first", "second")]
        super().__init__(directory, "--routes", self.routes_file, *arguments,
                         init=self.programs, **options)

    def say(self, first=":", second=":", routes=()):
        """Say what the next reload is to find."""
        for path, text in zip(self.programs, (first, second)):
            script(path, text)
        dump_json(self.routes_file, list(routes))

    def hang_up(self):
        self.process.send_signal(signal.SIGHUP)

    def count(self, pattern):
        """Return how many lines of the log have the regular expression."""
        return sum(1 for line in list(self.log) if re.search(pattern, line))

    def wait_count(self, pattern, count):
        wait_until(lambda: self.count(pattern) >= count, f"{count} lines with {pattern!r}")

    def reload(self, *said, **more):
        """Reload; return why it failed, or None."""
        if said or more:
            self.say(*said, **more)
        seen = len(self.log)
        self.hang_up()

        def look():
            return next((line for line in self.log[seen:] if re.search(f"{RELOADED}|{KEPT}", line)),
                        None)
        failure = re.search(KEPT, wait_until(look, "the end of the reload"))
        return failure.group(1) if failure else None

    def patterns(self):
        return [route["url_pattern"] for route in self.control("GET", "/routes").json()]

    def variables(self):
        """Return the environment of the init programs of the last reload."""
        return json.loads(self.dump.read_text())


@pytest.fixture(scope="module")
def module_server(tmp_path_factory):
    server = ReloadServer(tmp_path_factory.mktemp("server"))
    yield server
    assert server.stop() == 0
    server.check_gone()


@pytest.fixture
def server(module_server):
    """The module's server, after a reload that leaves it empty; it is idle after the test."""
    assert module_server.reload(first=":") is None
    assert (module_server.patterns(), module_server.services()) == ([], [])
    yield module_server
    module_server.say()
    if module_server.services():
        assert module_server.reload() is None
    module_server.check_idle()


@contextlib.contextmanager
def at_a_barrier(server, before=":", after=":"):
    """Reload with a first init program that waits, until the with statement has ended."""
    barrier = server.files / f"barrier-{server.count(RELOADS)}"
    os.mkfifo(barrier)
    server.say(f"{before}\n: > {barrier}.here\nread line < {barrier}\n{after}")
    ends = server.count(RELOADED)
    server.hang_up()
    wait_until((server.files / f"{barrier.name}.here").exists, "the init program")
    yield
    barrier.write_text("\n")
    server.wait_count(RELOADED, ends + 1)


# What a good one does.

def test_the_new_table_is_what_was_said(server):
    server.route(pattern="/by-hand")
    assert server.reload("kapow route add /a -c 'kapow set /response/body a'",
                         routes=[route("/b"), route("/c")]) is None
    assert server.patterns() == ["/b", "/c", "/a"]
    assert (server.get("/a").body, server.get("/by-hand").status) == (b"a", 404)
    server.route(pattern="/by-hand")
    server.route(pattern="/more")
    assert server.reload(put("/d")) is None
    assert server.patterns() == ["/d"]


def test_urls_of_a_reload(server):
    plain = server.init_environment["KAPOW_CONTROL_URL"]
    server.reload("kapow route add '/url' -c 'kapow set /response/body \"$KAPOW_CONTROL_URL\"'")
    variables = server.variables()
    assert variables["KAPOW_CONTROL_URL"] == variables["KAPOW_CONTROLAPI_URL"]
    assert re.fullmatch(re.escape(plain) + "/reloads/[0-9a-f-]{36}", variables["KAPOW_CONTROL_URL"])
    others = {name for name in variables if variables[name] != server.init_environment.get(name)}
    assert others <= {"KAPOW_CONTROL_URL", "KAPOW_CONTROLAPI_URL", "_", "SHLVL"}
    assert server.get("/url").body.decode() == plain


def test_paths_of_reloads(server):
    """The last one's is valid until another takes its place; no other is."""
    def status(path):
        return server.control("GET", path + "/routes").status_code

    def reload_path(*said):
        server.reload(*said)
        return "/reloads/" + server.variables()["KAPOW_CONTROL_URL"].rpartition("/")[2]
    first = reload_path(put("/a"))
    assert [item["url_pattern"] for item in server.control("GET", first + "/routes").json()] == ["/a"]
    assert server.control("POST", first + "/routes", route("/late")).status_code == 201
    assert server.patterns() == ["/a", "/late"]
    # The second program has run to its end, the first one has failed then.
    failed = reload_path(f"while ! [ -e {server.files}/go ]; do sleep 0.01; done; exit 1",
                         f": > {server.files}/go")
    os.unlink(server.files / "go")
    second = reload_path(":")
    assert (status(first), status(second)) == (404, 200)
    for path in (failed, "/reloads/x", "/reloads/", "/reloads", second + "x"):
        answer = server.control("GET", path + "/routes")
        assert (answer.status_code, answer.json()) == (404, {"reason": "Not Found"}), path
    assert server.control("GET", second).status_code == 404
    assert server.patterns() == []


def test_meanwhile_the_old_table_is_in_force(server):
    server.reload(put("/old", "old"))
    with at_a_barrier(server, put("/new", "new")):
        assert (server.get("/old").body, server.get("/new").status) == (b"old", 404)
        assert server.patterns() == ["/old"]
        server.route("kapow set /response/body hand", pattern="/by-hand")
        assert server.get("/by-hand").body == b"hand"
        [shown] = [item["id"] for item in server.control("GET", "/routes").json()
                   if item["url_pattern"] == "/old"]
        assert server.control("DELETE", f"/routes/{shown}").status_code == 204
        assert server.get("/old").status == 404
    assert server.patterns() == ["/new"]
    assert server.get("/new").body == b"new"


def test_nobody_sees_half_a_table(server):
    """A route of both tables always answers, and the table is always one of the two."""
    def tables(version):
        return (put("/second", version),
                [route("/both", command=f"kapow set /response/body {version}")])
    stop, bodies, seen, failures = threading.Event(), [], [], []

    def watch(look):
        while not stop.is_set():
            try:
                look()
            except Exception as error:          # is shown by the test itself
                failures.append(error)
                return

    def ask():
        reply = server.get("/both")
        bodies.append((reply.status, reply.body))

    def list_routes():
        seen.append(tuple(item["command"][-1] for item in server.control("GET", "/routes").json()))
    first, routes = tables(0)
    assert server.reload(first, routes=routes) is None
    threads = [threading.Thread(target=watch, args=(look,)) for look in (ask, ask, list_routes)]
    for thread in threads:
        thread.start()
    try:
        for version in (1, 2, 3):
            wait_until(lambda: failures or (bodies and seen), "an answer of each")
            first, routes = tables(version)
            assert server.reload(first, routes=routes) is None
    finally:
        stop.set()
        for thread in threads:
            thread.join(DEADLINE)
    assert not failures
    assert set(bodies) <= {(200, b"%d" % version) for version in range(4)}
    assert set(seen) <= {(str(version),) * 2 for version in range(4)}
    assert server.get("/both").body == b"3"


def test_running_handlers_keep_their_route(server):
    with server.handler(pattern="/{name}", target="/x") as handler:
        before = handler.get("/route/id").body
        assert server.reload(":") is None
        assert server.patterns() == []
        assert (handler.get("/route/id").body, handler.get("/request/matches/name").body) == (
            before, b"x")
        [listed] = server.control("GET", "/handlers").json()
        assert listed["route_id"] == before.decode()
        handler.put("/response/body", b"old")
        assert handler.finish().body == b"old"


def test_one_more_after_a_signal_meanwhile(server):
    before = server.count(RELOADS)
    with at_a_barrier(server):
        for _ in range(3):
            server.hang_up()
            # It has come when a signal that is sent later has.
            server.control("GET", "/routes")
        server.say(put("/more"))
    wait_until(lambda: server.count(RELOADS) >= before + 2, "one more")
    wait_until(lambda: server.patterns() == ["/more"], "its end")
    assert server.reload() is None
    assert server.count(RELOADS) == before + 3


# What a bad one does.

def check_kept(server, *words):
    """Fail unless a reload fails for a reason that has the words, and nothing has changed."""
    before = server.control("GET", "/routes").json()
    services = server.services()
    failure = server.reload()
    assert failure is not None and all(word in failure for word in words), failure
    assert server.control("GET", "/routes").json() == before
    assert server.services() == services
    assert server.get("/stays").body == b"stays"


@pytest.fixture
def settled(server):
    """The server with a route of its init program and one that was added by hand."""
    assert server.reload(put("/stays", "stays")) is None
    server.route(pattern="/by-hand")
    return server


@pytest.mark.parametrize("text, words", [
    (f"{put('/new')} && exit 3", ["/first", "3"]),
    (f"{put('/new')} && kill -KILL $$", ["/first", "SIGKILL"]),
    (put("no-slash"), ["/first", "1"]),
    (put("/new", service="none"), ["/first", "1"]),
])
def test_init_program_fails(settled, text, words):
    settled.say(text)
    check_kept(settled, *words)


@pytest.mark.parametrize("text, words", [
    ("{", ["routes.json", "Malformed JSON"]), ("{}", ["routes.json", "array"]),
    ('[{"method": "GET", "url_pattern": "/a"}, {"method": "GET", "url_pattern": "/{"}]',
     ["routes.json", "item 1"]), (None, ["routes.json", "No such file"]),
])
def test_routes_file_is_bad(settled, text, words):
    settled.say()
    if text is None:
        settled.routes_file.unlink()
    else:
        settled.routes_file.write_text(text)
    check_kept(settled, *words)


def test_init_program_cannot_be_started(settled):
    settled.say()
    settled.programs[1].unlink()
    check_kept(settled, "second")
    settled.programs[1].write_text("#!/no/such/interpreter\n")
    settled.programs[1].chmod(0o755)
    check_kept(settled, "second")
    settled.programs[1].chmod(0o644)
    check_kept(settled, "second")
    assert not settled.children()


def test_others_end_when_one_fails(settled):
    """With SIGTERM; the reload does not wait for one that would never end."""
    mark = settled.files / "mark"
    settled.say(f"trap 'kill $!; echo TERM > {mark}; exit' TERM; sleep 1000 & : > {mark}.here; wait",
                f"while ! [ -e {mark}.here ]; do sleep 0.01; done; exit 1")
    check_kept(settled, "second")
    assert mark.read_text() == "TERM\n"
    assert not settled.children()


def test_a_good_one_after_a_bad_one(settled):
    settled.say("exit 1")
    check_kept(settled)
    assert settled.reload(put("/good")) is None
    assert settled.patterns() == ["/good"]


def test_first_programs_that_still_run(start_server, tmp_path):
    """A reload waits until they have ended: what they still add is not added a second time."""
    first = script(tmp_path / "slow", f"if mkdir {tmp_path}/once; then\n"
                   f"    while ! [ -e {tmp_path}/go ]; do sleep 0.01; done\nfi\n{put('/only')}")
    server = start_server(init=[first], kind=BusyServer)
    wait_until((tmp_path / "once").exists, "the init program")
    server.process.send_signal(signal.SIGHUP)
    (tmp_path / "go").touch()
    server.wait_log(f"{RELOADED}|{KEPT}")
    wait_until(lambda: not server.children(), "the end of all programs")
    listed = server.control("GET", "/routes").json()
    assert [item["url_pattern"] for item in listed] == ["/only"]


def test_stop_during_a_reload(start_server):
    server = start_server(kind=ReloadServer)
    server.say("exec sleep 1000")
    server.hang_up()
    wait_until(server.children, "the init program")
    with server.handler() as handler:
        server.process.send_signal(signal.SIGTERM)
        assert handler.finish().status == 200
    assert server.stop() == 0
    server.check_gone()


# Where things come from.

def test_url_that_was_in_the_environment(start_server, tmp_path):
    """It is kept, and the reload's path stands behind it, whether it ends in a slash or not."""
    for number, end in enumerate(("", "/")):
        directory = tmp_path / str(number)
        directory.mkdir()
        with tcp() as given:
            url = f"https://127.0.0.1:{given.getsockname()[1]}{end}"
            server = start_server(kind=ReloadServer, environment={"KAPOW_CONTROL_URL": url},
                                  **handing_over(directory, [given], "control"))
            assert server.init_environment["KAPOW_CONTROL_URL"] == url
            assert server.reload(put("/new")) is None
            assert server.variables()["KAPOW_CONTROL_URL"].startswith(url.rstrip("/") + "/reloads/")
            assert server.ctl("route", "list").stdout.count(b'"/new"') == 1


def tls_connect(server, cert):
    sock = socket.create_connection(("127.0.0.1", server.port("user")), timeout=DEADLINE)
    return trusting(cert).wrap_socket(sock, server_hostname="127.0.0.1")


def ask(sock, file, path):
    sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
    return read_response(file)


def test_certificates(start_server, tmp_path):
    files = write_pair(tmp_path)
    other = write_pair(tmp_path, "other")
    old = tmp_path / "old.crt"
    old.write_text(files[0].read_text())
    server = start_server("--certfile", files[0], "--keyfile", files[1], kind=ReloadServer)
    with tls_connect(server, old) as first, first.makefile("rb") as file:
        assert ask(first, file, "/none").status == 404
        # One that does not fit its key, and ones that are none.
        files[0].write_text(other[0].read_text())
        assert server.reload()
        files[0].write_text("nonsense")
        assert server.reload()
        files[0].unlink()
        assert server.reload()
        tls_connect(server, old).close()
        for path, source in zip(files, other):
            path.write_text(source.read_text())
        # A program that fails keeps the old certificate too.
        assert "first" in server.reload("exit 1")
        tls_connect(server, old).close()
        assert server.reload(put("/new")) is None
        tls_connect(server, other[0]).close()
        with pytest.raises(OSError):
            tls_connect(server, old)
        # Who was there goes on, and sees the new table.
        assert ask(first, file, "/new").status == 200


def test_log_file_is_opened_anew(start_server, tmp_path):
    log, moved = tmp_path / "log", tmp_path / "log.1"
    init = script(tmp_path / "init", "echo once >&2")
    server = start_server("--log-file", log, wait=False, init=[init])
    try:
        port = int(wait_until(lambda: log.exists() and re.search(
            r"user interface: http://.*:(\d+)\n", log.read_text()), "its start").group(1))
        wait_until(lambda: "once" in log.read_text(), "the init program")
        log.rename(moved)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: log.exists() and "the server has reloaded" in log.read_text(), "the reload")
        assert "once" in log.read_text()
        with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as sock:
            sock.sendall(b"GET /none HTTP/1.0\r\n\r\n")
            wait_until(lambda: '"GET /none HTTP/1.0" 404' in log.read_text(), "the access log")
        assert "/none" not in moved.read_text()
        # It cannot be opened: the old one goes on.
        log.rename(tmp_path / "log.2")
        log.mkdir()
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "did not reload" in (tmp_path / "log.2").read_text(), "the refusal")
    finally:
        assert server.stop() == 0
    assert "Traceback" not in moved.read_text()


# Services.

SERVICE = r"""
import http.server, json, os, socketserver, sys

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        if self.path == "/_kapow/manifest":
            body = json.dumps({"name": "s", "version": "1", "routes": [
                {"method": "GET", "url_pattern": sys.argv[2], "handler": "h"}]}).encode()
        else:
            body = f"{sys.argv[1]} {os.getpid()}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

Server(os.environ["KAPOW_SERVICE_SOCKET"], Handler).serve_forever()
"""


@pytest.fixture
def command(server):
    """A function that returns the command of a service, as words for a shell."""
    (server.files / "service.py").write_text(SERVICE)

    def make(body, pattern="/manifest"):
        return [sys.executable, "-I", "-S", f"{server.files}/service.py", body, pattern]
    return make


SERVED = ("/routes", route("/s", service="s"))


def service(command, name="s"):
    """Return the call that adds a service, with the routes of its manifest."""
    return "/services", {"name": name, "routes": name == "s", "command": command}


def alive(pid):
    return os.path.exists(f"/proc/{pid}")


def test_service_that_is_kept(server, command):
    said = post(service(command("a")), SERVED)
    assert server.reload(said) is None
    before = wait_state(server, "s")
    wait_until(lambda: "/manifest" in server.patterns(), "the manifest's routes")
    assert server.reload(said) is None
    assert server.services() == [before]
    # The routes of its manifest are in the new table from its first moment.
    assert sorted(server.patterns()) == ["/manifest", "/s"]
    assert server.get("/s").body == server.get("/manifest").body == b"a %d" % before["pid"]


def test_service_that_is_changed(server, command):
    """The new one answers before the table is in force; nobody sees a 503."""
    assert server.reload(post(service(command("a", "/one")), SERVED)) is None
    before = wait_state(server, "s")["pid"]
    stop, replies = threading.Event(), []

    def ask_on():
        while not stop.is_set():
            reply = server.get("/s")
            replies.append((reply.status, reply.body[:1]))
    thread = threading.Thread(target=ask_on)
    thread.start()
    try:
        wait_until(lambda: replies, "an answer")
        assert server.reload(post(service(command("b", "/two")), SERVED)) is None
        assert server.services()[0]["state"] == "available"
        wait_until(lambda: not alive(before), "the old one's end")
        wait_until(lambda: replies[-1] == (200, b"b"), "an answer of the new one")
    finally:
        stop.set()
        thread.join(DEADLINE)
    assert set(replies) == {(200, b"a"), (200, b"b")}
    assert sorted(server.patterns()) == ["/s", "/two"]


def test_service_that_is_dropped(server, command):
    assert server.reload(post(service(command("a")))) is None
    before = wait_state(server, "s")["pid"]
    assert server.reload(":") is None
    assert (server.services(), server.patterns()) == ([], [])
    wait_until(lambda: not alive(before), "its end")


def test_service_that_a_route_names(server, command):
    """One of the operator's goes on if a route of the new table needs it."""
    add(server, "s", *command("a"))
    before = wait_state(server, "s")
    assert server.reload(routes=[route("/s", service="s")]) is None
    assert server.services() == [before]
    assert server.get("/s").body == b"a %d" % before["pid"]


def test_service_in_a_reload_that_fails(server, command):
    said = post(service(command("a", "/one")), SERVED)
    assert server.reload(said) is None
    before = wait_state(server, "s")
    wait_until(lambda: "/one" in server.patterns(), "the manifest's routes")
    listed = server.control("GET", "/routes").json()
    assert server.reload(post(service(command("b", "/two")), service(command("c"), "t")) + "; exit 1")
    assert server.services() == [before]
    assert server.control("GET", "/routes").json() == listed
    assert server.get("/s").body == b"a %d" % before["pid"]
    wait_until(lambda: set(server.children()) == {before["pid"]}, "the end of the new ones")
    # One that fails after it has named the same again takes nothing away either.
    assert server.reload(post(service(command("a", "/one"))) + "; exit 1")
    assert (server.services(), server.control("GET", "/routes").json()) == ([before], listed)
    # And a manifest that changes later still goes into the table in force, once.
    assert server.control("POST", "/services/s/restart").status_code == 200
    assert sorted(server.patterns()) == ["/one", "/s"]


def test_service_that_is_removed_during_a_reload(server, command):
    said = post(service(command("a")))
    assert server.reload(said) is None
    before = wait_state(server, "s")["pid"]
    with at_a_barrier(server, said):
        assert server.control("DELETE", "/services/s").status_code == 204
        assert (server.services(), server.patterns()) == ([], [])
    assert wait_state(server, "s")["pid"] == before
    assert server.patterns() == ["/manifest"]


def test_service_that_is_added_during_a_reload(server, command):
    """It is of the old configuration, and ends with that."""
    with at_a_barrier(server, ":"):
        add(server, "late", *command("a"))
        pid = wait_state(server, "late")["pid"]
    assert server.services() == []
    wait_until(lambda: not alive(pid), "its end")


def test_service_goes_into_the_new_table_alone(server, command):
    """What an operator took out of the table in force stays out while a reload comes to nothing."""
    said = post(service(command("a")))
    assert server.reload(said) is None
    wait_until(lambda: server.patterns() == ["/manifest"], "the manifest's routes")
    assert server.control("PUT", "/routes", []).status_code == 200
    assert server.reload(said + "; exit 1")
    assert server.patterns() == []


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


def test_routes_file_that_would_block(start_server):
    """A pipe in its place is refused, and SIGTERM ends the server as ever."""
    server = start_server(kind=ReloadServer)
    replace_by_pipe(server.routes_file)
    assert "is no plain file" in server.reload()
    assert server.stop() == 0


def test_log_file_that_would_block(start_server, tmp_path):
    path = tmp_path / "log"
    server = start_server("--log-file", path, kind=ReloadServer, wait=False)
    wait_until(lambda: path.exists() and "user interface" in path.read_text(), "the server")
    replace_by_pipe(path)
    server.hang_up()
    assert server.stop() == 0
