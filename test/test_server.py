"""Starting: addresses, init programs, --routes, HTTPS; and what makes a start fail."""

import contextlib
import datetime
import ipaddress
import json
import os
import socket
import ssl
import subprocess
import sys

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from conftest import DEADLINE, KAPOW, installed, wait_until, write_starter


def fails(*arguments, status=1, environment=None):
    """Run a server that does not start; return its last log line."""
    done = subprocess.run(
        [*installed(KAPOW), "server", *map(str, arguments)], capture_output=True, text=True,
        timeout=DEADLINE, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (status, "")
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


FREE = ("--bind", "127.0.0.1:0", "--control-bind", "127.0.0.1:0", "--data-bind", "127.0.0.1:0")


@pytest.mark.parametrize("option, name", [
    ("--bind", "user"), ("--control-bind", "control"), ("--data-bind", "data")])
def test_taken_port(tmp_path, option, name):
    mark = tmp_path / "init-ran"
    init = script(tmp_path / "init", f"touch {mark}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = "127.0.0.1:%d" % taken.getsockname()[1]
        line = fails(*FREE, option, address, init, environment={"TMPDIR": str(tmp_path)})
    assert f"{name} interface" in line and address in line and "Address already in use" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["init"]


@pytest.mark.parametrize("address, cause", [
    ("no-such-host.invalid:80", ""), ("a..b:0", ""), ("a" * 70 + ":0", ""), ("192.0.2.1:0", "assign"), ("[2001:db8::1]:0", "")])
def test_address_that_is_not_here(address, cause):
    line = fails(*FREE, "--bind", address)
    assert f"cannot listen on {address}: " in line and cause in line


def test_ipv6(start_server):
    server = start_server("--bind", "[::1]:0", "--data-bind", "[::1]:0", "--control-bind", "[::1]:0")
    server.wait_log(r"user interface: http://\[::1\]:\d+$")
    path = server.route("kapow get /request/remote | kapow set /response/body")
    with socket.create_connection(("::1", server.port("user"))) as sock:
        sock.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        assert sock.makefile("rb").read().endswith(b"\r\n\r\n::1")
    assert server.init_environment["KAPOW_DATA_URL"] == f"http://[::1]:{server.port('data')}"
    assert server.ctl("route", "list").stderr == b""


def test_any_address(start_server):
    server = start_server("--bind", "0.0.0.0:0", "--data-bind", "0.0.0.0:0")
    assert server.get(server.route("kapow set /response/body x")).body == b"x"
    assert server.init_environment["KAPOW_DATA_URL"] == f"http://127.0.0.1:{server.port('data')}"


def test_names(start_server):
    server = start_server("--bind", "localhost:0", "--control-bind", "localhost:0")
    server.wait_log(r"user interface: http://127\.0\.0\.1:\d+$")
    assert server.init_environment["KAPOW_CONTROL_URL"] == f"https://localhost:{server.port('control')}"
    assert server.ctl("route", "list").returncode == 0


@pytest.mark.parametrize("host, san", [
    ("kapow.example", x509.DNSName("kapow.example")),
    ("192.0.2.7", x509.IPAddress(ipaddress.ip_address("192.0.2.7"))),
    ("[2001:db8::7]", x509.IPAddress(ipaddress.ip_address("2001:db8::7"))),
])
def test_reachable_address_and_certificates(start_server, host, san):
    server = start_server("--control-reachable-addr", f"{host}:1234")
    environment = server.init_environment
    assert environment["KAPOW_CONTROL_URL"] == f"https://{host}:1234"
    own, client = (x509.load_pem_x509_certificate(environment[name].encode()) for name in (
        "KAPOW_CONTROL_SERVER_CERT", "KAPOW_CONTROL_CLIENT_CERT"))
    key = serialization.load_pem_private_key(environment["KAPOW_CONTROL_CLIENT_KEY"].encode(), None)
    assert key.public_key() == client.public_key()
    assert list(own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value) == [san]
    for certificate, usage in ((own, x509.ExtendedKeyUsageOID.SERVER_AUTH),
                               (client, x509.ExtendedKeyUsageOID.CLIENT_AUTH)):
        assert isinstance(certificate.public_key().curve, ec.SECP256R1)
        extension = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
        assert list(extension.value) == [usage]
        life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
        assert life >= datetime.timedelta(days=3650)
    assert "PRIVATE" not in environment["KAPOW_CONTROL_SERVER_CERT"]


def test_reachable_name_beyond_ascii(start_server):
    server = start_server("--control-reachable-addr", "münchen.example:1")
    own = x509.load_pem_x509_certificate(server.init_environment["KAPOW_CONTROL_SERVER_CERT"].encode())
    names = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.DNSName("xn--mnchen-3ya.example")]
    assert "no host name" in fails(*FREE, "--control-reachable-addr", "a..b:1")


def test_closed_streams(start_server, tmp_path):
    """No file of the server gets the number of a standard stream that was closed."""
    wrapper = write_starter(tmp_path / "closed.py", "for fd in (0, 1):\n    os.close(fd)")
    other = start_server(script=wrapper)
    links = [os.readlink(f"/proc/{other.process.pid}/fd/{fd}") for fd in (0, 1)]
    assert links == ["/dev/null", "/dev/null"]
    assert other.get(other.route("kapow set /response/body x")).body == b"x"


def test_reachable_name_is_what_clients_verify(start_server):
    server = start_server("--control-reachable-addr", "localhost:0")
    port = server.port("control")
    assert server.init_environment["KAPOW_CONTROL_URL"] == f"https://localhost:{port}"
    assert server.ctl("route", "list").returncode == 0
    done = server.ctl("route", "list", "--control-url", f"https://127.0.0.1:{port}")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1


def script(path, text, interpreter="/bin/sh"):
    """Write an executable script; return its path."""
    path.write_text(f"#!{interpreter}\n{text}\n")
    path.chmod(0o755)
    return path


def test_empty_urls_in_the_environment_are_none(start_server):
    server = start_server(environment={"KAPOW_DATA_URL": "", "KAPOW_CONTROL_URL": ""})
    assert server.get(server.route("kapow set /response/body x")).body == b"x"


def test_urls_in_the_environment_are_kept(start_server, tmp_path):
    """And credentials that the server itself was given go to no handler."""
    (tmp_path / "routes").write_text(json.dumps([
        {"method": "GET", "url_pattern": "/x", "command": "env | grep KAPOW_ >&2"}]))
    server = start_server("--routes", tmp_path / "routes", wait=False, environment={
        "KAPOW_DATA_URL": "http://192.0.2.1:1", "KAPOW_CONTROL_URL": "https://192.0.2.1:2",
        "KAPOW_CONTROL_CLIENT_KEY": "secret", "KAPOW_HANDLER_ID": "another"})
    server.wait_log("user interface")
    assert server.get("/x").status == 200
    for line in ("KAPOW_DATA_URL=http://192.0.2.1:1", "KAPOW_DATAAPI_URL=http://192.0.2.1:1",
                 "KAPOW_CONTROL_URL=https://192.0.2.1:2", "KAPOW_CONTROLAPI_URL=https://192.0.2.1:2",
                 r"KAPOW_HANDLER_ID=[0-9a-f-]{36}"):
        server.wait_log(f"^{line}$")
    assert "secret" not in "\n".join(server.log)


def test_init_programs(start_server, tmp_path):
    talking = script(tmp_path / "talking", "echo to stdout; echo to stderr >&2; exit 3")
    dying = script(tmp_path / "dying", "kill -KILL $$")
    nameless = script(tmp_path / "nameless", "kill -35 $$")
    adding = script(tmp_path / "adding", "kapow route add /one; kroute add /two; kapowctl route add /three")
    server = start_server(init=[talking, dying, nameless, adding])
    for line in ("^to stdout$", "^to stderr$", "init program .*talking exited with status 3$",
                 "init program .*dying died of SIGKILL$", "init program .*nameless died of signal 35$", '"url_pattern": "/three"'):
        server.wait_log(line)
    routes = server.control("GET", "/routes").json()
    assert [route["url_pattern"] for route in routes] == ["/one", "/two", "/three"]
    assert server.access == []


def test_init_programs_run_together(start_server, tmp_path):
    """Each waits for the other."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    server = start_server(init=[script(tmp_path / "reader", f"read x < {fifo}; echo got $x >&2"),
                                script(tmp_path / "writer", f"echo it > {fifo}")])
    server.wait_log("^got it$")


def test_init_program_found_on_path(start_server, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    script(programs / "kapow-test-init", "echo from path >&2")
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    server = start_server(init=["kapow-test-init"], environment={"PATH": path})
    server.wait_log("^from path$")
    script(server.directory / "kapow-test-init", "echo from here >&2")
    again = subprocess.Popen([sys.executable, str(KAPOW), "server", *FREE, "kapow-test-init"],
                             cwd=server.directory, env={**server.environment, "PATH": path},
                             stderr=subprocess.PIPE, text=True)
    with again, contextlib.closing(again.stderr):
        assert any("from here" in line for line in again.stderr)
        again.terminate()


@pytest.mark.parametrize("name, mode, words", [
    ("/no/such/init", None, "no such file"), ("no-such-init", None, "PATH"), (".", None, "it is a directory"),
    ("init", 0o644, "Permission denied"), ("init", 0o755, "Exec format error"),
])
def test_init_program_that_cannot_start(tmp_path, name, mode, words):
    if mode is not None:
        name = tmp_path / name
        name.write_text("no interpreter line")
        name.chmod(mode)
    line = fails(*FREE, name)
    assert "ERROR cannot start the init program" in line and words in line


def test_debug_names_init_programs(start_server, tmp_path):
    server = start_server("--debug", init=[script(tmp_path / "noisy", "echo out; echo err >&2")])
    server.wait_log("noisy stdout: out$")
    server.wait_log("noisy stderr: err$")


def test_running_init_program_is_ended(start_server, tmp_path):
    server = start_server(script(tmp_path / "staying", "echo up >&2; sleep 1000"), wait=False)
    server.wait_log("^up$")
    assert server.stop() == 0


ROUTES = [{"method": "GET", "url_pattern": "/one", "command": "kapow set /response/body 1"},
          {"id": "x", "index": 7, "method": "GET", "url_pattern": "/two", "entrypoint": None}]


def test_routes_files(start_server, tmp_path):
    for name, routes in (("a", ROUTES), ("b", ROUTES[:1]), ("empty", [])):
        (tmp_path / name).write_text(json.dumps(routes))
    server = start_server("--routes", tmp_path / "a", "--routes", tmp_path / "empty",
                          "--routes", tmp_path / "b")
    listed = server.control("GET", "/routes").json()
    assert [route["url_pattern"] for route in listed] == ["/one", "/two", "/one"]
    assert server.get("/one").body == b"1"
    # What is listed can be loaded again.
    (tmp_path / "again").write_bytes(server.ctl("route", "list").stdout)
    again = start_server("--routes", tmp_path / "again")
    assert [route["command"] for route in again.control("GET", "/routes").json()] == [
        route["command"] for route in listed]


@pytest.mark.parametrize("text, words", [
    (None, ["No such file"]), ("{", ["Malformed JSON"]), ("{}", ["JSON array"]),
    ('[{"method": "GET", "url_pattern": "/"}, {"method": "GET"}]', ["item 1", "url_pattern"]),
    ('[{"method": "GET", "url_pattern": "/{"}]', ["item 0", "never closed"]),
])
def test_routes_file_refused(tmp_path, text, words):
    path = tmp_path / "routes.json"
    if text is not None:
        path.write_text(text)
    line = fails(*FREE, "--routes", path)
    assert all(word in line for word in [str(path), *words])


def key_usage(authority):
    """Return the X.509 key usage of an authority, or of what it signs."""
    names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment",
             "key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    wanted = "key_cert_sign" if authority else "digital_signature"
    return x509.KeyUsage(**{name: name == wanted for name in names})


def make_certificate(directory, name, subject, issuer=None, host=None):
    """Write a key and a certificate; return (certificate, key, path prefix)."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.timezone.utc)
    name_of = x509.Name.from_rfc4514_string(subject)
    builder = (x509.CertificateBuilder(issuer[0].subject if issuer else name_of, name_of,
                                       key.public_key(), x509.random_serial_number())
               .not_valid_before(now - datetime.timedelta(days=1))
               .not_valid_after(now + datetime.timedelta(days=1))
               .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), True)
               .add_extension(key_usage(issuer is None), True))
    authority_key = (issuer[1] if issuer else key).public_key()
    for extension in (x509.SubjectKeyIdentifier.from_public_key(key.public_key()),
                      x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key)):
        builder = builder.add_extension(extension, False)
    if host:
        address = x509.IPAddress(ipaddress.ip_address(host))
        builder = builder.add_extension(x509.SubjectAlternativeName([address]), False)
    certificate = builder.sign(issuer[1] if issuer else key, hashes.SHA256())
    path = directory / name
    path.with_suffix(".crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    path.with_suffix(".key").write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return certificate, key, path


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """A test authority with a server's and two clients' certificates, in its directory."""
    directory = tmp_path_factory.mktemp("authority")
    root = make_certificate(directory, "root", "CN=Test Root")
    make_certificate(directory, "server", "CN=server", root, "127.0.0.1")
    make_certificate(directory, "client", CLIENT_DN, root)
    make_certificate(directory, "stranger", "CN=stranger")
    return directory


CLIENT_DN = r"CN=A\, B \"q\" \+ ü,OU=x+O=y,C=ES"


def tls_request(server, authority, path, client=None):
    """Make an HTTPS request with curl's eyes: verify the server; return the body."""
    context = ssl.create_default_context(cafile=authority / "root.crt")
    if client:
        context.load_cert_chain(authority / f"{client}.crt", authority / f"{client}.key")
    with server.connect() as sock, context.wrap_socket(sock, server_hostname="127.0.0.1") as tls:
        tls.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
        answer = tls.makefile("rb").read()
    return answer.partition(b"\r\n\r\n")[2]


def test_https(start_server, authority):
    server = start_server("--certfile", authority / "server.crt", "--keyfile", authority / "server.key")
    server.wait_log("user interface: https://")
    path = server.route("kapow set /response/headers/Content-Length 1000000; "
                        "head -c 1000000 /dev/zero | kapow set /response/body")
    assert tls_request(server, authority, path) == bytes(1000000)
    path = server.route("kapow get /ssl/client/i/dn || kapow set /response/body none")
    assert tls_request(server, authority, path) == b"none"
    server.raw(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
    wait_until(lambda: server.usage() <= server.idle, "the connections' end")
    assert not [line for line in server.log if "Traceback" in line or "unexpected" in line]


def test_https_reads_and_writes_at_once(start_server, authority):
    """An upload is echoed while it comes: both directions of one TLS session."""
    server = start_server("--certfile", authority / "server.crt", "--keyfile", authority / "server.key")
    path = server.route("kapow get /request/body | kapow set /response/stream", "POST")
    upload = authority / "upload"
    upload.write_bytes(os.urandom(5_000_000))
    done = subprocess.run(
        ["curl", "--silent", "--show-error", "--cacert", authority / "root.crt", "--data-binary",
         f"@{upload}", "--header", "Expect:", f"https://127.0.0.1:{server.port('user')}{path}"],
        capture_output=True, timeout=DEADLINE, check=True)
    assert done.stdout == upload.read_bytes()


@pytest.mark.parametrize("switch", [["--clientauth"], ["--clientauth=true"], ["--clientauth", "true"]])
def test_client_certificates(start_server, authority, switch):
    server = start_server("--certfile", authority / "server.crt", "--keyfile", authority / "server.key",
                          *switch, "--clientcafile", authority / "root.crt")
    path = server.route("kapow get /ssl/client/i/dn | kapow set /response/body")
    own = x509.load_pem_x509_certificate((authority / "client.crt").read_bytes())
    shown = tls_request(server, authority, path, "client").decode()
    assert shown == own.subject.rfc4514_string() or set(shown) == set(CLIENT_DN)
    assert x509.Name.from_rfc4514_string(shown) == own.subject
    for client in (None, "stranger"):
        with pytest.raises(OSError):
            if tls_request(server, authority, path, client) == b"":
                raise ConnectionResetError
    assert tls_request(server, authority, path, "client").decode() == shown


@pytest.mark.parametrize("switch", [["--clientauth=optional"], ["--clientauth", "optional"]])
def test_client_certificates_that_are_optional(start_server, authority, switch):
    server = start_server("--certfile", authority / "server.crt", "--keyfile", authority / "server.key",
                          *switch, "--clientcafile", authority / "root.crt")
    path = server.route("kapow get /ssl/client/i/dn | kapow set /response/body; "
                        "kapow set /response/body .")
    assert tls_request(server, authority, path) == b"."
    assert b"=" in tls_request(server, authority, path, "client")
    with pytest.raises(OSError):        # one that is given must be good
        if tls_request(server, authority, path, "stranger") == b"":
            raise ConnectionResetError


def test_client_certificates_switched_off(start_server, authority):
    server = start_server("--clientauth", "false", "--certfile", authority / "server.crt",
                          "--keyfile", authority / "server.key")
    assert tls_request(server, authority, server.route("kapow set /response/body x")) == b"x"


@pytest.mark.parametrize("certfile, keyfile, cafile, words", [
    ("none", "server.key", None, "No such file"), ("server.crt", "none", None, "No such file"),
    ("server.crt", "client.key", None, "MISMATCH"), ("server.key", "server.crt", None, ""),
    ("server.crt", "server.key", "none", "No such file"), ("server.crt", "server.key", "root.key", ""),
])
def test_certificates_refused(authority, certfile, keyfile, cafile, words):
    client = ["--clientauth", "--clientcafile", authority / cafile] if cafile else []
    line = fails(*FREE, "--certfile", authority / certfile, "--keyfile", authority / keyfile, *client)
    assert "ERROR cannot use" in line and words in line


@pytest.mark.parametrize("subject, text", [
    ([[("commonName", "a")]], "CN=a"),
    ([[("countryName", "ES")], [("commonName", "a")]], "CN=a,C=ES"),
    ([[("commonName", "a"), ("userId", "b")]], "CN=a+UID=b"),
    ([[("commonName", 'a,b+"c"<d>;\\e')]], r'CN=a\,b\+\"c\"\<d\>\;\\e'),
    ([[("commonName", "#a")]], r"CN=\#a"), ([[("commonName", " a ")]], r"CN=\ a\ "),
    ([[("commonName", " ")]], r"CN=\ "), ([[("commonName", "a\0b\n")]], r"CN=a\00b\0A"),
    ([[("emailAddress", "a@b")]], "emailAddress=a@b"), ([[("1.2.3", "x")]], "1.2.3=x"), ([], ""),
])
def test_dn(subject, text):
    import kapow
    assert kapow.format_dn(subject) == text
