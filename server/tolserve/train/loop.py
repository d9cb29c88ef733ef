"""The training loop: AdamW, warm-up and cosine, cross entropy with z-loss, exact resume (paper section 4)."""

import ctypes
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from tolserve.model.checkpoint import compute_fingerprint, save_checkpoint, save_tensors
from tolserve.model.config import ModelConfig
from tolserve.model.transformer import Transformer
from tolserve.tol.files import replacing
from tolserve.train.data import Sequences, Tokens
from tolserve.train.evaluate import Loss, evaluate
from tolserve.train.objective import Objective
from tolserve.train.ranks import ALONE, Ranks
from tolserve.train.rate import distinct_share, matrix_rate, training_flops
from tolserve.train.recipe import Recipe, TrainError, claimed
from tolserve.train.start import TOKENIZER_FILES, load_teacher, take_over
from tolserve.train.text import Text
from tolserve.train.tokenizer import save_tokenizer

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed memory instead of returning it to the kernel.

    A step frees and takes back hundreds of megabytes of activations; page faults on them cost 1.4 x of the whole
    step (10M parameters, 8,192 tokens, 2 cores: 2,350 against 3,390 tokens/s). Does nothing on another libc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, top_pad, mmap_max = -1, -2, -4
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 256 * 2**20)
        mallopt(mmap_max, 0)


def tell_people(line: str) -> None:
    """On standard error: standard output is for what a command was asked for."""
    print(line, file=sys.stderr)


def make_optimizer(model: Transformer, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over what trains; matrices decay, norms do not."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=(recipe.beta1, recipe.beta2), fused=True)


class Run:
    """One training run in a folder: model files at its top, resumable state under `state/`, `loss.csv` beside it."""

    def __init__(self, out: Path, shape: ModelConfig, recipe: Recipe, ranks: Ranks = ALONE) -> None:
        self.out, self.state_dir, self.recipe, self.ranks = out, out / "state", recipe, ranks
        if recipe.length > shape.max_position_embeddings:
            raise TrainError(f"--length {recipe.length}: the model has {shape.max_position_embeddings} positions")
        with claimed(out, shape, recipe) if ranks.first else nullcontext():
            self._prepare(shape)
        self.step, self.seconds = 0, 0.0
        self.losses: list[float] = []  # of the steps since the last row of loss.csv
        self._resume()

    def _prepare(self, shape: ModelConfig) -> None:
        """Everything that can be refused, so that it is refused before the first step."""
        recipe, ranks = self.recipe, self.ranks
        with ranks.first_ahead():
            self.text = Text.prepare(self.out, shape, recipe)
            self.sequences = Sequences(self.text.streams(self.state_dir), recipe.length, recipe.seed)
            self.held_out = self.text.held_out() if ranks.first else None
        next(self.sequences.batches(recipe.batch, 0))
        self.config = shape
        if recipe.init_from is None:
            end = self.text.separator
            self.config = replace(shape, vocab_size=self.text.vocab_size, bos_token_id=end, eos_token_id=end)
        self.model = self._begin().to(ranks.device)
        teacher = load_teacher(Path(recipe.init_from), ranks.device) if recipe.init_from and recipe.distil else None
        self.optimizer = make_optimizer(self.model, recipe)
        self.objective = Objective(self.model, recipe, ranks, teacher)

    def _begin(self) -> Transformer:
        model = Transformer(self.config, with_memory=True)
        model.initialise(self.recipe.seed)
        if self.recipe.init_from is not None:
            taken = take_over(model, Path(self.recipe.init_from))
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not (self.recipe.freeze and name in taken))
            if not any(parameter.requires_grad for parameter in model.parameters()):
                raise TrainError("--freeze leaves nothing to train: the checkpoint has all that the model has")
        return model

    def _resume(self) -> None:
        progress = self.state_dir / "progress.json"
        if not progress.exists():
            return
        saved = json.loads(progress.read_text())
        state = load_file(self.state_dir / saved["file"])
        self.step, self.seconds, self.losses = saved["step"], saved["seconds"], saved.get("losses", [])
        for name, parameter in self.model.named_parameters():
            parameter.data.copy_(state[name])
            if parameter.requires_grad:
                moments = {key: state[f"{key}:{name}"].to(parameter.device) for key in _MOMENTS}
                self.optimizer.state[parameter] = moments

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.batch * self.recipe.length

    @property
    def tokens_seen(self) -> int:
        return self.step * self.tokens_per_step

    def save_state(self) -> None:
        """Weights and moments in one file, then the pointer to it: a crash between leaves the previous state."""
        self.state_dir.mkdir(exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            tensors[name] = parameter.data
            for key, moment in self.optimizer.state[parameter].items():
                tensors[f"{key}:{name}"] = moment
        file = f"state-{self.step:08d}.safetensors"
        save_tensors(self.state_dir / file, tensors)
        progress = {"file": file, "step": self.step, "seconds": self.seconds, "losses": self.losses}
        with replacing(self.state_dir / "progress.json") as pointer:
            pointer.write(json.dumps(progress).encode())
        for old in self.state_dir.iterdir():  # also what a killed process was writing, whatever its name
            if old.name not in (file, "progress.json") and not old.name.startswith("tokens-"):
                old.unlink()

    def train_step(self, batch: Tokens) -> float:
        """One update; returns the mean cross entropy in nats per token. Raises TrainError, and updates nothing, where
        the loss or its gradient is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        cross_entropy = self.objective.backward(batch)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip).item()
        if not math.isfinite(cross_entropy + norm):
            raise TrainError(
                f"step {self.step + 1}: the loss is {cross_entropy}, its gradient's norm {norm}; start anew, with a "
                "smaller --peak-lr"
            )
        self.optimizer.step()
        self.step += 1
        return cross_entropy

    def train(self, save_every: int, log_every: int = 10, tell: Callable[[str], None] = tell_people) -> None:
        """Run to the last step, saving resumable state every `save_every` steps; a killed run goes on from there."""
        recipe, first = self.recipe, self.ranks.first
        if save_every < 1:
            raise TrainError(f"--save-every is {save_every}; it must be at least 1 step")
        available = sum(len(stream) for stream in self.sequences.streams)
        total, done = recipe.steps * self.tokens_per_step, self.tokens_seen
        if first:
            tell(f"{available:,} training tokens; {total:,} will be used")
        batches = self.sequences.batches(recipe.batch, self.step)
        with tqdm(unit="tok", unit_scale=True, smoothing=0.05, total=total, initial=done, disable=not first) as bar:
            while self.step < recipe.steps:
                begun = time.perf_counter()
                self.losses.append(self.train_step(next(batches)))
                self.seconds += time.perf_counter() - begun
                bar.update(self.tokens_per_step)
                if self.step % log_every == 0 or self.step == recipe.steps:
                    if first:
                        self._log()
                    bar.set_postfix(loss=f"{np.mean(self.losses):.3f}")
                    self.losses.clear()
                if first and (self.step % save_every == 0 or self.step == recipe.steps):
                    self.save_state()

    def _log(self) -> None:
        """Add a row to loss.csv, in place of those that a killed run had written beyond the state it left."""
        path = self.out / "loss.csv"
        rows = path.read_text().splitlines()[1:] if path.exists() else []
        rows = [row for row in rows if int(row.partition(",")[0]) < self.step]
        rate = self.recipe.learning_rate(self.step - 1)
        rows.append(f"{self.step},{self.tokens_seen},{np.mean(self.losses):.5f},{rate:.3e},{self.seconds:.0f}")
        with replacing(path) as file:
            file.write(("\n".join(["step,tokens,loss,learning_rate,seconds", *rows]) + "\n").encode())

    def speed(self) -> dict[str, float]:
        """Tokens per second, and the arithmetic that training needs as a share of the matrix products' rate, measured
        now in the training's precision on all processes' devices. A teacher's arithmetic is not counted."""
        if not self.seconds:
            return {}
        dtype = torch.bfloat16 if self.recipe.autocast == "bf16" else torch.float32
        rate = self.ranks.sum(torch.tensor(matrix_rate(self.ranks.device, dtype), device=self.ranks.device))
        sample = itertools.islice(self.sequences.batches(self.recipe.batch, 0), 16)
        flops = training_flops(self.model, self.recipe.length, distinct_share(sample, self.objective.rows))
        per_second = self.tokens_seen / self.seconds
        return {
            "tokens_per_second": round(per_second, 1),
            "flops_per_token": round(flops),
            "matrix_gflops": round(rate / 1e9, 1),
            "share_of_matrix_rate": round(per_second * flops / rate, 3),
        }

    def finish(self, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
        """Write the model directory in `dtype`, evaluate what was written, and return its figures.

        Every process calls it; the first one writes.
        """
        figures: dict[str, Any] = {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "training_tokens": self.tokens_seen,
            "training_seconds": round(self.seconds),
            **self.speed(),
        }
        if not self.ranks.first:
            return figures
        weights = {name: parameter.data.to("cpu", dtype) for name, parameter in self.model.named_parameters()}
        self._write_model(weights)
        if (held_out := self.held_out) is not None:
            self.model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
            figures["held_out"] = asdict(evaluate(self.model, held_out, self.recipe.length))
            if self.config.has_memory:
                zeroed: Loss = evaluate(self.model, held_out, self.recipe.length, alpha=0.0)
                figures["held_out_memory_zeroed"] = asdict(zeroed)
        with replacing(self.out / "figures.json") as file:  # last: it says that the run is finished
            file.write((json.dumps(figures, indent=2) + "\n").encode())
        return figures

    def _write_model(self, weights: dict[str, Tensor]) -> None:
        fingerprint = compute_fingerprint(self.config, weights) if self.config.has_memory else None
        save_checkpoint(self.out, self.config, weights, fingerprint)
        if self.recipe.init_from is None:
            save_tokenizer(self.text.tokenizer, self.out, self.config.max_position_embeddings, self.text.separator)
            return
        for name in TOKENIZER_FILES:
            if (given := Path(self.recipe.init_from) / name).is_file():
                with replacing(self.out / name) as file:
                    file.write(given.read_bytes())
