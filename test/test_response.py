"""Section 5 of kapow.py: the response under construction and its handler. No sockets."""

import threading

import pytest

import kapow
from conftest import DEADLINE


def refused(reason, call, *arguments):
    with pytest.raises(kapow.ApiError) as caught:
        call(*arguments)
    assert caught.value.reason == reason


def write(response, data, mode="body"):
    """Write `data` whole."""
    made = response.begin_write(mode)
    response.append(made, data)
    response.end_write(made)


def test_writes_in_the_order_of_their_begin():
    response = kapow.Draft()
    first, second, third = (response.begin_write("body") for _ in range(3))
    response.append(third, b"3")
    response.append(second, b"2")
    assert not response.available
    response.append(first, b"1")
    assert response.take_all() == b"1"
    response.append(first, b"1")
    response.end_write(third)
    response.end_write(first)
    assert response.take_all() == b"12"
    response.append(second, b"2")
    response.end_write(second)
    assert response.take_all() == b"23"
    assert (response.open_writes, response.take_all()) == (0, b"")


def test_late_write_waits_in_a_spool():
    response = kapow.Draft()
    first, second = (response.begin_write("body") for _ in range(2))
    for _ in range(40):
        response.append(second, b"x" * kapow.PIECE)
        assert not response.must_wait(second)
    while not response.must_wait(first):
        response.append(first, b"y" * kapow.PIECE)
    response.end_write(first)
    data = b"".join(response.take() for _ in range(kapow.WRITE_BUFFER // kapow.PIECE))
    assert data == b"y" * kapow.WRITE_BUFFER
    assert response.must_wait(second)       # which has become the front
    assert response.take_all() == b"x" * 40 * kapow.PIECE
    assert not response.must_wait(second)


def test_held_back_up_to_the_limit():
    response = kapow.Draft()
    write(response, b"x" * kapow.HOLD_LIMIT)
    response.set_status(b"404")
    assert not response.started
    write(response, b"x")
    assert response.started
    refused("Response Already Started", response.set_status, b"200")
    refused("Response Already Started", response.add_field, b"X", b"y")
    refused("Response Already Started", response.add_cookie, b"X", b"y")


def test_stream_starts_at_its_first_byte():
    response = kapow.Draft()
    stream = response.begin_write("stream")
    response.set_status(b"404")
    response.append(stream, b"x")
    refused("Response Already Started", response.set_status, b"200")


@pytest.mark.parametrize("one, other", [("body", "stream"), ("stream", "body")])
def test_exclusive(one, other):
    response = kapow.Draft()
    write(response, b"x", one)
    refused("Body And Stream Are Exclusive", response.begin_write, other)
    write(response, b"x", one)


@pytest.mark.parametrize("value, reason", [
    (b"", "Non Integer Value"), (b"abc", "Non Integer Value"), (b"20 0", "Non Integer Value"),
    (b" 200", "Non Integer Value"), (b"2_0", "Non Integer Value"), (b"200.0", "Non Integer Value"),
    (b"\xb2\xb2\xb2", "Non Integer Value"), (b"0x1", "Non Integer Value"),
    (b"199", "Invalid Status Code"), (b"1000", "Invalid Status Code"), (b"0", "Invalid Status Code"),
    (b"-200", "Invalid Status Code"), (b"0404", "Invalid Status Code"), (b"101", "Invalid Status Code"),
])
def test_status_refused(value, reason):
    response = kapow.Draft()
    refused(reason, response.set_status, value)
    assert not response.said_anything


@pytest.mark.parametrize("value", [b"200", b"404", b"599", b"600", b"999"])
def test_status(value):
    response = kapow.Draft()
    response.set_status(b"200")
    response.set_status(value)
    assert response.status == int(value)


@pytest.mark.parametrize("name, value", [
    (b"", b"x"), (b"a b", b"x"), (b"a:", b"x"), (b"a\n", b"x"), (b"\xe9", b"x"),
    (b"X", b"a\nb"), (b"X", b"a\rb"), (b"X", b"a\0b"), (b"X", b"\x7f"), (b"X", b"\r"),
    (b"Connection", b"close"), (b"transfer-encoding", b"chunked"), (b"Keep-Alive", b"x"),
    (b"Content-Length", b"x"), (b"Content-Length", b"-1"), (b"Content-Length", b""),
])
def test_header_refused(name, value):
    response = kapow.Draft()
    refused("Invalid Header", response.add_field, name, value)
    assert not response.said_anything and response.length is None


def test_headers():
    response = kapow.Draft()
    response.add_field(b"X", b" a\tb ")
    response.add_field(b"x", "é".encode())
    response.add_field(b"Content-Length", b"5")
    refused("Invalid Header", response.add_field, b"content-length", b"5")
    response.add_cookie(b"c", b"1; Path=/")
    refused("Invalid Header", response.add_cookie, b"c=d", b"1")
    refused("Invalid Header", response.add_cookie, b"c", b"1\r\nX: y")
    assert response.fields == [(b"X", b"a\tb"), (b"x", "é".encode()), (b"Content-Length", b"5"),
                               (b"Set-Cookie", b"c=1; Path=/")]


def say_nothing(response):
    """Say nothing."""


def say_empty_body(response):
    write(response, b"")


def say_status(response):
    response.set_status(b"201")


def say_header(response):
    response.add_field(b"X", b"y")


def say_cookie(response):
    response.add_cookie(b"X", b"y")


def say_body(response):
    write(response, b"body")


@pytest.mark.parametrize("say, succeeded, status, body", [
    (say_nothing, True, None, b""), (say_nothing, False, 500, kapow.reason_json(500)),
    (say_empty_body, True, None, b""), (say_empty_body, False, 500, kapow.reason_json(500)),
    (say_status, False, 201, b""), (say_header, True, None, b""),
    (say_header, False, 500, kapow.reason_json(500)), (say_cookie, False, 500, kapow.reason_json(500)),
    (say_body, False, None, b"body"), (say_body, True, None, b"body"),
])
def test_conclude(say, succeeded, status, body):
    response = kapow.Draft()
    say(response)
    assert (response.conclude(succeeded), response.status) == (body, status)


def make_handler():
    return kapow.Handler(None, None, {})


@pytest.mark.parametrize("returncode, succeeded", [
    (0, True), (1, False), (255, False), (-1, True), (-2, True), (-15, True), (-13, True),
    (-9, False), (-11, False), (-6, False), (129, False),
])
def test_exit_status(returncode, succeeded):
    handler = make_handler()
    handler.program_ended(kapow.is_clean(returncode))
    assert handler.next_step() == ("end", None)
    assert handler.succeeded == succeeded


def test_end_waits_for_writers():
    """The handler ends when the program has exited and the last write has ended, not before."""
    handler = make_handler()
    more = threading.Event()

    def pieces():
        yield b"first"
        assert more.wait(DEADLINE)
        yield b"last"
    writer = threading.Thread(target=handler.pour, args=("body", pieces()))
    writer.start()
    with handler.condition:
        assert handler.condition.wait_for(lambda: handler.response.said_anything, DEADLINE)
    handler.program_ended(True)
    assert not handler.finished
    more.set()
    assert handler.next_step() == ("end", None)
    writer.join()
    assert handler.response.take_all() == b"firstlast"
    refused("Handler ID Not Found", handler.pour, "body", [b"late"])


def test_slow_client_slows_the_program():
    handler = make_handler()
    given = []

    def pieces():
        for count in range(64):
            given.append(count)
            yield b"x" * kapow.PIECE
    writer = threading.Thread(target=handler.pour, args=("stream", pieces()))
    writer.start()
    with handler.condition:
        assert handler.condition.wait_for(
            lambda: handler.response._writes and handler.response.must_wait(
                handler.response._writes[0]), DEADLINE)
    assert len(given) <= kapow.WRITE_BUFFER // kapow.PIECE + 1
    received = 0
    while received < 64 * kapow.PIECE:
        step, data = handler.next_step()
        assert step == "data"
        received += len(data)
    writer.join(DEADLINE)
    assert not writer.is_alive()


def test_abort_kills_once_and_wakes_writers():
    handler, kills = make_handler(), []
    handler.launched(1, lambda: kills.append(1))
    writer = threading.Thread(target=handler.pour, args=("stream", [b"x" * kapow.PIECE] * 64))
    writer.start()
    assert handler.next_step()[0] == "data"
    handler.abort(499, "client")
    handler.abort(503, "stop")
    writer.join(DEADLINE)
    assert not writer.is_alive()
    assert (handler.next_step(), handler.aborted, handler.cause, kills) == (
        ("abort", None), 499, "client", [1])


def test_abort_before_the_program_runs():
    handler, kills = make_handler(), []
    handler.abort(499, "client")
    handler.launched(1, lambda: kills.append(1))
    assert kills == [1]
    late = make_handler()
    late.program_ended(True)
    late.launched(1, lambda: kills.append(2))
    assert late.next_step() == ("end", None)
    late.abort(504, "timeout")      # when only sending is left, nothing is killed
    assert (kills, late.aborted) == ([1], None)


def test_interrupt_only_while_the_handler_lives():
    hung_up = []
    handler = kapow.Handler(None, None, {}, lambda: hung_up.append("client"))
    with handler.calling(lambda: hung_up.append("gone before")):
        handler.interrupt()
    with handler.calling(lambda: hung_up.append("call")):
        handler.close()
    handler.interrupt()
    assert hung_up == ["client", "call"]


def test_ended_writes_are_waited_for_too():
    """Many small writes, one after the other, are no way around a slow client."""
    response = kapow.Draft()
    count = 0
    while True:
        made = response.begin_write("stream")
        response.append(made, b"x" * 1000)
        if response.must_wait(made):
            break
        response.end_write(made)
        count += 1
    assert count < kapow.WRITE_BUFFER // 1000 + 1
    while response.take():
        pass
    assert not response.must_wait(made)


def test_spools_share_their_memory():
    response = kapow.Draft()
    response.begin_write("body")
    for _ in range(5):
        later = response.begin_write("body")
        response.append(later, b"x" * (kapow.MEMORY_LIMIT - 1))
    spools = [made._spool for made in response._writes]
    assert sum(len(spool._memory) for spool in spools) <= kapow.MEMORY_LIMIT
    response.drop()


def test_table():
    handlers, handler = kapow.HandlerTable(), make_handler()
    with handlers.holding(handler):
        assert handlers.find(handler.id) is handler
        assert handlers.snapshot() == [handler]
    refused("Handler ID Not Found", handlers.find, handler.id)
    handlers.abort_all()
    with handlers.holding(handler):
        assert (handler.aborted, handler.cause) == (503, "stop")
