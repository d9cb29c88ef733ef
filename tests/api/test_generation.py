"""Deltas to pieces to JSON: what a stream shows piece by piece is what the whole answer shows."""

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tolserve.api.chat import ChatShape
from tolserve.api.completions import CompletionShape, lay_out
from tolserve.api.errors import from_engine
from tolserve.api.generation import Answer, ChoiceText, Piece, UsageCount
from tolserve.api.tokenizer import ModelTokenizer, Prompt
from tolserve.engine.client import EngineError
from tolserve.engine.request import Delta, FinishReason, TokenLogprob, Usage
from tolserve.train.tokenizer import train_tokenizer

RAW: Tokenizer = train_tokenizer(["The old house — café 漢字 🙂 aab"], 290)
TOKENIZER = ModelTokenizer(RAW)
END = 0
IDS = st.lists(st.integers(0, RAW.get_vocab_size() - 1), min_size=1, max_size=16)
SIZES = st.lists(st.integers(1, 4), min_size=16, max_size=16)
USAGE = Usage(prompt_tokens=3, cached_tokens=0, completion_tokens=5, lookups=8, hits=6, stall_ms=1.5)


def scored(token: int) -> TokenLogprob:
    return TokenLogprob(token, -0.5 * token, ((END, -0.1), (token, -0.5 * token)))


def deltas_of(tokens: list[int], sizes: list[int], reason: FinishReason = "length") -> list[Delta]:
    """The tokens in deltas of the given sizes, the last with the reason."""
    deltas, at = [], 0
    for size in sizes:
        part = tokens[at : at + size]
        at += size
        last = at >= len(tokens)
        deltas.append(Delta("r", part, USAGE, [scored(t) for t in part], None, reason if last else None))
        if last:
            break
    return deltas


def feed_all(text: ChoiceText, deltas: list[Delta]) -> list[Piece]:
    pieces = []
    for delta in deltas:
        if (piece := text.feed(delta)) is not None:
            pieces.append(piece)
            if piece.finish_reason is not None:
                break
    return pieces


def joined(pieces: list[Piece]) -> Piece:
    whole = Piece()
    for piece in pieces:
        whole.extend(piece)
    return whole


@given(IDS, SIZES)
def test_text_is_that_of_the_tokens(tokens: list[int], sizes: list[int]) -> None:
    pieces = feed_all(ChoiceText(TOKENIZER, (), frozenset(), False), deltas_of(tokens, sizes))
    whole = joined(pieces)
    assert whole.text == RAW.decode(tokens, skip_special_tokens=True)
    assert whole.tokens == tokens
    assert [entry.token for entry in whole.logprobs] == tokens
    assert (whole.finish_reason, whole.usage) == ("length", USAGE)
    assert all(piece.text for piece in pieces[:-1])


@given(IDS, SIZES, st.sampled_from(["a", "e h", "字", " 🙂", "\ufffd"]), st.booleans())
def test_a_stop_string_ends_the_choice(tokens: list[int], sizes: list[int], stop: str, include: bool) -> None:
    whole = joined(feed_all(ChoiceText(TOKENIZER, [stop], frozenset(), include), deltas_of(tokens, sizes)))
    text = RAW.decode(tokens, skip_special_tokens=True)
    at = text.find(stop)
    if at < 0:
        assert (whole.text, whole.finish_reason, whole.tokens) == (text, "length", tokens)
    else:
        assert (whole.text, whole.finish_reason) == (text[: at + len(stop) * include], "stop")
        assert whole.tokens == tokens[: len(whole.tokens)]
        # No token more than the stop string needed; a decoded prefix may end in a U+FFFD of its own.
        assert stop == "\ufffd" or stop not in RAW.decode(whole.tokens[:-1], skip_special_tokens=True)


def test_the_beginning_of_a_stop_string_that_never_comes_is_shown_at_the_end() -> None:
    tokens = RAW.encode("The old").ids
    text = ChoiceText(TOKENIZER, ["old house"], frozenset(), False)
    assert joined(feed_all(text, deltas_of(tokens, [1] * len(tokens)))).text == "The old"


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_is_counted_and_shown_only_on_request(include: bool) -> None:
    a, b = RAW.token_to_id("a"), RAW.token_to_id("b")
    whole = joined(feed_all(ChoiceText(TOKENIZER, (), frozenset({b}), include), deltas_of([b, a, b], [1] * 3, "stop")))
    assert whole.text == ("bab" if include else "ba")
    assert whole.tokens == [b, a, b]
    assert whole.finish_reason == "stop"


@given(IDS, IDS, SIZES)
def test_offsets_say_where_tokens_begin(prompt: list[int], tokens: list[int], sizes: list[int]) -> None:
    """With every token's text whole, text_offset cuts an echoed answer into its tokens."""
    prompt, tokens = [t for t in prompt if ascii_token(t)], [t for t in tokens if ascii_token(t)]
    if not tokens:
        return
    shape = CompletionShape(TOKENIZER, [Prompt(tuple(prompt))], 1, echo=True, logprobs=True)
    piece = joined(feed_all(ChoiceText(TOKENIZER, (), frozenset(), False), deltas_of(tokens, sizes)))
    piece.prompt_logprobs = [None if i == 0 else scored(t) for i, t in enumerate(prompt)]
    choice = shape.whole(0, piece)
    offsets = choice["logprobs"]["text_offset"]
    cut = [choice["text"][a:b] for a, b in zip(offsets, [*offsets[1:], None], strict=True)]
    assert cut == choice["logprobs"]["tokens"] == [TOKENIZER.label(t) for t in prompt + tokens]
    assert len(choice["logprobs"]["token_logprobs"]) == len(choice["logprobs"]["top_logprobs"]) == len(offsets)


def ascii_token(token: int) -> bool:
    return token != END and TOKENIZER.to_bytes(token).isascii()


def test_an_echo_leaves_out_what_the_tokenizer_added() -> None:
    ids = RAW.encode("The old").ids
    assert lay_out(TOKENIZER, Prompt((END, *ids), frozenset({0})))[0] == "The old"
    assert lay_out(TOKENIZER, Prompt((END, *ids)))[0] == "<|endoftext|>The old"


def test_the_first_token_of_a_scored_prompt_has_no_logprob() -> None:
    shape = CompletionShape(TOKENIZER, [Prompt((1, 2))], 1, echo=True, logprobs=True)
    logprobs = shape.whole(0, Piece(finish_reason="length", prompt_logprobs=[None, scored(2)]))["logprobs"]
    assert logprobs["token_logprobs"] == [None, -1.0]
    assert logprobs["top_logprobs"] == [None, {TOKENIZER.label(2): -1.0, "<|endoftext|>": -0.1}]


def test_the_chosen_token_is_always_among_the_alternatives_and_json_stays_finite() -> None:
    shape = CompletionShape(TOKENIZER, [Prompt((1,))], 1, echo=False, logprobs=True)
    entry = TokenLogprob(5, float("-inf"), ((6, -0.25),))
    logprobs = shape.whole(0, Piece(tokens=[5], offsets=[0], logprobs=[entry]))["logprobs"]
    assert logprobs["top_logprobs"] == [{TOKENIZER.label(5): -9999.0, TOKENIZER.label(6): -0.25}]
    json.dumps(logprobs, allow_nan=False)


@given(IDS, SIZES, st.booleans(), st.booleans())
def test_chunks_add_up_to_the_whole(tokens: list[int], sizes: list[int], echo: bool, logprobs: bool) -> None:
    def shape() -> CompletionShape:
        return CompletionShape(TOKENIZER, [Prompt((1,)), Prompt((2, 3))], 1, echo, logprobs)

    def run() -> list[Piece]:
        return feed_all(ChoiceText(TOKENIZER, (), frozenset(), False), deltas_of(tokens, sizes))

    streaming = shape()
    chunks = [streaming.chunk(1, piece) for piece in run()]
    whole = shape().whole(1, joined(run()))
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    if logprobs:
        for key in ("tokens", "text_offset", "token_logprobs"):
            assert [value for chunk in chunks for value in chunk["logprobs"][key]] == whole["logprobs"][key]


@given(IDS, SIZES)
def test_chat_chunks_add_up_to_the_message(tokens: list[int], sizes: list[int]) -> None:
    def run() -> list[Piece]:
        return feed_all(ChoiceText(TOKENIZER, (), frozenset(), False), deltas_of(tokens, sizes))

    shape = ChatShape(TOKENIZER, logprobs=True)
    chunks = [shape.chunk(0, piece) for piece in run()]
    whole = ChatShape(TOKENIZER, logprobs=True).whole(0, joined(run()))
    assert chunks[0]["delta"]["role"] == "assistant"
    assert all("role" not in chunk["delta"] for chunk in chunks[1:])
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == whole["message"]["content"]
    content = [entry for chunk in chunks for entry in chunk["logprobs"]["content"]]
    assert content == whole["logprobs"]["content"]
    assert [bytes(entry["bytes"]) for entry in content] == [TOKENIZER.to_bytes(token) for token in tokens]


def test_usage_counts_a_prompt_once_and_every_choice() -> None:
    usage = UsageCount(3, 2)
    usage.add(0, Piece(tokens=[1, 2], usage=USAGE))  # so far: counted once, at the end
    usage.add(0, Piece(tokens=[3], finish_reason="length", usage=USAGE))
    usage.add(1, Piece(tokens=[4], finish_reason="length", usage=USAGE))
    assert usage.to_json() == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 0},
        "tol": {"lookups": 16, "hits": 12, "stall_ms": 3.0},
    }


@given(st.integers(1, 4), st.lists(st.integers(0, 64), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_of_a_prompt_is_cached_what_none_of_its_choices_computed(n: int, found: list[int], dice: random.Random) -> None:
    found = found[: max(1, len(found) // n) * n]
    usage = UsageCount(100 * len(found), n)
    for index in dice.sample(range(len(found)), len(found)):
        usage.add(index, Piece(finish_reason="stop", usage=USAGE._replace(cached_tokens=found[index])))
    least = sum(min(found[first : first + n]) for first in range(0, len(found), n))
    assert usage.to_json()["prompt_tokens_details"] == {"cached_tokens": least}


def test_envelopes() -> None:
    def answer(**changes: Any) -> Answer:
        return Answer("m", "0123456789abcdef", ChatShape(TOKENIZER, False), UsageCount(1, 1), **changes)

    whole = answer().whole({0: Piece("hi", finish_reason="stop")})
    assert (whole["object"], whole["model"], whole["system_fingerprint"]) == (
        "chat.completion",
        "m",
        "tol-0123456789ab",
    )
    assert whole["id"].startswith("chatcmpl-")
    assert "usage" not in answer().chunk(0, Piece("hi"))
    counting = answer(include_usage=True)
    assert counting.chunk(0, Piece("hi"))["usage"] is None
    assert counting.usage_chunk()["choices"] == []
    assert counting.usage_chunk()["usage"]["total_tokens"] == 1


@pytest.mark.parametrize(
    ("kind", "status"), [("invalid", 400), ("busy", 429), ("table", 500), ("engine", 500), ("dead", 503)]
)
def test_engine_errors_have_their_status(kind: str, status: int) -> None:
    error = from_engine(EngineError(kind, "why"))
    assert (error.status, error.message) == (status, "why")
    assert ("retry-after" in error.headers) == (status in (429, 503))
    assert (error.type == "table_error") == (kind == "table")
