"""Each script alone in an empty directory, on the standard library alone: a minimal host."""

import json
import shutil
import subprocess
import sys

from conftest import CREDENTIALS, DEADLINE, KAPOW, KAPOWCTL, Server, write_starter

MINIMAL = [sys.executable, "-I", "-S"]      # no site-packages: neither of the two packages


def run(*arguments, **options):
    return subprocess.run([*MINIMAL, *map(str, arguments)], capture_output=True, text=True,
                          timeout=DEADLINE, **options)


def test_scripts_start_alone(lone_copy):
    for script in (KAPOW, KAPOWCTL):
        alone = lone_copy(script)
        done = run(alone, "--version", cwd=alone.parent)
        assert (done.returncode, done.stderr) == (0, "")
        assert [path.name for path in alone.parent.iterdir()] == [script.name]


def minimal_server(directory, kapow, routes, *arguments):
    """Start a server on the standard library alone, with `routes`."""
    (directory / "routes.json").write_text(json.dumps(routes))
    wrapper = write_starter(directory / "start.py", command=[*MINIMAL, str(kapow)])
    return Server(directory, "--routes", directory / "routes.json", *arguments, script=wrapper, wait=False)


def test_server_without_packages(lone_copy, tmp_path):
    """kapow.py and kapowctl.py alone: no control interface, and all the rest."""
    kapow = lone_copy(KAPOW)
    shutil.copy(KAPOWCTL, kapow.parent)
    server = minimal_server(tmp_path, kapow, [
        {"method": "POST", "url_pattern": "/{name}", "command":
         "{ kapow get /request/matches/name; kapow get /request/body; } | kapow set /response/body; "
         "env | grep KAPOW_CONTROL >&2; kapow set /response/status 201"}])
    server.wait_log("control interface needs the Python package cryptography")
    server.wait_log("user interface")
    assert not [line for line in server.log if "control interface: https" in line]
    reply = server.request("POST", "/a", b"b")
    assert (reply.status, reply.body) == (201, b"ab")
    assert server.stop() == 0
    server.check_gone()
    assert not [line for line in server.log if "KAPOW_CONTROL" in line]


def test_server_without_its_client(lone_copy, tmp_path):
    """kapow.py alone has get and set for shells, and says what is missing."""
    server = minimal_server(tmp_path, lone_copy(KAPOW), [
        {"method": "GET", "url_pattern": "/shell",
         "command": "kapow get /request/method | kapow set /response/body"},
        {"method": "GET", "url_pattern": "/kapow", "command": "kapow get -- /request/method || exit 0"},
        {"method": "GET", "url_pattern": "/curl", "command":
         'curl -sS -T - "$KAPOW_DATA_URL/handlers/$KAPOW_HANDLER_ID/response/body" < /proc/version'}])
    server.wait_log("WARNING kapowctl.py is not beside kapow.py")
    server.wait_log("user interface")
    assert server.get("/kapow").status == 200
    server.wait_log("^kapow: kapowctl.py is not beside kapow.py")
    assert server.get("/shell").body == b"GET"
    with open("/proc/version", "rb") as version:
        assert server.get("/curl").body == version.read()
    assert server.stop() == 0
    server.check_gone()


def test_init_programs_need_the_package(lone_copy, tmp_path):
    init = tmp_path / "init"
    init.write_text("#!/bin/sh\n")
    init.chmod(0o755)
    done = run(lone_copy(KAPOW), "server", "--bind", "127.0.0.1:0", "--control-bind", "127.0.0.1:0",
               "--data-bind", "127.0.0.1:0", init)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) <= 2
    assert "cryptography" in done.stderr.splitlines()[-1]


def test_client_without_requests(lone_copy):
    done = run(lone_copy(KAPOWCTL), "route", "list", env={name: "x" for name in CREDENTIALS})
    assert (done.returncode, done.stderr) == (
        1, "kapowctl: kapow route, service and handler need the Python package requests\n")


def test_client_alone_gets_and_sets(lone_copy, server):
    client = lone_copy(KAPOWCTL)
    with server.handler(target="?a=1") as handler:
        environment = {"KAPOW_HANDLER_ID": handler.id,
                       "KAPOW_DATA_URL": server.init_environment["KAPOW_DATA_URL"]}
        done = run(client, "get", "/request/params/a", env=environment)
        assert (done.returncode, done.stdout) == (0, "1")
        assert run(client, "set", "/response/body", env=environment, input="b").returncode == 0
        assert handler.finish().body == b"b"
