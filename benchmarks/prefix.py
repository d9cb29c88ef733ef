"""Time to the first token of a prompt whose beginning was sent before, through the real server.

    python benchmarks/prefix.py --out results/prefix-demo-cpu.json
    python benchmarks/prefix.py --model /fast/disk/model-1b --out results/prefix-1b-cpu.json -- --device-cache 4096

What follows `--` are options of `tolserve serve`. A round is a tenant with a `cache_salt` of its own: a first prompt,
and then a second one that shares its beginning and ends otherwise. All rounds use the same tokens, so that the records
are there and the first prompt differs from the second by nothing but the keys and values that it finds. The second one
is sent once more under a salt where nothing is known: the answers are compared.
"""

import argparse
import http.client
import json
import random
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from report import machine, write
from serve import server

from tolserve.settings import DEMO_MODEL

ANSWER = 4  # tokens


def ask(port: int, prompt: list[int], salt: str) -> dict[str, Any]:
    """Stream an answer: seconds to its first token, its tokens' log-probabilities by text, what was cached."""
    body = {"model": "random", "prompt": prompt, "max_tokens": ANSWER, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}, "logprobs": 2, "cache_salt": salt}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    started = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(answer.read().decode())
    lines = [answer.readline()]
    first = time.perf_counter() - started
    lines += answer.readlines()
    connection.close()
    events = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    scored = [event["choices"][0]["logprobs"] for event in events if event["choices"]]
    return {
        "seconds": first,
        "tokens": [token for part in scored for token in part["tokens"]],
        "logprobs": [value for part in scored for value in part["token_logprobs"]],
        "best": [sorted(top.values())[-2:] for part in scored for top in part["top_logprobs"]],
        "cached": events[-1]["usage"]["prompt_tokens_details"]["cached_tokens"],
    }


def compare(cached: dict[str, Any], whole: dict[str, Any]) -> dict[str, float]:
    """How far an answer moved, up to where it went another way; `gap` is how close the best two tokens lay there."""
    pairs = list(zip(cached["tokens"], whole["tokens"], strict=True))
    same = next((index for index, (a, b) in enumerate(pairs) if a != b), len(pairs))
    moved = [abs(a - b) for a, b in zip(cached["logprobs"][:same], whole["logprobs"][:same], strict=True)]
    gap = whole["best"][same][1] - whole["best"][same][0] if same < len(pairs) else 0.0
    return {"moved": max(moved, default=0.0), "differs": float(same < len(pairs)), "gap": gap}


def measure(port: int, args: argparse.Namespace) -> dict[str, Any]:
    dice = random.Random(0)
    known = [dice.randrange(256, args.vocab) for _ in range(args.distinct)]
    shared = [dice.choice(known) for _ in range(args.shared)]
    rounds, moves = [], []
    for turn in range(args.rounds + 1):
        own = [[dice.choice(known) for _ in range(args.own)] for _ in range(2)]
        first, second = (ask(port, shared + end, f"tenant {turn}") for end in own)
        whole = ask(port, shared + own[1], f"stranger {turn}")
        if first["cached"] or whole["cached"]:
            raise RuntimeError("a tenant was given what another had computed")
        if turn:  # the first round brings the records
            rounds.append((first, second))
            moves.append(compare(second, whole))
    ratios = [second["seconds"] / first["seconds"] for first, second in rounds]
    return {
        "prompt_tokens": args.shared + args.own,
        "cached_tokens": sorted({second["cached"] for _, second in rounds}),
        "first_ms": round(1000 * statistics.median(first["seconds"] for first, _ in rounds), 2),
        "second_ms": round(1000 * statistics.median(second["seconds"] for _, second in rounds), 2),
        "second_over_first": round(statistics.median(ratios), 4),
        "by_round": [round(ratio, 4) for ratio in ratios],
        "logprobs_moved_by_at_most": max(move["moved"] for move in moves),
        "answers_that_differ": sum(move["differs"] for move in moves),
        "largest_gap_where_they_part": max(move["gap"] for move in moves),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--shared", type=int, default=1000, help="tokens that both prompts begin with")
    parser.add_argument("--own", type=int, default=16, help="tokens that each ends with")
    parser.add_argument("--distinct", type=int, default=400, help="token ids that all prompts are made of")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, options = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    args.vocab = json.loads((args.model / "config.json").read_text())["vocab_size"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with server(args.model, options, port):
        result = measure(port, args)
    write(machine() | {"model": args.model.name, "options": options} | result, args.out)


if __name__ == "__main__":
    main()
