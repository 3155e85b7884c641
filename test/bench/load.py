#!/usr/bin/env python3
"""Two minutes of good, broken, slow and vanishing clients against one server.

    python test/bench/load.py [SECONDS]
Says what came, how the server's memory, files and threads went, and ends with
status 1 if a good client was not served or the server said something unexpected.
"""

import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import mixed                        # noqa: E402  (found by the line above)
from bodies import resident         # noqa: E402
from conftest import Server         # noqa: E402

THREADS = 16


def main():
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 120
    with tempfile.TemporaryDirectory(prefix="kapow-bench-") as name:
        server = Server(pathlib.Path(name))
        mixed.add_routes(server)
        mixed.visit_at_once(server, THREADS, lambda count: count < 20)
        server.check_idle()
        before = resident(server), *server.usage()
        deadline = time.monotonic() + seconds
        counts = mixed.visit_at_once(server, THREADS, lambda count: time.monotonic() < deadline)
        assert server.get("/hello").body == b"hello\n"
        server.check_idle()
        after = resident(server), *server.usage()
        assert server.stop() == 0
        server.check_gone()
    print(f"{sum(counts.values())} visits in {seconds:.0f} s from {THREADS} threads: "
          + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    for what, old, new in zip(("MB resident", "open files", "threads"), before, after):
        print(f"{what:12} {old:8.1f} before {new:8.1f} after")


if __name__ == "__main__":
    main()
