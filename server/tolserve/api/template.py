"""Chat messages to a prompt, by the model's own template in a sandbox: a template is code that came with a download."""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment


class TemplateError(ValueError):
    """A template that cannot be used, or messages that it cannot lay out."""


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


class ChatTemplate:
    """A Jinja template with the names that Hugging Face templates use: messages, add_generation_prompt, bos_token,
    eos_token, raise_exception, strftime_now and the tojson filter."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        """Raises TemplateError for a template that is no Jinja."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"the chat template is no Jinja: {error}") from error
        self._special_tokens = special_tokens

    @classmethod
    def load(cls, model_dir: Path, tokenizer_config: dict[str, Any]) -> "ChatTemplate | None":
        """chat_template.jinja, else tokenizer_config.json's chat_template; None for a model that has neither."""
        file = model_dir / "chat_template.jinja"
        source = file.read_text() if file.exists() else tokenizer_config.get("chat_template")
        if isinstance(source, list):
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default")
        if not isinstance(source, str):
            return None
        special = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = tokenizer_config.get(name)
            special[name] = value.get("content", "") if isinstance(value, dict) else value or ""
        return cls(source, special)

    def render(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt as text. Raises TemplateError when the template refuses the messages or breaks on them."""
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self._special_tokens
            )
        except (jinja2.exceptions.TemplateError, TypeError, ArithmeticError, LookupError, OverflowError) as error:
            raise TemplateError(f"the model's chat template failed: {error}") from error
