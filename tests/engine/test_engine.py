"""The engine over real tables: the same answers whatever the tiers, the batch or the interruptions."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.driver import (
    Answer,
    Answers,
    OpenEngine,
    assert_idle,
    collect,
    dense_logprobs,
    finish,
    replay,
    request,
    serve,
    serve_recorded,
    submit,
)
from tiny import tiny_config
from tol.tables import value
from tolserve.engine.engine import Engine
from tolserve.engine.request import Request, TokenLogprob
from tolserve.model.checkpoint import load_transformer
from tolserve.model.config import ModelConfig

VOCAB = 300
# Float32 sums in another order: log-probabilities of the tiny models (up to 16) then differ by up to 3.2e-6 here.
FLOAT32_BOUND = 1e-4
STEP = 16  # tokens per step; as many slots then suffice for any of its steps


def prompt_of(length: int, seed: int) -> list[int]:
    """Random tokens; a third of them from a few frequent ones, so that records repeat."""
    dice = random.Random(seed)
    return [dice.randrange(8) if dice.random() < 0.3 else dice.randrange(VOCAB) for _ in range(length)]


def mixed_requests() -> list[Request]:
    """Greedy and sampled, short and long, scored and not."""
    requests = []
    for index, length in enumerate([1, 3, 40, 17, 9, 33, 2, 60, 5, 25]):
        sampled = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": index} if index % 2 else {}
        scored = {"logprobs": 3, "prompt_logprobs": 2} if index % 3 == 0 else {"logprobs": 0}
        requests.append(request(f"r{index}", prompt_of(length, index), 4 + index, **sampled, **scored))
    return requests


def all_close(scores: list[TokenLogprob | None], others: list[TokenLogprob | None]) -> bool:
    """The same tokens, with log-probabilities within the bound."""
    pairs = list(zip(scores, others, strict=True))
    return all(
        a == b if a is None or b is None else a.token == b.token and abs(a.logprob - b.logprob) < FLOAT32_BOUND
        for a, b in pairs
    )


def assert_same_output(answers: Answers, others: Answers) -> None:
    """Other compositions of steps: equal tokens (no tie is near in these fixed runs), logprobs within the bound."""
    assert answers.keys() == others.keys()
    for name, answer in answers.items():
        other = others[name]
        assert (answer.tokens, answer.finish_reason) == (other.tokens, other.finish_reason), name
        assert all_close([*answer.logprobs], [*other.logprobs]), name
        assert all_close(answer.prompt_logprobs or [], other.prompt_logprobs or []), name


def test_greedy_tokens_are_the_same_with_and_without_logprobs(engine_of: OpenEngine) -> None:
    """Without them a step needs no logits, only the best token of each; bit by bit it is the same one."""
    answers = []
    for asked in (None, 0):
        with engine_of(device_cache="100%") as engine:
            requests = [request(str(index), prompt_of(5 + index, index), 12, logprobs=asked) for index in range(6)]
            answers.append({name: answer.tokens for name, answer in serve(engine, requests).items()})
    assert answers[0] == answers[1]


def test_answers_are_bit_identical_whatever_the_tiers(engine_of: OpenEngine) -> None:
    requests = mixed_requests()
    arrivals = {0: requests[:4], 3: requests[4:8], 11: requests[8:]}
    shape: dict[str, Any] = {"max_num_seqs": 6, "max_num_batched_tokens": STEP}
    with engine_of(device_cache="100%", **shape) as engine:
        answers, steps = serve_recorded(engine, arrivals)
        assert value(engine.registry, "tol_misses_total") == 0
        assert_idle(engine)
    assert max(map(len, steps)) > 3, "the steps are no real batches"
    caches: list[dict[str, Any]] = [
        {"device_cache": str(STEP)},
        {"device_cache": str(STEP), "host_cache": "20"},
        {"device_cache": "10%", "host_cache": "100%"},
        {"device_cache": "37", "tol_io": "buffered"},
        {"device_cache": str(STEP), "host_cache": "20", "tol_policy": "s3fifo"},
        {"device_cache": str(STEP), "host_cache": "20", "tol_policy": "context"},
        {"device_cache": "100%"},
    ]
    for cache in caches:
        with engine_of(**cache, **shape) as engine:
            again = replay(engine, requests, steps)
            assert {name: a.text for name, a in again.items()} == {name: a.text for name, a in answers.items()}, cache
            if cache["device_cache"] != "100%":
                assert value(engine.registry, "tol_evictions_total", "device") > 0
            if "host_cache" in cache:
                assert value(engine.registry, "tol_misses_total", "host") > 0
            assert_idle(engine)


@pytest.fixture(scope="session")
def variants(model_dir_of: Callable[[ModelConfig], Path]) -> dict[str, Path]:
    """All with two query heads per key head."""
    configs = {f"flex{beta}": tiny_config("flex", flex_beta=beta) for beta in (1, 2, 3)}
    configs |= {"memory": tiny_config(), "untied": tiny_config(tie_word_embeddings=False), "base": tiny_config("base")}
    return {name: model_dir_of(config) for name, config in configs.items()}


# Live rows differ from the table's by their rounding to bf16, at most 2^-8 of each value; measured: up to 0.014.
LIVE_BOUND = 0.05


@pytest.mark.parametrize("name", ["base", "memory", "untied", "flex1", "flex2", "flex3"])
def test_serving_agrees_with_the_training_form(engine_of: OpenEngine, variants: dict[str, Path], name: str) -> None:
    model = load_transformer(variants[name], with_memory=True, dtype=torch.float32)
    prompt = prompt_of(37, 1)
    cache = {} if name == "base" else {"device_cache": "20"}
    with engine_of(variants[name], max_num_batched_tokens=STEP, **cache) as engine:
        answer = serve(engine, [request("r", prompt, 12, logprobs=0, prompt_logprobs=0)])["r"]
        assert_idle(engine)
    tokens = prompt + answer.tokens
    scores = [score for score in answer.prompt_logprobs or [] if score is not None] + answer.logprobs
    assert [score.token for score in scores] == tokens[1:]
    served = torch.tensor([score.logprob for score in scores])
    for rounded, bound in ((True, FLOAT32_BOUND), (False, LIVE_BOUND)):
        dense = dense_logprobs(model, tokens, rounded=rounded)[:-1]
        own = dense.gather(-1, torch.tensor(tokens[1:])[:, None]).squeeze(-1)
        assert (served - own).abs().max() < bound
        new = slice(len(prompt) - 1, None)
        assert (dense[new].amax(-1) - own[new]).max() < bound, "a greedy token is not the best one"


@pytest.fixture(scope="module")
def alone(engine_of: OpenEngine) -> Answers:
    """Each request by itself, its prompt in one step."""
    answers: Answers = {}
    with engine_of(device_cache="100%") as engine:
        for each in mixed_requests():
            answers |= serve(engine, [each])
    return answers


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"device_cache": "100%"}, id="batched"),
        pytest.param({"device_cache": "100%", "max_num_batched_tokens": 7}, id="chunked"),
        pytest.param({"device_cache": "5"}, id="split by slots"),
        pytest.param({"device_cache": "1", "max_num_seqs": 3}, id="one slot"),
        pytest.param({"device_cache": "30", "host_cache": "30", "max_num_seqs": 2}, id="queued"),
    ],
)
def test_answers_do_not_depend_on_the_batch(engine_of: OpenEngine, alone: Answers, options: dict[str, Any]) -> None:
    with engine_of(**options) as engine:
        assert_same_output(serve(engine, mixed_requests()), alone)
        assert_idle(engine)


def test_answers_survive_preemption(engine_of: OpenEngine, alone: Answers) -> None:
    # 4,096 B hold 16 tokens of this model: the pool is one sequence of the greatest length and two blocks more.
    with engine_of(device_cache="40", max_model_len=80, kv_cache=f"{7 * 4096}B", max_num_batched_tokens=40) as engine:
        assert_same_output(serve(engine, mixed_requests()), alone)
        assert value(engine.registry, "num_preemptions_total") > 0
        assert_idle(engine)


def test_draws_differ_by_seed_and_choice_and_by_nothing_else(engine_of: OpenEngine) -> None:
    def sampled(name: str, **keys: int) -> Request:
        return request(name, prompt_of(6, 3), 16, temperature=1.5, **keys)

    with engine_of(device_cache="50") as engine:
        answers = serve(engine, [sampled("a", seed=1), sampled("b", seed=1, choice=1), sampled("c", seed=2)])
        again = serve(engine, [sampled("d", seed=2), sampled("e", seed=1)])
    texts = {name: answer.tokens for name, answer in (answers | again).items()}
    assert texts["a"] == texts["e"]
    assert texts["c"] == texts["d"]
    assert len({tuple(text) for text in texts.values()}) == 3


def test_draws_go_by_the_position_in_the_whole_text(engine_of: OpenEngine) -> None:
    """So a request that is sent again with what it had got goes on as if it had never stopped."""
    prompt = prompt_of(6, 3)
    with engine_of(device_cache="50") as engine:
        whole = serve(engine, [request("r", prompt, 16, temperature=1.5, seed=9)])["r"].tokens
        rest = serve(engine, [request("r", prompt + whole[:5], 11, temperature=1.5, seed=9)])["r"].tokens
    assert rest == whole[5:]


Told = list[tuple[str, tuple[int, ...]]]


def told_by(engine: Engine) -> Told:
    """What the policy of the device tier hears from now on: (request id, tokens), no tokens at a sequence's end."""
    assert engine.pager is not None
    told: Told = []
    policy = engine.pager.parts[0].policy
    policy.advance = lambda name, tokens: told.append((name, tuple(tokens)))  # type: ignore[method-assign]
    policy.end = lambda name: told.append((name, ()))  # type: ignore[method-assign]
    return told


def tokens_told(told: Told, name: str) -> list[int]:
    return [token for about, tokens in told if about == name for token in tokens]


def test_the_policy_hears_of_every_sequence_until_it_ends(engine_of: OpenEngine) -> None:
    with engine_of(device_cache="24", max_num_batched_tokens=8) as engine:
        told = told_by(engine)
        submit(engine, [request("whole", prompt_of(20, 1), 4), request("left", prompt_of(20, 2), 30)])
        answers: Answers = {}
        while "whole" not in answers or answers["whole"].finish_reason is None:
            collect(answers, engine.step())
        engine.abort("left")
        engine.abort("left")
    assert tokens_told(told, "whole") == [*prompt_of(20, 1), *answers["whole"].tokens[:-1]]
    assert sorted(name for name, tokens in told if not tokens) == ["left", "whole"]
    assert told[-1] == ("left", ())


def test_the_policy_hears_of_a_preempted_sequences_tokens_once(engine_of: OpenEngine) -> None:
    with engine_of(device_cache="40", max_model_len=80, kv_cache=f"{7 * 4096}B", max_num_batched_tokens=40) as engine:
        told = told_by(engine)
        answers = serve(engine, mixed_requests())
        assert value(engine.registry, "num_preemptions_total") > 0
    for each in mixed_requests():
        ran = [*each.prompt, *answers[each.request_id].tokens[:-1]]
        assert tokens_told(told, each.request_id) == ran


def test_a_request_that_goes_away_takes_all_it_held_with_it(engine_of: OpenEngine) -> None:
    with engine_of(device_cache="24", max_num_seqs=2, max_num_batched_tokens=8) as engine:
        kept = request("kept", prompt_of(10, 5))
        alone = serve(engine, [kept])
        names = ["decoding", "prefilling", "queued"]
        submit(engine, [request("decoding", prompt_of(3, 1), 30), request("prefilling", prompt_of(100, 2), 4)])
        answers: Answers = {}
        while not answers:
            collect(answers, engine.step())
        submit(engine, [request("queued", prompt_of(3, 4)), kept])
        states = [sequence.request_id for sequence in engine.scheduler.sequences()]
        assert sorted(states) == sorted([*names, "kept"])
        assert [s.request_id for s in engine.scheduler.waiting] == ["queued", "kept"]
        for name in names:
            engine.abort(name)
            engine.abort(name)  # a second time is no error
        assert engine.scheduler.pool.free == engine.scheduler.pool.blocks
        assert_same_output(finish(engine), alone)
        assert_idle(engine)
        for name in names:  # between any two steps
            for steps in range(6):
                submit(engine, [request(name, prompt_of(30, steps), 3), request("other", prompt_of(30, 9), 3)])
                for _ in range(steps):
                    engine.step()
                engine.abort(name)
                engine.abort("other")
                assert_idle(engine)


def test_scoring_a_prompt_generates_nothing(engine_of: OpenEngine, alone: Answers) -> None:
    prompt = prompt_of(40, 2)
    with engine_of(device_cache="30", max_num_batched_tokens=STEP) as engine:
        answers = serve(
            engine,
            [request("none", prompt, 0, prompt_logprobs=2, logprobs=1), request("some", prompt, 3, prompt_logprobs=2)],
        )
        one = serve(engine, [request("one", [5], 0, prompt_logprobs=2)])["one"]
    none, some = answers["none"], answers["some"]
    assert (none.tokens, none.logprobs, none.finish_reason) == ([], [], "length")
    assert none.usage is not None
    assert (none.usage.prompt_tokens, none.usage.completion_tokens) == (40, 0)
    assert none.prompt_logprobs is not None
    assert some.prompt_logprobs is not None
    assert none.prompt_logprobs[0] is None
    assert [score.token for score in none.prompt_logprobs[1:] if score is not None] == prompt[1:]
    assert all(len(score.top) == 2 for score in none.prompt_logprobs[1:] if score is not None)
    assert all_close(none.prompt_logprobs, some.prompt_logprobs)
    assert one.prompt_logprobs == [None]


def greedy(engine: Engine, max_tokens: int = 20, **sampling: Any) -> Answer:
    return serve(engine, [request("r", prompt_of(12, 8), max_tokens, **sampling)])["r"]


def test_generation_stops_where_it_was_told_to(engine_of: OpenEngine) -> None:
    with engine_of(device_cache="30") as engine:
        whole = greedy(engine)
        assert (len(whole.tokens), whole.finish_reason) == (20, "length")
        stop = whole.tokens[7]
        first = whole.tokens.index(stop)
        stopped = greedy(engine, stop_token_ids=(299, stop))
        assert (stopped.tokens, stopped.finish_reason) == (whole.tokens[: first + 1], "stop")
        assert stopped.usage is not None
        assert stopped.usage.completion_tokens == first + 1
        last = greedy(engine, max_tokens=first + 1, stop_token_ids=(stop,))
        assert last.finish_reason == "stop", "the last token that was allowed is a stop token"


def test_the_end_of_text_ends_it_unless_ignored(
    engine_of: OpenEngine, model_dir_of: Callable[[ModelConfig], Path]
) -> None:
    model_dir = model_dir_of(tiny_config(tie_word_embeddings=False))
    with engine_of(model_dir, device_cache="30") as engine:
        whole = greedy(engine)
        end = whole.tokens[5]
    config = ModelConfig.load(model_dir)
    ModelConfig(**vars(config) | {"eos_token_id": end}).save(model_dir)
    with engine_of(model_dir, device_cache="30") as engine:
        first = whole.tokens.index(end)
        ended = greedy(engine, ignore_eos=False)
        assert (ended.tokens, ended.finish_reason) == (whole.tokens[: first + 1], "stop")
        assert greedy(engine).tokens == whole.tokens


def test_a_sequence_may_fill_the_context_to_the_last_position(engine_of: OpenEngine) -> None:
    with engine_of(device_cache="100%", max_model_len=48) as engine:
        answer = serve(engine, [request("r", prompt_of(40, 1), 8)])["r"]
        assert (len(answer.tokens), answer.finish_reason) == (8, "length")
        answer = serve(engine, [request("r", prompt_of(48, 1), 0, prompt_logprobs=0)])["r"]
        assert answer.finish_reason == "length"
        assert_idle(engine)


def test_a_requests_own_numbers_add_up_to_the_servers(engine_of: OpenEngine) -> None:
    with engine_of(device_cache="20", host_cache="10", max_num_batched_tokens=STEP) as engine:
        usages = [serve(engine, [each])[each.request_id].usage for each in mixed_requests()]
        assert_idle(engine)

        def total(name: str) -> float:
            return value(engine.registry, name)

        assert total("tol_lookups_total") == total("tol_hits_total") + total("tol_misses_total")
        assert sum(u.lookups for u in usages if u) == total("tol_lookups_total") > 0
        assert sum(u.hits for u in usages if u) == total("tol_hits_total") > 0
        assert sum(u.stall_ms for u in usages if u) == pytest.approx(1000 * total("tol_stall_seconds_total"))
        assert sum(u.prompt_tokens for u in usages if u) == total("prompt_tokens_total")
        assert sum(u.completion_tokens for u in usages if u) == total("generation_tokens_total")
        for each, usage in zip(mixed_requests(), usages, strict=True):
            assert usage is not None
            assert (usage.prompt_tokens, usage.completion_tokens) == (len(each.prompt), each.sampling.max_tokens)
        assert total("request_success_total") == len(usages)


def test_waiting_is_counted_when_it_ends_whatever_comes_of_the_request(engine_of: OpenEngine) -> None:
    def waits(engine: Engine) -> int:
        (metric,) = [m for m in engine.registry.snapshot() if m.name == "tolserve_request_queue_time_seconds"]
        return sum(metric.samples[0].buckets)

    with engine_of(device_cache="20", max_num_seqs=1) as engine:
        submit(engine, [request("first", [1, 2], 20), request("second", [3], 20)])
        engine.step()
        assert waits(engine) == 1
        engine.abort("first")
        engine.step()
        assert waits(engine) == 2
        finish(engine)
        assert waits(engine) == 2


def test_every_token_says_whether_its_record_was_there(engine_of: OpenEngine) -> None:
    prompt = [5, 9, 5, 7]
    with engine_of(device_cache="20") as engine:
        answer = serve(engine, [request("r", prompt, 6, token_hits=True)])["r"]
        seen, expected = set(prompt), [False] * 4  # one step asks for all of the prompt
        for token in answer.tokens[:-1]:
            expected.append(token in seen)
            seen.add(token)
        assert answer.token_hits == expected
        assert answer.usage is not None
        assert answer.usage.hits == sum(expected)
        new = next(token for token in range(VOCAB) if token not in seen)
        mixed = serve(engine, [request("again", [*prompt, new], 1, token_hits=True)])["again"]
        assert mixed.token_hits == [True] * 4 + [False]
        assert serve(engine, [request("unasked", prompt, 2)])["unasked"].token_hits == []


def test_token_hits_cover_every_token_once_under_preemption(engine_of: OpenEngine) -> None:
    asking = [request(f"r{i}", prompt_of(20 + 5 * i, i), 12, token_hits=True) for i in range(6)]
    with engine_of(device_cache="40", max_model_len=80, kv_cache=f"{7 * 4096}B", max_num_batched_tokens=40) as engine:
        answers = serve(engine, asking)
        assert value(engine.registry, "num_preemptions_total") > 0
    for each in asking:
        assert len(answers[each.request_id].token_hits) == len(each.prompt) + 12 - 1


def test_what_cannot_be_served_is_refused_and_harms_nobody(engine_of: OpenEngine) -> None:
    with engine_of(device_cache="20", max_model_len=64, max_queue=2, max_num_seqs=1) as engine:
        good = request("good", prompt_of(9, 1))
        alone = serve(engine, [good])
        submit(engine, [good])
        refused = {
            "no tokens": request("bad", []),
            "is not below 300": request("bad", [1, 300]),
            "not below": request("bad", [1, -1]),
            "65 tokens; 64 fit": request("bad", prompt_of(60, 1), 5),
            "already running": good,
        }
        for words, bad in refused.items():
            failure = engine.add(bad)
            assert failure is not None
            assert (failure.kind, failure.request_id) == ("invalid", bad.request_id)
            assert words in failure.message
        assert engine.add(request("second", prompt_of(4, 2))) is None
        failure = engine.add(request("third", prompt_of(4, 2)))
        assert failure is not None
        assert failure.kind == "busy"
        answers = finish(engine)
        assert answers.keys() == {"good", "second"}
        assert answers["good"].text == alone["good"].text
        assert_idle(engine)
