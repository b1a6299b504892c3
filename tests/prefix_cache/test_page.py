"""A page is what its label says, or it is not used: any flipped bit, cut or swap is noticed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.page import HEAD_BYTES, BadPage, Label, checksum, claim, head, slot_bytes

LABEL = Label(space=b"s" * 16, hash=b"h" * 16, ids=bytes(range(64)))
sums = st.integers(0, (1 << 64) - 1)


@given(sums, st.integers(1, 1 << 40), st.data())
def test_a_flipped_bit(payload_sum: int, size: int, data: st.DataObject) -> None:
    header = bytearray(head(LABEL, size, payload_sum))
    assert claim(header, LABEL, size) == payload_sum
    bit = data.draw(st.integers(0, 8 * len(header) - 1))
    header[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BadPage):
        claim(header, LABEL, size)


@given(st.binary(min_size=1, max_size=200), st.data())
def test_a_flipped_bit_of_a_payload(payload: bytes, data: st.DataObject) -> None:
    """Its sum is the same in whatever parts it is read."""
    cut, bit = data.draw(st.integers(0, len(payload))), data.draw(st.integers(0, 8 * len(payload) - 1))
    assert checksum(payload[:cut], payload[cut:]) == checksum(payload)
    hurt = bytearray(payload)
    hurt[bit // 8] ^= 1 << bit % 8
    assert checksum(hurt) != checksum(payload)


@given(st.integers(0, 300), st.integers(0, 300))
def test_a_cut(length: int, size: int) -> None:
    header = head(LABEL, 200, 7)
    wanted = "truncated" if length < len(header) else "length" if size != 200 else ""
    if wanted:
        with pytest.raises(BadPage, match=wanted):
            claim(header[:length], LABEL, size)
    else:
        assert claim(header[:length], LABEL, size) == 7


@given(st.sampled_from(("space", "hash", "ids")), st.binary(min_size=64, max_size=64))
def test_another_label(field: str, other: bytes) -> None:
    meant = LABEL._replace(**{field: other[: len(getattr(LABEL, field))]})
    header = head(LABEL, 2, 7)
    if meant == LABEL:
        assert claim(header, meant, 2) == 7
    else:
        with pytest.raises(BadPage, match="tokens" if field == "ids" else field):
            claim(header, meant, 2)


def test_never_written() -> None:
    with pytest.raises(BadPage, match="header"):
        claim(bytes(HEAD_BYTES), LABEL, 2)


def test_slots_are_whole_memory_pages() -> None:
    assert slot_bytes(1) == 2 * HEAD_BYTES
    assert slot_bytes(HEAD_BYTES) == 2 * HEAD_BYTES
    assert slot_bytes(HEAD_BYTES + 1) == 3 * HEAD_BYTES
