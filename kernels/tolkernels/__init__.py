"""Kernels of tolserve, each with a torch twin of the same signature.

Call them by the names in this package: each takes the Triton kernel on CUDA where Triton is installed, a compiled one
on the CPU where it was built, and the twin everywhere else.
"""

from tolkernels.attention import chunk_attention, decode_attention, store_kv
from tolkernels.formats import DTYPES, INT4_GROUP, Encoding, encoded_bytes
from tolkernels.gather import add_rows, lookup_slots, rms_norm
from tolkernels.linear import Weight, embedding_rows, fast_on_cpu, linear, linear_argmax, make_weight

__all__ = [
    "DTYPES",
    "INT4_GROUP",
    "Encoding",
    "Weight",
    "add_rows",
    "chunk_attention",
    "decode_attention",
    "embedding_rows",
    "encoded_bytes",
    "fast_on_cpu",
    "linear",
    "linear_argmax",
    "lookup_slots",
    "make_weight",
    "rms_norm",
    "store_kv",
]
