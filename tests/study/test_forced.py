"""What the speed benchmarks feed their engines."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from tolkernels import add_rows
from tolserve.study.forced import ForcedEngine, Text
from tolserve.study.random_model import random_model, shape_of
from tolserve.study.random_table import table_of
from tolserve.tol.encoding import Values

TRACE = np.arange(1000) % 50


def test_text_goes_on_where_its_prompts_end() -> None:
    text = Text(TRACE, batch=2, context=3)
    assert text.prompts == [[0, 1, 2], [0, 1, 2]]
    assert text.take(2) == [[3, 3], [4, 4]]
    assert text.take(1) == [[5, 5]]
    assert Text(TRACE, batch=1, context=3, part=1).prompts != Text(TRACE, batch=1, context=3, part=2).prompts


@pytest.mark.parametrize("slots", [8, 50])
def test_an_engine_runs_the_forced_tokens_and_looks_up_their_records(tmp_path: Path, slots: int) -> None:
    engine = engine_of(tmp_path, slots)
    engine.start([[1, 2, 3], [4, 5, 6]])
    before = engine.counters()["tol_lookups_total"]
    engine.timed_steps([[7, 8], [9, 9], [10, 11]])
    assert ran(engine) == [[1, 2, 3, 7, 9, 10], [4, 5, 6, 8, 9, 11]]
    assert engine.counters()["tol_lookups_total"] - before == 5  # one for each distinct token of each step
    engine.start([[1, 2, 3]])
    engine.timed_steps([[12]])
    assert engine.generated == 2
    assert engine.engine.pager is not None
    engine.engine.pager.check()
    engine.close()


def test_an_engine_that_is_a_step_ahead_runs_them_too(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, 50, ahead=True)
    for _ in range(2):
        engine.start([[1, 2, 3], [4, 5, 6]])
        engine.timed_steps([[7, 8], [9, 9], [10, 11], [12, 13], [14, 15]])
        first, second = ran(engine)
        assert (first[:3], second[:3]) == ([1, 2, 3], [4, 5, 6])
        assert first[4:7] == [7, 9, 10]  # the one before was sampled at the prompt's end
        assert second[4:7] == [8, 9, 11]
    engine.close()


def engine_of(folder: Path, slots: int, ahead: bool = False) -> ForcedEngine:
    config = shape_of("small", "memory", vocab=50)
    model = random_model(config, dtype=torch.float32)
    table = table_of(folder, "bf16", config)
    sizes = {"slots": slots, "sequences": 2, "longest": 20}
    engine = ForcedEngine(model, table, **sizes, dtype=torch.float32, ahead=ahead)
    engine.warm(TRACE, 20)
    return engine


def ran(engine: ForcedEngine) -> list[list[int]]:
    """Each sequence's tokens that went through the layers."""
    sequences = {sequence.request_id: sequence for sequence in engine.engine.scheduler.sequences()}
    return [sequences[name].tokens[: sequences[name].computed] for name in sorted(sequences)]


@pytest.mark.parametrize("values", get_args(Values))
def test_random_rows_have_the_size_of_trained_ones(tmp_path: Path, values: Values) -> None:
    table = table_of(tmp_path, values, shape_of("small", "memory", vocab=64))
    manifest = table.manifest
    records = torch.from_numpy(np.stack([table.read_record(token) for token in range(64)]))
    for layer in range(manifest.num_layers):
        group, row = manifest.row_layout(layer)
        offset = manifest.groups[group].offset + row.offset
        layout = {"values": row.values, "group_size": row.group_size}
        width = manifest.hidden_size
        rows, _ = add_rows(
            records, torch.arange(64), torch.zeros(64, width), torch.ones(width), 1e-5, offset=offset, **layout
        )
        assert rows.std() == pytest.approx(0.02, rel=0.1)
        assert rows.abs().max() < 0.1
