"""The examples, run as their first lines tell people to run them.

The first lines of an example are a session: `$ ` begins a command, what is
indented below it goes on with it, and the rest is its output, in which `...`
stands for anything. The session is run with curl against a real server, whose
routes are run by each shell that is here. Then come requests that mean harm.
"""

import concurrent.futures
import contextlib
import hashlib
import html
import http.client
import json
import os
import re
import shlex
import shutil
import subprocess
import urllib.parse

import pytest

from conftest import DEADLINE, ROOT, Server, wait_until

EXAMPLES = ROOT / "examples"
ALL_EXAMPLES = ("hello", "log-search", "system-monitor", "line-count", "json", "redirect", "cookie",
                "background-job", "client-certificate", "service-python", "service-node")
SERVICE_EXAMPLES = {"service-python": "counters", "service-node": "digest"}     # and the service
BILLETS = ("guestbook", "short", "start", "weekday")     # in examples/billets
NEEDED = {"json": "jq", "service-node": "node"}     # programs that not every machine has
SHELLS = [shell for shell in ("dash", "bash") if shutil.which(shell)] or ["sh"]

# What strangers send. Where one of them is run, a file `canary` appears.
HOSTILE = ("--help", "-f/etc/passwd", "$(touch canary)`touch canary`", "; touch canary |touch canary",
           "x\ntouch canary\ny", "a[$(touch canary)]", "';touch canary;'", '";touch canary;"',
           "../../etc/passwd", r"%s%d\n\c * ?", "<html><script>alert(1)</script>", "x" * 7000)

LOG = """\
Jan  1 00:00:01 kernel: usb1: new device
Jan  1 00:00:02 kernel: [disk] full
Jan  1 00:00:03 kernel: eth0: link is up
"""


class Session:
    """The commands in an example's first lines.

    `setup` is a list of commands before the server's start, `server` its
    command, `steps` a list of (command, expected output) after it.
    """

    def __init__(self, path):
        self.setup, self.server, self.steps = [], None, []
        commands = []           # [command, output lines]
        for line in self._indented(path):
            if line.startswith("$ "):
                commands.append([line[2:], []])
            elif line.startswith("  "):
                commands[-1][0] += "\n" + line
            else:
                commands[-1][1].append(line)
        for command, output in commands:
            if "kapow server" in command:
                self.server = command
            elif self.server is None:
                self.setup.append(command)
            else:
                self.steps.append((command, "\n".join(output)))

    @staticmethod
    def _indented(path):
        """Return the indented lines of the comment that begins the file, less their indentation."""
        comment = re.match(r"#!.*\n((?:#.*\n)+)", path.read_text()).group(1)
        return [line[4:] for line in comment.splitlines() if line.startswith("#   ")]

    def server_arguments(self, name):
        """Return the options in the server's command, which starts the example `name`."""
        words = shlex.split(self.server.replace("\\\n", ""))
        start = words.index("kapow")
        assert all("=" in word for word in words[:start])
        assert words[start + 1] == "server" and words[-1] == f"examples/{name}"
        return words[start + 2:-1]


def client_environment(home, *path):
    """Return an environment for curl without the settings of this user and machine."""
    hidden = ("proxy", "ca_bundle")
    environment = {name: value for name, value in os.environ.items()
                   if not name.lower().endswith(hidden) and not name.startswith("KAPOW_")}
    return {**environment, "HOME": str(home), "CURL_HOME": str(home), "LC_ALL": "C",
            "PATH": os.pathsep.join([*map(str, path), os.environ["PATH"]])}


def run_shell(script, directory, shell="sh", path=()):
    """Run a shell script; return the CompletedProcess."""
    return subprocess.run([shell, "-c", script], cwd=directory, capture_output=True, timeout=DEADLINE,
                          text=True, stdin=subprocess.DEVNULL, env=client_environment(directory, *path))


def fits(expected, output):
    """Tell whether `output` is as `expected`, where `...` stands for anything."""
    pattern = re.escape(expected.rstrip("\n")).replace(re.escape("..."), ".*")
    return re.fullmatch(pattern, output.rstrip("\n"), re.DOTALL) is not None


def with_port(command, port):
    """Return a command for a server on the usual port as one for that on `port`."""
    return command.replace("localhost:8080", f"127.0.0.1:{port}")


def check_session(steps, port, directory, shell="sh", path=()):
    """Run (command, expected output) pairs in one shell, and compare."""
    mark = "\x1e"
    script = "".join(f"{with_port(command, port)}\nprintf '\\036'\n" for command, _ in steps)
    done = run_shell(script, directory, shell, path)
    outputs = done.stdout.split(mark)
    assert outputs.pop() == "" and len(outputs) == len(steps), done
    for (command, expected), output in zip(steps, outputs):
        assert fits(expected, output), f"{command}\nexpected:\n{expected}\ngot:\n{output}{done.stderr}"


class Answer:
    """What curl got: `status` int, `headers` a dict with lower-case names, `body` bytes."""

    def __init__(self, output):
        head, body = b"", output
        while body.startswith(b"HTTP/"):        # also those of 100 Continue
            head, _, body = body.partition(b"\r\n\r\n")
        line, *fields = head.decode("latin-1").split("\r\n")
        self.status = int(line.split()[1])
        self.headers = {name.lower(): value.strip() for name, _, value in
                        (field.partition(":") for field in fields)}
        self.body = body

    @property
    def text(self):
        return self.body.decode()


class Running:
    """An example being served: `directory` is the server's and the clients' current one."""

    def __init__(self, name, directory):
        self.name, self.directory = name, directory
        self.session = Session(EXAMPLES / name)
        self.released = directory / "released"
        self.setup = [run_shell(command, directory) for command in self.session.setup]
        self.server = Server(directory, *self.session.server_arguments(name),
                             init=[EXAMPLES / name], environment=self._environment())
        self.port = self.server.port("user")
        self._seen = 0      # lines of the server's log, in tests before
        self._routes = self.server.control("GET", "/routes").json()
        assert self._routes

    def use_shell(self, shell):
        """Let `shell` run the commands of the routes, and services begin anew."""
        self.shell = shell
        for service in self.server.services():
            answer = self.server.control("POST", f"/services/{service['name']}/restart")
            assert answer.status_code == 200, answer.text
        if self.name in SERVICE_EXAMPLES:       # whose routes have no commands
            return
        routes = [{**route, "entrypoint": route["entrypoint"].replace("/bin/sh", shutil.which(shell))}
                  for route in self._routes]
        assert self.server.control("PUT", "/routes", routes).status_code == 200

    def _environment(self):
        """Make what the examples want to find, and return the variables that say where."""
        root, jobs = self.directory / "root", self.directory / "jobs directory"
        (root / "apt").mkdir(parents=True)
        (root / "apt" / "history.log").write_text("Start-Date: today\n")
        (root / "odd $(touch canary)").write_text("odd\n")
        (root / "out").symlink_to("/etc")
        (self.directory / "root2").mkdir()
        (self.directory / "root2" / "near").write_text("secret\n")
        os.mkfifo(root / "fifo")
        log = self.directory / "a log"
        log.write_text(LOG + "\n".join(HOSTILE) + "\n")
        jobs.mkdir()
        # Jobs sleep until the client of the session does, or the test says so.
        server_bin = self._write_sleep(
            "server", f"n=0; while [ ! -e '{self.released}' ] && [ $n -lt 1500 ]\n"
            f"do {shutil.which('sleep')} 0.02; n=$((n + 1)); done")
        self.client_bin = self._write_sleep("client", f": > '{self.released}'")
        return {"LOG_FILE": str(log), "FILES_ROOT": str(root), "LC_ALL": "C",
                **({"TMPDIR": str(jobs)} if self.name == "background-job" else {}),
                "PATH": f"{server_bin}{os.pathsep}{os.environ['PATH']}"}

    def _write_sleep(self, whose, command):
        """Write a sleep(1) that runs `command`; return its directory."""
        directory = self.directory / f"{whose}-bin"
        directory.mkdir()
        (directory / "sleep").write_text(f"#!/bin/sh\n{command}\n")
        (directory / "sleep").chmod(0o755)
        return directory

    def curl(self, path, *arguments, input=b"", scheme="http"):
        """Ask for `path` with curl; return the Answer."""
        done = subprocess.run(
            ["curl", "-sS", "-i", "--path-as-is", *arguments,
             f"{scheme}://127.0.0.1:{self.port}{path}"],
            input=input, capture_output=True, timeout=DEADLINE, cwd=self.directory,
            env=client_environment(self.directory))
        assert done.returncode == 0, done
        return Answer(done.stdout)

    def curl_each(self, texts, make):
        """Yield (text, Answer) where `make(text)` gives the arguments for curl(); some at a time."""
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            yield from zip(texts, pool.map(lambda text: self.curl(*make(text)), texts))

    def check_unharmed(self):
        """Fail when a stranger's text was run, or the server or a handler went wrong."""
        seen, self._seen = self._seen, len(self.server.log)
        assert not list(self.directory.rglob("canary"))
        assert not [line for line in self.server.log[seen:] if re.search(
            r"Traceback|unexpected|[Ss]yntax error|not found$", line)]

    def stop(self):
        self.released.touch()
        self.server.remove_services()
        wait_until(lambda: not self.server.children(), "the end of the jobs")
        assert self.server.stop() == 0
        self.server.check_gone()


@pytest.fixture(scope="module")
def run_example(tmp_path_factory):
    """A function that gives an example, started once in the module, its routes under a shell."""
    running = {}

    def run(name, shell):
        if name in NEEDED and not shutil.which(NEEDED[name]):
            pytest.skip(f"{NEEDED[name]}, which this example is about, is not installed")
        if name not in running:
            running[name] = Running(name, tmp_path_factory.mktemp(name))
        running[name].use_shell(shell)
        return running[name]

    with contextlib.ExitStack() as stack:
        yield run
        for example in running.values():
            stack.callback(example.stop)


@pytest.fixture
def example(request, run_example):
    """The running example of a test that is under_shells(); it must be unharmed after the test."""
    running = run_example(*request.param)
    yield running
    running.check_unharmed()


def under_shells(*names):
    """Decorate a test of these examples: it takes the fixture `example`."""
    # A service is no shell's work but to be added, which its session shows under each.
    pairs = [(name, shell) for name in names
             for shell in (SHELLS[:1] if names[0] in SERVICE_EXAMPLES else SHELLS)]
    return pytest.mark.parametrize("example", pairs, indirect=True, ids="-".join, scope="function")


def encode(text):
    """Percent-encode all of a text that is not a letter or digit."""
    return urllib.parse.quote(text, safe="")


def in_query(path, name):
    """Return a function that makes arguments for curl(): a text as the query parameter `name`."""
    return lambda text: (path, "-G", "--data-urlencode", f"{name}={text}")


# All of them.


def test_the_list_is_whole():
    """Every file in examples/ that can be executed is in the list of examples."""
    assert sorted(ALL_EXAMPLES) == sorted(
        path.name for path in EXAMPLES.iterdir() if path.is_file() and os.access(path, os.X_OK))
    # The others are the programs of services.
    programs = [path.stem for path in EXAMPLES.iterdir() if path.suffix]
    assert sorted(programs) == sorted(SERVICE_EXAMPLES)


@pytest.mark.parametrize("name", ALL_EXAMPLES)
def test_is_a_plain_shell_script(name):
    """An example is a POSIX shell script without eval, whose first lines show how to use it."""
    path = EXAMPLES / name
    text = path.read_text()
    assert text.startswith(f"#!/bin/sh\n# {name}: ")
    assert not re.search(r"^[^#]*\beval\b", text, re.MULTILINE)
    session = Session(path)
    assert session.server and any("curl" in command for command, _ in session.steps)
    for shell in SHELLS:
        assert subprocess.run([shell, "-n", path], timeout=DEADLINE, capture_output=True).stderr == b""


@under_shells(*ALL_EXAMPLES)
def test_session(example):
    """What the first lines show is what happens."""
    example.released.unlink(missing_ok=True)
    assert [done for done in example.setup if done.returncode] == []
    check_session(example.session.steps, example.port, example.directory, example.shell,
                  [example.client_bin])


def test_output_that_does_not_fit_is_seen(tmp_path):
    """The comparison that the sessions rest on can fail."""
    assert fits("one ...\n...\nend", "one two\nthree\nend\n")
    assert not fits("one", "one\ntwo") and not fits("one", "") and not fits("a.c", "abc")
    with pytest.raises(AssertionError):
        check_session([("echo one", "one"), ("echo two", "three")], 0, tmp_path)


# One by one.


@under_shells("hello")
def test_hello_hostile(example):
    """A name is said back, whatever it is."""
    for text, answer in example.curl_each(HOSTILE, lambda text: ["/hello/" + encode(text)]):
        if "/" in text:
            assert answer.status == 404
        else:
            assert (answer.status, answer.text) == (200, f"Hello, {text}!\n")
            assert answer.headers["content-type"].startswith("text/plain")


def lines_with(text, path):
    return "".join(line for line in path.read_text().splitlines(True) if text in line)


@under_shells("log-search")
def test_log_search_hostile_text(example):
    """A text is looked for as it is: neither an option, nor a pattern, nor a command."""
    for text, answer in example.curl_each(HOSTILE, in_query("/log", "text")):
        if "\n" in text:
            assert answer.status == 400
        else:
            assert (answer.status, answer.text) == (200, lines_with(text, example.directory / "a log"))
            assert answer.headers["content-type"].startswith("text/plain")


@under_shells("log-search")
def test_log_search_hostile_regex(example):
    """A regular expression finds lines, nothing, or is refused."""
    for text, answer in example.curl_each(HOSTILE, in_query("/log", "regex")):
        assert answer.status in ((400,) if "\n" in text else (200, 400, 404))
    found = example.curl("/log", "-G", "--data-urlencode", "regex=--hel[p]$")
    assert (found.status, found.text) == (200, "--help\n")


WRONG_QUESTIONS = ("", "?text=", "?regex=", "?text=%0A", "?regex=%28", "?text=a%0Ab", "?other=1",
                   "?text=%00")


@under_shells("log-search")
def test_log_search_wrong_question(example):
    """No text, an empty one, several lines or a broken regular expression: 400."""
    for query, answer in example.curl_each(WRONG_QUESTIONS, lambda query: ["/log" + query]):
        assert answer.status == 400, query


@under_shells("log-search")
def test_log_search_without_log(example):
    """A log that is not there is the server's fault."""
    log = example.directory / "a log"
    away = log.rename(example.directory / "away")
    try:
        assert example.curl("/log?text=usb").status == 500
    finally:
        away.rename(log)


OUTSIDE = (
    "..", "../", "../root2/near", "%2e%2e/root2/near", "..%2Froot2%2Fnear", "apt/../../root2/near",
    "out", "out/passwd", "/etc/passwd", "//etc/passwd", "fifo", "none", "apt/none",
    "../root/../root2/near",
    "apt%2Fhistory.log%0A", "apt/history.log/", *map(encode, HOSTILE))


@under_shells("system-monitor")
def test_system_monitor_keeps_inside(example):
    """Nothing is shown but the directory's own files."""
    for path, answer in example.curl_each(OUTSIDE, lambda path: ["/files/" + path]):
        assert answer.status == 404, path
        assert b"secret" not in answer.body and b"root:" not in answer.body


@pytest.mark.parametrize("path, body", [
    ("apt/history.log", "Start-Date: today\n"), ("apt/../apt/history.log", "Start-Date: today\n"),
    ("/apt//history.log", "Start-Date: today\n"), (encode("odd $(touch canary)"), "odd\n")])
@under_shells("system-monitor")
def test_system_monitor_shows(example, path, body):
    """A file inside is shown, also under an odd name or by a roundabout way."""
    answer = example.curl("/files/" + path)
    assert (answer.status, answer.text) == (200, body)
    assert answer.headers["content-type"].startswith("text/plain")


@under_shells("line-count")
def test_line_count_hostile_name(example):
    """A file's name is shown, and is nothing else."""
    for text in (*HOSTILE, "%s%d"):
        # What curl would encode or take for its own is tested elsewhere.
        if not re.search(r'[;"\\\n]', text) and len(text) < 1000:
            answer = example.curl("/lines", "-F", f'file=@-;filename="{text}"', input=b"1\n2\n")
            assert (answer.status, answer.text) == (200, f"2 {text.rpartition('/')[2]}\n")


@pytest.mark.parametrize("content, lines", [
    (b"", 0), (b"no end", 0), (b"\0\n\xff\n", 2), (b"x\n" * 10**6, 10**6)],
    ids=["empty", "no end", "bytes", "million"])
@under_shells("line-count")
def test_line_count_content(example, content, lines):
    """A line is what ends in a newline, in any bytes and any number."""
    answer = example.curl("/lines", "-F", "file=@-;filename=f", input=content)
    assert (answer.status, answer.text) == (200, f"{lines} f\n")


@under_shells("line-count")
def test_line_count_without_file(example):
    """A form without the file, and what is no form, are refused."""
    for arguments in (["-F", "file=text"], ["-d", "file=text"],
                      ["-H", "Content-Type: text/plain", "-d", "x"]):
        assert example.curl("/lines", *arguments).status == 400


@under_shells("json")
def test_json_hostile_sum(example):
    """A name goes through as it is."""
    def post(text):
        return "/sum", "--data-binary", json.dumps({"name": text, "numbers": [1, 2]})

    for text, answer in example.curl_each(HOSTILE, post):
        assert (answer.status, json.loads(answer.body)) == (200, {"name": text, "sum": 3})
        assert answer.headers["content-type"] == "application/json"


NO_SUMS = (
    "", "{", "[]", "1", "null", '{"name": 1, "numbers": []}', '{"name": "a", "numbers": ["1"]}',
    '{"name": "a", "numbers": 1}', '{"name": "a", "numbers": []} {"name": "a", "numbers": []}',
    "--help", "$(touch canary)")


@under_shells("json")
def test_json_refuses(example):
    """What is no such document is refused, in JSON."""
    for body, answer in example.curl_each(NO_SUMS, lambda body: ["/sum", "--data-binary", body]):
        assert (answer.status, list(json.loads(answer.body))) == (400, ["reason"]), body


@under_shells("json")
def test_json_hostile_quote(example):
    """A text becomes a JSON string."""
    for text, answer in example.curl_each(HOSTILE, in_query("/quote", "text")):
        assert (answer.status, json.loads(answer.body)) == (200, {"text": text, "length": len(text)})


@under_shells("redirect")
def test_redirect_hostile(example):
    """Only the names that are written there lead anywhere."""
    names = (*HOSTILE, "curl ", "CURL", "cur?", "c*", "curl\r\nX: y", "https://example.org/")
    for _, answer in example.curl_each(names, lambda name: ["/go/" + encode(name)]):
        assert answer.status == 404 and "location" not in answer.headers


VISITS = {
    "7": 8, "0": 1, "999999998": 999999999, "999999999": 1000000000, "1000000000": 1, "08": 1, "-5": 1,
    "1+1": 1, "0x10": 1, "": 1, "9" * 4000: 1, "\N{ARABIC-INDIC DIGIT TWO}": 1,
    "\N{SUPERSCRIPT TWO}": 1, "HOME": 1, "visits": 1, "a[$(touch canary)]": 1, "`touch canary`": 1,
    "--help": 1, "*": 1}


@under_shells("cookie")
def test_cookie_value(example):
    """What is no number of a sensible size counts as none, and is not calculated."""
    for value, answer in example.curl_each(
            list(VISITS), lambda value: ["/visits", "-H", f"Cookie: visits={value}"]):
        visit = VISITS[value]
        assert (answer.status, answer.text) == (200, f"This is visit number {visit}.\n"), value
        assert answer.headers["set-cookie"] == f"visits={visit}; Path=/; HttpOnly; SameSite=Lax"


@under_shells("cookie")
def test_cookie_jar(example):
    """A client that keeps its cookies is counted."""
    jar = ("-b", "jar", "-c", "jar")
    (example.directory / "jar").unlink(missing_ok=True)
    assert [example.curl("/visits", *jar).text for _ in range(3)] == [
        f"This is visit number {number}.\n" for number in (1, 2, 3)]


@under_shells("background-job")
def test_background_job_is_answered_at_once(example):
    """The answer does not wait for the job, whose result comes when it is done."""
    example.released.unlink(missing_ok=True)
    answer = example.curl("/jobs", "--data-binary", "@-", input=b"b\n" + b"a" * 200000 + b"\n")
    place = answer.headers["location"]
    assert (answer.status, answer.text) == (202, place + "\n")
    assert re.fullmatch(r"/jobs/[0-9A-Za-z]{12}", place)
    assert example.curl(place).text == "running\n"
    example.released.touch()
    wait_until(lambda: example.curl(place).text != "running\n", "the end of the job")
    assert example.curl(place).text == "done\n" + "a" * 200000 + "\nb\n"


@under_shells("background-job")
def test_background_job_hostile(example):
    """A job's input is nothing but input, and only an id is an id."""
    example.released.touch()
    lines = "\n".join(HOSTILE).split("\n")
    answer = example.curl("/jobs", "--data-binary", "@-", input="\n".join(lines).encode())
    place = answer.headers["location"]
    wait_until(lambda: example.curl(place).text != "running\n", "the end of the job")
    assert example.curl(place).text == "done\n" + "\n".join(sorted(lines)) + "\n"
    for name in (*HOSTILE, "x", "..", ".", "x" * 12, "." * 12, place[6:] + "/status", place[6:] + "\n"):
        assert example.curl("/jobs/" + encode(name)).status == 404


@under_shells("client-certificate")
def test_client_certificate_needs_one(example):
    """Without a certificate, or with one that its holder signed, there is no answer."""
    run_shell("openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes "
              "-subj /O=Example/CN=alice -keyout mallory.key -out mallory.pem", example.directory)
    for arguments in ("", "--cert mallory.pem --key mallory.key"):
        url = f"https://127.0.0.1:{example.port}/secret"
        done = run_shell(f"curl -sS --cacert server.pem {arguments} {url}", example.directory)
        assert done.returncode != 0 and done.stdout == ""


@pytest.mark.parametrize("subject", [
    "/O=Example/CN=alice/CN=alice", "/CN=alice/O=Example", "/O=Example/CN=alice,O=Example",
    "/CN=alice", "/CN=alice,O=Example", "/O=Example\n/CN=alice", "/O=Example/CN=Alice", "/O=Example/CN=$(touch canary)"])
@under_shells("client-certificate")
def test_client_certificate_other_subject(example, subject):
    """A subject that only looks like the right one is refused."""
    run_shell(f"""openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -utf8 \\
        -subj {shlex.quote(subject)} -keyout other.key -out other.csr &&
        openssl x509 -req -in other.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out other.pem""",
              example.directory).check_returncode()
    answer = example.curl("/secret", "--cacert", "server.pem", "--cert", "other.pem",
                          "--key", "other.key", scheme="https")
    assert (answer.status, answer.text) == (403, "This is not for you.\n")


def ask(example, method, path, body=None, headers=None, times=1):
    """Make requests on one connection; return the list of (status, bytes) of the responses."""
    connection = http.client.HTTPConnection("127.0.0.1", example.port, timeout=DEADLINE)
    answers = []
    with contextlib.closing(connection):
        for _ in range(times):
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            answers.append((response.status, response.read()))
    return answers


@under_shells(*SERVICE_EXAMPLES)
def test_service_has_the_routes_of_its_manifest(example):
    """What the program says of itself is what is served."""
    service, = example.server.services()
    assert (service["name"], service["state"]) == (SERVICE_EXAMPLES[example.name], "available")
    keys = ("method", "url_pattern", "handler")
    routes = example.server.control("GET", "/routes").json()
    assert [{key: route[key] for key in keys} for route in routes] == service["manifest"]["routes"]
    assert {route["service"] for route in routes} == {service["name"]}


@under_shells("service-python")
def test_service_python_hostile(example):
    """Only short names of letters and digits are names, and no header takes their place."""
    for _, answer in example.curl_each(
            HOSTILE, lambda text: ["/counters/" + encode(text), "-X", "POST"]):
        assert (answer.status, answer.body) == (404, b'{"reason": "Not Found"}')
    forged = {"Kapow-Handler": "add", "Kapow-Match-name": "other", "kapow_match_name": "other"}
    assert ask(example, "POST", "/counters/one", headers=forged) == [(200, b"1\n")]
    assert ask(example, "GET", "/counters/one", headers=forged, times=2) == 2 * [(200, b"1\n")]
    assert ask(example, "GET", "/counters/other")[0][0] == 404


@under_shells("service-python")
def test_service_python_counts_each(example):
    """No request is lost or counted twice, however many come at once."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(
            lambda _: ask(example, "POST", "/counters/all", times=25), range(8)))
    assert sorted(int(body) for answer in answers for _, body in answer) == list(range(1, 201))


@pytest.mark.parametrize("body, headers", [
    (b"POST / HTTP/1.1\r\n\r\n", {}), (100 * b"x", {"Expect": "100-continue"}),
    (100 * [b"x"], {}), (2**20 * b"x", {})],
    ids=["length", "expect", "chunked", "large"])
@under_shells("service-python")
def test_service_python_takes_no_body(example, body, headers):
    """A body that nobody asked for is not taken for a request."""
    assert ask(example, "POST", "/counters/body", body, headers) == [(200, b"1\n")]
    assert ask(example, "POST", "/counters/body") == [(200, b"2\n")]


@under_shells("service-python")
def test_service_python_has_an_end(example):
    """Strangers cannot make it keep names without end."""
    connection = http.client.HTTPConnection("127.0.0.1", example.port, timeout=DEADLINE)
    with contextlib.closing(connection):
        for number in range(1001):
            connection.request("POST", f"/counters/{number}")
            response = connection.getresponse()
            assert (response.status, response.read()) == (
                (200, b"1\n") if number < 1000 else (507, b"There are too many counters.\n"))
    assert ask(example, "POST", "/counters/0") == [(200, b"2\n")]


@under_shells("service-python")
def test_service_python_comes_back(example):
    """Its process is killed: another one answers, and has not counted."""
    assert ask(example, "POST", "/counters/one") == [(200, b"1\n")]
    pid = example.server.services()[0]["pid"]
    assert example.server.control("POST", "/services/counters/signal", {"signal": "KILL"}).ok

    def another():
        service, = example.server.services()
        return service["state"] == "available" and service["pid"] != pid

    wait_until(another, "another process")
    assert ask(example, "GET", "/counters/one")[0][0] == 404


@under_shells("service-node")
def test_service_node_digest(example):
    """Any bytes, in any number."""
    for content in (b"", b"\0\xff\r\n", "\n".join(HOSTILE).encode(), bytes(10**7)):
        digest = hashlib.sha256(content).hexdigest().encode() + b"\n"
        assert ask(example, "POST", "/digest", content) == [(200, digest)]
        if content:                     # without a length, in chunks
            assert ask(example, "POST", "/digest", [content[:1], content[1:]]) == [(200, digest)]


@under_shells("service-node")
def test_service_node_digest_of_half_a_body(example):
    """A client that leaves within its body harms nobody."""
    with example.server.connect() as sock:
        sock.sendall(b"POST /digest HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
                     + 70000 * b"x")
    example.server.wait_access(r'"POST /digest HTTP/1.1" (400|499) ')
    assert ask(example, "POST", "/digest", b"")[0][0] == 200


@under_shells("service-node")
def test_service_node_countdown(example):
    """It comes line by line, and ends with its client."""
    assert ask(example, "GET", "/countdown/2") == [(200, b"2\n1\n")]
    connection = http.client.HTTPConnection("127.0.0.1", example.port, timeout=DEADLINE)
    with contextlib.closing(connection):
        connection.request("GET", "/countdown/997")
        assert connection.getresponse().readline() == b"997\n"
    # Which is long before all has been sent.
    example.server.wait_access(r'"GET /countdown/997 HTTP/1.1" 200 \d{1,3} ')


@under_shells("service-node")
def test_service_node_hostile(example):
    """Only numbers are numbers, and no header names another handler."""
    for _, answer in example.curl_each(HOSTILE, lambda text: ["/countdown/" + encode(text)]):
        assert (answer.status, answer.body) == (404, b'{"reason": "Not Found"}')
    for name in ("countdown", "hasOwnProperty", "__proto__", "constructor"):
        forged = {"Kapow-Handler": name, "kapow_handler": name, "Kapow-Match-number": "5"}
        assert ask(example, "GET", "/countdown/1", headers=forged) == [(200, b"1\n")]


# The directory of billets.


class Site(Running):
    """A copy of examples/billets being served: `base` is the directory."""

    def __init__(self, directory):
        self.directory, self._seen = directory, 0
        self.base = directory / "examples" / "billets"
        shutil.copytree(EXAMPLES / "billets", self.base,
                        ignore=shutil.ignore_patterns("data", "temp"))
        self.server = Server(directory, "--billets", "examples/billets")
        self.port = self.server.port("user")

    def stop(self):
        """End the server; it must leave nothing behind."""
        self.server.check_idle()
        assert self.server.stop() == 0
        self.server.check_gone()


@pytest.fixture(scope="module")
def running_site(tmp_path_factory):
    """The Site, started once in the module."""
    running = Site(tmp_path_factory.mktemp("billets"))
    yield running
    running.stop()


@pytest.fixture
def site(running_site):
    """The Site, which must be unharmed after the test."""
    yield running_site
    running_site.check_unharmed()


def test_the_list_of_billets_is_whole():
    """Every launcher is in the list of them, can be run, and names Bash if it is for Bash."""
    launchers = list((EXAMPLES / "billets").glob("*.b"))
    assert sorted(path.stem for path in launchers) == sorted(BILLETS)
    for path in launchers:
        assert os.access(path, os.X_OK)
        first, text = path.read_text().split("\n", 1)
        assert text.startswith(f"# {path.stem}: ") and not re.search(r"(?m)^[^#]*\beval\b", text)
        if first == "#!/bin/bash":
            done = subprocess.run(["bash", "-n", path], timeout=DEADLINE, capture_output=True)
            assert (done.returncode, done.stderr) == (0, b"")
        else:
            compile(path.read_bytes(), str(path), "exec")


@pytest.mark.parametrize("name", BILLETS)
def test_session_of_billet(site, name):
    """What the first lines show is what happens."""
    session = Session(EXAMPLES / "billets" / f"{name}.b")
    assert (session.server, session.setup) == ("kapow server --billets examples/billets", [])
    steps = [(command, with_port(expected, site.port)) for command, expected in session.steps]
    check_session(steps, site.port, site.directory)


def test_guestbook_hostile(site):
    """What visitors say is shown as it is, and is nothing else: each on a line of its own."""
    texts = [text for text in HOSTILE if len(text) < 1000]
    for _, answer in site.curl_each(texts, lambda text: [
            "/guestbook/sign", "-d", "name=x", "--data-urlencode", f"text={text}"]):
        assert (answer.status, answer.headers["location"]) == (303, "/guestbook/")
    page = site.curl("/guestbook").text.splitlines()
    for text in texts:
        shown = html.escape(text.replace("\n", " "), quote=False).replace('"', "&quot;")
        assert f"<p><b>x</b>: {shown}</p>" in page
    wrong = ("", "name=x", "name=%00&text=%0a%0a", "name=x&text=" + 2001 * "y")
    for fields, answer in site.curl_each(wrong, lambda fields: ["/guestbook/sign", "-d", fields]):
        assert answer.status == 400, fields[:20]
    assert site.curl("/guestbook/sign").status == 405
    assert site.curl("/guestbook").text.splitlines() == page


def test_guestbook_is_kept(site):
    """A launcher that has changed finds what there is."""
    site.curl("/guestbook/sign", "-d", "name=Grace&text=kept")
    before = site.curl("/guestbook").body
    (site.base / "guestbook.b").touch()
    assert site.curl("/guestbook").body == before and b"<b>Grace</b>: kept" in before


def test_short_hostile(site):
    """Only addresses on the web are taken, and only codes lead anywhere."""
    longest = "https://example.org/" + 1980 * "x"
    wrong = (*HOSTILE, "", "https://", "ftp://example.org/", "https://a b/", "https://a/\r\nX: y",
             "https://a/\x7f", "HTTPS://a/", longest + "x")
    for text in wrong:
        assert site.curl("/short", "--data-binary", "@-", input=text.encode()).status == 400
    place = site.curl("/short", "--data-binary", "@-", input=longest.encode() + b"\n")
    assert place.status == 201
    path = urllib.parse.urlsplit(place.text.strip()).path
    assert site.curl(path).headers["location"] == longest
    for name in (*HOSTILE, "0123456789", "..", path[-10:] + "/x", path[-10:] + "\n", ""):
        assert site.curl("/short/" + encode(name)).status == 404, name


def test_weekday_refuses(site):
    """What is no date is refused."""
    for _, answer in site.curl_each(HOSTILE[:4], in_query("/weekday", "date")):
        assert answer.status == 400
    queries = ("", "?date=2024-2-29", "?other=1", "?" + 20 * "date=2024-02-29&")
    for query, answer in site.curl_each(queries, lambda query: ["/weekday" + query]):
        assert answer.status == 400, query


def test_nothing_but_rsrc_is_served(site):
    """No spelling leads to a launcher's text, its data, or a file elsewhere."""
    (site.base / "start" / "data").mkdir()
    (site.base / "start" / "data" / "secret").write_text("secret\n")
    for path in ("data/secret", "rsrc/../data/secret", "rsrc/%2e%2e/data/secret", "rsrc", "rsrc/",
                 "rsrc/..%2f..%2fstart.b", "rsrc//style.css", "rsrc/style.css/",
                 "rsrc/style.css%00"):
        for prefix in ("/start/", "/"):
            assert site.curl(prefix + path).status == 404, prefix + path
    for path in ("/start.b", "/default", "/start/../start.b", "/guestbook/data/entries"):
        assert site.curl(path).status == 404, path
    assert site.curl("/rsrc/style.css", "-d", "x").status == 405


def test_static_file_is_fetched_once(site):
    """A browser that has the page asks whether it has changed."""
    answer = site.curl("/rsrc/index.html")
    assert answer.body == (site.base / "start" / "rsrc" / "index.html").read_bytes()
    fresh = site.curl("/start/rsrc/index.html", "-H", f"If-None-Match: {answer.headers['etag']}")
    assert (fresh.status, fresh.body) == (304, b"")


def test_launcher_comes_and_goes(site):
    """Its x bit decides, at once."""
    launcher = site.base / "weekday.b"
    launcher.chmod(0o644)
    assert site.curl("/weekday?date=2024-02-29").status == 404
    launcher.chmod(0o755)
    assert site.curl("/weekday?date=2024-02-29").status == 200
