"""One request straight into an app, and what every error must look like."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
from fastapi import FastAPI

VOCAB_SIZE = 310  # more than the tokenizer's 300: a model may have ids that no text has
CONTEXT = 64

Call = Callable[..., httpx.Response]


def caller(app: FastAPI) -> Call:
    """`call(method, path, **httpx arguments)`: one request straight into the app; its lifespan does not run."""

    def call(method: str, path: str, **arguments: Any) -> httpx.Response:
        async def run() -> httpx.Response:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **arguments)

        return asyncio.run(run())

    return call


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object, checked to be OpenAI's shape."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert body["error"]["message"]
    assert response.headers["x-request-id"]
    error: dict[str, Any] = body["error"]
    return error
