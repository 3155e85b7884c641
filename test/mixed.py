"""Clients of all kinds at once: good, broken, slow and vanishing. For tests and benches.

Each kind is a function (server, rng) that makes one visit, and raises
AssertionError when a good client is not served as it should be.
"""

import random
import socket
import threading
import time

from conftest import DEADLINE, read_all
from test_fuzz import mutate


def add_routes(server):
    """Make the routes that the visitors know."""
    server.control("PUT", "/routes", [
        {"method": "GET", "url_pattern": "/hello", "command": "echo hello | kapow set /response/body"},
        {"method": "POST", "url_pattern": "/echo",
         "command": "kapow get /request/body | kapow set /response/body"},
        {"method": "POST", "url_pattern": "/form",
         "command": "kapow get /request/files/f/content | wc -c | kapow set /response/body"},
        {"method": "GET", "url_pattern": "/stream",
         "command": "head -c 500000 /dev/zero | kapow set /response/stream"},
        {"method": "GET", "url_pattern": "/sleep", "command": "sleep 1000"},
        {"method": "GET", "url_pattern": "/fuzz", "entrypoint": "/bin/true"},
        {"method": "GET", "url_pattern": "/timeout", "command": "sleep 1000", "timeout": 0.2},
        {"method": "GET", "url_pattern": "/fail", "command": "exit 3"},
        {"method": "GET", "url_pattern": "/date/{y}-{m}-{d}", "command": "kapow get /request/matches/d"},
        {"method": "GET", "url_pattern": "/words/{x:(a+)+}/{y:.*}.{z:.*}", "command": ""},
        {"method": "POST", "url_pattern": "/fields", "command":
         "for i in 1 2 3; do kapow get /request/form/f5 | kapow set /response/body; done"},
        {"method": "POST", "url_pattern": "/readers", "command":
         'for i in 1 2 3; do kapow get /request/body >/dev/null & '
         'curl -sS "$KAPOW_DATA_URL/handlers/$KAPOW_HANDLER_ID/request/body" >/dev/null & done; wait'},
        {"method": "GET", "url_pattern": "/shadow", "command":
         "head() { :; }; kapow get /request/headers/X-Long | wc -c | kapow set /response/body"},
    ])


def good(server, rng):
    """A few requests on one connection."""
    with server.connect() as sock, sock.makefile("rb") as answers:
        for _ in range(rng.randint(1, 3)):
            sock.sendall(b"GET /hello HTTP/1.1\r\nHost: h\r\n\r\n")
            assert answers.readline().split()[1] == b"200"
            while answers.readline() != b"\r\n":
                pass
            assert answers.read(6) == b"hello\n"


def echo(server, rng):
    """An upload that comes back."""
    body = rng.randbytes(rng.choice([1, 1000, 100_000]))
    reply = server.request("POST", "/echo", body)
    assert (reply.status, reply.body) == (200, body)


def upload(server, rng):
    """A form with a file."""
    content = b"x" * rng.choice([0, 1000, 200_000])
    body = b'--B\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\n%b\r\n--B--' % content
    reply = server.request("POST", "/form", body, {"Content-Type": "multipart/form-data; boundary=B"})
    assert reply.body.strip() == b"%d" % len(content)


def download(server, rng):
    """A stream, read whole."""
    reply = server.get("/stream")
    assert (reply.status, len(reply.body)) == (200, 500_000), reply.body[:300]
    assert not reply.body.strip(b"\0")


def timed_out(server, rng):
    """A program that is too slow."""
    assert server.get("/timeout").status == 504


def failed(server, rng):
    """A program that fails."""
    assert server.get("/fail").status == 500


def broken(server, rng):
    """Bytes that are hardly a request."""
    with server.connect() as sock:
        send(sock, mutate(rng))
        shut(sock)
        read_all(sock)


def slow(server, rng):
    """A head in little pieces, and an answer read in little pieces."""
    with server.connect() as sock:
        for byte in b"GET /hello HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n":
            send(sock, bytes([byte]))
            time.sleep(0.002)
        answer = b""
        while piece := sock.recv(10):
            answer += piece
        assert answer.endswith(b"hello\n")


VANISHING = (b"", b"GET /he", b"GET /hello HTTP/1.1\r\nHost: h\r\n\r\n", b"GET /sleep HTTP/1.1\r\nHost: h\r\n\r\n",
             b"POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n\r\npart",
             b"POST /form HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
             b"GET /stream HTTP/1.1\r\nHost: h\r\n\r\n")


def vanishing(server, rng):
    """A client that leaves at any moment, in any way."""
    with server.connect() as sock:
        send(sock, rng.choice(VANISHING))
        if rng.random() < 0.5:
            time.sleep(rng.random() * 0.05)
        if rng.random() < 0.3:
            sock.settimeout(0.01)
            try:
                sock.recv(rng.choice([1, 1000, 100_000]))
            except OSError:
                pass
        if rng.random() < 0.3:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


# Those who would stop the server, each in a way that once did.


def backtracker(server, rng):
    """A path that a backtracking matcher needs long for."""
    path = rng.choice(("/date/" + "-" * 7000, "/words/" + "a" * 7000 + "!", "/words/" + "a/" * 3000,
                       "/date/" + "1-" * 3000 + "/", "/words/a/" + "." * 7000))
    assert server.get(path).status in (200, 404)


def parser(server, rng):
    """A form of thousands of fields, of which few are wanted."""
    body = b"&".join(b"f%d=%d" % (number, number) for number in range(rng.choice((5, 6, 3000))))
    reply = server.request("POST", "/fields", body, {"Content-Type": "application/x-www-form-urlencoded"})
    assert reply.body in (b"", b"555")


def dribbler(server, rng):
    """A body in little pieces, which several readers want at once."""
    with server.connect() as sock:
        send(sock, b"POST /readers HTTP/1.1\r\nHost: h\r\nContent-Length: 200\r\n\r\n")
        for _ in range(rng.choice((20, 200))):
            send(sock, b"x")
            time.sleep(0.001)


def half_duplex(server, rng):
    """A long body that comes back, for a client that reads when it has sent all."""
    body = rng.randbytes(1000) * 3000
    with server.connect() as sock:
        sock.sendall(b"POST /echo HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
                     % len(body) + body)
        assert read_all(sock).startswith(b"HTTP/1.1 200 ")


def neighbour(server, rng):
    """Somebody on the same host who asks for handlers that there are not, and stays."""
    with server.connect("data") as sock:
        send(sock, b"PUT /handlers/%032x/response/body HTTP/1.1\r\nHost: h\r\n"
                   b"Transfer-Encoding: chunked\r\n\r\n" % rng.getrandbits(128))
        assert sock.recv(12) == b"HTTP/1.1 404"
        for _ in range(20):
            send(sock, b"1\r\nx\r\n")
            time.sleep(0.001)


def crowd(server, rng):
    """Connections that do nothing, or half of something, and all end at once."""
    socks = [server.connect(rng.choice(("user", "user", "data", "control"))) for _ in range(30)]
    for sock in socks:
        send(sock, rng.choice((b"", b"GET /he", b"GET / HTTP/1.1\r\nHost: h\r\n")))
    for sock in socks:
        sock.close()


def shadow(server, rng):
    """A program with a function that bears a program's name."""
    assert server.get("/shadow", **{"X-Long": "x" * 5000}).body.strip() == b"5000"


def send(sock, data):
    """Send to a server that may have had enough."""
    try:
        sock.sendall(data)
    except OSError:
        pass


def shut(sock):
    """End the output, if there still is one."""
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass


KINDS = (good, good, good, echo, echo, upload, download, timed_out, failed, broken, broken, slow,
         vanishing, vanishing, vanishing, backtracker, parser, dribbler, half_duplex, neighbour,
         crowd, shadow)


def visit(server, seed, go_on):
    """Make visits of all kinds while `go_on(count)`; return {kind: count}."""
    rng, counts = random.Random(seed), {}
    while go_on(sum(counts.values())):
        kind = rng.choice(KINDS)
        kind(server, rng)
        counts[kind.__name__] = counts.get(kind.__name__, 0) + 1
    return counts


def visit_at_once(server, threads, go_on):
    """Visit from many threads; return {kind: count}. Raises what a visit raised."""
    results, errors = [], []

    def work(seed):
        try:
            results.append(visit(server, seed, lambda count: not errors and go_on(count)))
        except Exception as error:
            errors.append(error)
    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(DEADLINE * 10)
    if errors:
        raise errors[0]
    return {kind.__name__: sum(result.get(kind.__name__, 0) for result in results) for kind in KINDS}


def leave_until_gone(server, seed):
    """Make visits that end at any moment until nobody listens any more; return how many."""
    rng, count = random.Random(seed), 0
    try:
        while True:
            rng.choice((vanishing, vanishing, broken))(server, rng)
            count += 1
    except OSError:             # refused, or reset before it was accepted
        return count
