"""Logits -> tokens, for all draws of a step at once.

A draw's logits go through: penalties, bias, mask of stop ids, temperature, min-p, top-k, top-p (the order of the last
three is vLLM's). Then one uniform number, keyed by (seed, choice, position), picks from the cumulated probabilities in
order of id. Logprobs are those of the raw logits, before all of this.
"""

import math

import numpy as np
import torch
from torch import Tensor

from services.engine.noise import uniform
from services.engine.plan import Draw, Sampled
from shared.messages import Logprob, Sampling

CANDIDATES = 1024  # so many of the largest logits are sorted first; all of them only where that is not enough


def sample(logits: Tensor, draw_row: Tensor, draws: tuple[Draw, ...]) -> list[Sampled]:
    """One answer per draw, from row draw_row[i] of logits [rows, vocab] float32. Token -1: they were not finite."""
    if all(_is_plain(draw) for draw in draws):
        largest = logits.argmax(1)  # which is where a NaN is, if there is one
        found = logits.gather(1, largest.unsqueeze(1)).squeeze(1)
        return [Sampled(token) for token in largest.where(found.isfinite(), -1)[draw_row].tolist()]
    raw = logits[draw_row]  # [draws, vocab], a copy
    sound = raw.amax(1).isfinite()
    raw.masked_fill_(~sound.unsqueeze(1), 0)
    tokens = _pick(_edited(raw, draws), draws)
    reports = [_logprob(row, token, draw.sampling) for row, token, draw in zip(raw, tokens, draws, strict=True)]
    answers = zip(tokens, reports, sound.tolist(), strict=True)
    return [Sampled(token, report) if good else Sampled(-1) for token, report, good in answers]


def _is_plain(draw: Draw) -> bool:
    return draw.sampling.temperature == 0 and draw.sampling.logprobs is None and not _has_edits(draw)


def _has_edits(draw: Draw) -> bool:
    s = draw.sampling
    penalized = s.repetition_penalty != 1 or s.frequency_penalty != 0 or s.presence_penalty != 0
    return penalized or bool(s.logit_bias) or not (draw.allow_stop or not s.stop_ids)


def _edited(raw: Tensor, draws: tuple[Draw, ...]) -> Tensor:
    edited = raw.clone()
    for row, draw in zip(edited, draws, strict=True):
        if _has_edits(draw):
            _edit(row, draw)
    return edited


def _edit(row: Tensor, draw: Draw) -> None:
    """Penalties, bias and stop mask on one row [vocab], in place."""
    s = draw.sampling
    if s.repetition_penalty != 1:
        seen = torch.from_numpy(np.unique(np.array(draw.prompt + draw.output, dtype=np.int64)))
        values = row[seen]
        row[seen] = torch.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
    if s.frequency_penalty or s.presence_penalty:
        ids, counts = np.unique(np.array(draw.output, dtype=np.int64), return_counts=True)
        row[torch.from_numpy(ids)] -= torch.from_numpy(s.frequency_penalty * counts + s.presence_penalty).float()
    for token, bias in s.logit_bias:
        row[token : token + 1] += bias  # a slice: a token that the vocabulary lacks changes nothing
    for token in () if draw.allow_stop else s.stop_ids:
        row[token : token + 1] = -math.inf


def _pick(logits: Tensor, draws: tuple[Draw, ...]) -> list[int]:
    """The largest where the temperature is 0, else a draw from what the filters leave."""
    tokens = logits.argmax(1)
    warm = [i for i, draw in enumerate(draws) if draw.sampling.temperature > 0]
    if warm:
        tokens[warm] = _draw(logits[warm], [draws[i] for i in warm])
    picked: list[int] = tokens.tolist()
    return picked


def _draw(logits: Tensor, draws: list[Draw]) -> Tensor:
    """Inverse of the cumulated weights, in order of id, at the draw's uniform number: [draws] int64."""
    heat = torch.tensor([[draw.sampling.temperature] for draw in draws], dtype=torch.float32)
    heated = (logits - logits.amax(1, keepdim=True)).div_(
        heat.clamp(min=1e-5)
    )  # 0 is the largest: weights are at most 1
    floors = _floors(heated, [draw.sampling for draw in draws])
    weights = heated.exp().masked_fill_(heated < floors.unsqueeze(1), 0)
    total = weights.cumsum(1, dtype=torch.float64)
    noise = [[uniform(draw.sampling.seed, draw.choice, draw.position)] for draw in draws]
    at = torch.tensor(noise, dtype=torch.float64) * total[:, -1:]
    return torch.searchsorted(total, at, right=True).squeeze(1)


def _floors(heated: Tensor, samplings: list[Sampling]) -> Tensor:
    """The smallest logit that the filters keep, per row. Equals of the last kept one are kept too."""
    floors = torch.tensor([math.log(s.min_p) if s.min_p else -math.inf for s in samplings])
    rows = [i for i, s in enumerate(samplings) if s.top_k or s.top_p < 1]
    width = min(CANDIDATES, heated.shape[1])
    while rows:
        found, enough = _cut(heated[rows], floors[rows], [samplings[i] for i in rows], width)
        done = [i for i, good in zip(rows, enough, strict=True) if good]
        floors[done] = found[torch.tensor(enough)]
        rows, width = [i for i, good in zip(rows, enough, strict=True) if not good], heated.shape[1]
    return floors


def _cut(heated: Tensor, floors: Tensor, samplings: list[Sampling], width: int) -> tuple[Tensor, list[bool]]:
    """Raise the floors [rows] to top-k's, then top-p's, by each row's `width` largest; and whether these sufficed."""
    vocab = heated.shape[1]
    largest = heated.topk(width, dim=1).values  # [rows, width], falling
    k = torch.tensor([min(s.top_k or vocab, vocab) for s in samplings])
    kth = largest.gather(1, (k.clamp(max=width) - 1).unsqueeze(1)).squeeze(1)
    floors = floors.maximum(kth.where(k < vocab, -math.inf))
    p = torch.tensor([s.top_p for s in samplings])
    weights = heated.exp().masked_fill_(heated < floors.unsqueeze(1), 0).sum(1)  # [rows], before top-p
    kept = largest.exp().masked_fill_(largest < floors.unsqueeze(1), 0)
    total = kept.cumsum(1)
    count = (total - kept < (p * weights).unsqueeze(1)).sum(1).clamp(min=1)  # those before which p is not reached
    last = largest.gather(1, (count - 1).unsqueeze(1)).squeeze(1)
    enough = ((k <= width) | (k == vocab)) & ((p >= 1) | (total[:, -1] >= p * weights) | (width == vocab))
    return floors.maximum(last.where(p < 1, -math.inf)), enough.tolist()


def _logprob(raw: Tensor, token: int, sampling: Sampling) -> Logprob | None:
    if sampling.logprobs is None:
        return None
    logs = raw.log_softmax(0)
    top = logs.topk(min(sampling.logprobs, len(logs)))
    return logs[token].item(), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
