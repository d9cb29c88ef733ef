"""What steering costs a decode step, and that it costs nothing where nobody steers.

    python benchmarks/steering.py --other ../checkout-before --out results/steering.json

Each case is a whole engine of the demo model in a process of its own: of this checkout without steering, twice, so that
it shows by how much two processes of one kind differ; with alpha 1, and with a pack of one row or of all rows of a
layer; and, with --other, of another checkout without steering. They take turns round by round, each for `--steps` steps
of `--batch` sequences, while the others wait; ratios are medians of the rounds' ratios to this checkout without
steering. The table is held in RAM (`--device-cache 100%`), so no disk and no page cache takes part.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
CASES = ("plain", "plain again", "alpha 1", "pack of one row", "pack of a layer")


def work(case: str, packs: str, batch: int, steps: int) -> None:
    """Answer each line of standard input with the milliseconds of a step. Runs in older checkouts too."""
    from tolserve.engine.assemble import assemble, use_threads
    from tolserve.engine.config import EngineSettings
    from tolserve.engine.request import Request, SamplingParams
    from tolserve.settings import DEMO_MODEL

    use_threads(None)
    given: dict[str, Any] = {"model": str(DEMO_MODEL), "device_cache": "100%", "device": "cpu", "max_num_seqs": batch}
    extra: dict[str, Any] = {}
    if case not in ("plain", "plain again", "other"):
        from tolserve.engine.request import Steering

        names = {"pack of one row": ("one",), "pack of a layer": ("layer",)}.get(case, ())
        given, extra = given | {"packs": packs}, {"steering": Steering((1.0,) * 8, names)}
    engine = assemble(EngineSettings(cache_dir=packs, **given))
    sampling = SamplingParams(max_tokens=900, temperature=1.0, ignore_eos=True)
    print("ready", flush=True)
    for turn, _ in enumerate(sys.stdin):
        for index in range(batch):
            engine.add(Request(f"{turn}-{index}", (5, 17, 300 + index), sampling, **extra))
        for _ in range(8):  # prompts, and what the caches of the processor have forgotten
            engine.step()
        begun = time.perf_counter()
        for _ in range(steps):
            engine.step()
        print(1000 * (time.perf_counter() - begun) / steps, flush=True)
        for index in range(batch):
            engine.abort(f"{turn}-{index}")
    engine.close()


def make_packs(folder: Path) -> None:
    from tolserve.cli import main

    for name, tokens in (("one", "300"), ("layer", ",".join(map(str, range(8192))))):
        pack = [
            "pack",
            "--scale",
            "1",
            "--layers",
            "6",
            "--tokens",
            tokens,
            "--out",
            str(folder / f"{name}.safetensors"),
        ]
        if main(pack) != 0:
            raise SystemExit(f"the pack {name} could not be made")


def start(case: str, checkout: Path, packs: Path, args: argparse.Namespace) -> "subprocess.Popen[str]":
    paths = os.pathsep.join(str(checkout / part) for part in ("server", "kernels", "benchmarks"))
    argv = [sys.executable, __file__, "--work", case, "--packs", str(packs)]
    argv += ["--batch", str(args.batch), "--steps", str(args.steps)]
    pipe = subprocess.PIPE
    worker = subprocess.Popen(argv, env=os.environ | {"PYTHONPATH": paths}, stdin=pipe, stdout=pipe, text=True)
    if _pipe(worker.stdout).readline() != "ready\n":
        raise SystemExit(f"{case}: no engine")
    return worker


def _pipe(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise ValueError("the worker has no pipe")
    return pipe


def turn(worker: "subprocess.Popen[str]") -> float:
    _pipe(worker.stdin).write("go\n")
    _pipe(worker.stdin).flush()
    return float(_pipe(worker.stdout).readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--other", type=Path, help="another checkout, with its kernels built")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--packs", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work, args.packs, args.batch, args.steps)
        return
    from report import become_engine, machine, write  # of this checkout; a worker may run another

    become_engine()
    report = machine()
    with TemporaryDirectory() as folder:
        make_packs(Path(folder))
        cases = [*CASES, *(["other"] if args.other else [])]
        workers = {case: start(case, args.other if case == "other" else ROOT, Path(folder), args) for case in cases}
        times: dict[str, list[float]] = {case: [] for case in cases}
        for count in range(args.rounds):
            for case in [*cases[count % len(cases) :], *cases[: count % len(cases)]]:
                times[case].append(turn(workers[case]))
        for worker in workers.values():
            worker.communicate()
    plain = times["plain"]
    report["cases"] = {
        case: {
            "ms_per_step": statistics.median(of),
            "over_plain": statistics.median(a / b for a, b in zip(of, plain, strict=True)),
            "rounds": of,
        }
        for case, of in times.items()
    }
    write(report | {"batch": args.batch, "steps": args.steps}, args.out)


if __name__ == "__main__":
    main()
