"""What the test suites of werkzeug (3.1) and of busboy (1.6, @fastify/busboy 3.2) know of forms.

Cases in our own words of what they check, with the values of our contract: the
peers agree on them unless a comment says otherwise. Then werkzeug itself as an oracle.
"""

import io
import re

import pytest
from hypothesis import given, settings, strategies as st
from werkzeug.formparser import MultiPartParser
from werkzeug.wrappers import Request

import kapow
from test_forms import user_request

BOUNDARY = "---------------------------7d91b03a20128"
BROKEN = "400"
FIELD = 'Content-Disposition: form-data; name="%s"'
FILE = FIELD + '; filename="%s"'


def lines(*texts, end="\r\n"):
    """Return a body of lines, "@" in front of which stands for the boundary's delimiter."""
    return end.join(text.replace("@", "--" + BOUNDARY, 1) if text.startswith("@") else text
                    for text in texts).encode()


# What is it -> (body, its (name, file name or None, content), or BROKEN).
MULTIPART = {
    # busboy, and what browsers send.
    "fields and files": (lines(
        "@", FIELD % "a", "", "super alpha file", "@", FIELD % "b", "", "super beta file",
        "@", FILE % ("u0", "1k_a.dat"), "Content-Type: application/octet-stream", "", "A" * 1023,
        "@", FILE % ("u1", "1k_b.dat"), "Content-Type: application/octet-stream", "", "B" * 1023, "@--"), [
            ("a", None, "super alpha file"), ("b", None, "super beta file"),
            ("u0", "1k_a.dat", "A" * 1023), ("u1", "1k_b.dat", "B" * 1023)]),
    "a name without quotes": (lines("@", "Content-Disposition: form-data; name=bit", "", "2", "@--"), [
        ("bit", None, "2")]),
    "nothing at all": (b"", BROKEN),
    "an empty form": (lines("@--"), []),
    "another boundary": (lines("@Y--"), BROKEN),
    "a blank before the delimiter": (lines(" @--").replace(b"@", b"--" + BOUNDARY.encode()), BROKEN),
    "paths": (lines(
        "@", FILE % ("u0", "/tmp/1k_a.dat"), "", "x", "@", FILE % ("u1", "C:\\files\\1k_b.dat"), "", "y",
        "@", FILE % ("u2", "relative/1k_c.dat"), "", "z", "@--"), [
            ("u0", "1k_a.dat", "x"), ("u1", "1k_b.dat", "y"), ("u2", "1k_c.dat", "z")]),
    "empty headers": (lines(
        "@", FIELD % "cont", "Content-Type: ", "", "some random content",
        "@", "Content-Disposition: ", "", "some random pass", "@--"), [("cont", None, "some random content")]),
    "an encoded file name": (lines(
        "@", "Content-Disposition: form-data; name=\"file\"; filename*=utf-8''n%C3%A4me.txt", "", "A", "@--"), [
            ("file", "näme.txt", "A")]),
    "a cut header": (lines(
        "@\r\n:)Content-Type: text/plain\r\n:)" + FIELD % "foo" + "\r\n:)\r\n:)asd\r\n:)--x--"), BROKEN),
    "a cut file without content": (lines("@", FILE % ("u", "a.dat"), "", ""), BROKEN),
    "a cut file": (lines("@", FILE % ("u", "a.dat"), "", "a"), BROKEN),
    "a folded header": (lines(
        "@", FILE % ("u", "notes.txt"), "Content-Type: ", " text/plain; charset=utf8", "", "a", "@--"), [
            ("u", "notes.txt", "a")]),
    # Werkzeug refuses that one; Go and busboy pass over it.
    "no disposition": (lines("@", "Content-Type: text/plain", "", "a", "@--"), []),
    # Busboy goes on behind it, and the file is lost; ours is a refusal, 413.
    "an oversized header": (lines(
        "@", FILE % ("u0", "a" * 65536 + ".txt"), "", "ab", "@", FILE % ("u1", "b.txt"), "", "cd", "@--"), "413"),
    "long headers, each below the limit": (lines(
        "@", FILE % ("u0", "a" * 8192), "", "ab", "@", FILE % ("u1", "b" * 8192), "", "cd", "@--"), [
            ("u0", "a" * 8192, "ab"), ("u1", "b" * 8192, "cd")]),
    "a part without content": (lines(
        "", "@", "Content-Type: application/gzip", "Content-Encoding: gzip",
        "Content-Disposition: form-data; name=batch-1; filename=batch-1", "", "", "@--"), [
            ("batch-1", "batch-1", "")]),
    "CR at a border of pieces": (lines("@", FILE % ("u", "n"), "", "a" * 31 + "\r" + "b" * 40, "@--"), [
        ("u", "n", "a" * 31 + "\r" + "b" * 40)]),
    "Rails' form": (lines(
        "@", FIELD % "_method", "", "put", "@", FIELD % "profile[blog]", "", "", "@", FIELD % "profile[bio]", "",
        "hello", "", '"quote"', "@", FILE % ("media", ""), "Content-Type: application/octet-stream", "", "",
        "@", FIELD % "commit", "", "Save", "@--") + b"Extra", [
            ("_method", None, "put"), ("profile[blog]", None, ""), ("profile[bio]", None, 'hello\r\n\r\n"quote"'),
            ("media", "", ""), ("commit", None, "Save")]),
    "the same without its end": (lines(
        "@", FIELD % "_method", "", "put", "@", FILE % ("media", ""), "", "", "@", FIELD % "commit", "", "Save",
        "@"), BROKEN),
    "a multipart in a part": (lines(
        "@", FIELD % "foo", "", "bar", "@", FIELD % "files", "Content-Type: multipart/mixed, boundary=C", "",
        "--C", "Content-Disposition: attachment; filename=\"file.txt\"", "", "contents", "--C--", "@--"), [
            ("foo", None, "bar"), ("files", None, "--C\r\nContent-Disposition: attachment; filename=\"file.txt\""
                                                  "\r\n\r\ncontents\r\n--C--")]),
    "a blank before the first header": (lines("@", " " + FIELD % "bild", "", "", "@--"), [("bild", None, "")]),
    "an epilogue": (lines("@", FIELD % "field", "", "value", "@--", "epilogue", "@", FIELD % "b", "", "x"), [
        ("field", None, "value")]),
    "two delimiters in a row": (lines(
        "@", FIELD % "regsubmit", "", "yes", "@", "@", FIELD % "referer", "", "http://x/./", "@", "@", "@",
        FIELD % "empty", "", "", "@--"), [
            ("regsubmit", None, "yes"), ("referer", None, "http://x/./"), ("empty", None, "")]),
    # @fastify/busboy passes over the part.
    "a header that the end cuts": (lines(
        "@", FIELD % "a", "", "x", "@", FIELD % "b", "@--"), BROKEN),
    "a header that the next part cuts": (lines(
        "@", FIELD % "a", "@", FIELD % "c", "", "y", "@--"), BROKEN),
    # There the part is lost; Go has it as here.
    "a delimiter right behind a header": (lines(
        "@", FIELD % "f0", "", "@", FIELD % "f1", "", "b", "@--"), [("f0", None, ""), ("f1", None, "b")]),
    # Werkzeug.
    "UTF-8": (lines("", "@", FIELD % "fname", "", "ß∑œß∂ƒå∂", "@", FILE % ("lname", "bob"), "", "asdasd",
                    "@--", "    "), [("fname", None, "ß∑œß∂ƒå∂"), ("lname", "bob", "asdasd")]),
    "blank lines before": (lines("", "", "@", FIELD % "foo", "", "a string", "@--"), [("foo", None, "a string")]),
    "lookalikes": (lines("@", FIELD % "text", "", "--long text", "--with boundary", "--lookalikes--", "@--"), [
        ("text", None, "--long text\r\n--with boundary\r\n--lookalikes--")]),
    "a path of Windows' network": (lines(
        "@", FILE % ("u", "\\\\server\\share\\Sellersburg 02-22-2010doc.doc"), "", "x", "@--"), [
            ("u", "Sellersburg 02-22-2010doc.doc", "x")]),
    "a file name in sections": (lines(
        "@", "Content-Type: text/plain; charset=utf-8", "Content-Disposition: form-data; name=rfc2231;",
        "\tfilename*0*=ascii''a%20b%20;", "\tfilename*1*=c%20d%20;", '\tfilename*2="e f.txt"', "", "x", "@--"), [
            ("rfc2231", "a b c d e f.txt", "x")]),
    "bare LF": (lines("@", FIELD % "foo", "", "this is just bar", "@", FIELD % "bar", "", "blafasel", "@--",
                      end="\n"), [("foo", None, "this is just bar"), ("bar", None, "blafasel")]),
    # Werkzeug takes it, Go and busboy do not.
    "bare CR": (lines("@", FIELD % "foo", "", "x", "@--", end="\r"), BROKEN),
    "line breaks at borders of 64 KiB": (lines(
        "@", FIELD % "t", "", "\n".join(["\r" * 31] * 2045 + ["y" * 31]) + "\r\n" + "\n".join(
            ["\r" * 31] * 2047 + ["x" * 30]), "@--"), [
        ("t", None, "\n".join(["\r" * 31] * 2045 + ["y" * 31]) + "\r\n" + "\n".join(
            ["\r" * 31] * 2047 + ["x" * 30]))]),
    "CR at the end of a content": (lines("@", FILE % ("foo", "t"), "", "\0" * 65535 + "\r\r", "@--"), [
        ("foo", "t", "\0" * 65535 + "\r\r")]),
    **{f"a content of {start!r}": (lines("@", FILE % ("f", "t"), "", start + "\r\nBCDE", "@--"), [
        ("f", "t", start + "\r\nBCDE")]) for start in ("A", "\n", "\r", "\r\n", "\n\r", "A\n", "A\r", "A\n\r")},
}


def outcome(data, content_type, step):
    """Return the form's (name, file name, content), or the status of its refusal, as the tables have them."""
    try:
        found = user_request(data, content_type, step)
    except kapow.ApiError as error:
        return str(error.status)
    return [(name.decode(), filename if filename is None else filename.decode(), content.decode("latin-1"))
            for name, filename, content in found]


def as_latin(wanted):
    """Return what a table wants with the bytes of its contents one character each."""
    return wanted if isinstance(wanted, str) else [
        (name, filename, content.encode().decode("latin-1")) for name, filename, content in wanted]


@pytest.mark.parametrize("step", [1, 3, 64, 65536])
@pytest.mark.parametrize("case", MULTIPART)
def test_multipart(case, step):
    data, wanted = MULTIPART[case]
    if step > 1 or len(data) < 2000:
        kind = f'multipart/form-data; boundary="{BOUNDARY}"'.encode()
        assert outcome(data, kind, step) == as_latin(wanted)


@pytest.mark.parametrize("case", [case for case in MULTIPART if len(MULTIPART[case][0]) < 100_000])
def test_multipart_of_a_request(server, case):
    """The same from the data interface."""
    data, wanted = MULTIPART[case]
    kind = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    with server.handler("POST", body=data, headers=kind) as handler:
        if isinstance(wanted, str):
            assert {handler.get("/request/" + path).status for path in (
                "form", "files", "form/a", "files/u0/content")} == {int(wanted)}
            return
        for name, filename, content in wanted:
            name = name.replace("[", "%5B").replace("]", "%5D")
            if filename is None:
                assert handler.get("/request/form/" + name).body == content.encode()
            else:
                assert handler.get(f"/request/files/{name}/filename").body == filename.encode()
                assert handler.get(f"/request/files/{name}/content").body == content.encode()
        names = [name for name, filename, _ in wanted if filename is None]
        assert handler.get("/request/form").body.decode().splitlines() == names


# Busboy's urlencoded forms: body and fields.
@pytest.mark.parametrize("data, wanted", [
    ("foo", [("foo", "")]), ("foo=bar", [("foo", "bar")]), ("foo&bar=baz", [("foo", ""), ("bar", "baz")]),
    ("foo=bar&baz", [("foo", "bar"), ("baz", "")]), ("foo&bar&", [("foo", ""), ("bar", "")]),
    ("foo=bar+baz%2Bquux", [("foo", "bar baz+quux")]), ("foo%20bar=baz%20bla%21", [("foo bar", "baz bla!")]),
    ("foo=100%&bar=5%2&baz%=bla", [("foo", "100%"), ("bar", "5%2"), ("baz%", "bla")]), ("foo%", [("foo%", "")]),
    ("foo=bar%2", [("foo", "bar%2")]), ("&", []), ("&&&&&", []), ("=", [("", "")]), ("", []),
])
@pytest.mark.parametrize("step", [1, 4, 1000])
def test_urlencoded(data, wanted, step):
    assert outcome(data.encode(), b"application/x-www-form-urlencoded", step) == [
        (name, None, value) for name, value in wanted]


# Parameters, from werkzeug's and busboy's tests of headers; contents that differ are left out.
@pytest.mark.parametrize("value, wanted", [
    ("v;a=b;c=d;", {"a": "b", "c": "d"}), ("v;  ; a=b ; ", {"a": "b"}), ("v;a", {}), ("v;=b", {}),
    ('v;a="b"', {"a": "b"}), ("v;a=\"';'\";b=\"µ\";", {"a": "';'", "b": "µ"}), ('v;a="b c"', {"a": "b c"}),
    ('v;a="b\\"c";d=e', {"a": 'b"c', "d": "e"}), ('v;a="c:\\\\"', {"a": "c:\\"}), ('v;a="c:\\"', {"a": "c:\\"}),
    ('v;a="b\\\\\\"c"', {"a": 'b\\"c'}), ('v; a="C:\\folder\\test.png"', {"a": "C:\\folder\\test.png"}),
    ('v; a="John \\"Magic\\" Smith.png"', {"a": 'John "Magic" Smith.png'}),
    ('v; a="utf8";\t   foo=bar;test', {"a": "utf8", "foo": "bar"}), ('v; a=""', {"a": ""}),
    ('v; a="utf-8"garbage; b=test', {"a": "utf-8", "b": "test"}),
    ('v; a="payload.jpg".html', {"a": "payload.jpg"}), ('v; a="test.pdf"extra.txt', {"a": "test.pdf"}),
    ('v; a="hello"  ; b="world.png"', {"a": "hello", "b": "world.png"}), ("v; A=b", {"a": "b"}),
])
def test_parameters(value, wanted):
    kind, parameters = kapow.parse_parameters(value.encode())
    assert kind == b"v"
    assert {name.decode(): text.decode() for name, text in parameters.items()} == wanted


@pytest.mark.parametrize("value, wanted", [
    ("a*=ASCII'en'b", "b"), ("a*=US-ASCII''%62", "b"), ("a*=UTF-8''%C2%B5", "µ"),
    ("a*=UTF-8'''%F0%9F%90%8D'.txt", "'🐍'.txt"), ('a="🐍.txt"', "🐍.txt"), ("a*0=b;a*1=c;d=e", "bc"),
    ("a*0*=b", "b"), ("a*0*=UTF-8''b;a*1=c;a*2*=%C2%B5", "bcµ"), ('a="b%22c"', 'b"c'),
    ("a*=iso-8859-1'en'%A3%20rates", "£ rates"), ("a*=utf-8''%c2%a3%20and%20%e2%82%ac%20rates", "£ and € rates"),
    ("a*=utf-8''%E6%B5%8B%E8%AF%95%E6%96%87%E6%A1%A3", "测试文档"), ("a*=iso-8859-1'en';", ""),
])
def test_encoded_parameters(value, wanted):
    _, parameters = kapow.parse_parameters(b"v;" + value.encode())
    assert kapow.part_parameter(parameters, b"a").decode() == wanted


# Werkzeug as an oracle: bodies of pieces that mean something, so that many are nearly right. Left out
# is what the two decide differently: bare CR, parts without a name, header lines without a colon.
COMMON = settings(deadline=None, derandomize=True, max_examples=400)
DISPOSITION = b"Content-Disposition: form-data; name="
PIECES = [b"--B\r\n", b"--B--", b"--B--\r\n", b"\r\n--B\r\n", b"\r\n--B--", b"--Bx\r\n", b"--B \r\n", b"\r\n", b"x",
          b"\r\n--B", b"--", DISPOSITION + b'"a"\r\n\r\n', DISPOSITION + b'"f"; filename="g"\r\n\r\n',
          b"X: y\r\n" + DISPOSITION + b"b\r\n\r\nvalue", b"\0\xff"]
PARTS = [b"--B\r\n" + DISPOSITION + b'"%b"\r\n\r\n%b\r\n' % pair for pair in [
    (b"a", b"1"), (b"b", b""), (b'f"; filename="g', b"\xff\0"), (b"a", b"--\r\n\r\n")]]


def werkzeug_multipart(data):
    """Return the form as outcome() does, by name and kind; None when werkzeug refuses it."""
    try:
        form, files = MultiPartParser().parse(io.BytesIO(data), b"B", len(data))
    except ValueError:
        return None
    found = {(name, None): form.getlist(name) for name in form}
    for name, file in files.items(multi=True):
        found.setdefault((name, file.filename), []).append(file.read().decode("utf-8", "replace"))
    return found


def our_multipart(data, step):
    """As werkzeug_multipart."""
    try:
        fields = user_request(data, b"multipart/form-data; boundary=B", step)
    except kapow.ApiError as error:
        assert error.status == 400
        return None
    found = {}
    for name, filename, content in fields:
        key = name.decode(), filename if filename is None else filename.decode()
        found.setdefault(key, []).append(content.decode("utf-8", "replace"))
    return found


def agree(data, step):
    """Compare the two, unless a part has no name; where only werkzeug takes the body there must be a reason."""
    ours, theirs = our_multipart(data, step), werkzeug_multipart(data)
    headers = [(b"\r\n" + part).partition(b"\r\n\r\n")[0] for part in re.split(rb"--B *\r\n", data)[1:]]
    if any(b"\r\n" + DISPOSITION not in header for header in headers) and ours is not None:
        return                      # we pass over it
    if ours is None and theirs is not None:
        # It takes any line for a header field, a delimiter too.
        assert any(b":" not in line or line.startswith(b"--B") for header in headers
                   for line in header.split(b"\r\n") if line), data
    else:
        assert ours == theirs, data


@COMMON
@given(st.lists(st.sampled_from(PARTS), max_size=4), st.data())
def test_cut_forms_against_werkzeug(parts, data):
    """A right form, cut or with a few bytes gone or added."""
    body = b"".join(parts) + b"--B--\r\n"
    place = data.draw(st.integers(0, len(body)))
    change = data.draw(st.sampled_from(["cut", "none", "delimiter"]))
    if change == "cut":
        body = body[:place]
    elif change == "delimiter":
        body = body.replace(b"--B", b"--C", 1) if data.draw(st.booleans()) else body.replace(b"--B--", b"--B")
    agree(body, data.draw(st.integers(1, 100)))


@COMMON
@given(st.lists(st.tuples(st.sampled_from(["a", "b c", "n;x", "é", ""]),
                          st.one_of(st.none(), st.sampled_from(["f.txt", "x;y=z", "é", ""])),
                          st.lists(st.sampled_from(PIECES), max_size=4).map(b"".join)), max_size=4),
       st.integers(1, 60), st.booleans())
def test_forms_against_werkzeug(parts, step, ends):
    """Contents full of delimiters and of what nearly is one."""
    body = b""
    for name, filename, content in parts:
        name = f'"{name}"' if filename is None else f'"{name}"; filename="{filename}"'
        body += b"--B\r\n" + DISPOSITION + name.encode() + b"\r\n\r\n" + content + b"\r\n"
    body += b"--B--\r\n" if ends else b""
    agree(body, step)


@COMMON
@given(st.lists(st.sampled_from([b"a", b"b=", b"=", b"&", b"+", b"%41", b"%", b"%4", b"%C3%A9", b"%00", b";", b"=c&"]),
                max_size=20).map(b"".join), st.integers(1, 30))
def test_urlencoded_against_werkzeug(data, step):
    request = Request.from_values(input_stream=io.BytesIO(data), content_length=len(data), method="POST",
                                  content_type="application/x-www-form-urlencoded")
    ours = user_request(data, b"application/x-www-form-urlencoded", step)
    try:
        ours = [(name.decode(), value.decode()) for name, _, value in ours]
    except UnicodeDecodeError:      # of which it leaves the escapes
        return
    assert sorted(ours) == sorted(request.form.items(multi=True))
