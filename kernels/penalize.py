"""Penalties on logits, in place, from what each draw's sequence has said so far.

    logits     float32 [draws, vocab]
    slots      int32 [draws]
    seen       int32 [slots, vocab]    times a token is in the output, plus IN_PROMPT where it is in the prompt
    repetition float32 [draws]         1: none; a seen token's logit is divided by it if positive, else multiplied
    frequency, presence float32 [draws]   subtracted times the count, and once, for what is in the output

Keskar et al., "CTRL" (2019), for the first; OpenAI's API for the other two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

IN_PROMPT = 1 << 30
_IN_PROMPT = tl.constexpr(IN_PROMPT)


def reference(logits: Tensor, slots: Tensor, seen: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor) -> Tensor:
    mine, wide = seen[slots.long()], logits.double()
    factor = repetition.double().unsqueeze(1)
    repeated = torch.where(wide > 0, wide / factor, wide * factor)
    wide = torch.where(mine > 0, repeated, wide)
    counts = (mine % IN_PROMPT).double()
    return wide - counts * frequency.double().unsqueeze(1) - (counts > 0) * presence.double().unsqueeze(1)


@triton.jit(do_not_specialize_on_alignment=["slots", "repetition", "frequency", "presence"])
def _penalize(logits, slots, seen, repetition, frequency, presence, vocab, logits_row, BLOCK: tl.constexpr):
    draw = tl.program_id(0)
    factor = tl.load(repetition + draw)
    often = tl.load(frequency + draw)
    once = tl.load(presence + draw)
    if (factor != 1.0) | (often != 0.0) | (once != 0.0):
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        place = logits + draw.to(tl.int64) * logits_row + at
        value = tl.load(place, mask=at < vocab)
        mine = tl.load(seen + tl.load(slots + draw).to(tl.int64) * vocab + at, mask=at < vocab, other=0)
        value = tl.where(mine > 0, tl.where(value > 0, value / factor, value * factor), value)
        count = mine & (_IN_PROMPT - 1)
        value -= count.to(tl.float32) * often + tl.where(count > 0, once, 0.0)
        tl.store(place, value, mask=at < vocab)


def penalize(logits: Tensor, slots: Tensor, seen: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor) -> None:
    draws, vocab = logits.shape
    _penalize[(draws, triton.cdiv(vocab, 4096))](
        logits, slots, seen, repetition, frequency, presence, vocab, logits.stride(0), 4096, num_warps=8
    )
