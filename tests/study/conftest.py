"""Tiny models under study, and a BLiMP of four paradigms."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tiny import tiny_config
from tolserve.model.config import FfnVariant, ModelConfig
from tolserve.study.evaluate import Studied, load

# UID, linguistics_term, pairs.
PARADIGMS = [
    (
        "irregular",
        "irregular_forms",
        [("The boy wore it.", "The boy worn it."), ("A light was seen.", "A light was saw.")],
    ),
    ("gender", "anaphor_agreement", [("Katherine saw herself.", "Katherine saw himself.")]),
    ("island", "island_effects", [("Who had lived in it?", "Who lived had in it in?"), ("No answer.", "Answer no.")]),
    ("distractor", "subject_verb_agreement", [("The house of years stands.", "The house of years stand.")]),
]


@pytest.fixture
def blimp_zip(tmp_path: Path) -> Path:
    path = tmp_path / "blimp.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for uid, term, pairs in PARADIGMS:
            lines = [
                json.dumps({"sentence_good": good, "sentence_bad": bad, "UID": uid, "linguistics_term": term})
                for good, bad in pairs
            ]
            archive.writestr(f"data/{uid}.jsonl", "\n".join(lines) + "\n")
            archive.writestr(f"__MACOSX/data/._{uid}.jsonl", b"\xb0 not text")
    return path


@pytest.fixture(scope="session")
def studied_of(model_dir_of: Callable[[ModelConfig], Path]) -> Callable[[FfnVariant], Studied]:
    """A tiny model of a variant, read from its folder."""
    read: dict[FfnVariant, Studied] = {}

    def of(variant: FfnVariant) -> Studied:
        if variant not in read:
            read[variant] = load(model_dir_of(tiny_config(variant)))
        return read[variant]

    return of
