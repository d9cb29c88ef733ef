"""The sizes of model that benchmarks take, and the device cache that they give them."""

from tolserve.model.config import ModelConfig
from tolserve.model.presets import SIZES
from tolserve.study.random_model import SMALL

SIZE_NAMES = (*SIZES, SMALL)


def quarter_of_ffn(base: ModelConfig) -> int:
    """A quarter of a base model's feed-forward weights in 16 bits, bytes: the device cache that benchmarks use."""
    return 3 * base.hidden_size * base.intermediate_size * base.num_hidden_layers * 2 // 4
