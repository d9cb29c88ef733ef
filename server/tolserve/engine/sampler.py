"""From logits to the next token and its log-probabilities."""

import numpy as np
import torch
from torch import Tensor

from tolserve.engine.request import SamplingParams, TokenLogprob


def uniform(seed: int, choice: int, position: int) -> float:
    """A draw in [0, 1) that depends on its three arguments alone: Philox, keyed by them.

    So a request's text does not depend on its neighbours in the batch, nor on being preempted and recomputed.
    """
    key = np.array([seed, (choice << 32) | position], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key)).random())


def sample(logits: Tensor, params: SamplingParams, position: int) -> int:
    """The token at `position` (prompt included) from its logits [V].

    Temperature, then top-k, then top-p and min-p over what top-k left; greedy at temperature 0. Candidates are ranked
    by logit with ties broken by token id, so equal logits give equal draws.
    """
    if params.temperature == 0:
        return int(logits.argmax())
    scaled = logits.double() / params.temperature
    values, tokens = scaled.sort(descending=True, stable=True)
    if params.top_k:
        values, tokens = values[: params.top_k], tokens[: params.top_k]
    probabilities = values.softmax(-1)
    keep = probabilities >= params.min_p * probabilities[0]
    keep &= probabilities.cumsum(-1) - probabilities < params.top_p
    keep[0] = True
    cumulative = probabilities[keep].cumsum(-1)
    drawn = uniform(params.seed, params.choice, position) * float(cumulative[-1])
    index = int(torch.searchsorted(cumulative, drawn, right=True))
    return int(tokens[min(index, len(cumulative) - 1)])


def logprobs(logits: Tensor, tokens: Tensor, top: int) -> list[TokenLogprob]:
    """Log-probabilities of `tokens` [n] under logits [n, V], each with the `top` best alternatives.

    From the model's own distribution: before temperature and filters. The alternatives' values and the token's own
    come from one tensor, so a client may compare them for equality.
    """
    log_probabilities = logits.float().log_softmax(-1)
    own = log_probabilities.gather(-1, tokens[:, None]).squeeze(-1).tolist()
    best, ids = log_probabilities.topk(top, dim=-1)
    return [
        TokenLogprob(token, value, tuple(zip(row_ids, row_values, strict=True)))
        for token, value, row_ids, row_values in zip(tokens.tolist(), own, ids.tolist(), best.tolist(), strict=True)
    ]
