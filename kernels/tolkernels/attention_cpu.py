"""`tolkernels.attention` on the CPU through the compiled kernels (cpu/attention.c), in float32.

Keys and values are float32, float16 or bfloat16, read block by block where they lie. A token's result depends neither
on the tokens beside it nor on the number of threads. Decoding and a chunk of one token may differ in the last bits.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from tolkernels.cpu import address, compiled, isa

_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # the enum in attention.c


@cache
def _functions() -> ctypes.CDLL:
    lib = compiled()
    pointer, long = ctypes.c_void_p, ctypes.c_long
    lib.tk_store_kv.argtypes = [*[pointer] * 7, *[long] * 5, ctypes.c_int, ctypes.c_int]
    lib.tk_store_kv.restype = long
    lib.tk_decode_attention.argtypes = [*[pointer] * 6, *[long] * 7, ctypes.c_float, *[ctypes.c_int] * 3]
    lib.tk_decode_attention.restype = long
    decode = lib.tk_decode_attention.argtypes
    lib.tk_chunk_attention.argtypes = [*decode[:4], ctypes.c_int32, *decode[5:]]
    lib.tk_chunk_attention.restype = long
    return lib


def store_kv_cpu(
    qkv: Tensor, cos: Tensor, sin: Tensor, places: Tensor, keys: Tensor, values: Tensor, *, threads: int | None = None
) -> Tensor:
    """`store_kv` of float32 qkv. `threads` are torch's, unless a test asks for others.

    Raises IndexError for a place out of range.
    """
    qkv, cos, sin, places = qkv.contiguous(), cos.contiguous(), sin.contiguous(), places.contiguous()
    blocks, block_size, kv_heads, size = keys.shape
    q = torch.empty(len(qkv), qkv.shape[1] // size - 2 * kv_heads, size)
    wrong = _functions().tk_store_kv(
        *map(address, (qkv, cos, sin, places, keys, values, q)),
        *q.shape[:2],
        kv_heads,
        size,
        blocks * block_size,
        _CODES[keys.dtype],
        torch.get_num_threads() if threads is None else threads,
    )
    if wrong >= 0:
        raise IndexError(f"place {int(places[wrong])} of token {wrong} is out of range")
    return q


def decode_attention_cpu(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    *,
    level: int | None = None,
    threads: int | None = None,
) -> Tensor:
    """`decode_attention` of float32 q. Entries of a table past its length are not looked at.

    `level` of instructions and `threads` are the machine's and torch's, unless a test asks for others. Raises
    IndexError for a length or a block out of range.
    """
    q, tables, lengths = q.contiguous(), tables.contiguous(), lengths.contiguous()
    blocks, block_size, kv_heads, size = keys.shape
    out = torch.empty_like(q)
    wrong = _functions().tk_decode_attention(
        *map(address, (q, keys, values, tables, lengths, out)),
        *q.shape[:2],
        kv_heads,
        size,
        blocks,
        tables.shape[1],
        block_size,
        size**-0.5,
        _CODES[keys.dtype],
        isa() if level is None else level,
        torch.get_num_threads() if threads is None else threads,
    )
    if wrong >= 0:
        raise IndexError(f"length {int(lengths[wrong])} of sequence {wrong}, or one of its blocks, is out of range")
    return out


def chunk_attention_cpu(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    length: int,
    *,
    level: int | None = None,
    threads: int | None = None,
) -> Tensor:
    """`chunk_attention` of float32 q; the rest as for `decode_attention_cpu`."""
    q, table = q.contiguous(), table.contiguous()
    blocks, block_size, kv_heads, size = keys.shape
    out = torch.empty_like(q)
    wrong = _functions().tk_chunk_attention(
        *map(address, (q, keys, values, table)),
        length,
        address(out),
        *q.shape[:2],
        kv_heads,
        size,
        blocks,
        len(table),
        block_size,
        size**-0.5,
        _CODES[keys.dtype],
        isa() if level is None else level,
        torch.get_num_threads() if threads is None else threads,
    )
    if wrong >= 0:
        raise IndexError(f"length {length}, or one of the blocks, is out of range")
    return out
