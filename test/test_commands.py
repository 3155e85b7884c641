"""The two commands: exit statuses, messages, options, both spellings."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import threading

import pytest

from conftest import CREDENTIALS, DEADLINE, KAPOW, KAPOWCTL, installed

CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("KAPOW_")}


def run(script, *arguments, environment=None, **options):
    """Run a program outside of any server; return the CompletedProcess, its output as str."""
    return subprocess.run([*installed(script), *arguments], env={**CLEAN, **(environment or {})},
                          capture_output=True, text=True, timeout=DEADLINE, **options)


@pytest.mark.parametrize("script", [KAPOW, KAPOWCTL])
@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help(script, arguments):
    done = run(script, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ") and "route" in done.stdout


@pytest.mark.parametrize("script, words", [
    (KAPOW, []), (KAPOW, ["server"]), (KAPOW, ["get"]), (KAPOW, ["route"]), (KAPOW, ["route", "add"]),
    (KAPOWCTL, []), (KAPOWCTL, ["get"]), (KAPOWCTL, ["set"]), (KAPOWCTL, ["route"]),
    (KAPOWCTL, ["route", "add"]), (KAPOWCTL, ["route", "list"]), (KAPOWCTL, ["route", "remove"]),
])
def test_version_and_help_everywhere(script, words):
    import kapow
    version, text = (run(script, *words, option) for option in ("--version", "--help"))
    assert (version.returncode, text.returncode) == (0, 0)
    assert version.stdout.split()[1] == kapow.VERSION
    assert " ".join(words) in text.stdout.splitlines()[0]


@pytest.mark.parametrize("script, arguments", [
    (KAPOW, ["nonsense"]), (KAPOW, ["--nonsense"]), (KAPOW, ["server", "--nonsense"]),
    (KAPOW, ["server", "--bind"]), (KAPOW, ["server", "--bind", "nonsense"]),
    (KAPOW, ["server", "--bind", "::1:80"]), (KAPOW, ["server", "--bind", "h:70000"]),
    (KAPOW, ["server", "--bind", "h:"]), (KAPOW, ["server", "--data-bind", ":x"]),
    (KAPOW, ["server", "--bind", ":70000"]), (KAPOW, ["server", "--bind", ""]),
    (KAPOW, ["server", "--control-reachable-addr", "80"]), (KAPOW, ["server", "--control-reachable-addr", ":80"]),
    (KAPOW, ["server", "--control-reachable-addr", "h"]), (KAPOW, ["server", "--max-body", "1kb"]),
    (KAPOW, ["server", "--max-body", "-1"]), (KAPOW, ["server", "--max-body", ""]),
    (KAPOW, ["server", "--certfile", "x"]), (KAPOW, ["server", "--keyfile", "x"]),
    (KAPOW, ["server", "--clientauth"]), (KAPOW, ["server", "--clientauth=maybe"]),
    (KAPOW, ["server", "--clientcafile", "x", "--certfile", "x", "--keyfile", "x"]),
    (KAPOW, ["server", "--deb"]),
    (KAPOW, ["get"]), (KAPOW, ["route"]), (KAPOW, ["route", "nonsense"]),
    (KAPOWCTL, ["nonsense"]), (KAPOWCTL, ["get"]), (KAPOWCTL, ["get", "/a", "/b"]),
    (KAPOWCTL, ["get", "/request/method"]), (KAPOWCTL, ["set", "/response/body", "x"]),
    (KAPOWCTL, ["get", "--data-url", "http://127.0.0.1:1", "/request/method"]),
    (KAPOWCTL, ["set"]), (KAPOWCTL, ["set", "/a", "b", "c"]), (KAPOWCTL, ["get", "--nonsense", "/a"]),
    (KAPOWCTL, ["route"]), (KAPOWCTL, ["route", "add"]), (KAPOWCTL, ["route", "add", "/x", "-c"]),
    (KAPOWCTL, ["route", "add", "/x", "-c", "a", "file"]),
    (KAPOWCTL, ["route", "add", "/x", "--index", "one"]), (KAPOWCTL, ["route", "remove"]),
    (KAPOWCTL, ["route", "list", "-o", "yaml"]), (KAPOWCTL, ["route", "list", "a", "b"]),
])
def test_wrong_usage(script, arguments):
    done = run(script, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments, environment, words", [
    (["get", "/request/method"], {"KAPOW_DATA_URL": "http://127.0.0.1:1"}, "http://127.0.0.1:1"),
    (["set", "/response/body", "x"], {"KAPOW_DATA_URL": "http://127.0.0.1:1"}, "refused"),
    (["get", "/request/method"], {"KAPOW_DATA_URL": "nonsense"}, "nonsense"),
    (["get", "/request/method"], {"KAPOW_DATA_URL": "http://[::1"}, "http"),
    (["get", "/request/method"], {"KAPOW_DATA_URL": "http://no-such-host.invalid:1"}, "no-such-host"),
    (["route", "list"], {}, "KAPOW_CONTROL_SERVER_CERT"),
    (["route", "list"], {name: "nonsense" for name in CREDENTIALS}, "https://localhost:8081"),
    (["route", "add", "/x", "/no/such/file"], {}, "/no/such/file"),
])
@pytest.mark.parametrize("script", [KAPOW, KAPOWCTL])
def test_unreachable(script, arguments, environment, words):
    done = run(script, *arguments, environment={"KAPOW_HANDLER_ID": "x", **environment})
    assert (done.returncode, done.stdout) == (1, "")
    assert words in done.stderr and len(done.stderr.splitlines()) == 1


def add(server, *arguments, **options):
    """Run `kapowctl route add`; return the route that it prints."""
    done = server.ctl("route", "add", *arguments, **options)
    assert (done.returncode, done.stderr) == (0, b"")
    return json.loads(done.stdout)


def test_route_add(server):
    plain = add(server, "/a")
    assert (plain["method"], plain["entrypoint"], plain["command"]) == ("GET", "/bin/sh -c", "")
    full = add(server, "-X", "POST", "-e", "/bin/bash -c", "-c", "echo", "/b")
    assert (full["method"], full["entrypoint"], full["command"]) == ("POST", "/bin/bash -c", "echo")
    assert add(server, "/first", "--index", "0")["index"] == 0
    assert add(server, "/front", "--index", "-7")["index"] == 0
    assert add(server, "/end", "--index", "99", "--method", "get")["index"] == 4


def test_route_add_reads_files(server):
    path = server.directory / "command"
    path.write_bytes(b"printf '\xff\n'\n")
    assert add(server, "/f", str(path))["command"] == "printf '\udcff\n'\n"
    server.route(pattern="/unused")
    assert add(server, "/s", "-", input=b"from stdin\n")["command"] == "from stdin\n"
    assert add(server, "/e", "-c", "")["command"] == ""


def test_command_of_any_bytes(server):
    add(server, "/bytes", "-", input=b"printf '%s' '\xff\xc3\xa9' | kapow set /response/body")
    assert server.get("/bytes").body == b"\xff\xc3\xa9"


def test_route_list(server):
    first, second = add(server, "/a"), add(server, "/b", "-c", "two\nlines")
    done = server.ctl("route", "list")
    assert (done.returncode, json.loads(done.stdout)) == (0, [first, second])
    assert json.loads(server.ctl("route", "list", second["id"]).stdout) == second
    table = server.ctl("route", "list", "-o", "table").stdout.decode().splitlines()
    assert len(table) == 3 and table[0].startswith("INDEX") and "two\\nlines" in table[2]
    assert len(server.ctl("route", "list", "-o", "table", first["id"]).stdout.splitlines()) == 2


def test_route_list_on_a_terminal(server):
    add(server, "/a")
    leader, follower = os.openpty()
    subprocess.run([sys.executable, str(KAPOWCTL), "route", "list"], env=server.init_environment,
                   stdout=follower, timeout=DEADLINE, check=True)
    os.close(follower)
    assert os.read(leader, 100).startswith(b"INDEX")
    os.close(leader)


def test_route_remove(server):
    route = add(server, "/a")
    done = server.ctl("route", "remove", route["id"])
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    for command in ("remove", "list"):
        done = server.ctl("route", command, route["id"])
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr.decode() == f"kapowctl: route {route['id']}: Route Not Found\n"
    assert server.ctl("route", "remove", "../routes?x").returncode == 1


@pytest.mark.parametrize("arguments, words", [
    (["x"], "url_pattern"), (["/{"], "never closed"), (["/a", "-X", "a b"], "method"),
    (["/a", "-e", "'"], "entrypoint"),
])
def test_route_refused(server, arguments, words):
    done = server.ctl("route", "add", *arguments)
    assert (done.returncode, done.stdout) == (1, b"")
    message = done.stderr.decode()
    assert message.startswith("kapowctl: route ") and ": Invalid Route: " in message and words in message
    assert len(message.splitlines()) == 1


def test_kapow_hands_over(server):
    done = subprocess.run([sys.executable, str(KAPOW), "route", "list"], env=server.init_environment,
                          capture_output=True, timeout=DEADLINE)
    assert (done.returncode, json.loads(done.stdout)) == (0, [])


def test_options_override_the_environment(server):
    wrong = {"KAPOW_HANDLER_ID": "wrong", "KAPOW_DATA_URL": "http://127.0.0.1:1",
             "KAPOW_CONTROL_URL": "https://127.0.0.1:1"}
    data_url = server.init_environment["KAPOW_DATA_URL"]
    control_url = server.init_environment["KAPOW_CONTROL_URL"]
    with server.handler() as handler:
        for option in ("--handler", "--handler-id"):
            done = server.ctl("get", option, handler.id, "--data-url", data_url, "/request/method",
                              environment=wrong)
            assert (done.returncode, done.stdout) == (0, b"GET")
    done = server.ctl("route", "list", "--control-url", control_url, environment=wrong)
    assert done.returncode == 0
    older = {"KAPOW_CONTROL_URL": "", "KAPOW_CONTROLAPI_URL": control_url}
    assert server.ctl("route", "list", environment=older).returncode == 0


def test_wrong_bundle_in_the_environment_does_not_matter(server):
    environment = {"REQUESTS_CA_BUNDLE": "/dev/null", "CURL_CA_BUNDLE": "/dev/null",
                   "HTTPS_PROXY": "http://127.0.0.1:1"}
    assert server.ctl("route", "list", environment=environment).returncode == 0


def test_another_server_is_not_trusted(server, start_server):
    other = start_server()
    for name in CREDENTIALS[:1], CREDENTIALS[1:]:
        environment = {key: other.init_environment[key] for key in name}
        done = server.ctl("route", "list", environment=environment)
        assert (done.returncode, done.stdout) == (1, b"")
        assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def ctl(server):
    """A function that runs `kapowctl get|set` for one waiting handler."""
    with server.handler("POST", "?a=1&b%20c=2&d%25=3&e?=4", b"x" * 300_000) as handler:
        def call(*arguments, **options):
            return server.ctl(*arguments, environment={"KAPOW_HANDLER_ID": handler.id}, **options)
        call.handler = handler
        yield call


@pytest.mark.parametrize("resource, value", [
    ("/request/params/a", b"1"), ("request/params/a", b"1"), ("/request/params/b c", b"2"),
    ("/request/params/b%20c", b"2"), ("/request/params/d%25", b"3"), ("/request/params/d%", b"3"),
    ("/request/params/e?", b"4"), ("/request/body", b"x" * 300_000),
])
def test_get(ctl, resource, value):
    done = ctl("get", resource)
    assert (done.returncode, done.stdout, done.stderr) == (0, value, b"")
    assert ctl("get", "--", resource).stdout == value


@pytest.mark.parametrize("arguments, reason", [
    (["get", "/request/params/none"], "Resource Item Not Found"),
    (["get", "/nonsense"], "Invalid Resource Path"), (["get", ""], "Invalid Resource Path"),
    (["get", "/response/body"], "Invalid Resource Path"),
    (["set", "/request/method", "x"], "Invalid Resource Path"),
    (["set", "/response/status", "x"], "Non Integer Value"),
    (["set", "/response/status", "42"], "Invalid Status Code"),
    (["set", "/response/headers/X", "a\nb"], "Invalid Header"),
    (["get", "--handler", "none", "/request/method"], "Handler ID Not Found"),
    (["get", "--handler", "a b/c", "/request/method"], "Handler ID Not Found"),
])
def test_refused(ctl, arguments, reason):
    done = ctl(*arguments)
    assert (done.returncode, done.stdout) == (1, b"")
    resource = next(word for word in arguments[1:] if word[:1] in ("", "/"))
    assert done.stderr.decode() == f"kapowctl: {resource or '/'}: {reason}\n"


def test_set(ctl):
    for arguments, data in ((["a"], None), ([""], None), (["--", "-b"], None), ([], b"c\n"),
                            ([], b""), ([], b"\0" * 300_000), ([os.fsdecode(b"\xff")], None)):
        done = ctl("set", "/response/body", *arguments, input=data or b"")
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert ctl.handler.finish().body == b"a-bc\n" + b"\0" * 300_000 + b"\xff"


def test_set_streams_its_input(server):
    """What `kapowctl set` has read is on its way before its input ends."""
    with server.handler() as handler:
        writer = subprocess.Popen(
            [sys.executable, str(KAPOWCTL), "set", "/response/stream"], stdin=subprocess.PIPE,
            env={**server.init_environment, "KAPOW_HANDLER_ID": handler.id})
        writer.stdin.write(b"first")
        writer.stdin.flush()
        wait = threading.Event()
        for _ in range(DEADLINE * 20):      # until the head is out of the program's hands
            if handler.put("/response/status", b"200").status == 409:
                break
            wait.wait(0.05)
        else:
            pytest.fail("nothing was sent")
        writer.stdin.close()
        assert writer.wait(DEADLINE) == 0
        assert handler.finish().body == b"first"


def test_get_into_a_closed_pipe(ctl):
    tool = f'"{sys.executable}" "{KAPOWCTL}" get /request/body | head -c 1'
    done = subprocess.run(["/bin/sh", "-c", tool], capture_output=True, timeout=DEADLINE,
                          env={**ctl.handler.server.init_environment,
                               "KAPOW_HANDLER_ID": ctl.handler.id})
    assert (done.stdout, done.stderr) == (b"x", b"")


def test_get_onto_a_full_disk(ctl):
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, str(KAPOWCTL), "get", "/request/method"], stdout=full,
                              stderr=subprocess.PIPE, timeout=DEADLINE,
                              env={**ctl.handler.server.init_environment,
                                   "KAPOW_HANDLER_ID": ctl.handler.id})
    assert done.returncode == 1 and b"No space left" in done.stderr


@pytest.mark.parametrize("script", [KAPOW, KAPOWCTL])
def test_scripts_are_executable(script):
    assert pathlib.Path(script).stat().st_mode & 0o111 == 0o111
    assert pathlib.Path(script).read_text().startswith("#!/usr/bin/env python3\n")


def test_get_and_set_import_next_to_nothing():
    """The hot path: what a module costs to import is paid by every call."""
    code = (f"import sys; sys.path.insert(0, {str(KAPOWCTL.parent)!r}); before = set(sys.modules)\n"
            "import kapowctl\n"
            "status = kapowctl.main(['get', '/request/method'])\n"
            "print(status, *sorted(set(sys.modules) - before - {'kapowctl', 'os'}))")
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True,
                          timeout=DEADLINE, check=True,
                          env={"KAPOW_HANDLER_ID": "x", "KAPOW_DATA_URL": "http://127.0.0.1:1"})
    assert done.stdout.split() == ["1", "_socket"]


def test_options_stand_anywhere(server):
    route = add(server, "/z", "-X", "POST", "-", "--index", "0", input=b"c")
    assert (route["method"], route["command"], route["index"]) == ("POST", "c", 0)
    done = server.ctl("route", "add", "/z", "-c", "a", "file")
    assert (done.returncode, done.stderr) == (2, b"kapowctl: -c and a COMMAND_FILE exclude each other\n")
    with server.handler() as handler:
        done = server.ctl("set", "/response/body", "--handler", handler.id, "value")
        assert (done.returncode, handler.finish().body) == (0, b"value")


@pytest.mark.parametrize("words, status, output", [
    ("set /response/body <&-", 1, b"kapowctl: cannot read standard input: Bad file descriptor\n"),
    ("get /request/method >&-", 1, b"kapowctl: cannot write to standard output: Bad file descriptor\n"),
    ("get /request/params/none 2>&-", 1, b""),
    ("route list >&-", 1, b"kapowctl: cannot write to standard output: Bad file descriptor\n"),
    ("route list >/dev/full", 1, b"kapowctl: cannot write to standard output: No space left on device\n"),
    ("route list | true", 0, b""),
])
def test_closed_streams(ctl, words, status, output):
    done = subprocess.run(["/bin/sh", "-c", f'exec 2>&1; "{sys.executable}" "{KAPOWCTL}" {words}'],
                          capture_output=True, timeout=DEADLINE, stdin=subprocess.DEVNULL,
                          env={**ctl.handler.server.init_environment, "KAPOW_HANDLER_ID": ctl.handler.id})
    assert (done.returncode, done.stdout) == (status, output)


@pytest.mark.parametrize("answer", [
    b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"HTTP/1.1 x OK\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc", b"HTTP/1.1 500 Oh\r\nContent-Length: 2\r\n\r\n[]",
])
def test_garbage_is_one_line(answer):
    """Whatever answers, there is a sentence and no traceback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def serve():
            sock, _ = listener.accept()
            with sock:
                sock.recv(65536)
                sock.sendall(answer)
        thread = threading.Thread(target=serve)
        thread.start()
        url = "http://127.0.0.1:%d" % listener.getsockname()[1]
        done = run(KAPOWCTL, "get", "/x", environment={"KAPOW_HANDLER_ID": "x", "KAPOW_DATA_URL": url})
        thread.join()
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr


def test_control_url_must_be_https(server):
    done = server.ctl("route", "list", "--control-url", "http://127.0.0.1:1")
    assert (done.returncode, done.stdout) == (1, b"") and b"https://" in done.stderr
