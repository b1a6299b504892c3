"""Where a schema's modules stand, and what a request that chooses some of them puts before its prompt. Pure.

A module's positions begin behind everything that stands before it in the schema, chosen or not; the members of a union begin
at the same one; a parameter takes the most tokens that its argument may have. So a module stands at the same positions in
every prompt, and what was computed for one serves all.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from services.streamer.prompt_modules import HOLE, Module, OneOf, Schema, Use, begun, choice
from shared.layout import Layout, Segment
from shared.messages import ChatMessage

Count = Callable[[str], int]  # how many tokens a text has
Prompt = tuple[ChatMessage, ...] | str


@dataclass(frozen=True, slots=True)
class Standing:
    """A module's text around its parameters, and the first position of each parameter."""

    texts: tuple[Segment, ...]
    parameters: dict[str, int]


def standings(schema: Schema, tokens: Count) -> tuple[dict[str, Standing], int]:
    """Of all modules, by name, from position 0 on; and the position behind all of them."""
    found: dict[str, Standing] = {}
    return found, _stand(schema.modules, 0, tokens, found)


def _stand(parts: Iterable[Module | OneOf], at: int, tokens: Count, found: dict[str, Standing]) -> int:
    for part in parts:
        members = part.union if isinstance(part, OneOf) else [part]
        at = max(_stand_one(module, at, tokens, found) for module in members)
    return at


def _stand_one(module: Module, at: int, tokens: Count, found: dict[str, Standing]) -> int:
    texts: list[Segment] = []
    parameters: dict[str, int] = {}
    for nth, piece in enumerate(HOLE.split(module.text)):  # texts, and between them the parameters' names
        if nth % 2:
            parameters[piece] = at
            at += module.parameters[piece]
        elif piece:
            texts.append((at, piece))
            at += tokens(piece)
    found[module.name] = Standing(tuple(texts), parameters)
    return _stand(module.modules, at, tokens, found)


def lay_out(schema: Schema, use: Use, prompt: Prompt | bytes, tokens: Count, mark: str) -> tuple[Prompt, Layout]:
    """The prompt with the mark where the modules belong, and the modules. Nobody can have guessed the mark, so it is in no
    message. Raises BadRequest.
    """
    modules = choice(schema, use, tokens)
    where, end = standings(schema, tokens)
    texts: dict[str, tuple[Segment, ...]] = {}  # of the parts
    scaffold = _scaffolds(schema, [module.name for module in modules])
    for module in modules:
        part = scaffold.get(module.name, module.name)
        texts[part] = texts.get(part, ()) + where[module.name].texts
    arguments = tuple(
        (position, argument)
        for module in modules
        for name, position in where[module.name].parameters.items()
        if (argument := use.arguments.get(module.name, {}).get(name))
    )
    return begun(mark, prompt), Layout(mark=mark, parts=tuple(filter(None, texts.values())), arguments=arguments, end=end)


def _scaffolds(schema: Schema, chosen: list[str]) -> dict[str, str]:
    """Who is computed with whom: members of a scaffold, by name, where all of them are chosen. No module's name has a colon."""
    whole = {name: members for name, members in schema.scaffolds.items() if set(members) <= set(chosen)}
    return {member: f"scaffold:{name}" for name, members in whole.items() for member in members}
