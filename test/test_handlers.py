"""The life of a handler: its program's environment, exit, output, children and lost clients."""

import os
import pathlib
import re
import signal
import socket
import threading

import pytest

from conftest import DEADLINE, read_all, wait_until, write_starter


@pytest.mark.parametrize("command, status, body", [
    (":", 200, b""), ("exit 0", 200, b""),
    ("exit 1", 500, b'{"reason": "Internal Server Error"}'),
    ("kill -KILL $$", 500, b'{"reason": "Internal Server Error"}'),
    ("kill -SEGV $$", 500, b'{"reason": "Internal Server Error"}'),
    ("kill -TERM $$", 200, b""), ("kill -HUP $$", 200, b""), ("kill -INT $$", 200, b""),
    ("kill -PIPE $$", 200, b""),
    ("kapow set /response/status 404; exit 1", 404, b""),
    ("kapow set /response/headers/X y; exit 1", 500, b'{"reason": "Internal Server Error"}'),
    ("kapow set /response/cookies/X y; exit 1", 500, b'{"reason": "Internal Server Error"}'),
    ("kapow set /response/body x; exit 1", 200, b"x"),
    ("kapow set /response/body ''; exit 1", 500, b'{"reason": "Internal Server Error"}'),
    ("kapow set /response/status 503; kapow set /response/body x; kill -KILL $$", 503, b"x"),
])
def test_exit_status(server, command, status, body):
    reply = server.get(server.route(command))
    assert (reply.status, reply.body) == (status, body)
    if status == 500:
        assert reply.headers["Content-Type"] == "application/json"
    assert int(reply.headers["Content-Length"]) == len(body)


@pytest.mark.parametrize("entrypoint", ["/no/such/program", "/etc/passwd", "/"])
def test_cannot_be_spawned(server, entrypoint):
    reply = server.get(server.route("x", entrypoint=entrypoint))
    assert (reply.status, reply.body) == (500, b'{"reason": "Internal Server Error"}')
    server.wait_log(f"ERROR .* cannot run {entrypoint}: ")


def test_no_interpreter(server):
    script = server.directory / "broken"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    assert server.get(server.route(entrypoint=str(script))).status == 500


def test_entrypoint_gets_the_command_as_one_argument(server):
    path = server.route("a 'b c'", entrypoint=f"{server.directory}/show 'd e'")
    show = server.directory / "show"
    show.write_text('#!/bin/sh\nfor word; do echo "<$word>"; done | kapow set /response/body\n')
    show.chmod(0o755)
    assert server.get(path).body == b"<d e>\n<a 'b c'>\n"
    path = server.route(entrypoint=f"{server.directory}/show")
    assert server.get(path).body == b""


def test_environment(server):
    path = server.route("env -0 | kapow set /response/body")
    body = server.get(path, **{"X-Evil": "evil"}).body.decode()
    environment = dict(item.split("=", 1) for item in body.rstrip("\0").split("\0"))
    assert environment["KAPOW_TEST"] == server.marker
    assert environment["KAPOW_DATA_URL"] == environment["KAPOW_DATAAPI_URL"] == (
        f"http://127.0.0.1:{server.port('data')}")
    assert environment["KAPOW_CONTROL_URL"] == environment["KAPOW_CONTROLAPI_URL"] == (
        f"https://127.0.0.1:{server.port('control')}")
    assert len(environment["KAPOW_HANDLER_ID"]) == 36
    assert not {name for name in environment if "CERT" in name and "KAPOW" in name or "KEY" in name}
    assert "evil" not in body and path not in body
    tools, public, rest = environment["PATH"].split(os.pathsep, 2)
    assert rest == server.environment["PATH"]
    assert [pathlib.Path(path).stat().st_mode & 0o777 for path in (tools, public)] == [0o700, 0o755]


def test_standard_streams(server):
    path = server.route("echo lost; echo kept >&2; for fd in 0 1 2; do readlink /proc/$$/fd/$fd; done "
                        "| kapow set /response/body")
    stdin, stdout, stderr = server.get(path).body.decode().splitlines()
    assert (stdin, stdout) == ("/dev/null", "/dev/null")
    assert stderr.startswith("pipe:")
    server.wait_log("^kept$")
    assert "lost" not in "\n".join(server.log)


def test_signals_have_their_defaults(start_server, tmp_path):
    """Also when the server was started with some ignored and some blocked, as by nohup(1)."""
    ignoring = start_server(script=write_starter(
        tmp_path / "ignoring.py",
        "for name in ('HUP', 'QUIT', 'USR1', 'CHLD', 'INT', 'TSTP'):\n"
        "    signal.signal(getattr(signal, 'SIG' + name), signal.SIG_IGN)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2, signal.SIGTERM])"))
    reply = ignoring.get(ignoring.route(
        "grep -E 'Sig(Blk|Ign)' /proc/self/status | kapow set /response/body"))
    # Signals 32 and 33 are the C library's own; no program can change them.
    masks = [int(line.split()[1], 16) & ~(3 << 31) for line in reply.body.decode().splitlines()]
    assert masks == [0, 0]


def test_yes_ends_when_its_reader_does(server):
    path = server.route("yes | head -n 1 | kapow set /response/body")
    assert server.get(path).body == b"y\n"


def test_background_job_does_not_hold_the_response(server):
    fifo = server.directory / "fifo"
    os.mkfifo(fifo)
    path = server.route(f"(read line < {fifo}; echo $line > {fifo}.done) & kapow set /response/body x")
    assert server.get(path).body == b"x"
    # It lives on when its handler has ended.
    fifo.write_text("alive\n")
    wait_until(lambda: os.path.exists(f"{fifo}.done"), "the background job")
    os.unlink(fifo)


def test_background_write_holds_the_response(server):
    """A write that is in its middle when the program exits is waited for."""
    with server.handler() as handler, server.connect("data") as sock:
        sock.sendall(f"PUT /handlers/{handler.id}/response/body HTTP/1.1\r\nHost: h\r\n"
                     "Expect: 100-continue\r\nContent-Length: 8\r\n\r\n".encode())
        assert sock.recv(100).startswith(b"HTTP/1.1 100")
        finisher = threading.Thread(target=handler.finish)
        finisher.start()
        wait_until(lambda: not server.children(), "the program's exit")
        sock.sendall(b"at last\n")
        finisher.join(DEADLINE)
        assert handler.reply.body == b"at last\n"


def test_every_program_is_found_on_path(server):
    path = server.route(
        "{ request /params/q; echo; kapowctl get /request/method; echo; kapow get request/path; } "
        "| response /body; response status 201; request --version >&2; response --help >&2; "
        "request; echo usage $? >&2; kroute --version >&2; command -v kroute >&2", pattern="/tools")
    reply = server.get(path + "?q=7")
    assert (reply.status, reply.body) == (201, b"7\nGET\n/tools")
    for line in (r"^kapowctl \d", "^usage: kapowctl set ", "usage: request /PATH", "^usage 2$", "/kroute$"):
        server.wait_log(line)


def hold(server, more=""):
    """Return (path, pid file) of a route whose program and its child wait for ever."""
    pids = server.directory / "pids"
    pids.unlink(missing_ok=True)
    return server.route(f"{more} sleep 1000 & echo $$ $! > {pids}.new; mv {pids}.new {pids}; wait",
                        "POST"), pids


def alive(pid):
    """Whether a process lives; a zombie does not."""
    try:
        stat = pathlib.Path("/proc", str(pid), "stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("leave", ["close", "shutdown", "reset"])
@pytest.mark.parametrize("body", [b"", b"Content-Length: 5\r\n\r\nhello", b"Content-Length: 50\r\n\r\nhe"])
def test_lost_client(server, leave, body):
    """The whole process group of a client that left is ended, whatever was read of its body."""
    path, pids = hold(server)
    sock = server.connect()
    sock.sendall(f"POST {path} HTTP/1.1\r\nHost: h\r\n".encode() + (body or b"\r\n"))
    running = [int(pid) for pid in wait_until(lambda: pids.exists() and pids.read_text(), "pids").split()]
    assert all(map(alive, running))
    cut_short = body.startswith(b"Content-Length: 50")
    if leave == "shutdown":
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock).startswith(b"HTTP/1.1 400 ") == cut_short
    elif leave == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    if leave != "shutdown":
        sock.close()
    wait_until(lambda: not any(map(alive, running)), "the end of the group")
    server.wait_access(rf'"POST {path} HTTP/1.1" {"400 25" if cut_short else "499 0"} ')
    sock.close()


def test_lost_client_that_pipelined(server):
    path, pids = hold(server)
    sock = server.connect()
    sock.sendall(f"POST {path} HTTP/1.1\r\nHost: h\r\n\r\nGET /next HTTP/1.1\r\n".encode())
    running = [int(pid) for pid in wait_until(lambda: pids.exists() and pids.read_text(), "pids").split()]
    sock.close()
    wait_until(lambda: not any(map(alive, running)), "the end of the group")


def test_group_that_ignores_sigterm_is_killed(server):
    path, pids = hold(server, "trap '' TERM;")
    sock = server.connect()
    sock.sendall(f"POST {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
    running = [int(pid) for pid in wait_until(lambda: pids.exists() and pids.read_text(), "pids").split()]
    sock.close()
    wait_until(lambda: not any(map(alive, running)), "the end of the group")


def test_client_lost_while_it_is_sent_to(server):
    path = server.route("yes | kapow set /response/stream; sleep 1000")
    with server.connect() as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        assert sock.recv(1000)
    wait_until(lambda: not server.children(), "the end of the group")
    server.wait_access(rf'"GET {path} HTTP/1.1" 200 ')


def test_running_handler_keeps_its_route(server):
    with server.handler() as handler:
        route_id = handler.get("/route/id").body
        assert server.control("DELETE", f"/routes/{route_id.decode()}").status_code == 204
        assert handler.get("/route/id").body == route_id
        handler.put("/response/body", b"still here")
        assert handler.finish().body == b"still here"


def test_writers_side_by_side_keep_their_bytes_together(server):
    """Two writes at once: the one that began first comes first, and neither is cut."""
    with server.handler() as handler:
        with server.connect("data") as first, server.connect("data") as second:
            for sock in (first, second):
                sock.sendall(f"PUT /handlers/{handler.id}/response/body HTTP/1.1\r\nHost: h\r\n"
                             "Expect: 100-continue\r\nContent-Length: 200000\r\n\r\n".encode())
                assert sock.recv(100).startswith(b"HTTP/1.1 100")
            second.sendall(b"2" * 200000)       # taken in whole while the first is open
            assert second.recv(100).startswith(b"HTTP/1.1 200")
            first.sendall(b"1" * 200000)
            assert first.recv(100).startswith(b"HTTP/1.1 200")
        assert handler.finish().body == b"1" * 200000 + b"2" * 200000


def test_debug(start_server):
    server = start_server("--debug")
    path = server.route("echo to stdout; echo to stderr >&2; printf 'esc\\033[0m\\nno end'; "
                        "kapow get /request/id | kapow set /response/body")
    request_id = server.get(path).body.decode()
    server.wait_log(rf"{request_id} stdout: to stdout$")
    server.wait_log(rf"{request_id} stderr: to stderr$")
    server.wait_log(rf"{request_id} stdout: esc\\x1b\[0m$")
    server.wait_log(rf"{request_id} stdout: no end$")
    assert server.stop() == 0


def test_stop_lets_handlers_finish(start_server):
    server = start_server()
    with server.handler() as handler:
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: refuses(server), "the end of accepting")
        assert handler.put("/response/body", b"in time").status == 200
        assert handler.finish().body == b"in time"
    assert server.process.wait(DEADLINE) == 0


def refuses(server):
    """Whether the user interface takes no connection any more."""
    try:
        server.connect().close()
    except OSError:         # refused, or reset while the listening socket closes
        return True
    return False


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_stop_signals(start_server, signum):
    server = start_server()
    assert server.stop(signum) == 0


def test_access_log(server):
    path = server.route("kapow set /response/body hello; kapow set /response/status 201")
    server.get(path + "?x=%22", **{"User-Agent": 'a"b\\c\x7f'.replace("\x7f", ""), "Referer": "r"})
    line = server.wait_access(rf".* {path}.*").group()
    assert line.split(" ", 2)[0] == "127.0.0.1"
    assert re.fullmatch("[0-9a-f]{16}", line.split(" ")[1])
    assert re.search(rf'"GET {path}\?x=%22 HTTP/1.1" 201 5 "r" "a\\x22b\\x5cc" \d+\.\d{{3}} "{path}"$', line)
    server.get("/no-route")
    server.wait_access(r'^127.0.0.1 [0-9a-f]{16} - \[.*\] "GET /no-route HTTP/1.1" 404 23 "-" "-" \d+\.\d{3} "-"$')
    server.raw(b"GET /bad\x1b HTTP/1.1\r\n\r\n")
    server.wait_access(r'^127.0.0.1 [0-9a-f]{16} - \[.*\] "GET /bad\\x1b HTTP/1.1" 400 ')
    server.raw(b"\x16\x03\x01\x02")
    server.wait_access(r'^127.0.0.1 [0-9a-f]{16} - \[.*\] "-" 400 ')


def test_reader_that_outlives_its_handler_sees_a_failure(server):
    """A background job in the middle of the body does not get a short one as if it were all."""
    out = server.directory / "out"
    path = server.route(f"(kapow get /request/body > {out}.body; echo $? > {out}.new; "
                        f"mv {out}.new {out}) & until [ -s {out}.body ]; do sleep 0.01; done", "POST")
    with server.connect() as sock:
        sock.sendall(f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\nhalf".encode())
        assert read_all(sock).startswith(b"HTTP/1.1 200")
    wait_until(out.exists, "the reader's end")
    assert out.read_text() == "1\n"
