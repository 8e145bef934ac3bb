"""Functions of whole matrices, where a mesh divides both stacks and matrices.

What divides the stack, such as `expert` the experts, stays: each device has matrices of
its own. The devices along the axes that divide a matrix itself each have a share of the
same matrices. They swap, in an all-to-all, a share of every matrix for the whole of
some, and the results back. Nothing is gathered, and no matrix is worked on twice but
where whole copies of it are stored.

Shapes: B item of the stack (what is in front of the matrices' first dimension), C item
of a round, N matrix, I fan-in, O fan-out.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from jmoe.ops.matrices import MatrixDims
from jmoe.parallel import collectives

# Of the whole matrices that a device has at one time. With what is computed of them,
# and on their way, it takes some ten times as much.
ROUND_BYTES = 2**26


def map_matrices(
    function: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    spec: PartitionSpec,
    dims: MatrixDims,
    round_bytes: int = ROUND_BYTES,
) -> jax.Array:
    """Returns `function` of every whole matrix of a stack: this device's part of it.

    The stack is worked through in rounds, each of which overwrites its items, so that
    there is no second copy of it. Two all-to-alls a round and divided dimension, over
    the axes that divide the matrices.

    Args:
      function: of matrices [N, I, O], to as many of the same shape.
      x: this device's part of the stack.
      spec: how the mesh divides the stack.
      dims: which dimensions are a matrix's.
      round_bytes: of whole matrices on a device in a round; at least one it must be.
    """
    axes = [*spec, *(None,) * (x.ndim - len(spec))]
    shares = [axes[dim] or () for dim in dims.both]
    leading = x.ndim + min(dims.both)
    x_B = x.reshape(-1, *x.shape[leading:])

    def overwrite(x_B: jax.Array, start: int | jax.Array, size: int) -> jax.Array:
        items_C = _row_major(lax.dynamic_slice_in_dim(x_B, start, size))
        items_C = _row_major(_apply(function, items_C, dims, shares))
        return lax.dynamic_update_slice_in_dim(x_B, items_C, start, 0)

    size = _round_items(x_B, dims, shares, round_bytes)
    rounds, rest = divmod(len(x_B), size)
    x_B = lax.fori_loop(0, rounds, lambda i, x_B: overwrite(x_B, i * size, size), x_B)
    if rest:
        x_B = overwrite(x_B, rounds * size, rest)
    return x_B.reshape(x.shape)


def _round_items(
    x_B: jax.Array,
    dims: MatrixDims,
    shares: Sequence[collectives.Axes],
    round_bytes: int,
) -> int:
    """Returns how many items a round takes.

    It is as many as make each device's matrices as many.
    """
    item = x_B.shape[1:]
    devices = _devices(shares)
    matrices = math.prod(item[dim] for dim in dims.batch(len(item)))
    even = devices // math.gcd(devices, matrices)
    # An item's shares on a device are as much as its whole matrices on all devices.
    item_bytes = math.prod(item) * x_B.dtype.itemsize
    return min(len(x_B), even * max(1, round_bytes // (even * item_bytes)))


def _apply(
    function: Callable[[jax.Array], jax.Array],
    items_C: jax.Array,
    dims: MatrixDims,
    shares: Sequence[collectives.Axes],
) -> jax.Array:
    """Applies `function` to some items' matrices, of which this device has shares."""
    order = dims.batch(items_C.ndim) + dims.both
    ordered = items_C.transpose([dim + items_C.ndim for dim in order])
    x_N = ordered.reshape(-1, *ordered.shape[-len(dims.both) :])
    count = len(x_N)
    x_N = jnp.pad(
        x_N, [(0, -count % _devices(shares)), *((0, 0) for _ in x_N.shape[1:])]
    )
    for dim, axes in enumerate(shares, 1):
        x_N = collectives.all_to_all(x_N, axes, 0, dim)
    whole = x_N.shape[1:]
    fan_in = math.prod(whole[: len(dims.fan_in)])
    x_N = function(x_N.reshape(len(x_N), fan_in, -1)).reshape(-1, *whole)
    for dim, axes in reversed([*enumerate(shares, 1)]):
        x_N = collectives.all_to_all(x_N, axes, dim, 0)
    back = sorted(range(len(order)), key=order.__getitem__)
    return x_N[:count].reshape(ordered.shape).transpose(back)


def _row_major(x: jax.Array) -> jax.Array:
    """Keeps the compiler from transposing all of the stack, once, instead of items."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _devices(shares: Sequence[collectives.Axes]) -> int:
    """Returns how many devices have shares of the same matrices."""
    return math.prod(map(collectives.axis_size, shares))
