"""Prompt schemas as arithmetic: what a request makes of one, and what is refused."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.streamer.body import BadRequest, parse_body
from services.streamer.prompt_modules import MAX_DEPTH, Module, OneOf, Schema, Use, beginning, begun, check, places
from shared.messages import ChatMessage

TRIP = Schema.model_validate(
    {
        "name": "trip",
        "modules": [
            {"name": "guide", "text": "You are a guide. "},
            {
                "union": [
                    {"name": "sea", "text": "The sea. "},
                    {"name": "hills", "text": "Hills. ", "modules": [{"name": "huts"}]},
                ]
            },
            {"name": "plan", "text": "Plan {{days}} days for {{who}}. ", "parameters": {"days": 1, "who": 3}},
        ],
    }
)


def words(text: str) -> int:
    return len(text.split())


def use(*modules: str, **arguments: dict[str, str]) -> Use:
    return Use(name="trip", modules=list(modules), arguments=arguments, mode="exact")


def test_the_schema_gives_the_order_and_the_request_the_choice() -> None:
    check(TRIP)
    assert beginning(TRIP, use("sea", "guide"), words) == "You are a guide. The sea. "
    filled = beginning(TRIP, use("plan", plan={"days": "three", "who": "two old friends"}), words)
    assert filled == "Plan three days for two old friends. "
    assert beginning(TRIP, use("plan", plan={"who": "{{days}}"}), words) == "Plan  days for {{days}}. ", "filled once"


WRONG = [
    (use("moon"), "no module 'moon'"),
    (use("sea", "hills"), "exclude each other"),
    (use("huts"), "comes only with 'hills'"),
    (use("guide", plan={"days": "3"}), "'plan', which is not among the modules"),
    (use("plan", plan={"hours": "3"}), "no parameter 'hours'"),
    (use("plan", plan={"days": "two or three"}), "has 3 tokens; its place has room for 1"),
]


@pytest.mark.parametrize(("wrong", "why"), WRONG, ids=[why for _, why in WRONG])
def test_a_bad_choice_is_refused(wrong: Use, why: str) -> None:
    with pytest.raises(BadRequest, match=why):
        beginning(TRIP, wrong, words)


def nested(depth: int) -> dict[str, Any]:
    return {"name": f"m{depth}", "modules": [nested(depth - 1)] if depth > 1 else []}


BAD = [
    ([{"name": "a"}, {"name": "b", "modules": [{"name": "a"}]}], "two modules are named 'a'"),
    ([{"name": "a", "text": "{{x}}"}], "each parameter has one place"),
    ([{"name": "a", "text": "x", "parameters": {"x": 1}}], "each parameter has one place"),
    ([{"name": "a", "text": "{{x}} {{x}}", "parameters": {"x": 1}}], "each parameter has one place"),
    ([nested(MAX_DEPTH + 1)], "nested more than"),
    ([{"union": [{"name": f"{at}{i}"} for i in range(256)]} for at in range(2)], "more than 256 modules"),
]


@pytest.mark.parametrize(("modules", "why"), BAD, ids=[why for _, why in BAD])
def test_a_bad_schema_is_refused(modules: list[dict[str, Any]], why: str) -> None:
    with pytest.raises(BadRequest, match=why):
        check(Schema.model_validate({"name": "bad", "modules": modules}))


SCAFFOLDS = [
    ({"a": ["guide", "moon"]}, "there is no module 'moon'"),
    ({"a": ["guide", "guide"]}, "'guide' is twice in scaffolds"),
    ({"a": ["guide", "plan"], "b": ["sea", "guide"]}, "'guide' is twice in scaffolds"),
    ({"a": ["guide", "sea", "hills"]}, "exclude each other"),
]


@pytest.mark.parametrize(("scaffolds", "why"), SCAFFOLDS, ids=[why for _, why in SCAFFOLDS])
def test_a_bad_scaffold_is_refused(scaffolds: dict[str, list[str]], why: str) -> None:
    with pytest.raises(BadRequest, match=why):
        check(TRIP.model_copy(update={"scaffolds": scaffolds}))


def test_modules_are_computed_apart_unless_asked_otherwise() -> None:
    assert parse_body(Use, b'{"name": "trip", "modules": []}').mode == "modules"


@pytest.mark.parametrize("raw", [b"{}", b'{"name":"a","modules":[]}', b'{"name":"a b","modules":[{"name":"a"}]}'])
def test_what_is_no_schema(raw: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_body(Schema, raw)


@st.composite
def schemas(draw: st.DrawFn) -> Schema:
    """Any shape of modules, each with a text of its own."""
    left = iter(range(12))

    def module(depth: int) -> Module:
        name = f"m{next(left, 99)}"
        inner = parts(depth + 1) if depth < 3 else []
        return Module(name=name, text=f"<{name}>", modules=inner)

    def parts(depth: int) -> list[Module | OneOf]:
        shapes = draw(st.lists(st.booleans(), min_size=depth == 1, max_size=2))
        return [OneOf(union=[module(depth), module(depth)]) if union else module(depth) for union in shapes]

    return Schema(name="any", modules=parts(1))


@given(schemas(), st.sets(st.integers(0, 12)))
def test_any_choice_is_refused_or_stands_in_the_schemas_order(schema: Schema, picked: set[int]) -> None:
    """Whatever two requests choose, their prompts are equal up to the first module that only one of them has."""
    order = [place.module.name for place in places(schema.modules)]
    if len(order) != len(set(order)):
        with pytest.raises(BadRequest):
            check(schema)
        return
    chosen = [name for at, name in enumerate(order) if at in picked]
    try:
        text = beginning(schema, use(*reversed(chosen)), words)
    except BadRequest:
        alone = {place.module.name for place in places(schema.modules) if not place.parent and not place.rivals}
        assert not set(chosen) <= alone, "modules that ask for nothing were refused"
    else:
        assert text == "".join(f"<{name}>" for name in chosen)
        for place in places(schema.modules):
            if place.module.name in chosen:
                assert not place.rivals & set(chosen)
                assert place.parent in {"", *chosen}


def test_where_the_text_goes() -> None:
    system, user = ChatMessage(role="system", content="Be short."), ChatMessage(role="user", content="Hi")
    assert begun("A. ", "b") == "A. b"
    assert begun("A. ", (system, user)) == (ChatMessage(role="system", content="A. Be short."), user)
    assert begun("A. ", (user,)) == (ChatMessage(role="system", content="A. "), user)
    with pytest.raises(BadRequest, match="token ids"):
        begun("A. ", b"\0\0\0\0")
