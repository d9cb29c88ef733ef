"""A decode step as one launch that needs no token from the host: buffers that stay, and on CUDA a graph per batch size.

A row's token is either known to the host, or what a row of the step before has chosen, which lies on the device. Its
record is looked up there as well (tol/slotmap.py). So a step can be launched while the one before it still runs.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tolkernels import lookup_slots
from tolserve.engine.inputs import StepInputs
from tolserve.engine.kv import DecodeAttention
from tolserve.engine.runner import Runner, TableRows
from tolserve.engine.sampler import choose
from tolserve.engine.sequence import Sequence
from tolserve.model.serving import no_rows
from tolserve.tol.lease import Lease

_FIELDS = 5  # of a row beside its block table: token, source, position, place, length


@dataclass(eq=False)
class Row:
    """A sequence's next token in a decode step."""

    sequence: Sequence
    position: int  # of the token that runs
    token: int = -1  # -1: not known to the host
    source: int = -1  # the row of the step before that chose it, where it is not known
    lease: Lease | None = None  # with its record, once its token is known
    void: bool = False  # its record was nowhere: what it computed is nothing


class Mark(Protocol):
    """A place in the device's work, as torch.cuda.Event."""

    def synchronize(self) -> None: ...


class Launch:
    """A step on its way to the host."""

    def __init__(self, count: int, result: Tensor, logits: Tensor, mark: Mark | None) -> None:
        """`result` [2, rows] int64 in host memory, whole once `mark` is reached; logits [rows, V] on the device."""
        self._count, self._result, self._logits, self._mark = count, result, logits, mark

    def read(self) -> tuple[list[int], list[bool]]:
        """Wait for the step: the tokens it chose, and which rows found no record."""
        if self._mark is not None:
            self._mark.synchronize()
        tokens, missed = self._result[:, : self._count].tolist()
        return tokens, [bool(flag) for flag in missed]

    def choices(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Logits [n, V] of these rows and the tokens [n] chosen from them, on the device. Until the next launch."""
        return self._logits[rows], self._result[0, rows].to(self._logits.device)


class _Staging:
    """Host memory of one launch; pinned for CUDA, so that copies to and from it run by themselves."""

    def __init__(self, size: int, rows: int, blocks: int, pinned: bool) -> None:
        self.flat = torch.zeros(size, dtype=torch.int32, pin_memory=pinned)
        self.fields, self.tables = (view.numpy() for view in _views(self.flat, rows, blocks))
        self.result = torch.zeros((2, rows), dtype=torch.int64, pin_memory=pinned)


def _views(flat: Tensor, rows: int, blocks: int) -> tuple[Tensor, Tensor]:
    """fields [_FIELDS, rows] and tables [rows, blocks] of a flat buffer."""
    return flat[: _FIELDS * rows].view(_FIELDS, rows), flat[_FIELDS * rows :].view(rows, blocks)


def ladder(most: int) -> list[int]:
    """Batch sizes with a graph each: 1, 2, 4, and then every eighth up to `most`. At most seven rows of a step are
    padding: 9 run as 16, 65 as 72."""
    return sorted({size for size in (1, 2, 4, *range(8, most, 8), most) if size <= most})


class Decoder:
    """Launches decode steps of up to `max_rows` sequences, on the current stream.

    Steps are padded to the next of `sizes`. Rows that pad write into the KV block `spare`, which no sequence may own.
    """

    def __init__(self, runner: Runner, *, max_rows: int, spare: int, sizes: list[int] | None = None) -> None:
        self.runner, self.max_rows, self._spare = runner, max_rows, spare
        self._sizes = sizes if sizes is not None else ladder(max_rows)
        if runner.pager is not None and runner.pager.maps is None:
            raise ValueError("steps look records up by themselves: the pager must keep maps (mapped=True)")
        device, pinned = runner.device, runner.device.type == "cuda"
        blocks = -(-runner.kv.max_len // runner.kv.block_size)
        size = max_rows * (_FIELDS + blocks)
        self._flat = torch.zeros(size, dtype=torch.int32, device=device)
        self._fields, self._tables = _views(self._flat, max_rows, blocks)
        self._result = torch.zeros((2, max_rows), dtype=torch.int64, device=device)
        # Two: one of the step that runs, one of the step launched behind it.
        self._stagings = [_Staging(size, max_rows, blocks, pinned) for _ in range(2)]
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.capture()

    def launch(self, rows: list[Row]) -> Launch:
        """Launch a step. The one before the last must have been read. On CUDA the host waits for nothing."""
        size = next(size for size in self._sizes if size >= len(rows))
        staging = self._stagings[0]
        self._stagings.reverse()
        self._fill(staging, rows, size)
        return self._submit(staging, rows, size)

    def _fill(self, staging: _Staging, rows: list[Row], size: int) -> None:
        block_size = self.runner.kv.block_size
        for index, row in enumerate(rows):
            last, offset = divmod(row.position, block_size)
            blocks = row.sequence.blocks[: last + 1]
            place = blocks[last] * block_size + offset
            staging.fields[:, index] = row.token, row.source, row.position, place, row.position + 1
            staging.tables[index, : last + 1] = blocks
        self._pad(staging, len(rows), size)

    def _pad(self, staging: _Staging, start: int, stop: int) -> None:
        staging.fields[:, start:stop] = [[0], [-1], [0], [self._spare * self.runner.kv.block_size], [1]]
        staging.tables[start:stop] = self._spare

    @torch.inference_mode()
    def _submit(self, staging: _Staging, rows: list[Row], size: int) -> Launch:
        """All that a launch does on the device."""
        self._flat.copy_(staging.flat, non_blocking=True)
        logits = self._run(size)
        self.draw(rows, logits[: len(rows)], self._result[0, : len(rows)])
        staging.result.copy_(self._result, non_blocking=True)
        mark = None
        if logits.is_cuda:
            mark = torch.cuda.Event()
            mark.record()
        return Launch(len(rows), staging.result, logits, mark)

    def draw(self, rows: list[Row], logits: Tensor, tokens: Tensor) -> None:
        """Put the rows' choices among logits [B, V] into tokens [B] int64, which has the greedy ones already."""
        params = [row.sequence.request.sampling for row in rows]
        if any(asked.temperature != 0 for asked in params):
            tokens.copy_(choose(logits, params, [row.position + 1 for row in rows]))

    def _run(self, size: int) -> Tensor:
        if size not in self._graphs:  # on the CPU, and where `capture` found no memory
            return self._forward(size)
        graph, logits = self._graphs[size]
        graph.replay()
        return logits

    def _forward(self, size: int) -> Tensor:
        """The step itself, out of the buffers: logits [size, V], the greedy choices and what was missed."""
        token, source, position, place = self._fields[:4, :size].long().unbind()
        chosen = self._result[0].index_select(0, source.clamp(min=0))
        tokens = torch.where(source < 0, token, chosen)
        inputs = StepInputs(tokens, position, place, self._tables[:size], self._fields[4, :size])
        attend = DecodeAttention(self.runner.kv, inputs)
        missed = torch.zeros_like(tokens, dtype=torch.bool)
        rows, model = no_rows, self.runner.model
        if (pager := self.runner.pager) is not None and pager.maps is not None:
            host = pager.host.memory.tensor() if pager.host.slots else None
            records = pager.host.map.on_device.data if pager.host.map is not None and host is not None else None
            slots = []
            for part in pager.maps.parts:
                found, absent = lookup_slots(tokens, part.on_device.data, records)
                slots.append(found)
                missed |= absent
            rows = TableRows(self.runner, slots, host)
        logits = model.logits(model.hidden(tokens, attend, rows))
        self._result[0, :size] = logits.argmax(-1)
        self._result[1, :size] = missed
        return logits

    @torch.inference_mode()
    def capture(self) -> None:
        """Record the graphs, on CUDA: at first, and whenever the tiers or the table were changed, whose memory they
        read. No step may be on its way.

        Raises MemoryError when the device has no room; steps of the sizes that have no graph are then launched kernel
        by kernel, with the same result.
        """
        if self.runner.device.type != "cuda":
            return
        self._graphs.clear()
        try:
            self._record()
        except torch.OutOfMemoryError as error:
            raise MemoryError(f"the CUDA graphs of decode steps do not fit on the device: {error}") from error

    def _record(self) -> None:
        staging = self._stagings[0]
        self._pad(staging, 0, self.max_rows)
        self._flat.copy_(staging.flat)
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(self.runner.device)
        stream.wait_stream(torch.cuda.current_stream(self.runner.device))
        with torch.cuda.stream(stream):
            for size in reversed(self._sizes):  # the largest first: the others fit into its memory
                self._forward(size)  # compiles kernels, and takes what libraries take at their first use
                graph = torch.cuda.CUDAGraph()
                # Other threads may read from the disk meanwhile, and copy.
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    logits = self._forward(size)
                self._graphs[size] = graph, logits
        torch.cuda.synchronize(self.runner.device)
