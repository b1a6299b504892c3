"""What a prefix is called, and when fetching it is worth its time."""

from hypothesis import given
from hypothesis import strategies as st

from services.engine.prefix import LONGEST_S, Worth, labels, space, whole_chain
from shared.blocks import chain, root
from shared.fields import pack_ids

BLOCK = 8
ROOT = root("model", "float32", BLOCK, "tenant")
positive = st.floats(1e-3, 1e3)


@given(st.lists(st.integers(0, 99), max_size=60), st.integers(0, 7))
def test_a_chain_is_continued_where_it_is_known(tokens: list[int], known: int) -> None:
    whole = chain(ROOT, pack_ids(tokens), BLOCK)
    assert whole_chain(whole[:known], [ROOT, *whole[:known]][-1], tokens, BLOCK) == whole
    named = labels(b"s" * 16, whole, tokens, known, BLOCK)
    assert [label.hash for label in named] == whole[known:]
    assert b"".join(label.ids for label in named) == pack_ids(tokens[known * BLOCK : len(whole) * BLOCK])


def test_spaces_differ_by_all_that_shapes_a_page() -> None:
    given = [("m", "k", 16), ("n", "k", 16), ("m", "l", 16), ("m", "k", 8), ("m k", "", 16)]
    assert len({space(*each) for each in given}) == len(given)


@given(positive, positive, st.integers(1, 1000))
def test_a_fetch_pays_where_it_is_faster(prefill_s: float, fetch_s: float, pages: int) -> None:
    """Measured per page; the time to ask aside."""
    worth = Worth(page_bytes=1000, block_size=BLOCK)
    worth.note_prefill(100 * BLOCK, 100 * prefill_s)
    for _ in range(60):
        worth.fetch("a:1").note(1000, fetch_s)
    faster = pages * fetch_s < min(pages * prefill_s, LONGEST_S)
    gain = worth.gain_s("a:1", pages)
    assert abs(gain) < 0.01 * pages * (prefill_s + fetch_s) + 0.01 or (gain > 0) == faster


def test_nothing_is_slow_for_ever() -> None:
    """A cache that was slow once is asked again: each refusal is a reason less for the next."""
    worth = Worth(page_bytes=1 << 20, block_size=BLOCK)
    worth.note_prefill(1000, 1.0)
    worth.fetch("/cache").note(1 << 20, 1000.0)
    worth.fetch("/cache").value = 1000.0
    refusals = 0
    while worth.gain_s("/cache", 100) < 0:
        worth.fetch("/cache").doubt()
        refusals += 1
    assert 0 < refusals < 50


def test_short_prefills_tell_nothing() -> None:
    worth = Worth(page_bytes=1, block_size=BLOCK)
    worth.note_prefill(3, 100.0)
    assert worth.prefill_s(5) == LONGEST_S
