"""Faults that need privileges: a memory limit that is hit, a disk that takes seconds, one that never answers, and one
that is full. What the clients get, what the server does, and what its metrics and its log say.

    python benchmarks/faults.py --out benchmarks/results/faults-demo-cpu.json

Linux, root, cgroup v1 with the controllers memory and blkio, mkfs.ext4 and losetup. What tests/faults covers without
privileges is not repeated. Each case has a server of its own with the demo model, and asserts that its fault happened.
Takes about five minutes, most of them the two until a step counts as hung.
"""

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from crashes import Server, begin, complete, is_status, rounded, seen, serving, until
from load import total
from report import machine, write

MODEL = Path(__file__).parents[1] / "server" / "tolserve" / "demo_model"
MIB = 1 << 20
VOCAB = 8192
HUNG_STEP = 180.0  # seconds; the engine's own limit is 120


class Group:
    """A control group of our own, a child of the one this process is in: its limits and its parent's both hold."""

    def __init__(self, controller: str) -> None:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        found = [line.split(":", 2)[2] for line in lines if controller in line.split(":", 2)[1].split(",")]
        if not found:
            raise SystemExit(f"cgroup v1 with the controller {controller} is not mounted here")
        self._path = Path("/sys/fs/cgroup") / controller / found[0].strip("/") / f"tolserve-faults-{os.getpid()}"
        self._path.mkdir()

    def read(self, name: str) -> str:
        return (self._path / name).read_text()

    def write(self, name: str, value: object) -> None:
        (self._path / name).write_text(str(value))

    def value(self, file: str, key: str) -> int:
        return next(int(line.split()[1]) for line in self.read(file).splitlines() if line.split()[0] == key)

    def remove(self) -> None:
        """Once its processes are gone, which may take a moment after they were killed."""
        deadline = time.monotonic() + 30
        while True:
            try:
                self._path.rmdir()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)


@contextmanager
def grouped(controller: str) -> Iterator[Group]:
    group = Group(controller)
    try:
        yield group
    finally:
        group.remove()


@contextmanager
def mounted(*argv: str, at: Path) -> Iterator[Path]:
    at.mkdir()
    subprocess.run(["mount", *argv, str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


@dataclass(frozen=True)
class Disk:
    """A file system of its own, and its device's number as cgroups want it."""

    path: Path
    device: str


@contextmanager
def loop_disk(folder: Path) -> Iterator[Disk]:
    """ext4 on a loop device: its reads can be throttled without slowing the machine's disk."""
    image = folder / "image"
    with image.open("wb") as file:
        file.truncate(128 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    device = subprocess.run(["losetup", "--find", "--show", str(image)], check=True, capture_output=True, text=True)
    name = device.stdout.strip()
    try:
        with mounted(name, at=folder / "disk") as path:
            number = os.stat(name).st_rdev
            yield Disk(path, f"{os.major(number)}:{os.minor(number)}")
    finally:
        subprocess.run(["losetup", "--detach", name], check=True)


def build(out: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "tolserve", "table", "build", str(MODEL), "--out", str(out)]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def log_line(server: Server, pattern: str) -> str:
    """The message of the first log line that has it."""
    for line in (server.folder / "log").read_text().splitlines():
        if re.search(pattern, line):
            return str(json.loads(line)["message"]) if line.startswith("{") else line
    raise RuntimeError(f"no log line has {pattern!r}")


def tokens(client: int) -> list[int]:
    """A prompt of a thousand tokens that no other client's has."""
    return [(client * 1000 + i) % VOCAB for i in range(1000)]


async def falls_and_recovers(server: Server, work: list[asyncio.Task[str]]) -> dict[str, Any]:
    unhealthy = await until(lambda: is_status(server, "/health", 503))
    outcome = await seen(work)
    began = time.monotonic()
    while await complete(server, max_tokens=1) != "finished":
        await asyncio.sleep(0.05)
    metrics = await server.metrics()
    return {
        "clients saw": outcome,
        "seconds until /health is 503": unhealthy,
        "seconds from there until a completion works": time.monotonic() - began,
        "restarts": metrics['tolserve_engine_restarts_total{reason="exit"}'],
        "failures counted": metrics['tolserve_request_failure_total{kind="dead"}'],
        "log": log_line(server, "killed by SIGKILL"),
    }


async def memory(table: Path, options: list[str], spare: int, changes: dict[str, Any]) -> dict[str, Any]:
    """The limit is set under the running server, so that it meets what the clients make grow and nothing else."""
    with ExitStack() as stack:
        group = stack.enter_context(grouped("memory"))
        server = stack.enter_context(serving(table.parent, "--table", str(table), "--log-format", "json", *options))
        group.write("cgroup.procs", server.process.pid)
        await begin(server)
        await complete(server, prompt=list(range(500)), max_tokens=8)  # what torch allocates once
        resident = group.value("memory.stat", "total_rss")
        group.write("memory.limit_in_bytes", resident + spare)
        work = [asyncio.create_task(complete(server, **changes | {"prompt": tokens(i)})) for i in range(8)]
        report = await falls_and_recovers(server, work)
        kills = group.value("memory.oom_control", "oom_kill")
        if not kills:
            raise RuntimeError("the limit was not hit")
        return report | {"resident before, MiB": resident / MIB, "limit, MiB": (resident + spare) / MIB, "kills": kills}


async def too_small_to_start(table: Path) -> dict[str, Any]:
    with grouped("memory") as group, serving(table.parent, "--table", str(table), "--log-format", "json") as server:
        group.write("memory.limit_in_bytes", 200 * MIB)
        group.write("cgroup.procs", server.process.pid)
        status = await asyncio.to_thread(server.process.wait, 120)
        if not group.value("memory.oom_control", "oom_kill"):
            raise RuntimeError("the limit was not hit")
        return {"exit status": status, "log": log_line(server, "killed by SIGKILL")}


@contextmanager
def slow_server(table: Path, folder: Path) -> Iterator[tuple[Server, Callable[[str, int], None]]]:
    """A server whose table is on a disk that can be throttled: `limit(unit, amount)`, 0 for none."""
    with loop_disk(folder) as disk, grouped("blkio") as group:
        copy = disk.path / "tol"
        subprocess.run(["cp", "-r", str(table), str(copy)], check=True)
        os.sync()

        def limit(unit: str, amount: int) -> None:
            group.write(f"blkio.throttle.read_{unit}_device", f"{disk.device} {amount}")

        with serving(table.parent, "--table", str(copy), "--device-cache", "10%") as server:
            group.write("cgroup.procs", server.process.pid)
            try:
                yield server, limit
            finally:
                limit("bps", 0)  # or its processes could not end
                limit("iops", 0)


async def slow(table: Path, folder: Path) -> dict[str, Any]:
    """Two reads a second: a prompt of six new tokens waits three seconds."""
    with slow_server(table, folder) as (server, limit):
        await begin(server)
        before = await server.metrics()
        limit("iops", 2)
        healths: list[int | None] = []
        waits: list[float] = []
        began = time.monotonic()
        prompts = [[1000 + 10 * i + j for j in range(6)] for i in range(3)]
        work = [asyncio.create_task(complete(server, prompt=prompt, max_tokens=4)) for prompt in prompts]
        await asyncio.sleep(1.0)
        asked = time.monotonic()
        meanwhile = asyncio.create_task(complete(server, max_tokens=1))  # `begin` left its records in the device tier
        meanwhile.add_done_callback(lambda _: waits.append(time.monotonic() - asked))
        while not all(task.done() for task in [*work, meanwhile]):
            healths.append(await server.status("/health"))
            await asyncio.sleep(0.2)
        took = time.monotonic() - began
        limit("iops", 0)
        metrics = await server.metrics()
        again = time.monotonic()
        after = await complete(server, prompt=list(range(2000, 2006)), max_tokens=4)

        def grown(name: str) -> float:
            return total(metrics, name) - total(before, name)

        slow_fills = grown("tol_fill_seconds_count") - (
            metrics['tolserve_tol_fill_seconds_bucket{le="0.3",source="disk"}']
            - before['tolserve_tol_fill_seconds_bucket{le="0.3",source="disk"}']
        )
        if slow_fills < 1:
            raise RuntimeError("no read was slow")
        return {
            "clients saw": await seen(work),
            "seconds until the last was served": took,
            "seconds of a request that needs no read": waits[0],
            "statuses of /health": sorted(set(map(str, healths))),
            "stall, seconds": grown("tol_stall_seconds_total"),
            "reads of over 0.3 s": slow_fills,
            "restarts": total(metrics, "engine_restarts_total"),
            "afterwards": f"{after} in {time.monotonic() - again:.2f} s",
        }


async def endless(table: Path, folder: Path) -> dict[str, Any]:
    """A byte a second: the read of a page ends after an hour."""
    with slow_server(table, folder) as (server, limit):
        await begin(server)
        server.http.timeout = httpx.Timeout(2 * HUNG_STEP)
        limit("bps", 1)
        work = [asyncio.create_task(complete(server, prompt=[3000 + i], max_tokens=4)) for i in range(4)]
        began = time.monotonic()
        while await server.status("/health") == 200:
            if time.monotonic() - began > HUNG_STEP:
                raise TimeoutError("the engine was not found to hang")
            await asyncio.sleep(0.1)
        unhealthy = time.monotonic() - began
        outcome = await seen(work)
        await asyncio.sleep(30)
        meanwhile = await complete(server)
        limit("bps", 0)
        lifted = time.monotonic()
        await until(lambda: is_status(server, "/ready", 200))
        ready = time.monotonic() - lifted
        return {
            "clients saw": outcome,
            "seconds until /health is 503": unhealthy,
            "a new request while the disk still hangs": meanwhile,
            "seconds until ready once it answers again": ready,
            "afterwards": await complete(server, prompt=[3000], max_tokens=4),
            "restarts": (await server.metrics())['tolserve_engine_restarts_total{reason="hang"}'],
            "log": log_line(server, "hung"),
        }


async def full_disk(folder: Path) -> dict[str, Any]:
    """A table of 34 MB into a tmpfs of 16, which then grows."""
    with mounted("-t", "tmpfs", "-o", "size=16m", "none", at=folder / "small") as small:
        first = build(small / "tol")
        there = (small / "tol").exists()
        subprocess.run(["mount", "-o", "remount,size=128m", str(small)], check=True)
        second = build(small / "tol")
    if first.returncode == 0:
        raise RuntimeError("the disk was large enough")
    return {
        "exit status": first.returncode,
        "last line": first.stderr.strip().splitlines()[-1].replace(f"{folder}/", ""),
        "a table is there": there,
        "exit status with room": second.returncode,
    }


CASES: dict[str, Callable[[Path, Path], Awaitable[dict[str, Any]]]] = {
    "memory limit, host cache too large": lambda table, folder: memory(
        table, ["--host-cache", "90%"], 12 * MIB, {"max_tokens": 1}
    ),
    "memory limit, keys and values grow": lambda table, folder: memory(
        table, ["--device-cache", "100%", "--kv-cache", "1GiB"], 40 * MIB, {"max_tokens": 16}
    ),
    "memory limit, too small to start": lambda table, folder: too_small_to_start(table),
    "disk, two reads a second": slow,
    "disk, no answer": endless,
    "build, no room": lambda table, folder: full_disk(folder),
}


async def main(args: argparse.Namespace) -> dict[str, Any]:
    if os.geteuid():
        raise SystemExit("run it as root: it mounts file systems and limits control groups")
    cases = {}
    with tempfile.TemporaryDirectory() as base:
        table = Path(base) / "table" / "tol"
        build(table).check_returncode()
        for name, case in CASES.items():
            if args.case in (None, name):
                with tempfile.TemporaryDirectory() as folder:
                    report = await case(table, Path(folder))
                cases[name] = {key: rounded(value) for key, value in report.items()}
                print(name, json.dumps(cases[name]), file=sys.stderr)
    return {"cases": cases}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="this one alone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    write(machine() | asyncio.run(main(options)), options.out)
