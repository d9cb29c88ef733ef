"""Models small enough to compare with a slow reference, and a text with every kind of character."""

import torch

from tolserve.model.config import FfnVariant, ModelConfig
from tolserve.model.transformer import Transformer

TEXT = (
    "The old house stood at the end of the lane. Nobody had lived in it for years, and yet, every evening, a light was "
    "seen in the window. “Who's there?” cried the boy. — No answer came… 12, 345 and 6,789 café naïve Ωμέγα 漢字 🙂\n"
)


def tiny_config(variant: FfnVariant = "memory", **changes: object) -> ModelConfig:
    """Two layers of width 32 with grouped-query attention: small enough to compare with a slow reference."""
    shape: dict[str, object] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "ffn_variant": variant,
        "flex_beta": 2 if variant == "flex" else 0,
        "max_position_embeddings": 128,
    }
    return ModelConfig(**shape | changes)


def random_model(config: ModelConfig, seed: int = 0, spread: float = 16.0) -> Transformer:
    """The training form with weights large enough that every part of it moves the logits, norms included."""
    model = Transformer(config, with_memory=True)
    model.initialise(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.mul_(spread)
    return model.eval().requires_grad_(False)
