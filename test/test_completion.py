"""kapowctl completion: what the scripts for bash and zsh offer, both ways against the parser."""

import functools
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time

import pytest

import kapowctl
from conftest import DEADLINE, KAPOWCTL


def need(tool):
    """Return the mark of tests that need a tool which few machines have."""
    return pytest.mark.skipif(not shutil.which(tool), reason=f"{tool} is not here")


@functools.lru_cache
def completion(shell):
    done = subprocess.run([sys.executable, str(KAPOWCTL), "completion", shell], timeout=DEADLINE,
                          capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def commands():
    """Return {path of words: parser}, of kapowctl itself and of all commands."""
    found = {}

    def walk(parser, path):
        found[path] = parser
        for action in parser._actions:
            if isinstance(action.choices, dict):
                for word, other in action.choices.items():
                    walk(other, (*path, word))
    walk(kapowctl.make_parsers()[0], ())
    return found


COMMANDS = commands()


def words_of(parser):
    """Return all words that may follow a command: commands, options and fixed arguments."""
    words = set()
    for action in parser._actions:
        words.update(action.option_strings)
        if not action.option_strings:
            words.update(action.choices or ())
    return words


def values():
    """Yield (path, option, its choices) for the options that take a value."""
    for path, parser in COMMANDS.items():
        for action in parser._actions:
            if action.option_strings and action.nargs != 0:
                for option in action.option_strings:
                    yield path, option, sorted(action.choices or ())


@pytest.fixture(scope="module")
def offers(tmp_path_factory):
    """A function that returns what bash offers after each of many command lines, lists of words."""
    script = tmp_path_factory.mktemp("bash") / "kapowctl"
    script.write_text(completion("bash"))

    def ask(lines):
        program = ['. "$1" || exit 3']
        for line in lines:
            words = " ".join("'" + word.replace("'", "'\\''") + "'" for word in ("kapowctl", *line))
            program.append(f"COMP_WORDS=({words}); COMP_CWORD={len(line)}; COMPREPLY=(); _kapowctl "
                           "kapowctl; printf '%s ' \"${COMPREPLY[@]}\"; echo")
        done = subprocess.run(["bash", "--norc", "-c", "\n".join(program), "bash", str(script)],
                              capture_output=True, text=True, timeout=DEADLINE)
        assert (done.returncode, done.stderr) == (0, "")
        return [said.split() for said in done.stdout.split("\n")[:-1]]
    return ask


def test_bash_offers_what_the_parser_has(offers):
    paths = list(COMMANDS)
    for path, offered in zip(paths, offers([(*path, "") for path in paths])):
        assert sorted(offered) == sorted(words_of(COMMANDS[path])), path


def test_bash_offers_what_fits(offers):
    lines = [("ro",), ("route", "a"), ("--h",), ("route", "add", "--max-"), ("completion", "z"),
             ("nonsense-",)]
    assert offers(lines) == [
        ["route"], ["add", "apply"], ["--help"], ["--max-handlers", "--max-queue"], ["zsh"], []]


def test_bash_offers_values(offers):
    found = list(values())
    assert found
    for (path, option, choices), offered in zip(found, offers(
            [(*path, option, "") for path, option, _ in found])):
        assert sorted(offered) == choices, (path, option)


def test_bash_goes_on_behind_options_and_arguments(offers):
    """An option, its value or an argument in between does not lose the command."""
    add = sorted(words_of(COMMANDS["route", "add"]))
    lines = [("route", "add", "-X", "GET", ""), ("route", "add", "/x", ""),
             ("route", "add", "route", ""), ("route", "add", "-c", "list", "")]
    for line, offered in zip(lines, offers(lines)):
        assert sorted(offered) == add, line
    # A value that looks like a command is none.
    [offered] = offers([("get", "--handler", "route", "")])
    assert sorted(offered) == sorted(words_of(COMMANDS["get",]))


def test_bash_registers_it():
    done = subprocess.run(["bash", "--norc", "-c", 'eval "$(cat)"; complete -p kapowctl'],
                          input=completion("bash"), capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stderr) == (0, "")
    assert "-F _kapowctl" in done.stdout and done.stdout.rstrip().endswith(" kapowctl")


@need("shellcheck")
def test_shellcheck():
    done = subprocess.run(["shellcheck", "-s", "bash", "-"], input=completion("bash"), text=True,
                          capture_output=True, timeout=DEADLINE)
    assert (done.returncode, done.stdout) == (0, "")


# zsh.

@need("zsh")
def test_zsh_syntax(tmp_path):
    (tmp_path / "_kapowctl").write_text(completion("zsh"))
    done = subprocess.run(["zsh", "-n", str(tmp_path / "_kapowctl")], capture_output=True, text=True,
                          timeout=DEADLINE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert completion("zsh").startswith("#compdef kapowctl\n")


def test_zsh_names_all():
    """A function for each command, which has all its options and commands, and no others."""
    functions = dict(re.findall(r"^(_kapowctl\w*)\(\) \{\n(.*?)^\}$", completion("zsh"),
                                re.MULTILINE | re.DOTALL))
    assert set(functions) == {"_".join(("_kapowctl", *path)) for path in COMMANDS}
    for path, parser in COMMANDS.items():
        text = functions["_".join(("_kapowctl", *path))]
        options = {option for action in parser._actions for option in action.option_strings}
        assert set(re.findall(r"'(--?[\w-]+)\[", text)) == options, path
        below = {word for action in parser._actions if isinstance(action.choices, dict)
                 for word in action.choices}
        assert set(re.findall(r'([\w-]+)\\:"', text)) == below, path


class Zsh:
    """An interactive zsh with the completion; what it prints comes from a terminal."""

    PROMPT = "READY>"

    def __init__(self, directory):
        (directory / "functions").mkdir()
        (directory / "functions" / "_kapowctl").write_text(completion("zsh"))
        (directory / ".zshrc").write_text(
            f"PS1='{self.PROMPT}'; unsetopt prompt_sp prompt_cr beep; LISTMAX=1000\n"
            f"fpath=({directory}/functions $fpath); autoload -Uz compinit; compinit -u -D\n"
            "zstyle ':completion:*' list-grouped false; zstyle ':completion:*' verbose false\n"
            "setopt no_list_ambiguous\nbindkey '^I' list-choices\n"
            "kapowctl() { : }\n")
        pid, self.fd = pty.fork()
        if not pid:
            os.environ.update(ZDOTDIR=str(directory), TERM="dumb", COLUMNS="60", HOME=str(directory))
            os.execvp("zsh", ["zsh", "-d", "-i"])
        self.pid = pid
        self._said = ""         # and not read yet
        self.read_until(self.PROMPT)

    def read_until(self, end):
        """Return what it prints up to `end`."""
        deadline = time.monotonic() + DEADLINE
        while end not in self._said:
            if not select.select([self.fd], [], [], max(0, deadline - time.monotonic()))[0]:
                pytest.fail(f"zsh does not say {end!r} in {self._said!r}")
            self._said += os.read(self.fd, 65536).decode("utf-8", "replace")
        said, _, self._said = self._said.partition(end)
        return said

    def offers(self, line):
        """Return the words that zsh lists behind `line`."""
        os.write(self.fd, line.encode() + b"\t")
        # The rest of the line is printed after the list, as it is typed then.
        os.write(self.fd, b"\x15print -r EN''D\r")
        said = self.read_until("END")
        self.read_until(self.PROMPT)
        return set(said.replace("\x07", " ").split())

    def close(self):
        os.write(self.fd, b"\x15exit\r")
        os.waitpid(self.pid, 0)
        os.close(self.fd)


@pytest.fixture(scope="module")
def zsh(tmp_path_factory):
    shell = Zsh(tmp_path_factory.mktemp("zsh"))
    yield shell
    shell.close()


@need("zsh")
@pytest.mark.parametrize("path", list(COMMANDS), ids=" ".join)
def test_zsh_offers_commands_and_options(zsh, path):
    line = " ".join(("kapowctl", *path))
    parser = COMMANDS[path]
    options = {word for word in words_of(parser) if word.startswith("-")}
    offered = zsh.offers(line + " -")
    # Of an option's two names one may stand for both.
    for action in parser._actions:
        if action.option_strings:
            assert offered & set(action.option_strings), (action, offered)
    assert {word for word in offered if re.fullmatch("--[a-z].*", word)} <= options
    if words := words_of(parser) - options:
        assert words <= zsh.offers(line + " "), line


@need("zsh")
@pytest.mark.parametrize("line, words", [
    ("kapowctl route list -o ", {"json", "table"}), ("kapowctl completion ", {"bash", "zsh"}),
    ("kapowctl route add --disconnect ", {"kill", "keep"})])
def test_zsh_offers_values(zsh, line, words):
    assert words <= zsh.offers(line)
