"""The training loop: AdamW, warm-up and cosine, cross entropy with z-loss, exact resume (paper section 4)."""

import ctypes
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from tolserve.model.checkpoint import compute_fingerprint, save_checkpoint, save_tensors
from tolserve.model.config import ModelConfig
from tolserve.model.transformer import Transformer
from tolserve.train.data import Sequences, Tokens, read_documents, tokenise
from tolserve.train.evaluate import HeldOut, Loss, evaluate
from tolserve.train.tokenizer import END_OF_TEXT, save_tokenizer, train_tokenizer


class TrainError(ValueError):
    """A run that cannot start; the message says what to change."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of a run. Two runs of one recipe on one machine give the same weights."""

    data: tuple[str, ...]
    held_out: str | None
    tokenizer: str | None
    batch: int  # sequences per step
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

    def learning_rate(self, step: int) -> float:
        """Linear warm-up to `peak_lr`, then a cosine that reaches `min_lr` behind the last step."""
        if step < self.warmup:
            return self.peak_lr * (step + 1) / self.warmup
        share = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


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


def loss_terms(logits: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Mean cross entropy, and what is minimised: cross entropy + z_loss * mean(logsumexp^2)."""
    normaliser = logits.float().logsumexp(-1)
    picked = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1).float()
    cross_entropy = (normaliser - picked).mean()
    return cross_entropy, cross_entropy + z_loss * normaliser.square().mean()


def make_optimizer(model: Transformer, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; matrices decay, norms do not."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=(recipe.beta1, recipe.beta2), fused=True)


class Run:
    """One training run in a folder: model files at its top, resumable state under `state/`, `loss.csv` beside it."""

    def __init__(self, out: Path, shape: ModelConfig, recipe: Recipe) -> None:
        self.out, self.state_dir, self.recipe = out, out / "state", recipe
        out.mkdir(parents=True, exist_ok=True)
        self._claim_folder(shape)
        self.tokenizer = self._prepare_tokenizer(shape)
        end = self.tokenizer.token_to_id(END_OF_TEXT)
        if end is None:
            raise TrainError(f"the tokenizer has no {END_OF_TEXT!r} token")
        self.end: int = end
        vocabulary = self.tokenizer.get_vocab_size()
        self.config = replace(shape, vocab_size=vocabulary, bos_token_id=end, eos_token_id=end)
        self.model = Transformer(self.config, with_memory=True)
        self.model.initialise(recipe.seed)
        self.optimizer = make_optimizer(self.model, recipe)
        self.step, self.seconds = 0, 0.0
        self._resume()

    def _claim_folder(self, shape: ModelConfig) -> None:
        """A folder belongs to one recipe: continuing with another would make loss.csv and the card lie."""
        asked = json.loads(json.dumps({"shape": asdict(shape), "recipe": asdict(self.recipe)}))
        path = self.out / "recipe.json"
        if path.exists() and json.loads(path.read_text()) != asked:
            raise TrainError(f"{path} holds another recipe; give --out a new folder, or the same options to resume")
        path.write_text(json.dumps(asked, indent=2) + "\n")

    def _prepare_tokenizer(self, shape: ModelConfig) -> Tokenizer:
        given = self.recipe.tokenizer
        path = Path(given) if given else self.out / "tokenizer.json"
        if given and not path.exists():
            raise TrainError(f"--tokenizer {path} does not exist")
        if path.exists():
            tokenizer = Tokenizer.from_file(str(path))
            if given and (size := tokenizer.get_vocab_size()) != shape.vocab_size:
                raise TrainError(f"--vocab-size is {shape.vocab_size}, but the tokenizer {path} has {size} tokens")
            return tokenizer
        texts = (text for data in self.recipe.data for text in read_documents(Path(data)))
        tokenizer = train_tokenizer(texts, shape.vocab_size)
        tokenizer.save(str(path))
        return tokenizer

    def _resume(self) -> None:
        progress = self.state_dir / "progress.json"
        if not progress.exists():
            return
        saved = json.loads(progress.read_text())
        state = load_file(self.state_dir / saved["file"])
        self.step, self.seconds = saved["step"], saved["seconds"]
        for name, parameter in self.model.named_parameters():
            parameter.data.copy_(state[name])
            self.optimizer.state[parameter] = {key: state[f"{key}:{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}

    @property
    def tokens_seen(self) -> int:
        return self.step * self.recipe.batch * self.recipe.length

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
        temporary = self.state_dir / "progress.json.tmp"
        temporary.write_text(json.dumps({"file": file, "step": self.step, "seconds": self.seconds}))
        temporary.replace(self.state_dir / "progress.json")
        for old in self.state_dir.glob("state-*.safetensors"):
            if old.name != file:
                old.unlink()

    def streams(self) -> tuple[Tokens, ...]:
        """Token streams of the training files, tokenised once and kept beside the run."""
        streams = []
        for index, data in enumerate(self.recipe.data):
            kept = self.out / "state" / f"tokens-{index}.npy"
            if not kept.exists():
                kept.parent.mkdir(exist_ok=True)
                temporary = kept.with_suffix(".tmp.npy")
                np.save(temporary, tokenise(Path(data), self.tokenizer, self.end))
                temporary.replace(kept)
            streams.append(np.load(kept, allow_pickle=False))
        return tuple(streams)

    def train_step(self, batch: Tokens) -> float:
        """One update; returns the mean cross entropy in nats per token."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate(self.step)
        sample = torch.from_numpy(batch).long()
        cross_entropy, objective = loss_terms(self.model(sample[:, :-1]), sample[:, 1:], self.recipe.z_loss)
        self.optimizer.zero_grad(set_to_none=True)
        objective.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.step += 1
        return cross_entropy.item()

    def train(self, save_every: int, log_every: int = 10, tell: Callable[[str], None] = print) -> None:
        """Run to the last step, saving resumable state every `save_every` steps; a killed run goes on from there."""
        recipe = self.recipe
        if save_every < 1:
            raise TrainError(f"--save-every is {save_every}; it must be at least 1 step")
        sequences = Sequences(self.streams(), recipe.length, recipe.seed)
        available = sum(len(stream) for stream in sequences.streams)
        tell(f"{available:,} training tokens; {recipe.steps * recipe.batch * recipe.length:,} will be used")
        bar = tqdm(total=recipe.steps, initial=self.step, unit="step", smoothing=0.05)
        losses: list[float] = []
        batches = sequences.batches(recipe.batch, self.step)
        while self.step < recipe.steps:
            begun = time.perf_counter()
            losses.append(self.train_step(next(batches)))
            self.seconds += time.perf_counter() - begun
            bar.update()
            if self.step % log_every == 0 or self.step == recipe.steps:
                self._log(losses)
                bar.set_postfix(loss=f"{np.mean(losses):.3f}")
                losses.clear()
            if self.step % save_every == 0 or self.step == recipe.steps:
                self.save_state()
        bar.close()

    def _log(self, losses: list[float]) -> None:
        """Add a row to loss.csv, in place of those that a killed run had written beyond the state it left."""
        path = self.out / "loss.csv"
        rows = path.read_text().splitlines()[1:] if path.exists() else []
        rows = [row for row in rows if int(row.partition(",")[0]) < self.step]
        rate = self.recipe.learning_rate(self.step - 1)
        rows.append(f"{self.step},{self.tokens_seen},{np.mean(losses):.5f},{rate:.3e},{self.seconds:.0f}")
        path.write_text("\n".join(["step,tokens,loss,learning_rate,seconds", *rows]) + "\n")

    def held_out(self) -> HeldOut | None:
        if self.recipe.held_out is None:
            return None
        texts = list(read_documents(Path(self.recipe.held_out)))
        encoded = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        documents = tuple(np.array([self.end, *e.ids], dtype=np.int32) for e in encoded)
        return HeldOut(documents, sum(len(text.encode()) for text in texts))

    def finish(self, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
        """Write the model directory in `dtype`, evaluate what was written, and return its figures."""
        weights = {name: parameter.data.to(dtype) for name, parameter in self.model.named_parameters()}
        fingerprint = compute_fingerprint(self.config, weights) if self.config.has_memory else None
        save_checkpoint(self.out, self.config, weights, fingerprint)
        save_tokenizer(self.tokenizer, self.out, self.config.max_position_embeddings)
        figures: dict[str, Any] = {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "training_tokens": self.tokens_seen,
            "training_seconds": round(self.seconds),
        }
        if (held_out := self.held_out()) is not None:
            self.model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
            figures["held_out"] = asdict(evaluate(self.model, held_out, self.recipe.length))
            if self.config.has_memory:
                zeroed: Loss = evaluate(self.model, held_out, self.recipe.length, alpha=0.0)
                figures["held_out_memory_zeroed"] = asdict(zeroed)
        (self.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
        return figures
