"""The benchmark's clients count a stream's tokens, however its bytes come."""

import pytest
from serve import Stream

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
EVENT = b'data: {"id": "cmpl-1", "choices": []}\n\n'


def test_tokens_are_counted_wherever_they_are_split() -> None:
    whole = HEAD + 3 * EVENT + b"data: [DONE]\n\n"
    for size in (*range(1, 60), len(whole)):
        stream = Stream()
        assert all(stream.take(whole[at : at + size]) for at in range(0, len(whole), size))
        assert not stream.take(b"")
        assert len(stream.times) == 3


def test_a_refusal_ends_the_run() -> None:
    stream = Stream()
    assert stream.take(b"HTTP/1.")
    with pytest.raises(RuntimeError, match="429"):
        stream.take(b"1 429 Too Many Requests")
