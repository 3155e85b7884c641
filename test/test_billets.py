"""Billets: a directory of launchers, those in Bash, CGI programs, and plain files.

One server for all tests; each makes launchers with names of their own.
"""

import concurrent.futures
import contextlib
import email.utils
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import time
import uuid

import pytest

from conftest import DEADLINE, KAPOW, Server, read_all, wait_until, write_starter

import kapow

SETPRIV = shutil.which("setpriv")
ROOT_USER = os.geteuid() == 0
# A program that prints its environment.
DUMP = "#!/bin/sh\nprintf 'Content-Type: text/x-env\\n\\n'; env -0\n"


def fresh_name():
    """Return the name of a context that there is not yet."""
    return "c" + uuid.uuid4().hex


class Directory:
    """The directory of a server's launchers."""

    def __init__(self, path):
        self.path = path

    def write(self, text, name=None, mode=0o755):
        """Write the launcher of a fresh context, or of `name`; return that."""
        name = name or fresh_name()
        new = self.path / "new"
        new.write_bytes(text if isinstance(text, bytes) else text.encode())
        new.chmod(mode)
        new.rename(self.path / f"{name}.b")
        return name

    def bash(self, text, name=None):
        """As write(), for Bash."""
        return self.write("#!/bin/bash\n" + text, name)

    def cgi(self, text, name=None):
        """As write(), for a program of sh."""
        return self.write("#!/bin/sh\n" + text, name)

    def file(self, context, name, data=b"", directory="rsrc"):
        """Write a file of a context; return its path."""
        path = self.path / context / directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    @contextlib.contextmanager
    def default(self, text):
        """Have a file "default" for the length of a with statement."""
        path = self.path / "default"
        path.write_text(text)
        try:
            yield
        finally:
            path.unlink()


@pytest.fixture(scope="module")
def module_server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("server")
    (directory / "billets").mkdir()
    server = Server(directory, "--billets", "billets", "--max-body", "1MiB",
                    environment={"BILLPATH": f":{directory / 'more libs'}"})
    yield server
    assert server.control("PUT", "/routes", []).status_code == 200
    server._checked = len(server.log)       # each test has looked, and Bash says "unexpected"
    server.check_idle()
    for fd in OPEN:
        os.close(fd)
    OPEN.clear()
    assert server.stop() == 0
    server.check_gone()


@pytest.fixture
def server(module_server):
    """The module's server; after each test no request is left and no traceback was logged."""
    first = len(module_server.log)
    yield module_server
    wait_until(lambda: module_server.usage()[1] <= module_server.idle[1], "the end of all requests")
    assert not [line for line in module_server.log[first:] if "Traceback" in line]


@pytest.fixture
def billets(server):
    return Directory(server.directory / "billets")


@pytest.fixture
def restart(start_server, tmp_path):
    """A function that starts a server of the test's own; returns it and its Directory."""
    def start(*arguments, **options):
        path = tmp_path / fresh_name()
        path.mkdir()
        return start_server("--billets", path, *arguments, **options), Directory(path)
    return start


def ask(server, target, method="GET", headers=(), body=b"", version="1.1"):
    """Send one request, its bytes as they are given; return all that comes back."""
    lines = [f"{method} {target} HTTP/{version}", "Host: example.org:81", "Connection: close",
             *headers, "", ""]
    return server.raw("\r\n".join(lines).encode("latin-1") + body)


def environment(answer):
    """Return the environment that a DUMP has printed, a dict of bytes."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"text/x-env" in head, answer
    return dict(pair.split(b"=", 1) for pair in body.split(b"\0") if pair)


def dump(server, target, *arguments, **options):
    """As ask(), of a DUMP; return its environment."""
    return environment(ask(server, target, *arguments, **options))


def is_silent(server, path, method="GET"):
    """Tell whether the connection is closed without an answer, and logged as that."""
    silent = ask(server, path, method) == b""
    if silent:
        server.wait_access(rf'"{method} {re.escape(path)} HTTP/1.1" 444 ')
    return silent


def fifo(server):
    """Return the path of a new FIFO."""
    path = server.directory / uuid.uuid4().hex
    os.mkfifo(path)
    return path


def open_fifo(path):
    """Let who reads a FIFO go on, now or later."""
    fd = os.open(path, os.O_RDWR)       # which waits for no reader
    os.write(fd, b"\n")
    OPEN.append(fd)                     # what was written is gone when nobody has it open


OPEN = []


# Which launcher answers.

def test_what_is_there_is_served(server, billets):
    name = fresh_name()
    assert server.get(f"/{name}").status == 404
    billets.bash("billet:() { echo one; }", name)
    for path in (f"/{name}", f"/{name}/", f"/{name}?q", f"/{name}/a/b"):
        assert (server.get(path).status, server.get(path).body) == (200, b"one\n")
    billets.bash("billet:() { echo another; }", name)
    assert server.get(f"/{name}").body == b"another\n"
    launcher = billets.path / f"{name}.b"
    launcher.chmod(0o644)
    assert server.get(f"/{name}").status == 404
    launcher.chmod(0o755)
    assert server.get(f"/{name}").status == 200
    launcher.unlink()
    assert server.get(f"/{name}").status == 404


def test_routes_come_first(server, billets):
    name = billets.bash("billet:() { echo billet; }")
    server.route("kapow set /response/body route", "POST", f"/{name}")
    server.route("kapow set /response/body route", "GET", f"/{name}/{{x}}")
    assert server.get(f"/{name}").status == 405
    assert server.get(f"/{name}/x").body == b"route"
    assert server.get(f"/{name}/x/y").body == b"billet\n"


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW"])
def test_any_method(server, billets, method):
    name = billets.bash('billet:() { printf %s "$REQUEST_METHOD"; }')
    assert server.request(method, f"/{name}").body == method.encode()


def test_no_launcher(server, billets):
    """A directory, dangling links, an own directory alone: none of them is a context."""
    name = fresh_name()
    (billets.path / f"{name}.b").mkdir()
    dangling = fresh_name()
    (billets.path / f"{dangling}.b").symlink_to("none")
    loop = fresh_name()
    (billets.path / f"{loop}.b").symlink_to(f"{loop}.b")
    pipe = fresh_name()
    os.mkfifo(billets.path / f"{pipe}.b", 0o755)
    bare = fresh_name()
    billets.file(bare, "file", b"x")
    plain = fresh_name()
    (billets.path / plain).write_text("#!/bin/sh\n")
    (billets.path / plain).chmod(0o755)
    there = billets.bash("billet:() { echo default; }")
    for default in (None, there):
        with billets.default(default) if default else contextlib.nullcontext():
            for context in (name, dangling, loop, pipe):
                assert server.get(f"/{context}").status == 404
                assert server.get(f"/{context}/rsrc/file").status == 404
            for context in (bare, plain):
                assert server.get(f"/{context}").status == (200 if default else 404)
            assert server.get(f"/{bare}/rsrc/file").body == (
                b"default\n" if default else b'{"reason": "Not Found"}')


def test_launcher_that_is_a_link(server, billets):
    target = server.directory / "elsewhere"
    target.write_text("#!/bin/bash\nbillet:() { echo linked; }\n")
    target.chmod(0o755)
    name = fresh_name()
    (billets.path / f"{name}.b").symlink_to(target)
    assert server.get(f"/{name}").body == b"linked\n"


@pytest.mark.parametrize(
    "spelling",
    [
        ".",
        "..",
        "%2e",
        "%2e%2e",
        ".%2e",
        "",
        "%2f{}",
        "..%2f{dir}%2f{}",
        "../{dir}/{}",
        "{}%00",
        "%00",
        "{}%00.b",
        "{}.b",
        "{}%2e",
        "./{}",
        "%2e/{}",
        "{}%0a",
        "%ff{}",
        "x" * 300,
        "%5c{}",
        "{}%5c",
        "x/../{}",
        "~",
        "*",
        "?",
        "%3f",
        "%2a",
        "c*",
        "%24%7bHOME%7d",
        "%60true%60",
        "-e",
        "--",
        "-",
    ],
)
def test_names_that_are_no_context(server, billets, spelling):
    name = billets.bash("billet:() { echo found; }")
    path = "/" + spelling.replace("{}", name).replace("{dir}", billets.path.name)
    assert ask(server, path).startswith(b"HTTP/1.1 404 "), path


@pytest.mark.parametrize(
    "name",
    [
        "a b",
        "a;b",
        "$(id)",
        "`id`",
        "*",
        "?",
        "[a]",
        "-e",
        "--",
        "~",
        "é",
        "a'b",
        'a"b',
        "a\\b",
        "a\nb",
        "a&b",
        "a|b",
        "a=b",
        "...",
        "a:b",
        "default",
        "!x",
        "#x",
        "a.b",
        "%41",
    ],
)
def test_any_plain_name_is_a_context(server, billets, name):
    billets.bash('billet:x() { printf "%s|%s|%s" "$BILLET_CONTEXT" "$PATH_INFO" '
                 '"${BILLET_TRAIL[*]}"; }', name)
    try:
        quoted = "".join(f"%{byte:02x}" for byte in name.encode())
        assert server.get(f"/{quoted}/x").body == f"{name}|/x|{name} x".encode()
    finally:
        (billets.path / f"{name}.b").unlink()


def test_name_that_is_no_utf8(server, billets):
    path = os.fsencode(billets.path) + b"/\xff.b"
    pathlib.Path(os.fsdecode(path)).write_text('#!/bin/bash\nbillet:() { echo "$BILLET_CONTEXT"; }')
    os.chmod(path, 0o755)
    try:
        assert server.get("/%ff").body == b"\xff\n"
    finally:
        os.unlink(path)


def test_default(server, billets):
    there = billets.bash('billet:() { printf "%s|" "$SCRIPT_NAME" "$BILLET_PATH" "$PATH_INFO" '
                         '"$BILLET_CONTEXT" "${BILLET_TRAIL[@]}"; }')
    off = billets.write("#!/bin/bash\nbillet:() { echo; }", mode=0o644)
    billets.file(there, "file", b"static")
    assert server.get("/").status == 404
    with billets.default(f"{there}\n"):
        assert server.get("/").body == f"|/|/|{there}|{there}|".encode()
        assert server.get("/none/x").body == f"|/none/x|/none/x|{there}|{there}|none|x|".encode()
        assert server.get(f"/{there}/x").body == f"/{there}|/x|/x|{there}|{there}|x|".encode()
        assert server.get(f"/{off}").status == 404
        assert server.get("/rsrc/file").body == b"static"
        assert server.request("POST", "/rsrc/file").status == 405
        assert ask(server, "/none%00").startswith(b"HTTP/1.1 404 ")
        assert ask(server, "*", "OPTIONS").startswith((b"HTTP/1.1 404 ", b"HTTP/1.1 204 "))
    assert server.get("/").status == 404


@pytest.mark.parametrize("text", ["", "\n", "none\n", "../billets/{}\n", "/{}\n", ".\n", "..\n",
                                  "{}\n{}\n", "{}.b\n", "{}\0", "\0", "x" * 5000])
def test_bad_default(server, billets, text):
    name = billets.bash("billet:() { echo; }")
    with billets.default(text.replace("{}", name)):
        assert server.get("/").status == 404
        assert server.get(f"/{name}").status == 200


def test_default_that_is_no_file(server, billets):
    (billets.path / "default").mkdir()
    try:
        assert server.get("/").status == 404
    finally:
        (billets.path / "default").rmdir()


@pytest.mark.parametrize("directory", ["data", "temp", "libs", "rsrc2", "RSRC", "Rsrc", ".rsrc"])
def test_other_directories_are_not_served(server, billets, directory):
    name = billets.bash("billet:x() { :; }")
    billets.file(name, "secret", b"secret", directory)
    for path in (f"/{name}/{directory}/secret", f"/{name}/rsrc/../{directory}/secret",
                 f"/{name}/rsrc/%2e%2e/{directory}/secret", f"/{name}//{directory}/secret",
                 f"/{name}/rsrc%2f..%2f{directory}%2fsecret"):
        reply = ask(server, path)
        assert reply.startswith(b"HTTP/1.1 404 ") and b"secret" not in reply


# What a launcher is told.

def test_environment(server, billets):
    name = billets.write(DUMP)
    base = f"{billets.path}/{name}"
    seen = dump(server, f"/{name}/a%20b//c%2f..%2f%c3%a9?x=%20&y=a+b", headers=[
        "User-Agent: u", "X-One: 1", "X-One: 2", "Cookie: a=b", "Cookie: c=d", "X-Latin: \xe9"])
    expected = {
        "GATEWAY_INTERFACE": "CGI/1.1", "SERVER_PROTOCOL": "HTTP/1.1", "REQUEST_METHOD": "GET",
        "SERVER_NAME": "example.org", "SERVER_PORT": str(server.port("user")),
        "SERVER_SOFTWARE": f"Kapow/{kapow.VERSION}", "REMOTE_ADDR": "127.0.0.1",
        "QUERY_STRING": "x=%20&y=a+b", "SCRIPT_NAME": f"/{name}",
        "REQUEST_URI": f"/{name}/a%20b//c%2f..%2f%c3%a9?x=%20&y=a+b",
        "PATH_INFO": "/a b//c/../é", "BILLET_PATH": "/a b//c/../é",
        "HTTP_HOST": "example.org:81", "HTTP_USER_AGENT": "u", "HTTP_X_ONE": "1, 2",
        "HTTP_COOKIE": "a=b; c=d", "BILLET_BASE": str(billets.path), "BILLET_CONTEXT": name,
        "BILLET_DATA": f"{base}/data", "BILLET_RSRC": f"{base}/rsrc", "BILLET_LIBS": f"{base}/libs",
        "BILLET_TEMP": f"{base}/temp", "PWD": str(billets.path)}
    assert {key: os.fsdecode(seen.get(key.encode(), b"-")) for key in expected} == expected
    assert seen[b"HTTP_X_LATIN"] == b"\xe9"
    assert not {b"CONTENT_LENGTH", b"CONTENT_TYPE", b"HTTP_PROXY", b"BILLET_HEAD", b"BILLET_SETUP",
                b"HTTPS", b"KAPOW_CONTROL_CLIENT_KEY"} & set(seen)
    assert b"KAPOW_HANDLER_ID" in seen and b"KAPOW_DATA_URL" in seen


def test_environment_of_short_requests(server, billets):
    name = billets.write(DUMP)
    seen = environment(server.raw(f"GET /{name} HTTP/1.0\r\n\r\n".encode()))
    assert (seen[b"SERVER_PROTOCOL"], seen[b"QUERY_STRING"]) == (b"HTTP/1.0", b"")
    assert seen[b"SERVER_NAME"] and not seen.get(b"PATH_INFO")
    seen = dump(server, f"http://other.example:82/{name}/x?")
    assert (seen[b"PATH_INFO"], seen[b"QUERY_STRING"]) == (b"/x", b"")
    seen = environment(server.raw(f"GET /{name} HTTP/1.1\r\nHost: [::1]:80\r\n"
                                  "Connection: close\r\n\r\n".encode()))
    assert seen[b"SERVER_NAME"] == b"[::1]"


@pytest.mark.parametrize("header", [
    "Proxy", "PROXY", "proxy", "X_One", "Content_Length", "Content_Type", "_", "X_", "_Proxy",
    "HTTP_PROXY", "Content-Length_"])
def test_headers_that_are_not_passed(server, billets, header):
    seen = dump(server, f"/{billets.write(DUMP)}", headers=[f"{header}: evil"])
    assert b"evil" not in seen.values(), [key for key in seen if seen[key] == b"evil"]


def test_underscores_do_not_hide_true_headers(server, billets):
    seen = dump(server, f"/{billets.write(DUMP)}", headers=[
        "X_Real: evil", "X-Real: true", "x_real: evil", "Content-Type: true", "Content_Type: evil"])
    assert (seen[b"HTTP_X_REAL"], seen[b"CONTENT_TYPE"]) == (b"true", b"true")


def test_headers_become_nothing_else(server, billets):
    """No header can set a variable that is not HTTP_*, whatever its name."""
    plain = set(dump(server, f"/{billets.write(DUMP)}"))
    names = [
        "Path",
        "Bash-Env",
        "Ld-Preload",
        "Bash.Func.x%%",
        "Env",
        "X!",
        "#$%&'*+^`|~",
        "Status",
        "Billet-Setup",
        "Billet-Head",
        "Kapow-Handler-Id",
        "Request-Method",
        "Ifs",
    ]
    seen = set(dump(server, f"/{billets.write(DUMP)}",
                    headers=[f"{header}: () {{ :; }}; echo evil" for header in names]))
    assert all(key.startswith(b"HTTP_") for key in seen - plain) and plain <= seen


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("size", [1, 300_000])
def test_bodies(server, billets, framing, size):
    name = billets.cgi(
        'printf "Content-Type: application/x\\n\\n$CONTENT_LENGTH $CONTENT_TYPE\\n"\ncat'
    )
    body = os.urandom(size)
    data = body if framing == "length" else iter([body[:size // 2], body[size // 2:]])
    reply = server.request("POST", f"/{name}", data, {"Content-Type": "a/b"})
    assert reply.body == b"%d a/b\n" % size + body


@pytest.mark.parametrize(
    "headers, body, length",
    [
        ([], b"", None),
        (["Content-Length: 0"], b"", None),
        (["Transfer-Encoding: chunked"], b"0\r\n\r\n", b"0"),
    ],
)
def test_empty_bodies(server, billets, headers, body, length):
    name = billets.bash(
        'billet:() { readlink /proc/self/fd/0; cat; echo "${CONTENT_LENGTH-none}"; }'
    )
    answer = ask(server, f"/{name}", "POST", headers, body)
    *_, stdin, seen = answer.splitlines()
    assert seen in ((b"none", b"0") if headers else (b"none",))
    if not headers:
        assert stdin == b"/dev/null"


def test_body_that_is_not_read(server, billets):
    name = billets.bash("billet:() { echo done; }")
    with server.connect() as sock:
        sock.sendall(f"POST /{name} HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello"
                     f"GET /{name} HTTP/1.0\r\n\r\n".encode())
        assert read_all(sock).count(b"done\n") == 2


def test_expect_continue(server, billets):
    name = billets.bash("billet:() { cat; }")
    with server.connect() as sock:
        sock.sendall(
            f"POST /{name} HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nConnection: close\r\n"
            "Expect: 100-continue\r\n\r\n".encode()
        )
        assert sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"hello")
        assert read_all(sock).endswith(b"\r\n\r\nhello")


@pytest.mark.parametrize("headers, body, status", [
    (["Transfer-Encoding: chunked"], b"zz\r\n", b"400"), (["Content-Length: 2000000"], b"", b"413"),
    (["Transfer-Encoding: chunked"], b"100001\r\n" + b"x" * 0x100001 + b"\r\n0\r\n\r\n", b"413")])
def test_bad_bodies(server, billets, headers, body, status):
    """The launcher is not run."""
    mark = server.directory / uuid.uuid4().hex
    name = billets.bash(f"billet:() {{ echo > {mark}; }}")
    assert ask(server, f"/{name}", "POST", headers, body).startswith(b"HTTP/1.1 %b " % status)
    server.wait_access(rf'"POST /{name} HTTP/1.1" {status.decode()} ')
    assert not mark.exists()


def test_get_and_set(server, billets):
    """A launcher can use the resources besides."""
    for text in ("#!/bin/sh\nprintf 'X-Own: 1\\n\\n'\n%s", "#!/bin/bash\nbillet:() { %s\n}"):
        name = billets.write(text % "kapow get /request/method; kapow get /request/body; "
                             "kapow set /response/headers/X-Set 1; kapow get /route/id")
        reply = server.request("POST", f"/{name}", b"body")
        assert reply.body == f"POSTbody{name}.b".encode()
        assert reply.headers["X-Set"] == "1"


@pytest.mark.parametrize("text, status, kind, body", [
    ("kapow set /response/status 418", 418, None, b""),
    ("kapow set /response/body set", 200, None, b"set"),
    ("kapow set /response/status 418; echo x", 418, None, b"x\n"),
    ("kapow set /response/headers/Content-Type a/b; echo x", 200, "a/b", b"x\n"),
    ("kapow set /response/status 418; http_response 400; http_body", 400, None, b""),
])
def test_set_in_bash(server, billets, text, status, kind, body):
    reply = server.get("/" + billets.bash(f"billet:() {{ {text}; }}"))
    assert (reply.status, reply.body) == (status, body)
    if kind:
        assert reply.headers.get_all("Content-Type") == [kind]


def test_set_in_cgi(server, billets):
    reply = server.get(
        "/" + billets.cgi("kapow set /response/status 418; kapow set /response/body x")
    )
    assert (reply.status, reply.body) == (418, b"x")


# Nothing of a request is read by a shell.

HOSTILE = [
    "$(touch {})",
    "`touch {}`",
    ";touch {};",
    "'; touch {}; '",
    '"; touch {}; "',
    "|touch {}",
    "\ntouch {}\n",
    "a[$(touch {})]",
    "() { :; }; touch {}",
    "${x:-$(touch {})}",
    "&touch {}&",
    "x]] ; touch {} #",
    "-v a[$(touch {})]",
    "*",
    "%s%n%d",
]


def quote(text, kept=""):
    """Percent-encode all but `kept` and letters."""
    return "".join(chr(byte) if byte < 128 and (chr(byte).isalnum() or chr(byte) in kept)
                   else f"%{byte:02X}" for byte in text.encode())


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_requests(server, billets, text):
    mark = f"{server.directory}/hostile"
    text = text.replace("{}", mark)
    name = billets.bash('use mod\nbillet.setup() { :; }\nbillet:() { warn "$PATH_INFO"; '
                        'billet_url "$PATH_INFO"; http_header X-Q "$QUERY_STRING"; '
                        'printf "%s|" "${BILLET_TRAIL[@]}"; }')
    billets.file(name, "mod.bash", b"", "libs")
    line = re.sub(r"[\x00-\x1f]", " ", text)
    body = text.encode()
    reply = ask(
        server,
        f"/{name}/{quote(text)}/{quote(text, '/')}?{quote(text, '$();{}[]`|*')}",
        "POST",
        [
            f"X-Text: {line}",
            f"User-Agent: {line}",
            f"Cookie: {line}",
            f"Content-Type: {line}",
            f"Referer: {line}",
            f"Content-Length: {len(body)}",
        ],
        body,
    )
    assert reply.startswith(b"HTTP/1.1 200 "), reply
    trail = reply.partition(b"\r\n\r\n")[2]
    assert "|".join([name, *filter(None, f"{text}/{text}".split("/"))]).encode() + b"|" in trail
    assert not os.path.exists(mark)
    method = quote(text, "$`|*!'").replace("%", "'")
    ask(server, f"/{name}", method)
    ask(server, f"/{quote(text)}")
    assert not os.path.exists(mark)


def test_functions_of_no_handler_are_not_called(server, billets):
    """A path names handlers, and those that are functions; nothing else is run."""
    name = billets.bash(
        "billet.setup() { :; }\nbillet.before_request() { :; }\nother() { echo bad; }\n"
        "a:b() { echo bad; }\nbillet:a:b() { echo two; }\nbillet: () { echo none; }"
    )
    for path in (
        ".setup",
        "other",
        "a:b",
        "/a%3ab",
        "a%20b",
        ":a:b",
        "%3aa%3ab",
        "a%0ab",
        "echo",
        "-p",
        "a%3bid",
    ):
        assert server.get(f"/{name}/{path}").body == b"none\n", path
    for path in ("a/b", "a//b/", "/a/b", "a/b/c"):
        assert server.get(f"/{name}/{path}").body == b"two\n", path


# Launchers in Bash.


@pytest.mark.parametrize(
    "line, is_bash",
    [
        (b"#!/bin/bash", True),
        (b"#!/bin/bash\n", True),
        (b"#! /bin/bash\r\n", True),
        (b"#!/bin/bash -e\n", True),
        (b"#!/usr/bin/env bash\n", True),
        (b"#!/usr/bin/env -S bash -e\n", True),
        (b"#!/usr/bin/bill\n", True),
        (b"#!/usr/bin/env bill\n", True),
        (b"#!bash\n", True),
        (b"#!/bin/sh\n", False),
        (b"", False),
        (b"#!/bin/bashful\n", False),
        (b"#!/bin/rbash\n", False),
        (b"#!/bin/bash5\n", False),
        (b"#!/bin/sh\n#!/bin/bash\n", False),
        (b"#!/bin/sh\nbash\n", False),
        (b" #!/bin/bash\n", False),
        (b"/bin/bash\n", False),
        (b"#!/usr/bin/billy\n", False),
        (b"#!\n/bin/bash\n", False),
    ],
)
def test_lines_that_name_bash(line, is_bash):
    assert bool(kapow.BASH_LINE.match(line)) is is_bash


@pytest.mark.parametrize(
    "line", ["#!/usr/bin/env bash -e", "#!/none/bill", "#! /bin/bash", "#!bash"]
)
def test_sourced(server, billets, line):
    assert server.get("/" + billets.write(f"{line}\nbillet:() {{ echo x; }}")).body == b"x\n"


@pytest.mark.parametrize(
    "path, handler",
    [
        ("", "billet:"),
        ("/", "billet:"),
        ("/a", "billet:a"),
        ("/a/", "billet:a"),
        ("/a/b", "billet:a:b"),
        ("/a/b/c", "billet:a:b"),
        ("/a/x/c", "billet:a"),
        ("/x", "billet:"),
        ("/b/a", "billet:"),
        ("/a//b", "billet:a:b"),
        ("//a", "billet:a"),
        ("/%61", "billet:a"),
        ("/A", "billet:"),
        ("/é", "billet:é"),
        ("/a%20b", "billet:"),
        ("/a%2fb", "billet:a:b"),
        ("/../a", "billet:"),
        ("/x.y-z", "billet:x.y-z"),
        ("/a:b", "billet:"),
    ],
)
def test_handlers(server, billets, path, handler):
    name = "routing"
    if not (billets.path / f"{name}.b").exists():
        billets.bash("for name in : :a :a:b :x.y-z :é; do eval \"billet$name() { "
                     "printf %s \\\"\\$FUNCNAME\\\"; }\"; done", name)
    assert server.get(f"/{name}" + quote(path, "/%:.-")).body == handler.encode()


def test_no_handler(server, billets):
    name = billets.bash("billet:a() { echo a; }")
    assert server.get(f"/{name}/a").status == 200
    assert server.get(f"/{name}/b").status == server.get(f"/{name}").status == 404


def test_trail(server, billets):
    name = billets.bash('billet:() { printf "<%s>" "${BILLET_TRAIL[@]}"; }')
    for path, trail in {"": [], "/": [], "/a": ["a"], "/a/": ["a"], "//a///b//": ["a", "b"],
                        "/%20/*/%0a": [" ", "*", "\n"], "/%25/%5c/$x": ["%", "\\", "$x"],
                        "/a%20b/-n": ["a b", "-n"], "/%0a": ["\n"], "/a%0a/": ["a\n"]}.items():
        assert server.get(f"/{name}{path}").body.decode() == "".join(
            f"<{part}>" for part in [name, *trail]), path


def test_long_trail(server, billets):
    """The time for it does not explode."""
    name = billets.bash('billet:() { echo "${#BILLET_TRAIL[@]}"; }')
    with server.connect() as sock:
        sock.sendall(f"GET /{name}{'/a' * 4000} HTTP/1.0\r\n\r\n".encode())
        assert read_all(sock).endswith(b"\r\n\r\n4001\n")


@pytest.mark.parametrize(
    "text, status, fields, body",
    [
        ("echo hello", 200, {"Content-Type": "text/html"}, b"hello\n"),
        ("http_response; http_body; printf x", 200, {"Content-Type": "text/html"}, b"x"),
        ("http_response 201; http_header X-Y z; http_body; printf x", 201, {"X-Y": "z"}, b"x"),
        ("http_response 404 'Not Here'; http_body", 404, {}, b""),
        ("http_header Content-Type a/b; http_body; printf x", 200, {"Content-Type": "a/b"}, b"x"),
        (
            "http_header content-type a/b; printf x",
            200,
            {"content-type": "a/b", "Content-Type": None},
            b"x",
        ),
        (
            "http_header X-A 1; http_header X-B ' two words '; printf x",
            200,
            {"X-B": "two words"},
            b"x",
        ),
        (
            "http_header Set-Cookie a=b; http_header Set-Cookie c=d; http_body",
            200,
            {"Set-Cookie": "a=b"},
            b"",
        ),
        ("http_error 403", 403, {"Content-Type": "text/plain; charset=utf-8"}, None),
        ("http_error 403 'Go away'", 403, {}, b"Go away\n"),
        ("http_redirect /x", 302, {"Location": "/x"}, b""),
        ("http_redirect http://h/x 301", 301, {"Location": "http://h/x"}, b""),
        ("http_response 204; http_body", 204, {"Content-Type": None}, b""),
        ("http_response 304; http_body", 304, {}, b""),
        ("http_body", 200, {}, b""),
        ("http_response 200; false", 200, {}, b""),
        ("http_error 403 x; exit 3", 403, {}, b"x\n"),
        ("echo x; exit 3", 200, {}, b"x\n"),
        ("http_response 503; die gone", 503, {}, b""),
        ("exec > /dev/null; sleep 0.05; http_response 418; http_body", 418, {}, b""),
        ("http_header X-É x; echo x", 502, {}, None),
        ("http_header 'X Y' x; echo x", 502, {}, None),
        ("http_header X $'a\\nSet-Cookie: evil=1'; echo x", 200, {"Set-Cookie": None}, b"x\n"),
        ("http_header X $'a\\rSet-Cookie: evil=1'; echo x", 200, {"Set-Cookie": None}, b"x\n"),
        ("http_header $'X: y\\nSet-Cookie' evil=1; echo x", 200, {"Set-Cookie": None}, b"x\n"),
        ("http_response $'200\\nX-Evil: 1'; echo x", 200, {"X-Evil": None}, b"x\n"),
        ("http_response 99; echo x", 502, {}, None),
        ("http_response abc; echo x", 502, {}, None),
        ("http_response 1000; echo x", 502, {}, None),
        ("http_response 101; echo x", 502, {}, None),
        ("http_header Content-Length 3; printf abc", 200, {"Content-Length": "3"}, b"abc"),
        ("http_header Content-Length abc; printf abc", 502, {}, None),
        (
            "http_header Transfer-Encoding chunked; printf abc",
            200,
            {"Transfer-Encoding": None},
            b"abc",
        ),
        ('http_header X "$(printf %070000d 0)"; echo x', 502, {}, None),
        ("for i in {1..200}; do http_header X-$i 1; done; echo x", 502, {}, None),
        (
            'for name in A B; do http_header X-$name "$(printf %030000d 0)"; done; echo x',
            200,
            {},
            b"x\n",
        ),
        ("exec 1>&-; sleep 0.05; http_response 204", 204, {}, b""),
    ],
)
def test_responses(server, billets, text, status, fields, body):
    name = billets.bash(f"billet:() {{ {text}\n}}")
    for _ in range(2):
        answer = ask(server, f"/{name}")
        assert answer, "no answer"
        head, _, got = answer.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        seen = dict(line.split(": ", 1) for line in reversed(lines[1:]))
        assert lines[0].split(" ")[1] == str(status)
        assert {key: seen.get(key) for key in fields} == fields
        assert body is None or got == body


def test_reason(server, billets):
    name = billets.bash("billet:() { http_response 404 'Not Here'; http_body; }")
    assert server.get(f"/{name}").reason == "Not Here"


def test_large_body(server, billets):
    name = billets.bash("billet:() { http_header X-Y z; http_body; head -c 3000000 /dev/zero; }")
    reply = server.get(f"/{name}")
    assert (reply.body == bytes(3_000_000), reply.headers["X-Y"]) == (True, "z")


def test_head_request(server, billets):
    name = billets.bash("billet:() { http_header X-Y z; http_body; echo hello; }")
    with server.connect() as sock:
        sock.sendall(f"HEAD /{name} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
        answer = read_all(sock)
    assert (
        answer.startswith(b"HTTP/1.1 200 ")
        and answer.endswith(b"\r\n\r\n")
        and b"X-Y: z" in answer
    )


@pytest.mark.parametrize(
    "text",
    [
        "billet:() { :; }",
        "billet:() { exit 0; }",
        "billet:() { exit 3; }",
        "billet:() { die gone; }",
        "billet:() { kill -9 $$; }",
        "exit",
        "exit 3",
        "billet.before_request() { return 1; }",
        "billet.before_request() { exit 0; }",
        "billet.setup() { return 1; }",
        "billet.setup() { die no; }",
        "use none",
        "billet:() { use none; }",
        "use ../x",
        "use a/../b",
        "use /x",
        "use ''",
        "use .",
    ],
)
def test_no_answer(server, billets, text):
    assert is_silent(server, "/" + billets.bash(text))


def test_no_answer_closes_what_was_pipelined(server, billets):
    name = billets.bash("billet:() { :; }\nbillet:x() { echo x; }")
    with server.connect() as sock:
        sock.sendall(
            f"GET /{name}/x HTTP/1.1\r\nHost: h\r\n\r\nGET /{name} HTTP/1.1\r\nHost: h\r\n\r\n"
            f"GET /{name}/x HTTP/1.1\r\nHost: h\r\n\r\n".encode()
        )
        assert read_all(sock).count(b"HTTP/1.1 200") == 1


def test_hooks(server, billets):
    trace = server.directory / uuid.uuid4().hex
    name = billets.bash(
        f"note() {{ echo $1 >> {trace}; }}\n"
        "billet.setup() { note setup; own=1; }\n"
        "billet.before_request() { note before$own; [[ $QUERY_STRING != no ]] || http_error 403; "
        "[[ $QUERY_STRING != no ]]; }\n"
        "billet:() { note handler; http_body; echo x; return 3; }\n"
        "billet.after_request() { note after; return 4; }"
    )
    assert server.get(f"/{name}").body == b"x\n"
    assert trace.read_text().split() == ["setup", "before1", "handler", "after"]
    assert server.get(f"/{name}").body == b"x\n"
    assert trace.read_text().split()[4:] == ["before", "handler", "after"]
    assert server.get(f"/{name}?no").status == 403
    assert trace.read_text().split()[7:] == ["before"]


def test_after_request_comes_after_a_path_without_a_handler(server, billets):
    trace = server.directory / uuid.uuid4().hex
    name = billets.bash(f"billet.after_request() {{ echo > {trace}; }}")
    assert server.get(f"/{name}").status == 404
    assert trace.exists()


@pytest.mark.parametrize(
    "last", ["false", "(exit 2)", "(exit 127)", "[[ x == y ]]", "ls /none/none 2>/dev/null"]
)
def test_status_of_a_launcher_is_its_own_affair(server, billets, last):
    """It defines functions; what its last command returns says nothing."""
    assert server.get("/" + billets.bash(f"billet:() {{ echo x; }}\n{last}")).body == b"x\n"


@pytest.mark.parametrize(
    "options",
    [
        "set -e",
        "set -u",
        "set -euo pipefail",
        "set -f",
        "IFS=/",
        "IFS=",
        "shopt -s nullglob failglob",
        "shopt -s nocasematch",
        "set -o noclobber",
        "shopt -s extglob",
        "set -C; LC_ALL=C",
        "set -a",
        "trap 'true' EXIT",
    ],
)
def test_options_of_launchers(server, billets, options):
    name = billets.bash(
        f"{options}\nbillet.setup() {{ :; }}\nbillet.before_request() {{ :; }}\n"
        "billet:a:b() { http_response 201; http_header X-Y z; http_body; billet_url x; use mod; }\n"
        "billet.after_request() { :; }"
    )
    billets.file(name, "mod.bash", b"echo mod\n", "libs")
    for _ in range(2):
        reply = server.get(f"/{name}/a/b/c?*")
        assert (reply.status, reply.headers["X-Y"]) == (201, "z")
        assert reply.body == f"/{name}/x\nmod\n".encode()


def test_functions(server, billets):
    def said(text):
        return server.get("/" + billets.bash(text)).body

    name = billets.bash("billet:() { billet_url /a; billet_url b; billet_url ''; }")
    assert server.get(f"/{name}").body == f"/{name}/a\n/{name}/b\n/{name}/\n".encode()
    assert said("billet:() { need sh && ! need no-such-program && echo yes; }") == b"yes\n"
    assert said("f() { echo bad; }\nmain f\nbillet:() { main f; echo $?; }") == b"0\n"
    assert said("billet:() { warn a 'b  c' '*' %s; echo $?; }") == b"0\n"
    server.wait_log(r": a b  c \* %s$")
    assert said("billet:() { (die 'the end'); echo $?; }") == b"1\n"
    server.wait_log(r": the end$")


def test_url_of_a_name_that_must_be_quoted(server, billets):
    name = "sp ace"
    billets.bash('billet:() { http_redirect "$(billet_url there)"; }', name)
    assert server.get("/sp%20ace").headers["Location"] == "/sp%20ace/there"


def test_use(server, billets):
    name = billets.bash(
        "use one; use sub/two; use one; use www/http; use www/billet; use shared; use both\n"
        "billet:() { one; two; shared; both; echo $count; }"
    )
    more = server.directory / "more libs"
    more.mkdir(exist_ok=True)
    (more / "shared.bash").write_text("shared() { echo shared; }")
    (more / "both.bash").write_text("both() { echo wrong; }")
    billets.file(name, "one.bash", b"one() { echo one; }; ((++count))", "libs")
    billets.file(name, "sub/two.bash", b"two() { echo two; }; use sub/two", "libs")
    billets.file(name, "both.bash", b"both() { echo both; }", "libs")
    for _ in range(2):
        assert server.get(f"/{name}").body == b"one\ntwo\nshared\nboth\n1\n"
    broken = billets.bash("use broken && echo bad\nbillet:() { echo $?; }")
    billets.file(broken, "broken.bash", b"return 3", "libs")
    assert server.get(f"/{broken}").body == b"0\n"


def test_arguments_and_streams_of_launchers(server, billets):
    """Sourced without arguments, of the names with _billet it may know none."""
    name = billets.bash(
        'billet:() { echo "$#|$*|${BILLET_HEAD-}|${BILLET_SETUP-}|$PWD"; }\necho >&2'
    )
    assert server.get(f"/{name}").body == f"0||||{billets.path}\n".encode()


def test_endless_head(server, billets):
    """It is taken from, and nothing else is held up by that."""
    name = billets.bash(
        'value=$(printf %0100000d 0)\nbillet:() { while :; do http_header X "$value"; done; }'
    )
    with server.connect() as sock:
        sock.sendall(f"GET /{name} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        wait_until(server.children, "the launcher")
        route = server.route("kapow set /response/body alive")
        assert [server.get(route).body for _ in range(3)] == [b"alive"] * 3
    wait_until(lambda: not server.children(), "the launcher's end")


# billet.setup.

def counting_setup(server, more=":"):
    """Return the text of a launcher that counts its setups, and the file where it does."""
    trace = server.directory / uuid.uuid4().hex
    return (f"billet.setup() {{ echo x >> {trace}; {more}\n}}\n"
            f"billet:() {{ wc -l < {trace}; }}\n"), trace


def all_at_once(server, path, count=8):
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda _: ask(server, path), range(count)))


def test_setup_once(server, billets):
    text, trace = counting_setup(server)
    name = billets.bash(text)
    for _ in range(3):
        assert server.get(f"/{name}").body.strip() == b"1"
    for change in ("touch", "rewrite"):
        seen = trace.read_text()
        if change == "touch":
            os.utime(billets.path / f"{name}.b", ns=(1, 1))
        else:
            billets.bash(text + "# changed", name)
        for _ in range(3):
            server.get(f"/{name}")
        assert trace.read_text() == seen + "x\n"


def test_short_setups_are_noted(server, billets):
    """Also when the launcher ends at the moment at which that is read."""
    trace = server.directory / uuid.uuid4().hex
    names = [
        billets.bash(
            f"billet.setup() {{ echo x >> {trace}; }}\nbillet.before_request() {{ exit; }}"
        )
        for _ in range(30)
    ]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            list(pool.map(lambda name: ask(server, f"/{name}"), names))
    assert trace.read_text().count("x") == len(names)


def test_setup_once_under_concurrent_first_requests(server, billets):
    gate = fifo(server)
    text, trace = counting_setup(server, f"read < {gate}; echo done >> {trace_of(server)}")
    name = billets.bash(text + f"billet.before_request() {{ grep -q done {trace_of(server)}; }}")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, server, f"/{name}") for _ in range(8)]
        wait_until(trace.exists, "the setup")
        other = billets.bash("billet:() { echo other; }")
        assert server.get(f"/{other}").body == b"other\n"        # other contexts do not wait
        assert not any(answer.done() for answer in answers)
        open_fifo(gate)
        assert all(answer.result().endswith(b"\r\n\r\n1\n") for answer in answers)
    assert trace.read_text() == "x\n"


def trace_of(server):
    return server.directory / "setup-done"


def test_setup_again_after_a_failure(server, billets):
    go = server.directory / uuid.uuid4().hex
    text, trace = counting_setup(server, f"[[ -e {go} ]]")
    name = billets.bash(text)
    assert [is_silent(server, f"/{name}") for _ in range(2)] == [True, True]
    assert all_at_once(server, f"/{name}", 4) == [b""] * 4
    assert trace.read_text() == 6 * "x\n"
    go.touch()
    assert all(answer.endswith(b"\r\n\r\n7\n") for answer in all_at_once(server, f"/{name}", 4))


@pytest.mark.parametrize(
    "failure",
    [
        "http_error 503 later; return 1",
        "http_error 503 later; exit 0",
        "http_error 503 later; kill -9 $BASHPID",
    ],
)
def test_setup_that_fails_with_a_response(server, billets, failure):
    text, trace = counting_setup(server, failure)
    name = billets.bash(text)
    for _ in range(2):
        reply = server.get(f"/{name}")
        assert (reply.status, reply.body) == (503, b"later\n")
    assert trace.read_text() == "x\nx\n"


def test_setup_whose_client_leaves(server, billets):
    """It is killed like any launcher, and the next one does it."""
    gate = fifo(server)
    text, trace = counting_setup(server, f"[[ -e {gate}.go ]] || read < {gate}")
    name = billets.bash(text)
    with server.connect() as sock:
        sock.sendall(f"GET /{name} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        wait_until(trace.exists, "the setup")
        with server.connect() as waiting:
            waiting.sendall(f"GET /{name}?leaves HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        server.wait_access(rf'"GET /{name}\?leaves HTTP/1.1" 499 ')
        pathlib.Path(f"{gate}.go").touch()
    server.wait_access(rf'"GET /{name} HTTP/1.1" 499 ')
    assert server.get(f"/{name}").body.strip() == b"2"


def test_waiting_for_a_setup_ends_with_the_client(server, billets):
    """Nothing of the launcher is run for one that waited and left."""
    gate, mark = fifo(server), server.directory / uuid.uuid4().hex
    text, trace = counting_setup(server, f"read < {gate}")
    name = billets.bash(f"trap '' TERM\necho x >> {mark}\n" + text)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, server, f"/{name}")
        wait_until(trace.exists, "the setup")
        for number in range(5):
            with server.connect() as waiting:
                waiting.sendall(f"GET /{name}?{number} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        for number in range(5):
            server.wait_access(rf'"GET /{name}\?{number} HTTP/1.1" 499 ')
        open_fifo(gate)
        assert first.result().endswith(b"1\n")
    assert mark.read_text() == "x\n"


def test_setup_that_prints_much(server, billets):
    name = billets.bash("billet.setup() { head -c 200000 /dev/zero; }\nbillet:() { printf x; }")
    assert server.get(f"/{name}").body == bytes(200_000) + b"x"
    assert server.get(f"/{name}").body == b"x"


# CGI.

@pytest.mark.parametrize("data, parsed", [
    (b"Content-Type: a/b", (None, None, None, [(b"Content-Type", b"a/b")])),
    (b"Content-Type: a/b\r\nX: y", (None, None, None, [(b"Content-Type", b"a/b"), (b"X", b"y")])),
    (b"Status: 404", (404, "", None, [])),
    (b"status:404 Not Here\nX:y", (404, "Not Here", None, [(b"X", b"y")])),
    (b"STATUS: 999 caf\xe9", (999, "caf\xe9", None, [])),
    (b"Location: /x", (None, None, b"/x", [(b"Location", b"/x")])),
    (b"location: http://h/\nStatus: 301", (301, "", b"http://h/", [(b"location", b"http://h/")])),
    (b"Transfer-Encoding: chunked\nConnection: close\nX: y", (None, None, None, [(b"X", b"y")])),
    (b"X: a: b", (None, None, None, [(b"X", b"a: b")])),
    (b"X:", (None, None, None, [(b"X", b"")])),
    (b"X: a\nX: b", (None, None, None, [(b"X", b"a"), (b"X", b"b")])),
])
def test_parse_cgi_head(data, parsed):
    status, reason, location, fields = kapow.parse_cgi_head(data)
    assert (status, reason or parsed[1] and reason, location, fields) == parsed


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK",
        b"HTTP/1.1 200 OK\nContent-Type: a/b",
        b"HTTP/",
        b"nonsense",
        b"X y: z",
        b": x",
        b" X: y",
        b"X: y\n folded",
        b"X: \0",
        b"X: a\rb",
        b"Status: 99",
        b"Status: 100",
        b"Status: 101 Switching",
        b"Status: 1000",
        b"Status:",
        b"Status: abc",
        b"Status: +200",
        b"Status: 200OK",
        b"Status: 200 a\x01",
        b"X\xff: y",
        b"\n".join(b"X: y" for _ in range(101)),
        b"<html>",
        b"X : y",
        b"X: y\r\r\nZ: a",
    ],
)
def test_parse_cgi_head_refuses(data):
    with pytest.raises(kapow.BadProgram):
        kapow.parse_cgi_head(data)


@pytest.mark.parametrize(
    "text, status, fields, body",
    [
        ("Content-Type: a/b\\n\\nhello", 200, {"Content-Type": "a/b"}, b"hello"),
        ("Content-Type: a/b\\r\\n\\r\\nhello\\r\\n", 200, {"Content-Type": "a/b"}, b"hello\r\n"),
        ("Content-Type: a/b\\r\\n\\nhello", 200, {"Content-Type": "a/b"}, b"hello"),
        ("X: y\\n\\n\\n\\nhello", 200, {"X": "y"}, b"\n\nhello"),
        ("Status: 404 Not Here\\n\\n", 404, {}, b""),
        ("Status: 201\\nX: y\\n\\nx", 201, {"X": "y", "Status": None}, b"x"),
        ("Location: http://h/\\n\\n", 302, {"Location": "http://h/"}, b""),
        ("Location: http://h/\\nStatus: 301\\n\\nmoved", 301, {"Location": "http://h/"}, b"moved"),
        ("Location: /x\\nStatus: 303\\n\\n", 303, {"Location": "/x"}, b""),
        ("Status: 204\\n\\n", 204, {}, b""),
        ("Status: 304\\n\\n", 304, {}, b""),
        (
            "X: y\\nTransfer-Encoding: chunked\\nConnection: keep-alive\\n\\nx",
            200,
            {"Transfer-Encoding": None},
            b"x",
        ),
        ("Content-Length: 3\\n\\nabcdef", 200, {"Content-Length": "3"}, b"abc"),
        ("Content-Type: text/event-stream\\n\\ndata: x\\n\\n", 200, {}, None),
        ("HTTP/1.1 200 OK\\r\\nContent-Type: a/b\\r\\n\\r\\nx", 502, {}, None),
        ("HTTP/1.1 200 OK\\n", 502, {}, None),
        ("Content-Type: a/b\\n", 502, {}, None),
        ("Content-Type", 502, {}, None),
        ("hello", 502, {}, None),
        ("\\n", 502, {}, None),
        ("\\n\\nhello", 502, {}, None),
        ("\\nhello", 502, {}, None),
        ("<html>\\n\\n</html>", 502, {}, None),
        ("Status: 99\\n\\n", 502, {}, None),
        ("Content-Length: abc\\n\\nabc", 502, {}, None),
        ("Content-Length: -1\\n\\nabc", 502, {}, None),
        ("Content-Length: 3\\nContent-Length: 4\\n\\nabc", 502, {}, None),
        ("X: \\001\\n\\nx", 502, {}, None),
        ("X: y\\n Y: z\\n\\nx", 502, {}, None),
    ],
)
@pytest.mark.parametrize("end", ["", "; exit 3"])
def test_cgi_responses(server, billets, text, status, fields, body, end):
    answer = ask(server, "/" + billets.cgi(f"printf '{text}'{end}"))
    assert answer, "no answer"
    head, _, got = answer.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    seen = dict(line.split(": ", 1) for line in lines[1:])
    assert lines[0].split(" ")[1] == str(status)
    assert {key: seen.get(key) for key in fields} == fields
    assert body is None or got == body


@pytest.mark.parametrize("text", ["exit", "exit 3", "echo >&2", "kill -9 $$", "exec >&-; exit"])
def test_cgi_without_a_word(server, billets, text):
    assert is_silent(server, "/" + billets.cgi(text))


def test_cgi_head_in_pieces(server, billets):
    gate = fifo(server)
    name = billets.cgi(
        f"printf 'Content-Type: a/b\\r'; read x < {gate}; printf '\\n\\r'; read x < {gate}; "
        "printf '\\nhello'"
    )
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.get, f"/{name}")
        open_fifo(gate)
        open_fifo(gate)
        reply = answer.result()
    assert (reply.status, reply.headers["Content-Type"], reply.body) == (200, "a/b", b"hello")


def test_cgi_head_that_is_too_large(server, billets):
    for text in ("printf 'X: %070000d' 0; echo; echo", "printf 'X: %070000d\\n\\nx' 0",
                 "while :; do echo 'X: y' || exit; done"):
        assert ask(server, "/" + billets.cgi(text)).startswith(b"HTTP/1.1 502 "), text


def test_cgi_in_python(server, billets):
    name = billets.write(
        f"#!{sys.executable} -S\nimport os, sys\nprint('Content-Type: text/plain\\n')\n"
        "print(sys.argv[1:], os.environ['PATH_INFO'], sys.stdin.read(), end='')\n"
    )
    assert server.request("POST", f"/{name}/x", b"body").body == b"[] /x body"


def test_cgi_has_no_arguments(server, billets):
    """RFC 3875 section 4.4 would have them, of a query without '='."""
    assert (
        server.get("/" + billets.cgi("printf 'X: y\\n\\n'; echo \"$#\"") + "?-a+-b").body == b"0\n"
    )


# Local redirects.

def test_local_redirect(server, billets):
    there = billets.write(DUMP)
    name = billets.cgi(f"cat >/dev/null; printf 'Location: /{there}/x%%20y?q=1\\n\\n'")
    seen = dump(
        server, f"/{name}", "POST", ["Content-Length: 4", "Content-Type: a/b", "X-One: 1"], b"body"
    )
    assert {
        key: seen.get(key)
        for key in (
            b"REQUEST_METHOD",
            b"PATH_INFO",
            b"QUERY_STRING",
            b"HTTP_X_ONE",
            b"CONTENT_LENGTH",
            b"CONTENT_TYPE",
            b"SERVER_NAME",
        )
    } == {
        b"REQUEST_METHOD": b"GET",
        b"PATH_INFO": b"/x y",
        b"QUERY_STRING": b"q=1",
        b"HTTP_X_ONE": b"1",
        b"CONTENT_LENGTH": None,
        b"CONTENT_TYPE": None,
        b"SERVER_NAME": b"example.org",
    }
    server.wait_access(rf'"POST /{name} HTTP/1.1" 200 ')


def test_local_redirects_elsewhere(server, billets):
    route = server.route("kapow set /response/body route")
    context = billets.bash("billet:() { :; }")
    billets.file(context, "f.txt", b"file")
    silent = f"/{context}"
    name = billets.cgi('printf "Location: $QUERY_STRING\\n\\n"')
    with server.connect() as sock:
        for target, status, body in (
            (route, b"200", b"route"),
            (f"/{context}/rsrc/f.txt", b"200", b"file"),
            ("/none", b"404", None),
            (f"/{context}/rsrc/../x", b"404", None),
            (f"/{name}?{route}", b"200", b"route"),
        ):
            answer = ask(server, f"/{name}?{target}")
            assert answer.startswith(b"HTTP/1.1 %b " % status), target
            assert body is None or answer.endswith(b"\r\n\r\n" + body)
            sock.sendall(f"GET /{name}?{target} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        sock.sendall(b"GET /none HTTP/1.0\r\n\r\n")
        assert len(re.findall(rb"HTTP/1.1 \d\d\d ", read_all(sock))) == 6
    assert ask(server, f"/{name}?{silent}") == b""
    answer = ask(server, f"/{name}?{route}", "HEAD")
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"\r\n\r\n")


def test_local_redirects_without_end(server, billets):
    name = fresh_name()
    billets.cgi(f"printf 'Location: /{name}\\n\\n'", name)
    assert server.get(f"/{name}").status in (500, 502)
    assert server.get("/none").status == 404


@pytest.mark.parametrize(
    "location", ["/a b", "/\\351", "/%%zz", "/x#y", "//evil/x", "/" + 9000 * "x"]
)
def test_local_redirect_to_what_is_no_path(server, billets, location):
    """That is the launcher's mistake, not the client's."""
    answer = ask(server, "/" + billets.cgi(f"printf 'Location: {location}\\n\\n'"))
    assert re.match(rb"HTTP/1.1 (404|502|500|302) ", answer), answer
    assert (b"Location: //" in answer) == location.startswith("//")


def test_local_redirect_after_something_else_was_said(server, billets):
    route = server.route("kapow set /response/body route")
    name = billets.cgi(f"kapow set /response/stream begun; printf 'Location: {route}\\n\\n'")
    answer = ask(server, f"/{name}")
    assert answer.count(b"HTTP/1.1") == 1 and b"begun" in answer
    with server.connect() as sock:
        sock.sendall(f"GET /{name} HTTP/1.1\r\nHost: h\r\n\r\nGET /none HTTP/1.0\r\n\r\n".encode())
        answer = read_all(sock)
    # Either the body is whole and the next request answered, or the connection is cut.
    assert b"0\r\n\r\n" in answer or b" 404 " not in answer


# Launchers that cannot be run, and what goes wrong in those that can.


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "#!\n",
        "#!/none/none\n",
        "no interpreter\n",
        "#!/\n",
        "#!none\n",
        b"\x7fELF",
        b"\x7fELF" + bytes(200),
        b"\0" * 10,
        b"#!/bin/sh\r\nexit\r\n",
    ],
)
def test_launcher_that_cannot_be_run(server, billets, text):
    name = billets.write(text)
    for _ in range(2):
        assert server.get(f"/{name}").status == 500
    server.wait_log(rf"cannot run .*{name}\.b: ")


@pytest.mark.parametrize("text", ["if", "billet:() {", "echo )", "billet:() { echo \"; }", "fi; "])
def test_launcher_with_a_broken_syntax(server, billets, text):
    name = billets.bash(text)
    assert is_silent(server, f"/{name}")
    server.wait_log(rf"{name}\.b: line \d")


def test_bash_that_is_empty(server, billets):
    assert server.get("/" + billets.bash("")).status == 404


@pytest.mark.parametrize("text, status", [
    ("#!/bin/bash\nbillet:() { echo x; }\n%s", 200), ("#!/bin/sh\n%s\nprintf 'X: y\\n\\nx'", 200)])
def test_megabytes_to_stderr(server, billets, text, status):
    mark = uuid.uuid4().hex
    name = billets.write(text % f"head -c 3000000 /dev/zero | tr '\\0' x >&2; echo {mark} >&2")
    assert server.get(f"/{name}").status == status
    assert len(server.wait_log(f"x*{mark}").group()) > 3_000_000
    server.log[:] = [line for line in server.log if mark not in line]   # which is in the way


def test_what_is_left_in_the_background(server, billets):
    """It neither holds the response open nor is killed."""
    for text in (
        "#!/bin/bash\nbillet:() { %s echo x; }",
        "#!/bin/sh\nprintf 'X: y\\n\\n'; %s echo x",
    ):
        gate = fifo(server)
        name = billets.write(text % f"(read x < {gate}; echo late) &")
        assert server.get(f"/{name}").body == b"x\n"
        assert server.children()
        open_fifo(gate)
        wait_until(lambda: not server.children(), "its end")


@pytest.mark.parametrize("text", [
    "#!/bin/bash\nbillet:() { http_header Content-Type text/event-stream; http_body; %s\n}",
    "#!/bin/sh\nprintf 'Content-Type: text/event-stream; charset=utf-8\\n\\n'; %s",
    "#!/bin/sh\nprintf 'content-type: Text/Event-Stream\\n\\n'; %s"])
def test_streams(server, billets, text):
    """Events go on as they come."""
    gate = fifo(server)
    name = billets.write(text % f"echo data: 1; read x < {gate}; echo data: 2")
    with server.connect() as sock:
        sock.settimeout(2)
        sock.sendall(f"GET /{name} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
        got = b""
        while b"data: 1" not in got:
            got += sock.recv(65536)
        open_fifo(gate)
        assert b"data: 2" in read_all(sock)


def test_client_that_leaves(server, billets):
    for text in ("#!/bin/bash\nbillet:() { %s\n}", "#!/bin/sh\n%s\n"):
        gate = fifo(server)
        mark = server.directory / uuid.uuid4().hex
        name = billets.write(text % f"trap 'echo > {mark}.term; exit' TERM; echo > {mark}; "
                             f"while :; do read x < {gate}; done")
        with server.connect() as sock:
            sock.sendall(f"GET /{name} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
            wait_until(mark.exists, "the launcher")
        server.wait_access(rf'"GET /{name} HTTP/1.1" 499 ')
        assert pathlib.Path(f"{mark}.term").exists()


def test_client_that_leaves_within_its_body(server, billets):
    mark = server.directory / uuid.uuid4().hex
    name = billets.bash(f"billet:() {{ echo > {mark}; }}")
    with server.connect() as sock:
        sock.sendall(f"POST /{name} HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\nhalf".encode())
    server.wait_access(rf'"POST /{name} HTTP/1.1" (400|499) ')
    assert not mark.exists()


def test_slow_client_slows_the_launcher(server, billets):
    name = billets.cgi("printf 'X: y\\n\\n'; head -c 30000000 /dev/zero")
    with server.connect() as sock:
        sock.sendall(f"GET /{name} HTTP/1.0\r\n\r\n".encode())
        assert sock.recv(10)
        wait_until(server.children, "the launcher")
        assert len(read_all(sock)) > 30_000_000


def test_many_at_once(server, billets):
    bash = billets.bash('billet:() { cat; echo "$QUERY_STRING"; }')
    cgi = billets.cgi("printf 'X: y\\n\\n'; cat; echo \"$QUERY_STRING\"")

    def one(number):
        name = bash if number % 2 else cgi
        return server.request("POST", f"/{name}?{number}", b"%d," % number).body

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(60))) == [b"%d,%d\n" % (n, n) for n in range(60)]


# Plain files.

@pytest.fixture
def files(billets):
    """The name of a context with files."""
    name = "files"
    if not (billets.path / f"{name}.b").exists():
        billets.bash("billet:() { echo launcher; }", name)
        path = billets.file(name, "ten.txt", b"0123456789")
        os.utime(path, (1_700_000_000, 1_700_000_000))
        billets.file(name, "empty", b"")
        billets.file(name, "sub/deep/page.html", b"<p>")
        billets.file(name, "large.bin", bytes(1_500_000))
    return name


@pytest.mark.parametrize(
    "name, kind",
    [
        ("x.txt", "text/plain; charset=utf-8"),
        ("x.html", "text/html; charset=utf-8"),
        ("x.png", "image/png"),
        ("x.css", "text/css; charset=utf-8"),
        ("x.json", "application/json"),
        ("x", "application/octet-stream"),
        ("x.none", "application/octet-stream"),
        ("a b%é.txt", "text/plain; charset=utf-8"),
        (".hidden.png", "image/png"),
        ("x.tar.gz", "application/octet-stream"),
        ("sub/rsrc/x.svg", "image/svg+xml"),
    ],
)
def test_files(server, billets, name, kind):
    context = billets.bash("")
    path = billets.file(context, name, b"hello")
    for method in ("GET", "HEAD"):
        reply = server.request(method, f"/{context}/rsrc/{quote(name, '/')}")
        assert (reply.status, reply.body) == (200, b"hello" if method == "GET" else b"")
        assert reply.headers["Content-Type"] == kind
        assert reply.headers["Content-Length"] == "5"
        assert reply.headers["Last-Modified"] == email.utils.formatdate(
            int(path.stat().st_mtime), usegmt=True
        )
        assert re.fullmatch(r'"[^"]+"', reply.headers["ETag"])
    path.unlink()
    assert server.get(f"/{context}/rsrc/{quote(name, '/')}").status == 404


def test_large_file(server, files):
    with server.connect() as sock:
        sock.sendall(f"GET /{files}/rsrc/large.bin HTTP/1.1\r\nHost: h\r\n\r\n"
                     f"GET /{files}/rsrc/ten.txt HTTP/1.0\r\n\r\n".encode())
        answer = read_all(sock)
    assert answer.endswith(b"\r\n\r\n0123456789") and answer.count(b"\0") == 1_500_000
    server.wait_access(rf'"GET /{files}/rsrc/large.bin HTTP/1.1" 200 1500000 ')


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "/none",
        "/sub",
        "/sub/",
        "/sub/deep/",
        "/ten.txt/",
        "/ten.txt/x",
        "//ten.txt",
        "/sub//deep/page.html",
        "/./ten.txt",
        "/sub/../ten.txt",
        "/%2e/ten.txt",
        "/sub/%2e%2e/ten.txt",
        "/sub%2f..%2ften.txt",
        "/ten.txt%00",
        "/..%00/x",
        "/..",
        "/../rsrc/ten.txt",
        "/../../files.b",
        "/%2e%2e%2f%2e%2e%2ffiles.b",
        "/..%5cfiles.b",
        "/.%2e/.%2e/files.b",
        "/%252e%252e/files.b",
        "/..%c0%af..%c0%affiles.b",
        "/" + "x" * 300,
        "/" + "x/" * 2000,
        "/%2fetc%2fpasswd",
        "//etc/passwd",
        "/..;/x",
        "/ten.txt%20",
        "/ten.txt.",
        "/TEN.TXT",
        "/~",
        "/*",
        "/%ff",
    ],
)
def test_paths_of_no_file(server, files, path):
    answer = ask(server, f"/{files}/rsrc{path}")
    assert answer.startswith(b"HTTP/1.1 404 "), answer[:200]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "get"])
def test_other_methods_for_files(server, files, method):
    for path in ("ten.txt", "none", ""):
        reply = server.request(method, f"/{files}/rsrc/{path}")
        assert (reply.status, reply.headers["Allow"]) == (405, "GET, HEAD")


def test_links_are_not_followed(server, billets, files):
    context = billets.bash("")
    rsrc = billets.path / context / "rsrc"
    billets.file(context, "real/file", b"real")
    outside = server.directory / "outside"
    outside.mkdir()
    (outside / "file").write_text("secret")
    (rsrc / "to-file").symlink_to(outside / "file")
    (rsrc / "to-directory").symlink_to(outside)
    (rsrc / "inside").symlink_to("real/file")
    (rsrc / "real/up").symlink_to("..")
    (rsrc / "dangling").symlink_to("none")
    (rsrc / "loop").symlink_to("loop")
    os.mkfifo(rsrc / "pipe")
    for path in (
        "to-file",
        "to-directory/file",
        "inside",
        "real/up/real/file",
        "dangling",
        "loop",
        "loop/x",
        "pipe",
    ):
        assert server.get(f"/{context}/rsrc/{path}").status == 404, path
    assert server.get(f"/{context}/rsrc/real/file").body == b"real"


def test_files_of_a_launcher_that_is_off(server, billets):
    context = billets.bash("")
    billets.file(context, "x", b"x")
    (billets.path / f"{context}.b").chmod(0o644)
    assert server.get(f"/{context}/rsrc/x").status == 404


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"If-None-Match": "{etag}"}, 304),
        ({"If-None-Match": "W/{etag}"}, 304),
        ({"If-None-Match": "*"}, 304),
        ({"If-None-Match": '"x", {etag} , "y"'}, 304),
        ({"If-None-Match": '"x"'}, 200),
        ({"If-None-Match": "x"}, 200),
        ({"If-None-Match": ""}, 200),
        ({"If-Modified-Since": "{date}"}, 304),
        ({"If-Modified-Since": "Fri, 01 Jan 2038 00:00:00 GMT"}, 304),
        ({"If-Modified-Since": "Tue, 14 Nov 2023 22:13:19 GMT"}, 200),
        ({"If-Modified-Since": "Tue, 14 Nov 2023 22:13:20 GMT"}, 304),
        ({"If-Modified-Since": "Tuesday, 14-Nov-23 22:13:20 GMT"}, 304),
        ({"If-Modified-Since": "Tue Nov 14 22:13:20 2023"}, 304),
        ({"If-Modified-Since": "Tue Nov 14 22:13:19 2023"}, 200),
        ({"If-Modified-Since": "nonsense"}, 200),
        ({"If-Modified-Since": "99999999999"}, 200),
        ({"If-Modified-Since": "Tue, 99 Nov 99999 99:99:99 GMT"}, 200),
        ({"If-Modified-Since": "Tue, 14 Nov 2023 22:13:20 +99999999"}, 200),
        ({"If-None-Match": '"x"', "If-Modified-Since": "{date}"}, 200),
        ({"If-None-Match": "{etag}", "If-Modified-Since": "Tue, 14 Nov 2000 22:13:20 GMT"}, 304),
        ({"If-None-Match": "{etag}", "Range": "bytes=0-1"}, 304),
    ],
)
def test_validators(server, files, headers, status):
    path = f"/{files}/rsrc/ten.txt"
    first = server.get(path)
    assert first.headers["Last-Modified"] == "Tue, 14 Nov 2023 22:13:20 GMT"
    values = {"{etag}": first.headers["ETag"], "{date}": first.headers["Last-Modified"]}
    for key, value in values.items():
        headers = {name: text.replace(key, value) for name, text in headers.items()}
    for method in ("GET", "HEAD"):
        reply = server.request(method, path, headers=headers)
        assert (reply.status, reply.headers["ETag"]) == (status, first.headers["ETag"])
        assert reply.body == (b"0123456789" if status == 200 and method == "GET" else b"")
        if status == 304:
            assert reply.headers["Content-Length"] is None and reply.headers["Content-Type"] is None


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo", "XST8"])
@pytest.mark.parametrize(
    "date",
    [
        b"Sun, 06 Nov 1994 08:49:37 GMT",
        b"Sunday, 06-Nov-94 08:49:37 GMT",
        b"Sun Nov  6 08:49:37 1994",
    ],
)
def test_dates_are_of_greenwich(monkeypatch, zone, date):
    """All three forms of RFC 9110 section 5.6.7, wherever the server is."""
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert kapow.http_time(date) == 784111777
    finally:
        monkeypatch.undo()
        time.tzset()


def test_changed_file_has_another_tag(server, billets):
    context = billets.bash("")
    path = billets.file(context, "x", b"one")
    first = server.get(f"/{context}/rsrc/x").headers["ETag"]
    path.write_bytes(b"other")
    os.utime(path, (1, 1))
    reply = server.get(f"/{context}/rsrc/x", **{"If-None-Match": first})
    assert (reply.status, reply.body) == (200, b"other")
    assert reply.headers["ETag"] != first


@pytest.mark.parametrize("seconds", [-10, 0, 1 << 33, 300_000_000_000])
def test_odd_times(server, billets, seconds):
    context = billets.bash("")
    path = billets.file(context, "x", b"x")
    os.utime(path, (seconds, seconds))
    if int(path.stat().st_mtime) != seconds:
        pytest.skip("the file system does not keep it")
    reply = server.get(
        f"/{context}/rsrc/x", **{"If-Modified-Since": "Tue, 14 Nov 2023 22:13:20 GMT"}
    )
    assert reply.status in (200, 304)


@pytest.mark.parametrize(
    "value, part",
    [
        ("bytes=0-0", (0, 0)),
        ("bytes=2-4", (2, 4)),
        ("bytes=5-", (5, 9)),
        ("bytes=-3", (7, 9)),
        ("bytes=-99", (0, 9)),
        ("bytes=0-99", (0, 9)),
        ("bytes=9-9", (9, 9)),
        ("bytes=0-", (0, 9)),
        ("bytes=0-999999999999999999", (0, 9)),
        ("bytes= 1-2 ", (1, 2)),
        ("bytes=10-", 416),
        ("bytes=99-100", 416),
        ("bytes=-0", 416),
        ("bytes=999999999999999999-", 416),
        ("bytes=4-2", 200),
        ("bytes=-", 200),
        ("bytes=a-b", 200),
        ("bytes=0-1,3-4", 200),
        ("lines=0-1", 200),
        ("bytes=0", 200),
        ("bytes=", 200),
        ("bytes=+0-1", 200),
        ("bytes=--1", 200),
        ("0-1", 200),
        ("", 200),
        ("bytes=" + "9" * 5000 + "-", (200, 416)),
        ("bytes=0x1-", 200),
        ("bytes=\xb2-", 200),
    ],
)
def test_ranges(server, files, value, part):
    answer = ask(server, f"/{files}/rsrc/ten.txt", headers=[f"Range: {value}"])
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
    if isinstance(part, tuple) and part[0] < 100:
        assert (status, body) == (206, b"0123456789"[part[0]:part[1] + 1])
        assert fields["Content-Range"] == f"bytes {part[0]}-{part[1]}/10"
        assert fields["Content-Length"] == str(len(body)) and fields["ETag"]
    else:
        assert status in (part if isinstance(part, tuple) else (part,))
        assert fields.get("Content-Range") == ("bytes */10" if status == 416 else None)
        assert status == 416 or body == b"0123456789"
    head = ask(server, f"/{files}/rsrc/ten.txt", "HEAD", [f"Range: {value}"])
    assert head.startswith(b"HTTP/1.1 200 ") and b"Content-Range" not in head


def test_ranges_of_nothing(server, files):
    reply = server.get(f"/{files}/rsrc/empty")
    assert (reply.status, reply.body, reply.headers["Content-Length"]) == (200, b"", "0")
    for value in ("bytes=0-", "bytes=-1", "bytes=0-0"):
        reply = server.get(f"/{files}/rsrc/empty", Range=value)
        assert (reply.status, reply.headers["Content-Range"]) == (416, "bytes */0")


@pytest.mark.parametrize("condition, status", [
    ("{etag}", 206), ("{date}", 206), ("W/{etag}", 200), ('"x"', 200), ("x", 200), ("*", 200),
    ("Tue, 14 Nov 2023 22:13:21 GMT", 200), ("Tue, 14 Nov 2023 22:13:19 GMT", 200)])
def test_if_range(server, files, condition, status):
    path = f"/{files}/rsrc/ten.txt"
    first = server.get(path).headers
    condition = condition.replace("{etag}", first["ETag"]).replace("{date}", first["Last-Modified"])
    reply = server.get(path, Range="bytes=2-3", **{"If-Range": condition})
    assert (reply.status, reply.body) == (status, b"23" if status == 206 else b"0123456789")
    # A range that cannot be given is none, if the file is another.
    reply = server.get(path, Range="bytes=50-", **{"If-Range": condition})
    assert reply.status == (416 if status == 206 else 200)


def test_no_handler_for_files(server, billets, files):
    """No program runs; the access log has the request's id all the same."""
    server.get(f"/{files}/rsrc/ten.txt?{uuid.uuid4().hex}")
    assert server.wait_access(rf'^\S+ [0-9a-f]{{16}} - .*"GET /{files}/rsrc/ten.txt\?')


# Servers of their own.

def test_limits(restart):
    """Those of all handlers; also while the body comes, and while another does the setup."""
    server, billets = restart("--timeout", "0.3", "--max-handlers", "3", "--max-queue", "0")
    gate = fifo(server)
    name = billets.bash(f"billet.setup() {{ read x < {gate}; }}")
    answers = all_at_once(server, f"/{name}", 6)
    assert sorted(answer.split()[1] for answer in answers) == 3 * [b"503"] + 3 * [b"504"]
    name = billets.bash(f"billet:() {{ read x < {gate}; }}")
    assert server.get(f"/{name}").status == 504
    with server.connect() as sock:
        sock.settimeout(2)
        sock.sendall(f"POST /{name} HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\nhalf".encode())
        assert sock.recv(1000).startswith(b"HTTP/1.1 504 ")


def test_debug(restart):
    """The launcher's words are in the log, and what it prints goes to the client."""
    server, billets = restart("--debug")
    name = billets.bash("billet:() { http_header X-Y z; http_body; warn words; echo body; }")
    reply = server.get(f"/{name}")
    assert (reply.body, reply.headers["X-Y"]) == (b"body\n", "z")
    server.wait_log(r"[0-9a-f]{16} stderr.* words$")
    assert not [line for line in server.log if "stdout" in line and "body" in line]
    loud = billets.bash("billet:() { head -c 300000 /dev/zero >&2; echo x; }")
    assert server.get(f"/{loud}").body == b"x\n"


@pytest.mark.skipif(ROOT_USER and not SETPRIV, reason="root can read everything")
def test_files_that_cannot_be_read(tmp_path, tmp_path_factory):
    """As a user who is not root."""
    command = [sys.executable, str(KAPOW)]
    if ROOT_USER:
        # Capabilities are what lets root read what nobody may.
        command = [SETPRIV, "--bounding-set=-all", "--inh-caps=-all", "--", *command]
    starter = write_starter(tmp_path / "starter", command=command)
    directory, path = tmp_path / "server", tmp_path / "billets"
    directory.mkdir()
    path.mkdir()
    billets = Directory(path)
    server = Server(directory, "--billets", path, script=starter)
    try:
        bash = billets.bash("billet:() { echo secret; }")
        cgi = billets.cgi("printf 'X: y\\n\\nsecret'")
        static = billets.bash("billet:() { echo there; }")
        hidden = billets.file(static, "hidden", b"secret")
        for file in (path / f"{bash}.b", path / f"{cgi}.b"):
            file.chmod(0o111)
        hidden.chmod(0)
        for name in (bash, cgi):
            answer = ask(server, f"/{name}")
            assert answer == b"" or answer.startswith(b"HTTP/1.1 500 "), answer
        assert server.get(f"/{static}/rsrc/hidden").status == 404
        assert server.get(f"/{static}").body == b"there\n"
        server.check_idle()
    finally:
        server.stop()
    server.check_gone()


@pytest.mark.parametrize("directory", ["none", "file", ""])
def test_directory_that_is_none(tmp_path, directory):
    (tmp_path / "file").touch()
    done = subprocess.run([sys.executable, KAPOW, "server", "--billets", directory], cwd=tmp_path,
                          capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "--billets" in done.stderr


def test_stop_lets_launchers_finish(restart):
    server, billets = restart()
    gate = fifo(server)
    name = billets.bash(f"billet:() {{ echo > {gate}.on; read x < {gate}; echo done; }}")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        reply = pool.submit(server.get, f"/{name}")
        wait_until(pathlib.Path(f"{gate}.on").exists, "the launcher")
        threading.Timer(0.05, open_fifo, [gate]).start()
        server.process.terminate()
        assert reply.result().body == b"done\n"
    assert server.process.wait(DEADLINE) == 0


def test_without_billets(start_server):
    server = start_server()
    (server.directory / "x.b").write_text("#!/bin/bash\nbillet:() { echo x; }")
    (server.directory / "x.b").chmod(0o755)
    assert server.get("/x").status == 404


# The text for Bash.

@pytest.mark.parametrize("name", ["BILLET_RUNTIME", "BILLET_TEXT"])
def test_runtime_parses(tmp_path, name):
    text = tmp_path / "text.bash"
    text.write_text(getattr(kapow, name))
    done = subprocess.run(["bash", "-n", text], capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not here")
def test_runtime_is_clean(tmp_path):
    """SC1090: what is sourced is a launcher. SC2317: that calls what is here.

    SC2181: $? of it tells its syntax, not its success.
    """
    text = tmp_path / "text.bash"
    text.write_text(kapow.BILLET_RUNTIME)
    done = subprocess.run(
        ["shellcheck", "--shell", "bash", "--exclude", "SC1090,SC2181,SC2317", text],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.stdout == ""


def test_runtime_keeps_its_names_to_itself():
    """What is not offered begins with _billet or BILLET_."""
    defined = set(re.findall(r"(?m)^ *([a-z_]+)\(\)", kapow.BILLET_RUNTIME))
    offered = {
        "warn",
        "die",
        "need",
        "main",
        "http_response",
        "http_header",
        "http_body",
        "http_error",
        "http_redirect",
        "billet_url",
        "use",
    }
    assert {name for name in defined if not name.startswith("_billet")} == offered
    variables = set(re.findall(r"(?m)^ *(?:local +)?([A-Za-z_]+)\+?=", kapow.BILLET_RUNTIME))
    # IFS is changed in a function alone, where it is local.
    assert all(name.lower().startswith(("_billet", "billet_")) for name in variables - {"IFS"})


@pytest.mark.parametrize("count", [14, 15, 16, 17, 40, 4000])
def test_long_trails(server, billets, count):
    """All components are there, and the deepest function is found, in little time."""
    name = billets.bash('billet:() { echo top; }\nbillet:a:a:a() { echo "${#BILLET_TRAIL[@]} '
                        '${BILLET_TRAIL[0]} ${BILLET_TRAIL[-1]}"; }\nbillet:b() { echo no; }')
    assert server.get(f"/{name}" + "/a" * (count - 1) + "//*").body == f"{count + 1} {name} *\n".encode()
    counter = billets.path / f"{name}.count"
    counting = billets.bash(f"declare() {{ echo >>{counter}; builtin declare \"$@\"; }}\n"
                            "billet:a:a() { echo two; }")
    assert server.get(f"/{counting}" + "/a" * count).body == b"two\n"
    assert len(counter.read_text()) < 40            # looks for functions, however long the path is
    deep = billets.bash("billet:" + ":".join("x" * 20) + "() { echo deep; }\nbillet:x() { echo x; }")
    assert server.get(f"/{deep}" + "/x" * max(count, 20)).body == b"deep\n"
    assert server.get(f"/{deep}" + "/x" * 19).body == b"x\n"
