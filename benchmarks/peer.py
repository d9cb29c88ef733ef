"""Engines to be compared, each in a process and an interpreter of its own, driven step by step over one pipe.

One JSON object a line, one answer for each: `start` runs prompts through prefill until each has its first token,
`steps` runs decode steps of all sequences, `facts` says what the process is. The driver sends all tokens, so that every
peer gets the same. Whoever is not asked is stopped (SIGSTOP): idle threads that spin would slow the others down.

The adapters beside this file (peer_*.py) implement `Peer`. Standard library alone: they run in foreign environments.
"""

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

Tokens = Sequence[int]
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


class Peer(Protocol):
    """One engine with a loaded model. Methods return when the work is done, not when it was queued."""

    def start(self, prompts: list[list[int]]) -> None:
        """Drop what runs, then run these prompts until each has its first token."""

    def step(self, tokens: list[int]) -> None:
        """One decode step of all sequences, in `start`'s order, each fed its token of `tokens`."""

    def facts(self) -> dict[str, Any]:
        """Versions, sizes and choices worth keeping with a result."""

    def use(self, **options: Any) -> None:
        """Change what can be changed without loading the model again."""


def serve(make: Callable[[dict[str, Any]], Peer]) -> None:
    """An adapter's main: load what the JSON in argv[1] says, then answer commands until the input ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no driver, no peer, even while it is stopped
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with answers
    started = time.perf_counter()
    peer = make(json.loads(sys.argv[1]))
    print(json.dumps({"ready_seconds": time.perf_counter() - started}), file=answers)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(_answer(peer, command.pop("do"), command)), file=answers)
    os._exit(0)  # some engines' threads never end


def _answer(peer: Peer, do: str, command: dict[str, Any]) -> dict[str, Any]:
    if do == "start":
        return {"seconds": _timed(peer.start, command["prompts"])}
    if do == "steps":
        return {"seconds": [_timed(peer.step, tokens) for tokens in command["tokens"]]}
    if do == "use":
        return {"seconds": _timed(lambda: peer.use(**command))}
    return peer.facts() | {"process": memory()}


def _timed(work: Callable[..., None], *args: Any) -> float:
    started = time.perf_counter()
    work(*args)
    return time.perf_counter() - started


def memory() -> dict[str, int]:
    """Bytes of this process in RAM: all, and without pages of files, which the kernel can drop."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[key].split()[0]) * 1024 for name, key in {"rss": "VmRSS", "anonymous": "RssAnon"}.items()}


class PeerProcess:
    """The driver's end: a peer's process, stopped unless it works on a command."""

    def __init__(
        self, name: str, python: Path, adapter: str, options: dict[str, Any], env: dict[str, str] | None = None
    ) -> None:
        self.name = name
        script = Path(__file__).parent / adapter
        self._process = subprocess.Popen(
            [python, script, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | (env or {}),
            start_new_session=True,  # a process group of its own, to be stopped as one
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self, timeout: float = 900) -> float:
        """Wait until it is loaded; returns its own figure of the seconds that took."""
        seconds = self._read(timeout)["ready_seconds"]
        self._signal(signal.SIGSTOP)
        return seconds

    def ask(self, do: str, timeout: float = 600, **fields: Any) -> dict[str, Any]:
        """Send one command and wait for its answer. Raises RuntimeError when the peer fails or is too slow."""
        if self._process.stdin is None:
            raise RuntimeError("a peer without input")
        with suppress(ProcessLookupError):  # it has ended, as the answer will say
            self._signal(signal.SIGCONT)
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do} | fields) + "\n")
            self._process.stdin.flush()
        answer = self._read(timeout)
        self._signal(signal.SIGSTOP)
        return answer

    def _read(self, timeout: float) -> dict[str, Any]:
        """The next answer. An answer is one line, asked for one at a time, so nothing waits in the buffer."""
        if self._process.stdout is None:
            raise RuntimeError("a peer without output")
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            raise RuntimeError(f"{self.name} gave no answer for {timeout:.0f} s; its output is above")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self._process.wait()}; its output is above")
        return json.loads(line)

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid, number)

    def close(self) -> None:
        """Kill it, whatever it is doing; that works on a stopped process too."""
        if self._process.poll() is None:
            self._signal(signal.SIGKILL)
        self._process.wait()


def end_on_signals() -> None:
    """Let SIGTERM and SIGHUP unwind the driver, so that its peers are closed."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
