"""Decode speed at a paper shape: memory against base in one engine, paged against fully resident.

    python benchmarks/decode.py --trace trace-llama3.npz --table /fast/disk/table --out results/decode.json

Weights are random; the next tokens are forced from a trace of real text (.npz with `tokens`, `vocab_size`), since
sampling from random weights would visit unreal tokens. Every step goes through the engine's parts: scheduler, pager,
layers, output head, sampler. Variants take turns round by round, so that a slow minute of the machine hits them all;
ratios are medians of per-round ratios. Needs torch, numpy and safetensors alone; `--device cuda` runs the same on a
GPU. The table of random records is written once and kept.
"""

import argparse
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_table import random_table
from report import machine, write

from tolserve.engine.assemble import BLOCK_SIZE, use_threads
from tolserve.engine.blocks import BlockPool
from tolserve.engine.engine import Engine
from tolserve.engine.kv import KVCache
from tolserve.engine.request import Request, SamplingParams
from tolserve.engine.runner import Runner
from tolserve.engine.scheduler import Scheduler
from tolserve.metrics import Metrics
from tolserve.model.config import ModelConfig
from tolserve.model.presets import preset
from tolserve.model.transformer import Transformer
from tolserve.tol.pager import Pager
from tolserve.tol.policy import POLICIES
from tolserve.tol.table import Table

Trace = np.ndarray[Any, np.dtype[np.int64]]


def random_transformer(config: ModelConfig, dtype: torch.dtype, device: str) -> Transformer:
    """Serving form with random weights: one block of normal numbers, repeated and shifted from tensor to tensor."""
    with torch.device("meta"):
        model = Transformer(config, with_memory=False)
    block = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    state = {}
    for index, (name, parameter) in enumerate(model.named_parameters()):
        copies = -(-parameter.numel() // block.numel())
        values = block[: parameter.numel()].repeat(copies)[: parameter.numel()].roll(index).view(parameter.shape)
        state[name] = (torch.ones_like(values) if parameter.ndim == 1 else values).to(device)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


@dataclass
class Variant:
    """An engine under test, its running sequences and where in the trace each of them is."""

    name: str
    engine: Engine
    cursors: dict[str, int]
    slots: int  # of the device tier

    def counters(self) -> dict[str, float]:
        """The table's counters by name, labels summed."""
        return {
            m.name.removeprefix("tolserve_"): sum(s.value for s in m.samples) for m in self.engine.registry.snapshot()
        }

    def step(self, trace: Trace) -> float:
        """One engine step, next tokens forced; returns its seconds."""
        started = time.perf_counter()
        chunks = self.engine.scheduler.schedule()
        self.engine.run(chunks)
        seconds = time.perf_counter() - started
        for chunk in chunks:
            if chunk.sequence.pending == 1:
                self.cursors[chunk.sequence.request_id] += 1
                chunk.sequence.tokens[-1] = int(trace[self.cursors[chunk.sequence.request_id]])
        return seconds

    def start(self, trace: Trace, batch: int, context: int) -> None:
        """Put `batch` sequences of `context` tokens, from places spread over the trace, through prefill."""
        for index in range(batch):
            first = (index * len(trace)) // batch
            prompt = tuple(int(token) for token in trace[first : first + context])
            request = Request(str(index), prompt, SamplingParams(max_tokens=10_000, temperature=0, ignore_eos=True))
            self.cursors[request.request_id] = first + context
            if (failure := self.engine.add(request)) is not None:
                raise RuntimeError(failure.message)
        while any(s.generated == 0 for s in self.engine.scheduler.sequences()):
            self.step(trace)

    def stop(self) -> None:
        for request_id in list(self.cursors):
            self.engine.abort(request_id)
        self.cursors.clear()


def make_variant(name: str, model: Transformer, table: Table | None, slots: int, args: argparse.Namespace) -> Variant:
    config, metrics = model.config, Metrics()
    pager = None
    if table is not None:
        options = {"device": args.device, "policy": args.policy, "metrics": metrics}
        pager = Pager(table, device_slots=slots, host_slots=0, **options)
    longest = max(args.prompt, args.context + args.steps * (args.rounds + 1)) + BLOCK_SIZE
    blocks = max(args.batches) * -(-longest // BLOCK_SIZE)
    dtype = model.model.embed_tokens.weight.dtype
    kv = KVCache(config, blocks=blocks, block_size=BLOCK_SIZE, max_len=longest, dtype=dtype, device=args.device)
    scheduler = Scheduler(
        BlockPool(blocks, BLOCK_SIZE), max_seqs=max(args.batches), max_tokens=512, max_distinct=pager and pager.slots
    )
    engine = Engine(Runner(model, kv, pager), scheduler, metrics, max_model_len=1_000_000, max_queue=10_000)
    return Variant(name, engine, {}, slots)


def warm(variant: Variant, trace: Trace, lookups: int) -> None:
    """Bring a bounded cache to its steady state: frequent records first, then the trace itself, as a decode would."""
    pager = variant.engine.pager
    if pager is None or pager.slots == pager.table.manifest.vocab_size:
        return
    ids, counts = np.unique(trace, return_counts=True)
    pager.preload(ids[np.argsort(-counts, kind="stable")][: pager.slots].tolist())
    for token in trace[:lookups].tolist():
        lease = pager.acquire([token])
        lease.wait()
        pager.release(lease)


def measure(variants: list[Variant], trace: Trace, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    for variant in variants:
        variant.start(trace, batch, args.context)
        variant.step(trace)
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    before = {variant.name: variant.counters() for variant in variants}
    for _ in range(args.rounds):
        for variant in variants:
            steps = [variant.step(trace) for _ in range(args.steps)]
            seconds[variant.name].append(statistics.fmean(steps))
    result: dict[str, Any] = {}
    for variant in variants:
        after = variant.counters()
        spent = {key: after[key] - before[variant.name][key] for key in after}
        times = seconds[variant.name]
        result[variant.name] = {
            "ms_per_step_by_round": [round(1000 * t, 2) for t in times],
            "ms_per_step": round(1000 * statistics.median(times), 2),
            "tokens_per_second": round(batch / statistics.median(times), 2),
            "time_over_base": round(ratio(times, seconds["base"]), 3),
        }
        if lookups := spent.get("tol_lookups_total"):
            stall = spent["tol_stall_seconds_total"]
            result[variant.name] |= {
                "time_over_resident": round(ratio(times, seconds["resident"]), 3),
                "hit_rate": round(spent["tol_hits_total"] / lookups, 4),
                "stall_ms_per_step": round(1000 * stall / (args.rounds * args.steps), 3),
                "stall_share": round(stall / (sum(times) * args.steps), 4),
                "read_bytes_per_step": round(spent["tol_read_bytes_total"] / (args.rounds * args.steps)),
            }
        variant.stop()
    return result


def first_tokens(variant: Variant, trace: Trace, length: int, rounds: int) -> dict[str, Any]:
    """Seconds to the first token of prompts of `length` tokens that the cache does not hold, and again when it does."""
    engine, times = variant.engine, {"cold": [], "warm": []}  # type: dict[str, list[float]]
    if engine.pager is None:
        raise RuntimeError("a model without a table has no cold prompt")
    tokens = np.unique(trace)
    for index in range(rounds):
        first = (index * len(trace)) // rounds
        prompt = tuple(int(token) for token in trace[first : first + length])
        others = [int(token) for token in tokens[: 2 * engine.pager.slots] if token not in set(prompt)]
        engine.pager.resize(device_slots=1)  # forgets all records but one
        engine.pager.resize(device_slots=variant.slots)
        engine.pager.preload(others)
        for kind in times:
            request = Request(f"{kind}{index}", prompt, SamplingParams(max_tokens=1, temperature=0, ignore_eos=True))
            started = time.perf_counter()
            engine.add(request)
            while engine.busy:
                engine.step()
            times[kind].append(time.perf_counter() - started)
    seconds = {kind: [round(value, 3) for value in values] for kind, values in times.items()}
    return {
        "prompt_tokens": length,
        "seconds": seconds,
        "cold_over_warm": round(ratio(times["cold"], times["warm"]), 4),
    }


def ratio(times: list[float], reference: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, reference, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--table", type=Path, required=True, help="folder of the random table, written if absent")
    parser.add_argument("--size", default="1B", choices=("250M", "750M", "1B"))
    parser.add_argument("--vocab", type=int, help="fold token ids onto fewer (a smaller table and head)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8, help="per variant and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-lookups", type=int, default=30_000)
    parser.add_argument(
        "--no-resident", action="store_true", help="leave out the fully resident table (RAM for all of it)"
    )
    parser.add_argument("--policy", default="context", choices=POLICIES)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt whose first token is timed")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    use_threads()
    memory, base = preset(args.size, "memory"), preset(args.size, "base")
    if args.vocab:
        memory, base = replace(memory, vocab_size=args.vocab), replace(base, vocab_size=args.vocab)
    trace: Trace = np.load(args.trace)["tokens"].astype(np.int64) % memory.vocab_size
    table = random_table(
        args.table,
        vocab_size=memory.vocab_size,
        num_layers=memory.num_hidden_layers,
        hidden_size=memory.hidden_size,
    )
    dtype = getattr(torch, args.dtype)
    model = random_transformer(memory, dtype, args.device)
    ffn_bytes = 3 * memory.hidden_size * memory.intermediate_size * memory.num_hidden_layers * 2  # bf16
    slots = ffn_bytes // 4 // table.manifest.record_bytes
    variants = [
        make_variant("base", random_transformer(base, dtype, args.device), None, 0, args),
        make_variant("paged", model, table, slots, args),
    ]
    if not args.no_resident:
        resident = make_variant("resident", model, table, memory.vocab_size, args)
        if resident.engine.pager is not None:
            resident.engine.pager.preload()
        variants.append(resident)
    half = len(trace) // 2
    for variant in variants:
        warm(variant, trace[:half], args.warm_lookups)
    pager = variants[1].engine.pager
    report = machine(args.device)
    report |= {
        "device_cache": {"records": slots, "bytes": slots * table.manifest.record_bytes},
        "page_cache": "bypassed (O_DIRECT)" if pager and pager.disk.io == "direct" else "in use (buffered reads)",
        "first_token": first_tokens(variants[1], trace[half:], args.prompt, 3),
        "batches": {str(batch): measure(variants, trace[half:], batch, args) for batch in args.batches},
    }
    write(report, args.out)


if __name__ == "__main__":
    main()
