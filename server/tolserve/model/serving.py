"""The serving form: weights as the kernels read them, a layer in few calls, rows and attention from outside.

The arithmetic is model/transformer.py's, which is the training form and what tests compare with. Here q, k and v (gate
and up) are one matrix, every norm belongs to the sum before it, and matrices may be quantised.
"""

import ctypes
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Literal, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tolkernels import (
    DTYPES,
    INT4_GROUP,
    Encoding,
    Weight,
    embedding_rows,
    encoded_bytes,
    fast_on_cpu,
    linear,
    linear_argmax,
    make_weight,
    rms_norm,
)
from tolserve.model.checkpoint import Checkpoint, CheckpointError, check_names, tensor_shapes
from tolserve.model.config import ConfigError, ModelConfig

log = logging.getLogger(__name__)

# (layer, qkv [T, (heads + 2 kv_heads) * head_dim], not rotated) -> [T, heads * head_dim].
Attend = Callable[[int, Tensor], Tensor]

# (layer, stream [T, d], weight [d] of the norm that follows) -> (stream + that layer's rows, the norm of that). Asked
# only after the layer's attention, which is when a row is first needed; whoever serves from a table waits there.
AddRow = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]

# Called with the stream [T, d] after each addend, in order: "embedding" once, then for each layer "attention",
# "compute" (base, flex) and "memory" (memory, flex). It must not change the tensor.
Addend = Literal["embedding", "attention", "compute", "memory"]
Watch = Callable[[Addend, Tensor], None]

Weights = Literal["auto", "int8", "int4"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_SIXTEEN = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Precision:
    """What a model's numbers are held in: `dtype` and `weights` are the options of these names, without "auto" in
    `dtype`; norms are float32 always."""

    dtype: torch.dtype
    weights: Weights = "auto"
    device: str = "cpu"

    @property
    def activations(self) -> torch.dtype:
        """On the CPU float32, whatever the weights: the kernels widen what they read, and the stream stays exact."""
        return torch.float32 if self.device == "cpu" else self.dtype

    def matrix(self, stored: torch.dtype) -> Encoding:
        """Of a matrix that a checkpoint stores as `stored`. On the CPU a 16-bit one stays as it is: wider it would not
        be more exact. Where there are no kernels it is float32, which torch reads fastest."""
        if self.weights != "auto":
            return self.weights
        if self.device != "cpu":
            return _encoding(self.dtype)
        wanted = _encoding(stored if stored in _SIXTEEN else self.dtype)
        return wanted if fast_on_cpu(wanted) else "float32"

    def embedding(self, stored: torch.dtype) -> Encoding:
        """Of an embedding that is no output head: rows of it are looked up, so its own 16 bits cost no time."""
        return _encoding(stored if stored in _SIXTEEN else self.dtype)


def _encoding(dtype: torch.dtype) -> Encoding:
    return cast(Encoding, str(dtype).removeprefix("torch."))


def _rounds(stored: torch.dtype, encoding: Encoding) -> bool:
    """Whether these floats lose something of what is stored; nobody expects integers to keep all."""
    return encoding in DTYPES and torch.promote_types(stored, DTYPES[encoding]) != DTYPES[encoding]


@dataclass(frozen=True)
class ServingLayer:
    """One layer. `ffn` is what runs between attention and row: base's (gate and up, down), flex's square maps."""

    norm: Tensor  # [d] float32, before attention
    qkv: Weight
    out: Weight
    ffn_norm: Tensor | None
    ffn: tuple[Weight, ...]

    def weights(self) -> Iterator[Weight]:
        yield from (self.qkv, self.out, *self.ffn)


@dataclass(frozen=True)
class LayerNames:
    """The checkpoint's tensor names of a layer; those of one matrix are stacked."""

    norm: str
    qkv: tuple[str, ...]
    out: tuple[str, ...]
    ffn_norm: str | None
    ffn: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, config: ModelConfig, layer: int) -> "LayerNames":
        name = f"model.layers.{layer}."
        ffn_norm, ffn = None, tuple[tuple[str, ...], ...]()
        if config.ffn_variant == "base":
            ffn_norm = name + "post_attention_layernorm.weight"
            gate, up, down = (f"{name}mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
            ffn = ((gate, up), (down,))
        elif config.ffn_variant == "flex":
            ffn_norm = name + "compute_layernorm.weight"
            ffn = tuple((f"{name}compute.{index}.weight",) for index in range(config.flex_beta))
        q, k, v, o = (f"{name}self_attn.{part}_proj.weight" for part in "qkvo")
        return cls(name + "input_layernorm.weight", (q, k, v), (o,), ffn_norm, ffn)

    def matrices(self) -> tuple[tuple[str, ...], ...]:
        return (self.qkv, self.out, *self.ffn)


class Source(Protocol):
    """Where weights come from, by the checkpoint's tensor names."""

    def stored(self, name: str) -> torch.dtype: ...

    def read(self, names: Sequence[str]) -> Tensor:
        """Tensors stacked along their first dimension. They may be a file's: whoever keeps them copies them."""
        ...


def _promoted(stored: Callable[[str], torch.dtype], names: Sequence[str]) -> torch.dtype:
    """The precision that holds all of these tensors exactly."""
    return reduce(torch.promote_types, map(stored, names))


@dataclass(frozen=True)
class WeightSizes:
    """Bytes of a model's weights, without the few rows that kernels may pad a matrix with."""

    layers: int  # norms included
    embedding: int  # and the output head, where it is not tied
    encodings: frozenset[Encoding]  # of all of them


def weight_sizes(config: ModelConfig, precision: Precision, stored: Callable[[str], torch.dtype]) -> WeightSizes:
    """What ServingModel will hold of a checkpoint whose tensors are `stored` so. Raises ConfigError as it does."""
    check_precision(config, precision)
    shapes = tensor_shapes(config, with_memory=False)
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    matrices = [each for layer in range(config.num_hidden_layers) for each in LayerNames.of(config, layer).matrices()]
    encodings = {names: precision.matrix(_promoted(stored, names)) for names in [(head,), *matrices]}
    sizes = {
        names: encoded_bytes((sum(shapes[name][0] for name in names), shapes[names[0]][1]), encoding)
        for names, encoding in encodings.items()
    }
    embedding = sizes.pop((head,))
    if not config.tie_word_embeddings:
        looked_up = encodings[(EMBEDDING,)] = precision.embedding(stored(EMBEDDING))
        embedding += encoded_bytes(shapes[EMBEDDING], looked_up)
    norms = sum(4 * shape[0] for shape in shapes.values() if len(shape) == 1)
    return WeightSizes(sum(sizes.values()) + norms, embedding, frozenset(encodings.values()))


class ServingModel:
    """A model without memory networks, ready to run on `precision.device`.

    `embedding` and `head` are one copy where they are tied. Activations are `dtype` [T, ...], tokens lie flat.
    """

    def __init__(self, config: ModelConfig, precision: Precision, source: Source) -> None:
        """Reads one matrix at a time, the largest first: beside the model there is never more than that one.

        Raises ConfigError for a shape that `precision` cannot hold, and what `source` raises. Logs once what is rounded
        though nobody asked, and integers that are slow here.
        """
        check_precision(config, precision)
        _warn_of_slow(precision)
        self.config, self.dtype = config, precision.activations
        self.device = torch.device(precision.device)
        self._source, self._precision = source, precision
        self._rounded: set[tuple[torch.dtype, Encoding]] = set()
        self.head = self._matrix((EMBEDDING if config.tie_word_embeddings else HEAD,))
        self.embedding = self.head
        if not config.tie_word_embeddings:
            self.embedding = self._held([EMBEDDING], precision.embedding(source.stored(EMBEDDING)))
        self.layers = [self._layer(LayerNames.of(config, layer)) for layer in range(config.num_hidden_layers)]
        self.norm = self._vector("model.norm.weight")
        self._next_norms = [*(layer.norm for layer in self.layers[1:]), self.norm]
        if self._rounded:
            log.warning(_said(self._rounded))

    def _matrix(self, names: Sequence[str]) -> Weight:
        return self._held(names, self._precision.matrix(_promoted(self._source.stored, names)))

    def _held(self, names: Sequence[str], encoding: Encoding) -> Weight:
        if _rounds(stored := _promoted(self._source.stored, names), encoding):
            self._rounded.add((stored, encoding))
        try:
            return make_weight(self._source.read(names).to(self.device), encoding)  # which copies
        except ValueError as error:
            raise CheckpointError(f"tensor {names[0]!r}: {error}") from error

    def _vector(self, name: str) -> Tensor:
        return self._source.read([name]).to(self.device, torch.float32, copy=True)

    def _layer(self, names: LayerNames) -> ServingLayer:
        layer = ServingLayer(
            norm=self._vector(names.norm),
            qkv=self._matrix(names.qkv),
            out=self._matrix(names.out),
            ffn_norm=self._vector(names.ffn_norm) if names.ffn_norm is not None else None,
            ffn=tuple(self._matrix(each) for each in names.ffn),
        )
        _return_freed_memory()
        return layer

    @classmethod
    def load(
        cls, model_dir: Path, *, dtype: torch.dtype, weights: Weights = "auto", device: str = "cpu"
    ) -> "ServingModel":
        """Read a model directory; memory tensors may be there and are never read.

        Raises ConfigError or CheckpointError; a missing, misshapen or extra tensor is named. The weights are copied: a
        file that changes or fails later cannot reach a running model.
        """
        config = ModelConfig.load(model_dir)
        return cls(config, Precision(dtype, weights, device), CheckpointSource(model_dir, config))

    @classmethod
    def random(
        cls,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        weights: Weights = "auto",
        device: str = "cpu",
        stored: torch.dtype = torch.bfloat16,
    ) -> "ServingModel":
        """A model of random weights for benchmarks, as if a checkpoint in `stored` had held them."""
        return cls(config, Precision(dtype, weights, device), NoiseSource(config, stored))

    def weights(self) -> Iterator[Weight]:
        """Every matrix once."""
        yield from {id(weight): weight for weight in (self.embedding, self.head)}.values()
        for layer in self.layers:
            yield from layer.weights()

    @property
    def nbytes(self) -> int:
        norms = [self.norm, *(layer.norm for layer in self.layers)]
        norms += [layer.ffn_norm for layer in self.layers if layer.ffn_norm is not None]
        return sum(weight.nbytes for weight in self.weights()) + sum(norm.nbytes for norm in norms)

    def hidden(self, tokens: Tensor, attend: Attend, add_row: AddRow, watch: Watch | None = None) -> Tensor:
        """Run the layers. tokens [T] int64 -> normed hidden states [T, d] of `dtype`. A base model never asks for
        rows. Launches kernels only: on CUDA nothing in here waits, but for what `attend`, `add_row` and `watch` do, and
        nothing that it allocates outlives it, so that a CUDA graph may hold it."""
        eps, has_memory = self.config.rms_norm_eps, self.config.has_memory
        x = embedding_rows(tokens, self.embedding, self.dtype)
        if watch is not None:
            watch("embedding", x)
        h = rms_norm(x, self.layers[0].norm, eps)
        for index, (layer, next_norm) in enumerate(zip(self.layers, self._next_norms, strict=True)):
            x = linear(attend(index, linear(h, layer.qkv)), layer.out, x)
            if watch is not None:
                watch("attention", x)
            if layer.ffn_norm is not None:
                x = self._add_ffn(layer, x, rms_norm(x, layer.ffn_norm, eps))
                if watch is not None:
                    watch("compute", x)
            x, h = add_row(index, x, next_norm) if has_memory else (x, rms_norm(x, next_norm, eps))
            if watch is not None and has_memory:
                watch("memory", x)
        return h

    def _add_ffn(self, layer: ServingLayer, x: Tensor, h: Tensor) -> Tensor:
        """x + base's FFN or flex's FFN-C of h (blocks.SwiGLU, blocks.FlexCompute)."""
        if self.config.ffn_variant == "base":
            gate, up = linear(h, layer.ffn[0]).chunk(2, dim=-1)
            return linear(F.silu(gate) * up, layer.ffn[1], x)
        for weight in layer.ffn[:-1]:
            h = F.silu(linear(h, weight))
        return linear(h, layer.ffn[-1], x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Output head. hidden [T, d] -> [T, V] of `dtype`."""
        return linear(hidden, self.head)

    def best(self, hidden: Tensor) -> Tensor:
        """logits(hidden).argmax(-1), [T] int64; on the CPU the logits are never written down."""
        return linear_argmax(hidden, self.head)


def _warn_of_slow(precision: Precision) -> None:
    held = precision.weights
    if precision.device == "cpu" and held != "auto" and not fast_on_cpu(held):
        log.warning("--weights %s takes less memory and more time: no CPU kernels, and torch decodes at each use", held)


def _said(rounded: set[tuple[torch.dtype, Encoding]]) -> str:
    pairs = " and ".join(sorted(f"{_encoding(stored)} to {encoding}" for stored, encoding in rounded))
    exact = reduce(torch.promote_types, (stored for stored, _ in rounded))
    return f"the checkpoint's weights are rounded, {pairs}: --dtype {_encoding(exact)} keeps them as they are"


def _return_freed_memory() -> None:
    """glibc keeps freed blocks of up to 32 MiB for later: beside 246 MB of int8 weights it kept 290 MB of temporaries.
    Other C libraries have no such call, and do not need it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def no_rows(layer: int, stream: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """For base models, whose layers never ask."""
    raise RuntimeError(f"layer {layer} of a base model asked for a row")


def check_precision(config: ModelConfig, precision: Precision) -> None:
    """Raises ConfigError for a shape that the kernels do not take: pairs of columns, int4 in whole groups."""
    multiple = INT4_GROUP if precision.weights == "int4" else 2
    for size in ["hidden_size"] + (["intermediate_size"] if config.ffn_variant == "base" else []):
        if getattr(config, size) % multiple:
            how = "use --weights int8 or auto" if precision.weights == "int4" else "no kernel takes it"
            raise ConfigError(
                f"{size} {getattr(config, size)} with --weights {precision.weights}: it must be a multiple of "
                f"{multiple}; {how}"
            )


class CheckpointSource:
    """The weights of a model directory. Raises CheckpointError unless they are just those that `config` describes."""

    def __init__(self, model_dir: Path, config: ModelConfig) -> None:
        self._model_dir, self._headers = model_dir, Checkpoint(model_dir)
        check_names(tensor_shapes(config, with_memory=False), self._headers, skip_memory=config.has_memory)

    def stored(self, name: str) -> torch.dtype:
        return self._headers.dtype(name)

    def read(self, names: Sequence[str]) -> Tensor:
        # Opened anew: an open checkpoint keeps all that was read of it mapped, and this lets it go with the tensor.
        opened = Checkpoint(self._model_dir)
        tensors = [opened.read(name) for name in names]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


class NoiseSource:
    """Normal numbers, one block of them repeated and shifted from tensor to tensor; norms one."""

    def __init__(self, config: ModelConfig, stored: torch.dtype) -> None:
        self._shapes, self._stored = tensor_shapes(config, with_memory=False), stored
        self._order = {name: index for index, name in enumerate(self._shapes)}
        self._block = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(stored)

    def stored(self, name: str) -> torch.dtype:
        return self._stored

    def read(self, names: Sequence[str]) -> Tensor:
        return torch.cat([self._tensor(name) for name in names])

    def _tensor(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=self._stored)
        size, block = shape[0] * shape[1], self._block
        return block.roll(self._order[name]).repeat(-(-size // len(block)))[:size].view(shape)
