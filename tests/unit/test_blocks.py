"""Block hashes: equal prefixes share them, anything else that shapes the bytes changes them."""

from hypothesis import given
from hypothesis import strategies as st

from shared.blocks import HASH_BYTES, chain, root
from shared.fields import pack_ids

ids = st.lists(st.integers(0, 50000), max_size=80)
SIZE = 8


@given(ids, ids, ids)
def test_chains_share_exactly_their_common_blocks(common: list[int], left: list[int], right: list[int]) -> None:
    start = root("model", "float32", SIZE, "tenant")
    one, two = (chain(start, pack_ids(common + rest), SIZE) for rest in (left, right))
    a, b = common + left, common + right
    same = next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert len(one) == len(a) // SIZE
    for at, (x, y) in enumerate(zip(one, two, strict=False)):
        assert (x == y) == ((at + 1) * SIZE <= same)
    assert all(len(hash) == HASH_BYTES for hash in one)


def test_the_root_holds_all_that_shapes_the_bytes() -> None:
    roots = {
        root("m", "float32", 16, "a"),
        root("n", "float32", 16, "a"),
        root("m", "bfloat16", 16, "a"),
        root("m", "float32", 32, "a"),
        root("m", "float32", 16, "b"),
    }
    assert len(roots) == 5
