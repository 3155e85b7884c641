"""The manual pages and the programs say the same, and every example in the pages runs.

A literal block in a page is an example, and a comment in front of it says how it
is run::

    .\\" example NAME: KIND [ARGUMENT ...]

Blocks of one NAME share a directory and a server and run in their order, but
what the logs hold is looked for last. The kinds are the methods `do_KIND` of
Scenario. Lines that begin with ``$`` are commands, ``>`` continues one, and
what follows is the output, compared to the letter, but for ids.
"""

import argparse
import ast
import inspect
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types

import pytest

import kapow
import kapowctl
from conftest import CREDENTIALS, DEADLINE, KAPOW, KAPOWCTL, ROOT, Server, installed, wait_until

PAGES = {path.name: path for path in sorted((ROOT / "man").iterdir())}

# Parser -> the subsections of its page that list its options.
EVERY = "Options of every command"
DAEMON = "Daemons"
OPTION_LISTS = {
    "kapow": [EVERY],
    "kapow server": [EVERY, DAEMON, "The server"],
    "kapow billetd": [EVERY, DAEMON, "Billetd"],
    "kapowctl": [EVERY],
    "kapowctl get": [EVERY, "Get and set"],
    "kapowctl set": [EVERY, "Get and set"],
    "kapowctl route": [EVERY],
    "kapowctl route add": [EVERY, "Route", "Route add"],
    "kapowctl route list": [EVERY, "Route", "Route list"],
    "kapowctl route remove": [EVERY, "Route", "Route remove"],
    "kapowctl route match": [EVERY, "Route", "Route match"],
    "kapowctl route apply": [EVERY, "Route", "Route apply"],
    "kapowctl service": [EVERY],
    "kapowctl service add": [EVERY, "Service", "Service add"],
    "kapowctl service list": [EVERY, "Service", "Service list"],
    "kapowctl service start": [EVERY, "Service", "Service start, stop, restart"],
    "kapowctl service stop": [EVERY, "Service", "Service start, stop, restart"],
    "kapowctl service restart": [EVERY, "Service", "Service start, stop, restart"],
    "kapowctl service signal": [EVERY, "Service", "Service signal"],
    "kapowctl service remove": [EVERY, "Service", "Service remove"],
    "kapowctl handler": [EVERY],
    "kapowctl handler list": [EVERY, "Handler", "Handler list"],
    "kapowctl handler kill": [EVERY, "Handler", "Handler kill"],
    "kapowctl completion": [EVERY],
}

# ---------------------------------------------------------------------------
# Reading mdoc(7), as far as the pages use it
# ---------------------------------------------------------------------------

ENCLOSURES = {"Op": "[]", "Brq": "{}", "Pq": "()", "Sq": "''"}
MACROS = ("Nm", "Ar", "Cm", "Pa", "Li", "Ev", "Ic", "No", "Em", "Sy", "Dv", "Ql", "Sx", "Xr")
DELIMITER = "[,.:;)]"       # which stands outside, at the end of a line
ESCAPES = {r"\e": "\\", r"\(aq": "'", r"\(dq": '"', r"\&": ""}


def unescape(text):
    """Return `text` with the escapes of ESCAPES resolved; fail on others."""
    def resolve(found):
        assert found.group() in ESCAPES, f"what does {found.group()} stand for in {text!r}?"
        return ESCAPES[found.group()]
    return re.sub(r"\\(?:\(..|.)", resolve, text)


def render(words):
    """Return the text of a macro line, given as a list of words, as mandoc(1) shows it."""
    text, prefix, glued = "", "", True
    for place, word in enumerate(words):
        if word in ENCLOSURES:
            opening, closing = ENCLOSURES[word]
            inner, behind = words[place + 1:], ""
            while inner and re.fullmatch(DELIMITER, inner[-1]):
                behind = inner.pop() + behind
            return text + ("" if glued else " ") + opening + render(inner) + closing + behind
        if word in MACROS or word == "Fl":
            prefix = "-" if word == "Fl" else ""
        elif word == "Ns":
            glued = True
        elif word == "Bro":
            text, glued = text + " {", True
        elif re.fullmatch(f"{DELIMITER}|Brc", word):
            text += "}" if word == "Brc" else word
        else:
            text += ("" if glued else " ") + prefix + unescape(word)
            glued = False
    return text


def read_sections(name):
    """Return {section or (section, subsection): list of its lines} of the page `name`."""
    sections, heading = {}, None
    for line in PAGES[name].read_text().splitlines():
        if line.startswith(".Sh "):
            heading = section = line[4:]
        elif line.startswith(".Ss "):
            heading = section, line[4:]
        elif heading:
            sections.setdefault(section, []).append(line)
            if heading != section:
                sections.setdefault(heading, []).append(line)
    return sections


def subsection(name, title):
    """Return the lines of the subsection `title`, whatever its section."""
    return next(lines for key, lines in read_sections(name).items() if key[1:] == (title,))


def section_or_sub(name, title):
    """Return the lines of the section `title`, or else of the subsection."""
    sections = read_sections(name)
    return sections[title] if title in sections else subsection(name, title)


def items(lines, macro=""):
    """Return the list of the texts of the .It lines that begin with `macro`."""
    return [render(line.split()[1:]) for line in lines if line.startswith(f".It {macro}")]


def plain(lines):
    """Return the text of lines on one line."""
    return " ".join(render(line[1:].split()) if line.startswith(".") else unescape(line)
                    for line in lines if not line.startswith(r".\""))


def item_text(lines, start):
    """Return the plain text of the list item whose first line begins with `start`."""
    first = next(place for place, line in enumerate(lines) if line.startswith(f".It {start}"))
    body = lines[first + 1:]
    ends = [place for place, line in enumerate(body) if line.startswith((".It", ".El"))]
    return plain(body[:ends[0]])


# ---------------------------------------------------------------------------
# Options and synopsis
# ---------------------------------------------------------------------------


def walk_parsers(parser):
    """Yield `parser` and the parsers of its commands, down to the last."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from walk_parsers(inner)


def all_parsers():
    """Return {program and command: its parser}."""
    found = [kapow.make_parser(), kapow.make_server_parser(), kapow.make_billetd_parser(),
             *walk_parsers(kapowctl.make_parsers()[0])]
    return {parser.prog: parser for parser in found}


def page_of(prog):
    """Return the name of the page that describes a command."""
    return prog.split()[0] + ".1"


def describe_option(action):
    """Return an option of argparse as the pages write it: ``-X METHOD, --method METHOD``."""
    argument = action.metavar or ("{%s}" % ",".join(action.choices) if action.choices else "")
    return ", ".join(f"{option} {argument}" if action.nargs != 0 else option
                     for option in action.option_strings)


def test_every_parser_is_known_here():
    assert set(all_parsers()) == set(OPTION_LISTS)


@pytest.mark.parametrize("prog", OPTION_LISTS)
def test_options_of_parser_and_page_are_equal(prog):
    parser = {describe_option(action) for action in all_parsers()[prog]._actions
              if action.option_strings}
    page = [item for title in OPTION_LISTS[prog]
            for item in items(subsection(page_of(prog), title), "Fl ")]
    assert len(page) == len(set(page))
    assert set(page) == parser


@pytest.mark.parametrize("name", PAGES)
def test_options_are_listed_only_where_a_parser_has_them(name):
    known = {title for prog, titles in OPTION_LISTS.items() if page_of(prog) == name
             for title in titles}
    listing = {key[1] for key, lines in read_sections(name).items()
               if isinstance(key, tuple) and items(lines, "Fl ")}
    assert listing <= known
    assert sum(len(items(lines, "Fl ")) for key, lines in read_sections(name).items()
               if isinstance(key, str)) == sum(len(items(subsection(name, title), "Fl "))
                                               for title in listing)


def read_synopses(name):
    """Return the synopses of a page as the set of their texts."""
    synopses = []
    for line in read_sections(name)["SYNOPSIS"]:
        if line.startswith(".Nm "):
            synopses.append([])
        synopses[-1].append(render(line[1:].split()))
    return {" ".join(parts) for parts in synopses}


# The synopses that no parser of argparse has.
OTHER_SYNOPSES = {
    "kapow.1": {"kapow " + " | ".join(kapow.CLIENT_COMMANDS) + " ..."},
    "kapowctl.1": {"request /PATH", "response /PATH [VALUE]", "kroute ..."},
}


@pytest.mark.parametrize("name", OTHER_SYNOPSES)
def test_synopsis_is_the_usage_of_the_parsers(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")
    monkeypatch.setenv("NO_COLOR", "1")
    usages = {" ".join(parser.format_usage().split()[1:])
              for prog, parser in all_parsers().items() if page_of(prog) == name}
    assert read_synopses(name) == usages | OTHER_SYNOPSES[name]


@pytest.mark.parametrize("prog, start, default", [
    ("kapow server", "Fl -bind ", kapow.USER_ADDRESS),
    ("kapow server", "Fl -control-bind ", kapow.CONTROL_ADDRESS),
    ("kapow server", "Fl -data-bind ", kapow.DATA_ADDRESS),
    ("kapow server", "Fl -max-body ", "1GiB"),
    ("kapow server", "Fl -max-handlers ", f"{kapow.MAX_HANDLERS},"),
    ("kapow server", "Fl -max-queue ", f"{kapow.MAX_QUEUE}."),
    ("kapow server", "Fl -queue-time ", f"{kapow.QUEUE_TIME}."),
    ("kapow server", "Fl -grace ", f"{kapow.GRACE}."),
    ("kapowctl route add", "Fl X ", "GET"),
    ("kapowctl route add", "Fl e ", kapow.DEFAULT_ENTRYPOINT),
    ("kapowctl route add", "Fl -disconnect ", f"{kapow.Route('GET', '/').disconnect}."),
])
def test_defaults_are_those_of_the_program(prog, start, default):
    text = item_text(subsection(page_of(prog), OPTION_LISTS[prog][-1]), start)
    assert f"The default is {default}" in text


def test_defaults_of_parsers():
    server = kapow.make_server_parser()
    assert server.get_default("max_body") == kapow.parse_size("1GiB")
    assert server.get_default("bind") == kapow.USER_ADDRESS
    assert server.get_default("control_bind") == kapow.CONTROL_ADDRESS
    assert server.get_default("data_bind") == kapow.DATA_ADDRESS
    assert all_parsers()["kapowctl route add"].get_default("method") == "GET"


def parser_defaults(parser):
    """Return {option: its default} of the options of a parser that have one."""
    return {action.option_strings[0]: action.default for action in parser._actions
            if action.option_strings and action.nargs != 0 and action.default != argparse.SUPPRESS
            and isinstance(action.default, (str, int, float)) and action.default is not False}


def page_defaults(lines, parser):
    """Return {option: its default, as `parser` takes it} of a list whose page gives one as a literal."""
    defaults, option = {}, None
    for line, following in zip(lines, lines[1:]):
        if line.startswith(".It "):
            option = render(line.split()[1:]).split()[0]
        elif line == "The default is" and following.startswith(".Li "):
            text = re.fullmatch(r"\.Li (.*?)(?: [,.:;])?", following).group(1)
            action = parser._option_string_actions[option]
            text = unescape(text)
            defaults[option] = text if isinstance(action.default, str) else action.type(text)
    return defaults


@pytest.mark.parametrize("prog", ["kapow server", "kapow billetd"])
def test_defaults_of_the_servers_are_in_the_page_and_no_others(prog):
    parser, title = all_parsers()[prog], OPTION_LISTS[prog][-1]
    assert parser_defaults(parser)
    assert page_defaults(subsection("kapow.1", title), parser) == parser_defaults(parser)
    assert page_defaults(subsection("kapow.1", DAEMON), parser) == {}


def test_billetd_is_where_the_pages_say():
    port = kapow.make_billetd_parser().get_default("port")
    assert f"on port {port}, or that of -p" in plain(
        subsection("kapow-billets.7", "The directory alone"))
    assert f"on port {port}." in (ROOT / "README.md").read_text()


def test_commands_on_the_path_are_those_of_the_pages():
    older = {item.split()[0] for item in items(subsection("kapowctl.1", "Older spellings"), "Nm ")}
    assert older == set(kapow.TOOLS) - {"kapow", "kapowctl"}
    text = item_text(subsection("kapow.1", "Given to handlers and init programs"), "Ev PATH")
    listed = re.search(r"with the commands (.*) \(see", text).group(1)
    assert set(re.findall(r"\w+", listed)) - {"and"} == set(kapow.TOOLS)


# ---------------------------------------------------------------------------
# Environment and files
# ---------------------------------------------------------------------------


def variables(lines):
    """Return the set of the environment variables that are items of a list."""
    return set(items(lines, "Ev "))


@pytest.mark.parametrize("name, module", [("kapow.1", kapow), ("kapowctl.1", kapowctl)])
def test_environment_is_that_of_the_source(name, module):
    with open(module.__file__, encoding="utf-8") as file:
        source = file.read()
    used = set(re.findall(r'"(KAPOW_[A-Z_]+)"', source))
    used |= set(re.findall(r'environ(?:ment)?(?:\.get\(|\.pop\(|\[)"([A-Z_]+)"', source))
    used |= set(re.findall(r'"(LISTEN_[A-Z]+)"', source))
    used |= set(getattr(module, "SERVICE_SOCKET_VARIABLES", ()))
    if "tempfile." in source:
        used.add("TMPDIR")
    used -= {name for name in used if name.startswith("BILLET_")}       # see kapow-billets.7
    assert variables(read_sections(name)["ENVIRONMENT"]) == used


# What a service manager says to the server, and no program is to see.
MANAGER_VARIABLES = {"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "NOTIFY_SOCKET"}


def given(environment):
    """Return the names in an environment that the server has given."""
    return {name for name in environment if name.startswith("KAPOW_")} - {"KAPOW_TEST"} | {"PATH"}


def test_environment_of_handlers_and_init_programs(server):
    both = variables(subsection("kapow.1", "Given to handlers and init programs"))
    init = variables(subsection("kapow.1", "Given to init programs"))
    handler = variables(subsection("kapow.1", "Given to handlers"))
    assert given(server.init_environment) == both | init
    body = server.get(server.route("env | kapow set /response/body")).body.decode()
    assert given(re.findall(r"(?m)^([A-Z_]+)=", body)) == both | handler


def test_environment_of_services(start_server, tmp_path):
    program = tmp_path / "write-environment"
    program.write_text('#!/bin/sh\nenv > "$1.new"; mv "$1.new" "$1"; exec sleep 1000\n')
    program.chmod(0o755)
    # What opens doors is kept from them, though it be the server's own.
    doors = {**dict.fromkeys(CREDENTIALS, "secret"), kapow.CHANNEL_VARIABLE: "secret"}
    server = start_server(environment=doors)
    written = tmp_path / "environment"
    service = {"name": "probe", "command": [str(program), str(written)]}
    assert server.control("POST", "/services", service).status_code == 201
    wait_until(written.exists, "the environment of a service")
    environment = dict(line.split("=", 1) for line in written.read_text().splitlines())
    listed = variables(subsection("kapow.1", "Given to services"))
    own = {*server.environment, "PWD", "OLDPWD", "SHLVL", "_"} - doors.keys()
    assert set(environment) - own == listed
    assert environment["PATH"] == server.environment["PATH"]
    assert len({environment[name] for name in listed}) == 1
    server.remove_services()


def test_environment_that_the_server_reads(start_server):
    names = kapow.DATA_URL_VARIABLES + kapow.CONTROL_URL_VARIABLES + kapow.CREDENTIAL_VARIABLES
    given_values = {name: f"http://probe:{number}" for number, name in enumerate(names, 1)}
    server = start_server(environment={
        **given_values, **dict.fromkeys(MANAGER_VARIABLES, "x"), "LISTEN_PID": "1"})
    kept = {name for name in names if server.init_environment[name] == given_values[name]}
    read = variables(subsection("kapow.1", "Read by the server"))
    assert kept == read - {"JOURNAL_STREAM", "PATH", "TMPDIR", "XDG_RUNTIME_DIR"} - MANAGER_VARIABLES
    assert MANAGER_VARIABLES < read
    assert not MANAGER_VARIABLES & set(server.init_environment)


def test_private_directory_is_where_the_page_says(server):
    pattern, *_ = items(read_sections("kapow.1")["FILES"], "Pa ")
    first = server.init_environment["PATH"].split(os.pathsep)[0]
    assert os.path.dirname(first) == str(server.tmp)
    assert re.fullmatch(pattern.replace("/tmp/", "").replace("X", r"\w"), os.path.basename(first))
    assert os.stat(first).st_mode & 0o777 == 0o700
    assert set(os.listdir(first)) >= set(kapow.TOOLS)


def test_files_of_daemons_are_where_the_page_says(tmp_path, monkeypatch):
    section = read_sections("kapow.1")["FILES"]
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    _, *listed = items(section, "Pa ")
    assert [os.path.expandvars(item) for item in listed] == [
        kapow.state_path(name) for name in ("control-PID.json", "NAME.pid", "NAME.log")]
    assert (tmp_path / "kapow").stat().st_mode & 0o777 == 0o700
    assert f"NAME is {' or '.join(kapow.SERVER_COMMANDS)}:" in item_text(
        section, "Pa $XDG_RUNTIME_DIR/kapow/NAME.pid")
    other, = re.findall(r"in (/tmp/\S+),", plain(section))
    assert generalize(other) in source_texts(kapow) & source_texts(kapowctl)
    assert generalize("control-PID.json") in source_texts(kapow)


def test_file_for_other_terminals_is_as_the_pages_say(server):
    """It is where kapow(1) says, with the keys that kapow-api(7) lists."""
    left = server.runtime / "kapow" / f"control-{server.process.pid}.json"
    listed = variables(subsection("kapow-api.7", "Its URL and its certificates"))
    assert set(json.loads(left.read_text())) == listed
    assert left.stat().st_mode & 0o777 == 0o600
    text = item_text(read_sections("kapow.1")["FILES"], "Pa $XDG_RUNTIME_DIR/kapow/control")
    assert set(re.findall(r"KAPOW_\w+", text)) == listed


# ---------------------------------------------------------------------------
# Exit statuses
# ---------------------------------------------------------------------------


def returned_statuses(module, functions):
    """Return the ints that the `functions` (names) of `module` return."""
    with open(module.__file__, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    returns = [node.value for function in tree.body
               if isinstance(function, ast.FunctionDef) and function.name in functions
               for node in ast.walk(function) if isinstance(node, ast.Return)]
    names = [getattr(module, value.id) for value in returns if isinstance(value, ast.Name)]
    return {value.value for value in returns if isinstance(value, ast.Constant)} | set(names)


@pytest.mark.parametrize("name, statuses", [
    ("kapow.1", {2} | returned_statuses(kapow, ("main", "run_server", "run_client"))),
    ("kapowctl.1", {2} | returned_statuses(kapowctl, ("main",))),
])
def test_exit_statuses_of_source_and_page_are_equal(name, statuses):
    page = items(read_sections(name)["EXIT STATUS"])
    assert len(statuses) > 2 and {int(status) for status in page} == statuses
    assert len(page) == len(statuses)


def run(script, *arguments, **options):
    """Run one of the programs; return the CompletedProcess."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("KAPOW_")}
    return subprocess.run([*installed(script), *arguments], env=clean, timeout=DEADLINE,
                          stdin=subprocess.DEVNULL, capture_output=True, **options)


LOOPBACK = [part for name in ("--bind", "--control-bind", "--data-bind")
            for part in (name, "127.0.0.1:0")]


@pytest.mark.parametrize("script, arguments, status", [
    (KAPOW, [], 0),
    (KAPOW, ["--help"], 0),
    (KAPOW, ["server", "--version"], 0),
    (KAPOW, ["server", *LOOPBACK, "./there-is-none"], 1),
    (KAPOW, ["server", *LOOPBACK, "--routes", "there-is-none"], 1),
    (KAPOW, ["server", "--there-is-none"], 2),
    (KAPOW, ["billetd", "--version"], 0),
    (KAPOW, ["billetd", "--kill", "--pid-file", "there-is-none"], 1),
    (KAPOW, ["billetd", "-b", "there-is-none"], 2),
    (KAPOW, ["there-is-none"], 2),
    (KAPOW, ["get", "/request/method"], 2),
    (KAPOWCTL, [], 0),
    (KAPOWCTL, ["route", "list", "--help"], 0),
    (KAPOWCTL, ["route", "list"], 1),
    (KAPOWCTL, ["get", "/request/method"], 2),
])
def test_exit_status(script, arguments, status, tmp_path):
    assert run(script, *arguments, cwd=tmp_path).returncode == status


def test_exit_status_when_interrupted():
    """A client that waits for its standard input gets SIGINT."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(DEADLINE)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with subprocess.Popen([sys.executable, str(KAPOWCTL), "set", "--handler", "x",
                               "--data-url", url, "/response/body"], stdin=subprocess.PIPE) as client:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(DEADLINE)
                assert connection.recv(4096)
                client.send_signal(signal.SIGINT)
                assert client.wait(DEADLINE) == 130


# ---------------------------------------------------------------------------
# kapow-billets(7)
# ---------------------------------------------------------------------------


def test_functions_for_launchers_are_those_of_the_runtime():
    listed = items(subsection("kapow-billets.7", "Functions for a launcher"), "Ic ")
    offered = re.findall(r"(?m)^([a-z]\w*)\(\) \{(?: +# ([A-Z [\]]+))?", kapow.BILLET_RUNTIME)
    assert sorted(listed) == sorted(" ".join(words).rstrip() for words in offered)


def test_functions_of_launchers_are_those_of_the_runtime():
    listed = items(subsection("kapow-billets.7", "Functions of a launcher"), "Ic ")
    called = re.findall(r"_billet_is (billet[.:]\w*)", kapow.BILLET_RUNTIME)
    assert {name for name in listed if "." in name} == {name for name in called if "." in name}
    assert [name for name in listed if ":" in name] == ["billet:a:b:c"] and "billet:" in called


def test_environment_of_launchers(start_server, tmp_path):
    base = tmp_path / "site"
    base.mkdir()
    for name, text in {
            "cgi": "#!/bin/sh\nprintf 'Content-Type: text/plain\\n\\n'; env\n",
            "bash": "#!/bin/bash\nbillet:() { env; }\n"}.items():
        (base / f"{name}.b").write_text(text)
        (base / f"{name}.b").chmod(0o755)
    server = start_server("--billets", base)
    listed = variables(subsection("kapow-billets.7", "Of a launcher"))
    handlers = (variables(subsection("kapow.1", "Given to handlers and init programs"))
                | variables(subsection("kapow.1", "Given to handlers"))) - {kapow.CHANNEL_VARIABLE}
    for name in ("cgi", "bash"):
        body = server.request("POST", f"/{name}/x?q", b"body", {
            "Content-Type": "text/plain", "Name": "value", "Proxy": "x", "Under_score": "x"}).body
        environment = dict(re.findall(r"(?m)^(\w+)=(.*)$", body.decode()))
        others = {*server.environment, *handlers, "_", "SHLVL", "PWD", "OLDPWD",
                  "HTTP_HOST", "HTTP_ACCEPT_ENCODING"}
        taken = {"bash": {"BILLET_URL"}, "cgi": set()}[name]       # by billet_url
        assert environment.keys() - others == listed - {"HTTPS"} - taken
        assert handlers <= environment.keys()
        assert environment["PWD"] == environment["BILLET_BASE"] == str(base)
        assert environment["BILLET_DATA"] == str(base / name / "data")


def test_numbers_of_billets_are_those_of_the_server():
    assert f"After {kapow.REDIRECTS} in a row the answer is 500." in plain(
        read_sections("kapow-billets.7")["CGI"])
    assert f"The access log says {kapow.NO_ANSWER}." in plain(
        subsection("kapow-billets.7", "Without an answer"))
    assert f"{kapow.NO_ANSWER} for a program of" in plain(subsection("kapow.1", "Access log"))


# ---------------------------------------------------------------------------
# kapow(7)
# ---------------------------------------------------------------------------


def test_resources_are_those_of_the_server():
    def access(resource):
        return "write" if resource.get is None else "read"
    code = [f"/{b'/'.join(resource.words).decode()} ({access(resource)})"
            for resource in kapow.ALL_RESOURCES]
    assert not [resource for resource in kapow.ALL_RESOURCES
                if resource.get and (resource.put or resource.mode)]
    page = items(read_sections("kapow.7")["RESOURCES"], "Pa ")
    assert sorted(page) == sorted(code)


def raised_statuses():
    """Return the statuses from 400 on that kapow.py answers by number."""
    with open(kapow.__file__, encoding="utf-8") as file:
        calls = [node for node in ast.walk(ast.parse(file.read()))
                 if isinstance(node, ast.Call) and node.args]
    raisers = [node for node in calls if getattr(node.func, "id", getattr(node.func, "attr", None))
               in ("ApiError", "ProtocolError", "reason_json", "abort")]
    return {constant.value for node in raisers for constant in ast.walk(node.args[0])
            if isinstance(constant, ast.Constant) and isinstance(constant.value, int)
            and constant.value >= 400}


def test_reasons_are_those_of_the_server():
    page = items(read_sections("kapow.7")["REASONS"])
    own = {f"{status} {reason}" for reason, status in kapow.REASONS.items()}
    phrases = {f"{status} {kapow.status_phrase(status)}" for status in raised_statuses()}
    assert sorted(page) == sorted(own | phrases)


def test_route_keys_are_those_of_the_server():
    assert sorted(items(read_sections("kapow.7")["ROUTES"], "Li ")) == sorted(kapow.Route.KEYS)


def test_route_keys_are_options_of_route_add():
    options = {action.dest for action in all_parsers()["kapowctl route add"]._actions}
    assert set(kapow.Route.KEYS) - options == {"id"}
    assert options - set(kapow.Route.KEYS) == {"help", "version", "control_url", "command_file",
                                              "replace"}


def test_what_a_lost_client_can_do_is_in_the_page():
    text = item_text(subsection("kapowctl.1", "Route add"), "Fl -disconnect ")
    key = item_text(read_sections("kapow.7")["ROUTES"], "Li disconnect")
    option = all_parsers()["kapowctl route add"]._option_string_actions["--disconnect"]
    for word in option.choices:
        assert kapow.is_reaction(word) and f"{word} " in text and f'"{word}"' in key
    assert set(re.findall(r'"(\w+)"', key)) == set(option.choices)
    assert f'Absent it is "{kapow.Route("GET", "/").disconnect}"' in key


def test_keys_that_are_shown_when_given_are_the_last_of_a_route():
    section = read_sections("kapow.7")["ROUTES"]
    assert items(section, "Li ")[-len(kapow.Route.OPTIONAL):] == list(kapow.Route.OPTIONAL)
    assert len(kapow.Route.OPTIONAL) == 7 and "Of the last seven a route shows" in plain(section)


def test_handler_names_are_as_long_as_the_page_says():
    text = item_text(read_sections("kapow.7")["ROUTES"], "Li handler")
    longest = int(re.search(r"up to (\d+) characters of printable ASCII", text).group(1))
    fits = kapow.HANDLER_NAME.fullmatch
    assert fits(longest * "x") and fits("! ~") and not fits((longest + 1) * "x")
    assert not fits(" x") and not fits("x ") and not fits("\N{LATIN SMALL LETTER E WITH ACUTE}")


@pytest.mark.parametrize("name, lines", [
    ("kapow-api.7", item_text(subsection("kapow-api.7", "A service"), "Li name")),
    ("kapowctl.1", plain(subsection("kapowctl.1", "Service"))),
])
def test_service_names_are_those_of_the_server(name, lines):
    rule = re.search(r"[Uu]p to (\d+) letters, digits, (.*), the first a letter, a digit or '(.)'",
                     lines)
    marks = re.findall("'(.)'", rule.group(2))
    longest = int(rule.group(1))
    for text in ("a", "0", rule.group(3), "a" + "".join(marks), longest * "a"):
        assert kapow.SERVICE_NAME.fullmatch(text)
    for text in ("", (longest + 1) * "a", *(set(marks) - {rule.group(3)})):
        assert not kapow.SERVICE_NAME.fullmatch(text)
    taken = {chr(code) for code in range(0x110000) if kapow.SERVICE_NAME.fullmatch("a" + chr(code))}
    assert {mark for mark in taken if not mark.isalnum()} == set(marks)


def test_states_of_services_are_those_of_the_server():
    lines = [line.split(maxsplit=1)[1].split(" Ta ") for line in
             subsection("kapow.7", "States of a service") if line.startswith(".It ")]
    states = {state: (process, connection, set(following.split(", ")))
              for state, process, connection, following in lines[1:]}
    assert states == kapow.Supervisor.STATES
    assert states.keys() == {state for _, _, following in states.values() for state in following}


def test_answer_for_a_service_that_is_not_available_is_in_the_page():
    body, = [example for example in read_examples("kapow.7") if example.scenario == "unavailable"]
    assert body.text == kapow.UNAVAILABLE.decode() + "\n"


def test_manifest_in_the_page_is_one():
    shown, = [example for example in read_examples("kapow.7") if example.scenario == "manifest"]
    route, = kapow.routes_of_manifest("greeter", json.loads(shown.text))
    assert (route.method, route.handler, route.service) == ("GET", "greet", "greeter")


def test_headers_that_services_get_are_those_of_the_server():
    section = subsection("kapow.7", "What a service is asked")
    listed = {item.encode().lower() for item in items(section, "Li ")}
    request = kapow.UserRequest(kapow.RequestHead(b"GET / HTTP/1.1\r\nHost: h"), None, "::1")
    sent = request.passed_on(kapow.match_fields("handler", {"name": "value"}))
    names = {line.partition(b":")[0].lower() for line in sent.splitlines()[1:] if line}
    assert listed == names - {b"host"}
    assert all(kapow.is_own_field(name) for name in listed)


def public_methods(class_):
    """Return {NAME: [parameter]} of the methods of a class that its users call."""
    return {name: list(inspect.signature(value).parameters)[1:]
            for name, value in vars(class_).items()
            if inspect.isfunction(value) and not name.startswith("_")}


def test_library_is_that_of_the_module():
    listed = items(subsection("kapow.7", "The library"), "Li ")
    errors = [item for item in listed if "(" not in item]
    calls = dict(re.fullmatch(r"([\w.]+)\((.*)\)", item).groups() for item in listed if "(" in item)
    for name in ("Request", "Response"):
        parameters = inspect.signature(getattr(kapow, name)).parameters
        assert calls.pop(name).split(", ") == list(parameters)
    taken = inspect.signature(kapow.Supervisor).parameters.values()
    assert calls.pop("Supervisor").split(", ") == [
        str(parameter) for parameter in taken if parameter.kind != parameter.KEYWORD_ONLY]
    # The others are for the server.
    methods = public_methods(kapow.Supervisor)
    for call, parameters in calls.items():
        name = call.partition("Supervisor.")[2]
        assert [word for word in parameters.split(", ") if word] == [
            word for word in methods.pop(name) if word != "grace"]
    assert set(methods) == {"begin", "begin_to_stop", "begin_to_close", "close",
                            "serving", "lose", "look", "wait_available", "hand_manifest"}
    raised = kapow.SupervisorError.__subclasses__()
    assert sorted(errors) == sorted(error.__name__ for error in raised)
    text = plain(subsection("kapow.7", "The library"))
    assert [error for error in raised if error.text not in text] == []


@pytest.mark.parametrize("name, section, sentence", [
    ("kapow.7", "Limits", f"A request line may have {kapow.LINE_LIMIT // kapow.KIB} KiB, "
                          f"and {kapow.DATA_LINE_LIMIT // kapow.KIB} KiB on the data interface."),
    ("kapow.7", "Limits", f"A header may have {kapow.FIELDS_LIMIT // kapow.KIB} KiB and "
                          f"{kapow.FIELD_COUNT_LIMIT} lines, and the line with the size of a chunk "
                          f"{kapow.CHUNK_LINE_LIMIT // kapow.KIB} KiB."),
    ("kapow.7", "Limits", f"A form may have {kapow.FORM_FIELD_LIMIT} fields, and the header of a "
                          f"part {kapow.PART_HEAD_LIMIT // kapow.KIB} KiB."),
    ("kapow.7", "Limits", f"body may have {kapow.USER_BODY_LIMIT // kapow.MIB // 1024} GiB"),
    ("kapow.7", "Limits", f"whole {kapow.HEAD_TIME} seconds after its first byte"),
    ("kapow.7", "Limits", f"may have {kapow.ARGUMENT_LIMIT} bytes, which is what"),
    ("kapow.7", "Limits", f"may have {kapow.ARGUMENT_LIMIT - kapow.LIBRARY_ROOM}."),
    ("kapow.7", "Limits", f"idle for {kapow.IDLE_TIME} seconds is closed"),
    ("kapow.7", "Connections", f"drained up to {kapow.DRAIN_LIMIT // kapow.MIB} MiB"),
    ("kapow.7", "Connections", f"past {kapow.MEMORY_LIMIT // kapow.MIB} MiB in a temporary file"),
    ("kapow.7", "Time and number", f"{kapow.KILL_DELAY} seconds later SIGKILL"),
    ("kapow.7", "Time and number", f"{kapow.MAX_HANDLERS} handlers run at once, or as many as "
                                   "--max-handlers says."),
    ("kapow.7", "Time and number", f"{kapow.MAX_QUEUE} more requests, or what --max-queue says, wait"),
    ("kapow.7", "Time and number", f"first served, for {kapow.QUEUE_TIME} seconds at most, or"),
    ("kapow.7", "Time and number", "gets 503 with %s: %s," % kapow.RETRY_LATER),
    ("kapow.7", "ROUTES", f"may take, 0 to {kapow.LONGEST_TIMEOUT}."),
    ("kapow.7", "What is held back", f"more than {kapow.HOLD_LIMIT // kapow.KIB} KiB were written"),
    ("kapow.7", "Lost clients", f"{kapow.KILL_DELAY} seconds later SIGKILL"),
    ("kapow.7", "Lost clients", f"status {kapow.CLIENT_CLOSED_REQUEST} if nothing was sent"),
    ("kapow.7", "The response", f"These may have {kapow.VALUE_LIMIT // kapow.KIB} KiB."),
    ("kapow.7", "The manifest", f"longer than {kapow.MANIFEST_LIMIT // kapow.MIB} MiB, "
                                f"does not come in {kapow.MANIFEST_TIME} seconds"),
    ("kapow.7", "States of a service", f"after {kapow.RETRY_FIRST} seconds, then twice the time "
                                       f"of the last wait, {kapow.RETRY_LAST} seconds at most, "
                                       f"and {kapow.RETRY_FIRST} seconds again after a process "
                                       f"that has lived for {kapow.RETRY_LIFE} seconds."),
    ("kapow.7", "Start, stop and restart", f"gets SIGTERM and {kapow.STOP_TIME} seconds later"),
    ("kapow.7", "Start, stop and restart", f"does not answer in {kapow.START_TIME} seconds"),
    ("kapow.7", "Connections to a service", f"up to {kapow.IDLE_CONNECTIONS} of a process wait"),
    ("kapow.7", "Connections to a service", f"idle for less than {kapow.SURE_TIME} second, or"),
    ("kapow.7", "Connections to a service", f"{kapow.PIECE // kapow.KIB} KiB of it at most"),
    ("kapow.7", "The library", f"within {kapow.START_TIME} seconds"),
    ("kapowctl.1", "Service start, stop, restart", f"answers, {kapow.START_TIME} seconds at most"),
    ("kapow.1", "STOPPING", "the services, which get SIGTERM, with their process groups, and "
                            f"SIGKILL {kapow.STOP_TIME} seconds later."),
    ("kapow.1", "STOPPING", f"has asked /readyz within the last {kapow.IDLE_TIME} seconds"),
    ("kapow.1", "STOPPING", f"has asked {kapow.TELLS} times more. The server waits for that as long as "
                            f"{kapow.TELLS + 1} times take them, judged by how often they asked before, "
                            f"and by {kapow.TELL_TIME} seconds where that is more; but for "
                            f"{kapow.TELL_LONGEST} seconds at most, and no longer than --grace."),
    ("kapow.1", "STOPPING", f"are closed {kapow.PARTING_TIME} seconds later; a client that has only "
                            f"just connected has {kapow.FRESH_TIME} second more"),
    ("kapow.1", "Services in a reload", f"does not answer within {kapow.START_TIME} seconds, the"),
    ("kapow.1", "Metrics", f"more than {kapow.SERIES_LIMIT} series"),
    ("kapow.1", "UNIX SOCKETS", f"a path from the root and of {kapow.SOCKET_PATH_LIMIT} bytes at most"),
    ("kapow-api.7", "LIMITS", f"interface may have {kapow.CONTROL_BODY_LIMIT // kapow.MIB} MiB."),
    ("kapow-api.7", "LIMITS", f"may have {kapow.DATA_LINE_LIMIT // kapow.KIB} KiB on the data "
                              f"interface, {kapow.LINE_LIMIT // kapow.KIB} KiB on the other."),
    ("kapow-api.7", "LIMITS", f"log line may have {kapow.VALUE_LIMIT // kapow.KIB} KiB"),
    ("kapow-api.7", "LIMITS", f"whole {kapow.HEAD_TIME} seconds after its first byte, and a "
                              f"connection is closed after {kapow.IDLE_TIME} seconds"),
    ("kapowctl.1", "Handler kill", f"{kapow.KILL_DELAY} seconds later SIGKILL"),
    ("kapow.1", "Given to services", f"to listen, up to {kapow.SOCKET_PATH_LIMIT} bytes"),
    ("kapow.1", "DIAGNOSTICS", f"It has not for {kapow.START_TIME} seconds."),
    ("kapow.7", "How the program ended", "one that died of " + ", ".join(
        signum.name for signum in kapow.CLEAN_SIGNALS[:-1]) + f" or {kapow.CLEAN_SIGNALS[-1].name}."),
    ("kapow.1", "Open files", f"needs {kapow.OWN_FILES} open files for itself, {kapow.RESERVED_FILES} for "
                              f"clients of its other interfaces (or an eighth of its limit, if that is more), "
                              f"{kapow.HANDLER_FILES} for each handler, and one for each connection of a user."),
    ("kapow.1", "Open files", f"with less than {kapow.OWN_FILES + kapow.RESERVED_FILES + kapow.HANDLER_FILES} "
                              "the server does not start"),
    ("kapow.1", "Open files", f"and {kapow.IDLE_CONNECTIONS} for its idle connections"),
    ("kapow.1", "STOPPING", f"Handlers have {kapow.GRACE} seconds to finish, or the time that --grace "
                            f"gives. Those left then get SIGTERM, with their process groups, and "
                            f"SIGKILL {kapow.KILL_DELAY} seconds later"),
    ("kapow.1", "Init programs", f"SIGKILL {kapow.KILL_DELAY} seconds later"),
    ("kapow.1", "Access log", f"The status {kapow.CLIENT_CLOSED_REQUEST} stands for a client that left"),
    ("kapow.1", "Read by the server", f"bodies over {kapow.MEMORY_LIMIT // kapow.MIB} MiB"),
])
def test_numbers_are_those_of_the_server(name, section, sentence):
    assert sentence in plain(section_or_sub(name, section))


def test_numbers_of_the_readme_are_those_of_the_server():
    text = " ".join((ROOT / "README.md").read_text().split())
    assert (f"- {kapow.MAX_HANDLERS} handlers run at once (`--max-handlers`), {kapow.MAX_QUEUE} more "
            f"requests wait for up to {kapow.QUEUE_TIME} s (`--max-queue`, `--queue-time`), others get 503.") in text
    assert f"{kapow.USER_BODY_LIMIT // kapow.MIB // 1024} GiB (`--max-body`)" in text


def awaited_signals():
    """Return {what the server does: list of the names of the signals that have it do that}."""
    with open(kapow.__file__, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    function = next(node for node in tree.body
                    if isinstance(node, ast.FunctionDef) and node.name == "run_server")
    found = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values):
                found.setdefault(value.attr, []).append(key.attr)
    return found


def test_signals_are_those_that_the_server_awaits():
    assert set(awaited_signals()) == {"ask_to_stop", "ask_to_reload"}
    assert items(subsection("kapow.1", "Signals"), "Dv ") == [
        ", ".join(names) for names in awaited_signals().values()]


# ---------------------------------------------------------------------------
# What the server says of itself: status and activation
# ---------------------------------------------------------------------------


def test_status_pages_are_those_of_the_server():
    pages = items(subsection("kapow.1", "Pages"), "Pa ")
    assert pages == [path.decode() for path in kapow.STATUS_PAGES]


def test_states_of_readyz_are_in_the_page():
    text = item_text(subsection("kapow.1", "Pages"), "Pa /readyz")
    states = re.findall(r"(?:200|503) and (\w+)", text)
    assert set(states) == {"ready", "starting", "stopping"} <= source_texts(kapow)
    assert kapow.Readiness().state == "starting"


def metrics_page():
    """Return the text of /metrics of a server with one route and one service, without one."""
    metrics, supervisor = kapow.Metrics(), types.SimpleNamespace(state="available", restarts=0)
    metrics.count_request(("/", "GET", "200"), 0, 0)
    metrics.count_handler(types.SimpleNamespace(
        started=0, cause=None, route=types.SimpleNamespace(label="/")))
    services = [types.SimpleNamespace(name="x", supervisor=supervisor)]
    shared = types.SimpleNamespace(
        metrics=metrics, gate=types.SimpleNamespace(counts=lambda: (0, 0, 0)),
        configuration=types.SimpleNamespace(routes=kapow.RouteTable()),
        services=types.SimpleNamespace(snapshot=lambda: services))
    server = types.SimpleNamespace(shared=shared)
    _, _, body = kapow.StatusConversation.show_metrics(types.SimpleNamespace(server=server))
    return body.decode()


def test_metrics_are_those_of_the_server():
    kinds = dict(re.findall(r"(?m)^# TYPE (\S+) (\S+)$", metrics_page()))
    labels = {name: set() for name in kinds}
    for sample, pairs in re.findall(r"(?m)^(\w+)(?:\{(.*)\})? \S+$", metrics_page()):
        name = sample if sample in kinds else sample.rpartition("_")[0]
        labels[name] |= set(re.findall(r'(\w+)="', pairs)) - {"le"}
    listed = {re.fullmatch(r"(\w+)(?:\{(.*)\})? \((\w+)\)", item).groups()
              for item in items(subsection("kapow.1", "Metrics"), "Li ")}
    assert {name: kind for name, _, kind in listed} == kinds
    assert {name: set(words.split(",")) if words else set() for name, words, _ in listed} == labels
    assert len(listed) == len(items(subsection("kapow.1", "Metrics"), "Li "))


def test_causes_are_those_of_the_server():
    assert items(subsection("kapow.1", "Causes"), "Li ") == list(kapow.CAUSES)


def test_names_of_inherited_sockets_are_those_of_the_server():
    listed = items(subsection("kapow.1", "Socket activation"), "Li ")
    assert listed == list(kapow.INTERFACES)


def test_inherited_unix_sockets_are_for_those_that_the_page_says(tmp_path, monkeypatch):
    text = plain(subsection("kapow.1", "Socket activation"))
    names = re.search(r"only (\w+) and (\w+) may be Unix sockets", text).groups()
    for name in kapow.INTERFACES:
        with socket.socket(socket.AF_UNIX) as sock:
            monkeypatch.chdir(tmp_path)         # a path of its own may be too long
            sock.bind(name)
            sock.listen()
            try:
                kapow.inherited_socket(os.dup(sock.fileno()), name).close()
                assert name in names
            except kapow.StartError:
                assert name not in names


def test_what_a_unit_needs_is_in_the_example():
    """The settings of the page are those of the unit in examples/systemd."""
    unit = (ROOT / "examples" / "systemd" / "kapow.service").read_text()
    settings = [setting for item in items(subsection("kapow.1", "A unit for systemd"), "Li ")
                for setting in item.split(", ")]
    assert settings
    assert [setting for setting in settings
            if not re.search(f"(?m)^{re.escape(setting)}", unit)] == []


# ---------------------------------------------------------------------------
# kapow-api(7)
# ---------------------------------------------------------------------------


def test_control_calls_are_those_of_the_server():
    page = [tuple(item.split()) for item in items(subsection("kapow-api.7", "Calls"), "Ic ")]
    code = [(method, re.sub(re.escape("/services/([^/]+)"), "/services/NAME", pattern.pattern)
             .replace("([^/]+)", "ID"))
            for pattern, calls in kapow.CONTROL_CALLS for method in calls]
    assert sorted(page) == sorted(code)


def test_paths_of_the_api_are_those_of_the_server():
    text = plain(subsection("kapow-api.7", "Reloads"))
    path, = set(re.findall(r"/reloads/\w+", text))
    assert kapow.RELOAD_PATH.fullmatch(path)
    listed = items(subsection("kapow-api.7", "Read and write"), "Ic ")
    assert listed == [f"{method} /handlers/ID/RESOURCE" for method in ("GET", "PUT")]


def keys_of(title):
    """Return {key: type} of the JSON object in a subsection of kapow-api(7)."""
    listed = items(subsection("kapow-api.7", title), "Li ")
    pairs = [re.fullmatch(r"(\w+) \((.*)\)", item).groups() for item in listed]
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)


# The words for a type of JSON -> a value of it.
SAMPLES = {"string": "kill", "integer": 1, "number": 0.5, "boolean": True,
           "array of strings": ["x"], "object": {}, "null": None}


@pytest.mark.parametrize("title, kind", [("A route", kapow.Route), ("A service", kapow.Service)])
def test_types_of_keys_are_those_of_the_server(title, kind):
    listed = keys_of(title)
    for key, (fits, _) in kind.KEYS.items():
        # 0.5 and 1 both fit where a number does.
        assert fits(SAMPLES[listed[key]]), key
        others = set(SAMPLES) - {listed[key], "integer" if listed[key] == "number" else ""}
        assert [other for other in others if fits(SAMPLES[other])] == [], key


def test_keys_of_routes_are_those_of_the_server():
    assert list(keys_of("A route")) == list(kapow.Route.KEYS)


def fits_words(value, words):
    """Tell whether a JSON value is of one of the types `words`, such as "integer or null"."""
    types_of = {type(SAMPLES[word]) for word in words.split(" or ")}
    return type(value) in types_of | ({int} if float in types_of else set())


def test_keys_of_services_are_those_of_the_server():
    listed, sent = keys_of("A service"), list(kapow.Service.KEYS)
    shown = kapow.Service("x", ["x"], False, kapow.Supervisor("x", surroundings=object()),
                          threading.Lock()).to_json()
    assert list(listed) == sent + [key for key in shown if key not in sent]
    assert set(sent) - set(shown) == {"routes"}
    assert [key for key, value in shown.items() if not fits_words(value, listed[key])] == []


def test_keys_of_handlers_are_those_of_the_server():
    request = kapow.UserRequest(kapow.RequestHead(b"GET / HTTP/1.1\r\nHost: h"), None, "::1")
    shown = kapow.Handler(request, kapow.Route("GET", "/"), {}).to_json()
    listed = keys_of("A handler")
    assert list(listed) == list(shown)
    assert [key for key, value in shown.items() if not fits_words(value, listed[key])] == []


def test_reasons_of_the_calls_are_all_there_are():
    known = set(items(read_sections("kapow.7")["REASONS"]))
    text = unescape(re.sub(r'(?m)^\.\\".*', "", PAGES["kapow-api.7"].read_text()))
    listed = set(re.findall(r"(?m)^\.Li ([45]\d\d [A-Z][A-Za-z ]*[a-zA-Z])", text))
    assert listed <= known
    assert {f"{status} {reason}" for reason, status in kapow.REASONS.items()} <= listed


def test_more_keys_of_errors_are_those_of_the_server():
    listed = set(items(read_sections("kapow-api.7")["REASONS"], "Li "))
    with open(kapow.__file__, encoding="utf-8") as file:
        calls = [node for node in ast.walk(ast.parse(file.read()))
                 if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ApiError"]
    given_keys = {keyword.arg for call in calls for keyword in call.keywords if keyword.arg}
    assert {item.split()[0] for item in listed} >= given_keys - {"fields"}
    assert {"field", "item", "error", "routes"} == {item.split()[0] for item in listed}


# ---------------------------------------------------------------------------
# What is written twice, and the pages as such
# ---------------------------------------------------------------------------


def shared_constants(module):
    """Return {name: value} of the constants that server and client must agree on."""
    return {name: value for name, value in vars(module).items()
            if name == "VERSION" or re.fullmatch(r"[A-Z_]+_(ADDRESS|VARIABLES?|SCHEME)", name)}


def test_constants_written_twice_are_equal():
    client, server = shared_constants(kapowctl), shared_constants(kapow)
    assert len(client) == 11
    assert {name: server.get(name) for name in client} == client
    assert set(server) - set(client) == {"USER_ADDRESS", "CHANNEL_VARIABLE",
                                         "SERVICE_SOCKET_VARIABLES"}
    assert set(kapow.CREDENTIAL_VARIABLES) == {
        value for name, value in client.items() if re.search("_(CERT|KEY)_", name)}


def generalize(text):
    """Return a message with all that differs from case to case as an asterisk."""
    return re.sub(r"(?:\*|\b[A-Z][A-Z_]+\b)+", "*", re.sub(r"%[sdrg]", "*", text))


# What a source puts into a message in one piece, and the pages spell out; the
# source has each of them as a text, too.
PIECES = ("the service *", "exited with status *", "died of *", "cannot run *: *",
          "cannot keep the body of the request: *")


def spellings(text):
    """Return a text of a page, generalized, and with the PIECES as one asterisk."""
    whole = generalize(text)
    return {whole, generalize(re.sub("|".join(map(re.escape, PIECES)), "*", whole)),
            *(generalize(whole.replace(piece, "*")) for piece in PIECES)}


def source_texts(module):
    """Return the texts in the source of `module`, generalized."""
    with open(module.__file__, encoding="utf-8") as file:
        nodes = list(ast.walk(ast.parse(file.read())))
    texts = {node.value for node in nodes
             if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            # What is there only in some cases, the pages leave out.
            for sometimes in ("*", ""):
                texts.add("".join(
                    part.value if isinstance(part, ast.Constant)
                    else sometimes if isinstance(part.value, ast.IfExp) else "*"
                    for part in node.values))
    return {generalize(text.rstrip("\n")) for text in texts}


@pytest.mark.parametrize("name, module", [("kapow.1", kapow), ("kapowctl.1", kapowctl),
                                          ("kapow-billets.7", kapow)])
def test_diagnostics_are_in_the_source(name, module):
    page = [line[4:] for line in read_sections(name)["DIAGNOSTICS"] if line.startswith(".It ")]
    assert page
    texts = source_texts(module)
    assert [text for text in page if not spellings(text) & texts] == []


# What is said to nobody who reads DIAGNOSTICS: what a program as a library logs; and
# what stands in an example there.
UNLISTED = {"* failed: it *", "* interface: *"}


def texts_of(node):
    """Yield the texts, generalized, that the argument `node` of a call may be."""
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from texts_of(value)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield from texts_of(node.left)          # more of it may follow
    elif isinstance(node, ast.Constant):
        yield generalize(node.value.rstrip("\n"))
    elif isinstance(node, ast.JoinedStr):
        yield generalize("".join(
            part.value if isinstance(part, ast.Constant)
            else "" if isinstance(part.value, ast.IfExp) else "*" for part in node.values))


def messages(module, names):
    """Return the texts that calls of `names` in the source of `module` begin with."""
    with open(module.__file__, encoding="utf-8") as file:
        calls = [node for node in ast.walk(ast.parse(file.read()))
                 if isinstance(node, ast.Call) and node.args]
    return {text for call in calls if ast.unparse(call.func) in names
            for text in texts_of(call.args[0])} - {"*", "* *", "*: *", "* *: *", "* * * *"}


@pytest.mark.parametrize("pages, module, names", [
    (("kapow.1", "kapow-billets.7"), kapow, ("StartError", "log.error", "log.warning", "log.info")),
    (("kapowctl.1",), kapowctl, ("Refused", "WrongUsage"))])
def test_messages_of_the_source_are_diagnostics(pages, module, names):
    listed = {spelling for name in pages for line in read_sections(name)["DIAGNOSTICS"]
              if line.startswith(".It ") for spelling in spellings(line[4:])}
    assert len(messages(module, names)) > 15
    assert sorted(messages(module, names) - listed - UNLISTED) == []


def test_pieces_of_diagnostics_are_in_the_source():
    assert set(PIECES) <= source_texts(kapow)


def test_pages_are_all_installed():
    installed = set(re.findall(r"(?m)^ +man/(\S+)$", (ROOT / "setup.cfg").read_text()))
    assert installed == set(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_references_lead_somewhere(name):
    text = PAGES[name].read_text()
    references = {".".join(found) for found in re.findall(r"(?m)\bXr ([\w-]+) (\d)", text)}
    assert {page for page in references if page.startswith("kapow")} == set(PAGES) - {name}
    assert references - set(PAGES) <= OTHER_PAGES


# Of other programs, which the pages may name.
OTHER_PAGES = {"bash.1", "curl.1", "systemd.1", "zsh.1", "flock.2", "prctl.2", "sd_listen_fds.3",
               "sd_notify.3"}


def mandoc(name, *arguments):
    """Run mandoc(1) on a page; return the CompletedProcess."""
    if not shutil.which("mandoc"):
        pytest.skip("mandoc is not installed")
    return subprocess.run(["mandoc", *arguments, str(PAGES[name])], capture_output=True,
                          timeout=DEADLINE, text=True, encoding="utf-8")


@pytest.mark.parametrize("name", PAGES)
def test_page_is_clean(name):
    result = mandoc(name, "-T", "lint", "-W", "warning")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("name", PAGES)
def test_no_word_is_taken_for_a_macro(name):
    """As "In" was, which made of a reason a header file."""
    lines = [line.split() for line in PAGES[name].read_text().splitlines()
             if re.match(r"\.[A-Z][a-z] ", line)]
    assert [words for words in lines if set(words[1:]) & OTHER_MACROS] == []


# Of mdoc(7): what is one, wherever it stands in a line.
OTHER_MACROS = set("""
    Ac Ad An Ao Ap Aq At Bc Bo Bq Bsx Bx Cd Dc Do Dq Dx Ec En Eo Er Es Fa Fn Fr Ft Fx In Lk Ms Mt
    Nx Oc Oo Ot Ox Pc Pf Po Qc Qo Qq Sc So Tn Ux Va Vt Xc Xo""".split())


@pytest.mark.parametrize("form", ["ascii", "utf8"])
@pytest.mark.parametrize("name", PAGES)
def test_reader_sees_the_examples_that_are_run(name, form):
    shown = re.sub(".\b", "", mandoc(name, "-T", form).stdout)
    for example in read_examples(name):
        for line in example.text.splitlines():
            assert line in shown


# ---------------------------------------------------------------------------
# Examples
# ---------------------------------------------------------------------------

DIRECTIVE = re.compile(r'\.\\" example (\w+): (.+)')
UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"

# What differs from run to run in a sample of output -> how it looks.
VARYING = ((UUID, UUID), (r"\b[0-9a-f]{16}\b", "[0-9a-f]{16}"), (r"\[\d\d/\w{3}/[^]]+\]", r"\[\d\d/\w{3}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4}\]"),
           (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}", r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"),
           (r'(?<=" )\d\.\d{3}(?= ")', r"\d+\.\d{3}"), (r"curl/[\d.]+", r"curl/[\w.-]+"), (r'(?<="pid": )\d+', r"\d+"),
           (r"(?<=  available  )\d+ +", r"\d+ +"), (r"PID +(?=RESTARTS)", "PID +"))

# Of the interface that has no default; and the directory of sockets, in the pages.
STATUS_ADDRESS = "localhost:8083"
SOCKETS = "/run/kapow"


class Example:
    """A literal block: `scenario` its name, `kind`, `arguments` list of str, `text`."""

    def __init__(self, directive, lines):
        self.scenario, words = directive.groups()
        self.kind, *self.arguments = words.split()
        self.text = "".join(unescape(line) + "\n" for line in lines)


def read_examples(name):
    """Return the Examples of a page in their order; fail for a block that is none."""
    lines = PAGES[name].read_text().splitlines()
    examples = []
    for place, line in enumerate(lines):
        if line.startswith((".Bd", ".Dl", ".D1")):
            directive = DIRECTIVE.fullmatch(lines[place - 1])
            assert directive and line.startswith(".Bd -literal"), f"{name}:{place + 1} is not run"
            examples.append(Example(directive, lines[place + 1:lines.index(".Ed", place)]))
    assert len(examples) == len([line for line in lines if DIRECTIVE.fullmatch(line)])
    return examples


def read_scenarios():
    """Return {page/scenario: list of Example, logs last}."""
    scenarios = {}
    for name in PAGES:
        for example in read_examples(name):
            scenarios.setdefault(f"{name}/{example.scenario}", []).append(example)
    return {key: sorted(examples, key=lambda example: example.kind in ("log", "access"))
            for key, examples in scenarios.items()}


def pattern_of(sample):
    """Return the regular expression of the lines that look like `sample`."""
    pattern, place = "", 0
    for found in re.finditer("|".join(f"({shape})" for shape, _ in VARYING), sample):
        pattern += re.escape(sample[place:found.start()]) + VARYING[found.lastindex - 1][1]
        place = found.end()
    return pattern + re.escape(sample[place:])


def parse_transcript(text):
    """Return a list of (command, output) of a terminal session."""
    steps = []
    for line in text.splitlines():
        if line.startswith("$ "):
            steps.append([line[2:], ""])
        elif line.startswith("> ") and not steps[-1][1]:
            steps[-1][0] += "\n" + line[2:]
        else:
            steps[-1][1] += line + "\n"
    return [tuple(step) for step in steps]


class Scenario:
    """Runs examples that belong together, in `directory`."""

    def __init__(self, directory):
        self.directory = directory
        self.server = None
        self.reply = None           # of the last handler
        self.sockets = tempfile.mkdtemp(prefix="man-")      # whose path is short
        (directory / ".curlrc").write_text("silent\nshow-error\n")
        path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
        self.environment = {"PATH": path, "PYTHONPATH": str(ROOT), "CURL_HOME": str(directory),
                            "NO_PROXY": "*", "no_proxy": "*"}

    def run(self, example):
        """Run one Example."""
        if self.server is None and example.kind not in ("file", "server"):
            self.start()
        getattr(self, "do_" + example.kind)(example.text, *example.arguments)

    def start(self, *arguments):
        """Start the server that the examples talk to."""
        self.server = Server(self.directory, *arguments, environment=self.environment)

    def stop(self):
        """Stop the server; it must leave nothing behind."""
        if self.server is not None:
            try:
                self.server.remove_services()
                self.server.check_idle()
            finally:
                status = self.server.stop()
            self.server.check_gone()
            assert status == 0
        os.rmdir(self.sockets)      # which the server has left empty

    def real(self, text):
        """Return `text` with the default ports replaced by those of the server."""
        ports = {kapow.USER_ADDRESS: "user", kapow.CONTROL_ADDRESS: "control", kapow.DATA_ADDRESS: "data",
                 STATUS_ADDRESS: "status"}
        for address, name in ports.items():
            port = address.rpartition(":")[2]
            text = re.sub(rf":{port}\b", lambda _, name=name: f":{self.server.port(name)}", text)
        return text

    def session(self, steps, environment):
        """Run (command, output) pairs in one shell; each must succeed with that output."""
        mark = "=== the next step, after status"
        script = "".join(f"{command}\nprintf '\\n%s %s\\n' '{mark}' $?\n" for command, _ in steps)
        result = subprocess.run(["sh", "-c", script], cwd=self.directory, timeout=DEADLINE,
                                env={**environment, **self.environment, "PATH": environment["PATH"]},
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        outputs = re.split(rf"\n{mark} (\d+)\n", result.stdout.decode())
        assert len(outputs) == 2 * len(steps) + 1, outputs
        for (command, wanted), output, status in zip(steps, outputs[::2], outputs[1::2]):
            assert re.fullmatch(pattern_of(wanted.rstrip("\n")), output.rstrip("\n")), \
                f"{command}\nprinted\n{output}\nand not\n{wanted}"
            assert status == "0", command

    # The kinds of examples.

    def do_file(self, text, name):
        """The content of a file."""
        (self.directory / name).parent.mkdir(exist_ok=True)
        (self.directory / name).write_text(text)

    def do_server(self, text):
        """Commands, the last of which starts the server."""
        *before, (command, output) = parse_transcript(text)
        assert not output
        self.session(before, {**os.environ, **self.environment})
        program, verb, *arguments = shlex.split(command)
        assert (program, verb) == ("kapow", "server")
        self.start(*(re.sub(r"^\S+:\d+$", "127.0.0.1:0", argument).replace(SOCKETS, self.sockets)
                     for argument in arguments))

    def do_client(self, text):
        """Commands at another terminal."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("KAPOW_")}
        self.session(parse_transcript(self.real(text)), {
            **clean, "XDG_RUNTIME_DIR": self.server.environment["XDG_RUNTIME_DIR"],
            "PATH": self.server.init_environment["PATH"]})

    def do_init(self, text):
        """Commands of an init program."""
        self.session(parse_transcript(self.real(text)), self.server.init_environment)

    def do_handler(self, text, method, target):
        """Commands of the handler of one request."""
        environment = {name: value for name, value in self.server.init_environment.items()
                       if name not in CREDENTIALS}
        with self.server.handler(method, target, pattern=target.partition("?")[0]) as waiting:
            self.session(parse_transcript(self.real(text)),
                         {**environment, kapow.HANDLER_ID_VARIABLE: waiting.id})
            self.reply = waiting.finish()

    def do_reply(self, text):
        """The response of the last handler, headers of the server left out."""
        head, _, body = text.partition("\n\n")
        status, *fields = head.splitlines()
        assert status == f"HTTP/1.1 {self.reply.status} {self.reply.reason}"
        sent = [f"{name}: {value}" for name, value in self.reply.headers.items()]
        assert sorted(fields) == sorted(
            field for field in sent if field.partition(":")[0] not in ("Server", "Date"))
        assert self.reply.body.decode() == body.rstrip("\n")

    def do_log(self, text):
        """Lines of the server's standard error."""
        for line in self.real(text).splitlines():
            self.server.wait_log(f"^{pattern_of(line)}$")

    def do_access(self, text):
        """Lines of the server's standard output."""
        for line in text.splitlines():
            self.server.wait_access(f"^{pattern_of(line)}$")


@pytest.fixture
def scenario(tmp_path):
    """A Scenario in a directory of its own."""
    made = Scenario(tmp_path)
    yield made
    made.stop()


@pytest.mark.parametrize("key", read_scenarios())
def test_examples(key, scenario):
    examples = read_scenarios()[key]
    for tool in ("curl", "openssl", "jq"):
        if any(f"{tool} " in example.text for example in examples) and not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    for example in examples:
        scenario.run(example)
