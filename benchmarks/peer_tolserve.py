"""tolserve as a peer: the whole engine over a model of random weights, next tokens forced."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peer import serve

from tolserve.engine.assemble import use_threads
from tolserve.model.config import ModelConfig
from tolserve.study.forced import ForcedEngine, read_trace
from tolserve.study.random_model import random_model
from tolserve.tol.table import Table


class Tolserve:
    def __init__(self, options: dict[str, Any]) -> None:
        """options: config (ModelConfig's fields), dtype, weights, sequences, longest, threads, device; trace,
        warm_lookups; and for a model with a table those of `use`."""
        use_threads(options["threads"])
        self._options, self._dtype = options, getattr(torch, options["dtype"])
        self._config = ModelConfig(**options["config"])
        self._model = random_model(
            self._config, dtype=self._dtype, weights=options["weights"], device=options["device"]
        )
        self._engine: ForcedEngine | None = None
        self._table: Table | None = None
        if not self._config.has_memory:
            self._open(0)
        elif "table" in options:
            self.use(table=options["table"], cache_bytes=options["cache_bytes"])

    def use(self, **options: Any) -> None:
        """Serve from the table of this path, with so many bytes of device tier, in its steady state."""
        self._table = Table.open(Path(options["table"]))
        self._open(max(1, options["cache_bytes"] // self._table.manifest.record_bytes))

    def _open(self, slots: int) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        sizes = {name: self._options[name] for name in ("sequences", "longest")}
        self._engine = ForcedEngine(self._model, self._table, slots=slots, dtype=self._dtype, **sizes)
        if self._table is not None:
            trace = read_trace(Path(self._options["trace"]), self._config.vocab_size)
            self._engine.warm(trace[: len(trace) // 2], self._options["warm_lookups"])

    def start(self, prompts: list[list[int]]) -> None:
        self._ready().start(prompts)

    def step(self, tokens: list[int]) -> None:
        self._ready().step(tokens)

    def _ready(self) -> ForcedEngine:
        if self._engine is None:
            raise RuntimeError("a model with a table needs `use` first")
        return self._engine

    def facts(self) -> dict[str, Any]:
        engine = self._ready()
        pager = engine.engine.pager
        counted = ("tol_lookups_total", "tol_hits_total", "tol_stall_seconds_total", "tol_read_bytes_total")
        counters = engine.counters()
        return {
            "version": f"torch {version('torch')}",
            "bytes": engine.bytes(),
            "reads": pager.disk.io if pager is not None else None,
            "counters": {name: counters[name] for name in counted if name in counters},
        }


if __name__ == "__main__":
    serve(Tolserve)
