"""What clients see, and what is left, when an engine dies, hangs or is stopped, and when clients leave.

    python benchmarks/crashes.py --out benchmarks/results/crashes-demo-cpu.json

Every case has a server of its own, with the demo model, and as many streaming clients as `--clients`.
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from load import series, total
from report import machine, write

PATIENCE = 120.0  # seconds for what should take two
STATES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "tol_slots_pinned")


@dataclass
class Server:
    """A running server, its folder for temporary files, and how it was before anything happened to it."""

    process: subprocess.Popen[bytes]
    url: str
    folder: Path
    http: httpx.AsyncClient
    fds: int = 0
    engines: set[int] = field(default_factory=set)

    def engine(self) -> int:
        pid = self.process.pid
        children = {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
        self.engines |= children
        return max(children)

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    async def metrics(self) -> dict[str, float]:
        return series((await self.http.get("/metrics")).text)

    async def status(self, path: str) -> int | None:
        """None when nobody answers."""
        try:
            return (await self.http.get(path, timeout=5)).status_code
        except httpx.TransportError:
            return None


async def until(is_so: Callable[[], Awaitable[bool]]) -> float:
    """Seconds until it is so."""
    began = time.monotonic()
    while not await is_so():
        if time.monotonic() - began > PATIENCE:
            raise TimeoutError("this never happened")
        await asyncio.sleep(0.02)
    return time.monotonic() - began


@contextmanager
def serving(cache: Path, *options: str) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w") as log:
        argv = [sys.executable, "-m", "tolserve", "serve", "--port", str(port), "--cache-dir", str(cache), *options]
        process = subprocess.Popen(argv, env=os.environ | {"TMPDIR": folder}, stderr=log)
        # Without keep-alive, so that the server's open files are its own.
        limits = httpx.Limits(max_keepalive_connections=0)
        server = Server(process, url, Path(folder), httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits))
        try:
            yield server
        finally:
            process.kill()
            process.wait()


async def complete(server: Server, **changes: Any) -> str:
    """One streamed completion, and how it ended for the client."""
    body = {"model": "demo_model", "prompt": "Once upon a time", "stream": True, "ignore_eos": True, "max_tokens": 150}
    try:
        async with server.http.stream("POST", "/v1/completions", json=body | changes) as answer:
            if answer.status_code != 200:
                return f"{answer.status_code} {json.loads(await answer.aread())['error']['code']}"
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    return "finished"
                if line.startswith("data: ") and "error" in (event := json.loads(line[6:])):
                    return f"error event {event['error']['code']}"
    except httpx.TransportError:
        return "connection lost"
    return "the stream ended without a word"


@contextmanager
def clients(server: Server, count: int, **changes: Any) -> Iterator[list[asyncio.Task[str]]]:
    """`count` of them; those that still run leave at the end."""
    tasks = [asyncio.create_task(complete(server, **changes)) for _ in range(count)]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()


async def seen(tasks: list[asyncio.Task[str]]) -> dict[str, int]:
    return dict(Counter(await asyncio.gather(*tasks)))


async def begin(server: Server) -> None:
    """Wait until the server serves, and note how it is when it is idle."""
    await until(lambda: is_status(server, "/ready", 200))
    await complete(server, max_tokens=1)
    server.engine()
    await until(lambda: idle(server))
    await asyncio.sleep(0.5)  # our own connections' ends have to be noticed
    server.fds = server.open_files()


async def is_status(server: Server, path: str, status: int | None) -> bool:
    return await server.status(path) == status


async def at_least(server: Server, name: str, value: float) -> bool:
    return total(await server.metrics(), name) >= value


async def idle(server: Server) -> bool:
    metrics = await server.metrics()
    return not any(total(metrics, name) for name in STATES)


def alive(pid: int) -> bool:
    """Whether it still has anything; one that has ended may stay on the system's list until it is waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


async def leaked(server: Server) -> dict[str, float]:
    """What is there now and should not be."""
    left: dict[str, float] = {"folders": len(list(server.folder.glob("tolserve-*")))}
    if server.process.poll() is not None:
        await asyncio.sleep(0.1)
        return left | {"processes": sum(map(alive, server.engines))}
    await until(lambda: idle(server))
    metrics = await server.metrics()
    current = server.engine()
    left |= {name: total(metrics, name) for name in STATES}
    left["processes"] = sum(alive(pid) for pid in server.engines - {current})
    await asyncio.sleep(0.5)  # our own connections' ends have to be noticed
    return left | {"file descriptors": server.open_files() - server.fds}


async def engine_fault(server: Server, count: int, fault: signal.Signals) -> dict[str, Any]:
    with clients(server, count) as tasks:
        await until(lambda: at_least(server, "num_requests_running", count))
        os.kill(server.engine(), fault)
        unhealthy = await until(lambda: is_status(server, "/health", 503))
        outcome = await seen(tasks)
        refused = await complete(server)
        began = time.monotonic()
        while await complete(server, max_tokens=1) != "finished":
            await asyncio.sleep(0.02)
        again = time.monotonic() - began + unhealthy
    metrics = await server.metrics()
    counted = 'tolserve_engine_restarts_total{reason="%s"}'
    restarts = {reason: metrics[counted % reason] for reason in ("exit", "hang")}
    return {
        "clients saw": outcome,
        "a new request meanwhile": refused,
        "seconds until /health is 503": unhealthy,
        "seconds until a completion works": again,
        "restarts": restarts,
    }


async def stopped(server: Server, count: int, *signals: signal.Signals) -> dict[str, Any]:
    """The signals one after another, half a second apart, while streams run."""
    with clients(server, count) as tasks:
        await until(lambda: at_least(server, "num_requests_running", count))
        began = time.monotonic()
        server.process.send_signal(signals[0])
        report: dict[str, Any] = {}
        if signals[0] == signal.SIGTERM:
            report["seconds until /ready is 503"] = await until(lambda: is_status(server, "/ready", 503))
            report["a new request meanwhile"] = await complete(server)
            report["/health meanwhile"] = await server.status("/health")
        for following in signals[1:]:
            began = time.monotonic()
            server.process.send_signal(following)
        status = await asyncio.to_thread(server.process.wait, PATIENCE)
        report["seconds from the last signal to the end"] = time.monotonic() - began
        report["exit status"] = status
        return {"clients saw": await seen(tasks)} | report


async def left_queue(server: Server, count: int) -> dict[str, Any]:
    with clients(server, 1, max_tokens=1000) as blocker:
        await until(lambda: at_least(server, "num_requests_running", 1))
        with clients(server, count):
            await until(lambda: at_least(server, "num_requests_waiting", count))
        gone = await until(lambda: none_of(server, "num_requests_waiting"))
        still = not blocker[0].done()
    return {"clients saw": {"left": count}, "seconds until aborted": gone, "the one that ran goes on": still}


async def none_of(server: Server, name: str) -> bool:
    return total(await server.metrics(), name) == 0


async def left_prefill(server: Server, count: int) -> dict[str, Any]:
    before = total(await server.metrics(), "prompt_tokens_total")
    with clients(server, count, prompt=[token % 4000 for token in range(1000)], max_tokens=8):
        await until(lambda: at_least(server, "num_requests_running", 1))
        await until(lambda: at_least(server, "num_requests_waiting", count - 1))  # one is read, the others follow it
    gone = await until(lambda: idle(server))
    answered = total(await server.metrics(), "prompt_tokens_total") - before
    return {
        "clients saw": {"left": count},
        "seconds until aborted": gone,
        "prompts read": answered / 1000,
    }


async def left_stream(server: Server, count: int) -> dict[str, Any]:
    before = total(await server.metrics(), "generation_tokens_total")
    with clients(server, count, max_tokens=1000):
        await until(lambda: at_least(server, "generation_tokens_total", before + 10 * count))
    gone = await until(lambda: idle(server))
    tokens = total(await server.metrics(), "generation_tokens_total") - before
    return {
        "clients saw": {"left": count},
        "seconds until aborted": gone,
        "share generated": tokens / count / 1000,
    }


SLOW = ("--max-num-seqs", "1"), ("--max-num-batched-tokens", "8")
CASES: dict[str, tuple[tuple[str, ...], Callable[[Server, int], Awaitable[dict[str, Any]]]]] = {
    "SIGKILL to the engine": ((), lambda server, n: engine_fault(server, n, signal.SIGKILL)),
    "SIGSTOP to the engine": ((), lambda server, n: engine_fault(server, n, signal.SIGSTOP)),
    "SIGTERM": ((), lambda server, n: stopped(server, n, signal.SIGTERM)),
    "SIGTERM, past the deadline": (
        ("--shutdown-timeout", "0.5"),
        lambda server, n: stopped(server, n, signal.SIGTERM),
    ),
    "a second SIGTERM": ((), lambda server, n: stopped(server, n, signal.SIGTERM, signal.SIGTERM)),
    "SIGKILL to the API": ((), lambda server, n: stopped(server, n, signal.SIGKILL)),
    "client gone, queued": (SLOW[0], left_queue),
    "client gone, in prefill": (SLOW[1], left_prefill),
    "client gone, streaming": ((), left_stream),
}


def rounded(value: Any) -> Any:
    return round(value, 2) if isinstance(value, float) else value


async def run(case: str, count: int, cache: Path) -> dict[str, Any]:
    options, act = CASES[case]
    with serving(cache, *options) as server:
        await begin(server)
        report = await act(server, count)
        return {key: rounded(value) for key, value in report.items()} | {"leaked": await leaked(server)}


def table(cases: dict[str, dict[str, Any]]) -> str:
    lines = ["| case | clients saw | then | leaked |", "|---|---|---|---|"]
    for name, report in cases.items():
        rest = {key: value for key, value in report.items() if key not in ("clients saw", "leaked")}
        cells = [", ".join(f"{what}: {n}" for what, n in part.items()) for part in (report["clients saw"], rest)]
        left = ", ".join(f"{value:g} {what}" for what, value in report["leaked"].items() if value) or "nothing"
        lines.append(f"| {name} | {' | '.join(cells)} | {left} |")
    return "\n".join(lines)


async def main(args: argparse.Namespace) -> dict[str, Any]:
    cases = {}
    with tempfile.TemporaryDirectory() as cache:
        for case in CASES:
            cases[case] = await run(case, args.clients, Path(cache))
            print(case, json.dumps(cases[case]), file=sys.stderr)
    return {"clients": args.clients, "cases": cases}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = asyncio.run(main(options))
    write(machine() | result, options.out)
    print(table(result["cases"]))
