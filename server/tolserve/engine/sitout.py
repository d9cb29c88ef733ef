"""Sequences that let one step pass, in which their record comes from disk, instead of having all others wait for it."""

from collections.abc import Iterable

from tolserve.engine.sequence import Chunk, Sequence
from tolserve.tol.pager import Pager

# Of a step's time in the running mean: some ten steps are remembered, so that a batch that grows is soon noticed.
_NEW = 0.1


class SitOut:
    """Decides by what each way costs: the step's time for those that sit out, or the reads' time for everybody.

    With a step of 2 ms, 32 sequences and 2 records to come, 0.13 ms of the step are lost against 0.2 ms of waiting;
    with one of 100 ms nobody sits out. Under a clock of 2 ms, from disk, 32 sequences ran at 0.92 of the speed of a
    resident table that way, and at 0.88 if all waited (benchmarks/paging.py, int4 records).
    """

    def __init__(self, pager: Pager, max_fills: int) -> None:
        """`max_fills` bounds the reads ahead, and so those who sit out: each one's read must start now."""
        self._pager, self._max_fills = pager, max_fills
        self._step_seconds = float("inf")  # of a decode, without its stall; unknown at first: nobody sits out

    def ran(self, chunks: list[Chunk], seconds: float) -> None:
        """A step of these chunks took so long, what it waited for rows left out."""
        if all(chunk.count == 1 for chunk in chunks):
            known = self._step_seconds != float("inf")
            self._step_seconds = (1 - _NEW) * self._step_seconds + _NEW * seconds if known else seconds

    def choose(self, running: Iterable[Sequence]) -> set[str]:
        """Ids of the sequences that shall not be in the next step; never all that decode, and none twice running."""
        decoding = [sequence for sequence in running if sequence.pending == 1]
        if self._step_seconds >= self._pager.read_seconds * len(decoding):  # not even for one of them
            for sequence in decoding:
                sequence.sat_out = False
            return set()
        late = [sequence for sequence in decoding if self._is_on_disk(sequence.tokens[-1])]
        fresh = [sequence.request_id for sequence in late if not sequence.sat_out]
        chosen = set(fresh[: max(0, self._max_fills - self._pager.ahead)])
        if len(chosen) == len(decoding) or self._step_seconds * len(late) >= self._pager.read_seconds * len(decoding):
            chosen = set()
        for sequence in decoding:
            sequence.sat_out = sequence.request_id in chosen
        return chosen

    def _is_on_disk(self, token: int) -> bool:
        return not self._pager.present(token) and token not in self._pager.host
