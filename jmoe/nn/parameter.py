"""What a module says of a parameter that it makes: a record, in Linen's box.

The record is declared where the parameter is made, and nowhere else. Sharding, ZeRO,
optimizers, number formats, counts, plans and exports read it; nobody matches names.
`nn.scan` adds the dimension of its layers in front.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from jmoe.ops.matrices import MatrixDims
from jmoe.parallel.rules import LAYERS

Initializer = Callable[..., Any]  # of a parameter in a box, which `Module.param` opens

# Kernels [..., in, out], [..., in, heads, per head] and [..., in, 2, out]: a projection
# to all heads is one matrix, and a gate and an up-projection side by side are two.
MATRIX = MatrixDims(fan_in=(-2,), fan_out=(-1,))
TO_HEADS = MatrixDims(fan_in=(-3,), fan_out=(-2, -1))
TWO_MATRICES = MatrixDims(fan_in=(-3,), fan_out=(-1,))

EXPERT = "expert"  # the logical dimension that numbers routed experts
FP8, INT4 = "fp8", "int4"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
    """What there is to know of a parameter besides its shape and its values.

    dims: the logical name of each dimension, for `jmoe.parallel.rules`.
    matrix: which dimensions are a matrix's inputs and outputs; the others number
      matrices: layers, experts, or two side by side. None: a vector, or a table.
    is_hidden: it maps hidden states to hidden states, as embedding, head and router
      don't: what Muon updates.
    is_table: a token meets one of its rows, which nothing multiplies by.
    in_float32: modules compute with it in float32, whatever activations are.
    decays: weight decay pulls it to zero.
    formats: those of fewer bits, of FP8 and INT4, that it may be stored in.
    """

    dims: tuple[str | None, ...]
    matrix: MatrixDims | None = None
    is_hidden: bool = False
    is_table: bool = False
    in_float32: bool = False
    decays: bool = True
    formats: tuple[str, ...] = ()

    @property
    def is_stacked(self) -> bool:
        """Whether its first dimension numbers layers."""
        return self.dims[:1] == (LAYERS,)

    @property
    def of_experts(self) -> bool:
        """Whether routed experts have one each."""
        return EXPERT in self.dims

    @property
    def num_lead(self) -> int:
        """How many of its first dimensions number layers and experts."""
        return self.is_stacked + self.of_experts

    @property
    def pair_dim(self) -> int | None:
        """The dimension, from the end, of two matrices side by side; None: it's one."""
        if self.matrix is None:
            return None
        batch = self.matrix.batch(len(self.dims))[self.num_lead :]
        return batch[0] if batch else None

    def compute_dtype(self, activations: jax.typing.DTypeLike) -> Any:
        """Returns the dtype that modules convert it to.

        They convert inside of a product or a lookup, so that gradients aren't rounded.
        """
        return jnp.dtype(jnp.float32 if self.in_float32 else activations)


class Boxed(nn.LogicallyPartitioned):
    """Linen's box of a parameter, with its record."""

    record: Parameter = struct.field(default=Parameter(dims=()), pytree_node=False)


def boxed(init: Initializer, record: Parameter) -> Initializer:
    """Returns `init`, whose parameter comes in a box with its record."""

    def make(*arguments: Any) -> Boxed:
        return Boxed(init(*arguments), record.dims, record=record)

    return make


def records(tree: Any) -> Any:
    """Returns a tree of `Parameter`, of one of boxed parameters or of their shapes."""

    def of_box(box: Boxed) -> Parameter:
        return dataclasses.replace(box.record, dims=tuple(box.names))

    return jax.tree.map(of_box, tree, is_leaf=lambda x: isinstance(x, Boxed))


def normal_param(
    module: nn.Module,
    name: str,
    shape: Sequence[int],
    std: float,
    record: Parameter,
) -> jax.Array:
    """Returns a module's float32 parameter, which starts as normal noise."""
    init = boxed(nn.initializers.normal(std), record)
    return module.param(name, init, tuple(shape), jnp.float32)
