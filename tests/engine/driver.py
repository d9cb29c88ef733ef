"""Real engines over tiny checkpoints, driven step by step, and the model once more in its dense form."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tol.tables import value
from tolserve.engine.assemble import assemble
from tolserve.engine.config import EngineSettings
from tolserve.engine.engine import Engine, Output
from tolserve.engine.request import Failure, FinishReason, Request, SamplingParams, TokenLogprob, Usage
from tolserve.engine.sequence import Chunk
from tolserve.model.blocks import rotary_tables
from tolserve.model.transformer import Transformer, causal_attention, no_rows

OpenEngine = Callable[..., contextlib.AbstractContextManager[Engine]]
Composition = list[tuple[str, int, int]]  # one step: (request id, start, count) of each chunk


@dataclass
class Answer:
    """All that came back for one request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    token_hits: list[bool | None] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    failure: Failure | None = None

    @property
    def text(self) -> tuple[list[int], list[TokenLogprob], list[TokenLogprob | None] | None, FinishReason | None]:
        """What must not depend on tiers: everything but usage."""
        return self.tokens, self.logprobs, self.prompt_logprobs, self.finish_reason


Answers = dict[str, Answer]


def collect(answers: Answers, outputs: Iterable[Output]) -> None:
    for output in outputs:
        answer = answers.setdefault(output.request_id, Answer())
        assert answer.finish_reason is None, "more came after the end"
        assert answer.failure is None, "more came after a failure"
        if isinstance(output, Failure):
            answer.failure = output
            continue
        answer.tokens += output.tokens
        answer.logprobs += output.logprobs or []
        answer.token_hits += output.token_hits or []
        if output.prompt_logprobs is not None:
            assert answer.prompt_logprobs is None, "the prompt was scored twice"
            answer.prompt_logprobs = output.prompt_logprobs
        answer.finish_reason, answer.usage = output.finish_reason, output.usage


def request(name: str, prompt: Iterable[int], max_tokens: int = 8, **sampling: Any) -> Request:
    """Greedy and deaf to the end of text unless told otherwise."""
    options = {"temperature": 0.0, "ignore_eos": True} | sampling
    return Request(name, tuple(prompt), SamplingParams(max_tokens=max_tokens, **options))


def submit(engine: Engine, requests: Iterable[Request]) -> None:
    for each in requests:
        assert engine.add(each) is None


def finish(engine: Engine, answers: Answers | None = None) -> Answers:
    """Step until nobody is left."""
    answers = {} if answers is None else answers
    for _ in range(5000):
        if not engine.busy:
            return answers
        collect(answers, engine.step())
    pytest.fail("the engine does not come to an end")


def serve(engine: Engine, requests: Iterable[Request]) -> Answers:
    submit(engine, requests)
    return finish(engine)


def serve_recorded(engine: Engine, arrivals: Mapping[int, list[Request]]) -> tuple[Answers, list[Composition]]:
    """Serve requests that arrive before the given steps, and note what each step was made of."""
    answers: Answers = {}
    steps: list[Composition] = []
    while engine.busy or len(steps) <= max(arrivals):
        submit(engine, arrivals.get(len(steps), []))
        chunks = engine.scheduler.schedule()
        steps.append([(chunk.sequence.request_id, chunk.start, chunk.count) for chunk in chunks])
        collect(answers, engine.run(chunks))
    return answers, steps


def replay(engine: Engine, requests: Iterable[Request], steps: Iterable[Composition]) -> Answers:
    """Run the same steps once more, whatever the engine's own scheduler would have chosen."""
    answers: Answers = {}
    submit(engine, requests)
    scheduler = engine.scheduler
    sequence_of = {sequence.request_id: sequence for sequence in scheduler.sequences()}
    scheduler.running, scheduler.waiting = list(scheduler.waiting), type(scheduler.waiting)()
    for step in steps:
        chunks = [Chunk(sequence_of[name], start, count) for name, start, count in step]
        for chunk in chunks:
            assert chunk.sequence.computed == chunk.start
            assert scheduler.pool.grow(chunk.sequence.blocks, chunk.end)
        collect(answers, engine.run(chunks))
    assert not engine.busy
    return answers


def assert_idle(engine: Engine) -> None:
    """Nothing is held any more: no sequence, no KV block, no pin."""
    assert not engine.busy
    assert not list(engine.scheduler.sequences())
    assert engine.scheduler.pool.free == engine.scheduler.pool.blocks
    engine.scheduler.pool.check()
    if engine.pager is not None:
        engine.pager.preload([])  # waits for what is on its way
        engine.pager.check()
        assert value(engine.registry, "tol_slots_pinned") == 0


@contextlib.contextmanager
def open_engine(model_dir: Path, cache_dir: Path, **options: Any) -> Iterator[Engine]:
    """An engine on the CPU in float32; `options` as in EngineSettings. Ends with nothing held if the test did."""
    engine = assemble(EngineSettings(model=str(model_dir), cache_dir=str(cache_dir), device="cpu", **options))
    try:
        yield engine
    finally:
        engine.close()


def dense_logprobs(model: Transformer, tokens: list[int], *, rounded: bool) -> Tensor:
    """Log-probabilities float32 [S, V] after each token, by the training form over the whole sequence at once.

    `rounded` rounds the live rows to bf16, as a table does.
    """
    ids = torch.tensor(tokens)[None]
    cos, sin = rotary_tables(model.config, len(tokens), ids.device)
    embedding = model.model.embed_tokens(ids)

    def add_row(layer: int, x: Tensor) -> Tensor:
        row = model.model.layers[layer].memory_row(embedding)
        return x + (row.to(torch.bfloat16).float() if rounded else row)

    rows = add_row if model.config.has_memory else no_rows
    hidden = model.hidden(ids, causal_attention(cos, sin), rows)
    return model.logits(hidden).log_softmax(-1)[0]
