"""Hundreds of mixed requests leave nothing: no file, thread, process, zombie or temporary file."""

import pathlib

import mixed


def zombies(server):
    """Return the server's children that wait to be reaped."""
    found = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if words[0] == "Z" and int(words[1]) == server.process.pid:
            found.append(stat.parent.name)
    return found


def test_mixed_clients(server):
    mixed.add_routes(server)
    tools = sorted(server.tmp.rglob("*"))
    counts = mixed.visit_at_once(server, 8, lambda count: count < 60)
    assert sum(counts.values()) == 480 and min(counts.values()) > 0
    server.check_idle()
    assert zombies(server) == []
    assert sorted(server.tmp.rglob("*")) == tools
    deleted = [link for link in pathlib.Path(f"/proc/{server.process.pid}/fd").iterdir()
               if "(deleted)" in str(link.readlink())]
    assert deleted == []
