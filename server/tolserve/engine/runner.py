"""Runs the layers for one step's chunks. With engine/kv.py and tol/arena.py, the only engine code that sees a GPU."""

from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from tolkernels import add_rows, rms_norm
from tolserve.engine.inputs import step_inputs
from tolserve.engine.kv import KVCache, step_attention
from tolserve.engine.sequence import Chunk
from tolserve.engine.steering import StepSteering
from tolserve.model.serving import ServingModel, Watch, no_rows
from tolserve.tol.pager import Lease, Pager
from tolserve.tol.table import Table


@dataclass(frozen=True)
class StepResult:
    """Hidden states of every token of the step, chunk after chunk, and what waiting for rows cost."""

    hidden: Tensor  # [T, d], normed
    stall: float  # seconds


class Runner:
    """The serving form of a model over paged keys and values, with rows from a pager (None for a base model)."""

    def __init__(self, model: ServingModel, kv: KVCache, pager: Pager | None) -> None:
        self.model, self.kv, self.pager = model, kv, pager
        self.device = kv.data.device
        self.factors = self.factors_of(pager.table) if pager is not None else {}

    def factors_of(self, table: Table) -> dict[int, Tensor]:
        """A lowrank table's factors by layer, on the device and in the stream's precision; other tables have none.

        Raises TableError, MemoryError when the device has no room.
        """
        bits = table.read_factors()
        try:
            return {
                layer: torch.from_numpy(rows).view(torch.bfloat16).to(self.device, self.model.dtype)
                for layer, rows in bits.items()
            }
        except RuntimeError as error:  # torch's own for CUDA is a subclass; for the CPU there is none
            raise MemoryError(f"the factors of {table.path} do not fit on {self.device}: {error}") from error

    def run(self, chunks: list[Chunk], lease: Lease | None, watch: Watch | None = None) -> StepResult:
        """Compute one step; `watch` sees the stream as it grows.

        Raises RecordsUnavailable if a record it needs could not be read; keys and values written until then are
        overwritten when the sequences run again.
        """
        tokens = [token for chunk in chunks for token in chunk.tokens]
        inputs = step_inputs(chunks, tokens, self.kv.block_size, self.device)
        attend = step_attention(self.kv, chunks, inputs)
        if lease is None:
            return StepResult(self.model.hidden(inputs.tokens, attend, no_rows, watch), 0.0)
        rows = _LeasedRows(self, lease, tokens, self._steering(chunks))
        return StepResult(self.model.hidden(inputs.tokens, attend, rows, watch), rows.stall)

    def _steering(self, chunks: list[Chunk]) -> StepSteering | None:
        """None for a step that nobody steers: it costs nothing more."""
        if all(chunk.sequence.steering is None for chunk in chunks):
            return None
        steered = [(chunk.sequence.steering, chunk.tokens) for chunk in chunks]
        return StepSteering(steered, self.model.config.num_hidden_layers, self.device)


class TableRows:
    """An `AddRow` over the device tier: `slots` has for each of its parts a tensor [T] int64 on the device. Slots below
    0 are records in `host` uint8 [records, record_bytes], as add_rows says."""

    def __init__(
        self,
        runner: "Runner",
        slots: list[Tensor],
        host: Tensor | None = None,
        steering: StepSteering | None = None,
    ) -> None:
        if runner.pager is None:
            raise RuntimeError("rows without a pager")
        self._parts, self._part_of, self._slots = runner.pager.parts, runner.pager.part_of, slots
        self._manifest, self._factors = runner.pager.table.manifest, runner.factors
        self._host, self._steering = host, steering
        self._eps = runner.model.config.rms_norm_eps

    def part_of(self, layer: int) -> int | None:
        """The part that has the layer's rows; None for a layer without any."""
        if layer in self._manifest.dropped_layers:
            return None
        return self._part_of(self._manifest.row_layout(layer)[0])

    def __call__(self, layer: int, stream: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        scale = None
        if self._steering is not None:
            stream, scale = self._steering.apply(layer, stream)
        index = self.part_of(layer)
        if index is None:  # only an addend is missing (paper section 2)
            return stream, rms_norm(stream, norm, self._eps)
        group, row = self._manifest.row_layout(layer)
        part = self._parts[index]
        return add_rows(
            part.arena.data,
            self._slots[index],
            stream,
            norm,
            self._eps,
            offset=self._manifest.groups[group].offset - part.offset + row.offset,
            values=row.values,
            group_size=row.group_size,
            factor=self._factors.get(layer),
            host=self._host[:, part.offset :] if self._host is not None else None,
            scale=scale,
        )


class _LeasedRows:
    """TableRows of a lease, waiting for each part the first time that a layer needs a row of it."""

    def __init__(self, runner: Runner, lease: Lease, tokens: list[int], steering: StepSteering | None) -> None:
        self._lease, self._waited = lease, 0  # parts that were waited for
        slots = [array("q", map(part.__getitem__, tokens)) for part in lease.slots]
        places = [torch.frombuffer(each, dtype=torch.int64).to(runner.device) for each in slots]
        self._rows = TableRows(runner, places, steering=steering)
        self.stall = 0.0

    def __call__(self, layer: int, stream: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        index = self._rows.part_of(layer)
        while index is not None and self._waited <= index:
            self.stall += self._lease.wait(self._waited)
            self._waited += 1
        return self._rows(layer, stream, norm)
