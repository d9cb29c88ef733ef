"""Log lines of every process: one JSON object or one line of text each, on standard error.

No line holds what a client wrote (prompts, answers, keys, query strings), except its request id if that is plain.
"""

import atexit
import json
import logging
import os
import queue
import sys
import threading
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

Format = Literal["auto", "json", "text"]
Level = Literal["debug", "info", "warning", "error"]
Process = Literal["api", "engine"]

# The HTTP request that the current task serves; lines logged meanwhile carry it.
current_request: ContextVar[str | None] = ContextVar("current_request", default=None)

# Lines that wait for a reader of standard error that has stalled. More are dropped, and their number is logged.
LINES_KEPT = 10_000
# What is left when the process ends gets so long.
LAST_LINES_SECONDS = 1.0

# What every record has. The rest came with `extra`; uvicorn's colours are for its own formatter.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What a line says besides its message: the request id if there is one, then the extra fields."""
    # Libraries add marks of their own to every record, under names with an underscore; Ray does.
    given = {key: value for key, value in vars(record).items() if key not in _STANDARD and not key.startswith("_")}
    request_id = given.pop("request_id", None) or current_request.get()
    return ({"request_id": request_id} if request_id else {}) | given


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class JsonFormatter(logging.Formatter):
    """`time` (RFC 3339, UTC), `level`, `logger`, `process`, `message`, then a record's extra fields and `exception`."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": self._process,
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in _fields(record).items() if key not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)  # ASCII, so that any terminal's encoding can take it


class TextFormatter(logging.Formatter):
    """The same for people: `time LEVEL process logger: message key=value ...`, tracebacks on lines of their own."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        start = f"{_time(record)} {record.levelname} {self._process} {record.name}: {record.getMessage()}"
        line = " ".join([start, *(f"{key}={value}" for key, value in _fields(record).items())])
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class Outlet(logging.Handler):
    """Writes lines from a thread of its own: whoever logs never waits for the reader of standard error, which may be a
    full pipe. The caller formats, so that the line says which request it was."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: queue.Queue[str | None] = queue.Queue(LINES_KEPT)
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()
        atexit.register(self._finish)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._dropped += 1

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                sys.stderr.write(line + "\n")
                sys.stderr.flush()
            except (OSError, ValueError):
                continue  # the reader is gone; there is nobody left to tell
            if self._dropped and self._lines.empty():
                dropped, self._dropped = self._dropped, 0
                logging.getLogger(__name__).warning("%d log lines were dropped: nobody read them", dropped)

    def _finish(self) -> None:
        try:
            self._lines.put(None, timeout=LAST_LINES_SECONDS)
        except queue.Full:
            return
        self._thread.join(LAST_LINES_SECONDS)


def _open_stderr() -> None:
    """A process that was started without standard error gets one that goes nowhere: the next file that is opened would
    take its number."""
    if sys.stderr is None:
        sys.stderr = open(os.open(os.devnull, os.O_WRONLY), "w")  # noqa: SIM115 (it lives as long as the process)


def configure(form: Format, level: Level, process: Process) -> None:
    """Send this process's log lines to standard error: `auto` is text on a terminal, JSON elsewhere. Warnings and
    exceptions that nobody caught become lines too."""
    _open_stderr()
    as_text = form == "text" or (form == "auto" and sys.stderr.isatty())
    handler = Outlet()
    handler.setFormatter(TextFormatter(process) if as_text else JsonFormatter(process))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    crash = logging.getLogger("tolserve.crash")
    sys.excepthook = lambda kind, error, trace: crash.critical("uncaught exception", exc_info=(kind, error, trace))
    threading.excepthook = lambda given: crash.critical(
        "uncaught exception in a thread", exc_info=given.exc_value or True
    )
