"""Cold prompts arrive while others decode: what do they wait, and what do the decodes?

    python benchmarks/arrivals.py MODEL TEXT.jsonl.gz --label after --out results/arrivals.json

Four sequences decode. Prompts of other texts come in pairs, each pair when the one before has its first tokens, and run
one at a time, so that the second of a pair waits behind the first. The device tier holds 5% of the records, direct I/O
leaves the page cache out. Each run is added to the results under its label: to compare two versions of the server run
the script in turns, with `PYTHONPATH=OTHER/server:OTHER/kernels`. Inter-token times are those of steps while a prompt
is there.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from report import machine, write
from tokenizers import Tokenizer

from tolserve.engine.assemble import assemble, use_threads
from tolserve.engine.config import EngineSettings
from tolserve.engine.engine import Engine
from tolserve.engine.request import Delta, Request, SamplingParams
from tolserve.train.data import read_documents

DECODES = 4


def texts(model: Path, text: Path, length: int) -> list[tuple[int, ...]]:
    """Token ids of passages from all over the documents, `length` each."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    passages = []
    for document in read_documents(text):
        for start in range(20_000, min(len(document), 400_000) - 10_000, 40_000):
            ids = tokenizer.encode(document[start : start + 8 * length], add_special_tokens=False).ids
            passages.append(tuple(ids[:length]))
    np.random.default_rng(0).shuffle(passages)
    return [passage for passage in passages if len(passage) == length]


def add(engine: Engine, name: str, prompt: tuple[int, ...], max_tokens: int) -> None:
    if failure := engine.add(Request(name, prompt, SamplingParams(max_tokens, temperature=0.0, ignore_eos=True))):
        raise RuntimeError(failure.message)


def run(engine: Engine, passages: list[tuple[int, ...]], pairs: int) -> dict[str, Any]:
    for index in range(DECODES):
        add(engine, f"decode{index}", passages.pop()[:64], 900)
    for _ in range(30):
        engine.step()
    steps: list[float] = []
    misses: list[float] = []
    first: dict[str, list[float]] = {"first": [], "second": []}
    before = totals(engine)
    for pair in range(pairs):
        arrived = time.perf_counter()
        for place in first:
            add(engine, f"{place}{pair}", passages.pop(), 1)
        open_ = set(first)
        while open_:
            started, missed = time.perf_counter(), totals(engine)["tol_misses_total"]
            outputs = engine.step()
            ended = time.perf_counter()
            misses.append(totals(engine)["tol_misses_total"] - missed)
            steps.append(1000 * (ended - started))
            for output in outputs:
                place = output.request_id.removesuffix(str(pair))
                if isinstance(output, Delta) and place in open_:
                    first[place].append(1000 * (ended - arrived))
                    open_.remove(place)
    spent = {name: count - before[name] for name, count in totals(engine).items()}
    alone = []
    for _ in range(30):
        started = time.perf_counter()
        engine.step()
        alone.append(1000 * (time.perf_counter() - started))
    for index in range(DECODES):
        engine.abort(f"decode{index}")
    return {
        "first_token_ms": {place: quantiles(times) for place, times in first.items()},
        "inter_token_ms": quantiles(steps),
        "inter_token_ms_without_prompts": quantiles(alone),
        "misses_per_step": quantiles(misses),
        "steps_with_prompts": len(steps),
        "stall_ms_per_step": round(1000 * spent["tol_stall_seconds_total"] / len(steps), 3),
        "stall_ms_per_prompt": round(1000 * spent["tol_stall_seconds_total"] / (2 * pairs), 3),
        "fills_per_prompt": round(spent["tol_fills_total"] / (2 * pairs), 1),
        "hit_rate": round(spent["tol_hits_total"] / spent["tol_lookups_total"], 4),
    }


def quantiles(times: list[float]) -> dict[str, float]:
    return {name: round(float(np.quantile(times, q)), 2) for name, q in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))}


def totals(engine: Engine) -> dict[str, float]:
    return {m.name.removeprefix("tolserve_"): sum(s.value for s in m.samples) for m in engine.registry.snapshot()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--max-fills", type=int, help="instead of the server's own")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--label", required=True)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    use_threads(args.threads)
    with tempfile.TemporaryDirectory() as cache:
        engine = assemble(
            EngineSettings(model=str(args.model), cache_dir=cache, device_cache="5%", max_num_seqs=DECODES + 1)
        )
        if args.max_fills is not None:
            engine.scheduler.max_fills = args.max_fills
        result = run(engine, texts(args.model, args.text, args.tokens), args.pairs)
        engine.close()
    report: dict[str, Any] = machine()
    if args.out is not None and args.out.exists():
        report = json.loads(args.out.read_text())
    runs = report.setdefault("runs", {}).setdefault(args.label, [])
    runs.append(result)
    write(report, args.out)


if __name__ == "__main__":
    main()
