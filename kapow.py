#!/usr/bin/env python3
"""Kapow!: if you can script it, you can HTTP it.

A request on the user interface is matched against a route table; the route's
entrypoint is spawned; the program reads the request with ``kapow get`` and
writes the response with ``kapow set``; when it exits the response is finished.
kapow(1) is the command line, kapow(7) the life of a request and its resources.

This file is the whole server and runs alone on the standard library; the
``cryptography`` package is needed for the control interface only. Its client
is kapowctl.py.

Sections (search for "# <number>.")
    1. Constants          5. Handlers         9. Billets
    2. Errors             6. Resources       10. TLS and credentials
    3. Routes             7. Entrypoints     11. Interfaces
    4. HTTP messages      8. Services        12. Server
                                             13. Command line
Names are used below their definition. Sections 2 to 6 know no socket, no
process and no command line.

One request
    Interface.serve_forever                          a thread for each interface
      Conversation.handle                            a thread for each client
        Conversation.converse                        once for each request
          UserConversation.answer
            RouteTable.match
            Gate.passing                             waits for its turn
              Handler(request, route, matches)
              Services.running                       if the route names a service, see below
              Launcher.running                       else forks the entrypoint
                Spawner.spawn
                  Watcher.on_exit
              UserConversation._relay                waits on handler.condition
                ResponseSender                       writes to the client
    meanwhile the program runs `kapow get` and `kapow set`:
        Watcher -> Channel                           for shells: SHELL_LIBRARY
        DataConversation.answer                      else, a thread for each client
          find_resource
          Resource.read / write, Handler.pour        change the handler, notify
    and when it exits:
        Watcher -> Child -> Handler.program_ended    notifies
    where a launcher answers (Billets.find, when no route fits) the watcher takes what it prints:
              UserConversation._relay
                BilletAnswer.next_step               forks the launcher
        Watcher -> BilletOutput -> CgiSink / BashSink    change the handler, notify
    where a service answers nothing is forked, and the user thread asks it itself:
              UserConversation._relay
                ServiceAnswer.next_step
                  Exchange.begin / read              on a connection of the Instance's pool
                ResponseSender

    at SIGHUP the main thread sets all up anew, beside what serves:
        Signals -> Server.ask_to_reload
        Server._reload
          Configuration.successor                    a table of its own, and services
          InitPrograms.start                         they know a path of its own:
            ControlConversation.answer               Shared.find_configuration
          Server._put_in_force

Threads
    main            starts, reloads and stops everything
    signals         reads the signals that ask for that
    an interface    accepts
    a conversation  one for each connection of any interface. That of a user
                    request alone writes to its client's socket; the request's
                    body is read from it by whichever thread wants the body,
                    one at a time
    an upload       sends a body to a service that does not come at once
    a form          parses a form that a shell asks for, and ends
    a start         waits until a service answers, and ends
    the outputs     logs what services print and, with --debug, other programs
    the watcher     waits for what threads cannot wait for cheaply: child
                    exits, clients that hang up, deadlines, calls over channels.
                    It never blocks

Locks
    RouteTable._lock        writers of the table; readers take a tuple that
                            never changes
    Gate._lock              who runs and who waits for a turn
    HandlerTable._lock      the ids of running handlers
    Handler.condition       the handler's response, exit and abort
    RequestBody._condition  the spool of one request's body
    SpoolSpace._lock        what all spools take of the disk; a leaf, taken under the
                            locks of handlers and bodies
    AccessLog._lock         lines that wait for a reader
    Caretaker._lock         its next look; Caretaker._restoring: who writes again
    Form._condition         what is known of the form in it
    Child._lock             reaping and signalling one process group
    Interface._changed      the conversations that there are
    Connection._tls_lock    one TLS session, which OpenSSL wants used by one
                            thread at a time
    Watcher._lock           the heap of deadlines
    Supervisor._condition   the state of one service, and its processes
    Services._lock          the names of services, and which tables these are for
                            and have their routes: before RouteTable._lock
    Setups._condition       which contexts of billets are set up
    Surroundings._changed   the processes of services that live
    Exchange._lock          the connection that one request to a service uses
    Reaper._lock            which children are ours
    Metrics._lock           the counters
    Readiness._condition    whether the server is ready, and who knows
    Server._asked           what signals ask of the main thread
    No thread holds two of them, but these in that order, and none holds one while it waits for a
    socket or a process. The Turn is no such lock, see there.

Glossary
    route        maps a method and a URL pattern to a program
    handler      one request being answered: from the match to the last byte
    entrypoint   the program that a handler spawns
    command      the entrypoint's last argument
    resource     one piece of the request or the response, named by a path
    channel      pipes that lead from a handler's program to the server, for the
                 shell's side of `kapow get` and `kapow set`
    pour         a write whose bytes the server reads from the caller's own input
    write        the bytes of one `kapow set /response/body` or `/stream`
    conversation one client's connection, request after request
    init program an executable that sets up the routes when the server starts
    launcher     a program in the directory of billets that answers requests
    context      what a launcher and its files are called, the first part of the path
    billet       a launcher that is to answer one request, in the place of a route
    draft        what a handler's program has said of the response so far
    service      a resident program that answers requests on a Unix socket
    instance     one process of a service; there are two while it is restarted
    exchange     one request to a service, and its response
    manifest     what a service says of itself, its routes among it
    configuration    routes and services: one is in force, and while the server
                 reloads there is its successor
    orphan       a process whose parent has ended; it comes to process 1, or to a
                 subreaper before that
"""

import argparse
import atexit
import bisect
import codecs
import collections
import contextlib
import datetime
import email.utils
import errno
import fcntl
import functools
import heapq
import http
import http.server
import ipaddress
import itertools
import json
import logging
import math
import mimetypes
import os
import py_compile
import re
import resource as os_resource     # a resource is something else here
import select
import selectors
import shlex
import shutil
import signal
import socket
import socketserver
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import urllib.parse
import uuid
import warnings
import weakref

try:
    from re import _parser as regex_parser      # the parser of `re`, which has no public name
except ImportError:                             # until Python 3.10
    import sre_parse as regex_parser

# ---------------------------------------------------------------------------
# 1. Constants
# ---------------------------------------------------------------------------

VERSION = "0.1.0"

KIB = 1024
MIB = 1024 * KIB

# Where the interfaces listen when nothing is said. kapowctl.py knows the same
# control and data address, and a test holds them equal.
USER_ADDRESS = "0.0.0.0:8080"
CONTROL_ADDRESS = "localhost:8081"
DATA_ADDRESS = "localhost:8082"

ALL_ADDRESSES = "0.0.0.0"       # of IPv4, where an address to listen on is a port alone
UNIX_SCHEME = "unix:"           # before the path of a socket that stands for HOST:PORT

DEFAULT_ENTRYPOINT = "/bin/sh -c"

# The environment of handlers and init programs. Each URL has an older name
# that programs written for the Go implementation read.
HANDLER_ID_VARIABLE = "KAPOW_HANDLER_ID"
DATA_URL_VARIABLES = ("KAPOW_DATA_URL", "KAPOW_DATAAPI_URL")
CONTROL_URL_VARIABLES = ("KAPOW_CONTROL_URL", "KAPOW_CONTROLAPI_URL")
SERVER_CERT_VARIABLE = "KAPOW_CONTROL_SERVER_CERT"
CLIENT_CERT_VARIABLE = "KAPOW_CONTROL_CLIENT_CERT"
CLIENT_KEY_VARIABLE = "KAPOW_CONTROL_CLIENT_KEY"
CHANNEL_VARIABLE = "KAPOW_CHANNEL"
SERVICE_SOCKET_VARIABLES = ("KAPOW_SERVICE_SOCKET", "FOLD_SOCK_ADDR")
CREDENTIAL_VARIABLES = (SERVER_CERT_VARIABLE, CLIENT_CERT_VARIABLE, CLIENT_KEY_VARIABLE)

# Bytes. Request heads: RFC 9112 section 3 asks for request lines of 8000 at
# least; names of resources travel percent-encoded in the data interface's.
LINE_LIMIT = 8 * KIB
DATA_LINE_LIMIT = 64 * KIB
FIELDS_LIMIT = 64 * KIB
FIELD_COUNT_LIMIT = 100
CHUNK_LINE_LIMIT = 4 * KIB

# Bytes of a request body, by interface; None is no limit.
USER_BODY_LIMIT = 1024 * MIB
CONTROL_BODY_LIMIT = 1 * MIB
VALUE_LIMIT = 64 * KIB          # a status, header, cookie or log line

ARGUMENT_LIMIT = 128 * KIB - 1  # of a program, its NUL aside: execve(2), Linux
LIBRARY_ROOM = 1 * KIB          # of that for what has a shell read SHELL_LIBRARY first

MEMORY_LIMIT = 1 * MIB          # a spool moves from memory to a file here
DRAIN_LIMIT = 1 * MIB           # of an unread body, to keep its connection
HOLD_LIMIT = 64 * KIB           # of response held back until the program ends
WRITE_BUFFER = 256 * KIB        # what a program may be ahead of its client
PIECE = 64 * KIB                # moved at a time

FORM_FIELD_LIMIT = 10_000       # fields and files in one form
FORM_NAMES_LIMIT = 1 * MIB      # their names, which are kept in memory
ASKERS_LIMIT = 100              # balancers that are remembered
SERIES_LIMIT = 10_000           # of one metric; the oldest are forgotten
PART_HEAD_LIMIT = 16 * KIB      # the header of one multipart part, bytes
LOG_LINE_LIMIT = 8 * KIB        # of a line without its end that is waited for, bytes

# Seconds.
HEAD_TIME = 10                  # for a request head, from its first byte
IDLE_TIME = 60                  # without a byte, either way
RATE_TIME = 60                  # of waiting for a body, over which its rate is averaged
DRAIN_TIME = 60                 # for the rest of a body that nobody wants
LINGER_TIME = 2                 # for a refused client to read why
FRESH_TIME = 1                  # for who came just before the end to make a request
PARTING_TIME = 0.1              # for who has made some to make the last
TELLS = 3                       # that a balancer is told of the end before it comes: HAProxy's fall
TELL_TIME = 0.5                 # between two of them at the least
TELL_LONGEST = 6                # for all of them: HAProxy asks every 2 s by default
KILL_DELAY = 5                  # between SIGTERM and SIGKILL
KILL_LOOK = 0.05                # until a killed group is looked at again; doubled each time
KILL_LOOK_LAST = 0.5            # but never longer
LOST_TIME = 10                  # that a dead handler's call may take to come to its end
LAUNCH_TIME = 0.001             # until a call is looked at again that came too early
ROOM_TIME = 1                   # for connections to end that were told to, before a handler starts
FILES_TIME = 0.1                # until a file is opened again for which there was no room
LOCK_TIME = 5                   # that a directory may be locked by others
LOCK_LOOK = 0.05                # until its lock is asked for again
NOTIFY_TIME = 1                 # for a service manager to take what it is told
REAP_TIME = 0.5                 # until children of others that have exited are reaped
CARE_INTERVAL = 5               # until it is checked again that nothing was removed
LONGEST_TIMEOUT = 10 ** 9       # 31 years
LONGEST_SELECT = 86400          # epoll_wait(2) takes milliseconds in 32 bits
CERTIFICATE_DAYS = 3650

# Defaults of the limits that --max-handlers, --max-queue, --queue-time and --grace set.
MAX_HANDLERS = 1024             # handlers at once
MAX_QUEUE = 1024                # requests that wait for one of them to end
QUEUE_TIME = 10                 # seconds that these wait
GRACE = 10                      # seconds for running handlers when the server stops
MIN_RATE = 100                  # bytes of a body in a second
SPOOL_PART = 4                  # one of so many parts of the free disk is for bodies

# The channel.
CHANNEL_FORM_LIMIT = 64 * KIB   # bytes of a body that is parsed for an answer
SMALL_FORM = 2 * KIB            # of one that the watcher parses itself
PIPE_SIZE = 64 * KIB            # bytes that a pipe takes if nothing is said, pipe(7)
SLOTS = 2                       # calls of one handler at once, as in kapow get ... | kapow set ...
LINE_ANSWER_LIMIT = 2 * KIB     # bytes that a shell reads faster than it starts head(1)
NUMBER_SIZE = 20                # bytes at the most, of what says which call an answer belongs to
READS_AT_ONCE = 16              # of one write, before others have their turn
F_SETPIPE_SZ = 1031             # fcntl(2), Linux; in the module fcntl from Python 3.10 on

PR_GET_CHILD_SUBREAPER = 37     # prctl(2), Linux

# Services. Seconds, unless said otherwise.
START_TIME = 10                 # that a process has to answer on its socket
STOP_TIME = 10                  # between SIGTERM and SIGKILL for one that is to stop
RETRY_FIRST = 0.1               # between a death and the next start; doubled each time
RETRY_LAST = 10                 # but never longer
RETRY_LIFE = 60                 # a process that lived so long was sound: RETRY_FIRST again
MANIFEST_TIME = 3               # that a manifest is waited for
MANIFEST_LIMIT = 1 * MIB        # bytes of it
SOCKET_LOOK = 0.005             # until a socket is looked for again; doubled each time
SOCKET_LOOK_LAST = 0.1          # but never longer
CONNECT_LOOK = 0.5              # that a service's full queue is waited at, before a look around
STUCK_TIME = 1                  # without an answer on a new connection, until idle ones are closed
INTERIM_LIMIT = 100             # interim responses (1xx) to one request
UPLOAD_TIME = 2                 # for an upload to end after its answer, and leave its connection
IDLE_CONNECTIONS = 64           # connections to one process kept for later requests
SURE_TIME = 1                   # no service closes a connection that was idle for less
SOCKET_PATH_LIMIT = 107         # bytes, unix(7)
SOCKET_NAME_ROOM = 16           # of these, for the name of a socket in its directory

# What the system answers when no more files can be opened, or no memory is left.
NO_MORE_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

# Where directories of servers may be, besides the usual place for temporary files.
PARENTS = ("/tmp", "/var/tmp", "/dev/shm")

BACKLOG = 1024                  # connections that wait to be accepted

# Open files: of the server itself, and of each handler at the most (its client,
# its pidfd, four of its slots and two for each value poured there, two calls of
# the data interface, two pipes of --debug, two spools).
OWN_FILES = 64
HANDLER_FILES = 16
RESERVED_FILES = 128            # for clients of the other interfaces, at the least
RESERVED_PART = 8               # or one of so many parts of the limit
CLOSING_CONNECTIONS = 4         # more than there may be, as some are about to end
FILES_LIMIT = 2 ** 20           # no more are asked for

LEAST_MEMORY = 128 * MIB        # of address space, for the interpreter and the first threads
LOG_QUEUE_LIMIT = 1000          # lines of the event loop that wait to be written
LOG_INTERVAL = 1                # seconds between two complaints of one kind
ACCESS_LOG_BUFFER = 1 * MIB     # of lines that nobody reads, bytes
ACCESS_LOG_RETRY = 0.1          # seconds until they are tried again
SWITCH_INTERVAL = 0.05          # seconds that a thread computes before others have their turn

# Deaths that are no failure, as in systemd.service(5), SuccessExitStatus=.
CLEAN_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)

# nginx's status for a client that left before the answer; only logs see it.
CLIENT_CLOSED_REQUEST = 499

# nginx's status for a connection that is closed without an answer; so too.
NO_ANSWER = 444

REDIRECTS = 10                  # local ones of CGI programs, one after another

log = logging.getLogger("kapow")

# ---------------------------------------------------------------------------
# 2. Errors
# ---------------------------------------------------------------------------

# The status of each reason that an interface can give. What is not here has
# the phrase of its status (RFC 9110 section 15) as its reason.
REASONS = {
    "Malformed JSON": 400,
    "Invalid Resource Path": 400,
    "Invalid Status Code": 400,
    "Invalid Header": 400,
    "Route Not Found": 404,
    "Handler ID Not Found": 404,
    "Service Not Found": 404,
    "Resource Item Not Found": 404,
    "Response Already Started": 409,
    "Body And Stream Are Exclusive": 409,
    "Service Exists": 409,
    "Service In Use": 409,
    "Request ID Not Unique": 409,
    "Service Not Running": 409,
    "Invalid Route": 422,
    "Invalid Service": 422,
    "Invalid Signal": 422,
    "Non Integer Value": 422,
}

# Phrases that http.HTTPStatus has in an older or in no spelling.
PHRASES = {413: "Content Too Large", 414: "URI Too Long", 416: "Range Not Satisfiable",
           422: "Unprocessable Content", 505: "HTTP Version Not Supported"}


@functools.lru_cache(maxsize=1000)
def status_phrase(status):
    """Return the reason phrase of the int `status`, "" where RFC 9110 has none."""
    if status in PHRASES:
        return PHRASES[status]
    try:
        return http.HTTPStatus(status).phrase
    except ValueError:
        return ""


class ApiError(Exception):
    """A refusal that an interface answers with ``{"reason": ...}``.

    `reason` is a key of REASONS or an int status, whose phrase is then the
    reason. `headers` go into the answer, `details` into its JSON object.
    """

    def __init__(self, reason, headers=(), **details):
        self.status = REASONS[reason] if reason in REASONS else reason
        self.reason = reason if reason in REASONS else status_phrase(reason)
        self.headers = headers
        self.details = details
        super().__init__(self.reason)


def describe_refusal(error):
    """Return an ApiError with its details as words for people."""
    where = "".join(f", {key} {error.details[key]}" for key in ("item", "field")
                    if error.details.get(key) is not None)
    return f"{error.reason}{where}: {error.details['error']}"


class ProtocolError(Exception):
    """A client broke HTTP: it is told `status`, and its connection is closed.

    `why` is the sentence for the log.
    """

    def __init__(self, status, why):
        self.status = status
        super().__init__(why)


def reason_json(reason, **details):
    """Return the JSON text (bytes) of an error; an int `reason` means its phrase."""
    text = status_phrase(reason) if isinstance(reason, int) else reason
    return json.dumps({"reason": text, **details}).encode()


class PeerLeft(ProtocolError):
    """The other end's input ended within a message."""

    def __init__(self):
        super().__init__(400, "the other end left within the message")


class BadProgram(Exception):
    """A launcher does not do what CGI asks of it; the text says what it did."""


class StartError(Exception):
    """The server cannot start or a command cannot be done: its text says why."""


class MissingPackage(StartError):
    """What is asked for needs a Python package that is not installed."""


# ---------------------------------------------------------------------------
# 3. Routes
# ---------------------------------------------------------------------------

TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")     # RFC 9110 section 5.6.2


class PatternError(ValueError):
    """A URL pattern that means nothing, or could take too long; its text says where and why."""


def split_pattern(pattern):
    """Yield (literal, placeholder) pairs of a URL pattern, in order.

    `placeholder` is the text between braces, which may hold balanced braces
    itself (``{n:[0-9]{3}}``), or None behind the last literal.
    """
    depth = start = 0
    literal = ""
    for position, character in enumerate(pattern):
        if character == "{":
            if depth == 0:
                literal, start = pattern[start:position], position + 1
            depth += 1
        elif character == "}":
            depth -= 1
            if depth < 0:
                raise PatternError(f"the '}}' at character {position + 1} closes nothing")
            if depth == 0:
                yield literal, pattern[start:position]
                start = position + 1
    if depth:
        raise PatternError("a '{' is never closed")
    yield pattern[start:], None


# What one step of an Automaton costs grows with these; together they keep a match of
# 8 KiB under 50 ms, whatever the path (test_routes.py measures it).
POSITION_LIMIT = 1500           # characters that a pattern can ask for
CLASS_LIMIT = 32                # sets of characters, as [a-z]
SET_SIZE_LIMIT = 20_000         # characters of all of them, written out: some 1000 ranges
JUMP_LIMIT = 50                 # ways from one place of a pattern to another that is not the next
CHOICE_LIMIT = 300              # ways that are open at one place
COPY_LIMIT = 4 * POSITION_LIMIT     # instructions
SUFFIX_LIMIT = 64               # characters between a placeholder and the next slash, for `re`
CACHE_LIMIT = 5000              # entries of each cache

# Parts of a regular expression that no automaton can follow: operation -> what people call it.
NOT_REGULAR = {"GROUPREF": "a reference back to a group", "GROUPREF_EXISTS": "a condition",
               "ASSERT": "a look-around", "ASSERT_NOT": "a look-around",
               "AT": "a word boundary, or an anchor that is not at its end",
               "FAILURE": "a look-around", "ATOMIC_GROUP": "an atomic group",
               "POSSESSIVE_REPEAT": "a possessive repeat"}
TYPE_FLAGS = re.ASCII | re.LOCALE | re.UNICODE      # of which one holds

# How a class of characters is written, by the name that the parser has for it.
CATEGORIES = {"CATEGORY_DIGIT": r"\d", "CATEGORY_NOT_DIGIT": r"\D", "CATEGORY_SPACE": r"\s",
              "CATEGORY_NOT_SPACE": r"\S", "CATEGORY_WORD": r"\w", "CATEGORY_NOT_WORD": r"\W"}


def format_class(items):
    """Return the text of a set of characters, as [a-z], that the parser made `items` of."""
    text = ""
    for operation, value in items:
        name = str(operation)
        if name == "NEGATE":
            text += "^"
        elif name == "CATEGORY":
            text += CATEGORIES[str(value)]
        else:
            codes = (value,) if name == "LITERAL" else value
            text += "-".join(f"\\U{code:08x}" for code in codes)
    return f"[{text}]"


def is_anchor(part, side):
    """Return True if a part of a parsed regular expression is an anchor for "BEGINNING" or "END"."""
    operation, value = part
    return str(operation) == "AT" and str(value) in (f"AT_{side}", f"AT_{side}_STRING")


class ProgramBuilder:
    """Compiles the parts of a URL pattern to the program of an Automaton.

    An instruction is ("take", key) for one character, where `key` is a
    character or the compiled regular expression of a set of them, or
    ("split", instructions), to go on at any of these, the best first. After
    each one comes the next; the end of the list is the end of the path.
    """

    def __init__(self):
        self.instructions = []          # [kind, argument]
        self.labels = []                # the placeholder that each is in, int; None for literals
        self._label = None
        self._classes = {}              # (text, flags) -> compiled regular expression
        self._size = 0                  # of their texts, characters

    def add_literal(self, text):
        """Add characters that stand for themselves."""
        self._label = None
        for character in text:
            self._emit("take", character)

    def add_placeholder(self, label, regex):
        """Add the placeholder number `label`. Raises PatternError, re.error.

        Anchors at its ends say what holds anyway: the whole of it is compared.
        """
        self._label = label
        parsed = list(regex_parser.parse(regex))
        while parsed and is_anchor(parsed[0], "BEGINNING"):
            del parsed[0]
        while parsed and is_anchor(parsed[-1], "END"):
            del parsed[-1]
        self._add_all(parsed, 0)

    def longest(self):
        """Return the label of the placeholder that takes most of the program."""
        labels = collections.Counter(label for label in self.labels if label is not None)
        return labels.most_common(1)[0][0]

    def _emit(self, kind, argument):
        if len(self.instructions) >= COPY_LIMIT:
            raise PatternError("with its repeats counted out it is too long")
        self.instructions.append([kind, argument])
        self.labels.append(self._label)
        return len(self.instructions) - 1

    def _add_all(self, parsed, flags):
        for operation, value in parsed:
            name = str(operation)
            if name in NOT_REGULAR:
                raise PatternError(f"it has {NOT_REGULAR[name]}")
            add = getattr(self, "_add_" + name.lower(), None)
            if add is None:
                raise PatternError(f"it has a part that is not known, {name.lower()}")
            add(value, flags)

    def _add_literal(self, code, flags):
        if flags & re.IGNORECASE:
            self._add_in([("LITERAL", code)], flags)
        else:
            self._emit("take", chr(code))

    def _add_not_literal(self, code, flags):
        self._add_in([("NEGATE", None), ("LITERAL", code)], flags)

    def _add_any(self, _, flags):
        self._add_class(".", flags)

    def _add_in(self, items, flags):
        self._add_class(format_class(items), flags)

    def _add_class(self, text, flags):
        key = text, int(flags)
        if key not in self._classes:
            self._size += len(text)
            if self._size > SET_SIZE_LIMIT:
                raise PatternError("its sets of characters are too large")
            self._classes[key] = re.compile(text, flags)
        self._emit("take", self._classes[key])

    def _add_subpattern(self, value, flags):
        _, added, removed, parsed = value
        if added & TYPE_FLAGS:
            flags &= ~TYPE_FLAGS
        self._add_all(parsed, (flags | added) & ~removed)

    def _add_branch(self, value, flags):
        split, ends = self._emit("split", []), []
        for parsed in value[1]:
            self.instructions[split][1].append(len(self.instructions))
            self._add_all(parsed, flags)
            ends.append(self._emit("split", []))
        for end in ends:
            self.instructions[end][1].append(len(self.instructions))

    def _add_max_repeat(self, value, flags, lazy=False):
        least, most, parsed = value
        for _ in range(least):
            before = len(self.instructions)
            self._add_all(parsed, flags)
            if len(self.instructions) == before:    # it stands for nothing, however often
                return
        if most is regex_parser.MAXREPEAT:
            self._add_loop(parsed, flags, lazy)
        else:
            self._add_options(parsed, flags, lazy, most - least)

    def _add_min_repeat(self, value, flags):
        self._add_max_repeat(value, flags, lazy=True)

    def _add_loop(self, parsed, flags, lazy):
        split = self._emit("split", [])
        self._add_all(parsed, flags)
        self._emit("split", [split])
        self._choose(split, lazy)

    def _add_options(self, parsed, flags, lazy, count):
        splits = []
        for _ in range(count):
            splits.append(self._emit("split", []))
            before = len(self.instructions)
            self._add_all(parsed, flags)
            if len(self.instructions) == before:
                break
        for split in splits:
            self._choose(split, lazy)

    def _choose(self, split, lazy):
        """Have the instruction at `split` go into what follows it, or behind all there is."""
        ways = [split + 1, len(self.instructions)]
        self.instructions[split][1] = ways[::-1] if lazy else ways


class Automaton:
    """Matches paths against a pattern in time linear in the path, whatever both are.

    Thompson's simulation, over sets of positions that are the bits of an int (Navarro
    and Raffinot, Flexible Pattern Matching in Strings, chapter 5). A position is a
    character that the pattern asks for, counted from the left; the last one is the end of the
    path. match() goes through the path from its end and notes, for each character,
    the positions where it fits and so does all that follows. So the way forward never
    has to turn back. Where several ways are open it takes the one that the module
    `re` would: the first of ``a|b``, the longest of ``a*``, the shortest of ``a*?``.
    """

    def __init__(self, builder, names):
        """`names` are those of the placeholders, by label. Raises PatternError."""
        self._names = names
        self._instructions = builder.instructions
        takes = [at for at, (kind, _) in enumerate(self._instructions) if kind == "take"]
        self._position_of = {at: position for position, at in enumerate(takes)}
        self._end = len(takes)
        self._labels = [builder.labels[at] for at in takes]
        self._literals, self._sets = {}, {}     # character, regular expression -> positions
        for position, at in enumerate(takes):
            key = self._instructions[at][1]
            found = self._literals if isinstance(key, str) else self._sets
            found[key] = found.get(key, 0) | 1 << position
        self._masks = {}                        # character -> positions that take it; a cache
        self._follow = [self._find_ways(at + 1) for at in takes]
        self._follow.append(self._find_ways(0))     # at the end: of the beginning
        self._choices = {}                      # (position, open ways) -> the best one; a cache
        self._link()
        self._check_size()

    def _find_ways(self, start):
        """Return the positions that may follow where the instruction `start` is next, best first."""
        ways, seen, waiting = {}, set(), [start]
        while waiting:
            at = waiting.pop()
            if at in seen:
                continue
            seen.add(at)
            if at == len(self._instructions):
                ways[self._end] = None
            elif at in self._position_of:
                ways[self._position_of[at]] = None
            else:
                waiting.extend(reversed(self._instructions[at][1]))
            if len(seen) > 4 * CHOICE_LIMIT:
                raise PatternError("it has too many ways to go on at one place")
        return tuple(ways)

    def _link(self):
        """Turn the ways around: which positions lead to those of a set."""
        self._to_next = self._to_itself = 0     # positions that the next, or they themselves, follow
        others = {}                             # position -> those from which it is jumped to
        for position, ways in enumerate(self._follow[:-1]):
            for way in ways:
                if way == position + 1:
                    self._to_next |= 1 << position
                elif way == position:
                    self._to_itself |= 1 << position
                else:
                    others[way] = others.get(way, 0) | 1 << position
        jumps = {}                              # the same, for all that are jumped to alike
        for way, sources in others.items():
            jumps[sources] = jumps.get(sources, 0) | 1 << way
        self._jumps = [(targets, sources) for sources, targets in jumps.items()]
        self._ways = [sum(1 << way for way in ways) for ways in self._follow]

    def _check_size(self):
        for size, limit, what in (
                (self._end, POSITION_LIMIT, "characters"),
                (len(self._sets), CLASS_LIMIT, "different sets of characters"),
                (len(self._jumps), JUMP_LIMIT, "repeats, options and alternatives"),
                (max(map(len, self._follow)), CHOICE_LIMIT, "alternatives at one place")):
            if size > limit:
                raise PatternError(f"it has {size} {what}, more than {limit}")

    def match(self, text):
        """Return {name: text} when the whole of the str `text` fits, else None."""
        fitting = 1 << self._end
        places = []                             # of each character, from the last to the first
        for character in reversed(text):
            sources = fitting >> 1 & self._to_next | fitting & self._to_itself
            for targets, jumping in self._jumps:
                if fitting & targets:
                    sources |= jumping
            mask = self._masks.get(character)
            fitting = sources & (self._find_mask(character) if mask is None else mask)
            if not fitting:
                return None
            places.append(fitting)
        if not fitting & self._ways[self._end]:
            return None
        return self._read_matches(text, places)

    def _find_mask(self, character):
        mask = self._literals.get(character, 0)
        for expression, positions in self._sets.items():
            if expression.match(character):
                mask |= positions
        if len(self._masks) >= CACHE_LIMIT:
            self._masks.clear()
        self._masks[character] = mask
        return mask

    def _read_matches(self, text, places):
        """Go the best way through `places`, where each leads to the end; return {name: text}."""
        position, starts, ends = self._end, {}, {}
        for index in range(len(text)):
            fitting = places.pop() & self._ways[position]
            if fitting & fitting - 1:           # more than one
                position = self._choose(position, fitting)
            else:
                position = fitting.bit_length() - 1
            label = self._labels[position]
            if label is not None:
                starts.setdefault(label, index)
                ends[label] = index + 1
        return {name: text[starts.get(label, 0):ends.get(label, 0)]
                for label, name in enumerate(self._names)}

    def _choose(self, position, fitting):
        best = self._choices.get((position, fitting))
        if best is None:
            best = next(way for way in self._follow[position] if fitting >> way & 1)
            if len(self._choices) >= CACHE_LIMIT:
                self._choices.clear()
            self._choices[position, fitting] = best
        return best


def check_regex(name, regex):
    """Raise PatternError unless `regex` is a regular expression that can stand inside a pattern."""
    try:
        compiled = re.compile(regex)
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternError(f"the regular expression of {{{name}}} is broken: {error}") from None
    if compiled.flags & ~re.UNICODE:
        raise PatternError(f"{{{name}}} sets flags for the whole pattern; write (?i:...)")


def parse_pattern(pattern):
    """Return (literals, placeholders) of a URL pattern. Raises PatternError.

    The placeholders are {name: regular expression, None for any text without a
    slash}; there is one more literal, as each stands before its placeholder.
    """
    if not pattern.startswith("/"):
        raise PatternError("a URL pattern begins with '/'")
    literals, placeholders = [], {}
    for literal, placeholder in split_pattern(pattern):
        literals.append(literal)
        if placeholder is None:
            break
        name, colon, regex = placeholder.partition(":")
        if not name:
            raise PatternError("a placeholder has no name")
        if "{" in name:
            raise PatternError(f"the name {name!r} has a brace in it")
        if name in placeholders:
            raise PatternError(f"the name {name!r} comes twice")
        if colon:
            check_regex(name, regex)
        placeholders[name] = regex if colon else None
    return literals, placeholders


def is_plain(literals, placeholders):
    """Return True if the module `re` cannot have to try again: one placeholder between slashes."""
    return (not any(placeholders.values())
            and all("/" in literal for literal in literals[1:-1])
            and all(len(literal.partition("/")[0]) <= SUFFIX_LIMIT for literal in literals))


def match_plain(fullmatch, names, path):
    """Match `path` with a compiled regular expression whose groups are `names`."""
    found = fullmatch(path)
    return None if found is None else dict(zip(names, found.groups()))


def match_automaton(automaton, prefix, suffix, path):
    """Match what is left of `path` when `prefix` and `suffix` are taken off."""
    end = len(path) - len(suffix)
    if end < len(prefix) or not path.startswith(prefix) or not path.endswith(suffix):
        return None
    return automaton.match(path[len(prefix):end])


def compile_pattern(pattern):
    """Return the function that matches a decoded path: {name: text}, None if it does not fit.

    It takes time linear in the path. Raises PatternError.
    """
    literals, placeholders = parse_pattern(pattern)
    if is_plain(literals, placeholders):
        fullmatch = re.compile("([^/]+)".join(map(re.escape, literals))).fullmatch
        return functools.partial(match_plain, fullmatch, tuple(placeholders))
    builder, label = ProgramBuilder(), 0
    for literal, (name, regex) in zip(["", *literals[1:]], placeholders.items()):
        builder.add_literal(literal)
        try:
            builder.add_placeholder(label, "[^/]+" if regex is None else regex)
        except PatternError as error:
            raise PatternError(f"{{{name}}} is not taken: {error}; see URL patterns "
                               "in kapow(7)") from None
        except (ValueError, RecursionError, OverflowError) as error:
            raise PatternError(f"{{{name}}} is not taken: {error}") from None
        label += 1
    try:
        automaton = Automaton(builder, tuple(placeholders))
    except PatternError as error:
        name = list(placeholders)[builder.longest()]
        raise PatternError(f"{{{name}}} could take too long: {error}") from None
    return functools.partial(match_automaton, automaton, literals[0], literals[-1])


def pattern_hint(pattern):
    """Return a sentence about what a URL pattern takes literally and other servers do not, or None."""
    literals = "\0".join(literal for literal, _ in split_pattern(pattern))
    found = re.search(r"/(:([A-Za-z_]\w*)|<(?:\w+:)?(\w+)>)", literals)
    if found:
        name = found.group(2) or found.group(3)
        return f"'{found.group(1)}' stands for itself; write {{{name}}} for any part between slashes"
    if "*" in literals:
        return "'*' stands for itself; write {rest:.*} for the rest of a path"
    return None


SERVICE_NAME = re.compile(r"[0-9A-Za-z_][0-9A-Za-z_.@-]{0,63}")
HANDLER_NAME = re.compile(r"[!-~](?:[ -~]{0,254}[!-~])?")      # fits into a header
SERVICE_NAME_RULE = ("a name of a service is up to 64 letters, digits, '_', '.', '@' and '-', "
                     "and begins with one of the first three")


def invalid_route(field, why):
    """Return the ApiError for a route whose `field` (None: all of it) is wrong."""
    return ApiError("Invalid Route", field=field, error=why)


def invalid_service(field, why):
    """Return the ApiError for a service whose `field` (None: all of it) is wrong."""
    return ApiError("Invalid Service", field=field, error=why)


def check_object(document, what, keys, needed, invalid):
    """Raise `invalid(field, why)` unless a JSON value is an object that can be a `what`.

    `keys` is {key: (whether a JSON value fits, what does)}; null is absent. The
    keys `needed` must be there.
    """
    if not isinstance(document, dict):
        raise invalid(None, f"a {what} is a JSON object")
    for key, value in document.items():
        if key not in keys:
            raise invalid(key, f"a {what} has no such key")
        fits, wanted = keys[key]
        if value is not None and not fits(value):
            raise invalid(key, f"its value is not {wanted}")
    for key in needed:
        if document.get(key) is None:
            raise invalid(key, f"a {what} must have it")


def encodable(text):
    """Tell whether str `text` can be an argument of a program (execve(2))."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def is_long(text, limit=ARGUMENT_LIMIT):
    """Return True if str `text` is longer than an argument of a program can be."""
    return len(os.fsencode(text)) > limit


def is_text(value):
    """Tell whether a JSON value is a string."""
    return isinstance(value, str)


def is_integer(value):
    """Tell whether a JSON value is an integer."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_count(value):
    """Tell whether a JSON value is an integer that is not below 0."""
    return is_integer(value) and value >= 0


def is_duration(value):
    """Tell whether a JSON value is a number of seconds that can be waited for."""
    return (is_integer(value) or isinstance(value, float)) and 0 <= value <= LONGEST_TIMEOUT


def is_reaction(value):
    """Tell whether a JSON value says what a lost client does to a handler."""
    return value in ("kill", "keep")


SHELLS = ("sh", "ash", "bash", "dash")       # that SHELL_LIBRARY is known to work in


class Route:
    """One row of the route table. Never changes.

    Attributes are the values of the route's JSON object (kapow(7)), None where
    it leaves them to the server; `id` is unique in the life of the server.
    """

    # Key -> (whether a JSON value fits, what does).
    KEYS = {
        "id": (is_text, "a string"),
        "method": (is_text, "a string"),
        "url_pattern": (is_text, "a string"),
        "entrypoint": (is_text, "a string"),
        "command": (is_text, "a string"),
        "index": (is_integer, "an integer"),
        "timeout": (is_duration, f"a number of seconds from 0 to {LONGEST_TIMEOUT}"),
        "max_handlers": (is_count, "an integer, 0 or more"),
        "max_queue": (is_count, "an integer, 0 or more"),
        "queue_time": (is_duration, f"a number of seconds from 0 to {LONGEST_TIMEOUT}"),
        "disconnect": (is_reaction, '"kill" or "keep"'),
        "service": (is_text, "a string"),
        "handler": (is_text, "a string"),
    }
    # Those that a route shows only when it was given them.
    OPTIONAL = ("timeout", "max_handlers", "max_queue", "queue_time", "disconnect", "service",
                "handler")

    def __init__(self, method, url_pattern, entrypoint="", command="", of_manifest=False,
                 **options):
        """`options` are those in OPTIONAL; `of_manifest` tells that its service made it.

        Raises ApiError("Invalid Route"), naming the field and the cause.
        """
        self.id = str(uuid.uuid4())
        self.method = method
        self.url_pattern = url_pattern
        self.entrypoint = entrypoint
        self.command = command
        self.timeout = options.get("timeout")               # seconds, 0 for none
        self.max_handlers = options.get("max_handlers")     # of this route, 0 for no limit
        self.max_queue = options.get("max_queue")
        self.queue_time = options.get("queue_time")         # seconds
        self.disconnect = options.get("disconnect") or "kill"
        self.service = options.get("service")               # its name, takes the entrypoint's place
        self.handler = options.get("handler")               # what the service calls this route
        self.of_manifest = of_manifest
        self._options = options
        self.label = url_pattern        # what metrics call it
        self.hint = None                # what may be wrong with it all the same, a sentence
        if not TOKEN.fullmatch(method):
            raise invalid_route("method", "a method is one word of HTTP token characters")
        if not encodable(url_pattern):
            raise invalid_route("url_pattern", "no request can have this text in its path")
        try:
            self._match = compile_pattern(url_pattern)
            self.hint = pattern_hint(url_pattern)
        except PatternError as error:
            raise invalid_route("url_pattern", str(error)) from None
        if self.service is None:
            self._check_program()
        else:
            self._check_service()

    def _check_service(self):
        if not SERVICE_NAME.fullmatch(self.service):
            raise invalid_route("service", SERVICE_NAME_RULE)
        for field in ("entrypoint", "command"):
            if getattr(self, field):
                raise invalid_route(field, "a route has a service or an entrypoint, not both")
        if not HANDLER_NAME.fullmatch(self.handler or "-"):
            raise invalid_route("handler", "a name of a handler is printable ASCII text")

    def _check_program(self):
        if self.handler is not None:
            raise invalid_route("handler", "only the route of a service names a handler")
        self.entrypoint = self.entrypoint or DEFAULT_ENTRYPOINT
        self.argv = self._make_argv()
        # Whether a shell that is to run `command` will find the words there.
        shell = [os.path.basename(word) for word in self.argv[-3:-1]]
        self.calls_from_shell = ("kapow" in self.command and len(shell) == 2
                                 and shell[0] in SHELLS and shell[1] == "-c")
        self._check_length()

    def _check_length(self):
        limit = ARGUMENT_LIMIT - (LIBRARY_ROOM if self.calls_from_shell else 0)
        if is_long(self.command, limit):
            raise invalid_route("command", f"it is longer than {limit} bytes: put it into a file")
        if any(map(is_long, self.argv)):
            raise invalid_route("entrypoint", f"a word is longer than {ARGUMENT_LIMIT} bytes")

    def _make_argv(self):
        """Return the entrypoint's arguments as a list of str, the command last."""
        for field in ("entrypoint", "command"):
            if not encodable(getattr(self, field)):
                raise invalid_route(field, "no argument of a program can hold this text")
        try:
            argv = shlex.split(self.entrypoint)
        except ValueError as error:
            raise invalid_route("entrypoint", f"its quoting is broken: {error}") from None
        if not argv:
            raise invalid_route("entrypoint", "it names no program")
        if self.command or self.entrypoint == DEFAULT_ENTRYPOINT:
            argv.append(self.command)
        return argv

    @classmethod
    def from_json(cls, document, of_manifest=False):
        """Make a Route of a decoded JSON value; `id` and `index` in it are ignored."""
        check_object(document, "route", cls.KEYS, ("method", "url_pattern"), invalid_route)
        options = {key: document[key] for key in cls.OPTIONAL if document.get(key) is not None}
        return cls(document["method"], document["url_pattern"], document.get("entrypoint") or "",
                   document.get("command") or "", of_manifest, **options)

    def to_json(self, index):
        """Return the route at place `index` of its table as a dict for JSON."""
        return {"id": self.id, "method": self.method, "url_pattern": self.url_pattern,
                "entrypoint": self.entrypoint, "command": self.command, "index": index,
                **self._options}

    @property
    def way(self):
        """The name of what answers: "services" or "launcher"."""
        return "launcher" if self.service is None else "services"

    def is_like(self, other):
        """Return True if the Route `other` has the same method and pattern."""
        return self.method == other.method and self.url_pattern == other.url_pattern

    def match(self, path):
        """Return {name: text} when the decoded `path` fits, else None."""
        return self._match(path)


def routes_from_json(document):
    """Make a list of Route of a decoded JSON array, or raise ApiError for its first bad item."""
    if not isinstance(document, list):
        raise invalid_route(None, "a route table is a JSON array")
    routes = []
    for place, item in enumerate(document):
        try:
            routes.append(Route.from_json(item))
        except ApiError as error:
            error.details["item"] = place
            raise
    return routes


class RouteTable:
    """The routes in their order; the first that fits wins.

    Safe from many threads: a change makes a new tuple, a reader keeps the one
    it has.
    """

    def __init__(self, routes=()):
        self._lock = threading.Lock()
        self._routes = tuple(routes)

    def snapshot(self):
        """Return the routes as a tuple that never changes."""
        return self._routes

    def append(self, route):
        """Put `route` last; return its index."""
        with self._lock:
            self._routes += (route,)
            return len(self._routes) - 1

    def insert(self, route, index):
        """Put `route` at `index`, moving what follows; return where it came to stand."""
        with self._lock:
            index = min(max(index, 0), len(self._routes))
            self._routes = self._routes[:index] + (route,) + self._routes[index:]
            return index

    def put(self, route):
        """Put `route` in place of the first with its method and pattern, or last.

        Return (index, whether there was one).
        """
        with self._lock:
            for index, other in enumerate(self._routes):
                if other.is_like(route):
                    self._routes = (*self._routes[:index], route, *self._routes[index + 1:])
                    return index, True
            self._routes += (route,)
            return len(self._routes) - 1, False

    def hidden_by(self, route):
        """Return the first Route before `route` with its method and pattern, None without one."""
        for other in self._routes:
            if other is route:
                break
            if other.is_like(route):
                return other
        return None

    def replace(self, routes):
        """Take the Routes in `routes` in place of all there are, in one step."""
        with self._lock:
            self._routes = tuple(routes)

    def exchange(self, service, routes):
        """Take `routes` in place of those that the manifest of `service`, its name, had put here.

        In one step. Routes that only look like those of the manifest, from a list that
        was put back, count as such. Where nothing but the ids would change, nothing is done.
        """
        def words(route):
            """Return what tells one route of a service from another."""
            return route.method, route.url_pattern, route.handler

        new = list(map(words, routes))
        with self._lock:
            old = [route for route in self._routes if route.service == service
                   and (route.of_manifest or words(route) in new)]
            if list(map(words, old)) != new or not all(route.of_manifest for route in old):
                place = self._routes.index(old[0]) if old else len(self._routes)
                before, behind = self._routes[:place], self._routes[place:]
                self._routes = (*before, *routes, *(route for route in behind if route not in old))

    def find(self, route_id):
        """Return (index, Route); raises ApiError("Route Not Found")."""
        for index, route in enumerate(self._routes):
            if route.id == route_id:
                return index, route
        raise ApiError("Route Not Found")

    def remove(self, route_id):
        """Take the route away; raises ApiError("Route Not Found")."""
        with self._lock:
            index, _ = self.find(route_id)
            self._routes = self._routes[:index] + self._routes[index + 1:]

    def match(self, method, path):
        """Return (Route, {name: text}) for a request.

        A HEAD without a route of its own gets that of GET. Raises ApiError:
        404, or 405 with Allow; 204 with Allow for OPTIONS without a route.
        """
        allowed, for_get = [], None
        for route in self._routes:
            matches = {} if path == "*" else route.match(path)
            if matches is None:
                continue
            if route.method == method and path != "*":
                return route, matches
            if route.method == "GET" and for_get is None:
                for_get = route, matches
            allowed.append(route.method)
        if method == "HEAD" and for_get:
            return for_get
        if not allowed:
            raise ApiError(404)
        if "GET" in allowed:
            allowed.append("HEAD")
        allow = ", ".join(dict.fromkeys(allowed + ["OPTIONS"]))
        raise ApiError(204 if method == "OPTIONS" else 405, [("Allow", allow)])


# ---------------------------------------------------------------------------
# 4. HTTP messages
# ---------------------------------------------------------------------------

# RFC 9112, read strictly: where two parsers could disagree about the end of a
# message, it is refused. A target may hold raw bytes above 127, which browsers
# and curl send for text beyond ASCII. Of a response alone some mistakes are
# forgiven ("lenient"): it comes from a program that the server itself started,
# and what goes on to the client is what was understood, written again.
FIELD_NAME = re.compile(TOKEN.pattern.encode())
REQUEST_LINE = re.compile(
    b"(" + FIELD_NAME.pattern + rb") ([!\"$-~\x80-\xff]+) HTTP/(\d)\.(\d)")
FIELD_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
BARE_NEWLINE = re.compile(rb"(?<!\r)\n")
LINE_END = re.compile(rb"\r?\n")
EMPTY_LINE = re.compile(rb"\n\r?\n")
HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z\-._~%!$&'()*+,;=\x80-\xff]*)(?::\d*)?")
ABSOLUTE_FORM = re.compile(rb"(?i:https?)://([^/?]+)([^?]*)")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,32})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")


def find_head(buffer, line_limit=LINE_LIMIT):
    """Return where the head at the front of `buffer` ends, or None.

    A request's. The end is behind its empty line; None means that more must
    come. Raises ProtocolError as soon as what is there can become no head.
    """
    end = buffer.find(b"\r\n\r\n")
    line = buffer.find(b"\r\n", 0, line_limit + 2)
    if line < 0 and len(buffer) > line_limit + 1:
        raise ProtocolError(414, "the first line is too long")
    if end < 0:
        if buffer and buffer != b"\r" and not FIELD_NAME.match(buffer):
            raise ProtocolError(400, "this is not HTTP")
        if BARE_NEWLINE.search(buffer):
            raise ProtocolError(400, "a line ends without a carriage return")
    # Without an end, up to three bytes of it may be here.
    if (len(buffer) - 3 if end < 0 else end) > max(line, 0) + 2 + FIELDS_LIMIT:
        raise ProtocolError(431, "the header is too large")
    return None if end < 0 else end + 4


def take(buffer, size):
    """Take up to `size` bytes from the front of the bytearray `buffer`."""
    if len(buffer) <= size:
        data = bytes(buffer)
        buffer.clear()
    else:
        with memoryview(buffer) as view:
            data = bytes(view[:size])
        del buffer[:size]
    return data


def take_response_head(buffer):
    """Take a response's head from the front of the bytearray `buffer`; None until it is whole.

    Return it without its empty line. Lines may end with LF alone (RFC 9112
    section 2.2). Raises ProtocolError as find_head.
    """
    found = EMPTY_LINE.search(buffer)
    line = buffer.find(b"\n", 0, LINE_LIMIT + 2)
    if line < 0 and len(buffer) > LINE_LIMIT + 1:
        raise ProtocolError(414, "the first line is too long")
    if found is None and buffer and not FIELD_NAME.match(buffer):
        raise ProtocolError(400, "this is not HTTP")
    if (len(buffer) if found is None else found.start()) > max(line, 0) + 2 + FIELDS_LIMIT:
        raise ProtocolError(431, "the header is too large")
    if found is None:
        return None
    return take(buffer, found.end())[:found.start()].removesuffix(b"\r")


def parse_fields(lines, lenient=False):
    """Parse header or trailer lines (bytes) into a list of (name, value) bytes.

    With `lenient` there may be any number of lines, and blanks before a colon,
    which are removed (RFC 9112 section 5.1).
    """
    if len(lines) > FIELD_COUNT_LIMIT and not lenient:
        raise ProtocolError(431, "there are too many header lines")
    fields = []
    for line in lines:
        name, colon, value = line.partition(b":")
        if lenient:
            name = name.rstrip(b" \t")
        if not colon or not FIELD_NAME.fullmatch(name) or not FIELD_VALUE.fullmatch(value):
            raise ProtocolError(400, "a header line is malformed")
        fields.append((name, value.strip(b" \t")))
    return fields


def list_items(values):
    """Split header values (bytes) at their commas."""
    return [item.strip(b" \t") for value in values for item in value.split(b",")]


def take_line(buffer, limit, status, lenient=False):
    """Take one CRLF line from the front of the bytearray `buffer`; None until it is whole.

    Raises ProtocolError: `status` for a line of more than `limit` bytes, 400
    for one without its carriage return unless that is to be `lenient`.
    """
    end = buffer.find(b"\n", 0, max(limit, 0) + 2)
    if end < 0:
        if len(buffer) > limit + 1:
            raise ProtocolError(status, "a line of the body's framing is too long")
        return None
    line = bytes(buffer[:end])
    if not line.endswith(b"\r") and not lenient:
        raise ProtocolError(400, "a line of the body's framing ends without a carriage return")
    del buffer[:end + 1]
    return line.removesuffix(b"\r")


class LengthFraming:
    """A body whose length was announced."""

    def __init__(self, length):
        self._left = length
        self.announced = length     # bytes that are known to come, or have

    @property
    def done(self):
        """Whether the whole body was decoded."""
        return self._left == 0

    def decode(self, buffer):
        """Take body bytes from the front of the bytearray `buffer` and return them."""
        data = take(buffer, self._left)
        self._left -= len(data)
        return data


class ChunkedFraming:
    """A body in chunks (RFC 9112 section 7.1). Trailers are checked and dropped.

    A `lenient` one forgives LF for CRLF and blanks after a chunk's size.
    """

    def __init__(self, lenient=False):
        self._lenient = lenient
        self._step = self._size     # what the next bytes are
        self._left = 0              # of the current chunk, bytes
        self._trailer = []          # lines of it so far
        self._trailer_size = 0
        self.announced = 0          # as in LengthFraming: the sizes of the chunks so far
        self.done = False

    def decode(self, buffer):
        """As LengthFraming.decode. Raises ProtocolError."""
        pieces = []
        while not self.done and self._step(buffer, pieces):
            pass
        return b"".join(pieces)

    # The steps. Each returns False when it needs more bytes than there are.

    def _size(self, buffer, _pieces):
        line = take_line(buffer, CHUNK_LINE_LIMIT, 400, self._lenient)
        if line is None:
            return False
        found = CHUNK_SIZE.fullmatch(line.rstrip(b" \t") if self._lenient else line)
        if found is None:
            raise ProtocolError(400, "a chunk size is malformed")
        self._left = int(found.group(1), 16)
        self.announced += self._left
        self._step = self._data if self._left else self._trailer_line
        return True

    def _data(self, buffer, pieces):
        data = take(buffer, self._left)
        self._left -= len(data)
        pieces.append(data)
        if self._left == 0:
            self._step = self._data_end
        return bool(data)

    def _data_end(self, buffer, _pieces):
        end = b"\n" if self._lenient and buffer.startswith(b"\n") else b"\r\n"
        if not end.startswith(bytes(buffer[:len(end)])):
            raise ProtocolError(400, "a chunk is longer than it said")
        if len(buffer) < len(end):
            return False
        del buffer[:len(end)]
        self._step = self._size
        return True

    def _trailer_line(self, buffer, _pieces):
        line = take_line(buffer, FIELDS_LIMIT - self._trailer_size, 431, self._lenient)
        if line is None:
            return False
        if line:
            self._trailer.append(line)
            self._trailer_size += len(line) + 2
            if self._lenient or len(self._trailer) <= FIELD_COUNT_LIMIT:
                return True
        parse_fields(self._trailer, self._lenient)
        self.done = True
        return True


class CloseFraming:
    """The body of a response that ends where its connection does (RFC 9112 section 6.3)."""

    done = False                    # set by BodyReader at the end of input
    announced = 0

    def decode(self, buffer):
        """As LengthFraming.decode."""
        return take(buffer, len(buffer))


def format_request(method, target, fields):
    """Return the bytes of a request head, of bytes; `fields` holds (name, value)."""
    lines = [b"%b %b HTTP/1.1\r\n" % (method, target)]
    lines += [b"%b: %b\r\n" % field for field in fields]
    return b"".join(lines) + b"\r\n"


class MessageHead:
    """The header of a request or a response, checked.

    `fields` is the list of (name, value) bytes in order of arrival.
    """

    lenient = False                 # as parse_fields and ChunkedFraming take it

    def __init__(self, lines):
        """Parse `lines` (bytes). Raises ProtocolError."""
        self.fields = parse_fields(lines, self.lenient)
        self._by_name = {}
        for name, value in self.fields:
            self._by_name.setdefault(name.lower(), []).append(value)
        # What they say of the connection (RFC 9110 section 7.6.1), in lower case.
        self.connection_options = self.options(b"connection")

    def values(self, name):
        """Return the values of the header `name` (bytes, any case), in order."""
        return self._by_name.get(name.lower(), ())

    def first(self, name, default=b""):
        """Return the first value of the header `name`, `default` when there is none."""
        return next(iter(self.values(name)), default)

    def without(self, names):
        """Return the fields without those of the `names`, a set of lower-case bytes."""
        return [field for field in self.fields if field[0].lower() not in names]

    def options(self, name):
        """Return the words of a list in the header `name` (lower case), as a set, in lower case."""
        values = self._by_name.get(name)
        return {item.lower() for item in list_items(values)} if values else frozenset()

    def _parse_length(self, default):
        """Return the body's length, None when chunked, `default` if nothing is said (RFC 9112)."""
        codings = [item.lower() for item in list_items(self.values(b"transfer-encoding"))]
        lengths = set(list_items(self.values(b"content-length")))
        if codings:
            if lengths:
                raise ProtocolError(400, "Content-Length and Transfer-Encoding exclude each other")
            self._check_codings(codings)
            return None
        if not lengths:
            return default
        if len(lengths) > 1 or not re.fullmatch(rb"[0-9]{1,40}", min(lengths)):
            raise ProtocolError(400, "the Content-Length is malformed")
        return int(min(lengths))

    @staticmethod
    def _check_codings(codings):
        """Raise ProtocolError unless the body is chunked and nothing else (RFC 9112 section 6.3).

        Empty items are refused: not every parser passes over them.
        """
        if codings[-1] != b"chunked" or b"chunked" in codings[:-1] or b"" in codings:
            raise ProtocolError(400, "the transfer codings do not end with chunked, once")
        if len(codings) > 1:
            raise ProtocolError(501, "a transfer coding is not known")


class RequestHead(MessageHead):
    """The request line and header of one request, checked.

    Attributes: `method` str; `target` bytes as sent, and of it `raw_path` and
    `query`, bytes; `path` str, decoded (surrogateescape for what is not UTF-8);
    `version` (major, minor); `host` bytes; `length` int, or None for a chunked
    body; `keep_alive` and `expects_continue` bool.
    """

    def __init__(self, data):
        """Parse `data`, a head without its empty line. Raises ProtocolError."""
        first, *lines = bytes(data).split(b"\r\n")
        found = REQUEST_LINE.fullmatch(first)
        if found is None:
            raise ProtocolError(400, "the request line is malformed")
        method, self.target, major, minor = found.groups()
        self.method = method.decode("ascii")
        self.version = int(major), int(minor)
        if self.version[0] != 1:
            raise ProtocolError(505, "the version of HTTP is not 1.x")
        super().__init__(lines)
        self.host = self._parse_host()
        self._parse_target()
        self.length = self._parse_length(0)
        self._parse_connection()

    def framing(self):
        """Return what decodes the body."""
        return ChunkedFraming() if self.length is None else LengthFraming(self.length)

    def redirected(self, target):
        """Return the RequestHead of a GET for `target` (bytes) instead. Raises ProtocolError."""
        fields = [(b"Host", self.host), *self.without((
            b"host", b"content-length", b"content-type", b"transfer-encoding", b"expect"))]
        head = format_request(b"HEAD" if self.method == "HEAD" else b"GET", target, fields)
        other = RequestHead(head[:-4])
        other.version = self.version
        return other

    def _parse_host(self):
        hosts = self.values(b"host")
        if len(hosts) > 1 or (not hosts and self.version >= (1, 1)):
            raise ProtocolError(400, "there must be one Host header")
        if hosts and not HOST.fullmatch(hosts[0]):
            raise ProtocolError(400, "the Host header is malformed")
        return hosts[0] if hosts else b""

    def _parse_target(self):
        """Split the target (RFC 9112 section 3.2) into path and query."""
        path, _, self.query = self.target.partition(b"?")
        if not path.startswith(b"/"):
            path = self._parse_other_form(path)
        self.raw_path = path
        self.path = urllib.parse.unquote_to_bytes(path).decode("utf-8", "surrogateescape")

    def _parse_other_form(self, path):
        """Return the path of a target in absolute-form or asterisk-form."""
        absolute = ABSOLUTE_FORM.fullmatch(path)
        if absolute:
            host = absolute.group(1)
            if not HOST.fullmatch(host) or host.startswith(b":"):
                raise ProtocolError(400, "the host in the request target is malformed")
            self._take_host(host)
            return absolute.group(2) or b"/"
        if (self.method, path) != ("OPTIONS", b"*"):
            raise ProtocolError(400, "the request target is malformed")
        return path

    def _take_host(self, host):
        """Replace the Host header by that of the target (RFC 9112 section 3.2.2)."""
        fields = self.fields if self.values(b"host") else [(b"Host", host), *self.fields]
        self.fields = [(name, host if name.lower() == b"host" else value) for name, value in fields]
        self._by_name[b"host"] = [host]
        self.host = host

    def _parse_connection(self):
        options = self.connection_options
        self.keep_alive = b"close" not in options if self.version >= (1, 1) else (
            b"keep-alive" in options and b"close" not in options and self.length is not None)
        self.expects_continue = (self.version >= (1, 1)
                                 and b"100-continue" in self.options(b"expect"))


def join_pieces(pieces, limit, error):
    """Return the bytes of an iterator as one; raises `error` when there are over `limit`."""
    kept, size = [], 0
    for data in pieces:
        kept.append(data)
        size += len(data)
        if size > limit:
            raise error
    return b"".join(kept)


STATUS_LINE = re.compile(rb"HTTP/1\.(\d) ([1-9]\d\d)(?: ([\t\x20-\x7e\x80-\xff]*))?")


class ResponseHead(MessageHead):
    """The status line and header of one response, checked.

    Attributes: `status` int; `reason` str; `version` (major, minor); `length`
    of the body, int, None when nothing tells it before its end; `keep_alive` whether
    the connection can be used again, bool.
    """

    lenient = True

    def __init__(self, data, method):
        """Parse `data`, a head without its empty line, that answers a `method` request.

        Raises ProtocolError.
        """
        first, *lines = LINE_END.split(data)
        found = STATUS_LINE.fullmatch(first)
        if found is None:
            raise ProtocolError(400, "the status line is malformed")
        minor, status, reason = found.groups()
        super().__init__(lines)
        self.version = 1, int(minor)
        self.status = int(status)
        self.reason = (reason or b"").decode("latin-1")
        length = self._parse_length(-1)
        self._bodiless = method == "HEAD" or self.status < 200 or self.status in (204, 304)
        self._chunked = length is None
        self.length = length if length is not None and length >= 0 else None
        options = self.connection_options
        self.keep_alive = (b"close" not in options
                           and (self.version >= (1, 1) or b"keep-alive" in options)
                           and not isinstance(self.framing(), CloseFraming))

    def framing(self):
        """Return what decodes the body."""
        if self._bodiless:
            return LengthFraming(0)
        if self._chunked:
            return ChunkedFraming(self.lenient)
        return CloseFraming() if self.length is None else LengthFraming(self.length)


class BodyReader:
    """Reads one body off a connection, once.

    `head` is its message's; `buffer` is the connection's bytearray, at whose
    front the body begins; `receive()` returns more bytes for it, b"" at the end
    of input; `limit` is the largest body in bytes, or None; `on_wait`, when
    given, is called before the first `receive()`. `receive_now()` is as `receive()`,
    but returns None where that would wait. Who sends less than `min_rate` bytes a
    second is given up.
    """

    def __init__(self, head, buffer, receive, limit=None, on_wait=None,
                 receive_now=lambda: None, min_rate=0):
        """Raises ProtocolError 413 for a length over the limit."""
        if limit is not None and (head.length or 0) > limit:
            raise ProtocolError(413, "the body is too large")
        self.length = head.length
        self.waited = False         # whether the client was made to send (more of) it
        self._framing = head.framing()
        self._buffer = buffer
        self._receive = receive
        self._receive_now = receive_now
        self._limit = limit
        self._on_wait = on_wait
        self._min_rate = min_rate
        self._seconds = 0           # that were waited since the rate was looked at
        self._counted = 0           # bytes that came meanwhile
        self.received = 0           # bytes decoded so far

    @property
    def done(self):
        """Whether the last byte of the body was read."""
        return self._framing.done

    @property
    def arrived(self):
        """Whether the last byte is known to be here, read or not."""
        here = self.received + len(self._buffer)
        return self.done or self.length is not None and here >= self.length

    @property
    def is_held_back(self):
        """Whether the client waits to be told to send the body, and was not."""
        return self._on_wait is not None and not self.waited

    def read(self):
        """Return the next bytes of the body, b"" at its end. Raises ProtocolError, OSError."""
        return self._read(self._wait_for_more)

    def read_now(self):
        """As read(), but return None where that would wait."""
        return self._read(self._receive_now)

    def _read(self, receive):
        while not self._framing.done:
            data = self.read_buffered()
            if data:
                return data
            if not self._framing.done:
                data = receive()
                if data is None:
                    return None
                self._add(data)
        return b""

    def read_buffered(self):
        """Return the bytes of the body that are here, b"" for none. Raises ProtocolError."""
        data = self._framing.decode(self._buffer)
        self.received += len(data)
        if self._limit is not None and max(self.received, self._framing.announced) > self._limit:
            raise ProtocolError(413, "the body is too large")
        return data

    def ask(self):
        """Have a client that waits for it told to send its body; return whether that was done."""
        asked = self.is_held_back
        self.waited = True
        if asked:
            self._on_wait()
        return asked

    def _wait_for_more(self):
        self.ask()
        begin = time.monotonic()
        try:
            data = self._receive()
        except TimeoutError:
            raise ProtocolError(408, "the body did not come in time") from None
        if self._min_rate:
            self._check_rate(time.monotonic() - begin, len(data))
        return data

    def _check_rate(self, seconds, size):
        """Note how long `size` bytes were waited for. Raises ProtocolError 408 if too long."""
        self._seconds += seconds
        self._counted += size
        if self._seconds < RATE_TIME:
            return
        if self._counted < self._min_rate * self._seconds:
            raise ProtocolError(408, "the body comes too slowly")
        self._seconds = self._counted = 0

    def _add(self, data):
        self._buffer += data
        if not data:
            if not isinstance(self._framing, CloseFraming):
                raise PeerLeft()
            self._framing.done = True

    def read_all(self, limit):
        """Return the whole body; raises ApiError 413 when it is over `limit` bytes."""
        return join_pieces(iter(self.read, b""), limit, ApiError(413))

    def drain(self):
        """Read the rest and drop it; return False when it is broken or not worth the wait."""
        dropped, deadline = 0, time.monotonic() + DRAIN_TIME
        try:
            for data in iter(self.read, b""):
                dropped += len(data)
                if dropped > DRAIN_LIMIT or time.monotonic() > deadline:
                    return False
        except ProtocolError:
            return False
        return True


class Turn(threading.local):
    """The right to run, which one thread at a time has of those that answer users.

    The interpreter lets one thread run anyway, and hands itself over at every
    system call; with many threads that want it these spend more time on waking
    each other than on their requests. Those that wait here cost nothing: with 8
    clients of a service half as many requests again are answered (test/bench).

    It guards no data and is no lock in the sense of the rule above: it is taken by
    threads that hold none, and left before whatever may wait: a Condition, the file
    of a Spool, a Connection and the log do that themselves. Who has left it need
    not take it again; the next request does.
    """

    _lock = threading.Lock()
    _held = False               # by this thread

    def take(self):
        """Wait for it, unless this thread has it."""
        if not self._held:
            self._lock.acquire()
            self._held = True

    def leave(self):
        """Let others have it; return whether this thread had it."""
        held = self._held
        if held:
            self._held = False
            self._lock.release()
        return held

    @contextlib.contextmanager
    def left(self):
        """Let others have it for the length of a with statement, if this thread has it."""
        held = self.leave()
        try:
            yield
        finally:
            if held:
                self.take()


TURN = Turn()


class Condition(threading.Condition):
    """A condition whose waits leave the Turn. The only one here.

    They do not take it again: they hold a lock, and who has the Turn may want that.
    """

    def wait(self, timeout=None):
        """As threading.Condition's, which wait_for() calls if there is something to wait for."""
        TURN.leave()
        return super().wait(timeout)


@contextlib.contextmanager
def closed_on_error(file):
    """Give `file`, and close it if the with statement does not come to its end."""
    try:
        yield file
    except BaseException:
        file.close()
        raise


def write_at(file, data, offset):
    """Write all of `data` into an unbuffered file. Raises OSError."""
    view = memoryview(data)
    while view:
        written = os.pwrite(file.fileno(), view, offset)
        view, offset = view[written:], offset + written


def open_again(fd):
    """Return another descriptor of a file, for reading it from its first byte. Raises OSError."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:               # another system; nothing moves the place of this one
        return os.dup(fd)


class SpoolSpace:
    """What all spools together may take of the disk. Safe from many threads."""

    def __init__(self, limit=None):
        """`limit` is in bytes, None for no limit."""
        self._limit = limit
        self._lock = threading.Lock()
        self._taken = 0                 # bytes

    def take(self, size):
        """Count bytes that will be written. Raises OSError (ENOSPC) when they are too many."""
        with self._lock:
            if self._limit is not None and self._taken + size > self._limit:
                raise OSError(errno.ENOSPC, "the spools take all that --max-spool lets them have")
            self._taken += size

    def give_back(self, size):
        """Count bytes that were removed."""
        with self._lock:
            self._taken -= size

    def has_room(self, length):
        """Return True if a body of `length` bytes, None for any, may begin: it stays in memory or fits."""
        if self._limit is None or length is not None and length <= MEMORY_LIMIT:
            return True
        return self._taken + (length or 1) <= self._limit


class Spool:
    """Bytes in memory up to a limit, in an unlinked temporary file beyond.

    Not safe from many threads: its owner has the lock. Nothing is buffered, so
    only append() and to_file() meet a full disk.
    """

    def __init__(self, limit=MEMORY_LIMIT, space=None):
        """`space` is the SpoolSpace that its file counts for, None for no limit."""
        self._limit = limit
        self._space = SpoolSpace() if space is None else space
        self._memory = bytearray()
        self._file = None           # takes the place of _memory
        self.length = 0

    def append(self, data):
        """Add bytes at the end. Raises OSError when there is no room."""
        if self._file is None and self.length + len(data) > self._limit:
            self.to_file()
        if self._file is None:
            self._memory += data
        else:
            self._write(self._file, data, self.length)
        self.length += len(data)

    def _write(self, file, data, offset):
        TURN.leave()
        self._space.take(len(data))
        try:
            write_at(file, data, offset)
        except OSError:
            self._space.give_back(len(data))
            raise

    def to_file(self):
        """Keep the bytes in the file from now on; return its descriptor. Raises OSError."""
        if self._file is None:
            TURN.leave()
            with closed_on_error(tempfile.TemporaryFile(buffering=0)) as file:
                self._write(file, self._memory, 0)      # else they stay readable in memory
            self._file, self._memory = file, bytearray()
        return self._file.fileno()

    def read_at(self, offset, size):
        """Return up to `size` bytes from `offset`, b"" at the end."""
        size = max(min(size, self.length - offset), 0)
        if self._file is None:
            return bytes(self._memory[offset:offset + size])
        TURN.leave()
        return os.pread(self._file.fileno(), size, offset)

    def close(self):
        """Forget everything."""
        if self._file is not None:
            self._file.close()
            self._space.give_back(self.length)
        self._file = None
        self._memory = bytearray()
        self.length = 0


class RequestBody:
    """The body of a user request, for as many readers as want it.

    It is pulled from the client when a reader wants more than there is, by
    that reader's thread, and kept in a spool.
    """

    def __init__(self, reader, on_failure=lambda error: None, on_arrival=lambda: None, hang_ups=(),
                 end_input=None, space=None):
        """`reader` is the BodyReader, `space` the SpoolSpace, None for no limit.

        `on_failure(ProtocolError)` and `on_arrival()` are called once, by the
        thread that met the failure, or read the last byte from the client. Each of
        `hang_ups` must end a read that waits for the client, the gentlest first,
        when it is answered; `end_input()` before that.
        """
        self._reader = reader
        self._on_failure = on_failure
        self._on_arrival = on_arrival
        self._hang_ups = hang_ups
        self._end_input = end_input
        self._condition = Condition()         # guards what follows
        self._spool = Spool(space=space)
        self._pulling = False       # a thread is reading from the client
        self._failure = None        # the ProtocolError of every later read
        self._complete = reader.done
        self._fetching = False      # a thread of its own reads all of it
        self.length = reader.length

    @property
    def arrived(self):
        """As BodyReader.arrived."""
        return self._reader.arrived

    def is_coming(self):
        """Return True if the client is still sending it, or about to without being asked.

        So it is after a failure, too, which ends the handler.
        """
        return not (self.arrived or self._reader.is_held_back)

    def ask(self):
        """As BodyReader.ask, unless all of it is here."""
        return not self.arrived and self._reader.ask()

    def interrupt(self):
        """End a read that waits for the client, and those that come."""
        with self._condition:
            waiting = self._pulling and self._failure is None
            self._failure = self._failure or ProtocolError(400, "the handler has ended")
            self._condition.notify_all()
        if waiting and self._end_input is not None:
            self._end_input()

    def read_at(self, offset, size=PIECE):
        """Return 1 to `size` bytes from `offset`, b"" at the end.

        Waits for the client. Raises ProtocolError when the body is broken, cut
        short, too large, or its handler has ended.
        """
        while True:
            with self._condition:
                self._condition.wait_for(lambda: not self._pulling or self._settled(offset))
                if offset < self._spool.length:
                    return self._spool.read_at(offset, size)
                if self._failure is not None:
                    raise self._failure
                if self._complete:
                    return b""
                self._pulling = True
            self._pull(self._reader.read)

    def take_in(self):
        """Read what has come of the body, without waiting for more."""
        more = True
        while more and not self.arrived:
            with self._condition:
                if self._pulling or self._complete or self._failure is not None:
                    return
                self._pulling = True
            more = self._pull(self._reader.read_now)

    def fetch(self):
        """Have all of the body read from the client from now on, by a thread of its own.

        For a client that takes no answer before it has sent everything. Return
        False if there can be no thread.
        """
        with self._condition:
            if self._fetching or self._complete or self._failure is not None:
                return True
            self._fetching = True
        try:
            threading.Thread(target=self._fetch, name="fetch", daemon=True).start()
        except RuntimeError:                # there are too many of them
            with self._condition:
                self._fetching = False
            return False
        return True

    def _fetch(self):
        while True:
            with self._condition:
                self._condition.wait_for(lambda: not self._pulling)
                if self._complete or self._failure is not None:
                    return
                self._pulling = True
            self._pull(self._reader.read)

    def _settled(self, offset):
        return offset < self._spool.length or self._complete or self._failure is not None

    def _pull(self, read):
        """Read once from the client; return whether something came.

        The caller has set _pulling, so it is alone; `read` is a method of the BodyReader.
        """
        try:
            data, failure = self._read_from_client(read)
            with self._condition:
                if self._failure is None:
                    failure = failure or self._keep(data or b"")
                    self._failure = failure
                self._condition.notify_all()
            if failure is not None:
                self._on_failure(failure)       # before close() may return
            elif self.arrived:
                self._on_arrival()
        finally:
            with self._condition:
                self._pulling = False
                self._condition.notify_all()
        return data is not None

    def _read_from_client(self, read):
        """Return (data, None), or (b"", ProtocolError)."""
        try:
            return read(), None
        except ProtocolError as error:
            return b"", error
        except OSError:
            return b"", PeerLeft()

    def _keep(self, data):
        """Put bytes into the spool; return the ProtocolError when that is not possible."""
        try:
            self._spool.append(data)
        except OSError as error:
            return ProtocolError(500, f"cannot keep the body of the request: {error.strerror}")
        self._complete = self._reader.done
        return None

    def open_file(self):
        """Wait for the whole body; return (descriptor of a file with it, its length in bytes).

        The file is at its first byte, has no name, and is for the caller to close.
        Raises as read_at, and OSError.
        """
        for _ in self.pieces():
            pass
        with self._condition:
            if self._failure is not None:
                raise self._failure
            return open_again(self._spool.to_file()), self._spool.length

    def pieces(self):
        """Yield the body from its first byte. Raises as read_at."""
        offset = 0
        while data := self.read_at(offset):
            yield data
            offset += len(data)

    def pass_on(self):
        """Yield the body as it comes, for its only reader: none of it is kept.

        Raises as read_at.
        """
        offset = 0
        while data := self.read_at(offset, MEMORY_LIMIT):
            offset += len(data)
            with self._condition:
                if offset == self._spool.length:    # else more has come meanwhile
                    self._spool.close()
                    offset = 0
            yield data

    def close(self):
        """End every read, now and later.

        Where a thread is reading the client, call the hang_ups, one after
        another, until it has ended that.
        """
        with self._condition:
            self._failure = self._failure or ProtocolError(400, "the handler has ended")
            self._spool.close()
            self._condition.notify_all()
        for hang_up in self._hang_ups:
            with self._condition:
                if not self._pulling:
                    return
            hang_up()
            with self._condition:
                self._condition.wait_for(lambda: not self._pulling, LINGER_TIME)
        with self._condition:
            self._condition.wait_for(lambda: not self._pulling)


class Scanner:
    """Finds byte strings in a body that comes in pieces, in constant memory.

    `read_at(offset)` is as RequestBody.read_at. Offsets must not go back
    further than the last one asked for.
    """

    def __init__(self, read_at):
        self._read_at = read_at
        self._base = 0              # offset in the body of _window[0]
        self._window = b""

    def _more(self):
        data = self._read_at(self.end)
        self._window += data
        return bool(data)

    def find(self, what, start, limit=None):
        """Return the offset of `what` at or behind `start`; -1 when it does not come.

        With a `limit` it may begin so many bytes behind `start` at the most,
        however the bytes come, and what lies between can still be sliced.
        """
        stop = None if limit is None else start + limit + len(what)
        while True:
            last = None if stop is None else stop - self._base
            place = self._window.find(what, max(start - self._base, 0), last)
            if place >= 0:
                return self._base + place
            start = max(start, self.end - len(what) + 1)
            if stop is None:
                self._forget(start)
            elif self.end >= stop:
                return -1
            if not self._more():
                return -1

    @property
    def end(self):
        """The offset behind the last byte read so far."""
        return self._base + len(self._window)

    def _forget(self, offset):
        """Drop what lies before `offset` when that is worth a copy."""
        if offset - self._base >= PIECE:
            self._window = self._window[offset - self._base:]
            self._base = offset

    def slice(self, start, end):
        """Return the bytes from `start` to `end`, fewer where the body ends."""
        self._forget(start)
        while self.end < end and self._more():
            pass
        return self._window[start - self._base:end - self._base]


def unquote_form(data):
    """Decode bytes of application/x-www-form-urlencoded."""
    return urllib.parse.unquote_to_bytes(data.replace(b"+", b" "))


def unquote_pieces(pieces):
    """Decode form bytes that come in pieces, an escape cut in two included; yield no empty one."""
    left = b""
    for data in pieces:
        data = left + data
        cut = data.rfind(b"%", max(len(data) - 2, 0))
        data, left = (data, b"") if cut < 0 else (data[:cut], data[cut:])
        if data:
            yield unquote_form(data)
    if left:
        yield unquote_form(left)


class FormField:
    """One field or file of a form: a stretch of the body.

    `name` bytes; `filename` bytes, None for what is no file; `encoded` tells
    that '+' and percent-escapes stand in the stretch.
    """

    def __init__(self, body, name, start, end, filename=None, encoded=False):
        self.name = name
        self.filename = filename
        self._body, self._start, self._end = body, start, end
        self._encoded = encoded

    def pieces(self):
        """Yield the value's bytes. Raises as RequestBody.read_at."""
        raw = self._raw()
        return unquote_pieces(raw) if self._encoded else raw

    def _raw(self):
        offset = self._start
        while offset < self._end:
            data = self._body.read_at(offset, min(PIECE, self._end - offset))
            yield data
            offset += len(data)


def parse_query(query):
    """Parse a query string (bytes) into a list of (name, value) bytes."""
    pairs = []
    for item in query.split(b"&"):
        if item:
            name, _, value = item.partition(b"=")
            pairs.append((unquote_form(name), unquote_form(value)))
    return pairs


def parse_urlencoded(body):
    """Yield the FormFields of an urlencoded RequestBody, None for an empty item.

    Raises ApiError 413 for a name of more than PIECE bytes.
    """
    scanner = Scanner(body.read_at)
    start, end = 0, 0
    while end >= 0:
        end = near = scanner.find(b"&", start, PIECE)
        item = scanner.slice(start, min(near, start + PIECE) if near >= 0 else start + PIECE)
        name, equals, _ = item.partition(b"=")
        if not equals and len(item) == PIECE:
            raise ApiError(413)
        if near < 0:
            end = scanner.find(b"&", start + len(item))
        value = start + len(name) + len(equals)
        stop = end if end >= 0 else scanner.end
        yield FormField(body, unquote_form(name), value, stop, encoded=True) if item else None
        start = end + 1


# One parameter, from where the last one ended: anchored there, so that no header
# can make the search start over and over. Of the ways to read a value the first that
# fits is meant: what stands between quotes; the same with a backslash at its end, which
# browsers do not escape; between quotes with something behind them, which does not count;
# and without quotes.
PARAMETER = re.compile(rb"""[ \t]*([^\s;="]+)[ \t]*=[ \t]*(?:
    "((?:[^"\\]|\\.)*)"[ \t]*(?=;|\Z) | "((?:[^"\\]|\\.)*?\\)"[ \t]*(?=;|\Z)
    | "((?:[^"\\]|\\.)*)"[^;]* | ([^;]*))(?:;|\Z)""", re.DOTALL | re.VERBOSE)


def parse_parameters(value):
    """Parse ``text; name=value; ...`` (bytes, RFC 9110 section 5.6.6).

    Return (text, {lower-case name: value}), quotes taken off. What is no
    parameter is passed over.
    """
    text, _, rest = value.partition(b";")
    parameters, place = {}, 0
    while place < len(rest):
        found = PARAMETER.match(rest, place)
        if found is None:
            place = (rest.find(b";", place) + 1) or len(rest)
            continue
        place = found.end()
        name, bare = found.group(1, found.lastindex)
        is_plain = found.lastindex == PARAMETER.groups
        bare = bare.strip() if is_plain else re.sub(rb'\\(["\\])', rb"\1", bare)
        parameters.setdefault(name.lower(), bare)
    return text.strip().lower(), parameters


def unescape_name(value):
    """Undo what browsers do to names and file names in multipart forms (WHATWG HTML)."""
    return re.sub(rb"(?i)%(22|0d|0a)", lambda found: bytes.fromhex(found.group(1).decode()), value)


def decode_extended(value):
    """Decode ``charset'language'text`` (bytes, RFC 8187) into UTF-8 bytes; None if it is none."""
    charset, quote, rest = value.partition(b"'")
    _, second, text = rest.partition(b"'")
    if not quote or not second:
        return None
    data = urllib.parse.unquote_to_bytes(text)
    if charset.lower() == b"iso-8859-1":
        return data.decode("latin-1").encode("utf-8")
    return data


def join_sections(parameters, name):
    """Return the parameter `name` that is sent in sections, name*0, name*1* and so on, as UTF-8 bytes.

    Those with a second star are encoded, the first of these in the charset that it names
    (RFC 2231 section 3). None without the first section.
    """
    sections, charset = [], b""
    for number in itertools.count():
        section = parameters.get(b"%b*%d" % (name, number))
        encoded = parameters.get(b"%b*%d*" % (name, number))
        if encoded is not None:
            if number == 0 and encoded.count(b"'") >= 2:
                charset = encoded.partition(b"'")[0] + b"''"
                encoded = encoded.split(b"'", 2)[2]
            section = decode_extended((charset or b"''") + encoded)
        if section is None:
            return b"".join(sections) if sections else None
        sections.append(section)


def part_parameter(parameters, name):
    """Return a name of a part as bytes, in whichever way `parameters` have it; None if they do not.

    Browsers send it as it is; others as `name` with a star (RFC 8187), or in sections.
    """
    value = decode_extended(parameters.get(name + b"*", b""))
    if value is None:
        value = join_sections(parameters, name)
    if value is None and name in parameters:
        value = unescape_name(parameters[name])
    return value


def part_filename(parameters):
    """Return the file name of a part, without any directory; None when it is no file."""
    name = part_parameter(parameters, b"filename")
    if name is None:
        return None
    name = re.split(rb"[/\\]", name)[-1]
    return b"" if name in (b".", b"..") else name


def parse_part_head(head, line_break=b"\r\n"):
    """Return (name, filename or None) of a part's header (bytes); None when it has no name.

    Raises ApiError 400 when a line is not a header field.
    """
    names = None
    for line in re.sub(line_break + rb"[ \t]+", b" ", head).split(line_break):
        name, colon, value = line.partition(b":")
        if line and not colon:
            raise ApiError(400)
        if names is None and name.strip().lower() == b"content-disposition":
            kind, parameters = parse_parameters(value)
            name = part_parameter(parameters, b"name")
            if kind == b"form-data" and name is not None:
                names = name, part_filename(parameters)
    return names


def find_delimiter(scanner, delimiter, start):
    """Find the line that begins with `delimiter`, a line break and dashes, at or behind `start`.

    Return (its offset, the offset behind it, its line break), the last two None
    for the closing delimiter. Raises ApiError 400 when it does not come.
    """
    place = scanner.find(delimiter, start)
    while place >= 0:
        after = place + len(delimiter)
        if scanner.slice(after, after + 2) == b"--":
            return place, None, None
        line_end = scanner.find(b"\n", after, KIB)
        padding = scanner.slice(after, line_end if line_end >= 0 else after + KIB)
        if not padding.strip(b" \t\r"):
            if line_end < 0:
                break
            return place, line_end + 1, b"\r\n" if padding.endswith(b"\r") else b"\n"
        place = scanner.find(delimiter, place + 1)      # it is content that looks like one
    raise ApiError(400)


def read_part_head(scanner, start, line_break, dashes):
    """Return (header, the offset of the content) of the part whose header begins at `start`.

    `dashes` begin a delimiter; a part that is nothing but one is empty. Raises
    ApiError 413 for too long a header, 400 for one that is cut.
    """
    first = scanner.slice(start, start + len(dashes) + 1)
    if first[:-1] == dashes and first[-1:] in b" \t\r\n":
        return b"", start
    before = start - len(line_break)            # for a header without a line
    end = scanner.find(2 * line_break, before, PART_HEAD_LIMIT)
    if end < 0:
        raise ApiError(413 if scanner.end > before + PART_HEAD_LIMIT else 400)
    if line_break + dashes in scanner.slice(before, end):
        raise ApiError(400)
    return scanner.slice(start, end), end + 2 * len(line_break)


def parse_multipart(body, boundary):
    """Yield the FormFields of a multipart/form-data RequestBody (RFC 7578, RFC 2046).

    None stands for a part without a name. The lines of a part end as that of
    the delimiter before it, in CRLF or in LF alone. Raises ApiError 400 for a
    body that is cut or broken, 413 for the header of a part that is too long.
    """
    scanner = Scanner(lambda offset: body.read_at(offset - 2) if offset > 1 else b"\r\n"[offset:])
    # The body is read as if a line break stood before it, so that its first
    # delimiter looks like every other; offsets are two more than in the body.
    dashes = b"--" + boundary
    content, names = None, None     # offset and names of the part being read
    place, head, line_break = find_delimiter(scanner, b"\n" + dashes, 0)
    while True:
        if content is not None:
            yield FormField(body, names[0], content - 2, place - 2, names[1]) if names else None
        if head is None:
            return
        data, content = read_part_head(scanner, head, line_break, dashes)
        names = parse_part_head(data, line_break)
        # A part without content has its delimiter's line break in its header.
        place, head, line_break = find_delimiter(scanner, line_break + dashes,
                                                 content - len(line_break))


# Headers that describe a body, and nothing of the error that takes its place.
BODY_FIELDS = frozenset([b"content-type", b"content-length", b"content-encoding",
                         b"content-language", b"content-location", b"content-range",
                         b"content-disposition", b"etag", b"last-modified"])

# Headers that belong to the connection (RFC 9110 section 7.6.1): no program sets them,
# and they are not passed on.
CONNECTION_FIELDS = (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer",
                     b"transfer-encoding", b"upgrade")

# What a service is told in headers of ours; a client's that look like them to
# any program, which may see '_' for '-' (RFC 3875 section 4.1.18), are dropped.
HANDLER_FIELD = b"Kapow-Handler"
MATCH_FIELD = b"Kapow-Match-"
# And what is said anew, or not at all.
NOT_PASSED_ON = frozenset([*CONNECTION_FIELDS, b"host", b"expect", b"content-length"])
NOT_PASSED_BACK = frozenset([*CONNECTION_FIELDS, b"content-length"])


# What variables of the environment, and names in PHP, do not tell from '-'.
SAME_IN_PROGRAMS = bytes.maketrans(b"_.", b"--")


def is_kapow_field(name):
    """Tell whether a header, lower-case bytes, might pass for one of match_fields()."""
    name = name.translate(SAME_IN_PROGRAMS)
    return name == HANDLER_FIELD.lower() or name.startswith(MATCH_FIELD.lower())


def is_own_field(name):
    """Tell whether a header, lower-case bytes, might pass for one that a service trusts."""
    if name[0] not in b"fkx":       # as nearly all
        return False
    return (is_kapow_field(name) or name == b"forwarded"
            or name.translate(SAME_IN_PROGRAMS).startswith(b"x-forwarded-"))


def match_fields(handler, matches):
    """Return what a service is told of its route: its name there, {NAME: text} that matched."""
    fields = [(HANDLER_FIELD, handler.encode())] if handler else []
    for name, text in matches.items():
        words = (urllib.parse.quote(word.encode("utf-8", "surrogateescape"), safe="").encode()
                 for word in (name, text))
        fields.append((MATCH_FIELD + next(words), next(words)))
    return fields


class Form:
    """The form in the body of a request: parsed when it is first asked for, and remembered.

    Safe from many threads: of those that ask at once one parses, the others
    wait for it. What is wrong with the form is remembered too.
    """

    def __init__(self, head, body):
        """`head` is the RequestHead, `body` the RequestBody."""
        self._head, self._body = head, body
        self._condition = Condition()   # guards what follows
        self._parsing = False       # by a thread, which does not hold the condition meanwhile
        self._fields = None         # list of FormField, None before it was parsed
        self._named = None          # {is it a file: {name: [FormField]}}, as _fields
        self._refusal = None        # the status of the ApiError that it raised

    @property
    def is_parsed(self):
        """Whether it needs no parsing any more: nobody waits for what is asked of it now."""
        with self._condition:
            return self._fields is not None or self._refusal is not None

    def parse(self, wait=True):
        """Parse it, unless that was done; this reads the body. Raises as RequestBody.read_at.

        Where another thread does that, `wait` for it. Return is_parsed.
        """
        with self._condition:
            if wait:
                self._condition.wait_for(lambda: not self._parsing)
            if self._parsing or self._fields is not None or self._refusal is not None:
                return not self._parsing
            self._parsing = True
        fields = refusal = None
        try:
            fields = self._collect()
        except ApiError as error:
            refusal = error.status
        finally:
            self._keep(fields, refusal)
        return True

    def _keep(self, fields, refusal):
        """Note the result of parse(); without one the next that asks shall parse."""
        named = {False: {}, True: {}}
        for field in fields or ():
            named[field.filename is not None].setdefault(field.name, []).append(field)
        with self._condition:
            self._fields, self._named, self._refusal = fields, named, refusal
            self._parsing = False
            self._condition.notify_all()

    def _collect(self):
        fields, size = [], 0
        for count, field in enumerate(self._parsed_body()):
            if field is not None:
                fields.append(field)
                size += len(field.name) + len(field.filename or b"")
            if count >= FORM_FIELD_LIMIT or size > FORM_NAMES_LIMIT:
                raise ApiError(413)
        return fields

    def _parsed_body(self):
        kind, parameters = parse_parameters(self._head.first(b"content-type"))
        if kind == b"application/x-www-form-urlencoded":
            return parse_urlencoded(self._body)
        if kind != b"multipart/form-data" or self._has_no_body():
            return iter(())
        if not parameters.get(b"boundary"):
            raise ApiError(400)
        return parse_multipart(self._body, parameters[b"boundary"])

    def _has_no_body(self):
        """Return True if there is none, not even one of no bytes (RFC 9112 section 6.3)."""
        return self._head.length == 0 and not self._head.values(b"content-length")

    def _check(self):
        """Have it parsed. Raises as RequestBody.read_at, and ApiError."""
        self.parse()
        if self._refusal is not None:
            raise ApiError(self._refusal)

    def __call__(self):
        """Return the FormFields as a list, in order.

        Raises as RequestBody.read_at, and ApiError 413 for too many or too long
        names, 400 for what is broken.
        """
        self._check()
        return self._fields

    def named(self, files):
        """Return {name: [FormField]} of the `files`, or of the other fields, in order. Raises as a call."""
        self._check()
        return self._named[files]


class UserRequest:
    """A user request as its resources see it. Bytes, unless said otherwise.

    `method` str, `target`, `path` str, `host`, `version` str ("HTTP/1.1"),
    `fields` list of (name, value), `body` RequestBody, `form` the Form in that,
    `remote` str, the client's address, `client_dn` str, None without a client certificate,
    `scheme` b"http" or b"https", `port` the server's, int.
    """

    def __init__(self, head, body, remote, client_dn=None, scheme=b"http", port=80):
        self._head = head
        self.method, self.target, self.path = head.method, head.target, head.path
        self.host = head.host
        self.version = "HTTP/%d.%d" % head.version
        self.fields = head.fields
        self.body = body
        self.remote = remote
        self.client_dn = client_dn
        self.scheme = scheme
        self.port = port
        self.form = Form(head, body)

    def headers(self, name):
        """Return the values of the header `name`, in any case, in order."""
        return self._head.values(name)

    def params(self):
        """Return the query's (name, value) pairs, in order."""
        return parse_query(self._head.query)

    def passed_on(self, added):
        """Return the head (bytes) with which a service is asked the same; `added` are fields.

        In origin form (RFC 9112 section 3.2.1): to the service this is no proxy.
        """
        kept = self._head.without(NOT_PASSED_ON | self._head.connection_options)
        fields = [(b"Host", self.host),
                  *(field for field in kept if not is_own_field(field[0].lower()))]
        if self._head.length is None:
            fields.append((b"Transfer-Encoding", b"chunked"))
        elif self._head.length or self.headers(b"content-length"):
            fields.append((b"Content-Length", b"%d" % self._head.length))
        fields += [(b"X-Forwarded-For", self.remote.encode()),
                   (b"X-Forwarded-Proto", self.scheme), (b"X-Forwarded-Host", self.host), *added]
        query = b"?" + self._head.query if b"?" in self.target else b""
        return format_request(self.method.encode(), self._head.raw_path + query, fields)

    def cgi_variables(self):
        """Return those variables of RFC 3875 section 4.1 that the request decides, a dict of str.

        A header whose name has a '_' could pass for another, and that of Proxy
        for a variable that clients of HTTP obey.
        """
        host = self.host.decode("latin-1")
        variables = {
            "GATEWAY_INTERFACE": "CGI/1.1", "SERVER_SOFTWARE": f"Kapow/{VERSION}",
            "SERVER_PROTOCOL": self.version, "SERVER_PORT": str(self.port),
            "SERVER_NAME": re.sub(r":\d*\Z", "", host) or "localhost",
            "REQUEST_METHOD": self.method, "QUERY_STRING": os.fsdecode(self._head.query),
            "REQUEST_URI": os.fsdecode(self.target), "REMOTE_ADDR": self.remote}
        if self.scheme == b"https":
            variables["HTTPS"] = "on"
        for name, value in self.fields:
            key, text = name.decode("ascii").upper().replace("-", "_"), os.fsdecode(value)
            if b"_" in name or key in ("PROXY", "CONTENT_LENGTH", "TRANSFER_ENCODING"):
                continue
            if key == "CONTENT_TYPE":
                variables[key] = text
            else:
                glue = "; " if key == "COOKIE" else ", "
                before = variables.get("HTTP_" + key)
                variables["HTTP_" + key] = text if before is None else before + glue + text
        return variables

    def cookies(self):
        """Return the cookies' (name, value) pairs (RFC 6265 section 5.4), in order."""
        pairs = []
        for value in self._head.values(b"cookie"):
            for item in value.split(b";"):
                name, equals, text = item.partition(b"=")
                if equals:
                    pairs.append((name.strip(), text.strip()))
        return pairs


def decode_json(data):
    """Decode the bytes of one JSON value (RFC 8259); raises ApiError("Malformed JSON")."""
    def refuse(constant):
        """Refuse what json takes and RFC 8259 does not: NaN and the infinities."""
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ApiError("Malformed JSON", error=str(error)) from None


def format_head(status, fields, reason=None):
    """Return the bytes of a response head; `fields` holds (name, value), both str or bytes."""
    lines = ["HTTP/1.1 %d %s\r\n" % (status, status_phrase(status) if reason is None else reason)]
    for name, value in fields:
        if isinstance(name, bytes):
            name, value = name.decode("latin-1"), value.decode("latin-1")
        lines.append(f"{name}: {value}\r\n")
    lines.append("\r\n")
    return "".join(lines).encode("latin-1")


JSON_TYPE = (b"Content-Type", b"application/json")
LAST_CHUNK = b"0\r\n\r\n"


def chunk(data):
    """Return bytes as one chunk (RFC 9112 section 7.1), and b"" as b"": as a chunk it would be the last."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


def frame(pieces, chunked):
    """Yield what goes on the wire of a body that comes in pieces: `chunked`, or as they are.

    An empty piece is passed over; the last chunk comes when the pieces have ended well.
    """
    for data in filter(None, pieces):
        yield chunk(data) if chunked else data
    if chunked:
        yield LAST_CHUNK


@functools.lru_cache(maxsize=2)
def http_date(seconds):
    """Return the Date (RFC 9110 section 5.6.7) of an int of seconds since the epoch."""
    return email.utils.formatdate(seconds, usegmt=True)


# The bytes that say "not text", from the WHATWG MIME sniffing standard.
BINARY = re.compile(rb"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f]")
HTML = re.compile(rb"(?i)(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html|head|body)[\s/>]")


def sniff_content_type(data, whole):
    """Guess the Content-Type of a body that begins with `data`, and ends there if `whole`."""
    try:
        # Unless it is whole, its last character may be cut.
        codecs.getincrementaldecoder("utf-8")().decode(data, whole)
    except UnicodeDecodeError:
        return "application/octet-stream"
    if BINARY.search(data):
        return "application/octet-stream"
    return "text/html; charset=utf-8" if HTML.match(data) else "text/plain; charset=utf-8"


# ---------------------------------------------------------------------------
# 5. Handlers
# ---------------------------------------------------------------------------


class Write:
    """The bytes of one write to the body, first in, first out.

    While a write that began before it is open they go into a spool. When its
    turn has come they stay in memory, where must_wait() keeps them few.
    """

    def __init__(self, front, memory, space):
        """`memory` is how many bytes its spool may keep there, `space` as Spool's."""
        self.ended = False          # no more will be appended
        self.front = front          # all that began before it have ended
        self._spool = Spool(memory, space)
        self._taken = 0             # bytes of the spool that were taken
        self._fresh = collections.deque()   # bytes that came after the spool's
        self._fresh_size = 0

    @property
    def buffered(self):
        """How many bytes wait to be taken."""
        return self._spool.length - self._taken + self._fresh_size

    def append(self, data):
        """Add bytes. Raises OSError when the spool has no room."""
        if self.front:
            self._fresh.append(data)
            self._fresh_size += len(data)
        else:
            self._spool.append(data)

    def take(self):
        """Take some bytes out, b"" when there are none now."""
        data = self._spool.read_at(self._taken, PIECE)
        if data:
            self._taken += len(data)
        elif self._fresh:
            data = self._fresh.popleft()
            self._fresh_size -= len(data)
        if self._taken == self._spool.length:
            self._spool.close()
            self._taken = 0
        return data

    def close(self):
        """Drop what was not taken."""
        self._spool.close()
        self._fresh.clear()
        self._taken = self._fresh_size = 0


class Draft:
    """What the program has said so far. Every call holds its handler's condition.

    Writes are sent in the order in which they began: `_writes` holds those not
    yet taken whole, oldest first; the first is open or has bytes. Those whose
    turn has come are the ended ones at its head and the first open one.
    """

    def __init__(self, space=None):
        """`space` is the SpoolSpace for what must wait, None for no limit."""
        self._space = space
        self.status = None          # int, None until set
        self.reason = None          # a service's own phrase, str
        self.fields = []            # (name, value) bytes, in order
        self.failure = 500          # status of what fails and has said nothing; None: no answer
        self.verbatim = False       # the head is a service's: nothing is guessed
        self.length = None          # the program's own Content-Length, int
        self.started = False        # the head is out of the program's hands
        self.dropping = False       # nobody will read more: swallow writes
        self.open_writes = 0        # begun and not ended
        self._mode = None           # "body" or "stream", from the first write on
        self._writes = collections.deque()
        self._written = 0           # bytes of body, ever
        self._ready = 0             # bytes of writes whose turn has come, not taken
        self._spooled = 0           # bytes of the others

    @property
    def said_anything(self):
        """Whether the program set or wrote anything at all."""
        return bool(self.status or self.fields or self._written)

    @property
    def touched(self):
        """Whether the program has done anything about the response, if only an empty write."""
        return self.said_anything or self._mode is not None

    @property
    def crowded(self):
        """Whether the program is too far ahead of the client."""
        return not self.dropping and self._ready >= WRITE_BUFFER

    @property
    def must_wait_elsewhere(self):
        """Whether a write that begins now would wait, or go to disk: not on the event loop."""
        return self.crowded or self.open_writes > 0

    @property
    def available(self):
        """Whether take() has bytes now."""
        return bool(self._writes and self._writes[0].buffered)

    @property
    def is_stream(self):
        """Whether the body goes on to the client as it comes, whatever that is doing."""
        return self._mode == "stream"

    def _check_head(self):
        if self.started:
            raise ApiError("Response Already Started")

    def set_status(self, value):
        """Set the status from bytes. Raises ApiError."""
        if not re.fullmatch(rb"[+-]?[0-9]+", value):
            raise ApiError("Non Integer Value")
        if not re.fullmatch(rb"[2-9][0-9][0-9]", value):
            raise ApiError("Invalid Status Code")
        self._check_head()
        self.status = int(value)

    def add_field(self, name, value):
        """Add a header; `name` and `value` are bytes. Raises ApiError."""
        value = value.strip(b" \t")
        if not FIELD_NAME.fullmatch(name) or not FIELD_VALUE.fullmatch(value):
            raise ApiError("Invalid Header")
        if name.lower() in CONNECTION_FIELDS:
            raise ApiError("Invalid Header")
        if name.lower() == b"content-length":
            if self.length is not None or not re.fullmatch(rb"[0-9]{1,18}", value):
                raise ApiError("Invalid Header")
            self._check_head()
            self.length = int(value)
        self._check_head()
        self.fields.append((name, value))

    def add_cookie(self, name, value):
        """Add a Set-Cookie header (RFC 6265 section 4.1). Raises ApiError."""
        if not FIELD_NAME.fullmatch(name):
            raise ApiError("Invalid Header")
        self.add_field(b"Set-Cookie", name + b"=" + value)

    def take_over(self, head):
        """Take the ResponseHead of a service."""
        self.fields = head.without(NOT_PASSED_BACK | head.connection_options)
        if head.length is not None:
            self.fields.append((b"Content-Length", b"%d" % head.length))
        self.status, self.reason, self.length = head.status, head.reason, head.length
        self.verbatim = True

    def begin_head(self, status, reason, fields):
        """Set status (None for the usual one) and headers as a program printed them.

        Headers that were set before stay. Raises ApiError; then nothing is set.
        """
        before, length = list(self.fields), self.length
        names = {name.lower() for name, _ in before} - {b"set-cookie"}
        try:
            for name, value in fields:
                if name.lower() not in names:
                    self.add_field(name, value)
        except ApiError:
            self.fields, self.length = before, length
            raise
        if status is not None:
            self.status, self.reason = status, reason
        self.status = self.status or 200

    def fill(self, status, fields, body):
        """Say a whole short response."""
        self.status, self.fields = status, fields
        write = self.begin_write("body")
        self.append(write, body)
        self.end_write(write)

    def begin_write(self, mode):
        """Begin a write to the "body" or the "stream" and return it. Raises ApiError."""
        if self._mode not in (None, mode):
            raise ApiError("Body And Stream Are Exclusive")
        self._mode = mode
        write = Write(self.open_writes == 0, max(MEMORY_LIMIT - self._spooled, 0), self._space)
        self._writes.append(write)
        self.open_writes += 1
        return write

    def append(self, write, data):
        """Add bytes to `write`."""
        if self.dropping:
            return
        write.append(data)
        self._written += len(data)
        if write.front:
            self._ready += len(data)
        else:
            self._spooled += len(data)
        if self._mode == "stream" or self._written > HOLD_LIMIT:
            self.started = True

    def is_silent(self):
        """Whether nothing was said, and that is no answer."""
        return self.failure is None and not self.said_anything

    def must_wait(self, write):
        """Whether the writer of `write` is too far ahead of the client."""
        return write.front and self.crowded

    def end_write(self, write):
        """End `write`: no more comes; the next ones may have their turn."""
        write.ended = True
        self.open_writes -= 1
        self.started = self.started or self.is_stream
        if write.front and write is not self._writes[-1]:
            self._advance()
        self._settle()

    def _advance(self):
        for write in self._writes:
            if not write.front:
                write.front = True
                self._ready += write.buffered
                self._spooled -= write.buffered
            if not write.ended:
                return

    def _settle(self):
        while self._writes and self._writes[0].ended and not self._writes[0].buffered:
            self._writes.popleft()

    def take(self):
        """Take the next bytes for the client; b"" when there are none now."""
        data = self._writes[0].take() if self._writes else b""
        self._ready -= len(data)
        self._settle()
        return data

    def take_all(self):
        """Take what there is."""
        return b"".join(iter(self.take, b""))

    def drop(self):
        """Throw away what was not taken and all that is still to come."""
        self.dropping = True
        self._ready = self._spooled = 0
        for write in self._writes:
            write.close()

    def conclude(self, succeeded):
        """Return the body that was held back; `succeeded` tells how the program ended.

        What failed without a status and a body becomes an error, with the other headers.
        """
        if succeeded or self.status or self._written:
            return self.take_all()
        kept = [field for field in self.fields if field[0].lower() not in BODY_FIELDS]
        self.status, self.fields, self.length = self.failure or 500, [*kept, JSON_TYPE], None
        return reason_json(self.status)


# Why a handler can be ended early: its time is up, its client left, the body of its
# request is not as it should be, its response cannot be kept, an operator wants it,
# the server stops.
CAUSES = ("timeout", "client", "body", "storage", "operator", "stop")


def make_request_id():
    """Return a new request id, a str for logs; it says nothing about the handler's id."""
    return os.urandom(8).hex()


class Handler:
    """One request being answered.

    The user thread waits on `condition`; the data threads and the watcher
    change the handler under it and notify. `id` is the secret that the program
    shows to read the request and write the response. It needs no constant
    time: it is found by its hash, which is keyed, and compared only when equal.
    """

    def __init__(self, request, route, matches, hang_up=lambda: None,
                 body_is_coming=lambda: False, space=None, request_id=None):
        """`hang_up()` ends the connection to the client, without waiting.

        `body_is_coming()` is as RequestBody.is_coming(), `space` as Draft's.
        """
        self.id = str(uuid.uuid4())         # 122 random bits
        self.request_id = request_id or make_request_id()       # no secret, for logs
        self.started = time.monotonic()
        self.request = request
        self.route = route
        self.matches = matches              # {name: str}
        self.condition = Condition()
        self.response = Draft(space)
        self.exited = False                 # the entrypoint has exited, or never ran
        self.succeeded = False              # and that was no failure
        self.aborted = None                 # status of what ended it early, int
        self.cause = None                   # of that, one of CAUSES
        self.client_lost = False            # nobody waits for the response any more
        self.ended = False                  # the response is finished: no more writes
        self.kill = None                    # ends the process group; None before it runs
        self.pid = None                     # the program's, and its session's; None before
        self.slots = ()                     # Slots of the Channel that are its alone
        self.over = False                   # the user thread has gone on
        self.redirect = None                # target that is to answer instead, bytes
        self._hang_up = hang_up
        self._body_is_coming = body_is_coming
        self._sending = False               # bytes of the body were taken for the client
        self._fetching = False              # "fetch" was a step
        self._calls = set()                 # functions that end calls of its programs
        self._waiting_for_room = []         # functions to call when bytes were taken
        self._wants_continue = False        # the client is to be told to send its body

    # For the data threads and the watcher.

    def change(self, method, *arguments):
        """Call `method` of Draft with `arguments` under the condition."""
        with self.condition:
            self._check_alive()
            return method(self.response, *arguments)

    def _check_alive(self):
        if self.ended:
            raise ApiError("Handler ID Not Found")

    def pour(self, mode, pieces, hang_up=lambda: None):
        """Write the bytes of the iterator `pieces` to the "body" or "stream".

        Waits while the client is slow; `hang_up()` is called if the handler ends
        meanwhile, but not when it ends because this write has. Raises ApiError, and
        what `pieces` raises.
        """
        write = self.begin(mode)
        try:
            with self.calling(hang_up):
                for data in pieces:
                    if not self.offer(write, data):
                        self._wait_for_room(write)
        finally:
            self.end(write)

    def begin(self, mode):
        """Begin a write to the "body" or "stream" and return it. Raises ApiError."""
        return self.change(Draft.begin_write, mode)

    def offer(self, write, data):
        """Add bytes to `write`; return whether there is room for more. Raises ApiError."""
        try:
            with self.condition:
                self._check_alive()
                self.response.append(write, data)
                self._notify()
                return not self.response.must_wait(write)
        except OSError as error:
            log.error("%s cannot keep its response: %s", self.request_id, error.strerror)
            self.abort(500, "storage")
            raise ApiError(500) from None

    def _wait_for_room(self, write):
        with self.condition:
            self.condition.wait_for(lambda: self.ended or not self.response.must_wait(write))
            self._check_alive()

    def when_room(self, write, callback):
        """Call `callback()`, on any thread, once `write` need not wait any more."""
        with self.condition:
            if not self.ended and self.response.must_wait(write):
                self._waiting_for_room.append(callback)
                return
        callback()

    def end(self, write):
        """End `write`."""
        with self.condition:
            self.response.end_write(write)
            self._notify()

    def _notify(self):
        """Wake the user thread, if there is something for it to do."""
        if self._has_step():
            self.condition.notify_all()

    def _make_room(self):
        """Wake those who wait for bytes of the response to be taken."""
        self.condition.notify_all()
        callbacks, self._waiting_for_room = self._waiting_for_room, []
        for callback in callbacks:
            callback()

    def want_body(self):
        """Have the client told to go on (Expect: 100-continue)."""
        with self.condition:
            self._wants_continue = True
            self.condition.notify_all()

    def program_ended(self, succeeded):
        """Note that no program of the handler's own runs, now or any more."""
        with self.condition:
            self.exited = True
            self.succeeded = succeeded
            self.condition.notify_all()

    def abort(self, status, cause):
        """End the handler early: kill its program, answer `status` if nothing was sent.

        `cause` is one of CAUSES. Where only the rest of the response is to be
        sent, nothing is done.
        """
        with self.condition:
            if self.aborted is not None or self.ended:
                return
            self.aborted, self.cause = status, cause
            kill = self.kill
            self.response.drop()
            self._make_room()
        if kill is not None:
            kill()

    def interrupt(self):
        """End the sending to a client that does not take what it is sent."""
        with self.condition:
            if not self.over:
                self._hang_up()

    @contextlib.contextmanager
    def calling(self, hang_up):
        """Have `hang_up()` called if the handler ends within a with statement."""
        self.add_call(hang_up)
        try:
            yield
        finally:
            self.remove_call(hang_up)

    def add_call(self, hang_up):
        """Have `hang_up()`, which must not block, called if the handler ends."""
        with self.condition:
            self._calls.add(hang_up)
            if self.over:
                hang_up()

    def remove_call(self, hang_up):
        """Undo add_call."""
        with self.condition:
            self._calls.discard(hang_up)

    def lose_client(self, status):
        """Note that the client left; what that does to the handler its route says."""
        if self.route.disconnect == "kill":
            self.abort(status, "client")
            return
        with self.condition:
            self.client_lost = True
            self.response.drop()
            self._make_room()

    def launched(self, pid, kill):
        """Note the program's process, and how to kill it; do it if the handler was aborted."""
        with self.condition:
            self.pid, self.kill = pid, kill
            aborted = self.aborted is not None
        if aborted:
            kill()

    def to_json(self):
        """Return the handler as a dict for JSON; `age` in seconds."""
        request = self.request
        return {"id": self.id, "request_id": self.request_id, "route_id": self.route.id,
                "method": request.method,
                "path": request.path.encode("utf-8", "surrogateescape").decode("utf-8", "replace"),
                "client": request.remote, "pid": self.pid,
                "age": round(time.monotonic() - self.started, 3)}

    # For the user thread.

    @property
    def finished(self):
        """Whether the program has exited and every write has ended."""
        return self.exited and not self.response.open_writes

    def next_step(self):
        """Wait for something to do; return (name, bytes or None).

        "abort"; "continue": tell the client to send its body; "fetch": read all of
        that, as the response waits for it; "data": bytes for the client; "end".
        """
        with self.condition:
            self.condition.wait_for(self._has_step)
            if self.aborted is not None:
                return "abort", None
            if self._wants_continue:
                self._wants_continue = False
                return "continue", None
            if self._must_hold():
                self._fetching = True
                return "fetch", None
            if self._has_data():
                self._sending = True
                data = self.response.take()
                self._make_room()
                return "data", data
            self.ended = True
            return "end", None

    def _has_step(self):
        return (self.aborted is not None or self._wants_continue or self.finished
                or self._has_data() and not (self._fetching and self._must_hold()))

    def _has_data(self):
        """Return True if bytes can be sent, or the head alone: a stream begins with its first write."""
        response = self.response
        return response.started and (response.available
                                     or response.is_stream and not self._sending)

    def _must_hold(self):
        """Return True while a long response may not begin, as the request's body is not whole.

        Some clients, nginx among them, send no more once they are answered, and
        others read nothing before they have sent all.
        """
        response = self.response
        return (response.started and not (response.is_stream or self._sending or self.exited)
                and self._body_is_coming())

    def body_changed(self):
        """Note that the request's body is whole now."""
        with self.condition:
            self.condition.notify_all()

    def hold_no_longer(self):
        """Begin the response though the body is not whole: there is nobody to fetch it."""
        with self.condition:
            self._sending = True

    def wait_exit(self):
        """Wait until the program has exited."""
        with self.condition:
            self.condition.wait_for(lambda: self.exited)

    def close(self):
        """End the calls of those who outlived the program."""
        with self.condition:
            self.ended = self.over = True
            self.kill = None                # which leads back here: garbage is dearer than this
            self._make_room()
            for hang_up in self._calls:
                hang_up()


# What a client is told that came when all was full (RFC 9110 section 10.2.3).
RETRY_LATER = ("Retry-After", "1")


class Ticket:
    """A request's place at the gate. Guarded by the gate's lock."""

    def __init__(self, route, lock):
        self.route = route
        self.admitted = False
        self.given_up = False       # the client left, or the server stops
        self._lock = lock
        self._changed = None        # a condition, once it waits

    def wait(self, seconds):
        """Wait until it is admitted or given up."""
        self._changed = Condition(self._lock)
        self._changed.wait_for(lambda: self.admitted or self.given_up, seconds)

    def notify(self):
        """Have wait() look again."""
        if self._changed is not None:
            self._changed.notify()


class Gate:
    """Lets so many handlers run at once; the next requests wait for their turn.

    A ticket that waits is let in by the one that makes room for it, so whoever
    comes and finds room overtakes nobody who could have had it.
    """

    def __init__(self, max_running, max_waiting, queue_time=QUEUE_TIME):
        """`max_running` 0 is no limit; a route's own limits come on top of these.

        A route's own queue_time takes the place of `queue_time`, in seconds.
        """
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._queue_time = queue_time
        self._lock = threading.Lock()
        self._running = 0
        self._running_of = collections.Counter()    # route id -> running
        self._waiting = []                          # tickets, first come first
        self._refused = 0                           # so far
        self._closed = False

    @contextlib.contextmanager
    def passing(self, ticket):
        """Wait for the ticket's turn and hold a slot for the length of a with statement.

        Raises ApiError 503 when there is no room to wait, or no turn comes in
        the queue time, or the ticket is given up.
        """
        self._enter(ticket)
        try:
            yield
        finally:
            self._leave(ticket.route)

    def ticket(self, route):
        """Return a new Ticket for a request of `route`."""
        return Ticket(route, self._lock)

    def give_up(self, ticket):
        """Have the ticket wait no longer."""
        with self._lock:
            ticket.given_up = True
            ticket.notify()

    def close(self):
        """Let nobody wait any more; those who do are sent away."""
        with self._lock:
            self._closed = True
            for ticket in self._waiting:
                ticket.given_up = True
                ticket.notify()

    @property
    def running(self):
        """How many are in."""
        return self._running

    def counts(self):
        """Return how many are in, how many wait, and how many were sent away so far."""
        with self._lock:
            return self._running, len(self._waiting), self._refused

    def _enter(self, ticket):
        with self._lock:
            if self._has_room(ticket.route):
                self._admit(ticket)
                return
            if self._closed or self._is_full(ticket.route):
                self._refuse(ticket)
            self._waiting.append(ticket)
            own = ticket.route.queue_time
            ticket.wait(self._queue_time if own is None else own)
            if not ticket.admitted:
                self._waiting.remove(ticket)
                self._refuse(ticket)

    def _refuse(self, ticket):
        # A client that left was not sent away.
        self._refused += self._closed or not ticket.given_up
        raise ApiError(503, [RETRY_LATER])

    def _leave(self, route):
        with self._lock:
            self._running -= 1
            self._running_of[route.id] -= 1
            if not self._running_of[route.id]:
                del self._running_of[route.id]
            for ticket in list(self._waiting):
                if self._has_room(ticket.route) and not ticket.given_up:
                    self._waiting.remove(ticket)
                    self._admit(ticket)
                    ticket.notify()

    def _admit(self, ticket):
        ticket.admitted = True
        self._running += 1
        self._running_of[ticket.route.id] += 1

    def _has_room(self, route):
        return ((not self._max_running or self._running < self._max_running)
                and (not route.max_handlers or self._running_of[route.id] < route.max_handlers))

    def _is_full(self, route):
        same = sum(1 for ticket in self._waiting if ticket.route is route)
        return len(self._waiting) >= self._max_waiting or (
            route.max_queue is not None and same >= route.max_queue)


class HandlerTable:
    """The running handlers by id. Safe from many threads."""

    def __init__(self):
        self._lock = threading.Lock()
        self._handlers = {}
        self._aborting = False      # all there are and will be

    @contextlib.contextmanager
    def holding(self, handler):
        """Keep `handler` in the table for the length of a with statement."""
        with self._lock:
            self._handlers[handler.id] = handler
            aborting = self._aborting
        if aborting:
            handler.abort(503, "stop")
        try:
            yield handler
        finally:
            with self._lock:
                del self._handlers[handler.id]

    def find(self, handler_id):
        """Return the Handler; raises ApiError("Handler ID Not Found")."""
        handler = self._handlers.get(handler_id)
        if handler is None or handler.ended:
            raise ApiError("Handler ID Not Found")
        return handler

    def find_any(self, name):
        """Return the Handler with this id, or the only one with this request id.

        Raises ApiError.
        """
        found = [handler for handler in self.snapshot()
                 if handler.request_id == name and not handler.ended]
        if len(found) > 1:
            raise ApiError("Request ID Not Unique")
        return found[0] if found else self.find(name)

    def snapshot(self):
        """Return the running handlers as a list."""
        with self._lock:
            return list(self._handlers.values())

    def abort_all(self):
        """Abort all handlers that there are, and those that may still come."""
        with self._lock:
            self._aborting = True
        for handler in self.snapshot():
            handler.abort(503, "stop")


# ---------------------------------------------------------------------------
# 6. Resources
# ---------------------------------------------------------------------------


class Stream:
    """A value that is sent as it comes: `pieces` of bytes, `length` in all or None."""

    def __init__(self, pieces, length=None):
        self.pieces = pieces
        self.length = length


class Resource:
    """One row of the resource table.

    `path` holds the words of the resource; NAME and INDEX stand for one
    segment each, and are handed to the functions. Of these, each None where it
    is not allowed:
        get(handler, *segments)           returns bytes or a Stream
        put(handler, value, *segments)    takes a small value, one newline less
        mode                              of Handler.pour, for a value of any size
    The functions raise ApiError. `in_body` tells that the value is made from
    the request's body, whose client may have to be waited for, `in_form` that
    it is made from the form in it.
    """

    def __init__(self, path, get=None, put=None, mode=None):
        self.words = path.encode().split(b"/")[1:]
        self.get, self.put, self.mode = get, put, mode
        self.in_form = self.words[:2] in ([b"request", b"form"], [b"request", b"files"])
        self.in_body = self.in_form or self.words == [b"request", b"body"]

    def read(self, handler, segments):
        """Return get()'s value. Raises ApiError, also when there is none to be read."""
        if self.get is None:
            raise ApiError("Invalid Resource Path")
        return self.get(handler, *segments)

    def write(self, handler, value, segments):
        """Set the whole small value, a final newline of which does not count.

        Raises ApiError, also when this is not such a resource.
        """
        if self.put is None:
            raise ApiError("Invalid Resource Path")
        self.put(handler, re.sub(rb"\r?\n\Z", b"", value), *segments)

    def path(self, segments):
        """Return the path (bytes) that match() took NAME `segments` from, decoded."""
        names = iter(segments)
        return b"".join(b"/" + (next(names) if word == b"NAME" else word) for word in self.words)

    def match(self, segments):
        """Return the list of NAME and INDEX segments, None when the path is another."""
        captured = []
        for word, segment in zip(self.words, segments):
            if word == b"NAME":
                captured.append(segment)
            elif word == b"INDEX" and re.fullmatch(rb"[0-9]{1,9}", segment):
                captured.append(int(segment))
            elif word != segment:
                return None
        return captured


def find_resource(path):
    """Return (Resource, captured segments) for a path as it was sent (bytes).

    Raises ApiError("Invalid Resource Path").
    """
    segments = [urllib.parse.unquote_to_bytes(segment) for segment in path.split(b"/")[1:]]
    for resource in RESOURCES.get((segments[0] if segments else b"", len(segments)), ()):
        captured = resource.match(segments)
        if captured is not None:
            return resource, captured
    raise ApiError("Invalid Resource Path")


def pick(values, index):
    """Return values[index]; raises ApiError("Resource Item Not Found")."""
    if index >= len(values):
        raise ApiError("Resource Item Not Found")
    return values[index]


def list_names(names):
    """Return names (bytes), each once, one a line, so that none can pass for two."""
    lines = (name.replace(b"%", b"%25").replace(b"\r", b"%0D").replace(b"\n", b"%0A") + b"\n"
             for name in dict.fromkeys(names))
    return b"".join(lines)


# Control characters and what cannot be shown, by code point: ESC is \x1b.
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
# More line ends, and what turns the direction of writing.
CONTROLS.update({code: f"\\u{code:04x}" for code in (
    0x200e, 0x200f, *range(0x2028, 0x202f), *range(0x2066, 0x206a))})


def printable(data):
    """Return bytes as a str that fits on one line of a log."""
    return data.decode("utf-8", "backslashreplace").translate(CONTROLS)


def printable_path(request):
    """Return the path of a UserRequest as a str that fits on one line of a log."""
    return printable(request.path.encode("utf-8", "surrogateescape"))


def get_match(handler, name):
    """What NAME matched."""
    value = handler.matches.get(name.decode("utf-8", "surrogateescape"))
    if value is None:
        raise ApiError("Resource Item Not Found")
    return value.encode("utf-8", "surrogateescape")


def get_match_names(handler):
    """The names in the URL pattern."""
    return list_names(name.encode("utf-8", "surrogateescape") for name in handler.matches)


def get_param(handler, name, index=0):
    """A query parameter."""
    return pick([value for key, value in handler.request.params() if key == name], index)


def get_param_names(handler):
    """The names of the query parameters."""
    return list_names(name for name, _ in handler.request.params())


def get_header(handler, name, index=0):
    """A header."""
    return pick(handler.request.headers(name), index)


def get_header_names(handler):
    """The names of the headers, as first spelt."""
    spellings = {}
    for name, _ in handler.request.fields:
        spellings.setdefault(name.lower(), name)
    return list_names(spellings.values())


def get_cookie(handler, name):
    """A cookie."""
    return pick([value for key, value in handler.request.cookies() if key == name], 0)


def get_cookie_names(handler):
    """The names of the cookies."""
    return list_names(name for name, _ in handler.request.cookies())


def get_form(handler, name, index=0):
    """A field of the form."""
    return Stream(pick(handler.request.form.named(files=False).get(name, ()), index).pieces())


def get_form_names(handler):
    """The names of the fields of the form."""
    return list_names(handler.request.form.named(files=False))


def pick_file(handler, name, index):
    """Return the FormField of a file; raises ApiError("Resource Item Not Found")."""
    return pick(handler.request.form.named(files=True).get(name, ()), index)


def get_filename(handler, name, index=0):
    """The name of an uploaded file."""
    return pick_file(handler, name, index).filename


def get_file(handler, name, index=0):
    """What is in an uploaded file."""
    return Stream(pick_file(handler, name, index).pieces())


def get_file_names(handler):
    """The names of the fields that hold files."""
    return list_names(handler.request.form.named(files=True))


def get_body(handler):
    """The body as it was sent."""
    return Stream(handler.request.body.pieces(), handler.request.body.length)


def get_client_dn(handler):
    """The subject of the client's certificate."""
    if handler.request.client_dn is None:
        raise ApiError("Resource Item Not Found")
    return handler.request.client_dn.encode()


def set_status(handler, value):
    """Set the status."""
    handler.change(Draft.set_status, value)


def add_header(handler, value, name):
    """Add a header."""
    handler.change(Draft.add_field, name, value)


def add_cookie(handler, value, name):
    """Add a Set-Cookie header."""
    handler.change(Draft.add_cookie, name, value)


def write_log(handler, value, prefix=None):
    """Write a line to the log."""
    text = value if prefix is None else prefix + b": " + value
    log.info("%s %s", handler.request_id, printable(text))


def log_call(handler, verb, path, reason=""):
    """With --debug, log a call of the program: "get" or "set", a path (bytes), why it was refused."""
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s %s %s%s", handler.request_id, verb, printable(path), reason and ": " + reason)


@contextlib.contextmanager
def logging_call(handler, verb, path):
    """Context manager: log_call() at its end, with what ended it early."""
    try:
        yield
    except (ApiError, ProtocolError) as error:
        log_call(handler, verb, path, str(error))
        raise
    log_call(handler, verb, path)


ALL_RESOURCES = (
    Resource("/request/id", get=lambda handler: handler.request_id.encode()),
    Resource("/request/method", get=lambda handler: handler.request.method.encode()),
    Resource("/request/host", get=lambda handler: handler.request.host),
    Resource("/request/version", get=lambda handler: handler.request.version.encode()),
    Resource("/request/path",
             get=lambda handler: handler.request.path.encode("utf-8", "surrogateescape")),
    Resource("/request/remote", get=lambda handler: handler.request.remote.encode()),
    Resource("/request/url", get=lambda handler: handler.request.target),
    Resource("/request/matches", get=get_match_names),
    Resource("/request/matches/NAME", get=get_match),
    Resource("/request/params", get=get_param_names),
    Resource("/request/params/NAME", get=get_param),
    Resource("/request/params/NAME/INDEX", get=get_param),
    Resource("/request/headers", get=get_header_names),
    Resource("/request/headers/NAME", get=get_header),
    Resource("/request/headers/NAME/INDEX", get=get_header),
    Resource("/request/cookies", get=get_cookie_names),
    Resource("/request/cookies/NAME", get=get_cookie),
    Resource("/request/form", get=get_form_names),
    Resource("/request/form/NAME", get=get_form),
    Resource("/request/form/NAME/INDEX", get=get_form),
    Resource("/request/files", get=get_file_names),
    Resource("/request/files/NAME/filename", get=get_filename),
    Resource("/request/files/NAME/INDEX/filename", get=get_filename),
    Resource("/request/files/NAME/content", get=get_file),
    Resource("/request/files/NAME/INDEX/content", get=get_file),
    Resource("/request/body", get=get_body),
    Resource("/route/id", get=lambda handler: handler.route.id.encode()),
    Resource("/ssl/client/i/dn", get=get_client_dn),
    Resource("/response/status", put=set_status),
    Resource("/response/headers/NAME", put=add_header),
    Resource("/response/cookies/NAME", put=add_cookie),
    Resource("/response/body", mode="body"),
    Resource("/response/stream", mode="stream"),
    Resource("/server/log", put=write_log),
    Resource("/server/log/NAME", put=write_log),
)

# (first word, number of words) -> the rows that a path of that shape may mean.
RESOURCES = collections.defaultdict(list)
for _resource in ALL_RESOURCES:
    RESOURCES[_resource.words[0], len(_resource.words)].append(_resource)


# ---------------------------------------------------------------------------
# 7. Entrypoints
# ---------------------------------------------------------------------------


def poll_file(file, event, milliseconds):
    """Wait for `event`, as select.POLLIN; return those that came, 0 for none in that time.

    `milliseconds` None is for ever. A socket that another thread has closed is
    what poll(2) says of a closed descriptor, select.POLLNVAL.
    """
    poll = select.poll()
    try:
        poll.register(file, event)
    except ValueError:
        return select.POLLNVAL
    return next((found for _, found in poll.poll(milliseconds)), 0)


def set_kernel_timeout(sock, option, seconds):
    """Set SO_RCVTIMEO or SO_SNDTIMEO of a blocking socket; None is for ever."""
    whole, rest = divmod(seconds or 0, 1)
    sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", int(whole), int(rest * 10 ** 6)))


def hung_up(fd):
    """Tell whether the other end of the socket `fd` has ended its input."""
    return bool(poll_file(fd, select.POLLRDHUP, 0) & (select.POLLRDHUP | select.POLLHUP))


def writes_to_journal():
    """Return True if standard error leads to journald: systemd.exec(5), JOURNAL_STREAM."""
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


class LogFormatter(logging.Formatter):
    """Formats lines of the log; for journald with their priorities, and without its time stamp."""

    _FOR_JOURNAL = logging.Formatter("%(levelname)s %(message)s")
    # The largest level that has each priority, syslog(3).
    _PRIORITIES = ((logging.DEBUG, 7), (logging.INFO, 6), (logging.WARNING, 4))

    def __init__(self):
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def format(self, record):
        """Return the text of a record; standard error may be another file each time.

        Tracebacks are for --debug, those that the standard library logs too.
        """
        if record.levelno > logging.DEBUG:
            record.exc_info = record.exc_text = None
        if not writes_to_journal():
            return super().format(record)
        priority = next((number for level, number in self._PRIORITIES if record.levelno <= level), 3)
        return "\n".join(f"<{priority}>{line}"
                         for line in self._FOR_JOURNAL.format(record).split("\n"))


class Seldom:
    """Lets something be said at most once in LOG_INTERVAL. Not exact with many threads."""

    def __init__(self):
        self._last = -math.inf

    def is_due(self):
        """Return True if it may be said now; then it is taken as said."""
        now = time.monotonic()
        due = now - self._last >= LOG_INTERVAL
        if due:
            self._last = now
        return due


class LogHandler(logging.StreamHandler):
    """Writes the log, whose reader may be slow: others do not wait for it meanwhile.

    What threads that must not block have to say, another one writes.
    """

    def __init__(self):
        super().__init__()
        self.deputies = {}          # thread identifier -> Watcher that writes for it
        self._queue = collections.deque()       # records that deputies have still to write
        self._lost = 0              # that found no room there

    def handle(self, record):
        """As in logging.Handler."""
        TURN.leave()
        deputy = self.deputies.get(threading.get_ident())
        if deputy is None:
            return super().handle(record)
        if len(self._queue) >= LOG_QUEUE_LIMIT:
            self._lost += 1
        else:
            self._queue.append(record)
            deputy.call_soon(self._write_one)
        return True

    def _write_one(self):
        """Called on a deputy's thread."""
        super().handle(self._queue.popleft())
        lost, self._lost = self._lost, 0
        if lost:
            log.warning("%d lines of the log were dropped, as nobody read them", lost)

    def is_stuck(self):
        """Tell whether a thread is at writing and does not come to an end."""
        free = self.lock.acquire(timeout=LINGER_TIME)
        if free:
            self.lock.release()
        return not free


LOG_HANDLER = LogHandler()


class Watcher:
    """A thread that waits for children, files, hang-ups and deadlines.

    Callbacks run on its thread and must not block. Registering needs no wake:
    epoll and kqueue take it while another thread waits.
    """

    def __init__(self, name):
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ, self._woken)
        self._lock = threading.Lock()
        self._deadlines = []                # heap of [when, serial, callback or None]
        self._cancelled = 0                 # of them, without a callback
        self._serial = itertools.count()
        self._soon = collections.deque()    # callbacks
        self._stopping = False
        self._hangups = None                # epoll of client sockets, {fd: callback}
        self._hangup_callbacks = {}
        if hasattr(select, "EPOLLRDHUP"):
            # selectors cannot ask for this event, which alone tells that a
            # client left while bytes of it still wait to be read.
            self._hangups = select.epoll()
            self._selector.register(self._hangups, selectors.EVENT_READ, self._hung_up)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self):
        """Begin to watch."""
        self._thread.start()

    def write_log_for(self, other):
        """Write what the thread of the Watcher `other` has to log."""
        LOG_HANDLER.deputies[other._thread.ident] = self

    def stop(self, seconds=None):
        """End the thread, once no deadline is left, and close what it holds.

        With `seconds`, wait no longer than that; then it keeps what it holds. Who
        wakes it later writes to the pipe, so that stays open: its number must not
        be another file's.
        """
        self._stopping = True
        self._wake()
        self._thread.join(seconds)
        if self._thread.is_alive():
            return
        if self._hangups is not None:
            self._hangups.close()
        self._selector.close()

    def on_exit(self, pid, callback):
        """Call `callback()` once the child `pid` has exited; it is for that to reap it.

        Raises RuntimeError, or OSError, when it cannot be watched.
        """
        def exited():
            self._selector.unregister(pidfd)
            os.close(pidfd)
            callback()

        def wait():
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            self.call_soon(callback)

        try:
            pidfd = os.pidfd_open(pid)
        except (AttributeError, OSError):   # no Linux, an older one, too many files
            threading.Thread(target=wait, daemon=True).start()
            return
        try:
            self._selector.register(pidfd, selectors.EVENT_READ, exited)
        except BaseException:
            os.close(pidfd)
            raise

    def on_readable(self, file, callback):
        """Call `callback()` whenever `file` can be read, until forget(file)."""
        self._selector.register(file, selectors.EVENT_READ, callback)

    def forget(self, file):
        """Undo on_readable."""
        self._selector.unregister(file)

    def on_hangup(self, fd, callback):
        """Call `callback()` once when the other end of the socket `fd` ends its input.

        Where the system cannot tell, it is never called.
        """
        if self._hangups is not None:
            self._hangup_callbacks[fd] = callback
            with contextlib.suppress(ValueError):       # it has stopped
                self._hangups.register(fd, select.EPOLLRDHUP | select.EPOLLONESHOT)

    def forget_hangup(self, fd):
        """Undo on_hangup, before `fd` is closed."""
        if self._hangup_callbacks.pop(fd, None) is not None:
            with contextlib.suppress(ValueError, OSError):      # it has stopped, or had no room
                self._hangups.unregister(fd)

    def call_soon(self, callback):
        """Call `callback()`. Takes no lock, so that callers may hold one."""
        self._soon.append(callback)
        self._wake()

    def call_later(self, seconds, callback):
        """Call `callback()` in `seconds`; return what cancel() takes."""
        deadline = [time.monotonic() + seconds, next(self._serial), callback]
        with self._lock:
            heapq.heappush(self._deadlines, deadline)
            first = self._deadlines[0] is deadline
        if first:
            self._wake()
        return deadline

    @contextlib.contextmanager
    def calling_later(self, seconds, callback):
        """Call `callback()` in `seconds`, unless a with statement ends before."""
        deadline = self.call_later(seconds, callback)
        try:
            yield
        finally:
            self.cancel(deadline)

    def cancel(self, deadline):
        """Undo call_later.

        The entry stays in the heap without its callback, until it is due or
        most of the heap is such entries.
        """
        with self._lock:
            if deadline[2] is None:
                return
            deadline[2] = None
            self._cancelled += 1
            if self._cancelled > 100 + len(self._deadlines) // 2:
                self._deadlines = [entry for entry in self._deadlines if entry[2] is not None]
                heapq.heapify(self._deadlines)
                self._cancelled = 0

    def _wake(self):
        with contextlib.suppress(BlockingIOError):      # it is awake already
            os.write(self._wake_writer, b"\0")

    def _woken(self):
        os.read(self._wake_reader, 4096)

    def _hung_up(self):
        for fd, _ in self._hangups.poll(0):
            # The descriptor may have been closed, and given to another client,
            # since the event: look again at whom it is now.
            callback = self._hangup_callbacks.get(fd)
            if callback is not None and hung_up(fd):
                callback()

    def _run(self):
        while True:
            while self._soon:
                self._call(self._soon.popleft())
            timeout = self._run_due()
            if self._stopping and timeout is None:
                return
            if timeout is not None:
                timeout = min(timeout, LONGEST_SELECT)
            for key, _ in self._selector.select(timeout):
                # One before it may have had it forgotten, and its descriptor closed.
                if self._selector.get_map().get(key.fd) is key:
                    self._call(key.data)

    def _run_due(self):
        """Run the deadlines that have passed; return the seconds to the next, or None."""
        while True:
            with self._lock:
                while self._deadlines and self._deadlines[0][2] is None:
                    heapq.heappop(self._deadlines)
                    self._cancelled -= 1
                if not self._deadlines:
                    return None
                left = self._deadlines[0][0] - time.monotonic()
                if left > 0:
                    return left
                deadline = heapq.heappop(self._deadlines)
                callback, deadline[2] = deadline[2], None       # too late to cancel it
            self._call(callback)

    def _call(self, callback):
        """Call `callback()`; what it raises must not end the only thread that reaps children."""
        try:
            callback()
        except Exception as error:
            log.error("the watcher met an unexpected error, please report it: %r", error)
            log.debug("where that came from", exc_info=True)


def lock_directory(path):
    """Return a descriptor that holds a shared lock on a directory. Raises OSError.

    Where another has it locked, which who can read it can do, it is without one.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return fd


class OwnDirectory:
    """A directory of this server's among temporary files, and what is in it.

    It is locked (flock(2)), so that systemd-tmpfiles leaves it alone, and bears a
    marker, so that a later server can tell it from a user's own and remove it when
    its server was killed. What is removed all the same restore() writes again.
    """

    PREFIX = "kapow-"
    MARKER = ".kapow-server"

    def __init__(self, parent=None, mode=0o700):
        """Make it in the directory `parent`, None for the usual one. Raises OSError."""
        self.path = tempfile.mkdtemp(prefix=self.PREFIX, dir=parent)
        self._mode = mode
        self._files = {self.MARKER: b""}    # name -> what is in it
        self._fd = None                     # the directory's, which holds the lock
        self._identity = None               # its device and inode
        try:
            self._take()
        except BaseException:
            shutil.rmtree(self.path, ignore_errors=True)
            raise

    def fill(self, files):
        """Write `files`, {name: bytes}; they can be executed. Raises OSError."""
        self._files.update(files)
        self._write_all()

    def is_ours(self):
        """Return True if the path still leads to it: whoever takes it runs his code in our place."""
        try:
            found = os.lstat(self.path)         # of each start of a program
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._identity

    def is_whole(self):
        """Return True if nothing is missing."""
        return self.is_ours() and all(os.path.lexists(os.path.join(self.path, name))
                                      for name in self._files)

    def restore(self):
        """Write what is missing. Raises OSError, also if another user has taken the path."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.path, 0o700)
        self._take()
        log.warning("%s was removed, or something in it, and is there again", self.path)

    def _take(self):
        """Lock what is at the path, if it is ours, and write all of it."""
        fd = lock_directory(self.path)
        found = os.fstat(fd)
        if found.st_uid != os.geteuid():
            os.close(fd)
            raise FileExistsError(errno.EEXIST, "another user has taken its path")
        self._identity = found.st_dev, found.st_ino
        before, self._fd = self._fd, fd     # with both locks, until there is the new one
        if before is not None:
            os.close(before)
        self._write_all()

    def _write_all(self):
        for name, data in self._files.items():
            self._write(name, data)
        os.fchmod(self._fd, self._mode)

    def _write(self, name, data):
        new = f".new-{name}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(new, flags, 0o600, dir_fd=self._fd), "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), self._mode)
        # Who reads it finds all of it.
        os.rename(new, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def close(self):
        """Remove it, if it is still ours."""
        if self.is_ours():
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._fd)


def remove_if_abandoned(path):
    """Remove a directory that bears the marker of a server, if nobody has it locked."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            marker = os.stat(OwnDirectory.MARKER, dir_fd=fd, follow_symlinks=False)
            if {marker.st_uid, os.fstat(fd).st_uid} == {os.geteuid()} and stat.S_ISREG(marker.st_mode):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(fd)


def remove_abandoned(parents):
    """Remove what killed servers of this user left in the directories `parents`."""
    for parent in parents:
        with contextlib.suppress(OSError):
            for name in os.listdir(parent):
                if name.startswith(OwnDirectory.PREFIX):
                    remove_if_abandoned(os.path.join(parent, name))


class Caretaker:
    """Looks after what others may remove, as a cleaner of temporary files does.

    A thing has is_whole(), which does not block, and restore(), which raises OSError.
    """

    def __init__(self, watcher):
        self._watcher = watcher
        self._things = []
        self._lock = threading.Lock()   # guards the next two
        self._deadline = None           # the watcher's, None before start()
        self._stopped = False
        self._failed = set()            # things that could not be restored, which was said
        self._restoring = threading.Lock()      # held by the thread that restores

    def add(self, thing):
        """Look after `thing`, too."""
        self._things.append(thing)

    def start(self):
        """Begin to look, or go on."""
        deadline = self._watcher.call_later(CARE_INTERVAL, self._check)
        with self._lock:
            self._deadline, stopped = deadline, self._stopped
        if stopped:
            self._watcher.cancel(deadline)

    def stop(self):
        """Look no more, and wait until what is at work has ended."""
        with self._lock:
            self._stopped, deadline = True, self._deadline
        if deadline is not None:
            self._watcher.cancel(deadline)
        with self._restoring:
            pass

    def _check(self):
        """Called on the watcher's thread."""
        lost = [thing for thing in self._things if not thing.is_whole()]
        if lost:
            with contextlib.suppress(RuntimeError):     # no thread: the next time
                threading.Thread(target=self._restore, args=(lost,), daemon=True).start()
        self.start()

    def _restore(self, things):
        with self._restoring:
            for thing in things:
                if self._stopped:
                    return
                try:
                    thing.restore()
                    self._failed.discard(thing)
                except OSError as error:
                    if thing not in self._failed:
                        self._failed.add(thing)
                        log.error("what was removed cannot be written again: %s", error)


class OutputLogger:
    """Logs what comes through a pipe, line by line, each behind `label`.

    `watcher` is one for this purpose alone: when nobody reads the log it stands
    still, and in the end the programs that talk.
    """

    def __init__(self, watcher, label):
        """Make the pipe; `writer` is its end for the child, to be closed after the fork."""
        self._watcher = watcher
        self._label = label
        self._rest = b""
        self._reader, self.writer = os.pipe()
        os.set_blocking(self._reader, False)
        watcher.on_readable(self._reader, self._read)

    def _read(self):
        try:
            data = os.read(self._reader, PIECE)
        except BlockingIOError:
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LOG_LINE_LIMIT or (not data and self._rest):
            lines.append(self._rest)
            self._rest = b""
        for line in lines:
            log.info("%s: %s", self._label, printable(line))
        if not data:
            self._watcher.forget(self._reader)
            os.close(self._reader)


def adopts_orphans():
    """Tell whether children of others come to this process when those end.

    So it is for process 1, and for a child subreaper, which somebody has made it
    (PR_SET_CHILD_SUBREAPER, prctl(2)).
    """
    if os.getpid() == 1:
        return True
    try:
        import ctypes
        answer = ctypes.c_int()
        ctypes.CDLL(None).prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(answer))
    except (ImportError, OSError, AttributeError):      # another system's, or a smaller Python
        return False
    return bool(answer.value)


def child_pids():
    """Return the ids of this process's children, a set; of what comes and goes meanwhile some.

    Linux alone tells (proc_pid_task(5), children).
    """
    found = set()
    with contextlib.suppress(FileNotFoundError):
        for task in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError), \
                    open(f"/proc/self/task/{task}/children", "rb") as file:
                found.update(map(int, file.read().split()))
    return found


class Reaper:
    """Reaps children that are not ours: what handlers left behind, where that comes to us.

    Those of ours are reaped by subprocess, and must not be by others. Between
    its fork and keep() nobody knows that a child is ours. So one that is not
    known is left alone until all starts are over that were under way when it
    was seen first. Safe from many threads.
    """

    def __init__(self, watcher):
        self._watcher = watcher
        self._lock = threading.Lock()       # guards what follows
        self._starts = set()                # under way
        self._ours = set()                  # pids
        self._strangers = {}                # pid -> the starts that it may come of; the watcher's
        self._looks = 0                     # that are due

    def begin(self):
        """Note that a program is about to be started; return what end() takes."""
        start = object()
        with self._lock:
            self._starts.add(start)
        return start

    def keep(self, pid):
        """Note a child of ours, before end()."""
        with self._lock:
            self._ours.add(pid)

    def end(self, start):
        """Note that a start is over, whether it came to a child or not."""
        with self._lock:
            self._starts.discard(start)

    def forget(self, pid):
        """Note that a child of ours was reaped."""
        with self._lock:
            self._ours.discard(pid)

    def look_soon(self):
        """Look for children that have exited, since one has.

        Not at once, as many may, and twice: a child can change its place in
        the list while that is read.
        """
        with self._lock:
            idle, self._looks = not self._looks, 2
        if idle:
            self._watcher.call_later(REAP_TIME, self._look)

    def _look(self):
        """Called on the watcher's thread."""
        unsure = False
        for pid in self._sort_out(child_pids()):
            if self._strangers[pid]:
                unsure = True
            else:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
        with self._lock:
            self._looks = max(self._looks - 1, int(unsure))
            more = self._looks
        if more:
            self._watcher.call_later(REAP_TIME, self._look)

    def _sort_out(self, pids):
        """Return those of the children `pids` that are not known to be ours.

        The starts are looked at after the children were: a child of ours that
        was seen before its keep() has its start here.
        """
        with self._lock:
            self._strangers = {pid: self._strangers.get(pid, self._starts) & self._starts
                               for pid in pids - self._ours}
            return list(self._strangers)


class Child:
    """A program of ours, in a process group of its own.

    The group's number stays taken while it has a member, and the program itself
    is one until it is reaped. So a handler's is reaped when nobody will want to
    kill the group any more; reaping and signalling hold the same lock. What
    outlives the program in a group that was being killed is looked at again
    until it is gone or SIGKILL is due: it keeps the number as well.
    """

    def __init__(self, popen, watcher, reaper, on_exit, keep):
        """`on_exit(child, returncode)` is called on the watcher's thread.

        The Reaper knows of it. With `keep` the program is not reaped before
        release().
        """
        self._popen = popen
        self._reaper = reaper
        self.pid = popen.pid        # and its process group's
        self._watcher = watcher
        self._on_exit = on_exit
        self._keep = keep
        self._lock = threading.Lock()
        self._killing = False       # SIGTERM was sent
        self._gone = False          # there is no group to be signalled any more
        watcher.on_exit(popen.pid, self._exited)

    def _exited(self):
        found = os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOWAIT)
        exited = found.si_code == os.CLD_EXITED
        if not self._keep:
            self.release()
        self._on_exit(self, found.si_status if exited else -found.si_status)

    def release(self):
        """Reap the program, which has exited.

        From now on its group is left to itself, unless it is being killed.
        """
        with self._lock:
            self._popen.wait()
            if self._killing:
                self._signal(0)     # finds out whether others are left
            else:
                self._gone = True
        self._reaper.forget(self.pid)

    def send(self, signum):
        """Send a signal to the program alone; return whether it was there to get it."""
        with self._lock:
            if self._popen.returncode is None:
                os.kill(self.pid, signum)
            return self._popen.returncode is None

    def kill(self, delay=KILL_DELAY):
        """Send SIGTERM to the group now and, to what is left in `delay` seconds, SIGKILL."""
        with self._lock:
            if self._killing or self._gone:
                return
            self._killing = True
            self._signal(signal.SIGTERM)
        self._look_later(KILL_LOOK, time.monotonic() + delay)

    def _look_later(self, seconds, deadline):
        left = deadline - time.monotonic()
        self._watcher.call_later(max(min(seconds, left), 0),
                                 lambda: self._look(min(2 * seconds, KILL_LOOK_LAST), deadline))

    def _look(self, seconds, deadline):
        due = time.monotonic() >= deadline
        with self._lock:
            if not self._gone:
                self._signal(signal.SIGKILL if due else 0)
            done = self._gone or due
        if not done:
            self._look_later(seconds, deadline)

    def _signal(self, signum):
        try:
            os.killpg(self._popen.pid, signum)
        except (ProcessLookupError, PermissionError):   # nobody left, or nobody of ours
            self._gone = True


# What a shell that runs for a handler uses in place of the client: a call is
# made with its builtins alone, over the Channel, and costs no program start.
# FAST, CLIENT and SERVER stand for what TOOLS says. All names but those of the
# two commands begin with _kapow; it is POSIX sh with `local`, and Linux's /proc.
# What cannot be done here goes to the client, FAST.
SHELL_LIBRARY = r"""
# kapow and kapowctl for handlers in sh; a script may read it too: . kapow.sh

kapow() {
    # Of a shell that traces its commands (set -x) this line alone, for one call.
    case $- in *x*) { local -; set +x; } 2>/dev/null ;; esac
    case ${1-} in
    get|set) kapowctl "$@" ;;
    route|service|handler) $_kapow_exec CLIENT "$@" ;;
    *) $_kapow_exec SERVER "$@" ;;
    esac
}

kapowctl() {
    case $- in *x*) { local -; set +x; } 2>/dev/null ;; esac
    case ${1-} in
    get|set) ;;
    *)
        $_kapow_exec CLIENT "$@"
        return
        ;;
    esac
    # A trap that makes a call must not spoil the one that it interrupted.
    local _kapow_answer _kapow_calls _kapow_files _kapow_free _kapow_number _kapow_piece \
        _kapow_rest _kapow_self _kapow_slot _kapow_status
    case $#$1${2-}${3-} in
    2get/*) _kapow_get "$2" ;;
    2set/*) _kapow_pour "$2" ;;
    4set--/*) _kapow_set "$3" "$4" ;;
    3set/*)
        case $3 in
        -*) $_kapow_exec FAST "$@" ;;
        *) _kapow_set "$2" "$3" ;;
        esac
        ;;
    *) $_kapow_exec FAST "$@" ;;
    esac
}

_kapow_exec=            # a script that does nothing else says exec
_kapow_serial=0         # of the last call

_kapow_get() {          # RESOURCE
    if ! _kapow_call get "$1" ""; then
        $_kapow_exec FAST get "$1"
        return
    fi
    case $_kapow_answer in
    =*)
        if ! command printf %b "${_kapow_answer#=}" 2>/dev/null; then
            command printf 'kapowctl: cannot write to standard output\n' >&2
            return 1
        fi
        ;;
    "#"*) return "$_kapow_status" ;;
    *) _kapow_finish "$1" ;;
    esac
}

_kapow_set() {          # RESOURCE VALUE
    # A call is one line, and one write of at most 4096 bytes.
    case $2 in
    *"
"*) set -- "$1" "$2" long ;;
    esac
    if [ "${3-}" ] || [ "${#2}" -gt 800 ]; then
        command printf %s "$2" | _kapow_pour "$1"
    elif _kapow_call set "$1" "$2"; then
        _kapow_finish "$1"
    else
        $_kapow_exec FAST set -- "$1" "$2"
    fi
}

_kapow_pour() {         # RESOURCE, its value on standard input
    # $$ is the whole shell, this may be a fork of it; and descriptor 0 is
    # another file while read has it, descriptor 9 is not.
    for _kapow_self in /proc/self/task/*; do :; done
    if [ -p /proc/self/fd/0 ] && _kapow_call pour "$1" "${_kapow_self##*/}" 9<&0; then
        _kapow_finish "$1"
    elif [ -f /proc/self/fd/0 ] && command -v cat >/dev/null; then
        command cat - | _kapow_pour "$1"
    else
        $_kapow_exec FAST set "$1"
    fi
}

_kapow_finish() {       # RESOURCE
    case $_kapow_answer in
    "!"*)
        case $1 in
        *[[:cntrl:]]*) set -- "$(command printf %s "$1" | command tr "[:cntrl:]" "?")" ;;
        esac
        command printf 'kapowctl: %s: %b\n' "$1" "${_kapow_answer#!}" >&2
        return 1
        ;;
    esac
}

# Make a call, VERB RESOURCE VALUE, and leave its answer in _kapow_answer; what
# does not fit there is printed. Fails when the client must be used instead. A
# slot whose answer is not read whole, or is that to another call, is not made
# free again: nobody can take what is left in it for an answer.
_kapow_call() {
    case ${KAPOW_CHANNEL-} in
    *" ${KAPOW_HANDLER_ID-} ${KAPOW_DATA_URL-}") ;;
    *) return 1 ;;
    esac
    case $2 in
    *"
"*) return 1 ;;
    esac
    [ "${#2}" -le 200 ] || return 1
    # read takes the characters of IFS off both ends; no answer has blanks.
    case ${IFS-} in
    *[![:space:]]*)
        (IFS=) 2>/dev/null || return 1      # it cannot be changed
        ;;
    esac
    _kapow_files=${KAPOW_CHANNEL%% *}
    _kapow_rest=${KAPOW_CHANNEL#* }
    _kapow_calls=$_kapow_files/${_kapow_rest%% *}
    [ -p "$_kapow_calls" ] || return 1
    for _kapow_slot in 1 2; do
        _kapow_rest=${_kapow_rest#* }
        _kapow_free=$_kapow_files/${_kapow_rest%% *}
        _kapow_rest=${_kapow_rest#* }
        _kapow_read_line "$_kapow_free"
        [ "$_kapow_status" != 0 ] || break
        _kapow_slot=
    done
    [ "$_kapow_slot" ] || return 1
    _kapow_slot=${_kapow_rest%% *}
    _kapow_serial=$((_kapow_serial + 1))
    _kapow_number=${KAPOW_HANDLER_ID%%-*}.$_kapow_serial
    command printf '\000%s %s %s %s\000%s\000%s\000\n' "$KAPOW_HANDLER_ID" "$_kapow_slot" \
        "$_kapow_number" "$1" "$2" "$3" >"$_kapow_calls" || return 1
    _kapow_read "$_kapow_files/$_kapow_slot" || return 1
    case $_kapow_answer in
    "$_kapow_number:"*) _kapow_answer=${_kapow_answer#"$_kapow_number:"} ;;
    *) return 1 ;;
    esac
    case $_kapow_answer in
    "#"*) _kapow_copy "$_kapow_files/$_kapow_slot" || return ;;
    esac
    command echo >"$_kapow_free"
    [ "$_kapow_answer" != "?" ]
}

# Print the value behind the answer #LENGTH, from PIPE. After it comes the handler's id, which
# no value can have in it: so a head that read less, or more, is seen.
_kapow_copy() {
    command head -c "${_kapow_answer#?}" <"$1"
    _kapow_status=$?
    [ "$_kapow_status" != 127 ] || return 1
    if [ "$_kapow_status" = 0 ]; then
        _kapow_read "$1" && [ "$_kapow_answer" = "$KAPOW_HANDLER_ID" ] && _kapow_answer="#" && return
        _kapow_answer="!the value was cut short"
    fi
    # This call has its answer, but the slot is at an end.
    _kapow_free=/dev/null
}

# Read a line of PIPE into _kapow_piece, and its status into _kapow_status: in dash the
# status of a trap can pass for that of what it interrupts, but not in $?.
_kapow_read_line() {
    case ${IFS-} in
    *[![:space:]]*) IFS= command read -r _kapow_piece <"$1" ;;
    *) command read -r _kapow_piece <"$1" ;;
    esac
    _kapow_status=$?
}

# Read an answer from PIPE. A signal that is trapped interrupts read, maybe in
# the middle; the end of the file comes when the server is no more.
_kapow_read() {
    _kapow_answer=
    while :; do
        _kapow_read_line "$1"
        _kapow_answer=$_kapow_answer$_kapow_piece
        [ "$_kapow_status" != 0 ] || return 0
        [ -p "$1" ] || return 1
    done
}
"""

# One call: the handler's id, the number of the pipe for the answer, that of the call (a
# part of the id, and a serial), verb, resource and value, which of a pour is the
# caller's process id. It is written at once, and no part holds a newline or a
# NUL: what else may be written into the pipe spoils no call.
CALL = re.compile(rb"\0([0-9a-f-]{36}) ([0-9]{1,9}) ([0-9a-f]{8}\.[0-9]{1,9}) (get|set|pour)"
                  rb"\0([^\0\n]*)\0([^\0\n]*)\0\n")

# The answers to a call. What follows REFUSED is the reason, what follows VALUE a value,
# both as escape_value() writes them; after LONG_VALUE come the number of its bytes and a
# newline, the value itself, and the handler's id. On the pipe the number of the call stands
# before an answer, with a colon, and a newline behind it.
DONE, VALUE, LONG_VALUE, REFUSED, ASK_ELSEWHERE = b"+", b"=", b"#", b"!", b"?"

NOT_PLAIN = re.compile(rb"[^!-\[\]-~]")       # backslash, blanks and all but printable ASCII


def escape_value(value):
    """Return bytes as ASCII without blanks that printf(1) makes the same bytes of, with %b."""
    return NOT_PLAIN.sub(lambda found: b"\\0%03o" % found.group()[0], value)


def can_have_channels():
    """Tell whether this system has what a Channel needs: Linux has, with /proc."""
    return (hasattr(os, "pipe2") and hasattr(os, "pidfd_open")
            and os.path.exists(f"/proc/{os.getpid()}/fd/0"))


def open_standard_input(pid):
    """Open the pipe that is the standard input of a shell that pours, its descriptor 9.

    Return a descriptor that does not block. Raises OSError.
    """
    fd = os.open(f"/proc/{pid}/fd/9", os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileNotFoundError(errno.ENOENT, "this is no pipe")
    return fd


def refusal(error):
    """Return an ApiError as the answer to a call."""
    return REFUSED + escape_value(error.reason.encode())


def unread(fd):
    """Return how many bytes wait in a pipe."""
    return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), sys.byteorder)


def close_all(fds):
    """Close descriptors."""
    for fd in fds:
        os.close(fd)


class BodySink:
    """Where a Pour into the response's body goes."""

    def __init__(self, handler, mode):
        """Raises ApiError, as all the others."""
        self._handler = handler
        self._write = handler.begin(mode)

    def offer(self, data):
        """Take bytes; return whether there is room for more."""
        return self._handler.offer(self._write, data)

    def when_room(self, callback):
        """Call `callback()`, on any thread, when there is room."""
        self._handler.when_room(self._write, callback)

    def finish(self):
        """The value is complete."""

    def close(self):
        """Called at the end in any case."""
        self._handler.end(self._write)


class ValueSink:
    """Where a Pour into a small value goes. Methods as in BodySink."""

    def __init__(self, handler, resource, segments):
        self._handler, self._resource, self._segments = handler, resource, segments
        self._value = b""

    def offer(self, data):
        """As in BodySink; there is always room, up to VALUE_LIMIT."""
        self._value += data
        if len(self._value) > VALUE_LIMIT:
            raise ApiError(413)
        return True

    def finish(self):
        self._resource.write(self._handler, self._value, self._segments)

    def close(self):
        """As in BodySink."""


def open_sink(handler, resource, segments):
    """Return where the value of `resource` goes. Raises ApiError."""
    if resource.mode is not None:
        return BodySink(handler, resource.mode)
    if resource.put is None:
        raise ApiError("Invalid Resource Path")
    return ValueSink(handler, resource, segments)


class Siphon:
    """Moves bytes from a pipe into a sink, as they come and as the sink has room.

    Lives on the watcher's thread. A subclass may override empty(), and ended(),
    which is called once.
    """

    def __init__(self, watcher, sink, fd):
        """`fd` does not block; it is read and closed. `sink` is as BodySink."""
        self._watcher = watcher
        self._sink = sink
        self._fd = fd               # None when it has ended
        self._watched = False       # whether the watcher looks at _fd
        self.paused = False         # the sink has no room

    def read(self):
        """Take what there is, and have the watcher call again for the rest."""
        self.paused = False
        if self._fd is None:        # it ended while this call was on its way
            return
        try:
            for _ in range(READS_AT_ONCE):
                data = os.read(self._fd, PIECE)
                if not data:
                    self.complete()
                    return
                if not self._sink.offer(data):
                    self._pause()
                    return
        except BlockingIOError:
            self.empty()
            return
        except (ApiError, BadProgram) as error:
            self.close(error)
            return
        self._watch()

    def empty(self):
        """Called when nothing is there now."""
        self._watch()

    def _watch(self):
        if not self._watched:
            self._watched = True
            self._watcher.on_readable(self._fd, self.read)

    def _unwatch(self):
        if self._watched:
            self._watched = False
            self._watcher.forget(self._fd)

    def _pause(self):
        self.paused = True
        self._unwatch()
        self._sink.when_room(lambda: self._watcher.call_soon(self.read))

    def complete(self):
        """End it: all is in the sink."""
        try:
            self._sink.finish()
        except (ApiError, BadProgram) as error:
            self.close(error)
        else:
            self.close(None)

    def close(self, error):
        """End it as it is; `error` says why, None for no error."""
        if self._fd is None:        # the watcher saw several ends at once
            return
        self._unwatch()
        os.close(self._fd)
        self._fd = None
        self._sink.close()
        self.ended(error)

    def ended(self, error):
        """Called when it has ended, with what close() got."""
        raise NotImplementedError


class Pour(Siphon):
    """A value that the server itself reads from the standard input of a `kapow set`.

    So no program is needed to bring it over. The calling shell waits for the
    answer; when it dies instead, the value ends.
    """

    def __init__(self, watcher, sink, fd, pid, on_end):
        """`on_end(error, died)` is called once; an ApiError, or None, and whether the caller died."""
        super().__init__(watcher, sink, fd)
        self._pid = pid
        self._on_end = on_end
        self._caller = None         # its pidfd, once it has to wait
        self._died = False

    def _watch(self):
        if self._caller is None:
            try:
                self._caller = os.pidfd_open(self._pid)
            except ProcessLookupError:
                self.stop()
                return
            except OSError:         # there are too many files
                self.close(ApiError(500))
                return
            self._watcher.on_readable(self._caller, self._lose_caller)
        super()._watch()

    def _lose_caller(self):
        self._died = True
        self.close(None)

    def stop(self):
        """Read no more: the handler has ended."""
        self.close(ApiError("Handler ID Not Found"))

    def ended(self, error):
        if self._caller is not None:
            self._watcher.forget(self._caller)
            os.close(self._caller)
        self._on_end(error, self._died)


class Slot:
    """Room for one call at a time: a pipe that tells whether it is free, one for answers.

    In the first is a newline, which a caller takes out and puts back when it
    has read its answer. No process keeps it open for writing: a reader that
    finds it empty finds the end of the file, and does not wait. Only the server
    keeps the other one open for writing: when it dies no caller waits for ever.
    """

    def __init__(self):
        """Raises OSError."""
        self.used = False           # there was a call since is_clean() was True
        self.pour = None            # the Pour that its caller waits for
        self.pending = False        # its caller waits for another thread; the watcher's changes it
        self._grown = False         # the pipe for answers is larger than others
        with contextlib.ExitStack() as stack:
            self.free, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            stack.callback(os.close, self.free)
            os.close(writer)
            self.answers = self._open_answers()
            stack.callback(os.close, self.answers)
            self.renew()
            stack.pop_all()
        self.pipes = f"{self.free} {self.answers}"      # as programs are told

    def _open_answers(self):
        """Return one descriptor that reads and writes: an answer may come before its reader."""
        pipe = os.pipe2(os.O_CLOEXEC)
        try:
            return os.open(f"/proc/self/fd/{pipe[0]}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        finally:
            close_all(pipe)

    def answer(self, number, data):
        """Answer the call `number`; a caller that breaks the rules, and reads none, gets none."""
        with contextlib.suppress(BlockingIOError):
            os.write(self.answers, b"%b:%b\n" % (number, data))

    def answer_with(self, number, call):
        """Answer with what `call()` returns, unless that is None, or with its failure."""
        answer = ASK_ELSEWHERE
        try:
            answer = call()
        except ApiError as error:
            answer = refusal(error)
        except (OSError, ProtocolError):    # of /proc; of the client's, in the body
            pass
        finally:
            if answer is not None:
                self.answer(number, answer)

    def make_room(self, size):
        """Have an answer of `size` bytes taken at once. Raises OSError.

        A user who has many pipes gets new ones that take a page and no more.
        """
        if size > select.PIPE_BUF:
            fcntl.fcntl(self.answers, F_SETPIPE_SZ, max(size, PIPE_SIZE))
            self._grown = size > PIPE_SIZE

    def is_clean(self):
        """Return True if no caller is at it, and none died there; then it is as new.

        Also where no call was seen: a program may have written to its pipes all the same.
        """
        if self.pending or unread(self.free) != 1 or (self.used and unread(self.answers)):
            return False
        self.used = False
        if self._grown:             # the system grants a user so much and no more
            self._grown = False
            fcntl.fcntl(self.answers, F_SETPIPE_SZ, PIPE_SIZE)
        return True

    def renew(self):
        """Make it as new, whatever a caller that died has left."""
        for fd in (self.free, self.answers):
            with contextlib.suppress(BlockingIOError):
                while os.read(fd, PIECE):
                    pass
        writer = os.open(f"/proc/self/fd/{self.free}", os.O_WRONLY | os.O_NONBLOCK)
        with contextlib.suppress(BlockingIOError):      # a caller that breaks the rules fills it
            os.write(writer, b"\n")
        os.close(writer)

    def close(self):
        """Close both pipes."""
        close_all([self.free, self.answers])


class Channel:
    """The pipes over which the shells that run for handlers call this server.

    What a call means is what the same call of the data interface means. One
    that cannot be answered here at once is told so, and made there.

    All calls come through one pipe. Each handler is lent SLOTS for the answers
    for as long as it lives; they are used again and again, so a handler that
    makes no calls costs nothing. Programs inherit none of this: they open the
    pipes by the server's paths in /proc, which only its user can. A slot is never
    closed, so its path leads nowhere else; a late caller of a handler that has
    ended may meet another handler's, where only the one that took the newline
    gets an answer, and this one a refusal. A slot that comes back in use waits
    until its caller is done; when that seems to have died it is made anew. One
    whose answer another thread prepares waits for that first.

    lend() and give_back() are for user threads; all else runs on the watcher's,
    but that a form which is not small is parsed by a thread of its own.
    """

    def __init__(self, watcher, handlers, limit):
        """`handlers` is the HandlerTable, `limit` how many have slots. Raises OSError."""
        self._watcher = watcher
        self._handlers = handlers
        self._limit = limit
        # With a writer of its own a pipe does not come to its end.
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._calls = f"/proc/{os.getpid()}/fd {self._writer}"      # as programs are told
        self._slots = {}                        # number of the pipe for answers -> Slot
        self._idle = collections.deque()        # tuples of SLOTS that are lent together
        self._unclean = collections.deque()     # the same, with when they came back
        self._parsers = set()                   # threads
        watcher.on_readable(self._reader, self._read)

    def lend(self, handler):
        """Give `handler` its slots; return the names of all pipes and its id, for its program.

        None when there are no slots to be had.
        """
        try:
            handler.slots = self._idle.popleft()
        except IndexError:
            handler.slots = self._clean_again() or self._make_slots(handler)
        if not handler.slots:
            return None
        return " ".join([self._calls, *(slot.pipes for slot in handler.slots), handler.id])

    def give_back(self, handler):
        """Take the slots of `handler`, which has ended."""
        if not handler.slots:
            return
        if all([slot.is_clean() for slot in handler.slots]):
            self._idle.append(handler.slots)
        else:
            self._unclean.append((time.monotonic(), handler.slots))

    def _clean_again(self):
        """Return slots that were not clean and are; None where there are none."""
        try:
            since, slots = self._unclean.popleft()
        except IndexError:
            return None
        if all([slot.is_clean() for slot in slots]):
            return slots
        if time.monotonic() - since < LOST_TIME or any([slot.pending for slot in slots]):
            self._unclean.append((since, slots))
            return None
        try:
            for slot in slots:
                slot.renew()
        except OSError:                 # too many open files, say
            self._unclean.append((since, slots))
            return None
        return slots

    def _make_slots(self, handler):
        if len(self._slots) >= SLOTS * self._limit:
            return ()
        slots = []
        try:
            for _ in range(SLOTS):
                slots.append(Slot())
        except OSError as error:                # too many open files
            log.debug("%s gets no channel: %s", handler.request_id, error.strerror)
            for slot in slots:
                slot.close()
            return ()
        for slot in slots:
            self._slots[slot.answers] = slot
        return tuple(slots)

    def join(self):
        """Wait for the threads that it has started, before the watcher ends: no handler runs."""
        for thread in list(self._parsers):
            thread.join()

    def close(self):
        """Close all pipes, when the watcher has ended."""
        close_all([self._reader, self._writer])
        for slot in self._slots.values():
            slot.close()

    def _read(self):
        try:
            data = os.read(self._reader, PIPE_SIZE)
        except BlockingIOError:         # somebody else has read them
            return
        for found in CALL.finditer(data):
            handler_id, answers, *call = found.groups()
            if int(answers) in self._slots:
                self._take(handler_id.decode(), self._slots[int(answers)], *call)

    def _take(self, handler_id, slot, number, verb, path, value):
        """Answer a call, or see to it that it will be."""
        slot.used = True
        slot.answer_with(number,
                         lambda: self._call(handler_id, slot, number, verb, path, value))

    def _call(self, handler_id, slot, number, verb, path, value):
        """Do a call; return its answer, None when there is none or it will come later."""
        handler = self._handlers.find(handler_id)
        if slot not in handler.slots or slot.pour is not None or slot.pending:
            return None                         # this one breaks the rules
        if verb == b"pour" and handler.pid is None:     # its thread has not come that far
            self._watcher.call_later(LAUNCH_TIME, lambda: self._take(
                handler_id, slot, number, verb, path, value))
            return None
        shown = "get" if verb == b"get" else "set"
        try:
            resource, segments = find_resource(path)
            answer = self.VERBS[verb](self, handler, slot, number, resource, segments, value)
        except ApiError as error:
            log_call(handler, shown, path, error.reason)
            raise
        if answer is not None and answer != ASK_ELSEWHERE:
            log_call(handler, shown, path)
        return answer

    # The verbs. Each returns the answer, None when it will come later.

    def _get(self, handler, slot, number, resource, segments, _value):
        if resource.in_body:
            body = handler.request.body
            limit = MEMORY_LIMIT if resource.words[1] == b"body" else CHANNEL_FORM_LIMIT
            if body.length is None or body.length > limit:
                return ASK_ELSEWHERE
            body.take_in()
            if not body.arrived:
                return ASK_ELSEWHERE
            if resource.in_form and not self._parse_here(handler.request):
                return self._parse_apart(handler, slot, number, resource, segments)
        return self._value(handler, slot, resource, segments)

    def _parse_here(self, request):
        """Return whether the form of a request is parsed, after doing so if that takes no time."""
        return request.form.is_parsed or (
            request.body.length <= SMALL_FORM and request.form.parse(wait=False))

    def _parse_apart(self, handler, slot, number, resource, segments):
        """Have another thread parse a form, and answer then; return ASK_ELSEWHERE when there is none."""
        form = handler.request.form

        def parse():
            # What goes wrong with the body the caller learns elsewhere.
            with contextlib.suppress(Exception):
                form.parse()
            self._watcher.call_soon(answer)

        def answer():
            self._parsers.discard(parser)
            try:
                slot.answer_with(number, find_value)
            finally:
                slot.pending = False

        def find_value():
            self._handlers.find(handler.id)     # it may have ended
            if not form.is_parsed:
                return ASK_ELSEWHERE
            return self._value(handler, slot, resource, segments)

        parser = threading.Thread(target=parse, name="form", daemon=True)
        slot.pending = True
        self._parsers.add(parser)
        try:
            parser.start()
        except RuntimeError:                    # there are too many of them
            self._parsers.discard(parser)
            slot.pending = False
            return ASK_ELSEWHERE
        return None

    def _value(self, handler, slot, resource, segments):
        """Return the answer that holds the value of a resource."""
        value = resource.read(handler, segments)
        if isinstance(value, Stream):
            value = b"".join(value.pieces)
        text = escape_value(value[:LINE_ANSWER_LIMIT + 1])
        if len(text) <= LINE_ANSWER_LIMIT:
            return VALUE + text
        answer = LONG_VALUE + b"%d\n%b%b" % (len(value), value, handler.id.encode())
        slot.make_room(len(answer) + NUMBER_SIZE)
        return answer

    def _set(self, handler, _slot, _number, resource, segments, value):
        if resource.mode is not None and handler.response.must_wait_elsewhere:
            return ASK_ELSEWHERE
        sink = open_sink(handler, resource, segments)
        try:
            sink.offer(value)
            sink.finish()
        finally:
            sink.close()
        return DONE

    def _pour(self, handler, slot, number, resource, segments, value):
        pid = int(value) if value.isdigit() and len(value) < 10 else 0
        if not pid or os.getsid(pid) != handler.pid:
            return ASK_ELSEWHERE
        if resource.mode is not None and handler.response.open_writes:
            return ASK_ELSEWHERE                # its bytes would go to disk
        fd = open_standard_input(pid)
        try:
            sink = open_sink(handler, resource, segments)
        except ApiError:
            os.close(fd)
            raise

        def hang_up():
            """Called when the handler ends."""
            self._watcher.call_soon(pour.stop)

        def ended(error, died):
            """Called when the pour has ended, for whatever reason."""
            handler.remove_call(hang_up)
            slot.pour = None
            log_call(handler, "set", resource.path(segments),
                     "the caller has died" if died else error.reason if error else "")
            if died:
                slot.renew()
            else:
                slot.answer(number, refusal(error) if error else DONE)

        pour = slot.pour = Pour(self._watcher, sink, fd, pid, ended)
        handler.add_call(hang_up)
        pour.read()
        return None

    VERBS = {b"get": _get, b"set": _set, b"pour": _pour}


class Spawner:
    """Starts programs with the environment that handlers and init programs share."""

    def __init__(self, watcher, reaper, environment, outputs=None, file_limit=None,
                 directories=()):
        """`environment` is a dict of str; the Reaper is to spare what is started here.

        `directories` are the OwnDirectories on its PATH: if one is another's by now,
        nothing is started.

        With `outputs`, a Watcher of its own, what they print is logged line by
        line. `file_limit` is the (soft, hard) limit of open files to give them,
        None to leave them the server's.
        """
        self._watcher = watcher
        self._reaper = reaper
        self.environment = environment
        self._outputs = outputs
        self._file_limit = file_limit
        self._directories = directories
        self._null = os.open(os.devnull, os.O_RDWR)

    def close(self):
        """Close what is kept open. No program can be started any more."""
        os.close(self._null)

    def spawn(self, argv, extra, label, stdout, on_exit, keep=False, logged=True, **options):
        """Start the program `argv` and return its Child, which see for `on_exit` and `keep`.

        `extra` is added to the environment; `label` stands before its lines in
        the log; `stdout` is where its standard output goes without debug, or
        always if it is not to be `logged`, a descriptor, None for nowhere.
        `options` are Popen's. Raises OSError when it cannot be started, RuntimeError
        when it cannot be watched; then it does not run.
        """
        for directory in self._directories:
            if not directory.is_ours():
                raise OSError(errno.EPERM, f"{directory.path}, where its commands are, was "
                                           "removed, and is another's or not there")
        loggers, streams = [], {"stdin": self._null, "stdout": stdout or self._null}
        try:
            if self._outputs is not None:
                for name in ("stdout", "stderr") if logged else ("stderr",):
                    loggers.append(OutputLogger(self._outputs, f"{label} {name}"))
                    streams[name] = loggers[-1].writer
            popen = self._start(argv, {**self.environment, **extra}, {**streams, **options})
        finally:
            for logger in loggers:
                os.close(logger.writer)
        with self._killing_on_error(popen):
            self._restore_limit(popen.pid)
            return Child(popen, self._watcher, self._reaper, on_exit, keep)

    @contextlib.contextmanager
    def _killing_on_error(self, popen):
        """Context manager: a new process that nobody will watch is killed and reaped."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                os.killpg(popen.pid, signal.SIGKILL)
            popen.wait()
            self._reaper.forget(popen.pid)
            raise

    def _start(self, argv, environment, options):
        start = self._reaper.begin()
        try:
            # Popen gives SIGPIPE its default back, reset_signals() the others.
            popen = subprocess.Popen(argv, env=environment, start_new_session=True, **options)
            self._reaper.keep(popen.pid)
        finally:
            self._reaper.end(start)
        return popen

    def _restore_limit(self, pid):
        """Give a new child the limit of open files that the server itself was given.

        From outside, a moment after its start: code that runs in a child between
        fork and exec is not safe beside threads.
        """
        if self._file_limit is not None:
            with contextlib.suppress(OSError):          # it has exited already
                os_resource.prlimit(pid, os_resource.RLIMIT_NOFILE, self._file_limit)


def first_line(path):
    """Return the first line of a file, bytes with its end; b"" when there is none to be read."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            return file.readline(KIB)
    except OSError:
        return b""


CRLF_HINT = "its first line ends with CR and LF: save it with LF line ends, as sed -i 's/\\r$//' does"


def ends_with_crlf(path):
    """Return True if a script's line that names the interpreter ends with CR LF, which is part of it."""
    line = first_line(path)
    return line.startswith(b"#!") and line.endswith(b"\r\n")


def start_trouble(error, program):
    """Return why `program` could not be started, and the remedy where it is known.

    It is a path or a name on PATH, `error` what its start raised.
    """
    cause = getattr(error, "strerror", None) or str(error)
    number = getattr(error, "errno", None)
    path = program if os.sep in program else shutil.which(program, os.F_OK) or program
    if number == errno.EACCES and os.path.isfile(path) and not os.access(path, os.X_OK):
        return f"{cause}; make it executable: chmod +x {shlex.quote(path)}"
    if number == errno.ENOENT and ends_with_crlf(path):
        return f"{cause}; {CRLF_HINT}"
    if number == errno.ENOENT and os.path.isfile(path):
        return f"{cause}; the interpreter that its first line names is not there"
    if number == errno.ENOEXEC:
        return f"{cause}; its first line must name an interpreter, as #!/bin/sh does"
    return cause


def signal_name(signum):
    """Return the name of a signal; not every real-time signal has one."""
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"


def describe_exit(returncode):
    """Return how a program ended, in words; `returncode` as subprocess.Popen's."""
    if returncode < 0:
        return f"died of {signal_name(-returncode)}"
    return f"exited with status {returncode}"


def is_clean(returncode):
    """Tell whether a program that ended so has not failed; `returncode` as subprocess.Popen's."""
    return returncode == 0 or -returncode in CLEAN_SIGNALS


def log_exit(handler, returncode):
    """Log how the program of `handler` ended: with --debug, or if it failed.

    That is no failure of its own if it was told to end, but by its timeout.
    """
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s %s after %.3f s", handler.request_id, describe_exit(returncode),
                  time.monotonic() - handler.started)
    if is_clean(returncode) or handler.cause not in (None, "timeout"):
        return
    request = handler.request
    log.error("%s %s %s %s", handler.request_id, request.method,
              printable_path(request), describe_exit(returncode))


def raise_file_limit():
    """Let this process open as many files as it may.

    Return (how many, the limit that there was: (soft, hard), None when nothing was changed).
    """
    soft, hard = limit = os_resource.getrlimit(os_resource.RLIMIT_NOFILE)
    most = FILES_LIMIT if hard == os_resource.RLIM_INFINITY else min(hard, FILES_LIMIT)
    if soft == os_resource.RLIM_INFINITY or soft >= most or not hasattr(os_resource, "prlimit"):
        return min(soft, most) if soft != os_resource.RLIM_INFINITY else most, None
    os_resource.setrlimit(os_resource.RLIMIT_NOFILE, (most, hard))
    return most, limit


def check_memory():
    """Raise StartError if this process may have too little memory (RLIMIT_AS) to begin with.

    With less an interpreter may not even come to say so.
    """
    limit, _ = os_resource.getrlimit(os_resource.RLIMIT_AS)
    if limit != os_resource.RLIM_INFINITY and limit < LEAST_MEMORY:
        raise StartError(f"the limit of memory is {limit // MIB} MiB, and the server needs "
                         f"{LEAST_MEMORY // MIB}; ulimit -v raises it")


class FileBudget:
    """How the files that this process may open are shared out (RLIMIT_NOFILE, getrlimit(2))."""

    def __init__(self, max_handlers, max_connections):
        """As on the command line; 0 handlers is no limit, None connections the most that can be.

        Raises StartError when there is not enough to begin with.
        """
        limit, self.before = raise_file_limit()     # what was before, for children, or None
        self._reserved = max(RESERVED_FILES, limit // RESERVED_PART)
        self._files = limit - OWN_FILES - self._reserved        # for users and handlers
        most = self._files // HANDLER_FILES
        if most < 1:
            raise StartError(f"the limit of open files is {limit}, and the server needs "
                             f"{OWN_FILES + RESERVED_FILES + HANDLER_FILES}; ulimit -n raises it")
        if max_handlers > most:
            log.warning("the limit of open files, %d, is enough for %d handlers at once, not for %d",
                        limit, most, max_handlers)
        self.max_handlers = min(max_handlers, most)
        self._max_connections = self._files if max_connections is None else max_connections

    def user_connections(self, running):
        """Return how many users' connections there may be while `running` handlers run."""
        return min(self._max_connections, self._files - (HANDLER_FILES - 1) * running)

    def data_connections(self, running):
        """Return how many connections the data interface may have meanwhile."""
        return self._reserved // 2 + 2 * running

    def other_connections(self):
        """Return how many connections the control and the status interface may have each."""
        return self._reserved // 4


@contextlib.contextmanager
def keeping_time(watcher, handler, default):
    """Abort `handler` when its time is up, for a with statement.

    Its route's, else `default` seconds; 0 is no limit. The sending of what it
    said ends some time later.
    """
    def time_out():
        """Called on the watcher's thread."""
        deadlines.append(watcher.call_later(KILL_DELAY, handler.interrupt))
        handler.abort(504, "timeout")

    seconds = default if handler.route.timeout is None else handler.route.timeout
    deadlines = [watcher.call_later(seconds, time_out)] if seconds else []
    try:
        yield
    finally:
        for deadline in deadlines:
            watcher.cancel(deadline)


def log_start(handler, argv):
    """With --debug, log the program that is started for `handler`, a list of str."""
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s runs %s", handler.request_id, printable(os.fsencode(shlex.join(argv))))


def release(child, handler):
    """Leave the Child of a handler that is over to itself."""
    if not handler.exited:          # only if a bug ended it early
        child.kill()
        handler.wait_exit()
    child.release()


class Launcher:
    """Answers matched requests by running their routes' entrypoints."""

    def __init__(self, spawner, watcher, timeout, channel=None, library=None, data_url=None):
        """`timeout` is the seconds that a handler has, 0 for no limit.

        With `channel`, a Channel, programs can use that for the calls that they
        would make to `data_url` otherwise; SHELL_LIBRARY is in the file `library`.
        """
        self._spawner = spawner
        self._watcher = watcher
        self._timeout = timeout
        self._channel = channel
        self._library = library
        self._data_url = data_url
        self._silent = weakref.WeakSet()    # Routes of which that was said; the watcher's

    @contextlib.contextmanager
    def running(self, handler):
        """Spawn the entrypoint of `handler` and keep its time, for a with statement.

        Gives what tells the steps of the answer, as Handler.next_step() does. A
        failure to spawn is logged and ends the handler.
        """
        TURN.leave()
        child = None
        try:
            child = self._launch(handler)
            with keeping_time(self._watcher, handler, self._timeout):
                yield handler
        finally:
            if child is not None:
                release(child, handler)
            if self._channel is not None:
                self._channel.give_back(handler)

    def _launch(self, handler):
        def exited(_, returncode):
            """Called on the watcher's thread."""
            log_exit(handler, returncode)
            self._notice_silence(handler, returncode)
            handler.program_ended(is_clean(returncode))

        log_start(handler, handler.route.argv)
        extra = {HANDLER_ID_VARIABLE: handler.id}
        pipes = self._channel.lend(handler) if self._channel is not None else None
        if pipes is not None:
            extra[CHANNEL_VARIABLE] = f"{pipes} {self._data_url}"
        try:
            child = self._spawner.spawn(
                self._argv(handler.route), extra, handler.request_id, None, exited, keep=True)
        except (OSError, ValueError, RuntimeError) as error:
            program, request = handler.route.argv[0], handler.request
            log.error("%s %s %s cannot run %s: %s", handler.request_id, request.method,
                      printable_path(request), program,
                      start_trouble(error, program))
            handler.program_ended(False)
            return None
        handler.launched(child.pid, child.kill)
        return child

    def _notice_silence(self, handler, returncode):
        """Say once for a route that what its program prints is not the response.

        Nobody needs that who sees with --debug where it goes.
        """
        route = handler.route
        with handler.condition:
            needless = handler.response.touched or handler.aborted is not None
        if (needless or not is_clean(returncode) or log.isEnabledFor(logging.DEBUG)
                or route in self._silent):
            return
        self._silent.add(route)
        log.info("%s has set nothing of the response: what the program of %s %s prints is not it, "
                 "pipe that into kapow set /response/body", handler.request_id, route.method,
                 printable(os.fsencode(route.url_pattern)))

    def _argv(self, route):
        """Return the arguments of the entrypoint; of a shell, with SHELL_LIBRARY read first.

        On the line of the command's first, so that what the shell says about
        lines stays true.
        """
        if self._channel is None or not route.calls_from_shell:
            return route.argv
        library = f". {shlex.quote(self._library)}; "
        if is_long(library, LIBRARY_ROOM):      # the commands on the PATH do it, too
            return route.argv
        return [*route.argv[:-1], library + route.command]


# ---------------------------------------------------------------------------
# 8. Services
# ---------------------------------------------------------------------------

# What a client is told while there is nobody to ask.
UNAVAILABLE = (b'{"title": "Cannot service request",'
               b'"detail":"The application is not running. Please check the logs."}')

MANIFEST_REQUEST = format_request(b"GET", b"/_kapow/manifest", [(b"Host", b"localhost")])

PF_EXITING = 0x4                # a flag of a process, field 9 of proc(5), /proc/PID/stat


class SupervisorError(Exception):
    """A Supervisor could not do what it was told; `cause` says why, in words."""

    text = ""

    def __init__(self, cause):
        self.cause = cause
        super().__init__(self.text)


class FailedToStartProcess(SupervisorError):
    """The program could not be run, has exited, or does not answer on its socket."""

    text = "failed to start subprocess"


class FailedToStopProcess(SupervisorError):
    """The program is still there."""

    text = "failed to stop subprocess"


class FailedToSignalProcess(SupervisorError):
    """There is no program to be signalled, or no such signal."""

    text = "failed to signal subprocess"


class ServiceFailure(Exception):
    """A service did not answer a request as it should; the text says what it did instead."""


class ServiceDown(ServiceFailure):
    """A service could not be asked; `deaf` tells that nobody listens on its socket."""

    def __init__(self, error):
        """`error` is an OSError."""
        self.deaf = error.errno in (errno.ECONNREFUSED, errno.ENOENT)
        super().__init__(f"could not be reached: {error.strerror}")


def is_exiting(pid):
    """Tell whether the process `pid` has begun to exit: its files are closed after that.

    Where the system has no /proc, nobody knows.
    """
    TURN.leave()
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return bool(int(file.read().rpartition(b")")[2].split()[6]) & PF_EXITING)
    except OSError:
        return os.path.exists("/proc/self/stat")        # it is gone


class ServiceConnection:
    """A connection to a service, used by one request at a time."""

    def __init__(self, path, look):
        """Connect to the socket `path`. Raises OSError.

        While a service has too many clients at its door, `look()` is called
        now and then, which may raise OSError to give up.
        """
        self.buffer = bytearray()       # received and not yet read
        self.answered = False           # there was a request before this one
        self.since = None               # when that was over, in time.monotonic()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with TURN.left():
                self._connect(path, look)
        except OSError:
            self._socket.close()
            raise

    def _connect(self, path, look):
        set_kernel_timeout(self._socket, socket.SO_SNDTIMEO, CONNECT_LOOK)
        while True:
            with contextlib.suppress(BlockingIOError):      # what connect(2) says when time is up
                self._socket.connect(path)
                set_kernel_timeout(self._socket, socket.SO_SNDTIMEO, None)
                return
            look()

    def is_fit(self, repeatable):
        """Tell whether a request may be sent here; one that is not `repeatable` wants to be sure.

        A service may close a connection at the moment in which it is used
        again. What it has sent already is no answer to this request.
        """
        return ((repeatable or time.monotonic() - self.since < SURE_TIME)
                and not poll_file(self._socket, select.POLLIN, 0))

    def wait(self, seconds):
        """Wait up to `seconds` for the first byte; return whether there is one, or the end."""
        with TURN.left():
            return bool(poll_file(self._socket, select.POLLIN, seconds * 1000))

    def receive(self):
        """Return some bytes, b"" at the end. Raises OSError."""
        held = TURN.leave()             # as left() does, but cheaper: each request comes here
        try:
            return self._socket.recv(PIECE)
        finally:
            if held:
                TURN.take()

    def send(self, data):
        """Send all of `data`. Raises OSError."""
        with contextlib.suppress(BlockingIOError):
            data = memoryview(data)[self._socket.send(data, socket.MSG_DONTWAIT):]
        if data:
            with TURN.left():
                self._socket.sendall(data)

    def shutdown(self):
        """End the connection for every thread that uses it."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self):
        """Close the socket."""
        self._socket.close()


class ConnectionPool:
    """The connections to one process of a service that are idle. Safe from many threads."""

    def __init__(self, path, directory):
        """`path` is the socket's, in the OwnDirectory `directory`."""
        self.path = path
        self._directory = directory
        self._idle = collections.deque()    # ServiceConnections, the last used last
        self._closed = False

    def get(self, repeatable, look):
        """Return an idle connection that is fit, else a new one; as ServiceConnection."""
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:          # another thread has taken it
                break
            if connection.is_fit(repeatable):
                return connection
            connection.close()
        with TURN.left():
            is_ours = self._directory.is_ours()     # else another user could answer there
        if not is_ours:
            raise FileNotFoundError(errno.ENOENT, "the directory of its socket was removed")
        return ServiceConnection(self.path, look)

    def keep(self, connection):
        """Keep a connection that is idle now for requests to come, and close one that is old."""
        connection.answered = True
        connection.since = time.monotonic()
        self._idle.append(connection)
        with contextlib.suppress(IndexError):
            if self._closed:
                self.close_idle()
            elif (len(self._idle) > IDLE_CONNECTIONS
                  or self._idle[0].since < connection.since - IDLE_TIME):
                self._idle.popleft().close()

    def close(self):
        """Close them, and those that come back later."""
        self._closed = True
        self.close_idle()

    def close_idle(self):
        """Close them."""
        with contextlib.suppress(IndexError):
            while True:
                self._idle.popleft().close()


class Exchange:
    """One request to a process of a service, and its response.

    Only cut() is for other threads than the one that wants the response; `is_cut`
    tells whether it was called.
    """

    def __init__(self, instance, method, head, body=b"", pieces=None, chunked=False):
        """`head` and `body` (bytes) are sent at once.

        `pieces` is None, or yields more of the body (bytes) that is sent
        meanwhile by a thread of its own, with `chunked` as chunks.
        """
        self._instance = instance
        self._method = method
        self._data = head + body
        self._pieces = pieces
        self._chunked = chunked
        # What may be sent again (RFC 9110 section 9.2.2).
        self._repeatable = pieces is None and method in (
            "GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE")
        self._lock = threading.Lock()   # of the next two
        self._connection = None         # the ServiceConnection, None before and behind
        self.is_cut = False
        self._upload = None             # the thread that sends the pieces
        self._uploaded = pieces is None
        self._head = None               # the ResponseHead, once it has come
        self._reader = None             # of the response's body

    def cut(self):
        """End the exchange: nobody wants the response any more."""
        with self._lock:
            self.is_cut = True
            if self._connection is not None:
                self._connection.shutdown()

    def begin(self):
        """Send the request and return the ResponseHead.

        Raises ServiceDown, ServiceFailure. A connection that turns out to have
        been closed is replaced, if the request may be sent twice.
        """
        failure = None              # of the last one
        while True:
            try:
                connection = self._connect()
            except ServiceDown:
                if failure is not None:     # it was asked, and died of that
                    raise failure from None
                raise
            try:
                return self._ask(connection)
            except (OSError, ProtocolError) as error:
                stale = (connection.answered and not connection.buffer
                         and isinstance(error, (OSError, PeerLeft)))
                failure = self._failure(error)
                if not stale or not self._repeatable or self.is_cut:
                    raise failure from None
            self._forget_connection().close()

    def _connect(self):
        try:
            connection = self._instance.pool.get(self._repeatable, self._look)
        except OSError as error:
            raise ServiceDown(error) from None
        with self._lock:
            self._connection = connection
            if self.is_cut:
                connection.shutdown()
        return connection

    def _look(self):
        """Called while the service lets nobody in, or does not answer."""
        if self.is_cut:
            raise ConnectionAbortedError(errno.ECONNABORTED, "nobody waits any more")
        # If it takes one connection at a time, it may be waiting for an idle one.
        self._instance.pool.close_idle()

    def _forget_connection(self):
        with self._lock:
            connection, self._connection = self._connection, None
        return connection

    def _ask(self, connection):
        """Send the request, read the head of the response. Raises OSError, ProtocolError."""
        # A service that reads no more may have answered before that.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.send(self._data)
            if self._pieces is not None:
                self._begin_upload(connection)
        self._head = self._read_head(connection)
        self._reader = BodyReader(self._head, connection.buffer, connection.receive)
        return self._head

    def _begin_upload(self, connection):
        upload = threading.Thread(target=self._send_pieces, args=(connection,), daemon=True)
        try:
            with TURN.left():               # it waits for the thread's beginning
                upload.start()
        except RuntimeError as error:           # there are too many of them
            raise ServiceFailure(f"was not sent the body: {error}") from None
        self._upload = upload

    def _send_pieces(self, connection):
        try:
            for data in frame(self._pieces, self._chunked):
                connection.send(data)
            self._uploaded = True
        except ProtocolError:           # of the client, whose handler knows
            self.cut()
        except OSError:                 # of the service: the one that waits for it will see
            pass

    def _read_head(self, connection):
        while not connection.answered and not connection.wait(STUCK_TIME):
            self._look()
        interim = 0
        while True:
            data = take_response_head(connection.buffer)
            if data is None:
                more = connection.receive()
                if not more:
                    raise PeerLeft()
                connection.buffer += more
                continue
            head = ResponseHead(data, self._method)
            if head.status == 101:
                raise ProtocolError(501, "it changes to a protocol that nobody asked for")
            if head.status >= 200:      # the others are interim (RFC 9110 section 15.2)
                return head
            interim += 1
            if interim > INTERIM_LIMIT:
                raise ProtocolError(502, "it sends interim responses without end")

    def _failure(self, error):
        if isinstance(error, PeerLeft) or not isinstance(error, ProtocolError):
            what = "cut its response short" if self._head else "ended without a response"
            return ServiceFailure(what)
        return ServiceFailure(f"answered what is no HTTP: {error}")

    def read(self):
        """Return the next bytes of the body, b"" at its end. Raises ServiceFailure."""
        return self._decode(self._reader.read)

    def read_all(self, limit):
        """Return the whole body. Raises ServiceFailure, also for more than `limit` bytes."""
        return join_pieces(iter(self.read, b""), limit, ServiceFailure("answered too much"))

    def read_buffered(self):
        """Return what is here of the body, without waiting. Raises ServiceFailure."""
        return self._decode(self._reader.read_buffered)

    def _decode(self, read):
        try:
            data = read()
        except (OSError, ProtocolError) as error:
            raise self._failure(error) from None
        if not data and self._ends_with_connection() and self._instance.is_exiting():
            raise ServiceFailure("died within its response")
        return data

    def _ends_with_connection(self):
        return self._reader.done and isinstance(self._head.framing(), CloseFraming)

    def close(self, stop_upload=lambda: None):
        """Give the connection back, or close it.

        `stop_upload()` is to end a wait for more pieces.
        """
        connection = self._forget_connection()
        if connection is None:
            return
        if self._upload is not None:
            TURN.leave()
            self._upload.join(UPLOAD_TIME)
        if self._is_complete(connection):
            self._instance.pool.keep(connection)
            return
        connection.shutdown()
        if self._upload is not None:
            stop_upload()
            self._upload.join()
        connection.close()

    def _is_complete(self, connection):
        """Whether both messages ended where they said, and another request may follow."""
        if self._reader is None or not self._reader.done or not self._uploaded:
            return False
        if connection.buffer:
            log.warning("%s sent more than it announced", self._instance)
        return self._head.keep_alive and not connection.buffer and not self.is_cut


def parse_manifest(status, body):
    """Return the manifest, a dict, in a response; None for none. Raises ServiceFailure."""
    if status == 404:
        return None
    if status != 200:
        raise ServiceFailure(f"answered {status}")
    try:
        manifest = decode_json(body)
    except ApiError as error:
        raise ServiceFailure(f"answered what is no JSON: {error.details['error']}") from None
    if not isinstance(manifest, dict):
        raise ServiceFailure("answered what is no JSON object")
    return manifest


def fetch_manifest(instance, known):
    """Ask an Instance for its manifest; return a dict, None when it has none.

    Where the answer cannot be used, or does not come, that is `known`. Raises
    ServiceDown while nobody listens, FailedToStartProcess when it died.
    """
    exchange = Exchange(instance, "GET", MANIFEST_REQUEST)
    try:
        with instance.calling_later(MANIFEST_TIME, exchange.cut):
            status, body = exchange.begin().status, exchange.read_all(MANIFEST_LIMIT)
        return parse_manifest(status, body)
    except ServiceDown:
        raise
    except ServiceFailure as error:
        # A process that dies is seen here first.
        if instance.exited.wait(SOCKET_LOOK_LAST):
            raise FailedToStartProcess(instance.why) from None
        why = f"did not answer in {MANIFEST_TIME} s" if exchange.is_cut else error
        log.warning("%s has no manifest that can be used: it %s", instance, why)
        return known
    finally:
        exchange.close()


class Instance:
    """One process of a service, the socket that it listens on, and connections to that.

    `condition` is its Supervisor's, which guards what both have. What needs
    none of it: `pool` of the connections; `exited`, an Event; and behind that
    `why`, how it ended, in words, and `life`, in seconds.
    """

    def __init__(self, name, command, surroundings, condition, on_death, on_loss):
        """`on_death(instance)` is called once, on some thread, when the process has ended.

        `on_loss(instance)` is called when somebody removed its socket.
        """
        self._name = name
        self._command = command
        self._surroundings = surroundings
        self._condition = condition
        self._on_death = on_death
        self._on_loss = on_loss
        self._answered = False          # its socket has been there, and is not known to be lost
        self.pool = ConnectionPool(*surroundings.socket_path())
        self.exited = threading.Event()
        self.why = self.life = None
        self._started = time.monotonic()
        self._child = None              # None before it runs
        self._under_way = 0             # requests
        self._retired = False           # there will be no more of them
        self._ending = False            # the process is to end
        self._deadline = None           # the watcher's, for those that are under way

    def __str__(self):
        return f"the service {self._name}"

    # Its life.

    @property
    def pid(self):
        """The process id, None when there is none."""
        child = self._child
        return child.pid if child is not None and not self.exited.is_set() else None

    def launch(self):
        """Start the process."""
        self._surroundings.add(self)
        try:
            child = self._surroundings.spawn(self._command, self.pool.path, self._name,
                                             self._exited)
        except (OSError, RuntimeError) as error:        # the latter: no more threads
            program = printable(os.fsencode(self._command[0]))
            self._end(f"cannot run {program}: {start_trouble(error, self._command[0])}")
            return
        with self._condition:
            self._child = child
            ending = self._ending
        log.info("%s: process %d started", self, child.pid)
        if ending:
            child.kill(STOP_TIME)

    def _exited(self, child, returncode):
        """Called on the watcher's thread."""
        child.kill()                    # what is left of its group
        child.release()
        self._end(describe_exit(returncode))

    def _end(self, why):
        """Note its end, whichever: here all of them come by."""
        self.why = why
        self.life = time.monotonic() - self._started
        with self._condition:
            self._retired = True
            self.exited.set()
            deadline = self._deadline
        if deadline is not None:
            self._surroundings.watcher.cancel(deadline)
        self.pool.close()
        with contextlib.suppress(OSError):
            os.unlink(self.pool.path)
        self._surroundings.remove(self)
        self._on_death(self)

    def wait_answer(self, known, seconds=None):
        """Wait until the socket answers; return its manifest, as fetch_manifest() does.

        Raises FailedToStartProcess when that does not come, in `seconds` if
        that is a number.
        """
        begin, look, late = time.monotonic(), SOCKET_LOOK, False
        while True:
            try:
                manifest = fetch_manifest(self, known)
            except ServiceDown:
                pass
            else:
                self._answered = True
                return manifest
            if self.exited.wait(look):
                raise FailedToStartProcess(self.why)
            look = min(2 * look, SOCKET_LOOK_LAST)
            waited = time.monotonic() - begin
            if seconds is not None and waited > seconds:
                raise FailedToStartProcess(
                    f"it did not listen on ${SERVICE_SOCKET_VARIABLES[0]} in {seconds} s")
            if waited > START_TIME and not late:
                late = True
                log.warning("%s still does not listen on $%s", self, SERVICE_SOCKET_VARIABLES[0])

    def has_lost_socket(self):
        """Return True if others removed the socket on which it answered."""
        return self._answered and not self._retired and not os.path.lexists(self.pool.path)

    def lose_socket(self):
        """Have it replaced, once, as it cannot be asked any more."""
        self._answered = False
        self._on_loss(self)

    def keep_lost(self):
        """Note that it was not replaced: that will be tried again."""
        self._answered = True

    def retire(self, grace):
        """End it when its last request is over, in `grace` seconds at the latest."""
        with self._condition:
            self._retired = True
            idle = not self._under_way
        self.pool.close()
        if idle or not grace:
            self.end()
            return
        deadline = self._surroundings.watcher.call_later(grace, self.end)
        with self._condition:
            ended = self.exited.is_set()
            if not ended:
                deadline, self._deadline = self._deadline, deadline     # an earlier one
        if deadline is not None:
            self._surroundings.watcher.cancel(deadline)

    def end(self):
        """End it now: SIGTERM, and SIGKILL some time later."""
        with self._condition:
            self._ending = True
            child = self._child
        if child is not None:
            child.kill(STOP_TIME)

    def give_up(self, why):
        """End it, whether it was launched or not."""
        if self._child is None:
            self._end(why)
        else:
            self.end()

    def send(self, signum):
        """Send a signal to the process; return whether it was there to get it."""
        child = self._child
        return child is not None and not self.exited.is_set() and child.send(signum)

    def calling_later(self, seconds, callback):
        """As Watcher.calling_later."""
        return self._surroundings.watcher.calling_later(seconds, callback)

    def is_exiting(self):
        """Tell whether it has begun to exit: then what ends, ends because of that."""
        child = self._child
        return self.exited.is_set() or child is not None and is_exiting(child.pid)

    # Its requests.

    def enter(self):
        """Count a request that begins. The caller holds the condition."""
        self._under_way += 1

    def leave(self):
        """Count a request that is over."""
        with self._condition:
            self._under_way -= 1
            last = self._retired and not self._under_way
        if last:
            self.end()


def has_room_for_sockets(path):
    """Return True if a socket in the directory `path` has a path that is short enough."""
    return len(os.fsencode(path)) + SOCKET_NAME_ROOM <= SOCKET_PATH_LIMIT


def make_directory_for_sockets():
    """Return an OwnDirectory with a path as short as can be. Raises OSError."""
    for parent in PARENTS:
        with contextlib.suppress(OSError):
            return OwnDirectory(parent)
    return OwnDirectory()


class Surroundings:
    """What the processes of services need: someone who starts and watches them, a directory."""

    def __init__(self, directory, watcher, spawner, grace=GRACE):
        """`directory` is an OwnDirectory of mode 0700; it is for its maker to close.

        `grace` is the seconds that requests under way have when their process
        is to end.
        """
        self.watcher = watcher
        self.grace = grace
        self._directory = directory
        self._spawner = spawner
        self._serial = itertools.count(1)
        self._changed = Condition()     # guards what follows
        self._sockets = None            # the OwnDirectory for sockets, once one is wanted
        self._living = set()            # Instances
        self.closed = False             # all are to end, and no more to start

    def add(self, instance):
        """Note an Instance that begins."""
        with self._changed:
            self._living.add(instance)

    def remove(self, instance):
        """Note that it has ended."""
        with self._changed:
            self._living.discard(instance)
            self._changed.notify_all()

    def close(self):
        """End all processes, and start no more."""
        with self._changed:
            self.closed = True
            living = list(self._living)
        for instance in living:
            instance.end()
        with self._changed:
            self._changed.wait_for(lambda: not self._living)
            if self._sockets not in (None, self._directory):
                self._sockets.close()

    def socket_path(self):
        """Return a path for a socket that no other process has had, and its OwnDirectory."""
        with self._changed:
            if self._sockets is None:
                fits = has_room_for_sockets(self._directory.path)
                self._sockets = self._directory if fits else make_directory_for_sockets()
        return os.path.join(self._sockets.path, f"{next(self._serial)}.sock"), self._sockets

    # As the Caretaker wants it.

    def is_whole(self):
        """Return True if all processes that listened have their sockets."""
        return not self._find_lost()

    def restore(self):
        """Start those services again that have lost their sockets."""
        sockets = self._sockets
        if sockets not in (None, self._directory) and not sockets.is_whole():
            sockets.restore()
        for instance in self._find_lost():
            instance.lose_socket()

    def _find_lost(self):
        with self._changed:
            living = list(self._living)
        return [instance for instance in living if instance.has_lost_socket()]

    def spawn(self, command, path, name, on_exit):
        """Start a process that is to listen on `path`; return its Child. Raises OSError."""
        if self.closed:
            raise OSError(errno.ESHUTDOWN, "the server stops")
        if not self._sockets.is_ours():
            raise OSError(errno.EPERM, f"{self._sockets.path}, where its socket would be, was "
                                       "removed, and is another's or not there")
        if len(os.fsencode(path)) > SOCKET_PATH_LIMIT:
            raise OSError(errno.ENAMETOOLONG, f"the path of its socket is too long, {path}")
        return self._spawner.spawn(command, dict.fromkeys(SERVICE_SOCKET_VARIABLES, path), name,
                                   None, on_exit, keep=True)


def service_environment():
    """Return the environment of services: this process's, without what opens doors."""
    return {name: value for name, value in os.environ.items()
            if name not in (*CREDENTIAL_VARIABLES, CHANNEL_VARIABLE)}


@functools.lru_cache(maxsize=None)
def own_surroundings():
    """Return the Surroundings of the Supervisors that a program of another's makes."""
    directory, pid = OwnDirectory(), os.getpid()
    watcher, outputs = Watcher("watcher"), Watcher("outputs")
    for thread in (watcher, outputs):
        thread.start()
    spawner = Spawner(watcher, Reaper(watcher), service_environment(), outputs)
    surroundings = Surroundings(directory, watcher, spawner)

    def end():
        """End the services with the program, but not with a fork of it."""
        if os.getpid() == pid:
            surroundings.close()
            directory.close()

    atexit.register(end)
    return surroundings


class Request:
    """A request for Supervisor.do_request().

    `http_method` and `path` (without a query, percent-encoded as it is to be
    sent) are str; `handler` is what the service calls its handler, str, "" for none; `headers`
    and `query_params` {str: [str]}; `body` bytes; `path_params` {str: str},
    what the placeholders of a route matched.
    """

    def __init__(self, http_method, path, handler="", headers=None, body=b"", path_params=None,
                 query_params=None):
        self.http_method = http_method
        self.path = path
        self.handler = handler
        self.headers = {} if headers is None else headers
        self.body = body
        self.path_params = {} if path_params is None else path_params
        self.query_params = {} if query_params is None else query_params

    def head(self):
        """Return its head (bytes). Raises ValueError for what HTTP forbids."""
        target = urllib.parse.quote(self.path, safe="/%:@!$&'()*+,;=~")
        if self.query_params:
            target += "?" + urllib.parse.urlencode(self.query_params, doseq=True)
        fields = [(name.encode("latin-1"), value.encode("latin-1"))
                  for name, values in self.headers.items() for value in values]
        fields = [(name, value) for name, value in fields
                  if name.lower() not in NOT_PASSED_BACK and not is_kapow_field(name.lower())]
        if not any(name.lower() == b"host" for name, _ in fields):
            fields.insert(0, (b"Host", b"localhost"))
        if self.body or self.http_method in ("POST", "PUT", "PATCH"):   # RFC 9110 section 8.6
            fields.append((b"Content-Length", b"%d" % len(self.body)))
        fields += match_fields(self.handler, self.path_params)
        whole = (FIELD_NAME.fullmatch(self.http_method.encode()) and target.startswith("/")
                 and all(FIELD_NAME.fullmatch(name) and FIELD_VALUE.fullmatch(value)
                         for name, value in fields))
        if not whole:
            raise ValueError("HTTP forbids this method, path or header")
        return format_request(self.http_method.encode(), target.encode(), fields)


class Response:
    """What Supervisor.do_request() returns: `status` int, `headers` {str: [str]}, `body` bytes."""

    def __init__(self, status, headers, body):
        self.status = status
        self.headers = headers
        self.body = body

    @classmethod
    def of_head(cls, head, body):
        """Return the Response of a service, from its ResponseHead."""
        headers = {}
        for name, value in head.without({*CONNECTION_FIELDS, *head.connection_options}):
            headers.setdefault(name.decode("latin-1"), []).append(value.decode("latin-1"))
        return cls(head.status, headers, body)

    @classmethod
    def of_error(cls, status, body):
        """Return the Response that says JSON (bytes) instead of a service."""
        return cls(status, {"Content-Type": ["application/json"]}, body)


def is_command(value):
    """Tell whether a JSON value is a program with its arguments."""
    return (isinstance(value, list) and bool(value) and bool(value[0])
            and all(is_text(word) and encodable(word) for word in value))


class Supervisor:
    """Keeps a program up that answers requests on a Unix socket, whose path it tells it.

    Safe from many threads. What the program prints is logged through
    logging.getLogger("kapow"). A process that dies is started again, after a
    while that grows while it keeps dying.

        service = Supervisor("./hello.py")
        service.start()
        print(service.do_request(Request("GET", "/hello")).body)
        service.stop()
    """

    # state: (the process, the connection to it, the states that may follow).
    STATES = {
        "stopped": ("down", "down", {"starting"}),
        "starting": ("up", "down", {"available", "backoff", "stopping", "stopped"}),
        "available": ("up", "up", {"starting", "backoff", "stopping"}),
        "backoff": ("down", "down", {"starting", "stopped"}),
        "stopping": ("up", "down", {"stopped"}),
    }

    def __init__(self, command, *args, name=None, surroundings=None, on_manifest=None):
        """`command` is a program, as a path or of PATH, `args` its arguments, str.

        Raises ValueError for what no program can be given. For the server:
        `name` is what the log calls it, `surroundings` are its own, and
        `on_manifest(manifest)` is called when a process has come up.
        """
        if not is_command([command, *args]):
            raise ValueError("a command is a program and its arguments, str without NUL")
        self.name = name or os.path.basename(command)
        self._command = [command, *args]
        self._surroundings = own_surroundings() if surroundings is None else surroundings
        self._on_manifest = on_manifest or (lambda manifest: None)
        self._condition = Condition()         # guards what follows
        self._state = "stopped"
        self._instance = None           # that serves or will; None when the process is down
        self._closed = False            # it is not to be started again
        self._restarting = False        # restart() is at work
        self._handing = False           # hand_manifest() is at work
        self._once = False              # if this start fails, there will be no other
        self._delay = RETRY_FIRST       # seconds until the start after the next death
        self._retry = None              # the watcher's deadline in the state "backoff"
        self.restarts = 0               # how often it was started again, on demand or not
        self.manifest = None            # of the last process that came up; a dict, None for none

    def __str__(self):
        return f"the service {self.name}"

    @property
    def state(self):
        """One of STATES, str."""
        return self._state

    @property
    def pid(self):
        """The process id, None when there is none."""
        instance = self._instance
        return instance.pid if instance is not None else None

    def _become(self, state):
        """Change the state; the caller holds the condition."""
        assert state in self.STATES[self._state][2], f"{self._state} does not become {state}"
        self._state = state
        self._condition.notify_all()

    # Commands.

    def begin(self, once=False):
        """Start the program unless it is up; do not wait for it.

        With `once` it is not started again when it dies before it answers.
        Return the Instance that serves, or will. Raises FailedToStartProcess
        after close().
        """
        instance = self._make_instance()
        with self._condition:
            self._condition.wait_for(lambda: self._state != "stopping")
            if self._closed:
                raise FailedToStartProcess("it was removed")
            if self._state not in ("stopped", "backoff"):
                return self._instance
            retry, self._retry = self._retry, None
            self._once = once
            self._delay = RETRY_FIRST
            self._become("starting")
            self._instance = instance
        if retry is not None:
            self._surroundings.watcher.cancel(retry)
        instance.launch()
        self._on_thread(self._bring_up, instance)
        return instance

    def start(self):
        """Start the program, unless it is up, and wait until its socket answers.

        Raises FailedToStartProcess when it does not; then it is stopped.
        """
        instance = self.begin(once=True)
        with self._condition:
            self._condition.wait_for(lambda: self._state == "available"
                                     or self._instance is not instance, START_TIME)
            if self._state == "available":
                return
            late = self._instance is instance
        if late:
            self._stop(0, instance)
        raise FailedToStartProcess("it does not answer on its socket" if late
                                   else instance.why or "another process took its place")

    def stop(self, grace=None):
        """Stop the program, unless it is stopped, and wait until it has.

        Requests under way have `grace` seconds to finish, None being the usual
        number. Raises FailedToStopProcess.
        """
        self._stop(self._surroundings.grace if grace is None else grace)

    def close(self):
        """As stop(), and never start it again."""
        self.begin_to_close()
        self.stop()

    def begin_to_close(self):
        """As close(), without waiting."""
        with self._condition:
            self._closed = True
        self.begin_to_stop(self._surroundings.grace)

    def wait_available(self, seconds, given_up):
        """Wait up to `seconds` until it answers, or `given_up()`; return whether it does."""
        with self._condition:
            self._condition.wait_for(lambda: self._state == "available" or given_up(), seconds)
            return self._state == "available"

    def look(self):
        """Have wait_available() look again."""
        with self._condition:
            self._condition.notify_all()

    def _stop(self, grace, only=None):
        """Stop the Instance that serves, if it is the `only` one, and wait for its end."""
        instance = self.begin_to_stop(grace, only)
        with self._condition:
            patience = grace + STOP_TIME + KILL_DELAY
            if not self._condition.wait_for(lambda: instance is None
                                            or self._instance is not instance, patience):
                raise FailedToStopProcess(f"process {instance.pid} does not go away")

    def begin_to_stop(self, grace, only=None):
        """As _stop(), without waiting; return the Instance that is to end, None for none."""
        with self._condition:
            instance, retry = self._instance, self._retry
            if only not in (None, instance):
                return None
            self._retry = None
            if self._state == "backoff":
                self._become("stopped")
            elif self._state in ("starting", "available"):
                self._become("stopping")
        if retry is not None:
            self._surroundings.watcher.cancel(retry)
        if instance is not None:
            instance.retire(grace)
        return instance

    def restart(self):
        """Start a new process, have it serve once it answers, and end the old one.

        Requests under way go on with the old one. Raises FailedToStartProcess when the
        new one does not answer in START_TIME; then the old one stays.
        """
        with self._condition:
            self._condition.wait_for(lambda: not self._restarting and self._state != "stopping")
            if self._closed:
                raise FailedToStartProcess("it was removed")
            stopped = self._state == "stopped"
            self._restarting = not stopped
        if stopped:
            self.start()
            return
        try:
            self._replace()
        finally:
            with self._condition:
                self._restarting = False
                self._condition.notify_all()

    def signal(self, signum):
        """Send the signal `signum`, int, to the program. Raises FailedToSignalProcess."""
        instance = self._instance
        try:
            if instance is not None and instance.send(signum):
                return
        except (OSError, ValueError) as error:
            raise FailedToSignalProcess(str(error)) from None
        raise FailedToSignalProcess("it does not run")

    def get_manifest(self):
        """Return the manifest, a dict, that the program gave when it came up; None for none."""
        return self.manifest

    # The life of its processes.

    def _make_instance(self):
        return Instance(self.name, self._command, self._surroundings, self._condition,
                        self._died, self._lost_socket)

    def _lost_socket(self, instance):
        """Called when the socket of an Instance was removed; it is not asked any more."""
        log.warning("%s lost its socket, which was removed, and is restarted", self)
        self._on_thread(self._restart_lost, instance)

    def _restart_lost(self, instance):
        try:
            if self._instance is instance:
                self.restart()
        except FailedToStartProcess as error:
            log.error("%s cannot be restarted: %s", self, error.cause)
            instance.keep_lost()

    def _on_thread(self, function, instance):
        try:
            threading.Thread(target=function, args=(instance,), daemon=True).start()
        except RuntimeError as error:       # there are too many of them
            instance.give_up(str(error))

    def _bring_up(self, instance):
        """Wait until a process answers, and make it available."""
        try:
            manifest = instance.wait_answer(self.manifest)
        except FailedToStartProcess:
            return                      # _died() knows
        self._adopt(instance, manifest)
        with self._condition:
            come = self._instance is instance and self._state == "starting"
            if come:
                self._once = False
                self._become("available")
        if come:
            log.info("%s is available", self)

    def _adopt(self, instance, manifest):
        """Take the manifest of a process, unless another one serves by now, or none is to."""
        with self._condition:
            if self._instance is not instance or self._state == "stopping":
                return
            self.manifest = manifest
        self.hand_manifest(self._on_manifest)

    def hand_manifest(self, take):
        """Call take(manifest) with the last one adopted; one call at a time.

        So whoever comes last has the newest, in whichever order the threads arrive.
        """
        with self._condition:
            self._condition.wait_for(lambda: not self._handing)
            self._handing = True
            manifest = self.manifest
        try:
            take(manifest)
        finally:
            with self._condition:
                self._handing = False
                self._condition.notify_all()

    def _replace(self):
        """Have a new process serve in place of the old one."""
        new = self._make_instance()
        new.launch()
        try:
            manifest = new.wait_answer(self.manifest, START_TIME)
            old = self._take_over(new)
        except BaseException:           # whatever it is, the process is not to be left
            new.retire(0)
            raise
        try:
            self._adopt(new, manifest)
        finally:
            if old is not None:
                old.retire(self._surroundings.grace)

    def _take_over(self, new):
        """Let the Instance `new` serve; return the one that did, None when it has died."""
        with self._condition:
            if new.exited.is_set():
                raise FailedToStartProcess(new.why)
            if self._state in ("stopping", "stopped"):
                raise FailedToStartProcess("it was stopped meanwhile")
            old, self._instance = self._instance, new
            self._once = False
            if self._state == "backoff":
                self._become("starting")
            if self._state == "starting":
                self._become("available")
            self._delay = RETRY_FIRST
            self.restarts += 1
        log.info("%s is available, with its new process", self)
        return old

    def _died(self, instance):
        """Called once for each Instance that ended: here every death is dealt with."""
        with self._condition:
            serving = instance is self._instance
            if serving and self._surroundings.closed and self._state != "stopping":
                self._become("stopping")        # with all the others
            wanted = serving and self._state != "stopping" and not self._once
            if serving:
                self._instance = None
                self._become("backoff" if wanted else "stopped")
            if wanted:
                delay = RETRY_FIRST if instance.life >= RETRY_LIFE else self._delay
                self._delay = min(2 * delay, RETRY_LAST)
        if wanted:
            self._start_later(delay)
            log.error("%s: %s; it is started again in %g s", self, instance.why, delay)
        else:
            log.info("%s: %s", self, instance.why)

    def _start_later(self, seconds):
        retry = self._surroundings.watcher.call_later(seconds, self._start_again)
        with self._condition:
            waiting = self._state == "backoff"
            if waiting:
                self._retry = retry
        if not waiting:
            self._surroundings.watcher.cancel(retry)

    def _start_again(self):
        instance = self._make_instance()
        with self._condition:
            if self._state != "backoff":
                return
            self._retry = None
            self.restarts += 1
            self._become("starting")
            self._instance = instance
        self._on_thread(self._launch_again, instance)       # the watcher has no time to fork

    def _launch_again(self, instance):
        instance.launch()
        self._bring_up(instance)

    # Requests.

    @contextlib.contextmanager
    def serving(self):
        """Give the Instance to ask in a with statement, None when there is none."""
        with self._condition:
            instance = self._instance if self._state == "available" else None
            if instance is not None:
                instance.enter()
        try:
            yield instance
        finally:
            if instance is not None:
                instance.leave()

    def lose(self, instance, error):
        """Note the ServiceDown `error` of `instance`: if it is deaf, wait for its socket again."""
        with self._condition:
            if not error.deaf or instance is not self._instance or self._state != "available":
                return
            self._become("starting")
        log.warning("%s does not listen any more", self)
        self._on_thread(self._bring_up, instance)

    def do_request(self, request):
        """Ask the program a Request; return its Response.

        A 503 when it is not available, a 502 when it does not answer as it
        should. Raises ValueError for a request that HTTP forbids.
        """
        request.head()                  # which may refuse it, whatever the state
        with self.serving() as instance:
            if instance is None:
                return Response.of_error(503, UNAVAILABLE)
            exchange = self._make_exchange(instance, request)
            try:
                answer, body = exchange.begin(), exchange.read_all(math.inf)
            except ServiceDown as error:
                self.lose(instance, error)
                return Response.of_error(503, UNAVAILABLE)
            except ServiceFailure as error:
                log.error("%s failed: it %s", self, error)
                return Response.of_error(502, reason_json(502))
            finally:
                exchange.close()
        return Response.of_head(answer, body)

    def _make_exchange(self, instance, request):
        head, body = request.head(), request.body
        if len(body) <= PIECE:
            return Exchange(instance, request.http_method, head, body)
        # Who answers while it reads must not be kept waiting with both.
        return Exchange(instance, request.http_method, head, b"", iter([body]))


def unavailable(handler):
    """Have `handler` say that there is nobody to ask; return it."""
    handler.change(Draft.fill, 503, [JSON_TYPE], UNAVAILABLE)
    return handler


class ServiceAnswer:
    """The answer of a service to a handler's request, in the steps of Handler.next_step()."""

    def __init__(self, handler, supervisor, instance):
        self._handler = handler
        self._supervisor = supervisor
        self._instance = instance
        self._exchange = self._make_exchange()
        self._steps = self._take_steps()

    def _make_exchange(self):
        request, route = self._handler.request, self._handler.route
        head = request.passed_on(match_fields(route.handler or route.id, self._handler.matches))
        body = request.body
        if body.length is not None and body.length <= PIECE:
            body.take_in()
        if body.arrived and (body.length or 0) <= PIECE:
            return Exchange(self._instance, request.method, head, b"".join(body.pass_on()))
        return Exchange(self._instance, request.method, head, b"", body.pass_on(),
                        body.length is None)

    def cut(self):
        """End it early: the service sees its connection closed. From any thread."""
        self._exchange.cut()

    def close(self):
        """Leave the connection to others, or close it."""
        self._steps.close()
        self._exchange.close(self._handler.request.body.close)

    def next_step(self):
        """As Handler.next_step()."""
        try:
            step = next(self._steps)
        except ServiceFailure as error:
            step = self._fail(error)
        return ("abort", None) if self._handler.aborted is not None else step

    def _take_steps(self):
        handler, exchange = self._handler, self._exchange
        if handler.request.body.ask():
            yield handler.next_step()       # which is to tell the client
        head = exchange.begin()
        # Who announces bytes is about to send them; else they may be a long time coming.
        data = exchange.read() if head.length else exchange.read_buffered()
        handler.change(Draft.take_over, head)
        yield "data", data
        for data in iter(exchange.read, b""):
            yield "data", data
        while True:
            yield handler.next_step()

    def _fail(self, error):
        """Make the most of a ServiceFailure; return the last step."""
        handler = self._handler
        TURN.leave()
        if handler.aborted is None:
            log.error("%s %s failed: it %s", handler.request_id, self._supervisor, error)
        if isinstance(error, ServiceDown):
            self._supervisor.lose(self._instance, error)
            return unavailable(handler).next_step()
        handler.program_ended(False)
        return handler.next_step()


def routes_of_manifest(name, manifest):
    """Return the Routes that a manifest (None for none) lists for the service `name`.

    Raises ApiError("Invalid Route"). A key that is none of a manifest's is passed over.
    """
    items = [] if manifest is None else manifest.get("routes", [])
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise invalid_route(None, "the routes of a manifest are an array of objects")
    return [Route.from_json({**{key: item.get(key) for key in ("method", "url_pattern", "handler")},
                             "service": name}, of_manifest=True) for item in items]


def parse_signal(text):
    """Return the number of a signal, "HUP" or "SIGHUP". Raises ApiError("Invalid Signal")."""
    try:
        return signal.Signals["SIG" + text.upper().removeprefix("SIG")]
    except (AttributeError, KeyError):
        raise ApiError("Invalid Signal", error="a signal is a name such as HUP") from None


class Service:
    """A row of the table of services: a Supervisor, and what was said of it."""

    # Key -> (whether a JSON value fits, what does).
    KEYS = {
        "name": (is_text, "a string"),
        "command": (is_command, "an array of strings, the program first"),
        "routes": (lambda value: isinstance(value, bool), "true or false"),
    }

    def __init__(self, name, command, wants_routes, supervisor, lock):
        """With `wants_routes` those of its manifest are to be added; `lock` is its Services'."""
        self.name = name
        self.command = command
        self.wants_routes = wants_routes
        self.supervisor = supervisor
        self._lock = lock
        self.tables = ()                # RouteTables that it is for; guarded by the lock

    def says(self):
        """Return what makes it the service that it is."""
        return self.name, self.command, self.wants_routes

    def leave(self, table):
        """Be no longer for `table`. The caller holds the lock of its Services."""
        self.tables = tuple(other for other in self.tables if other is not table)

    def adopt(self, manifest, tables=None):
        """Put the routes of a manifest into `tables`, in place of those of the last one.

        None are all of its tables. For Supervisor.hand_manifest().
        """
        if not self.wants_routes:
            return
        try:
            routes = routes_of_manifest(self.name, manifest)
        except ApiError as error:
            log.error("%s has a manifest whose routes are not used: %s", self.supervisor,
                      describe_refusal(error))
            return
        with self._lock:                # or it could be removed meanwhile
            for table in self.tables if tables is None else set(tables).intersection(self.tables):
                table.exchange(self.name, routes)

    def to_json(self):
        """Return it as a dict for JSON."""
        supervisor = self.supervisor
        return {"name": self.name, "command": self.command, "state": supervisor.state,
                "pid": supervisor.pid, "restarts": supervisor.restarts,
                "manifest": supervisor.manifest}


class Services:
    """The services by name, and the way in which they answer matched requests.

    Safe from many threads. Methods raise ApiError.
    """

    def __init__(self, routes, surroundings, watcher, timeout):
        """`routes` is the RouteTable, `timeout` as Launcher's."""
        self._routes = routes
        self._surroundings = surroundings
        self._watcher = watcher
        self._timeout = timeout
        # Successors have the same. Who holds it may take a RouteTable's, never the reverse.
        self._lock = threading.Lock()
        self._services = {}             # name -> Service, in the order of their coming
        self._predecessor = None        # Services whose place this is to take
        self._closed = False

    def successor(self, routes):
        """Return new Services, for another RouteTable, that are to take the place of these.

        What is added there as it is here goes on.
        """
        other = Services(routes, self._surroundings, self._watcher, self._timeout)
        other._lock = self._lock
        other._predecessor = self
        return other

    def _before(self, name):
        """Return the Service of that name that there was before, None for none."""
        return self._predecessor._services.get(name) if self._predecessor is not None else None

    def wait_available(self, seconds, given_up):
        """Wait up to `seconds` until those answer that there were not before, or `given_up()`.

        Return the names of those that are to take the place of others and do not.
        """
        deadline, late = time.monotonic() + seconds, []
        for service in self.snapshot():
            left = max(deadline - time.monotonic(), 0)
            before = self._before(service.name)
            if (before is not service and not service.supervisor.wait_available(left, given_up)
                    and before is not None):
                late.append(service.name)
        return late

    def look(self):
        """Have wait_available() look again."""
        for service in self.snapshot():
            service.supervisor.look()

    def take_over(self):
        """Take the place of the predecessor; return those Services that nobody wants any more.

        Those are wanted that were added here, or that a route names.
        """
        with self._lock:
            named = {route.service for route in self._routes.snapshot()}
            before, self._predecessor = self._predecessor, None
            before._closed = True
            for name, service in before._services.items():
                if name in named and name not in self._services:
                    service.wants_routes = False
                    self._services[name] = service
                kept = self._services.get(name) is service
                service.tables = (self._routes,) if kept else ()
        return [service for service in before.snapshot() if not service.tables]

    def give_up(self):
        """Leave its place to the predecessor; what was not there before ends."""
        with self._lock:
            self._closed = True
            for service in self._services.values():
                service.leave(self._routes)
        for service in self.snapshot():
            if not service.tables:
                service.supervisor.begin_to_close()

    def snapshot(self):
        """Return the services as a list."""
        with self._lock:
            return list(self._services.values())

    def find(self, name):
        """Return the Service; raises ApiError("Service Not Found")."""
        service = self._services.get(name)
        if service is None:
            raise ApiError("Service Not Found")
        return service

    @contextlib.contextmanager
    def holding(self, routes):
        """Context manager: the services that the Routes name are there, and are not removed meanwhile.

        Raises ApiError if one is not there. For who puts the Routes into the table.
        """
        with self._lock:
            self.check(routes)
            yield

    def check(self, routes):
        """Raise ApiError unless all services that the Routes name are there."""
        for route in routes:
            if route.service is not None and route.service not in self._services:
                raise invalid_route("service", f"there is no service {route.service}; "
                                               "kapow service add makes one")

    def add(self, document):
        """Add the service that a decoded JSON value says, and start it; return the Service."""
        service = self._from_json(document)
        with self._lock:
            if service.name in self._services:
                raise ApiError("Service Exists")
            if self._closed:
                raise ApiError(503)
            before = self._before(service.name)
            kept = before is not None and before.says() == service.says()
            if kept:
                service = before
            self._services[service.name] = service
            service.tables += (self._routes,)
        if not kept:
            service.supervisor.begin()
        elif service.supervisor.manifest is not None:
            service.supervisor.hand_manifest(
                lambda manifest: service.adopt(manifest, [self._routes]))
        return service

    def _from_json(self, document):
        check_object(document, "service", Service.KEYS, ("name", "command"), invalid_service)
        name, command = document["name"], document["command"]
        if not SERVICE_NAME.fullmatch(name):
            raise invalid_service("name", SERVICE_NAME_RULE)
        if any(map(is_long, command)):
            raise invalid_service("command", f"a word is longer than {ARGUMENT_LIMIT} bytes")
        supervisor = Supervisor(*command, name=name, surroundings=self._surroundings,
                                on_manifest=lambda manifest: service.adopt(manifest))
        service = Service(name, command, bool(document.get("routes")), supervisor, self._lock)
        return service

    def remove(self, name):
        """Stop a service and forget it, its manifest's routes too.

        One that other routes use stays.
        """
        with self._lock:                # which holding() has while a route is added
            service = self.find(name)
            users = [(index, route) for index, route in enumerate(self._routes.snapshot())
                     if route.service == name and not route.of_manifest]
            if users:
                raise ApiError("Service In Use",
                               routes=[route.to_json(index) for index, route in users])
            del self._services[name]
            service.leave(self._routes)
            self._routes.exchange(name, [])
        if not service.tables:          # while the server reloads it may have two
            service.supervisor.close()

    def close(self):
        """Stop all services, and add no more."""
        with self._lock:
            self._closed = True
        for service in self.snapshot():
            service.supervisor.begin_to_stop(0)
        self._surroundings.close()

    @contextlib.contextmanager
    def running(self, handler):
        """As Launcher.running(): have the service of the handler's route answer."""
        handler.program_ended(True)         # none of its own runs that would be waited for
        handler.response.failure = 502
        service = self._services.get(handler.route.service)
        log.debug("%s goes to the service %s", handler.request_id, handler.route.service)
        if service is None:
            log.error("%s there is no service %s", handler.request_id, handler.route.service)
            yield unavailable(handler)
            return
        with keeping_time(self._watcher, handler, self._timeout), \
                service.supervisor.serving() as instance:
            if instance is None:
                yield unavailable(handler)
                return
            answer = ServiceAnswer(handler, service.supervisor, instance)
            try:
                handler.launched(None, answer.cut)
                yield answer
            finally:
                answer.close()


class Configuration:
    """Routes, and services for them: what --routes, init programs and operators say.

    One is in force; while the server reloads another is made, which then takes its
    place. `id` tells them apart in the paths of the control interface.
    """

    def __init__(self, routes, services):
        self.id = str(uuid.uuid4())
        self.routes = routes            # RouteTable
        self.services = services        # Services of these routes

    def successor(self, routes):
        """Return a new Configuration with Routes that is to take the place of this one."""
        table = RouteTable(routes)
        return Configuration(table, self.services.successor(table))


# ---------------------------------------------------------------------------
# 9. Billets
# ---------------------------------------------------------------------------

# What runs a launcher in Bash. A request is never part of its text, nor of any
# that a shell reads: it comes in the environment. Names with _billet are its own.
BILLET_RUNTIME = r"""
# bash -c TEXT billet LAUNCHER: answer one request with the functions of a launcher.
# The head of the response goes to descriptor BILLET_HEAD, its body is what is
# printed. With BILLET_SETUP the context has not been set up, or has changed.

_billet_launcher=$1
_billet_head=$BILLET_HEAD
_billet_setup=${BILLET_SETUP-}
_billet_url=$BILLET_URL
unset BILLET_HEAD BILLET_SETUP BILLET_URL
shift

# The components of the path, the context first.
BILLET_TRAIL=("$BILLET_CONTEXT")
_billet_split() {
    local IFS=/ _billet_part
    set -f
    for _billet_part in $BILLET_PATH; do
        [[ ! $_billet_part ]] || BILLET_TRAIL+=("$_billet_part")
    done
    set +f
}
_billet_split

warn() {                # TEXT
    printf '%s: %s\n' "$BILLET_CONTEXT" "$*" >&2
}

die() {                 # TEXT
    warn "$@"
    exit 1
}

need() {                # PROGRAM
    type "$1" >/dev/null 2>&1
}

main() {                # FUNCTION: for launchers that are run without a server
    :
}

_billet_say() {         # LINE
    if [[ $1 == *[$'\r\n']* ]]; then
        warn "a header must not have a line break in it"
        return 1
    fi
    printf '%s\n' "$1" >&"$_billet_head"
}

http_response() {       # [STATUS [REASON]]
    _billet_say "Status: ${1-200}${2:+ $2}"
}

http_header() {         # NAME VALUE
    _billet_say "$1: $2"
}

http_body() {
    printf '\n' >&"$_billet_head"
}

http_error() {          # STATUS [TEXT]
    http_response "$1" && http_header Content-Type "text/plain; charset=utf-8" && http_body &&
        printf '%s\n' "${2-$1}"
}

http_redirect() {       # URL [STATUS]
    http_response "${2-302}" && http_header Location "$1" && http_body
}

billet_url() {          # PATH
    printf '%s/%s\n' "$_billet_url" "${1#/}"
}

_billet_used=" www/http www/billet "

use() {                 # MODULE
    local _billet_directory _billet_rest=$BILLET_LIBS:${BILLPATH-}:
    [[ $_billet_used != *" $1 "* ]] || return 0
    case /$1/ in
    *//* | */../* | */./*) die "use: $1 is no name of a module" ;;
    esac
    while [[ $_billet_rest ]]; do
        _billet_directory=${_billet_rest%%:*}
        _billet_rest=${_billet_rest#*:}
        if [[ $_billet_directory && -f $_billet_directory/$1.bash ]]; then
            _billet_used+="$1 "
            source "$_billet_directory/$1.bash"
            return
        fi
    done
    die "use: there is no $1.bash in $BILLET_LIBS, nor in BILLPATH (${BILLPATH-})"
}

_billet_is() {          # FUNCTION
    declare -F -- "$1" >/dev/null
}

# Set _billet_depth to the most components that the name of a handler has.
_billet_measure() {
    local _billet_colons _billet_name
    _billet_depth=0
    while read -r _ _ _billet_name; do
        [[ $_billet_name == billet:* ]] || continue
        _billet_colons=${_billet_name//[!:]/}
        (( ${#_billet_colons} <= _billet_depth )) || _billet_depth=${#_billet_colons}
    done <<< "$(declare -F)"
}

_billet_answer() {
    local _billet_found="" _billet_name=billet _billet_part _billet_depth=${#BILLET_TRAIL[@]}
    ! _billet_is billet: || _billet_found=billet:
    # Few paths are so long that it pays to start a process for this.
    (( _billet_depth < 16 )) || _billet_measure
    for _billet_part in "${BILLET_TRAIL[@]:1:_billet_depth}"; do
        # A component with a colon in it must not pass for two.
        [[ $_billet_part != *:* ]] || break
        _billet_name+=:$_billet_part
        ! _billet_is "$_billet_name" || _billet_found=$_billet_name
    done
    if [[ $_billet_found ]]; then
        "$_billet_found"
    else
        http_error 404 "Not Found"
    fi
}

source "$_billet_launcher"
# Bash says 2 of what it cannot parse; so may the last command there.
[[ $? != 2 ]] || "$BASH" -n "$_billet_launcher" 2>/dev/null || die "the launcher does not parse"
if [[ $_billet_setup ]]; then
    if _billet_is billet.setup; then
        billet.setup || exit
    fi
    printf '\0setup\n' >&"$_billet_head"       # no header can look like this
fi
if _billet_is billet.before_request; then
    billet.before_request || exit
fi
_billet_answer
_billet_status=$?
if _billet_is billet.after_request; then
    billet.after_request
fi
exit "$_billet_status"
"""

# As Bash gets it each time: without what it need not read.
BILLET_TEXT = re.sub(r"(?m)^ +|^ *#.*\n| +# [A-Z].*$", "", BILLET_RUNTIME)

CGI_HEAD_END = re.compile(rb"\r?\n\r?\n")
CGI_STATUS = re.compile(rb"([2-9][0-9][0-9])(?: ([\t\x20-\x7e\x80-\xff]*))?")
BASH_LINE = re.compile(rb"#![ \t]*(?:[^\n]*[/ \t])?(?:bash|bill)(?:[ \t\r\n]|\Z)")


def is_plain_name(name):
    """Tell whether the str `name` can be that of a file, and of nothing else."""
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


def parse_cgi_head(data):
    """Parse the header that a CGI program prints (RFC 3875 section 6), bytes.

    Return (status or None, reason str or None, location bytes or None, fields);
    a field is (name, value) bytes. Raises BadProgram.
    """
    if data.startswith(b"HTTP/"):
        raise BadProgram("it prints a status line; NPH programs are not run")
    try:
        fields = parse_fields(re.split(rb"\r?\n", data))
    except ProtocolError as error:
        raise BadProgram(f"its header cannot be read: {error}") from None
    status = reason = location = None
    kept = []
    for name, value in fields:
        lower = name.lower()
        if lower == b"status":
            found = CGI_STATUS.fullmatch(value)
            if found is None:
                raise BadProgram("its Status is none")
            status, reason = int(found.group(1)), (found.group(2) or b"").decode("latin-1") or None
        elif lower not in CONNECTION_FIELDS:
            location = value if lower == b"location" else location
            kept.append((name, value))
    return status, reason, location, kept


class Billet:
    """A launcher that is to answer a request; it stands where a Route does.

    `context` is its name, str; `launcher` its path; `prefix` and `rest` the part of
    the request's path that led here, and what follows.
    """

    way = "billets"
    timeout = max_handlers = max_queue = queue_time = None
    disconnect = "kill"

    def __init__(self, context, base, prefix, rest):
        self.context = context
        self.launcher = os.path.join(base, context + ".b")
        self.id = self.label = context + ".b"       # what /route/id and metrics say
        self.base = base
        self.prefix = prefix
        self.rest = rest

    def directory(self, name):
        """Return the path of one of the context's directories."""
        return os.path.join(self.base, self.context, name)

    def is_bash(self):
        """Tell whether its first line names Bash. What cannot be read does not."""
        try:
            with open(self.launcher, "rb") as file:
                return bool(BASH_LINE.match(file.read(256)))
        except OSError:
            return False

    def version(self):
        """Return what changes when the launcher does. Raises OSError."""
        found = os.stat(self.launcher)
        return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size

    def environment(self, request, length):
        """Return CGI/1.1 (RFC 3875) and what billets get besides, as a dict of str.

        `length` is that of the body in bytes, None without one.
        """
        paths = {f"BILLET_{name.upper()}": self.directory(name)
                 for name in ("data", "rsrc", "libs", "temp")}
        own = {"SCRIPT_NAME": self.prefix, "PATH_INFO": self.rest,
               "BILLET_BASE": self.base, "BILLET_CONTEXT": self.context,
               "BILLET_PATH": self.rest,
               "BILLET_URL": urllib.parse.quote(os.fsencode(self.prefix))}
        if self.rest:
            own["PATH_TRANSLATED"] = self.directory("rsrc") + self.rest
        if length is not None:
            own["CONTENT_LENGTH"] = str(length)
        return {**request.cgi_variables(), **own, **paths}


def billet_environment(environment):
    """Return an environment without what only a request may say."""
    names = ("AUTH_TYPE", "CONTENT_LENGTH", "CONTENT_TYPE", "HTTPS", "PATH_INFO",
             "PATH_TRANSLATED", "QUERY_STRING", "REMOTE_HOST", "REMOTE_IDENT", "REMOTE_USER")
    return {name: value for name, value in environment.items()
            if name not in names and not name.startswith(("HTTP_", "BILLET_"))}


class Setups:
    """Which contexts have been set up. Safe from many threads."""

    def __init__(self):
        self._condition = Condition()
        self._versions = {}             # launcher -> its version when that was done
        self._running = set()           # launchers

    def begin(self, billet, given_up):
        """Return the version of `billet` if the caller is to set that up, and then to call end().

        None if that was done. While another does it, wait for that, or until
        `given_up()`. Raises OSError.
        """
        with self._condition:
            self._condition.wait_for(lambda: billet.launcher not in self._running or given_up())
            version = billet.version()
            if given_up() or self._versions.get(billet.launcher) == version:
                return None
            self._running.add(billet.launcher)
            return version

    def end(self, billet, version):
        """Note that it is over; `version` is what was set up, None for nothing."""
        with self._condition:
            self._running.discard(billet.launcher)
            if version is not None:
                self._versions[billet.launcher] = version
            self._condition.notify_all()

    def look(self):
        """Have those who wait in begin() look again."""
        with self._condition:
            self._condition.notify_all()


def begin_response(handler, status, reason, fields):
    """Say the head of a response; return the BodySink for the rest. Raises BadProgram.

    Events for browsers (WHATWG HTML, server-sent events) go on as they come.
    """
    try:
        handler.change(Draft.begin_head, status, reason, fields)
    except ApiError as error:
        raise BadProgram(f"its header is refused: {error.reason}") from None
    kinds = [parse_parameters(value)[0] for name, value in fields
             if name.lower() == b"content-type"]
    return BodySink(handler, "stream" if b"text/event-stream" in kinds else "body")


class LauncherSink:
    """Where the output of a launcher goes: its head to the response, the rest to the body.

    Lives on the watcher's thread; methods as in BodySink. Raises BadProgram too.
    """

    def __init__(self, handler):
        self._handler = handler
        self._body = None               # the BodySink, once the head is complete

    def start(self):
        """Called when the launcher runs."""

    def look(self):
        """Called when it has exited, before the rest of its output is offered."""

    def when_room(self, callback):
        self._body.when_room(callback)

    def close(self):
        if self._body is not None:
            self._body.close()


class CgiSink(LauncherSink):
    """The sink of a CGI program, which prints its head before the body."""

    def __init__(self, handler):
        super().__init__(handler)
        self._head = b""
        self._lone = None               # the fields, a lone Location, until there is a body

    def offer(self, data):
        if self._lone is not None:
            self._redirect_client()
        if self._body is not None:
            return self._body.offer(data)
        self._head += data
        end = CGI_HEAD_END.search(self._head)
        if (len(self._head) if end is None else end.start()) > FIELDS_LIMIT:
            raise BadProgram("its header is too large")
        if end is None:
            return True
        self._begin(self._head[:end.start()])
        rest, self._head = self._head[end.end():], b""
        return self.offer(rest) if rest else True

    def _begin(self, head):
        status, reason, location, fields = parse_cgi_head(head)
        if not fields and status is None:
            raise BadProgram("it prints no header")
        if status is None and location is not None:
            if len(fields) == 1 and re.match(rb"/(?!/)", location):
                self._lone = fields
                return
            status = self._handler.response.status or 302
        self._body = begin_response(self._handler, status, reason, fields)

    def _redirect_client(self):
        """Begin a response of the lone Location: something else was said, so it is not local."""
        fields, self._lone = self._lone, None
        status = self._handler.response.status or 302
        self._body = begin_response(self._handler, status, None, fields)

    def finish(self):
        """As in BodySink. A Location on its own is a local redirect (RFC 3875 section 6.2.2)."""
        if self._lone is not None and self._handler.response.said_anything:
            self._redirect_client()
        elif self._lone is not None:
            self._handler.redirect = self._lone[0][1]
        elif self._body is None and self._head:
            raise BadProgram("its header does not end with an empty line")


class BashSink(LauncherSink):
    """The sink of a launcher in Bash, whose head comes through a pipe of its own."""

    def __init__(self, handler, watcher, fd, on_setup):
        """`fd` is read and closed; `on_setup()` is called when the context has been set up."""
        super().__init__(handler)
        self._watcher = watcher
        self._fd = fd                   # None once it has ended
        self._watched = False           # whether the watcher looks at it
        self._on_setup = on_setup
        self._rest = b""                # of a line
        self._lines = []                # of the head
        self._complete = False          # its end was said
        self._size = 0                  # of all that came, bytes

    def start(self):
        """Begin to read the head: it may be longer than what the pipe takes."""
        if self._fd is not None:
            self._watched = True
            self._watcher.on_readable(self._fd, self.look)

    def look(self):
        """Take what has come of the head."""
        data = b"?"
        with contextlib.suppress(BlockingIOError):
            for _ in range(READS_AT_ONCE):
                if not data or self._fd is None:
                    break
                data = os.read(self._fd, PIECE)
                self._size += len(data)
                if self._size <= FIELDS_LIMIT:
                    self._rest += data
        if not data:
            self.end()
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            if line == b"\0setup":
                self._on_setup()
            elif not line:
                self._complete = True
            elif not self._complete:
                self._lines.append(line)

    def end(self):
        """Read no more of the head."""
        if self._watched:
            self._watched = False
            self._watcher.forget(self._fd)
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _begin(self, printed):
        """Begin the response; something was `printed`, or only a head."""
        self._complete = True
        if self._size > FIELDS_LIMIT:
            raise BadProgram("its header is too large")
        head = b"\n".join(self._lines)
        status, reason, _, fields = parse_cgi_head(head) if head else (None, None, None, [])
        if printed and not any(name.lower() == b"content-type" for name, _ in fields):
            fields.append((b"Content-Type", b"text/html"))
        self._body = begin_response(self._handler, status, reason, fields)

    def offer(self, data):
        self.look()                     # it was written before
        if self._body is None:
            self._begin(printed=True)
        return self._body.offer(data)

    def finish(self):
        self.look()
        if self._body is None and (self._lines or self._complete):
            self._begin(printed=False)

    def close(self):
        self.end()
        super().close()


class BilletOutput(Siphon):
    """What a launcher prints, on its way to a sink. Ends when the launcher has exited.

    What it left running may hold the pipe open; all that the launcher itself
    has printed is in it by then. It may also close the pipe before.
    """

    def __init__(self, watcher, sink, fd, on_end):
        """`on_end(error)` is called once; None, BadProgram or ApiError."""
        super().__init__(watcher, sink, fd)
        self._on_end = on_end
        self._exited = False
        self._closed = False            # by the launcher

    def start(self):
        """Begin to read."""
        self._sink.start()
        self.read()

    def program_exited(self):
        """Note that the launcher has exited."""
        self._exited = True
        self._sink.look()               # though nobody may take the body for some time
        if self._closed:
            super().complete()
        elif not self.paused:
            self.read()

    def empty(self):
        if self._exited:
            super().complete()
        else:
            super().empty()

    def complete(self):
        if self._exited:
            super().complete()
        else:
            self._closed = True
            self._unwatch()

    def ended(self, error):
        self._on_end(error)


class BilletAnswer:
    """The answer of a launcher to a handler's request, in the steps of Handler.next_step()."""

    def __init__(self, handler, spawner, watcher, setups, shell):
        """`shell` is the words that run a launcher in Bash."""
        self._handler = handler
        self._billet = handler.route
        self._spawner = spawner
        self._watcher = watcher
        self._setups = setups
        self._shell = shell
        self._child = None
        self._returncode = None         # its, None while it runs
        self._taken = False             # all of its output was taken
        self._error = None              # what was wrong with that
        self._setting_up = None         # the launcher's version while it does its setup
        self._output = None
        self._steps = self._take_steps()

    def next_step(self):
        """As Handler.next_step()."""
        return next(self._steps)

    def _take_steps(self):
        if self._handler.request.body.ask():
            yield self._handler.next_step()         # which is to tell the client
        self._launch()
        while True:
            yield self._handler.next_step()

    def _launch(self):
        handler = self._handler
        handler.launched(None, handler.request.body.interrupt)
        try:
            with contextlib.ExitStack() as stack:
                stdin = length = None
                if handler.request.body.length != 0:
                    stdin, length = handler.request.body.open_file()
                    stack.callback(os.close, stdin)
                self._run(stack, stdin, self._billet.environment(handler.request, length))
        except ProtocolError:           # of the client, whom the handler knows to be lost
            pass
        except (OSError, ValueError, RuntimeError) as error:
            log.error("%s cannot run %s: %s", handler.request_id, self._billet.launcher,
                      start_trouble(error, self._billet.launcher))
            handler.response.failure = 500
        finally:
            if self._child is None:     # whatever came: others wait for the setup
                self._end_setup(False)
                handler.program_ended(False)

    def _run(self, stack, stdin, environment):
        """Start the launcher; `stack` closes what is the program's alone."""
        handler, argv, head = self._handler, [self._billet.launcher], None
        files = []
        with contextlib.ExitStack() as ours:
            output, stdout = self._make_pipe(stack, ours)
            if self._billet.is_bash():
                argv = [*self._shell, self._billet.launcher]
                self._begin_setup(environment)
                head, writer = self._make_pipe(stack, ours)
                environment["BILLET_HEAD"] = str(writer)
                files.append(writer)
            sink = CgiSink(handler) if head is None else BashSink(
                handler, self._watcher, head, lambda: self._end_setup(True))
            self._output = BilletOutput(self._watcher, sink, output, self._ended)
            if handler.aborted is not None:     # while it waited for a setup
                return
            log_start(handler, [self._billet.launcher])
            self._child = self._spawner.spawn(
                argv, {**environment, HANDLER_ID_VARIABLE: handler.id}, handler.request_id, stdout,
                self._exited, keep=True, logged=False, pass_fds=files, cwd=self._billet.base,
                **({} if stdin is None else {"stdin": stdin}))
            ours.pop_all()
        handler.launched(self._child.pid, self._child.kill)
        self._watcher.call_soon(self._output.start)

    def _make_pipe(self, stack, ours):
        """Return (reader, writer) of a pipe; `stack` closes the program's end, `ours` the other."""
        reader, writer = os.pipe()
        stack.callback(os.close, writer)
        ours.callback(os.close, reader)
        os.set_blocking(reader, False)
        return reader, writer

    def _begin_setup(self, environment):
        handler = self._handler
        handler.launched(None, self._setups.look)       # which ends the wait
        self._setting_up = self._setups.begin(self._billet, lambda: handler.aborted is not None)
        if self._setting_up is not None:
            environment["BILLET_SETUP"] = "1"

    def _end_setup(self, succeeded):
        version, self._setting_up = self._setting_up, None
        if version is not None:
            self._setups.end(self._billet, version if succeeded else None)

    def _exited(self, _child, returncode):
        """Called on the watcher's thread, as _ended()."""
        log_exit(self._handler, returncode)
        self._returncode = returncode
        try:
            self._output.program_exited()
        finally:
            self._end_setup(False)      # unless that was said to be done
        self._settle()

    def _ended(self, error):
        """Called when the output was taken, or is not worth it; that may be before the exit."""
        self._taken = True
        self._error = error
        if isinstance(error, BadProgram):
            log.error("%s %s: %s", self._handler.request_id, self._billet.launcher, error)
            self._handler.response.failure = 502
        self._settle()

    def _settle(self):
        if self._taken and self._returncode is not None:
            self._handler.program_ended(self._error is None and is_clean(self._returncode))

    def close(self):
        """Called at the end."""
        self._steps.close()
        if self._child is not None:
            release(self._child, self._handler)


def http_time(value):
    """Return the seconds since the epoch of an HTTP date (bytes), None when it is none."""
    try:
        found = email.utils.parsedate_to_datetime(value.decode("ascii"))
        return found.replace(tzinfo=found.tzinfo or datetime.timezone.utc).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


# Python takes no int of over 4,300 digits from text; nobody means as many.
BYTE_RANGE = re.compile(rb"(?i:bytes)=[ \t]*(\d{0,1000})-(\d{0,1000})[ \t]*")


class StaticFile:
    """A plain file that is served as it is; `size` in bytes, `modified` in seconds, int."""

    def __init__(self, fd, name, label):
        """`fd` is open for reading, `label` what metrics call it.

        Raises OSError for what is no plain file.
        """
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, "this is no plain file")
        self._fd = fd
        self.label = label
        self.size = found.st_size
        self.modified = int(found.st_mtime)
        self.etag = f'"{found.st_mtime_ns:x}-{found.st_size:x}"'
        kind, coding = mimetypes.guess_type(name)
        self.type = "application/octet-stream" if kind is None or coding else kind
        if self.type.startswith("text/"):
            self.type += "; charset=utf-8"

    def is_refused(self, head):
        """Return True if the client of a RequestHead wants another version (RFC 9110 section 13.1)."""
        tags = head.values(b"if-match")
        if tags:
            return not {b"*", self.etag.encode()} & set(list_items(tags))
        since = http_time(head.first(b"if-unmodified-since"))
        return since is not None and self.modified > since

    def is_fresh(self, head):
        """Tell whether the client of a RequestHead has it already (RFC 9110 section 13)."""
        tags = head.values(b"if-none-match")
        if tags:
            return bool({b"*", self.etag.encode()} & {
                tag[2:] if tag.startswith(b"W/") else tag for tag in list_items(tags)})
        since = http_time(head.first(b"if-modified-since"))
        return since is not None and self.modified <= since

    def find_range(self, head):
        """Return the range(first, end) of bytes that the client wants, None for all.

        Several ranges are all of it (RFC 9110 section 14.2). Raises ApiError 416.
        """
        found = BYTE_RANGE.fullmatch(head.first(b"range"))
        condition = head.first(b"if-range")
        if found is None or found.groups() == (b"", b"") or head.method != "GET":
            return None
        if condition and condition != self.etag.encode() and http_time(condition) != self.modified:
            return None
        first, last = found.groups()
        if not first:
            wanted = range(max(self.size - int(last), 0), self.size)
        else:
            wanted = range(int(first), min(int(last or self.size), self.size - 1) + 1)
            if last and int(last) < int(first):
                return None
        if not wanted:
            raise ApiError(416, [("Content-Range", f"bytes */{self.size}")])
        return wanted

    def read_at(self, offset, size):
        """Return up to `size` bytes from `offset`. Raises OSError."""
        return os.pread(self._fd, size, offset)

    def close(self):
        """Close the file."""
        os.close(self._fd)


def open_beneath(directory, names):
    """Open the file of the path `names` below `directory`, and nothing that is elsewhere.

    No name may be a symbolic link, so whoever moves things meanwhile wins nothing.
    Return a descriptor. Raises OSError.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for place, name in enumerate(names, 1):
        flags = os.O_DIRECTORY if place < len(names) else os.O_NONBLOCK
        try:
            inner = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=fd)
        finally:
            os.close(fd)
        fd = inner
    return fd


class Billets:
    """A directory of launchers, and the way in which they answer. Safe from many threads."""

    def __init__(self, base, spawner, watcher, timeout):
        """`base` is the directory, `timeout` as Launcher's."""
        self._base = os.path.abspath(base)
        self._spawner = spawner
        self._watcher = watcher
        self._timeout = timeout
        self._setups = Setups()
        self._shell = [shutil.which("bash") or "/bin/bash", "-c", BILLET_TEXT, "billet"]

    def find(self, method, path):
        """Return the Billet or the StaticFile for a decoded path. Raises ApiError 404, 405."""
        billet = self._find_billet(path)
        names = billet.rest.split("/")[1:]
        if names[:1] != ["rsrc"]:
            return billet
        if method not in ("GET", "HEAD"):
            raise ApiError(405, [("Allow", "GET, HEAD")])
        return self._open_file(billet, names[1:])

    def _find_billet(self, path):
        if "\0" in path or not path.startswith("/"):
            raise ApiError(404)
        name, slash, rest = path[1:].partition("/")
        if is_plain_name(name) and self._is_there(name):
            if not self._can_run(name):
                raise ApiError(404)
            return Billet(name, self._base, "/" + name, slash + rest)
        name = self._default()
        if name is None or not self._can_run(name):
            raise ApiError(404)
        return Billet(name, self._base, "", path)

    def _is_there(self, name):
        return os.path.lexists(os.path.join(self._base, name + ".b"))

    def _can_run(self, name):
        path = os.path.join(self._base, name + ".b")
        return os.path.isfile(path) and os.access(path, os.X_OK)

    def _default(self):
        """Return the name of the context for what has no launcher, None for none."""
        path = os.path.join(self._base, "default")
        if not os.path.isfile(path):
            return None
        try:
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                name = file.read(KIB).strip()
        except OSError:
            return None
        return name if is_plain_name(name) else None

    def _open_file(self, billet, names):
        if not names or not all(map(is_plain_name, names)):
            raise ApiError(404)
        try:
            fd = open_beneath(billet.directory("rsrc"), names)
        except (OSError, ValueError):
            raise ApiError(404) from None
        try:
            return StaticFile(fd, names[-1], billet.label)
        except OSError:
            os.close(fd)
            raise ApiError(404) from None

    @contextlib.contextmanager
    def running(self, handler):
        """As Launcher.running(): have the launcher of the handler's billet answer."""
        TURN.leave()
        handler.response.failure = None         # what says nothing gets no answer
        answer = BilletAnswer(handler, self._spawner, self._watcher, self._setups, self._shell)
        try:
            with keeping_time(self._watcher, handler, self._timeout):
                yield answer
        finally:
            answer.close()


# ---------------------------------------------------------------------------
# 10. TLS and credentials
# ---------------------------------------------------------------------------


def is_address(host):
    """Tell whether the str `host` is an IP address, not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def ascii_host(host):
    """Return a host name as DNS has it (RFC 5890). Raises StartError."""
    try:
        return host.encode("idna").decode("ascii")
    except UnicodeError as error:
        raise StartError(f"{host} is no host name: {error}") from None


def make_certificate(name, host=None):
    """Make a key and a self-signed certificate (ECDSA P-256, RFC 5280).

    Return both as PEM text. With `host`, an address or a name, it is a
    server's, else a client's. Raises MissingPackage without ``cryptography``,
    StartError for a host that is neither.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        raise MissingPackage("the control interface needs the Python package "
                             "cryptography") from None
    except Exception as error:          # some of it was loaded, for want of memory, say
        raise StartError(f"cannot load the Python package cryptography: {error!r}; is there "
                         "enough memory?") from None
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.timezone.utc)
    usage = x509.ExtendedKeyUsageOID.SERVER_AUTH if host else x509.ExtendedKeyUsageOID.CLIENT_AUTH
    builder = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        # A client's clock may be a little behind.
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=CERTIFICATE_DAYS))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False))
    if host:
        alternative = (x509.IPAddress(ipaddress.ip_address(host)) if is_address(host)
                       else x509.DNSName(ascii_host(host)))
        builder = builder.add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
    certificate = builder.sign(key, hashes.SHA256())
    return (certificate.public_bytes(serialization.Encoding.PEM).decode(),
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                              serialization.NoEncryption()).decode())


@contextlib.contextmanager
def pem_path(text):
    """Give PEM text a path that can be read once, for a with statement.

    The ssl module loads keys from files only; this one is a pipe, so that the
    key never touches a disk. PEM of one key or certificate fits its buffer.
    """
    reader, writer = os.pipe()
    try:
        os.write(writer, text.encode())
        os.close(writer)
        yield f"/dev/fd/{reader}"
    finally:
        os.close(reader)


def server_context():
    """Return an ssl.SSLContext for a server, without certificates yet."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)       # from OpenSSL 1.1.0h on
    context.set_alpn_protocols(["http/1.1"])
    return context


class Credentials:
    """The certificates that the control interface and its clients know each other by.

    PEM text: `server_cert`, `client_cert`, `client_key`. The server's key is
    kept for tls_context() alone.
    """

    def __init__(self, host):
        """Make both pairs; `host` is what clients call the server, brackets off.

        Raises as make_certificate.
        """
        self.server_cert, self._server_key = make_certificate("kapow control", host)
        self.client_cert, self.client_key = make_certificate("kapow client")

    def environment(self):
        """Return what a client needs as {variable name: PEM text}."""
        return {SERVER_CERT_VARIABLE: self.server_cert, CLIENT_CERT_VARIABLE: self.client_cert,
                CLIENT_KEY_VARIABLE: self.client_key}

    def tls_context(self):
        """Return the ssl.SSLContext of a server that takes the one client only."""
        context = server_context()
        with pem_path(self.server_cert) as cert, pem_path(self._server_key) as key:
            context.load_cert_chain(cert, key)
        # A certificate that is no authority vouches for itself alone.
        context.load_verify_locations(cadata=self.client_cert)
        context.verify_mode = ssl.CERT_REQUIRED
        return context


def state_path(name):
    """Return the path of a file that servers leave for this user; its directory is made.

    Raises StartError.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    directory = os.path.join(base, "kapow") if base else f"/tmp/kapow-{os.getuid()}"
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        found = os.lstat(directory)
    except OSError as error:
        raise StartError(f"cannot make {directory}: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise StartError(f"{directory} is not this user's alone: no file is safe there")
    return os.path.join(directory, name)


def remove_left(directory):
    """Remove what servers left in `directory` that were killed."""
    for name in os.listdir(directory):
        if re.fullmatch(r"control-[0-9]+\.json", name):
            path = os.path.join(directory, name)
            with contextlib.suppress(OSError), \
                    open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)


def write_left(path, environment):
    """Write a dict as JSON to `path`, in one step; return the file, locked. Raises OSError."""
    remove_left(os.path.dirname(path))
    new = path + ".new"
    with closed_on_error(open(os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), "w",
                              encoding="ascii")) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        json.dump(environment, file)
        file.flush()
        os.rename(new, path)
    return file


class LeftFile:
    """What a client needs for kapowctl in this user's other terminals: a file, locked.

    It has variables, a dict of str, as JSON, and is there for as long as the server lives.
    """

    def __init__(self, environment):
        """Write it. Raises StartError, OSError."""
        self._environment = environment
        self._path = state_path(f"control-{os.getpid()}.json")
        self._file = write_left(self._path, environment)
        self._directory = lock_directory(os.path.dirname(self._path))

    def is_whole(self):
        """Return True if it is there."""
        return os.path.lexists(self._path)

    def restore(self):
        """Write it again. Raises OSError."""
        try:
            path = state_path(os.path.basename(self._path))
        except StartError as error:
            raise OSError(errno.EACCES, str(error)) from None
        directory = lock_directory(os.path.dirname(path))
        before, self._directory = self._directory, directory
        os.close(before)
        before, self._file = self._file, write_left(path, self._environment)
        before.close()
        log.warning("%s was removed and is there again", path)

    def close(self):
        """Remove it."""
        os.close(self._directory)
        with self._file, contextlib.suppress(OSError):
            # In another container a process may have the same number.
            if os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path)):
                os.unlink(self._path)


@contextlib.contextmanager
def left_for_user(environment, caretaker):
    """Context manager: leave a file with `environment` for kapowctl in other terminals."""
    try:
        left = LeftFile(environment)
    except (StartError, OSError) as error:
        log.warning("kapowctl in other terminals will not find this server: %s", error)
        yield
        return
    caretaker.add(left)
    with contextlib.closing(left):
        yield


def no_password():
    """Refuse to ask for the password of a key: the server has no terminal."""
    raise ValueError("the key has a password; the server takes keys without one")


def file_trouble(error):
    """Return the cause of an OSError or ValueError as words without the file's name."""
    if isinstance(error, ssl.SSLError):
        return error.reason or "it holds no usable PEM text"
    return getattr(error, "strerror", None) or str(error)


def user_context(certfile, keyfile, clientauth=False, clientcafile=None):
    """Return the ssl.SSLContext of the user interface. Raises StartError.

    `clientauth` is true to ask clients for a certificate, "optional" to do without.
    """
    context = server_context()
    try:
        context.load_cert_chain(certfile, keyfile, password=no_password)
    except (OSError, ValueError) as error:
        raise StartError(f"cannot use the certificate {certfile} with the key {keyfile}: "
                         f"{file_trouble(error)}") from None
    if clientauth:
        optional = clientauth == "optional"
        context.verify_mode = ssl.CERT_OPTIONAL if optional else ssl.CERT_REQUIRED
        try:
            if clientcafile:
                context.load_verify_locations(clientcafile)
            else:
                context.load_default_certs(ssl.Purpose.CLIENT_AUTH)
        except (OSError, ValueError) as error:
            raise StartError(f"cannot use {clientcafile}, the authorities of client certificates: "
                             f"{file_trouble(error)}") from None
    return context


# Attribute types with another keyword in RFC 4514 than in OpenSSL.
DN_KEYWORDS = {"commonName": "CN", "localityName": "L", "stateOrProvinceName": "ST",
               "organizationName": "O", "organizationalUnitName": "OU", "countryName": "C",
               "streetAddress": "STREET", "domainComponent": "DC", "userId": "UID"}


def escape_dn(value):
    """Escape an attribute value (RFC 4514 section 2.4).

    Control characters too: a shell drops the newlines at the end of $(...),
    and one name must not pass for another.
    """
    value = re.sub(r'([\\"+,;<>])', r"\\\1", value)
    value = re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\{ord(found.group()):02X}", value)
    if value.startswith(("#", " ")):
        value = "\\" + value
    if value.endswith(" ") and value != "\\ ":
        value = value[:-1] + "\\ "
    return value


def format_dn(subject):
    """Return the subject of SSLSocket.getpeercert() as RFC 4514 text."""
    return ",".join(
        "+".join(f"{DN_KEYWORDS.get(kind, kind)}={escape_dn(value)}" for kind, value in names)
        for names in reversed(subject))


# ---------------------------------------------------------------------------
# 11. Interfaces
# ---------------------------------------------------------------------------

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
TAKES_HTTPS = "this port takes HTTPS only, and got plain HTTP: write https:// in the URL"
# How a client begins that speaks HTTP where TLS is expected; the first byte of that is 0x16.
PLAIN_START = re.compile(rb"[\r\n]|" + FIELD_NAME.pattern)
PLAIN_REQUEST = re.compile(rb"[\r\n]*" + REQUEST_LINE.pattern + rb"\r?\n")
BODILESS = (204, 205, 304)          # statuses without a body (RFC 9110 section 15)
COMING = b"-"                       # for the request line of a head that is not whole yet
STDOUT, STDERR = 1, 2               # written directly: one write, one line
SERVER_NAME = f"Kapow/{VERSION}"
OCTETS_TYPE = ("Content-Type", "application/octet-stream")
TEXT_TYPE = "text/plain; charset=utf-8"
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# That metrics tell apart where there is no route to say what is usual (RFC 9110 section 9,
# RFC 5789).
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")

# Before the path of a control call that is for the configuration of a reload: its id.
RELOAD_PATH = re.compile("/reloads/([^/]+)")


@contextlib.contextmanager
def more_masked(mask):
    """Add `mask` to the umask, which is the whole process's, for a with statement."""
    before = os.umask(0o777)
    os.umask(before | mask)
    try:
        yield
    finally:
        os.umask(before)


class Address:
    """HOST:PORT. `host` str without brackets, `port` int."""

    def __init__(self, host, port):
        self.host = host
        self.port = port

    @classmethod
    def parse(cls, text):
        """Parse an address as the command line has it. Raises ValueError, for people."""
        found = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^\[\]:]+)):([0-9]{1,5})", text)
        if found is None:
            raise ValueError(f"{text!r} is not HOST:PORT; IPv6 goes in brackets, [::1]:8080")
        if int(found.group(3)) > 65535:
            raise ValueError(f"the port of {text!r} is over 65535")
        if found.group(1):
            ipaddress.IPv6Address(found.group(1))       # whose error is a sentence
        return cls(found.group(1) or found.group(2), int(found.group(3)))

    @classmethod
    def parse_listening(cls, text):
        """Parse an address to listen on: PORT or :PORT is that port on all IPv4 addresses.

        Raises ValueError, for people.
        """
        port = re.fullmatch(":?([0-9]{1,5})", text)
        return cls.parse(f"{ALL_ADDRESSES}:{port.group(1)}" if port else text)

    def __str__(self):
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def listen(self):
        """Return a socket that listens on the first address there is, IPv4 before IPv6.

        Raises OSError, UnicodeError for a name like a..b.
        """
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM,
                                   flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
        with closed_on_error(socket.socket(family, kind, protocol)) as sock:
            # What is left of the last server's connections is in nobody's way.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
            sock.bind(address)
            sock.listen(BACKLOG)
        return sock

    def retire(self):
        """Keep new clients away, as far as can be, before the socket is closed."""


class UnixAddress:
    """``unix:/path``, a socket in the file system (unix(7)) of mode `mode` less the umask."""

    def __init__(self, path, mode):
        self.path = path
        self._mode = mode
        self._made = None           # os.stat_result of the socket, once it is there

    def __str__(self):
        return UNIX_SCHEME + self.path

    def listen(self):
        """As Address.listen(). A socket that nobody listens on any more is replaced."""
        directory = os.open(os.path.dirname(self.path), os.O_RDONLY | os.O_DIRECTORY)
        try:
            # Else another server could take for stale what does not listen yet.
            self._lock(directory)
            return self._bind()
        finally:
            os.close(directory)

    def _lock(self, directory):
        """Lock the directory, which anyone can who may read it. Raises OSError after LOCK_TIME."""
        deadline = time.monotonic() + LOCK_TIME
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            if time.monotonic() > deadline:
                raise OSError(errno.EAGAIN, "another program has kept its directory, "
                                            f"{os.path.dirname(self.path)}, locked for {LOCK_TIME} s")
            time.sleep(LOCK_LOOK)

    def _bind(self):
        self._remove_stale()
        with closed_on_error(socket.socket(socket.AF_UNIX)) as sock:
            with more_masked(0o777 & ~self._mode):
                sock.bind(self.path)
            self._made = os.lstat(self.path)
            sock.listen(BACKLOG)
        return sock

    def _remove_stale(self):
        try:
            found = os.lstat(self.path)
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(found.st_mode):
            raise FileExistsError(errno.EEXIST, "there is a file that is no socket")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)            # the queue of a living one may be full
            if probe.connect_ex(self.path) != errno.ECONNREFUSED:
                raise OSError(errno.EADDRINUSE, "another program listens there")
        os.unlink(self.path)

    def retire(self):
        """As Address.retire(): remove the file, unless it is another's by now."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.lstat(self.path), self._made):
                os.unlink(self.path)


class InheritedSocket:
    """In the place of an address: a socket that listens already, the service manager's."""

    def __init__(self, sock):
        self._socket = sock

    def __str__(self):
        return "an inherited socket"

    def listen(self):
        """As Address.listen()."""
        return self._socket

    def retire(self):
        """As Address.retire(): nothing, they may wait for the next server."""


def parse_address(text, mode):
    """Parse an address that may be ``unix:/path``, then of `mode`.

    Raises ValueError, for people.
    """
    if not text.startswith(UNIX_SCHEME):
        return Address.parse_listening(text)
    path = text[len(UNIX_SCHEME):]
    if not path.startswith("/"):
        raise ValueError(f"{text!r} has no whole path; unix:/run/kapow.sock has")
    if len(os.fsencode(path)) > SOCKET_PATH_LIMIT:
        raise ValueError(f"the path of {text!r} is longer than {SOCKET_PATH_LIMIT} bytes")
    return UnixAddress(path, mode)


class Histogram:
    """How many of some durations were how long."""

    BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, math.inf)

    def __init__(self):
        self.counts = [0] * len(self.BOUNDS)    # of those up to each bound, and over the last
        self.sum = 0.0                          # seconds

    def add(self, seconds):
        """Count one."""
        self.counts[bisect.bisect_left(self.BOUNDS, seconds)] += 1
        self.sum += seconds

    def samples(self, labels):
        """Yield its samples, with `labels`, as render_metrics() takes them."""
        for bound, count in zip(self.BOUNDS, itertools.accumulate(self.counts)):
            le = "+Inf" if bound == math.inf else f"{bound:g}"
            yield "_bucket", {**labels, "le": le}, count
        yield "_sum", labels, self.sum
        yield "_count", labels, sum(self.counts)


def forget_oldest(series):
    """Make room in a dict of metrics: some programs make routes, and take them away, without end.
    """
    if len(series) > SERIES_LIMIT:
        del series[next(iter(series))]


class Metrics:
    """What became of users' requests since the start. Safe from many threads.

    A route is known by its label, a handler that was ended early by one of CAUSES.
    """

    def __init__(self):
        self._lock = threading.Lock()
        # (route, method, status), str -> how many, and route -> Histogram; what was
        # used last is last.
        self._requests = {}
        self._durations = {}
        self._killed = dict.fromkeys(CAUSES, 0)
        self._received = self._sent = 0             # bytes of bodies

    def count_request(self, labels, received, sent):
        """Count a request that was answered; `labels` are (route, method, status), str.

        `received` and `sent` are bytes of bodies.
        """
        with self._lock:
            # At the end, away from those that nobody uses any more.
            self._requests[labels] = self._requests.pop(labels, 0) + 1
            self._received += received
            self._sent += sent
            forget_oldest(self._requests)

    def count_handler(self, handler):
        """Count a Handler that is over."""
        seconds = time.monotonic() - handler.started
        with self._lock:
            label = handler.route.label
            durations = self._durations[label] = self._durations.pop(label, None) or Histogram()
            durations.add(seconds)
            forget_oldest(self._durations)
            if handler.cause is not None:
                self._killed[handler.cause] += 1

    def families(self):
        """Return what was counted, as render_metrics() takes it."""
        with self._lock:
            requests = [(dict(zip(("route", "method", "status"), key)), count)
                        for key, count in self._requests.items()]
            durations = [sample for label, found in self._durations.items()
                         for sample in found.samples({"route": label})]
            return [
                ("kapow_requests_total", "counter", "Requests answered.", requests),
                ("kapow_handler_seconds", "histogram", "How long handlers lived.", durations),
                ("kapow_handlers_killed_total", "counter", "Handlers ended early.",
                 [({"cause": cause}, count) for cause, count in self._killed.items()]),
                ("kapow_request_bytes_total", "counter", "Bytes of request bodies read.",
                 [({}, self._received)]),
                ("kapow_response_bytes_total", "counter", "Bytes of response bodies sent.",
                 [({}, self._sent)])]


def process_families():
    """Return what the system says of this process, as render_metrics() takes it; Linux alone does.
    """
    try:
        files = len(os.listdir("/proc/self/fd")) - 1        # without the one that lists them
        with open("/proc/self/statm", "rb") as file:
            resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return []
    return [("process_open_fds", "gauge", "Open files.", [({}, files)]),
            ("process_resident_memory_bytes", "gauge", "Resident memory.", [({}, resident)])]


def escape_label(value):
    """Return a str as it stands between the quotes of a label."""
    value = value.encode("utf-8", "replace").decode()
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def render_metrics(families):
    """Return families of metrics in the text format of Prometheus, version 0.0.4, as bytes.

    Each is (name, type, help, samples), a sample ({label: text}, number), or
    (suffix of the name, {label: text}, number).
    """
    lines = []
    for name, kind, text, samples in families:
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        for *suffix, labels, value in samples:
            pairs = ",".join(f'{label}="{escape_label(text)}"' for label, text in labels.items())
            lines.append(f"{name}{''.join(suffix)}{f'{{{pairs}}}' if pairs else ''} {value}")
    return "\n".join([*lines, ""]).encode()


class Readiness:
    """Whether the server is ready for users, and who was told that it is not any more."""

    def __init__(self):
        self._condition = Condition()         # guards what follows
        self.state = "starting"         # or "ready", "stopping", or why it is not ready
        self.starting = True            # the first init programs have not all exited
        # Client's address -> (when it asked last, the most seconds between two times, how often
        # it was told of the stop). Those who asked last are last.
        self._askers = {}

    def become(self, state):
        """Change the state; what stops does not become ready again."""
        with self._condition:
            if self.state != "stopping":
                self.state = state
                self.starting = self.starting and state == "stopping"

    def ask(self, client):
        """Return the state to the address `client`, which will act on it."""
        now = time.monotonic()
        with self._condition:
            last, period, told = self._askers.pop(client, (now, TELL_TIME, 0))
            period = max(period, now - last)
            self._askers[client] = now, period, told + (self.state == "stopping")
            if len(self._askers) > ASKERS_LIMIT:
                del self._askers[next(iter(self._askers))]
            self._condition.notify_all()
            return self.state

    def look(self):
        """Have wait_told() look again."""
        with self._condition:
            self._condition.notify_all()

    def wait_told(self, longest, hurried):
        """Wait until those who ask know that the server stops, and have seen it a few times.

        For as long as that usually takes them, and not over `longest` seconds, or until
        `hurried()`. Not at all for those who have not asked of late.
        """
        now = time.monotonic()
        with self._condition:
            periods = {client: period for client, (last, period, _) in self._askers.items()
                       if now - last < IDLE_TIME}
            seconds = max(periods.values(), default=0) * (TELLS + 1)
            self._condition.wait_for(
                lambda: hurried() or all(told >= TELLS for client, (_, _, told)
                                         in self._askers.items() if client in periods),
                min(seconds, longest))


class Interface(http.server.ThreadingHTTPServer):
    """One listening socket and the threads of its conversations.

    `shared` holds what the conversations use (see Shared). Each conversation
    does its own TLS handshake, so that a client who is slow at it holds up
    nobody.
    """

    daemon_threads = True           # an idle client must not hold up the end

    def __init__(self, name, address, conversation, shared, find_limit, tls=None):
        """Listen on `address`, an Address or what stands for one. Raises StartError.

        `find_limit()` tells how many connections there may be now.
        """
        self.name = name
        self._find_limit = find_limit
        self._idle = {}                 # Conversations, the longest idle first; has no lock
        self._refusals = Seldom()
        self._address = address
        self.shared = shared
        self.tls = tls
        self.stopping = False           # each conversation ends with its next answer
        self.retired = False            # and idle ones do not wait for another request
        self._changed = Condition()     # guards what follows
        self._conversations = set()
        self._coming = 0                # of them, whose threads have not begun
        try:
            sock = address.listen()
        except (OSError, UnicodeError) as error:
            raise StartError(f"the {name} interface cannot listen on {address}: "
                             f"{getattr(error, 'strerror', None) or error}") from None
        self.address_family = sock.family
        self.is_inherited = isinstance(address, InheritedSocket)
        self.is_unix = sock.family == socket.AF_UNIX
        super().__init__(sock.getsockname(), conversation, bind_and_activate=False)
        self.socket.close()             # theirs, which looks up the machine's name to bind it
        self.socket = sock
        sock.setblocking(False)         # a client may have left between select() and accept()
        self._wake_reader, self._wake_writer = socket.socketpair()
        # With TLS idle conversations wait for it too: it can be read once they are to end. It
        # stays open, as some may outlive the interface.
        self.alarm, self._alarm_writer = os.pipe()
        self._thread = threading.Thread(target=self.serve_forever, name=name, daemon=True)

    @property
    def port(self):
        """The port that is listened on, int; on a Unix socket the usual one."""
        if self.is_unix:
            return 443 if self.tls else 80
        return self.server_address[1]

    def url(self, host=None):
        """Return where it is found, as people write it; on `host`, if that is given."""
        if self.is_unix:
            return UNIX_SCHEME + os.fsdecode(self.server_address)
        address = Address(host or self.server_address[0], self.port)
        return f"{'https' if self.tls else 'http'}://{address}"

    def start(self):
        """Begin to accept, and say so in the log."""
        log.info("%s interface: %s", self.name, self.url())
        self._thread.start()

    def serve_forever(self, poll_interval=None):
        """Accept clients until shutdown(); unlike socketserver's, without polling."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.socket, selectors.EVENT_READ)
            selector.register(self._wake_reader, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select()}
                if self._wake_reader in ready:
                    break
                self._accept()
        for _ in range(BACKLOG):            # they came before the end
            if not self._accept():
                break

    def _accept(self):
        """Begin a conversation with the client that waits; return whether there was one."""
        try:
            request, address = self.get_request()
        except OSError as error:
            if error.errno in NO_MORE_FILES:
                self._complain("the %s interface cannot accept a client: %s", error.strerror)
                if not self.shared.user.close_longest_idle():
                    time.sleep(FILES_TIME)  # until some are gone; spinning would not help them
            return False
        if self._is_full() and not self.close_longest_idle():
            self._complain("the %s interface refuses a client: %s connections, and none is idle",
                           self._count())
            self.shutdown_request(request)
            return True
        self._begin(request, address)
        return True

    def _begin(self, request, address):
        with self._changed:
            self._coming += 1
        try:
            self.process_request(request, address)
        except (RuntimeError, MemoryError) as error:    # no thread can be started
            self._complain("the %s interface drops a client: %s", error)
            self.shutdown_request(request)
            with self._changed:
                self._coming -= 1
            self.close_longest_idle()

    def _complain(self, message, why):
        """Log what the interface `name` does to a client, and `why`, unless it just did."""
        if self._refusals.is_due():
            log.error(message, self.name, why)

    def _count(self):
        return len(self._conversations) + self._coming

    def _is_full(self):
        """Return True if there are as many connections as there may be.

        Waits a little where many were told to end and have not yet.
        """
        limit = self._find_limit()
        if self._count() < limit:
            return False
        with self._changed:
            self._changed.wait_for(lambda: self._count() < limit + CLOSING_CONNECTIONS, FILES_TIME)
        return self._count() >= limit

    def make_room(self):
        """Close idle connections where there are more than there may be, now that a handler runs."""
        over = self._count() - self._find_limit()
        if over > 0 and any([self.close_longest_idle() for _ in range(min(over, HANDLER_FILES))]):
            with self._changed:
                self._changed.wait_for(lambda: self._count() <= self._find_limit(), ROOM_TIME)

    def note_idle(self, conversation):
        """Note that a Conversation waits for a request, or for the end of its head."""
        self._idle[conversation] = None

    def note_busy(self, conversation):
        """Note that it does not, any more."""
        self._idle.pop(conversation, None)

    def close_longest_idle(self):
        """Close the connection that has been idle for longest; return whether there was one."""
        while True:
            try:
                conversation = next(iter(self._idle))
            except StopIteration:
                return False
            except RuntimeError:            # another thread has changed it just then
                continue
            self._idle.pop(conversation, None)
            with self._changed:             # what is in the set has its connection open
                if conversation in self._conversations and conversation.dismiss():
                    return True

    def shutdown(self):
        """Accept who waits and close the listening socket, if that was not done."""
        if self.socket.fileno() < 0:
            return
        self._address.retire()
        if self._thread.is_alive():
            self._wake_writer.send(b"\0")
            self._thread.join()
        self.server_close()
        self._wake_reader.close()
        self._wake_writer.close()

    def add(self, conversation):
        """Note a Conversation that begins."""
        with self._changed:
            self._coming -= 1
            self._conversations.add(conversation)

    def remove(self, conversation):
        """Note that it is over."""
        with self._changed:
            self._conversations.discard(conversation)
            self._changed.notify_all()

    def retire(self):
        """Have every conversation end with the request that it has now, idle ones very soon.

        Clients that were about to make one can still do so: it is answered, and
        they are told that it was the last. Who has only just come, and made no
        request yet, has a moment for it, and so has one of which a part has come.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._coming and not self._conversations,
                                   PARTING_TIME)
        self.retired = True
        os.close(self._alarm_writer)
        self._end_idle()
        with self._changed:
            self._changed.wait_for(lambda: not self._coming and not any(
                conversation.fresh or conversation.line is COMING
                for conversation in self._conversations), FRESH_TIME)
        self._end_idle(fresh=True)

    def _end_idle(self, fresh=False):
        """End the conversations that wait for a request; with `fresh` also for their first.

        A conversation sets its `idle` and then looks at `retired`, retire() does
        it the other way round, so none is overlooked. From now on each of them
        counts as busy until it is gone: a request may just have come. Under the
        lock, as the connection of one that is still in the set is not closed yet.
        """
        with self._changed:
            for conversation in self._conversations:
                if conversation.idle and (fresh or not conversation.fresh):
                    conversation.idle = False
                    conversation.connection.end_idle()

    def look(self):
        """Have those who wait for conversations look again."""
        with self._changed:
            self._changed.notify_all()

    def wait_answered(self, seconds, enough=lambda: False):
        """Wait up to `seconds` until no conversation is at a request, or `enough()`.

        Return whether none is.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._is_busy() or enough(), seconds)
            return not self._is_busy()

    def _is_busy(self):
        return any(conversation.busy for conversation in self._conversations)

    def handle_error(self, request, client_address):
        """Log what no conversation should have let through, as one line."""
        error = sys.exc_info()[1]
        log.error("the %s interface dropped a client on an unexpected error, please report it: %r",
                  self.name, error)
        log.debug("where that came from", exc_info=True)


class AccessLog:
    """Writes lines to standard output, and waits for nobody who does not read them.

    Lines that cannot be written at once are kept, up to ACCESS_LOG_BUFFER, and tried again
    with the next line and by the event loop. What comes then is dropped and counted.
    Safe from many threads.
    """

    def __init__(self, watcher):
        self._watcher = watcher
        self._lock = threading.Lock()   # guards what follows
        self._output = None             # what _open() returns, None before the first line
        self._waiting = bytearray()
        self._dropped = 0               # lines
        self._retrying = False          # the watcher will try again
        self._closed = False            # nothing is written any more

    def reopen(self):
        """Write to what standard output is from now on."""
        with self._lock, contextlib.suppress(OSError):
            self._close()
            self._output = self._open()

    def close(self):
        """Write what waits, if somebody reads it, and no more after that."""
        with self._lock:
            self._closed = True
            self._flush()
            end = time.monotonic() + LINGER_TIME
            while self._waiting and time.monotonic() < end and poll_file(
                    STDOUT, select.POLLOUT, ACCESS_LOG_RETRY * 1000):
                self._flush()
            dropped = self._dropped + self._waiting.count(b"\n")
            self._waiting.clear()
            self._dropped = 0
            self._close()
        self._report(dropped)

    def write(self, line):
        """Write bytes, a line with its end."""
        with self._lock:
            if self._closed:
                return
            if not self._waiting:       # as nearly always
                line = line[self._put_now(line):]
                if not line:
                    return
            self._flush()
            if len(self._waiting) + len(line) > ACCESS_LOG_BUFFER:
                self._dropped += 1
            else:
                self._waiting += line
                self._flush()
            retry, dropped = self._settle()
        if retry or dropped:
            self._follow(retry, dropped)

    def _retry(self):
        """Called on the watcher's thread."""
        with self._lock:
            self._retrying = False
            if self._closed:
                return
            self._flush()
            retry, dropped = self._settle()
        self._follow(retry, dropped)

    def _settle(self):
        """Return whether what waits must be tried again, and the lines whose loss can be told."""
        if self._waiting:
            retry, self._retrying = not self._retrying, True
            return retry, 0
        dropped, self._dropped = self._dropped, 0
        return False, dropped

    def _follow(self, retry, dropped):
        """Do what _settle() returned, without the lock."""
        if retry:
            self._watcher.call_later(ACCESS_LOG_RETRY, self._retry)
        self._report(dropped)

    def _report(self, dropped):
        if dropped:
            log.warning("%d lines of the access log were dropped, as nobody read them", dropped)

    def _flush(self):
        while self._waiting:
            written = self._put_now(self._waiting[:PIECE])
            if not written:
                return
            del self._waiting[:written]

    def _put_now(self, data):
        """Write what can be written without waiting; return how many bytes that are, lost or not."""
        try:
            return self._put(data)
        except BlockingIOError:
            return 0
        except OSError:                     # a reader that left stops no server
            return len(data)

    def _put(self, data):
        """Write some bytes without waiting; return how many. Raises OSError."""
        if self._output is None:
            self._output = self._open()
        if isinstance(self._output, socket.socket):
            return self._output.send(data, socket.MSG_DONTWAIT)
        if self._output == STDOUT and not self._is_file:
            if not poll_file(STDOUT, select.POLLOUT, 0):
                raise BlockingIOError(errno.EAGAIN, "nobody reads")
            data = data[:select.PIPE_BUF]       # for which there is room then, pipe(7)
        return os.write(self._output, data)

    def _open(self):
        """Return what stands for standard output, of its own mode: others have that as well.

        A socket, or a descriptor; STDOUT itself where there is no better. Raises OSError.
        """
        kind = os.fstat(STDOUT).st_mode
        self._is_file = stat.S_ISREG(kind)
        if stat.S_ISSOCK(kind):
            return socket.socket(fileno=os.dup(STDOUT))
        if not self._is_file:
            with contextlib.suppress(FileNotFoundError, PermissionError):
                return os.open(f"/proc/self/fd/{STDOUT}",
                               os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        return STDOUT

    def _close(self):
        if isinstance(self._output, socket.socket):
            self._output.close()
        elif self._output not in (None, STDOUT):
            os.close(self._output)
        self._output = None


class Shared:
    """What the conversations of all interfaces share."""

    def __init__(self, watcher, gate, body_limit, min_rate, space):
        self.configuration = None       # that is in force, once there are Services
        self.coming = None              # the Configuration of a reload
        self.handlers = HandlerTable()
        self.gate = gate
        self.watcher = watcher
        self.launcher = None            # Launcher, once the interfaces' URLs are known
        self.billets = None             # Billets, if there are any
        self.user = None                # the Interface of users, once it listens
        self.access_log = AccessLog(watcher)
        self.metrics = None             # Metrics, if somebody may ask for them
        self.readiness = Readiness()
        self.body_limit = body_limit    # bytes of a user request's body, or None
        self.min_rate = min_rate        # of it in a second, 0 for any
        self.space = space              # SpoolSpace of all bodies

    @property
    def services(self):
        """The Services in force."""
        return self.configuration.services

    def find_configuration(self, path):
        """Return the Configuration that a path of the control interface is about, and the rest.

        Raises ApiError.
        """
        found = RELOAD_PATH.match(path)
        if found is None:
            return self.configuration, path
        for configuration in (self.configuration, self.coming):
            if configuration is not None and configuration.id == found.group(1):
                return configuration, path[found.end():]
        raise ApiError(404)

    def find(self, method, path):
        """Return (Route, {name: text}), or (Billet or StaticFile, {}). Raises ApiError.

        What no route fits while the first init programs run may be asked again.
        """
        starting = self.readiness.starting      # before the look, as a route may come meanwhile
        try:
            return self._find(method, path)
        except ApiError as error:
            if starting and error.status in (404, 405):
                raise ApiError(503, [RETRY_LATER]) from None
            raise

    def _find(self, method, path):
        try:
            return self.configuration.routes.match(method, path)
        except ApiError as error:
            if self.billets is None or error.status != 404:
                raise
        TURN.leave()                    # the disk may be slow
        return self.billets.find(method, path), {}


def take_plain_request(sock, deadline):
    """Return the first bytes, with a whole request line, of a client that speaks HTTP without TLS.

    Return b"", and take nothing, where TLS begins: no record of that begins with a
    character of a method. Raises OSError, also for what is neither, or late.
    """
    data = b""
    sock.settimeout(max(deadline - time.monotonic(), 0.001))
    if not PLAIN_START.match(sock.recv(1, socket.MSG_PEEK)):
        return data
    while b"\n" not in data.lstrip(b"\r\n") and len(data) <= LINE_LIMIT:
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        more = sock.recv(LINE_LIMIT)
        if not more:
            break
        data += more
    if not PLAIN_REQUEST.match(data):
        raise ConnectionError("this is neither TLS nor HTTP")
    return data


class Connection:
    """The socket of one client, and in `buffer` what it sent and nobody read.

    `is_plain` tells that TLS was wanted and the client asked without it: it can be
    told so. One thread may receive while another sends. OpenSSL does not take that in
    one session: with TLS the socket does not block, each call to OpenSSL holds
    the lock, and waiting is done outside it.
    """

    def __init__(self, sock, tls=None, on_wrap=lambda sock: None):
        """With `tls`, an SSLContext, shake hands. Raises OSError.

        `on_wrap(socket)` is called with what takes the place of `sock` before that.
        """
        self.buffer = bytearray()
        self._patience = IDLE_TIME  # seconds that sending and receiving may stand still, or None
        self.closed = False         # nothing more can be said to the client
        self.retired = False        # its input was ended here, not by the client
        deadline = time.monotonic() + HEAD_TIME
        if tls:
            self.buffer += take_plain_request(sock, deadline)
        self.is_plain = bool(self.buffer)
        if self.is_plain:
            tls = None
        self._tls_lock = threading.Lock() if tls else None
        self._seconds = 0           # that receiving may take, as the kernel knows it
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        if tls:
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
            sock = tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            on_wrap(sock)
            sock.do_handshake()
            sock.settimeout(0)
        else:
            # A Python socket with a timeout polls before each call; the kernel
            # keeps the time without one (socket(7)).
            sock.settimeout(None)
            set_kernel_timeout(sock, socket.SO_SNDTIMEO, self._patience)
        self.socket = sock

    @contextlib.contextmanager
    def waiting_for_ever(self):
        """Context manager: sending and receiving may stand still for as long as it lasts."""
        self._set_patience(None)
        try:
            yield
        finally:
            self._set_patience(IDLE_TIME)

    def _set_patience(self, seconds):
        self._patience = seconds
        if not self._tls_lock:
            set_kernel_timeout(self.socket, socket.SO_SNDTIMEO, seconds)

    def client_subject(self):
        """Return the subject of the client's certificate (RFC 4514), None without one."""
        certificate = self.socket.getpeercert() if self._tls_lock else None
        return format_dn(certificate["subject"]) if certificate else None

    def receive_first(self, seconds, alarm=None):
        """Return the first bytes of a request, b"" if none come in `seconds`. Raises OSError.

        Or until end_idle(); with TLS until `alarm` can be read, a descriptor.
        """
        if self._tls_lock:
            return self.receive() if self._wait_input(seconds, alarm) else b""
        try:
            return self.receive_within(seconds)
        except TimeoutError:
            return b""

    def _wait_input(self, seconds, alarm):
        TURN.leave()
        if self.socket.pending():
            return True
        poll = select.poll()
        for file in filter(None, (self.socket, alarm)):
            poll.register(file, select.POLLIN)
        return any(fd != alarm for fd, _ in poll.poll(seconds * 1000))

    def dismiss(self):
        """End a connection that waits for a request; return False if one has just come."""
        if poll_file(self.socket, select.POLLIN, 0):
            return False
        if self._tls_lock:
            self.gone()                     # its end could not be said without waiting
        else:
            self.retired = True
            self._shutdown(socket.SHUT_RD)
        return True

    def end_idle(self):
        """Have receive_first() return what has come, or b"".

        What is read afterwards may miss its end, so this is for connections on
        which nothing has come.
        """
        if not self._tls_lock and not poll_file(self.socket, select.POLLIN, 0):
            self.retired = True
            self._shutdown(socket.SHUT_RD)

    def receive(self):
        """Return some bytes, b"" at the end of input. Raises OSError, TimeoutError among them."""
        return self.receive_within(self._patience)

    def receive_within(self, seconds):
        """As receive(), with other patience."""
        TURN.leave()
        if self._tls_lock:
            return self._patiently(self.socket.recv, 4 * PIECE, seconds)
        if seconds != self._seconds:        # a system call saved
            set_kernel_timeout(self.socket, socket.SO_RCVTIMEO, seconds)
            self._seconds = seconds
        try:
            return self.socket.recv(4 * PIECE)
        except BlockingIOError:
            raise TimeoutError("the client is silent") from None

    def receive_now(self):
        """Return some bytes, b"" at the end of input, None where none are here. Raises OSError.

        For the event loop too: it never waits.
        """
        if not self._tls_lock:
            with contextlib.suppress(BlockingIOError):
                return self.socket.recv(4 * PIECE, socket.MSG_DONTWAIT)
        elif self._tls_lock.acquire(blocking=False):
            try:
                return self.socket.recv(4 * PIECE)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                pass
            finally:
                self._tls_lock.release()
        return None

    def send(self, data, on_wait=lambda: None):
        """Send all of `data`. Raises OSError, also when the client takes nothing for too long.

        Unlike sendall(), whose time is for all of it: a slow client is no idle one.
        `on_wait()` is called before each wait for the client.
        """
        view = memoryview(data)
        while view:
            if self._tls_lock:
                sent = self._patiently(self.socket.send, view[:PIECE], self._patience, on_wait)
            else:
                sent = self._send(view, on_wait)
            view = view[sent:]

    def _send(self, view, on_wait):
        try:
            return self.socket.send(view, socket.MSG_DONTWAIT)
        except BlockingIOError:
            TURN.leave()
        on_wait()
        try:
            return self.socket.send(view)
        except BlockingIOError:
            raise TimeoutError("the client takes nothing") from None

    def _patiently(self, call, argument, seconds, on_wait=lambda: None):
        """Return call(argument), a TLS call, waiting outside the lock when it would block.

        `on_wait()` is called before that.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            try:
                with self._tls_lock:
                    return call(argument)
            except ssl.SSLWantReadError:
                event = select.POLLIN
            except ssl.SSLWantWriteError:
                event = select.POLLOUT
            TURN.leave()
            on_wait()
            left = deadline and max(deadline - time.monotonic(), 0) * 1000
            if not poll_file(self.socket, event, left):
                raise TimeoutError("the client is silent")

    def _shutdown(self, how):
        # SSLSocket.shutdown() would take the session from under other threads.
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.socket, how)

    def end_input(self):
        """Read what has come, and then the end.

        With TLS, which would take that for an attack, ask the client to end.
        """
        if self._tls_lock:
            self.end_output()
        else:
            self._shutdown(socket.SHUT_RD)

    def gone(self):
        """Note that the other end left, and wake the threads that receive or send."""
        self.closed = True
        self._shutdown(socket.SHUT_RDWR)

    def linger(self):
        """Say that no more is sent, and give the client time to read what was.

        Closing at once, with bytes of it unread, would reset the connection and
        take the answer away (RFC 9112 section 9.6). What still comes is dropped
        as it is: after its close_notify OpenSSL takes more data for an error.
        """
        TURN.leave()
        deadline = time.monotonic() + LINGER_TIME
        self.end_output()
        with contextlib.suppress(OSError):
            while (left := deadline - time.monotonic()) > 0:
                self.socket.settimeout(left)
                if not socket.socket.recv(self.socket, 4 * PIECE):
                    break

    def end_output(self):
        """Say that no more is sent."""
        if self._tls_lock:
            # Sends close_notify, whose answer is not waited for. ValueError: it
            # was sent and answered.
            with self._tls_lock, contextlib.suppress(OSError, ValueError):
                self.socket.unwrap()
        self._shutdown(socket.SHUT_WR)

    def cut(self):
        """Make close() reset the connection.

        For a body that ends with the connection: an orderly end would tell the
        client that it has all of it.
        """
        self.closed = True
        with contextlib.suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def close(self):
        """Close the socket."""
        self.socket.close()


class Conversation(socketserver.BaseRequestHandler):
    """One client's connection, request after request; the base of every interface's.

    http.server's own base class answers unknown methods before we see them,
    takes what RFC 9112 refuses and cannot read chunked bodies, so of the
    library's only the server is used.

    For a subclass: `answer()`, and `line_limit`, `body_limit`, `min_rate`,
    `on_wait`.
    While a request is answered: `line` is its request line, COMING before that
    is here, None between two; `began` when its first byte was here;
    `head` its RequestHead and `reader` its BodyReader, None until the head was
    read; `keep_alive` whether another request may follow; `status` and `sent`,
    bytes of body, what was answered so far.
    """

    line_limit = LINE_LIMIT         # bytes of a request line

    def answer(self):
        """Answer the request. May raise ApiError, ProtocolError, OSError."""
        raise NotImplementedError

    def body_limit(self):
        """Return the largest request body in bytes, or None."""
        return None

    def min_rate(self):
        """Return the bytes of body that a client must send in a second, 0 for any."""
        return 0

    def on_wait(self):
        """Called when a client that waits for it is to be told to send its body."""
        self.connection.send(CONTINUE)

    def setup(self):
        """Called by socketserver before handle()."""
        self.connection = None
        self._shaking = self.request    # the socket until there is a connection
        self.line = self.head = None
        self.idle = False           # it waits for the first byte of a request
        self.over = False           # there will be no other request
        self.fresh = True           # no request of it has come yet
        self.server.add(self)
        self.server.note_idle(self)

    def handle(self):
        """Talk to the client until either end has had enough."""
        try:
            self.connection = Connection(self.request, self.server.tls, self._note_socket)
            if self.connection.is_plain:
                log.warning("the %s interface takes HTTPS only, and got plain HTTP from %s",
                            self.server.name, UNIX_SCHEME if self.server.is_unix
                            else self.client_address[0])
            self.connected()
            while self.converse():
                pass
        except OSError as error:            # no TLS, or the client left, or is silent
            log.debug("%s: %s", self.label, error)

    def _note_socket(self, sock):
        self._shaking = sock

    def connected(self):
        """Called when the client can be talked to."""

    @property
    def label(self):
        """What lines of the log about it begin with."""
        return f"{self.server.name} interface"

    def dismiss(self):
        """End it if it waits for a request, or its end, and return whether it did. From any thread."""
        if self.connection is None:             # it shakes hands
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._shaking, socket.SHUT_RDWR)
            return True
        return (self.idle or self.line is COMING) and self.connection.dismiss()

    @property
    def busy(self):
        """Whether a request may have come that is not answered yet."""
        return not (self.idle or self.over or self.line is COMING or self.connection is None)

    def finish(self):
        """Called by socketserver after handle()."""
        self.line = None
        self.server.note_busy(self)
        self.server.remove(self)
        if self.connection is not None:
            if not self.connection.closed:
                self.connection.end_output()
            self.connection.close()

    def converse(self):
        """Take one request and answer it; return whether another may follow."""
        self.head = self.reader = self.status = None
        self.sent = 0
        self.keep_alive = False
        try:
            if not self._read_head():
                return False
            self.answer()
        except ApiError as error:
            self.reply_error(error)
        except ProtocolError as error:
            log.debug("%s: %s", self.label, error)
            self.refuse(error)
        finally:
            if self.line is not None:
                self.log_request()
                self.line = None
            self.fresh = False
        return self._settle()

    def log_request(self):
        """Called when a request was answered, or could not be."""

    def _read_head(self):
        """Read a request head; return False when the client has no more requests."""
        self.server.note_idle(self)
        try:
            data = self._receive_head()
        finally:
            self.server.note_busy(self)
        if data is None:
            return False
        self.line = data.partition(b"\r\n")[0]
        self.fresh = False
        if self.server.stopping:
            self.server.look()
        self.head = RequestHead(data[:-4])
        if self.connection.is_plain:
            raise ApiError(400, error=TAKES_HTTPS)
        self.keep_alive = self.head.keep_alive
        on_wait = self.on_wait if self.head.expects_continue else None
        self.reader = BodyReader(self.head, self.connection.buffer, self.connection.receive,
                                 self.body_limit(), on_wait, self.connection.receive_now,
                                 self.min_rate())
        return True

    def _receive_head(self):
        """Return the bytes of a request head, None when the client ends or is idle instead."""
        buffer = self.connection.buffer
        deadline = None             # from the first byte of the head on
        while True:
            while buffer.startswith(b"\r\n"):       # RFC 9112 section 2.2
                del buffer[:2]
            if buffer and deadline is None:
                self.line = COMING
                self.began = time.monotonic()
                deadline = self.began + HEAD_TIME
            end = find_head(buffer, self.line_limit)
            if end is not None:
                return take(buffer, end)
            data = self._receive_more(deadline)
            if not data:
                return None
            buffer += data

    def _receive_more(self, deadline):
        """Return more bytes of a request head; b"" when none come, and none of it is here."""
        if deadline is not None:
            try:
                return self.connection.receive_within(max(deadline - time.monotonic(), 0.001))
            except TimeoutError:
                raise ProtocolError(408, "the request head did not come in time") from None
        self.idle = True
        data = b""
        if not self.server.retired:
            data = self.connection.receive_first(IDLE_TIME, self.server.alarm)
        if not data and self.server.retired and self.fresh:
            data = self.connection.receive_first(FRESH_TIME)
        self.idle = False
        return data

    def _settle(self):
        """Leave the connection at the front of the next request, or tell that it cannot be."""
        if self.connection.closed:
            return False
        if self.keep_alive and not (self.body_is_coming() and self.reader.drain()):
            self.keep_alive = False
        if not self.keep_alive:
            self.over = True
            if self.server.stopping:
                self.server.look()
            self.connection.linger()
        return self.keep_alive

    def body_is_coming(self):
        """Whether the rest of the request's body will come and is small enough to read."""
        if self.reader.done:
            return True
        if self.head.expects_continue and not self.reader.waited:
            return False
        return (self.reader.length or 0) - self.reader.received <= DRAIN_LIMIT

    def break_off(self, delimited):
        """End an unfinished body; `delimited` tells that its head said how it ends."""
        self.keep_alive = False
        if delimited:
            self.connection.end_output()
        else:
            self.connection.cut()

    def refuse(self, error):
        """Answer a ProtocolError and end the conversation."""
        self.keep_alive = False
        self.reply(error.status, reason_json(error.status), [JSON_TYPE])

    def reply_error(self, error):
        """Answer an ApiError."""
        if error.status == 204:
            self.reply(204, b"", error.headers)
        else:
            self.reply(error.status, reason_json(error.reason, **error.details),
                       [JSON_TYPE, *error.headers], error.reason)

    def reply(self, status, body=b"", fields=(), reason=None):
        """Send a whole response."""
        fields = [*fields, *self.common_fields()]
        if status not in (204, 304):
            fields.append(("Content-Length", str(len(body))))
        if self.head is not None and self.head.method == "HEAD":
            body = b""
        self.status, self.sent = status, len(body)
        self.connection.send(format_head(status, fields, reason) + body)

    def common_fields(self):
        """Return the header fields of every response, as (name, value) pairs.

        They say whether the connection is kept, so that is settled here.
        """
        fields = [("Server", SERVER_NAME), ("Date", http_date(int(time.time())))]
        self.keep_alive = (self.keep_alive and not self.server.stopping
                           and self.body_is_coming())
        if not self.keep_alive:
            fields.append(("Connection", "close"))
        elif self.head.version < (1, 1):
            fields.append(("Connection", "keep-alive"))
        return fields


class DataConversation(Conversation):
    """The data interface: the resources of running handlers."""

    line_limit = DATA_LINE_LIMIT

    def answer(self):
        found = re.fullmatch(rb"/handlers/([^/]+)(.*)", self.head.raw_path)
        if found is None:
            raise ApiError("Handler ID Not Found")
        handler_id = urllib.parse.unquote_to_bytes(found.group(1)).decode("latin-1")
        handler = self.server.shared.handlers.find(handler_id)
        if self.head.method not in ("GET", "PUT"):
            raise ApiError(405, [("Allow", "GET, PUT")])
        self._request_id = handler.request_id
        verb = "get" if self.head.method == "GET" else "set"
        # A program may pause for as long as its handler lives.
        with logging_call(handler, verb, found.group(2)), self.connection.waiting_for_ever():
            resource, segments = find_resource(found.group(2))
            if verb == "get":
                self._get(resource, handler, segments)
            else:
                self._put(resource, handler, segments)

    def _get(self, resource, handler, segments):
        with handler.calling(self.connection.gone):
            value = resource.read(handler, segments)
            if isinstance(value, Stream):
                self._send_stream(value)
            else:
                self.reply(200, value, [OCTETS_TYPE])

    def _send_stream(self, value):
        """Send a Stream; when it fails in its middle the connection is cut."""
        pieces = iter(value.pieces)
        first = next(pieces, b"")           # what fails before it is a plain error
        chunked = value.length is None and self.head.version >= (1, 1)
        fields = [OCTETS_TYPE]
        if value.length is not None:
            fields.append(("Content-Length", str(value.length)))
        elif chunked:
            fields.append(("Transfer-Encoding", "chunked"))
        else:
            self.keep_alive = False
        self.connection.send(format_head(200, fields + self.common_fields()))
        try:
            for data in frame(itertools.chain([first], pieces), chunked):
                self.connection.send(data)
        except ProtocolError as error:
            log.debug("%s a resource was cut: %s", self._request_id, error)
            self.break_off(chunked or value.length is not None)

    def _put(self, resource, handler, segments):
        if resource.mode is not None:
            handler.pour(resource.mode, iter(self.reader.read, b""), self.connection.gone)
        elif resource.put is not None:
            with handler.calling(self.connection.gone):
                value = self.reader.read_all(VALUE_LIMIT)
            resource.write(handler, value, segments)
        else:
            raise ApiError("Invalid Resource Path")
        self.reply(200)


@contextlib.contextmanager
def command_errors():
    """Make what a Supervisor could not do in a with statement an ApiError."""
    try:
        yield
    except FailedToStartProcess as error:
        raise ApiError(502, error=error.cause) from None
    except FailedToStopProcess as error:
        raise ApiError(500, error=error.cause) from None
    except FailedToSignalProcess as error:
        raise ApiError("Service Not Running", error=error.cause) from None


class ControlConversation(Conversation):
    """The control interface: JSON in and out.

    While a request is answered `configuration` is the one that it is about.
    """

    def body_limit(self):
        return CONTROL_BODY_LIMIT

    def answer(self):
        self.configuration, path = self.server.shared.find_configuration(
            self.head.raw_path.decode("latin-1"))
        for pattern, calls in CONTROL_CALLS:
            found = pattern.fullmatch(path)
            if found:
                break
        else:
            raise ApiError(404)
        call = calls.get(self.head.method)
        if call is None:
            raise ApiError(405, [("Allow", ", ".join(calls))])
        status, document = call(self, *map(urllib.parse.unquote, found.groups()))
        if status == 204:
            self.reply(204)
        else:
            self.reply(status, json.dumps(document).encode(), [JSON_TYPE])

    def _document(self):
        """Return the request's JSON value; raises ApiError("Malformed JSON")."""
        return decode_json(self.reader.read_all(CONTROL_BODY_LIMIT))

    def _asks(self, name):
        """Return True if the query has the parameter `name`, bytes."""
        return any(key == name for key, _ in parse_query(self.head.query))

    def _added(self, route, index):
        """Return the JSON value of a Route that came to stand at `index` of the table."""
        hidden_by = self.configuration.routes.hidden_by(route)
        return {**route.to_json(index), **({"hidden_by": hidden_by.id} if hidden_by else {}),
                **({"hint": route.hint} if route.hint else {})}

    # The calls. Each returns (status, JSON value).

    def list_routes(self):
        """GET /routes; with ?path and maybe &method the one that would answer."""
        if self._asks(b"path"):
            return self._match_route()
        routes = self.configuration.routes.snapshot()
        return 200, [route.to_json(index) for index, route in enumerate(routes)]

    def _match_route(self):
        query = dict(reversed(parse_query(self.head.query)))
        method = query.get(b"method", b"GET").decode("latin-1")
        path = urllib.parse.unquote(query[b"path"].partition(b"?")[0].decode("latin-1"), "latin-1")
        path = path.encode("latin-1").decode("utf-8", "surrogateescape")
        table = RouteTable(self.configuration.routes.snapshot())
        try:
            route, matches = table.match(method, path)
        except ApiError as error:
            why = "no URL pattern fits the path"
            if error.headers:
                why = f"the path is one for {dict(error.headers)['Allow']}"
            raise ApiError("Route Not Found", error=why) from None
        index, _ = table.find(route.id)
        return 200, {"route": route.to_json(index), "matches": {
            name: text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            for name, text in matches.items()}}

    def show_route(self, route_id):
        """GET /routes/{id}."""
        index, route = self.configuration.routes.find(route_id)
        return 200, route.to_json(index)

    def append_route(self):
        """POST /routes."""
        route = Route.from_json(self._document())
        with self.configuration.services.holding([route]):
            return 201, self._added(route, self.configuration.routes.append(route))

    def put_routes(self):
        """PUT /routes, with an object or an array. With ?dry-run only what would come of it.

        With ?replace an object takes the place of its like.
        """
        document = self._document()
        if isinstance(document, list):
            routes = routes_from_json(document)
            with self.configuration.services.holding(routes):
                if self._asks(b"dry-run"):
                    return 200, [route.to_json(index) for index, route in enumerate(routes)]
                self.configuration.routes.replace(routes)
            return 200, [self._added(route, index) for index, route in enumerate(routes)]
        route = Route.from_json(document)
        index = document.get("index") or 0
        with self.configuration.services.holding([route]):
            if self._asks(b"dry-run"):
                return 200, route.to_json(index)
            if self._asks(b"replace"):
                index, replaced = self.configuration.routes.put(route)
                return 200 if replaced else 201, self._added(route, index)
            return 201, self._added(route, self.configuration.routes.insert(route, index))

    def delete_route(self, route_id):
        """DELETE /routes/{id}."""
        self.configuration.routes.remove(route_id)
        return 204, None

    def list_services(self):
        """GET /services."""
        return 200, [service.to_json() for service in self.configuration.services.snapshot()]

    def show_service(self, name):
        """GET /services/{name}."""
        return 200, self.configuration.services.find(name).to_json()

    def add_service(self):
        """POST /services."""
        with command_errors():
            return 201, self.configuration.services.add(self._document()).to_json()

    def remove_service(self, name):
        """DELETE /services/{name}."""
        with command_errors():
            self.configuration.services.remove(name)
        return 204, None

    def start_service(self, name):
        """POST /services/{name}/start."""
        return self._command(name, Supervisor.begin)

    def stop_service(self, name):
        """POST /services/{name}/stop."""
        return self._command(name, Supervisor.stop)

    def restart_service(self, name):
        """POST /services/{name}/restart."""
        return self._command(name, Supervisor.restart)

    def signal_service(self, name):
        """POST /services/{name}/signal."""
        document = self._document()
        signum = parse_signal(document.get("signal") if isinstance(document, dict) else None)
        return self._command(name, lambda supervisor: supervisor.signal(signum))

    def _command(self, name, command):
        """Do command(Supervisor) with the service; return the answer."""
        service = self.configuration.services.find(name)
        with command_errors():
            command(service.supervisor)
        return 200, service.to_json()

    def list_handlers(self):
        """GET /handlers."""
        return 200, [handler.to_json() for handler in self.server.shared.handlers.snapshot()]

    def kill_handler(self, handler_id):
        """DELETE /handlers/{id}."""
        self.server.shared.handlers.find_any(handler_id).abort(503, "operator")
        return 204, None


CONTROL_CALLS = (
    (re.compile("/routes"), {"GET": ControlConversation.list_routes,
                             "POST": ControlConversation.append_route,
                             "PUT": ControlConversation.put_routes}),
    (re.compile("/routes/([^/]+)"), {"GET": ControlConversation.show_route,
                                     "DELETE": ControlConversation.delete_route}),
    (re.compile("/services"), {"GET": ControlConversation.list_services,
                               "POST": ControlConversation.add_service}),
    (re.compile("/services/([^/]+)"), {"GET": ControlConversation.show_service,
                                       "DELETE": ControlConversation.remove_service}),
    (re.compile("/services/([^/]+)/start"), {"POST": ControlConversation.start_service}),
    (re.compile("/services/([^/]+)/stop"), {"POST": ControlConversation.stop_service}),
    (re.compile("/services/([^/]+)/restart"), {"POST": ControlConversation.restart_service}),
    (re.compile("/services/([^/]+)/signal"), {"POST": ControlConversation.signal_service}),
    (re.compile("/handlers"), {"GET": ControlConversation.list_handlers}),
    (re.compile("/handlers/([^/]+)"), {"DELETE": ControlConversation.kill_handler}),
)


class ResponseSender:
    """Puts the response of one handler on the wire of its conversation."""

    def __init__(self, conversation):
        self._conversation = conversation
        self.started = False        # the head was sent
        self._chunked = False
        self._bodiless = False
        self._left = None           # bytes that the head still promises, or None
        self._overflowed = False    # and there were more, which was logged

    def start(self, response, data, whole):
        """Send the head and `data`, the body's first bytes; with `whole` all of them."""
        self.started = True
        conversation = self._conversation
        conversation.status = status = response.status or 200
        self._bodiless = conversation.head.method == "HEAD" or status in BODILESS
        fields = [(name, value) for name, value in response.fields
                  if status not in (204, 205) or name.lower() != b"content-length"]
        fields += self._framing(response, data, whole)
        names = {name.lower() for name, _ in response.fields}
        guessing = not response.verbatim and status not in BODILESS
        if data and guessing and b"content-type" not in names:
            fields.append(("Content-Type", sniff_content_type(data, whole)))
        fields += [(name, value) for name, value in conversation.common_fields()
                   if name.lower().encode() not in names]
        self._send(format_head(status, fields, response.reason), data)

    def _framing(self, response, data, whole):
        """Decide how the body ends; return the header fields that say so."""
        conversation = self._conversation
        if conversation.status == 205:
            return [("Content-Length", "0")]
        if response.length is not None:
            self._left = response.length
        elif conversation.status in BODILESS:
            pass
        elif whole:
            return [("Content-Length", str(len(data)))]
        elif conversation.head.version >= (1, 1):
            self._chunked = True
            return [("Transfer-Encoding", "chunked")]
        else:
            conversation.keep_alive = False
        return []

    def send(self, data):
        """Send more of the body."""
        self._send(b"", data)

    def _send(self, head, data):
        if self._bodiless:
            data = b""
        elif self._left is not None:
            if len(data) > self._left and not self._overflowed:
                self._overflowed = True
                log.warning("%s wrote more than the Content-Length it set",
                            self._conversation.request_id)
            data = data[:self._left]
            self._left -= len(data)
        self._conversation.sent += len(data)
        if self._chunked and data:
            data = chunk(data)
        if head or data:
            self._conversation.connection.send(head + data, self._conversation.fetch_body)

    def finish(self, complete):
        """End the body; what is not `complete`, or shorter than promised, is cut off."""
        short = bool(self._left) and not self._bodiless
        if short:
            log.warning("%s wrote less than the Content-Length it set",
                        self._conversation.request_id)
        if short or not complete:
            self.break_off()
        elif self._chunked and not self._bodiless:
            self._conversation.connection.send(LAST_CHUNK)

    def break_off(self):
        """Leave the body unfinished, so that the client sees it."""
        self._conversation.break_off(self._chunked or self._left is not None)


def escape_byte(found):
    """Return the escape of the byte that a regular expression found."""
    return b"\\x%02x" % found.group()[0]


def first_value(head, name):
    """Return the first value of a header as bytes; b"-" without one, or without a head."""
    return head.first(name, b"-") if head is not None else b"-"


UNQUOTED = re.compile(rb"[ !#-\[\]-~]*")       # what needs no escape between quotes


def quotable(data):
    """Return bytes as a str that may stand between the quotes of a log line."""
    if UNQUOTED.fullmatch(data):
        return data.decode("ascii")
    return printable(re.sub(rb'["\\]', escape_byte, data))


@functools.lru_cache(maxsize=2)
def log_date(seconds):
    """Return the time of the access log for an int of seconds since the epoch."""
    return time.strftime("%d/%b/%Y:%H:%M:%S %z", time.localtime(seconds))


def format_access(remote, request_id, line, status, sent, head, seconds, pattern):
    """Return a line (bytes) in the combined log format, the request id in the place of the ident.

    It is followed by the `seconds` that the request took and the `pattern` (str) of its route.
    """
    quoted = [quotable(text) for text in (
        line, first_value(head, b"referer"), first_value(head, b"user-agent"),
        pattern.encode("utf-8", "surrogateescape"))]
    text = '%s %s - [%s] "%s" %s %d "%s" "%s" %.3f "%s"\n' % (
        remote, request_id, log_date(int(time.time())), quoted[0], status or "-", sent,
        *quoted[1:3], seconds, quoted[3])
    return text.encode("utf-8", "backslashreplace")


class UserConversation(Conversation):
    """The user interface: each request matched against the routes and given a handler."""

    def setup(self):
        super().setup()
        self.handler = None         # the Handler of the request being answered
        self._ticket = None         # its Ticket at the gate, before and while that runs
        self._left = False          # the client has ended its input
        self._watched = None        # the descriptor that the watcher knows

    @property
    def label(self):
        about_request = self.line is not None or self.head is not None
        return f"{self.request_id} {super().label}" if about_request else super().label

    def reply_error(self, error):
        log.debug("%s: %s", self.label, error.reason)
        super().reply_error(error)

    def connected(self):
        self._watched = self.connection.socket.fileno()
        self.server.shared.watcher.on_hangup(self._watched, self._hung_up)

    def finish(self):
        TURN.leave()
        # Before the descriptor is closed and can be another client's.
        if self._watched is not None:
            self.server.shared.watcher.forget_hangup(self._watched)
        super().finish()

    def converse(self):
        self.request_id = make_request_id()
        self._found = None          # that is to answer: Route, Billet or StaticFile
        return super().converse()

    def _receive_more(self, deadline):
        """As in Conversation; what follows is work for one thread at a time."""
        data = super()._receive_more(deadline)
        TURN.take()
        return data

    def _hung_up(self):
        """Called by the watcher when the client ends its input, which counts as leaving.

        It sets _left and then looks for a ticket and a handler; answer() sets
        these and then looks at _left. So one of them sees both.
        """
        if self.connection.retired:
            return
        self._left = True
        ticket, handler = self._ticket, self.handler
        if handler is not None:
            self._lose_client(handler)
        elif ticket is not None:
            self.server.shared.gate.give_up(ticket)

    def _lose_client(self, handler):
        if handler.request.body.arrived:
            self.connection.gone()
            handler.lose_client(CLIENT_CLOSED_REQUEST)
        else:
            # It may have closed one direction only, and is told of its mistake.
            handler.lose_client(400)

    def body_limit(self):
        return self.server.shared.body_limit

    def min_rate(self):
        return self.server.shared.min_rate

    def on_wait(self):
        if self.handler is not None:
            self.handler.want_body()

    def answer(self):
        reader = self.reader
        for _ in range(REDIRECTS + 1):
            target = self._answer_once(reader)
            if target is None:
                return
            try:
                self.head = self.head.redirected(target)
            except ProtocolError:
                log.error("%s a launcher sends it to %s, which is none of this server",
                          self.request_id, printable(target))
                raise ApiError(502) from None
            reader = BodyReader(self.head, bytearray(), None)       # of nothing
        log.error("%s %s redirects without end", self.request_id, printable(self.line))
        raise ApiError(500)

    def _answer_once(self, reader):
        """Answer the request; return the target of another one that is to answer it, or None."""
        found, matches = self.server.shared.find(self.head.method, self.head.path)
        self._found = found
        if isinstance(found, StaticFile):
            with contextlib.closing(found):
                self._send_file(found)
            return None
        return self._answer_matched(found, matches, reader)

    def _answer_matched(self, route, matches, reader):
        shared = self.server.shared
        self._ticket = ticket = shared.gate.ticket(route)
        try:
            if self._left:
                shared.gate.give_up(ticket)
            if not reader.arrived and not shared.space.has_room(reader.length):
                raise ApiError(503, [RETRY_LATER])
            with shared.gate.passing(ticket):
                if self._left and route.disconnect == "kill":
                    return self._forsake()
                return self._run_handler(route, matches, reader)
        finally:
            self._ticket = None

    def _send_file(self, file):
        """Send a StaticFile, all or the part that is wanted, if the client has it not already."""
        head = self.head
        if file.is_refused(head):
            raise ApiError(412)
        fields = [("ETag", file.etag), ("Last-Modified", http_date(file.modified)),
                  ("Accept-Ranges", "bytes")]
        if file.is_fresh(head):
            self.reply(304, b"", fields)
            return
        wanted = file.find_range(head)
        if wanted is not None:
            fields.append(("Content-Range", f"bytes {wanted[0]}-{wanted[-1]}/{file.size}"))
        start, end = (0, file.size) if wanted is None else (wanted.start, wanted.stop)
        self.status = 200 if wanted is None else 206
        fields += [("Content-Type", file.type), ("Content-Length", str(end - start)),
                   *self.common_fields()]
        data = format_head(self.status, fields)
        while head.method != "HEAD" and start < end:
            piece = file.read_at(start, min(PIECE, end - start))
            if not piece:                       # it was cut meanwhile
                self.connection.send(data)
                self.break_off(True)
                return
            self.connection.send(data + piece)
            data = b""
            start += len(piece)
            self.sent += len(piece)
        if data:
            self.connection.send(data)

    def _forsake(self):
        """Start nothing for a client that left before it could be."""
        if not self.reader.arrived:
            raise PeerLeft()
        self.status = CLIENT_CLOSED_REQUEST
        self.connection.gone()

    def _run_handler(self, route, matches, reader):
        """Answer with a Handler; return its redirect."""
        shared = self.server.shared
        self.server.make_room()

        def handler_changed():
            """Called when the body is whole."""
            handler.body_changed()

        body = RequestBody(reader, lambda error: self._body_failed(handler, error),
                           handler_changed, (self._let_go, self.connection.gone),
                           self.connection.end_input, shared.space)
        request = UserRequest(self.head, body, self._remote(), self.connection.client_subject(),
                              b"https" if self.server.tls else b"http", self.server.port)
        self.handler = handler = Handler(request, route, matches, self.connection.gone,
                                         body.is_coming, shared.space, self.request_id)
        try:
            if self._left:
                self._lose_client(handler)
            way = getattr(shared, route.way)
            with shared.handlers.holding(handler), way.running(handler) as answer:
                self._relay(handler, answer)
            return handler.redirect if self.status is None else None
        finally:
            handler.close()
            body.close()
            if shared.metrics is not None:
                shared.metrics.count_handler(handler)
            self.handler = None

    def fetch_body(self):
        """Have the rest of the body taken in: the client takes no answer now."""
        if self.handler.request.body.is_coming():
            self.handler.request.body.fetch()

    def _let_go(self):
        """Give a client that still sends its body the time to read that it was answered."""
        self.keep_alive = False
        self.connection.end_output()

    def _body_failed(self, handler, error):
        """Called by the thread that met a ProtocolError in the body."""
        if error.status == 500:             # the client is not to blame
            log.error("%s %s", handler.request_id, error)
        if isinstance(error, PeerLeft):
            handler.lose_client(error.status)
        else:
            handler.abort(error.status, "body")

    def _remote(self):
        """Return the client's IP address; one that came over IPv6 as the IPv4 that it is.

        On a Unix socket, where there is none, what nginx says.
        """
        if self.server.is_unix:
            return UNIX_SCHEME
        address = self.client_address[0]
        return address[len("::ffff:"):] if address.startswith("::ffff:") else address

    def _relay(self, handler, answer):
        """Send what the program writes until it has ended; `answer` tells it step by step."""
        sender, step = ResponseSender(self), None
        while step not in ("end", "abort"):
            try:
                step, data = answer.next_step()
                if not handler.client_lost:
                    self._take_step(step, data, handler.response, sender)
            except OSError as error:
                log.debug("%s lost its client: %s", handler.request_id, error)
                self.connection.closed = True
                handler.lose_client(CLIENT_CLOSED_REQUEST)
        if handler.aborted is not None:
            self._end_early(handler, sender)
        elif handler.client_lost:
            self.status = self.status or CLIENT_CLOSED_REQUEST
            self.connection.gone()

    def _take_step(self, step, data, response, sender):
        if step == "continue" and not sender.started:
            self.connection.send(CONTINUE)
        elif step == "fetch":
            if not self.handler.request.body.fetch():
                self.handler.hold_no_longer()
        elif step == "data" and not sender.started:
            sender.start(response, data, whole=False)
        elif step == "data":
            sender.send(data)
        elif step == "end" and self.handler.redirect is not None:
            pass                                # somebody else answers
        elif step == "end" and not sender.started and response.is_silent():
            self.status = NO_ANSWER
            self.connection.gone()
        elif step == "end" and not sender.started:
            sender.start(response, response.conclude(self.handler.succeeded), whole=True)
            sender.finish(complete=True)
        elif step == "end":
            sender.finish(complete=self.handler.succeeded)

    def _end_early(self, handler, sender):
        """Answer for a handler that was aborted, and wait for its program's end."""
        self.keep_alive = False
        if self.connection.closed:
            self.status = self.status or handler.aborted
        elif sender.started:
            sender.break_off()
        else:
            with contextlib.suppress(OSError):
                self.reply(handler.aborted, reason_json(handler.aborted), [JSON_TYPE])
                self.connection.end_output()
        handler.wait_exit()

    def log_request(self):
        TURN.leave()                # the log may be slow
        pattern = self._found.url_pattern if isinstance(self._found, Route) else "-"
        self.server.shared.access_log.write(format_access(
            self._remote(), self.request_id, self.line, self.status, self.sent, self.head,
            time.monotonic() - self.began, pattern))
        metrics = self.server.shared.metrics
        if metrics is not None:
            received = self.reader.received if self.reader is not None else 0
            metrics.count_request(self._labels(), received, self.sent)

    def _labels(self):
        """Return what metrics call the request: no client shall fill them with words of its own."""
        method = self.head.method if self.head is not None else ""
        if method and method not in METHODS and not isinstance(self._found, Route):
            method = "other"
        label = self._found.label if self._found is not None else ""
        return label, method, str(self.status or "")


class StatusConversation(Conversation):
    """The status interface: what balancers and Prometheus ask."""

    def answer(self):
        page = STATUS_PAGES.get(self.head.raw_path)
        if page is None:
            raise ApiError(404)
        if self.head.method not in ("GET", "HEAD"):
            raise ApiError(405, [("Allow", "GET, HEAD")])
        status, kind, body = page(self)
        self.reply(status, body, [("Content-Type", kind)])

    # The pages. Each returns (status, Content-Type, bytes).

    def show_health(self):
        """/healthz: the process lives."""
        return 200, TEXT_TYPE, b"ok\n"

    def show_readiness(self):
        """/readyz: the server takes requests."""
        state = self.server.shared.readiness.ask(self.client_address[0])
        return 200 if state == "ready" else 503, TEXT_TYPE, state.encode() + b"\n"

    def show_metrics(self):
        """/metrics, in the text format of Prometheus."""
        shared = self.server.shared
        running, waiting, refused = shared.gate.counts()
        services = shared.services.snapshot()
        families = [
            *shared.metrics.families(),
            ("kapow_handlers_running", "gauge", "Handlers that run.", [({}, running)]),
            ("kapow_handlers_queued", "gauge", "Requests that wait to be handled.",
             [({}, waiting)]),
            ("kapow_requests_refused_total", "counter", "Requests for which there was no room.",
             [({}, refused)]),
            ("kapow_service_up", "gauge", "Whether a service answers.",
             [({"service": service.name}, int(service.supervisor.state == "available"))
              for service in services]),
            ("kapow_service_restarts_total", "counter", "New processes of a service.",
             [({"service": service.name}, service.supervisor.restarts) for service in services]),
            *process_families()]
        return 200, METRICS_TYPE, render_metrics(families)


STATUS_PAGES = {b"/healthz": StatusConversation.show_health,
                b"/readyz": StatusConversation.show_readiness,
                b"/metrics": StatusConversation.show_metrics}


# ---------------------------------------------------------------------------
# 12. Server
# ---------------------------------------------------------------------------


# By these names a service manager hands sockets over, in this order if it gives none,
# from the descriptor FIRST_INHERITED on (sd_listen_fds(3)).
INTERFACES = ("user", "control", "data", "status")
FIRST_INHERITED = 3

# What a program on this machine calls instead of "any address".
CALLABLE_HOSTS = {"0.0.0.0": "127.0.0.1", "::": "::1"}

# The commands that handlers and init programs find on their PATH, as shell text
# in which the words in capitals become commands. Of the client, `get` and
# `set`, which run several times in a request, are FAST: compiled, and without
# site-packages; `route` needs those. LIBRARY is the path of SHELL_LIBRARY, in
# which the words stand as well.
READ_LIBRARY = ". LIBRARY\n_kapow_exec=exec\n"
TOOLS = {
    "kapow": READ_LIBRARY + 'kapow "$@"\n',
    "kapowctl": READ_LIBRARY + 'kapowctl "$@"\n',
    "request": 'case ${1?usage: request /PATH} in\n-*) exec CLIENT get "$@" ;;\nesac\n'
               + READ_LIBRARY + 'kapow get "/request/${1#/}"\n',
    "response": 'case ${1?usage: response /PATH [VALUE]} in\n-*) exec CLIENT set "$@" ;;\nesac\n'
                + READ_LIBRARY
                + '_kapow_path=/response/${1#/}\nshift\nkapow set "$_kapow_path" "$@"\n',
    "kroute": 'exec CLIENT route "$@"\n',
}
LIBRARY_NAME = "kapow.sh"
COMPILED_NAME = "kapowctl.pyc"
NO_CLIENT = ("kapowctl.py is not beside kapow.py: kapow get and set work in the shells of "
             "handlers alone, kapow route, service, handler and completion nowhere")


def find_client():
    """Return the path of kapowctl, this program's client; None when it is not here."""
    here = os.path.dirname(os.path.realpath(__file__))
    for name in ("kapowctl.py", "kapowctl"):
        path = os.path.join(here, name)
        if os.path.isfile(path):
            return path
    return None


def compile_client(client, directory):
    """Return the bytes of the compiled client, None if it is not Python of this version.

    It is compiled in `directory`.
    """
    path = os.path.join(directory, COMPILED_NAME)
    try:
        with open(py_compile.compile(client, path, doraise=True), "rb") as file:
            return file.read()
    except (OSError, py_compile.PyCompileError):        # an installed command of another Python
        return None


def tool_commands(client, compiled):
    """Return what the words in TOOLS stand for, as {word: shell text}.

    `client` is the path of the client, and `compiled` that of the compiled one; each
    may be None. Where there is no client, its words stand for this program, which says so.
    """
    python = shlex.quote(sys.executable or "python3")
    server = f"{python} {shlex.quote(os.path.realpath(__file__))}"
    slow = server if client is None else f"{python} {shlex.quote(client)}"
    fast = slow if compiled is None else f"{python} -I -S {shlex.quote(compiled)}"
    return {"SERVER": server, "CLIENT": slow, "FAST": fast}


def make_tools(work, home):
    """Return the TOOLS, the SHELL_LIBRARY and the compiled client, {name: bytes}.

    They refer to each other in the directory `home`; `work` is one to work in.
    """
    client = find_client()
    if client is None:
        log.warning("%s", NO_CLIENT)
    compiled = None if client is None else compile_client(client, work)
    found = None if compiled is None else os.path.join(home, COMPILED_NAME)
    words = {**tool_commands(client, found),
             "LIBRARY": shlex.quote(os.path.join(home, LIBRARY_NAME))}
    files = {} if compiled is None else {COMPILED_NAME: compiled}
    for name, text in {**TOOLS, LIBRARY_NAME: SHELL_LIBRARY}.items():
        text = re.sub(r"\b(?:%s)\b" % "|".join(words), lambda found: words[found.group()], text)
        text = re.sub(r"(?m)^ *# .*\n", "", text)      # which the shell need not read each time
        files[name] = os.fsencode("#!/bin/sh\n" + text)
    return files


def directory_for_programs():
    """Return where a program can be run from: the directory of temporary files, or another.

    That one where there is no better; mount(8) has noexec.
    """
    usual = tempfile.gettempdir()
    for path in (usual, "/var/tmp", "/dev/shm"):
        with contextlib.suppress(OSError):
            noexec = os.statvfs(path).f_flag & getattr(os, "ST_NOEXEC", 0)
            if not noexec and os.access(path, os.W_OK | os.X_OK):
                return path
    log.warning("no program can be run from %s: kapow is found by no handler and init program",
                usual)
    return usual


class ToolDirectories:
    """Where handlers and init programs find kapow: two directories on their PATH.

    `private` is for this user alone, and the first; sockets are in it too. `public`
    has the same tools for programs that became another user, and the library for all.
    """

    def __init__(self):
        """Make both. Raises OSError."""
        parent = directory_for_programs()
        remove_abandoned({parent, *PARENTS})
        with contextlib.ExitStack() as stack:
            self.private = stack.enter_context(contextlib.closing(OwnDirectory(parent)))
            self.public = stack.enter_context(contextlib.closing(OwnDirectory(parent, 0o755)))
            tools = make_tools(self.private.path, self.public.path)
            for directory in self:
                directory.fill(tools)
            self._stack = stack.pop_all()

    def __iter__(self):
        return iter((self.private, self.public))

    @property
    def library(self):
        """The path of the SHELL_LIBRARY."""
        return os.path.join(self.public.path, LIBRARY_NAME)

    def close(self):
        """Remove both."""
        self._stack.close()


def child_environment(directories, data_url, control_url):
    """Return the environment of handlers and init programs, without credentials.

    `directories` are ToolDirectories; `control_url` is None without a control
    interface. A URL that the server's own environment has is kept.
    """
    environment = {name: value for name, value in os.environ.items()
                   if name not in (*CREDENTIAL_VARIABLES, CHANNEL_VARIABLE)}
    environment["PATH"] = os.pathsep.join([*(directory.path for directory in directories),
                                           environment.get("PATH", os.defpath)])
    urls = {DATA_URL_VARIABLES: data_url, CONTROL_URL_VARIABLES: control_url}
    for (name, older), url in urls.items():
        url = environment.get(name) or url
        if url is not None:
            environment[name] = environment[older] = url
    return environment


def load_routes(path):
    """Return the Routes of the JSON file `path`. Raises StartError."""
    try:
        with open(path, "rb") as file:
            routes = routes_from_json(decode_json(file.read()))
    except OSError as error:
        raise StartError(f"cannot read the routes in {path}: {error.strerror}") from None
    except ApiError as error:
        raise StartError(f"cannot use the routes in {path}: {describe_refusal(error)}") from None
    for route in routes:
        if route.hint:
            log.warning("%s: the route %s %s: %s", path, route.method,
                        printable(os.fsencode(route.url_pattern)), route.hint)
    return routes


def find_program(name):
    """Return the path of an init program: `name` as a path, else on PATH. Raises StartError."""
    if os.path.isfile(name):
        return os.path.abspath(name)
    path = shutil.which(name) if os.sep not in name else None
    if path is None and os.path.isdir(name):
        raise StartError(f"cannot start the init program {name}: it is a directory; "
                         "--billets serves the programs in one")
    if path is None:
        raise StartError(f"cannot start the init program {name}: there is no such file, "
                         "and none of that name on PATH")
    return path


class InitPrograms:
    """One run of the programs that set up the routes."""

    def __init__(self, spawner, watcher, environment, on_exit):
        """`environment` is what they get besides what handlers get.

        `on_exit()` is called on the watcher's thread when one has exited.
        """
        self._spawner = spawner
        self._watcher = watcher
        self._environment = environment
        self._on_exit = on_exit
        self._started = []          # (name, Child, threading.Event set at its exit)
        self._reminder = None       # the watcher's deadline
        self.failure = None         # how the first one failed, a sentence

    @property
    def done(self):
        """Whether all have exited."""
        return not self._running()

    def _running(self):
        return [name for name, _, exited in self._started if not exited.is_set()]

    def start(self, names):
        """Start the programs `names`, each a path or of PATH. Raises StartError."""
        for name, path in [(name, find_program(name)) for name in names]:
            self._start(name, path)
        self._reminder = self._watcher.call_later(START_TIME, self._remind)

    def _remind(self):
        """Called on the watcher's thread."""
        for name in self._running():
            log.warning("the init program %s still runs; what comes after it waits", name)

    def _start(self, name, path):
        exited = threading.Event()
        # As of #!/usr/bin/env, which is there itself.
        hint = f"; {CRLF_HINT}" if ends_with_crlf(path) else ""

        def on_exit(_, returncode):
            if returncode != 0:
                failure = f"the init program {name} {describe_exit(returncode)}{hint}"
                self.failure = self.failure or failure
                log.error("%s", failure)
            exited.set()
            self._on_exit()

        try:
            child = self._spawner.spawn([path], self._environment, os.path.basename(name), STDERR,
                                        on_exit)
        except (OSError, RuntimeError) as error:
            raise StartError(f"cannot start the init program {name}: "
                             f"{start_trouble(error, path)}") from None
        self._started.append((name, child, exited))

    def stop(self):
        """End those that still run, and wait for them."""
        if self._reminder is not None:
            self._watcher.cancel(self._reminder)
        for _, child, _ in self._started:
            child.kill()
        for _, _, exited in self._started:
            exited.wait()


class ServiceManager:
    """Who started the server, if it wants to be told what that is at: sd_notify(3)."""

    def __init__(self):
        """Take its address out of the environment, where children are not to find it."""
        self._address = os.environ.pop("NOTIFY_SOCKET", "")

    def tell(self, state):
        """Say `state`, as ``READY=1``; what cannot be said is nobody's loss."""
        if not self._address.startswith(("/", "@")):
            return
        address = self._address.replace("@", "\0", 1) if self._address[0] == "@" else self._address
        with contextlib.suppress(OSError), \
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(NOTIFY_TIME)
            sock.sendto(os.fsencode(state), address)


def inherited_socket(fd, name):
    """Return the socket that listens on the descriptor `fd`, for the interface `name`.

    Raises StartError.
    """
    try:
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise StartError(f"the descriptor {fd} is no socket for the {name} interface: "
                         f"{error.strerror}") from None
    families = [socket.AF_INET, socket.AF_INET6]
    if name in ("user", "data"):
        families.append(socket.AF_UNIX)
    if sock.type != socket.SOCK_STREAM or not listens or sock.family not in families:
        raise StartError(f"the inherited socket {fd} is none on which the {name} interface "
                         "can listen")
    return sock


def inherited_sockets():
    """Return the sockets that a service manager has handed over (sd_listen_fds(3)).

    {name of an interface: InheritedSocket}. Raises StartError. Children are not
    to find them, nor what the environment says of them.
    """
    said = {name: os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS",
                                                        "LISTEN_FDNAMES")}
    if said["LISTEN_PID"] != str(os.getpid()) or not re.fullmatch("[0-9]{1,4}", said["LISTEN_FDS"]):
        return {}
    count = int(said["LISTEN_FDS"])
    names = said["LISTEN_FDNAMES"].split(":") if said["LISTEN_FDNAMES"] else INTERFACES
    if count > len(names):
        raise StartError(f"there are {count} inherited sockets and {len(names)} names for them")
    found = {}
    for fd, name in zip(range(FIRST_INHERITED, FIRST_INHERITED + count), names):
        if name not in INTERFACES or name in found:
            raise StartError(f"the inherited socket {fd} is called {name}; the names are "
                             f"{', '.join(INTERFACES)}, each once (FileDescriptorName=)")
        found[name] = InheritedSocket(inherited_socket(fd, name))
    return found


def callable_url(interface):
    """Return the URL at which programs on this machine reach an Interface."""
    return interface.url(CALLABLE_HOSTS.get(interface.server_address[0]))


def find_spool_limit(wanted):
    """Return the bytes that spools may take: `wanted`, or if that is None a part of what is free.

    0 is no limit, which is None. Raises OSError.
    """
    if wanted is not None:
        return wanted or None
    found = os.statvfs(tempfile.gettempdir())
    return found.f_bavail * found.f_frsize // SPOOL_PART


FIRST_ROUTE = "kapow route add /hello -c 'echo Hello | kapow set /response/body'"
TO_STOP = "it is to stop"       # why a server does not reload


class Server:
    """All of one running server. `options` is what make_server_parser() parses to."""

    def __init__(self, options, background, manager, sockets):
        """`background` is the Background and `manager` the ServiceManager that run() is to have.

        `sockets` are as inherited_sockets() returns them.
        """
        self._options = options
        self._background = background
        self._manager = manager
        self._sockets = sockets
        self._watcher = Watcher("watcher")
        self._outputs = Watcher("outputs")
        self.reaper = Reaper(self._watcher)
        self._caretaker = Caretaker(self._watcher)
        self._files = FileBudget(options.max_handlers, options.max_connections)
        gate = Gate(self._files.max_handlers, options.max_queue, options.queue_time)
        self._shared = Shared(self._watcher, gate, options.max_body or None, options.min_rate,
                              SpoolSpace(find_spool_limit(options.max_spool)))
        self._asked = Condition()         # guards what follows
        self._stop_asked = False
        self._hurried = False           # no more grace for running handlers
        self._reload_asked = False
        # Made by run().
        self._credentials = {}          # what init programs get that handlers do not
        self._spawner = None            # of handlers and init programs

    def ask_to_stop(self):
        """Have run() end; when asked again, without waiting for handlers. From any thread."""
        with self._asked:
            self._hurried = self._stop_asked
            self._stop_asked = True
            self._asked.notify_all()
        if self._hurried:
            self._shared.readiness.look()
            if self._shared.user is not None:
                self._shared.user.look()
        coming = self._shared.coming
        if coming is not None:
            coming.services.look()

    def ask_to_reload(self):
        """Have run() set all up anew. From any thread."""
        with self._asked:
            self._reload_asked = True
            self._asked.notify_all()

    def _look(self):
        """Have the main thread look again."""
        with self._asked:
            self._asked.notify_all()

    def run(self):
        """Start everything, wait until asked to stop, stop everything. Raises StartError.

        What is opened is closed in the reverse order: users first, the data
        interface, which running programs need, late, and last who tells of it.
        """
        options = self._options
        for name in options.init_programs:
            find_program(name)              # or there is nothing to start for
        routes = self._load_routes()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._background.holding())
            status = self._open_status(stack)
            directories = stack.enter_context(contextlib.closing(ToolDirectories()))
            channel = self._open_channel(stack)
            self._start_watchers(stack)
            data = self._open(stack, "data", options.data_bind, DataConversation,
                              lambda: self._files.data_connections(self._shared.gate.running))
            control, control_url = self._open_control(stack)
            shared = self._shared
            shared.user = self._open(stack, "user", options.bind, UserConversation,
                                     lambda: self._files.user_connections(shared.gate.running),
                                     self._user_tls())
            environment = child_environment(directories, callable_url(data), control_url)
            self._make_ways(stack, directories, environment, channel, callable_url(data))
            self._shared.configuration = self._make_configuration(stack, directories.private,
                                                                  routes)
            self._look_after(stack, directories)
            first = InitPrograms(self._spawner, self._watcher, self._credentials, self._look)
            stack.callback(first.stop)
            stack.callback(self._abort_users)
            stack.callback(self._end_users)
            for name in self._sockets:
                log.warning("the inherited socket for the %s interface is not used", name)
            self._background.write_pid()
            self._background.redirect()
            shared.access_log.reopen()
            for interface in filter(None, (status, data, control)):
                interface.start()
            if not self._shared.user.is_inherited:
                self._shared.user.start()
            if control and not (routes or options.init_programs or options.billets is not None):
                log.info("nothing is served yet, as there are no routes; this adds one: %s",
                         FIRST_ROUTE)
            first.start(options.init_programs)
            self._background.ready()
            self._serve(first)

    def _serve(self, first):
        """Be ready when the programs `first` are done; then reload, until asked to stop."""
        if self._wait(lambda: first.done):
            return
        self._become_ready(first.failure)
        while not self._wait(lambda: self._reload_asked):
            self._reload()

    def _wait(self, condition):
        """Wait until `condition()`, or a stop is asked for; return whether that is."""
        with self._asked:
            self._asked.wait_for(lambda: self._stop_asked or condition())
            return self._stop_asked

    def _become_ready(self, failure):
        """Serve what the init programs have set up; `failure` says how one failed, None for none."""
        self._shared.readiness.become(failure or "ready")
        if self._shared.user.is_inherited:
            self._shared.user.start()      # who waits there has come for what the init programs set up
        count = len(self._shared.configuration.routes.snapshot())
        routes = f"{count} route{'' if count == 1 else 's'}"
        if failure:
            log.warning("not ready, since %s: %s, %s", failure, routes, self._shared.user.url())
            self._manager.tell(f"READY=1\nSTATUS={failure}")
        else:
            log.info("ready: %s, %s", routes, self._shared.user.url())
            self._manager.tell("READY=1")

    def _reload(self):
        """Set all up anew. What fails leaves everything as it was, and the log says why."""
        shared = self._shared
        with self._asked:
            self._reload_asked = False          # from now on it is one more
        log.info("the server reloads")
        self._manager.tell(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        outcome = "reloaded"
        try:
            self._background.reopen_log()
            shared.access_log.reopen()
            self._check_files()
            tls = self._user_tls()
            shared.coming = shared.configuration.successor(self._load_routes())
            self._set_up(shared.coming)
        except Exception as error:
            why = error if isinstance(error, (StartError, OSError)) else f"unexpected, {error!r}"
            outcome = f"did not reload: {why}"
            log.error("the server did not reload, and all is as it was: %s", why)
            log.debug("where that came from", exc_info=True)
            if shared.coming is not None:
                shared.coming.services.give_up()
        else:
            self._shared.user.tls = tls
            self._put_in_force(shared.coming)
            shared.readiness.become("ready")
            log.info("the server has reloaded")
        shared.coming = None
        self._manager.tell(f"READY=1\nSTATUS={outcome}")

    def _check_files(self):
        """Raise StartError for a file that can be read but once, or not at all for a long time."""
        options = self._options
        for path in (*options.routes, options.certfile, options.keyfile, options.clientcafile):
            if path is not None and os.path.exists(path) and not os.path.isfile(path):
                raise StartError(f"{path} is no plain file, and cannot be loaded again")

    def _set_up(self, configuration):
        """Have the init programs fill a Configuration. Raises StartError when one fails."""
        urls = {name: f"{url.rstrip('/')}/reloads/{configuration.id}"
                for name, url in self._spawner.environment.items() if name in CONTROL_URL_VARIABLES}
        programs = InitPrograms(self._spawner, self._watcher, {**self._credentials, **urls},
                                self._look)
        try:
            programs.start(self._options.init_programs)
            stopping = self._wait(lambda: programs.done or programs.failure)
        finally:
            programs.stop()
        if stopping or programs.failure:
            raise StartError(programs.failure or TO_STOP)
        late = configuration.services.wait_available(START_TIME, lambda: self._stop_asked)
        if self._stop_asked:
            raise StartError(TO_STOP)
        if late:
            raise StartError(f"the new service {late[0]} does not answer on its socket")

    def _put_in_force(self, configuration):
        left = configuration.services.take_over()
        self._shared.configuration = configuration
        for service in left:
            service.supervisor.begin_to_close()

    def _load_routes(self):
        """Return the Routes of --routes as a list. Raises StartError."""
        return [route for path in self._options.routes for route in load_routes(path)]

    def _start_watchers(self, stack):
        """Start the threads that watch programs and write what they print."""
        self._outputs.start()
        stack.callback(self._stop_outputs)
        self._watcher.start()
        stack.callback(self._watcher.stop)
        stack.callback(self._shared.access_log.close)
        self._outputs.write_log_for(self._watcher)

    def _stop_outputs(self):
        """Wait for the last lines of the log, but not for one who does not read it."""
        LOG_HANDLER.deputies.clear()
        self._outputs.stop(LINGER_TIME)

    def _make_spawner(self, stack, environment, outputs, directories=()):
        spawner = Spawner(self._watcher, self.reaper, environment, outputs, self._files.before,
                          directories)
        stack.callback(spawner.close)
        return spawner

    def _look_after(self, stack, directories):
        """Have the Caretaker look after the files that handlers need."""
        for directory in directories:
            self._caretaker.add(directory)
        self._caretaker.start()
        stack.callback(self._caretaker.stop)

    def _make_ways(self, stack, directories, environment, channel, data_url):
        """Make what answers requests, but for services.

        `directories` are the ToolDirectories. Programs use `channel` if nothing stands
        before `data_url`.
        """
        options, shared = self._options, self._shared
        outputs = self._outputs if options.debug else None
        self._spawner = self._make_spawner(stack, environment, outputs, directories)
        if environment[DATA_URL_VARIABLES[0]] != data_url:
            channel = None
        shared.launcher = Launcher(self._spawner, self._watcher, options.timeout, channel,
                                   directories.library, data_url)
        if channel is not None:
            stack.callback(channel.join)
        if options.billets is not None:
            spawner = self._make_spawner(stack, billet_environment(environment), outputs,
                                         directories)
            shared.billets = Billets(options.billets, spawner, self._watcher, options.timeout)

    def _make_configuration(self, stack, directory, routes):
        """Return the first Configuration; `stack` will stop the services of the last."""
        spawner = self._make_spawner(stack, service_environment(), self._outputs)
        surroundings = Surroundings(directory, self._watcher, spawner, self._options.grace)
        self._caretaker.add(surroundings)
        stack.callback(lambda: self._shared.services.close())
        table = RouteTable(routes)
        return Configuration(table, Services(table, surroundings, self._watcher,
                                             self._options.timeout))

    def _open_channel(self, stack):
        """Return a Channel that `stack` will close, None where there is none."""
        if not can_have_channels():
            return None
        channel = Channel(self._watcher, self._shared.handlers,
                          self._files.max_handlers or MAX_HANDLERS)
        stack.callback(channel.close)
        return channel

    def _open(self, stack, name, address, conversation, find_limit, tls=None):
        """Return a listening Interface that `stack` will close."""
        interface = Interface(name, self._sockets.pop(name, address), conversation, self._shared,
                              find_limit, tls)
        stack.callback(interface.shutdown)
        return interface

    def _open_status(self, stack):
        """Return the status Interface, None if nobody wants it."""
        if self._options.status_bind is None and "status" not in self._sockets:
            return None
        self._shared.metrics = Metrics()
        return self._open(stack, "status", self._options.status_bind, StatusConversation,
                          self._files.other_connections)

    def _open_control(self, stack):
        """Return the control Interface and its URL, (None, None) where there can be none.

        Leaves what its clients need in a file.
        """
        options = self._options
        if not options.control:
            return None, None
        reachable = options.control_reachable_addr or options.control_bind
        try:
            credentials = Credentials(reachable.host)
        except MissingPackage as error:
            if options.init_programs:
                raise StartError(f"{error}; without it there can be no init programs") from None
            log.warning("%s: there is none, and the routes are those of --routes", error)
            return None, None
        control = self._open(stack, "control", options.control_bind, ControlConversation,
                             self._files.other_connections, credentials.tls_context())
        port = reachable.port if options.control_reachable_addr and reachable.port else control.port
        url = f"https://{Address(reachable.host, port)}"
        self._credentials = credentials.environment()
        stack.enter_context(left_for_user({CONTROL_URL_VARIABLES[0]: url, **self._credentials},
                                          self._caretaker))
        return control, url

    def _user_tls(self):
        options = self._options
        if not options.certfile:
            return None
        return user_context(options.certfile, options.keyfile, options.clientauth,
                            options.clientcafile)

    def _end_users(self):
        """Take no more requests, and let those that came be answered for a while.

        Balancers are told first, and then the listening socket is closed.
        """
        shared, user = self._shared, self._shared.user
        shared.readiness.become("stopping")
        self._manager.tell("STOPPING=1")
        user.stopping = True
        shared.gate.close()
        shared.readiness.wait_told(min(TELL_LONGEST, self._options.grace), lambda: self._hurried)
        user.shutdown()
        user.retire()
        user.wait_answered(self._options.grace, lambda: self._hurried)

    def _abort_users(self):
        """End the requests that are still there, whatever became of _end_users()."""
        shared, user = self._shared, self._shared.user
        if user.wait_answered(0):
            return
        shared.handlers.abort_all()
        if not user.wait_answered(KILL_DELAY + 1, lambda: not shared.handlers.snapshot()):
            for handler in shared.handlers.snapshot():
                handler.interrupt()
            user.wait_answered(LINGER_TIME)


# ---------------------------------------------------------------------------
# 13. Command line
# ---------------------------------------------------------------------------

SERVER_COMMANDS = ("server", "billetd")
CLIENT_COMMANDS = ("get", "set", "route", "service", "handler", "completion")
SIZE_UNITS = {"": 1, "KiB": KIB, "MiB": MIB, "GiB": 1024 * MIB}

DESCRIPTION = """\
If you can script it, you can HTTP it.

commands:
  server     serve the routes that init programs set up
  billetd    serve a directory of web programs
  route      add, list, match, remove routes       (see kapowctl --help)
  service    run resident programs, supervised     (see kapowctl --help)
  handler    list and end running requests         (see kapowctl --help)
  get        read a resource of the request        (see kapowctl --help)
  set        write a resource of the response      (see kapowctl --help)
  completion complete kapowctl in a shell          (see kapowctl --help)
"""


def parse_size(text):
    """Return bytes for digits and a unit of SIZE_UNITS. Raises ValueError."""
    found = re.fullmatch(r"([0-9]+)(KiB|MiB|GiB|)", text)
    if found is None:
        raise ValueError(f"{text!r} is no size: digits, then nothing, KiB, MiB or GiB")
    return int(found.group(1)) * SIZE_UNITS[found.group(2)]


def parse_seconds(text):
    """Return the float of seconds in decimal digits. Raises ValueError."""
    if not re.fullmatch(r"[0-9]+\.?[0-9]*|\.[0-9]+", text) or float(text) > LONGEST_TIMEOUT:
        raise ValueError(f"{text!r} is no number of seconds")
    return float(text)


def parse_count(text):
    """Return the int in decimal digits. Raises ValueError."""
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError(f"{text!r} is no number, 0 or more")
    return int(text)


def parse_directory(text):
    """Return the path of a directory that is there. Raises ValueError."""
    if not os.path.isdir(text):
        raise ValueError(f"{text!r} is no directory")
    return text


def parse_port(text):
    """Return the int of a port. Raises ValueError."""
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        raise ValueError(f"{text!r} is no port")
    return int(text)


CLIENTAUTH = {"true": True, "false": False, "optional": "optional"}


def parse_clientauth(text):
    """Return the value of CLIENTAUTH. Raises ValueError."""
    if text not in CLIENTAUTH:
        raise ValueError(f"{text!r} is neither true nor false nor optional")
    return CLIENTAUTH[text]


def argument_type(parse):
    """Make of `parse`, which raises ValueError with a sentence, an argparse type."""
    def convert(text):
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return convert


def socket_type(mode):
    """Return an argparse type for addresses that may be ``unix:/path``, then of `mode`."""
    return argument_type(lambda text: parse_address(text, mode))


def make_parser():
    """Return the parser of `kapow` itself."""
    parser = argparse.ArgumentParser(prog="kapow", description=DESCRIPTION, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"kapow {VERSION}")
    parser.add_argument("command", metavar="COMMAND", choices=(*SERVER_COMMANDS, *CLIENT_COMMANDS),
                        help="what to do, see above")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER,
                        help="its arguments; COMMAND --help tells which")
    return parser


def add_daemon_options(parser):
    """Give a parser the options that have a server run in the background."""
    option = parser.add_argument
    option("-d", "--daemon", action="store_true",
           help="run in the background, with its output in the log file")
    option("-k", "--kill", action="store_true", help="stop the daemon of the pid file")
    option("--pid-file", metavar="FILE", help="where its process id is (see kapow(1))")
    option("--log-file", metavar="FILE", help="where its output goes (see kapow(1))")


def make_server_parser():
    """Return the parser of `kapow server`."""
    parser = argparse.ArgumentParser(prog="kapow server", allow_abbrev=False,
                                     description="Serve the routes that init programs set up.")
    option = parser.add_argument
    address = argument_type(Address.parse_listening)
    option("--version", action="version", version=f"kapow {VERSION}")
    option("--bind", metavar="ADDR", type=socket_type(0o666), default=USER_ADDRESS,
           help="where to listen for users, HOST:PORT, PORT or unix:/path (%(default)s)")
    option("--control-bind", metavar="ADDR", type=address, default=CONTROL_ADDRESS,
           help="where to listen for kapow route (%(default)s)")
    option("--data-bind", metavar="ADDR", type=socket_type(0o600), default=DATA_ADDRESS,
           help="where to listen for kapow get and set (%(default)s)")
    option("--status-bind", metavar="ADDR", type=address,
           help="where to listen for /healthz, /readyz and /metrics (nowhere)")
    option("--control-reachable-addr", metavar="HOST:PORT", type=argument_type(Address.parse),
           help="what clients call the control interface (where it listens)")
    option("--certfile", metavar="FILE", help="serve users over HTTPS with this certificate")
    option("--keyfile", metavar="FILE", help="the key of --certfile")
    option("--clientauth", metavar="true", type=argument_type(parse_clientauth), default=False,
           help="demand a certificate of every user; optional: check one if it is given")
    option("--clientcafile", metavar="FILE", help="the authorities of those (the system's)")
    option("--routes", metavar="FILE", action="append", default=[],
           help="JSON routes to start with; may be repeated")
    option("--billets", metavar="DIR", type=argument_type(parse_directory),
           help="a directory of web programs to serve besides, see kapow-billets(7)")
    option("--max-body", metavar="SIZE", type=argument_type(parse_size), default=USER_BODY_LIMIT,
           help="largest body of a user's request, as 64KiB, 10MiB; 0 is no limit (1GiB)")
    option("--max-spool", metavar="SIZE", type=argument_type(parse_size),
           help="what all bodies kept on disk may take; 0 is no limit (a quarter of what is free)")
    option("--min-rate", metavar="N", type=argument_type(parse_count), default=MIN_RATE,
           help="bytes of body that a user must send in a second; 0 is no limit (%(default)s)")
    option("--timeout", metavar="SECONDS", type=argument_type(parse_seconds), default=0,
           help="longest time that a handler may take; 0 is no limit (0)")
    option("--max-handlers", metavar="N", type=argument_type(parse_count), default=MAX_HANDLERS,
           help="handlers at once; 0 is no limit (%(default)s)")
    option("--max-connections", metavar="N", type=argument_type(parse_count),
           help="connections of users at once (what the limit of open files allows)")
    option("--max-queue", metavar="N", type=argument_type(parse_count), default=MAX_QUEUE,
           help="requests that wait for a handler to end (%(default)s)")
    option("--queue-time", metavar="SECONDS", type=argument_type(parse_seconds), default=QUEUE_TIME,
           help="how long they wait (%(default)s)")
    option("--grace", metavar="SECONDS", type=argument_type(parse_seconds), default=GRACE,
           help="time for running handlers when the server stops (%(default)s)")
    option("--debug", action="store_true", help="log what programs do, and print line by line")
    add_daemon_options(parser)
    parser.set_defaults(control=True)
    option("init_programs", metavar="INIT_PROGRAM", nargs="*",
           help="an executable that sets up routes with kapow route")
    return parser


def make_billetd_parser():
    """Return the parser of `kapow billetd`."""
    parser = argparse.ArgumentParser(prog="kapow billetd", allow_abbrev=False,
                                     description="Serve a directory of web programs.")
    option = parser.add_argument
    option("--version", action="version", version=f"kapow {VERSION}")
    option("-a", metavar="ADDRESS", dest="address", default="0.0.0.0",
           help="where to listen, a host (%(default)s)")
    option("-p", metavar="PORT", dest="port", type=argument_type(parse_port), default=8000,
           help="where to listen, a port (%(default)s)")
    option("-b", metavar="DIR", dest="billets", type=argument_type(parse_directory), default=".",
           help="the directory (the current one)")
    add_daemon_options(parser)
    return parser


def spell_out_switches(arguments):
    """Give a bare --clientauth the value that it stands for."""
    spelled = []
    for position, word in enumerate(arguments):
        if word == "--":
            return spelled + arguments[position:]
        if word in CLIENTAUTH and spelled and spelled[-1] == "--clientauth=true":
            spelled[-1] = f"--clientauth={word}"
        else:
            spelled.append("--clientauth=true" if word == "--clientauth" else word)
    return spelled


def parse_server_options(arguments):
    """Parse the arguments of `kapow server`; a contradiction ends the program with status 2."""
    parser = make_server_parser()
    options = parser.parse_intermixed_args(spell_out_switches(arguments))
    if bool(options.certfile) != bool(options.keyfile):
        parser.error("--certfile and --keyfile go together")
    if options.clientauth and not options.certfile:
        parser.error("--clientauth needs HTTPS: --certfile and --keyfile")
    if options.clientcafile and not options.clientauth:
        parser.error("--clientcafile does nothing without --clientauth")
    return options


def parse_billetd_options(arguments):
    """Parse the arguments of `kapow billetd`; return the options of a server that is as it."""
    own = make_billetd_parser().parse_args(arguments)
    options = parse_server_options([])
    options.bind = Address(own.address.strip("[]"), own.port)
    options.data_bind = Address("127.0.0.1", 0)
    options.control = False
    for name in ("billets", "daemon", "kill", "pid_file", "log_file"):
        setattr(options, name, getattr(own, name))
    return options


def is_running(pid):
    """Tell whether there is a process with this id."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


class PidFile:
    """A file with the id of the process that runs as a daemon, which keeps it locked."""

    def __init__(self, path):
        self.path = path
        self._file = None           # that was written and is locked

    def pid(self):
        """Return the id in it, None when there is none. Raises StartError."""
        return self._read()[0]

    def held_pid(self):
        """Return the id of the daemon that wrote it and lives, None for none. Raises StartError.

        What another user but root wrote there is no daemon of ours.
        """
        pid, is_held, user = self._read()
        return pid if is_held and user in (0, os.geteuid()) else None

    def _read(self):
        """Return (the id, whether the file is locked, its user), of one and the same file."""
        try:
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
            with open(os.open(self.path, flags), encoding="ascii", errors="replace") as file:
                text, user = file.read(32).strip(), os.fstat(file.fileno()).st_uid
                is_held = False
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    is_held = True
        except FileNotFoundError:
            return None, False, None
        except OSError as error:
            raise StartError(f"cannot read the pid file {self.path}: {error.strerror}") from None
        pid = int(text) if re.fullmatch(r"[1-9][0-9]{0,8}", text) else None
        return pid, is_held, user

    def check(self):
        """Raise StartError if its process lives, or it could not be written."""
        pid = self.pid()
        # In a container each start may have the same id, or that of its parent.
        if pid not in (None, os.getpid(), os.getppid()) and is_running(pid):
            raise StartError(f"the pid file {self.path} is that of process {pid}, which runs")
        directory = os.path.dirname(self.path) or "."
        if not os.access(directory, os.W_OK | os.X_OK):
            why = "is not for us" if os.path.isdir(directory) else "is not there"
            raise StartError(f"cannot write the pid file {self.path}: its directory {why}")

    def write(self):
        """Write this process's id and lock it. Raises StartError.

        Into a new file, which nobody else can lock, in place of one that is stale:
        that may be another user's, or locked by one.
        """
        self.check()
        new = f"{self.path}.{os.getpid()}"
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(new)              # of a process that had the same id
            fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with contextlib.ExitStack() as stack:
                stack.callback(os.unlink, new)
                file = stack.enter_context(open(fd, "w", encoding="ascii"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                print(os.getpid(), file=file, flush=True)
                with self._holding_stale():
                    self.check()            # another server may have come meanwhile
                    os.rename(new, self.path)
                stack.pop_all()
                self._file = file
        except OSError as error:
            raise StartError(f"cannot write the pid file {self.path}: {error.strerror}") from None

    @contextlib.contextmanager
    def _holding_stale(self):
        """Context manager: the file that is there is locked, if only its user can do that.

        So of two servers that find it one replaces it. Raises OSError for the other.
        """
        try:
            file = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            yield
            return
        try:
            found = os.fstat(file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if found.st_uid == os.geteuid() and not found.st_mode & 0o077:
                    raise OSError(errno.EAGAIN, "another server is about to start") from None
            yield
        finally:
            os.close(file)

    def remove(self):
        """Remove it, if it was written and is not another server's by now."""
        if self._file is None:
            return
        with contextlib.suppress(OSError):
            if os.path.samestat(os.lstat(self.path), os.fstat(self._file.fileno())):
                os.unlink(self.path)
        self._file.close()


def kill_daemon(pid_file):
    """Do --kill; return the exit status. Raises StartError."""
    pid = pid_file.held_pid()
    if pid is None:
        raise StartError(f"there is no daemon with the pid file {pid_file.path}")
    try:
        ended = os.pidfd_open(pid)
        os.kill(pid, signal.SIGTERM)
        poll_file(ended, select.POLLIN, None)
        os.close(ended)
    except AttributeError:              # an older system: its lock is held to the end
        os.kill(pid, signal.SIGTERM)
        while pid_file.held_pid() == pid:
            time.sleep(KILL_LOOK)
    except OSError as error:
        raise StartError(f"cannot stop process {pid}: {error.strerror}") from None
    return 0


def become_daemon():
    """Go on in a process of its own; return the descriptor that tells this one, the parent, how.

    A NUL byte is success, other text what went wrong, and nothing that it was said already.
    """
    reader, writer = os.pipe()
    if os.fork() == 0:                  # no thread was started yet
        os.close(reader)
        os.setsid()
        return writer
    os.close(writer)
    with open(reader, "rb") as file:
        said = file.read()
    if said not in (b"", b"\0"):
        os.write(STDERR, said)
    os._exit(0 if said == b"\0" else 1)


def open_log(path):
    """Return a descriptor that appends to the log file. Raises StartError."""
    try:
        # One that has no reader is an error, not a reason to wait.
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o640)
        os.set_blocking(file, True)
        return file
    except OSError as error:
        raise StartError(f"cannot write the log file {path}: {error.strerror}") from None


class Background:
    """What is to be done for a server that may be in the background."""

    def __init__(self, pid_file=None, log_path=None, log_file=None, parent=None):
        """`pid_file` is a PidFile, `log_file` a descriptor, `parent` as become_daemon() returns.

        Each may be None.
        """
        self._pid_file = pid_file
        self._log_path = log_path
        self._log_file = log_file       # None once the standard streams lead there
        self._parent = parent

    @contextlib.contextmanager
    def holding(self):
        """Context manager: remove the pid file at the end, if write_pid() was called."""
        try:
            yield
        finally:
            if self._pid_file is not None:
                self._pid_file.remove()

    def write_pid(self):
        """Write the pid file: all interfaces listen. Raises StartError."""
        if self._pid_file is not None:
            self._pid_file.write()

    def redirect(self):
        """Have the standard streams lead to the log file from now on."""
        if self._log_file is None:
            return
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (self._log_file, STDOUT), (self._log_file, STDERR)):
            os.dup2(source, target)
        close_all([null, self._log_file])
        self._log_file = None

    def reopen_log(self):
        """Go on in a new log file if somebody moved the old one away. Raises StartError."""
        if self._log_path is not None:
            file = open_log(self._log_path)
            for target in (STDOUT, STDERR):
                os.dup2(file, target)
            os.close(file)

    def ready(self):
        """Tell who started the server that it serves."""
        self._tell(b"\0")

    def failed(self, error):
        """Tell who started the server what is in its log, if that is not on the terminal."""
        if self._log_file is None:
            self._tell(f"kapow: {error}\n".encode("utf-8", "backslashreplace"))

    def _tell(self, data):
        if self._parent is not None:
            with contextlib.suppress(OSError):
                os.write(self._parent, data)
            os.close(self._parent)
            self._parent = None


def make_background(options, name):
    """Return the Background that the options say; with --daemon, in the process that is to be it.

    Raises StartError.
    """
    pid_path, log_path = options.pid_file, options.log_file
    if options.daemon:
        pid_path, log_path = (path or state_path(name + suffix)
                              for path, suffix in ((pid_path, ".pid"), (log_path, ".log")))
    pid_file = PidFile(os.path.abspath(pid_path)) if pid_path else None
    if pid_file is not None:
        pid_file.check()
    log_path = os.path.abspath(log_path) if log_path else None
    log_file = open_log(log_path) if log_path else None
    return Background(pid_file, log_path, log_file, become_daemon() if options.daemon else None)


def do_nothing(signum, frame):
    """Handle a signal without doing anything."""


class Signals:
    """Calls functions for signals, for a with statement.

    A Python handler runs in the main thread, and late when that waits in a
    system call; the wake-up descriptor is written at once, and read by a thread
    that does nothing else.
    """

    def __init__(self, calls):
        """`calls` are {signal: function}."""
        self._calls = calls

    def __enter__(self):
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        signal.set_wakeup_fd(self._writer)
        for signum in self._calls:
            signal.signal(signum, do_nothing)
        self._thread = threading.Thread(target=self._read, name="signals", daemon=True)
        self._thread.start()

    def __exit__(self, *exc_info):
        # What comes now is too late to change anything, but would be the end of
        # an interpreter that is about to exit with another status.
        for signum in self._calls:
            signal.signal(signum, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        os.write(self._writer, b"\0")       # no signal has this number
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)

    def _read(self):
        while 0 not in (signums := os.read(self._reader, KIB)):
            for signum in signums:
                if signum in self._calls:
                    self._calls[signum]()


def reset_signals():
    """Make sure that children start with default dispositions and no signal blocked.

    What is ignored stays so over execve(2), what is handled does not: so a
    signal that was ignored when the server started gets a handler that does
    nothing. Popen takes care of those that Python ignores.
    """
    for signum in signal.valid_signals():
        if signal.getsignal(signum) == signal.SIG_IGN and signum not in (
                signal.SIGPIPE, getattr(signal, "SIGXFSZ", None)):
            signal.signal(signum, do_nothing)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def fill_standard_streams():
    """Give a descriptor to each standard stream that was closed.

    Else the next file that is opened would have its number, and get what
    children write. Reading or writing these is an error, as it was.
    """
    for fd, mode in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, mode)       # which takes the lowest number, that one


def log_thread_error(arguments):
    """Log what no thread should have let through, as threading.excepthook."""
    log.error("a thread met an unexpected error, please report it: %r", arguments.exc_value)
    log.debug("where that came from", exc_info=arguments[:3])


def run_server(options, name):
    """Do `kapow server` or `kapow billetd`, the `name`; return the exit status."""
    fill_standard_streams()
    warnings.simplefilter("ignore")     # of the re module, about users' patterns
    LOG_HANDLER.setFormatter(LogFormatter())
    logging.basicConfig(handlers=[LOG_HANDLER],
                        level=logging.DEBUG if options.debug else logging.INFO)
    reset_signals()
    sys.setswitchinterval(SWITCH_INTERVAL)
    threading.excepthook = log_thread_error
    background = Background()
    try:
        if options.kill:
            return kill_daemon(PidFile(options.pid_file or state_path(name + ".pid")))
        check_memory()
        sockets = inherited_sockets()
        background = make_background(options, name)
        server = Server(options, background, ServiceManager(), sockets)
        calls = {signal.SIGTERM: server.ask_to_stop, signal.SIGINT: server.ask_to_stop,
                 signal.SIGHUP: server.ask_to_reload}
        if adopts_orphans():
            calls[signal.SIGCHLD] = server.reaper.look_soon
        with Signals(calls):
            server.run()
        if LOG_HANDLER.is_stuck():      # the interpreter would wait for it
            os._exit(0)
    except (StartError, OSError, MemoryError, RuntimeError) as error:   # the last: no thread
        why = error if isinstance(error, StartError) else (
            f"the server cannot go on: {str(error) or 'there is not enough memory'}")
        log.error("%s", why)
        background.failed(why)
        return 1
    except Exception as error:
        why = f"the server ends on an unexpected error, please report it: {error!r}"
        log.error("%s", why)
        log.debug("where that came from", exc_info=True)
        background.failed(why)
        return 1
    return 0


def run_client(arguments):
    """Become kapowctl with `arguments`; return only when there is none."""
    client = find_client()
    if client is None:
        print(f"kapow: {NO_CLIENT}", file=sys.stderr)
        return 1
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, client, *arguments])


def use_utf8():
    """Run this process again in Python's UTF-8 mode (PEP 540) where the locale has another encoding.

    So paths, arguments, environment and the log are UTF-8, with surrogateescape, whatever the
    locale: a request may hold what that cannot say. Programs get the locale as it is. Return
    where there is nothing to do, or no way.
    """
    if sys.getfilesystemencoding().lower() == "utf-8" or sys.flags.utf8_mode or not sys.executable:
        return
    words = getattr(sys, "orig_argv", [])       # from Python 3.10 on
    with contextlib.suppress(OSError), open("/proc/self/cmdline", "rb") as file:
        words = file.read().split(b"\0")[:-1]
    if words:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *words[1:]])


def main(argv=None):
    """Run `kapow` with `argv`, a list of str (sys.argv without the program); return its status."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments:
        make_parser().print_help()
        return 0
    if arguments[0] in CLIENT_COMMANDS:
        return run_client(arguments)
    if argv is None:
        use_utf8()
    command = make_parser().parse_args(arguments)
    parse = parse_server_options if command.command == "server" else parse_billetd_options
    try:
        return run_server(parse(command.arguments), command.command)
    except KeyboardInterrupt:       # before the server waits for signals
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
