"""Keys and values in blocks, and the attention that reads them through block tables."""

import math
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from tolkernels import chunk_attention, decode_attention, store_kv
from tolserve.engine.inputs import StepInputs
from tolserve.engine.sequence import Chunk
from tolserve.model.blocks import rotary_tables
from tolserve.model.config import ModelConfig
from tolserve.model.serving import Attend


class KVCache:
    """All layers' keys and values. The block pool (blocks.py) decides which block belongs to whom."""

    def __init__(
        self, config: ModelConfig, *, blocks: int, block_size: int, max_len: int, dtype: torch.dtype, device: str
    ) -> None:
        self.block_size = block_size
        width = (config.num_key_value_heads, config.head_dim)
        # [layers, keys or values, blocks, block_size, kv_heads, head_dim]
        self.data = _zeros((config.num_hidden_layers, 2, blocks, block_size, *width), dtype, device)
        self._rotary = torch.stack(rotary_tables(config, max_len, self.data.device))  # [2, max_len, head_dim]

    @property
    def max_len(self) -> int:
        return self._rotary.shape[1]

    def rotations(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions [T] int64, each [T, head_dim] float32."""
        cos, sin = self._rotary.index_select(1, positions).unbind()
        return cos, sin

    @staticmethod
    def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        width = config.num_key_value_heads * config.head_dim
        return config.num_hidden_layers * 2 * block_size * width * dtype.itemsize


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Zeros, since attention multiplies masked positions by zero and garbage could be NaN. On the CPU they come from
    calloc, so that blocks nobody has used yet cost no RAM."""
    if device != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


class DecodeAttention:
    """An `Attend` for single tokens, one of each of some sequences. It reads tensors alone, so that a CUDA graph may
    hold it: `inputs` may then be buffers that every step fills anew."""

    def __init__(self, kv: KVCache, inputs: StepInputs) -> None:
        self._kv, self._inputs = kv, inputs
        self._cos, self._sin = kv.rotations(inputs.positions)

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        keys, values = self._kv.data[layer]
        q = store_kv(qkv, self._cos, self._sin, self._inputs.places, keys, values)
        return decode_attention(q, keys, values, self._inputs.tables, self._inputs.lengths).flatten(1)


class MixedAttention:
    """An `Attend` for a step with longer chunks: these attend one by one over their own blocks, the single tokens
    together."""

    def __init__(self, kv: KVCache, chunks: list[Chunk], inputs: StepInputs) -> None:
        self._kv, self._inputs = kv, inputs
        self._cos, self._sin = kv.rotations(inputs.positions)
        rows = [0, *accumulate(chunk.count for chunk in chunks)]
        at = [index for index, chunk in enumerate(chunks) if chunk.count == 1]
        self._singles = torch.tensor([rows[index] for index in at], dtype=torch.int64, device=inputs.tokens.device)
        self._tables, self._lengths = inputs.tables[at], inputs.lengths[at]
        self._pieces = [  # rows of the step, the sequence's table, its tokens so far
            (slice(rows[index], rows[index + 1]), inputs.tables[index], chunk.end)
            for index, chunk in enumerate(chunks)
            if chunk.count > 1
        ]

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        keys, values = self._kv.data[layer]
        q = store_kv(qkv, self._cos, self._sin, self._inputs.places, keys, values)
        out = torch.empty_like(q)
        if len(self._singles):
            out[self._singles] = decode_attention(q[self._singles], keys, values, self._tables, self._lengths)
        for rows, table, length in self._pieces:
            out[rows] = chunk_attention(q[rows], keys, values, table, length)
        return out.flatten(1)


def step_attention(kv: KVCache, chunks: list[Chunk], inputs: StepInputs) -> Attend:
    """The attention of one step, whose tensors `inputs` are."""
    if all(chunk.count == 1 for chunk in chunks):
        return DecodeAttention(kv, inputs)
    return MixedAttention(kv, chunks, inputs)
