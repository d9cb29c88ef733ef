"""Models of random weights at the paper's shapes and at a small one, for the speed benchmarks."""

from dataclasses import replace

import torch

from tolserve.model.config import ModelConfig
from tolserve.model.presets import SIZES, preset
from tolserve.model.transformer import Transformer

SMALL = "small"  # runs everything on any machine in seconds; its speed says nothing
SIZE_NAMES = (*SIZES, SMALL)


def shape_of(size: str, variant: str, vocab: int | None = None) -> ModelConfig:
    """A paper shape, with another vocabulary if asked; or the small one. Raises KeyError for another name."""
    if size != SMALL:
        config = preset(size, variant)
        return replace(config, vocab_size=vocab or config.vocab_size)
    widths = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 4}
    config = replace(preset("250M", variant), **widths, intermediate_size=680)
    return replace(config, vocab_size=vocab or 4096)


def quarter_of_ffn(base: ModelConfig) -> int:
    """A quarter of a base model's feed-forward weights in 16 bits, bytes: the device cache that benchmarks use."""
    return 3 * base.hidden_size * base.intermediate_size * base.num_hidden_layers * 2 // 4


def random_transformer(config: ModelConfig, dtype: torch.dtype, device: str) -> Transformer:
    """Training form with random weights: one block of normal numbers, repeated and shifted from tensor to tensor."""
    with torch.device("meta"):
        model = Transformer(config, with_memory=False)
    block = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    state = {}
    for index, (name, parameter) in enumerate(model.named_parameters()):
        copies = -(-parameter.numel() // block.numel())
        values = block[: parameter.numel()].repeat(copies)[: parameter.numel()].roll(index).view(parameter.shape)
        state[name] = (torch.ones_like(values) if parameter.ndim == 1 else values).to(device)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def random_model(config: ModelConfig, *, dtype: torch.dtype, weights: str = "auto", device: str = "cpu") -> Transformer:
    """Serving form with random weights."""
    if weights != "auto":
        raise ValueError(f"--weights {weights}: not yet")
    model = random_transformer(config, dtype, device)
    model.device = torch.device(device)
    model.nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    return model
