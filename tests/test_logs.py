"""One line of JSON per record, whatever is in it."""

import json
import logging
import re
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from e2e.conftest import environment
from tolserve.logs import JsonFormatter, TextFormatter, current_request

names = st.text(st.characters(categories=["Ll"])).map("x_".__add__)  # none that a record has itself
extras = st.dictionaries(names, st.one_of(st.text(), st.integers(), st.booleans(), st.none()), max_size=4)


def record(message: str, **extra: object) -> logging.LogRecord:
    return logging.makeLogRecord({"name": "n", "msg": message, "levelname": "INFO", "created": 0.5} | extra)


@given(st.text(), extras)
def test_a_record_is_one_line_of_json_with_everything_in_it(message: str, extra: dict[str, object]) -> None:
    line = JsonFormatter("engine").format(record(message.replace("%", "%%"), **extra))
    assert "\n" not in line
    fixed = {"time": "1970-01-01T00:00:00.500Z", "level": "info", "logger": "n", "process": "engine"}
    assert json.loads(line).items() >= (extra | fixed | {"message": message.replace("%", "%%")}).items()


def test_lines_carry_the_request_that_is_served() -> None:
    token = current_request.set("id-1")
    try:
        assert json.loads(JsonFormatter("api").format(record("m")))["request_id"] == "id-1"
        assert json.loads(JsonFormatter("api").format(record("m", request_id="id-2")))["request_id"] == "id-2"
        assert "request_id=id-1" in TextFormatter("api").format(record("m"))
    finally:
        current_request.reset(token)
    assert "request_id" not in json.loads(JsonFormatter("api").format(record("m")))


def test_text_says_the_same() -> None:
    line = TextFormatter("api").format(record("answered", route="/r", status=200, _mark_of_a_library=1))
    assert line == "1970-01-01T00:00:00.500Z INFO api n: answered route=/r status=200"


def run(code: str) -> list[dict[str, object]]:
    setup = "import logging, threading, warnings; from tolserve import logs; logs.configure('json', 'info', 'api'); "
    argv = [sys.executable, "-c", setup + code]
    ended = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=60)
    return [json.loads(line) for line in ended.stderr.splitlines()]


def test_what_nobody_caught_becomes_a_line_too() -> None:
    (line,) = run("1 / 0")
    assert (line["level"], line["message"]) == ("critical", "uncaught exception")
    assert re.match(r"Traceback(.|\n)*ZeroDivisionError", str(line["exception"]))
    (line,) = run("t = threading.Thread(target=lambda: 1 / 0); t.start(); t.join()")
    assert "ZeroDivisionError" in str(line["exception"])
    (line,) = run("warnings.warn('careful')")
    assert "careful" in str(line["message"])


def test_severities_below_the_level_are_left_out() -> None:
    (line,) = run("log = logging.getLogger('x'); log.debug('a'); log.info('b')")
    assert line["message"] == "b"


def test_a_reader_that_stalls_stops_nobody() -> None:
    """64 KiB fit into the pipe that nobody reads; 20,000 lines are a hundred times that."""
    script = (
        "import logging, sys\n"
        "from tolserve import logs\n"
        "logs.configure('json', 'info', 'api')\n"
        "for number in range(20_000): logging.info('x' * 300)\n"
        "print('done', flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "done\n"
        lines = process.stderr.read().splitlines()
        assert process.wait(60) == 0
    assert 0 < len(lines) < 20_000
    assert all(json.loads(line)["process"] == "api" for line in lines)


def test_a_process_without_standard_error_logs_to_nobody() -> None:
    script = "from tolserve import logs; logs.configure('auto', 'info', 'api'); import logging; logging.info('x')"
    argv = ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, script]
    assert subprocess.run(argv, env=environment(), timeout=60, check=False).returncode == 0
