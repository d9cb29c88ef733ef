"""A recorded trace through a policy, beside LRU and the optimum: what a cache of a given size would have hit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import pairwise
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from tolserve.tol.policy import make_policy
from tolserve.tol.policy.base import Policy
from tolserve.tol.policy.lru import LRU

Ints = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]


class TraceError(ValueError):
    """A trace that cannot be used; the message says why."""


@dataclass(frozen=True)
class Trace:
    """Documents one after another: document d is `tokens[offsets[d]:offsets[d + 1]]`."""

    tokens: Ints
    offsets: Ints
    vocab_size: int

    @classmethod
    def load(cls, path: Path) -> "Trace":
        """From an .npz with `tokens`, `offsets` and `vocab_size`. Raises TraceError for anything else."""
        try:
            with np.load(path, allow_pickle=False) as file:
                tokens, offsets = file["tokens"].astype(np.int64), file["offsets"].astype(np.int64)
                vocab_size = int(file["vocab_size"])
        except (OSError, ValueError, TypeError, KeyError, EOFError, BadZipFile) as error:
            raise TraceError(f"{path} is no trace of tokens, offsets and vocab_size: {error}") from error
        if tokens.ndim != 1 or offsets.ndim != 1 or not len(tokens) or len(offsets) < 2:
            raise TraceError(f"{path}: a trace needs at least one token and one document")
        if offsets[0] != 0 or offsets[-1] != len(tokens) or (np.diff(offsets) < 0).any():
            raise TraceError(f"{path}: offsets must rise from 0 to the number of tokens, {len(tokens)}")
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            raise TraceError(f"{path}: tokens must lie below the vocabulary's size, {vocab_size}")
        return cls(tokens, offsets, vocab_size)

    def documents(self, chosen: Sequence[int]) -> "Trace":
        """These documents alone, in this order."""
        parts = [self.tokens[self.offsets[d] : self.offsets[d + 1]] for d in chosen]
        return Trace(np.concatenate(parts), np.cumsum([0, *map(len, parts)]), self.vocab_size)

    def sample(self, tokens: int) -> "Trace":
        """At most `tokens` of it: documents at even distances, as a trace may be sorted by source; the last is cut."""
        every = -(-len(self.tokens) // tokens)
        if every == 1:
            return self
        chosen = self.documents(range(0, len(self.offsets) - 1, every))
        return Trace(chosen.tokens[:tokens], np.minimum(chosen.offsets, tokens), self.vocab_size)


@dataclass(frozen=True)
class Steps:
    """Step s runs `tokens[bounds[s]:bounds[s + 1]]`, the next token of each `document` that is running."""

    tokens: list[int]
    documents: list[int]
    bounds: list[int]
    ends: dict[int, list[int]]  # documents whose last token runs in the step
    distinct: list[list[int]]  # each step's tokens, once each
    vocab_size: int
    warmup: int  # steps that are not measured

    def __len__(self) -> int:
        return len(self.distinct)

    @property
    def lookups(self) -> int:
        """In the measured steps."""
        return sum(map(len, self.distinct[self.warmup :]))

    @property
    def widest(self) -> int:
        """Slots that the largest step needs."""
        return max(map(len, self.distinct))

    def counts(self) -> Ints:
        """Of each token in the steps before the measured ones."""
        return np.bincount(self.tokens[: self.bounds[self.warmup]], minlength=self.vocab_size)


def interleave(trace: Trace, sequences: int) -> Steps:
    """Each sequence runs a token a step, then takes the next document when its own has ended. Half of it is warm-up."""
    lengths = np.diff(trace.offsets)
    begins = np.zeros(len(lengths), np.int64)
    lanes = np.zeros(len(lengths), np.int64)
    free = [(0, lane) for lane in range(sequences)]  # a heap of (step, sequence)
    ends: dict[int, list[int]] = {}
    for document in np.flatnonzero(lengths).tolist():
        begins[document], lanes[document] = begin, lane = heappop(free)
        end = begin + int(lengths[document])
        heappush(free, (end, lane))
        ends.setdefault(end - 1, []).append(document)
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    step_of = np.arange(len(trace.tokens)) - trace.offsets[:-1][document_of] + begins[document_of]
    order = np.lexsort((lanes[document_of], step_of))
    tokens = trace.tokens[order].tolist()
    bounds = np.searchsorted(step_of[order], np.arange(step_of.max() + 2)).tolist()
    distinct = [list(dict.fromkeys(tokens[a:b])) for a, b in pairwise(bounds)]
    return Steps(tokens, document_of[order].tolist(), bounds, ends, distinct, trace.vocab_size, len(distinct) // 2)


def _check(steps: Steps, slots: int) -> None:
    if slots < steps.widest:
        raise TraceError(f"{slots} slots do not hold the {steps.widest} records of the widest step; give more")


@dataclass
class HostTier:
    """The tier below, as tol/host.py keeps it: inclusive, and its policy sees only what the device tier misses."""

    slots: int
    policy: Policy
    resident: set[int] = field(default_factory=set)

    def hit(self, token: int, reading: set[int]) -> bool:
        """Whether a record that the device tier misses is here; if not, it comes in unless all slots are in `reading`,
        the step's reads so far."""
        if token in self.resident:
            self.policy.touch(token)
            return True
        if len(self.resident) == self.slots:
            victim = self.policy.victim(lambda key: key not in reading)
            if victim is None:
                return False
            self.policy.remove(victim)
            self.resident.remove(victim)
        self.policy.insert(token)
        self.resident.add(token)
        reading.add(token)
        return False


def hit_rate(steps: Steps, slots: int, policy: Policy, progress: Progress | None = None) -> float:
    """Hits per lookup in the second half of the steps. A lookup is a distinct token of a step. Raises as `misses`."""
    lookups = steps.lookups
    return (lookups - int(misses(steps, slots, policy, progress=progress).sum())) / lookups


def misses(
    steps: Steps, slots: int, policy: Policy, host: HostTier | None = None, progress: Progress | None = None
) -> Ints:
    """Misses of each step of the second half, int64 [steps, 2]: served by the host tier, and read from disk.

    The policies are called as the pager calls them. All of a step's tokens are in use until it ends. Raises TraceError
    if a step needs more slots than there are.
    """
    _check(steps, slots)
    below = host if host is not None else HostTier(0, LRU())
    resident: set[int] = set()
    counts = np.zeros((len(steps) - steps.warmup, 2), np.int64)
    for step, wanted in enumerate(steps.distinct):
        for at in range(steps.bounds[step], steps.bounds[step + 1]):
            policy.advance(steps.documents[at], (steps.tokens[at],))
            below.policy.advance(steps.documents[at], (steps.tokens[at],))
        missing = _use(policy, resident, wanted, slots)
        reading: set[int] = set()
        from_host = sum(below.hit(token, reading) for token in missing)
        if step >= steps.warmup:
            counts[step - steps.warmup] = from_host, len(missing) - from_host
        for document in steps.ends.get(step, ()):
            policy.end(document)
            below.policy.end(document)
        if progress is not None and step % 4096 == 0:
            progress(step, len(steps))
    return counts


def _use(policy: Policy, resident: set[int], wanted: list[int], slots: int) -> list[int]:
    """One step; returns its misses."""
    in_use = set(wanted)
    missing = []
    for token in wanted:
        if token in resident:
            policy.touch(token)
        else:
            missing.append(token)
    for token in missing:
        if len(resident) == slots:
            victim = policy.victim(lambda key: key not in in_use)
            if victim is None:
                raise RuntimeError("the policy names no victim though records are out of use")
            policy.remove(victim)
            resident.remove(victim)
        policy.insert(token)
        policy.touch(token)
        resident.add(token)
    return missing


def oracle_hit_rate(steps: Steps, slots: int) -> float:
    """Belady's optimum, measured as `hit_rate` measures: out goes the record whose next use is farthest away."""
    _check(steps, slots)
    stride = steps.vocab_size
    following = _next_uses(steps)
    heap: list[int] = []  # -(next use x stride + token)
    entry_of: dict[int, int] = {}  # of what is resident
    hits = lookups = cursor = 0
    for step, wanted in enumerate(steps.distinct):
        missing = sum(token not in entry_of for token in wanted)
        surplus = len(entry_of) + missing - slots
        # Entries of this step's own tokens name this step, the nearest of all: they are never popped here.
        while surplus > 0:
            entry = heappop(heap)
            if entry_of.get(-entry % stride) == entry:
                del entry_of[-entry % stride]
                surplus -= 1
        for token in wanted:
            entry_of[token] = entry = -(following[cursor] * stride + token)
            heappush(heap, entry)
            cursor += 1
        if step >= steps.warmup:
            lookups += len(wanted)
            hits += len(wanted) - missing
    return hits / lookups


def _next_uses(steps: Steps) -> list[int]:
    """For each lookup, in order, the step of the same token's next one; the number of steps if there is none."""
    tokens = np.concatenate([np.array(wanted, np.int64) for wanted in steps.distinct])
    step_of = np.repeat(np.arange(len(steps)), [len(wanted) for wanted in steps.distinct])
    order = np.lexsort((step_of, tokens))
    result = np.full(len(tokens), len(steps), np.int64)
    again = tokens[order[1:]] == tokens[order[:-1]]
    result[order[:-1][again]] = step_of[order[1:][again]]
    return result.tolist()


@dataclass(frozen=True)
class Figures:
    policy: str
    slots: int
    sequences: int
    hit_rate: float
    lru_hit_rate: float
    oracle_hit_rate: float


def replay(
    steps: Steps,
    sequences: int,
    slots: int,
    name: str,
    frequent: Sequence[int],
    progress: Progress | None = None,
) -> Figures:
    """Raises TraceError if a step needs more slots than there are, ValueError for an unknown policy."""
    policy = make_policy(name, slots, frequent)
    lru = hit_rate(steps, slots, LRU(), None if name != "lru" else progress)
    own = lru if name == "lru" else hit_rate(steps, slots, policy, progress)
    return Figures(name, slots, sequences, own, lru, oracle_hit_rate(steps, slots))


def render(figures: Sequence[Figures], vocab_size: int) -> str:
    """A table, and the same as a curve: each line from the lowest LRU rate to 100%."""
    lowest = min(figure.lru_hit_rate for figure in figures)
    lines = [
        f"{'slots':>9} {'share':>6} {'LRU':>7} {figures[0].policy:>11} {'optimum':>8}  |L LRU, * policy, O optimum"
    ]
    for figure in figures:
        rates = {"O": figure.oracle_hit_rate, "*": figure.hit_rate, "L": figure.lru_hit_rate}
        curve = [" "] * 41
        for mark, rate in rates.items():
            curve[min(40, max(0, round(40 * (rate - lowest) / max(1e-9, 1 - lowest))))] = mark
        lines.append(
            f"{figure.slots:>9,} {figure.slots / vocab_size:>6.1%} {figure.lru_hit_rate:>7.2%} "
            f"{figure.hit_rate:>11.2%} {figure.oracle_hit_rate:>8.2%}  |{''.join(curve).rstrip()}"
        )
    return "\n".join(lines)
