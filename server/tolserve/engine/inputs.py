"""What a step's chunks are to the layers: a few arrays, made whole and brought to the device as they are."""

from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from tolserve.engine.sequence import Chunk


@dataclass(frozen=True)
class StepInputs:
    """Tensors on the device. The T tokens of C chunks lie flat, chunk after chunk."""

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    places: Tensor  # [T] int64: where keys and values go, as an index into [blocks * block_size]
    tables: Tensor  # [C, most blocks] int32: all of a chunk's blocks, padded with 0
    lengths: Tensor  # [C] int32: tokens up to the chunk's end


def step_inputs(chunks: list[Chunk], tokens: list[int], block_size: int, device: torch.device) -> StepInputs:
    """`tokens` are the chunks', one after the other.

    For 16 sequences that decode it takes 25 us. In the caches that layers leave behind any call takes several times as
    long as otherwise, so there are few.
    """
    positions = [position for chunk in chunks for position in range(chunk.start, chunk.end)]
    places = [
        chunk.sequence.blocks[position // block_size] * block_size + position % block_size
        for chunk in chunks
        for position in range(chunk.start, chunk.end)
    ]
    width = 4 * max(len(chunk.sequence.blocks) for chunk in chunks)
    tables = bytearray().join([chunk.sequence.blocks.tobytes().ljust(width, b"\0") for chunk in chunks])
    flat = torch.frombuffer(array("q", tokens + positions + places), dtype=torch.int64).to(device)
    lists = torch.frombuffer(tables, dtype=torch.int32).to(device)
    lengths = torch.frombuffer(array("i", [chunk.end for chunk in chunks]), dtype=torch.int32).to(device)
    ids, at, into = flat.view(3, -1).unbind()
    return StepInputs(ids, at, into, lists.view(len(chunks), -1), lengths)
