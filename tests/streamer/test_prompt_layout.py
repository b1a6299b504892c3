"""Where a schema's modules stand, whatever a request chooses of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.streamer.body import BadRequest
from services.streamer.lengths import MAX_REMEMBERED, Lengths
from services.streamer.prompt_layout import lay_out, standings
from services.streamer.prompt_modules import Module, OneOf, Schema, Use, check, places
from shared.layout import Layout
from shared.messages import ChatMessage
from tests.streamer.test_prompt_modules import TRIP, schemas, words

LONG = Schema(name="long", modules=[*TRIP.modules, Module(name="end", text="Be short. ")], scaffolds={"ends": ["end", "guide"]})


def layout(*modules: str, **arguments: dict[str, str]) -> Layout:
    return lay_out(LONG, Use(name="trip", modules=list(modules), arguments=arguments), "Go.", words, "*")[1]


def test_positions_are_the_schemas() -> None:
    """Four words of a guide; two of the sea, or one of hills and none of huts; a plan of four and 1 + 3 for its parameters."""
    found, end = standings(LONG, words)
    assert {name: [at for at, _ in stands.texts] for name, stands in found.items()} == {
        "guide": [0], "sea": [4], "hills": [4], "huts": [], "plan": [6, 8, 13], "end": [14],
    }  # fmt: skip
    assert found["plan"].parameters == {"days": 7, "who": 10}
    assert end == 16


def test_what_is_chosen_stands_where_it_stands() -> None:
    plan = ((6, "Plan "), (8, " days for "), (13, ". "))
    chosen = layout("plan", "sea", plan={"days": "three", "who": ""})
    assert chosen.parts == (((4, "The sea. "),), plan)
    assert chosen.arguments == ((7, "three"),)
    assert layout("plan", plan={"who": "us", "days": "two"}).arguments == ((7, "two"), (10, "us"))
    assert chosen.end == layout("guide").end == 16


def test_a_scaffold_is_one_part_where_it_is_whole() -> None:
    guide, end = (0, "You are a guide. "), (14, "Be short. ")
    assert layout("guide", "sea", "end").parts == ((guide, end), ((4, "The sea. "),))
    assert layout("guide", "sea").parts == ((guide,), ((4, "The sea. "),))


def test_where_the_modules_belong() -> None:
    use = Use(name="trip", modules=["guide"])
    system, user = ChatMessage(role="system", content="Be kind."), ChatMessage(role="user", content="Go.")
    assert lay_out(TRIP, use, "Go.", words, "*")[0] == "*Go."
    assert lay_out(TRIP, use, (user,), words, "*")[0] == (ChatMessage(role="system", content="*"), user)
    assert lay_out(TRIP, use, (system, user), words, "*")[0] == (ChatMessage(role="system", content="*Be kind."), user)
    with pytest.raises(BadRequest, match="token ids"):
        lay_out(TRIP, use, b"ids.", words, "*")


@given(schemas(), st.sets(st.integers(0, 12)))
def test_chosen_texts_never_overlap(schema: Schema, picked: set[int]) -> None:
    names = [place.module.name for place in places(schema.modules)]
    use = Use(name="any", modules=[name for at, name in enumerate(names) if at in picked])
    try:
        check(schema)
        _, layout = lay_out(schema, use, "x", len, "*")
    except BadRequest:
        return
    spans = sorted((at, at + len(text)) for part in layout.parts for at, text in part)
    ends = [0, *(end for _, end in spans)]
    assert all(end <= start for end, (start, _) in zip(ends, [*spans, (layout.end, 0)], strict=True))


def test_lengths_are_counted_once_and_remembered_in_bounds() -> None:
    asked: list[str] = []

    def count(text: str) -> int:
        asked.append(text)
        return len(text)

    lengths = Lengths(count)
    assert [lengths("abc"), lengths("abc"), lengths("d")] == [3, 3, 1]
    assert asked == ["abc", "d"]
    for at in range(MAX_REMEMBERED):
        lengths(str(at))
    assert lengths("abc") == 3
    assert asked.count("abc") == 2


def test_an_empty_schema_of_modules_stands_nowhere() -> None:
    schema = Schema(name="a", modules=[Module(name="b"), OneOf(union=[Module(name="c"), Module(name="d")])])
    assert lay_out(schema, Use(name="a", modules=["b", "c"]), "x", words, "*")[1].parts == ()
