"""Streaming text: whatever the pieces, the result is that of the whole."""

import itertools

from hypothesis import example, given
from hypothesis import strategies as st

from tolserve.api.detokenize import StopMatcher, Utf8Decoder

SHORT = st.text("ab🙂", max_size=12)
STOPS = st.lists(st.text("ab🙂", min_size=1, max_size=4), max_size=3)


def cut(whole: str | bytes, cuts: list[int]) -> list[str | bytes]:
    edges = sorted({0, len(whole), *(c % (len(whole) + 1) for c in cuts)})
    return [whole[a:b] for a, b in itertools.pairwise(edges)]


@given(st.binary(max_size=24), st.lists(st.integers(0, 100), max_size=8))
def test_pieces_of_bytes_give_the_text_of_the_whole(data: bytes, cuts: list[int]) -> None:
    decoder = Utf8Decoder()
    text = "".join(decoder.push(piece) for piece in cut(data, cuts))
    assert text + decoder.flush() == data.decode(errors="replace")


@given(st.text(max_size=12))
def test_no_half_character_is_ever_shown(text: str) -> None:
    """Byte by byte, every prefix that is shown is a prefix of the text, whole characters as soon as they are whole."""
    decoder = Utf8Decoder()
    shown = ""
    for byte in text.encode():
        shown += decoder.push(bytes([byte]))
        assert text.startswith(shown)
    assert shown == text


def reference(text: str, stops: list[str], include: bool) -> tuple[str, bool]:
    """Reads character by character and stops at the first that completes a stop string, the longest if several."""
    for end in range(1, len(text) + 1):
        completed = [stop for stop in stops if text[:end].endswith(stop)]
        if completed:
            return (text[:end] if include else text[: end - max(map(len, completed))]), True
    return text, False


@example("xabb", ["abb", "b"], False, [])  # the one that ends first, not the one that begins first
@example("xab", ["b", "ab"], True, [])  # of those that end together the longest
@given(SHORT, STOPS, st.booleans(), st.lists(st.integers(0, 100), max_size=8))
def test_stop_strings_cut_the_same_however_the_text_comes(
    text: str, stops: list[str], include: bool, cuts: list[int]
) -> None:
    matcher = StopMatcher(stops, include)
    shown = "".join(matcher.push(str(piece)) for piece in cut(text, cuts))
    assert (shown + matcher.flush(), matcher.matched) == reference(text, stops, include)


@given(SHORT, STOPS)
def test_only_a_possible_beginning_of_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for end, character in enumerate(text, 1):
        shown += matcher.push(character)
        if matcher.matched:
            return
        held = text[len(shown) : end]
        assert text[:end] == shown + held
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_nothing_comes_after_a_match() -> None:
    matcher = StopMatcher(["b"])
    assert matcher.push("ab") == "a"
    assert matcher.push("c") == ""
    assert matcher.flush() == ""
