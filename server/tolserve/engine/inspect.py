"""A token's record as people can read it: how long its rows are, what they say to the output head, whose are alike.

Reading a row through the output head is the usual first look at a vector of the residual stream ("logit lens"); it
leaves out that later layers work on the sum.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tolkernels import add_rows, linear
from tolserve.engine.assemble import find_table
from tolserve.engine.config import EngineSettings
from tolserve.engine.look import Frequency, LookError, RowView, Scored, TokenView
from tolserve.engine.runner import Runner
from tolserve.model.config import ModelConfig
from tolserve.model.serving import ServingModel
from tolserve.tol.frequencies import Counts
from tolserve.tol.manifest import Manifest
from tolserve.tol.table import Bytes, Table
from tolserve.tol.view import Tier

# Of records in the device tier that a server compares with, those evicted last. At the 1B shape that are 1,365 records,
# whose comparison takes a decode step's time on a CPU; the product with the output head takes another's.
_VALUES_COMPARED = 1 << 26
# Of a layer, decoded at once: 4 MiB as float32. Fewer make more calls, each of which wakes the compute threads.
_VALUES_AT_ONCE = 1 << 20
# Below any row's mean square. A row of zeros is like no other, instead of being divided by zero.
_TINY = 1e-30


@dataclass(frozen=True)
class Records:
    """Records of `tokens` as they lie in memory. For each layer group of the table: uint8 [slots, stride], where in it
    each token's bytes lie [n] int64, and the byte of a record with which a slot begins."""

    tokens: Sequence[int]
    groups: Sequence[tuple[Tensor, Tensor, int]]

    @classmethod
    def whole(cls, tokens: Sequence[int], records: Bytes, manifest: Manifest) -> "Records":
        """Records uint8 [n, record_bytes], one after another."""
        data = torch.from_numpy(records)
        return cls(tokens, [(data, torch.arange(len(data)), 0)] * len(manifest.groups))

    def zeros(self, manifest: Manifest) -> Tensor:
        """[n, d] float32, where the records lie; `rows` adds to them."""
        return torch.zeros(len(self.tokens), manifest.hidden_size, device=self.groups[0][0].device)

    def rows(self, layer: int, manifest: Manifest, factors: dict[int, Tensor], zeros: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's rows float32 [n, d], and the same with a root mean square of 1; a row of zeros stays zero."""
        group, row = manifest.row_layout(layer)
        data, slots, base = self.groups[group]
        factor = factors.get(layer)
        return add_rows(
            data,
            slots,
            zeros,
            torch.ones(manifest.hidden_size, device=data.device),
            _TINY,
            offset=manifest.groups[group].offset - base + row.offset,
            values=row.values,
            group_size=row.group_size,
            factor=factor.to(data.device, torch.float32) if factor is not None else None,
        )


@dataclass(frozen=True)
class Compared:
    """Of the layers asked for and n records: cosines with the token's own rows, and the rows' norms, float32 [L, n]."""

    tokens: Tensor  # [n] int64
    cosines: Tensor
    norms: Tensor


class Reader:
    """Reads the records of one table with one model's output head. Not for a base model."""

    def __init__(self, model: ServingModel, manifest: Manifest, factors: dict[int, Tensor]) -> None:
        self.model, self.manifest, self.factors = model, manifest, factors

    @torch.inference_mode()
    def read(
        self,
        token: int,
        record: Bytes,
        others: Iterable[Records],
        *,
        layers: Sequence[int] | None = None,
        top: int,
        tier: Tier | None = None,
        counts: Counts | None = None,
    ) -> TokenView:
        """A token's record uint8 [record_bytes], beside `others`; among them the token itself is left out.

        `layers` are all that have a row if not given, `top` is the length of the lists. Raises LookError for a layer
        without rows.
        """
        chosen = rows_of(self.manifest, layers)
        own = Records.whole([token], np.array(record)[None], self.manifest)
        zeros = own.zeros(self.manifest)
        pairs = [own.rows(layer, self.manifest, self.factors, zeros) for layer in chosen]
        rows = torch.cat([row for row, _ in pairs]).to(self.model.device)
        units = torch.cat([unit for _, unit in pairs]).to(self.model.device)
        up, down = self._spoken(rows, top)
        compared = self._compare(token, chosen, units, others)
        near, medians = _nearest(compared, top, len(chosen))
        norms = torch.linalg.vector_norm(rows, dim=1).tolist()
        views = map(RowView, chosen, norms, medians, up, down, near)
        frequency = frequency_of(token, counts) if counts is not None else None
        return TokenView(token, tier, frequency, len(compared.tokens) if compared is not None else 0, list(views))

    def _spoken(self, rows: Tensor, top: int) -> tuple[list[list[Scored]], list[list[Scored]]]:
        """What each of the rows [L, d] promotes and suppresses, strongest first: one product with the output head."""
        logits = linear((rows * self.model.norm).to(self.model.dtype), self.model.head).float()
        count = min(top, logits.shape[1])
        return _scored(*logits.topk(count)), _scored(*logits.topk(count, largest=False))

    def _compare(self, token: int, layers: Sequence[int], units: Tensor, others: Iterable[Records]) -> Compared | None:
        """One pass over the other records; None if there are none."""
        tokens: list[int] = []
        cosines, norms = [], []
        for batch in others:
            zeros = batch.zeros(self.manifest)
            keep = torch.tensor([each != token for each in batch.tokens])
            found: list[tuple[Tensor, Tensor]] = []
            for layer, mine in zip(layers, units, strict=True):
                row, unit = batch.rows(layer, self.manifest, self.factors, zeros)
                found.append((unit @ mine.to(unit.device), torch.linalg.vector_norm(row, dim=1)))
            cosines.append(torch.stack([angles for angles, _ in found]).cpu()[:, keep] / self.manifest.hidden_size)
            norms.append(torch.stack([sizes for _, sizes in found]).cpu()[:, keep])
            tokens += [each for each in batch.tokens if each != token]
        if not tokens:
            return None
        return Compared(torch.tensor(tokens), torch.cat(cosines, dim=1), torch.cat(norms, dim=1))


def _nearest(compared: Compared | None, top: int, layers: int) -> tuple[list[list[Scored]], Sequence[float | None]]:
    if compared is None:
        return [[]] * layers, [None] * layers
    values, places = compared.cosines.topk(min(top, len(compared.tokens)))
    return _scored(values, compared.tokens[places]), compared.norms.median(dim=1).values.tolist()


def _scored(values: Tensor, tokens: Tensor) -> list[list[Scored]]:
    """Values and token ids [L, k] as lists."""
    pairs = zip(tokens.tolist(), values.tolist(), strict=True)
    return [[Scored(*each) for each in zip(ids, numbers, strict=True)] for ids, numbers in pairs]


def rows_of(manifest: Manifest, layers: Sequence[int] | None) -> Sequence[int]:
    """The layers asked for, in order and once each. Raises LookError for one that has no rows."""
    if layers is None:
        return manifest.layers
    if wrong := [layer for layer in layers if layer not in manifest.layers]:
        has = "was dropped from this table" if wrong[0] in manifest.dropped_layers else "does not exist"
        raise LookError(f"layers: layer {wrong[0]} {has}; the model has {manifest.num_layers}, from 0 on")
    return sorted(set(layers))


def frequency_of(token: int, counts: Counts) -> Frequency | None:
    """None while nothing was counted."""
    total = int(counts.sum())
    if not total:
        return None
    count = int(counts[token])
    return Frequency(count, count / total, int(np.count_nonzero(counts > count)) + 1)


def look_up(
    runner: Runner, token: int, layers: Sequence[int] | None, top: int, counts: Counts | None = None
) -> TokenView:
    """A token's record in a running engine, between two steps, compared with some of those in the device tier.

    It is no lookup and moves nothing. What it costs is bounded, see docs/memory.md. Raises LookError for what cannot be
    asked, RecordError for a record that cannot be read.
    """
    pager = runner.pager
    if pager is None:
        raise LookError("a base model has no memory to look into")
    reader = Reader(runner.model, pager.table.manifest, runner.factors)
    values = len(rows_of(reader.manifest, layers)) * reader.manifest.hidden_size
    record, tier = pager.peek(token)
    others = _device_records(runner, pager.latest(max(1, _VALUES_COMPARED // values)))
    return reader.read(token, record, others, layers=layers, top=top, tier=tier, counts=counts)


def _device_records(runner: Runner, tokens: list[int]) -> Iterator[Records]:
    pager = runner.pager
    if pager is None:
        return
    parts = [pager.parts[pager.part_of(group)] for group in range(len(pager.table.manifest.groups))]
    for start, end in pairwise([*range(0, len(tokens), _at_once(pager.table.manifest)), len(tokens)]):
        batch = tokens[start:end]
        groups = []
        for part in parts:
            slots = [part.slot_of[token] for token in batch]
            part.ready(slots)
            groups.append((part.arena.data, torch.tensor(slots, device=runner.device), part.offset))
        yield Records(batch, groups)


def _at_once(manifest: Manifest) -> int:
    return max(1, _VALUES_AT_ONCE // manifest.hidden_size)


def table_records(table: Table, progress: Callable[[int, int], object] | None = None) -> Iterator[Records]:
    """All records of a table, read once in order, some at a time. `progress(done, total)` is called after each batch.

    Raises RecordError for the first that cannot be read.
    """
    manifest = table.manifest
    size = _at_once(manifest)
    for shard in manifest.shards:
        end = shard.first_token + shard.tokens
        with (table.path / shard.file).open("rb", buffering=0) as file:
            for start in range(shard.first_token, end, size):
                tokens = range(start, min(start + size, end))
                records = np.stack([table.read_from(file, token) for token in tokens])
                yield Records.whole(tokens, records, manifest)
                if progress is not None:
                    progress(tokens.stop, manifest.vocab_size)


def inspect_table(
    settings: EngineSettings,
    token: int,
    *,
    layers: Sequence[int] | None,
    top: int,
    counts: Counts | None,
    nearest: bool,
    progress: Callable[[int, int], object] | None,
) -> TokenView:
    """A token's record without a server, from the table that `settings` would serve; with `nearest` compared with all
    others in one pass, of which only norms and cosines stay in memory.

    Raises LookError for what cannot be asked, RecordError, and what loading the model and the table raises.
    """
    model_dir = Path(settings.model)
    config = ModelConfig.load(model_dir)
    if not config.has_memory:
        raise LookError(f"{model_dir} is a base model: its FFNs read the stream, so no token has a record")
    if not 0 <= token < config.vocab_size:
        raise LookError(f"there is no token {token}: ids are below {config.vocab_size}")
    table = find_table(settings, model_dir, config)
    rows_of(table.manifest, layers)  # before the weights are read
    factors = {layer: torch.from_numpy(bits).view(torch.bfloat16) for layer, bits in table.read_factors().items()}
    reader = Reader(ServingModel.load(model_dir, dtype=torch.float32), table.manifest, factors)
    others = table_records(table, progress) if nearest else ()
    return reader.read(token, table.read_record(token), others, layers=layers, top=top, counts=counts)
