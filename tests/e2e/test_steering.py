"""Steering through the real server and the official client."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import BadRequestError, OpenAI

from e2e.conftest import Running
from packs import random_changes, save_pack
from tiny import tiny_config
from tolserve.model.checkpoint import compute_fingerprint, load_transformer, save_checkpoint
from tolserve.model.config import ModelConfig

GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 12}
PROMPT = "The old house stood at the end of the lane."


@pytest.fixture(scope="module")
def steerable(
    start_server: Callable[..., Running], model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Running:
    folder = tmp_path_factory.mktemp("packs")
    for index, name in enumerate(("loud", "calm")):
        save_pack(folder / f"{name}.safetensors", model_dir, random_changes(model_dir, index, range(300)), f"is {name}")
    save_pack(folder / "empty.safetensors", model_dir, {})
    (folder / "broken.safetensors").write_text("no pack")
    return start_server("--device-cache", "60", "--packs", str(folder)).wait_ready()


def complete(client: OpenAI, **tol: Any) -> Any:
    body = {"ignore_eos": True} | ({"tol": tol} if tol else {})
    return client.completions.create(prompt=PROMPT, extra_body=body, **GREEDY)


def chat(client: OpenAI, **tol: Any) -> Any:
    body = {"ignore_eos": True} | ({"tol": tol} if tol else {})
    return client.chat.completions.create(messages=[{"role": "user", "content": PROMPT}], extra_body=body, **GREEDY)


def test_a_request_steers_and_the_next_one_does_not(steerable: Running) -> None:
    client = steerable.openai()
    plain = complete(client)
    kinds: list[dict[str, Any]] = [
        {"edits": "loud"}, {"edits": ["loud", "calm"]}, {"edits": ["calm", "loud"]}, {"alpha": -1}, {"alpha": [0, 2.5]}
    ]  # fmt: skip
    texts = [complete(client, **kind).choices[0].text for kind in kinds]
    assert len({*texts, plain.choices[0].text}) == len(kinds) + 1
    assert [complete(client, **kind).choices[0].text for kind in kinds] == texts
    for nothing in ({"alpha": 1}, {"alpha": [1, 1.0], "drop_layers": [], "edits": []}):
        assert complete(client, **nothing).choices[0].text == plain.choices[0].text
    dropped = complete(client, drop_layers=[0], alpha=2.5)
    assert dropped.choices[0].text == complete(client, alpha=[0, 2.5]).choices[0].text
    assert dropped.usage.completion_tokens == 12
    assert dropped.usage.tol["lookups"] > 12
    said = chat(client, edits=["loud"]).choices[0].message.content
    assert said != chat(client).choices[0].message.content
    stream = client.completions.create(
        prompt=PROMPT, stream=True, extra_body={"ignore_eos": True, "tol": {"edits": "loud"}}, **GREEDY
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == texts[0]


def scored(client: OpenAI, salt: str, tol: dict[str, Any] | None, **fields: Any) -> tuple[str, Any]:
    """Text and log-probabilities, of the prompt as well. Nothing is found in the prefix cache: a prompt whose beginning
    is, runs in another step and may round otherwise."""
    body = {"ignore_eos": True, "cache_salt": salt} | ({"tol": tol} if tol is not None else {})
    fields = {"prompt": PROMPT, "logprobs": 3, "echo": True} | GREEDY | fields
    (choice,) = client.completions.create(extra_body=body, **fields).choices
    return choice.text, choice.logprobs.model_dump()


def test_alpha_one_and_an_empty_pack_change_no_bit(steerable: Running) -> None:
    client = steerable.openai()
    plain = scored(client, "plain", None)
    nothing: list[dict[str, Any]] = [
        {}, {"alpha": 1}, {"alpha": [1, 1]}, {"drop_layers": []}, {"edits": []}, {"edits": "empty"},
        {"edits": ["empty", "empty"], "alpha": 1},
    ]  # fmt: skip
    for number, tol in enumerate(nothing):
        assert scored(client, f"nothing-{number}", tol) == plain, tol
    assert scored(client, "something", {"edits": ["empty", "calm"]}) != plain


def test_alpha_zero_is_a_model_whose_records_are_zero(
    start_server: Callable[..., Running], steerable: Running, model_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(model_dir, tmp_path / "silent")
    config = ModelConfig.load(model_dir)
    state = load_transformer(model_dir, with_memory=True, dtype=torch.bfloat16).state_dict()
    state |= {name: torch.zeros_like(weight) for name, weight in state.items() if "memory.down_proj" in name}
    save_checkpoint(tmp_path / "silent", config, state, compute_fingerprint(config, state))
    silent = start_server("--device-cache", "60", model=tmp_path / "silent").wait_ready().openai()
    for tol in ({"alpha": 0}, {"alpha": [0, 0.0]}, {"drop_layers": [0, 1]}, {"alpha": 0, "edits": "loud"}):
        assert scored(steerable.openai(), f"zero-{tol}", tol) == scored(silent, "silent", None)


def test_requests_with_different_packs_run_in_one_batch(steerable: Running) -> None:
    """Each gets what it gets alone, though they share steps and cached records."""
    kinds: list[dict[str, Any] | None] = [
        None, {"edits": "loud"}, {"edits": "calm"}, {"edits": ["loud", "calm"]}, {"alpha": 0.5}, {"drop_layers": [1]},
        None, {"edits": "calm", "alpha": -1},
    ]  # fmt: skip
    client = steerable.openai()

    def ask(kind: dict[str, Any] | None, salt: str) -> str:
        return scored(client, salt, kind, max_tokens=60, echo=False)[0]

    def steps() -> float:
        return steerable.metric("tolserve_iteration_tokens_total_count")

    start = steps()
    alone = [ask(kind, "alone") for kind in kinds]
    between = steps()
    with ThreadPoolExecutor(len(kinds)) as pool:
        together = [*pool.map(ask, kinds, ["together"] * len(kinds))]
    assert together == alone
    assert len(set(alone)) == len(kinds) - 1
    assert steps() - between < (between - start) / 2, "most steps had several of them"


@pytest.mark.parametrize(
    ("tol", "message"),
    [
        ({"edits": "nothing"}, "the pack 'nothing' does not exist; see /v1/memory/packs"),
        ({"edits": ["loud", "broken"]}, "the pack 'broken' cannot be used"),
        ({"alpha": [1, 2, 3]}, "tol.alpha: it has 3 numbers, and the model 2 layers"),
        ({"drop_layers": [2]}, "tol.drop_layers: layers are numbered from 0 to 1"),
        ({"alpha": 9}, "tol.alpha"),
    ],
)
def test_what_cannot_be_steered_is_said(steerable: Running, tol: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequestError, match=message) as raised:
        complete(steerable.openai(), **tol)
    assert raised.value.param == "tol"
    assert "completion" in complete(steerable.openai(), edits="calm").object


def test_the_packs_are_listed_behind_the_key(steerable: Running, server: Running) -> None:
    complete(steerable.openai(), edits="loud")
    with steerable.http() as http:
        listed = {pack["name"]: pack for pack in http.get("/v1/memory/packs").json()["packs"]}
        assert http.get("/v1/memory/packs", headers={"authorization": ""}).status_code == 401
    assert sorted(listed) == ["broken", "calm", "empty", "loud"]
    loud = listed["loud"]
    assert (loud["loaded"], loud["description"], loud["problem"]) == (True, "is loud", None)
    assert loud["bytes"] == loud["entries"] * (4 * 32 + 12)
    assert "no pack" in listed["broken"]["problem"]
    assert steerable.metric("tolserve_packs_loaded") >= 1
    assert steerable.metric("tolserve_pack_loads_total") >= 1
    assert steerable.metric('tolserve_steered_requests_total{by="packs"}') >= 1
    with server.http() as http:
        missing = http.get("/v1/memory/packs")
        refused = http.post("/v1/completions", json={"model": "tiny", "prompt": "x", "tol": {"edits": "loud"}})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "no_packs")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tol")
    assert "--packs" in refused.json()["error"]["message"]


def test_a_base_model_has_nothing_to_steer(
    start_server: Callable[..., Running], model_dir_of: Callable[..., Path]
) -> None:
    base = start_server(model=model_dir_of(tiny_config("base"))).wait_ready()
    with pytest.raises(BadRequestError, match=r"tol.drop_layers: this model has no table") as raised:
        complete(base.openai(), drop_layers=[0])
    assert raised.value.param == "tol"
