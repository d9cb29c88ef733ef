"""What a training step minimises, and its gradient (paper section 4)."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tolserve.model.transformer import Transformer
from tolserve.train.data import Tokens
from tolserve.train.ranks import Ranks
from tolserve.train.recipe import Recipe, TrainError


def loss_terms(logits: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Mean cross entropy, and what is minimised beside it: z_loss * mean(logsumexp^2)."""
    normaliser = logits.float().logsumexp(-1)
    picked = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1).float()
    cross_entropy = (normaliser - picked).mean()
    return cross_entropy, z_loss * normaliser.square().mean()


def divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """Mean over positions of KL(teacher || model), in nats; both [..., V]."""
    expected, found = (x.float().flatten(0, -2).log_softmax(-1) for x in (teacher, logits))
    return F.kl_div(found, expected, reduction="batchmean", log_target=True)


class Objective:
    """The gradient of a step, over micro-batches and processes.

    The loss is the mean over the step's tokens, however they are shared out: the result follows from the recipe, up
    to the order of summation. `teacher` is what `Recipe.distil` learns from. Raises TrainError where the step's
    sequences do not divide evenly.
    """

    def __init__(self, model: Transformer, recipe: Recipe, ranks: Ranks, teacher: Transformer | None = None) -> None:
        pieces = ranks.size * recipe.accumulate
        if recipe.batch % pieces:
            raise TrainError(
                f"--batch {recipe.batch} does not divide into {ranks.size} processes x --accumulate {recipe.accumulate}"
            )
        self.recipe, self.ranks, self.teacher = recipe, ranks, teacher
        self.rows = recipe.batch // pieces  # sequences in a micro-batch
        self._parallel = DistributedDataParallel(model) if ranks.size > 1 else None
        whole = self._parallel or model
        self._forward = torch.compile(whole) if recipe.compile else whole

    def backward(self, batch: Tokens) -> float:
        """Add the gradient of a step's mean loss to the parameters'.

        batch [recipe.batch, length + 1]: all processes' sequences. Returns the mean cross entropy in nats per token.
        """
        begin = self.ranks.rank * self.rows * self.recipe.accumulate
        share = torch.from_numpy(batch[begin : begin + self.rows * self.recipe.accumulate])
        pieces = share.to(self.ranks.device).long().split(self.rows)
        total = torch.zeros((), device=self.ranks.device)
        for index, piece in enumerate(pieces):
            # Gradients are exchanged once, behind the last micro-batch.
            waits = self._parallel is not None and index + 1 < len(pieces)
            with self._parallel.no_sync() if self._parallel is not None and waits else nullcontext():
                cross_entropy, objective = self._terms(piece[:, :-1], piece[:, 1:])
                (objective / len(pieces)).backward()
            total += cross_entropy.detach() / len(pieces)
        return self.ranks.mean(total)

    def _terms(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross entropy, and what is minimised."""
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.recipe.autocast == "bf16"):
            logits = self._forward(inputs)
            cross_entropy, penalty = loss_terms(logits, targets, self.recipe.z_loss)
            if self.teacher is None:
                return cross_entropy, cross_entropy + penalty
            with torch.no_grad():
                expected = self.teacher(inputs)
            return cross_entropy, penalty + divergence(logits, expected)
