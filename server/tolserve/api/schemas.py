"""What clients may send. Strict: no field is ignored, no text becomes a number, no bound is left open.

Field meanings: OpenAI's API reference; `top_k`, `min_p`, `ignore_eos`, `stop_token_ids`,
`include_stop_str_in_output`, `cache_salt` and the /tokenize shapes: vLLM's OpenAI-compatible server.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from tolserve.api.detokenize import MAX_STOP_CHARACTERS

# Bounds on what one request can multiply. n, logprobs and stop are at or above OpenAI's own (128, 20 and 4 there, but
# each of our choices is a sequence in the engine); 128 prompts are what evaluation harnesses batch at most.
MAX_N = 16
MAX_PROMPTS = 128
MAX_SEQUENCES = 128
MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_MESSAGES = 4096
# What is larger is a slip: the paper goes from 1 down to 0.5. No model has so many layers.
MAX_ALPHA = 8
MAX_LAYERS = 1024
MAX_EDITS = 4  # each takes 2 to 8% of a step of the demo model, benchmarks/results/steering-demo-cpu-*.json
MAX_SALT_CHARACTERS = 256  # as long as any token or hash that somebody would take for it

# Fields of OpenAI's and vLLM's interfaces that are not served yet, with the values that ask for nothing; null is one
# for all of them. Anything else is refused by name.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "add_special_tokens": (),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "length_penalty": (1, 1.0),
    "logit_bias": ({},),
    "logprob_token_ids": (),
    "metadata": ({},),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "presence_penalty": (0, 0.0),
    "priority": (0,),
    "prompt_cache_key": (),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1, 1.0),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
# What a client sends back of an earlier answer's message, and of stream_options.
_NEUTRAL_IN_MESSAGE: Mapping[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "reasoning": (),
    "reasoning_content": (),
    "refusal": (),
    "tool_calls": ([],),
}
_NEUTRAL_IN_STREAM_OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "continuous_usage_stats": (False,),
    "include_obfuscation": (False,),
}


class Wire(BaseModel):
    """Base of all request bodies; `neutral` lists the fields that are taken only at a value that asks for nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        kept = {}
        for name, value in raw.items():
            if name in cls.model_fields or name not in cls.neutral:
                kept[name] = value
            elif value is not None and not any(_same(value, allowed) for allowed in cls.neutral[name]):
                raise PydanticCustomError("unsupported", "this is not supported yet; leave it out", {"param": name})
        return kept


def _same(value: Any, allowed: Any) -> bool:
    return type(value) is type(allowed) and bool(value == allowed)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_prompts(value: Any) -> Any:
    """One prompt, as text or as token ids, becomes a list of one."""
    if isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], int)):
        return [value]
    return value


def _encodable(text: str) -> str:
    """JSON can write half of a surrogate pair ("\\ud800"), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be Unicode text, without lone surrogates") from None
    return text


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Text = Annotated[str, AfterValidator(_encodable)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
PromptItem = Annotated[
    Annotated[Text, Tag("~text")] | Annotated[list[TokenId], Tag("~tokens")],
    Discriminator(lambda value: "~text" if isinstance(value, str) else "~tokens"),
]


class StreamOptions(Wire):
    neutral = _NEUTRAL_IN_STREAM_OPTIONS
    include_usage: bool | None = None


Alpha = Annotated[float, Field(ge=-MAX_ALPHA, le=MAX_ALPHA)]
LayerIndex = Annotated[int, Field(ge=0, lt=MAX_LAYERS)]
PackName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,100}$")]


class TolOptions(Wire):
    """What a request asks of the table."""

    alpha: (
        Annotated[
            Annotated[Alpha, Tag("~number")] | Annotated[list[Alpha], Field(max_length=MAX_LAYERS), Tag("~list")],
            Discriminator(lambda value: "~list" if isinstance(value, list) else "~number"),
        ]
        | None
    ) = Field(None, description="what all rows are multiplied by, or a number for each layer; 1 if not given")
    drop_layers: Annotated[list[LayerIndex], Field(max_length=MAX_LAYERS)] | None = Field(
        None, description="layers whose rows are left out"
    )
    edits: Annotated[list[PackName], Field(max_length=MAX_EDITS), BeforeValidator(_as_list)] | None = Field(
        None, description="names of memory packs, which apply in this order"
    )
    token_hits: bool | None = Field(None, description="say of each token whether its record was in the device tier")


class Sampling(Wire):
    """What completions and chat completions have in common. null means the default everywhere."""

    neutral = NEUTRAL

    model: str
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(None, description="0 and -1 keep all tokens")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = Field(None, description="taken modulo 2^64")
    stop: Annotated[list[StopString], Field(max_length=MAX_STOPS), BeforeValidator(_as_list)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    tol: TolOptions | None = None
    cache_salt: Annotated[Text, Field(min_length=1, max_length=MAX_SALT_CHARACTERS)] | None = Field(
        None, description="what was computed for a prompt is used again for requests of the same salt alone"
    )
    user: str | None = Field(None, description="an identifier of the client's own; it has no effect")

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("needs_stream", "only allowed with stream: true", {"param": "stream_options"})
        return self

    @property
    def token_hits(self) -> bool:
        return self.tol is not None and bool(self.tol.token_hits)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionRequest(Sampling):
    prompt: Annotated[list[PromptItem], Field(min_length=1, max_length=MAX_PROMPTS), BeforeValidator(_as_prompts)]
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(None, description="16 if not given")
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _check_sequences(self) -> Self:
        if len(self.prompt) * (self.n or 1) > MAX_SEQUENCES:
            raise PydanticCustomError(
                "too_many", f"n times the number of prompts must be at most {MAX_SEQUENCES}", {"param": "n"}
            )
        return self


class TextPart(Wire):
    type: Literal["text"]
    text: Text


class Message(Wire):
    neutral = _NEUTRAL_IN_MESSAGE

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_as_parts)]

    def to_template(self) -> dict[str, str]:
        """Text parts run together; "developer" is OpenAI's newer word for "system", and templates know the older."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "".join(part.text for part in self.content)}


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


class ChatCompletionRequest(Sampling):
    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(None, description="what fits if not given")
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("needs_logprobs", "only allowed with logprobs: true", {"param": "top_logprobs"})
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise PydanticCustomError("both", "give this or max_tokens, not both", {"param": "max_completion_tokens"})
        return self


class TokenizeRequest(Wire):
    """Either `prompt` or `messages`."""

    model: str | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(None, description="true for a prompt, false for messages if not given")
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None

    neutral = {"chat_template": (), "chat_template_kwargs": ({},), "continue_final_message": (False,), "tools": ([],)}

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("one_of", "give exactly one of prompt and messages", {"param": "prompt"})
        return self


class AttributionRequest(Wire):
    """A prompt whose logits are taken apart."""

    model: str
    prompt: PromptItem
    targets: Annotated[
        Annotated[Literal["next"], Tag("~next")] | Annotated[list[TokenId], Tag("~tokens")],
        Discriminator(lambda value: "~next" if isinstance(value, str) else "~tokens"),
    ] = Field("next", description="the token that comes next, at the end the best one; or an id for each position")
    against: (
        Annotated[
            Annotated[Text, Tag("~text")] | Annotated[TokenId, Tag("~token")],
            Discriminator(lambda value: "~text" if isinstance(value, str) else "~token"),
        ]
        | None
    ) = Field(None, description="id or text of one token, whose logit is taken off the target's")


CacheWords = Annotated[str, Field(min_length=1, max_length=40, description="as the option: 4096, 2GiB or 10%")]


class CacheRequest(Wire):
    """New sizes of the tiers; one that is not given stays."""

    device_cache: CacheWords | None = None
    host_cache: CacheWords | None = None

    @model_validator(mode="after")
    def _check_any(self) -> Self:
        if self.device_cache is None and self.host_cache is None:
            raise PydanticCustomError("any_of", "give this, host_cache or both", {"param": "device_cache"})
        return self


class ReopenRequest(Wire):
    """Nothing can be asked for: the table is the one that the server was started with."""


class DetokenizeRequest(Wire):
    model: str | None = None
    tokens: list[TokenId]
