"""What decides the result of a training run, and the file that says so (paper section 4)."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tolserve.model.config import ModelConfig
from tolserve.tol.files import replacing


class TrainError(ValueError):
    """A run that cannot start; the message says what to change."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of a run. Two runs of one recipe on one machine give the same weights.

    A field with a default was added later: a recipe.json without it means the default.
    """

    data: tuple[str, ...]
    held_out: str | None
    tokenizer: str | None
    batch: int  # sequences per step, over all processes and micro-batches
    length: int  # tokens per sequence
    steps: int
    warmup: int
    peak_lr: float
    min_lr: float
    weight_decay: float
    beta1: float
    beta2: float
    z_loss: float
    clip: float
    seed: int
    accumulate: int = 1  # micro-batches that a process cuts its share of a step into
    autocast: Literal["off", "bf16"] = "off"
    compile: bool = False
    init_from: str | None = None  # checkpoint whose attention, norms, embedding and head are taken over
    freeze: bool = False  # train only what was not taken over
    distil: bool = False  # learn the distribution of init_from's model instead of the text's next token

    def __post_init__(self) -> None:
        for name in ("freeze", "distil"):
            if getattr(self, name) and self.init_from is None:
                raise TrainError(f"--{name} needs --init-from, a model to start from")

    def learning_rate(self, step: int) -> float:
        """Linear warm-up to `peak_lr`, then a cosine that reaches `min_lr` behind the last step."""
        if step < self.warmup:
            return self.peak_lr * (step + 1) / self.warmup
        share = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def _read(path: Path) -> tuple[ModelConfig, Recipe] | None:
    """None for what another version wrote: it cannot be continued here."""
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
        return ModelConfig(**raw["shape"]), Recipe(**raw["recipe"] | {"data": tuple(raw["recipe"]["data"])})
    except (ValueError, KeyError, TypeError):
        return None


@contextmanager
def claimed(out: Path, shape: ModelConfig, recipe: Recipe) -> Iterator[None]:
    """Take a folder for one recipe: continuing with another would make loss.csv and the card lie.

    The block prepares the run. Where it fails, a folder that was taken now is given back with what was made in it, so
    that the same command with a mistake less can have it. Raises TrainError where the folder's recipe.json says
    something else.
    """
    path, before = out / "recipe.json", _prepared(out)
    if path not in before:
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"shape": asdict(shape), "recipe": asdict(recipe)}, indent=2) + "\n"
        with replacing(path) as file:
            file.write(text.encode())
    elif _read(path) != (shape, recipe):
        raise TrainError(f"{path} holds another recipe; give --out a new folder, or the same options to resume")
    try:
        yield
    except Exception:
        if path not in before:
            for made in _prepared(out) - before:
                made.unlink()
        raise


def _prepared(out: Path) -> set[Path]:
    """What a run makes before its first step, as far as it is there."""
    files = {out / "recipe.json", out / "tokenizer.json", *(out / "state").glob("tokens-*.npy")}
    return {path for path in files if path.exists()}
