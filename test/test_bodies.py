"""Bodies that come and go at the same time, and clients that are slow, or half-duplex."""

import contextlib
import getpass
import hashlib
import os
import shutil
import subprocess
import sys
import threading

import pytest
import requests

import kapow
import services
from conftest import DEADLINE, read_all, wait_until
from operating import UnixConnection

SIZE = 50 * 1024 * 1024
ECHO = "kapow get /request/body | kapow set /response/{}"


def pattern(size):
    """Return bytes that show where a piece is missing or stands twice."""
    return b"".join(number.to_bytes(8, "big") for number in range(size // 8))


BODY = pattern(SIZE)
SUM = hashlib.sha256(BODY).hexdigest()


def digest(data):
    return hashlib.sha256(data).hexdigest()


def post(server, path, body=BODY, **options):
    """Send all, then read: as requests and urllib do."""
    with requests.Session() as session:
        session.trust_env = False
        return session.post(server.url + path, data=body, timeout=DEADLINE, **options)


@pytest.mark.parametrize("where", ["body", "stream"])
def test_echo_for_a_client_that_reads_last(server, where):
    reply = post(server, server.route(ECHO.format(where), "POST"))
    assert (reply.status_code, digest(reply.content)) == (200, SUM)


@pytest.mark.parametrize("where", ["body", "stream"])
def test_echo_of_a_chunked_body(server, where):
    pieces = (BODY[start:start + 100_000] for start in range(0, SIZE, 100_000))
    reply = post(server, server.route(ECHO.format(where), "POST"), pieces)
    assert (reply.status_code, digest(reply.content)) == (200, SUM)


def test_echo_through_the_data_interface(server):
    """The same without the channel: two programs that speak HTTP."""
    url = '"$KAPOW_DATA_URL/handlers/$KAPOW_HANDLER_ID'
    path = server.route(f'curl -sSN {url}/request/body" | curl -sS -T - {url}/response/body"', "POST")
    assert digest(post(server, path).content) == SUM


def test_filter(server):
    """gzip reads and writes at its own pace."""
    path = server.route("kapow set /response/headers/Content-Encoding gzip; "
                        "kapow get /request/body | gzip -1 | kapow set /response/body", "POST")
    assert digest(post(server, path).content) == SUM


def test_head_comes_after_a_long_body(server):
    """No byte of an answer that is longer than what is held before the request is whole."""
    path = server.route("head -c 1000000 /dev/zero | kapow set /response/body", "POST")
    with server.connect() as client:
        client.sendall(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\nConnection: close\r\n\r\n"
                       % path.encode())
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.settimeout(DEADLINE)
        client.sendall(b"x" * 100)
        assert read_all(client).startswith(b"HTTP/1.1 200 ")


def test_stream_begins_at_once(server):
    path = server.route("head -c 100000 /dev/zero | kapow set /response/stream; "
                        "kapow get /request/body >/dev/null", "POST")
    with server.connect() as client:
        client.sendall(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nConnection: close\r\n\r\n"
                       % path.encode())
        assert client.recv(15) == b"HTTP/1.1 200 OK"
        client.sendall(b"x")
        assert len(read_all(client)) > 100_000


def test_empty_write_begins_a_stream(server):
    gate = server.directory / "stream-gate"
    path = server.route(f"kapow set /response/stream </dev/null; until [ -e {gate} ]; do sleep 0.02; done; "
                        "kapow set /response/status 404; echo late | kapow set /response/stream")
    with server.connect() as client:
        client.sendall(b"GET %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % path.encode())
        assert client.recv(12) == b"HTTP/1.1 200"
        gate.touch()
        assert read_all(client).endswith(b"5\r\nlate\n\r\n0\r\n\r\n")


def test_write_that_outlives_its_program_is_answered(server):
    out = server.directory / "outlived"
    url = '"$KAPOW_DATA_URL/handlers/$KAPOW_HANDLER_ID/response/body"'
    path = server.route(f"(printf a; sleep 0.05; printf b) | (curl -sS -T - {url}; echo $? >>{out}) & "
                        "sleep 0.02; exit 0")
    for _ in range(20):
        assert server.get(path).body in (b"ab", b"")        # the write may come after the program's end
    wait_until(lambda: not server.children(), "the end of all")
    assert set(out.read_text().split()) <= {"0", "22"}


@pytest.mark.parametrize("amount", [10, 200_000])
def test_early_answer(server, amount):
    """A program that ends without reading an upload is answered for before that is whole."""
    path = server.route(f"head -c {amount} /dev/zero | kapow set /response/body", "POST")
    with server.connect() as client:
        client.sendall(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: 62914560\r\n\r\n" % path.encode())
        answer = client.recv(15)
    assert answer == b"HTTP/1.1 200 OK"


def test_held_answer_has_its_timeout(server):
    """A client that sends no more does not keep the answer to a handler's timeout waiting."""
    path = server.route("head -c 1000000 /dev/zero | kapow set /response/body; sleep 60", "POST",
                        timeout=0.5)
    with server.connect() as client:
        client.sendall(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n" % path.encode())
        assert client.recv(12) == b"HTTP/1.1 504"


def test_chunk_over_the_limit_is_refused_when_it_is_announced(start_server):
    server = start_server("--max-body", "1MiB")
    path = server.route("kapow get /request/body >/dev/null", "POST")
    answer = server.raw(b"POST %b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
                        b"fffff\r\n%b\r\n2\r\n" % (path.encode(), b"x" * 0xfffff))
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_expected_body_is_not_waited_for(server):
    """Who waits to be told to send a body gets a long answer without sending it."""
    path = server.route("head -c 1000000 /dev/zero | kapow set /response/body", "POST")
    answer = server.raw(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
                        b"Expect: 100-continue\r\n\r\n" % path.encode())
    assert answer.startswith(b"HTTP/1.1 200 ")


def test_loop_does_not_wait_for_a_client(server):
    """Two readers of one body and a client that dribbles: an unrelated request is answered."""
    gate = server.directory / "gate"
    os.mkfifo(gate)
    path = server.route(
        f'curl -sSN "$KAPOW_DATA_URL/handlers/$KAPOW_HANDLER_ID/request/body" >/dev/null & '
        f'read x < {gate}; for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do '
        'kapow get /request/body | head -c 1 >/dev/null & done; wait', "POST")
    other = server.route("kapow get /request/method | kapow set /response/body")
    with server.connect() as client:
        client.sendall(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" % path.encode())
        done = threading.Event()
        dribble = threading.Thread(target=dribble_into, args=(client, done))
        dribble.start()
        try:
            with open(gate, "w") as file:
                file.write("\n")
            for _ in range(50):
                assert server.get(other).body == b"GET"
        finally:
            done.set()
            dribble.join()


def dribble_into(client, done):
    """Send a byte now and then until `done` is set."""
    with contextlib.suppress(OSError):
        while not done.wait(0.002):
            client.send(b"x")


def test_spools_have_a_limit(start_server):
    """A body that does not fit any more is a full disk; the next request with one is 503."""
    server = start_server("--max-spool", "4MiB")
    path = server.route("kapow get /request/body | kapow set /response/body; sleep 0.01", "POST")
    small = server.route("kapow get /request/body | kapow set /response/body", "POST")
    with server.handler("POST", body=b"x" * 3_500_000) as waiting:
        assert len(waiting.get("/request/body").body) == 3_500_000
        refused = post(server, path, b"x" * 3_000_000)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert server.get(small).status == 405      # a request without a body is not concerned
        assert post(server, small, b"y" * 900_000).content == b"y" * 900_000    # nor a small one
    assert post(server, path, b"x" * 6_000_000).status_code == 503     # it never can
    # A body is given up a moment after its answer has ended.
    wait_until(lambda: post(server, path, b"x" * 3_000_000).content == b"x" * 3_000_000, "room")
    assert wait_until(lambda: status_with_room(server, path), "a body that is begun") == 500
    server.wait_log("cannot keep the body of the request: the spools take all")
    wait_until(lambda: post(server, path, b"x" * 3_000_000).status_code == 200, "room again")


def status_with_room(server, path):
    """Send a body that is too much; return the status, None if there was no room to begin with."""
    status = post(server, path, iter([b"x" * 1_000_000] * 6)).status_code
    return status if status != 503 else None


def test_spool_space_is_given_back():
    space = kapow.SpoolSpace(10 * kapow.MIB)
    spool = kapow.Spool(100, space)
    spool.append(b"x" * 100)
    assert space._taken == 0
    spool.append(b"y" * 50)
    assert space._taken == 150
    with pytest.raises(OSError):
        spool.append(b"z" * 10 * kapow.MIB)
    assert (space._taken, spool.length, spool.read_at(99, 2)) == (150, 150, b"xy")
    spool.close()
    assert space._taken == 0
    full = kapow.Spool(10, kapow.SpoolSpace(15))
    full.append(b"0123456789")
    with pytest.raises(OSError):
        full.append(b"abcdef")
    assert full.read_at(0, 100) == b"0123456789"


@pytest.mark.parametrize("size, pause, fails", [(1000, 9.0, False), (899, 9.0, True), (1, 0.02, True),
                                                (899, 9.99, True), (900, 9.0, False)])
def test_least_rate(monkeypatch, size, pause, fails):
    """100 bytes a second, averaged over each minute in which the client was waited for."""
    clock = [1000.0]

    def receive():
        clock[0] += pause
        return b"x" * size

    monkeypatch.setattr(kapow.time, "monotonic", lambda: clock[0])
    head = kapow.RequestHead(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000")
    reader = kapow.BodyReader(head, bytearray(), receive, min_rate=100)
    try:
        while clock[0] < 1000 + 150:
            reader.read()
    except kapow.ProtocolError as error:
        assert fails and error.status == 408
        assert 60 <= clock[0] - 1000 < 70
    else:
        assert not fails


# Real clients behind a real nginx, with and without its buffering of requests.

NGINX = """\
daemon off; user {user}; pid {directory}/pid; error_log {directory}/error.log; worker_processes 1;
events {{ worker_connections 64; }}
http {{
  access_log off; client_max_body_size 0;
  client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy;
  fastcgi_temp_path {directory}/f; uwsgi_temp_path {directory}/u; scgi_temp_path {directory}/s;
  server {{
    listen unix:{directory}/nginx.sock;
    proxy_http_version 1.1;
    location / {{ proxy_pass http://127.0.0.1:{port}; proxy_request_buffering {buffering}; }}
  }}
}}
"""


@contextlib.contextmanager
def nginx(server, directory, buffering):
    """Context manager: an nginx in front of `server`; gives the path of its socket."""
    config = directory / "nginx.conf"
    config.write_text(NGINX.format(directory=directory, port=server.port("user"), buffering=buffering,
                                   user=getpass.getuser()))
    process = subprocess.Popen(["nginx", "-c", str(config), "-p", str(directory),
                                "-e", str(directory / "error.log")], stderr=subprocess.DEVNULL)
    try:
        wait_until((directory / "nginx.sock").exists, "nginx's socket")
        yield directory / "nginx.sock"
    finally:
        process.terminate()
        process.wait(DEADLINE)


def post_unix(path, target, body=BODY):
    """Send all and then read, over a Unix socket; return (status, body)."""
    with contextlib.closing(UnixConnection(path)) as connection:
        connection.request("POST", target, body)
        reply = connection.getresponse()
        return reply.status, reply.read()


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
@pytest.mark.parametrize("buffering", ["on", "off"])
def test_behind_nginx(server, tmp_path, buffering):
    echo = server.route(ECHO.format("body"), "POST")
    early = server.route("head -c 20000 /dev/zero | kapow set /response/body", "POST")
    with nginx(server, tmp_path, buffering) as path:
        status, body = post_unix(path, echo)
        assert (status, digest(body)) == (200, SUM)
        status, body = post_unix(path, early)
        assert (status, len(body)) == (200, 20_000)


def test_service(server, tmp_path):
    """A service answers while it reads, to clients that read only when they have sent all."""
    script = tmp_path / "service.py"
    script.write_text(services.PYTHON)
    services.add(server, "echo", sys.executable, script, "HTTP/1.1")
    services.wait_state(server, "echo")
    server.route(method="POST", pattern="/stream", service="echo")
    assert digest(post(server, "/stream").content) == SUM
    server.remove_services()


def deleted_files(server):
    """Return {inode: size} of the files without a name that the server has open."""
    found = {}
    for entry in os.scandir(f"/proc/{server.process.pid}/fd"):
        with contextlib.suppress(FileNotFoundError):        # it was closed meanwhile
            if "(deleted)" in os.readlink(entry.path):
                found[os.stat(entry.path).st_ino] = os.stat(entry.path).st_size
    return found


def test_billet(start_server, tmp_path):
    """A launcher has the whole body in a file before it starts; it is kept once."""
    launcher = tmp_path / "echo.b"
    launcher.write_text("#!/bin/sh\nprintf 'Content-Type: text/plain\\n\\n'; cat\n")
    launcher.chmod(0o755)
    server = start_server("--billets", tmp_path)
    assert digest(post(server, "/echo").content) == SUM
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    launcher.write_text(f"#!/bin/sh\nread x < {fifo}; printf 'Content-Type: text/plain\\n\\n'; wc -c\n")
    thread = threading.Thread(target=post, args=(server, "/echo"))
    thread.start()
    wait_until(lambda: server.children(), "the launcher")
    files = deleted_files(server)
    fifo.write_text("x\n")
    thread.join()
    assert list(files.values()) == [SIZE]
