"""What a client can see of the table: its own tokens' hits, and the device tier."""

import json
from typing import Any

from e2e.conftest import Running


def stream(server: Running, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a streamed answer."""
    with server.http() as client, client.stream("POST", path, json=body | {"stream": True}) as answer:
        assert answer.status_code == 200
        data = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert data[-1] == "[DONE]"
    return [json.loads(line) for line in data[:-1]]


def test_a_stream_says_which_tokens_were_hits(server: Running) -> None:
    prompt = [3, 4, 3, 5, 250]
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 7, "ignore_eos": True, "tol": {"token_hits": True}}
    chunks = stream(server, "/v1/completions", body | {"stream_options": {"include_usage": True}})
    hits = [hit for chunk in chunks for choice in chunk["choices"] for hit in choice["tol"]["hits"]]
    assert len(hits) == len(prompt) + 7 - 1
    assert hits[0] == hits[2]  # both looked up in the same step
    with server.http() as client:
        whole = client.post("/v1/completions", json=body).json()["choices"][0]["tol"]["hits"]
        assert len(whole) == len(hits)
        assert all(whole[: len(prompt)])
        assert "tol" not in client.post("/v1/completions", json=body | {"tol": None}).json()["choices"][0]
        refused = client.post("/v1/completions", json=body | {"tol": {"beta": 1}})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "tol"


def test_chat_says_which_tokens_were_hits(server: Running) -> None:
    messages = [{"role": "user", "content": "The old house"}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 4, "ignore_eos": True, "tol": {"token_hits": True}}
    chunks = stream(server, "/v1/chat/completions", body | {"stream_options": {"include_usage": True}})
    hits = [hit for chunk in chunks for choice in chunk["choices"] for hit in choice["tol"]["hits"]]
    assert len(hits) == chunks[-1]["usage"]["total_tokens"] - 1


def test_the_cache_shows_its_records_and_the_last_steps_as_pinned(server: Running) -> None:
    with server.http() as client:
        for token in (40, 41, 42):
            client.post("/v1/completions", json={"model": "tiny", "prompt": [token], "max_tokens": 0, "echo": True})
        view = client.get("/v1/tol/cache", params={"limit": 4096}).json()
        states = {token["id"]: token["state"] for token in view["tokens"]}
        assert [states[token] for token in (40, 41, 42)] == ["resident", "resident", "pinned"]
        assert [client.get("/v1/tol/cache", params={"limit": 3}).json()["tokens"]] == [view["tokens"][:3]]
        assert view["used"] <= view["slots"] == server.metric('tolserve_tol_slots{tier="device"}') == 60
        text = next(token["text"] for token in view["tokens"] if token["id"] == 42)
        assert client.post("/tokenize", json={"prompt": text}).json()["tokens"] == [42]
        everything = client.get("/v1/tol/cache", params={"limit": 4096}).json()
        assert len(everything["tokens"]) == everything["used"]
        for limit in ("0", "4097", "-1", "x"):
            refused = client.get("/v1/tol/cache", params={"limit": limit})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "limit")
        assert client.get("/v1/tol/cache", headers={"authorization": ""}).status_code == 401


def test_the_processes_count_themselves(server: Running) -> None:
    with server.http() as client:
        text = client.get("/metrics").text
    for name in ("resident_memory_bytes", "open_fds", "threads"):
        assert text.count(f"# TYPE tolserve_{name} ") == 1
        assert server.metric(f'tolserve_{name}{{process="api"}}') > 0
        assert server.metric(f'tolserve_{name}{{process="engine"}}') > 0
    assert server.metric("tolserve_api_tasks") > 0
    assert server.metric("tolserve_tol_record_bytes") > 0
