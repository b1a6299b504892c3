"""Chat messages → prompt text, through the model's own template in an immutable sandbox. Pure.

The template comes from the operator's model, never from a request.
"""

import json
from collections.abc import Sequence
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shared.messages import ChatMessage
from shared.vocab import Vocab


class BadChat(ValueError):
    """The model's template refuses these messages; the text is the template's own."""


def _refuse(message: str) -> NoReturn:
    raise BadChat(message)


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


class ChatTemplate:
    """Raises ValueError at construction when the model's template is not jinja2."""

    def __init__(self, vocab: Vocab) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        self._special = {"bos_token": vocab.bos, "eos_token": vocab.eos}
        try:
            self._template = environment.from_string(vocab.template) if vocab.template else None
        except TemplateError as error:
            raise ValueError(f"the model's chat template does not compile: {error}") from error

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The prompt, up to where the assistant speaks. Raises BadChat."""
        if self._template is None:
            raise BadChat("this model has no chat template; use /v1/completions")
        plain = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._template.render(messages=plain, add_generation_prompt=True, **self._special)
        except (TemplateError, TypeError, ArithmeticError, LookupError) as error:
            raise BadChat(f"the model's chat template refuses these messages: {error}") from error
