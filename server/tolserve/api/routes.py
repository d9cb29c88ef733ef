"""Everything but generation: models, tokens, the cache, health, version, metrics."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from fastapi.responses import JSONResponse, Response

from tolserve import __version__
from tolserve.api import metrics
from tolserve.api.chat import read_messages
from tolserve.api.errors import ApiError
from tolserve.api.schemas import DetokenizeRequest, TokenizeRequest
from tolserve.api.state import Server, server_of
from tolserve.metrics import Metric

# 4,096 records are about 300 KB of JSON and a few milliseconds of the engine's time between two steps.
MAX_CACHE_LIMIT = 4096

router = APIRouter()
State = Annotated[Server, Depends(server_of)]


def _model_card(server: Server) -> dict[str, Any]:
    return {
        "id": server.settings.model_name,
        "object": "model",
        "created": server.started,
        "owned_by": "tolserve",
        "max_model_len": server.max_model_len,
    }


@router.get("/v1/models")
async def models(server: State) -> dict[str, Any]:
    """The served models: one."""
    return {"object": "list", "data": [_model_card(server)]}


@router.get("/v1/models/{model:path}")
async def model(model: str, server: State) -> dict[str, Any]:
    """One served model."""
    server.require_model(model)
    return _model_card(server)


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, server: State) -> dict[str, Any]:
    """Token ids of a text or of a conversation (vLLM's shapes)."""
    server.require_model(body.model)
    tokenizer = server.files.tokenizer
    if body.messages is not None:
        prompt = await read_messages(server, body.messages, body.add_generation_prompt, bool(body.add_special_tokens))
    else:
        special = body.add_special_tokens is not False
        prompt = await tokenizer.encode_async(body.prompt or "", add_special_tokens=special)
    return {
        "count": len(prompt.ids),
        "max_model_len": server.max_model_len,
        "tokens": list(prompt.ids),
        "token_strs": [tokenizer.name(token) for token in prompt.ids] if body.return_token_strs else None,
    }


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, server: State) -> dict[str, str]:
    """Text of token ids, special tokens included."""
    server.require_model(body.model)
    server.require_known(body.tokens, "tokens")
    return {"prompt": server.files.tokenizer.decode(body.tokens)}


@router.get("/v1/tol/cache")
async def cache(server: State, limit: Annotated[int, Query(ge=1, le=MAX_CACHE_LIMIT)] = 1024) -> dict[str, Any]:
    """What the device tier holds: the records that would be evicted last, and what was evicted lately."""
    server.require_ready()
    view = await server.engine.cache(limit)
    if view is None:
        raise ApiError(404, "this model has no table", code="no_table")
    text = server.files.tokenizer.label
    return {
        "slots": view.slots,
        "used": view.used,
        "tokens": [
            {"id": record.token, "text": text(record.token), "uses": record.uses, "state": record.state}
            for record in view.residents
        ],
        "evicted": [{"id": token, "text": text(token)} for token in view.evicted],
    }


@router.get("/health")
async def health(server: State) -> Response:
    """200 while an engine answers, and while the first one loads."""
    if not server.engine.alive:
        raise ApiError(503, server.engine.failure or "the engine is gone", code="engine_dead")
    return JSONResponse({"status": "ok"})


@router.get("/ready")
async def ready(server: State) -> Response:
    """200 while requests are served: the model is loaded and warm, and the server is not stopping."""
    server.require_ready()
    return JSONResponse({"status": "ready"})


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": __version__}


async def numbers(server: Server) -> list[Metric]:
    """The engine's numbers and the API's own, as they stand now."""
    server.process.refresh()
    server.tasks.set(len(asyncio.all_tasks()))
    return [*await server.engine.metrics(), *server.metrics.snapshot()]


@router.get("/metrics")
async def prometheus(server: State) -> Response:
    """All numbers in Prometheus' text format."""
    return Response(metrics.render(await numbers(server)), media_type=metrics.CONTENT_TYPE)
