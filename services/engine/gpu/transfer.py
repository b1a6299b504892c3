"""Between host and device without waiting: pinned memory, one stream, events. On a CPU (the interpreter's) all is at hand."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor


def send(values: Tensor | Sequence[object] | np.ndarray[tuple[int, ...], np.dtype[np.generic]], device: torch.device) -> Tensor:
    """A copy on the device, in stream order."""
    held = values if isinstance(values, Tensor) else torch.as_tensor(values)
    return held.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else held.clone()


def fetch(values: Tensor) -> Tensor:
    """A copy on the host, whole once an event behind it has happened."""
    if not values.is_cuda:
        return values.clone()
    return torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)


def staging(like: Tensor) -> Tensor:
    """Host memory that is sent again and again."""
    held = torch.zeros_like(like, device="cpu")
    return held.pin_memory() if like.is_cuda else held


class Mark:
    """A point in the stream."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def hold(self) -> None:
        """What goes to the current stream from now on comes behind it."""
        if self._event is not None:
            self._event.wait()


class Stream:
    """The stream that all work of one device goes to, as a context."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()
