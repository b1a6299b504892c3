"""Short chunks behind long contexts, as rows of one token each. Pure.

What a found prefix leaves to compute is a few tokens behind thousands. As a chunk it is one tile of queries for each head,
which walks through all keys by itself: few programs, most processors idle. As decode rows, its tokens' contexts are cut into
pieces for all processors. They read the context's keys and values once for each token, a tile once for each head: that bounds
how many tokens are worth it.
"""

from services.engine.plan import Plan, Row

SHORT = 16  # tokens of a chunk: at most what a block leaves
# Of all such chunks of a step. A tile's walk takes an H100 30 us a layer for 1,024 keys (8 ms for 8,192 in 32 layers), for one
# chunk or for four; a row's 4 MB (8 key heads of 128) take 1 us from the second-level cache.
TOGETHER = 32


def spread(plan: Plan, most: int) -> Plan:
    """The same work in `most` rows at most: short chunks, if they are few, become decode rows. Draws follow their rows."""
    short = {at for at, row in enumerate(plan.rows) if 1 < len(row.tokens) <= SHORT <= row.start}
    tokens = sum(len(plan.rows[at].tokens) for at in short)
    if not short or tokens > TOGETHER or len(plan.rows) - len(short) + tokens > most:
        return plan
    order = sorted(range(len(plan.rows)), key=lambda at: 0 if len(plan.rows[at].tokens) == 1 else 1 if at in short else 2)
    rows: list[Row] = []
    last: dict[int, int] = {}  # where a row's last token is now
    for at in order:
        rows += _singles(plan.rows[at]) if at in short else [plan.rows[at]]
        last[at] = len(rows) - 1
    return Plan(tuple(rows), tuple(draw._replace(row=last[draw.row]) for draw in plan.draws), plan.copies)


def _singles(row: Row) -> list[Row]:
    """The first one tells all blocks. All tokens' keys and values are in their places before any of them attends."""
    return [
        Row((token,), row.start + at, row.blocks, row.slot, len(row.blocks) if at else row.told, row.positions[at : at + 1])
        for at, token in enumerate(row.tokens)
    ]
