"""What every form of a linear layer y = x Wᵀ has in common, on any device."""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import silu

Before = Callable[[Tensor], Tensor]  # what a layer does to its input first: a Norm, `gate`, or nothing


def plain(x: Tensor) -> Tensor:
    return x


def gate(x: Tensor) -> Tensor:
    """[rows, 2 * columns] -> [rows, columns]: the first half, through silu, opens the second."""
    opening, passing = x.chunk(2, dim=1)
    return silu(opening).mul_(passing)


class Form:
    """y = before(x) Wᵀ, added to `onto` (whose memory it may reuse) if that is given. Rows are of any float type."""

    def __call__(self, x: Tensor, before: Before = plain, onto: Tensor | None = None) -> Tensor:
        x = before(x)
        return self.product(x) if onto is None else self.add(x, onto)

    def product(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def add(self, x: Tensor, onto: Tensor) -> Tensor:
        return onto + self.product(x)
