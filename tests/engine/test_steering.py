"""Steered requests: what they add up to, that others do not notice, and that nobody finds their keys and values."""

import dataclasses
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.driver import (
    Answer,
    Answers,
    OpenEngine,
    assert_idle,
    collect,
    finish,
    replay,
    request,
    serve,
    serve_recorded,
    submit,
)
from engine.flights import open_ahead
from engine.test_engine import FLOAT32_BOUND, all_close, assert_same_output, prompt_of
from packs import Changes, apply, random_changes, save_pack
from tiny import random_model, tiny_config
from tol.tables import flip_byte, value
from tolserve.cli import main
from tolserve.engine.engine import Engine
from tolserve.engine.request import Request, Steering
from tolserve.model.blocks import rotary_tables
from tolserve.model.build import BuildOptions, build_table
from tolserve.model.checkpoint import compute_fingerprint, load_transformer, save_checkpoint
from tolserve.model.config import ModelConfig
from tolserve.model.transformer import Transformer, causal_attention
from tolserve.tol.table import Table

LAYERS = 2
PACKS = 4


@pytest.fixture(scope="module")
def changes(tiny_model_dir: Path) -> list[Changes]:
    """Of overlapping sets of tokens, the last of none."""
    return [
        *(random_changes(tiny_model_dir, seed, random.Random(seed).sample(range(300), 150)) for seed in range(PACKS)),
        {},
    ]


@pytest.fixture(scope="module")
def packs(tiny_model_dir: Path, changes: list[Changes], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the packs p0 to p3, and p4, which is empty."""
    folder = tmp_path_factory.mktemp("packs")
    for index, each in enumerate(changes):
        save_pack(folder / f"p{index}.safetensors", tiny_model_dir, each)
    return str(folder)


def steered(asked: Request, alpha: float | Iterable[float] = 1.0, *edits: str) -> Request:
    numbers = (alpha,) * LAYERS if isinstance(alpha, int | float) else tuple(alpha)
    return dataclasses.replace(asked, steering=Steering(numbers, edits))


def scored(name: str, seed: int, max_tokens: int = 8) -> Request:
    return request(name, prompt_of(30, seed), max_tokens, logprobs=1, prompt_logprobs=0)


def reference(model: Transformer, tokens: list[int], alpha: tuple[float, ...], packs: list[Changes]) -> Tensor:
    """Log-probabilities [S, V] of the training form, whose rows are changed one by one."""
    ids = torch.tensor(tokens)[None]
    cos, sin = rotary_tables(model.config, len(tokens), ids.device)
    embedding = model.model.embed_tokens(ids)

    def add_row(layer: int, x: Tensor) -> Tensor:
        rows = model.model.layers[layer].memory_row(embedding).to(torch.bfloat16).float()[0]
        pairs = zip(tokens, rows, strict=True)
        return x + torch.stack([apply(row, token, layer, alpha[layer], packs) for token, row in pairs])

    return model.logits(model.hidden(ids, causal_attention(cos, sin), add_row)).log_softmax(-1)[0]


def scores_of(answer: Answer) -> Tensor:
    scores = [score for score in answer.prompt_logprobs or [] if score is not None] + answer.logprobs
    return torch.tensor([score.logprob for score in scores])


@settings(max_examples=40)
@given(
    alpha=st.tuples(*[st.sampled_from([0.0, 1.0, 0.5, -0.7, 1.5])] * LAYERS),
    which=st.lists(st.integers(0, PACKS), max_size=4),
    seed=st.integers(0, 99),
    step=st.sampled_from([7, 512]),
)
def test_a_layer_adds_alpha_times_what_the_packs_make_of_the_row(
    engine_of: OpenEngine,
    tiny_model_dir: Path,
    packs: str,
    changes: list[Changes],
    alpha: tuple[float, ...],
    which: list[int],
    seed: int,
    step: int,
) -> None:
    """Against the training form, which changes one row after the other."""
    model = load_transformer(tiny_model_dir, with_memory=True, dtype=torch.float32)
    asked = steered(scored("r", seed), alpha, *(f"p{index}" for index in which))
    with engine_of(packs=packs, device_cache="40", max_num_batched_tokens=step) as engine:
        answer = serve(engine, [asked])["r"]
        assert_idle(engine)
    tokens = [*asked.prompt, *answer.tokens]
    dense = reference(model, tokens, alpha, [changes[index] for index in which])[:-1]
    own = dense.gather(-1, torch.tensor(tokens[1:])[:, None]).squeeze(-1)
    assert (scores_of(answer) - own).abs().max() < 10 * FLOAT32_BOUND  # rows are up to four times as large
    new = slice(len(asked.prompt) - 1, None)
    assert (dense[new].amax(-1) - own[new]).max() < 10 * FLOAT32_BOUND, "a greedy token is not the best one"


ENCODINGS = {"bf16": BuildOptions(), "int4": BuildOptions("int4", group_size=32), "lowrank": BuildOptions(rank=8)}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_alpha_one_and_an_empty_pack_change_no_bit(
    engine_of: OpenEngine, tiny_model_dir: Path, tmp_path: Path, packs: str, encoding: str
) -> None:
    build_table(tiny_model_dir, tmp_path / "tol", ENCODINGS[encoding])
    plain = [scored(f"r{index}", index, 5 + index) for index in range(5)]
    asked = [steered(each, 1.0, *["p4"] * (index % 3)) if index != 2 else each for index, each in enumerate(plain)]
    options = {"table": str(tmp_path / "tol"), "any_encoding": True, "device_cache": "100%", "packs": packs}
    with engine_of(**options) as engine:
        expected, steps = serve_recorded(engine, {0: plain[:3], 2: plain[3:]})
    with engine_of(**options) as engine:
        found = replay(engine, asked, steps)
        assert_idle(engine)
    assert {name: answer.text for name, answer in found.items()} == {
        name: answer.text for name, answer in expected.items()
    }


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_alpha_zero_is_a_model_whose_records_are_zero(
    engine_of: OpenEngine, tiny_model_dir: Path, tmp_path: Path, encoding: str
) -> None:
    config = ModelConfig.load(tiny_model_dir)
    state = load_transformer(tiny_model_dir, with_memory=True, dtype=torch.bfloat16).state_dict()
    silent = {name: torch.zeros_like(t) if "memory.down_proj" in name else t for name, t in state.items()}
    save_checkpoint(tmp_path, config, silent, compute_fingerprint(config, silent))
    build_table(tiny_model_dir, tmp_path / "own", ENCODINGS[encoding])
    build_table(tmp_path, tmp_path / "zero", ENCODINGS[encoding])
    options = {"device_cache": "100%", "any_encoding": True}
    plain = [scored(f"r{index}", index, 6) for index in range(4)]
    with engine_of(tmp_path, table=str(tmp_path / "zero"), **options) as engine:
        expected, steps = serve_recorded(engine, {0: plain})
    with engine_of(table=str(tmp_path / "own"), **options) as engine:
        found = replay(engine, [steered(each, 0.0) for each in plain], steps)
        assert [found[each.request_id].text for each in plain] == [expected[each.request_id].text for each in plain]
        dropped = serve(engine, [steered(plain[0], (0.0, 1.0))])["r0"]
        assert not all_close([*dropped.logprobs], [*expected["r0"].logprobs])


def test_a_pack_of_all_of_another_models_rows_makes_one_that_model(
    engine_of: OpenEngine, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """To the last bit: `tolserve pack --from`, loaded and applied."""
    config, other = ModelConfig.load(tiny_model_dir), random_model(tiny_config(), seed=3).state_dict()
    state = load_transformer(tiny_model_dir, with_memory=True, dtype=torch.bfloat16).state_dict()
    state |= {name: weight.to(torch.bfloat16) for name, weight in other.items() if "memory" in name}
    save_checkpoint(tmp_path / "other", config, state, compute_fingerprint(config, state))
    every = ",".join(map(str, range(config.vocab_size)))
    words = ["--from", str(tmp_path / "other"), "--tokens", every, "--out", str(tmp_path / "packs" / "p.safetensors")]
    assert main(["pack", str(tiny_model_dir), *words]) == 0
    plain = [scored(f"r{index}", index, 6) for index in range(4)]
    with engine_of(tmp_path / "other", device_cache="100%") as engine:
        expected, steps = serve_recorded(engine, {0: plain})
    with engine_of(device_cache="100%", packs=str(tmp_path / "packs")) as engine:
        found = replay(engine, [steered(each, 1.0, "p") for each in plain], steps)
        assert_idle(engine)
        unlike = serve(engine, [plain[0]])["r0"]
    assert [found[each.request_id].text for each in plain] == [expected[each.request_id].text for each in plain]
    assert not all_close([*unlike.logprobs], [*expected["r0"].logprobs])


def mixed() -> list[Request]:
    """Half of them steered, no two alike, many of one text."""
    kinds: list[tuple[Any, ...]] = [(1.0, "p0"), (1.0, "p1"), (0.5, "p0", "p2"), ((0.0, 1.0),), (1.0, "p3", "p1")]
    requests = [scored(f"r{index}", index % 3, 4 + index) for index in range(10)]
    return [steered(each, *kinds[index // 2]) if index % 2 else each for index, each in enumerate(requests)]


@pytest.mark.parametrize(
    "options",
    [
        {"device_cache": "100%"},
        {"device_cache": "12", "max_num_batched_tokens": 9},
        {"device_cache": "30", "host_cache": "30", "max_num_seqs": 3},
    ],
)
@pytest.mark.parametrize("ahead", [False, True])
def test_a_batch_of_many_packs_gives_each_what_it_gets_alone(
    engine_of: OpenEngine, tiny_model_dir: Path, cache_dir: Path, packs: str, options: dict[str, Any], ahead: bool
) -> None:
    alone = {}
    with engine_of(device_cache="100%") as engine:
        plain = serve(engine, [each for each in mixed() if each.steering is None])
    with engine_of(device_cache="100%", packs=packs, prefix_cache=False) as engine:
        for each in mixed():
            alone |= serve(engine, [each])
    assert_same_output({name: alone[name] for name in plain}, plain)
    assert len({tuple(answer.tokens[:4]) for answer in alone.values()}) > 5, "steering shows"
    opened = (
        open_ahead(tiny_model_dir, cache_dir, packs=packs, **options) if ahead else engine_of(packs=packs, **options)
    )
    with opened as engine:
        assert_same_output(serve(engine, mixed()), alone)
        assert_idle(engine)
        assert not [pack for pack in store_of(engine)._loaded.values() if pack.users]


def test_who_steers_is_in_no_step_that_runs_ahead(
    engine_of: OpenEngine, tiny_model_dir: Path, cache_dir: Path, packs: str
) -> None:
    """Also when it sat out the step before, which ran ahead without it."""
    asked = [steered(scored("steered", 0), 1.0, "p0"), scored("a", 1), scored("b", 2)]
    asked = [dataclasses.replace(each, sampling=dataclasses.replace(each.sampling, logprobs=None)) for each in asked]
    with engine_of(device_cache="100%", packs=packs) as engine:
        alone = {name: answer for each in asked for name, answer in serve(engine, [each]).items()}
    with open_ahead(tiny_model_dir, cache_dir, device_cache="100%", packs=packs) as engine:
        submit(engine, asked)
        answers: Answers = {}
        collect(answers, engine.step())
        collect(answers, engine._start(engine.scheduler.schedule({"steered"})))
        assert engine._flight is not None
        assert_same_output(finish(engine, answers), alone)
        assert_idle(engine)


def store_of(engine: Engine) -> Any:
    assert engine.packs is not None
    return engine.packs


def cached(answer: Answer) -> int:
    assert answer.usage is not None
    return answer.usage.cached_tokens


def test_keys_and_values_are_found_by_the_same_steering_alone(
    engine_of: OpenEngine, tiny_model_dir: Path, packs: str, tmp_path: Path
) -> None:
    """Also a copy of a pack under another name is the same, and a changed one is not."""
    copy = tmp_path / "packs"
    copy.mkdir()
    for path in Path(packs).iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
        (copy / f"again-{path.name}").write_bytes(path.read_bytes())
    text = prompt_of(40, 0)
    kinds: list[tuple[Any, ...]] = [
        (0.5,), ((0.5, 1.0),), ((1.0, 0.5),), (1.0, "p0"), (1.0, "p1"), (1.0, "p0", "p1"), (1.0, "p1", "p0"),
        (0.5, "p0"),
    ]  # fmt: skip
    with engine_of(device_cache="100%", packs=str(copy)) as engine:

        def ask(*kind: Any) -> int:
            asked = request("r", text, 1)
            return cached(serve(engine, [steered(asked, *kind) if kind else asked])["r"])

        assert [ask(), *(ask(*kind) for kind in kinds)] == [0] * 9
        assert [ask(), *(ask(*kind) for kind in kinds)] == [32] * 9
        assert ask(1.0, "again-p0") == 32
        save_pack(copy / "p0.safetensors", tiny_model_dir, random_changes(tiny_model_dir, 77, range(50)))
        assert ask(1.0, "p0") == 0
        assert ask(1.0, "again-p0") == 32
        assert_idle(engine)


def test_what_cannot_be_steered_is_refused_and_harms_nobody(
    engine_of: OpenEngine, model_dir_of: Callable[[ModelConfig], Path], packs: str
) -> None:
    with engine_of(device_cache="100%", packs=packs) as engine:
        submit(engine, [steered(scored("fine", 0), 1.0, "p0")])
        for asked, message in (
            (steered(scored("r", 0), (1.0,) * 3), "3 numbers; this model has 2 layers"),
            (steered(scored("r", 0), 1.0, "p0", "nothing"), "'nothing' does not exist"),
            (steered(scored("r", 0), 1.0, "../p0"), "does not exist"),
        ):
            failure = engine.add(asked)
            assert failure is not None
            assert (failure.kind, failure.param) == ("invalid", "tol")
            assert message in failure.message
        assert finish(engine)["fine"].failure is None
        assert_idle(engine)
        assert value(engine.registry, "steered_requests_total") == 1
    with engine_of(device_cache="100%") as engine:
        failure = engine.add(steered(scored("r", 0), 1.0, "p0"))
        assert failure is not None
        assert "no packs" in failure.message
    with engine_of(model_dir_of(tiny_config("base"))) as engine:
        failure = engine.add(steered(scored("r", 0)))
        assert failure is not None
        assert "no table" in failure.message


def test_an_aborted_request_lets_its_packs_go(engine_of: OpenEngine, packs: str) -> None:
    with engine_of(device_cache="100%", packs=packs) as engine:
        submit(engine, [steered(scored("r", 0, 50), 1.0, "p0", "p1")])
        engine.step()
        assert [pack.users for pack in store_of(engine)._loaded.values()] == [1, 1]
        engine.abort("r")
        assert [pack.users for pack in store_of(engine)._loaded.values()] == [0, 0]
        assert_idle(engine)


def test_a_busy_server_of_packs_says_so(engine_of: OpenEngine, packs: str) -> None:
    size = max(path.stat().st_size for path in Path(packs).iterdir())
    with engine_of(device_cache="100%", packs=packs, pack_memory=f"{size}B") as engine:
        submit(engine, [steered(scored("r", 0), 1.0, "p0")])
        failure = engine.add(steered(scored("s", 0), 1.0, "p1"))
        assert failure is not None
        assert (failure.kind, failure.param) == ("busy", "tol")
        assert finish(engine)["r"].failure is None
        submit(engine, [steered(scored("s", 0), 1.0, "p1")])
        assert finish(engine)["s"].failure is None


def test_a_preempted_request_keeps_its_packs_and_its_tokens(engine_of: OpenEngine, packs: str) -> None:
    asked = [steered(scored(f"r{index}", index, 30), 0.5, f"p{index}") for index in range(3)]
    alone = {}
    with engine_of(device_cache="100%", packs=packs) as engine:
        for each in asked:
            alone |= serve(engine, [each])
    with engine_of(
        device_cache="100%", packs=packs, max_model_len=80, kv_cache=f"{7 * 4096}B", prefix_cache=False
    ) as engine:
        assert_same_output(serve(engine, asked), alone)
        assert value(engine.registry, "num_preemptions_total") > 0
        assert not [pack for pack in store_of(engine)._loaded.values() if pack.users]
        assert_idle(engine)


def test_a_request_whose_record_cannot_be_read_lets_its_packs_go(
    engine_of: OpenEngine, tiny_model_dir: Path, tmp_path: Path, packs: str
) -> None:
    build_table(tiny_model_dir, tmp_path / "tol")
    with engine_of(table=str(tmp_path / "tol"), packs=packs) as engine:
        flip_byte(Table.open(tmp_path / "tol"), 250)
        failure = serve(engine, [steered(request("r", [3, 250, 5]), 1.0, "p0")])["r"].failure
        assert failure is not None
        assert failure.kind == "table"
        assert [pack.users for pack in store_of(engine)._loaded.values()] == [0]
        assert_idle(engine)


def test_a_step_that_nobody_steers_makes_no_scales(engine_of: OpenEngine, packs: str) -> None:
    with engine_of(device_cache="100%", packs=packs) as engine:
        asked = [scored("a", 0), scored("b", 1)]
        submit(engine, asked)
        chunks = engine.scheduler.schedule()
        assert engine.runner._steering(chunks) is None
        engine.run(chunks)
        finish(engine)
