"""docs/memory.md: its commands work as typed, and its examples and field names are what comes back."""

import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from e2e.conftest import ROOT, Running
from tolserve.cli import main
from tolserve.settings import DEMO_MODEL

PAGE = (ROOT / "docs" / "memory.md").read_text()
# Rows are rounded to bf16 after a product whose order of summation depends on the machine.
TOLERANCE = 0.03
NUMBER = re.compile(r"-?\d+\.\d+")


@dataclass
class Example:
    argv: list[str]
    output: str


def examples() -> list[Example]:
    """Of the page's blocks, each line `$ command` with what is printed under it."""
    found = []
    for block in re.findall(r"^```\n(\$ .*?)^```$", PAGE, re.DOTALL | re.MULTILINE):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            found.append(Example(shlex.split(command), output))
    return found


def terms(section: str) -> set[str]:
    """What the first column of a section's tables names, those of `body` aside."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    rows = [row for table in text.split("| field | |")[1:] for row in table.split("\n\n")[0].splitlines()]
    return {name for row in rows for name in re.findall("`([^`]+)`", row.split("|")[1] if "|" in row else "")}


def parts(value: Any) -> Iterator[Any]:
    yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from parts(inner)


def same(found: Any, shown: Any) -> bool:
    """Equal, but for the last digits of numbers."""
    if isinstance(shown, float):
        return isinstance(found, float) and found == pytest.approx(shown, abs=TOLERANCE)
    if isinstance(shown, dict):
        return isinstance(found, dict) and list(found) == list(shown) and all(same(found[k], shown[k]) for k in shown)
    if isinstance(shown, list):
        return isinstance(found, list) and len(found) == len(shown) and all(map(same, found, shown))
    return type(found) is type(shown) and found == shown


def values(text: str) -> Iterator[Any]:
    """JSON values one after another."""
    while text := text.strip():
        value, end = json.JSONDecoder().raw_decode(text)
        yield value
        text = text[end:]


def fetch(client: httpx.Client, argv: list[str]) -> Any:
    """What curl would, as far as the page uses it."""
    if "-d" not in argv:
        return client.get(argv[-1].replace("http://127.0.0.1:8000", "")).json()
    url, body = argv[2], argv[argv.index("-d") + 1]
    assert argv[argv.index("-H") + 1] == "content-type: application/json"
    return client.post(url.replace("http://127.0.0.1:8000", ""), json=json.loads(body)).json()


def test_the_terminal_examples(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    shown = [example for example in examples() if example.argv[0] == "tolserve"]
    assert [Path(example.argv[2]).resolve() for example in shown] == [DEMO_MODEL.resolve()] * 2
    printed, refused = shown
    assert main(printed.argv[1:]) == 0
    found = capsys.readouterr().out
    assert NUMBER.sub("#", found) == NUMBER.sub("#", printed.output)
    pairs = zip(NUMBER.findall(found), NUMBER.findall(printed.output), strict=True)
    assert all(float(one) == pytest.approx(float(other), abs=TOLERANCE) for one, other in pairs)
    assert main(refused.argv[1:]) == 2
    assert capsys.readouterr().err == refused.output


def test_the_http_examples_and_the_names_of_fields(start_server: Callable[..., Running]) -> None:
    """In the page's order, on a server that has answered nothing before."""
    running = start_server("--served-model-name", "demo_model", model=DEMO_MODEL).wait_ready()
    shown = [example for example in examples() if example.argv[0] == "curl"]
    answers = []
    with running.http() as client:
        for example in shown:
            answers.append(fetch(client, example.argv))
            for value in values(example.output):
                assert any(same(part, value) for part in parts(answers[-1])), (value, answers[-1])
    keys = [{key for part in parts(answer) if isinstance(part, dict) for key in part} for answer in answers]
    assert len(shown) == 5
    assert {"tier", "compared", "nearest"} < terms("A token's record over HTTP") < keys[1]
    assert {"target", "embedding", "compute"} < terms("An attribution") < keys[2]


def test_the_attribution_in_words_is_that_in_numbers() -> None:
    (example,) = [each for each in examples() if each.argv[2].endswith("/attribution")]
    middle, last = values(example.output)
    for position in (middle, last):
        shares = position["embedding"] + sum(position["attention"]) + sum(position["memory"])
        assert shares == pytest.approx(position["logit"], abs=1e-3)
    said = (middle["logit"], sum(middle["memory"]), middle["memory"][0], last["logit"], sum(last["attention"]))
    for value in said:
        assert f"{value:.2f}" in PAGE
