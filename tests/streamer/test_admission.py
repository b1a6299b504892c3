"""Admission as arithmetic: limits, and the wait that a queue means."""

import pytest

from services.streamer.admission import Overloaded, Pace, admit
from shared.config import StreamerConfig

CONFIG = StreamerConfig(id="s", max_requests=10, max_queue=100, max_wait_s=5)


@pytest.mark.parametrize(
    ("open_here", "queued", "missing", "wait_s", "status"),
    [(0, 0, "engine", 0.0, 503), (10, 0, "", 0.0, 429), (0, 100, "", 0.0, 429), (0, 50, "", 5.1, 429)],
)
def test_refusals_say_when_to_come_back(open_here: int, queued: int, missing: str, wait_s: float, status: int) -> None:
    with pytest.raises(Overloaded) as refused:
        admit(CONFIG, open_here, {"submit": 0, "work": queued}, missing, wait_s)
    assert refused.value.status == status
    assert 1 <= refused.value.retry_after_s <= 60


def test_what_fits_comes_in() -> None:
    admit(CONFIG, 9, {"submit": 49, "work": 50}, "", 5.0)


def test_the_wait_is_the_queue_over_the_pace_of_a_busy_mesh() -> None:
    pace = Pace()
    assert pace.wait_s(1000) == 0.0, "nothing is known yet"
    for second in range(1, 20):
        pace.look(float(second), 20.0 * second, waiting=50)
    assert pace.wait_s(100) == pytest.approx(5.0)
    for second in range(20, 400):
        pace.look(float(second), 400.0, waiting=0)
    assert pace.wait_s(100) == pytest.approx(5.0), "an idle mesh shows nothing of what it can do"
    pace.look(400.0, 400.0, waiting=50)
    pace.look(401.0, 3.0, waiting=50)
    assert pace.wait_s(100) == pytest.approx(5.0), "an engine that started again counts from zero"


def test_a_slow_mesh_is_not_thought_to_stand_still() -> None:
    """Four answers of ten seconds each at a time; between their ends nothing happens."""
    pace = Pace()
    for second in range(1, 200):
        pace.look(float(second), 4.0 * (second // 10), waiting=1)
        assert pace.wait_s(4) <= 10 * 1.5
    for second in range(200, 300):
        pace.look(float(second), 80.0, waiting=1)
    assert pace.wait_s(4) > 20, "but one that does stand still is noticed"
