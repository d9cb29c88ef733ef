"""Runs the layers for one step's chunks. With engine/kv.py and tol/arena.py, the only engine code that sees a GPU."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tolkernels import gather_rows
from tolserve.engine.kv import KVCache, StepAttention
from tolserve.engine.sequence import Chunk
from tolserve.model.blocks import AddRow
from tolserve.model.transformer import Transformer, no_rows
from tolserve.tol.pager import Lease, Pager
from tolserve.tol.table import Table


@dataclass(frozen=True)
class StepResult:
    """Hidden states of every token of the step, chunk after chunk, and what waiting for rows cost."""

    hidden: Tensor  # [T, d], normed
    stall: float  # seconds


class Runner:
    """The serving form of a model over paged keys and values, with rows from a pager (None for a base model)."""

    def __init__(self, model: Transformer, kv: KVCache, pager: Pager | None) -> None:
        self.model, self.kv, self.pager = model, kv, pager
        self.device = kv.data.device
        self.factors = self.factors_of(pager.table) if pager is not None else {}

    def factors_of(self, table: Table) -> dict[int, Tensor]:
        """A lowrank table's factors by layer, on the device and in the model's precision; other tables have none.

        Raises TableError, MemoryError when the device has no room.
        """
        bits = table.read_factors()
        try:
            return {
                layer: torch.from_numpy(rows).view(torch.bfloat16).to(self.device, self.kv.data.dtype)
                for layer, rows in bits.items()
            }
        except RuntimeError as error:  # torch's own for CUDA is a subclass; for the CPU there is none
            raise MemoryError(f"the factors of {table.path} do not fit on {self.device}: {error}") from error

    @torch.inference_mode()
    def run(self, chunks: list[Chunk], lease: Lease | None) -> StepResult:
        """Compute one step. Raises RecordsUnavailable if a record it needs could not be read; keys and values written
        until then are overwritten when the sequences run again."""
        tokens = [token for chunk in chunks for token in chunk.tokens]
        rows = _LeasedRows(self, lease, tokens) if lease is not None else None
        add_row: AddRow = rows if rows is not None else no_rows
        ids = torch.tensor(tokens, device=self.device)
        hidden = self.model.hidden(ids, StepAttention(self.kv, chunks), add_row)
        return StepResult(hidden, rows.stall if rows is not None else 0.0)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)


class _LeasedRows:
    """Adds rows out of the device tier, waiting for each part of it the first time a layer needs a row of it."""

    def __init__(self, runner: Runner, lease: Lease, tokens: list[int]) -> None:
        if runner.pager is None:
            raise RuntimeError("a lease without a pager")
        self._pager, self._lease, self._tokens = runner.pager, lease, tokens
        self._device, self._factors = runner.device, runner.factors
        self._manifest = runner.pager.table.manifest
        self._slots: list[Tensor] = []  # by part that was waited for: [T] int64
        self.stall = 0.0

    def __call__(self, layer: int, x: Tensor) -> Tensor:
        if layer in self._manifest.dropped_layers:  # only an addend is missing (paper section 2)
            return x
        group, row = self._manifest.row_layout(layer)
        index = self._pager.part_of(group)
        while len(self._slots) <= index:
            self.stall += self._lease.wait(len(self._slots))
            slots = self._lease.slots[len(self._slots)]
            self._slots.append(torch.tensor([slots[token] for token in self._tokens], device=self._device))
        part = self._pager.parts[index]
        offset = self._manifest.groups[group].offset - part.offset + row.offset
        return gather_rows(
            part.arena.data,
            self._slots[index],
            x,
            offset=offset,
            values=row.values,
            group_size=row.group_size,
            factor=self._factors.get(layer),
        )
