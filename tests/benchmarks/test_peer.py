"""A peer process answers what it is asked, is stopped in between, and says so when it ends."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from peer import PeerProcess

ADAPTER = """
import sys
sys.path.insert(0, {benchmarks!r})
from peer import serve

class Echo:
    def __init__(self, options):
        print("a library's chatter")
        self.options, self.prompts, self.fed = options, [], []

    def start(self, prompts):
        self.prompts, self.fed = prompts, []

    def step(self, tokens):
        print("more of it")
        if tokens == [13]:
            raise SystemExit(3)
        self.fed.append(tokens)

    def facts(self):
        return {{"options": self.options, "prompts": self.prompts, "fed": self.fed}}

    def use(self, **options):
        self.options = options

serve(Echo)
"""


@pytest.fixture
def echo(tmp_path: Path) -> Iterator[PeerProcess]:
    adapter = tmp_path / "adapter.py"
    adapter.write_text(ADAPTER.format(benchmarks=str(Path(__file__).parents[2] / "benchmarks")))
    peer = PeerProcess("echo", Path(sys.executable), str(adapter), {"size": 1})
    peer.wait_ready(60)
    yield peer
    peer.close()


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_commands_are_answered_whatever_libraries_print(echo: PeerProcess) -> None:
    echo.ask("start", prompts=[[1, 2], [3, 4]])
    assert len(echo.ask("steps", tokens=[[5, 6], [7, 8]])["seconds"]) == 2
    echo.ask("use", size=2)
    facts = echo.ask("facts")
    assert (facts["prompts"], facts["fed"]) == ([[1, 2], [3, 4]], [[5, 6], [7, 8]])
    assert facts["options"] == {"size": 2}
    assert facts["process"]["rss"] > facts["process"]["anonymous"] > 0


def test_it_is_stopped_unless_it_is_asked(echo: PeerProcess) -> None:
    deadline = time.monotonic() + 10
    while state(echo.pid) != "T" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state(echo.pid) == "T"


def test_its_end_is_told(echo: PeerProcess) -> None:
    with pytest.raises(RuntimeError, match="echo ended with status 3"):
        echo.ask("steps", tokens=[[13]])
    with pytest.raises(RuntimeError, match="echo ended with status 3"):
        echo.ask("facts")


def test_closing_ends_a_stopped_one(echo: PeerProcess) -> None:
    echo.close()
    with pytest.raises(ProcessLookupError):
        os.kill(echo.pid, 0)
