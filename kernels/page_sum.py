"""Checksums of pages where they lie: a page's words of all layers, each mixed with its place, added up.

    pages int64 [layers, blocks, words]       any strides but the last: the bytes of all pages, eight a word
    where int64 [n]                           the blocks to sum
    sums  int64 [n]                           sum over i of mix(word[i] xor (i + 1) * GOLDEN) mod 2^64; i: layer * words + word

`mix` is the finalizer of SplitMix64 (Steele, Lea and Flood 2014), which maps no two words to the same one. So a fault within
one word (any of its bits, or all of them) always changes the sum. Any other fault (words swapped, shifted, lost, of another
page) goes unseen about once in 2^64: each word is mixed with its own place, so order counts, and zeros do not sum to zero.

Against accidents, not against an attacker: whoever may write pages may write their sums. Who may do that, and whose pages an
engine asks for, is the business of tenants and labels. Addition has no order, so the sum is the same however the work is cut.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
FIRST, SECOND = tl.constexpr(0xBF58476D1CE4E5B9), tl.constexpr(0x94D049BB133111EB)
BLOCK = 1024  # words a program has in registers at once


def reference(pages: Tensor, where: Tensor) -> Tensor:
    """The same in plain torch, whose int64 wraps around as the kernel's unsigned words do."""
    words = pages[:, where].transpose(0, 1).flatten(1)
    places = torch.arange(1, words.shape[1] + 1, device=pages.device)
    mixed = words ^ places * _signed(GOLDEN.value)
    mixed = (mixed ^ _shifted(mixed, 30)) * _signed(FIRST.value)
    mixed = (mixed ^ _shifted(mixed, 27)) * _signed(SECOND.value)
    return (mixed ^ _shifted(mixed, 31)).sum(1)


def _signed(word: int) -> int:
    return word - (1 << 64)


def _shifted(words: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in from the left."""
    return words >> bits & (1 << 64 - bits) - 1


@triton.jit(do_not_specialize=["where", "parts"])
def _page_sum(pages, where, parts, layer_stride, page_stride, words, BLOCK: tl.constexpr):
    """One layer of one page."""
    page, layer = tl.program_id(0), tl.program_id(1)
    begin = pages + layer.to(tl.int64) * layer_stride + tl.load(where + page) * page_stride
    total = tl.zeros([BLOCK], tl.uint64)
    for start in range(0, words, BLOCK):
        at = start + tl.arange(0, BLOCK)
        word = tl.load(begin + at, mask=at < words, other=0).to(tl.uint64, bitcast=True)
        place = (layer.to(tl.int64) * words + at + 1).to(tl.uint64)
        mixed = word ^ place * GOLDEN
        mixed = (mixed ^ mixed >> 30) * FIRST
        mixed = (mixed ^ mixed >> 27) * SECOND
        total += tl.where(at < words, mixed ^ mixed >> 31, 0)
    tl.store(parts + page * tl.num_programs(1) + layer, tl.sum(total, 0).to(tl.int64, bitcast=True))


def page_sum(pages: Tensor, where: Tensor) -> Tensor:
    layers, _, words = pages.shape
    if pages.stride(2) != 1 or not where.is_contiguous() or pages.dtype != torch.int64 or where.dtype != torch.int64:
        raise ValueError("pages and blocks must be int64, the words of a page side by side")
    parts = torch.empty(len(where), layers, dtype=torch.int64, device=pages.device)
    if len(where):
        _page_sum[(len(where), layers)](pages, where, parts, pages.stride(0), pages.stride(1), words, BLOCK, num_warps=4)
    return parts.sum(1)
