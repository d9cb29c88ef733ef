"""What moved the logits of a prompt: each addend of the stream, read through the final norm and the output head.

The stream of a position is a sum: the embedding, then of each layer what attention, FFN and memory add. The final norm
divides it by one number, its root mean square. With that number held at what it was, a logit is a sum over the same
addends. That is direct attribution: what an addend does through the layers behind it counts as theirs.
"""

import time
from collections.abc import Sequence as Tokens

import torch
from torch import Tensor

from tolkernels import embedding_rows
from tolserve.engine.engine import Engine
from tolserve.engine.look import Attribution
from tolserve.engine.request import Request
from tolserve.engine.sequence import Chunk, Sequence
from tolserve.model.serving import Addend, ServingModel
from tolserve.tol.pager import Lease


class NoRoom(RuntimeError):  # noqa: N818 - says what happened; it is over when other requests end
    """The KV blocks that the prompt needs are taken now."""


class _Addends:
    """Watches the stream of T tokens: the products of each addend with a direction of each token, in float64.

    Deltas of the stream as it was, whatever it was rounded to, so that their sum is the stream. The last token's
    direction may not be known yet, so its addends are kept.
    """

    def __init__(self, directions: Tensor) -> None:
        self._directions = directions  # [T, d] float64
        self.stream = torch.zeros_like(directions)
        self.products: dict[Addend, list[Tensor]] = {}  # [T] of each layer
        self.last: dict[Addend, list[Tensor]] = {}  # [d]

    def __call__(self, addend: Addend, stream: Tensor) -> None:
        now = stream.double()
        delta = now - self.stream
        self.stream = now
        self.products.setdefault(addend, []).append((delta * self._directions).sum(1))
        self.last.setdefault(addend, []).append(delta[-1].clone())  # a view would keep all of them

    def contributions(self, addend: Addend, direction: Tensor, divisor: Tensor) -> list[list[float]] | None:
        """[T, N], with the last token's direction [d] and all divisors [T]; None if there was no such addend."""
        if addend not in self.products:
            return None
        products = torch.stack(self.products[addend], dim=1)
        products[-1] = torch.stack(self.last[addend]) @ direction
        found: list[list[float]] = (products / divisor.unsqueeze(1)).tolist()
        return found


def attribute(engine: Engine, request: Request, targets: Tokens[int] | None, against: int | None) -> Attribution:
    """Run a request's prompt as one step between two others, as it would run there alone, and take its logits apart.

    `targets` has a token for each position, or is None for those that come next, at the last position the model's
    best. Records are paged as for any step: lookups, hits and misses count, policies are not told. KV blocks come
    from the pool and go back, without a name in the prefix cache. Nothing of it stays but records that came up.

    Raises ValueError for what cannot be asked, NoRoom, and RecordsUnavailable for a record that cannot be read.
    """
    _check(engine, request, targets, against)
    engine.drain()
    sequence = Sequence(request, time.monotonic())
    pool, pager = engine.scheduler.pool, engine.pager
    if not pool.grow(sequence.blocks, len(sequence.tokens)):
        raise NoRoom("other requests hold the keys' and values' memory that this prompt needs; try again later")
    lease = None
    try:
        lease = pager.acquire(sequence.tokens) if pager is not None else None
        return _run(engine, Chunk(sequence, 0, len(sequence.tokens)), lease, targets, against)
    finally:
        if lease is not None and pager is not None:
            pager.release(lease)
        pool.release(sequence.blocks)


def _check(engine: Engine, request: Request, targets: Tokens[int] | None, against: int | None) -> None:
    prompt, vocab_size = request.prompt, engine.runner.model.config.vocab_size
    given = [*prompt, *(targets or ()), *([] if against is None else [against])]
    most = min(engine.scheduler.max_tokens, engine.max_model_len)
    distinct, slots = len(set(prompt)), engine.scheduler.max_distinct
    if not prompt or (targets is not None and len(targets) != len(prompt)):
        raise ValueError("a prompt has at least one token, and targets has one for each of them")
    if not all(0 <= token < vocab_size for token in given):
        raise ValueError(f"a token id is not below {vocab_size}")
    if len(prompt) > most:
        raise ValueError(f"the prompt has {len(prompt)} tokens; {most} fit into one step (--max-num-batched-tokens)")
    if slots is not None and distinct > slots:
        raise ValueError(
            f"the prompt has {distinct} distinct tokens; the device tier has room for the records of {slots}: shorten "
            "it, or make --device-cache larger"
        )


@torch.inference_mode()
def _run(
    engine: Engine, chunk: Chunk, lease: Lease | None, targets: Tokens[int] | None, against: int | None
) -> Attribution:
    model = engine.runner.model
    wanted = list(targets) if targets is not None else [*chunk.tokens[1:], 0]
    addends = _Addends(model.norm.double() * _outputs(model, wanted, against))
    hidden = engine.runner.run([chunk], lease, addends).hidden
    if targets is None:
        wanted[-1] = int(model.best(hidden[-1:]))
    outputs = _outputs(model, wanted, against)
    last = model.norm.double() * outputs[-1]
    divisor = (addends.stream.square().mean(1) + model.config.rms_norm_eps).sqrt()
    embedding = addends.contributions("embedding", last, divisor) or []
    return Attribution(
        targets=wanted,
        logits=(hidden.double() * outputs).sum(1).tolist(),
        embedding=[value for (value,) in embedding],
        attention=addends.contributions("attention", last, divisor) or [],
        memory=addends.contributions("memory", last, divisor),
        compute=addends.contributions("compute", last, divisor),
    )


def _outputs(model: ServingModel, targets: list[int], against: int | None) -> Tensor:
    """The output head's rows of the targets, less that of `against`: float64 [T, d]."""
    ids = torch.tensor(targets if against is None else [*targets, against], device=model.device)
    rows = embedding_rows(ids, model.head, torch.float32).double()
    return rows if against is None else rows[:-1] - rows[-1]
