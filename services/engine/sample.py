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

CANDIDATES = 128  # so many of the largest logits are sorted first; all of them only where that is not enough


class Histories:
    """What penalties count: the tokens so far of each slot whose sequence has a penalty, as (prompt, output)."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[list[int], list[int]]] = {}

    def of(self, draw: Draw) -> tuple[list[int], list[int]]:
        if draw.begins:
            self._of[draw.slot] = (list(draw.prompt), list(draw.output))
        return self._of[draw.slot]

    def note(self, draws: tuple[Draw, ...], answers: list[Sampled]) -> None:
        for draw, answer in zip(draws, answers, strict=True):
            if _penalized(draw.sampling):
                self._of[draw.slot][1].append(answer.token)


def sample(logits: Tensor, draw_row: Tensor, draws: tuple[Draw, ...], histories: Histories) -> list[Sampled]:
    """One answer per draw, from row draw_row[i] of logits [rows, vocab] float32. Token -1: they were not finite."""
    answers = _sample(logits, draw_row, draws, histories)
    histories.note(draws, answers)
    return answers


def _sample(logits: Tensor, draw_row: Tensor, draws: tuple[Draw, ...], histories: Histories) -> list[Sampled]:
    if all(_is_plain(draw) for draw in draws):
        # By numpy, four times as fast as torch. It is where a NaN is, if there is one.
        largest = torch.from_numpy(logits.numpy().argmax(1))
        found = logits.gather(1, largest.unsqueeze(1)).squeeze(1)
        return [Sampled(token) for token in largest.where(found.isfinite(), -1)[draw_row].tolist()]
    same = draw_row.tolist() == list(range(len(logits)))
    raw = logits if same else logits[draw_row]  # [draws, vocab]
    sound = raw.amax(1).isfinite()
    if not sound.all():
        raw = raw.masked_fill(~sound.unsqueeze(1), 0)
    tokens = _pick(_edited(raw, draws, histories), draws)
    reports = [_logprob(row, token, draw.sampling) for row, token, draw in zip(raw, tokens, draws, strict=True)]
    answers = zip(tokens, reports, sound.tolist(), strict=True)
    return [Sampled(token, report) if good else Sampled(-1) for token, report, good in answers]


def _is_plain(draw: Draw) -> bool:
    return draw.sampling.temperature == 0 and draw.sampling.logprobs is None and not _has_edits(draw)


def _penalized(s: Sampling) -> bool:
    return s.repetition_penalty != 1 or s.frequency_penalty != 0 or s.presence_penalty != 0


def _has_edits(draw: Draw) -> bool:
    s = draw.sampling
    return _penalized(s) or bool(s.logit_bias) or not (draw.allow_stop or not s.stop_ids)


def _edited(raw: Tensor, draws: tuple[Draw, ...], histories: Histories) -> Tensor:
    if not any(_has_edits(draw) for draw in draws):
        return raw
    edited = raw.clone()
    for row, draw in zip(edited, draws, strict=True):
        if _has_edits(draw):
            _edit(row, draw, histories)
    return edited


def _edit(row: Tensor, draw: Draw, histories: Histories) -> None:
    """Penalties, bias and stop mask on one row [vocab], in place."""
    s = draw.sampling
    prompt, output = histories.of(draw) if _penalized(s) else ([], [])
    if s.repetition_penalty != 1:
        seen = torch.from_numpy(np.unique(np.array(prompt + output, dtype=np.int64)))
        values = row[seen]
        row[seen] = torch.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
    if s.frequency_penalty or s.presence_penalty:
        ids, counts = np.unique(np.array(output, dtype=np.int64), return_counts=True)
        row[torch.from_numpy(ids)] -= torch.from_numpy(s.frequency_penalty * counts + s.presence_penalty).float()
    for token, bias in s.logit_bias:
        row[token : token + 1] += bias  # a slice: a token that the vocabulary lacks changes nothing
    for token in () if draw.allow_stop else s.stop_ids:
        row[token : token + 1] = -math.inf


def _pick(logits: Tensor, draws: tuple[Draw, ...]) -> list[int]:
    """The largest where the temperature is 0, else a draw from what the filters leave."""
    warm = [i for i, draw in enumerate(draws) if draw.sampling.temperature > 0]
    if len(warm) == len(draws):
        tokens = _draw(logits, list(draws))
    else:
        tokens = logits.argmax(1)
        tokens[warm] = _draw(logits[warm], [draws[i] for i in warm]) if warm else tokens[warm]
    picked: list[int] = tokens.tolist()
    return picked


def _draw(logits: Tensor, draws: list[Draw]) -> Tensor:
    """[draws] int64. Sorting is dear: top-k and top-p sort few logits first, and all only if these fall short."""
    heat = torch.tensor([[draw.sampling.temperature] for draw in draws], dtype=torch.float32)
    heated = (logits - logits.amax(1, keepdim=True)).div_(heat.clamp_(min=1e-5))  # the largest is 0, weights at most 1
    tokens = torch.zeros(len(draws), dtype=torch.int64)
    rows = [i for i, draw in enumerate(draws) if draw.sampling.top_k or draw.sampling.top_p < 1]
    free = sorted(set(range(len(draws))) - set(rows))
    if free:
        tokens[free] = _from_all(heated[free], [draws[i] for i in free])
    width = min(CANDIDATES, heated.shape[1])
    while rows:
        found, enough = _from_largest(heated[rows], [draws[i] for i in rows], width)
        tokens[rows] = found
        rows = [i for i, good in zip(rows, enough, strict=True) if not good]
        width = heated.shape[1]
    return tokens


def _from_all(heated: Tensor, draws: list[Draw]) -> Tensor:
    weights = heated.exp()
    if any(draw.sampling.min_p for draw in draws):
        weights.masked_fill_(weights < torch.tensor([[draw.sampling.min_p] for draw in draws]), 0)
    return _invert(weights, draws)


def _from_largest(heated: Tensor, draws: list[Draw], width: int) -> tuple[Tensor, list[bool]]:
    """Draws from each row's `width` largest, and whether these hold all that the filters leave: else draw again."""
    values, ids = heated.topk(width, dim=1)  # falling
    last, enough = _last_kept(values, heated, [draw.sampling for draw in draws])
    weights = values.exp().masked_fill_(torch.arange(width) > last.unsqueeze(1), 0)
    ids, order = ids.sort(1)
    return ids.gather(1, _invert(weights.gather(1, order), draws).unsqueeze(1)).squeeze(1), enough.tolist()


def _last_kept(values: Tensor, heated: Tensor, samplings: list[Sampling]) -> tuple[Tensor, Tensor]:
    """The index [rows] among the falling values [rows, width] of the last that min-p, top-k and top-p keep."""
    width, vocab = values.shape[1], heated.shape[1]
    k = torch.tensor([min(s.top_k or vocab, vocab) for s in samplings])
    p = torch.tensor([s.top_p for s in samplings])
    least = torch.tensor([s.min_p for s in samplings])
    kept = values.exp()
    kept.masked_fill_((torch.arange(width) >= k.unsqueeze(1)) | (kept < least.unsqueeze(1)), 0)
    closed = (k <= width) | (kept[:, -1] == 0)  # nothing behind the sorted ones survives min-p and top-k
    cumulated = kept.cumsum(1)
    mass = cumulated[:, -1].clone() if closed.all() else cumulated[:, -1].where(closed, heated.exp().sum(1))
    before = cumulated - kept  # a token stays while those before it have not reached p
    stays = (kept > 0) & ((before < (p * mass).unsqueeze(1)) | (p >= 1).unsqueeze(1))
    enough = closed | ((k == vocab) & (least == 0) & (p < 1) & (cumulated[:, -1] >= p * mass))
    return stays.sum(1).clamp(min=1) - 1, enough


def _invert(weights: Tensor, draws: list[Draw]) -> Tensor:
    """The first index [draws] at which the cumulated weights [draws, any] exceed the draw's share of their sum."""
    cumulated = weights.cumsum(1)  # summed in double precision inside
    noise = torch.tensor([[uniform(draw.sampling.seed, draw.choice, draw.position)] for draw in draws])
    total = cumulated[:, -1:]
    below = (noise * total).minimum(torch.nextafter(total, torch.zeros(())))  # rounding must not reach the sum itself
    return torch.searchsorted(cumulated, below, right=True).squeeze(1)


def _logprob(raw: Tensor, token: int, sampling: Sampling) -> Logprob | None:
    if sampling.logprobs is None:
        return None
    logs = raw.log_softmax(0)
    top = logs.topk(min(sampling.logprobs, len(logs)))
    return logs[token].item(), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
