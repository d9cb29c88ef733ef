"""Unstructured pruning of a base model: magnitude, Wanda and SparseGPT (the baselines of the paper's Fig. 11).

Every matrix of attention and FFN loses the same share of its weights; norms, embedding and head stay whole. Counts are
exact: what a row or block cannot keep of a fraction, the next one keeps.
"""

import copy
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from tolserve.model.blocks import Attend, Layer, rotary_tables
from tolserve.model.transformer import Transformer, causal_attention, no_rows
from tolserve.study.report import StudyError

Method = Literal["magnitude", "wanda", "sparsegpt"]
METHODS: tuple[Method, ...] = ("magnitude", "wanda", "sparsegpt")

# Sequences of calibration text that run through a layer at once.
_BATCH = 8
# SparseGPT's own settings: columns that share one choice of weights, and damping as a share of the mean diagonal.
_BLOCK = 128
_DAMPING = 0.01


def active_parameters(model: Transformer) -> int:
    """Weights of a forward pass that are not zero, embedding and head left out, memory networks too."""
    left_out = ("model.embed_tokens.", "lm_head.")
    named = ((name, weight) for name, weight in model.named_parameters() if ".memory" not in name)
    return sum(int(weight.count_nonzero()) for name, weight in named if not name.startswith(left_out))


def share_to_keep(model: Transformer, active: int) -> float:
    """Share of each matrix's weights that stays, so that `active` of all stay. Raises StudyError."""
    linears = [linear for layer in model.model.layers for linear in _linears(layer)]
    matrices = sum(linear.weight.numel() for linear in linears)
    whole = active_parameters(model)
    share = (active - (whole - matrices)) / matrices
    if not 0 < share <= 1:
        raise StudyError(f"the base model has {whole:,} active parameters; it cannot be pruned to {active:,}")
    return share


@torch.no_grad()
def prune(model: Transformer, method: Method, keep: float, calibration: Tensor) -> Transformer:
    """A copy of a base model that keeps the share `keep` of each matrix.

    calibration [n, S] int64: tokens that Wanda and SparseGPT see; magnitude looks at no text. Layers are pruned in
    order, each on what the pruned layers below it hand up, as both papers do.
    """
    pruned = copy.deepcopy(model)
    if method == "magnitude":
        for layer in pruned.model.layers:
            for linear in _linears(layer):
                linear.weight.mul_(strongest(linear.weight.abs(), round(keep * linear.weight.numel())))
        return pruned
    attend = causal_attention(*rotary_tables(model.config, calibration.shape[1], calibration.device))
    streams = [pruned.model.embed_tokens(part) for part in calibration.split(_BATCH)]
    for index, layer in enumerate(pruned.model.layers):
        for linear, gram in _input_grams(layer, index, streams, attend).items():
            linear.weight.copy_({"wanda": wanda, "sparsegpt": sparsegpt}[method](linear.weight, gram, keep))
        streams = [layer(x, index, attend, no_rows) for x in streams]
    return pruned


def _linears(layer: Layer) -> Iterator[nn.Linear]:
    return (module for module in layer.modules() if isinstance(module, nn.Linear))


def _input_grams(layer: Layer, index: int, streams: list[Tensor], attend: Attend) -> dict[nn.Linear, Tensor]:
    """X^T X [in, in] of what each linear map reads when the layer runs over `streams`."""
    grams = {linear: torch.zeros(linear.in_features, linear.in_features) for linear in _linears(layer)}

    def add(linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2)
        grams[linear] += x.T @ x  # type: ignore[index]  # hooks are on linear maps alone

    hooks = [linear.register_forward_pre_hook(add) for linear in grams]
    for x in streams:
        layer(x, index, attend, no_rows)
    for hook in hooks:
        hook.remove()
    return grams


def strongest(scores: Tensor, count: int) -> Tensor:
    """True at the `count` largest of scores [...]."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().topk(count).indices] = True
    return mask.view_as(scores)


def wanda(weight: Tensor, gram: Tensor, keep: float) -> Tensor:
    """weight [out, in] with each row's least |w_ij| * ||x_j|| zeroed (Sun et al. 2023, arXiv 2306.11695)."""
    scores = weight.abs() * gram.diagonal().sqrt()
    ends = torch.arange(len(weight) + 1, dtype=torch.float64).mul(keep * weight.shape[1]).round()
    counts = ends.diff().unsqueeze(1)
    ranks = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return weight * (ranks < counts)


def sparsegpt(weight: Tensor, gram: Tensor, keep: float, block: int = _BLOCK) -> Tensor:
    """weight [out, in] pruned column by column, the columns to come making up for each loss (Frantar and Alistarh
    2023, arXiv 2301.00774).

    With H = gram + damping and H_j its rows and columns from j on, dropping w_j costs w_j^2 / (H_j^-1)_00, and is made
    up for by -w_j / (H_j^-1)_00 * (H_j^-1)_0. Both are read off the upper Cholesky factor of H^-1, whose row j is
    (H_j^-1)_0 / sqrt((H_j^-1)_00). What to drop is chosen per block of columns, over all rows.
    """
    hessian = gram.to(torch.float64, copy=True)
    hessian.diagonal().add_(max(_DAMPING * float(hessian.diagonal().mean()), torch.finfo(torch.float32).tiny))
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    left = weight.to(torch.float64, copy=True)
    for start in range(0, weight.shape[1], block):
        here = slice(start, min(start + block, weight.shape[1]))
        kept_until, kept_before = (round(keep * weight.shape[0] * column) for column in (here.stop, here.start))
        kept = strongest((left[:, here] / factor.diagonal()[here]).square(), kept_until - kept_before)
        errors = torch.zeros_like(left[:, here])
        for column in range(start, here.stop):
            error = left[:, column].masked_fill(kept[:, column - start], 0) / factor[column, column]
            left[:, column : here.stop] -= error.outer(factor[column, column : here.stop])
            errors[:, column - start] = error
        left[:, here] *= kept
        left[:, here.stop :] -= errors @ factor[here, here.stop :]
    return left.to(weight.dtype)
