"""Streaming clients against a running server: errors, speed, and what is left behind.

    tolserve serve --device-cache 10% &
    python benchmarks/load.py --text heldout.jsonl.gz --clients 32 --seconds 60 --out results/load.json

Every client streams one completion after another, sampled, with prompts of random length from the text; some leave in
the middle of a stream. Afterwards the server must be idle: nothing pinned, no KV block held, lookups = hits + misses.
Memory, descriptors, threads and tasks of the server are looked at all the while: over 20 minutes (`--seconds 1200`)
they must stay where the first minutes took them.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from report import machine, write

from tolserve.train.data import read_documents

SAMPLE_SECONDS = 5.0


class Tally:
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: list[float] = []
        self.between: list[float] = []


async def client(number: int, http: httpx.AsyncClient, args: argparse.Namespace, text: str, tally: Tally) -> None:
    rng = random.Random(number)
    deadline = time.monotonic() + args.seconds
    while time.monotonic() < deadline:
        start = rng.randrange(len(text) - 4000)
        body = {
            "model": args.model,
            "prompt": text[start : start + rng.randrange(20, 1500)],
            "max_tokens": rng.randrange(8, 96),
            "seed": rng.randrange(2**31),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            await one(http, body, tally, leave=rng.random() < args.leave)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            tally.counts[f"error: {type(error).__name__}: {error}"] += 1


async def one(http: httpx.AsyncClient, body: dict[str, Any], tally: Tally, leave: bool) -> None:
    asked = last = time.perf_counter()
    chunks, usage = 0, None
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            tally.counts[f"error: status {answer.status_code}"] += 1
            return
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise ValueError(event["error"]["message"])
            now = time.perf_counter()
            (tally.between if chunks else tally.first).append(now - (last if chunks else asked))
            last, chunks, usage = now, chunks + 1, event.get("usage")
            if leave and chunks == 3:
                tally.counts["left"] += 1
                return
    if usage is None:
        raise ValueError("the stream ended without usage")
    tally.counts["finished"] += 1
    tally.counts["tokens"] += usage["completion_tokens"]
    tally.counts["prompt tokens"] += usage["prompt_tokens"]


def series(text: str) -> dict[str, float]:
    """Every series of a Prometheus page by its full name."""
    return {k: float(v) for k, v in (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))}


def total(metrics: dict[str, float], name: str) -> float:
    return sum(value for key, value in metrics.items() if key.split("{")[0] == f"tolserve_{name}")


async def settle(http: httpx.AsyncClient) -> dict[str, float]:
    """The metrics once nothing runs; those of the last look if that never comes."""
    metrics: dict[str, float] = {}
    for _ in range(50):
        metrics = series((await http.get("/metrics")).text)
        if total(metrics, "num_requests_running") + total(metrics, "num_requests_waiting") == 0:
            break
        await asyncio.sleep(0.2)
    return metrics


Samples = list[dict[str, float]]


async def watch(http: httpx.AsyncClient, samples: Samples) -> None:
    """What the server takes, every few seconds, until cancelled."""
    while True:
        metrics = series((await http.get("/metrics")).text)
        held = ("resident_memory_bytes", "open_fds", "threads", "api_tasks")
        samples.append({key: value for key, value in metrics.items() if key.split("{")[0][len("tolserve_") :] in held})
        await asyncio.sleep(SAMPLE_SECONDS)


def steadiness(samples: Samples) -> dict[str, dict[str, Any]]:
    """Per series: at the start, the median of each tenth of the run, and the largest."""

    def facts(key: str) -> dict[str, Any]:
        values = [sample[key] for sample in samples]
        tenths = [values[len(values) * i // 10 : len(values) * (i + 1) // 10] or values for i in range(10)]
        return {"first": values[0], "tenths": [statistics.median(tenth) for tenth in tenths], "max": max(values)}

    return {key.removeprefix("tolserve_"): facts(key) for key in samples[0]}


def percentile(values: list[float], share: float) -> float | None:
    return round(1000 * sorted(values)[int(share * (len(values) - 1))], 1) if values else None


async def main(args: argparse.Namespace) -> dict[str, Any]:
    text = "\n".join(read_documents(args.text))
    tally = Tally()
    limits = httpx.Limits(max_connections=args.clients + 2)
    async with httpx.AsyncClient(base_url=args.url, timeout=120, limits=limits) as http:
        before = await settle(http)
        samples: Samples = []
        watching = asyncio.create_task(watch(http, samples))
        started = time.monotonic()
        await asyncio.gather(*(client(n, http, args, text, tally) for n in range(args.clients)))
        seconds = time.monotonic() - started
        watching.cancel()
        after = await settle(http)
    names = ("tol_lookups_total", "tol_hits_total", "tol_misses_total", "tol_stall_seconds_total")
    lookups, hits, misses, stall = (total(after, n) - total(before, n) for n in names)
    return {
        "clients": args.clients,
        "seconds": round(seconds, 1),
        "outcomes": dict(tally.counts),
        "tokens_per_second": round(tally.counts["tokens"] / seconds, 1),
        "first_token_ms": {"p50": percentile(tally.first, 0.5), "p99": percentile(tally.first, 0.99)},
        "between_chunks_ms": {"p50": percentile(tally.between, 0.5), "p99": percentile(tally.between, 0.99)},
        "lookups": lookups,
        "hits_plus_misses": hits + misses,
        "hit_rate": round(hits / lookups, 4),
        "stall_seconds": round(stall, 3),
        "left_behind": {
            name: total(after, name)
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "tol_slots_pinned")
        },
        "samples": len(samples),
        "steadiness": steadiness(samples),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="demo_model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--leave", type=float, default=0.05, help="share of streams that the client abandons")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    write(machine() | asyncio.run(main(options)), options.out)
