"""Parameters with named dimensions, and the linear, embedding and norm modules."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jmoe.nn.parameter import MATRIX, Description, described
from jmoe.ops import dot, norm, stored
from jmoe.ops.matrices import MatrixDims

DotGeneral = Callable[..., jax.Array]


def named_param(
    module: nn.Module,
    name: str,
    shape: Sequence[int],
    dims: Sequence[str | None],
    std: float,
    hidden_matrix: MatrixDims | None = None,
) -> jax.Array:
    """A float32 normal parameter whose dimensions carry their logical names.

    Args:
      hidden_matrix: see `jmoe.nn.parameter.Description`.
    """
    description = Description(hidden_matrix=hidden_matrix)
    init = described(nn.initializers.normal(std), dims, description)
    return module.param(name, init, tuple(shape), jnp.float32)


def weight(module: nn.Module, name: str, *described: Any) -> stored.Weight:
    """`named_param`, or the matrix in fewer bits that variables hold in its place."""
    if module.has_variable("params", name):
        kept = module.get_variable("params", name)
        if isinstance(kept, stored.FewerBits):
            return kept
    return named_param(module, name, *described)


class Linear(nn.Module):
    """`x @ kernel`, plus a bias if asked; `features` may have several dimensions.

    `dot_general` is where other number formats come in. It is given the kernel in the
    dtype that it is held in, and computes in x's: so the kernel's gradient is rounded
    to x's dtype nowhere. `matrix` says which of the kernel's dimensions, [input,
    *features], are one matrix.
    """

    features: tuple[int, ...]
    dims: tuple[str | None, ...]  # logical names: input, then features
    init_std: float
    dot_general: DotGeneral = dot.dot_general
    matrix: MatrixDims = MATRIX
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], *self.features)
        kernel = weight(self, "kernel", shape, self.dims, self.init_std, self.matrix)
        contract = (((x.ndim - 1,), (0,)), ((), ()))
        if isinstance(kernel, stored.FewerBits):
            kernel = stored.as_array(kernel, x.dtype).reshape(shape)
        y = self.dot_general(x, kernel, contract)
        if not self.use_bias:
            return y
        # In float32, as then its gradient is too, which sums over tokens.
        init = described(
            nn.initializers.zeros_init(), self.dims[1:], Description(decays=False)
        )
        bias = self.param("bias", init, self.features, jnp.float32)
        return (y.astype(jnp.float32) + bias).astype(y.dtype)


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension, in float32 inside."""

    epsilon: float
    dim: str | None = "embed"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ones = nn.initializers.ones_init()
        init = described(ones, (self.dim,), Description(decays=False))
        scale_D = self.param("scale", init, (x.shape[-1],), jnp.float32)
        return norm.rms_norm(x, scale_D, self.epsilon)
