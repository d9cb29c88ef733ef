"""Notices that the table's files are no longer those that were opened."""

import logging
import os
import threading
from pathlib import Path
from typing import Literal

from tolserve.metrics import Metrics
from tolserve.tol.table import Table, TableError, files_of

log = logging.getLogger(__name__)

# Soon enough that an alert finds it, seldom enough that nobody sees the calls: one per file.
WATCH_SECONDS = 5.0

Change = Literal["replaced", "modified", "vanished"]
Stamps = dict[Path, tuple[int, int, int, int]]  # of each file: device, inode, size, time of its last writing (ns)

_ADVICE = {
    "replaced": "another table lies there now; this server reads the old one until the table is reopened",
    "modified": "a file in use was written to; records that no longer match their checksums fail their requests",
    "vanished": "it was moved or deleted; this server reads the open files, and the next start will find no table",
}


def stamps_of(table: Table) -> Stamps:
    """To be taken between `Table.open` and the opening of the shards: what changes in between is then noticed, here or
    by the checksums. Raises TableError."""
    try:
        return {table.path / file: _stamp(table.path / file) for file in files_of(table.manifest)}
    except OSError as error:
        raise TableError(f"{table.path} changed while it was opened: {error}") from error


def _stamp(path: Path) -> tuple[int, int, int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def change_since(stamps: Stamps) -> Change | None:
    """How the files that lie there now differ from those that were stamped. Raises OSError when nobody can say."""
    try:
        now = {path: _stamp(path) for path in stamps}
    except (FileNotFoundError, NotADirectoryError):
        return "vanished"
    if any(now[path][:2] != stamp[:2] for path, stamp in stamps.items()):
        return "replaced"
    return "modified" if now != stamps else None


class TableWatch:
    """Looks at the table's files from a thread of its own, since a network volume may take its time to answer; keeps a
    gauge, and logs each change once."""

    def __init__(self, stamps: Stamps, metrics: Metrics) -> None:
        self._gauge = metrics.gauge(
            "tol_table_changed", "1 while the table's files differ from those that were opened, else 0."
        )
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self.follow(stamps)
        self._thread = threading.Thread(target=self._work, name="table-watch", daemon=True)
        self._thread.start()

    def follow(self, stamps: Stamps) -> None:
        """These are the files in use from now on."""
        with self._lock:
            self._stamps = stamps
            self._change: Change | None = None
            self._gauge.set(0)

    def _work(self) -> None:
        while not self._closing.wait(WATCH_SECONDS):
            self._look()

    def _look(self) -> None:
        stamps = self._stamps
        try:
            change = change_since(stamps)
        except OSError as error:
            log.debug("the table's files cannot be looked at: %s", error)
            return
        with self._lock:
            if stamps is not self._stamps or change == self._change:
                return
            self._change = change
            self._gauge.set(0 if change is None else 1)
            folder = next(iter(stamps)).parent
        if change is None:
            log.info("the table %s is again as it was opened", folder)
        else:
            log.warning("the table %s was changed (%s): %s", folder, change, _ADVICE[change])

    def close(self) -> None:
        """Does not wait for a look that hangs."""
        self._closing.set()
