"""How exact is serving? Three questions about one model, answered on slices of a text.

    PYTHONPATH=tests python benchmarks/exactness.py MODEL TEXT.jsonl.gz --out results/exactness.json

1. Same composition of steps, other tiers and cache sizes: are greedy tokens and log-probabilities bit-identical?
2. Other compositions (batched, prompts split into chunks): how far do log-probabilities move, does a token change, and
   how close were the two best logits where it did?
3. Against a float64 reference: the served model, and the FFNs run live in float32 and bfloat16.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import machine, write
from tokenizers import Tokenizer

from reference import Reference, weights_of
from tolserve.engine.assemble import assemble, use_threads
from tolserve.engine.config import EngineSettings
from tolserve.engine.engine import Engine
from tolserve.engine.request import Delta, Request, SamplingParams, TokenLogprob
from tolserve.model.checkpoint import load_transformer
from tolserve.model.config import ModelConfig
from tolserve.train.data import read_documents

NEW_TOKENS = 24
LONGEST_PROMPT = 56  # distinct tokens of a prompt must fit 64 slots, so that it runs in one step


def make_prompts(model: Path, text: Path, count: int) -> list[tuple[int, ...]]:
    """Slices of 1 to LONGEST_PROMPT tokens from places spread over the documents."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    rng = np.random.default_rng(0)
    documents = list(read_documents(text))
    prompts = []
    for index in range(count):
        document = documents[index % len(documents)]
        start = int(rng.integers(len(document) - 2000))
        ids = tokenizer.encode(document[start : start + 2000], add_special_tokens=False).ids
        prompts.append(tuple(ids[: int(rng.integers(1, LONGEST_PROMPT + 1))]))
    return prompts


class Answers:
    """A request's greedy tokens, their log-probabilities and the prompt's, collected from deltas."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.scores: list[TokenLogprob] = []
        self.prompt: list[TokenLogprob | None] = []

    def take(self, delta: Delta) -> None:
        self.tokens += delta.tokens
        self.scores += delta.logprobs or []
        self.prompt += delta.prompt_logprobs or []

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Answers) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


def run(engine: Engine, prompts: list[tuple[int, ...]], at_once: int) -> list[Answers]:
    answers: dict[str, Answers] = {str(index): Answers() for index in range(len(prompts))}
    for first in range(0, len(prompts), at_once):
        for index, prompt in enumerate(prompts[first : first + at_once], first):
            sampling = SamplingParams(NEW_TOKENS, temperature=0, ignore_eos=True, logprobs=2, prompt_logprobs=1)
            engine.add(Request(str(index), prompt, sampling))
        while engine.busy:
            for output in engine.step():
                if not isinstance(output, Delta):
                    raise RuntimeError(output.message)
                answers[output.request_id].take(output)
    if engine.pager is not None:
        engine.pager.check()
    engine.close()
    return list(answers.values())


def movement(ours: list[Answers], theirs: list[Answers]) -> dict[str, Any]:
    """How far two runs are apart; after a changed token the texts differ, so only what is before it is compared."""
    moved, changed, gaps = 0.0, 0, []
    for a, b in zip(ours, theirs, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)) if x != y), len(a.tokens))
        pairs = [*zip(a.prompt[1:], b.prompt[1:], strict=True), *zip(a.scores[:same], b.scores[:same], strict=True)]
        moved = max([moved, *(abs(x.logprob - y.logprob) for x, y in pairs if x is not None and y is not None)])
        if same < len(a.tokens):
            changed += 1
            (_, best), (_, second) = a.scores[same].top
            gaps.append(best - second)
    return {
        "largest_logprob_difference": moved,
        "prompts_with_a_changed_token": changed,
        "largest_gap_of_the_two_best_logits_there": max(gaps, default=None),
    }


def against_float64(model: Path, prompts: list[tuple[int, ...]], served: list[Answers]) -> dict[str, Any]:
    config = ModelConfig.load(model)
    reference = Reference(config, weights_of(load_transformer(model, with_memory=True, dtype=torch.float64)))
    live = {d: load_transformer(model, with_memory=True, dtype=d) for d in (torch.float32, torch.bfloat16)}
    worst = {"live_float32": [0.0, 0.0], "live_bfloat16": [0.0, 0.0]}
    worst_served = 0.0
    for prompt, answer in zip(prompts, served, strict=True):
        exact = torch.from_numpy(reference.logits(list(prompt)))
        exact_logprobs = exact.log_softmax(-1)
        for dtype, model_form in live.items():
            with torch.inference_mode():
                logits = model_form(torch.tensor([prompt]))[0].double()
            name = f"live_{str(dtype).removeprefix('torch.')}"
            differences = (
                (logits - exact).abs().max().item(),
                (logits.log_softmax(-1) - exact_logprobs).abs().max().item(),
            )
            worst[name] = [max(pair) for pair in zip(worst[name], differences, strict=True)]
        for position, score in enumerate(answer.prompt[1:]):
            if score is not None:
                worst_served = max(worst_served, abs(score.logprob - exact_logprobs[position, score.token].item()))
    names = ("largest_logit_difference", "largest_logprob_difference")
    return {name: dict(zip(names, pair, strict=True)) for name, pair in worst.items()} | {
        "served_prompt_logprobs": worst_served,
        "largest_logit": exact.abs().max().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--reference-prompts", type=int, default=40)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    use_threads()
    prompts = make_prompts(args.model, args.text, args.prompts)

    with tempfile.TemporaryDirectory() as cache:

        def engine(**changes: Any) -> Engine:
            return assemble(EngineSettings(model=str(args.model), cache_dir=cache, **changes))

        resident = run(engine(device_cache="100%"), prompts, at_once=1)
        sizes = [("10%", "0"), ("64", "0"), ("100%", "20%"), ("10%", "20%"), ("64", "256")]
        identical = {
            f"device {device}, host {host}": sum(
                map(Answers.__eq__, resident, run(engine(device_cache=device, host_cache=host), prompts, at_once=1))
            )
            for device, host in sizes
        }
        moved = {
            "32 at once": movement(resident, run(engine(), prompts, at_once=32)),
            "alone, prompts in chunks of 16": movement(resident, run(engine(max_num_batched_tokens=16), prompts, 1)),
            "32 at once, 64 slots": movement(resident, run(engine(device_cache="64"), prompts, at_once=32)),
        }
    few = slice(0, args.reference_prompts)
    report = {
        **machine(),
        "prompts": len(prompts),
        "tokens_each": NEW_TOKENS,
        "bit_identical_to_fully_resident": identical,
        "other_compositions": moved,
        "float64_reference": against_float64(args.model, prompts[few], resident[few]) | {"prompts": len(prompts[few])},
    }
    write(report, args.out)


if __name__ == "__main__":
    main()
