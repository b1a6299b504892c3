"""Pages out of a GPU and into it, beside its steps: on streams of their own, from memory that the GPU reads by itself.

What comes is staged, put into its blocks and summed there, while the link brings what follows: the link never waits for the
host, and a step waits for nothing of this.
"""

import ctypes
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.page_sum import page_sum
from services.engine.gpu.transfer import Mark, Stream, fetch, send, staging
from shared.page import Buffer, slot_bytes

PORTION_BYTES = 64 << 20  # 1.2 ms of a link of 55 GB/s: a late host is no gap, and the last portion's sums are soon made
AHEAD = 4  # portions on their way: bounds what is staged, 256 MiB
COPY_BYTES = 8 << 20  # at once: what a step sends to the device waits behind it, 0.15 ms
LOCKED_BYTES = 64 << 20  # at once: no step can be started meanwhile, 2 ms
PORTABLE = 1  # cudaHostRegisterPortable: for all of the process's threads and contexts
POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, since Linux 5.14
WORD = (1 << 64) - 1
log = logging.getLogger("headrace")


@dataclass(slots=True)
class Room:
    """Where a portion waits for its blocks; it is free again behind `taken`."""

    staged: Tensor  # uint8 [portion * slot_bytes]
    taken: Mark


@dataclass(frozen=True, slots=True)
class Cargo:
    """`memory` is kept until it has been read."""

    found: Tensor  # int64 [pages], on the host behind `landed`
    landed: Mark
    memory: memoryview

    def sums(self) -> Sequence[int]:
        self.landed.wait()
        return [word & WORD for word in self.found.tolist()]


def runs(places: Sequence[int], apart: int, most: int, piece: int) -> Iterator[tuple[int, int, int]]:
    """Neighbours among places, up to `most`, in the same piece of a memory that is cut into pieces of so many bytes: the number
    of the first of them, where it lies, and how many there are.
    """
    first = 0
    for at in range(1, len(places) + 1):
        if (
            at in (len(places), first + most)
            or places[at] != places[at - 1] + apart
            or places[at] // piece != places[first] // piece
        ):
            yield first, places[first], at - first
            first = at


def pieces(size: int, piece: int) -> Iterator[tuple[int, int]]:
    """Where each piece begins, and its size."""
    return ((at, min(piece, size - at)) for at in range(0, size, piece))


class GpuFerry:
    """`pages` is [layers, blocks, block_size, 2 * kv_heads, head_dim], contiguous; `stream` is where plans run.

    `way` names a way of computing whose bits a device promises: it shares no pages with others. Its pages and those that
    `auto` chose other weights for are not the same to the last bit, and as good.
    """

    def __init__(
        self, pages: Tensor, stream: Stream, way: str = "", portion_bytes: int = PORTION_BYTES, ahead: int = AHEAD,
        locked_bytes: int = LOCKED_BYTES,
    ) -> None:  # fmt: skip
        self.page_bytes, self.ahead, self._stream, self._device = pages[:, 0].nbytes, ahead, stream, pages.device
        if self.page_bytes // len(pages) % 8:
            raise ValueError(f"a layer's page of {self.page_bytes // len(pages)} bytes is not made of words of 8")
        self.page_kind = f"{pages.device.type} page_sum {pages.dtype} {tuple(pages[:, 0].shape)} {way}"
        self.portion = max(1, portion_bytes // self.page_bytes)
        self._words = pages.flatten(2).view(torch.int64)  # [layers, blocks, words]
        self._slot = slot_bytes(self.page_bytes)
        self._piece = self._slot * max(1, locked_bytes // self._slot)  # of a cache's memory: no page lies in two of them
        self._copies, self._places, self._exports = (Stream(pages.device) for _ in range(3))
        self._rooms: list[Room] = []
        self._begun = 0
        self._gathered = self._sent = torch.empty(0)
        self._plans = Mark(pages.device)

    def make_room(self) -> None:
        staged = torch.empty(self.ahead, self.portion * self._slot, dtype=torch.uint8, device=self._device)
        self._rooms = [Room(part, Mark(self._device)) for part in staged]
        layers, _, words = self._words.shape
        self._gathered = torch.empty(self.portion, layers, words, dtype=torch.int64, device=self._device)
        self._sent = staging(self._gathered)
        self.export((0,))  # each kernel once: the driver loads it when nothing runs
        self.bring(memoryview(bytearray(self._slot)), (0,), (0,)).sums()

    def follow(self) -> None:
        with self._stream():
            self._plans = Mark(self._device)

    def export(self, blocks: Sequence[int]) -> tuple[Sequence[Buffer], Sequence[int]]:
        gathered, sent = self._gathered[: len(blocks)], self._sent[: len(blocks)]
        with torch.inference_mode(), self._exports():
            self._plans.hold()
            where = send(blocks, self._device)
            torch.index_select(self._words.transpose(0, 1), 0, where, out=gathered)
            sent.copy_(gathered, non_blocking=True)
            cargo = Cargo(fetch(page_sum(self._words, where)), Mark(self._device), memoryview(b""))
        sums = cargo.sums()
        return [memoryview(page).cast("B") for page in sent.flatten(1).numpy()], sums

    def bring(self, memory: memoryview, places: Sequence[int], blocks: Sequence[int]) -> Cargo:
        """Returns at once, if the memory is locked."""
        with torch.inference_mode(), self._copies():
            room = self._room()
            room.taken.hold()
            self._copy(memory, places, room.staged)
            arrived = Mark(self._device)
        with torch.inference_mode(), self._places():
            where = send(blocks, self._device)
            self._plans.hold()
            arrived.hold()
            staged = room.staged.view(-1, self._slot)[: len(blocks), : self.page_bytes].view(torch.int64)
            self._words[:, where] = staged.unflatten(1, (len(self._words), -1)).transpose(0, 1)
            room.taken = Mark(self._device)
            return Cargo(fetch(page_sum(self._words, where)), Mark(self._device), memory)

    def _room(self) -> Room:
        """The next one in turn: of `ahead` cargoes, the oldest has landed."""
        self._begun += 1
        return self._rooms[self._begun % self.ahead]

    def _copy(self, memory: memoryview, places: Sequence[int], staged: Tensor) -> None:
        """Neighbouring slots in one copy, with the headers that lie between their payloads. None reads two locked pieces."""
        source = torch.frombuffer(memory, dtype=torch.uint8)
        for at, first, count in runs(places, self._slot, max(1, COPY_BYTES // self._slot), self._piece):
            size = (count - 1) * self._slot + self.page_bytes
            staged[at * self._slot :][:size].copy_(source[first : first + size], non_blocking=True)

    def pin(self, memory: memoryview) -> bool:
        """`memory` begins with a memory page. 0.1 s a gigabyte, of which 2 ms at a time keep steps from being started."""
        if self._device.type != "cuda":
            return False
        runtime, address = torch.cuda.cudart(), _address(memory)
        with torch.cuda.device(self._device):
            for at, size in pieces(len(memory), self._piece):
                _map(address + at, size)
                done = runtime.cudaHostRegister(address + at, size, PORTABLE)
                if done != runtime.cudaError.success:
                    log.warning("cannot lock a prefix cache's memory: %s", runtime.cudaGetErrorString(done))
                    self.unpin(memory[:at])
                    return False
        return True

    def unpin(self, memory: memoryview) -> None:
        with self._copies():
            Mark(self._device).wait()  # what still comes from it
        for at, _ in pieces(len(memory), self._piece):
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(_address(memory) + at))


def _map(address: int, size: int) -> None:
    """Or the driver does it, a memory page at a time, 250 ms a gigabyte for which it holds everybody up. A kernel too old is no
    fault: it takes longer.
    """
    ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), POPULATE_WRITE)


def _address(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
