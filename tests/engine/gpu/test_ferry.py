"""Pages leave a device and come back to other blocks, of this device or of another, the same to the byte."""

import torch

from services.engine.ferry import TorchFerry


def test_there_and_back() -> None:
    """Also where CUDA is: through locked memory and past it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pages = torch.randn(3, 12, 4, 2, 8, device=device).to(torch.bfloat16)
    other = torch.zeros_like(pages)
    source, target = TorchFerry(pages), TorchFerry(other)
    memory = memoryview(bytearray(source.page_bytes * 3))
    payloads = source.export([2, 11, 5])
    for lock in (False, True):
        other.zero_()
        locked = lock and target.pin(memory)
        assert locked == (lock and pages.is_cuda)
        views = [memory[at * len(payloads[0]) : (at + 1) * len(payloads[0])] for at in range(3)]
        for view, payload in zip(views, payloads, strict=True):
            view[:] = payload
        target.adopt([7, 1, 10], views)
        assert torch.equal(other[:, [7, 1, 10]], pages[:, [2, 11, 5]])
        assert not other[:, [0, 2, 3, 4, 5, 6, 8, 9, 11]].any()
    if pages.is_cuda:
        target.unpin(memory)
    assert source.page_kind == target.page_kind != TorchFerry(pages.float()).page_kind
