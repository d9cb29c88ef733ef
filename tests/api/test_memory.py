"""Looks into the memory, before any engine is asked: what is refused, and for whom."""

from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from api.wire import VOCAB_SIZE, Call, caller, error_of
from tolserve.api.app import create_app
from tolserve.api.memory import MAX_LOOKS
from tolserve.engine.messages import Ready
from tolserve.settings import ServeSettings

LOOK = "/v1/memory/tokens/5"
ATTRIBUTION = "/v1/memory/attribution"
BODY: dict[str, Any] = {"model": "tiny", "prompt": "The old house"}


def pretend_ready(app: FastAPI, encoding: str | None = "bf16") -> None:
    """As if an engine had said so; it would not answer."""
    app.state.server.engine.ready = Ready(
        vocab_size=VOCAB_SIZE, num_layers=2, max_model_len=64, fingerprint=None, encoding=encoding
    )


def test_an_engine_must_be_there(call: Call) -> None:
    for answer in (call("GET", LOOK), call("POST", ATTRIBUTION, json=BODY)):
        assert (answer.status_code, error_of(answer)["code"]) == (503, "not_ready")


def test_the_key_is_asked_for(model_dir: Path) -> None:
    call = caller(create_app(ServeSettings(model=model_dir, api_key="k3y")))
    for answer in (call("GET", LOOK), call("POST", ATTRIBUTION, json=BODY)):
        assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")


def test_a_base_model_has_no_records(app: FastAPI, call: Call) -> None:
    pretend_ready(app, None)
    answer = call("GET", LOOK)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "no_table")


@pytest.mark.parametrize(
    ("path", "status", "param", "message"),
    [
        (f"/v1/memory/tokens/{VOCAB_SIZE}", 404, "token", "ids are below 310 (digits as text: ?text=true)"),
        ("/v1/memory/tokens/123456789", 404, "token", "there is no token 123456789"),
        ("/v1/memory/tokens/", 400, "token", "is empty"),
        ("/v1/memory/tokens/house/lane", 400, "token", "tokens: "),
        ("/v1/memory/tokens/9999?text=true", 400, "token", "4 tokens: "),
        ("/v1/memory/tokens/9999999999", 400, "token", "10 tokens: "),
        (f"{LOOK}?top=0", 400, "top", "top: "),
        (f"{LOOK}?top=51", 400, "top", "top: "),
        (f"{LOOK}?layers=", 400, "layers", "layers: "),
        (f"{LOOK}?layers=0,-1", 400, "layers", "layers: "),
        (f"{LOOK}?text=maybe", 400, "text", "text: "),
    ],
)
def test_what_is_no_token_is_refused(
    app: FastAPI, call: Call, path: str, status: int, param: str, message: str
) -> None:
    pretend_ready(app)
    answer = call("GET", path)
    error = error_of(answer)
    assert (answer.status_code, error["param"]) == (status, param)
    assert message in error["message"]


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [VOCAB_SIZE]}, "prompt"),
        ({"prompt": [1] * 65}, "prompt"),
        ({"targets": "best"}, "targets"),
        ({"prompt": [1, 2], "targets": [1]}, "targets"),
        ({"prompt": [1, 2], "targets": [1, VOCAB_SIZE]}, "targets"),
        ({"against": VOCAB_SIZE}, "against"),
        ({"against": "several of them"}, "against"),
        ({"against": -1}, "against"),
        ({"against": "x" * 100_000}, "against"),
        ({"against": 1.5}, "against"),
        ({"layers": [0]}, "layers"),
    ],
)
def test_a_wrong_body_is_refused_by_name(app: FastAPI, call: Call, changed: dict[str, Any], param: str) -> None:
    pretend_ready(app)
    answer = call("POST", ATTRIBUTION, json=BODY | changed)
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)


def test_only_some_looks_may_wait(app: FastAPI, call: Call) -> None:
    pretend_ready(app)
    app.state.server.looks = MAX_LOOKS
    for answer in (call("GET", LOOK), call("POST", ATTRIBUTION, json=BODY)):
        assert (answer.status_code, error_of(answer)["code"]) == (429, "queue_full")
    assert app.state.server.looks == MAX_LOOKS
    app.state.server.looks = 0
    assert call("GET", LOOK).status_code == 503  # nobody answers
    assert app.state.server.looks == 0
