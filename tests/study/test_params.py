"""Parameter counts: the paper's, and those of the modules themselves."""

import json

import pytest
import torch

from tiny import tiny_config
from tolserve.model.config import ModelConfig
from tolserve.model.presets import SIZES, VARIANTS, preset
from tolserve.model.transformer import Transformer
from tolserve.study.params import count_parameters, render, report

# Paper section 5: millions, cut to whole ones.
ACTIVE = {
    "250M": {"base": 265, "flex-3": 154, "flex-2": 132, "flex-1": 110, "memory": 88},
    "750M": {"base": 737, "flex-3": 430, "flex-2": 368, "flex-1": 307, "memory": 245},
    "1B": {"base": 1208, "flex-3": 704, "flex-2": 604, "flex-1": 503, "memory": 402},
}
# K of base and memory, and of FFN-M for beta = 1, 2, 3.
INTERMEDIATE = {"250M": (2560, 2240, 1920, 1600), "750M": (4272, 3738, 3200, 2668), "1B": (5464, 4778, 4096, 3418)}
# Linear maps alone, millions per layer at 1B: FFN-C, FFN-M.
FFN_1B = {
    "memory": (0, 33.554),
    "flex-1": (4.194, 29.360),
    "flex-2": (8.388, 25.165),
    "flex-3": (12.582, 20.971),
}


def module_parameters(config: ModelConfig, with_memory: bool) -> int:
    with torch.device("meta"):
        model = Transformer(config, with_memory)
    outside = ("model.embed_tokens.weight", "lm_head.weight")
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name not in outside)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_equal_the_papers_and_the_modules(size: str, variant: str) -> None:
    config = preset(size, variant)
    count = count_parameters(config)
    assert count.active // 1_000_000 == ACTIVE[size][variant]
    assert count.total // 1_000_000 == ACTIVE[size]["base"]
    assert count.active == module_parameters(config, with_memory=False)
    assert count.total == module_parameters(config, with_memory=True)


def test_shapes_are_the_papers() -> None:
    for size, (dense, *flex) in INTERMEDIATE.items():
        expected = {"base": dense, "memory": dense} | {f"flex-{beta}": k for beta, k in enumerate(flex, 1)}
        assert {variant: preset(size, variant).intermediate_size for variant in VARIANTS} == expected
    assert [preset(size, "memory").hidden_size for size in SIZES] == [960, 1600, 2048]
    assert [preset(size, "memory").num_attention_heads for size in SIZES] == [16, 16, 32]
    assert {preset(size, "base").vocab_size for size in SIZES} == {128_256}


@pytest.mark.parametrize("variant", ["base", "memory", "flex"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_counts_hold_with_grouped_query_attention(variant: str, kv_heads: int) -> None:
    config = tiny_config(variant, num_key_value_heads=kv_heads, tie_word_embeddings=False)
    count = count_parameters(config)
    assert count.active == module_parameters(config, with_memory=False)
    assert count.total == module_parameters(config, with_memory=True)


@pytest.mark.parametrize("variant", FFN_1B)
def test_the_split_of_the_ffn_follows_the_paper(variant: str) -> None:
    """FFN-C is beta * h^2 exactly; FFN-M is (8 - beta) * h^2 up to K being a whole number."""
    config = preset("1B", variant)
    compute, memory = FFN_1B[variant]
    assert config.flex_beta * config.hidden_size**2 / 1e6 == pytest.approx(compute, abs=1e-3)
    assert 3 * config.hidden_size * config.intermediate_size / 1e6 == pytest.approx(memory, rel=2e-3)


def test_the_report_has_fifteen_rows_for_machines_and_people() -> None:
    rows = report()
    assert [(row["size"], row["variant"]) for row in rows] == [(s, v) for s in SIZES for v in VARIANTS]
    assert json.loads(json.dumps(rows)) == rows
    assert all(row["active"] + row["memory"] == row["total"] for row in rows)
    lines = render(rows).splitlines()
    assert len(lines) == 16
    assert len({len(line) for line in lines}) == 1
    assert lines[-1].split() == ["1B", "memory", "2048", "5464", "402M", "805M", "1208M"]
