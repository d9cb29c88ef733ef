"""A cold prompt from disk: how much of the reading does the computation hide?

    python benchmarks/prefill.py MODEL TEXT.jsonl.gz --tokens 512 --out results/prefill.json

Each repeat assembles a fresh engine, so that the device tier is empty; with direct I/O the page cache plays no part.
Stall is what the forward pass waited for rows, read time the sum over all reads of the prompt's records.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from report import machine, write
from tokenizers import Tokenizer

from tolserve.engine.assemble import assemble, use_threads
from tolserve.engine.config import EngineSettings
from tolserve.engine.engine import Engine
from tolserve.engine.request import Request, SamplingParams
from tolserve.train.data import read_documents


def one(engine: Engine, prompt: tuple[int, ...]) -> dict[str, Any]:
    before = _totals(engine)
    engine.add(Request("cold", prompt, SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)))
    started = time.perf_counter()
    while engine.busy:
        engine.step()
    seconds = time.perf_counter() - started
    spent = {name: value - before[name] for name, value in _totals(engine).items()}
    pager = engine.pager
    return {
        "first_token_ms": 1000 * seconds,
        "stall_ms": 1000 * spent["tol_stall_seconds_total"],
        "read_ms": 1000 * spent["tol_fill_seconds"],
        "reads": spent["tol_fills_total"],
        "most_reads_outstanding": pager.disk.peak_outstanding if pager else 0,
        "io": pager.disk.io if pager else None,
    }


def _totals(engine: Engine) -> dict[str, float]:
    return {m.name.removeprefix("tolserve_"): sum(s.value for s in m.samples) for m in engine.registry.snapshot()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--chunks", type=int, nargs="+", default=[512, 128])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    use_threads()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    document = next(iter(read_documents(args.text)))
    prompt = tuple(tokenizer.encode(document[5000:15000], add_special_tokens=False).ids[: args.tokens])
    report: dict[str, Any] = {
        **machine(),
        "prompt_tokens": len(prompt),
        "distinct_tokens": len(set(prompt)),
    }
    with tempfile.TemporaryDirectory() as cache:
        for chunk in args.chunks:
            runs = []
            for repeat in range(args.repeats + 1):
                settings = EngineSettings(
                    model=str(args.model), cache_dir=cache, device_cache="10%", max_num_batched_tokens=chunk
                )
                engine = assemble(settings)
                if repeat:  # the first only wakes the machine
                    runs.append(one(engine, prompt) | {"warm_first_token_ms": one(engine, prompt)["first_token_ms"]})
                else:
                    one(engine, prompt)
                engine.close()
            numbers = {k: statistics.median(r[k] for r in runs) for k in runs[0] if k != "io"}
            share = statistics.median(r["stall_ms"] / r["read_ms"] for r in runs)
            report[f"chunks of {chunk}"] = {k: round(v, 2) for k, v in numbers.items()} | {
                "io": runs[0]["io"],
                "stall_over_summed_read_time": round(share, 3),
            }
    write(report, args.out)


if __name__ == "__main__":
    main()
