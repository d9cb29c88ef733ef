"""POST /v1/chat/completions."""

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from tolserve.api.errors import bad_request
from tolserve.api.generation import Answer, Piece, UsageCount, respond
from tolserve.api.logprobs import chat_logprobs
from tolserve.api.schemas import ChatCompletionRequest, Message
from tolserve.api.state import Server, server_of
from tolserve.api.template import TemplateError
from tolserve.api.tokenizer import ModelTokenizer, Prompt

router = APIRouter()


class ChatShape:
    """Writes choices as assistant messages; a stream's first chunk of each choice carries the role."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, tokenizer: ModelTokenizer, logprobs: bool) -> None:
        self._tokenizer, self._logprobs = tokenizer, logprobs
        self._begun: set[int] = set()

    def whole(self, index: int, piece: Piece) -> dict[str, Any]:
        return self._choice(index, piece, {"message": {"role": "assistant", "content": piece.text, "refusal": None}})

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        delta: dict[str, Any] = {} if index in self._begun else {"role": "assistant"}
        self._begun.add(index)
        if piece.text or delta:
            delta["content"] = piece.text
        return self._choice(index, piece, {"delta": delta})

    def _choice(self, index: int, piece: Piece, content: dict[str, Any]) -> dict[str, Any]:
        logprobs = chat_logprobs(self._tokenizer, piece.logprobs) if self._logprobs else None
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": piece.finish_reason}


async def read_messages(
    server: Server, messages: Sequence[Message], add_generation_prompt: bool, add_special_tokens: bool = False
) -> Prompt:
    """Messages through the model's template to token ids; the template writes special tokens itself. Raises 400 for a
    model without a template, and for messages that it refuses."""
    template = server.files.template
    if template is None:
        raise bad_request("messages", "messages: this model has no chat template; use /v1/completions")
    plain = [message.to_template() for message in messages]
    try:
        text = await asyncio.to_thread(template.render, plain, add_generation_prompt)
    except TemplateError as error:
        raise bad_request("messages", f"messages: {error}") from error
    return await server.files.tokenizer.encode_async(text, add_special_tokens=add_special_tokens)


@router.post("/v1/chat/completions")
async def chat_completions(
    body: ChatCompletionRequest, http: HttpRequest, server: Annotated[Server, Depends(server_of)]
) -> Response:
    """Answer a conversation."""
    server.require_model(body.model)
    ready = server.require_ready()
    prompt = await read_messages(server, body.messages, body.add_generation_prompt)
    if not prompt.ids:
        raise bad_request("messages", "messages: they come to no tokens")
    newer = body.max_completion_tokens is not None
    asked = body.max_completion_tokens if newer else body.max_tokens
    fields = ("messages", "max_completion_tokens" if newer else "max_tokens")
    max_tokens = server.token_budget(prompt, asked, None, fields)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    answer = Answer(
        server.settings.model_name,
        ready.fingerprint,
        ChatShape(server.files.tokenizer, bool(body.logprobs)),
        UsageCount(len(prompt.ids), body.n or 1),
        body.include_usage,
    )
    choices = server.make_choices(body, [(prompt, max_tokens)], logprobs, None)
    return await respond(http, server.engine, choices, answer, bool(body.stream))
