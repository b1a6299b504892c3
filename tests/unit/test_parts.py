"""Parts of prompts as arithmetic: where each token lies and stands, and that no page has the name of another one's content."""

from itertools import chain as joined

from hypothesis import given
from hypothesis import strategies as st

from services.engine.parts import pack, positions
from shared.blocks import chain
from shared.fields import pack_ids
from shared.layout import Placement

BLOCK = 4
ROOT = b"root of a tenant"

run = st.tuples(st.integers(0, 30), st.integers(1, 6))
runs = st.lists(run, min_size=1, max_size=3).map(tuple)
prompts = st.builds(Placement, head=st.integers(0, 6), parts=st.lists(runs, max_size=3).map(tuple), rest=runs)


def stands(prompt: Placement) -> list[int]:
    """The position of each token, as they come."""
    runs = joined(*prompt.parts, prompt.rest)
    return [*range(prompt.head), *(position + at for position, count in runs for at in range(count))]


def pages(prompt: Placement, tokens: list[int]) -> dict[bytes, object]:
    """What each page of a prompt depends on, by its name: its part's tokens, or those of all parts and of all before it."""
    packed = pack(tokens, prompt, ROOT, BLOCK)
    found: dict[bytes, object] = {}
    for part in packed.parts:
        where = positions(part.runs, 0, len(part.tokens))
        for at, name in enumerate(part.hashes, start=1):
            found[name] = (part.tokens[: at * BLOCK], where[: at * BLOCK])
    stem, first = sum(len(part.whole) for part in packed.parts), sum(part.length for part in packed.parts)
    content = [(part.length, found[part.hashes[-1]]) for part in packed.parts]
    for at, name in enumerate(packed.hashes[stem:], start=stem + 1):
        found[name] = (content, packed.tokens[: at * BLOCK], positions(packed.runs, first, at * BLOCK))
    return found


@given(st.lists(prompts, min_size=2, max_size=6))
def test_a_name_stands_for_one_content(drawn: list[Placement]) -> None:
    """All tokens are equal, so that nothing but positions, lengths and the choice of parts tells pages apart."""
    known: dict[bytes, object] = {}
    for prompt in drawn:
        count = len(stands(prompt))
        for name, content in pages(prompt, [0] * count).items():
            assert known.setdefault(name, content) == content
        exact = chain(ROOT, bytes(4 * count), BLOCK)
        assert not known.keys() & set(exact), "an exact prompt would find them"


@given(prompts)
def test_every_token_has_its_place_and_its_position(prompt: Placement) -> None:
    spoken = stands(prompt)
    packed = pack(spoken, prompt, ROOT, BLOCK)  # each token tells the position at which it stands
    first = sum(part.length for part in packed.parts)
    assert sorted(packed.tokens) == sorted(spoken)
    assert list(positions(packed.runs, first, len(spoken))) == packed.tokens[first:] == spoken[first:]
    for part in packed.parts:
        length = len(part.loose) + len(part.whole) * BLOCK
        end = next((at for at in range(len(part.tokens), 0, -1) if at - 1 in part.loose or (at - 1) // BLOCK in part.whole), 0)
        assert length == part.length
        assert list(part.tokens[:end]) == list(positions(part.runs, 0, end))
        assert len(part.tokens) == len(part.hashes) * BLOCK
    pairs = [(part, block) for part in packed.parts for block in part.whole]
    shared = [token for part, block in pairs for token in part.tokens[block * BLOCK : (block + 1) * BLOCK]]
    assert packed.tokens[: len(shared)] == shared
    assert packed.hashes[: len(pairs)] == [part.hashes[block] for part, block in pairs]


def test_what_follows_other_parts_has_another_name() -> None:
    """Also where these are whole blocks of equal tokens, so that places and tokens of all that follows are the same."""
    placements = [Placement(head=0, parts=(((at, 4),),), rest=((20, 8),)) for at in (0, 8)]
    one, other = (pack([0] * 12, placement, ROOT, BLOCK) for placement in placements)
    assert one.tokens == other.tokens and one.runs == other.runs
    assert not set(one.hashes) & set(other.hashes)


def test_tenants_share_no_part() -> None:
    placement = Placement(head=0, parts=(((0, 8),),), rest=((8, 1),))
    one, other = (pack([1] * 9, placement, root, BLOCK) for root in (ROOT, b"root of another!"))
    assert not set(one.parts[0].hashes) & set(other.parts[0].hashes)
    assert not set(one.hashes) & set(other.hashes)
    assert pack_ids(one.tokens) == pack_ids(other.tokens)
