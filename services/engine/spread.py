"""Short chunks behind long contexts, as rows of one or few tokens each. Pure.

What a found prefix leaves to compute is a few tokens behind thousands. As a chunk it is one tile of queries for each head,
which walks through all keys by itself: few programs, most processors idle. As decode rows, its tokens' contexts are cut into
pieces for all processors. They read the context's keys and values once for each row, a tile once for each head: that bounds
how many rows are worth it.
"""

from collections.abc import Sequence

from services.engine.plan import Plan, Row

SHORT = 16  # rows that a chunk becomes, at most: on a CPU, 16 tokens behind 1,500 take 44 ms as rows and 55 as a chunk
# Of all such chunks of a step. A tile's walk takes an H100 30 us a layer for 1,024 keys (8 ms for 8,192 in 32 layers), for one
# chunk or for four; a row's 4 MB (8 key heads of 128) take 1 us from the second-level cache.
TOGETHER = 32


def leading(rows: Sequence[Row], pack: int) -> int:
    """How many of the first rows have up to so many tokens."""
    return next((at for at, row in enumerate(rows) if len(row.tokens) > pack), len(rows))


def spread(plan: Plan, most: int, pack: int = 1) -> Plan:
    """The same work in `most` rows at most: short chunks, if they are few, become rows of up to `pack` tokens, which come
    behind the decode rows. Draws follow their rows.
    """
    short = {at: -(-len(row.tokens) // pack) for at, row in enumerate(plan.rows) if _is_short(row, pack)}
    together = sum(short.values())
    if not short or together > TOGETHER or len(plan.rows) - len(short) + together > most:
        return plan
    order = sorted(range(len(plan.rows)), key=lambda at: 0 if len(plan.rows[at].tokens) == 1 else 1 if at in short else 2)
    rows: list[Row] = []
    last: dict[int, int] = {}  # where a row's last token is now
    for at in order:
        rows += _cut(plan.rows[at], pack) if at in short else [plan.rows[at]]
        last[at] = len(rows) - 1
    return Plan(tuple(rows), tuple(draw._replace(row=last[draw.row]) for draw in plan.draws), plan.copies)


def _is_short(row: Row, pack: int) -> bool:
    """Behind more than it is itself."""
    return 1 < len(row.tokens) <= min(SHORT * pack, row.start)


def _cut(row: Row, pack: int) -> list[Row]:
    """The first one tells all blocks. All tokens' keys and values are in their places before any of them attends."""
    parts = [slice(at, at + pack) for at in range(0, len(row.tokens), pack)]
    return [
        Row(
            row.tokens[part], row.start + part.start, row.blocks, row.slot, len(row.blocks) if part.start else row.told,
            row.positions[part],
        )
        for part in parts
    ]  # fmt: skip
