"""Routes that need no engine, and what surrounds all routes: ids, keys, sizes, error shapes, counts."""

import asyncio
import re
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from api.wire import CONTEXT, Call, caller, error_of
from tolserve import __version__
from tolserve.api.app import create_app
from tolserve.api.edge import MAX_BODY_BYTES
from tolserve.settings import ServeSettings


def test_models(call: Call) -> None:
    listed = call("GET", "/v1/models").json()
    assert listed["object"] == "list"
    (card,) = listed["data"]
    assert card == call("GET", "/v1/models/tiny").json()
    assert (card["id"], card["object"], card["max_model_len"]) == ("tiny", "model", CONTEXT)
    response = call("GET", "/v1/models/other")
    assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")


def test_the_served_name_may_be_chosen(model_dir: Path) -> None:
    call = caller(create_app(ServeSettings(model=model_dir, served_model_name="org/name")))
    assert call("GET", "/v1/models/org/name").json()["id"] == "org/name"
    assert call("POST", "/tokenize", json={"model": "tiny", "prompt": "a"}).status_code == 404
    response = call("POST", "/v1/completions", json={"model": "tiny", "prompt": "a"})
    assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")


def test_tokenize_and_back(call: Call) -> None:
    text = "The old house — 漢字 🙂"
    answer = call("POST", "/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert set(answer) == {"count", "max_model_len", "tokens", "token_strs"}
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == CONTEXT
    assert call("POST", "/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}
    assert call("POST", "/tokenize", json={"prompt": ""}).json()["tokens"] == []


def test_long_texts_give_the_same_tokens_from_their_thread(call: Call) -> None:
    once = call("POST", "/tokenize", json={"prompt": "The old house "}).json()
    many = call("POST", "/tokenize", json={"prompt": "The old house " * 1000}).json()
    assert many["tokens"][: once["count"] - 1] == once["tokens"][:-1]
    assert many["count"] > 1000


def test_tokenize_messages(call: Call) -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "there"}]
    tokens = call("POST", "/tokenize", json={"messages": messages}).json()["tokens"]
    assert call("POST", "/detokenize", json={"tokens": tokens}).json() == {"prompt": "Hello\nthere\n"}
    for body in ({}, {"prompt": "a", "messages": messages}):
        assert error_of(call("POST", "/tokenize", json=body))["param"] == "prompt"


def test_health_ready_and_version(app: FastAPI, call: Call) -> None:
    assert call("GET", "/health").status_code == 200
    assert error_of(call("GET", "/ready"))["code"] == "not_ready"
    assert call("GET", "/version").json() == {"version": __version__}
    app.state.server.engine.failure = "the engine process ended with exit code 1"
    for path in ("/health", "/ready"):
        response = call("GET", path)
        assert (response.status_code, error_of(response)["code"]) == (503, "engine_dead")
        assert response.headers["retry-after"]


def test_metrics_answer_when_the_engine_is_dead(app: FastAPI, call: Call) -> None:
    app.state.server.engine.failure = "gone"
    call("GET", "/v1/models/tiny")
    call("GET", "/nowhere/secret")
    call("BREW", "/version")
    response = call("GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    counted = 'tolserve_http_requests_total{method="%s",route="%s",status="%d"} 1.0'
    assert counted % ("GET", "/v1/models/{model:path}", 200) in response.text
    assert counted % ("GET", "other", 404) in response.text
    assert counted % ("other", "/version", 405) in response.text
    assert "secret" not in response.text
    assert "tolserve_engine_up 0.0" in response.text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/no", 404), ("GET", "/console/x", 404), ("GET", "/v1/models/", 404), ("GET", "/v1/completions", 405)],
)
def test_unknown_routes_and_methods(call: Call, method: str, path: str, status: int) -> None:
    response = call(method, path)
    error_of(response)
    assert response.status_code == status


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b"", "application/json"),
        (b"{", "application/json"),
        (b"[1]", "application/json"),
        (b"\xff", "application/json"),
        (b"[" * 100_000, "application/json"),
        (b'{"prompt": ' + b"1" * 5000 + b"}", "application/json"),
        (b'{"prompt": "a"}', "text/plain"),
        (b"prompt=a", "application/x-www-form-urlencoded"),
    ],
)
def test_bodies_that_are_no_json_object(call: Call, content: bytes, content_type: str) -> None:
    response = call("POST", "/v1/completions", content=content, headers={"content-type": content_type})
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


def test_large_bodies_are_refused(call: Call) -> None:
    fitting = b'{"prompt": "' + b"a" * (MAX_BODY_BYTES - 14) + b'"}'
    headers = {"content-type": "application/json"}
    assert len(fitting) == MAX_BODY_BYTES
    assert call("POST", "/detokenize", content=fitting, headers=headers).status_code == 400
    response = call("POST", "/detokenize", content=fitting + b" ", headers=headers)
    assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")


def test_large_bodies_without_a_length_are_refused(app: FastAPI) -> None:
    async def run() -> tuple[int, int]:
        sent = 0

        async def chunks() -> object:
            nonlocal sent
            for _ in range(8):
                sent += 2**20
                yield b"a" * 2**20

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            response = await client.post("/detokenize", content=chunks())
        return response.status_code, sent

    status, sent = asyncio.run(run())
    assert status == 413
    assert sent <= MAX_BODY_BYTES + 2**20


def test_request_ids(call: Call) -> None:
    assert call("GET", "/version", headers={"x-request-id": "abc-1.2:3_4"}).headers["x-request-id"] == "abc-1.2:3_4"
    for insane in ("a b", "x" * 129, "é".encode("latin-1").decode("latin-1"), ""):
        answered = call("GET", "/version", headers={"x-request-id": insane.encode("latin-1")}).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", answered)


def test_every_route_of_the_api_but_two_asks_for_the_key(model_dir: Path) -> None:
    app = create_app(ServeSettings(model=model_dir, api_key="s3cret"))
    call = caller(app)
    app.state.server.engine.failure = "gone"  # so that /metrics has no engine to ask
    paths = [(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods]
    assert ("POST", "/v1/completions") in paths
    for method, path in [*paths, ("GET", "/nowhere"), ("GET", "/openapi.json")]:
        if path in ("/health", "/ready"):
            continue
        for header in ({}, {"authorization": "Bearer s3cre"}, {"authorization": "Basic s3cret"}, {"api-key": "s3cret"}):
            response = call(method, path, headers=header)
            assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key"), path
            assert response.headers["www-authenticate"] == "Bearer"
            assert "s3cret" not in response.text
        assert call(method, path, headers={"authorization": "bearer s3cret"}).status_code != 401
    assert call("GET", "/health").status_code == 503
    assert call("GET", "/ready").status_code == 503
    assert call("GET", "/health/").status_code == 401


def test_an_unexpected_error_is_a_500_that_tells_nothing(app: FastAPI, call: Call) -> None:
    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("secret inside")

    response = call("GET", "/broken")
    assert response.status_code == 500
    assert error_of(response)["type"] == "server_error"
    assert "secret" not in response.text


def test_the_openapi_page_can_be_made(call: Call) -> None:
    assert "/v1/completions" in call("GET", "/openapi.json").json()["paths"]
