"""A model under study: read from its folder, run with other rows or scaled ones, and scored on texts.

`scale` is what a layer's feed-forward output is multiplied by (the paper's alpha, Fig. 7): a memory or flex model's
rows, a base model's FFN. One number for all layers, or one for each.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from tolserve.model.blocks import AddRow, rotary_tables
from tolserve.model.checkpoint import load_transformer
from tolserve.model.config import ModelConfig
from tolserve.model.networks import TOKENS_PER_BATCH
from tolserve.model.transformer import Transformer, causal_attention, no_rows
from tolserve.study.params import count_parameters
from tolserve.study.report import StudyError
from tolserve.train.data import read_documents
from tolserve.train.evaluate import HeldOut, Loss, batch_values, mean_loss
from tolserve.train.tokenizer import read_tokenizer

Rows = Tensor  # float32 [vocab_size, layers, hidden_size]
Scale = Sequence[float] | float


@dataclass(frozen=True)
class Studied:
    """A model in float32, its memory networks included. `separator` is the token that begins each text."""

    model: Transformer
    tokenizer: Tokenizer
    config: ModelConfig
    path: Path
    separator: int

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def facts(self) -> dict[str, Any]:
        """What the model is; parameters without embeddings and head, as the paper counts them."""
        count = count_parameters(self.config)
        shown = ("ffn_variant", "flex_beta", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
        shape = {name: getattr(self.config, name) for name in shown}
        return {"model": self.name, **shape, "parameters": count.total, "active_parameters": count.active}


def load(model_dir: Path) -> Studied:
    """Read a model with its networks: base, memory or flex.

    Raises ConfigError or CheckpointError, StudyError where there is no tokenizer or no separator, and TrainError for a
    tokenizer that cannot be read.
    """
    model = load_transformer(model_dir, with_memory=True, dtype=torch.float32)
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        raise StudyError(f"{model_dir} holds no tokenizer.json, and a study reads text; put the model's own there")
    config = model.config
    separator = config.eos_token_id if config.bos_token_id is None else config.bos_token_id
    if separator is None:
        raise StudyError(f"{model_dir}/config.json names neither bos_token_id nor eos_token_id, to begin a text with")
    return Studied(model, read_tokenizer(path), config, model_dir, separator)


def scales_of(config: ModelConfig, scale: Scale) -> list[float]:
    """One factor per layer. Raises StudyError for another number of them."""
    scales = [float(scale)] * config.num_hidden_layers if isinstance(scale, int | float) else list(map(float, scale))
    if len(scales) != config.num_hidden_layers:
        raise StudyError(f"{len(scales)} scales for a model of {config.num_hidden_layers} layers; give one for each")
    return scales


class Forward:
    """The training form with `rows` in place of those its networks give, and feed-forward outputs scaled.

    Raises StudyError for rows of another shape than the model's, or for a base model, which adds none.
    """

    def __init__(self, studied: Studied, rows: Rows | None = None, scale: Scale = 1.0) -> None:
        config = studied.config
        shape = (config.vocab_size, config.num_hidden_layers, config.hidden_size)
        if rows is not None and not config.has_memory:
            raise StudyError(f"{studied.name} is a base model: its layers add no rows that could be replaced")
        if rows is not None and tuple(rows.shape) != shape:
            raise StudyError(f"rows of shape {list(rows.shape)} for a model that has {list(shape)}")
        self.model, self._rows, self._scales = studied.model, rows, scales_of(config, scale)

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens [B, S] int64 -> logits [B, S, V]."""
        return self.model.logits(self.hidden(tokens))

    def hidden(self, tokens: Tensor) -> Tensor:
        """tokens [B, S] int64 -> normed hidden states [B, S, d]."""
        cos, sin = rotary_tables(self.model.config, tokens.shape[-1], tokens.device)
        attend = causal_attention(cos, sin)
        if self.model.config.has_memory:
            return self.model.hidden(tokens, attend, self._add_row(tokens))
        with _scaled_networks(self.model, self._scales):
            return self.model.hidden(tokens, attend, no_rows)

    def _add_row(self, tokens: Tensor) -> AddRow:
        distinct, inverse = tokens.unique(return_inverse=True)
        rows, scales, layers = self._rows, self._scales, self.model.model.layers
        embedding = self.model.model.embed_tokens(distinct)

        def add_row(layer: int, x: Tensor) -> Tensor:
            if scales[layer] == 0:
                return x
            row = layers[layer].memory_row(embedding) if rows is None else rows[distinct, layer]
            return x + F.embedding(inverse, row * scales[layer])

        return add_row


@contextmanager
def _scaled_networks(model: Transformer, scales: Sequence[float]) -> Iterator[None]:
    """A base model's FFNs put out `scales` times what they compute."""

    def times(scale: float) -> Callable[..., Tensor]:
        return lambda module, inputs, output: output * scale

    pairs = zip(model.model.layers, scales, strict=True)
    handles = [layer.mlp.register_forward_hook(times(scale)) for layer, scale in pairs if scale != 1]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def network_rows(studied: Studied) -> Rows:
    """Every row of the vocabulary, run in float32: what a table without any rounding would hold.

    Takes 4 * vocab_size * layers * hidden_size bytes. Raises StudyError for a base model.
    """
    config = studied.config
    if not config.has_memory:
        raise StudyError(f"{studied.name} is a base model: its FFNs read the residual stream and have no rows")
    embedding = studied.model.model.embed_tokens.weight
    rows = torch.empty(config.vocab_size, config.num_hidden_layers, config.hidden_size)
    for start in range(0, config.vocab_size, TOKENS_PER_BATCH):
        part = slice(start, start + TOKENS_PER_BATCH)
        for index, layer in enumerate(studied.model.model.layers):
            rows[part, index] = layer.memory_row(embedding[part])
    return rows


def read_text(studied: Studied, path: Path, tokens: int | None, length: int) -> HeldOut:
    """A text's documents as tokens, each begun by the separator; about `tokens` of them where that is given.

    So few documents are taken, evenly spaced, that each fills a window of `length` tokens if it has as many, and of
    each the middle, where a book is neither title page nor index. Raises DataError for a file that cannot be read.
    """
    documents = [studied.tokenizer.encode(text, add_special_tokens=False).ids for text in read_documents(path)]
    parts = documents if tokens is None else _middles(documents, tokens, min(length, tokens))
    # In byte-level BPE a token's name has one letter for each of its bytes.
    size = sum(len(studied.tokenizer.id_to_token(token) or "") for ids in parts for token in ids)
    return HeldOut(tuple(np.array([studied.separator, *ids], np.int32) for ids in parts), size)


def _middles(documents: Sequence[list[int]], tokens: int, window: int) -> list[list[int]]:
    """About `tokens` tokens: the middles of as many documents, evenly spaced, as have them at `window` tokens each."""
    sizes = [len(ids) for ids in documents]
    mean = max(1.0, sum(min(size, window) for size in sizes) / max(1, len(sizes)))
    count = min(len(documents), max(1, round(tokens / mean)))
    taken = [documents[(2 * index + 1) * len(documents) // (2 * count)] for index in range(count)]
    longest = max(window, *sizes) if sizes else window
    # Long documents make up for short ones.
    share = bisect_left(range(longest), tokens, lo=window, key=lambda most: sum(min(len(ids), most) for ids in taken))
    return [ids[max(0, len(ids) - share) // 2 :][:share] for ids in taken]


def loss_of(studied: Studied, text: HeldOut, length: int, rows: Rows | None = None, scale: Scale = 1.0) -> Loss:
    """Mean loss over windows of `length` tokens, which the model must take, of a text that was read. Raises StudyError,
    DataError for an empty text."""
    forward = Forward(studied, rows, scale)
    return mean_loss(forward, text, length, batch_values(studied.config), torch.device("cpu"))


def perplexity_of(loss: Loss) -> float:
    """exp of the mean loss per token: only models with one tokenizer can be compared by it."""
    return math.exp(loss.nats_per_token)
