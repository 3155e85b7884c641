"""The README, done as it says.

Its blocks of shell commands are run in order, from top to bottom, as somebody
does who reads it with a terminal beside. A block that ends in the start of a
server starts one; the blocks below it speak to that server. A block of text
below a block of commands is what they print.

Two things are left to test/run and the release: `pip install .`, which needs a
package index, is taken off the line that it begins, and the block that is
`test/run` itself is passed over.

Blocks of the language `console` are for root on a machine of their own: there
`# ` begins a command. They are run below a directory in place of the real one,
with the programs that change the machine replaced by what writes down how they
were called.
"""

import re
import shlex
import shutil
import stat
import subprocess
import sys

import pytest

import kapow
import kapowctl
from conftest import DEADLINE, KAPOW, KAPOWCTL, ROOT, wait_until
from test_examples import check_session, client_environment, run_shell

README = (ROOT / "README.md").read_text()
INSTALL = "pip install . && "
TEST_RUN = "test/run"
STATUS = "localhost:8083"       # where the README's servers have it
# What they would change is the machine.
STUBBED = ("docker", "haproxy", "journalctl", "sudo", "systemctl", "useradd")


def write_program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def blocks(language):
    """Return (place, text) of the README's blocks in a language."""
    return [(found.start(), found.group(1)) for found in re.finditer(
        rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)]


def expected_output(place):
    """Return the block of text that comes next after the block of commands at `place`, or None."""
    inside = r"(?:(?!```).*\n)*"
    pair = re.compile(rf"```sh\n{inside}```\n\n```text\n({inside})```\n")
    found = pair.match(README, place)
    return found and found.group(1)


class Reader:
    """Somebody who does what the README says. `directory` is where they are."""

    def __init__(self, directory, start_server):
        self.directory = directory
        self._start_server = start_server
        self._server = None
        shutil.copytree(ROOT / "examples", directory / "examples")
        self._bin = directory / "bin"
        self._bin.mkdir()
        write_program(self._bin / "kapowctl", f'exec {shlex.join([sys.executable, str(KAPOWCTL)])} "$@"')

    def do(self, commands, expected):
        """Run a block of commands; `expected` is its output, None when that is not told."""
        *lines, last = commands.removeprefix(INSTALL).splitlines()
        words = shlex.split(last) if "server" in last else []
        if "server" not in words:
            lines.append(last)
        if lines:
            self._run("\n".join(lines), expected)
        if "server" in words:
            position = words.index("server")
            self._serve(words[:position], words[position + 1:])

    def _run(self, script, expected):
        """Run a script; curl fails for an answer that is an error."""
        fail = "curl() { command curl --fail --silent --show-error \"$@\"; }\nset -e\n"
        if self._server is None:
            assert "curl" not in script
            run_shell(fail + script, self.directory).check_returncode()
        else:
            if STATUS in script:
                script = script.replace(STATUS, f"127.0.0.1:{self._server.port('status')}")
            fail += f"export XDG_RUNTIME_DIR={shlex.quote(str(self._server.runtime))}\n"
            check_session([(fail + script, "..." if expected is None else expected)],
                          self._server.port("user"), self.directory, path=[self._bin])

    def _serve(self, program, arguments):
        """Start a server instead of the one before."""
        if self._server is not None:
            assert self._server.stop() == 0
        if program == ["kapow"]:
            files = [word for word in arguments if (self.directory / word).is_file()]
            options = [word.replace(STATUS, "127.0.0.1:0") for word in arguments if word not in files]
            self._server = self._start_server(*options, cwd=self.directory,
                                              init=[self.directory / word for word in files])
            if "--status-bind" in options:
                wait_until(self._is_ready, "the server being ready")
        else:
            assert program == ["python3", KAPOW.name]
            self._server = self._start_alone(arguments)

    def _is_ready(self):
        return b" 200 " in self._server.raw(b"GET /readyz HTTP/1.0\r\n\r\n", "status")

    def _start_alone(self, arguments):
        """Start copies of the two files, with a Python that has its standard library only."""
        alone = self.directory / "alone"
        alone.mkdir()
        for script in (KAPOW, KAPOWCTL):
            shutil.copy(script, alone)
        python = self.directory / "python3"
        python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -I -S "$@"\n')
        python.chmod(0o755)
        paths = [self.directory / word if word.endswith(".json") else word for word in arguments]
        server = self._start_server(*paths, script=alone / KAPOW.name, python=str(python), wait=False)
        server.wait_log("cryptography")     # which it says that it has not
        server.wait_log("user interface: ")
        return server


def test_commands(tmp_path, start_server):
    """All commands of the README do what it says."""
    (tmp_path / "reader").mkdir()
    reader = Reader(tmp_path / "reader", start_server)
    done = 0
    for place, commands in blocks("sh"):
        if commands.strip() != TEST_RUN:
            reader.do(commands, expected_output(place))
            done += 1
    assert done == len(blocks("sh")) - 1


def test_all_commands_are_in_blocks_that_are_run():
    """No block is in a language that this module passes over."""
    assert set(re.findall(r"^```(\w*)$", README, re.MULTILINE)) == {"sh", "text", "console", "yaml", ""}
    assert len(blocks("text")) == len([place for place, _ in blocks("sh") if expected_output(place)])


@pytest.mark.parametrize("command", [f"{INSTALL}kapow server examples/hello", TEST_RUN])
def test_set_up_commands(command):
    """The two commands that do all the setting up stand in the README, each a block of its own."""
    assert command + "\n" in [text for _, text in blocks("sh")]


# Options in console blocks: of useradd, systemctl, docker run.
OTHERS_OPTIONS = {"--system", "--home-dir", "--shell", "--now", "--rm", "--stop-timeout", "--name"}


@pytest.fixture
def machine(tmp_path):
    """A directory in the place of /: `calls` has the calls of programs that would change it."""
    checkout, programs = tmp_path / "checkout", tmp_path / "programs"
    programs.mkdir()
    (tmp_path / "etc" / "systemd" / "system").mkdir(parents=True)
    (tmp_path / "etc" / "haproxy").mkdir()
    shutil.copytree(ROOT / "examples", checkout / "examples")
    call = f"printf '%s\\n' \"${{0##*/}} $*\" >> {shlex.quote(str(tmp_path / 'calls'))}"
    for name in STUBBED:
        write_program(programs / name, call)
    write_program(checkout / "examples" / "haproxy" / "rolling-restart", call)
    # pip makes kapow and kapowctl in the environment, but needs a package index.
    write_program(tmp_path / "pip", f'{call}\n: > "${{0%/*}}/kapow"; : > "${{0%/*}}/kapowctl"')
    write_program(programs / "python3", '[ "$1 $2" = "-m venv" ] && mkdir -p "$3/bin" && '
                  f'cp {shlex.quote(str(tmp_path / "pip"))} "$3/bin/pip"')
    return tmp_path


def commands_of_root():
    return [line for _, text in blocks("console") for line in text.splitlines()]


def test_commands_of_root(machine):
    """What is to be done as root leads to a machine on which the units find what they name."""
    script = ["set -e"]
    for line in commands_of_root():
        assert line.startswith("# ")
        script.append(re.sub(r"(?<!\S)(?=/(opt|etc)/)", str(machine), line[2:]))
    done = subprocess.run(["sh", "-c", "\n".join(script)], cwd=machine / "checkout", text=True,
                          env=client_environment(machine, machine / "programs"), timeout=DEADLINE,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert (done.returncode, done.stdout) == (0, "")
    system = machine / "etc" / "systemd" / "system"
    for name in ("kapow.service", "kapow-user.socket", "kapow-status.socket"):
        path = ROOT / "examples" / "systemd" / name
        assert (system / name).read_bytes() == path.read_bytes()
        assert path.read_text().startswith(f"# /etc/systemd/system/{name}")
    unit = (system / "kapow.service").read_text()
    for path in ("/opt/kapow/bin/kapow", "/etc/kapow/routes", "/etc/kapow/environment"):
        assert path in unit and (machine / path[1:]).is_file()
    assert (machine / "etc/kapow/routes").stat().st_mode & 0o111
    assert stat.S_IMODE((machine / "etc/kapow/environment").stat().st_mode) == 0o600
    check_calls((machine / "calls").read_text().splitlines())


def check_calls(calls):
    """Fail where a call is of something that there is not."""
    units = {"kapow", "haproxy", *(path.name for path in (ROOT / "examples" / "systemd").iterdir())}
    verbs = {}
    for program, *words in map(str.split, calls):
        plain = [word for word in words if not word.startswith("-")]
        if program == "systemctl":
            verbs.setdefault(plain[0], []).extend(plain[1:])
            assert set(plain[1:]) <= units
        elif program == "docker" and plain[0] == "build":
            assert (ROOT / words[words.index("-f") + 1]).is_file() and words[-1] == "."
        elif program == "useradd":
            assert plain[-1] in re.findall("(?m)^User=(.*)$", read_example("systemd/kapow.service"))
        elif program == "rolling-restart":
            assert set(words) == {f"{host}:8083" for host in re.findall(
                r"server \w+ ([\d.]+):8080", read_example("haproxy/haproxy.cfg"))}
        elif program == "sudo":
            command, = [word for word in words if word.endswith("/opt/kapow/bin/kapowctl")]
            kapowctl.make_parsers()[0].parse_args(words[words.index(command) + 1:])
    assert sorted(verbs) == ["daemon-reload", "enable", "reload", "restart", "stop"]
    assert {*verbs["enable"]} == {*verbs["stop"], "kapow.service"}


def read_example(name):
    return (ROOT / "examples" / name).read_text()


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_configuration_of_prometheus(tmp_path):
    (_, text), = blocks("yaml")
    (tmp_path / "prometheus.yml").write_text(text)
    done = subprocess.run(["promtool", "check", "config", tmp_path / "prometheus.yml"], text=True,
                          timeout=DEADLINE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout


def test_examples_are_listed():
    """The table of the examples has each of them, and no other."""
    listed = re.findall(r"^\| `([\w-]+)` \|", README, re.MULTILINE)
    # The program of a service stands beside its example, as NAME.py.
    assert sorted(listed) == sorted({path.stem for path in (ROOT / "examples").iterdir()})


def test_files_are_there():
    """The files that the README names exist."""
    for name in ("kapow.py", "kapowctl.py", "CHANGELOG.md", "man/kapow.7", "test/run",
                 "examples/haproxy/haproxy.cfg"):
        assert name in README and (ROOT / name).exists()


def test_options_exist():
    """The options that the README names are options of the server, or of the client's commands."""
    parsers = [kapow.make_server_parser(), *kapowctl.make_parsers()[1].values()]
    known = {option for parser in parsers for option in parser._option_string_actions}
    known |= OTHERS_OPTIONS
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert OTHERS_OPTIONS <= named
    assert named and not [option for option in named if option not in known]
