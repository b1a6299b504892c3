"""Pages leave a device and come back to other blocks, of this device or of another, the same to the byte."""

import mmap
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from services.engine.ferry import HostFerry
from services.engine.gpu.ferry import GpuFerry, runs
from services.engine.gpu.transfer import Stream
from services.engine.plan import Ferry
from shared.page import HEAD_BYTES, slot_bytes

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
SHAPES = [(3, 12, 4, 2, 8), (5, 12, 16, 6, 12)]


def on_gpu(pages: Tensor) -> GpuFerry:
    """Two pages at once, two such portions on their way, three slots locked at once."""
    page = pages[:, 0].nbytes
    return GpuFerry(pages, Stream(pages.device), portion_bytes=2 * page, ahead=2, locked_bytes=3 * slot_bytes(page))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("make", "device"), [(HostFerry, torch.device("cpu")), (on_gpu, DEVICE)])
@pytest.mark.parametrize("slots", [[0, 1, 2, 3, 4, 5], [6, 2, 3, 0, 5, 4]], ids=["neighbours", "strewn"])
def test_there_and_back(
    shape: tuple[int, ...], make: Callable[[Tensor], Ferry], device: torch.device, slots: list[int]
) -> None:
    """Also where CUDA is: through locked memory and past it. More portions than may be on their way at once."""
    pages = torch.randn(shape, device=device).to(torch.bfloat16)
    other = torch.zeros_like(pages)
    source, target = make(pages), make(other)
    there, here, rest = [2, 11, 5, 0, 7, 1], [7, 1, 10, 3, 0, 11], [2, 4, 5, 6, 8, 9]
    portions = [slice(at, at + 2) for at in range(0, 6, 2)]
    slot = slot_bytes(source.page_bytes)
    memory = memoryview(mmap.mmap(-1, 7 * slot))
    places, sums = [number * slot + HEAD_BYTES for number in slots], list[int]()
    source.make_room()
    target.make_room()
    source.follow()
    for part in portions:
        payloads, theirs = source.export(there[part])
        sums += theirs
        assert {len(payload) for payload in payloads} == {source.page_bytes}
        for place, payload in zip(places[part], payloads, strict=True):
            memory[place : place + source.page_bytes] = payload
    assert len(set(sums)) == len(sums)
    for lock in (False, True):
        other.zero_()
        assert (lock and target.pin(memory)) == (lock and pages.is_cuda)
        target.follow()
        cargoes = [target.bring(memory, places[part], here[part]) for part in portions]
        assert [word for cargo in cargoes for word in cargo.sums()] == sums
        assert torch.equal(other[:, here], pages[:, there])
        assert not other[:, rest].any()
    if pages.is_cuda:
        target.unpin(memory)
    assert source.page_kind == target.page_kind != make(pages.float()).page_kind


def test_kinds_that_are_summed_otherwise_are_others() -> None:
    pages = torch.zeros(SHAPES[0])
    assert HostFerry(pages).page_kind != on_gpu(pages).page_kind
    assert on_gpu(pages).page_kind != GpuFerry(pages, Stream(pages.device), "invariant").page_kind
    with pytest.raises(ValueError, match="words of 8"):
        on_gpu(torch.zeros(2, 3, 1, 1, 3))


def test_runs() -> None:
    assert list(runs([], 10, 3, 100)) == []
    assert list(runs([5], 10, 3, 100)) == [(0, 5, 1)]
    assert list(runs([5, 15, 25, 45, 35, 45], 10, 3, 100)) == [(0, 5, 3), (3, 45, 1), (4, 35, 2)]
    assert list(runs([5, 15, 25, 35, 45, 10], 10, 2, 100)) == [(0, 5, 2), (2, 25, 2), (4, 45, 1), (5, 10, 1)]
    assert list(runs([5, 15, 25, 35, 45, 55], 10, 4, 20)) == [(0, 5, 2), (2, 25, 2), (4, 45, 2)]
    assert list(runs([15, 25, 35, 45], 10, 4, 30)) == [(0, 15, 2), (2, 35, 2)]
