"""What a module says of a parameter that it makes: the box that Linen hands on.

A box names the parameter's dimensions, for `jmoe.parallel.rules`, and describes it, for
optimizers. `nn.scan` adds the dimension of its layers in front.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax import struct

from jmoe.ops.matrices import MatrixDims

Initializer = Callable[..., Any]  # of a parameter in a box, which `Module.param` opens

# Kernels [..., in, out], [..., in, heads, per head] and [..., in, 2, out]: a projection
# to all heads is one matrix, and a gate and an up-projection side by side are two.
MATRIX = MatrixDims(fan_in=(-2,), fan_out=(-1,))
TO_HEADS = MatrixDims(fan_in=(-3,), fan_out=(-2, -1))
TWO_MATRICES = MatrixDims(fan_in=(-3,), fan_out=(-1,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """What an optimizer must know of a parameter.

    hidden_matrix: which dimensions make it a linear map between hidden states, or a
    batch of such; None of what is none: embedding, head, router and norms. decays:
    whether weight decay pulls it to zero.
    """

    hidden_matrix: MatrixDims | None = None
    decays: bool = True


class Described(nn.LogicallyPartitioned):
    """Linen's box, with a description."""

    description: Description = struct.field(default=Description(), pytree_node=False)


def described(
    init: Initializer, dims: Sequence[str | None], description: Description
) -> Initializer:
    """`init`, whose parameter comes in a box with its dimensions' logical names."""

    def boxed(*arguments: Any) -> Described:
        return Described(init(*arguments), tuple(dims), description=description)

    return boxed


def descriptions(boxed: Any) -> Any:
    """A tree of `Description`, of one of boxed parameters or of their shapes."""
    return jax.tree.map(
        lambda box: box.description, boxed, is_leaf=lambda x: isinstance(x, Described)
    )
