"""The campaign's short selection: killed streamers, a flush and a lost file, a request that kills engines; one seed each."""

from tests.chaos.__main__ import SHORT, campaign
from tests.chaos.matrix import ROWS


async def test_the_short_selection() -> None:
    for result in await campaign([ROWS[id] for id in SHORT], [1]):
        assert not result.wrong, result.wrong
        assert result.tally.requests > 10
