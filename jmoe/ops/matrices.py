"""Which dimensions of an array make matrices, and which a batch of them."""

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatrixDims:
    """The dimensions of an array that are a matrix's inputs, and those of its outputs.

    They are counted from the end, so that a stack of layers has those of one layer. All
    others number matrices.
    """

    fan_in: tuple[int, ...]
    fan_out: tuple[int, ...]

    @property
    def both(self) -> tuple[int, ...]:
        """The dimensions of inputs, then those of outputs."""
        return self.fan_in + self.fan_out

    def batch(self, ndim: int) -> tuple[int, ...]:
        """Returns the dimensions that number matrices, of an array of `ndim`."""
        return tuple(dim for dim in range(-ndim, 0) if dim not in self.both)

    def sizes(self, shape: Sequence[int]) -> tuple[int, int]:
        """Returns how many inputs and outputs a matrix has, of an array's shape."""
        fan_in, fan_out = (
            math.prod(shape[dim] for dim in dims)
            for dims in (self.fan_in, self.fan_out)
        )
        return fan_in, fan_out
