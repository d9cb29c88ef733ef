"""What a cache of a given size would leave to the tiers below it: replayed from a trace, or estimated from counts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import lgamma

import numpy as np
import numpy.typing as npt

from tolserve.tol.frequencies import Counts, most_frequent
from tolserve.tol.policy import NEED_FREQUENCIES, make_policy, pinned_slots
from tolserve.tol.replay import HostTier, Steps, Trace, TraceError, interleave, misses

Floats = npt.NDArray[np.float64]

# Rank r of a vocabulary weighs (r + 3) ** -1.2. Fitted to LRU on 6.2 million tokens of mixed English in LLaMA-3's
# vocabulary at 1, 3.2, 5, 10 and 20% of it and at 1 and 32 sequences: the largest error is 5.5 points of hit rate.
# No such weights fit better, since text repeats itself and independent draws do not. On the same kind of text in the
# demo model's vocabulary of 8,192 the largest error is 8.1 points. The tokens' own counts are worse, 17 and 24 points.
_ZIPF_EXPONENT, _ZIPF_SHIFT = 1.2, 3.0
# Of the shared trace: six cache sizes at 1 and 32 sequences then take LRU a quarter of a minute and `context`, the
# slowest policy, about one. Hit rates lie up to 1.0 points above those of all 6.2 million tokens (1%: 1.0, 10%: 0.3).
TRACE_TOKENS = 1_000_000
_ALMOST = 1 - 1e-12
_FOR_EVER = 1e15  # steps


@dataclass(frozen=True)
class Demand:
    """A step's records, on average, and how many of them come from where. A lookup is a distinct token of a step."""

    lookups: float
    host: float  # misses that the host tier serves
    disk: float  # misses that are read from disk
    reads: Floats  # [n]: share of the steps that read 0, 1, ... n - 1 records from disk

    @property
    def hit_rate(self) -> float:
        return 1 - (self.host + self.disk) / self.lookups


def replayed(
    steps: Steps,
    slots: int,
    policy: str,
    host_slots: int = 0,
    frequent: Sequence[int] | None = None,
) -> Demand | None:
    """The second half of the steps through the policy's own code; None if a step needs more slots than there are."""
    lookups = steps.lookups / (len(steps) - steps.warmup)
    if slots >= steps.vocab_size:
        return Demand(lookups, 0.0, 0.0, np.ones(1))
    if slots < steps.widest:
        return None
    host = (
        HostTier(host_slots, make_policy(policy, host_slots, frequent)) if 0 < host_slots < steps.vocab_size else None
    )
    counts = misses(steps, slots, make_policy(policy, slots, frequent), host)
    if host_slots >= steps.vocab_size:  # it was filled at the start
        counts = np.stack((counts.sum(axis=1), np.zeros(len(counts), np.int64)), axis=1)
    from_host, from_disk = counts.mean(axis=0).tolist()
    return Demand(lookups, from_host, from_disk, np.bincount(counts[:, 1]) / len(counts))


def independent(weights: Floats, sequences: int, slots: int, policy: str, host_slots: int = 0) -> Demand | None:
    """An estimate for tokens drawn independently by their weights; None if a step may need more slots than there are.

    Che's approximation of LRU, per step: a record stays for T steps after its use, and T is such that as many are there
    as there are slots (Che, Tung, Wang: "Hierarchical Web Caching Systems", 2002). `static` and `half-pinned` are an
    LRU beside the heaviest tokens; for other policies it is the estimate of LRU. The host tier sees what the device
    tier misses: a token again at the earliest when that has dropped it, as in the paper.
    """
    listed = int(np.count_nonzero(weights))
    if slots < min(sequences, listed):
        return None
    heaviest_first = np.sort(weights)[::-1] / weights.sum()
    asked = _in_a_step(heaviest_first, sequences)
    lookups = float(asked.sum())
    if slots >= len(weights):
        return Demand(lookups, 0.0, 0.0, np.ones(1))
    stay = _stay(asked, slots, min(listed, pinned_slots(policy, slots)))
    missed = asked * _gone(asked, stay)
    read = missed if host_slots < len(weights) else np.zeros(len(weights))
    if 0 < host_slots < len(weights):
        host_stay = _stay(missed, host_slots, min(listed, pinned_slots(policy, host_slots)))
        read = missed * _gone(missed, np.maximum(host_stay - stay, 0))
    disk = float(read.sum())
    return Demand(lookups, float(missed.sum()) - disk, disk, _binomial(sequences, disk / sequences))


def zipf(vocab_size: int) -> Floats:
    """Weights of a vocabulary's tokens, the heaviest first, where nothing is known of the text."""
    return np.power(np.arange(1, vocab_size + 1) + _ZIPF_SHIFT, -_ZIPF_EXPONENT)


def _in_a_step(chances: Floats, sequences: int) -> Floats:
    """Chance that one of a step's tokens is this one; below 1, whose logarithm is needed."""
    return np.minimum(-np.expm1(sequences * np.log1p(-np.minimum(chances, _ALMOST))), _ALMOST)


def _gone(asked: Floats, stay: Floats) -> Floats:
    """Chance that a record has left by its next use."""
    return np.exp(stay * np.log1p(-asked))


def _stay(asked: Floats, slots: int, pinned: int) -> Floats:
    """Steps that each record stays after its use: for ever among the first `pinned`, the same for all others."""
    room = slots - pinned
    others = asked[pinned:]
    others = others[others > 0]
    shortest, longest = 1e-3, _FOR_EVER
    if len(others) <= room:
        shortest = longest
    while longest > shortest * 1.0001:
        middle = (shortest * longest) ** 0.5
        fits = (1 - _gone(others, np.full(1, middle))).sum() <= room
        shortest, longest = (middle, longest) if fits else (shortest, middle)
    return np.where(np.arange(len(asked)) < pinned, _FOR_EVER, shortest)


def _binomial(most: int, chance: float) -> Floats:
    """Share of steps with 0, 1, ... `most` reads when each of `most` lookups reads with this chance."""
    if not 0 < chance < 1:
        return np.eye(most + 1)[most if chance >= 1 else 0]
    logs = [lgamma(most + 1) - lgamma(n + 1) - lgamma(most - n + 1) for n in range(most + 1)]
    reads = np.arange(most + 1)
    return np.exp(np.array(logs) + reads * np.log(chance) + (most - reads) * np.log1p(-chance))


@dataclass
class FromTrace:
    """Demand by replay of a part of a trace. `counts` is the list for policies that pin; without one it is what the
    replay's first half holds. Raises TraceError for a trace of another vocabulary."""

    trace: Trace
    vocab_size: int
    policy: str
    host_slots: int
    counts: Counts | None
    _steps: dict[int, Steps] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.trace.vocab_size != self.vocab_size:
            raise TraceError(
                f"the trace is of a vocabulary of {self.trace.vocab_size:,} tokens, the model has {self.vocab_size:,}; "
                "record one with the model's own tokenizer"
            )
        self.sample = self.trace.sample(TRACE_TOKENS)

    def __call__(self, slots: int, sequences: int) -> Demand | None:
        if sequences not in self._steps:
            self._steps[sequences] = interleave(self.sample, sequences)
        steps = self._steps[sequences]
        frequent = most_frequent(steps.counts() if self.counts is None else self.counts)
        return replayed(steps, slots, self.policy, self.host_slots, frequent)

    @property
    def note(self) -> str:
        part, whole = len(self.sample.tokens), len(self.trace.tokens)
        spread = "" if part == whole else " (documents at even distances)"
        pins = self.policy in NEED_FREQUENCIES and self.counts is None
        return (
            f"Hit rates: {self.policy} replayed over {part:,} of the trace's {whole:,} tokens{spread}, second half "
            f"measured{'; it pins by the counts of the first half' if pins else ''}."
        )


@dataclass
class FromCounts:
    """Demand of independent tokens that occur as often as a list says, or by a Zipf law where there is none."""

    counts: Counts | None
    vocab_size: int
    policy: str
    host_slots: int

    def __call__(self, slots: int, sequences: int) -> Demand | None:
        weights = zipf(self.vocab_size) if self.counts is None else self.counts.astype(np.float64)
        return independent(weights, sequences, slots, self.policy, self.host_slots)

    @property
    def note(self) -> str:
        if self.counts is None:
            source = (
                "a rough guess from a Zipf law fitted to mixed English, within 6 points there (128,256 tokens) and 8 "
                "points in a vocabulary of 8,192. --trace replays the real policy on your text."
            )
        else:
            source = (
                "an estimate from the frequency list (Che's approximation), which takes tokens as independent. Texts "
                "repeat themselves, so what is not pinned really hits more: by 5 to 25 points in a cache of under a "
                "tenth of the vocabulary. --trace replays the real policy on your text."
            )
        known = self.policy == "lru" or self.policy in NEED_FREQUENCIES
        other = "" if known else f" It is LRU's; {self.policy} has none and should hit more."
        return f"Hit rates: {source}{other}"
