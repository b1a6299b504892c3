"""Prompts that the operator has declared public: whoever begins with one shares its pages with all tenants. Pure.

Whether such a beginning is computed already tells a tenant only what the operator's own prompts are used for. Everything
behind it is salted with the tenant as before, and the last full block of a prompt always is, so that what an engine adds to
the chain is private.
"""

import json
from bisect import bisect_left
from collections.abc import Callable, Sequence

from services.tokenizer.template import BadChat, ChatTemplate
from shared.blocks import chain, extend
from shared.messages import ChatMessage

MAX_PREFIXES = 64


class BadPrefixes(ValueError):
    """The operator's file is not what it should be."""


def read(text: str) -> list[str]:
    """A JSON list of texts: system prompts, and beginnings of plain prompts. Raises BadPrefixes."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise BadPrefixes(f"not JSON: {error}") from error
    if not isinstance(found, list) or not all(isinstance(item, str) and item for item in found):
        raise BadPrefixes("not a list of texts")
    if len(found) > MAX_PREFIXES:
        raise BadPrefixes(f"more than {MAX_PREFIXES} texts")
    return found


class PublicPrefixes:
    """`encode` gives the packed ids of a text, with the special tokens that the model adds, or as a template has them."""

    def __init__(self, texts: Sequence[str], template: ChatTemplate, encode: Callable[[str, bool], bytes]) -> None:
        self._ids = [encode(text, True) for text in texts]
        for text in texts:
            try:
                chats = [_chat(template, text, said) for said in ("a", "0")]
            except BadChat:
                continue
            self._ids.append(_common(*(encode(chat, False) for chat in chats)))

    def blocks(self, ids: bytes, block_size: int) -> int:
        """How many full blocks of a prompt are public."""
        width = 4 * block_size
        longest = max((_same_blocks(ids, public, width) for public in self._ids), default=0)
        return max(0, min(longest, len(ids) // width - 1))


def _chat(template: ChatTemplate, system: str, said: str) -> str:
    return template.render([ChatMessage(role="system", content=system), ChatMessage(role="user", content=said)])


def _common(one: bytes, other: bytes) -> bytes:
    """The tokens that both begin with."""
    size = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[: size // 4 * 4]


def _same_blocks(one: bytes, other: bytes, width: int) -> int:
    most = min(len(one), len(other)) // width
    return bisect_left(range(1, most + 1), True, key=lambda blocks: one[: blocks * width] != other[: blocks * width])


def part_public(common: bytes, own: bytes, ids: bytes, block_size: int, public: int) -> list[bytes]:
    """A chain whose first `public` blocks hang on the root of all tenants, and the others on the tenant's own as well."""
    cut = 4 * block_size * public
    first = chain(common, ids[:cut], block_size)
    return first + chain(extend(first[-1], own) if first else own, ids[cut:], block_size)
