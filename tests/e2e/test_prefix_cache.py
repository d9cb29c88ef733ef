"""What a client sees of the prefix cache, and of other tenants' use of it: nothing."""

from typing import Any

from e2e.conftest import Running
from e2e.test_memory_view import stream

PROMPT = [(7 * number) % 20 + 1 for number in range(70)]  # few records: the server is shared


def complete(server: Running, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    with server.http() as client:
        answer = client.post("/v1/completions", json=body | fields)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def cached(answer: dict[str, Any]) -> int:
    tokens: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tokens


def test_the_second_request_says_what_it_found(server: Running) -> None:
    queries, hits = (f"tolserve_prefix_cache_{name}_total" for name in ("queries", "hits"))
    before = server.metric(queries), server.metric(hits)
    first, second = complete(server, cache_salt="second"), complete(server, cache_salt="second")
    assert (cached(first), cached(second)) == (0, 64)
    assert first["choices"][0]["text"] == second["choices"][0]["text"]
    assert second["usage"]["prompt_tokens"] == 70
    assert (server.metric(queries) - before[0], server.metric(hits) - before[1]) == (140, 64)


def test_of_several_choices_the_prompt_counts_once(server: Running) -> None:
    complete(server, cache_salt="choices")
    assert cached(complete(server, cache_salt="choices", n=3)) == 64
    assert cached(complete(server, cache_salt="choices", prompt=[PROMPT, PROMPT[:40]], n=2)) == 64 + 32


def test_streamed_usage_says_it_too(server: Running) -> None:
    complete(server, cache_salt="streamed")
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 3, "cache_salt": "streamed"}
    chunks = stream(server, "/v1/completions", body | {"stream_options": {"include_usage": True}})
    assert cached(chunks[-1]) == 64


def test_a_conversation_goes_on_from_its_answer(server: Running) -> None:
    messages = [{"role": "user", "content": "The old house stood at the end of the lane. Who is there?"}]
    body = {"model": "tiny", "max_tokens": 60, "temperature": 0, "ignore_eos": True, "cache_salt": "talk"}
    with server.http() as client:
        first = client.post("/v1/chat/completions", json=body | {"messages": messages}).json()
        messages += [first["choices"][0]["message"], {"role": "user", "content": "And then?"}]
        second = client.post("/v1/chat/completions", json=body | {"messages": messages}).json()
    assert cached(first) == 0
    assert cached(second) >= first["usage"]["prompt_tokens"] // 16 * 16


def test_tenants_do_not_see_each_other(server: Running) -> None:
    complete(server, cache_salt="one")
    assert cached(complete(server, cache_salt="other")) == 0
    complete(server, prompt=[*PROMPT[:50], 250])
    assert cached(complete(server, prompt=[*PROMPT[:50], 251])) == 48
    assert cached(complete(server, cache_salt="third", prompt=[*PROMPT[:50], 251])) == 0


def test_a_scored_prompt_runs_whole(server: Running) -> None:
    complete(server, cache_salt="scored")
    scored = complete(server, cache_salt="scored", echo=True, logprobs=0, max_tokens=1)
    assert cached(scored) == 0
    assert len(scored["choices"][0]["logprobs"]["tokens"]) == 71
