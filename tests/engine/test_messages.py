"""What one process sends is what the other reads, and nothing else is read at all."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tolserve.engine.look import Attribution, Frequency, RowView, Scored, TokenView
from tolserve.engine.messages import (
    Abort,
    AskAttribution,
    AskCache,
    AskMetrics,
    AskPacks,
    AskToken,
    Attributed,
    Declined,
    FromEngine,
    Heartbeat,
    Hello,
    MetricsSnapshot,
    Packs,
    Progress,
    Ready,
    Refusal,
    Reopen,
    Reopened,
    Resize,
    Resized,
    Submit,
    ToEngine,
    TokenSeen,
    decode_from_engine,
    decode_to_engine,
    encode,
)
from tolserve.engine.request import Delta, Failure, PackView, Request, SamplingParams, Steering, TokenLogprob, Usage
from tolserve.metrics import Metric, Sample
from tolserve.tol.view import CacheSizes, TierSize

ids = st.text(max_size=20)
tokens = st.integers(0, 2**31)
counts = st.integers(0, 2**53)
floats = st.floats(allow_nan=False)
optional_count = st.one_of(st.none(), st.integers(0, 20))

sampling = st.builds(
    SamplingParams,
    max_tokens=counts,
    temperature=floats,
    top_k=counts,
    top_p=floats,
    min_p=floats,
    seed=st.integers(0, 2**64 - 1),
    choice=counts,
    stop_token_ids=st.lists(tokens, max_size=4).map(tuple),
    ignore_eos=st.booleans(),
    logprobs=optional_count,
    prompt_logprobs=optional_count,
)
steering = st.builds(Steering, st.lists(floats, max_size=3).map(tuple), st.lists(ids, max_size=3).map(tuple))
requests = st.builds(
    Request,
    ids,
    st.lists(tokens, max_size=20).map(tuple),
    sampling,
    st.one_of(st.none(), ids),
    st.one_of(st.none(), steering),
)
scores = st.builds(TokenLogprob, tokens, floats, st.lists(st.tuples(tokens, floats), max_size=3).map(tuple))
usages = st.builds(Usage, counts, counts, counts, counts, counts, floats)
deltas = st.builds(
    Delta,
    ids,
    st.lists(tokens, max_size=5),
    usages,
    st.one_of(st.none(), st.lists(scores, max_size=3)),
    st.one_of(st.none(), st.lists(st.one_of(st.none(), scores), max_size=3)),
    st.sampled_from([None, "stop", "length"]),
    st.one_of(st.none(), st.lists(st.one_of(st.none(), st.booleans()), max_size=3)),
)
kinds = st.sampled_from(["invalid", "busy", "table", "engine", "dead", "stopping"])
failures = st.builds(Failure, ids, kinds, st.text(), st.one_of(st.none(), ids))
packs = st.builds(PackView, ids, optional_count, optional_count, st.none() | ids, st.booleans(), st.none() | ids)
series = st.builds(Sample, st.lists(ids, max_size=2).map(tuple), floats, st.lists(counts, max_size=4))
metrics = st.builds(
    Metric,
    ids,
    st.sampled_from(["counter", "gauge", "histogram"]),
    st.text(),
    st.lists(ids, max_size=2).map(tuple),
    st.lists(floats, max_size=4).map(tuple),
    st.lists(series, max_size=3),
)
tiers = st.builds(TierSize, counts, counts)
sizes = st.builds(CacheSizes, tiers, tiers)
declined = st.builds(Declined, st.sampled_from(["invalid", "memory", "busy", "conflict", "table"]), st.text())
facts = st.dictionaries(ids, st.one_of(st.none(), counts, ids, st.lists(counts, max_size=3)), max_size=3)
numbers = st.lists(counts, max_size=3)
scored = st.lists(st.builds(Scored, tokens, floats), max_size=3)
rows = st.builds(RowView, counts, floats, st.one_of(st.none(), floats), scored, scored, scored)
frequencies = st.builds(Frequency, counts, floats, counts)
views = st.builds(
    TokenView,
    tokens,
    st.sampled_from([None, "device", "host", "disk"]),
    st.one_of(st.none(), frequencies),
    counts,
    st.lists(rows, max_size=2),
)
column = st.lists(floats, max_size=3)
matrix = st.lists(column, max_size=3)
parts = st.one_of(st.none(), matrix)
attributions = st.builds(Attribution, numbers, column, column, matrix, parts, parts)
to_engine: st.SearchStrategy[ToEngine] = st.one_of(
    st.builds(Submit, requests),
    st.builds(Abort, ids),
    st.just(Hello()),
    st.just(AskMetrics()),
    st.builds(AskCache, counts),
    st.just(AskPacks()),
    st.builds(Resize, st.one_of(st.none(), ids), st.one_of(st.none(), ids)),
    st.just(Reopen()),
    st.builds(AskToken, tokens, st.one_of(st.none(), numbers), counts),
    st.builds(AskAttribution, requests, st.one_of(st.none(), numbers), st.one_of(st.none(), tokens)),
)
from_engine: st.SearchStrategy[FromEngine] = st.one_of(
    st.builds(Ready, counts, counts, counts, st.one_of(st.none(), ids), st.one_of(st.none(), ids)),
    st.builds(Progress, st.lists(deltas, max_size=3)),
    st.builds(Refusal, failures),
    st.builds(MetricsSnapshot, st.lists(metrics, max_size=3)),
    st.builds(Heartbeat, floats),
    st.builds(Packs, st.one_of(st.none(), st.lists(packs, max_size=3)), st.one_of(st.none(), declined)),
    st.builds(Resized, st.one_of(st.none(), sizes), st.one_of(st.none(), declined)),
    st.builds(Reopened, st.one_of(st.none(), facts), st.one_of(st.none(), declined)),
    st.builds(TokenSeen, st.one_of(st.none(), views), st.one_of(st.none(), declined)),
    st.builds(Attributed, st.one_of(st.none(), attributions), st.one_of(st.none(), declined)),
)


@given(to_engine)
@settings(max_examples=60)
def test_what_is_sent_to_the_engine_arrives(message: ToEngine) -> None:
    read = decode_to_engine(encode(message))
    assert read == message
    assert type(read) is type(message)


@given(from_engine)
@settings(max_examples=60)
def test_what_the_engine_sends_arrives(message: FromEngine) -> None:
    read = decode_from_engine(encode(message))
    assert read == message
    assert type(read) is type(message)


@given(st.binary(max_size=64))
@settings(max_examples=100)
def test_garbage_is_refused(frame: bytes) -> None:
    for decode in (decode_to_engine, decode_from_engine):
        with pytest.raises(msgspec.MsgspecError):
            decode(frame)


@given(to_engine, from_engine)
@settings(max_examples=20)
def test_a_message_in_the_wrong_direction_is_refused(up: ToEngine, down: FromEngine) -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_from_engine(encode(up))
    with pytest.raises(msgspec.ValidationError):
        decode_to_engine(encode(down))


@given(st.one_of(to_engine, from_engine), st.data())
@settings(max_examples=40)
def test_a_message_that_is_cut_off_is_refused(message: ToEngine | FromEngine, data: st.DataObject) -> None:
    frame = encode(message)
    cut = frame[: data.draw(st.integers(0, len(frame) - 1))]
    for decode in (decode_to_engine, decode_from_engine):
        with pytest.raises(msgspec.MsgspecError):
            decode(cut)


@pytest.mark.parametrize(
    "changed",
    [
        {"request_id": 7},
        {"prompt": "text"},
        {"prompt": [1, "2"]},
        {"prompt": [1.5]},
        {"sampling": None},
        {"sampling": {"max_tokens": "many"}},
        {"sampling": {}},
    ],
)
def test_a_request_of_the_wrong_types_is_refused(changed: dict[str, object]) -> None:
    right = {"request_id": "r", "prompt": [1], "sampling": {"max_tokens": 3}}
    frame = msgspec.msgpack.encode({"type": "submit", "request": right})
    assert decode_to_engine(frame) == Submit(Request("r", (1,), SamplingParams(max_tokens=3)))
    with pytest.raises(msgspec.ValidationError):
        decode_to_engine(msgspec.msgpack.encode({"type": "submit", "request": right | changed}))
