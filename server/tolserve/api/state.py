"""What the routes share, and the checks that every generating request passes before work starts."""

import secrets
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastapi import Request as HttpRequest

from tolserve.api.errors import ApiError, bad_request
from tolserve.api.generation import Choice, ChoiceText
from tolserve.api.schemas import Sampling, TolOptions
from tolserve.api.tokenizer import ModelFiles, Prompt
from tolserve.engine.client import EngineClient
from tolserve.engine.messages import Ready
from tolserve.engine.request import Request, SamplingParams, Steering
from tolserve.logs import current_request
from tolserve.metrics import Metrics, ProcessGauges
from tolserve.settings import ServeSettings


@dataclass
class Server:
    """One API worker: its options, the model's files, the connection to the engine, its own metrics."""

    settings: ServeSettings
    files: ModelFiles
    engine: EngineClient
    metrics: Metrics = field(default_factory=Metrics)
    stopping_since: float | None = None  # monotonic; set by the first SIGTERM
    looks: int = 0  # into the memory, that wait for the engine
    started: int = field(default_factory=lambda: int(time.time()))  # seconds since 1970

    def __post_init__(self) -> None:
        self.process = ProcessGauges(self.metrics, "api")
        self.metrics.gauge("start_time_seconds", "When the server started, in seconds since 1970.").set(self.started)
        self.tasks = self.metrics.gauge("api_tasks", "Tasks of the API's event loop.")

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together; before the engine is ready, what it is going to say."""
        if self.engine.ready is not None:
            return self.engine.ready.max_model_len
        return self.settings.max_model_len or self.files.max_position_embeddings

    def require_ready(self) -> Ready:
        """Raises 503 while the server stops, while the model loads, and from an engine's end to the next one."""
        if self.stopping_since is not None:
            # A closed connection makes the client's next attempt find another server behind the same address.
            raise ApiError(503, "the server is stopping", code="stopping", headers={"connection": "close"})
        if not self.engine.alive:
            raise ApiError(503, self.engine.failure or "the engine is gone", code="engine_dead")
        if self.engine.ready is None:
            raise ApiError(503, "the model is still loading", code="not_ready")
        return self.engine.ready

    def require_model(self, name: str | None) -> None:
        """Raises 404 for a model that is not served; None asks for the one that is."""
        if name is not None and name != self.settings.model_name:
            raise ApiError(
                404, f"the model {name!r} does not exist; see /v1/models", param="model", code="model_not_found"
            )

    def require_known(self, tokens: Sequence[int], param: str) -> None:
        """Raises 400 for a token id outside the vocabulary."""
        if any(token >= self.files.vocab_size for token in tokens):
            raise bad_request(param, f"{param}: token ids must be below {self.files.vocab_size}")

    def token_budget(self, prompt: Prompt, asked: int | None, default: int | None, params: tuple[str, str]) -> int:
        """How many tokens may follow a prompt: what was asked for, else the default, else what fits.

        `params` names the prompt's and the limit's request fields. Raises 400 for what does not fit.
        """
        room = self.max_model_len - len(prompt.ids)
        if room < (0 if asked == 0 else 1):
            raise bad_request(
                params[0],
                f"{params[0]}: {len(prompt.ids)} tokens leave no room for an answer; this model's context is "
                f"{self.max_model_len} tokens",
                "context_length_exceeded",
            )
        if asked is None:
            return room if default is None else min(default, room)
        if asked > room:
            raise bad_request(
                params[1],
                f"{params[1]}: {asked} is too large; {len(prompt.ids)} prompt tokens leave {room} of "
                f"{self.max_model_len}",
                "context_length_exceeded",
            )
        return asked

    def make_choices(
        self, body: Sampling, prompts: Sequence[tuple[Prompt, int]], logprobs: int | None, prompt_logprobs: int | None
    ) -> list[Choice]:
        """`body.n` sequences for each (prompt, max_tokens), numbered prompt by prompt."""
        self.require_known(body.stop_token_ids or [], "stop_token_ids")
        if body.token_hits and self.require_ready().encoding is None:
            raise bad_request("tol", "tol.token_hits: this model has no table")
        steering = self.steering(body.tol) if body.tol is not None else None
        # The HTTP request's id comes first, so that log lines can be joined. A client may reuse its own ids, but the
        # engine must never see one twice.
        group = f"{current_request.get() or ''}/{uuid.uuid4().hex}"
        seed = secrets.randbits(64) if body.seed is None else body.seed % 2**64
        choices: list[Choice] = []
        for prompt, max_tokens in prompts:
            for choice in range(body.n or 1):
                params = self._sampling(body, max_tokens, seed, choice, logprobs, prompt_logprobs)
                index = len(choices)
                text = ChoiceText(
                    self.files.tokenizer,
                    body.stop or (),
                    frozenset(params.stop_token_ids) | self.files.eos_token_ids,
                    bool(body.include_stop_str_in_output),
                )
                request = Request(f"{group}-{index}", prompt.ids, params, body.cache_salt, steering)
                choices.append(Choice(index, request, text))
        return choices

    def steering(self, tol: TolOptions) -> Steering | None:
        """What a request asks to change of the rows; None for nothing. Raises 400 for a model without a table, and for
        layers that it does not have. The engine looks for the packs."""
        if tol.alpha is None and not tol.drop_layers and not tol.edits:
            return None
        ready = self.require_ready()
        if ready.encoding is None:
            field = "alpha" if tol.alpha is not None else "drop_layers" if tol.drop_layers else "edits"
            raise bad_request("tol", f"tol.{field}: this model has no table")
        count = ready.num_layers
        alpha = tol.alpha if isinstance(tol.alpha, list) else [1.0 if tol.alpha is None else tol.alpha] * count
        if len(alpha) != count:
            raise bad_request("tol", f"tol.alpha: it has {len(alpha)} numbers, and the model {count} layers")
        dropped = tol.drop_layers or []
        if any(layer >= count for layer in dropped):
            raise bad_request("tol", f"tol.drop_layers: layers are numbered from 0 to {count - 1}")
        numbers = tuple(0.0 if layer in dropped else float(number) for layer, number in enumerate(alpha))
        return Steering(numbers, tuple(tol.edits or ())) if tol.edits or set(numbers) != {1.0} else None

    def _sampling(
        self, body: Sampling, max_tokens: int, seed: int, choice: int, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        defaults = self.files.defaults
        stops = set(body.stop_token_ids or ())
        if not body.ignore_eos:
            stops |= self.files.eos_token_ids
        top_k = defaults.top_k if body.top_k is None else max(body.top_k, 0)
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=defaults.temperature if body.temperature is None else body.temperature,
            top_k=min(top_k, self.files.vocab_size),
            top_p=defaults.top_p if body.top_p is None else body.top_p,
            min_p=body.min_p or 0.0,
            seed=seed,
            choice=choice,
            stop_token_ids=tuple(sorted(stops)),
            ignore_eos=bool(body.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            token_hits=body.token_hits,
        )


async def server_of(http: HttpRequest) -> Server:
    """The FastAPI dependency that hands the state to a route; async, since a plain one would cost a thread hop."""
    server: Server = http.app.state.server
    return server
