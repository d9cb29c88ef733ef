"""Log-probabilities as OpenAI's two endpoints write them."""

from collections.abc import Sequence
from typing import Any

from tolserve.api.tokenizer import ModelTokenizer
from tolserve.engine.request import TokenLogprob

# JSON has no minus infinity; vLLM's stand-in, which clients know.
LEAST_LOGPROB = -9999.0


def _bounded(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def completion_logprobs(
    tokenizer: ModelTokenizer,
    tokens: Sequence[int],
    logprobs: Sequence[TokenLogprob | None],
    offsets: Sequence[int],
) -> dict[str, list[Any]]:
    """The completions form: parallel lists. `top_logprobs` always has the token itself; a prompt's first token, which
    nothing predicts, has null."""
    tops: list[dict[str, float] | None] = []
    for entry in logprobs:
        if entry is None:
            tops.append(None)
            continue
        top = {tokenizer.label(entry.token): _bounded(entry.logprob)}
        for token, logprob in entry.top:
            top.setdefault(tokenizer.label(token), _bounded(logprob))
        tops.append(top)
    return {
        "tokens": [tokenizer.label(token) for token in tokens],
        "token_logprobs": [None if entry is None else _bounded(entry.logprob) for entry in logprobs],
        "top_logprobs": tops,
        "text_offset": list(offsets),
    }


def chat_logprobs(tokenizer: ModelTokenizer, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The chat form: one object per token, with its bytes and its alternatives, most likely first."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.to_bytes(token)
        return {"token": tokenizer.label(token), "logprob": _bounded(logprob), "bytes": list(data)}

    content = [
        entry(item.token, item.logprob) | {"top_logprobs": [entry(*alternative) for alternative in item.top]}
        for item in logprobs
    ]
    return {"content": content, "refusal": None}
