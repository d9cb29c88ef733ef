"""The commands of docs/packs.md, as they stand there, give what it says: a change, and its undoing."""

import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from e2e.conftest import ROOT, Running, environment, tolserve

PAGE = ROOT / "docs" / "packs.md"
ADDRESS = "127.0.0.1:8000"  # where a reader's server listens
SERVE = "tolserve serve --packs packs"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def steps() -> list[tuple[str, str]]:
    """Each command of the page, with the output that follows it there."""
    parts = [part for block in blocks("console") for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    return [(command, output) for command, _, output in (part.partition("\n") for part in parts)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The page's server, with the demo model, on a free port instead of the one that a reader's takes."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "packs").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [*tolserve(*shlex.split(SERVE)[1:]), "--port", str(port), "--cache-dir", str(folder / "cache")]
    log = folder / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(argv, cwd=folder, env=environment(), stderr=stderr, text=True)
    try:
        yield Running(process, f"http://127.0.0.1:{port}", log, folder).wait_ready()
    finally:
        process.terminate()
        process.wait(30)


def shell(server: Running, commands: list[str]) -> list[str]:
    """What each command prints, in one shell in the reader's folder."""
    for block in blocks("python"):
        name = block.partition("\n")[0].removeprefix("# ")
        (server.temporary / name).write_text(block.replace(f"http://{ADDRESS}", server.url))
    lines = [f'tolserve() {{ {shlex.join(tolserve())} "$@"; }}', f'python() {{ {sys.executable} "$@"; }}']
    for command in commands:
        lines += [command.replace(f"http://{ADDRESS}", server.url), "printf '\\0'"]
    ran = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", "\n".join(lines)],
        cwd=server.temporary, env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split("\0")[:-1]


@pytest.fixture(scope="module")
def printed(server: Running, tool: Callable[[str], str]) -> list[tuple[str, str, str]]:
    """Every command of the page but those that start the server, what the page says it prints, and what it printed."""
    tool("curl"), tool("jq")
    told = [step for step in steps() if step[0] not in ("mkdir packs", SERVE)]
    assert len(told) == len(steps()) - 2
    outputs = shell(server, [command for command, _ in told])
    return [(command, output, found) for (command, output), found in zip(told, outputs, strict=True)]


def test_the_page_says_what_its_commands_print(printed: list[tuple[str, str, str]]) -> None:
    for command, told, found in printed:
        assert found == told, command


def test_the_packs_change_what_they_are_for_and_leaving_them_out_undoes_it(
    server: Running, printed: list[tuple[str, str, str]]
) -> None:
    """To the last bit of the log-probabilities."""
    assert printed

    def ask(prompt: str, *edits: str) -> dict[str, Any]:
        body = {"model": "demo_model", "prompt": prompt, "temperature": 0, "max_tokens": 12, "logprobs": 5}
        with server.http() as http:
            answer = http.post("/v1/completions", json=body | ({"tol": {"edits": edits}} if edits else {}))
        choice: dict[str, Any] = answer.json()["choices"][0]
        return choice

    ship, king = "The ship was bound for New", "The king of the country was"
    plain = ask(ship)
    changed = ask(ship, "new-england")
    assert (plain["text"][:5], changed["text"][:8]) == (" York", " England")
    assert ask(ship) == plain
    assert ask(ship, "thank-god") == plain
    assert ask(ship, "new-england", "thank-god") == changed
    assert ask(king, "new-england", "no-new") == ask(king)
