"""What decides the result of a training run, and the file that says so (paper section 4)."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tolserve.model.checkpoint import WEIGHTS
from tolserve.model.config import ModelConfig
from tolserve.tol.files import replacing

# Files of a model, which a run writes at its end. One that has them and no recipe.json is somebody's.
_MODEL = (WEIGHTS, f"{WEIGHTS}.index.json", "config.json")


class TrainError(ValueError):
    """A run that cannot start; the message says what to change."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of a run.

    On the CPU of one machine, with the same numbers of threads and processes and the same torch, two runs of one recipe
    give the same weights, and one that was stopped and goes on too. CUDA's attention and gathers add gradients up in
    any order, and what is compiled may depend on the steps that a process has seen: there results are close, not equal.
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


def claim(out: Path, shape: ModelConfig, recipe: Recipe) -> None:
    """Take a folder for one recipe: continuing with another would make loss.csv and the card lie.

    Raises TrainError where the folder's recipe.json says something else, or a model lies there that no run made.
    """
    path = out / "recipe.json"
    if path.exists():
        if _read(path) != (shape, recipe):
            raise TrainError(f"{path} holds another recipe; give --out a new folder, or the same options to resume")
        return
    if models := [name for name in _MODEL if (out / name).exists()]:
        raise TrainError(f"{out} holds a model ({models[0]}) that no run made; give --out a new folder")
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"shape": asdict(shape), "recipe": asdict(recipe)}, indent=2) + "\n"
    with replacing(path) as file:
        file.write(text.encode())


@contextmanager
def claimed(out: Path, shape: ModelConfig, recipe: Recipe) -> Iterator[None]:
    """Take a folder as `claim` does, for the block that prepares the run.

    Where it fails, a folder that was taken now is given back with what was made in it, so that the same command with a
    mistake less can have it.
    """
    path, before = out / "recipe.json", _prepared(out)
    claim(out, shape, recipe)
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
