"""Attention over keys and values in blocks: storing a step's own, and attending over a sequence's (LLaMA's form)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tolkernels.dispatch import use_compiled, use_triton

# Of the compiled kernels: a megabyte of a thread's stack, and eight times what models have.
MOST_SIZE, MOST_GROUP = 1024, 128


def store_kv(qkv: Tensor, cos: Tensor, sin: Tensor, places: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Rotate q and k of qkv, write k and v into the cache, and return the rotated q [T, heads, hd] of qkv's dtype.

    qkv [T, (heads + 2 * kv_heads) * hd] of any float dtype: queries, keys and values of each token, unrotated; cos and
    sin [T, hd] float32 in LLaMA's half-split layout; places [T] int64, each token's flat index into the cache
    [blocks * block_size]; keys and values [blocks, block_size, kv_heads, hd] of one float dtype, written in place.
    Rotated in float32, rounded once.

    Rows that pad a batch have places in a block that no sequence owns; several may share one, whose content is then
    one of theirs. Raises ValueError for shapes and dtypes that do not fit. A place out of range is an IndexError on
    the CPU and undefined on CUDA.
    """
    _check_cache(keys, values)
    kv_heads, size = keys.shape[2:]
    if qkv.ndim != 2 or qkv.shape[1] % size or qkv.shape[1] <= 2 * kv_heads * size or not qkv.is_floating_point():
        raise ValueError(
            f"qkv must be [T, (heads + {2 * kv_heads}) * {size}] of floats, got {list(qkv.shape)} {qkv.dtype}"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (qkv.shape[0], size) or table.dtype != torch.float32:
            raise ValueError(f"{name} must be [{qkv.shape[0]}, {size}] float32, got {list(table.shape)} {table.dtype}")
    if places.shape != qkv.shape[:1] or places.dtype != torch.int64:
        raise ValueError(f"places must be [{qkv.shape[0]}] int64, got {list(places.shape)} {places.dtype}")
    if use_triton(qkv.device):
        from tolkernels.attention_triton import store_kv_triton as implementation
    elif _compiled(qkv, keys, 1):
        from tolkernels.attention_cpu import store_kv_cpu as implementation
    else:
        implementation = store_kv_torch
    return implementation(qkv, cos, sin, places, keys, values)


def store_kv_torch(qkv: Tensor, cos: Tensor, sin: Tensor, places: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The twin: `store_kv` in torch, on any device."""
    kv_heads, size = keys.shape[2:]
    heads = qkv.shape[1] // size - 2 * kv_heads
    q, k, v = qkv.unflatten(1, (-1, size)).split((heads, kv_heads, kv_heads), dim=1)
    keys.view(-1, kv_heads, size).index_copy_(0, places, _rotate(k, cos, sin).to(keys.dtype))
    values.view(-1, kv_heads, size).index_copy_(0, places, v.to(values.dtype))
    return _rotate(q, cos, sin).to(qkv.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, hd] rotated, in float32."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
    """Attention of one new token per sequence over its own blocks: [B, heads, hd] of q's dtype.

    q [B, heads, hd] of any float dtype, rotated; keys and values [blocks, block_size, kv_heads, hd] of one float dtype,
    where head h reads kv head h // (heads // kv_heads); tables [B, max_blocks] int32, each sequence's blocks in order;
    lengths [B] int32, its tokens with the new one, whose key and value are stored already. Scores are divided by
    sqrt(hd); softmax and sums are in float32.

    Entries of a table past its length are valid block numbers (0 will do), whatever is stored there. A row that pads a
    batch has length 1 and a table of a block that no sequence owns. The work is laid out by the tables' shape alone, so
    a CUDA graph may replay it with other lengths. Raises ValueError for shapes and dtypes that do not fit. A block out
    of range is an IndexError on the CPU and undefined on CUDA. A length is from 1 to max_blocks * block_size; the
    compiled kernels raise IndexError for another.
    """
    _check_cache(keys, values)
    kv_heads, size = keys.shape[2:]
    if q.ndim != 3 or q.shape[2] != size or q.shape[1] % kv_heads or not q.is_floating_point():
        raise ValueError(f"q must be [B, n * {kv_heads}, {size}] of floats, got {list(q.shape)} {q.dtype}")
    if tables.ndim != 2 or tables.shape[0] != q.shape[0] or tables.dtype != torch.int32:
        raise ValueError(f"tables must be [{q.shape[0]}, blocks] int32, got {list(tables.shape)} {tables.dtype}")
    if lengths.shape != q.shape[:1] or lengths.dtype != torch.int32:
        raise ValueError(f"lengths must be [{q.shape[0]}] int32, got {list(lengths.shape)} {lengths.dtype}")
    if use_triton(q.device):
        from tolkernels.attention_triton import decode_attention_triton as implementation
    elif _compiled(q, keys, q.shape[1] // kv_heads):
        from tolkernels.attention_cpu import decode_attention_cpu as implementation
    else:
        implementation = decode_attention_torch
    return implementation(q, keys, values, tables, lengths)


def decode_attention_torch(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
    """The twin: `decode_attention` in torch, on any device. It copies every table's blocks."""
    rows = tables.flatten().long()
    k, v = (
        cache.index_select(0, rows).unflatten(0, tables.shape).flatten(1, 2).transpose(1, 2).to(q.dtype)
        for cache in (keys, values)
    )  # [B, kv_heads, max_blocks * block_size, hd]
    visible = torch.arange(k.shape[2], device=q.device) < lengths.unsqueeze(1)
    # A weight of zero does not undo a NaN, which a request's steering may have left in a block.
    beyond = ~visible[:, None, :, None]
    k, v = k.masked_fill(beyond, 0), v.masked_fill(beyond, 0)
    out = F.scaled_dot_product_attention(q.unsqueeze(2), k, v, attn_mask=visible[:, None, None], enable_gqa=True)
    return out.squeeze(2)


def chunk_attention(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, length: int) -> Tensor:
    """Causal attention of several tokens of one sequence over its blocks: [T, heads, hd] of q's dtype.

    q [T, heads, hd] of any float dtype, rotated: the last T of the sequence's `length` tokens, whose keys and values
    are stored already; table [blocks] int32, the sequence's blocks in order; the rest as for `decode_attention`.

    On the CPU as compiled, a token's result is the same in any chunk. Raises ValueError for shapes, dtypes and a length
    that do not fit; a block out of range is an IndexError on the CPU.
    """
    _check_cache(keys, values)
    block_size, kv_heads, size = keys.shape[1:]
    if q.ndim != 3 or q.shape[2] != size or q.shape[1] % kv_heads or not q.is_floating_point():
        raise ValueError(f"q must be [T, n * {kv_heads}, {size}] of floats, got {list(q.shape)} {q.dtype}")
    if table.ndim != 1 or table.dtype != torch.int32:
        raise ValueError(f"table must be [blocks] int32, got {list(table.shape)} {table.dtype}")
    if not len(q) <= length <= len(table) * block_size:
        raise ValueError(f"length must be from {len(q)} tokens to {len(table)} blocks of {block_size}, got {length}")
    if _compiled(q, keys, 1):
        from tolkernels.attention_cpu import chunk_attention_cpu

        return chunk_attention_cpu(q, keys, values, table, length)
    return chunk_attention_torch(q, keys, values, table, length)


def chunk_attention_torch(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, length: int) -> Tensor:
    """The twin: `chunk_attention` in torch, on any device. It copies the table's blocks."""
    rows = table[: -(-length // keys.shape[1])]
    k, v = (
        cache.index_select(0, rows).flatten(0, 1)[:length].transpose(0, 1).to(q.dtype).unsqueeze(0)
        for cache in (keys, values)
    )  # [1, kv_heads, length, hd]
    mask = None  # a chunk from the start on is plainly causal, which is faster
    if len(q) < length:
        at = torch.arange(length - len(q), length, device=q.device)
        mask = torch.arange(length, device=q.device) <= at.unsqueeze(1)  # [T, length]
    query = q.transpose(0, 1).unsqueeze(0)
    out = F.scaled_dot_product_attention(query, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out[0].transpose(0, 1)


def _compiled(x: Tensor, keys: Tensor, group: int) -> bool:
    """Whether the compiled kernels take it: they keep `group` query heads, and their sums, on the stack."""
    return use_compiled(x) and keys.dtype != torch.float64 and keys.shape[3] <= MOST_SIZE and group <= MOST_GROUP


def _check_cache(keys: Tensor, values: Tensor) -> None:
    if keys.ndim != 4 or not keys.is_floating_point() or keys.shape[3] % 2:
        raise ValueError(f"keys must be [blocks, block_size, kv_heads, even hd] of floats, got {list(keys.shape)}")
    if values.shape != keys.shape or values.dtype != keys.dtype:
        raise ValueError(
            f"values must be as keys, {list(keys.shape)} {keys.dtype}, got {list(values.shape)} {values.dtype}"
        )
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("keys and values must be contiguous")
