"""The linear and the norm module, and weights that may be stored in fewer bits."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from jmoe.nn.parameter import FP8, MATRIX, Parameter, boxed, normal_param
from jmoe.ops import dot, norm, stored
from jmoe.ops.matrices import MatrixDims

DotGeneral = Callable[..., jax.Array]


def weight(
    module: nn.Module, name: str, shape: Sequence[int], std: float, record: Parameter
) -> stored.Weight:
    """Returns `normal_param`, or what variables hold in its place in fewer bits."""
    if module.has_variable("params", name):
        kept = module.get_variable("params", name)
        if isinstance(kept, stored.FewerBits):
            return kept
    return normal_param(module, name, shape, std, record)


class Linear(nn.Module):
    """`x @ kernel`, plus a bias if asked; `features` may have several dimensions.

    `dot_general` is where other number formats come in. It is given the kernel in the
    dtype that it is held in, and computes in x's: so the kernel's gradient is rounded
    to x's dtype nowhere. `matrix` says which of the kernel's dimensions, [input,
    *features], are one matrix, and `formats` in which others it may be stored.
    """

    features: tuple[int, ...]
    dims: tuple[str | None, ...]  # logical names: input, then features
    init_std: float
    dot_general: DotGeneral = dot.dot_general
    matrix: MatrixDims = MATRIX
    formats: tuple[str, ...] = (FP8,)
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], *self.features)
        record = Parameter(
            dims=self.dims, matrix=self.matrix, is_hidden=True, formats=self.formats
        )
        kernel = weight(self, "kernel", shape, self.init_std, record)
        contract = (((x.ndim - 1,), (0,)), ((), ()))
        if isinstance(kernel, stored.FewerBits):
            kernel = stored.as_array(kernel, x.dtype).reshape(shape)
        y = self.dot_general(x, kernel, contract)
        if not self.use_bias:
            return y
        # In float32, as then its gradient is too, which sums over tokens.
        record = Parameter(dims=self.dims[1:], in_float32=True, decays=False)
        init = boxed(nn.initializers.zeros_init(), record)
        bias = self.param("bias", init, self.features, jnp.float32)
        return (y.astype(jnp.float32) + bias).astype(y.dtype)

    def kernel_array(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Returns the kernel [input, *features] of a module that has its parameters."""
        kernel = self.get_variable("params", "kernel")
        kernel = stored.as_array(kernel, dtype)
        return kernel.reshape(kernel.shape[0], *self.features)


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension, in float32 inside."""

    epsilon: float
    dim: str | None = "embed"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        record = Parameter(dims=(self.dim,), in_float32=True, decays=False)
        init = boxed(nn.initializers.ones_init(), record)
        scale_D = self.param("scale", init, (x.shape[-1],), jnp.float32)
        return norm.rms_norm(x, scale_D, self.epsilon)
