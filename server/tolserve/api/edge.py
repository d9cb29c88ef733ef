"""What surrounds every route: request ids, request counts, the API key, the size of a body. Plain ASGI, so that
streams pass through untouched."""

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tolserve.api.errors import ApiError
from tolserve.logs import current_request
from tolserve.metrics import Metrics

log = logging.getLogger(__name__)
access = logging.getLogger("tolserve.access")

# 4 MiB hold a batch of 128 prompts of 2,048 token ids with room to spare; uvicorn would take any size.
MAX_BODY_BYTES = 4 * 2**20
OPEN_PATHS = frozenset({"/health", "/ready", "/"})
OPEN_FOLDER = "/console/"  # the page at / and its files: static, the same for everybody

_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
# Asked every few seconds by machines: their lines are for --log-level debug.
_PROBES = frozenset({"/health", "/ready", "/metrics"})
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def _header(scope: Scope, name: bytes) -> bytes | None:
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return None


class Edge:
    """Outermost: gives every answer its x-request-id (the client's own if it is short and plain), counts and logs it by
    route template, and answers what no handler expected with a 500 that says nothing of the inside."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self._requests = metrics.counter(
            "http_requests_total", "Answered HTTP requests.", ("route", "method", "status")
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = _header(scope, b"x-request-id")
        request_id = given if given is not None and _SANE_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        current_request.set(request_id.decode())
        began = time.monotonic()
        status = 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        try:
            await self.app(scope, receive, send_marked)
        except Exception:
            log.exception("a request failed")
            if status:
                raise  # the answer has begun; the server closes the connection
            await ApiError(500, "internal error; the server's log says more").response()(scope, receive, send_marked)
        except asyncio.CancelledError:  # the server stops, and this did not end in time
            if not status:
                error = ApiError(503, "the server is stopping", code="stopping")
                await error.response()(scope, receive, send_marked)
        finally:
            self._note(scope, status or 499, time.monotonic() - began)  # 499: the client was gone before an answer

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        """Count and log an answer. Nothing here is what the client wrote: not the path, but its template."""
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._requests.add(1, route, method, str(status))
        about = {"route": route, "method": method, "status": status, "seconds": round(seconds, 6)}
        state = scope.get("state", {})
        if (usage := state.get("usage")) is not None:
            counts = usage.to_json()
            about |= {name: counts[name] for name in ("prompt_tokens", "completion_tokens")}
        level = logging.DEBUG if route in _PROBES else logging.INFO
        if (error := state.get("error")) is not None:  # a stream that broke after its status was sent
            level, about["error"] = logging.WARNING, error
        access.log(level, "answered", extra=about)


class Auth:
    """Asks for `Authorization: Bearer KEY` on every path but the open ones. Compares digests, in constant time."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app = app
        self._digest = hashlib.sha256(key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        is_open = path in OPEN_PATHS or path.startswith(OPEN_FOLDER)
        if scope["type"] != "http" or is_open or self._allowed(scope):
            await self.app(scope, receive, send)
            return
        error = ApiError(
            401,
            "a valid API key is needed: Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
        await error.response()(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        scheme, _, key = (_header(scope, b"authorization") or b"").partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        return hmac.compare_digest(given, self._digest) and scheme.lower() == b"bearer"


class BodyLimit:
    """Reads the body before the route runs and refuses one above MAX_BODY_BYTES with 413."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = _header(scope, b"content-length") or b"0"
        if not declared.isdigit() or int(declared[:20]) > MAX_BODY_BYTES:
            await _too_large()(scope, receive, send)
            return
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MAX_BODY_BYTES:
                await _too_large()(scope, receive, send)
                return
        whole: Message | None = {"type": "http.request", "body": bytes(body), "more_body": False}

        async def replay() -> Message:
            nonlocal whole
            if whole is None:
                return await receive()
            message, whole = whole, None
            return message

        await self.app(scope, replay, send)


def _too_large() -> ASGIApp:
    return ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes", code="body_too_large").response()
