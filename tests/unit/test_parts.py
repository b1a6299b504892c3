"""Parts of prompts as arithmetic: where each token lies and stands, and that no page has the name of another one's content."""

from itertools import chain as joined

from hypothesis import given
from hypothesis import strategies as st

from services.engine.parts import pack, positions
from shared.blocks import chain
from shared.fields import pack_ids
from shared.layout import Run

BLOCK = 4
ROOT = b"root of a tenant"

run = st.tuples(st.integers(0, 30), st.integers(1, 6))
runs = st.lists(run, min_size=1, max_size=3)
prompts = st.tuples(st.lists(runs, max_size=3), runs)


def pages(parts: list[list[Run]], rest: list[Run], tokens: list[int]) -> dict[bytes, object]:
    """What each page of a prompt depends on, by its name: its part's tokens, or those of all parts and of all before it."""
    packed = pack(tokens, parts, rest, ROOT, BLOCK)
    found: dict[bytes, object] = {}
    for part in packed.parts:
        where = positions(part.runs, 0, len(part.tokens))
        for at, name in enumerate(part.hashes, start=1):
            found[name] = (part.tokens[: at * BLOCK], where[: at * BLOCK])
    stem, first = sum(part.whole for part in packed.parts), sum(part.length for part in packed.parts)
    for at, name in enumerate(packed.hashes[stem:], start=stem + 1):
        where = positions(packed.runs, first, at * BLOCK)
        content = [(part.tokens[: part.length], positions(part.runs, 0, part.length)) for part in packed.parts]
        found[name] = (content, packed.tokens[: at * BLOCK], where)
    return found


@given(st.lists(prompts, min_size=2, max_size=6))
def test_a_name_stands_for_one_content(drawn: list[tuple[list[list[Run]], list[Run]]]) -> None:
    """All tokens are equal, so that nothing but positions, lengths and the choice of parts tells pages apart."""
    known: dict[bytes, object] = {}
    for parts, rest in drawn:
        count = sum(count for _, count in joined(*parts, rest))
        for name, content in pages(parts, rest, [0] * count).items():
            assert known.setdefault(name, content) == content
        whole = chain(ROOT, bytes(4 * count), BLOCK)
        assert not known.keys() & set(whole), "an exact prompt would find them"


@given(prompts)
def test_every_token_has_its_place_and_its_position(drawn: tuple[list[list[Run]], list[Run]]) -> None:
    parts, rest = drawn
    spoken = [position + at for position, count in joined(*parts, rest) for at in range(count)]
    packed = pack(spoken, parts, rest, ROOT, BLOCK)  # each token tells the position at which it stands
    first = sum(part.length for part in packed.parts)
    assert sorted(packed.tokens) == sorted(spoken)
    assert list(positions(packed.runs, first, len(spoken))) == packed.tokens[first:] == spoken[first:]
    for part in packed.parts:
        assert list(part.tokens[: part.length]) == list(positions(part.runs, 0, part.length))
        assert len(part.tokens) == len(part.hashes) * BLOCK
    shared = [token for part in packed.parts for token in part.tokens[: part.whole * BLOCK]]
    assert packed.tokens[: len(shared)] == shared
    assert packed.hashes[: len(shared) // BLOCK] == [name for part in packed.parts for name in part.hashes[: part.whole]]


def test_tenants_share_no_part() -> None:
    one, other = (pack([1] * 9, [[(0, 8)]], [(8, 1)], root, BLOCK) for root in (ROOT, b"root of another!"))
    assert not set(one.parts[0].hashes) & set(other.parts[0].hashes)
    assert not set(one.hashes) & set(other.hashes)
    assert pack_ids(one.tokens) == pack_ids(other.tokens)
