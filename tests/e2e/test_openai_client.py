"""The official client against the real process."""

import threading
import time
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from e2e.conftest import CONTEXT, Running

PROMPT = "The old house stood at the end of the lane."
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "extra_body": {"ignore_eos": True}}


def complete(client: OpenAI, **fields: Any) -> Any:
    return client.completions.create(**{"prompt": PROMPT, "max_tokens": 12, **GREEDY, **fields})


def chat(client: OpenAI, **fields: Any) -> Any:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    return client.chat.completions.create(**{"messages": messages, "max_tokens": 12, **GREEDY, **fields})


def test_completion(client: OpenAI) -> None:
    answer = complete(client)
    (choice,) = answer.choices
    assert choice.text
    assert choice.finish_reason == "length"
    assert answer.object == "text_completion"
    assert answer.system_fingerprint.startswith("tol-")
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    tol = answer.usage.tol
    assert 0 <= tol["hits"] <= tol["lookups"]
    assert tol["lookups"] > 12
    assert complete(client).choices[0].text == choice.text


def test_streamed_completion_is_the_whole_one(client: OpenAI) -> None:
    whole = complete(client)
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_wire_of_a_stream(server: Running) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 3, "stream": True}
    with server.http() as client:
        response = client.post("/v1/completions", json=body, headers={"x-request-id": "mine"})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-request-id"] == "mine"
    events = response.text.split("\n\n")
    assert all(event.startswith("data: ") for event in events[:-1])
    assert events[-2:] == ["data: [DONE]", ""]


def test_chat(client: OpenAI) -> None:
    whole = chat(client, logprobs=True, top_logprobs=3)
    (choice,) = whole.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert len(choice.logprobs.content) == whole.usage.completion_tokens == 12
    for entry in choice.logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)  # greedy
    chunks = list(chat(client, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
    assert chunks[-1].choices[0].finish_reason == "length"


def test_chat_fills_the_context_unless_told_otherwise(client: OpenAI) -> None:
    answer = chat(client, max_tokens=None)
    assert answer.usage.total_tokens == CONTEXT


def test_batches_and_choices(client: OpenAI) -> None:
    prompts = [[5, 6, 7, 8], [9, 10], [5, 6, 7, 8]]
    answer = complete(client, prompt=prompts, n=2, temperature=1, seed=3, max_tokens=8)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert answer.usage.prompt_tokens == 10
    assert answer.usage.completion_tokens == 48
    texts = [choice.text for choice in answer.choices]
    assert texts[0] != texts[1]
    assert texts[0:2] == texts[4:6]  # the same prompt, seed and choice


def test_a_seed_repeats_and_no_seed_does_not(client: OpenAI) -> None:
    def text(seed: int | None) -> str:
        return str(complete(client, temperature=1, seed=seed, max_tokens=24).choices[0].text)

    assert text(5) == text(5)
    assert text(-5) == text(-5)
    assert len({text(5), text(6), text(None), text(None)}) == 4


def test_scoring_as_evaluation_harnesses_do(client: OpenAI) -> None:
    """lm-eval's request: token-id prompts, echo, logprobs 1, one new token."""
    prompts = [[5, 6, 7, 8, 9], [20, 21, 22]]
    answer = complete(client, prompt=prompts, echo=True, logprobs=1, max_tokens=1, seed=1234)
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        scores = choice.logprobs
        assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs) == len(prompt) + 1
        assert scores.token_logprobs[0] is None
        assert scores.top_logprobs[0] is None
        for token, logprob, top in list(zip(scores.tokens, scores.token_logprobs, scores.top_logprobs, strict=True))[
            1:
        ]:
            assert top[token] == logprob
            assert logprob <= max(top.values()) <= 0
        assert scores.token_logprobs[-1] == max(scores.top_logprobs[-1].values())


def test_echo_without_new_tokens(client: OpenAI) -> None:
    scored = complete(client, echo=True, logprobs=0, max_tokens=0)
    (choice,) = scored.choices
    assert choice.text == PROMPT
    assert choice.finish_reason == "length"
    assert scored.usage.completion_tokens == 0
    assert len(choice.logprobs.tokens) == scored.usage.prompt_tokens
    longer = complete(client, echo=True, logprobs=0, max_tokens=2)
    assert longer.choices[0].text.startswith(PROMPT)


def test_stop_strings_and_stop_tokens(client: OpenAI) -> None:
    whole = complete(client, max_tokens=24, logprobs=0).choices[0]
    stop = whole.text[len(whole.text) // 2 :][:3]
    before = whole.text[: whole.text.index(stop)]
    stopped = complete(client, max_tokens=24, stop=[stop])
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (before, "stop")
    assert stopped.usage.completion_tokens < 24
    shown = complete(
        client, max_tokens=24, stop=stop, extra_body={"include_stop_str_in_output": True, "ignore_eos": True}
    )
    assert shown.choices[0].text == before + stop
    streamed = list(complete(client, max_tokens=24, stop=[stop], stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == before
    ids = tokens_of(client, complete(client, max_tokens=24))
    stopped = complete(client, max_tokens=24, extra_body={"stop_token_ids": [ids[5]], "ignore_eos": True})
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens == ids.index(ids[5]) + 1


def tokens_of(client: OpenAI, answer: Any) -> list[int]:
    """Token ids of a greedy answer, read off the labels of its logprobs and the vocabulary."""
    scored = complete(client, max_tokens=answer.usage.completion_tokens, logprobs=0).choices[0].logprobs.tokens
    vocabulary: dict[str, int] = {}
    for token in range(300):
        answer = complete(client, prompt=[token], max_tokens=0, echo=True, logprobs=0)
        vocabulary.setdefault(answer.choices[0].logprobs.tokens[0], token)
    return [vocabulary[label] for label in scored]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": CONTEXT}, "max_tokens"),
        ({"prompt": [5] * (CONTEXT + 1)}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"temperature": 3}, "temperature"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"extra_body": {"nonsense": 1}}, "nonsense"),
        ({"extra_body": {"stop_token_ids": [300]}}, "stop_token_ids"),
    ],
)
def test_bad_requests_name_the_field(client: OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        complete(client, **fields)
    assert raised.value.param == param
    assert complete(client, max_tokens=1).usage.completion_tokens == 1


def test_other_errors(server: Running, client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        complete(client, model="other")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        complete(server.openai("wrong"))
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def wait_idle(server: Running) -> None:
    deadline = time.monotonic() + 30
    while server.metric("tolserve_num_requests_running") + server.metric("tolserve_num_requests_waiting"):
        assert time.monotonic() < deadline, "requests still run"
        time.sleep(0.02)


def test_leaving_a_stream_aborts_its_choices(server: Running, client: OpenAI) -> None:
    wait_idle(server)
    before = server.metric("tolserve_generation_tokens_total")
    stream = complete(client, n=16, max_tokens=CONTEXT - 50, stream=True, temperature=1)
    next(iter(stream))
    stream.close()
    wait_idle(server)
    assert server.metric("tolserve_generation_tokens_total") - before < 16 * (CONTEXT - 50)
    assert server.metric("tolserve_kv_cache_usage_perc") == 0
    assert server.metric("tolserve_tol_slots_pinned") == 0


def test_leaving_an_unfinished_answer_aborts_it(server: Running) -> None:
    wait_idle(server)
    before = server.metric("tolserve_generation_tokens_total")
    body = {"model": "tiny", "prompt": PROMPT, "n": 16, "max_tokens": CONTEXT - 50, "ignore_eos": True}
    with server.http() as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json=body, timeout=0.3)
    wait_idle(server)
    assert server.metric("tolserve_generation_tokens_total") - before < 16 * (CONTEXT - 50)


@pytest.mark.parametrize("stream", [False, True])
def test_more_than_the_queue_holds_is_refused(server: Running, client: OpenAI, stream: bool) -> None:
    """16 sequences run, and of 32 more only 20 may wait. A stream is refused before it begins, with a status."""
    busy = complete(client, n=16, max_tokens=CONTEXT - 50, stream=True)
    next(iter(busy))
    with pytest.raises(openai.RateLimitError) as raised:
        complete(client, prompt=[PROMPT] * 2, n=16, stream=stream)
    busy.close()
    assert raised.value.code == "queue_full"
    assert int(raised.value.response.headers["retry-after"]) > 0
    wait_idle(server)


def test_clients_side_by_side(server: Running, client: OpenAI) -> None:
    texts: dict[int, str] = {}

    def run(number: int) -> None:
        chunks = complete(client, prompt=[number + 5] * 20, max_tokens=20, stream=True)
        texts[number] = "".join(chunk.choices[0].text for chunk in chunks)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 8
    wait_idle(server)
    hits, misses = server.metric("tolserve_tol_hits_total"), server.metric("tolserve_tol_misses_total")
    assert server.metric("tolserve_tol_lookups_total") == hits + misses
    assert server.metric("tolserve_tol_slots_pinned") == 0
    assert server.metric("tolserve_kv_cache_usage_perc") == 0
