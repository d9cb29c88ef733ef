"""What a decode step costs the host outside the layers, part by part.

    python benchmarks/profile_step.py --work /tmp/profile --out results/profile-step-cpu.json

The real engine process's loop over a real socket, with the 1B shape's vocabulary, layers and heads and a small hidden
size: the host's work does not depend on it. A receiver in another process decodes what is sent, as the API does. Next
tokens are replaced by random ones of which a given share is in the device tier (`hit rate`). A part's time is its own,
without the parts inside it; the layers, the output head and waiting for the disk are left out of the sum. Medians over
steps, and quartiles of whole steps: on a busy machine those hold other processes' turns; `processor` has the engine
thread's processor time instead, of a run of its own. Greedy tokens are found in the output head's own loop:
`greedy_beside_output_head_ms` is what that adds to it. Sampling with top-p and log-probabilities are timed alone.
"""

import argparse
import cProfile
import multiprocessing
import os
import pstats
import random
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import zmq
from model_dir import write_model
from report import become_engine, machine, write

from tolkernels import linear, linear_argmax, make_weight
from tolserve.engine.assemble import assemble, use_threads
from tolserve.engine.config import EngineSettings
from tolserve.engine.messages import Hello, Progress, Submit, decode_from_engine, encode
from tolserve.engine.process import EngineServer
from tolserve.engine.pulse import Pulse
from tolserve.engine.request import Request, SamplingParams
from tolserve.engine.sampler import choose, logprobs
from tolserve.model.presets import preset

HIDDEN = 128  # the smallest with an even head_dim at the 1B shape's 32 heads
SLOTS = 4096  # bf16 records of a quarter of the FFNs' bytes at the 1B shape
LEFT_OUT = ("layers", "output head", "waiting for rows", "outside")


class Clock:
    """Times functions and what is inside them apart; `step` begins the next step's row."""

    def __init__(self, now: Callable[[], float]) -> None:
        """`now` is the time by which everything is measured, in seconds."""
        self._now = now
        self.rows: list[dict[str, float]] = []
        self._row: defaultdict[str, float] = defaultdict(float)
        self._stack: list[float] = []  # time spent in the parts inside each running one
        self._noted: dict[str, float] = {}
        self.noted: list[dict[str, float]] = []  # what `note` was told in each step
        self._began = 0.0

    def step(self) -> None:
        now = self._now()
        if self._began:
            self._row["loop"] += now - self._began - sum(self._row.values())
            self.rows.append(dict(self._row))
            self.noted.append(dict(self._noted))
        self._row.clear()
        self._began = now

    def note(self, name: str, number: float) -> None:
        self._noted[name] = number

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Replace a function of an object by one that is timed."""
        setattr(owner, name, self.timed(getattr(owner, name), part))

    def timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._stack.append(0.0)
            started = self._now()
            try:
                return function(*args, **kwargs)
            finally:
                spent = self._now() - started
                self._row[part] += spent - self._stack.pop()
                if self._stack:
                    self._stack[-1] += spent

        return run


def watch(server: EngineServer, clock: Clock) -> None:
    """Time every part of a server's loop."""
    engine, pager = server.engine, server.engine.pager
    clock.wrap(engine, "step", "engine")
    clock.wrap(engine.scheduler, "schedule", "schedule")
    clock.wrap(engine, "_acquire", "acquire")
    clock.wrap(engine, "_read_ahead", "read ahead")
    clock.wrap(engine.runner, "run", "prepare tensors")
    clock.wrap(engine.runner.model, "hidden", "layers")
    clock.wrap(engine.runner.model, "logits", "output head")
    clock.wrap(engine.runner.model, "best", "output head")
    clock.wrap(engine, "_advance", "advance and deltas")
    clock.wrap(engine.metrics, "step", "metrics")
    clock.wrap(server, "_receive_all", "receive")
    clock.wrap(server, "_send_outputs", "encode and send")
    if pager is None or engine._sit_out is None:
        raise RuntimeError("a model without a table")
    clock.wrap(engine._sit_out, "choose", "sit out")
    clock.wrap(pager, "release", "release")
    clock.wrap(pager, "bring", "waiting for rows")
    acquire = pager.acquire

    def counted(tokens: list[int]) -> Any:
        lease = acquire(tokens)
        clock.note("lookups", len(lease.tokens))
        clock.note("hits", len(lease.hits))
        return lease

    pager.acquire = counted  # type: ignore[method-assign]


def force(server: EngineServer, clock: Clock, hit_rate: float) -> None:
    """Replace the tokens that a step chose, so that the next step hits as often as asked."""
    engine, pager, rng = server.engine, server.engine.pager, random.Random(0)
    step, vocab_size = engine.step, engine.runner.model.config.vocab_size
    if pager is None:
        raise RuntimeError("a model without a table")
    part = pager.parts[-1]

    def draw() -> int:
        there = rng.random() < hit_rate
        while (token := rng.randrange(vocab_size)) in part.arriving or pager.present(token) is not there:
            pass
        return token

    def replace_tokens(chosen: set[str]) -> None:
        for sequence in engine.scheduler.running:
            if sequence.request_id in chosen:
                sequence.tokens[-1] = draw()

    outside = clock.timed(replace_tokens, "outside")

    def forced() -> Any:
        clock.step()
        outputs = step()
        outside({output.request_id for output in outputs})
        return outputs

    engine.step = forced  # type: ignore[method-assign]


def receive(address: str, batch: int, prompt: int, steps: int, facts: Connection) -> None:
    """The API's end in a process of its own: submit, decode everything, tell what decoding took."""
    socket = zmq.Context().socket(zmq.DEALER)
    socket.connect(address)
    socket.send(encode(Hello()))
    rng = random.Random(1)
    for index in range(batch):
        tokens = tuple(rng.randrange(128_256) for _ in range(prompt))
        sampling = SamplingParams(max_tokens=steps, temperature=0, ignore_eos=True)
        socket.send(encode(Submit(Request(f"{index:036}", tokens, sampling))))
    finished, times, sizes = 0, [], []
    while finished < batch:
        frame = socket.recv()
        started = time.perf_counter()
        message = decode_from_engine(frame)
        if isinstance(message, Progress):
            times.append(time.perf_counter() - started)
            sizes.append(len(frame))
            finished += sum(delta.finish_reason is not None for delta in message.deltas)
    facts.send({"decode_us": 1e6 * statistics.median(times), "frame_bytes": statistics.median(sizes)})


def serve(
    model: Path,
    hit_rate: float,
    args: argparse.Namespace,
    now: Callable[[], float] = time.perf_counter,
    profile: cProfile.Profile | None = None,
) -> dict[str, Any]:
    """Decode `args.steps` steps; the parts' medians in microseconds, or a profile without the parts."""
    settings = EngineSettings(str(model), cache_dir=str(model), device="cpu", device_cache=str(SLOTS))
    clock = Clock(now)
    with tempfile.TemporaryDirectory() as folder:
        engine = assemble(settings)
        address = f"ipc://{folder}/engine"
        context = zmq.Context()
        socket = context.socket(zmq.ROUTER)
        socket.bind(address)
        server = EngineServer(engine, socket, Pulse(f"ipc://{folder}/pulse"))
        if engine.pager is not None:
            engine.pager.preload()
        if profile is None:
            watch(server, clock)
        force(server, clock, hit_rate)
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        task = (address, args.batch, args.prompt, args.steps, theirs)
        receiver = multiprocessing.get_context("spawn").Process(target=receive, args=task)
        receiver.start()
        lifeline, end = os.pipe()
        threading.Thread(target=lambda: (receiver.join(), os.close(end))).start()
        if profile is not None:
            profile.enable()
        server.run(lifeline)
        if profile is not None:
            profile.disable()
        engine.close()
        context.destroy(linger=0)
    if profile is not None:
        return {}
    last = slice(-args.steps // 2, None)
    lookups, hits = (sum(noted[name] for noted in clock.noted[last]) for name in ("lookups", "hits"))
    return parts(clock.rows[last]) | ours.recv() | {"hit_rate": round(hits / lookups, 4)}


def parts(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Median microseconds of each part, and of their sum without what is left out."""
    names = {name for row in rows for name in row}
    medians = {name: round(1e6 * statistics.median(row.get(name, 0.0) for row in rows), 1) for name in sorted(names)}
    host = [sum(spent for name, spent in row.items() if name not in LEFT_OUT) for row in rows]
    return {
        "host_us": {name: value for name, value in medians.items() if name not in LEFT_OUT},
        "left_out_us": {name: medians[name] for name in LEFT_OUT},
        "host_us_sum": round(sum(value for name, value in medians.items() if name not in LEFT_OUT), 1),
        "host_us_of_whole_steps": [round(1e6 * q, 1) for q in statistics.quantiles(host, n=4)],
        "steps": len(rows),
    }


def busiest(profile: cProfile.Profile, steps: int) -> list[dict[str, Any]]:
    """The functions that take most of a step by themselves, under the profiler, which makes short ones look longer."""
    table: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    rows = sorted(table.items(), key=lambda row: -row[1][2])[:30]
    return [
        {
            "function": f"{Path(file).name}:{line} {name}",
            "calls_per_step": round(calls / steps, 2),
            "own_us_per_step": round(1e6 * own / steps, 1),
            "us_per_step": round(1e6 * whole / steps, 1),
        }
        for (file, line, name), (_, calls, own, whole, _) in rows
    ]


def sampling(batch: int, vocab_size: int) -> dict[str, float]:
    """Milliseconds of a step's sampling over logits [batch, V], N(0, 2.5^2): flatter than a trained model's, and so
    slower to draw from."""
    logits = [2.5 * torch.randn(batch, vocab_size, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    ways = {
        "greedy, of logits": SamplingParams(1, temperature=0.0),
        "temperature 1": SamplingParams(1),
        "temperature 0.7": SamplingParams(1, temperature=0.7),
        "top-p 0.95": SamplingParams(1, top_p=0.95),
        "temperature 0.7, top-p 0.9": SamplingParams(1, temperature=0.7, top_p=0.9),
        "top-k 50": SamplingParams(1, top_k=50),
        "min-p 0.05": SamplingParams(1, min_p=0.05),
    }
    positions = list(range(batch))
    result = {
        name: _milliseconds(lambda i, way=way: choose(logits[i % 4], [way] * batch, positions))  # type: ignore[misc]
        for name, way in ways.items()
    }
    tokens = torch.arange(batch)
    return result | {f"{k} logprobs": _milliseconds(lambda i, k=k: logprobs(logits[i % 4], tokens, k)) for k in (0, 5)}  # type: ignore[misc]


def greedy(batch: int, vocab_size: int) -> float:
    """Milliseconds that the best tokens add to the output head; below 0 where it saves more not to write logits."""
    generator = torch.Generator().manual_seed(0)
    weight = make_weight(0.02 * torch.randn(vocab_size, HIDDEN, generator=generator), "bfloat16")
    x = torch.randn(batch, HIDDEN, generator=generator)
    added = [
        _milliseconds(lambda i: linear_argmax(x, weight)) - _milliseconds(lambda i: linear(x, weight)) for _ in "abc"
    ]
    return round(statistics.median(added), 3)


def _milliseconds(run: Callable[[int], Any]) -> float:
    times = []
    for index in range(15):
        started = time.perf_counter()
        run(index)
        times.append(time.perf_counter() - started)
    return round(1e3 * statistics.median(times), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the model directory, written if absent")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--steps", type=int, default=400, help="the second half is measured")
    parser.add_argument("--hit-rates", type=float, nargs="+", default=[1.0, 0.81])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    become_engine()
    use_threads()
    config = replace(preset("1B", "memory"), hidden_size=HIDDEN, intermediate_size=HIDDEN)
    model = write_model(args.work, config)
    report = machine() | {"batch": args.batch, "vocabulary": config.vocab_size, "sampling_ms": {}}
    for hit_rate in args.hit_rates:
        profile = cProfile.Profile()
        name = f"hit rate {hit_rate:g}"
        report[name] = serve(model, hit_rate, args)
        busy = serve(model, hit_rate, args, time.thread_time)
        report[name]["processor"] = {key: busy[key] for key in ("host_us", "host_us_sum")}
        serve(model, hit_rate, args, profile=profile)
        report[name]["busiest"] = busiest(profile, args.steps)
    report["greedy_beside_output_head_ms"] = greedy(args.batch, config.vocab_size)
    report["sampling_ms"] = sampling(args.batch, config.vocab_size)
    write(report, args.out)


if __name__ == "__main__":
    main()
