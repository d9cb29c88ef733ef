"""The five variants' cost at a tiny shape: what is predicted against obvious counts, what is measured against that."""

from pathlib import Path
from statistics import median
from typing import Any

import pytest
from matplotlib.figure import Figure

from tolserve.cli import main
from tolserve.model.presets import preset
from tolserve.study.compare import Shape
from tolserve.study.decode_cost import ORDER, Setup, draw, preset_shapes, run, shapes
from tolserve.study.report import Study, StudyError
from tolserve.tol.plan import PlanError

D, LAYERS, VOCAB, K = 64, 2, 512, 176  # K: 8 d / 3, up to a multiple of 8
SHAPE = Shape(hidden_size=D, layers=LAYERS, heads=4, vocab_size=VOCAB)
SETUP = Setup(device="cpu", device_cache="25%", context=20, steps=3, rounds=3)
RECORD = LAYERS * D * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("decode-cost")


@pytest.fixture(scope="module")
def study(folder: Path) -> Study:
    return run(shapes(SHAPE), SETUP, folder)


def computed(variant: str) -> int:
    """Parameters that run beside attention in a layer."""
    return 3 * D * K if variant == "base" else int(variant[-1]) * D * D if "flex" in variant else 0


@pytest.mark.parametrize("variant", ORDER)
def test_what_is_held_is_what_was_predicted(study: Study, variant: str) -> None:
    details = study.extra[variant]
    norms = 2 * LAYERS + 1 if computed(variant) else LAYERS + 1
    weights = 2 * (VOCAB * D + LAYERS * (4 * D * D + computed(variant))) + 4 * norms * D
    blocks = -(-(20 + 4 * 3 + 1) // 16) + 1
    kv = blocks * 16 * LAYERS * 2 * D * 2
    cache = 0 if variant == "base" else VOCAB // 4 * RECORD
    memory = details["predicted"]["memory"]
    assert memory["layers"] + memory["embedding"] == weights
    assert memory["kv"] == kv
    assert details["predicted"]["cache"] == cache
    assert details["predicted"]["held"] == details["held"] == weights + kv + cache
    length = (20 + 33) / 2
    read = weights + round(length * LAYERS * 2 * D * 2) + (0 if variant == "base" else RECORD)
    assert details["predicted"]["read"] == read


def test_rows_tell_what_rounds_took(study: Study) -> None:
    assert [row["variant"] for row in study.rows] == list(ORDER)
    base = study.extra["base"]["ms_by_round"]
    for row in study.rows:
        rounds = study.extra[row["variant"]]["ms_by_round"]
        assert len(rounds) == SETUP.rounds
        assert (row["min"], row["ms"], row["max"]) == (min(rounds), median(rounds), max(rounds))
        assert row["over base"] == pytest.approx(median(a / b for a, b in zip(rounds, base, strict=True)))
        assert row["MB"] == study.extra[row["variant"]]["held"] / 1e6


def test_predicted_time_is_reading_and_waiting(study: Study) -> None:
    rate = study.facts["bytes_per_second"]["median"]
    assert rate == median(study.facts["bytes_per_second"]["by_round"])
    for row in study.rows:
        predicted: dict[str, Any] = study.extra[row["variant"]]["predicted"]
        stall = predicted["tiers"]["stall_ms"] if predicted["tiers"] else 0
        assert row["predicted ms"] == pytest.approx(1000 * predicted["read"] / rate + stall)


def test_every_variant_with_a_table_looks_the_same_tokens_up(study: Study) -> None:
    steps = (SETUP.steps + 1) * SETUP.rounds
    assert study.extra["base"]["hit_rate"] is None
    for name in ORDER[1:]:
        counted = study.extra[name]["counted"]
        assert counted["tol_lookups_total"] == steps
        assert 0 < study.extra[name]["hit_rate"] < 1
    assert len({study.extra[name]["counted"]["tol_hits_total"] for name in ORDER[1:]}) == 1


def test_a_cache_of_the_whole_table_waits_for_nothing(folder: Path) -> None:
    study = run(shapes(SHAPE), Setup("cpu", "100%", context=2, steps=1, rounds=1), folder)
    for name in ORDER[1:]:
        assert study.extra[name]["hit_rate"] == study.extra[name]["predicted"]["tiers"]["hit_rate"] == 1
        assert study.extra[name]["predicted"]["tiers"]["stall_ms"] == 0


def test_facts_and_picture(study: Study) -> None:
    assert study.facts["table"]["slots"] == VOCAB // 4
    assert study.facts["disk"]["reads"] > 0
    assert study.facts["reads"]
    assert study.facts["seed"] == 0
    figure = Figure(layout="constrained")
    draw(study, figure)
    assert len(figure.axes) == 2


@pytest.mark.usefixtures("study")
def test_the_table_is_gone(folder: Path) -> None:
    assert list(folder.iterdir()) == []


def test_the_table_is_gone_after_a_failure_too(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        assert any(tmp_path.iterdir())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(shapes(SHAPE), SETUP, tmp_path, stop)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="--vocab-size"):
        run(preset_shapes("1B", 10**8), SETUP, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("size", "error"), [("0", StudyError), ("1 furlong", PlanError)])
def test_a_cache_that_cannot_be(tmp_path: Path, size: str, error: type[ValueError]) -> None:
    with pytest.raises(error):
        run(shapes(SHAPE), Setup("cpu", size), tmp_path)


def test_presets_are_the_papers() -> None:
    assert preset_shapes("750M") == {name: preset("750M", name) for name in ORDER}
    assert {config.vocab_size for config in preset_shapes("250M", 100).values()} == {100}


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["study", "decode-cost", "--out", str(tmp_path), "--hidden-size", "32", "--num-hidden-layers", "1"]
    argv += ["--num-attention-heads", "2", "--context", "2", "--steps", "1", "--rounds", "1"]
    assert main([*argv, "--preset", "1B"]) == 2
    assert "--hidden-size: --preset 1B has one of its own" in capsys.readouterr().err
    assert main([*argv, "--vocab-size", "64"]) == 0
    assert "flex-3" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"decode-cost.{kind}" for kind in ("json", "md", "png")]
