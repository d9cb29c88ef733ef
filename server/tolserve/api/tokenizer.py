"""A model directory as the API sees it: tokenizer, chat template, default sampling. No weights are read.

Only byte-level tokenizers are served (GPT-2's, LLaMA 3's, and what `tolserve train` writes): there a token is a fixed
string of bytes, so text can be streamed and cut exactly. `clean_up_tokenization_spaces` is not applied: it would make
the text differ from the tokens.
"""

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tolserve.api.template import ChatTemplate

# Encoding runs at about 2 MB/s: 4,096 characters hold the event loop for 2 ms, longer texts are encoded in a thread.
INLINE_CHARACTERS = 4096


class ModelFilesError(ValueError):
    """A model directory that cannot be served; the message names the file and says what is wrong."""


class NotOneTokenError(ValueError):
    """A text that stands where one token is asked for; the message names its tokens."""


@dataclass(frozen=True)
class Prompt:
    """Token ids, and the positions that the tokenizer's post-processor put there: an echo leaves those out."""

    ids: tuple[int, ...]
    added: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Defaults:
    """Sampling where a request says nothing: generation_config.json, else plain sampling."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes a byte as a printable character: itself if it is one, else the next free one from 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_of_character()


class ModelTokenizer:
    """Text to token ids and back. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises ModelFilesError unless the decoder is byte-level."""
        decoder = json.loads(tokenizer.to_str())["decoder"] or {}
        if decoder.get("type") != "ByteLevel":
            raise ModelFilesError("only byte-level tokenizers (decoder ByteLevel) are supported")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._bytes: dict[int, bytes] = {}

    @property
    def largest_id(self) -> int:
        return max(self._tokenizer.get_vocab().values())

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Prompt:
        encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        added = frozenset(i for i, special in enumerate(encoding.special_tokens_mask) if special)
        return Prompt(tuple(encoding.ids), added)

    async def encode_async(self, text: str, *, add_special_tokens: bool = True) -> Prompt:
        """The same without holding the event loop for long."""
        if len(text) <= INLINE_CHARACTERS:
            return self.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.encode, text, add_special_tokens=add_special_tokens)

    def only_id(self, text: str) -> int:
        """The token that a text is. Raises NotOneTokenError."""
        if len(text) > INLINE_CHARACTERS:
            raise NotOneTokenError(f"the text has {len(text)} characters, and no token has so many")
        ids = self.encode(text, add_special_tokens=False).ids
        if len(ids) == 1:
            return ids[0]
        named = ", ".join(f"{token} {self.label(token)!r}" for token in ids[:16]) + (", ..." if len(ids) > 16 else "")
        raise NotOneTokenError(f"the text {f'is {len(ids)} tokens: {named}; give one of them' if ids else 'is empty'}")

    def id_of(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def is_special(self, token: int) -> bool:
        return token in self._special

    def to_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; none for an id that the model has and the tokenizer has not."""
        if token not in self._bytes:
            name = self.name(token)
            plain = all(character in _BYTE_OF for character in name)
            self._bytes[token] = bytes(_BYTE_OF[c] for c in name) if plain else name.encode()
        return self._bytes[token]

    def name(self, token: int) -> str:
        """The token as the vocabulary writes it ("Ġthe")."""
        return self._tokenizer.id_to_token(token) or ""

    def label(self, token: int) -> str:
        r"""The token as OpenAI's logprobs write it: its text, or `bytes:\xe2\x80` if it is no whole text."""
        data = self.to_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the tokens, special ones shown."""
        return b"".join(self.to_bytes(token) for token in tokens).decode(errors="replace")


@dataclass(frozen=True)
class ModelFiles:
    """What the API needs of a model directory."""

    tokenizer: ModelTokenizer
    template: ChatTemplate | None
    defaults: Defaults
    vocab_size: int
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: frozenset[int]

    @classmethod
    def load(cls, model_dir: Path) -> "ModelFiles":
        """Raises ModelFilesError when a needed file is missing or wrong. config.json is checked in full by the engine;
        here only its sizes are read."""
        if not model_dir.is_dir():
            raise ModelFilesError(f"{model_dir} is no model directory")
        config = _read_json(model_dir / "config.json")
        words = _read_json(model_dir / "tokenizer_config.json", optional=True)
        generation = _read_json(model_dir / "generation_config.json", optional=True)
        path = model_dir / "tokenizer.json"
        try:
            tokenizer = ModelTokenizer(Tokenizer.from_file(str(path)))
        except Exception as error:  # tokenizers raises nothing more special
            raise ModelFilesError(f"{path} cannot be used: {error}") from error
        vocab_size = _positive(config, "vocab_size", model_dir)
        if tokenizer.largest_id >= vocab_size:
            raise ModelFilesError(f"{path} has token {tokenizer.largest_id}; the model's vocab_size is {vocab_size}")
        bos = _token_name(words.get("bos_token"))
        return cls(
            tokenizer,
            ChatTemplate.load(model_dir, words),
            _defaults(generation, model_dir),
            vocab_size,
            _positive(config, "max_position_embeddings", model_dir),
            tokenizer.id_of(bos) if bos else config.get("bos_token_id"),
            _ids(config.get("eos_token_id")) | _ids(generation.get("eos_token_id")),
        )


def _read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        if optional:
            return {}
        raise ModelFilesError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"{path} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise ModelFilesError(f"{path} holds no JSON object")
    return raw


def _positive(config: dict[str, Any], key: str, model_dir: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ModelFilesError(f"{model_dir / 'config.json'}: {key} is {value!r}; it must be a positive integer")
    return value


def _ids(value: Any) -> frozenset[int]:
    return frozenset([value] if isinstance(value, int) else value or [])


def _token_name(value: Any) -> str | None:
    """tokenizer_config.json gives a special token as its text or as an object with a `content`."""
    name = value.get("content") if isinstance(value, dict) else value
    return name if isinstance(name, str) else None


def _defaults(generation: dict[str, Any], model_dir: Path) -> Defaults:
    limits = {"temperature": (0, 2), "top_p": (0, 1), "top_k": (0, 2**31)}
    given = {name: generation[name] for name in limits if generation.get(name) is not None}
    for name, value in given.items():
        low, high = limits[name]
        if not isinstance(value, int | float) or not low <= value <= high:
            raise ModelFilesError(
                f"{model_dir / 'generation_config.json'}: {name} is {value!r}; it must be {low}..{high}"
            )
    return Defaults(**given)
