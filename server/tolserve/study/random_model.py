"""Models of random weights at the paper's shapes and at a small one, for what measures speed."""

from dataclasses import replace
from typing import Any

import torch

from tolkernels import INT4_GROUP
from tolserve.model.config import ModelConfig
from tolserve.model.presets import preset
from tolserve.model.serving import ServingModel, Weights

SMALL = "small"  # runs everything on any machine in seconds; its speed says nothing


def shape_of(size: str, variant: str, vocab: int | None = None, weights: str = "auto") -> ModelConfig:
    """A paper shape, with another vocabulary if asked; or the small one. Raises KeyError for another name.

    With int4 weights the feed-forward width is rounded down to whole groups, in the dense model's favour.
    """
    if size == SMALL:
        widths: dict[str, Any] = {
            "hidden_size": 256,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "num_hidden_layers": 4,
        }
        config = replace(preset("250M", variant), **widths, intermediate_size=680, vocab_size=4096)
    else:
        config = preset(size, variant)
    group = INT4_GROUP if weights == "int4" else 1
    return replace(
        config,
        vocab_size=vocab or config.vocab_size,
        intermediate_size=config.intermediate_size // group * group,
    )


def random_model(
    config: ModelConfig, *, dtype: torch.dtype, weights: Weights = "auto", device: str = "cpu"
) -> ServingModel:
    """Serving form of random weights, as if a checkpoint had held them in 16 bits."""
    stored = torch.float16 if dtype == torch.float16 else torch.bfloat16
    return ServingModel.random(config, dtype=dtype, weights=weights, device=device, stored=stored)
