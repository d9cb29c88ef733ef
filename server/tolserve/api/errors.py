"""Errors on the wire: OpenAI's nested JSON on every route and for every cause."""

import json
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from tolserve.engine.client import EngineError

# A full queue drains by one request in seconds at this server's sizes; a client that comes back sooner only adds load.
RETRY_AFTER_SECONDS = 2

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """An answer other than success. `param` names the request field at fault, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type or _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.param, self.code = param, code
        self.headers = dict(headers or {})
        if status in (429, 503):
            self.headers.setdefault("retry-after", str(RETRY_AFTER_SECONDS))

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, headers=self.headers)


def bad_request(param: str | None, message: str, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def from_engine(error: EngineError) -> ApiError:
    """The answer for what the engine says about one request."""
    message = str(error)
    match error.kind:
        case "invalid":
            return ApiError(400, message, param=error.param)
        case "busy":
            return ApiError(429, message, code="queue_full")
        case "dead":
            return ApiError(503, message, code="engine_dead")
        case "stopping":
            return ApiError(503, message, code="stopping", headers={"connection": "close"})
        case "slow":
            return ApiError(503, message, code="engine_slow")
        case "memory":
            return ApiError(507, message, code="out_of_memory")
        case "conflict":
            return ApiError(409, message, code="table_conflict")
        case "table":
            return ApiError(500, message, type="table_error", code="table_error")
    return ApiError(500, message, code="engine_error")


def from_validation(errors: list[Any]) -> ApiError:
    """The first thing wrong with a request body, in one line that names the field."""
    first = errors[0]
    context = first.get("ctx") or {}
    # Parts that start with "~" name a union's branch, not something the client wrote; "body" is FastAPI's.
    path = [part for part in first["loc"][1:] if not str(part).startswith("~")]
    if "param" in context:
        path.append(context["param"])
    if first["type"] == "json_invalid":
        return bad_request(None, f"the body is no valid JSON: {context.get('error', first['msg'])}")
    if not path:
        return bad_request(None, "the body must be a JSON object, sent with content-type application/json")
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
    param = str(path[0])
    if first["type"] == "extra_forbidden":
        return bad_request(param, f"{name}: there is no such field")
    if first["type"] == "missing":
        return bad_request(param, f"{name} is missing")
    return bad_request(param, f"{name}: {first['msg'].removeprefix('Value error, ')}")


def to_api_error(error: Exception) -> ApiError:
    """The answer for anything that a route raised."""
    match error:
        case ApiError():
            return error
        case EngineError():
            return from_engine(error)
        case RequestValidationError():
            return from_validation(list(error.errors()))
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=error.headers)
    return ApiError(500, "internal error; the server's log says more")


async def _answer(_: Request, error: Exception) -> JSONResponse:
    return to_api_error(error).response()


def install(app: FastAPI) -> None:
    """Answer the errors that routes raise; what nobody expects is caught and logged by edge.Edge."""
    for kind in (ApiError, EngineError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _answer)


def to_event(error: ApiError) -> bytes:
    """The error as a server-sent event, for a stream that has begun."""
    return b"data: " + json.dumps(error.body()).encode() + b"\n\n"
