"""The paper's fifteen shapes: three sizes, each as base, flex (beta 1, 2, 3) and memory.

Source: paper Tables 4 and 5, the flex rows in the order that its parameter counts imply.
"""

from dataclasses import dataclass

from tolserve.model.config import ConfigError, FfnVariant, ModelConfig

LAYERS = 24
VOCABULARY = 128_256  # LLaMA-3.1's tokenizer
CONTEXT = 2_048


@dataclass(frozen=True)
class Size:
    """One row of Table 5: `intermediate` is K of base and memory, `flex_intermediate` K of FFN-M by beta."""

    hidden: int
    heads: int
    intermediate: int
    flex_intermediate: dict[int, int]


SIZES = {
    "250M": Size(960, 16, 2560, {1: 2240, 2: 1920, 3: 1600}),
    "750M": Size(1600, 16, 4272, {1: 3738, 2: 3200, 3: 2668}),
    "1B": Size(2048, 32, 5464, {1: 4778, 2: 4096, 3: 3418}),
}
VARIANTS: dict[str, tuple[FfnVariant, int]] = {
    "base": ("base", 0),
    "flex-3": ("flex", 3),
    "flex-2": ("flex", 2),
    "flex-1": ("flex", 1),
    "memory": ("memory", 0),
}


def variant_name(ffn_variant: FfnVariant, flex_beta: int) -> str:
    """The name in VARIANTS. Raises ConfigError for a beta that the variant does not have."""
    for name, variant in VARIANTS.items():
        if variant == (ffn_variant, flex_beta):
            return name
    raise ConfigError(f"ffn_variant {ffn_variant!r} with flex_beta {flex_beta}; flex has 1, 2 or 3, the others 0")


def preset(size: str, variant: str) -> ModelConfig:
    """The configuration of one of SIZES as one of VARIANTS. Raises KeyError for another name."""
    shape = SIZES[size]
    ffn_variant, beta = VARIANTS[variant]
    return ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.flex_intermediate[beta] if beta else shape.intermediate,
        num_hidden_layers=LAYERS,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        ffn_variant=ffn_variant,
        flex_beta=beta,
        max_position_embeddings=CONTEXT,
    )
