"""Memory packs in an engine: loaded by name when a request first asks, kept within a limit, held by who uses them."""

import os
import stat
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tolserve.engine.request import PackView
from tolserve.metrics import Metrics
from tolserve.model.pack import (
    MAX_HEADER,
    SUFFIX,
    Entries,
    PackError,
    Target,
    check_header,
    is_pack_name,
    parse_pack,
    read_header,
)

# Packs that a listing shows: reading so many headers takes the engine some 30 ms between two steps.
MAX_LISTED = 256

Stamp = tuple[int, int, int]


class PackBusy(PackError):  # noqa: N818 - says what happened; it is over when other requests end
    """A pack that cannot be had right now."""


@dataclass(eq=False)
class Pack:
    """A loaded pack. The entries' rows lie on the engine's device; the rest is looked at by the host."""

    name: str
    entries: Entries
    adds: NDArray[np.bool_]  # [E]: whether a row is not all zeros
    digest: bytes  # of the file: equal ones mean equal packs
    stamp: Stamp
    users: int = 0  # requests that hold it

    @property
    def nbytes(self) -> int:
        return self.entries.nbytes

    @property
    def rows(self) -> Tensor:
        """[E, d] bfloat16 or float32."""
        return self.entries.rows

    def find(self, tokens: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which entries apply to tokens [T]: (index into `tokens`, entry), a pair for each."""
        first, end = (np.searchsorted(self.entries.tokens, tokens, side) for side in ("left", "right"))
        counts = end - first
        before = np.cumsum(counts) - counts
        entries = np.arange(counts.sum()) + np.repeat(first - before, counts)
        return np.repeat(np.arange(len(tokens)), counts), entries


class PackStore:
    """The packs of a folder. What is loaded takes at most `limit` bytes, those that requests still hold included; one
    that nobody holds leaves for another, the one that was used longest ago first."""

    def __init__(self, folder: Path, limit: int, target: Target, device: torch.device, metrics: Metrics) -> None:
        self._folder, self._limit, self._target, self._device = folder, limit, target, device
        self._loaded: OrderedDict[str, Pack] = OrderedDict()  # used longest ago first
        self._replaced: list[Pack] = []  # held still, but their files are others by now
        self._unusable: dict[str, tuple[Stamp, str]] = {}  # files that were read in vain, and what is wrong with them
        self._count = metrics.gauge("packs_loaded", "Memory packs that are loaded")
        self._bytes = metrics.gauge("pack_bytes", "What the loaded memory packs take")
        self._loads = metrics.counter("pack_loads_total", "Memory packs read from their files")

    @property
    def nbytes(self) -> int:
        return sum(pack.nbytes for pack in (*self._loaded.values(), *self._replaced))

    def take(self, names: Sequence[str]) -> tuple[Pack, ...]:
        """Packs for a request, which gives them back with `give`. Raises PackError; nothing is held then."""
        taken: list[Pack] = []
        try:
            for name in names:
                taken.append(self._current(name))
                taken[-1].users += 1
        except PackError:
            self.give(taken)
            raise
        return tuple(taken)

    def give(self, packs: Iterable[Pack]) -> None:
        for pack in packs:
            pack.users -= 1
        self._replaced = [pack for pack in self._replaced if pack.users]
        self._show()

    def _current(self, name: str) -> Pack:
        """The pack as its file is now."""
        stamp = self._stamp(name)
        pack = self._loaded.get(name)
        if pack is not None and pack.stamp != stamp:
            self._drop(pack)
            pack = None
        if pack is None:
            pack = self._loaded[name] = self._load(name, stamp)
            self._loads.add(1)
        self._loaded.move_to_end(name)
        self._show()
        return pack

    def _stamp(self, name: str) -> Stamp:
        if is_pack_name(name):
            try:
                found = os.stat(self._path(name))
                if stat.S_ISREG(found.st_mode):
                    return _stamp_of(found)
            except OSError:
                pass
            if (pack := self._loaded.get(name)) is not None:
                self._drop(pack)
        raise PackError(f"the pack {name!r} does not exist; see /v1/memory/packs")

    def _path(self, name: str) -> Path:
        return self._folder / (name + SUFFIX)

    def _drop(self, pack: Pack) -> None:
        del self._loaded[pack.name]
        if pack.users:
            self._replaced.append(pack)
        self._show()

    def _make_room(self, size: int) -> None:
        """Let packs go until another of `size` bytes fits."""
        idle = [pack for pack in self._loaded.values() if not pack.users]
        held = self.nbytes - sum(pack.nbytes for pack in idle)
        if size > self._limit:
            raise PackError(
                f"it takes {size:,} bytes, and --pack-memory is {self._limit:,}; start the server with more"
            )
        if held + size > self._limit:
            raise PackBusy(
                f"it takes {size:,} bytes, and running requests hold {held:,} of --pack-memory's {self._limit:,}; try "
                "again later, or start the server with more"
            )
        for pack in idle:
            if self.nbytes + size <= self._limit:
                return
            self._drop(pack)

    def _load(self, name: str, stamp: Stamp) -> Pack:
        """Read a file, which costs another pack's place only when its header is one of ours. One that cannot be used is
        read once."""
        known, message = self._unusable.get(name, (None, ""))
        if known == stamp:
            raise PackError(message)
        try:
            return self._read(name, stamp)
        except PackBusy as error:
            raise PackBusy(f"the pack {name!r} cannot be had now: {error}") from error
        except PackError as error:
            message = f"the pack {name!r} cannot be used: {error}"
            self._unusable[name] = stamp, message
            raise PackError(message) from error

    def _read(self, name: str, stamp: Stamp) -> Pack:
        try:
            with self._path(name).open("rb") as file:
                if _stamp_of(os.fstat(file.fileno())) != stamp:
                    raise PackBusy("its file was changed just now; try again")
                check_header(read_header(file.read(MAX_HEADER)), self._target, stamp[1])
                self._make_room(stamp[1])
                file.seek(0)
                data = file.read(stamp[1])
            entries = parse_pack(data, self._target)
            adds = entries.rows.ne(0).any(dim=1).numpy()
            on_device = replace(entries, rows=entries.rows.to(self._device))
        except OSError as error:
            raise PackBusy(error.strerror or "its file cannot be read") from error
        except RuntimeError as error:  # torch's own for CUDA is a subclass
            raise PackBusy(f"there is no memory for it on {self._device}") from error
        return Pack(name, on_device, adds, blake2b(data, digest_size=32).digest(), stamp)

    def _show(self) -> None:
        self._count.set(len(self._loaded) + len(self._replaced))
        self._bytes.set(self.nbytes)

    def view(self) -> list[PackView]:
        """The folder's packs by name, at most MAX_LISTED. One that cannot be used says why."""
        names = (path.stem for path in self._folder.glob(f"*{SUFFIX}"))
        return [self._look(name) for name in sorted(filter(is_pack_name, names))[:MAX_LISTED]]

    def _look(self, name: str) -> PackView:
        loaded = False
        try:
            stamp = self._stamp(name)
            loaded = name in self._loaded and self._loaded[name].stamp == stamp
            with self._path(name).open("rb") as file:
                header = read_header(file.read(MAX_HEADER))
            check_header(header, self._target, stamp[1])
        except (OSError, PackError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            return PackView(name, None, None, None, loaded, reason)
        return PackView(name, header.entries, header.nbytes, header.description, loaded, None)


def _stamp_of(found: os.stat_result) -> Stamp:
    """What tells a file from the one that lay there before."""
    return found.st_ino, found.st_size, found.st_mtime_ns
