"""How each slot's sequence is drawn for: told once by its first draw, kept on the host, sent with every step."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels.sample import Rules
from services.engine.gpu.transfer import send
from services.engine.noise import seed_at, stream
from services.engine.plan import Draw
from shared.messages import Sampling

FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")


def penalized(given: Sampling) -> bool:
    return given.repetition_penalty != 1 or given.frequency_penalty != 0 or given.presence_penalty != 0


class Rulebook:
    """`odd` [slots]: what not every draw has (penalties, a bias, stop ids to mask, logprobs), so most steps need not look."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self.device = device
        self.odd = np.zeros(slots, bool)
        self._floats = np.zeros((len(FLOATS), slots), np.float32)
        self._top_k = np.zeros(slots, np.int64)
        self._streams = [0] * slots

    def begin(self, draw: Draw) -> None:
        given, slot = draw.sampling, draw.slot
        self._floats[:, slot] = [getattr(given, name) for name in FLOATS]
        self._top_k[slot] = given.top_k
        self._streams[slot] = stream(given.seed, draw.choice)
        masked = bool(given.min_tokens and given.stop_ids)
        self.odd[slot] = masked or penalized(given) or bool(given.logit_bias) or given.logprobs is not None

    def warm(self, slots: Sequence[int]) -> bool:
        """Whether anybody draws by chance."""
        return bool(self._floats[0, slots].any())

    def filtered(self, slots: Sequence[int]) -> bool:
        heat, top_p, min_p, *_ = self._floats[:, slots]
        return bool(((heat > 0) & ((top_p < 1) | (min_p > 0) | (self._top_k[slots] > 0))).any())

    def rules(self, draws: Sequence[Draw], slots: Sequence[int], rows: Sequence[int]) -> tuple[Rules, Tensor]:
        """And the penalties, [3, draws]: repetition, frequency, presence."""
        warm = self.warm(slots)
        seeds = [seed_at(self._streams[draw.slot], draw.position) if warm else 0 for draw in draws]
        ints = send(np.array([rows, slots, self._top_k[slots], seeds], np.int64), self.device)
        floats = send(np.ascontiguousarray(self._floats[:, slots]), self.device)  # one row per rule
        return Rules(ints[0], ints[1], floats[0], ints[2], floats[1], floats[2], ints[3]), floats[3:]
