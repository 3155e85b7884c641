"""SIGTERM loses no request: who is told first, what is still answered, when the listener closes."""

import os
import signal
import socket
import threading

import pytest

from conftest import DEADLINE, read_all, wait_until
from operating import UnixServer, dump_json, read_response, trusting, write_pair
from test_status import StatusServer

WAITING = 30        # clients in the accept queue


def get(path, *fields):
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: h", *fields, "\r\n"]).encode()


def refuses(server):
    """Whether nobody listens for users any more."""
    try:
        server.connect().close()
    except (ConnectionRefusedError, FileNotFoundError):
        return True
    except ConnectionResetError:
        pass
    return False


def terminate(server):
    server.process.send_signal(signal.SIGTERM)


def check_whole(said, body):
    """Fail unless a connection brought one whole answer."""
    head, _, rest = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ") and rest == body


def check_answered(said, body):
    """Fail unless that was so, and said to be the last one."""
    check_whole(said, body)
    assert b"\r\nConnection: close" in said.partition(b"\r\n\r\n")[0]


@pytest.mark.parametrize("kind", ["tcp", "unix", "tls", "inherited"])
def test_accept_queue_is_answered(start_server, tmp_path, kind):
    options = []
    more = {"kind": UnixServer} if kind == "unix" else {}
    if kind == "tls":
        pair = write_pair(tmp_path)
        options = ["--certfile", pair[0], "--keyfile", pair[1]]
    if kind == "inherited":
        from test_activation import handing_over, tcp
        with tcp() as given:
            server = start_server(**handing_over(tmp_path, [given], "user"))
    else:
        server = start_server(*options, **more)
    path = server.route("kapow set /response/body x")
    said = []

    def ask(sock):
        if kind == "tls":
            sock = trusting(pair[0]).wrap_socket(sock, server_hostname="127.0.0.1")
        with sock:
            sock.sendall(get(path))
            said.append(read_all(sock))
    server.process.send_signal(signal.SIGSTOP)
    threads = [threading.Thread(target=ask, args=(server.connect(),)) for _ in range(WAITING)]
    for thread in threads:
        thread.start()
    terminate(server)
    server.process.send_signal(signal.SIGCONT)
    for thread in threads:
        thread.join(DEADLINE)
    assert server.process.wait(DEADLINE) == 0
    assert len(said) == WAITING
    for reply in said:
        check_whole(reply, b"x")        # some may be answered before it sees the signal


def test_everything_at_once(start_server):
    """One server with every kind of client that a stop may meet."""
    server = start_server()
    path = server.route("kapow set /response/body x")
    with server.handler() as handler:
        idle, half, busy, piped = (server.connect() for _ in range(4))
        with idle, half, busy, piped:
            with idle.makefile("rb") as file:
                idle.sendall(get(path))
                reply = read_response(file)
                assert (reply.body, reply.headers["Connection"]) == (b"x", None)
                half.sendall(get(path)[:-2])
                slow = server.route("kapow get /request/body | kapow set /response/body", "POST")
                busy.sendall(f"POST {slow} HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nab".encode())
                wait_until(lambda: len(server.control("GET", "/handlers").json()) == 2, "handlers")
                terminate(server)
                # Who is idle is sent away, at once and not when the handlers have ended.
                assert file.read() == b""
            wait_until(lambda: refuses(server), "the listener's end")
            # The interfaces that programs and operators need are still there.
            assert handler.get("/request/method").body == b"GET"
            assert len(server.control("GET", "/handlers").json()) == 2
            half.sendall(b"\r\n")
            check_answered(read_all(half), b"x")
            busy.sendall(b"cd")
            check_answered(read_all(busy), b"abcd")
        assert server.process.poll() is None
        assert handler.finish().headers["Connection"] == "close"
    assert server.process.wait(DEADLINE) == 0


@pytest.mark.parametrize("kind", ["tcp", "unix", "tls"])
def test_request_on_a_kept_connection(start_server, tmp_path, kind):
    """One that came before the server could see that it is to stop is answered, body and all."""
    pair = write_pair(tmp_path) if kind == "tls" else None
    server = start_server(*(("--certfile", pair[0], "--keyfile", pair[1]) if pair else ()),
                          **({"kind": UnixServer} if kind == "unix" else {}))
    path = server.route("kapow get /request/body | kapow set /response/body", "POST")
    request = f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nab".encode()
    socks = [server.connect() for _ in range(WAITING)]
    if pair:
        socks = [trusting(pair[0]).wrap_socket(sock, server_hostname="127.0.0.1") for sock in socks]
    try:
        files = [sock.makefile("rb") for sock in socks]
        for sock, file in zip(socks, files):
            sock.sendall(request)
            assert read_response(file).headers["Connection"] is None
        server.process.send_signal(signal.SIGSTOP)
        for sock in socks:
            sock.sendall(request)
        terminate(server)
        server.process.send_signal(signal.SIGCONT)
        for file in files:
            assert read_response(file).body == b"ab"
            file.close()
    finally:
        for sock in socks:
            sock.close()
    assert server.process.wait(DEADLINE) == 0


def test_client_that_has_only_just_come(start_server):
    server = start_server()
    path = server.route("kapow set /response/body x")
    with server.connect() as sock, server.connect() as silent:
        terminate(server)
        sock.sendall(get(path))
        check_answered(read_all(sock), b"x")
        # And who says nothing is waited for a moment only.
        assert read_all(silent) == b""
    assert server.process.wait(DEADLINE) == 0


def test_pipelined_requests(start_server):
    """One of them is answered, with Connection: close; the others are for another server."""
    server = start_server()
    path = server.route("kapow set /response/body x")
    with server.handler() as handler, server.connect() as sock:
        server.process.send_signal(signal.SIGSTOP)
        sock.sendall(get(path) * 3)
        terminate(server)
        server.process.send_signal(signal.SIGCONT)
        said = read_all(sock)
        # It may have answered some before it saw the signal.
        assert 1 <= said.count(b"HTTP/1.1 200 OK") <= 3
        assert said.count(b"Connection: close") == 1
        assert b"Connection: close" in said[said.rindex(b"HTTP/1.1"):]
        handler.finish()
    assert server.process.wait(DEADLINE) == 0


def test_balancer_is_told_first(start_server):
    """While it asks, all are served; when it has been told three times, the listener closes."""
    server = start_server(kind=StatusServer)
    path = server.route("kapow set /response/body x")
    server.wait_readyz()
    with server.handler() as handler, server.connect() as kept, kept.makefile("rb") as file:
        kept.sendall(get(path))
        assert read_response(file).headers["Connection"] is None
        terminate(server)
        wait_until(lambda: server.status("/healthz").status == 200, "life")
        # New clients and old ones are answered, and told to go elsewhere.
        reply = wait_until(lambda: (told := server.get(path)).headers["Connection"] and told, "a stop")
        assert (reply.status, reply.headers["Connection"]) == (200, "close")
        kept.sendall(get(path))
        reply = read_response(file)
        assert (reply.status, reply.headers["Connection"]) == (200, "close")
        assert [server.status("/readyz").status for _ in range(3)] == [503] * 3
        wait_until(lambda: refuses(server), "the listener's end")
        assert server.status("/readyz").status == 503
        handler.finish()
    assert server.process.wait(DEADLINE) == 0


def test_balancer_that_asks_no_more(start_server):
    """It is not waited for without end."""
    server = start_server(kind=StatusServer)
    server.wait_readyz()
    terminate(server)
    assert server.process.wait(DEADLINE) == 0


def test_second_signal_ends_all_waiting(start_server):
    server = start_server("--grace", "1000", kind=StatusServer)
    server.wait_readyz()
    with server.connect() as sock:
        sock.sendall(get(server.route("exec sleep 1000")))
        wait_until(lambda: server.control("GET", "/handlers").json(), "the handler")
        terminate(server)
        wait_until(lambda: server.status("/readyz").status == 503, "the stop")
        terminate(server)
        assert read_all(sock).startswith(b"HTTP/1.1 503 ")
    assert server.process.wait(DEADLINE) == 0


def test_who_waits_for_a_slot(start_server):
    """They get 503 at once; who comes later and finds room is served."""
    server = start_server("--max-handlers", "1", kind=StatusServer)
    path = server.route("kapow set /response/body x")
    server.wait_readyz()
    with server.handler() as handler, server.connect() as sock:
        sock.sendall(get(path))
        wait_until(lambda: b"kapow_handlers_queued 1" in server.status("/metrics").body, "the queue")
        terminate(server)
        said = read_all(sock)
        assert said.startswith(b"HTTP/1.1 503 ") and b"\r\nConnection: close" in said
        assert server.get(path).status == 503
        handler.finish()
    assert server.process.wait(DEADLINE) == 0


@pytest.fixture
def big_file(tmp_path):
    """A directory of billets with a file that does not fit into any buffer; its URL."""
    script = tmp_path / "big.b"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    (tmp_path / "big" / "rsrc").mkdir(parents=True)
    with open(tmp_path / "big" / "rsrc" / "file", "wb") as file:
        file.truncate(32 << 20)
    return "/big/rsrc/file"


def begin_to_read(sock, path):
    """Ask for the file and wait for its first byte; return the file of the connection."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    sock.sendall(get(path))
    file = sock.makefile("rb")
    while file.readline() != b"\r\n":
        pass
    assert file.read(1) == b"\0"
    return file


def test_slow_file(start_server, tmp_path, big_file):
    server = start_server("--billets", tmp_path)
    with server.connect() as sock, begin_to_read(sock, big_file) as file:
        terminate(server)
        wait_until(lambda: refuses(server), "the listener's end")
        assert server.process.poll() is None
        size = 1
        while data := file.read(1 << 20):
            size += len(data)
        assert size == 32 << 20
    assert server.process.wait(DEADLINE) == 0


def test_file_that_nobody_reads(start_server, tmp_path, big_file):
    """After the grace its client is left alone."""
    server = start_server("--billets", tmp_path, "--grace", "0.2")
    with server.connect() as sock, begin_to_read(sock, big_file):
        terminate(server)
        assert server.process.wait(DEADLINE) == 0


def test_reload_is_asked_for_while_it_stops(start_server, tmp_path):
    routes = dump_json(tmp_path / "routes.json", [])
    server = start_server("--routes", routes)
    with server.handler() as handler:
        terminate(server)
        wait_until(lambda: refuses(server), "the listener's end")
        server.process.send_signal(signal.SIGHUP)
        assert handler.put("/response/body", b"x").status == 200
        assert handler.finish().body == b"x"
    assert server.process.wait(DEADLINE) == 0
    assert not [line for line in server.log if "reload" in line]
    assert os.listdir(server.tmp) == []
