"""A product of bfloat16 tiles by a warpgroup's tensor cores."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def product(a: Any, b_smem: Any, start: jax.Array | None = None) -> jax.Array:
    """`start + a @ b`, float32, once it is there; a is in registers or shared memory.

    The interpreter knows neither such an `a` nor a start, and tests replace this.
    """

    def multiply(accumulator):
        if start is not None:
            accumulator[...] = start
        plgpu.wgmma(accumulator, a, b_smem)
        return accumulator[...]

    shape = a.shape[0], b_smem.shape[1]
    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
