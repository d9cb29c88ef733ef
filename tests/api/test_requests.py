"""Every field is honoured or refused by name, at its bounds and beyond. The app's engine is not started, so a body
that passes all checks gets 503."""

import json
import re
from typing import Any

import pytest

from api.wire import VOCAB_SIZE, Call, error_of
from tolserve.api.schemas import NEUTRAL, ChatCompletionRequest, CompletionRequest

COMPLETION = {"model": "tiny", "prompt": "Once"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}
HUGE = 2**63
SAMPLING_GOOD: list[tuple[str, Any]] = [
    ("n", 1),
    ("n", 16),
    ("temperature", 0),
    ("temperature", 2.0),
    ("top_p", 1),
    ("top_p", 1e-9),
    ("top_k", -1),
    ("top_k", 0),
    ("top_k", 2**31 - 1),
    ("min_p", 0.0),
    ("min_p", 1.0),
    ("seed", -HUGE),
    ("seed", HUGE - 1),
    ("stop", "x"),
    ("stop", ["x"] * 16),
    ("stop", "x" * 256),
    ("stop", []),
    ("stop_token_ids", [0, 1]),
    ("include_stop_str_in_output", True),
    ("ignore_eos", True),
    ("stream", False),
    ("user", "someone"),
    ("cache_salt", "x"),
    ("cache_salt", "é" * 256),
    ("cache_salt", None),
    ("tol", {"alpha": 1, "drop_layers": [0, 3], "edits": "calm"}),
    ("tol", {"alpha": [0.5, -8, 8.0], "edits": ["a", "b.c-d_E", "a", "0"], "drop_layers": []}),
    ("tol", {"alpha": None, "drop_layers": None, "edits": None}),
    ("presence_penalty", 0),
    ("frequency_penalty", 0.0),
    ("logit_bias", {}),
    ("response_format", {"type": "text"}),
]
SAMPLING_BAD: list[tuple[str, Any]] = [
    *[("n", value) for value in (0, 17, -1, HUGE, True, "1", 1.0, 1.5, [1])],
    *[("temperature", value) for value in (-0.1, 2.1, HUGE, True, "1", float("nan"), float("inf"))],
    *[("top_p", value) for value in (0, -1, 1.1, True, "1", float("nan"))],
    *[("top_k", value) for value in (-2, 2**31, HUGE, True, 1.5, "1")],
    *[("min_p", value) for value in (-0.1, 1.1, True, "0", float("nan"))],
    *[("seed", value) for value in (-HUGE - 1, HUGE, True, "1", 1.5)],
    *[("stop", value) for value in ("", [""], ["x"] * 17, "x" * 257, [1], 1, [None], "\ud800")],
    *[("stop_token_ids", value) for value in ([-1], [2**31], [HUGE], [True], ["1"], [0] * 17, 0)],
    *[("stream", value) for value in (1, "true", "no")],
    ("ignore_eos", 1),
    ("model", 1),
    ("model", None),
    ("user", 5),
    *[("cache_salt", value) for value in ("", "x" * 257, 1, True, ["x"], "\ud800")],
    *[("tol", {"alpha": value}) for value in (8.1, -9, True, "1", float("nan"), float("inf"), [9], ["1"], [[1]], {})],
    *[("tol", {"drop_layers": value}) for value in (3, [-1], [1024], [True], ["1"], [1.5], [0] * 1025)],
    *[("tol", {"edits": value}) for value in ("", "a/b", "é", [1], 1, ["a"] * 5, "x" * 101, "a b", "a\n")],
    ("tol", {"beta": 1}),
    ("stream_options", {"include_usage": True}),  # without stream
    ("presence_penalty", 0.5),
    ("presence_penalty", False),
    ("frequency_penalty", -1),
    ("logit_bias", {"5": 1}),
    ("best_of", 2),
    ("priority", 1),
    ("min_tokens", 3),
    ("response_format", {"type": "json_object"}),
    ("repetition_penalty", 1.1),
    ("unheard_of", 0),
    ("unheard_of", None),
]


def post(call: Call, path: str, body: dict[str, Any], **changes: Any) -> Any:
    """The body as Python writes it, NaN and lone surrogates included."""
    content = json.dumps(body | changes).encode()
    return call("POST", path, content=content, headers={"content-type": "application/json"})


ENDPOINTS = [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)]


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
def test_good_values_pass_all_checks(call: Call, path: str, body: dict[str, Any]) -> None:
    for name, value in SAMPLING_GOOD:
        response = post(call, path, body, **{name: value})
        assert (response.status_code, error_of(response)["code"]) == (503, "not_ready"), (name, value)
        assert response.headers["retry-after"]


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
def test_bad_values_are_refused_by_name(call: Call, path: str, body: dict[str, Any]) -> None:
    for name, value in SAMPLING_BAD:
        response = post(call, path, body, **{name: value})
        error = error_of(response)
        assert (response.status_code, error["param"], error["type"]) == (400, name, "invalid_request_error"), (
            name,
            value,
            error,
        )
        assert name in error["message"] or name == "model", error


@pytest.mark.parametrize(
    ("name", "value", "good"),
    [
        ("prompt", "", True),
        ("prompt", ["a", "b"], True),
        ("prompt", [1, 2], True),
        ("prompt", [[1], [2, 3]], True),
        ("prompt", [[]], True),  # the begin-of-text token stands in
        ("prompt", ["a"] * 128, True),
        ("prompt", ["a"] * 129, False),
        ("prompt", [], False),
        ("prompt", None, False),
        ("prompt", 5, False),
        ("prompt", [1, "a"], False),
        ("prompt", ["a", 1], False),
        ("prompt", [True], False),
        ("prompt", [1.0], False),
        ("prompt", [-1], False),
        ("prompt", [HUGE], False),
        ("prompt", [[1, None]], False),
        ("prompt", "\ud800", False),
        ("prompt", {"text": "a"}, False),
        ("max_tokens", 0, True),
        ("max_tokens", None, True),
        ("max_tokens", 2**31 - 1, True),  # too large for the context, which only a ready engine knows
        ("max_tokens", 2**31, False),
        ("max_tokens", -1, False),
        ("max_tokens", True, False),
        ("max_tokens", "16", False),
        ("logprobs", 0, True),
        ("logprobs", 20, True),
        ("logprobs", 21, False),
        ("logprobs", -1, False),
        ("logprobs", True, False),
        ("echo", True, True),
        ("echo", 1, False),
        ("suffix", "", True),
        ("suffix", "end", False),
        ("prompt_logprobs", 1, False),
        ("best_of", 1, True),
    ],
)
def test_completion_fields(call: Call, name: str, value: Any, good: bool) -> None:
    response = post(call, "/v1/completions", COMPLETION, **{name: value})
    assert response.status_code == (503 if good else 400), response.text
    if not good:
        assert error_of(response)["param"] == name


def test_prompts_times_n_is_bounded(call: Call) -> None:
    assert post(call, "/v1/completions", COMPLETION, prompt=["a"] * 8, n=16).status_code == 503
    response = post(call, "/v1/completions", COMPLETION, prompt=["a"] * 9, n=16)
    assert (response.status_code, error_of(response)["param"]) == (400, "n")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "mood": None}]}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 5, "max_tokens": 5}, "max_completion_tokens"),
        ({"logprobs": 1}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"prompt": "x"}, "prompt"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options"),
    ],
)
def test_bad_chat_fields(call: Call, changes: dict[str, Any], param: str) -> None:
    response = post(call, "/v1/chat/completions", CHAT, **changes)
    assert (response.status_code, error_of(response)["param"]) == (400, param), response.text


@pytest.mark.parametrize(
    "changes",
    [
        {"messages": [{"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
        {"messages": [{"role": "assistant", "content": "x", "refusal": None, "tool_calls": []}]},
        {"messages": [{"role": "developer", "content": ""}, {"role": "user", "content": "x"}]},
        {"max_completion_tokens": 5},
        {"logprobs": True, "top_logprobs": 20},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"tools": None, "tool_choice": "none"},
    ],
)
def test_good_chat_fields(call: Call, changes: dict[str, Any]) -> None:
    response = post(call, "/v1/chat/completions", CHAT, **changes)
    assert (response.status_code, error_of(response)["code"]) == (503, "not_ready"), response.text


def test_every_unsupported_field_is_refused_and_its_null_is_not() -> None:
    for schema, body in ((CompletionRequest, COMPLETION), (ChatCompletionRequest, CHAT)):
        for name in NEUTRAL.keys() - schema.model_fields.keys():
            schema.model_validate({**body, name: None})
            for value in NEUTRAL[name]:
                schema.model_validate({**body, name: value})
            with pytest.raises(ValueError, match="not supported"):
                schema.model_validate({**body, name: {"a": "value that asks for something"}})


def test_token_ids_beyond_the_vocabulary(call: Call) -> None:
    """Known without the engine, so /detokenize says it at once."""
    assert call("POST", "/detokenize", json={"tokens": [VOCAB_SIZE - 1]}).status_code == 200
    response = call("POST", "/detokenize", json={"tokens": [VOCAB_SIZE]})
    assert (response.status_code, error_of(response)["param"]) == (400, "tokens")


@pytest.mark.parametrize(
    ("path", "changes", "name"),
    [
        ("/v1/completions", {"prompt": [1, -1]}, "prompt[0][1]"),
        ("/v1/completions", {"prompt": ["a", 1]}, "prompt[1]"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
        ),
    ],
)
def test_an_error_says_where(call: Call, path: str, changes: dict[str, Any], name: str) -> None:
    response = post(call, path, CHAT if "chat" in path else COMPLETION, **changes)
    assert re.match(re.escape(name) + "(:| is missing)", error_of(response)["message"])


def test_an_error_repeats_nothing_that_was_sent(call: Call) -> None:
    response = post(call, "/v1/completions", COMPLETION, temperature="my secret")
    assert "secret" not in response.text
