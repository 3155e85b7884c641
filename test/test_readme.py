"""The README, done as it says.

Its blocks of shell commands are run in order, from top to bottom, as somebody
does who reads it with a terminal beside. A block that ends in the start of a
server starts one; the blocks below it speak to that server. A block of text
below a block of commands is what they print.

Two things are left to test/run and the release: `pip install .`, which needs a
package index, is taken off the line that it begins, and the block that is
`test/run` itself is passed over.
"""

import re
import shlex
import shutil
import sys

import pytest

from conftest import KAPOW, KAPOWCTL, ROOT
from test_examples import check_session, run_shell

README = (ROOT / "README.md").read_text()
INSTALL = "pip install . && "
TEST_RUN = "test/run"


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
        fail = "curl() { command curl --fail \"$@\"; }\nset -e\n"
        if self._server is None:
            assert "curl" not in script
            run_shell(fail + script, self.directory).check_returncode()
        else:
            check_session([(fail + script, "..." if expected is None else expected)],
                          self._server.port("user"), self.directory)

    def _serve(self, program, arguments):
        """Start a server instead of the one before."""
        if self._server is not None:
            assert self._server.stop() == 0
        if program == ["kapow"]:
            options = arguments if arguments[0].startswith("-") else []
            programs = [self.directory / word for word in arguments[len(options):]]
            self._server = self._start_server(*options, init=programs, cwd=self.directory)
        else:
            assert program == ["python3", KAPOW.name]
            self._server = self._start_alone(arguments)

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
    assert set(re.findall(r"^```(\w*)$", README, re.MULTILINE)) == {"sh", "text", ""}
    assert len(blocks("text")) == len([place for place, _ in blocks("sh") if expected_output(place)])


@pytest.mark.parametrize("command", [f"{INSTALL}kapow server examples/hello", TEST_RUN])
def test_set_up_commands(command):
    """The two commands that do all the setting up stand in the README, each a block of its own."""
    assert command + "\n" in [text for _, text in blocks("sh")]


def test_examples_are_listed():
    """The table of the examples has each of them, and no other."""
    listed = re.findall(r"^\| `([\w-]+)` \|", README, re.MULTILINE)
    # The program of a service stands beside its example, as NAME.py.
    assert sorted(listed) == sorted({path.stem for path in (ROOT / "examples").iterdir()})


def test_files_are_there():
    """The files that the README names exist."""
    for name in ("kapow.py", "kapowctl.py", "CHANGELOG.md", "man/kapow.7", "test/run"):
        assert name in README and (ROOT / name).exists()


def test_options_exist():
    """The options that the README names are options of the server, or of the client's commands."""
    import kapow
    import kapowctl
    parsers = [kapow.make_server_parser(), *kapowctl.make_parsers()[1].values()]
    known = {option for parser in parsers for option in parser._option_string_actions}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert named and not [option for option in named if option not in known]
