"""Weights on disk: strict safetensors reading, atomic writing, and the fingerprint that ties a table to its model.

Layout: design of the model directory in ARCHITECTURE.md. No pickle, no code from the model directory.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tolserve.model.config import ModelConfig
from tolserve.model.transformer import Transformer
from tolserve.tol.files import sync_folder

WEIGHTS = "model.safetensors"
FINGERPRINT_KEY = "tol_fingerprint"
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # by safetensors' names


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as the model its config describes; the message names the tensor or file."""


class Checkpoint:
    """The tensors of a model directory, opened by header only; a tensor's bytes are read when it is asked for.

    Raises CheckpointError when no weights are there, or a header does not fit its file.
    """

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self._files: dict[str, safe_open] = {}
        self.metadata: dict[str, str] = {}
        for path in _weight_files(model_dir):
            try:
                opened = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
            self.metadata.update(opened.metadata() or {})
            for name in opened.keys():
                if name in self._files:
                    raise CheckpointError(f"tensor {name!r} is in more than one file of {model_dir}")
                self._files[name] = opened

    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Raises CheckpointError if the tensor is missing or holds no floats."""
        if name not in self._files:
            raise CheckpointError(f"tensor {name!r} is missing from {self.model_dir}")
        stored = self._files[name].get_slice(name).get_dtype()
        if stored not in _FLOATS:
            raise CheckpointError(f"tensor {name!r} is {stored}; weights must be float32, float16 or bfloat16")
        return _FLOATS[stored]

    def read(self, name: str) -> Tensor:
        """One tensor. Raises CheckpointError if it is missing or holds no floats."""
        self.dtype(name)
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def has_memory_weights(self) -> bool:
        return any(is_memory_tensor(name) for name in self._files)


def _weight_files(model_dir: Path) -> list[Path]:
    index = model_dir / (WEIGHTS + ".index.json")
    if not index.exists():
        path = model_dir / WEIGHTS
        if not path.exists():
            raise CheckpointError(f"{model_dir} holds no {WEIGHTS}; other formats are not read")
        return [path]
    try:
        names = list(dict.fromkeys(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} holds no weight_map: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {name!r}; only safetensors files beside it are read")
    return [model_dir / name for name in names]


def is_memory_tensor(name: str) -> bool:
    """Whether a tensor is needed to build the table and not to serve from it."""
    return ".memory." in name or ".memory_layernorm." in name


def check_names(wanted: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint, skip_memory: bool) -> None:
    """Raises CheckpointError unless the checkpoint holds exactly these tensors, memory tensors aside if they are to be
    skipped."""
    found = {name for name in checkpoint.names() if not (skip_memory and is_memory_tensor(name))}
    if missing := sorted(wanted.keys() - found):
        raise CheckpointError(f"{checkpoint.model_dir} lacks {len(missing)} tensor(s), first {missing[0]!r}")
    if extra := sorted(found - wanted.keys()):
        raise CheckpointError(
            f"{checkpoint.model_dir} has {len(extra)} tensor(s) that its config.json does not describe, "
            f"first {extra[0]!r}"
        )
    for name, shape in wanted.items():
        if checkpoint.shape(name) != shape:
            raise CheckpointError(
                f"tensor {name!r} has shape {list(checkpoint.shape(name))}; config.json asks for {list(shape)}"
            )


def read_copies(model_dir: Path, names: Iterable[str]) -> list[Tensor]:
    """Copies of tensors. Opened anew each time: an open checkpoint keeps all that was read of it mapped, twice the
    weights in the end."""
    checkpoint = Checkpoint(model_dir)
    return [checkpoint.read(name).clone() for name in names]


def tensor_shapes(config: ModelConfig, with_memory: bool) -> dict[str, tuple[int, ...]]:
    """What a checkpoint holds, by tensor name: with the memory networks, or without them."""
    with torch.device("meta"):
        model = Transformer(config, with_memory)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def load_transformer(
    model_dir: Path, *, with_memory: bool, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Transformer:
    """Read a model with its memory networks or without them, converted to `dtype`.

    Without them, a checkpoint may have memory tensors or not; they are never read. Raises ConfigError or
    CheckpointError; a missing, misshapen or extra tensor is named.
    The weights are copied: a file that changes or fails later cannot reach a running model.
    """
    config = ModelConfig.load(model_dir)
    checkpoint = Checkpoint(model_dir)
    with torch.device("meta"):
        model = Transformer(config, with_memory)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    check_names(wanted, checkpoint, skip_memory=config.has_memory and not with_memory)
    state = {name: checkpoint.read(name).to(device=device, dtype=dtype, copy=True) for name in wanted}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file under a temporary name, sync it, and rename it into place.

    Raises OSError, as where the disk is full; then `path` is what it was, and nothing is left beside it.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777  # as the umask has it; safetensors 0.8 lets the owner alone read
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, dict(metadata or {}))
        temporary.chmod(mode)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):
            raise OSError(f"{path} cannot be written: {error}") from error
        raise
    sync_folder(path.parent)


def save_checkpoint(
    model_dir: Path, config: ModelConfig, tensors: Mapping[str, Tensor], fingerprint: str | None
) -> None:
    """Write config.json and model.safetensors; `fingerprint` goes into the latter's metadata."""
    model_dir.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"} | ({FINGERPRINT_KEY: fingerprint} if fingerprint else {})
    save_tensors(model_dir / WEIGHTS, tensors, metadata)
    config.save(model_dir)


def _fingerprint_names(config: ModelConfig, names: set[str]) -> Iterator[str]:
    yield "model.embed_tokens.weight"
    memory = sorted(name for name in names if is_memory_tensor(name))
    if len(memory) != 4 * config.num_hidden_layers:
        raise CheckpointError(
            f"a fingerprint needs the memory tensors of {config.num_hidden_layers} layers; found {len(memory)} tensors"
        )
    yield from memory


def compute_fingerprint(config: ModelConfig, tensors: Mapping[str, Tensor]) -> str:
    """Hash of everything a table is computed from: embedding, memory norms, memory FFNs and the norms' epsilon.

    32 hexadecimal digits of SHA-256 over each tensor's name, dtype, shape and bytes. `tensors` are as stored, since
    a checkpoint in another precision has another table.
    """
    digest = hashlib.sha256(f"eps={config.rms_norm_eps!r}".encode())
    for name in _fingerprint_names(config, set(tensors)):
        tensor = tensors[name].contiguous()
        digest.update(f"|{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def read_fingerprint(model_dir: Path) -> str:
    """The fingerprint in the checkpoint's metadata, or computed from the weights where there is none.

    Raises CheckpointError when it is neither stored nor computable (no memory tensors).
    """
    checkpoint = Checkpoint(model_dir)
    if stored := checkpoint.metadata.get(FINGERPRINT_KEY):
        return stored
    config = ModelConfig.load(model_dir)
    names = _fingerprint_names(config, checkpoint.names())
    return compute_fingerprint(config, {name: checkpoint.read(name) for name in names})
