"""Short chunks become rows of one token: the same tokens at the same places, and every draw still on its own."""

from hypothesis import given
from hypothesis import strategies as st

from services.engine.plan import Draw, Plan, Row
from services.engine.spread import SHORT, TOGETHER, leading, spread
from shared.messages import Sampling

BLOCK = 8


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Decode rows, then chunks; some drawn from, some more than once; some with positions of their own."""
    lengths = [1] * draw(st.integers(0, 5)) + draw(st.lists(st.integers(1, 3 * SHORT), max_size=5))
    rows = []
    for slot, length in enumerate(lengths):
        start = draw(st.integers(0, 3 * SHORT))
        blocks = tuple(range(100 * slot, 100 * slot - (-(start + length) // BLOCK)))
        positions = tuple(range(500, 500 + length)) if draw(st.booleans()) else ()
        told = draw(st.integers(0, len(blocks)))
        rows.append(Row(tuple(range(1000 * slot, 1000 * slot + length)), start, blocks, slot, told, positions))
    rows.sort(key=lambda row: len(row.tokens) > 1)
    drawn = draw(st.lists(st.integers(0, max(len(rows) - 1, 0)), max_size=6)) if rows else []
    sampling = Sampling(temperature=0.0)
    draws = tuple(Draw(row, nth, 0, sampling, (), (), True, slot=nth) for nth, row in enumerate(drawn))
    return Plan(tuple(rows), draws, ((1, 2),))


def placed(plan: Plan) -> dict[tuple[int, int], tuple[int, int, int]]:
    """By slot and place: the token, its position, its block."""
    found = {}
    for row in plan.rows:
        for at, token in enumerate(row.tokens):
            place = row.start + at
            position = row.positions[at] if row.positions else place
            assert (row.slot, place) not in found
            found[row.slot, place] = token, position, row.blocks[place // BLOCK]
    return found


@given(plans(), st.integers(1, 60), st.integers(1, 4))
def test_the_same_work(plan: Plan, most: int, pack: int) -> None:
    most = max(most, len(plan.rows))
    done = spread(plan, most, pack)
    assert placed(done) == placed(plan)
    assert len(done.rows) <= most and done.copies == plan.copies
    decoding = [row for row in plan.rows if len(row.tokens) == 1]
    assert list(done.rows[: len(decoding)]) == decoding, "decode rows come first, in their order"
    for old, new in zip(plan.draws, done.draws, strict=True):
        assert old._replace(row=new.row) == new
        assert plan.rows[old.row].tokens[-1] == done.rows[new.row].tokens[-1]
    for slot in {row.slot for row in plan.rows}:
        [old] = [row for row in plan.rows if row.slot == slot]
        first, *others = sorted((row for row in done.rows if row.slot == slot), key=lambda row: row.start)
        assert first.told == old.told and all(row.told == len(row.blocks) for row in others)


@given(plans(), st.integers(1, 4))
def test_what_is_spread(plan: Plan, pack: int) -> None:
    short = [row for row in plan.rows if 1 < len(row.tokens) <= min(pack * SHORT, row.start)]
    few = sum(-(-len(row.tokens) // pack) for row in short) <= TOGETHER
    done = spread(plan, 1000, pack)
    if not (short and few):
        assert done is plan
        return
    first = sum(len(row.tokens) == 1 for row in plan.rows) + sum(-(-len(row.tokens) // pack) for row in short)
    assert leading(done.rows, pack) >= first
    assert {row.slot for row in done.rows[first:]}.isdisjoint(row.slot for row in short)
