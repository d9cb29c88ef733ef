"""Which tokens of which sequences run in the next step. Plain Python: no tensors, no clock, no table."""

from collections import deque
from collections.abc import Callable, Iterator, Set
from itertools import islice

from tolserve.engine.blocks import BlockPool
from tolserve.engine.prefix import PrefixCache
from tolserve.engine.sequence import Chunk, Sequence

Present = Callable[[int], bool]

# A server at its limit of 32 sequences, answers of 100 tokens, steps of 2 ms: one ends every 6 ms. Eight admissions
# are then 50 ms, in which a few hundred records are read ahead, as many as a cold prompt of 512 tokens needs.
MAX_PASSES = 8
# Waiting sequences that are looked at for one that may go first. Looking at one costs up to 50 us (512 tokens).
_LOOK = 8


class Scheduler:
    """Continuous batching with chunked prefill.

    A step takes running sequences first, longest unserved first, then admits waiting ones in order of arrival. It is
    bounded by tokens, by sequences, by KV blocks and by distinct token ids (a step's records must all have a slot at
    once). When blocks run out the youngest running sequence gives its blocks back and is recomputed later.

    A step that decodes has a budget of fills besides: its prompts together may miss `max_fills` records, so that the
    decodes do not wait for hundreds of reads. A waiting sequence whose records are there may pass earlier ones whose
    are not. Each is passed over at most MAX_PASSES times, a preempted one never.

    With a prefix cache, a sequence that is admitted begins behind what others, or itself, have computed of its text.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_seqs: int,
        max_tokens: int,
        max_distinct: int | None,
        present: Present | None = None,
        max_fills: int = 128,
        prefix_cache: bool = True,
    ) -> None:
        """`max_distinct` is the number of device slots, `present` says whether a token's record is in one of them or
        on its way there; both None for a model without a table. `max_fills` is at least 1."""
        self.pool = pool
        self._prefix = PrefixCache(pool) if prefix_cache else None
        self.max_seqs, self.max_tokens, self.max_distinct = max_seqs, max_tokens, max_distinct
        self.present = _everything if present is None else present
        self.max_fills = max_fills
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.overtakes = 0  # admissions that passed over somebody

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished, failed or aborted sequence and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.pool.release(sequence.blocks)

    def ran(self, chunk: Chunk) -> None:
        """A chunk's keys and values are there now."""
        chunk.sequence.computed = chunk.end
        if self._prefix is not None:
            self._prefix.ran(chunk.sequence, chunk.start, chunk.end)

    def known(self, sequence: Sequence) -> list[int]:
        """The blocks that a waiting sequence would begin with if it were admitted now."""
        return [] if self._prefix is None else self._prefix.find(sequence)

    def unread(self, sequence: Sequence) -> list[int]:
        """Tokens of a waiting sequence's first chunk whose records were not seen on their way yet."""
        if sequence.read_ahead >= min(len(sequence.tokens), sequence.begins + self.max_tokens):
            return []
        begins = len(self.known(sequence)) * self.pool.block_size
        if begins != sequence.begins:
            sequence.begins = sequence.read_ahead = begins
        return sequence.tokens[sequence.read_ahead : begins + self.max_tokens]

    def forget_prefixes(self) -> None:
        """Find nothing of what was computed until now: the table is another one. Running sequences keep their keys of
        before, under which nobody looks any more: what they compute from now on is of both tables."""
        if self._prefix is not None:
            self._prefix.version += 1
        for sequence in self.waiting:
            sequence.start_over()

    def sequences(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def schedule(self, sitting_out: Set[str] = frozenset()) -> list[Chunk]:
        """Choose a step, without the running sequences of these ids. Empty only when nothing else waits or runs.

        Sequences that were served move behind those that were not, so that a step too small for everyone (more
        distinct tokens than slots) is followed by one for the others.
        """
        step = _Step(self)
        preemptions = self.preemptions
        for sequence in sorted(self.running, key=_has_prompt):  # decodes first
            preempted = preemptions != self.preemptions and sequence not in self.running
            if sequence.request_id not in sitting_out and not preempted and (count := self._make_room(sequence, step)):
                step.add(sequence, count)
        # Admitting right after a preemption would hand the victim back what it just gave.
        while self.waiting and step.room and len(self.running) < self.max_seqs and preemptions == self.preemptions:
            if not self._admit(self._next(step), step):
                break
        if len(step.chunks) < len(self.running):
            self.running.sort(key=step.holds)
        return step.chunks

    def _next(self, step: "_Step") -> int:
        """Which of the waiting to admit: the first whose records are there, else the first; nobody passes one who was
        passed over often enough."""
        for index, sequence in enumerate(islice(self.waiting, _LOOK)):
            if step.ready(sequence, len(self.known(sequence)) * self.pool.block_size):
                return index
            if sequence.passed >= MAX_PASSES:
                break
        return 0

    def _admit(self, index: int, step: "_Step") -> bool:
        """Take one of the waiting into the step, behind what is known of it; False if it finds no room there."""
        sequence = self.waiting[index]
        for block in self.known(sequence):
            self.pool.hold(block)
            sequence.blocks.append(block)
        sequence.computed = len(sequence.blocks) * self.pool.block_size
        count = step.affordable(sequence)
        if not count or not self.pool.grow(sequence.blocks, sequence.computed + count):
            self.pool.release(sequence.blocks)
            sequence.computed = 0
            return False
        for passed in islice(self.waiting, index):
            passed.passed += 1
        self.overtakes += index > 0
        self.running.append(sequence)
        del self.waiting[index]
        if sequence.cached is None and self._prefix is not None:
            sequence.cached = sequence.computed
        step.add(sequence, count)
        return True

    def _make_room(self, sequence: Sequence, step: "_Step") -> int:
        """Get blocks for what the step can take of a running sequence, preempting the youngest others if needed.
        Returns how many of its tokens that is."""
        count = step.affordable(sequence)
        while count and not self.pool.grow(sequence.blocks, sequence.computed + count):
            candidates = [s for s in self.running if s.blocks and not step.holds(s)]
            victim = max(candidates, key=lambda s: s.arrived)
            self._preempt(victim)
            if victim is sequence:
                return 0
        return count

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence.blocks)
        sequence.start_over()
        sequence.passed = MAX_PASSES  # its client has waited before
        self.waiting.appendleft(sequence)
        self.preemptions += 1


class _Step:
    """The step being put together, and what it still has room for."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.chunks: list[Chunk] = []
        self.room = scheduler.max_tokens
        self.distinct: set[int] = set()
        self._max_distinct = scheduler.max_distinct
        self._fills = scheduler.max_fills  # that prompts may still cause
        self._present = scheduler.present
        self._decodes = False
        self._members: set[int] = set()

    def holds(self, sequence: Sequence) -> bool:
        return id(sequence) in self._members

    def ready(self, sequence: Sequence, start: int) -> bool:
        """Whether the records of a sequence's tokens from `start` on are there, but for as many as may be filled."""
        wanted = self._wanted(sequence, start)
        return prefix_within(wanted, self._at_hand, self._fills) == len(wanted)

    def affordable(self, sequence: Sequence) -> int:
        """How many of a sequence's next tokens fit.

        A prompt with more distinct tokens than there is room for takes half of the room: the other half then takes
        the next chunk's records while this one computes.
        """
        if sequence.decodes and self.room and (self._max_distinct is None or len(self.distinct) < self._max_distinct):
            return 1  # what follows would find the same, in three times the time
        wanted = self._wanted(sequence, sequence.computed)
        if self._max_distinct is not None:
            room = self._max_distinct - len(self.distinct)
            fitting = prefix_within(wanted, self.distinct.__contains__, room)
            if fitting < len(wanted):
                wanted = wanted[: prefix_within(wanted, self.distinct.__contains__, (room + 1) // 2)]
        if self._decodes and not sequence.decodes:
            return prefix_within(wanted, self._at_hand, self._fills)
        return len(wanted)

    def add(self, sequence: Sequence, count: int) -> None:
        chunk = Chunk(sequence, sequence.computed, count)
        if sequence.decodes:
            self._decodes = True
        else:
            self._fills -= len({token for token in chunk.tokens if not self._at_hand(token)})
        self.chunks.append(chunk)
        self._members.add(id(sequence))
        self.room -= count
        self.distinct.update(chunk.tokens)

    def _wanted(self, sequence: Sequence, start: int) -> list[int]:
        return sequence.tokens[start : start + self.room]

    def _at_hand(self, token: int) -> bool:
        return token in self.distinct or self._present(token)


def prefix_within(tokens: list[int], known: Present, limit: int) -> int:
    """Length of the longest prefix with at most `limit` distinct tokens that are not known."""
    new: set[int] = set()
    for index, token in enumerate(tokens):
        if not known(token):
            new.add(token)
            if len(new) > limit:
                return index
    return len(tokens)


def _has_prompt(sequence: Sequence) -> bool:
    return not sequence.decodes


def _everything(token: int) -> bool:
    return True
