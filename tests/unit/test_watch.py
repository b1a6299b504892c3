"""The supervisor's eye: only who has shown itself and stopped doing so is stuck."""

from services.up.watch import SILENT_S, Watch


def test_silence_is_counted_from_the_last_sign() -> None:
    watch = Watch()
    assert watch.stuck(0.0, [1, 2, 99], [1, 2, 3]) == [], "3 is starting, 99 is another host's"
    assert watch.stuck(SILENT_S, [2], [1, 2, 3]) == []
    assert watch.stuck(SILENT_S + 1, [2], [1, 2, 3]) == [1]
    assert watch.stuck(SILENT_S + 2, [2], [2, 3]) == [], "it was ended"
    assert watch.stuck(SILENT_S + 3, [2, 1], [1, 2, 3]) == [], "a new process, by the same number"
