"""What kapowctl says and does about routes, services and handlers."""

import json

import pytest

from conftest import wait_until
from operating import dump_json


def says(server, *arguments, status=1, **options):
    """Return the one line that a command writes to standard error, which exits with `status`."""
    done = server.ctl(*arguments, **options)
    assert (done.returncode, done.stdout) == (status, b"")
    text = done.stderr.decode()
    assert text.startswith("kapowctl: ") and text.endswith("\n") and len(text.splitlines()) == 1
    return text[len("kapowctl: "):-1]


def listed(server):
    """Return the routes in order, as (method, pattern, command)."""
    return [(route["method"], route["url_pattern"], route["command"])
            for route in server.control("GET", "/routes").json()]


# Messages.

@pytest.mark.parametrize("resource, reason", [
    ("/request/params/none", "/request/params/none: Resource Item Not Found"),
    ("request/nothing", "/request/nothing: Invalid Resource Path"),
    ("/request/params/a\n\x1b[1mb", "/request/params/a??[1mb: Resource Item Not Found")])
def test_message_has_the_resource(server, resource, reason):
    with server.handler() as handler:
        environment = {"KAPOW_HANDLER_ID": handler.id}
        assert says(server, "get", resource, environment=environment) == reason
        assert says(server, "set", "/response/status", "x", environment=environment) == (
            "/response/status: Non Integer Value")


@pytest.mark.parametrize("entrypoint", ["/bin/sh -c", "bash -c", "busybox ash -c"])
def test_message_of_the_function_is_that_of_the_client(server, entrypoint):
    path = server.route("""{ kapow get /request/params/none
        kapow get "$(printf '/request/params/a\\033b')"
        kapow set /response/status x
        echo x | kapow set /response/status; } 2>&1 | kapow set /response/body""", entrypoint=entrypoint)
    assert server.get(path).body.decode() == (
        "kapowctl: /request/params/none: Resource Item Not Found\n"
        "kapowctl: /request/params/a?b: Resource Item Not Found\n"
        "kapowctl: /response/status: Non Integer Value\n" * 1
        + "kapowctl: /response/status: Non Integer Value\n")


@pytest.mark.parametrize("arguments, reason", [
    (["route", "add", "-X", "PUT", "/x/{"], "route PUT /x/{: Invalid Route: url_pattern: a '{' is never closed"),
    (["route", "list", "no-id"], "route no-id: Route Not Found"),
    (["route", "remove", "no-id"], "route no-id: Route Not Found"),
    (["route", "remove", "/none"], "route /none: Route Not Found"),
    (["route", "remove", "-X", "PUT", "/none"], "route PUT /none: Route Not Found"),
    (["service", "list", "none"], "service none: Service Not Found"),
    (["service", "add", "a/b", "true"], "service a/b: Invalid Service: name: "),
    (["service", "start", "none"], "service none: Service Not Found"),
    (["service", "signal", "none", "HUP"], "service none: Service Not Found"),
    (["service", "remove", "none"], "service none: Service Not Found"),
    (["handler", "kill", "none"], "handler none: Handler ID Not Found"),
    (["handler", "kill", "a\x1bb"], "handler a?b: Handler ID Not Found")])
def test_message_says_what_it_is_about(server, arguments, reason):
    assert says(server, *arguments).startswith(reason)


def test_message_of_apply_has_the_file(server, tmp_path):
    path = dump_json(tmp_path / "routes.json", [{"method": "GET", "url_pattern": "/"}, {"method": "GET"}])
    assert says(server, "route", "apply", path) == (
        f"the routes in {path}: Invalid Route: item 1: url_pattern: a route must have it")


@pytest.mark.parametrize("document", [{}, {"method": "GET", "url_pattern": "/"}, None, 1, "[]", True])
def test_apply_takes_an_array_alone(server, tmp_path, document):
    path = dump_json(tmp_path / "routes.json", document)
    server.route("", pattern="/stays")
    for more in ([], ["--dry-run"]):
        assert says(server, "route", "apply", *more, path) == (
            f"the routes in {path} are no JSON array, as kapow route list prints it")
    assert listed(server) == [("GET", "/stays", "")]


# Routes that hide others, and take their place.

def test_hidden_route_is_added_with_a_warning(server):
    for method, pattern in (("GET", "/a"), ("POST", "/a"), ("GET", "/{any}")):
        done = server.ctl("route", "add", "-X", method, pattern)
        assert (done.returncode, done.stderr) == (0, b"")
    first = server.control("GET", "/routes").json()[0]
    for more in ([], ["--index", "2"]):
        done = server.ctl("route", "add", *more, "/a")
        assert done.returncode == 0 and "hidden_by" not in json.loads(done.stdout)
        assert done.stderr.decode() == (
            "kapowctl: warning: the route GET /a never answers, hidden by an earlier one with the same "
            f"method and pattern: {first['id']}\n")
    assert server.ctl("route", "add", "--index", "0", "/a").stderr == b""
    assert len(listed(server)) == 6
    assert not [route for route in server.control("GET", "/routes").json() if "hidden_by" in route]


def test_hidden_by_is_in_the_answers(server, tmp_path):
    route = {"method": "GET", "url_pattern": "/a"}
    first, second = server.control("PUT", "/routes", [route, route]).json()
    assert second["hidden_by"] == first["id"] and "hidden_by" not in first
    assert server.control("POST", "/routes", route).json()["hidden_by"] == first["id"]
    assert "hidden_by" not in server.control("PUT", "/routes", route).json()
    done = server.ctl("route", "apply", dump_json(tmp_path / "routes.json", [route, route]))
    assert done.returncode == 0 and b"warning" in done.stderr and b"hidden_by" not in done.stdout


def test_replace(server):
    """The first of its like, in its place; without one it comes last."""
    for pattern, command in (("/a", "1"), ("/b", "2"), ("/b", "3"), ("/c", "4")):
        server.route(command, pattern=pattern)
    server.route("5", "POST", "/b")
    answer = server.control("PUT", "/routes?replace", {"method": "GET", "url_pattern": "/b", "command": "x"})
    assert (answer.status_code, answer.json()["index"]) == (200, 1)
    assert listed(server) == [("GET", "/a", "1"), ("GET", "/b", "x"), ("GET", "/b", "3"), ("GET", "/c", "4"),
                              ("POST", "/b", "5")]
    done = server.ctl("route", "add", "--replace", "-X", "POST", "/b", "-c", "y")
    assert (json.loads(done.stdout)["index"], done.stderr) == (4, b"")
    done = server.ctl("route", "add", "--replace", "/d", "-c", "z")
    assert json.loads(done.stdout)["index"] == 5
    assert listed(server)[4:] == [("POST", "/b", "y"), ("GET", "/d", "z")]
    answer = server.control("PUT", "/routes?replace", {"method": "GET", "url_pattern": "/e"})
    assert answer.status_code == 201
    assert server.control("PUT", "/routes?replace", {"method": "GET", "url_pattern": "{"}).status_code == 422
    assert "exclude" in says(server, "route", "add", "--replace", "--index", "0", "/a", status=2)


# Removing and matching.

def test_remove_by_pattern(server):
    for method, pattern in (("GET", "/a"), ("POST", "/a"), ("GET", "/b/{x}"), ("GET", "/c"), ("GET", "/c")):
        server.route(method=method, pattern=pattern)
    several = says(server, "route", "remove", "/a")
    ids = [f"{route['method']} {route['id']}" for route in server.control("GET", "/routes").json()]
    assert several == f"route /a: several routes have it, name one by its id: {ids[0]}, {ids[1]}"
    assert "several" in says(server, "route", "remove", "-X", "GET", "/c")
    assert says(server, "route", "remove", "--method", "GET", "no-slash", status=2)
    for arguments in (["-X", "POST", "/a"], ["/a"], ["/b/{x}"]):
        done = server.ctl("route", "remove", *arguments)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert [route[:2] for route in listed(server)] == [("GET", "/c"), ("GET", "/c")]


def test_match(server):
    for method, pattern in (("GET", "/greet/{name}"), ("POST", "/greet/{name}"), ("GET", "/{all:.*}")):
        server.route(method=method, pattern=pattern)
    routes = server.control("GET", "/routes").json()
    for arguments, index, matches in (
            (["/greet/a%20%C3%A9?x=1"], 0, {"name": "a é"}), (["/greet/ñ"], 0, {"name": "ñ"}),
            (["-X", "POST", "/greet/+&=%26"], 1, {"name": "+&=&"}), (["-X", "HEAD", "/greet/x"], 0, {"name": "x"}),
            (["/greet/x/"], 2, {"all": "greet/x/"}), (["/%ff"], 2, {"all": "\ufffd"})):
        done = server.ctl("route", "match", *arguments)
        assert (done.returncode, done.stderr) == (0, b"")
        assert json.loads(done.stdout) == {"route": routes[index], "matches": matches}


@pytest.mark.parametrize("method, path, why", [
    ("GET", "/none", "no URL pattern fits the path"), ("PUT", "/a", "the path is one for POST, OPTIONS"),
    ("OPTIONS", "/a", "the path is one for POST, OPTIONS")])
def test_match_of_none(server, method, path, why):
    server.route(method="POST", pattern="/a")
    assert says(server, "route", "match", "-X", method, path) == f"route {method} {path}: Route Not Found: {why}"
    answer = server.control("GET", f"/routes?method={method}&path={path}")
    assert (answer.status_code, answer.json()["reason"]) == (404, "Route Not Found")


def test_list_with_an_id(server):
    server.route(pattern="/a")
    server.route(pattern="/b")
    route = server.control("GET", "/routes").json()[1]
    assert json.loads(server.ctl("route", "list", route["id"]).stdout) == route
    table = server.ctl("route", "list", "-o", "table", route["id"]).stdout.decode().splitlines()
    assert len(table) == 2 and route["id"] in table[1]
    wait_until(lambda: not server.children(), "no process")
