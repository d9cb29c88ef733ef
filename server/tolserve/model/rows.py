"""Rows out of a table's records, for what reads tokens by their ids and not through the pager."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tolkernels import add_rows
from tolserve.tol.table import Table

# add(layer, x [n, d], slots [n] int64): x with the layer's row of tokens[slots[i]] added to x[i].
AddRecords = Callable[[int, Tensor, Tensor], Tensor]


def add_records(table: Table, tokens: Sequence[int], device: torch.device | None = None) -> AddRecords:
    """Read the records of `tokens` and return what adds their rows, by the kernel that serves. A layer that the table
    has dropped adds nothing. Raises RecordError for a damaged record."""
    manifest = table.manifest
    records = torch.from_numpy(np.stack([table.read_record(token) for token in tokens])).to(device)
    factors = {layer: torch.from_numpy(bits).view(torch.bfloat16) for layer, bits in table.read_factors().items()}

    def add(layer: int, x: Tensor, slots: Tensor) -> Tensor:
        if layer in manifest.dropped_layers:
            return x
        group, row = manifest.row_layout(layer)
        factor = factors[layer].to(x.device, x.dtype) if factors else None
        unused_norm = torch.ones(x.shape[-1], device=x.device)
        total, _ = add_rows(
            records,
            slots,
            x,
            unused_norm,
            1.0,
            offset=manifest.groups[group].offset + row.offset,
            values=row.values,
            group_size=row.group_size,
            factor=factor,
        )
        return total

    return add
