"""POST /v1/completions."""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from tolserve.api.detokenize import Utf8Decoder
from tolserve.api.errors import bad_request
from tolserve.api.generation import Answer, Piece, UsageCount, respond
from tolserve.api.logprobs import completion_logprobs
from tolserve.api.schemas import CompletionRequest
from tolserve.api.state import Server, server_of
from tolserve.api.tokenizer import ModelTokenizer, Prompt
from tolserve.engine.request import TokenLogprob

DEFAULT_MAX_TOKENS = 16  # OpenAI's

router = APIRouter()


class CompletionShape:
    """Writes choices as text, the prompt first if `echo` asks for it."""

    id_prefix = "cmpl-"
    whole_object = chunk_object = "text_completion"

    def __init__(self, tokenizer: ModelTokenizer, prompts: Sequence[Prompt], n: int, echo: bool, logprobs: bool):
        self._tokenizer, self._prompts, self._n = tokenizer, prompts, n
        self._echo, self._logprobs = echo, logprobs
        self._shift: dict[int, int] = {}  # choice -> characters of its echoed prompt, once that is written

    def whole(self, index: int, piece: Piece) -> dict[str, Any]:
        echo = self._echo and index not in self._shift
        prompt = self._prompts[index // self._n] if echo else Prompt(())
        prompt_text, prompt_offsets = lay_out(self._tokenizer, prompt) if echo else ("", [])
        shift = self._shift.setdefault(index, len(prompt_text))
        logprobs = None
        if self._logprobs:
            entries: list[TokenLogprob | None] = [*(piece.prompt_logprobs or []), *piece.logprobs]
            offsets = prompt_offsets + [shift + offset for offset in piece.offsets]
            logprobs = completion_logprobs(self._tokenizer, [*prompt.ids, *piece.tokens], entries, offsets)
        return {
            "index": index,
            "text": prompt_text + piece.text,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
        }

    chunk = whole


def lay_out(tokenizer: ModelTokenizer, prompt: Prompt) -> tuple[str, list[int]]:
    """A prompt's text and where each token begins in it; tokens that the tokenizer added have no text."""
    decoder = Utf8Decoder()
    text, offsets = "", []
    for position, token in enumerate(prompt.ids):
        offsets.append(len(text))
        text += "" if position in prompt.added else decoder.push(tokenizer.to_bytes(token))
    return text + decoder.flush(), offsets


async def read_prompt(server: Server, item: str | list[int]) -> Prompt:
    """A prompt as token ids. An empty one becomes the begin-of-text token where the model has one."""
    if isinstance(item, str):
        prompt = await server.files.tokenizer.encode_async(item)
    else:
        server.require_known(item, "prompt")
        prompt = Prompt(tuple(item))
    if not prompt.ids and server.files.bos_token_id is not None:
        prompt = Prompt((server.files.bos_token_id,), frozenset({0}))
    if not prompt.ids:
        raise bad_request("prompt", "prompt: it has no tokens, and this model has no begin-of-text token")
    return prompt


@router.post("/v1/completions")
async def completions(
    body: CompletionRequest, http: HttpRequest, server: Annotated[Server, Depends(server_of)]
) -> Response:
    """Continue one or several prompts."""
    server.require_model(body.model)
    ready = server.require_ready()
    prompts = [await read_prompt(server, item) for item in body.prompt]
    fields = ("prompt", "max_tokens")
    sized = [(p, server.token_budget(p, body.max_tokens, DEFAULT_MAX_TOKENS, fields)) for p in prompts]
    echo = bool(body.echo)
    choices = server.make_choices(body, sized, body.logprobs, body.logprobs if echo else None)
    answer = Answer(
        server.settings.model_name,
        ready.fingerprint,
        CompletionShape(server.files.tokenizer, prompts, body.n or 1, echo, body.logprobs is not None),
        UsageCount(sum(len(prompt.ids) for prompt in prompts), body.n or 1),
        body.include_usage,
    )
    return await respond(http, server.engine, choices, answer, bool(body.stream))
