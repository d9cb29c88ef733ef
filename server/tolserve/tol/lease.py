"""A step's claim on its records."""

from collections.abc import Callable

from tolserve.tol.part import Fill
from tolserve.tol.table import RecordError


class RecordsUnavailable(RuntimeError):  # noqa: N818 - says what happened; RecordError is one record's
    """Records that a step needs and that could not be read: `errors` by token."""

    def __init__(self, errors: dict[int, RecordError]) -> None:
        super().__init__("; ".join(str(error) for error in errors.values()))
        self.errors = errors


class Lease:
    """The records stay in their slots until the lease is released.

    `slots` maps, for each part of the device tier, each distinct token to its slot; `hits` are the tokens that were in
    the device tier, whole, when asked for (by an earlier lease, of those that acquire took over).
    """

    def __init__(self, bring: "Callable[[Lease, int], float]", tokens: dict[int, None]) -> None:
        """`bring` is the pager's."""
        self._bring = bring
        self.tokens = tokens  # distinct, in order
        self.slots: list[dict[int, int]] = []
        self.hits: frozenset[int] = frozenset()
        self.absent: dict[int, list[int]] = {}  # parts that had to be brought, by token
        self.fills: list[Fill] = []  # that it waits for
        self.lost: set[int] = set()  # tokens whose fill failed: their slots are others' by now
        self.unreported = 0.0  # seconds that acquire was blocked, reported by the first wait, if there is one
        self.stalled = False
        self.in_place: list[int] = []  # tokens whose records the step reads in host memory

    def holds(self, token: int) -> bool:
        return token in self.tokens and token not in self.lost

    def wait(self, part: int = -1) -> float:
        """Block until the rows of this part and those before it are in; on CUDA the current stream then waits for the
        copies, not the host.

        Returns the seconds that this call waited (the first call adds what `acquire` was blocked), 0.0 when all was
        there. Raises RecordsUnavailable naming the tokens that failed: their slots hold nothing of theirs.
        """
        waited = self._bring(self, part)
        if errors := {fill.token: fill.error for fill in self.fills if fill.error is not None}:
            raise RecordsUnavailable(errors)
        return waited
