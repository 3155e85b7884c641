"""The control interface: routes as JSON, and who may call it."""

import json
import socket
import ssl

import pytest

from conftest import read_all

ROUTE = {"method": "GET", "url_pattern": "/x", "command": "c"}


def check(answer, status, reason):
    """Compare an error with what it should be."""
    assert (answer.status_code, answer.reason) == (status, reason), answer.text
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json()["reason"] == reason


def patterns(server):
    routes = server.control("GET", "/routes").json()
    assert [route["index"] for route in routes] == list(range(len(routes)))
    return [route["url_pattern"] for route in routes]


def test_post(server):
    first, second = (server.control("POST", "/routes", {**ROUTE, "id": "mine", "index": 0})
                     for _ in range(2))
    assert first.status_code == second.status_code == 201
    assert first.headers["Content-Type"] == "application/json"
    shown = first.json()
    assert shown.pop("id") not in ("mine", second.json()["id"])
    assert shown == {**ROUTE, "entrypoint": "/bin/sh -c", "index": 0}
    assert second.json()["index"] == 1
    hidden = second.json()
    assert hidden.pop("hidden_by") == first.json()["id"]
    assert server.control("GET", "/routes").json() == [first.json(), hidden]
    assert server.control("GET", "/routes/" + first.json()["id"]).json() == first.json()


@pytest.mark.parametrize("index, place", [(None, 0), (-3, 0), (0, 0), (1, 1), (2, 2), (99, 2)])
def test_put_inserts(server, index, place):
    for name in ("/a", "/b"):
        server.route(pattern=name)
    answer = server.control("PUT", "/routes", {**ROUTE, "index": index})
    assert (answer.status_code, answer.json()["index"]) == (201, place)
    assert patterns(server).index("/x") == place


def test_put_replaces_all_or_nothing(server):
    server.route(pattern="/a")
    listed = server.control("GET", "/routes").json()
    answer = server.control("PUT", "/routes", [ROUTE, {**listed[0], "url_pattern": "/b"}])
    assert answer.status_code == 200
    assert patterns(server) == ["/x", "/b"]
    assert answer.json()[1]["id"] != listed[0]["id"]
    refused = server.control("PUT", "/routes", [ROUTE, {**ROUTE, "url_pattern": "/{"}])
    check(refused, 422, "Invalid Route")
    assert (refused.json()["item"], refused.json()["field"]) == (1, "url_pattern")
    assert patterns(server) == ["/x", "/b"]


def test_delete(server):
    server.route(pattern="/a")
    route_id = server.control("GET", "/routes").json()[0]["id"]
    answer = server.control("DELETE", "/routes/" + route_id)
    assert (answer.status_code, answer.content, patterns(server)) == (204, b"", [])
    for method in ("GET", "DELETE"):
        check(server.control(method, "/routes/" + route_id), 404, "Route Not Found")


@pytest.mark.parametrize("data", [
    b"", b"{", b"nonsense", b'{"a": NaN}', b"\xff", b"{}{}", b"[" * 100000, b'"\x00"', b"1" * 5000 + b"x",
    '{"method": "GET"}'.encode("utf-16"),
])
@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_malformed(server, method, data):
    check(server.control(method, "/routes", data=data), 400, "Malformed JSON")
    assert patterns(server) == []


@pytest.mark.parametrize("method, document", [
    ("POST", []), ("POST", [ROUTE]), ("POST", None), ("POST", "x"), ("POST", 1), ("POST", {}),
    ("PUT", "x"), ("PUT", 1), ("PUT", {}), ("PUT", [[]]), ("PUT", [None]),
    ("POST", {**ROUTE, "url_pattern": "x"}), ("POST", {**ROUTE, "extra": 1}),
    ("POST", {**ROUTE, "method": 1}), ("PUT", {**ROUTE, "index": "0"}),
    ("PUT", {**ROUTE, "url_pattern": "/{a:(}"}), ("POST", {**ROUTE, "entrypoint": "'"}),
])
def test_invalid(server, method, document):
    answer = server.control(method, "/routes", data=json.dumps(document))
    check(answer, 422, "Invalid Route")
    assert answer.json()["error"]
    assert patterns(server) == []


def test_null_is_absent(server):
    answer = server.control("POST", "/routes", {**ROUTE, "entrypoint": None, "command": None,
                                                "id": None, "index": None})
    assert (answer.status_code, answer.json()["command"]) == (201, "")


@pytest.mark.parametrize("method, path, status, allow", [
    ("DELETE", "/routes", 405, "GET, POST, PUT"), ("PATCH", "/routes", 405, "GET, POST, PUT"),
    ("PUT", "/routes/x", 405, "GET, DELETE"), ("GET", "/", 404, None), ("GET", "/routes/", 404, None),
    ("GET", "/routes/x/y", 404, None), ("GET", "/handlers/x", 405, "DELETE"),
    ("POST", "/handlers", 405, "GET"), ("GET", "/handlers/x/y", 404, None),
    ("GET", "/reloads/x/routes", 404, None),
])
def test_other_calls(server, method, path, status, allow):
    answer = server.control(method, path)
    check(answer, status, "Not Found" if status == 404 else "Method Not Allowed")
    assert answer.headers.get("Allow") == allow


def test_body_too_large(server):
    check(server.control("POST", "/routes", data=b" " * (1024 * 1024 + 1)), 413, "Content Too Large")
    check(server.control("POST", "/routes", data=iter([b" " * 600_000] * 2)), 413, "Content Too Large")
    assert server.control("POST", "/routes", data=b" " * 1_000_000 + json.dumps(ROUTE).encode()).ok


def test_pinned_both_ways(server):
    """Only the one client certificate opens the control interface, and not by plain HTTP."""
    import kapow
    other = kapow.Credentials("127.0.0.1")
    address = ("127.0.0.1", server.port("control"))
    own = server.directory
    for cert, key in ((None, None), (other.client_cert, other.client_key)):
        context = ssl.create_default_context(cadata=server.init_environment["KAPOW_CONTROL_SERVER_CERT"])
        if cert:
            (own / "other.pem").write_text(cert + key)
            context.load_cert_chain(own / "other.pem")
        with pytest.raises(OSError), socket.create_connection(address) as sock:
            with context.wrap_socket(sock, server_hostname="127.0.0.1") as tls:
                tls.sendall(b"GET /routes HTTP/1.1\r\nHost: h\r\n\r\n")
                assert tls.recv(100) == b""
                raise ConnectionResetError
    with socket.create_connection(address) as sock:
        sock.sendall(b"GET /routes HTTP/1.1\r\nHost: h\r\n\r\n")
        assert b"HTTP/1.1 2" not in read_all(sock)


def test_old_tls_is_refused(server):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, OSError)):
        with socket.create_connection(("127.0.0.1", server.port("control"))) as sock:
            context.wrap_socket(sock)
