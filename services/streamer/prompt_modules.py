"""Prompt schemas: the pieces that a tenant's prompts are made of, and the text that a request makes of them. Pure.

A schema's modules stand in one order for good. They are computed apart from each other (services.streamer.prompt_layout) or,
in mode `exact`, written out, so that prompts which choose the same first modules begin with the same tokens.
A union's members exclude each other; a nested module comes with the one that it stands in; `{{name}}` in a module's text is
where a parameter's argument goes.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from services.streamer.body import BadRequest, Body, Text
from shared.messages import ChatMessage

MAX_MODULES, MAX_DEPTH, MAX_PARAMETERS, MAX_ARGUMENT_TOKENS, MAX_SCAFFOLDS = 256, 8, 32, 4096, 64
HOLE = re.compile(r"\{\{([A-Za-z0-9_.-]{1,64})\}\}")

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
ArgumentTokens = Annotated[int, Field(ge=1, le=MAX_ARGUMENT_TOKENS)]
Scaffold = Annotated[list[Name], Field(min_length=2, max_length=MAX_MODULES)]
Parts = Annotated[list["Module | OneOf"], Field(max_length=MAX_MODULES)]


class Module(Body):
    """`parameters` are the most tokens that each one's argument may have."""

    name: Name
    text: Text = ""
    parameters: Annotated[dict[Name, ArgumentTokens], Field(max_length=MAX_PARAMETERS)] = Field(default_factory=dict)
    modules: Parts = Field(default_factory=list)


class OneOf(Body):
    """A prompt has one of these, or none."""

    union: Annotated[list[Module], Field(min_length=2, max_length=MAX_MODULES)]


class Schema(Body):
    """Modules of a scaffold see each other, where a request chooses all of them."""

    name: Name
    modules: Annotated[Parts, Field(min_length=1)]
    scaffolds: Annotated[dict[Name, Scaffold], Field(max_length=MAX_SCAFFOLDS)] = Field(default_factory=dict)


class Use(Body):
    """What a request makes of a schema. `exact`: the prompt is computed like any other, and its beginning is looked up;
    `modules`: each module is computed apart from the others, once, and looked up wherever it stands. That is an approximation.
    """

    name: Name
    modules: Annotated[list[Name], Field(max_length=MAX_MODULES)]
    arguments: Annotated[dict[Name, dict[Name, Text]], Field(max_length=MAX_MODULES)] = Field(default_factory=dict)
    mode: Literal["modules", "exact"] = "modules"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module stands: in which module (if in one), how deep, and instead of which others."""

    module: Module
    parent: str
    depth: int
    rivals: frozenset[str]


def places(parts: Iterable[Module | OneOf], parent: str = "", depth: int = 1) -> Iterator[Place]:
    """All modules, in the order in which their texts follow each other."""
    for part in parts:
        members = part.union if isinstance(part, OneOf) else [part]
        names = frozenset(module.name for module in members)
        for module in members:
            yield Place(module, parent, depth, names - {module.name})
            yield from places(module.modules, module.name, depth + 1)


def check(schema: Schema) -> None:
    """Raises BadRequest for what would make a schema ambiguous or too large."""
    seen: dict[str, Place] = {}
    for place in places(schema.modules):
        name = place.module.name
        if name in seen:
            raise BadRequest(f"two modules are named {name!r}", "modules")
        seen[name] = place
        if place.depth > MAX_DEPTH:
            raise BadRequest(f"module {name!r} is nested more than {MAX_DEPTH} deep", "modules")
        _check_holes(place.module)
    if len(seen) > MAX_MODULES:
        raise BadRequest(f"more than {MAX_MODULES} modules", "modules")
    _check_scaffolds(schema.scaffolds, seen)


def _check_scaffolds(scaffolds: Mapping[str, list[str]], found: Mapping[str, Place]) -> None:
    taken: set[str] = set()
    for scaffold, members in scaffolds.items():
        for name in members:
            if name not in found:
                raise BadRequest(f"scaffold {scaffold!r}: there is no module {name!r}", "scaffolds")
            if name in taken:
                raise BadRequest(f"module {name!r} is twice in scaffolds; one is all it may be in", "scaffolds")
            if rivals := found[name].rivals & set(members):
                raise BadRequest(f"scaffold {scaffold!r}: {name!r} and {min(rivals)!r} exclude each other", "scaffolds")
            taken.add(name)


def _check_holes(module: Module) -> None:
    holes = HOLE.findall(module.text)
    if sorted(holes) != sorted(module.parameters):
        wrong = f"its parameters are {sorted(module.parameters)} and its text has places for {sorted(holes)}"
        raise BadRequest(f"module {module.name!r}: {wrong}; each parameter has one place", "modules")


def choice(schema: Schema, use: Use, tokens: Callable[[str], int]) -> list[Module]:
    """The modules that a request has chosen, in the schema's order. `tokens` counts those of a text. Raises BadRequest."""
    found = {place.module.name: place for place in places(schema.modules)}
    chosen = frozenset(use.modules)
    _check_choice(schema.name, found, chosen)
    stray = next((name for name in use.arguments if name not in chosen), None)
    if stray is not None:
        raise BadRequest(f"arguments for module {stray!r}, which is not among the modules", "prompt_schema.arguments")
    modules = [place.module for name, place in found.items() if name in chosen]
    for module in modules:
        _check_arguments(module, use.arguments.get(module.name, {}), tokens)
    return modules


def beginning(schema: Schema, use: Use, tokens: Callable[[str], int]) -> str:
    """The text that a request's prompt begins with; an argument that is not given is empty. Raises BadRequest."""

    def filled(module: Module) -> str:
        arguments = use.arguments.get(module.name, {})
        return HOLE.sub(lambda hole: arguments.get(hole[1], ""), module.text)

    return "".join(map(filled, choice(schema, use, tokens)))


def _check_choice(schema: str, found: Mapping[str, Place], chosen: frozenset[str]) -> None:
    for name in sorted(chosen):
        if name not in found:
            raise BadRequest(f"schema {schema!r} has no module {name!r}", "prompt_schema.modules")
        place = found[name]
        if place.parent and place.parent not in chosen:
            raise BadRequest(f"module {name!r} comes only with {place.parent!r}, in which it stands", "prompt_schema.modules")
        if rivals := place.rivals & chosen:
            raise BadRequest(f"modules {name!r} and {min(rivals)!r} exclude each other", "prompt_schema.modules")


def _check_arguments(module: Module, arguments: Mapping[str, str], tokens: Callable[[str], int]) -> None:
    for name, argument in arguments.items():
        where = f"prompt_schema.arguments.{module.name}.{name}"
        if name not in module.parameters:
            raise BadRequest(f"module {module.name!r} has no parameter {name!r}", where)
        count, most = tokens(argument), module.parameters[name]
        if count > most:
            raise BadRequest(f"{where} has {count} tokens; its place has room for {most}", where)


def begun(text: str, prompt: tuple[ChatMessage, ...] | str | bytes) -> tuple[ChatMessage, ...] | str:
    """A prompt behind a schema's text: in a chat it begins the system message. Raises BadRequest."""
    if isinstance(prompt, bytes):
        raise BadRequest("prompt_schema goes with messages or a prompt of text, not with token ids", "prompt")
    if isinstance(prompt, str):
        return text + prompt
    first = prompt[0]
    if first.role == "system":
        return (ChatMessage(role="system", content=text + first.content), *prompt[1:])
    return (ChatMessage(role="system", content=text), *prompt)
