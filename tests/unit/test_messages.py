"""What goes over the wire comes back the same, and what is not ours is refused without harm."""

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.codec import VERSION, Malformed, decode, encode
from shared.fields import MAX_MESSAGE_BYTES, pack_ids, unpack_ids
from shared.layout import Placement
from shared.messages import Cancel, Claim, End, Sampling, Step, Submit, Tokens, Work

ids = st.lists(st.integers(0, 2**31 - 1), max_size=50)
END = End(
    request="r", epoch=(1, 2, 3), choice=0, count=4, reason="stop", cached_tokens=0,
    tokenize_ms=1.0, queue_ms=1.0, prefill_ms=1.0, decode_ms=1.0,
)  # fmt: skip


@given(ids)
def test_ids(ids: list[int]) -> None:
    packed = pack_ids(ids)
    assert len(packed) == 4 * len(ids)
    assert list(unpack_ids(packed)) == ids
    assert packed[:4] == (ids[0].to_bytes(4, "little") if ids else b"")


@given(st.lists(ids, max_size=8), st.integers(0, 9), st.text(max_size=50), st.none() | st.integers(1, 99))
def test_submit_comes_back(given: list[list[int]], generation: int, text: str, max_tokens: int | None) -> None:
    item = Submit(
        request="abc",
        tenant="t",
        partition="p",
        log_from="5-1",
        generation=generation,
        given=tuple(map(pack_ids, given)),
        ends=(None, END),
        prompt=text,
        sampling=Sampling(logit_bias=((5, 1.5),), stop_ids=(2,)),
        max_tokens=max_tokens,
        deadline_ms=10**13,
    )
    assert decode(encode(item)) == item


def test_a_placement_tells_of_every_token() -> None:
    work = Work(
        request="r", tenant="t", partition="p", log_from="5-1", generation=0, given=(), ends=(), prompt=pack_ids(range(9)),
        root=bytes(16), blocks=b"", sampling=Sampling(), max_tokens=1, deadline_ms=0, tokenize_ms=0.0,
        placement=Placement(head=2, parts=(((2, 1), (9, 3)),), rest=((20, 2), (30, 1))),
    )  # fmt: skip
    assert decode(encode(work)) == work
    assert work.placement is not None and work.placement.end == 31
    with pytest.raises(Malformed):
        decode(encode(work.model_copy(update={"prompt": pack_ids(range(8))})))


@given(ids, st.integers(0, 7))
def test_step_comes_back(ids: list[int], choice: int) -> None:
    tokens = Tokens(request="r", epoch=(0, 1, 2), choice=choice, first=3, digest=b"12345678", ids=pack_ids(ids))
    item = Step(records=(Claim(request="r", epoch=(0, 1, 2), prompt_tokens=9), tokens, END))
    assert decode(encode(item)) == item


@given(st.binary(max_size=200))
def test_noise_is_malformed(noise: bytes) -> None:
    with pytest.raises(Malformed):
        decode(noise)


GOOD = Cancel(request="r", generation=1).model_dump()


@pytest.mark.parametrize(
    "body",
    [
        [VERSION + 1, GOOD],
        [VERSION],
        GOOD,
        [VERSION, GOOD | {"kind": "nope"}],
        [VERSION, GOOD | {"generation": "1"}],
        [VERSION, GOOD | {"generation": -1}],
        [VERSION, GOOD | {"generation": True}],
        [VERSION, GOOD | {"extra": 1}],
        [VERSION, GOOD | {"request": "../etc"}],
        [VERSION, {"kind": "cancel"}],
        [VERSION, msgpack.ExtType(5, b"x")],
    ],
)
def test_wrong_messages_are_malformed(body: object) -> None:
    with pytest.raises(Malformed):
        decode(msgpack.packb(body))


def test_size_is_limited_both_ways() -> None:
    with pytest.raises(Malformed):
        decode(b"\x00" * (MAX_MESSAGE_BYTES + 1))
    tokens = Tokens(request="r", epoch=(0, 1, 2), choice=0, first=0, digest=b"12345678", ids=b"\0" * MAX_MESSAGE_BYTES)
    with pytest.raises(ValueError, match="larger"):
        encode(Step(records=(tokens,)))
