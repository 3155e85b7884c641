#!/usr/bin/env python3
"""kapowctl: the client of Kapow!, for its programs and its operators.

``kapowctl get`` and ``kapowctl set`` speak to the data interface of the server
that runs the calling program; ``kapowctl route`` and ``kapowctl service`` speak
to its control interface. kapowctl(1) is the command line, kapow(7) has the resources.

This file is the whole client and runs alone on the standard library; the
``requests`` package is needed for the control interface only.

``get`` and ``set`` run several times in a request, and most of their time is
the start of the interpreter. So nothing is imported here that these two do not
need: no argparse, no http.client, not even socket, which costs as much as all
the rest. What else a command needs it imports itself.

What the server validates is not validated here: its reason is printed.
"""

import os
import sys

try:
    import _socket as socket        # the module socket without its Python half
except ImportError:
    import socket

# ---------------------------------------------------------------------------
# Constants
# ---------------------------------------------------------------------------

VERSION = "0.1.0"

# Where a server listens when nothing is said. kapow.py knows the same, and a
# test holds them equal.
CONTROL_ADDRESS = "localhost:8081"
DATA_ADDRESS = "localhost:8082"

HANDLER_ID_VARIABLE = "KAPOW_HANDLER_ID"
DATA_URL_VARIABLES = ("KAPOW_DATA_URL", "KAPOW_DATAAPI_URL")
CONTROL_URL_VARIABLES = ("KAPOW_CONTROL_URL", "KAPOW_CONTROLAPI_URL")
SERVER_CERT_VARIABLE = "KAPOW_CONTROL_SERVER_CERT"
CLIENT_CERT_VARIABLE = "KAPOW_CONTROL_CLIENT_CERT"
CLIENT_KEY_VARIABLE = "KAPOW_CONTROL_CLIENT_KEY"

PIECE = 64 * 1024           # bytes moved at a time
HEAD_LIMIT = 64 * 1024      # bytes of a response head
CONNECT_TIME = 10           # seconds

# Exit statuses. (An IntEnum would cost more to import than `get` takes.)
DONE = 0
REFUSED = 1                 # the server refused or could not be reached
WRONG_USAGE = 2

# ---------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------


class Refused(Exception):
    """The server refused, or could not be reached: the text says why, in one line."""


class WrongUsage(Exception):
    """The command line makes no sense: the text says why, in one line."""


def environment(names, default=None):
    """Return the first of the environment variables `names` that is set and not empty."""
    for name in names:
        if os.environ.get(name):
            return os.environ[name]
    return default


# ---------------------------------------------------------------------------
# Data client
# ---------------------------------------------------------------------------


def split_url(url):
    """Return (authority, host, port) of an ``http://HOST:PORT`` URL. Raises Refused."""
    scheme, _, authority = url.rstrip("/").partition("://")
    host, colon, port = authority.rpartition(":")
    digits = port.isascii() and port.isdigit()
    if scheme != "http" or not host or not digits or int(port) > 65535:
        raise Refused(f"{url!r} is not the URL of a data interface, http://HOST:PORT")
    return authority, host.strip("[]"), int(port)


def quote(resource):
    """Percent-encode what cannot stand in a request target; '%' and '/' are left alone."""
    return "".join(
        chr(byte) if 0x21 <= byte <= 0x7e and byte not in b'#?"' else f"%{byte:02X}"
        for byte in os.fsencode(resource))


def reason_of(body):
    """Return the reason in the JSON text (bytes) of an error, on one line, or ""."""
    import json
    try:
        document = json.loads(body)
    except ValueError:
        return ""
    if not isinstance(document, dict):
        return ""
    words = [str(document[key]) for key in ("reason", "error") if document.get(key)]
    if document.get("field"):
        words.insert(1, str(document["field"]))
    if document.get("routes"):
        words.append(", ".join(f"{route['method']} {route['url_pattern']} ({route['id']})"
                               for route in document["routes"]))
    return ": ".join(words).replace("\n", " ")


class DataClient:
    """One request to the data interface, HTTP/1.1 on a plain socket.

    All methods raise Refused.
    """

    def __init__(self, url, handler_id):
        """Connect to `url`, such as ``http://127.0.0.1:8082``."""
        self._url = url
        self._handler_id = handler_id
        self._buffer = b""          # received and not yet read
        self._authority, host, port = split_url(url)
        self._socket = self._connect(host, port)

    def _connect(self, host, port):
        try:
            # Bytes: a str would import the codec for international names.
            found = socket.getaddrinfo(os.fsencode(host), port, 0, socket.SOCK_STREAM)
            found.sort(key=lambda info: info[0] != socket.AF_INET)
            for family, kind, protocol, _, address in found:
                sock = socket.socket(family, kind, protocol)
                sock.settimeout(CONNECT_TIME)
                try:
                    sock.connect(address)
                except OSError as caught:
                    sock.close()
                    error = caught
                else:
                    sock.settimeout(None)
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    return sock
        except OSError as caught:
            error = caught
        raise Refused(f"cannot reach the data interface {self._url}: {error.strerror or error}")

    def start(self, method, resource, framing):
        """Send the head of a request for `resource`, a str; `framing` is a header line."""
        if not resource.startswith("/"):
            resource = "/" + resource
        head = (f"{method} /handlers/{quote(self._handler_id)}{quote(resource)} HTTP/1.1\r\n"
                f"Host: {self._authority}\r\nConnection: close\r\n{framing}\r\n")
        self.send(head.encode("ascii", "replace"))

    def send(self, data):
        """Send bytes. A server that has answered already is left to say why."""
        view = memoryview(data)
        try:
            while view:
                view = view[self._socket.send(view):]
        except OSError as error:
            self.finish()
            raise Refused(f"the server stopped to listen: {error.strerror}") from None

    def _receive(self):
        try:
            return self._socket.recv(PIECE)
        except OSError as error:
            raise Refused(f"the data interface {self._url} broke off: {error.strerror}") from None

    def _read_head(self):
        """Return (status, {lower-case header name: value}), bytes."""
        while b"\r\n\r\n" not in self._buffer:
            data = self._receive()
            if not data and not self._buffer:
                raise Refused(f"the data interface {self._url} closed the connection: "
                              "the handler has ended")
            if not data or len(self._buffer) > HEAD_LIMIT:
                raise Refused(f"what answers at {self._url} is no data interface")
            self._buffer += data
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        line, *fields = head.split(b"\r\n")
        words = line.split(b" ", 2)
        if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
            raise Refused(f"what answers at {self._url} is no data interface")
        pairs = (field.partition(b":") for field in fields)
        return int(words[1]), {name.lower(): value.strip() for name, _, value in pairs}

    def finish(self):
        """Read the response's head; return an iterator of its body's bytes, of any size."""
        status, fields = self._read_head()
        if fields.get(b"transfer-encoding", b"").lower() == b"chunked":
            body = self._chunks()
        else:
            body = self._exactly(self._number(fields.get(b"content-length", b""), 10))
        if status != 200:
            raise Refused(reason_of(b"".join(body)) or f"the server answered {status}")
        return body

    def _more(self):
        data = self._receive()
        if not data:
            raise Refused("the value was cut short")
        self._buffer += data

    def _exactly(self, left):
        while left:
            if not self._buffer:
                self._more()
            data, self._buffer = self._buffer[:left], self._buffer[left:]
            left -= len(data)
            yield data

    def _line(self):
        while b"\r\n" not in self._buffer:
            self._more()
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        return line

    def _number(self, digits, base):
        try:
            return int(digits, base)
        except ValueError:
            raise Refused(f"what answers at {self._url} is no data interface") from None

    def _chunks(self):
        while size := self._number(self._line().partition(b";")[0], 16):
            yield from self._exactly(size)
            self._line()


# ---------------------------------------------------------------------------
# Control client
# ---------------------------------------------------------------------------


def write_credentials(directory):
    """Write the environment's certificates into `directory`, mode 0700, as `requests` needs them.

    Return (server certificate, (client certificate, client key)), paths of
    files of mode 0600. Raises Refused.
    """
    paths = []
    for name in (SERVER_CERT_VARIABLE, CLIENT_CERT_VARIABLE, CLIENT_KEY_VARIABLE):
        if not os.environ.get(name):
            raise Refused(f"{name} is not set: routes and services are for the init programs "
                          "of a server")
        path = os.path.join(directory, name)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(os.environ[name])
        paths.append(path)
    return paths[0], tuple(paths[1:])


def cause_of(error):
    """Return what lies at the bottom of an exception of `requests`, in one line."""
    while True:
        inner = getattr(error, "reason", None) or error.__cause__ or error.__context__ or next(
            (item for item in error.args if isinstance(item, BaseException)), None)
        if not isinstance(inner, BaseException):
            break
        error = inner
    return str(getattr(error, "strerror", None) or error).replace("\n", " ")


class ControlClient:
    """Calls of the control interface, with the certificates of the environment.

    The server's certificate is the only one that is trusted. All methods raise
    Refused.
    """

    def __init__(self, url):
        """`url` is such as ``https://localhost:8081``."""
        try:
            import requests
        except ImportError:
            raise Refused("kapow route and kapow service need "
                          "the Python package requests") from None
        self._requests = requests
        self._url = url.rstrip("/")
        if not self._url.startswith("https://"):
            raise Refused(f"{url!r} is not the URL of a control interface, https://HOST:PORT")

    def call(self, method, path, document=None):
        """Make a call; return the decoded JSON answer, None when it has none."""
        import tempfile
        try:
            with tempfile.TemporaryDirectory(prefix="kapowctl-") as directory:
                answer = self._request(write_credentials(directory), method, path, document)
        except OSError as error:
            raise Refused(f"cannot keep the certificates for a moment: {error.strerror}") from None
        if not answer.ok:
            raise Refused(reason_of(answer.content) or f"the server answered {answer.status_code}")
        try:
            return answer.json() if answer.content else None
        except ValueError:
            raise Refused(f"what answers at {self._url} is no control interface") from None

    def _request(self, credentials, method, path, document):
        session = self._requests.Session()
        # The environment's CURL_CA_BUNDLE would be preferred to `verify`.
        session.trust_env = False
        session.verify, session.cert = credentials
        try:
            return session.request(method, self._url + path, json=document)
        except (self._requests.RequestException, OSError, ValueError) as error:
            raise Refused(f"cannot reach the control interface {self._url}: "
                          f"{cause_of(error)}") from None


# ---------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------


def open_data(options):
    """Return (url, handler id) of the data interface. Raises WrongUsage."""
    handler_id = options.get("handler") or environment([HANDLER_ID_VARIABLE])
    if not handler_id:
        raise WrongUsage(f"there is no handler id: {HANDLER_ID_VARIABLE} is not set, "
                         "and --handler was not given")
    url = options.get("data_url") or environment(DATA_URL_VARIABLES, f"http://{DATA_ADDRESS}")
    return DataClient(url, handler_id)


def write_out(data):
    """Write bytes to standard output. Raises Refused; BrokenPipeError when no one reads."""
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(1, view):]
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Refused(f"cannot write to standard output: {error.strerror}") from None


def do_get(options):
    """Copy a resource to standard output."""
    client = open_data(options)
    client.start("GET", options["resource"], "")
    for data in client.finish():
        write_out(data)


def send_stdin(client):
    """Send standard input in chunks, each as soon as it is there."""
    while True:
        try:
            data = os.read(0, PIECE)
        except OSError as error:
            raise Refused(f"cannot read standard input: {error.strerror}") from None
        client.send(b"%x\r\n%b\r\n" % (len(data), data))
        if not data:
            return


def do_set(options):
    """Write a resource: the value given, or standard input as it comes."""
    client = open_data(options)
    value = options.get("value")
    if value is not None:
        data = os.fsencode(value)
        client.start("PUT", options["resource"], f"Content-Length: {len(data)}\r\n")
        client.send(data)
    else:
        client.start("PUT", options["resource"], "Transfer-Encoding: chunked\r\n")
        send_stdin(client)
    for _ in client.finish():
        pass


def control_client(options):
    """Return the ControlClient that the options and the environment name."""
    return ControlClient(options.get("control_url")
                         or environment(CONTROL_URL_VARIABLES, f"https://{CONTROL_ADDRESS}"))


def write_json(document):
    """Write a JSON value for people and programs alike."""
    import json
    write_out((json.dumps(document, indent=2) + "\n").encode())


def read_command(path):
    """Return the text of a command file, `-` being standard input. Raises Refused."""
    try:
        with open(0 if path == "-" else path, "rb") as file:
            return os.fsdecode(file.read())
    except OSError as error:
        raise Refused(f"cannot read the command in {path}: {error.strerror}") from None


# The keys of a route that are options or arguments of `route add` as they stand.
ROUTE_OPTIONS = ("method", "url_pattern", "entrypoint", "timeout", "max_handlers", "max_queue",
                 "disconnect", "service", "handler")


def do_route_add(options):
    """Add a route, at --index or last, and print it."""
    route = {key: options[key] for key in ROUTE_OPTIONS if options[key] is not None}
    if options["command_file"] is not None:
        if options["command"] is not None:
            raise WrongUsage("-c and a COMMAND_FILE exclude each other")
        route["command"] = read_command(options["command_file"])
    elif options["command"] is not None:
        route["command"] = options["command"]
    if options["index"] is None:
        write_json(control_client(options).call("POST", "/routes", route))
    else:
        route["index"] = options["index"]
        write_json(control_client(options).call("PUT", "/routes", route))


def quote_id(text):
    """Percent-encode an id as one segment of a path."""
    from urllib.parse import quote as quote_all
    return quote_all(text, safe="")


def make_cell(value):
    """Return a JSON value as the printable text of one cell."""
    text = " ".join(value) if isinstance(value, list) else "" if value is None else str(value)
    return ascii(text)[1:-1]


def make_table(columns, rows):
    """Return rows, dicts with the keys `columns`, as the text of a table, one a line."""
    lines = [[name.upper() for name in columns]]
    lines += [[make_cell(row.get(name, "")) for name in columns] for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    return "".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() + "\n"
                   for line in lines)


def write_list(options, document, columns, more=()):
    """Print what the server answered, one row or a list, as --output says.

    A table has the columns `more` where a row has something in them.
    """
    if (options["output"] or ("table" if os.isatty(1) else "json")) == "json":
        write_json(document)
    else:
        rows = document if isinstance(document, list) else [document]
        columns = (*columns, *(name for name in more if any(name in row for row in rows)))
        write_out(make_table(columns, rows).encode())


def do_route_list(options):
    """Print all routes, or one."""
    path = "/routes" if options["id"] is None else "/routes/" + quote_id(options["id"])
    write_list(options, control_client(options).call("GET", path),
               ("index", "id", "method", "url_pattern", "entrypoint", "command"), ("service",))


def do_route_remove(options):
    """Remove a route."""
    control_client(options).call("DELETE", "/routes/" + quote_id(options["id"]))


def service_path(options, *action):
    """Return the path of a service, or of an action on it."""
    return "/".join(["/services", quote_id(options["name"]), *action])


def do_service_add(options):
    """Add a service, which starts it, and print it."""
    if not options["command"]:
        raise WrongUsage("what is the program? kapow service add NAME -- PROGRAM [ARG ...]")
    service = {key: options[key] for key in ("name", "command", "routes")}
    write_json(control_client(options).call("POST", "/services", service))


def do_service_list(options):
    """Print all services, or one."""
    path = "/services" if options["name"] is None else service_path(options)
    write_list(options, control_client(options).call("GET", path),
               ("name", "state", "pid", "restarts", "command"))


def do_service_action(options):
    """Start, stop or restart a service, and print it."""
    write_json(control_client(options).call("POST", service_path(options, options["action"])))


def do_service_signal(options):
    """Send a signal to the program of a service."""
    control_client(options).call("POST", service_path(options, "signal"),
                                 {"signal": options["signal"]})


def do_service_remove(options):
    """Stop a service and forget it."""
    control_client(options).call("DELETE", service_path(options))


# ---------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------


def seconds(text):
    """Return the number in `text`; raises ValueError for what JSON does not have."""
    value = float(text)
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(text)
    return value


def add_version(parser):
    """Give a parser --version."""
    parser.add_argument("--version", action="version", version=f"kapowctl {VERSION}")


def add_command(commands, name, function, text):
    """Add the command `name`, done by `function` and described by `text`; return its parser."""
    parser = commands.add_parser(name, help=text, description=text.capitalize() + ".",
                                 allow_abbrev=False)
    add_version(parser)
    parser.set_defaults(function=function)
    return parser


def add_data_commands(commands):
    """Add the commands of the data interface; return their parsers."""
    get = add_command(commands, "get", do_get, "read a resource of the request")
    put = add_command(commands, "set", do_set, "write a resource of the response")
    for parser in (get, put):
        parser.add_argument("--handler", "--handler-id", metavar="ID",
                            help=f"the handler's id ({HANDLER_ID_VARIABLE})")
        parser.add_argument("--data-url", metavar="URL",
                            help=f"the data interface ({DATA_URL_VARIABLES[0]})")
        parser.add_argument("resource", metavar="RESOURCE",
                            help="as /request/params/q, see kapow(7)")
    put.add_argument("value", metavar="VALUE", nargs="?", help="what to write (standard input)")
    return [get, put]


def add_control_url(parsers):
    """Give parsers the option that all commands of the control interface have; return them."""
    for parser in parsers:
        parser.add_argument("--control-url", metavar="URL",
                            help=f"the control interface ({CONTROL_URL_VARIABLES[0]})")
    return parsers


def add_list(commands, function, what, argument):
    """Add a command `list` that prints rows of `what`, or the one that `argument` names."""
    show = add_command(commands, "list", function, f"print the {what}s, or one")
    show.add_argument("-o", "--output", choices=("json", "table"), help="(table on a terminal)")
    show.add_argument(argument.lower(), metavar=argument, nargs="?", help="of the one to print")
    return show


def add_route_commands(commands):
    """Add the commands for routes; return their parsers."""
    add = add_command(commands, "add", do_route_add, "add a route")
    add.add_argument("-X", "--method", metavar="METHOD", default="GET", help="(%(default)s)")
    add.add_argument("-e", "--entrypoint", metavar="ENTRYPOINT",
                     help="the program that runs the command (/bin/sh -c)")
    add.add_argument("-c", "--command", metavar="COMMAND", help="the entrypoint's last argument")
    add.add_argument("--index", metavar="N", type=int, help="the place in the table (the last)")
    add.add_argument("--timeout", metavar="SECONDS", type=seconds,
                     help="longest time of a handler, 0 for no limit (the server's)")
    add.add_argument("--max-handlers", metavar="N", type=int,
                     help="handlers of this route at once (the server's limit alone)")
    add.add_argument("--max-queue", metavar="N", type=int,
                     help="requests that wait for this route (the server's limit alone)")
    add.add_argument("--disconnect", choices=("kill", "keep"),
                     help="what a lost client does to the handler (kill)")
    add.add_argument("--service", metavar="NAME", help="the service that answers, no command")
    add.add_argument("--handler", metavar="NAME",
                     help="what the service is told to be asked for (the route's id)")
    add.add_argument("url_pattern", metavar="URL_PATTERN", help="as /greet/{name}, see kapow(7)")
    add.add_argument("command_file", metavar="COMMAND_FILE", nargs="?",
                     help="a file with the command, - for standard input")
    show = add_list(commands, do_route_list, "route", "ID")
    remove = add_command(commands, "remove", do_route_remove, "remove a route")
    remove.add_argument("id", metavar="ID", help="of the route")
    return add_control_url([add, show, remove])


def add_action(commands, action, text):
    """Add a command that has the server do `action` with a service; return its parser."""
    parser = add_command(commands, action, do_service_action, text)
    parser.set_defaults(action=action)
    return parser


def add_service_commands(commands):
    """Add the commands for services; return their parsers."""
    add = add_command(commands, "add", do_service_add, "add a service, and start it")
    add.add_argument("name", metavar="NAME", help="of the service")
    add.add_argument("--routes", action="store_true", help="add the routes of its manifest")
    add.add_argument("command", metavar="PROGRAM", nargs="*",
                     help="to run, behind -- if arguments follow that begin with -")
    show = add_list(commands, do_service_list, "service", "NAME")
    named = [add_action(commands, "start", "start a service"),
             add_action(commands, "stop", "stop a service"),
             add_action(commands, "restart", "start a service anew, without losing a request"),
             add_command(commands, "signal", do_service_signal, "send a signal to a service"),
             add_command(commands, "remove", do_service_remove, "stop a service and forget it")]
    for parser in named:
        parser.add_argument("name", metavar="NAME", help="of the service")
    named[3].add_argument("signal", metavar="SIGNAL", help="as HUP")
    return add_control_url([add, show, *named])


def add_group(commands, name, text, add_commands):
    """Add the commands of `add_commands` as `name` COMMAND; return their parsers."""
    group = commands.add_parser(name, help=text, allow_abbrev=False,
                                description=text.capitalize() + ".")
    add_version(group)
    return add_commands(group.add_subparsers(metavar="COMMAND", dest="action", required=True))


def make_parsers():
    """Return the parser of the whole client and {"route add": its parser, ...}."""
    import argparse
    parser = argparse.ArgumentParser(
        prog="kapowctl", allow_abbrev=False, description="The client of a Kapow! server.",
        epilog="Inside a handler or an init program the environment says where the server is.")
    add_version(parser)
    commands = parser.add_subparsers(metavar="COMMAND", dest="command_name", required=True)
    leaves = add_data_commands(commands)
    leaves += add_group(commands, "route", "add, list and remove routes", add_route_commands)
    leaves += add_group(commands, "service", "run resident programs that answer requests",
                        add_service_commands)
    return parser, {leaf.prog.partition(" ")[2]: leaf for leaf in leaves}


def parse_leaf(leaf, arguments):
    """Parse the arguments of one command; return its options as a dict.

    For a program that is to be run, all behind the first ``--`` is left as it
    is, which not every argparse does.
    """
    program = []
    if leaf.get_default("function") is do_service_add and "--" in arguments:
        place = arguments.index("--")
        arguments, program = arguments[:place], arguments[place + 1:]
    options = vars(leaf.parse_intermixed_args(arguments))
    if program:
        options["command"] += program
    return options


def parse(arguments):
    """Parse any command line; return its options as a dict.

    Help, and wrong usage, end the program as argparse does.
    """
    parser, leaves = make_parsers()
    for words in (1, 2):
        leaf = leaves.get(" ".join(arguments[:words]))
        if leaf is not None:
            # Which, unlike the parser of all, takes options between arguments.
            return parse_leaf(leaf, arguments[words:])
    if not arguments:
        parser.print_help()
        return {"function": lambda options: None}
    return vars(parser.parse_args(arguments))


def parse_quickly(arguments):
    """Parse a plain `get` or `set` without argparse; return its options, None when it is not one.

    Words behind ``--`` are no options.
    """
    if arguments[:1] not in (["get"], ["set"]):
        return None
    words = arguments[1:]
    dashes = words.index("--") if "--" in words else len(words)
    if any(word[:1] == "-" for word in words[:dashes]):
        return None
    words = words[:dashes] + words[dashes + 1:]
    if not 1 <= len(words) <= (1 if arguments[0] == "get" else 2):
        return None
    return {"function": do_get if arguments[0] == "get" else do_set,
            "resource": words[0], "value": words[1] if len(words) > 1 else None}


def fill_standard_streams():
    """Give a descriptor to each standard stream that was closed.

    Else the socket would have its number, and be read or written for it.
    """
    for fd, mode in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, mode)       # which takes the lowest number, that one


def complain(error):
    """Write one line to standard error."""
    try:
        os.write(2, os.fsencode(f"kapowctl: {error}\n"))
    except OSError:
        pass                                # nobody wants to know


def main(argv=None):
    """Run `kapowctl` with `argv`, a list of str (sys.argv without the program).

    Return the exit status.
    """
    arguments = sys.argv[1:] if argv is None else argv
    fill_standard_streams()
    options = parse_quickly(arguments) or parse(arguments)
    try:
        options["function"](options)
    except BrokenPipeError:         # nobody reads what we print: as `head` would have it
        return REFUSED
    except WrongUsage as error:
        complain(error)
        return WRONG_USAGE
    except Refused as error:
        complain(error)
        return REFUSED
    except KeyboardInterrupt:
        return 130
    return DONE


if __name__ == "__main__":
    sys.exit(main())
