"""The token log's protocol under random faults: no schedule goes wrong, and a rule that is missing is seen.

python -m tests.protocol runs as many schedules as one likes; these are the same ones, and always the same.
"""

import pytest

from tests.protocol.__main__ import tally
from tests.protocol.mutations import PAIRS, RULES

CHUNK = 500
COMPARED = range(100)
# Rules whose absence others make up for: it costs work or time, and never a token.
COSTLY = {
    "lease refresh": "wasted",  # engines take each other's work
    "conflict": "",  # with "look after" below
    "look after": "",
    "incarnation": "",
    "acknowledge last": "",
    "cursor's hash": "",
}


@pytest.mark.parametrize("first", range(0, 2000, CHUNK))
def test_no_schedule_goes_wrong(first: int) -> None:
    total = tally(range(first, first + CHUNK))
    assert not total.violations, total.first
    assert total.faults["crash"] > CHUNK


@pytest.mark.parametrize("rule", [*(rule for rule in RULES if rule not in COSTLY), *PAIRS])
def test_a_missing_rule_is_seen(rule: str) -> None:
    """As a splice, a stall, an error, or a conflict that nothing explains."""
    assert any(tally(range(first, first + 50), rule).violations for first in range(0, 1500, 50))
