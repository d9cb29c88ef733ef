"""How fast a run was, as a share of what the machine's matrix products reach."""

import time
from collections.abc import Iterable

import numpy as np
import torch

from tolserve.model.transformer import Transformer
from tolserve.train.data import Tokens

# Square products large enough to reach the rate of larger ones, and short: on two AVX-512 cores float32 products of
# 1,024 took 15 ms each and 2,048 ran no faster; CUDA devices need larger ones, 2 ms each at 600 TFLOP/s.
_SIDE = {"cpu": 1024, "cuda": 8192}
_SECONDS = 0.5


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a square matrix product, the best of half a second's."""
    side = _SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        begun = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return 2 * side**3 / best


def distinct_share(batches: Iterable[Tokens], rows: int) -> float:
    """Distinct tokens per token in micro-batches of `rows` sequences: how often a memory network runs."""
    pieces = [piece[:, :-1] for batch in batches for piece in np.split(batch, len(batch) // rows)]
    return sum(len(np.unique(piece)) for piece in pieces) / sum(piece.size for piece in pieces)


def training_flops(model: Transformer, length: int, distinct: float) -> float:
    """Floating-point operations that training takes per token, matrix products and attention alone.

    Forward 2 per weight; backward 2 for the gradient that flows on and 2 for a weight that trains. The embedding is
    looked up, unless it is the head as well. Memory networks run once per distinct token of a micro-batch, a share
    `distinct` of the tokens. Attention is counted causal: 2 * length * d forward per layer, twice that backward.
    Layer 0 is counted like the others, though it needs less where the embedding does not train.
    """
    total = 0.0
    for name, parameter in model.named_parameters():
        looked_up = name == "model.embed_tokens.weight" and model.lm_head is not None
        if parameter.ndim > 1 and not looked_up:
            share = distinct if ".memory." in name else 1.0
            total += share * parameter.numel() * (6 if parameter.requires_grad else 4)
    return total + 6 * model.config.num_hidden_layers * length * model.config.hidden_size
