"""Pages leave a device and come back to other blocks, of this device or of another, the same to the byte."""

import torch

from services.engine import ferry


def test_there_and_back() -> None:
    """Also where CUDA is: through locked memory and past it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pages = torch.randn(3, 12, 4, 2, 8, device=device).to(torch.bfloat16)
    other = torch.zeros_like(pages)
    memory = memoryview(bytearray(pages[:, 0].nbytes * 3))
    payloads = ferry.export(pages, [2, 11, 5])
    for lock in (False, True):
        other.zero_()
        if lock:
            ferry.pin(pages, memory)
        views = [memory[at * len(payloads[0]) : (at + 1) * len(payloads[0])] for at in range(3)]
        for view, payload in zip(views, payloads, strict=True):
            view[:] = payload
        ferry.adopt(other, [7, 1, 10], views)
        assert torch.equal(other[:, [7, 1, 10]], pages[:, [2, 11, 5]])
        assert not other[:, [0, 2, 3, 4, 5, 6, 8, 9, 11]].any()
    ferry.unpin(pages, memory)
    assert ferry.kind(pages) == ferry.kind(other) != ferry.kind(pages.float())
