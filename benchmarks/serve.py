"""What HTTP costs: streams through the real server against the same engine driven in a process of its own.

    python benchmarks/model_dir.py /fast/disk/model-1b --size 1B --table /fast/disk/table
    python benchmarks/serve.py /fast/disk/model-1b --out results/serve-1b-cpu.json -- --device-cache 4096

What follows `--` are options of `tolserve serve`, for the server and the bare engine alike. Both do the same work: the
same prompts, greedy, to the same length. They take turns, each idle while the other runs. Clients are raw sockets in a
process of their own, which shares the machine's cores with the server. Rates and gaps count while all streams run: from
the last stream's first token to the first stream's last. Ratios are medians of per-round ratios.
"""

import argparse
import json
import multiprocessing
import os
import random
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from report import become_engine, machine, write

from tolserve.settings import ServeSettings

Times = list[list[float]]  # by stream: when each of its tokens came, seconds
START_SECONDS = 600.0
ANSWERED = b"HTTP/1.1 200 "
TOKEN = b'data: {"id"'  # how a token's event begins


@dataclass
class Work:
    """What both sides are given: a stream for each prompt."""

    prompts: list[tuple[int, ...]]
    tokens: int


def bare_engine(options: dict[str, Any], orders: Connection) -> None:
    """A process with the engine alone."""
    from tolserve.engine.assemble import assemble, use_threads
    from tolserve.engine.config import EngineSettings
    from tolserve.engine.process import warm_up
    from tolserve.engine.request import Delta, Request, SamplingParams

    settings = EngineSettings.from_json(options)
    use_threads(settings.threads)
    engine = assemble(settings)
    warm_up(engine)
    orders.send("ready")
    while (work := orders.recv()) is not None:
        sampling = SamplingParams(work.tokens, temperature=0, ignore_eos=True)
        for index, prompt in enumerate(work.prompts):
            if (failure := engine.add(Request(str(index), prompt, sampling))) is not None:
                raise RuntimeError(failure.message)
        times: Times = [[] for _ in work.prompts]
        while engine.busy:
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                if not isinstance(output, Delta):
                    raise RuntimeError(output.message)
                times[int(output.request_id)] += [now] * len(output.tokens)
        orders.send(times)
    engine.close()


def clients(port: int, orders: Connection) -> None:
    """A process with all the streaming clients."""
    while (work := orders.recv()) is not None:
        streams = [Stream() for _ in work.prompts]
        waiting = selectors.DefaultSelector()
        for received, prompt in zip(streams, work.prompts, strict=True):
            body = {
                "model": "random",
                "prompt": prompt,
                "max_tokens": work.tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
            }
            stream = socket.create_connection(("127.0.0.1", port))
            data = json.dumps(body).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {len(data)}\r\n"
            stream.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + data)
            waiting.register(stream, selectors.EVENT_READ, received)
        while waiting.get_map():
            for key, _ in waiting.select():
                stream = key.fileobj
                if not key.data.take(stream.recv(1 << 16)):
                    waiting.unregister(stream)
                    stream.close()
        orders.send([received.times for received in streams])


@dataclass
class Stream:
    """What came on one connection."""

    times: list[float] = field(default_factory=list)
    head: bytes = b""
    tail: bytes = b""

    def take(self, data: bytes) -> bool:
        """Note the tokens in the next bytes, wherever they were split; False at the end."""
        self.head = (self.head + data)[: len(ANSWERED)]
        if not ANSWERED.startswith(self.head):
            raise RuntimeError(data.decode())
        known = self.tail + data
        self.times += [time.perf_counter()] * known.count(TOKEN)
        self.tail = known[-len(TOKEN) + 1 :]  # too short to hold one that was counted
        return bool(data)


@contextmanager
def server(model: Path, options: list[str], port: int) -> Any:
    """`tolserve serve` as a process, ready."""
    argv = [
        sys.executable,
        "-m",
        "tolserve",
        "serve",
        str(model),
        "--served-model-name",
        "random",
        "--port",
        str(port),
        *options,
    ]
    with tempfile.TemporaryFile() as log, subprocess.Popen(argv, stdout=log, stderr=log) as process:
        try:
            deadline = time.monotonic() + START_SECONDS
            while b" 200 " not in _get(port, "/ready"):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"the server did not start:\n{log.read().decode()[-2000:]}")
                time.sleep(0.1)
            yield process
        finally:
            process.terminate()


def _get(port: int, path: str) -> bytes:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n".encode())
            return connection.recv(1 << 16)
    except OSError:
        return b""


def together(times: Times) -> tuple[float, list[float]]:
    """Tokens per second while all streams ran, and the gaps between a stream's tokens then, seconds."""
    begin, end = max(stream[0] for stream in times), min(stream[-1] for stream in times)
    inside = [[moment for moment in stream if begin <= moment <= end] for stream in times]
    gaps = [b - a for stream in inside for a, b in pairwise(stream)]
    return sum(begin < moment <= end for stream in times for moment in stream) / (end - begin), gaps


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def compare(count: int, sides: dict[str, Connection], pids: dict[str, int], args: argparse.Namespace) -> dict[str, Any]:
    """Rounds of `count` streams on either side, one side after the other, the order turning."""
    rates: dict[str, list[float]] = {side: [] for side in sides}
    gaps: dict[str, list[float]] = {side: [] for side in sides}
    spent = dict.fromkeys(pids, 0.0)
    chunks = 0
    for turn in range(args.rounds):
        rng = random.Random(turn)
        # Ids below 256 are single bytes, which may be half a character and wait for the rest.
        prompts = [tuple(rng.randrange(256, args.vocab) for _ in range(args.prompt)) for _ in range(count)]
        for side in list(sides)[:: 1 if turn % 2 else -1]:
            before = {name: cpu_seconds(pid) for name, pid in pids.items()}
            sides[side].send(Work(prompts, args.tokens))
            times: Times = sides[side].recv()
            rate, between = together(times)
            rates[side].append(rate)
            gaps[side] += between
            if side == "http":
                chunks += sum(map(len, times))
                spent = {name: spent[name] + cpu_seconds(pid) - before[name] for name, pid in pids.items()}
    asked = count * args.tokens * args.rounds
    shares = [http / bare for http, bare in zip(rates["http"], rates["engine"], strict=True)]
    return {
        "http_over_engine": round(statistics.median(shares), 4),
        "by_round": [round(share, 4) for share in shares],
        "chunks_of_tokens": f"{chunks} of {asked}",
        "cpu_us_per_token": {name: round(1e6 * seconds / asked) for name, seconds in spent.items()},
    } | {side: facts(rates[side], gaps[side]) for side in sides}


def facts(rates: list[float], gaps: list[float]) -> dict[str, float]:
    median, p99 = statistics.median(gaps), statistics.quantiles(gaps, n=100)[98]
    return {
        "tokens_per_second": round(statistics.median(rates), 2),
        "between_tokens_ms": round(1000 * median, 2),
        "between_tokens_p99_ms": round(1000 * p99, 2),
        "p99_over_median": round(p99 / median, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, options = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    if args.tokens < 2:
        parser.error("--tokens: a rate needs at least two tokens")
    become_engine()
    args.vocab = json.loads((args.model / "config.json").read_text())["vocab_size"]
    settings = ServeSettings.load([str(args.model), *options], "serve").engine_json()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    (http, clients_end), (engine, engine_end) = spawn.Pipe(), spawn.Pipe()
    sides = {"http": http, "engine": engine}
    helpers = [
        spawn.Process(target=clients, args=(port, clients_end), daemon=True),
        spawn.Process(target=bare_engine, args=(settings, engine_end), daemon=True),
    ]
    for helper, its_end in zip(helpers, (clients_end, engine_end), strict=True):
        helper.start()
        its_end.close()  # so that one that dies ends the wait for it
    engine.recv()
    with server(args.model, options, port) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        pids = {"api": process.pid, "engine": int(children[0]), "clients": helpers[0].pid or 0}
        compare(1, sides, pids, argparse.Namespace(**vars(args) | {"rounds": 1}))  # wakes everything
        results = {str(count): compare(count, sides, pids, args) for count in args.clients}
    for side, helper in zip(sides.values(), helpers, strict=True):
        side.send(None)
        helper.join()
    write(machine() | {"prompt_tokens": args.prompt, "answer_tokens": args.tokens, "clients": results}, args.out)


if __name__ == "__main__":
    main()
