"""BLiMP's scores against the slow reference, sentence by sentence, and the grouping of its phenomena."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from slow_study import Scaled
from tolserve.model.config import FfnVariant
from tolserve.study.blimp import (
    PHENOMENA,
    Pairs,
    accuracies,
    by_group,
    by_phenomenon,
    grouping,
    log_probabilities,
    read_pairs,
)
from tolserve.study.evaluate import Forward, Studied
from tolserve.study.report import StudyError


@pytest.mark.parametrize("variant", ["base", "memory", "flex"])
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_the_likelier_whole_sentence_wins(
    studied_of: Callable[[FfnVariant], Studied], blimp_zip: Path, variant: FfnVariant, scale: float
) -> None:
    studied = studied_of(variant)
    reference = Scaled(studied, None, [scale] * 2)
    pairs = read_pairs(studied, blimp_zip, 1000)
    expected = {}
    for paradigm, group in pairs.sentences.items():
        scores = [[sum(reference.log_probabilities(tokens.tolist())) for tokens in pair] for pair in group]
        expected[paradigm] = np.mean([good > bad for good, bad in scores])
    assert accuracies(studied, pairs, scale=scale) == expected


def test_a_sum_runs_from_the_token_asked_for(studied_of: Callable[[FfnVariant], Studied]) -> None:
    studied = studied_of("memory")
    reference = Scaled(studied, None, [1.0, 1.0])
    generator = np.random.default_rng(0)
    sentences = [generator.integers(0, studied.config.vocab_size, size).astype(np.int32) for size in (5, 3, 5, 9, 1)]
    firsts = [1, 2, 4, 9, 1]
    expected = [
        sum(reference.log_probabilities(s.tolist())[first - 1 :]) if len(s) > 1 else 0.0
        for s, first in zip(sentences, firsts, strict=True)
    ]
    assert log_probabilities(Forward(studied), sentences, firsts) == pytest.approx(expected, rel=1e-4)
    assert expected[3] == 0


def test_a_tie_is_half_a_hit(studied_of: Callable[[FfnVariant], Studied]) -> None:
    same = np.array([0, 7, 8], np.int32)
    pairs = Pairs({"same": [(same, same.copy())]}, {"same": "binding"})
    assert accuracies(studied_of("memory"), pairs) == {"same": 0.5}


def test_pairs_are_the_first_of_each_paradigm(studied_of: Callable[[FfnVariant], Studied], blimp_zip: Path) -> None:
    studied = studied_of("memory")
    pairs = read_pairs(studied, blimp_zip, 1)
    assert {name: len(group) for name, group in pairs.sentences.items()} == dict.fromkeys(
        ("distractor", "gender", "irregular", "island"), 1
    )
    good, bad = pairs.sentences["irregular"][0]
    assert good[0] == bad[0] == studied.separator
    assert studied.tokenizer.decode(good[1:].tolist()) == "The boy wore it."
    assert studied.tokenizer.decode(bad[1:].tolist()) == "The boy worn it."


def test_groups_are_means_over_paradigms() -> None:
    names = {"a": "irregular_forms", "b": "irregular_forms", "c": "anaphor_agreement", "d": "island_effects"}
    accuracy = {"a": 1.0, "b": 0.5, "c": 0.0, "d": 0.75}
    pairs = Pairs({}, names)
    assert by_phenomenon(pairs, accuracy) == {"irregular_forms": 0.75, "anaphor_agreement": 0.0, "island_effects": 0.75}
    assert by_group(pairs, accuracy) == {"recall": 0.5, "structure": 0.75, "all": 0.5625}
    assert {phenomenon.group for phenomenon in PHENOMENA.values()} == {"recall", "structure"}
    assert grouping()["ellipsis"] == {"group": "structure", "reason": PHENOMENA["ellipsis"].reason}


def test_another_file_is_refused(studied_of: Callable[[FfnVariant], Studied], tmp_path: Path, blimp_zip: Path) -> None:
    studied, text, empty, strange = studied_of("memory"), tmp_path / "text.zip", tmp_path / "e.zip", tmp_path / "s.zip"
    text.write_text("no zip")
    with zipfile.ZipFile(empty, "w") as archive:
        archive.writestr("readme", "nothing")
    with zipfile.ZipFile(strange, "w") as archive:
        archive.writestr(
            "x.jsonl", '{"sentence_good": "a", "sentence_bad": "b", "UID": "x", "linguistics_term": "rhyme"}'
        )
    for path, said in ((tmp_path / "none.zip", "BLiMP"), (text, "BLiMP"), (empty, "no .jsonl"), (strange, "rhyme")):
        with pytest.raises(StudyError, match=said):
            read_pairs(studied, path, 1)
    with pytest.raises(StudyError, match="--pairs 0"):
        read_pairs(studied, blimp_zip, 0)


def test_the_docs_give_the_grouping_as_it_is() -> None:
    text = (Path(__file__).parents[2] / "docs" / "studies.md").read_text()
    for name, phenomenon in PHENOMENA.items():
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[2:] == [phenomenon.group, phenomenon.reason]
