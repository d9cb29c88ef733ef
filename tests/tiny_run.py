"""Training runs that take a second: a text of few words, and a recipe for it."""

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from tiny import TEXT
from tolserve.train.loop import Run
from tolserve.train.recipe import Recipe

STEPS = 8
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "dog", "run", "far", "away", "home", "again"]


def sentences(seed: int) -> str:
    chosen = np.random.default_rng(seed).integers(len(WORDS), size=400)
    return " ".join(WORDS[i] for i in chosen) + " " + TEXT


def write_texts(folder: Path, tokenizer: Tokenizer) -> Path:
    """What `recipe_of` names."""
    for seed, name in enumerate(("first", "second", "unseen")):
        (folder / f"{name}.txt").write_text(sentences(seed))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    fixed = {
        "data": (str(folder / "first.txt"), str(folder / "second.txt")),
        "held_out": str(folder / "unseen.txt"),
        "tokenizer": str(folder / "tokenizer.json"),
        "batch": 2,
        "length": 24,
        "steps": STEPS,
        "warmup": 3,
        "peak_lr": 1e-2,
        "min_lr": 1e-3,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "z_loss": 1e-6,
        "clip": 1.0,
        "seed": 5,
    }
    return Recipe(**fixed | changes)


def train(run: Run, save_every: int = 3) -> Run:
    run.train(save_every, log_every=2, tell=lambda line: None)
    return run
