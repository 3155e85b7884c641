#!/usr/bin/env python3
"""Measures large bodies, many handlers, lost clients and the stop: seconds and resident memory.

Run with the environment that test/run makes, or any that has its packages:
    python test/bench/bodies.py
Each line has a bar; the figures are of the whole server process.
"""

import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from conftest import Server, wait_until     # noqa: E402  (found by the line above)

MB = 1_000_000


def resident(server, name="VmRSS"):
    """Return the server's resident memory, or its peak ("VmHWM"), in MB."""
    for line in pathlib.Path(f"/proc/{server.process.pid}/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024 / MB
    raise LookupError(name)


def reset_peak(server):
    """Have the peak begin anew (proc(5), clear_refs)."""
    pathlib.Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")


def report(what, seconds, bar, grown=None):
    """Print one line of the table."""
    memory = "" if grown is None else f"{grown:8.1f} MB"
    print(f"{what:58} {seconds:8.2f} s {memory:12} bar {bar}", flush=True)


def curl(server, path, *arguments, stdout=subprocess.DEVNULL):
    """Run curl on a path of the server; return (seconds, what it printed)."""
    begun = time.monotonic()
    done = subprocess.run(["curl", "--silent", "--show-error", "--fail", *arguments,
                           server.url + path], stdout=stdout, check=True)
    return time.monotonic() - begun, done.stdout


def measure(server, what, bar, path, *arguments, size=None):
    """Measure one transfer, three times; report the fastest and the most memory."""
    times, grown = [], 0
    for _ in range(3):
        reset_peak(server)
        before = resident(server)
        seconds, printed = curl(server, path, "--output", "/dev/null", "--write-out",
                                "%{size_download}", *arguments, stdout=subprocess.PIPE)
        assert size is None or int(printed) == size, printed
        times.append(seconds)
        grown = max(grown, resident(server, "VmHWM") - before)
    report(what, min(times), bar, grown)


def measure_bodies(server, directory):
    """The three transfers."""
    big = directory / "big"
    with open(big, "wb") as file:
        file.truncate(300 * MB)
    echo = server.route("kapow get /request/body | kapow set /response/body", "POST")
    measure(server, "300 MB posted and echoed", "2.0 s, 48 MB", echo, "--data-binary", f"@{big}",
            "--header", "Expect:", size=300 * MB)
    head = server.route(f"head -c {500 * MB} /dev/zero | kapow set /response/body")
    measure(server, "500 MB from head -c", "1.3 s, 48 MB", head, size=500 * MB)
    with open(big, "wb") as file:
        file.truncate(100 * MB)
    count = server.route("kapow get /request/files/f/content | wc -c | kapow set /response/body", "POST")
    measure(server, "multipart upload, 100 MB, wc -c", "48 MB", count, "--form", f"f=@{big}", size=10)


def measure_sleepers(server):
    """500 handlers at once."""
    path = server.route("sleep 15; kapow set /response/body x")
    replies = []
    threads = [threading.Thread(target=lambda: replies.append(server.get(path).body))
               for _ in range(500)]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    most = 0
    while threads[-1].is_alive():
        most = max(most, resident(server))
        threads[-1].join(0.2)
    for thread in threads:
        thread.join()
    assert replies == [b"x"] * 500
    print(f"{'500 handlers asleep at once':58} {time.monotonic() - begun:8.2f} s {most:8.1f} MB  "
          "bar 90 MB resident")


def measure_lost_client(server):
    """From the client's end to that of the whole group."""
    path = server.route("sleep 1000 & sleep 1000 & wait")
    with server.connect() as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        wait_until(lambda: len(server.children()) == 3, "the programs")
        begun = time.monotonic()
    wait_until(lambda: not server.children(), "their end")
    report("client gone, handler silent", time.monotonic() - begun, "1.5 s")


def measure_stop(server):
    """SIGTERM with 20 handlers running."""
    path = server.route("sleep 2; kapow set /response/body x")
    replies = []
    threads = [threading.Thread(target=lambda: replies.append(server.get(path).body))
               for _ in range(20)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(server.children()) >= 40, "the programs")
    begun = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    status = server.stop()
    seconds = time.monotonic() - begun
    server.check_gone()
    assert (status, replies) == (0, [b"x"] * 20)
    report("SIGTERM with 20 handlers running, all finish", seconds, "grace, exit 0, nothing left")


def main():
    with tempfile.TemporaryDirectory(prefix="kapow-bench-") as name:
        directory = pathlib.Path(name)
        server = Server(directory)
        print(f"idle {resident(server):.1f} MB resident")
        measure_bodies(server, directory)
        measure_sleepers(server)
        measure_lost_client(server)
        measure_stop(server)


if __name__ == "__main__":
    main()
