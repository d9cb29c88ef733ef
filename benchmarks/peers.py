"""Our engine against other engines at the same shape, precision and tokens, in turns.

    python benchmarks/peers.py --trace trace-llama3.npz --tables /fast/disk/tables --files /fast/disk/gguf \\
        --vllm-python V/bin/python --llama-python L/bin/python --transformers-python V/bin/python --out peers.json

The peers run a dense LLaMA; ours runs the MemoryLLM of the same size over a table on disk, with a device cache of a
quarter of the feed-forward weights' bytes. All are loaded once, each in a process of its own (peer.py), and take turns
round by round; whoever waits is stopped. A turn is one untimed step and --steps timed ones, whose mean counts. Ratios
are medians over rounds of peer's time / ours. A peer whose interpreter is not given is left out. The 16-bit peers and
the int8 ones run in two groups, so that 24 GB of RAM hold each. --size small runs everything in a few minutes; its
speeds say nothing.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peer import PeerProcess, end_on_signals
from report import machine, write
from sizes import SIZE_NAMES, quarter_of_ffn

from tolserve.model.config import ModelConfig
from tolserve.study.forced import Text, Trace, read_trace
from tolserve.study.random_model import shape_of
from tolserve.study.random_table import table_of

FIRST_TOKEN_PROMPT = 512
# Values per block of a format's rows: the dense model's width is rounded down to it, in the peer's favour.
ROW_BLOCK = {"F16": 1, "Q8_0": 32, "Q4_K": 256}


def llama_shape(config: ModelConfig, row_block: int = 1) -> dict[str, Any]:
    """A LLaMA's config.json of this base model's shape."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("max_position_embeddings", "rms_norm_eps", "rope_theta")
    return {name: getattr(config, name) for name in names} | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "intermediate_size": config.intermediate_size // row_block * row_block,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def common(args: argparse.Namespace) -> dict[str, Any]:
    """What every adapter is told."""
    names = ("device", "threads", "dtype")
    return {name: getattr(args, name) for name in names} | {
        "sequences": max(batch for batch, _ in args.shapes),
        "longest": max(context for _, context in args.shapes) + args.room,
        "most_tokens": max(batch * (context + args.room) for batch, context in args.shapes),
        "room": args.room,  # for tokens that a sequence of any shape generates
    }


def ours(args: argparse.Namespace, name: str, config: ModelConfig, weights: str, **paging: Any) -> PeerProcess:
    """Our engine in a process; `paging` is the table and the cache's bytes, which `use` can give later, too."""
    options = {"config": asdict(config), "weights": weights, "trace": str(args.trace.absolute())}
    options |= {"warm_lookups": args.warm_lookups} | paging
    return PeerProcess(name, Path(sys.executable), "peer_tolserve.py", common(args) | options)


def llama_cpp(args: argparse.Namespace, kind: str) -> PeerProcess:
    shape = llama_shape(args.config("base"), ROW_BLOCK[kind])
    options = {"shape": shape, "format": kind, "files": str(args.files.absolute())}
    options |= {"gpu_layers": 999 if args.device == "cuda" else 0}
    return PeerProcess(f"llama.cpp {kind}", args.llama_python, "peer_llama.py", common(args) | options)


def vllm(args: argparse.Namespace) -> PeerProcess:
    """With Intel's OpenMP where the environment has it, as vLLM recommends (1 to 6% faster), and threads bound as vLLM
    binds those of its worker process (vllm/utils/ompmultiprocessing.py)."""
    openmp = args.vllm_python.absolute().parents[1] / "lib/libiomp5.so"
    env = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))[: args.threads]]
    if args.device == "cpu" and openmp.exists():
        affinity = f"granularity=fine,explicit,proclist=[{','.join(cores)}]"
        env |= {"LD_PRELOAD": str(openmp), "KMP_AFFINITY": affinity, "KMP_BLOCKTIME": "5", "KMP_TPAUSE": "0"}
    elif args.device == "cpu":
        env["GOMP_CPU_AFFINITY"] = " ".join(cores)
    options = {"shape": llama_shape(args.config("base"))}
    return PeerProcess("vllm", args.vllm_python, "peer_vllm.py", common(args) | options, env)


def transformers(args: argparse.Namespace) -> PeerProcess:
    options = {"shape": llama_shape(args.config("base"))}
    return PeerProcess("transformers", args.transformers_python, "peer_transformers.py", common(args) | options)


def groups(args: argparse.Namespace) -> Iterator[tuple[str, list[Any]]]:
    """(name, how to start each peer); ours comes first. One peer is started at a time: loading wants the machine."""
    memory = args.config("memory")
    paging = {"table": str(args.tables.absolute() / "bf16"), "cache_bytes": quarter_of_ffn(args.config("base"))}
    if "16bit" in args.groups:
        start = [lambda: ours(args, "tolserve", memory, "auto", **paging)]
        start += [lambda: vllm(args)] if args.vllm_python else []
        start += [lambda: llama_cpp(args, "F16")] if args.llama_python else []
        start += [lambda: transformers(args)] if args.transformers_python else []
        yield "16bit", start
    if "int8" in args.groups and args.llama_python:
        yield "int8", [lambda: ours(args, "tolserve", memory, "int8", **paging), lambda: llama_cpp(args, "Q8_0")]


def measure_decode(peers: list[PeerProcess], trace: Trace, batch: int, context: int, args: Any) -> dict[str, Any]:
    """All peers decode the same tokens, in turns."""
    text = Text(trace, batch, context)
    for peer in peers:
        peer.ask("start", prompts=text.prompts)
    times: dict[str, list[float]] = {peer.name: [] for peer in peers}
    for _ in range(args.rounds):
        tokens = text.take(1 + args.steps)
        for peer in peers:
            seconds = peer.ask("steps", tokens=tokens)["seconds"]
            times[peer.name].append(statistics.fmean(seconds[1:]))
    return compared(times)


def measure_first_token(peers: list[PeerProcess], trace: Trace, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds from a prompt to its first token, another prompt in each round."""
    times: dict[str, list[float]] = {peer.name: [] for peer in peers}
    for number in range(args.rounds):
        prompts = Text(trace, 1, FIRST_TOKEN_PROMPT, part=1 + number).prompts
        for peer in peers:
            times[peer.name].append(peer.ask("start", prompts=prompts)["seconds"])
    return compared(times)


def compared(times: dict[str, list[float]]) -> dict[str, Any]:
    own = times["tolserve"]
    return {
        name: {
            "ms": round(1000 * statistics.median(seconds), 2),
            "ms_by_round": [round(1000 * value, 2) for value in seconds],
            "time_over_ours": round(statistics.median(a / b for a, b in zip(seconds, own, strict=True)), 3),
        }
        for name, seconds in times.items()
    }


def measure_group(result: dict[str, Any], start: list[Any], trace: Trace, args: argparse.Namespace) -> None:
    """Fills `result` as it goes: what was measured stays when a peer fails. Facts are asked for twice: who cannot tell
    them fails before anything is measured, and memory is that of the end."""
    result["decode"], result["facts"] = {}, {}
    with ExitStack() as stack:
        peers = []
        for make in start:
            peer = make()
            stack.callback(peer.close)
            tell_ready(peer)
            result["facts"][peer.name] = peer.ask("facts")
            peers.append(peer)
        for batch, context in args.shapes[1:]:
            figures = measure_decode(peers, trace, batch, context, args)
            result["decode"][f"batch {batch}, context {context}"] = figures
            tell(f"batch {batch}, context {context}", figures)
        result["first_token"] = measure_first_token(peers, trace, args)
        tell(f"first token of {FIRST_TOKEN_PROMPT}", result["first_token"])
        result["facts"] = {peer.name: peer.ask("facts") for peer in peers}


def tell_ready(peer: PeerProcess) -> None:
    seconds = peer.wait_ready()
    print(f"{peer.name}: ready after {seconds:.0f} s", file=sys.stderr, flush=True)


def tell(what: str, figures: dict[str, Any]) -> None:
    line = "  ".join(f"{name} {row['ms']:.1f} ms ({row['time_over_ours']:.2f}x)" for name, row in figures.items())
    print(f"{what}: {line}", file=sys.stderr, flush=True)


def shape(text: str) -> tuple[int, int]:
    """BATCHxCONTEXT."""
    batch, context = text.split("x")
    return int(batch), int(context)


def add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--tables", type=Path, required=True, help="folder of random tables, written if absent")
    parser.add_argument("--files", type=Path, help="folder of llama.cpp's files, written if absent")
    parser.add_argument("--size", default="1B", choices=SIZE_NAMES)
    parser.add_argument("--vocab", type=int, help="another vocabulary; the trace's ids are folded onto it")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="timed, per peer and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-lookups", type=int, default=20_000)
    parser.add_argument("--llama-python", type=Path)
    parser.add_argument("--out", type=Path)


def checked(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parser.parse_args()
    if args.llama_python and not args.files:
        parser.error("--llama-python needs --files, a folder for gguf files")
    args.config = lambda variant, weights="auto": shape_of(args.size, variant, args.vocab, weights)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # the peers' processes inherit it
    end_on_signals()
    return args


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser)
    parser.add_argument("--vllm-python", type=Path)
    parser.add_argument("--transformers-python", type=Path)
    parser.add_argument("--groups", nargs="+", default=["16bit", "int8"], choices=("16bit", "int8"))
    parser.add_argument(
        "--shapes", type=shape, nargs="+", default=[(1, 64), (4, 64), (16, 64), (1, 512), (4, 512)], metavar="BxCONTEXT"
    )
    args = checked(parser)
    config = args.config("memory")
    table_of(args.tables, "bf16", config)
    trace = read_trace(args.trace, config.vocab_size)
    args.shapes.insert(0, (1, FIRST_TOKEN_PROMPT))
    args.room = args.rounds * (args.steps + 1) + 1
    report = machine(args.device) | {"device_cache_bytes": quarter_of_ffn(args.config("base")), "groups": {}}
    for name, start in groups(args):
        report["groups"][name] = {}
        try:
            measure_group(report["groups"][name], start, trace[len(trace) // 2 :], args)
        finally:
            write(report, args.out)


if __name__ == "__main__":
    main()
