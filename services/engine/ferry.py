"""Pages out of a device and into it, as bytes of their own: each block's keys and values of all layers. Imports torch.

`pages` is [layers, blocks, block_size, 2 * kv_heads, head_dim] on any device.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from shared.page import Buffer

_PORTABLE = 1  # cudaHostRegisterPortable: for all of the process's threads and contexts


def kind(pages: Tensor) -> str:
    """`auto` may choose other weights in another engine: that is as good, and not the same to the last bit."""
    return f"{pages.device.type} {pages.dtype} {tuple(pages[:, 0].shape)}"


def export(pages: Tensor, blocks: Sequence[int]) -> list[memoryview]:
    """Copies, once all that was started before on the current stream has run."""
    found = pages[:, list(blocks)].transpose(0, 1).contiguous().view(torch.uint8).flatten(1)
    if found.is_cuda:
        found = torch.empty_like(found, device="cpu", pin_memory=True).copy_(found, non_blocking=True)
        torch.cuda.current_stream().synchronize()
    return [memoryview(page) for page in found.numpy()]


def adopt(pages: Tensor, blocks: Sequence[int], payloads: Sequence[Buffer]) -> None:
    """Before anything that is started later on the current stream. The payloads are copied when this returns."""
    shape = pages[:, 0].shape
    sources = [torch.frombuffer(payload, dtype=pages.dtype).view(shape) for payload in payloads]
    if pages.is_cuda:
        _adopt_aside(pages, blocks, sources)
        return
    for block, source in zip(blocks, sources, strict=True):
        pages[:, block] = source


def _adopt_aside(pages: Tensor, blocks: Sequence[int], sources: Sequence[Tensor]) -> None:
    """The bytes come on a stream of their own, beside the steps that run; only the last copy is in line with them."""
    current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    with torch.cuda.stream(aside):
        staged = torch.empty((len(sources), *sources[0].shape), dtype=pages.dtype, device=pages.device)
        for at, source in enumerate(sources):
            staged[at].copy_(source, non_blocking=True)
        target = torch.tensor(blocks, device=pages.device)
        arrived = aside.record_event()
    current.wait_event(arrived)
    pages[:, target] = staged.transpose(0, 1)
    for used in (staged, target):
        used.record_stream(current)
    arrived.synchronize()


def pin(pages: Tensor, memory: memoryview) -> None:
    """Lock memory that payloads will be views of, so that the device copies from it by itself."""
    if pages.is_cuda:
        with torch.cuda.device(pages.device):
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(_address(memory), len(memory), _PORTABLE))


def unpin(pages: Tensor, memory: memoryview) -> None:
    if pages.is_cuda:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(_address(memory)))


def _address(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
