"""Which tokens of which sequences run in the next step. Plain Python: no tensors, no clock, no table."""

from collections import deque
from collections.abc import Iterator

from tolserve.engine.blocks import BlockPool
from tolserve.engine.sequence import Chunk, Sequence


class Scheduler:
    """Continuous batching with chunked prefill.

    A step takes running sequences first, longest unserved first, then admits waiting ones in order of arrival. It is
    bounded by tokens, by sequences, by KV blocks and by distinct token ids (a step's records must all have a slot at
    once). When blocks run out the youngest running sequence gives its blocks back and is recomputed later.
    """

    def __init__(self, pool: BlockPool, *, max_seqs: int, max_tokens: int, max_distinct: int | None) -> None:
        """`max_distinct` is the number of device slots, None for a model without a table."""
        self.pool = pool
        self.max_seqs, self.max_tokens, self.max_distinct = max_seqs, max_tokens, max_distinct
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished, failed or aborted sequence and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.pool.release(sequence.blocks)

    def sequences(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def schedule(self) -> list[Chunk]:
        """Choose a step. Empty only when nothing waits or runs.

        Sequences that were served move behind those that were not, so that a step too small for everyone (more
        distinct tokens than slots) is followed by one for the others.
        """
        step = _Step(self.max_tokens, self.max_distinct)
        preemptions = self.preemptions
        for sequence in sorted(self.running, key=lambda sequence: sequence.pending > 1):  # decodes first
            if sequence in self.running and self._make_room(sequence, step):
                step.add(sequence, step.affordable(sequence))
        # Admitting right after a preemption would hand the victim back what it just gave.
        while self.waiting and len(self.running) < self.max_seqs and preemptions == self.preemptions:
            sequence = self.waiting[0]
            count = step.affordable(sequence)
            if not count or not self.pool.grow(sequence.blocks, sequence.computed + count):
                break
            self.running.append(self.waiting.popleft())
            step.add(sequence, count)
        served = {id(chunk.sequence) for chunk in step.chunks}
        self.running.sort(key=lambda sequence: id(sequence) in served)
        return step.chunks

    def _make_room(self, sequence: Sequence, step: "_Step") -> bool:
        """Get blocks for what the step can take of a running sequence, preempting the youngest others if needed."""
        count = step.affordable(sequence)
        if not count:
            return False
        while not self.pool.grow(sequence.blocks, sequence.computed + count):
            candidates = [s for s in self.running if s.blocks and not step.holds(s)]
            victim = max(candidates, key=lambda s: s.arrived)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence.blocks)
        sequence.computed = 0
        self.waiting.appendleft(sequence)
        self.preemptions += 1


class _Step:
    """The step being put together, and what it still has room for."""

    def __init__(self, max_tokens: int, max_distinct: int | None) -> None:
        self.chunks: list[Chunk] = []
        self.room = max_tokens
        self.max_distinct = max_distinct
        self.distinct: set[int] = set()
        self._members: set[int] = set()

    def holds(self, sequence: Sequence) -> bool:
        return id(sequence) in self._members

    def affordable(self, sequence: Sequence) -> int:
        """How many of a sequence's next tokens fit.

        A prompt with more distinct tokens than there is room for takes half of the room: the other half then takes
        the next chunk's records while this one computes.
        """
        wanted = sequence.tokens[sequence.computed : sequence.computed + self.room]
        if self.max_distinct is None:
            return len(wanted)
        fitting = _prefix_within(wanted, self.distinct, self.max_distinct)
        if fitting == len(wanted):
            return fitting
        room = self.max_distinct - len(self.distinct)
        return _prefix_within(wanted, self.distinct, len(self.distinct) + (room + 1) // 2)

    def add(self, sequence: Sequence, count: int) -> None:
        chunk = Chunk(sequence, sequence.computed, count)
        self.chunks.append(chunk)
        self._members.add(id(sequence))
        self.room -= count
        self.distinct.update(chunk.tokens)


def _prefix_within(tokens: list[int], present: set[int], limit: int) -> int:
    """Length of the longest prefix whose distinct tokens, with those present, number at most `limit`."""
    new: set[int] = set()
    for index, token in enumerate(tokens):
        if token not in present:
            new.add(token)
            if len(present) + len(new) > limit:
                return index
    return len(tokens)
