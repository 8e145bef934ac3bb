"""Muon: momentum, made orthogonal by Newton-Schulz (kellerjordan.github.io/posts/muon).

On a mesh, momentum is worked out where it lies. Each matrix is made orthogonal on one
device of those that hold a share of it, in `jax.shard_map`: see `parallel.matrices`.

Which parameters are matrices, and how, their modules say (`nn.parameter`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from jmoe.nn.parameter import Parameter
from jmoe.ops.matrices import MatrixDims
from jmoe.ops.newton_schulz import newton_schulz
from jmoe.parallel.matrices import map_matrices
from jmoe.train.layout import Layout, on_mesh

MOMENTUM = 0.95

Scale = Callable[[int, int], float]


def rms(fan_in: int, fan_out: int) -> float:
    """Makes a step's root mean square 0.2, about AdamW's (arXiv 2502.16982, sec. 2.2).

    One learning rate and one weight decay then serve both.
    """
    return 0.2 * max(fan_in, fan_out) ** 0.5


def spectral(fan_in: int, fan_out: int) -> float:
    """Makes a step change outputs as much whatever the width (Jordan's)."""
    return max(1.0, fan_out / fan_in) ** 0.5


SCALES: dict[str, Scale] = {"rms": rms, "spectral": spectral}


class MuonState(NamedTuple):
    """count: int32, steps done. mu: the momentum, float32."""

    count: Any
    mu: Any


def scale_by_muon(layout: Layout, scale: Scale) -> optax.GradientTransformation:
    """Turns updates into Nesterov momentum as nearly orthogonal matrices by `scale`.

    The momentum is an average, free of its bias to zero, of which the gradient is
    counted in once more, as `optax.contrib.muon` has it. All parameters must be hidden
    matrices, or masked out.
    """

    def init(params: Any) -> MuonState:
        return MuonState(jnp.int32(0), optax.tree.zeros_like(params))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, MOMENTUM, 1)
        ahead = jax.tree.map(
            lambda m, g: MOMENTUM * m + (1 - MOMENTUM) * g,
            optax.tree.bias_correction(mu, MOMENTUM, optax.safe_increment(count)),
            optax.tree.bias_correction(updates, MOMENTUM, count),
        )
        updates = jax.tree.map(orthogonal, layout.records, layout.stored, ahead)
        return updates, MuonState(count, mu)

    def orthogonal(record: Parameter, spec: PartitionSpec, x: Any) -> Any:
        if isinstance(x, optax.MaskedNode):
            return x
        assert record.matrix is not None, "what is hidden is a matrix"
        return orthogonalize(x, spec, record.matrix, scale, layout)

    return optax.GradientTransformation(init, update)


def orthogonalize(
    x: jax.Array, spec: PartitionSpec, dims: MatrixDims, scale: Scale, layout: Layout
) -> jax.Array:
    """Returns each matrix of a stack, nearly orthogonal, times `scale` of its sizes.

    Args:
      x: the whole stack, which lies on the mesh as `spec` says.
    """
    factor = scale(*dims.sizes(x.shape))

    def of_part(x: jax.Array) -> jax.Array:
        return map_matrices(lambda x_N: factor * newton_schulz(x_N), x, spec, dims)

    return on_mesh(of_part, layout, (spec,), spec)(x)
