"""The token log's protocol under random faults: no schedule goes wrong, and a rule that is missing is seen.

python -m tests.protocol runs as many schedules as one likes; these are the same ones, and always the same.
"""

import pytest

from shared.messages import Step
from tests.protocol.__main__ import tally
from tests.protocol.actors import SimStreamer
from tests.protocol.kernel import Kernel
from tests.protocol.mutations import PAIRS, RULES
from tests.protocol.schedule import run

CHUNK = 250
SEARCHED = 1000  # from where it was seen first; a change of the schedules moves that
FROM = {
    "acknowledge last and look after": 2500, "compare and set": 70, "generation": 70, "hash": 350,
    "incarnation and look after": 810, "incarnation, conflict and look after": 750, "restore": 50,
    "read on": 16_000, "restore's comparison": 190,
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


@pytest.mark.parametrize("seed", [16_008, 109_100])
def test_what_once_went_wrong(seed: int) -> None:
    assert not run(seed).violation


@pytest.mark.parametrize("lost", [0, 2])
def test_another_broker_moves_a_reader_back_over_what_was_lost_and_nowhere_else(lost: int) -> None:
    """Whoever attached meanwhile trusts that all behind the reader's place is yet to be read (seed 16008)."""
    kernel = Kernel(0)
    streamer = SimStreamer(kernel, kernel.process("s0"), "p")
    stream = streamer.bus.names.tokens("p")
    entries = [kernel.through(streamer.bus.append(stream, Step(records=()))) for _ in range(4)]
    streamer.tail.positions[stream] = entries[2]  # a read is under way, and will bring the fourth
    kernel.broker.restart(lost)
    kernel.through(streamer.restore_all())
    kernel.close()
    assert streamer.tail.positions[stream] == entries[1 if lost else 2]


def test_engines_that_do_not_renew_what_they_have_waste_work() -> None:
    seeds = range(60)
    assert tally(seeds, "lease refresh").wasted > 1.2 * tally(seeds).wasted
