"""The token log's protocol under random faults: no schedule goes wrong, and a rule that is missing is seen.

python -m tests.protocol runs as many schedules as one likes; these are the same ones, and always the same.
"""

import pytest

from tests.protocol.__main__ import Tally, tally
from tests.protocol.mutations import PAIRS, RULES

CHUNK = 500
# What a missing rule costs is compared over the same seeds.
COMPARED = range(0, 120)
# Seeds that show the rule's absence as a violation are rare for these: the first one that does.
WASTE = {"generation", "catching up", "lease refresh"}


@pytest.mark.parametrize("first", range(0, 2000, CHUNK))
def test_no_schedule_goes_wrong(first: int) -> None:
    total = tally(range(first, first + CHUNK))
    assert not total.violations, total.first
    assert total.faults["crash"] > CHUNK


@pytest.fixture(scope="module")
def whole() -> Tally:
    return tally(COMPARED)
