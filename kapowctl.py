#!/usr/bin/env python3
"""kapowctl: the client of Kapow!, for its programs and its operators.

``kapowctl get`` and ``kapowctl set`` speak to the data interface of the server
that runs the calling program; ``kapowctl route``, ``service`` and ``handler`` speak
to its control interface. kapowctl(1) is the command line, kapow(7) has the
resources, kapow-api(7) what goes over the wire.

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

CREDENTIAL_VARIABLES = (SERVER_CERT_VARIABLE, CLIENT_CERT_VARIABLE, CLIENT_KEY_VARIABLE)

UNIX_SCHEME = "unix:"       # before the path of a data interface's socket

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
        raise Refused(f"{url!r} is not the URL of a data interface, http://HOST:PORT "
                      "or unix:/path")
    return authority, host.strip("[]"), int(port)


def quote(resource):
    """Percent-encode what cannot stand in a request target; '%' and '/' are left alone."""
    return "".join(
        chr(byte) if 0x21 <= byte <= 0x7e and byte not in b'#?"' else f"%{byte:02X}"
        for byte in os.fsencode(resource))


def without_controls(text):
    """Return `text` with a question mark for each control character, for a message."""
    return "".join("?" if character < " " or character == "\x7f" else character
                   for character in text)


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
    if "item" in document:
        words.insert(1, f"item {document['item']}")
    if document.get("routes"):
        words.append(", ".join(f"{route['method']} {route['url_pattern']} ({route['id']})"
                               for route in document["routes"]))
    return ": ".join(words).replace("\n", " ")


class DataClient:
    """One request to the data interface, HTTP/1.1 on a plain socket.

    All methods raise Refused.
    """

    def __init__(self, url, handler_id):
        """Connect to `url`, such as ``http://127.0.0.1:8082`` or ``unix:/path``."""
        self._url = url
        self._handler_id = handler_id
        self._buffer = b""          # received and not yet read
        if url.startswith(UNIX_SCHEME):
            self._authority = "localhost"
            self._socket = self._connect_unix(url[len(UNIX_SCHEME):])
        else:
            self._authority, host, port = split_url(url)
            self._socket = self._connect(host, port)

    def _connect_unix(self, path):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(path)
        except OSError as error:
            raise Refused(f"cannot reach the data interface {self._url}: "
                          f"{error.strerror or error}") from None
        return sock

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
        self._resource = without_controls(resource)
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
            reason = reason_of(b"".join(body)) or f"the server answered {status}"
            raise Refused(f"{self._resource}: {reason}")
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


def state_directory():
    """Return where the servers of this user leave what their clients need."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    return os.path.join(base, "kapow") if base else f"/tmp/kapow-{os.getuid()}"


def is_private(found):
    """Tell whether nobody but this user can have written what os.stat() `found`."""
    return found.st_uid == os.getuid() and not found.st_mode & 0o077


def read_left(path):
    """Return what a server left in the file `path`, {variable: value}; None if it is gone."""
    import fcntl
    import json
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), encoding="utf-8",
                  errors="surrogateescape") as file:
            if not is_private(os.fstat(file.fileno())):
                return None
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:         # the server's lock: it lives
                document = json.load(file)
                if all(isinstance(document.get(name), str) for name in
                       (CONTROL_URL_VARIABLES[0], *CREDENTIAL_VARIABLES)):
                    return document
    except (OSError, ValueError, AttributeError, RecursionError):
        pass                                # what no server has written
    return None


def takes_connection(url):
    """Tell whether somebody listens at an ``https://HOST:PORT`` URL."""
    from socket import create_connection
    from urllib.parse import urlsplit
    try:
        address = urlsplit(url)
        create_connection((address.hostname, address.port), CONNECT_TIME).close()
    except (OSError, ValueError):
        return False
    return True


def find_servers():
    """Return what the servers of this user left that take a connection, a list of dicts.

    Raises Refused where somebody else could have left it.
    """
    directory = state_directory()
    try:
        if not is_private(os.lstat(directory)):
            raise Refused(f"{directory} is not this user's alone, and what is in it is not used; "
                          "is the server another user's? Then run this as that user")
        names = sorted(os.listdir(directory))
    except OSError:
        return []
    left = [read_left(os.path.join(directory, name)) for name in names
            if name.startswith("control-") and name.endswith(".json")]
    return [server for server in left
            if server is not None and takes_connection(server[CONTROL_URL_VARIABLES[0]])]


def find_server(url):
    """Return what the server at `url` left, or if that is None the only one of this user.

    Raises Refused, WrongUsage.
    """
    servers = find_servers()
    urls = [server[CONTROL_URL_VARIABLES[0]] for server in servers]
    if url is not None and url.rstrip("/") in urls:
        return servers[urls.index(url.rstrip("/"))]
    if url is None and len(servers) == 1:
        return servers[0]
    if url is None and servers:
        raise WrongUsage("several servers of this user run; name one with --control-url:\n"
                         + "\n".join(urls))
    raise Refused(f"{SERVER_CERT_VARIABLE} is not set, and in {state_directory()} there is no "
                  f"server of this user that runs{'' if url is None else ' at ' + url}")


def write_credentials(directory, environment):
    """Write the certificates of `environment` into `directory`, as `requests` needs them.

    That is of mode 0700. Return (server certificate, (client certificate, client key)), paths of
    files of mode 0600. Raises Refused.
    """
    paths = []
    for name in CREDENTIAL_VARIABLES:
        if not environment.get(name):
            raise Refused(f"{name} is not set: handlers get no credentials, init programs do")
        path = os.path.join(directory, name)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(environment[name])
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
    """Calls of the control interface, with the certificates of an environment.

    The server's certificate is the only one that is trusted. All methods raise
    Refused.
    """

    def __init__(self, url, environment):
        """`url` is such as ``https://localhost:8081``, `environment` has the certificates."""
        try:
            import requests
        except ImportError:
            raise Refused("kapow route, service and handler need "
                          "the Python package requests") from None
        self._requests = requests
        self._environment = environment
        self._url = url.rstrip("/")
        if not self._url.startswith("https://"):
            raise Refused(f"{url!r} is not the URL of a control interface, https://HOST:PORT")

    def call(self, method, path, document=None, about=None):
        """Make a call; return the decoded JSON answer, None when it has none.

        What the server refuses is said to be `about` something, a str as "route /x".
        """
        import tempfile
        prefix = f"{without_controls(about)}: " if about else ""
        try:
            with tempfile.TemporaryDirectory(prefix="kapowctl-") as directory:
                answer = self._request(write_credentials(directory, self._environment),
                                       method, path, document)
        except Refused as error:
            raise Refused(f"{prefix}{error}") from None
        except OSError as error:
            raise Refused(f"cannot keep the certificates for a moment: {error.strerror}") from None
        if not answer.ok:
            reason = reason_of(answer.content) or f"the server answered {answer.status_code}"
            raise Refused(prefix + reason)
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
    """Return a DataClient for the resource in `options`. Raises WrongUsage, Refused."""
    handler_id = options.get("handler") or environment([HANDLER_ID_VARIABLE])
    if not handler_id:
        raise WrongUsage(f"there is no handler id: {HANDLER_ID_VARIABLE} is not set, "
                         "and --handler was not given")
    url = options.get("data_url") or environment(DATA_URL_VARIABLES, f"http://{DATA_ADDRESS}")
    try:
        return DataClient(url, handler_id)
    except Refused as error:
        raise Refused(f"{without_controls(options['resource'])}: {error}") from None


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
    """Return the ControlClient that the options and the environment name.

    Where that has no credentials, those that a server has left for its user;
    but not for handlers, which are not to change routes. Raises Refused,
    WrongUsage.
    """
    url = options.get("control_url") or environment(CONTROL_URL_VARIABLES)
    if environment([*CREDENTIAL_VARIABLES, HANDLER_ID_VARIABLE]):
        return ControlClient(url or f"https://{CONTROL_ADDRESS}", os.environ)
    found = find_server(url)
    return ControlClient(found[CONTROL_URL_VARIABLES[0]], found)


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
                 "queue_time", "disconnect", "service", "handler")


def do_route_add(options):
    """Add a route, at --index or last, and print it."""
    route = {key: options[key] for key in ROUTE_OPTIONS if options[key] is not None}
    if options["command_file"] is not None:
        if options["command"] is not None:
            raise WrongUsage("-c and a COMMAND_FILE exclude each other")
        route["command"] = read_command(options["command_file"])
    elif options["command"] is not None:
        route["command"] = options["command"]
    call = ("POST", "/routes")
    if options["replace"]:
        if options["index"] is not None:
            raise WrongUsage("--index and --replace exclude each other")
        call = ("PUT", "/routes?replace")
    elif options["index"] is not None:
        route["index"] = options["index"]
        call = ("PUT", "/routes")
    about = f"route {route['method']} {route['url_pattern']}"
    write_json(take_warning(control_client(options).call(*call, route, about)))


def take_warning(route):
    """Warn of a route that may not do what was meant; return it as it is listed.

    Such is one that an earlier one hides, and whatever else the server has a hint for.
    """
    about = f"the route {route['method']} {route['url_pattern']}"
    hidden_by, hint = route.pop("hidden_by", None), route.pop("hint", None)
    if hidden_by is not None:
        complain(without_controls(
            f"warning: {about} never answers, "
            f"hidden by an earlier one with the same method and pattern: {hidden_by}"))
    if hint is not None:
        complain(without_controls(f"warning: {about}: {hint}"))
    return route


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


# Of a table of routes: those that are always there, and those that may be.
ROUTE_COLUMNS = (("index", "id", "method", "url_pattern", "entrypoint", "command"), ("service",))


def do_route_list(options):
    """Print all routes, or one."""
    path, about = "/routes", None
    if options["id"] is not None:
        path, about = "/routes/" + quote_id(options["id"]), f"route {options['id']}"
    write_list(options, control_client(options).call("GET", path, about=about), *ROUTE_COLUMNS)


def find_route(client, method, pattern):
    """Return the id of the only route with `pattern` and, unless that is None, `method`.

    Raises Refused.
    """
    found = [route for route in client.call("GET", "/routes")
             if route["url_pattern"] == pattern and method in (None, route["method"])]
    about = without_controls(f"route {method} {pattern}" if method else f"route {pattern}")
    if not found:
        raise Refused(f"{about}: Route Not Found")
    if len(found) > 1:
        ids = ", ".join(f"{route['method']} {route['id']}" for route in found)
        raise Refused(f"{about}: several routes have it, name one by its id: {ids}")
    return found[0]["id"]


def do_route_remove(options):
    """Remove a route, named by its id or by its pattern, which begins with a slash."""
    client, name, method = None, options["id"], options["method"]
    about = f"route {name}"
    if name.startswith("/"):
        client = control_client(options)
        name = find_route(client, method, name)
    elif method is not None:
        raise WrongUsage("--method goes with a URL_PATTERN, which begins with a slash")
    client = client or control_client(options)
    client.call("DELETE", "/routes/" + quote_id(name), about=about)


def do_route_match(options):
    """Print the route that would answer a request, and what its placeholders match."""
    query = f"method={quote_id(options['method'])}&path={quote_id(options['path'])}"
    write_json(control_client(options).call(
        "GET", f"/routes?{query}", about=f"route {options['method']} {options['path']}"))


def read_routes(path):
    """Return the JSON array in a file, `-` being standard input. Raises Refused."""
    import json
    try:
        with open(0 if path == "-" else path, "rb") as file:
            routes = json.loads(file.read())
    except OSError as error:
        raise Refused(f"cannot read the routes in {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise Refused(f"the routes in {path} are no JSON: {error}") from None
    if not isinstance(routes, list):
        raise Refused(f"the routes in {path} are no JSON array, as kapow route list prints it")
    return routes


def changes(before, after):
    """Yield the steps from one list of routes to another, as {"change": what, ...}.

    "added" has the place `to`, "removed" the place `from`, "moved" both.
    """
    import difflib
    import json

    def words(route):
        """Return what makes a route the one that it is."""
        return json.dumps({key: value for key, value in route.items()
                           if key not in ("id", "index")}, sort_keys=True)

    old, new = [words(route) for route in before], [words(route) for route in after]
    steps = [step for step in difflib.SequenceMatcher(None, old, new, False).get_opcodes()
             if step[0] != "equal"]
    removed = [place for _, start, end, _, _ in steps for place in range(start, end)]
    for _, _, _, start, end in steps:
        for place in range(start, end):
            source = next((other for other in removed if old[other] == new[place]), None)
            if source is not None:
                removed.remove(source)
            yield {**after[place], "change": "added" if source is None else "moved",
                   "from": source, "to": place}
    for place in removed:
        yield {**before[place], "change": "removed", "from": place, "to": None}


def do_route_apply(options):
    """Take the routes of a file in place of all there are, or say what that would change."""
    routes, about = read_routes(options["file"]), f"the routes in {options['file']}"
    client = control_client(options)
    if not options["dry_run"]:
        added = client.call("PUT", "/routes", routes, about)
        write_list(options, [take_warning(route) for route in added], *ROUTE_COLUMNS)
        return
    before = client.call("GET", "/routes")
    after = client.call("PUT", "/routes?dry-run", routes, about)
    write_list(options, list(changes(before, after)),
               ("change", "from", "to", "method", "url_pattern", "entrypoint", "command"),
               ("service",))


def do_handler_list(options):
    """Print the handlers that run."""
    write_list(options, control_client(options).call("GET", "/handlers"),
               ("request_id", "method", "path", "client", "pid", "age", "id", "route_id"))


def do_handler_kill(options):
    """End a handler early."""
    control_client(options).call("DELETE", "/handlers/" + quote_id(options["id"]),
                                 about=f"handler {options['id']}")


def service_path(options, *action):
    """Return the path of a service, or of an action on it."""
    return "/".join(["/services", quote_id(options["name"]), *action])


def do_service_add(options):
    """Add a service, which starts it, and print it."""
    if not options["command"]:
        raise WrongUsage("what is the program? kapow service add NAME -- PROGRAM [ARG ...]")
    service = {key: options[key] for key in ("name", "command", "routes")}
    write_json(control_client(options).call("POST", "/services", service,
                                            f"service {options['name']}"))


def do_service_list(options):
    """Print all services, or one."""
    path, about = "/services", None
    if options["name"] is not None:
        path, about = service_path(options), f"service {options['name']}"
    write_list(options, control_client(options).call("GET", path, about=about),
               ("name", "state", "pid", "restarts", "command"))


def do_service_action(options):
    """Start, stop or restart a service, and print it."""
    write_json(control_client(options).call("POST", service_path(options, options["action"]),
                                            about=f"service {options['name']}"))


def do_service_signal(options):
    """Send a signal to the program of a service."""
    control_client(options).call("POST", service_path(options, "signal"),
                                 {"signal": options["signal"]}, f"service {options['name']}")


def do_service_remove(options):
    """Stop a service and forget it."""
    control_client(options).call("DELETE", service_path(options),
                                 about=f"service {options['name']}")


# ---------------------------------------------------------------------------
# Completions
# ---------------------------------------------------------------------------


def below(parser):
    """Return the commands below a parser as {word: its parser}."""
    return next((action.choices for action in parser._actions
                 if isinstance(action.choices, dict)), {})


def walk(parser, path=()):
    """Yield (words, parser) of a parser and of all the commands below it."""
    yield path, parser
    for word, other in below(parser).items():
        yield from walk(other, (*path, word))


BASH_COMPLETION = """\
# Completes kapowctl in bash(1); made by: kapowctl completion bash
_kapowctl() {
    local word=${COMP_WORDS[COMP_CWORD]} last=${COMP_WORDS[COMP_CWORD-1]} path='' words='' i
    for ((i = 1; i < COMP_CWORD; i++)); do
        case "$path ${COMP_WORDS[i]}" in
        COMMANDS) path="$path ${COMP_WORDS[i]}" ;;
        esac
    done
    case "$path:$last" in
VALUES
WORDS
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
}
complete -o default -F _kapowctl kapowctl
"""


def bash_completion(parser):
    """Return the script for bash(1), which offers files where it knows nothing better."""
    commands, values, words = [], {}, []
    for path, other in walk(parser):
        name, offered = "".join(" " + word for word in path), []
        commands += [f'"{name}"'] if path else []
        for action in other._actions:
            offered += action.option_strings or action.choices or ()
            if action.nargs != 0:
                names = [f'"{name}:{option}"' for option in action.option_strings]
                values.setdefault(" ".join(action.choices or ()), []).extend(names)
        words.append(f'    "{name}":*) words="{" ".join(offered)}" ;;')
    cases = [f'    {" | ".join(names)}) words="{offered}" ;;'
             for offered, names in values.items() if names]
    return BASH_COMPLETION.replace("COMMANDS", " | ".join(commands)).replace(
        "VALUES", "\n".join(cases)).replace("WORDS\n", "\n".join(words) + "\n")


def zsh_text(text):
    """Return words for people without what zsh's _arguments would take for its own."""
    return "".join(character for character in text if character not in "[]():\"'\\")


def zsh_argument(action):
    """Return what follows a ':' in the specification of an argument, for _arguments."""
    if isinstance(action.choices, dict):
        helps = {choice.dest: choice.help for choice in action._choices_actions}
        words = " ".join(f'{word}\\:"{zsh_text(helps[word])}"' for word in action.choices)
        return f"command:(({words}))"
    name = zsh_text(str(action.metavar or action.dest))
    if action.choices:
        return f"{name}:({' '.join(action.choices)})"
    return f"{name}:{'_files' if name.endswith(('FILE', 'PROGRAM')) else ' '}"


def zsh_completion(parser):
    """Return the script for zsh(1), with a function for each command."""
    lines = ["#compdef kapowctl", "# Made by: kapowctl completion zsh"]
    for path, other in walk(parser):
        specs, places = [], 0
        for action in other._actions:
            words = zsh_text((action.help or "") % {"default": action.default})
            for option in action.option_strings:
                value = "" if action.nargs == 0 else ":" + zsh_argument(action)
                specs.append(f"'{option}[{words}]{value}'")
            if not action.option_strings:
                places += 1
                place = "*" if action.nargs == "*" else places
                specs.append(f"'{place}:{zsh_argument(action)}'")
        name = "_".join(("_kapowctl", *path))
        lines.append(f"{name}() {{")
        if below(other):
            lines += ["    local line state", f"    _arguments -C {' '.join(specs)} '*:: :->below'",
                      f"    [[ $state == below ]] && (( $+functions[{name}_$line[1]] )) &&",
                      f"        {name}_$line[1]"]
        else:
            lines.append(f"    _arguments {' '.join(specs)}")
        lines.append("}")
    return "\n".join([*lines, '_kapowctl "$@"', ""])


COMPLETIONS = {"bash": bash_completion, "zsh": zsh_completion}


def do_completion(options):
    """Print the script that completes the command line in a shell."""
    write_out(COMPLETIONS[options["shell"]](options["parser"]).encode())


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


def add_output(parser):
    """Give a parser the option that says how a list is printed."""
    parser.add_argument("-o", "--output", choices=("json", "table"), help="(table on a terminal)")


def add_list(commands, function, what, argument):
    """Add a command `list` that prints rows of `what`, or the one that `argument` names."""
    show = add_command(commands, "list", function, f"print the {what}s, or one")
    add_output(show)
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
    add.add_argument("--replace", action="store_true",
                     help="take the place of the first route with this method and pattern")
    add.add_argument("--timeout", metavar="SECONDS", type=seconds,
                     help="longest time of a handler, 0 for no limit (the server's)")
    add.add_argument("--max-handlers", metavar="N", type=int,
                     help="handlers of this route at once (the server's limit alone)")
    add.add_argument("--max-queue", metavar="N", type=int,
                     help="requests that wait for this route (the server's limit alone)")
    add.add_argument("--queue-time", metavar="SECONDS", type=seconds,
                     help="how long they wait (as the server says)")
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
    remove.add_argument("-X", "--method", metavar="METHOD", help="of the route (any)")
    remove.add_argument("id", metavar="ROUTE", help="its id, or its URL_PATTERN")
    match = add_command(commands, "match", do_route_match, "print the route that would answer")
    match.add_argument("-X", "--method", metavar="METHOD", default="GET", help="(%(default)s)")
    match.add_argument("path", metavar="URL_PATH", help="of a request, as /greet/World")
    apply = add_command(commands, "apply", do_route_apply,
                        "take the routes of a file in place of all there are")
    apply.add_argument("--dry-run", action="store_true",
                       help="print what would be added, removed and moved instead")
    add_output(apply)
    apply.add_argument("file", metavar="FILE",
                       help="a JSON array as route list prints it, - for standard input")
    return add_control_url([add, show, remove, match, apply])


def add_handler_commands(commands):
    """Add the commands for handlers; return their parsers."""
    show = add_command(commands, "list", do_handler_list, "print the handlers that run")
    add_output(show)
    kill = add_command(commands, "kill", do_handler_kill, "end a handler early")
    kill.add_argument("id", metavar="ID", help="of the handler, or of the request")
    return add_control_url([show, kill])


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
    leaves += add_group(commands, "route", "add, list, match, apply and remove routes", add_route_commands)
    leaves += add_group(commands, "service", "run resident programs that answer requests",
                        add_service_commands)
    leaves += add_group(commands, "handler", "list and end requests that are being answered",
                        add_handler_commands)
    completion = add_command(commands, "completion", do_completion,
                             "print what completes this command line in a shell")
    completion.add_argument("shell", metavar="SHELL", choices=tuple(COMPLETIONS),
                            help=" or ".join(COMPLETIONS))
    completion.set_defaults(parser=parser)
    leaves.append(completion)
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
