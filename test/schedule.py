"""Disturb the threads of a server under test, so that a test meets what else is rare.

`python -c "import schedule; schedule.install(); import kapow; ..."` with a seed in the
environment variable KAPOW_TEST_SCHEDULE: at each acquire, release, wait, notify, thread
start, spawn, receive and close a thread may pause. Which places are slow the seed
decides, so that a seed that fails can be run again: a few stand still for a while, as
if the system had other work just then, some take a little, and the others only let
another thread run. A place is a line of a function of kapow.py, so a seed means the
same after changes elsewhere. Names of functions behind the seed, "7 take_over", make their
places slow for certain: to aim at one race.

The same wrapper looks at what the event loop, the thread named "watcher", does, and
who has the Turn: a system call there that may block is one line with the word
"unexpected" on stderr, on which Server.check_idle() fails. Who has the Turn may not use
the disk either.
"""

import builtins
import os
import random
import select
import socket
import stat
import subprocess
import sys
import threading
import time

SEED = "KAPOW_TEST_SCHEDULE"
LOOP = "watcher"
PROGRAM = "kapow.py"        # whose lines are the places
DEPTH = 8                   # calls that may lie between one of these and what it calls

SLOW = 0.1                  # of the places, that stand still
SLOW_TIME = 0.05            # seconds, at the most
SLOW_COUNT = 5              # times each; a place in the middle of all would take minutes
AIMED_TIME = 0.2            # seconds, and half of it at the least
UNEVEN = 0.3                # of the places, that take a little
UNEVEN_TIME = 0.001         # seconds, at the most
LOCK_TIME = 5               # seconds that the loop may wait for a lock

SCHEDULE = GUARD = None     # made by install()

real_sleep = time.sleep
real_lock = threading.Lock
real_write = os.write


def program_frames():
    """Return the innermost frames of kapow.py that the caller was called from, innermost first."""
    frame, found = sys._getframe(2), []
    while frame is not None:
        if frame.f_code.co_filename.endswith(PROGRAM):
            found.append(frame)
        frame = frame.f_back
    return found


class Schedule:
    """Who pauses where. `seed` is text, which names of functions may follow."""

    def __init__(self, seed):
        self._seed, *self._aimed = seed.split()
        self._places = {}       # (function, line in it, what) -> [seconds, times left, least seconds]
        self._local = threading.local()
        self._lock = real_lock()
        self._threads = 0       # that came here

    def _random(self):
        """Return the Random of this thread: of the seed, and of how many came before it."""
        try:
            return self._local.random
        except AttributeError:
            with self._lock:
                self._threads += 1
                self._local.random = random.Random(f"{self._seed} {self._threads}")
            return self._local.random

    def _place(self, what):
        """Return the entry of _places of the line of kapow.py that the caller came from."""
        frame = sys._getframe(2)
        for _ in range(DEPTH):
            if frame is None:
                return None
            code = frame.f_code
            if code.co_filename.endswith(PROGRAM):
                return self._named_place((code.co_name, frame.f_lineno - code.co_firstlineno, what))
            frame = frame.f_back
        return None

    def _named_place(self, name):
        place = self._places.get(name)
        if place is None:
            chance = random.Random(f"{self._seed} {name}").random()
            if name[0] in self._aimed:
                place = [AIMED_TIME, SLOW_COUNT, AIMED_TIME / 2]
            elif chance < SLOW:
                place = [SLOW_TIME, SLOW_COUNT, 0]
            elif chance < SLOW + UNEVEN:
                place = [UNEVEN_TIME, sys.maxsize, 0]
            else:
                place = [0, sys.maxsize, 0]
            self._places[name] = place
        return place

    def pause(self, what):
        """Let other threads run for as long as the place wants it; `what` is done there."""
        place = self._place(what)
        if place is not None and place[1] > 0:
            place[1] -= 1
            real_sleep(self._random().uniform(place[2], place[0]))


class Guard:
    """Says on stderr what a thread did that must not block."""

    def __init__(self):
        self.loop = None        # identifier of the loop's thread
        self._said = set()

    def on_loop(self):
        """Return True if this is the loop's thread."""
        return threading.get_ident() == self.loop

    def has_turn(self):
        """Return True if this thread has the Turn."""
        turn = getattr(sys.modules.get("kapow"), "TURN", None)
        return turn is not None and turn._held

    def cares(self):
        """Return True if this thread may not block."""
        return self.on_loop() or self.has_turn()

    def blocks(self, what):
        """Note that this thread does `what`, which may block."""
        if self.on_loop():
            self.say(f"the thread of the event loop may block in {what}")
        elif self.has_turn():
            self.say(f"a thread that has the Turn may block in {what}")

    def say(self, text):
        """Write one line, once for each place."""
        names = [f"{frame.f_code.co_name}:{frame.f_lineno - frame.f_code.co_firstlineno}"
                 for frame in program_frames()[:4]]
        line = f"schedule: unexpected: {text}, in {' of '.join(names)}\n"
        if names and line not in self._said:
            self._said.add(line)
            real_write(2, line.encode())


class Lock:
    """A threading.Lock, or by `make` an RLock, around which threads pause."""

    def __init__(self, make=real_lock):
        self._inner = make()
        self.locked = getattr(self._inner, "locked", None)
        self._at_fork_reinit = self._inner._at_fork_reinit

    def acquire(self, blocking=True, timeout=-1):
        if not blocking:
            return self._inner.acquire(False)
        SCHEDULE.pause("acquire")
        began = time.monotonic()
        got = self._inner.acquire(True, timeout)
        if GUARD.on_loop() and time.monotonic() - began > LOCK_TIME:
            GUARD.blocks("Lock.acquire")
        return got

    def release(self):
        self._inner.release()
        SCHEDULE.pause("release")

    def __enter__(self):
        return self.acquire()

    def __exit__(self, *exc_info):
        self.release()


class RLock(Lock):
    """A threading.RLock likewise; a Condition wants more of it."""

    def __init__(self, make=threading.RLock):
        super().__init__(make)
        self._is_owned = self._inner._is_owned

    def _release_save(self):
        state = self._inner._release_save()
        SCHEDULE.pause("release")
        return state

    def _acquire_restore(self, state):
        SCHEDULE.pause("acquire")
        self._inner._acquire_restore(state)


class Poll:
    """A select.poll() whose poll() is looked at."""

    def __init__(self, make=select.poll):
        self._inner = make()

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def poll(self, timeout=None):
        if timeout is None or timeout > 0:
            GUARD.blocks("poll")
        return self._inner.poll(timeout)


def is_blocking(fd):
    """Return True for a pipe or socket that is not set to answer at once."""
    try:
        kind = os.fstat(fd).st_mode
        return (stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)) and os.get_blocking(fd)
    except OSError:
        return False


def wrap(owner, name, check=lambda *arguments, **options: False, before=False, after=False):
    """Put into `owner` a function `name` that pauses, and tells the guard when `check()`.

    `check` gets the arguments.
    """
    real = getattr(owner, name)

    def wrapper(*arguments, **options):
        if check(*arguments, **options):
            GUARD.blocks(name)
        if before:
            SCHEDULE.pause(name)
        try:
            return real(*arguments, **options)
        finally:
            if after:
                SCHEDULE.pause(name)
    setattr(owner, name, wrapper)


def wrap_sockets():
    """Look at all that may block on a socket."""
    def waits(sock, *arguments):
        """Return True if a call of `sock` may block; the flags are among the arguments."""
        flags = [value for value in arguments if isinstance(value, int)]
        asked = any(flag & socket.MSG_DONTWAIT for flag in flags)
        return GUARD.cares() and sock.gettimeout() != 0 and not (asked and sock.gettimeout() is None)

    def receives(sock, _size, flags=0):
        return waits(sock, flags)

    def goes_on(sock, *arguments):
        return GUARD.cares() and sock.gettimeout() != 0

    for name in ("recv", "recv_into"):
        wrap(socket.socket, name, receives, before=True, after=True)
    wrap(socket.socket, "send", lambda sock, _data, flags=0: waits(sock, flags), after=True)
    for name in ("sendall", "accept", "connect"):
        wrap(socket.socket, name, goes_on, after=True)
    wrap(socket.socket, "close", before=True, after=True)
    wrap(socket.socket, "shutdown", before=True)


def wrap_files():
    """Look at pipes, and at what starts programs or waits for them."""
    wrap(os, "read", lambda fd, size: GUARD.cares() and is_blocking(fd), after=True)
    wrap(os, "write", lambda fd, data: GUARD.cares() and is_blocking(fd), after=True)
    wrap(os, "close", before=True)
    wrap(time, "sleep", lambda seconds: seconds > 0, after=True)
    wrap(subprocess.Popen, "__init__", lambda *arguments, **options: True, before=True, after=True)
    for name in ("open", "stat", "lstat", "access", "pread", "pwrite", "scandir"):
        wrap(os, name, lambda *arguments, **options: not GUARD.on_loop())
    wrap(builtins, "open", lambda *arguments, **options: not GUARD.on_loop())
    select.poll = Poll


def wrap_threads():
    """Have locks pause, and threads when they begin."""
    threading.Lock, threading.RLock = Lock, RLock
    wrap(threading.Condition, "wait", lambda *arguments: True)
    wrap(threading.Thread, "join", lambda *arguments: True)
    wrap(threading.Thread, "start", before=True, after=True)
    run = threading.Thread.run

    def begin(thread):
        if thread.name == LOOP:
            GUARD.loop = threading.get_ident()
        place = SCHEDULE._named_place(("run", getattr(thread._target, "__qualname__", ""), "begin"))
        real_sleep(SCHEDULE._random().uniform(place[2], place[0]))
        run(thread)
    threading.Thread.run = begin


def install():
    """Do it, for a program that is imported next; nothing without a seed in the environment."""
    global SCHEDULE, GUARD
    seed = os.environ.pop(SEED, "")
    if seed:
        SCHEDULE, GUARD = Schedule(seed), Guard()
        wrap_threads()
        wrap_sockets()
        wrap_files()
