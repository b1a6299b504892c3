"""Checksums of pages: the kernel is the reference to the bit, and no fault of a page goes unseen."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.page_sum import BLOCK, page_sum, reference

LEAST, MOST = -(1 << 63), (1 << 63) - 1


def words(seed: int, *shape: int) -> Tensor:
    return torch.randint(LEAST, MOST, shape, generator=torch.Generator().manual_seed(seed))


def alone(page: Tensor) -> int:
    """The sum of one page [layers, words]."""
    return int(reference(page.unsqueeze(1), torch.tensor([0])))


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("size", [1, 7, 48, BLOCK, BLOCK + 1, 3 * BLOCK - 5])
def test_the_kernel_is_the_reference(layers: int, size: int, device: torch.device) -> None:
    """Between and behind the pages lies what belongs to nobody."""
    wide = words(size, layers, 9, size + 3).to(device)
    pages, where = wide[:, :, :size], torch.tensor([5, 0, 8, 5], device=device)
    found = page_sum(pages, where)
    assert torch.equal(found, reference(pages, where))
    assert found[0] == found[3]
    wide[:, :, size:] = -1
    wide[:, [1, 2, 3, 4, 6, 7]] = 17
    assert torch.equal(page_sum(pages, where), found)


def test_extreme_words(device: torch.device) -> None:
    pages = torch.tensor([0, -1, LEAST, MOST, 1], device=device).view(1, 1, 5).expand(2, 3, 5).contiguous()
    where = torch.arange(3, device=device)
    assert torch.equal(page_sum(pages, where), reference(pages, where))
    assert len(page_sum(pages, where[:0])) == 0


def test_the_reference_is_the_statement() -> None:
    """In Python's own integers."""
    page, whole = words(1, 2, 5), (1 << 64) - 1
    total = 0
    for at, word in enumerate(page.flatten().tolist(), start=1):
        mixed = (word & whole) ^ at * 0x9E3779B97F4A7C15 & whole
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & whole
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & whole
        total += mixed ^ mixed >> 31
    assert alone(page) & whole == total & whole


FAULTS = {
    "bits": lambda page, at, to, word: page.index_put((at,), page[at] ^ word),
    "a swap": lambda page, at, to, word: page.index_put((torch.stack((at, to)),), page[torch.stack((to, at))]),
    "a shift": lambda page, at, to, word: page.roll(int(at) + 1),
    "a cut": lambda page, at, to, word: torch.cat((page[:at], torch.zeros_like(page[at:]))),
    "another page": lambda page, at, to, word: page.flip(0),
    "nothing": lambda page, at, to, word: torch.zeros_like(page),
    "one value": lambda page, at, to, word: torch.full_like(page, int(word)),
    "a repeat": lambda page, at, to, word: torch.cat((page[: at + 1], page[: len(page) - int(at) - 1])),
}


@given(st.sampled_from(sorted(FAULTS)), st.integers(2, 60), st.integers(1, 3), st.integers(0, 99), st.booleans(), st.data())
@settings(max_examples=300, deadline=None)
def test_faults_are_seen(fault: str, size: int, layers: int, seed: int, plain: bool, data: st.DataObject) -> None:
    """Of pages of noise, and of pages whose words are all nearly the same."""
    page = (words(seed, size) & 1 if plain else words(seed, size)).repeat(layers)
    at, to = (torch.tensor(data.draw(st.integers(0, len(page) - 1))) for _ in "ab")
    word = torch.tensor(data.draw(st.one_of(st.integers(0, 62).map(lambda bit: 1 << bit), st.integers(LEAST, MOST))))
    hurt = FAULTS[fault](page, at, to, word)
    assert (alone(page.view(layers, -1)) == alone(hurt.view(layers, -1))) == torch.equal(page, hurt)


@given(st.integers(0, 63), st.integers(0, 40), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_a_flipped_bit(bit: int, at: int, seed: int) -> None:
    page = words(seed, 1, 41)
    hurt = page.clone()
    hurt[0, at] ^= (1 << bit) - (1 << 64 if bit == 63 else 0)
    assert alone(page) != alone(hurt)
