"""Products of bfloat16 tiles by a warpgroup's tensor cores."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def product(a: Any, b_smem: Any, start: jax.Array | None = None) -> jax.Array:
    """Returns `start + a @ b`, float32, once it is there.

    The operand a is in registers or shared memory.

    The interpreter knows neither such an `a` nor a start, and tests replace this.
    """

    def multiply(accumulator):
        if start is not None:
            accumulator[...] = start
        plgpu.wgmma(accumulator, a, b_smem)
        return accumulator[...]

    shape = a.shape[0], b_smem.shape[1]
    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def products(
    first: tuple[Any, Any],
    second: tuple[jax.Array, Any, jax.Array],
    meanwhile: Callable[[jax.Array], Any],
) -> tuple[jax.Array, Any]:
    """Returns the second product, as `product` takes it, and `meanwhile` of the first.

    Both begin at once: the second may still be under way when the first is there. Until
    both are there, nothing may be put where the second's operands are: so what is the
    next one's operand is to be converted to bfloat16 afterwards.
    """
    p, b_smem, start = second

    def multiply(first_sum, second_sum):
        second_sum[...] = start
        plgpu.wgmma(first_sum, *first)
        plgpu.wgmma(second_sum, p, b_smem)
        made = meanwhile(plgpu.wgmma_accumulator_load(first_sum, wait_n=1))
        return second_sum[...], made

    rows, columns = start.shape
    shapes = (first[0].shape[0], first[1].shape[1]), (rows, columns)
    return pl.run_scoped(
        multiply, *(plgpu.WGMMAAccumulatorRef(shape, jnp.float32) for shape in shapes)
    )
