"""Keys and values in blocks, and the attention that reads them through block tables."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tolserve.engine.sequence import Chunk
from tolserve.model.blocks import rotary_tables, rotate
from tolserve.model.config import ModelConfig


class KVCache:
    """All layers' keys and values. The block pool (blocks.py) decides which block belongs to whom."""

    def __init__(
        self, config: ModelConfig, *, blocks: int, block_size: int, max_len: int, dtype: torch.dtype, device: str
    ) -> None:
        self.block_size = block_size
        width = (config.num_key_value_heads, config.head_dim)
        # [layers, keys or values, blocks, block_size, kv_heads, head_dim]
        self.data = _zeros((config.num_hidden_layers, 2, blocks, block_size, *width), dtype, device)
        self.cos, self.sin = rotary_tables(config, max_len, self.data.device)

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


class StepAttention:
    """Causal attention of one step's chunks over their own blocks; an `Attend` for the layers.

    Tokens of the step lie flat, chunk after chunk. Single-token chunks (decoding) attend together, padded to the
    longest; longer chunks attend one by one.
    """

    def __init__(self, kv: KVCache, chunks: list[Chunk]) -> None:
        self.kv = kv
        device = kv.data.device
        positions = torch.cat([torch.arange(chunk.start, chunk.end) for chunk in chunks])
        slots, offsets, cursor = [], [], 0
        for chunk in chunks:
            table = torch.tensor(chunk.sequence.blocks)
            at = torch.arange(chunk.start, chunk.end)
            slots.append(table[at // kv.block_size] * kv.block_size + at % kv.block_size)
            offsets.append(cursor)
            cursor += chunk.count
        self.slots = torch.cat(slots).to(device)  # [T] where each token's key and value go
        self.cos, self.sin = (table[positions.to(device)] for table in (kv.cos, kv.sin))  # [T, head_dim]
        self._decodes = _Decodes(kv, [(o, c) for o, c in zip(offsets, chunks, strict=True) if c.count == 1], device)
        self._prefills = [
            _Prefill(kv, offset, chunk, device)
            for offset, chunk in zip(offsets, chunks, strict=True)
            if chunk.count > 1
        ]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, heads, head_dim], k and v [T, kv_heads, head_dim], unrotated -> [T, heads, head_dim]."""
        q, k = rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)
        keys, values = self.kv.data[layer, 0], self.kv.data[layer, 1]
        keys.flatten(0, 1).index_copy_(0, self.slots, k)
        values.flatten(0, 1).index_copy_(0, self.slots, v)
        out = torch.empty_like(q)
        if self._decodes.rows.numel():
            out[self._decodes.rows] = self._decodes.attend(q, keys, values)
        for prefill in self._prefills:
            out[prefill.rows] = prefill.attend(q, keys, values)
        return out


class _Decodes:
    """The step's single-token chunks, attending as one padded batch."""

    def __init__(self, kv: KVCache, chunks: list[tuple[int, Chunk]], device: torch.device) -> None:
        self.rows = torch.tensor([offset for offset, _ in chunks], dtype=torch.int64, device=device)
        if not chunks:
            return
        used = [-(-chunk.end // kv.block_size) for _, chunk in chunks]
        tables = torch.zeros((len(chunks), max(used)), dtype=torch.int64)
        for row, (count, (_, chunk)) in enumerate(zip(used, chunks, strict=True)):
            tables[row, :count] = torch.tensor(chunk.sequence.blocks[:count])
        lengths = torch.tensor([chunk.end for _, chunk in chunks])
        self.tables = tables.to(device)  # [B, blocks]
        visible = torch.arange(max(used) * kv.block_size) < lengths[:, None]
        self.mask = visible[:, None, None, :].to(device)  # [B, 1, 1, context]

    def attend(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        k, v = (cache[self.tables].flatten(1, 2).transpose(1, 2) for cache in (keys, values))  # [B, kv, context, hd]
        out = F.scaled_dot_product_attention(q[self.rows].unsqueeze(2), k, v, attn_mask=self.mask, enable_gqa=True)
        return out.squeeze(2)


class _Prefill:
    """One chunk of several tokens, attending over the sequence so far."""

    def __init__(self, kv: KVCache, offset: int, chunk: Chunk, device: torch.device) -> None:
        self.rows = slice(offset, offset + chunk.count)
        used = -(-chunk.end // kv.block_size)
        self.table = torch.tensor(chunk.sequence.blocks[:used], device=device)
        self.length = chunk.end
        at = torch.arange(chunk.start, chunk.end, device=device)
        self.mask = torch.arange(chunk.end, device=device) <= at[:, None]  # [count, context]

    def attend(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        k, v = (cache[self.table].flatten(0, 1)[: self.length].transpose(0, 1) for cache in (keys, values))
        query = q[self.rows].transpose(0, 1)
        out = F.scaled_dot_product_attention(
            query[None], k[None], v[None], attn_mask=self.mask[None, None], enable_gqa=True
        )
        return out[0].transpose(0, 1)
