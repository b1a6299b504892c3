"""Sampling on the device: what penalties count is kept there, and nothing waits for the host."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kernels.penalize import IN_PROMPT, penalize
from kernels.sample import sample
from services.engine.gpu.rulebook import Rulebook, penalized
from services.engine.gpu.transfer import Mark, fetch, send
from services.engine.plan import Draw, Sampled


@dataclass(frozen=True, slots=True)
class Report:
    """Logprobs on their way to the host, for the draws `asked` (index, how many alternatives)."""

    asked: tuple[tuple[int, int], ...]
    own: Tensor  # [asked] float32, pinned
    top: Tensor  # [asked, most] float32
    top_ids: Tensor  # [asked, most] int64


@dataclass(frozen=True, slots=True)
class Answers:
    """A step's tokens [draws] on their way to the host."""

    tokens: Tensor
    report: Report | None
    arrived: Mark

    def read(self) -> list[Sampled]:
        """Waits until they are there."""
        self.arrived.wait()
        found = [Sampled(token) for token in self.tokens.tolist()]
        if self.report is not None:
            told = (self.report.own.tolist(), self.report.top.tolist(), self.report.top_ids.tolist())
            for (at, count), own, top, ids in zip(self.report.asked, *told, strict=True):
                found[at] = Sampled(found[at].token, (own, tuple(zip(ids[:count], top[:count], strict=True))))
        return found


class Draws:
    """`newest` [slots + 1] int32 is the token drawn last in each slot; the last entry is padding's."""

    def __init__(self, slots: int, vocab: int, device: torch.device) -> None:
        self.vocab, self.device = vocab, device
        self.newest = torch.zeros(slots + 1, dtype=torch.int32, device=device)
        self.book = Rulebook(slots, device)
        self._slots = slots
        self._seen: Tensor | None = None  # int32 [slots, vocab], once somebody has a penalty

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> Answers:
        """From logits [rows drawn from, vocab] float32, rows in the order of the plan. Asynchronous."""
        for draw in draws:
            if draw.begins:
                self._begin(draw)
        slots = [draw.slot for draw in draws]
        row_of = {row: at for at, row in enumerate(sorted({draw.row for draw in draws}))}
        rules, penalties = self.book.rules(draws, slots, [row_of[draw.row] for draw in draws])
        odd = np.flatnonzero(self.book.odd[slots]).tolist()
        raw = logits
        if odd:  # each draw has logits of its own to be edited
            raw = logits[rules.rows]
            logits = self._edited(raw.clone(), rules.slots, penalties, draws, odd)
            rules = replace(rules, rows=torch.arange(len(draws), device=self.device))
        tokens = sample(logits, rules, self.newest, self.book.filtered(slots))
        report = self._after(raw, tokens, draws, odd) if odd else None
        return Answers(fetch(tokens), report, Mark(self.device))

    def _begin(self, draw: Draw) -> None:
        self.book.begin(draw)
        if penalized(draw.sampling):
            if self._seen is None:
                self._seen = torch.zeros(self._slots, self.vocab, dtype=torch.int32, device=self.device)
            seen = self._seen[draw.slot].zero_()
            seen[self._ids(sorted(set(draw.prompt)))] = IN_PROMPT
            seen.index_add_(0, self._ids(draw.output), torch.ones(len(draw.output), dtype=torch.int32, device=self.device))

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return send(torch.tensor(ids, dtype=torch.int64), self.device)

    def _edited(self, logits: Tensor, slots: Tensor, penalties: Tensor, draws: Sequence[Draw], odd: list[int]) -> Tensor:
        """Penalties, then bias, then the mask of stop ids, in place."""
        if self._seen is not None and any(penalized(draws[at].sampling) for at in odd):
            penalize(logits, slots, self._seen, *penalties)
        bias = [(at, id, value) for at in odd for id, value in draws[at].sampling.logit_bias if id < self.vocab]
        stops = [(at, id) for at in odd if not draws[at].allow_stop for id in draws[at].sampling.stop_ids if id < self.vocab]
        if bias:
            rows, ids, values = zip(*bias, strict=True)
            amounts = send(torch.tensor(values, dtype=torch.float32), self.device)
            logits.index_put_((self._ids(rows), self._ids(ids)), amounts, accumulate=True)
        if stops:
            rows, ids = zip(*stops, strict=True)
            logits[self._ids(rows), self._ids(ids)] = -torch.inf
        return logits

    def _after(self, raw: Tensor, tokens: Tensor, draws: Sequence[Draw], odd: list[int]) -> Report | None:
        """Remember what was drawn where a penalty counts it, and tell logprobs where they are asked for."""
        counting = [at for at in odd if penalized(draws[at].sampling)]
        if counting and self._seen is not None:
            slots, drawn = self._ids([draws[at].slot for at in counting]), tokens[self._ids(counting)].long().clamp_(min=0)
            ones = torch.ones(len(counting), dtype=torch.int32, device=self.device)
            self._seen.view(-1).index_add_(0, slots * self.vocab + drawn, ones)
        asked = tuple((at, count) for at in odd if (count := draws[at].sampling.logprobs) is not None)
        if not asked:
            return None
        rows = self._ids([at for at, _ in asked])
        logs = raw[rows].log_softmax(1)
        own = logs.gather(1, tokens[rows].long().clamp_(min=0).unsqueeze(1)).squeeze(1)
        top = logs.topk(max(count for _, count in asked), dim=1)
        return Report(asked, fetch(own), fetch(top.values), fetch(top.indices))
