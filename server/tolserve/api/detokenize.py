"""Tokens to text as they come: never half a character, and never text that a stop string may still take back."""

import codecs
from collections.abc import Iterable

# A stop string longer than a line of prose is a mistake, and what may be held back is bounded by it.
MAX_STOP_CHARACTERS = 256


class Utf8Decoder:
    """Bytes in pieces to text, holding back an unfinished character (at most three bytes).

    Bytes that can never become a character give U+FFFD, as in `bytes.decode(errors="replace")` of the whole.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, data: bytes) -> str:
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left at the end: an unfinished character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)


class StopMatcher:
    """Cuts text at the first stop string, holding back what may be the beginning of one.

    Of several matches the one that ends first counts, and of those the longest: so the result does not depend on how
    the text was cut into pieces.
    """

    def __init__(self, stops: Iterable[str], include: bool = False) -> None:
        """`include` keeps the stop string itself in the text."""
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """Text that is certain. After a match (`matched`) all further text is dropped."""
        if self.matched:
            return ""
        self._held += text
        if (found := self._first_match()) is not None:
            self.matched = True
            start, end = found
            return self._held[: end if self._include else start]
        keep = self._unfinished()
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain

    def flush(self) -> str:
        """What was held back for a stop string that never came."""
        held, self._held = self._held, ""
        return "" if self.matched else held

    def _first_match(self) -> tuple[int, int] | None:
        matches = [(at, at + len(stop)) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        return min(matches, key=lambda match: (match[1], match[0]), default=None)

    def _unfinished(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
