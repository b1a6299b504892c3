"""Which jobs an engine runs: what was cancelled while it was on its way does not run."""

from typing import Any
from unittest.mock import Mock

import pytest

from services.engine.admission import Admission
from services.engine.jobs import Jobs
from services.engine.pages import Pages
from services.engine.schedule import Scheduler
from shared.messages import Cancel
from shared.stats import Stats
from tests.unit.test_job import job


@pytest.mark.parametrize(("generation", "runs"), [(0, True), (1, False), (2, False)])
def test_a_cancellation_that_came_while_the_log_was_read(generation: int, runs: bool) -> None:
    """It names the newest attempt that it is meant for; the job here is of generation 1."""
    said: list[Any] = []
    publisher: Any = Mock(put=lambda _, *records: said.extend(records))
    scheduler, stats = Scheduler(Pages(8, 16), 16, 4), Stats()
    admission = Admission(scheduler, Jobs(scheduler, publisher, stats, None), stats, None, lambda _: None)
    taken = job([[1, 2]])
    taken.work = taken.work.model_copy(update={"deadline_ms": 1 << 50})
    admission.hear(Cancel(request="r", generation=generation))
    admission.take_over(taken)
    assert bool(admission.ours) == bool(scheduler.open) == runs
    assert [record.code for record in said] == ([] if runs else ["cancelled"])
