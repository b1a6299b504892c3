"""Pages out of a CPU's memory and into it, as bytes of their own: each block's keys and values of all layers. Imports torch.

By numpy in threads of its own: torch would bring a second team of OpenMP threads there, and slow down every step.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared.host import usable_cores
from shared.page import Buffer, checksum

PORTION_BYTES = 8 << 20  # so that what has come from a network is still in the processor's cache when it is put away
THREADS = 8  # at most; each puts away and sums 4.5 GB/s here


@dataclass(frozen=True, slots=True)
class Cargo:
    """Pages that a thread puts away."""

    done: Future[list[int]]

    def sums(self) -> Sequence[int]:
        return self.done.result()


class HostFerry:
    """`pages` is [layers, blocks, block_size, 2 * kv_heads, head_dim], contiguous."""

    def __init__(self, pages: Tensor) -> None:
        self._bytes = pages.flatten(2).view(torch.uint8).numpy()  # [layers, blocks, bytes]
        self.page_kind = f"cpu xxh3 {pages.dtype} {tuple(pages[:, 0].shape)}"
        self.page_bytes = pages[:, 0].nbytes
        self.portion, threads = max(1, PORTION_BYTES // self.page_bytes), min(THREADS, usable_cores())
        self.ahead = threads + 1  # one that is being read from a network
        self._threads = ThreadPoolExecutor(threads, "ferry")

    def make_room(self) -> None:
        """Memory is at hand."""

    def follow(self) -> None:
        """A plan is over when the device's thread has something else to do."""

    def export(self, blocks: Sequence[int]) -> tuple[Sequence[Buffer], Sequence[int]]:
        copies = self._bytes[:, list(blocks)].swapaxes(0, 1).reshape(len(blocks), -1)
        return [copy.data for copy in copies], [checksum(copy.data) for copy in copies]

    def bring(self, memory: memoryview, places: Sequence[int], blocks: Sequence[int]) -> Cargo:
        return Cargo(self._threads.submit(self._put_away, memory, places, blocks))

    def _put_away(self, memory: memoryview, places: Sequence[int], blocks: Sequence[int]) -> list[int]:
        for place, block in zip(places, blocks, strict=True):
            page = np.frombuffer(memory, np.uint8, self.page_bytes, place)
            self._bytes[:, block] = page.reshape(len(self._bytes), -1)
        return [checksum(*(layer.data for layer in self._bytes[:, block])) for block in blocks]

    def pin(self, memory: memoryview) -> bool:
        return False

    def unpin(self, memory: memoryview) -> None:
        pass
