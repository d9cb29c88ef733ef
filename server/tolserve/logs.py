"""Log lines of every process: one JSON object or one line of text each, on standard error.

No line holds what a client wrote (prompts, answers, keys, query strings), except its request id if that is plain.
"""

import json
import logging
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

# What every record has. The rest came with `extra`; uvicorn's colours are for its own formatter.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What a line says besides its message: the request id if there is one, then the extra fields."""
    given = {key: value for key, value in vars(record).items() if key not in _STANDARD}
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


def configure(form: Format, level: Level, process: Process) -> None:
    """Send this process's log lines to standard error: `auto` is text on a terminal, JSON elsewhere. Warnings and
    exceptions that nobody caught become lines too."""
    as_text = form == "text" or (form == "auto" and sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TextFormatter(process) if as_text else JsonFormatter(process))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    crash = logging.getLogger("tolserve.crash")
    sys.excepthook = lambda kind, error, trace: crash.critical("uncaught exception", exc_info=(kind, error, trace))
    threading.excepthook = lambda given: crash.critical(
        "uncaught exception in a thread", exc_info=given.exc_value or True
    )
