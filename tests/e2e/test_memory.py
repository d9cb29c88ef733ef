"""A look into the memory of a served model, and what moved the logits of a prompt, over HTTP."""

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from e2e.conftest import Running
from e2e.test_lifecycle import engine_of, eventually
from tiny import tiny_config
from tolserve.model.config import ModelConfig
from tolserve.settings import DEMO_MODEL

Start = Callable[..., Running]


def look(client: httpx.Client, token: int | str, **params: Any) -> Any:
    answer = client.get(f"/v1/memory/tokens/{token}", params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_token_may_be_given_by_id_and_by_text(server: Running) -> None:
    with server.http() as client:
        by_id = look(client, 270, top=3)
        text = by_id["token"]["text"]
        assert by_id["token"]["id"] == 270
        assert len(text) > 1
        assert look(client, text.replace(" ", "%20"), top=3)["layers"][0]["promotes"] == by_id["layers"][0]["promotes"]
        digit = client.post("/tokenize", json={"prompt": "7"}).json()["tokens"][0]
        assert look(client, "7")["token"]["id"] == 7
        assert look(client, "7", text=True)["token"] == {"id": digit, "text": "7"}
        assert look(client, "%2F", text=True)["token"]["text"] == "/"
        assert [row["layer"] for row in look(client, 5, layers="1")["layers"]] == [1]
        refused = client.get("/v1/memory/tokens/5", params={"layers": "0,2"})
        assert (refused.status_code, "layer 2 does not exist" in refused.text) == (400, True)


def test_a_look_says_where_the_record_lies_and_counts_no_lookup(server: Running) -> None:
    def counted() -> list[float]:
        return [server.metric(f"tolserve_tol_{name}_total") for name in ("lookups", "fills", "evictions")]

    with server.http() as client:
        client.post("/v1/completions", json={"model": "tiny", "prompt": [101], "max_tokens": 0, "echo": True})
        looks = server.metric('tolserve_memory_looks_total{kind="token"}')
        held = {token["id"] for token in client.get("/v1/tol/cache", params={"limit": 4096}).json()["tokens"]}
        before = counted()
        assert look(client, 101)["tier"] == "device"
        view = look(client, min(set(range(300)) - held), top=50)
        assert view["tier"] == "disk"
        assert view["compared"] == len(held)
        assert {near["id"] for near in view["layers"][0]["nearest"]} <= held
        assert counted() == before
        assert server.metric('tolserve_memory_looks_total{kind="token"}') == looks + 2
        for path in ("/v1/memory/tokens/5", "/v1/memory/tokens/the"):
            assert client.get(path, headers={"authorization": ""}).status_code == 401


def attribution_of(client: httpx.Client, **body: Any) -> Any:
    answer = client.post("/v1/memory/attribution", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def assert_adds_up(positions: list[dict[str, Any]]) -> None:
    for each in positions:
        layers = [value for part in ("attention", "memory", "compute") for value in each[part] or []]
        assert each["embedding"] + sum(layers) == pytest.approx(each["logit"], abs=1e-3)


@pytest.mark.parametrize("variant", ["memory", "base", "flex"])
def test_an_attribution_adds_up(
    server: Running, start_server: Start, model_dir_of: Callable[[ModelConfig], Path], variant: Any
) -> None:
    if variant != "memory":
        server = start_server(model=model_dir_of(tiny_config(variant))).wait_ready()
    prompt = "The old house stood at the end"
    with server.http() as client:
        found = attribution_of(client, model="tiny", prompt=prompt, against="7")
        ids = client.post("/tokenize", json={"prompt": prompt}).json()["tokens"]
        positions = found["positions"]
        assert [each["token"]["id"] for each in positions] == ids
        assert [each["target"]["id"] for each in positions[:-1]] == ids[1:]
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 1}
        best = client.post("/v1/completions", json=body | {"ignore_eos": True}).json()["choices"][0]["logprobs"]
        assert positions[-1]["target"]["text"] == best["tokens"][0]
        assert found["against"]["text"] == "7"
        assert_adds_up(positions)
        assert (positions[0]["memory"] is None) == (variant == "base")
        assert (positions[0]["compute"] is None) == (variant == "memory")
        assert all(len(each["attention"]) == 2 for each in positions)
        if variant == "base":
            refused = client.get("/v1/memory/tokens/5")
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "no_table")


def test_the_demo_models_attribution_adds_up(start_server: Start) -> None:
    running = start_server(model=DEMO_MODEL).wait_ready()
    with running.http() as client:
        prompt = "It was a cold evening, and the old man said nothing."
        for against in (None, 100):
            assert_adds_up(attribution_of(client, model="tiny", prompt=prompt, against=against)["positions"])
        chosen = attribution_of(client, model="tiny", prompt=[5, 6], targets=[7, 8])["positions"]
        assert [each["target"]["id"] for each in chosen] == [7, 8]
        assert_adds_up(chosen)


def test_an_attribution_has_bounds(server: Running) -> None:
    with server.http() as client:
        looks = server.metric('tolserve_memory_looks_total{kind="attribution"}')
        answers = [
            client.post("/v1/memory/attribution", json={"model": "tiny", "prompt": prompt})
            for prompt in ([5] * 256, [5] * 257, list(range(61)))
        ]
        assert [answer.status_code for answer in answers] == [200, 400, 400]
        assert "61 distinct tokens" in answers[-1].text
        assert server.metric('tolserve_memory_looks_total{kind="attribution"}') == looks + 2
        refused = client.post("/v1/memory/attribution", json={"model": "other", "prompt": [5]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")


def test_looks_and_answers_do_not_disturb_each_other(server: Running) -> None:
    """At once: every answer is that of a quiet server, every attribution the same."""
    body = {"model": "tiny", "prompt": [9, 8, 7], "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    with server.http() as client, ThreadPoolExecutor(8) as pool:
        text = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        alone = attribution_of(client, model="tiny", prompt=[4, 5, 6])
        answers = [pool.submit(client.post, "/v1/completions", json=body) for _ in range(3)]
        looks = [pool.submit(attribution_of, client, model="tiny", prompt=[4, 5, 6]) for _ in range(20)]
        looks += [pool.submit(look, client, token) for token in range(20)]
        assert all(answer.result().json()["choices"][0]["text"] == text for answer in answers)
        assert all(found.result() == alone for found in looks[:20])
        assert [found.result()["token"]["id"] for found in looks[20:]] == list(range(20))


def test_a_dead_engine_is_named(start_server: Start) -> None:
    running = start_server().wait_ready()
    with running.http() as client:
        os.kill(engine_of(running), signal.SIGKILL)
        eventually(lambda: client.get("/health").status_code == 503, "the death is seen")
        asked = {"model": "tiny", "prompt": [5]}
        for answer in (client.get("/v1/memory/tokens/5"), client.post("/v1/memory/attribution", json=asked)):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")
        running.wait_ready()
        assert look(client, 5)["token"]["id"] == 5
