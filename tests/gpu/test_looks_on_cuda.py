"""Steered requests and looks into the memory on a CUDA device, beside the same on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.driver import assert_idle, open_engine, request, serve
from engine.flights import open_ahead
from engine.test_engine import prompt_of
from engine.test_steering import PACKS, mixed
from packs import random_changes, save_pack
from tolserve.engine.assemble import assemble
from tolserve.engine.attribution import attribute
from tolserve.engine.config import EngineSettings
from tolserve.engine.inspect import look_up
from tolserve.engine.look import Attribution, TokenView

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
CUDA = {"device": "cuda", "dtype": "float32", "device_cache": "100%"}


def test_a_batch_of_many_packs_gives_each_what_it_gets_alone(
    tiny_model_dir: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache_dir = tmp_path_factory.mktemp("cache")
    for index in range(PACKS):
        save_pack(tmp_path / f"p{index}.safetensors", tiny_model_dir, random_changes(tiny_model_dir, index, range(150)))
    options: dict[str, Any] = {**CUDA, "packs": str(tmp_path), "prefix_cache": False}
    engine = assemble(EngineSettings(model=str(tiny_model_dir), cache_dir=str(cache_dir), **options), ahead=False)
    alone = {each.request_id: serve(engine, [each])[each.request_id].tokens for each in mixed()}
    engine.close()
    with open_ahead(tiny_model_dir, cache_dir, **options) as engine:
        answers = serve(engine, mixed())
        assert {name: answer.tokens for name, answer in answers.items()} == alone
        assert_idle(engine)


def test_looks_find_what_they_find_on_the_cpu(tiny_model_dir: Path, tmp_path: Path) -> None:
    prompt = prompt_of(20, 3)
    found: list[tuple[TokenView, Attribution]] = []
    engine = assemble(EngineSettings(model=str(tiny_model_dir), cache_dir=str(tmp_path), **CUDA))
    with open_engine(tiny_model_dir, tmp_path, device_cache="100%") as reference:
        for each in (engine, reference):
            serve(each, [request("r", prompt, 1)])
            view = look_up(each.runner, prompt[0], None, 5)
            found.append((view, attribute(each, request("a", prompt, 0), None, None)))
    engine.close()
    (view, told), (expected_view, expected) = found
    assert told.targets == expected.targets
    for part in ("logits", "embedding", "attention", "memory"):
        mine, theirs = torch.tensor(getattr(told, part)), torch.tensor(getattr(expected, part))
        assert torch.allclose(mine, theirs, atol=1e-3)
    for row, expected_row in zip(view.layers, expected_view.layers, strict=True):
        assert row.norm == pytest.approx(expected_row.norm, rel=1e-4)
        for mine, theirs in zip(row.promotes, expected_row.promotes, strict=True):
            assert mine.value == pytest.approx(theirs.value, rel=1e-3, abs=1e-3)
        for mine, theirs in zip(row.nearest, expected_row.nearest, strict=True):
            assert mine.value == pytest.approx(theirs.value, abs=1e-3)
