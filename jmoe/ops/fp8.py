"""Block-scaled FP8: e4m3 numbers with a float32 scale for each block, and products.

    x = data * scale,   scale = max |x of the block| / 448

as DeepSeek-V3 does it (arXiv 2412.19437, section 3.3). Blocks are 1x128 for what flows
through the model, so that an outlier costs precision in its own block of its own token
alone, and 128x128 for weights. e4m3 has 3 bits after the leading one, and its smallest
step is 2**-9, so the error of an element is at most the larger of 1/16 of itself and
2**-10 of the scale. Scales are taken from the numbers at hand: nothing saturates. A
block that holds NaN or infinity becomes NaN, and so does all that is computed of it.

All three products of a linear layer are of such numbers, each with blocks along the
dimension that is summed:

    y = x @ w           x 1x128,  w 128x128
    dx = dy @ w.T       dy 1x128, w 128x128
    dw = x.T @ dy       x 128x1,  dy 128x1

Kept for the backward pass is the quantized x, which for dw is quantized again.

Dimensions: K summed, M and N not, B = ceil(K / 128) blocks.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.ops import dot, e4m3
from jmoe.ops.by_platform import by_platform
from jmoe.ops.e4m3 import DTYPE, LARGEST

BLOCK = 128

Block = tuple[int, ...]
"""Sizes of a block along the last dimensions: 1, BLOCK or WHOLE."""

WHOLE = -1
ROW: Block = (BLOCK,)
SQUARE: Block = (BLOCK, BLOCK)
TENSOR: Block = (WHOLE, WHOLE)


def transposed(block: Block) -> Block:
    """Of a matrix's blocks, those of its transpose; so it need not be transposed."""
    return (*(1,) * (2 - len(block)), *block)[::-1]


class Quantized(NamedTuple):
    """e4m3 [..., M, K], and the float32 scales to multiply its blocks with.

    There is a scale for each block: [..., M, B] for ROW, [..., ceil(M / 128), B] for
    SQUARE, [..., 1, 1] for TENSOR.
    """

    data: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def mT(self) -> "Quantized":
        """Of the transpose, whose blocks are transposed too."""
        return Quantized(self.data.mT, self.scale.mT)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Which numbers share a scale; the last dimension is the one that is summed."""

    activations: Block = ROW
    weights: Block = SQUARE
    gradients: Block = ROW
    power_of_two: bool = False  # scales, rounded up

    def quantize(self, x: jax.Array, block: Block) -> Quantized:
        return quantize(x, block, power_of_two=self.power_of_two)

    def round(self, x: jax.Array, block: Block) -> jax.Array:
        return rounded(x, block, power_of_two=self.power_of_two)


RECIPES = {
    "fp8": Recipe(),
    "fp8_power_of_two": Recipe(power_of_two=True),
    # What DeepSeek-V3 found to be worse, for comparisons.
    "fp8_tensor": Recipe(TENSOR, TENSOR, TENSOR),
    "fp8_square_gradients": Recipe(gradients=SQUARE),
}


def num_blocks(dim: int) -> int:
    """How many blocks cover `dim` elements; the last one may be shorter."""
    return -(-dim // BLOCK)


@functools.partial(jax.jit, static_argnames=("block", "power_of_two"))
def quantize(
    x: jax.Array, block: Block = ROW, *, power_of_two: bool = False
) -> Quantized:
    """Blocks along the last dimensions; the last one of each may be shorter.

    In a bfloat16 matrix's rows or columns, it is a kernel when compiled for a Hopper.
    """

    in_columns = block == transposed(ROW)

    def kernel(x):
        from jmoe.ops.kernels import fp8_quantize

        if in_columns:
            return Quantized(*fp8_quantize.rows(x.T)).mT
        return Quantized(*fp8_quantize.rows(x))

    def reference(x):
        tiles, scale, axes = _scaled(x, block, power_of_two)
        data = _from_tiles(e4m3.convert(tiles), axes, x.shape)
        return Quantized(data, scale.squeeze(axes))

    fits = has_kernel(x, ROW if in_columns else block, power_of_two)
    return by_platform(kernel, reference, x, fits=fits)


def has_kernel(x: jax.Array, block: Block, power_of_two: bool) -> bool:
    """Whether `jmoe.ops.kernels.fp8_quantize` can quantize a matrix's rows."""
    is_matrix = x.ndim == 2 and x.size > 0 and x.dtype == jnp.bfloat16
    return is_matrix and block == ROW and not power_of_two


@functools.partial(jax.jit, static_argnames=("block", "power_of_two"))
def rounded(
    x: jax.Array, block: Block = ROW, *, power_of_two: bool = False
) -> jax.Array:
    """What is left of x once quantized: `dequantize(quantize(x))`, bit for bit.

    It never is e4m3, conversions to which take CPUs longer than all the rest.
    """
    tiles, scale, axes = _scaled(x, block, power_of_two)
    return _from_tiles(e4m3.nearest(tiles) * scale, axes, x.shape).astype(x.dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def dequantize(x: Quantized, dtype: jax.typing.DTypeLike) -> jax.Array:
    """`data * scale`, multiplied in float32 and then converted."""
    tiles, axes = _tiles(x.data.astype(jnp.float32), _block_of(x))
    product = tiles * jnp.expand_dims(x.scale, axes)
    return _from_tiles(product, axes, x.data.shape).astype(dtype)


def to_bits(x: Quantized) -> Quantized:
    """With uint8 for e4m3, to be kept: until `from_bits`, it can only be moved.

    When a loop writes a part of an array of e4m3, XLA for CPUs converts all of it, and
    back.
    """
    return x._replace(data=lax.bitcast_convert_type(x.data, jnp.uint8))


def from_bits(x: Quantized) -> Quantized:
    return x._replace(data=lax.bitcast_convert_type(x.data, DTYPE))


class Roundings(NamedTuple):
    """What is left of each kind of operand once it was quantized, in its own dtype.

    A product of such numbers in float32 is what FP8 kernels compute, but for the order
    of sums.
    """

    activations: Callable[[jax.Array], jax.Array]
    weights: Callable[[jax.Array], jax.Array]
    gradients: Callable[[jax.Array], jax.Array]


def roundings(recipe: Recipe | None) -> Roundings:
    """Those of a recipe; None: everything is left as it is."""

    if recipe is None:
        return Roundings(*[lambda x: x] * 3)
    blocks = recipe.activations, recipe.weights, recipe.gradients
    return Roundings(*(functools.partial(recipe.round, block=b) for b in blocks))


def matmul(a: Quantized, b: Quantized, dtype: jax.typing.DTypeLike) -> jax.Array:
    """`a @ b.T`, [M, N], of a [M, K] and b [N, K], summed in float32.

    Both operands have what is summed last, as tensor cores take e4m3. Where a has ROW
    scales and b ROW or SQUARE ones, and the `gpu` extra is installed, it is a kernel
    when compiled for a Hopper GPU (`jmoe.ops.by_platform`).
    """

    return _product(a, b, dtype, summed=1)


def outer(x: Quantized, dy: Quantized, dtype: jax.typing.DTypeLike) -> jax.Array:
    """`x.T @ dy`, [K, N], of x [M, K] and dy [M, N].

    It is the same kernel, of the transposes; elsewhere it is `dot.outer`.
    """
    return _product(x, dy, dtype, summed=0)


def _product(
    a: Quantized, b: Quantized, dtype: jax.typing.DTypeLike, *, summed: int
) -> jax.Array:
    """Over dimension `summed` of both."""

    def summed_last(a, b):
        return (a, b) if summed == 1 else (a.mT, b.mT)

    def kernel(a, b):
        from jmoe.ops.kernels import fp8_matmul

        a, b = summed_last(a, b)
        return fp8_matmul.matmul(*a, *b, dtype=dtype)

    def reference(a, b):
        a, b = (dequantize(x, jnp.float32) for x in (a, b))
        precision = lax.Precision.HIGHEST
        if summed == 0:
            return dot.outer(a, b, precision=precision).astype(dtype)
        return jnp.matmul(a, b.T, precision=precision).astype(dtype)

    fits = _is_for_kernel(*summed_last(a, b))
    return by_platform(kernel, reference, a, b, fits=fits)


def _is_for_kernel(a: Quantized, b: Quantized) -> bool:
    (M, K), N = a.data.shape, b.data.shape[0]
    B = num_blocks(K)
    fits = a.scale.shape == (M, B) and b.scale.shape in ((N, B), (num_blocks(N), B))
    return fits and min(M, N, K) > 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def fp8_dot(x: jax.Array, w: jax.Array, recipe: Recipe) -> jax.Array:
    """`x @ w`, [..., N...] of x [..., K], in x's dtype; all three products are FP8.

    Any sizes will do: blocks at the ends are shorter. A w [K, N...] of several output
    dimensions is quantized as the matrix that they make together, after it was
    converted to x's dtype. Its gradient has its own dtype, straight from the sums.
    """
    return forward(x, w, recipe)[0]


def forward(x: jax.Array, w: jax.Array, recipe: Recipe):
    """The product, and what `backward` is given: first x as [M, K], quantized, bits."""
    x_MK = recipe.quantize(x.reshape(-1, x.shape[-1]), recipe.activations)
    w_KN = w.astype(x.dtype).reshape(w.shape[0], -1)
    quantized = recipe.quantize(w_KN, recipe.weights)
    y_MN = matmul(x_MK, quantized.mT, x.dtype)
    like_w = jnp.zeros((0, *w.shape[1:]), w.dtype)
    saved = to_bits(x_MK), to_bits(quantized), like_w
    return y_MN.reshape(*x.shape[:-1], *w.shape[1:]), saved


def backward(recipe: Recipe, saved: Any, dy: jax.Array):
    """The gradients of x and w."""
    x_MK, w, like_w = saved
    x_MK, w = from_bits(x_MK), from_bits(w)
    outputs = like_w.shape[1:]
    lead = dy.shape[: dy.ndim - len(outputs)]
    dy_MN = dy.reshape(-1, math.prod(outputs))
    dx_MK = matmul(recipe.quantize(dy_MN, recipe.gradients), w, dy.dtype)
    dw_KN = outer(
        recipe.quantize(dequantize(x_MK, jnp.float32), transposed(recipe.activations)),
        recipe.quantize(dy_MN, transposed(recipe.gradients)),
        like_w.dtype,
    )
    dw = dw_KN.reshape(dw_KN.shape[0], *outputs)
    return dx_MK.reshape(*lead, dx_MK.shape[1]), dw


fp8_dot.defvjp(forward, backward)


@dataclasses.dataclass(frozen=True)
class DotGeneral:
    """`fp8_dot` as a `jax.lax.dot_general` of the kind that linear layers call.

    Raises (when called):
      ValueError: batch dimensions, or other than the left's last and the right's first
        dimension are summed.
    """

    recipe: Recipe

    def __call__(
        self,
        x: jax.Array,
        w: jax.Array,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: jax.typing.DTypeLike | None = None,
    ) -> jax.Array:
        del precision  # is e4m3's
        (of_x, of_w), batch = dimension_numbers
        if any(map(len, batch)) or tuple(of_x) != (x.ndim - 1,) or tuple(of_w) != (0,):
            raise ValueError(
                f"an FP8 product with dimension_numbers={dimension_numbers}: it can "
                f"only be (({x.ndim - 1},), (0,)), ((), ()), a linear layer's."
            )
        y: jax.Array = fp8_dot(x, w, self.recipe)
        return y if preferred_element_type is None else y.astype(preferred_element_type)


def dot_general(precision: str) -> Callable[..., jax.Array]:
    """What linear layers multiply by: one of RECIPES, or "native", in x's dtype."""
    return dot.dot_general if precision == "native" else DotGeneral(RECIPES[precision])


def recipe_of(dot_general: Callable[..., jax.Array]) -> Recipe | None:
    """That by which it multiplies; None: it isn't FP8."""
    return dot_general.recipe if isinstance(dot_general, DotGeneral) else None


def _scaled(x: jax.Array, block: Block, power_of_two: bool):
    """Tiles of x divided by their scales, within 448; the scales; the tiles' axes."""
    tiles, axes = _tiles(x.astype(jnp.float32), block)
    # Not a division, for which XLA takes this product on some platforms.
    scale = jnp.abs(tiles).max(axes, keepdims=True, initial=0.0) * (1 / LARGEST)
    # The smallest normal number keeps the scale of a block of zeros from being zero.
    scale = jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)
    if power_of_two:
        scale = _round_up(scale)
    # Above 448 by a rounding at most, which the conversion rounds away.
    return tiles / scale, scale, axes


def _round_up(scale: jax.Array) -> jax.Array:
    """To a power of two: the bits of a positive float32 are in its numbers' order."""
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    mantissa = (1 << 23) - 1
    up = (bits + mantissa) & ~mantissa
    # NaN and infinity have the largest exponent, and stay what they are.
    return jnp.where(
        jnp.isfinite(scale), lax.bitcast_convert_type(up, jnp.float32), scale
    )


def _tiles(x: jax.Array, block: Block) -> tuple[jax.Array, tuple[int, ...]]:
    """[..., n, size, ...] for the block's dimensions, filled with zeros; its axes.

    A dimension whose blocks are single elements stays one.
    """
    lead = x.ndim - len(block)
    shape, padding, axes = list(x.shape[:lead]), [(0, 0)] * lead, []
    for dim, size in zip(x.shape[lead:], block, strict=True):
        if size == 1:
            shape.append(dim)
            padding.append((0, 0))
            continue
        size = dim if size == WHOLE else min(size, max(dim, 1))
        count = -(-dim // size) if size else 1
        shape += [count, size]
        padding.append((0, count * size - dim))
        axes.append(len(shape) - 1)
    return jnp.pad(x, padding).reshape(shape), tuple(axes)


def _from_tiles(
    tiles: jax.Array, axes: Sequence[int], shape: Sequence[int]
) -> jax.Array:
    merged = list(tiles.shape)
    for axis in reversed(axes):
        merged[axis - 1 : axis + 1] = [merged[axis - 1] * merged[axis]]
    return tiles.reshape(merged)[tuple(slice(size) for size in shape)]


def _block_of(x: Quantized) -> Block:
    """That of all dimensions, as a scale's shape tells it."""

    def size(dim: int, count: int) -> int:
        if count == num_blocks(dim):
            return BLOCK
        return 1 if count == dim else WHOLE

    return tuple(map(size, x.data.shape, x.scale.shape))
