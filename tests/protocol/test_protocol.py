"""The token log's protocol under random faults: no schedule goes wrong, and a rule that is missing is seen.

python -m tests.protocol runs as many schedules as one likes; these are the same ones, and always the same.
"""

import pytest

from tests.protocol.__main__ import tally
from tests.protocol.mutations import PAIRS, RULES

CHUNK = 250
SEARCHED = 1000  # from where it was seen first; a change of the schedules moves that
FROM = {
    "acknowledge last and look after": 2500, "compare and set": 70, "generation": 70, "hash": 350,
    "incarnation and look after": 810, "incarnation, conflict and look after": 750, "restore": 50,
    "restore's comparison": 190,
}  # fmt: skip
# Others make up for these at once; without both it is seen (PAIRS).
BACKED_UP = {"conflict", "look after", "incarnation", "acknowledge last"}
# Without these, work and streams are lost that need not be.
COSTLY = {"lease refresh", "cursor's hash"}


@pytest.mark.parametrize("first", range(0, 2000, CHUNK))
def test_no_schedule_goes_wrong(first: int) -> None:
    total = tally(range(first, first + CHUNK))
    assert not total.violations, total.first
    assert total.faults["crash"] > CHUNK


@pytest.mark.parametrize("rule", sorted({*RULES, *PAIRS} - BACKED_UP - COSTLY))
def test_a_missing_rule_is_seen(rule: str) -> None:
    """As a splice, a stall, an error, or a conflict that nothing explains."""
    begin = FROM.get(rule, 0)
    assert any(tally(range(first, first + 10), rule).violations for first in range(begin, begin + SEARCHED, 10))


def test_engines_that_do_not_renew_what_they_have_waste_work() -> None:
    seeds = range(60)
    assert tally(seeds, "lease refresh").wasted > 1.2 * tally(seeds).wasted
