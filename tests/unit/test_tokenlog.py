"""The log's rules: whatever engines write, all readers derive one sequence, and only ever one that some engine wrote whole."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.fields import Epoch, pack_ids
from shared.messages import Claim, End, Fail, LogRecord, Tokens
from shared.tokenlog import Follower, Verdict, agrees, counts_of, cursor, digest

R = "r"


def claim(epoch: Epoch) -> Claim:
    return Claim(request=R, epoch=epoch, prompt_tokens=5)


def tokens(epoch: Epoch, before: list[int], new: list[int], choice: int = 0) -> Tokens:
    return Tokens(request=R, epoch=epoch, choice=choice, first=len(before), digest=digest(pack_ids(before)), ids=pack_ids(new))


def end(epoch: Epoch, count: int, choice: int = 0) -> End:
    return End(
        request=R, epoch=epoch, choice=choice, count=count, reason="length", cached_tokens=0,
        tokenize_ms=0.0, queue_ms=0.0, prefill_ms=0.0, decode_ms=0.0,
    )  # fmt: skip


A, B = (0, 10, 0), (0, 11, 0)


def test_tokens_count_only_under_the_current_claim() -> None:
    reader = Follower(0, 1)
    assert reader.read(tokens(A, [], [1])) is Verdict.NOTHING
    assert reader.read(claim(A)) is Verdict.NEWS
    assert reader.read(tokens(A, [], [1])) is Verdict.NEWS
    assert reader.read(claim(B)) is Verdict.NEWS
    assert reader.read(tokens(A, [1], [2])) is Verdict.NOTHING, "a zombie's late record"
    assert reader.read(claim(A)) is Verdict.NOTHING, "a zombie's late claim"
    assert reader.read(tokens(B, [1], [3])) is Verdict.NEWS
    assert list(reader.choices[0].ids) == [1, 3]


def test_overlap_is_dropped_gap_and_splice_are_conflicts() -> None:
    reader = Follower(0, 1)
    reader.read(claim(A))
    reader.read(tokens(A, [], [1, 2, 3]))
    assert reader.read(tokens(A, [], [1, 2, 3])) is Verdict.NOTHING
    assert reader.read(tokens(A, [1], [2, 3, 4])) is Verdict.NEWS
    assert reader.read(tokens(A, [1, 2, 3, 4, 5], [6])) is Verdict.CONFLICT
    assert reader.read(tokens(A, [1, 2, 3, 9], [6])) is Verdict.CONFLICT, "generated from another prefix"
    assert reader.read(tokens(A, [1, 2], [3, 9])) is Verdict.CONFLICT, "an overlap that differs"
    assert reader.read(end(A, 5)) is Verdict.CONFLICT
    assert reader.read(end(A, 4)) is Verdict.NEWS
    assert reader.ended
    assert reader.read(tokens(A, [1, 2, 3, 4], [5])) is Verdict.NOTHING


def test_a_new_generation_outranks_every_entry_of_an_old_one() -> None:
    reader = Follower(1, 1, [pack_ids([1, 2])])
    assert reader.read(claim((0, 10**15, 0))) is Verdict.NOTHING
    assert reader.read(claim((1, 5, 0))) is Verdict.NEWS
    assert reader.read(tokens((1, 5, 0), [1, 2], [3])) is Verdict.NEWS


def test_choices_end_for_themselves_and_stay_ended() -> None:
    reader = Follower(0, 2)
    reader.read(claim(A))
    reader.read(tokens(A, [], [1], choice=0))
    reader.read(end(A, 1, choice=0))
    assert not reader.ended
    reader.read(claim(B))
    assert reader.read(tokens(B, [1], [2], choice=0)) is Verdict.NOTHING
    reader.read(tokens(B, [], [7], choice=1))
    reader.read(end(B, 1, choice=1))
    assert reader.ended
    again = Follower(1, 2, [pack_ids([1]), b""], [end(A, 1), None])
    assert again.choices[0].end is not None
    assert not again.ended


def test_a_refusal_counts_until_an_engine_has_claimed() -> None:
    refusal = Fail(request=R, epoch=(0, 0, 0), code="bad_prompt", text="no")
    late, early = Follower(0, 1), Follower(0, 1)
    late.read(claim(A))
    assert late.read(refusal) is Verdict.NOTHING
    assert early.read(refusal) is Verdict.NEWS
    assert early.read(claim(A)) is Verdict.NOTHING
    assert early.ended


def chain_after(prefix: list[int], rng: random.Random) -> list[int]:
    """A token bound to everything before it, as an engine would draw it."""
    return [*prefix, hash((tuple(prefix), rng.getrandbits(20))) % 10**6]


@settings(max_examples=500, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 2**32))
def test_readers_agree_whatever_engines_do(seed: int, cut: int) -> None:
    """Engines claim, read up to their claim, write, stall, repeat and come back late; a reader that starts from a checkpoint
    of another reader derives the same sequence."""
    rng, log = random.Random(seed), list[LogRecord]()
    engines: list[tuple[Epoch, list[int]]] = []
    for entry in range(1, rng.randrange(2, 5)):
        log.append(claim((0, entry, 0)))
        mine = Follower(0, 1)
        for record in log:
            mine.read(record)
        engines.append(((0, entry, 0), list(mine.choices[0].ids)))
        for _ in range(rng.randrange(12)):
            which = rng.randrange(len(engines))
            epoch, told = engines[which]
            grown = chain_after(told, rng)
            record = tokens(epoch, told, grown[len(told) :])
            log += [record] * rng.choice((1, 1, 2))
            engines[which] = (epoch, grown)
    one, two = Follower(0, 1), Follower(0, 1)
    at = cut % (len(log) + 1)
    for position, record in enumerate(log):
        assert one.read(record) is not Verdict.CONFLICT
        two.read(record)
        if position == at:
            copied = Follower(0, 1, [pack_ids(two.choices[0].ids)])
            copied.epoch, two = two.epoch, copied
    assert list(one.choices[0].ids) == list(two.choices[0].ids) == engines[-1][1]


@given(st.lists(st.lists(st.integers(0, 10**6), max_size=20), min_size=1, max_size=4), st.integers(0, 2**32))
def test_cursors(outputs: list[list[int]], seed: int) -> None:
    rng = random.Random(seed)
    choices = Follower(0, len(outputs), [pack_ids(ids) for ids in outputs]).choices
    counts = [rng.randrange(len(ids) + 1) for ids in outputs]
    text = cursor(choices, counts)
    assert counts_of(text, len(outputs)) == counts
    assert agrees(text, choices)
    changed = Follower(0, len(outputs), [pack_ids([id + 1 for id in ids]) for ids in outputs]).choices
    assert agrees(text, changed) == (sum(counts) == 0)
    assert not agrees(text, Follower(0, len(outputs)).choices) or sum(counts) == 0


@pytest.mark.parametrize(
    "text", ["", "5", "5.", "x.12345678", "1-2.12345678", "-1.12345678", "１.12345678", "9" * 20 + ".12345678"]
)
def test_what_is_no_cursor(text: str) -> None:
    with pytest.raises(ValueError, match="not a cursor"):
        counts_of(text, 1)


def test_attempts_that_said_nothing_are_counted_and_others_fenced() -> None:
    reader = Follower(0, 1)
    for entry in range(1, 4):
        reader.read(claim((0, entry, 0)))
    assert reader.fruitless == 3
    reader.read(tokens((0, 2, 0), [], [9]))
    assert (reader.fruitless, reader.fenced) == (3, 1)
    reader.read(tokens((0, 3, 0), [], [1]))
    assert reader.fruitless == 0


def test_only_what_ends_under_ones_own_claim_is_to_be_continued() -> None:
    before = [claim(A), tokens(A, [], [1, 2]), claim(B)]
    assert Follower(0, 1).continues(B, before)
    assert not Follower(0, 1).continues(A, before), "a higher epoch"
    assert not Follower(0, 1).continues(B, [*before, tokens(B, [1, 2, 3], [4])]), "a conflict"
    assert not Follower(0, 1).continues(A, [*before[:2], end(A, 2)]), "an end"
