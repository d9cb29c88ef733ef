"""Clients that do not finish what they begin."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import h11
import pytest
import uvicorn

from tolserve.api.listener import TimedProtocol

HEADERS, BODY = 0.3, 0.6
REQUEST = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\n"


class Hasty(TimedProtocol):
    limits = {h11.IDLE: HEADERS, h11.SEND_BODY: BODY}  # noqa: RUF012


async def answer_slowly(scope: Any, receive: Any, send: Any) -> None:
    while (message := await receive()).get("more_body"):
        pass
    if message["type"] == "http.disconnect":
        return
    await asyncio.sleep(2 * BODY)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    server = uvicorn.Server(uvicorn.Config(answer_slowly, port=0, http=Hasty, lifespan="off", log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()
    server.should_exit = True
    thread.join()


def seconds_until_closed(connection: socket.socket, trickle: bytes) -> float:
    """How long a client lasts that sends a byte now and then."""
    began = time.monotonic()
    connection.settimeout(0.05)
    for byte in trickle:
        try:
            connection.sendall(bytes([byte]))
            if connection.recv(100) == b"":
                break
        except TimeoutError:
            continue
        except OSError:
            break
    else:
        raise AssertionError("the server waited for all of it")
    return time.monotonic() - began


def test_headers_that_never_end(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as connection:
        assert seconds_until_closed(connection, b"G" * 300) >= HEADERS - 0.1


def test_headers_that_stop_before_their_end(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(REQUEST[:-1])
        assert connection.recv(100) == b""


def test_a_body_that_never_ends(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(REQUEST.replace(b"4", b"4000"))
        assert seconds_until_closed(connection, b"x" * 400) >= BODY - 0.1


def test_a_connection_that_says_nothing(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=30) as connection:
        assert connection.recv(100) == b""


def test_whole_requests_are_answered_however_long_that_takes(address: tuple[str, int]) -> None:
    """Also the second one on a connection that was idle for longer than headers may take."""
    with socket.create_connection(address, timeout=30) as connection:
        for _ in range(2):
            connection.sendall(REQUEST + b"body")
            answer = b""
            while not answer.endswith(b"ok"):
                received = connection.recv(1000)
                assert received
                answer += received
            time.sleep(2 * HEADERS)
