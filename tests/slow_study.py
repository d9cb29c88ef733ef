"""The float64 reference with other rows or scaled feed-forward outputs, one token at a time."""

import math

import numpy as np

from reference import Array, Reference, weights_of
from tolserve.study.evaluate import Studied


class Scaled(Reference):
    """`rows` [V, N, d] in place of the networks'; `scales` multiplies rows, or a base model's FFN outputs."""

    def __init__(self, studied: Studied, rows: Array | None, scales: list[float]) -> None:
        super().__init__(studied.config, weights_of(studied.model))
        self.rows, self.scales = rows, scales

    def row(self, token: int, layer: int) -> Array:
        return self.scales[layer] * (super().row(token, layer) if self.rows is None else self.rows[token, layer])

    def after_attention(self, x: Array, token: int, layer: int) -> Array:
        result = super().after_attention(x, token, layer)
        return x + self.scales[layer] * (result - x) if self.config.ffn_variant == "base" else result

    def log_probabilities(self, tokens: list[int]) -> list[float]:
        """Of each token but the first, after those before it."""
        logits = self.logits(tokens[:-1])
        pairs = zip(logits, tokens[1:], strict=True)
        return [float(row[token] - row.max() - math.log(np.exp(row - row.max()).sum())) for row, token in pairs]
