"""Real tables that are replaced, written to, moved and put back under a watch."""

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tol.tables import flip_byte, make_table, value
from tolserve.metrics import Metrics
from tolserve.tol import watch
from tolserve.tol.table import Table, TableError
from tolserve.tol.watch import TableWatch, change_since, stamps_of
from tolserve.tol.writer import TableWriter


def replace(table: Table) -> None:
    """As `table build --force` does, with the same bytes."""
    manifest = table.manifest
    shape = {"vocab_size": manifest.vocab_size, "num_layers": manifest.num_layers, "hidden_size": manifest.hidden_size}
    writer = TableWriter(table.path, **shape, fingerprint=manifest.fingerprint)
    for token in range(manifest.vocab_size):
        writer.write(table.read_record(token)[None])
    writer.finish()


def replace_manifest(table: Table) -> None:
    manifest = table.path / "manifest.json"
    shutil.copy(manifest, table.path / "new").rename(manifest)


CHANGES: dict[str, tuple[Callable[[Table], object], watch.Change]] = {
    "replaced": (replace, "replaced"),
    "one file replaced": (replace_manifest, "replaced"),
    "written to": (lambda t: flip_byte(t, 3), "modified"),
    "truncated": (lambda t: (t.path / t.manifest.shards[-1].file).open("r+b").truncate(9000), "modified"),
    "moved": (lambda t: t.path.rename(t.path.with_name("elsewhere")), "vanished"),
    "shard deleted": (lambda t: (t.path / t.manifest.shards[0].file).unlink(), "vanished"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_happened_to_the_files_is_told_apart(tmp_path: Path, name: str) -> None:
    table, _ = make_table(tmp_path / "table")
    stamps = stamps_of(table)
    for token in range(5):
        table.read_record(token)
    assert change_since(stamps) is None
    change, expected = CHANGES[name]
    change(table)
    assert change_since(stamps) == expected


def test_a_table_that_goes_while_it_is_opened(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path / "table")
    shutil.rmtree(table.path)
    with pytest.raises(TableError, match="changed while it was opened"):
        stamps_of(table)


@contextmanager
def watching(table: Table, metrics: Metrics) -> Iterator[TableWatch]:
    watcher = TableWatch(stamps_of(table), metrics)
    try:
        yield watcher
    finally:
        watcher.close()


def eventually(metrics: Metrics, expected: float) -> None:
    deadline = time.monotonic() + 30
    while value(metrics, "tol_table_changed") != expected:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_change_shows_until_the_table_is_reopened_and_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watch, "WATCH_SECONDS", 0.01)
    caplog.set_level(logging.INFO)
    table, _ = make_table(tmp_path / "table")
    metrics = Metrics()
    with watching(table, metrics) as watcher:
        time.sleep(0.1)
        assert value(metrics, "tol_table_changed") == 0
        replace(table)
        eventually(metrics, 1)
        time.sleep(0.1)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert f"{table.path} was changed (replaced)" in caplog.text
        watcher.follow(stamps_of(Table.open(table.path)))
        assert value(metrics, "tol_table_changed") == 0
        away = table.path.rename(tmp_path / "away")
        eventually(metrics, 1)
        away.rename(table.path)
        eventually(metrics, 0)
        assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "INFO"]
        assert "(vanished)" in caplog.text
