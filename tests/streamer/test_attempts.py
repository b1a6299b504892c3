"""What becomes of a request's record, as arithmetic: who serves the client, and which attempt counts."""

from hypothesis import given
from hypothesis import strategies as st

from services.streamer.attempts import attached, attempt, restored
from shared.bus import START
from shared.messages import Cancel, Record, Sampling, Submit
from shared.names import Streams

numbers = st.integers(0, 10**13)


def record(connection: int, generation: int) -> Record:
    submit = Submit(
        request="r", tenant="t", partition="p", log_from=START, generation=generation, given=(), ends=(), prompt="x",
        sampling=Sampling(), max_tokens=None, deadline_ms=0,
    )  # fmt: skip
    return Record(submit=submit, stop=("a",), connection=connection)


@given(numbers, numbers, numbers)
def test_a_client_that_comes_back_counts_up(connection: int, generation: int, clock: int) -> None:
    seen = record(connection, generation)
    after = attached(seen, seen, clock)
    assert after is not None
    assert after.connection > connection
    assert after.connection >= clock
    assert after.submit == seen.submit
    assert attached(seen, after, clock) is None, "somebody was faster: look again"
    assert attached(seen, None, clock) is None


@given(numbers, numbers, numbers, numbers, numbers)
def test_a_new_attempt_outranks_all_and_yields_to_a_newer_connection(
    connection: int, generation: int, other: int, others: int, least: int
) -> None:
    mine, now = record(connection, generation), record(other, others)
    after = restored(mine, now, [b"\1\0\0\0"], [None], "5-0", least)
    assert (after is None) == (other > connection)
    if after is not None:
        assert after.connection == connection
        assert after.submit.generation > max(generation, others)
        assert after.submit.generation >= least
        assert (after.submit.given, after.submit.log_from) == ((b"\1\0\0\0",), "5-0")
        cancel, start = (item for _, item in attempt(Streams("m"), after))
        assert isinstance(cancel, Cancel)
        assert cancel.generation == after.submit.generation - 1
        assert start == after.submit
    assert restored(mine, None, [], [], START, 0) is not None, "the broker lost the record"
