"""Pages out of a device and into it, as bytes of their own: each block's keys and values of all layers. Imports torch."""

import ctypes
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from shared.page import Buffer

_PORTABLE = 1  # cudaHostRegisterPortable: for all of the process's threads and contexts
log = logging.getLogger("headrace")


class TorchFerry:
    """`pages` is [layers, blocks, block_size, 2 * kv_heads, head_dim] on any device; `stream` is where its plans run.

    `way` names a way of computing whose bits a device promises: it shares no pages with others.
    """

    def __init__(
        self, pages: Tensor, stream: Callable[[], AbstractContextManager[object]] = nullcontext, way: str = ""
    ) -> None:
        self._pages, self._shape, self._stream, self._way = pages, pages[:, 0].shape, stream, way
        self._aside = torch.cuda.Stream(pages.device) if pages.is_cuda else None

    @property
    def page_bytes(self) -> int:
        return self._pages[:, 0].nbytes

    @property
    def page_kind(self) -> str:
        """`auto` may choose other weights in another engine: that is as good, and not the same to the last bit."""
        return f"{self._pages.device.type} {self._pages.dtype} {tuple(self._shape)} {self._way}"

    def export(self, blocks: Sequence[int]) -> list[memoryview]:
        with torch.inference_mode(), self._stream():
            found = self._pages[:, list(blocks)].transpose(0, 1).contiguous().view(torch.uint8).flatten(1)
            if found.is_cuda:
                found = torch.empty_like(found, device="cpu", pin_memory=True).copy_(found, non_blocking=True)
                torch.cuda.current_stream().synchronize()
            return [memoryview(page) for page in found.numpy()]

    def adopt(self, blocks: Sequence[int], payloads: Sequence[Buffer]) -> None:
        sources = [torch.frombuffer(payload, dtype=self._pages.dtype).view(self._shape) for payload in payloads]
        with torch.inference_mode(), self._stream():
            if self._aside is not None:
                self._adopt_aside(self._aside, blocks, sources)
                return
            for block, source in zip(blocks, sources, strict=True):
                self._pages[:, block] = source

    def _adopt_aside(self, aside: torch.cuda.Stream, blocks: Sequence[int], sources: Sequence[Tensor]) -> None:
        """The bytes come on a stream of their own, beside the steps that run; only the last copy is in line with them."""
        current, device = torch.cuda.current_stream(), self._pages.device
        with torch.cuda.stream(aside):
            staged = torch.empty((len(sources), *self._shape), dtype=self._pages.dtype, device=device)
            for at, source in enumerate(sources):
                staged[at].copy_(source, non_blocking=True)
            target = torch.tensor(blocks, device=device)
            arrived = aside.record_event()
        current.wait_event(arrived)
        self._pages[:, target] = staged.transpose(0, 1)
        for used in (staged, target):
            used.record_stream(current)
        arrived.synchronize()

    def pin(self, memory: memoryview) -> bool:
        if self._aside is None:
            return False
        runtime = torch.cuda.cudart()
        with torch.cuda.device(self._pages.device):
            done = runtime.cudaHostRegister(_address(memory), len(memory), _PORTABLE)
        if done != runtime.cudaError.success:
            log.warning("cannot lock a prefix cache's memory: %s", runtime.cudaGetErrorString(done))
        return bool(done == runtime.cudaError.success)

    def unpin(self, memory: memoryview) -> None:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(_address(memory)))


def _address(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
