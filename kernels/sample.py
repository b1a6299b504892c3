"""Draws tokens from logits on the device, each by its own rules; nothing waits for the host.

    logits      float32 [rows, vocab]   -inf is allowed; a NaN, or a row without a finite maximum, answers -1
    rows        int32 [draws]           which row a draw is from
    slots       int32 [draws]           where `newest` takes its token
    temperature float32 [draws]         0: the largest logit, and of equals the first
    top_k       int32 [draws]           0: no limit
    top_p, min_p float32 [draws]        1 and 0: no limit
    seeds       int64 [draws]           the noise depends on this and the token's id alone
    newest      int32 [slots]           out
    out         int32 [draws]           out

The filters leave what is at least a threshold: min-p first, then the k largest, then the fewest of the largest that hold the
share p of what is left (equals of the last one stay too). The threshold is found by halving the range of float32 patterns,
over the few candidates near the maximum where these suffice. Then the largest of logit / temperature + Gumbel noise is a draw
from the softmax (Gumbel, 1954; Maddison et al., 2014); the noise is Philox (Salmon et al., 2011), so it needs no state.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLITS = 16  # programs that share a row, at most
BLOCK = 2048  # logits a program takes at once
NEAR = tl.constexpr(12.0)  # candidates weigh at least exp(-12) of the largest
CANDIDATES = 8192  # at most so many


@dataclass(frozen=True)
class Rules:
    """How each draw is made; the arrays of the statement."""

    rows: Tensor
    slots: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor


def support(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Reference for one row [vocab]: bool, which tokens the filters leave; float64."""
    weights = ((logits.double() - logits.double().max()) / temperature).exp()
    kept = weights >= min_p
    if 0 < top_k < len(logits):
        kept &= logits >= logits[kept].sort(descending=True).values[: int(top_k)].min()
    if top_p < 1:
        order = weights.where(kept, 0).sort(descending=True)
        before = order.values.cumsum(0) - order.values
        last = order.values[before < top_p * order.values.sum()].min()
        kept &= weights >= last
    return kept


@triton.jit
def _key(value):
    """float32 patterns as int64 in the order of the numbers."""
    bits = value.to(tl.float32).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _number(key):
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _tally(source, count, least, peak, heat, BLOCK: tl.constexpr):
    """How many of `count` logits are at least `least`, and what they weigh together."""
    many = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(source + at, mask=at < count, other=float("-inf"))
        kept = (value >= least) & (at < count)
        many += kept.to(tl.int32)
        mass += tl.where(kept, tl.exp((value - peak) / heat), 0.0)
    return tl.sum(many, 0), tl.sum(mass, 0)


@triton.jit
def _largest(source, count, low, peak, heat, want_many, want_mass, BLOCK: tl.constexpr):
    """The largest threshold, from `low` on, that leaves at least so many logits of at least such a mass."""
    below = _key(low)
    above = _key(peak)
    while below < above:
        middle = above - (above - below) // 2
        many, mass = _tally(source, count, _number(middle), peak, heat, BLOCK)
        if (many >= want_many) & (mass >= want_mass):
            below = middle
        else:
            above = middle - 1
    return _number(below)


@triton.jit
def _collect(row, vocab, low, near, peak, heat, candidates, ROOM: tl.constexpr, BLOCK: tl.constexpr):
    """Write the logits from `near` on to `candidates`. Their number, their mass, and the mass of all from `low` on."""
    count = 0
    inner = tl.zeros([BLOCK], tl.float32)
    whole = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(row + at, mask=at < vocab, other=float("-inf"))
        weight = tl.where((at < vocab) & (value >= low), tl.exp((value - peak) / heat), 0.0)
        whole += weight
        taken = (value >= near) & (at < vocab)
        inner += tl.where(taken, weight, 0.0)
        place = count + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(candidates + place, value, mask=taken & (place < ROOM))
        count += tl.sum(taken.to(tl.int32), 0)
    tl.debug_barrier()
    return count, tl.sum(inner, 0), tl.sum(whole, 0)


@triton.jit
def _peak(row, vocab, BLOCK: tl.constexpr):
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        peak = tl.maximum(peak, tl.load(row + at, mask=at < vocab, other=float("-inf")))
    return tl.max(peak, 0)


@triton.jit(do_not_specialize_on_alignment=["rows", "temperature", "top_k", "top_p", "min_p"])
def _thresholds(
    logits, rows, temperature, top_k, top_p, min_p, thresholds, candidates, vocab, logits_row, ROOM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    draw = tl.program_id(0)
    heat = tl.load(temperature + draw)
    k = tl.load(top_k + draw)
    p = tl.load(top_p + draw)
    share = tl.load(min_p + draw)
    limited = (k > 0) & (k < vocab)
    least = float("-inf")
    if (heat > 0) & (limited | (p < 1) | (share > 0)):
        row = logits + tl.load(rows + draw).to(tl.int64) * logits_row
        mine = candidates + draw.to(tl.int64) * ROOM
        peak = _peak(row, vocab, BLOCK)
        low = tl.where(share > 0, peak + heat * tl.log(tl.maximum(share, 1e-30)), float("-inf"))
        near = tl.maximum(low, peak - NEAR * heat)
        count, inner, mass = _collect(row, vocab, low, near, peak, heat, mine, ROOM, BLOCK)
        few = (count <= ROOM) & tl.where(limited, (count >= k) | (near <= low), (p >= 1) | (inner >= p * mass) | (near <= low))
        source = row
        n = vocab
        if few:
            source = mine
            n = count
        if limited:
            low = _largest(source, n, tl.where(few, near, low), peak, heat, tl.minimum(k, n), 0.0, BLOCK)
            _, mass = _tally(source, n, low, peak, heat, BLOCK)
        if p < 1:
            low = _largest(source, n, tl.maximum(low, tl.where(few, near, low)), peak, heat, 1, p * mass, BLOCK)
        least = low
    tl.store(thresholds + draw, least)


@triton.jit(do_not_specialize_on_alignment=["rows", "temperature", "seeds"])
def _pick(
    logits, rows, temperature, seeds, thresholds, best, best_id, vocab, logits_row, chunk,
    FILTERED: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    draw = tl.program_id(0)
    split = tl.program_id(1)
    row = logits + tl.load(rows + draw).to(tl.int64) * logits_row
    heat = tl.load(temperature + draw)
    seed = tl.load(seeds + draw)
    least = tl.load(thresholds + draw) if FILTERED else float("-inf")
    top = float("-inf")
    top_id = vocab
    for start in range(split * chunk, tl.minimum(split * chunk + chunk, vocab), BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(row + at, mask=at < vocab, other=float("-inf"))
        score = value
        if heat > 0:
            uniform = tl.rand(seed, at)
            wait = tl.where(uniform < 1e-3, uniform + uniform * uniform / 2, -tl.log(1 - uniform))
            score = tl.where(value >= least, value / heat - tl.log(tl.maximum(wait, 1e-30)), float("-inf"))
        score = tl.where(value != value, float("inf"), score)
        peak = tl.max(score, 0)
        first = tl.min(tl.where(score == peak, at, vocab), 0)
        if peak > top:
            top = peak
            top_id = first
    tl.store(best + draw * SPLITS + split, top)
    tl.store(best_id + draw * SPLITS + split, top_id)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _settle(best, best_id, slots, newest, out, vocab, SPLITS: tl.constexpr):
    draw = tl.program_id(0)
    at = draw * SPLITS + tl.arange(0, SPLITS)
    score = tl.load(best + at)
    top = tl.max(score, 0)
    token = tl.min(tl.where(score == top, tl.load(best_id + at), vocab), 0)
    token = tl.where((top < float("inf")) & (top > float("-inf")), token, -1)
    tl.store(out + draw, token)
    tl.store(newest + tl.load(slots + draw), tl.maximum(token, 0))


def sample(logits: Tensor, rules: Rules, newest: Tensor, filtered: bool) -> Tensor:
    """int32 [draws]; `filtered`: some draw has a top_k, top_p or min_p."""
    draws, vocab, device = len(rules.rows), logits.shape[1], logits.device
    thresholds = torch.empty(draws if filtered else 0, dtype=torch.float32, device=device)
    if filtered:
        candidates = torch.empty(draws, CANDIDATES, dtype=torch.float32, device=device)
        _thresholds[(draws,)](
            logits, rules.rows, rules.temperature, rules.top_k, rules.top_p, rules.min_p, thresholds, candidates, vocab,
            logits.stride(0), CANDIDATES, 4096, num_warps=8,
        )  # fmt: skip
    splits = min(SPLITS, triton.next_power_of_2(triton.cdiv(vocab, BLOCK)))
    best = torch.empty(draws, splits, dtype=torch.float32, device=device)
    best_id = torch.empty(draws, splits, dtype=torch.int32, device=device)
    _pick[(draws, splits)](
        logits, rules.rows, rules.temperature, rules.seeds, thresholds if filtered else best, best, best_id, vocab,
        logits.stride(0), triton.cdiv(vocab, splits), filtered, splits, BLOCK, num_warps=4,
    )  # fmt: skip
    out = torch.empty(draws, dtype=torch.int32, device=device)
    _settle[(draws,)](best, best_id, rules.slots, newest, out, vocab, splits, num_warps=1)
    return out
