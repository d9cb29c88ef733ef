"""Active and total parameters of the paper's configurations (paper section 5; embeddings and head left out)."""

from dataclasses import dataclass
from typing import Any

from tolserve.model.config import ModelConfig
from tolserve.model.presets import SIZES, VARIANTS, preset


@dataclass(frozen=True)
class ParameterCount:
    """`active` is what a forward pass over table rows still reads; `memory` (FFN-M, its norm) is what the table
    replaces."""

    active: int
    memory: int

    @property
    def total(self) -> int:
        return self.active + self.memory


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count analytically, norms included. GQA shrinks K and V; FFN-C is beta square maps."""
    size, heads = config.hidden_size, config.num_attention_heads
    swiglu = 3 * size * config.intermediate_size
    active = 2 * size * size + 2 * size * size * config.num_key_value_heads // heads + size  # attention and its norm
    memory = swiglu + size
    if config.ffn_variant == "base":
        active, memory = active + swiglu + size, 0
    if config.ffn_variant == "flex":
        active += config.flex_beta * size * size + size
    return ParameterCount(config.num_hidden_layers * active + size, config.num_hidden_layers * memory)


def report() -> list[dict[str, Any]]:
    """One row per configuration: size, variant, shape, and active, memory and total parameters."""
    rows = []
    for size in SIZES:
        for variant in VARIANTS:
            config = preset(size, variant)
            count = count_parameters(config)
            rows.append(
                {
                    "size": size,
                    "variant": variant,
                    "layers": config.num_hidden_layers,
                    "hidden_size": config.hidden_size,
                    "intermediate_size": config.intermediate_size,
                    "active": count.active,
                    "memory": count.memory,
                    "total": count.total,
                }
            )
    return rows


def render(rows: list[dict[str, Any]]) -> str:
    """The rows of `report` as a table for people, counts in millions cut to whole ones as the paper prints them."""
    lines = [f"{'size':<6}{'variant':<9}{'d':>6}{'K':>6}{'active':>9}{'memory':>9}{'total':>9}"]
    for row in rows:
        counts = "".join(f"{row[key] // 1_000_000:>8}M" for key in ("active", "memory", "total"))
        lines.append(f"{row['size']:<6}{row['variant']:<9}{row['hidden_size']:>6}{row['intermediate_size']:>6}{counts}")
    return "\n".join(lines)
