"""What a request asks of the engine and what comes back. Plain data: no torch, no wire library.

What comes back with every step is a NamedTuple: made in half a dataclass's time, and a short array on the wire.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. Values are checked by whoever builds this (the API, or a benchmark)."""

    max_tokens: int  # new tokens; 0 only scores the prompt
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0  # 0 <= seed < 2^64
    choice: int = 0  # which of a request's `n`; a draw depends on (seed, choice, position) alone
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; k: the token's own and the k best alternatives
    prompt_logprobs: int | None = None  # the same for the prompt's tokens
    token_hits: bool = False  # say of every token whether its record was in the device tier


@dataclass(frozen=True)
class Steering:
    """What a request changes of the rows that its tokens get: engine/steering.py has the formula."""

    alpha: tuple[float, ...]  # a number for each layer that its rows are multiplied by; 0 drops the layer
    edits: tuple[str, ...] = ()  # names of packs, which apply in this order


@dataclass(frozen=True)
class Request:
    """One sequence to continue. `n` choices or several prompts of one HTTP request are several of these."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    cache_salt: str | None = None  # keys and values are shared among requests of one salt, or of none
    steering: Steering | None = None


class TokenLogprob(NamedTuple):
    """Natural-log probability under the unscaled logits (before temperature and filters), and the best alternatives,
    most likely first, each (token id, logprob)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Usage(NamedTuple):
    """What a request used. A lookup is a distinct token id of the request in a step; a hit is one whose
    record was in the device tier when the step asked; `stall_ms` is the waiting of the steps it took part in.
    `cached_tokens` of the prompt had their keys and values already."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    lookups: int
    hits: int
    stall_ms: float


class Delta(NamedTuple):
    """New tokens of one sequence and what it has used so far (a client that stops at a string of text needs that at
    any time). `finish_reason` comes with the last one; `prompt_logprobs` (one entry per prompt token, the first None)
    with the first one. `token_hits` has an entry for each token that passed through the layers since the last delta,
    the prompt's first: a token sampled now gets its own with the next delta, the last one never. A token whose keys and
    values were there already has None: nothing was looked up. A finished request may carry no new token."""

    request_id: str
    tokens: list[int]
    usage: Usage
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    token_hits: list[bool | None] | None = None


FailureKind = Literal["invalid", "busy", "table", "engine", "dead", "stopping"]


@dataclass(frozen=True)
class Failure:
    """One request failed; others go on. `kind`: "invalid" is the client's doing, "busy" the queue's, "table" a record
    that could not be read, "engine" ours, "dead" that the engine process is gone, "stopping" that the server is."""

    request_id: str
    kind: FailureKind
    message: str
    param: str | None = None  # the request's field at fault, where it is one


@dataclass(frozen=True)
class PackView:
    """A memory pack of the server's folder. One that cannot be used has a `problem` instead of what it holds."""

    name: str
    entries: int | None
    bytes: int | None
    description: str | None
    loaded: bool
    problem: str | None
