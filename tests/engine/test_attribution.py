"""What moved a logit: the addends add up to it, each is what a float64 reference says, and nothing is left behind."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from engine.driver import Answers, OpenEngine, assert_idle, collect, finish, open_engine, request, serve, submit
from engine.flights import open_ahead
from reference import Array, Reference
from tiny import tiny_config
from tol.tables import flip_byte, value
from tolserve.engine.attribution import NoRoom, attribute
from tolserve.engine.engine import Engine
from tolserve.engine.inspect import look_up
from tolserve.engine.look import Attribution
from tolserve.model.build import build_table
from tolserve.model.config import ModelConfig
from tolserve.tol.pager import RecordsUnavailable
from tolserve.tol.table import Table

VOCAB = 300
VARIANTS: dict[str, ModelConfig] = {
    "base": tiny_config("base"),
    "memory": tiny_config("memory"),
    "memory untied": tiny_config("memory", tie_word_embeddings=False, num_hidden_layers=5),
    **{f"flex {beta}": tiny_config("flex", flex_beta=beta) for beta in (1, 2, 3)},
}


class Addends(Reference):
    """The reference, with the rows rounded as a table rounds them, and what each layer adds to the stream."""

    def row(self, token: int, layer: int) -> Array:
        return torch.tensor(super().row(token, layer)).to(torch.bfloat16).double().numpy()

    def addends(self, tokens: list[int]) -> tuple[list[Array], dict[str, list[list[Array]]]]:
        """The embeddings, and by kind and layer the addends [S, d]."""
        embedding = self.weights["model.embed_tokens.weight"]
        begin = [embedding[token] for token in tokens]
        stream, found = begin, {"attention": [], "memory": [], "compute": []}
        for layer in range(self.config.num_hidden_layers):
            name = f"model.layers.{layer}."
            attended = self.attention([self.norm(x, name + "input_layernorm") for x in stream], name + "self_attn")
            middle = [x + a for x, a in zip(stream, attended, strict=True)]
            after = [self.after_attention(x, token, layer) for x, token in zip(middle, tokens, strict=True)]
            rows = [self.row(token, layer) for token in tokens] if self.config.has_memory else [0 * x for x in middle]
            found["attention"].append(attended)
            found["memory"].append(rows)
            found["compute"].append([y - x - row for x, y, row in zip(middle, after, rows, strict=True)])
            stream = after
        return begin, found


@pytest.fixture(scope="module", params=VARIANTS)
def served(
    request: pytest.FixtureRequest, model_dir_of: Callable[[ModelConfig], Path], cache_dir: Path
) -> Iterator[tuple[Engine, Addends]]:
    """An engine, and the reference of its weights."""
    model_dir = model_dir_of(VARIANTS[request.param])
    config = ModelConfig.load(model_dir)
    weights = {name: w.double().numpy() for name, w in load_file(model_dir / "model.safetensors").items()}
    with open_engine(model_dir, cache_dir, max_model_len=64) as engine:
        yield engine, Addends(config, weights)


def total(found: Attribution) -> Array:
    """All that the parts add up to, at each position."""
    layers = [np.array(part).sum(1) for part in (found.attention, found.memory, found.compute) if part is not None]
    return np.array(found.embedding) + sum(layers)


prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30)
tokens = st.integers(0, VOCAB - 1)


@given(prompt=prompts, against=st.none() | tokens, targets=st.none() | st.lists(tokens, min_size=30, max_size=30))
@settings(max_examples=25)
def test_the_parts_add_up_and_are_the_references(
    served: tuple[Engine, Addends], prompt: list[int], against: int | None, targets: list[int] | None
) -> None:
    engine, reference = served
    targets = targets[: len(prompt)] if targets is not None else None
    found = attribute(engine, request("a", prompt, 0), targets, against)
    config, weights = reference.config, reference.weights
    variant = config.ffn_variant
    assert (found.memory is None, found.compute is None) == (variant == "base", variant == "memory")

    logits = reference.logits(prompt)
    assert found.targets == (targets if targets is not None else [*prompt[1:], found.targets[-1]])
    at = np.arange(len(prompt))
    if targets is None:
        assert logits[-1][found.targets[-1]] == pytest.approx(logits[-1].max(), rel=1e-3)
    expected = logits[at, found.targets] - (logits[:, against] if against is not None else 0.0)
    scale = np.abs(logits).max()
    assert total(found) == pytest.approx(np.array(found.logits), abs=1e-5 * scale)
    assert np.array(found.logits) == pytest.approx(expected, abs=1e-3 * scale)

    begin, addends = reference.addends(prompt)
    stream = np.array(begin) + sum(np.array(layer) for kind in addends.values() for layer in kind)
    head = weights["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    outputs = head[found.targets] - (head[against] if against is not None else 0.0)
    rms = np.sqrt((stream**2).mean(1) + config.rms_norm_eps)
    directions = outputs * weights["model.norm.weight"] / rms[:, None]
    assert np.array(found.embedding) == pytest.approx((np.array(begin) * directions).sum(1), abs=1e-3 * scale)
    for kind, each in addends.items():
        if (part := getattr(found, kind)) is not None:
            by_layer = np.stack([(np.array(layer) * directions).sum(1) for layer in each], axis=1)
            assert np.array(part) == pytest.approx(by_layer, abs=1e-3 * scale)


def test_the_logits_are_those_that_requests_see(served: tuple[Engine, Addends]) -> None:
    """Differences of log-probabilities are differences of logits; the last target is the greedy token."""
    engine, _ = served
    prompt = [5, 9, 5, 70, 200, 13]
    found = attribute(engine, request("a", prompt, 0), None, 33)
    answer = serve(engine, [request("b", prompt, 1, logprobs=20, prompt_logprobs=20)])["b"]
    assert answer.tokens == found.targets[-1:]
    scored = [*(answer.prompt_logprobs or [])[1:], *answer.logprobs]
    other = attribute(engine, request("a", prompt, 0), [entry.top[0][0] for entry in scored if entry], 33)
    for entry, mine, best in zip(scored, found.logits, other.logits, strict=True):
        assert entry is not None
        assert best - mine == pytest.approx(entry.top[0][1] - entry.logprob, abs=1e-4)


def test_nothing_is_left_behind_and_others_are_not_disturbed(engine_of: OpenEngine) -> None:
    """In the midst of answers: the same tokens and log-probabilities, no block, pin or sequence more than before."""
    requests = [request("x", range(10, 20), 12, logprobs=2), request("y", range(30, 37), 9, logprobs=2)]
    with engine_of(device_cache="100%") as engine:
        quiet = serve(engine, requests)
        submit(engine, requests)
        answers: Answers = {}
        for _ in range(5):
            collect(answers, engine.step())
            free, known = engine.scheduler.pool.free, len(engine.scheduler.pool._block_of)
            attribute(engine, request("x", [1, 2, 3] * 9, 0), None, None)  # an id that runs is no matter
            assert engine.scheduler.pool.free == free
            assert len(engine.scheduler.pool._block_of) == known
        finish(engine, answers)
        assert {name: answer.text for name, answer in answers.items()} == {n: a.text for n, a in quiet.items()}
        assert_idle(engine)


def test_steps_ahead_are_landed_first(tiny_model_dir: Path, cache_dir: Path) -> None:
    """With a decode step on its way, attribution and a look change no answer, and see what they see alone."""
    requests = [request("x", range(10, 20), 12), request("y", range(30, 37), 9)]
    with open_ahead(tiny_model_dir, cache_dir, device_cache="100%") as engine:
        quiet = serve(engine, requests)
        alone = attribute(engine, request("a", [1, 2, 3] * 9, 0), None, None)
        submit(engine, requests)
        answers: Answers = {}
        flights = 0
        for _ in range(8):
            collect(answers, engine.step())
            flights += engine._flight is not None
            look_up(engine.runner, 15, None, 2)
            assert attribute(engine, request("x", [1, 2, 3] * 9, 0), None, None) == alone
        assert flights > 2
        finish(engine, answers)
        assert {name: answer.text for name, answer in answers.items()} == {n: a.text for n, a in quiet.items()}
        assert_idle(engine)


def test_records_are_looked_up_as_for_a_step(engine_of: OpenEngine) -> None:
    with engine_of(device_cache="16") as engine:
        attribute(engine, request("a", [5, 6, 7, 5], 0), None, None)
        attribute(engine, request("a", [5, 6, 8], 0), None, None)
        assert value(engine.registry, "tol_lookups_total") == 6
        assert value(engine.registry, "tol_hits_total") == 2
        assert_idle(engine)


@pytest.mark.parametrize(
    ("prompt", "targets", "against", "message"),
    [
        ([], None, None, "at least one"),
        ([1, 2], [1], None, "one for each"),
        ([1, VOCAB], None, None, "not below 300"),
        ([1, 2], [1, -1], None, "not below 300"),
        ([1, 2], None, VOCAB, "not below 300"),
        ([1] * 33, None, None, "33 tokens; 32 fit into one step"),
        (list(range(17)), None, None, "17 distinct tokens; the device tier has room for the records of 16"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    engine_of: OpenEngine, prompt: list[int], targets: list[int] | None, against: int | None, message: str
) -> None:
    with engine_of(device_cache="16", max_num_batched_tokens=32) as engine:
        with pytest.raises(ValueError, match=message):
            attribute(engine, request("a", prompt, 0), targets, against)
        assert_idle(engine)


def test_without_free_blocks_it_is_refused(engine_of: OpenEngine) -> None:
    with engine_of(device_cache="100%", kv_cache="16KiB", max_model_len=64) as engine:
        assert engine.scheduler.pool.blocks == 4
        submit(engine, [request("x", range(10, 60), 10)])
        engine.step()
        with pytest.raises(NoRoom, match="try again"):
            attribute(engine, request("a", [1, 2, 3], 0), None, None)
        engine.abort("x")
        attribute(engine, request("a", [1, 2, 3], 0), None, None)
        assert_idle(engine)


def test_a_record_that_cannot_be_read_fails_it_alone(
    tiny_model_dir: Path, engine_of: OpenEngine, tmp_path: Path
) -> None:
    build_table(tiny_model_dir, tmp_path / "table")
    flip_byte(Table.open(tmp_path / "table"), 33)
    with engine_of(device_cache="16", table=str(tmp_path / "table")) as engine:
        with pytest.raises(RecordsUnavailable, match="token 33"):
            attribute(engine, request("a", [3, 33, 4], 0), None, None)
        attribute(engine, request("a", [3, 4], 0), None, None)
        assert_idle(engine)
