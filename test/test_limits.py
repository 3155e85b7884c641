"""Time and number: timeouts, the gate and its queue, grace, lost clients that are to be kept."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import threading

import pytest

import kapow
from conftest import DEADLINE, Server, read_all, wait_until, write_starter
from test_handlers import alive, hold, refuses

JSON_504 = b'{"reason": "Gateway Timeout"}'


class Road:
    """What the gate needs of a route."""

    def __init__(self, max_handlers=None, max_queue=None, queue_time=None):
        self.id, self.max_handlers, self.max_queue = object(), max_handlers, max_queue
        self.queue_time = queue_time


class Passage:
    """A thread that goes through a gate: `inside` is set while it is in, `refused` if it may not."""

    def __init__(self, gate, road):
        self.gate, self.ticket = gate, gate.ticket(road)
        self.inside, self.go_on, self.refused = (threading.Event() for _ in range(3))
        self.thread = threading.Thread(target=self._pass)
        self.thread.start()

    def _pass(self):
        try:
            with self.gate.passing(self.ticket):
                self.inside.set()
                assert self.go_on.wait(DEADLINE)
        except kapow.ApiError as error:
            assert (error.status, error.headers) == (503, [("Retry-After", "1")])
            self.refused.set()

    def leave(self):
        self.go_on.set()
        self.thread.join(DEADLINE)
        assert not self.thread.is_alive()


def waiting(gate, count):
    wait_until(lambda: len(gate._waiting) == count, f"{count} waiting")


def test_gate_first_come_first_served():
    gate, road = kapow.Gate(1, 10), Road()
    passages = [Passage(gate, road)]
    assert passages[0].inside.wait(DEADLINE)
    for count in range(1, 5):
        passages.append(Passage(gate, road))
        waiting(gate, count)
    for place, passage in enumerate(passages):
        assert passage.inside.wait(DEADLINE)
        assert not any(later.inside.is_set() for later in passages[place + 1:])
        passage.leave()
    assert (gate._running, dict(gate._running_of), gate._waiting) == (0, {}, [])


def test_gate_is_full():
    gate, road = kapow.Gate(1, 1), Road()
    first = Passage(gate, road)
    assert first.inside.wait(DEADLINE)
    second = Passage(gate, road)
    waiting(gate, 1)
    third = Passage(gate, road)
    assert third.refused.wait(DEADLINE)
    first.leave()
    assert second.inside.wait(DEADLINE)
    second.leave()


def test_gate_of_a_route():
    """A route at its limit holds up neither others nor those behind it."""
    gate, narrow, wide = kapow.Gate(3, 10), Road(max_handlers=1, max_queue=1), Road()
    first = Passage(gate, narrow)
    assert first.inside.wait(DEADLINE)
    second = Passage(gate, narrow)
    waiting(gate, 1)
    assert Passage(gate, narrow).refused.wait(DEADLINE)
    others = [Passage(gate, wide) for _ in range(2)]
    assert all(other.inside.wait(DEADLINE) for other in others)
    fourth = Passage(gate, wide)
    waiting(gate, 2)
    others[0].leave()       # which makes room for any but the narrow one
    assert fourth.inside.wait(DEADLINE) and not second.inside.is_set()
    first.leave()
    assert second.inside.wait(DEADLINE)
    for passage in (second, fourth, others[1]):
        passage.leave()
    assert (gate._running, dict(gate._running_of)) == (0, {})


def test_gate_without_limit_or_queue():
    gate, road = kapow.Gate(0, 0), Road(max_handlers=0, max_queue=0)
    passages = [Passage(gate, road) for _ in range(20)]
    assert all(passage.inside.wait(DEADLINE) for passage in passages)
    for passage in passages:
        passage.leave()


def test_gate_given_up_and_closed():
    gate, road = kapow.Gate(1, 10), Road()
    first = Passage(gate, road)
    assert first.inside.wait(DEADLINE)
    others = [Passage(gate, road) for _ in range(2)]
    waiting(gate, 2)
    gate.give_up(others[0].ticket)
    assert others[0].refused.wait(DEADLINE)
    gate.close()
    assert others[1].refused.wait(DEADLINE)
    assert Passage(gate, road).refused.wait(DEADLINE)
    first.leave()
    last = Passage(gate, road)      # which need not wait
    assert last.inside.wait(DEADLINE)
    last.leave()
    assert gate.counts() == (0, 0, 2)       # who gave up was not sent away


@pytest.mark.parametrize("of_server, of_route", [(0.05, None), (DEADLINE * 2, 0.05), (DEADLINE * 2, 0), (0, None)])
def test_gate_waits_no_longer_than_said(of_server, of_route):
    gate, road = kapow.Gate(1, 10, of_server), Road(queue_time=of_route)
    first = Passage(gate, road)
    assert first.inside.wait(DEADLINE)
    assert Passage(gate, road).refused.wait(DEADLINE)
    first.leave()


def test_gate_waits_as_long_as_a_route_says():
    gate, road = kapow.Gate(1, 10, 0), Road(queue_time=DEADLINE * 2)
    first = Passage(gate, road)
    assert first.inside.wait(DEADLINE)
    second = Passage(gate, road)
    waiting(gate, 1)
    first.leave()
    assert second.inside.wait(DEADLINE)
    second.leave()


def test_gate_many():
    """Nobody is lost and the limits hold when a hundred push."""
    gate, roads = kapow.Gate(5, 100), [Road(max_handlers=2), Road(), Road(max_handlers=1)]
    inside, most, lock = {road: 0 for road in roads}, [], threading.Lock()

    def push(road):
        for _ in range(20):
            with gate.passing(gate.ticket(road)):
                with lock:
                    inside[road] += 1
                    most.append((sum(inside.values()), inside[roads[0]], inside[roads[2]]))
                with lock:
                    inside[road] -= 1
    threads = [threading.Thread(target=push, args=(roads[number % 3],)) for number in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert len(most) == 600
    assert [max(column) for column in zip(*most)] <= [5, 2, 1]
    assert (gate._running, dict(gate._running_of), gate._waiting) == (0, {}, [])


@pytest.mark.parametrize("keys, fine", [
    ({"timeout": 0}, True), ({"timeout": 1.5}, True), ({"timeout": -1}, False),
    ({"timeout": "1"}, False), ({"timeout": True}, False), ({"timeout": 1e300}, False),
    ({"max_handlers": 0}, True), ({"max_handlers": 3}, True), ({"max_handlers": -1}, False),
    ({"max_handlers": 1.5}, False), ({"max_queue": 0}, True), ({"max_queue": None}, True),
    ({"queue_time": 0.5}, True), ({"queue_time": 0}, True), ({"queue_time": -1}, False), ({"queue_time": "1"}, False),
    ({"max_queue": []}, False), ({"disconnect": "kill"}, True), ({"disconnect": "keep"}, True),
    ({"disconnect": "hold"}, False), ({"disconnect": 1}, False), ({"disconnect": []}, False),
])
def test_route_keys(server, keys, fine):
    route = {"method": "GET", "url_pattern": "/x", **keys}
    answer = server.control("POST", "/routes", route)
    assert answer.status_code == (201 if fine else 422)
    if fine:
        shown = answer.json()
        given = {key: value for key, value in keys.items() if value is not None}
        assert {key: shown[key] for key in given} == given
        assert set(shown) == {"id", "method", "url_pattern", "entrypoint", "command", "index", *given}
    else:
        assert answer.json()["field"] == list(keys)[0]


def test_route_add_options(server):
    done = server.ctl("route", "add", "/x", "--timeout", "1.5", "--max-handlers", "2", "--max-queue", "3",
                      "--queue-time", "0.5", "--disconnect", "keep")
    route = json.loads(done.stdout)
    assert [route[key] for key in ("timeout", "max_handlers", "max_queue", "queue_time",
                                     "disconnect")] == [1.5, 2, 3, 0.5, "keep"]


def test_timeout(server):
    path, pids = hold(server)
    route = server.control("GET", "/routes").json()[0]
    server.control("PUT", "/routes", [{**route, "timeout": 0.3}])
    reply = server.request("POST", path)
    assert (reply.status, reply.body) == (504, JSON_504)
    running = [int(pid) for pid in pids.read_text().split()]
    wait_until(lambda: not any(map(alive, running)), "the end of the group")
    server.wait_access(rf'"POST {path} HTTP/1.1" 504 ')


def test_timeout_answers_at_once(server):
    """The client need not wait for a program that takes its time to die."""
    path = server.route("trap '' TERM; while :; do sleep 1; done", timeout=0.2)
    with server.connect() as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        answer = read_all(sock)
        assert server.children(), "the program should still be there"
    assert answer.startswith(b"HTTP/1.1 504 ") and answer.endswith(JSON_504)
    wait_until(lambda: not server.children(), "SIGKILL")


def test_timeout_cuts_what_was_begun(server):
    path = server.route("kapow set /response/stream part; sleep 1000", timeout=1)
    answer = server.raw(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"4\r\npart\r\n")


def test_timeout_of_the_server_and_of_the_route(start_server):
    server = start_server("--timeout", "0.3")
    assert server.get(server.route("sleep 1000")).status == 504
    assert server.get(server.route("sleep 0.6; kapow set /response/body x", timeout=0)).body == b"x"
    assert server.get(server.route("sleep 0.6; kapow set /response/body x", timeout=30)).body == b"x"


@contextlib.contextmanager
def held_slots(server, path, count):
    """Have `count` requests for `path` run, whose programs wait; give their sockets."""
    with contextlib.ExitStack() as stack:
        socks = []
        for number in range(count):
            socks.append(stack.enter_context(server.connect()))
            socks[-1].sendall(f"POST {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
            wait_until(lambda: len(sleepers(server)) == number + 1, "a program")
        yield socks
    wait_until(lambda: not server.children(), "the programs' end")


def sleepers(server):
    """Return the children of the server that sleep."""
    found = []
    for pid in server.children():
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/comm") as name:
                found += [pid] if name.read() == "sleep\n" else []
    return found


def test_queue(start_server):
    server = start_server("--max-handlers", "1", "--max-queue", "1")
    path = server.route("exec sleep 1000", "POST")
    quick = server.route("kapow set /response/body x")
    with held_slots(server, path, 1) as (first,):
        with wait_until(lambda: queued(server, quick), "a place in the queue") as second:
            reply = wait_until(lambda: refused(server, quick), "a full queue")
            assert reply.headers["Retry-After"] == "1"
            assert reply.json() == {"reason": "Service Unavailable"}
            first.close()       # its program is ended, and its slot is free
            assert read_all(second).endswith(b"\r\n\r\nx")
    server.wait_access(rf'"GET {quick} HTTP/1.1" 503 ')


def refused(server, path):
    """Ask on a connection that is given up when no answer comes; return the Reply of a 503."""
    from conftest import Reply
    import http.client
    connection = http.client.HTTPConnection("127.0.0.1", server.port("user"), timeout=2)
    try:
        connection.request("GET", path)
        reply = Reply(connection.getresponse())
        return reply if reply.status == 503 else None
    except (TimeoutError, socket.timeout):
        return None
    finally:
        connection.close()


def test_client_that_leaves_gives_up_its_place(start_server):
    server = start_server("--max-handlers", "1", "--max-queue", "1")
    path = server.route("exec sleep 1000", "POST")
    quick = server.route("kapow set /response/body x")
    with held_slots(server, path, 1) as (first,):
        with wait_until(lambda: queued(server, quick), "a place in the queue"):
            wait_until(lambda: refused(server, quick), "a full queue")
        third = wait_until(lambda: queued(server, quick), "a place in the queue")
        first.close()
        with third:
            assert read_all(third).endswith(b"\r\n\r\nx")


def queued(server, path):
    """Ask on a new connection; return it when it is not refused for a while."""
    sock = server.connect()
    sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
    sock.settimeout(2)
    try:
        sock.recv(1, socket.MSG_PEEK)
    except (TimeoutError, socket.timeout):
        sock.settimeout(DEADLINE)
        return sock
    sock.close()
    return None


def test_keep(server):
    """A route that keeps its handlers: what was begun is done, though the client has left."""
    done = server.directory / "done"
    fifo = server.directory / "fifo"
    os.mkfifo(fifo)
    path = server.route(f"kapow set /response/stream begun; read line < {fifo}; "
                        f"head -c 1000000 /dev/zero | kapow set /response/stream && echo $? > {done}",
                        disconnect="keep")
    with server.connect() as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        assert sock.recv(1000)
    with open(fifo, "w") as writer:
        writer.write("go\n")
    wait_until(done.exists, "the end of the work")
    assert done.read_text() == "0\n"
    server.wait_access(rf'"GET {path} HTTP/1.1" 200 ')
    done.unlink()
    fifo.unlink()


def test_keep_before_anything_was_sent(server):
    done = server.directory / "done"
    path, pids = hold(server, "trap 'exit 0' USR1;")
    route = server.control("GET", "/routes").json()[0]
    server.control("PUT", "/routes", [{**route, "disconnect": "keep"}])
    sock = server.connect()
    sock.sendall(f"POST {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
    shell, sleep = (int(pid) for pid in
                    wait_until(lambda: pids.exists() and pids.read_text(), "pids").split())
    sock.close()
    reply = server.get("/none")     # the server goes on meanwhile
    assert (reply.status, alive(shell), alive(sleep)) == (404, True, True)
    os.kill(shell, signal.SIGUSR1)
    os.kill(sleep, signal.SIGTERM)
    server.wait_access(rf'"POST {path} HTTP/1.1" 499 0 ')
    done.unlink(missing_ok=True)


def test_keep_still_has_its_timeout(server):
    path = server.route("sleep 1000", timeout=1, disconnect="keep")
    with server.connect() as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        wait_until(server.children, "the program")
    wait_until(lambda: not server.children(), "the timeout")
    server.wait_access(rf'"GET {path} HTTP/1.1" 504 0 ')


def test_stop_in_grace(start_server):
    """20 handlers run: all finish, what waits gets 503, idle connections are closed."""
    server = start_server("--max-handlers", "20")
    fifo = server.directory / "fifo"
    os.mkfifo(fifo)
    path = server.route(f"exec 3< {fifo}; read line <&3; kapow set /response/body done", "POST")
    with contextlib.ExitStack() as stack:
        idle, waiter, *socks = (stack.enter_context(server.connect()) for _ in range(22))
        idle.sendall(b"GET /none HTTP/1.1\r\nHost: h\r\n\r\n")
        assert idle.recv(1000).startswith(b"HTTP/1.1 404")
        writer = os.open(fifo, os.O_RDWR)
        for number, sock in enumerate(socks):
            sock.sendall(f"POST {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        wait_until(lambda: len(server.children()) >= 20, "20 programs")
        waiter.sendall(f"POST {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        server.process.send_signal(signal.SIGTERM)
        assert idle.recv(1000) == b""
        assert read_all(waiter).startswith(b"HTTP/1.1 503 ")
        assert refuses(server)
        os.write(writer, b"go\n" * 20)
        for sock in socks:
            answer = read_all(sock)
            assert b"Connection: close" in answer and answer.endswith(b"done")
        os.close(writer)
    assert server.process.wait(DEADLINE) == 0
    assert len([line for line in server.access if " 200 4 " in line]) == 20


def test_stop_after_grace(start_server):
    server = start_server("--grace", "0.2")
    path = server.route("sleep 1000")
    with server.connect() as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        wait_until(server.children, "the program")
        server.process.send_signal(signal.SIGTERM)
        assert read_all(sock).startswith(b"HTTP/1.1 503 ")
    assert server.process.wait(DEADLINE) == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_second_signal(start_server, second):
    server = start_server("--grace", "1000")
    path = server.route("trap '' TERM; sleep 1000")
    with server.connect() as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        wait_until(server.children, "the program")
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: refuses(server), "the end of accepting")
        server.process.send_signal(second)
        assert read_all(sock).startswith(b"HTTP/1.1 503 ")
    assert server.process.wait(DEADLINE) == 0


def test_data_interface_lives_while_handlers_do(start_server):
    server = start_server()
    with server.handler() as handler:
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: refuses(server), "the end of accepting")
        assert handler.get("/request/method").body == b"GET"
        assert handler.put("/response/body", b"late").status == 200
        reply = handler.finish()
    assert (reply.body, reply.headers["Connection"]) == (b"late", "close")
    assert server.process.wait(DEADLINE) == 0


def test_open_files(tmp_path):
    """A low soft limit is raised for the server to the hard one, and given back to its programs."""
    wrapper = write_starter(tmp_path / "limited.py",
                            "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 20000))")
    server = Server(tmp_path, "--max-handlers", "500", script=wrapper)
    with open(f"/proc/{server.process.pid}/limits") as limits:
        assert "Max open files            20000                20000 " in limits.read()
    # A moment after its start, so the first command may still see the other.
    path = server.route("until [ $(ulimit -S -n) = 256 ]; do :; done; ulimit -S -n | kapow set /response/body",
                        timeout=DEADLINE)
    assert server.get(path).body == b"256\n"
    assert server.stop() == 0
    server.check_gone()


def test_timeout_of_any_length(server):
    path = server.route("kapow set /response/body x", timeout=kapow.LONGEST_TIMEOUT)
    assert server.get(path).body == b"x"
    for text in ("nan", "inf", "x"):
        assert server.ctl("route", "add", "/x", "--timeout", text).returncode == 2


def test_timeout_frees_the_slot_of_a_client_that_reads_nothing(server):
    path = server.route("head -c 20000000 /dev/zero | kapow set /response/body", timeout=0.5,
                        max_handlers=1)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", server.port("user")))
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        server.wait_access(rf'"GET {path} HTTP/1.1" 200 ')


def test_lost_client_ends_a_background_write(server):
    """A job that writes on when its entrypoint has exited is ended with the client."""
    path = server.route("(yes | kapow set /response/stream) & sleep 0.2")
    with server.connect() as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        assert sock.recv(1000)
        wait_until(lambda: not sleepers(server), "the entrypoint's exit")
    wait_until(lambda: not server.children(), "the end of the job")


def test_background_job_outlives_a_client_that_was_served(server):
    """Only a client that left before the end is lost."""
    fifo = server.directory / "alive"
    os.mkfifo(fifo)
    path = server.route(f"(read line < {fifo}; echo $line > {fifo}.done) & kapow set /response/body x")
    for _ in range(20):
        assert server.get(path).body == b"x"
        fd = os.open(fifo, os.O_RDWR)
        os.write(fd, b"alive\n")
        done = fifo.with_suffix(".done")
        wait_until(lambda: done.exists() and done.read_text(), "the job")
        os.close(fd)
        done.unlink()
    fifo.unlink()


def test_endless_stream_keeps_no_file(server):
    """What a slow client has read is not kept on disk."""
    path = server.route("yes | kapow set /response/stream")
    with server.connect() as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        received = 0
        while received < 20_000_000:
            received += len(sock.recv(65536))
        assert temporary_bytes(server) == 0


def temporary_bytes(server):
    """Return the size of the server's open temporary files."""
    return sum(link.stat().st_size for link in pathlib.Path(f"/proc/{server.process.pid}/fd").iterdir()
               if "(deleted)" in str(link.readlink()))


def test_body_that_cannot_be_kept(tmp_path):
    """No disk: the reader sees a failure, the client a 500, the log the cause."""
    wrapper = write_starter(tmp_path / "limited.py",
                            "resource.setrlimit(resource.RLIMIT_FSIZE, (1_200_000, 1_200_000))")
    server = Server(tmp_path, script=wrapper)
    path = server.route("kapow get /request/body > /dev/null; echo status $? >&2", "POST")
    reply = server.request("POST", path, iter([bytes(65536)] * 30))
    assert reply.status == 500
    server.wait_log("ERROR [0-9a-f]{16} cannot keep the body of the request: File too large$")
    assert server.stop() == 0
    server.check_gone()
