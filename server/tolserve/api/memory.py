"""Looks into the memory of the served model: a token's record, what moved the logits of a prompt, and its packs."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query

from tolserve.api.completions import read_prompt
from tolserve.api.errors import ApiError, bad_request
from tolserve.api.schemas import AttributionRequest
from tolserve.api.state import Server, server_of
from tolserve.api.tokenizer import NotOneTokenError
from tolserve.engine.look import DIGITS, to_json
from tolserve.engine.request import Request, SamplingParams

MAX_TOP = 50
# Numbers of one answer: 256 tokens of 24 layers are 0.15 MB of JSON, twice that for flex.
MAX_ATTRIBUTED_TOKENS = 256
# That wait for the engine at once. It takes one between two steps, so eight delay nobody's look by much.
MAX_LOOKS = 8

router = APIRouter()
State = Annotated[Server, Depends(server_of)]


@asynccontextmanager
async def _looking(server: Server) -> AsyncIterator[None]:
    """One of the few looks that may wait for the engine. Raises 429 and what Server.require_ready does."""
    server.require_ready()
    if server.looks >= MAX_LOOKS:
        raise ApiError(429, f"{MAX_LOOKS} looks into the memory are waiting already", code="queue_full")
    server.looks += 1
    try:
        yield
    finally:
        server.looks -= 1


@router.get("/v1/memory/tokens/{token:path}")
async def token(
    token: str,
    server: State,
    text: bool = False,
    layers: Annotated[str | None, Query(pattern=r"^[0-9]{1,4}(,[0-9]{1,4})*$")] = None,
    top: Annotated[int, Query(ge=1, le=MAX_TOP)] = 8,
) -> dict[str, Any]:
    """A token's record. A path of digits is an id, unless `text` says that it is text; `layers` as 0,3."""
    if server.require_ready().encoding is None:
        raise ApiError(400, "this model has no table, so there is no memory to look into", code="no_table")
    number = _token_id(server, token, text)
    asked = [int(layer) for layer in layers.split(",")] if layers is not None else None
    async with _looking(server):
        view = await server.engine.token(number, asked, top)
    return to_json(view, server.files.tokenizer.label)


def _token_id(server: Server, token: str, text: bool) -> int:
    """Raises 404 for an id outside the vocabulary, 400 for what is not one token."""
    if text or not re.fullmatch("[0-9]{1,9}", token):
        return _only_id(server, token, "token")
    if int(token) >= server.files.vocab_size:
        raise ApiError(
            404,
            f"there is no token {token}; ids are below {server.files.vocab_size} (digits as text: ?text=true)",
            param="token",
            code="token_not_found",
        )
    return int(token)


def _only_id(server: Server, text: str, param: str) -> int:
    try:
        return server.files.tokenizer.only_id(text)
    except NotOneTokenError as error:
        raise bad_request(param, f"{param}: {error}", "not_one_token") from error


def _named(server: Server, token: int) -> dict[str, Any]:
    return {"id": token, "text": server.files.tokenizer.label(token)}


@router.post("/v1/memory/attribution")
async def attribution(body: AttributionRequest, server: State) -> dict[str, Any]:
    """What each layer's attention and memory added to the next token's logit, at each position of a prompt."""
    server.require_model(body.model)
    server.require_ready()
    prompt = await read_prompt(server, body.prompt)
    if len(prompt.ids) > (most := min(MAX_ATTRIBUTED_TOKENS, server.max_model_len)):
        raise bad_request("prompt", f"prompt: {len(prompt.ids)} tokens; at most {most} can be attributed")
    targets = None if body.targets == "next" else body.targets
    if targets is not None:
        server.require_known(targets, "targets")
        if len(targets) != len(prompt.ids):
            raise bad_request("targets", f"targets: {len(targets)} ids for {len(prompt.ids)} tokens of the prompt")
    against = body.against
    if isinstance(against, str):
        against = _only_id(server, against, "against")
    elif against is not None:
        server.require_known([against], "against")
    request = Request("attribution", prompt.ids, SamplingParams(max_tokens=0, temperature=0.0))
    async with _looking(server):
        found = await server.engine.attribution(request, targets, against)

    def at(values: list[list[float]] | None, position: int) -> list[float] | None:
        return None if values is None else [round(value, DIGITS) for value in values[position]]

    return {
        "object": "memory.attribution",
        "model": server.settings.model_name,
        "against": _named(server, against) if against is not None else None,
        "positions": [
            {
                "token": _named(server, token),
                "target": _named(server, found.targets[position]),
                "logit": round(found.logits[position], DIGITS),
                "embedding": round(found.embedding[position], DIGITS),
                "attention": at(found.attention, position),
                "memory": at(found.memory, position),
                "compute": at(found.compute, position),
            }
            for position, token in enumerate(prompt.ids)
        ],
    }


@router.get("/v1/memory/packs")
async def packs(server: State) -> dict[str, Any]:
    """The memory packs that requests may ask for in `tol.edits`."""
    if server.settings.packs is None:
        raise ApiError(404, "this server has no packs; start it with --packs DIR", code="no_packs")
    async with _looking(server):
        found = await server.engine.packs()
    return {"packs": [asdict(pack) for pack in found]}
