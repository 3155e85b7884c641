"""The status interface: /healthz, /readyz and /metrics, and what moves which counter."""

import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

import kapow
from conftest import DEADLINE, Server, read_all, wait_until
from operating import BusyServer, read_response, script
from services import add, remove

HISTOGRAM = "kapow_handler_seconds"


class StatusServer(Server):
    """A Server with a status interface."""

    def __init__(self, directory, *arguments, **options):
        super().__init__(directory, "--status-bind", "127.0.0.1:0", *arguments, **options)

    def status(self, path, method="GET"):
        """Ask the status interface; return the Reply."""
        with self.connect("status") as sock:
            sock.sendall(f"{method} {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
            with sock.makefile("rb") as file:
                return read_response(file, method)

    def wait_readyz(self):
        """Ask until the server is ready, as a balancer does."""
        wait_until(lambda: self.status("/readyz").status == 200, "readiness")

    def metrics(self):
        """Return {(name of the sample, ((label, value), ...)): number}."""
        reply = self.status("/metrics")
        assert reply.status == 200
        return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value
                for family in text_string_to_metric_families(reply.body.decode())
                for sample in family.samples}

    def changes(self, before):
        """Return how the counters that have changed since metrics() differ, gauges left out."""
        return {key: value - before.get(key, 0) for key, value in self.metrics().items()
                if value != before.get(key, 0) and not key[0].startswith("process_")
                and not key[0].endswith(("_running", "_queued", "_up"))}


class BusyStatusServer(StatusServer, BusyServer):
    """One whose init programs do not end."""


def key(name, **labels):
    return name, tuple(sorted(labels.items()))


def counted(route, method, status):
    return key("kapow_requests_total", route=route, method=method, status=str(status))


@pytest.fixture(scope="module")
def module_server(tmp_path_factory):
    server = StatusServer(tmp_path_factory.mktemp("server"), "--max-handlers", "2", "--max-queue", "1",
                          "--max-body", "1MiB", "--billets", billets(tmp_path_factory))
    server.wait_readyz()
    yield server
    assert server.stop() == 0
    server.check_gone()


def billets(tmp_path_factory):
    """Return a directory of one billet with one plain file."""
    directory = tmp_path_factory.mktemp("billets")
    script(directory / "hello.b", "printf 'Content-Type: text/plain\\n\\nhello'")
    (directory / "hello" / "rsrc").mkdir(parents=True)
    (directory / "hello" / "rsrc" / "file.txt").write_text("four")
    return directory


def settled(server, before, wanted):
    """Fail unless the counters `wanted` come to have changed by so much since `before`."""
    def look():
        changes = server.changes(before)
        return {name: changes.get(name, 0) for name in wanted} == wanted
    wait_until(look, f"{wanted} in {server.changes(before)}")


# Health and readiness.

def test_pages(server):
    for path, kind in (("/healthz", "text/plain"), ("/readyz", "text/plain"),
                       ("/metrics", "text/plain; version=0.0.4")):
        reply = server.status(path)
        assert reply.status == 200 and reply.headers["Content-Type"].startswith(kind)
        assert reply.body and int(reply.headers["Content-Length"]) == len(reply.body)
        head = server.status(path, "HEAD")
        assert (head.status, head.body) == (200, b"")
        assert head.headers["Content-Type"] == reply.headers["Content-Type"]
        assert server.status(path + "?query=1").status == 200
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "get"):
            reply = server.status(path, method)
            assert (reply.status, reply.json()) == (405, {"reason": "Method Not Allowed"})
            assert reply.headers["Allow"] == "GET, HEAD"
    assert server.status("/readyz").body == b"ready\n"


@pytest.mark.parametrize("path", ["/", "/metrics/", "/healthz/x", "/routes", "/handlers", "//healthz",
                                  "/HEALTHZ", "/reloads/x/routes"])
def test_other_paths(server, path):
    reply = server.status(path)
    assert (reply.status, reply.json()) == (404, {"reason": "Not Found"})


def test_connection_is_kept(server):
    with server.connect("status") as sock, sock.makefile("rb") as file:
        for _ in range(3):
            sock.sendall(b"GET /readyz HTTP/1.1\r\nHost: h\r\n\r\n")
            assert read_response(file).body == b"ready\n"
        sock.sendall(b"nonsense\r\n\r\n")
        assert read_response(file).status == 400


def test_starting_and_stopping(start_server, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    init = script(tmp_path / "init", f"read line < {fifo}")
    server = start_server(init=[init], kind=BusyStatusServer)
    reply = server.status("/readyz")
    assert (reply.status, reply.body) == (503, b"starting\n")
    assert server.status("/healthz").status == 200
    fifo.write_text("\n")
    server.wait_readyz()
    with server.handler() as handler:
        # A kept connection too is told.
        with server.connect("status") as sock, sock.makefile("rb") as file:
            server.process.send_signal(signal.SIGTERM)

            def ask():
                sock.sendall(b"GET /readyz HTTP/1.1\r\nHost: h\r\n\r\n")
                return read_response(file)
            reply = wait_until(lambda: (told := ask()).status == 503 and told, "503")
            assert reply.body == b"stopping\n"
        assert server.status("/healthz").status == 200
        assert server.metrics()[key("kapow_handlers_running")] == 1
        assert handler.finish().headers["Connection"] == "close"
    assert server.stop() == 0


def test_off_unless_asked_for(start_server):
    server = start_server()
    assert not [line for line in server.log if "status interface" in line]
    with open(f"/proc/{server.process.pid}/net/tcp") as table:
        listening = [line.split() for line in table if line.split()[3] == "0A"]
    inodes = set()
    for fd in os.listdir(f"/proc/{server.process.pid}/fd"):
        link = os.readlink(f"/proc/{server.process.pid}/fd/{fd}")
        if link.startswith("socket:["):
            inodes.add(link[len("socket:["):-1])
    ports = {int(line[1].split(":")[1], 16) for line in listening if line[9] in inodes}
    assert ports == {server.port(name) for name in ("user", "control", "data")}


def test_address_taken(tmp_path):
    from test_server import FREE, fails
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        line = fails(*FREE, "--status-bind", address)
    assert f"the status interface cannot listen on {address}: Address already in use" in line


# The format.

@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not here")
def test_promtool(server):
    server.get(server.route("kapow set /response/body x"))
    server.get("/none")
    add(server, "puppet", "sleep", "1000")
    text = server.status("/metrics").body
    remove(server, "puppet")
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True,
                          timeout=DEADLINE)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def test_families(server):
    server.get(server.route())
    families = {family.name: family for family in
                text_string_to_metric_families(server.status("/metrics").body.decode())}
    assert {name: family.type for name, family in families.items()} == {
        "kapow_requests": "counter", "kapow_handler_seconds": "histogram",
        "kapow_handlers_running": "gauge", "kapow_handlers_queued": "gauge",
        "kapow_requests_refused": "counter", "kapow_handlers_killed": "counter",
        "kapow_request_bytes": "counter", "kapow_response_bytes": "counter",
        "kapow_service_up": "gauge", "kapow_service_restarts": "counter",
        "process_open_fds": "gauge", "process_resident_memory_bytes": "gauge"}
    assert all(family.documentation for family in families.values())
    assert {sample.labels["cause"] for sample in families["kapow_handlers_killed"].samples} == {
        "timeout", "client", "body", "storage", "operator", "stop"}


def test_process(server):
    shown = server.metrics()
    files = len(os.listdir(f"/proc/{server.process.pid}/fd"))
    assert abs(shown[key("process_open_fds")] - files) <= 4         # the connection that asks
    with open(f"/proc/{server.process.pid}/status") as status:
        resident = next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) * 1024
    assert 0.5 < shown[key("process_resident_memory_bytes")] / resident < 2


# Counters.

def test_requests_and_bytes(server):
    path = server.route("kapow get /request/body | kapow set /response/body", "POST", "/echo/{what}")
    before = server.metrics()
    assert server.request("POST", "/echo/a", b"x" * 1000).body == b"x" * 1000
    assert server.request("POST", "/echo/b", iter([b"x" * 1000] * 2)).status == 200
    assert server.get("/echo/a").status == 405
    assert server.get("/nowhere").status == 404
    settled(server, before, {
        counted(path, "POST", 200): 2, counted("", "GET", 405): 1, counted("", "GET", 404): 1,
        key("kapow_request_bytes_total"): 3000,
        key(HISTOGRAM + "_count", route=path): 2,
        key(HISTOGRAM + "_bucket", route=path, le="+Inf"): 2})
    # Errors have bodies too, which the access log counts as well.
    server.wait_access('"GET /nowhere ')
    sent = sum(int(line.split()[-5]) for line in server.access[-4:])
    settled(server, before, {key("kapow_response_bytes_total"): sent})


def test_head_and_options(server):
    path = server.route("kapow set /response/body hello")
    before = server.metrics()
    assert server.request("HEAD", path).status == 200
    assert server.request("OPTIONS", path).status == 204
    settled(server, before, {counted(path, "HEAD", 200): 1, key("kapow_response_bytes_total"): 0})
    found = [name for name in server.changes(before) if dict(name[1]).get("method") == "OPTIONS"]
    assert len(found) == 1


def test_histogram(server):
    path = server.route("sleep 0.12")
    before = server.metrics()
    server.get(path)
    settled(server, before, {key(HISTOGRAM + "_count", route=path): 1})
    shown = server.metrics()
    buckets = sorted((float(dict(labels)["le"]), value) for (name, labels), value in shown.items()
                     if name == HISTOGRAM + "_bucket" and dict(labels)["route"] == path)
    assert buckets[-1] == (math.inf, 1) and [value for _, value in buckets] == sorted(
        value for _, value in buckets)
    seconds = shown[key(HISTOGRAM + "_sum", route=path)]
    assert 0.12 <= seconds < DEADLINE
    assert all(value == (bound >= seconds) for bound, value in buckets)


def test_billets_and_files(server):
    before = server.metrics()
    assert server.get("/hello/some/path").body == b"hello"
    assert server.get("/hello/rsrc/file.txt").body == b"four"
    settled(server, before, {counted("hello.b", "GET", 200): 2,
                             key(HISTOGRAM + "_count", route="hello.b"): 1,
                             key("kapow_response_bytes_total"): 9})


def killed(cause):
    return key("kapow_handlers_killed_total", cause=cause)


def ask_and_leave(server, path):
    with server.connect() as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        wait_until(lambda: server.control("GET", "/handlers").json(), "a handler")


def test_killed(server):
    slow = server.route("exec sleep 1000")
    short = server.route("exec sleep 1000", timeout=0.1)
    body = server.route("kapow get /request/body; exec sleep 1000", "POST")
    before = server.metrics()
    assert server.get(short).status == 504
    ask_and_leave(server, slow)
    settled(server, before, {killed("client"): 1, killed("timeout"): 1})

    asker = threading.Thread(target=server.get, args=(slow,))
    asker.start()
    [handler] = wait_until(lambda: server.control("GET", "/handlers").json(), "a handler")
    assert server.control("DELETE", f"/handlers/{handler['id']}").status_code == 204
    asker.join(DEADLINE)

    with server.connect() as sock:
        sock.sendall(f"POST {body} HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        wait_until(lambda: server.control("GET", "/handlers").json(), "a handler")
        sock.sendall(b"nonsense\r\n")
        assert read_all(sock).startswith(b"HTTP/1.1 400 ")
    settled(server, before, {
        killed("timeout"): 1, killed("client"): 1, killed("operator"): 1, killed("body"): 1,
        killed("stop"): 0, killed("storage"): 0, counted(short, "GET", 504): 1,
        counted(slow, "GET", 503): 1, counted(body, "POST", 400): 1,
        key(HISTOGRAM + "_count", route=slow): 2})


def test_end_that_is_no_kill(server):
    """Neither a failure nor a lost client whose route says keep."""
    before = server.metrics()
    assert server.get(server.route("exit 1")).status == 500
    fifo = server.directory / "kept"
    os.mkfifo(fifo)
    path = server.route(f"read line < {fifo}", disconnect="keep")
    ask_and_leave(server, path)
    fifo.write_text("\n")
    settled(server, before, {key(HISTOGRAM + "_count", route=path): 1,
                             **{killed(cause): 0 for cause in ("client", "timeout", "operator")}})
    os.unlink(fifo)


def test_running_queued_and_refused(server):
    path = server.route("exec sleep 1000")
    before = server.metrics()
    assert before[key("kapow_handlers_running")] == before[key("kapow_handlers_queued")] == 0
    socks = []
    for name, count in (("running", 1), ("running", 2), ("queued", 1)):
        socks.append(server.connect())
        socks[-1].sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        wait_until(lambda: server.metrics()[key(f"kapow_handlers_{name}")] == count, name)
    reply = server.get(path)
    assert (reply.status, reply.headers["Retry-After"]) == (503, "1")
    settled(server, before, {key("kapow_requests_refused_total"): 1, counted(path, "GET", 503): 1})
    for sock in reversed(socks):        # who waits first: a client that leaves is not refused
        sock.close()
    wait_until(lambda: server.metrics()[key("kapow_handlers_running")] == 0, "the end")
    settled(server, before, {key("kapow_requests_refused_total"): 1})
    assert server.metrics()[key("kapow_handlers_queued")] == 0


def test_services(server):
    add(server, "quick", sys.executable, "-I", "-S", "-c",
        "import os, socket, time\ns = socket.socket(socket.AF_UNIX)\n"
        "s.bind(os.environ['KAPOW_SERVICE_SOCKET'])\ns.listen()\ntime.sleep(1000)")
    add(server, "idle", "sleep", "1000")
    names = [key(f"kapow_service_{what}", service="quick") for what in ("up", "restarts_total")]
    wait_until(lambda: server.metrics()[names[0]] in (0, 1), "the service")
    shown = server.metrics()
    assert shown[key("kapow_service_up", service="idle")] == 0
    assert shown[names[1]] == 0
    pid = server.control("GET", "/services/idle").json()["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: server.metrics()[key("kapow_service_restarts_total", service="idle")] == 1,
               "a restart")
    for name in ("quick", "idle"):
        remove(server, name)
    assert not [name for name, _ in server.metrics() if name.startswith("kapow_service_")]


# Labels.

@pytest.mark.parametrize("pattern, path", [
    ('/quo"te', "/quo%22te"), ("/back\\slash", "/back%5Cslash"), ("/new\nline", "/new%0Aline"),
    ('/{x:[^"\\\\]+}/"', "/y/%22"), ("/ü€", "/%C3%BC%E2%82%AC"), ("/a\\n", "/a%5Cn"),
    ("/} 1", "/%7D%201")])
def test_patterns_are_escaped(server, pattern, path):
    answer = server.control("POST", "/routes", {"method": "GET", "url_pattern": pattern})
    if answer.status_code != 201:
        return                      # then there is nothing to show
    before = server.metrics()
    assert server.get(path).status == 200
    settled(server, before, {counted(pattern, "GET", 200): 1,
                             key(HISTOGRAM + "_count", route=pattern): 1})


def test_nothing_of_a_client_is_a_label(server):
    server.route(pattern="/known/{x}")
    before = set(server.metrics())
    for request in (
            b"EVIL /evil HTTP/1.1\r\nHost: evil\r\nUser-Agent: evil\r\nX-Evil: evil\r\n\r\n",
            b"EVIL /known/evil?evil=evil HTTP/1.1\r\nHost: evil\r\n\r\n",
            b"get /known/evil HTTP/1.1\r\nHost: evil\r\n\r\n",
            b"GET /known/evil?evil HTTP/1.1\r\nHost: evil\r\nCookie: evil=evil\r\n\r\n",
            b"EVIL /hello/evil HTTP/1.1\r\nHost: evil\r\n\r\n",
            b"EVIL /hello/rsrc/evil HTTP/1.1\r\nHost: evil\r\n\r\n",
            b"EVIL /hello/rsrc/file.txt HTTP/1.1\r\nHost: evil\r\n\r\n",
            b'E"\\VIL / HTTP/1.1\r\nHost: evil\r\n\r\n', b"evil\x00\xff\r\n\r\n", b"evil\r\n\r\n",
            b"GET /evil HTTP/9.9\r\nHost: evil\r\n\r\n", b"EVIL * HTTP/1.1\r\nHost: evil\r\n\r\n",
            b"GET /" + b"evil" * 5000 + b" HTTP/1.1\r\nHost: evil\r\n\r\n"):
        with server.connect() as sock:
            sock.sendall(request)
            sock.shutdown(socket.SHUT_WR)
            read_all(sock)
    wait_until(lambda: any(counted("/known/{x}", "GET", status) in server.metrics()
                           for status in (200, 499, "")), "the counting")
    wait_until(lambda: not server.control("GET", "/handlers").json(), "the handlers' end")
    text = server.status("/metrics").body.lower()
    assert b"evil" not in text
    new = {dict(labels)["method"] for name, labels in set(server.metrics()) - before
           if name == "kapow_requests_total"}
    assert new <= {"GET", "other", ""}


def test_a_route_may_have_a_method_of_its_own(server):
    path = server.route("", "BREW")
    before = server.metrics()
    assert server.request("BREW", path).status == 200
    settled(server, before, {counted(path, "BREW", 200): 1})


def test_two_routes_of_one_pattern_are_one(server):
    """Also when one is removed; counters never go back."""
    first = server.route("", "GET", "/same")
    server.route("", "POST", "/same")
    before = server.metrics()
    server.get(first)
    server.request("POST", first)
    settled(server, before, {key(HISTOGRAM + "_count", route="/same"): 2})
    assert server.control("PUT", "/routes", []).status_code == 200
    settled(server, before, {key(HISTOGRAM + "_count", route="/same"): 2})


def test_what_is_in_use_is_not_forgotten(monkeypatch):
    """Of too many series the one goes that was not used for the longest time."""
    monkeypatch.setattr(kapow, "SERIES_LIMIT", 3)
    metrics = kapow.Metrics()
    for label in ("busy", "a", "busy", "b", "busy", "c", "busy", "d", "busy"):
        metrics.count_request((label, "GET", "200"), 0, 0)
    requests = dict((labels["route"], count) for labels, count in metrics.families()[0][3])
    assert requests == {"busy": 5, "c": 1, "d": 1}
