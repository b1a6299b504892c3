"""A page is what its label says, or it is not used: any flipped bit, cut or swap is noticed."""

from hypothesis import given
from hypothesis import strategies as st

from shared.page import HEAD_BYTES, Label, head, slot_bytes, verify

LABEL = Label(space=b"s" * 16, hash=b"h" * 16, ids=bytes(range(64)))


@given(st.binary(min_size=1, max_size=200), st.data())
def test_a_flipped_bit(payload: bytes, data: st.DataObject) -> None:
    header = head(LABEL, payload)
    assert verify(header, payload, LABEL) == ""
    page = bytearray(header + payload)
    bit = data.draw(st.integers(0, 8 * len(page) - 1))
    page[bit // 8] ^= 1 << bit % 8
    assert verify(page[: len(header)], page[len(header) :], LABEL)


@given(st.binary(max_size=200), st.integers(0, 199))
def test_a_cut(payload: bytes, length: int) -> None:
    header = head(LABEL, payload)
    assert verify(header[:length], payload, LABEL) == ("truncated" if length < len(header) else "")
    if length < len(payload):
        assert verify(header, payload[:length], LABEL) == "length"


@given(st.sampled_from(("space", "hash", "ids")), st.binary(min_size=64, max_size=64))
def test_another_label(field: str, other: bytes) -> None:
    meant = {"space": LABEL.space, "hash": LABEL.hash, "ids": LABEL.ids}
    meant[field] = other[: len(meant[field])]
    found = verify(head(LABEL, b"kv"), b"kv", Label(**meant))
    assert bool(found) == (Label(**meant) != LABEL)


def test_never_written() -> None:
    assert verify(bytes(HEAD_BYTES), b"kv", LABEL)


def test_slots_are_whole_memory_pages() -> None:
    assert slot_bytes(1) == 2 * HEAD_BYTES
    assert slot_bytes(HEAD_BYTES) == 2 * HEAD_BYTES
    assert slot_bytes(HEAD_BYTES + 1) == 3 * HEAD_BYTES
