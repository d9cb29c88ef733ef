"""Two replicas behind Ray Serve against one, and what a killed replica costs.

    unshare --net sh -c 'ip link set lo up && python benchmarks/ray_replicas.py --out results/ray-demo-cpu.json'

The configuration is deploy/ray/serve.yaml with the demo model, one thread per engine, and two applications side by
side: "one" with one replica, "two" with two. Closed-loop clients in a process of their own drive one and then the
other, round after round, so that what else the machine does falls on both. Then a replica of "two" gets SIGKILL in the
middle of the load.
"""

import argparse
import asyncio
import copy
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from ray_cluster import Cluster, ray_serve, replicas_here, shipped_config
from report import machine, write

from tolserve.settings import DEMO_MODEL

# Long prompts and short answers keep the engines busy rather than Ray's proxy; short prompts and long streams are what
# people see, and cost the proxy and the API a message per token.
WORKLOADS = {
    "prompts": {"prompt_tokens": 512, "max_tokens": 8, "stream": False},
    "streams": {"prompt_tokens": 16, "max_tokens": 64, "stream": True},
}
VOCABULARY = 8000  # ids below this are words of the demo model


# --- the clients, in a process of their own ---


class Load:
    """Closed-loop clients: each sends its next request when it has its answer."""

    def __init__(self, url: str, workload: str, seconds: float) -> None:
        self.url, self.seconds = url, seconds
        self._shape = WORKLOADS[workload]
        self.tokens = 0
        self.ends: list[float] = []  # time.monotonic() of each whole answer
        self.failures: list[tuple[float, str]] = []

    async def run(self, clients: int) -> dict[str, Any]:
        limits = httpx.Limits(max_connections=clients)
        async with httpx.AsyncClient(base_url=self.url, timeout=120, limits=limits) as http:
            started = time.monotonic()
            until = started + self.seconds
            await asyncio.gather(*(self._client(http, number, until) for number in range(clients)))
        return {
            "seconds": time.monotonic() - started,
            "requests": len(self.ends),
            "tokens": self.tokens,
            "ends": self.ends,
            "failures": self.failures,
        }

    async def _client(self, http: httpx.AsyncClient, number: int, until: float) -> None:
        rng = random.Random(number)
        while time.monotonic() < until:
            prompt = [rng.randrange(1, VOCABULARY) for _ in range(self._shape["prompt_tokens"])]
            body = {"model": "demo", "prompt": prompt, "ignore_eos": True}
            body |= {name: self._shape[name] for name in ("max_tokens", "stream")}
            try:
                await self._ask(http, body)
                self.ends.append(time.monotonic())
            except (httpx.HTTPError, ValueError) as error:
                self.failures.append((time.monotonic(), f"{type(error).__name__}: {error}"[:120]))

    async def _ask(self, http: httpx.AsyncClient, body: dict[str, Any]) -> None:
        last = ""
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                last = line or last
        if answer.status_code != 200:
            raise ValueError(f"status {answer.status_code}")
        if body["stream"] and last != "data: [DONE]":
            raise ValueError(f"the stream ended with {last[:80]}")
        self.tokens += body["max_tokens"] + len(body["prompt"])


def start_load(cluster: Cluster, path: str, workload: str, clients: int, seconds: float) -> subprocess.Popen[str]:
    argv = [sys.executable, __file__, "--load", cluster.url + path, workload, str(clients), str(seconds)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)


def result(load: subprocess.Popen[str]) -> dict[str, Any]:
    text, _ = load.communicate()
    if load.returncode:
        raise RuntimeError(f"the clients ended with status {load.returncode}")
    figures: dict[str, Any] = json.loads(text)
    return figures


# --- the measurements ---


def throughput(cluster: Cluster, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens through the layers per second, by workload and application; medians over the rounds."""
    figures: dict[str, Any] = {}
    for workload, shape in WORKLOADS.items():
        rates: dict[str, list[float]] = {"one": [], "two": []}
        errors = 0
        for number in range(args.rounds):
            for name in ("one", "two") if number % 2 == 0 else ("two", "one"):
                load = result(start_load(cluster, f"/{name}", workload, args.clients, args.seconds))
                rates[name].append(load["tokens"] / load["seconds"])
                errors += len(load["failures"])
        ratios = [two / one for one, two in zip(rates["one"], rates["two"], strict=True)]
        figures[workload] = shape | {
            "tokens_per_second": {name: [round(rate, 1) for rate in values] for name, values in rates.items()},
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
            "failed": errors,
        }
    return figures


def in_flight(cluster: Cluster, path: str) -> dict[str, float]:
    """Requests that each replica's engine runs or queues."""
    names = ("tolserve_num_requests_running", "tolserve_num_requests_waiting")
    running, waiting = (cluster.by_replica(name, path) for name in names)
    return {replica: count + waiting.get(replica, 0) for replica, count in running.items()}


def kill_one(cluster: Cluster, args: argparse.Namespace) -> dict[str, Any]:
    """SIGKILL a replica of "two" (its process, not its engine's) in the middle of the load."""
    old = cluster.wait_for(2, "/two")
    load = start_load(cluster, "/two", "streams", args.clients, args.kill_seconds)
    time.sleep(args.kill_seconds / 4)
    victim, engine = next(iter(replicas_here("two").items()))
    had = in_flight(cluster, "/two")
    killed = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    now = old
    while len(now - old) < 1:
        now = cluster.wait_for(2, "/two")
    whole = time.monotonic()
    figures = result(load)
    (dead,) = old - now
    ends = sorted(figures["ends"])
    after = [end for end in ends if end > killed]
    return {
        "clients": args.clients,
        "running_on_the_replica": had[dead],
        "failed": len(figures["failures"]),
        "failures": Counter(message for _, message in figures["failures"]),
        "last_failure_after_seconds": round(max((at - killed for at, _ in figures["failures"]), default=0), 2),
        "succeeded_before": len(ends) - len(after),
        "succeeded_after": len(after),
        "longest_pause_between_answers_seconds": round(max(b - a for a, b in itertools.pairwise(ends)), 2),
        "seconds_to_two_replicas": round(whole - killed, 1),
        "engine_left_behind": Path(f"/proc/{engine}").exists(),
    }


def config(threads: int) -> dict[str, Any]:
    """The shipped configuration, twice: one replica under /one, two under /two."""
    shipped = shipped_config()
    (template,) = shipped.pop("applications")
    applications = []
    for name, replicas in (("one", 1), ("two", 2)):
        application = copy.deepcopy(template) | {"name": name, "route_prefix": f"/{name}"}
        application["args"] |= {"model": str(DEMO_MODEL), "served-model-name": "demo", "threads": threads}
        (deployment,) = application["deployments"]
        deployment["autoscaling_config"] |= {"min_replicas": replicas, "max_replicas": replicas}
        applications.append(application)
    return shipped | {"applications": applications}


def main(args: argparse.Namespace) -> dict[str, Any]:
    with ray_serve(config(args.threads)) as cluster:
        cluster.wait_for(1, "/one")
        cluster.wait_for(2, "/two")
        for name in ("one", "two"):  # warms the caches
            result(start_load(cluster, f"/{name}", "prompts", args.clients, args.seconds / 2))
        return {
            "threads_per_engine": args.threads,
            "cores": len(os.sched_getaffinity(0)),
            "clients": args.clients,
            "seconds_per_round": args.seconds,
            "throughput": throughput(cluster, args),
            "killed_replica": kill_one(cluster, args),
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--kill-seconds", type=float, default=40)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="of each engine")
    parser.add_argument("--load", nargs=4, metavar=("URL", "WORKLOAD", "CLIENTS", "SECONDS"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.load is not None:
        url, workload, clients, seconds = options.load
        print(json.dumps(asyncio.run(Load(url, workload, float(seconds)).run(int(clients)))))
    else:
        write(machine() | main(options), options.out)
