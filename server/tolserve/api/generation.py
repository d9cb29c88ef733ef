"""From engine deltas to an HTTP answer, shared by completions and chat: text, choices side by side, streaming."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tolserve.api.detokenize import StopMatcher, Utf8Decoder
from tolserve.api.errors import ApiError, to_api_error, to_event
from tolserve.api.tokenizer import ModelTokenizer
from tolserve.engine.client import EngineClient, EngineError
from tolserve.engine.request import Delta, FinishReason, Request, TokenLogprob, Usage

T = TypeVar("T")

_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # json.dumps makes one at every call


@dataclass
class Piece:
    """The next part of one choice. `offsets` give where each token begins in the choice's own text, in characters
    (before a stop string cuts it); `finish_reason` comes last, `usage` is the choice's so far."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    token_hits: list[bool | None] | None = None

    def extend(self, later: "Piece") -> None:
        self.text += later.text
        self.tokens += later.tokens
        self.offsets += later.offsets
        self.logprobs += later.logprobs
        self.prompt_logprobs = self.prompt_logprobs or later.prompt_logprobs
        if later.token_hits is not None:
            self.token_hits = [*(self.token_hits or []), *later.token_hits]
        self.finish_reason, self.usage = later.finish_reason, later.usage


class ChoiceText:
    """One choice's deltas to pieces: detokenised, special tokens left out, cut at the first stop string."""

    def __init__(
        self, tokenizer: ModelTokenizer, stops: Sequence[str], stop_ids: frozenset[int], include_stop: bool
    ) -> None:
        """`stop_ids` are the tokens that end a choice; like stop strings they are shown only with `include_stop`."""
        self._tokenizer = tokenizer
        self._stop_ids = frozenset() if include_stop else stop_ids
        self._decoder = Utf8Decoder()
        self._matcher = StopMatcher(stops, include_stop)
        self._length = 0
        self._pending = Piece()

    def feed(self, delta: Delta) -> Piece | None:
        """The next piece; None while there is no certain text to show (what came is part of a later piece)."""
        piece = self._pending
        piece.prompt_logprobs = piece.prompt_logprobs or delta.prompt_logprobs
        if delta.token_hits is not None:
            piece.token_hits = [*(piece.token_hits or []), *delta.token_hits]
        ended = delta.finish_reason == "stop"
        for i, token in enumerate(delta.tokens):
            hidden = ended and i == len(delta.tokens) - 1 and token in self._stop_ids
            piece.tokens.append(token)
            piece.offsets.append(self._length)
            if delta.logprobs is not None:
                piece.logprobs.append(delta.logprobs[i])
            self._show(piece, "" if hidden or self._tokenizer.is_special(token) else self._decode(token))
            if self._matcher.matched:
                break
        if delta.finish_reason is not None and not self._matcher.matched:
            self._show(piece, self._decoder.flush())
            piece.text += self._matcher.flush()
        piece.finish_reason = "stop" if self._matcher.matched else delta.finish_reason
        piece.usage = delta.usage
        if not piece.text and piece.finish_reason is None:
            return None
        self._pending = Piece()
        return piece

    def _decode(self, token: int) -> str:
        return self._decoder.push(self._tokenizer.to_bytes(token))

    def _show(self, piece: Piece, text: str) -> None:
        self._length += len(text)
        piece.text += self._matcher.push(text)


Pieces = AsyncGenerator[tuple[int, Piece], None]  # (choice index, piece)


@dataclass(frozen=True)
class Choice:
    """One sequence of an HTTP request."""

    index: int
    request: Request
    text: ChoiceText


async def run_choices(engine: EngineClient, choices: Sequence[Choice]) -> Pieces:
    """All choices side by side: (index, piece) as they come. Raises EngineError as soon as one fails; leaving early,
    for whatever reason, aborts what still runs."""
    queue: asyncio.Queue[tuple[int, Piece] | Exception] = asyncio.Queue()

    async def pump(choice: Choice) -> None:
        try:
            async with aclosing(engine.generate(choice.request)) as deltas:
                async for delta in deltas:
                    if (piece := choice.text.feed(delta)) is None:
                        continue
                    queue.put_nowait((choice.index, piece))
                    if piece.finish_reason is not None:
                        return
        except Exception as error:  # noqa: BLE001  (raised below, where someone listens)
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(choice)) for choice in choices]
    try:
        unfinished = len(choices)
        while unfinished:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            unfinished -= item[1].finish_reason is not None
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class UsageCount:
    """Summed over a request's choices; a prompt counts once however many choices continue it, and what of it was cached
    is what was for all of them."""

    def __init__(self, prompt_tokens: int, n: int) -> None:
        """`prompt_tokens` of all prompts together, each of which `n` choices continue."""
        self._prompt_tokens, self._n = prompt_tokens, n
        self._cached_tokens: dict[int, int] = {}  # by prompt
        self._completion_tokens = 0
        self._lookups, self._hits, self._stall_ms = 0, 0, 0.0

    def add(self, index: int, piece: Piece) -> None:
        """Count the next piece of a choice."""
        self._completion_tokens += len(piece.tokens)
        if piece.finish_reason is not None and piece.usage is not None:
            prompt, cached = index // self._n, piece.usage.cached_tokens
            self._cached_tokens[prompt] = min(cached, self._cached_tokens.get(prompt, cached))
            self._lookups += piece.usage.lookups
            self._hits += piece.usage.hits
            self._stall_ms += piece.usage.stall_ms

    def to_json(self) -> dict[str, Any]:
        tol = {"lookups": self._lookups, "hits": self._hits, "stall_ms": round(self._stall_ms, 3)}
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens.values())},
            "tol": tol,
        }


class Shape(Protocol):
    """How an endpoint writes a choice."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def whole(self, index: int, piece: Piece) -> dict[str, Any]: ...

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """Called with a choice's pieces in order."""
        ...


@dataclass
class Answer:
    """One HTTP answer: its fixed fields, its usage and the shape of its choices."""

    model: str
    fingerprint: str | None
    shape: Shape
    usage: UsageCount
    include_usage: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)  # without the shape's prefix
    created: int = field(default_factory=lambda: int(time.time()))

    def _choice(self, choice: dict[str, Any], piece: Piece) -> dict[str, Any]:
        return choice if piece.token_hits is None else choice | {"tol": {"hits": piece.token_hits}}

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.shape.id_prefix + self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"tol-{self.fingerprint[:12]}" if self.fingerprint else None,
            "choices": choices,
        }

    def whole(self, pieces: dict[int, Piece]) -> dict[str, Any]:
        choices = [self._choice(self.shape.whole(index, pieces[index]), pieces[index]) for index in sorted(pieces)]
        return self._envelope(self.shape.whole_object, choices) | {"usage": self.usage.to_json()}

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        body = self._envelope(self.shape.chunk_object, [self._choice(self.shape.chunk(index, piece), piece)])
        return body | {"usage": None} if self.include_usage else body

    def usage_chunk(self) -> dict[str, Any]:
        return self._envelope(self.shape.chunk_object, []) | {"usage": self.usage.to_json()}


async def respond(
    http: HttpRequest, engine: EngineClient, choices: Sequence[Choice], answer: Answer, stream: bool
) -> Response:
    """Run the choices and answer. Errors known before the first text have their own status, streaming or not."""
    http.state.usage = answer.usage  # for the log line of the request
    pieces = run_choices(engine, choices)
    if not stream:
        collected = await until_disconnect(http, _collect(pieces, answer))
        return JSONResponse(answer.whole(collected))
    first = await until_disconnect(http, anext(pieces))
    return EventStream(pieces, _events(http, first, pieces, answer))


async def _collect(pieces: Pieces, answer: Answer) -> dict[int, Piece]:
    collected: dict[int, Piece] = {}
    async with aclosing(pieces):
        async for index, piece in pieces:
            answer.usage.add(index, piece)
            collected.setdefault(index, Piece()).extend(piece)
    return collected


async def _events(http: HttpRequest, first: tuple[int, Piece], rest: Pieces, answer: Answer) -> AsyncIterator[bytes]:
    """Server-sent events: a chunk per piece, then usage if asked for, then [DONE]; an error ends the stream, and is
    noted in `http.state.error`, because the answer's status was sent before."""
    item: tuple[int, Piece] | None = first
    try:
        while item is not None:
            answer.usage.add(*item)
            yield _event(answer.chunk(*item))
            item = await anext(rest, None)
    except EngineError as error:
        http.state.error = error.kind
        yield to_event(to_api_error(error))
        return
    if answer.include_usage:
        yield _event(answer.usage_chunk())
    yield b"data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + _to_json(body).encode() + b"\n\n"


class EventStream(StreamingResponse):
    """A server-sent event stream that closes its source even if the client left before the first byte."""

    def __init__(self, source: Pieces, events: AsyncIterator[bytes]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._source.aclose()


async def until_disconnect(http: HttpRequest, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away first."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "the client closed the connection")
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
