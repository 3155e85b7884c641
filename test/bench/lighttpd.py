"""What the benches that measure against lighttpd's mod_cgi share: works, servers, wrk, rows."""

import argparse
import collections
import contextlib
import dataclasses
import http.client
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile

# Users other than root have no sbin in PATH, and Debian has lighttpd there.
PROGRAM_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin"))
LIGHTTPD, WRK = (shutil.which(name, path=PROGRAM_PATH) for name in ("lighttpd", "wrk"))
MISSING = [f"the program {name}" for name, path in (("lighttpd", LIGHTTPD), ("wrk", WRK))
           if not path]
MISSING += [f"the Python package {name}" for name in ("cryptography", "pytest", "requests")
            if not importlib.util.find_spec(name)]
if MISSING:
    sys.exit(f"{sys.argv[0]} needs what is not installed: {', '.join(MISSING)}.")

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from conftest import DEADLINE, Server, wait_until     # noqa: E402  (found by the line above)

HOST = "127.0.0.1"
STARTS = 5          # of lighttpd: another program may take the port that was found free
WRK_THREADS = 2     # at most; one connection takes one


# What is measured.

@dataclasses.dataclass(frozen=True)
class Work:
    """A request that is made over and over, and its one right answer.

    `command` is the str of the Kapow! route at `pattern`, None if it has none, or for
    lighttpd. `target` is the str asked for, with `body` (str, JSON, or None). `answer` is
    the body in bytes.
    """

    name: str
    command: str
    pattern: str
    target: str
    answer: bytes
    method: str = "GET"
    body: str = None

    def check(self, port):
        """Make one request at `port` (int); return a list of str, empty if all was right."""
        headers = {"Content-Type": "application/json"} if self.body else {}
        connection = http.client.HTTPConnection(HOST, port, timeout=DEADLINE)
        try:
            connection.request(self.method, self.target, self.body, headers)
            response = connection.getresponse()
            got = response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            got = error
        finally:
            connection.close()
        return [] if got == (200, self.answer) else [f"{self.name}: answered {got!r}"]


CGI = """\
#!/bin/sh
echo 'Content-Type: text/plain'
echo
echo 'Hello World!'
"""

BASE = Work("lighttpd", None, None, "/hello.cgi", b"Hello World!\n")


# The servers.

def free_port():
    """Return a port (int) that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return sock.getsockname()[1]


def write_site(directory):
    """Write lighttpd's one program into `directory` (Path)."""
    program = directory / "hello.cgi"
    program.write_text(CGI)
    program.chmod(0o755)


def launch_lighttpd(directory, port, log):
    """Return the Popen of a lighttpd at `port` (int) that writes to `log` (a binary file)."""
    config = directory / "lighttpd.conf"
    config.write_text(f'server.modules = ("mod_cgi")\nserver.document-root = "{directory}"\n'
                      f'server.bind = "{HOST}"\nserver.port = {port}\n'
                      'cgi.assign = (".cgi" => "")\n')
    return subprocess.Popen([LIGHTTPD, "-D", "-f", config], stdin=subprocess.DEVNULL,
                            stdout=log, stderr=log)


def connects(port):
    """Return whether something listens at `port` (int)."""
    with socket.socket() as sock:
        return sock.connect_ex((HOST, port)) == 0


def listens(process, port):
    """Wait for `process` (Popen) to listen at `port` (int) or to end; return which, as a bool."""
    wait_until(lambda: process.poll() is not None or connects(port), "lighttpd")
    return process.poll() is None


def end(process):
    """End `process` (Popen), if need be the hard way."""
    process.terminate()
    try:
        process.wait(DEADLINE)
    finally:
        process.kill()      # does nothing once it has ended


@contextlib.contextmanager
def run_lighttpd(directory):
    """Run lighttpd with its files in `directory` (Path) for a with statement; give its port."""
    write_site(directory)
    with open(directory / "log", "w+b") as log:
        for _ in range(STARTS):
            port = free_port()
            process = launch_lighttpd(directory, port, log)
            try:
                if listens(process, port):
                    yield port
                    return
            finally:
                end(process)
        log.seek(0)
        sys.exit(f"lighttpd does not start: {log.read().decode(errors='replace')}")


@contextlib.contextmanager
def run_kapow(directory, *arguments):
    """Run a Server in `directory` (Path) with more arguments for a with statement."""
    server = Server(directory, *arguments, access_log=subprocess.DEVNULL)   # lighttpd writes none
    try:
        yield server
    finally:
        try:
            server.stop()
        finally:
            server.process.kill()       # does nothing once it has ended


@contextlib.contextmanager
def run_servers(prepare=lambda site, directory: ()):
    """Run both for a with statement; give lighttpd's port, the Server and a Path for files.

    `prepare` may write into lighttpd's and the Server's directory (Paths); it returns
    more arguments of the Server.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))       # through the finally clauses
    with tempfile.TemporaryDirectory(prefix="kapow-bench-") as name:
        directories = [pathlib.Path(name, part) for part in ("lighttpd", "kapow", "wrk")]
        for directory in directories:
            directory.mkdir()
        arguments = prepare(*directories[:2])
        with run_lighttpd(directories[0]) as port, run_kapow(directories[1], *arguments) as server:
            yield port, server, directories[2]


# The measurements.

# wrk calls done() at its end; times are in µs. A status is an error from 400 on.
SCRIPT = """\
wrk.method = %s
wrk.body = %s
wrk.headers["Content-Type"] = %s
function done(summary, latency)
    local errors = summary.errors
    local sockets = errors.connect + errors.read + errors.write + errors.timeout
    io.write(string.format('{"requests": %%d, "us": %%d, "p50_us": %%f, "p99_us": %%f, ' ..
                           '"statuses": %%d, "sockets": %%d}\\n',
                           summary.requests, summary.duration, latency:percentile(50),
                           latency:percentile(99), errors.status, sockets))
end
"""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One measurement: `rate` in requests a second, `p50` and `p99` in ms (floats)."""

    rate: float
    p50: float
    p99: float


def lua(value):
    """Return the Lua literal (str) of `value`, an ASCII str or None."""
    return "nil" if value is None else json.dumps(value)


def run_wrk(work, port, connections, seconds, directory):
    """Load `work` at `port` for `seconds` (int); return the dict that SCRIPT prints.

    `connections` is an int; the script is written into `directory` (Path).
    """
    script = directory / f"{work.name}.lua"
    script.write_text(SCRIPT % (lua(work.method), lua(work.body),
                                lua("application/json" if work.body else None)))
    done = subprocess.run(
        [WRK, "--threads", str(min(connections, WRK_THREADS)), "--connections", str(connections),
         "--duration", str(seconds), "--script", script, f"http://{HOST}:{port}{work.target}"],
        stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(work, port, connections, seconds, directory):
    """As run_wrk, with a check before and after; return (Sample, list of str what was wrong)."""
    wrong = work.check(port)
    seen = run_wrk(work, port, connections, seconds, directory)
    wrong += [f"{work.name}: {seen[kind]} wrong {kind} at {connections} connections"
              for kind in ("statuses", "sockets") if seen[kind]]
    wrong += work.check(port)
    if not seen["requests"]:
        sys.exit("; ".join([*wrong, f"{work.name}: no answer in {seconds} s"]))
    rate = seen["requests"] / seen["us"] * 1e6
    return Sample(rate, seen["p50_us"] / 1e3, seen["p99_us"] / 1e3), wrong


def measure_rounds(ports, options, directory):
    """Measure each Work in `ports` (a dict to its int port) in all rounds.

    Return (dict of (name, connections) to a list of Samples, list of str what was wrong).
    """
    samples, wrong = collections.defaultdict(list), []
    for _ in range(options.rounds):
        for connections in options.connections:
            for work, port in ports.items():
                sample, more = measure(work, port, connections, options.seconds, directory)
                samples[work.name, connections].append(sample)
                wrong += more
    return samples, wrong


# The results.

def median(values):
    """Return the median of an iterable of floats, to four digits that count."""
    return float(f"{statistics.median(values):.4g}")


def is_met(ratio, ratio_bar, tail, tail_bar):
    """Return whether the bars that are not None are met (bool), None if there are none."""
    if ratio_bar is None and tail_bar is None:
        return None
    return (ratio_bar is None or ratio >= ratio_bar) and (tail_bar is None or tail <= tail_bar)


def ratio_by_round(own, base):
    """Return the median of the ratios within each round, from two lists of Samples."""
    return median(mine.rate / theirs.rate for mine, theirs in zip(own, base))


def ratio_of_medians(own, base):
    """Return the ratio of the medians over all rounds, from two lists of Samples."""
    return round(median(sample.rate for sample in own)
                 / median(sample.rate for sample in base), 3)


def make_row(key, samples, find_ratio, ratio_bar, tail_bar):
    """Return the dict that is the row of `key`, (name, connections), from all samples.

    The bars (None: none) are the least ratio, which `find_ratio(own, base)` returns, and
    the most that p99/p50 may be.
    """
    own, base = samples[key], samples[BASE.name, key[1]]
    ratio = find_ratio(own, base)
    tail = median(sample.p99 / sample.p50 for sample in own)
    return {"work": key[0], "connections": key[1],
            "requests_per_second": median(sample.rate for sample in own),
            "p50_ms": median(sample.p50 for sample in own),
            "p99_ms": median(sample.p99 for sample in own), "p99_to_p50": tail, "ratio": ratio,
            "ratio_bar": ratio_bar, "p99_to_p50_bar": tail_bar,
            "met": is_met(ratio, ratio_bar, tail, tail_bar)}


def make_rows(samples, find_ratio, ratio_bars, tail_bars):
    """Return the rows of all `samples` (of measure_rounds); the bars are dicts by key."""
    return [make_row(key, samples, find_ratio, ratio_bars.get(key), tail_bars.get(key))
            for key in samples]


def describe_bar(row):
    """Return the last column of `row` (a dict of make_row) as a str."""
    bars = [text.format(row[name]) for name, text in (
        ("ratio_bar", "ratio >= {:.2f}"), ("p99_to_p50_bar", "p99/p50 <= {:g}")) if row[name]]
    return ", ".join([*bars, "met" if row["met"] else "MISSED"]) if bars else ""


def print_table(rows):
    """Print the dicts of make_row as a table."""
    print(f"{'work':9} {'connections':>11} {'requests/s':>10} {'p50 ms':>8} {'p99 ms':>8} "
          f"{'p99/p50':>8} {'ratio':>6}  bar")
    for row in rows:
        print(f"{row['work']:9} {row['connections']:11} {row['requests_per_second']:10.0f} "
              f"{row['p50_ms']:8.2f} {row['p99_ms']:8.2f} {row['p99_to_p50']:8.2f} "
              f"{row['ratio']:6.2f}  {describe_bar(row)}".rstrip())


def report(results, as_json, show):
    """Print `results`, as JSON or by `show()`, and what was wrong; return the exit status (int).

    `results` is a dict for JSON with the list of str `wrong`.
    """
    if as_json:
        print(json.dumps(results, indent=2))
    else:
        show()
    for line in results["wrong"]:
        print(line, file=sys.stderr)
    return 1 if results["wrong"] else 0


# The command line.

def positive(text):
    """Return the int, one or more, that `text` (str) is."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def positives(text):
    """Return the list of ints that `text` (str) gives between commas."""
    return [positive(part) for part in text.split(",")]


def make_parser(text):
    """Return an argparse.ArgumentParser with what all have; `text` (str) begins with a summary."""
    parser = argparse.ArgumentParser(description=text.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON rather than a table")
    parser.add_argument("--seconds", type=positive, default=3, metavar="N",
                        help="for each measurement with wrk (%(default)s)")
    parser.add_argument("--rounds", type=positive, default=3, metavar="N",
                        help="of these (%(default)s)")
    parser.add_argument("--connections", type=positives, default=[1, 8, 64], metavar="N,...",
                        help="at once (1,8,64)")
    return parser
