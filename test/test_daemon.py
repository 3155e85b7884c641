"""Servers in the background: --daemon, --kill, --pid-file and --log-file.

`kapow billetd` starts soonest, so most tests use that. What a test leaves
running is ended by its process id, found by a mark in its environment.
"""

import contextlib
import http.client
import os
import re
import signal
import socket
import stat
import subprocess
import uuid

import pytest

from conftest import DEADLINE, KAPOW, installed, processes_with, wait_until

SERVER = ["server", *(part for name in ("--bind", "--control-bind", "--data-bind")
                      for part in (name, "127.0.0.1:0"))]
BILLETD = ["billetd", "-a", "127.0.0.1", "-p", "0"]


class Terminal:
    """Where commands are typed: in `directory`, with the daemons' files in `state`."""

    def __init__(self, directory):
        self.directory = directory
        self.state = directory / "run" / "kapow"
        self.state.parent.mkdir()
        self.mark = uuid.uuid4().hex
        clean = {name: value for name, value in os.environ.items() if not name.startswith("KAPOW_")}
        self.options = {"cwd": directory, "stdin": subprocess.DEVNULL, "env": {
            **clean, "KAPOW_TEST": self.mark, "TMPDIR": str(directory),
            "XDG_RUNTIME_DIR": str(self.state.parent)}}
        self.programs = []

    def run(self, *arguments):
        """Run kapow to its end; return (exit status, what it said)."""
        done = subprocess.run([*installed(KAPOW), *arguments], timeout=DEADLINE, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **self.options)
        return done.returncode, done.stdout

    def start(self, *arguments, **options):
        """Run kapow beside the test; return its Popen."""
        self.programs.append(subprocess.Popen([*installed(KAPOW), *arguments],
                                              **self.options, **options))
        return self.programs[-1]

    def pid(self, name="billetd"):
        """Return the process id in a pid file of `state`."""
        return int((self.state / f"{name}.pid").read_text())

    def living(self):
        """Return the pids of what was started here and runs."""
        return processes_with(self.mark.encode())

    def end(self):
        """End all that still runs."""
        for pid in self.living():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for program in self.programs:
            program.wait(DEADLINE)
        wait_until(lambda: not self.living(), "the end of all daemons")


@pytest.fixture
def terminal(tmp_path):
    made = Terminal(tmp_path)
    yield made
    made.end()


def check_refused(terminal, *arguments, sentence):
    """Fail unless kapow ends with status 1 and one line that has the regular expression."""
    before = terminal.living()
    status, said = terminal.run(*arguments)
    assert status == 1 and len(said.splitlines()) == 1 and re.search(sentence, said), said
    assert terminal.living() == before


def test_life_of_a_daemon(terminal):
    launcher = terminal.directory / "hello.b"
    launcher.write_text("#!/bin/bash\nbillet:() { echo hello; echo aside >&2; }\n")
    launcher.chmod(0o755)
    pid_file, log = terminal.state / "billetd.pid", terminal.state / "billetd.log"
    assert terminal.run(*BILLETD, "-d") == (0, "")
    pid = terminal.pid()
    assert terminal.living() == [pid] and os.getsid(pid) == pid
    streams = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(3)]
    assert streams == ["/dev/null", str(log), str(log)]
    assert stat.S_IMODE(terminal.state.stat().st_mode) == 0o700
    assert stat.S_IMODE(log.stat().st_mode) & 0o027 == 0

    port = int(wait_until(lambda: re.search(r"user interface: http://127\.0\.0\.1:(\d+)\n",
                                            log.read_text()), "the line of its start").group(1))
    assert "control interface" not in log.read_text()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    connection.request("GET", "/hello", headers={"Connection": "close"})
    assert connection.getresponse().read() == b"hello\n"
    connection.close()
    wait_until(lambda: '"GET /hello HTTP/1.1" 200 6' in log.read_text(), "the access log")
    assert "\naside\n" in log.read_text()

    # It stays alone with its pid file.
    check_refused(terminal, *BILLETD, "-d",
                  sentence=f"ERROR the pid file {pid_file} is that of process {pid}, which runs$")
    assert terminal.pid() == pid

    assert terminal.run("billetd", "-k") == (0, "")
    assert not pid_file.exists()
    assert not terminal.living()
    check_refused(terminal, "billetd", "-k",
                  sentence=f"ERROR there is no daemon with the pid file {pid_file}$")
    assert "Traceback" not in log.read_text()


def test_stale_pid_file_is_replaced_and_log_is_continued(terminal):
    files = ["--pid-file", "p", "--log-file", "l"]
    pid_file, log = terminal.directory / "p", terminal.directory / "l"
    program = terminal.start(*BILLETD, *files)
    wait_until(lambda: log.exists() and "user interface: " in log.read_text(), "its start")
    assert pid_file.read_text() == f"{program.pid}\n"
    program.kill()
    program.wait(DEADLINE)
    assert pid_file.exists()
    check_refused(terminal, "billetd", "-k", *files, sentence="no daemon with the pid file p$")
    assert terminal.run(*BILLETD, "-d", *files) == (0, "")
    assert terminal.living() == [int(pid_file.read_text())] != [program.pid]
    wait_until(lambda: log.read_text().count("user interface: ") == 2, "the line of the second")
    assert not terminal.state.exists()


def test_port_taken(terminal):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        check_refused(terminal, *BILLETD[:-1], address.partition(":")[2], "-d",
                      sentence=f"ERROR the user interface cannot listen on {address}: Address ")
    assert os.listdir(terminal.state) == ["billetd.log"]
    assert (terminal.state / "billetd.log").read_text() == ""


def test_server_in_the_background_ends_with_a_signal(terminal):
    """Its files are others than those of billetd; two of a kind need a name each."""
    assert terminal.run(*SERVER, "-d") == (0, "")
    assert terminal.run(*SERVER, "-d", "--pid-file", "p", "--log-file", "l") == (0, "")
    pid = int((terminal.directory / "p").read_text())
    left = [f"control-{number}.json" for number in (pid, terminal.pid("server"))]
    assert sorted(os.listdir(terminal.state)) == sorted([*left, "server.log", "server.pid"])
    assert sorted(terminal.living()) == sorted([pid, terminal.pid("server")])
    os.kill(terminal.pid("server"), signal.SIGTERM)
    wait_until(lambda: terminal.living() == [pid], "the end of the first")
    assert sorted(os.listdir(terminal.state)) == [left[0], "server.log"]
    assert terminal.run("server", "-k", "--pid-file", "p") == (0, "")
    assert os.listdir(terminal.state) == ["server.log"]
    assert not (terminal.directory / "p").exists()
    assert "control interface: " in (terminal.directory / "l").read_text()


def test_pid_file_without_a_daemon(terminal):
    """It is removed at the end; the output stays where it was."""
    program = terminal.start(*BILLETD, "--pid-file", "p", stderr=subprocess.PIPE)
    with program.stderr as log:
        assert b"user interface: " in log.readline() + log.readline()
        assert b" ready: " in log.readline()
        assert (terminal.directory / "p").read_text() == f"{program.pid}\n"
        program.terminate()
        assert (log.read(), program.wait(DEADLINE)) == (b"", 0)
    assert os.listdir(terminal.directory) == ["run"]
    assert not terminal.state.exists()


def test_pid_file_of_another_process_that_lives(terminal):
    """It is left alone, by --kill as well."""
    (terminal.directory / "p").write_text(f"{os.getpid()}\n")
    check_refused(terminal, *BILLETD, "-d", "--pid-file", "p", "--log-file", "l",
                  sentence=f"/p is that of process {os.getpid()}, which runs$")
    check_refused(terminal, "billetd", "-k", "--pid-file", "p", sentence="there is no daemon with ")
    assert (terminal.directory / "p").read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize("option, path, sentence", [
    ("--pid-file", "none/p", "cannot write the pid file .*/none/p: "),
    ("--pid-file", ".", "cannot read the pid file .*: Is a directory$"),
    ("--log-file", "none/l", "cannot write the log file .*/none/l: No such file or directory$"),
    ("--log-file", ".", "cannot write the log file .*: Is a directory$"),
])
def test_files_that_cannot_be_written(terminal, option, path, sentence):
    check_refused(terminal, *BILLETD, "-d", option, path, sentence=sentence)
    assert not list(terminal.state.glob("*.pid"))


def test_directory_of_daemons_must_be_private(terminal):
    terminal.state.mkdir()
    terminal.state.chmod(0o755)
    check_refused(terminal, *BILLETD, "-d", sentence="kapow is not this user's alone: ")
    assert os.listdir(terminal.state) == []
