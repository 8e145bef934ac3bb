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

Kept for the backward pass is the quantized x, which for dw is quantized again; but for
layers after SwiGLU (`jmoe.ops.swiglu`) and attention (`jmoe.ops.after_attention`).

Dimensions: K summed, M and N not, B = ceil(K / 128) blocks.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.ops import blocks, dot, formats
from jmoe.ops.blocks import ROW, SQUARE, TENSOR, Block, num_blocks, transposed
from jmoe.ops.by_platform import by_platform
from jmoe.ops.formats import E4M3
from jmoe.ops.formats import E4M3_DTYPE as DTYPE

LARGEST = E4M3.largest


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
        """The transposed matrix, whose blocks are transposed too."""
        return Quantized(self.data.mT, self.scale.mT)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Says which numbers share a scale; the last dimension is the one that is summed.

    power_of_two: whether scales are rounded up to one. Those of the inputs after
    attention (`jmoe.ops.after_attention`) and of the experts always are.
    """

    activations: Block = ROW
    weights: Block = SQUARE
    gradients: Block = ROW
    power_of_two: bool = False

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


def of_tokens(recipe: Recipe | None) -> Recipe | None:
    """Returns the recipe of the experts' inputs, which has powers of two for scales.

    So tokens that came in FP8 are quantized to the same numbers once more, of bfloat16
    too (DeepSeek-V3, arXiv 2412.19437, section 3.3.3).
    """
    return recipe and dataclasses.replace(recipe, power_of_two=True)


@functools.partial(jax.jit, static_argnames=("block", "power_of_two"))
def quantize(
    x: jax.Array, block: Block = ROW, *, power_of_two: bool = False
) -> Quantized:
    """Quantizes by blocks along the last dimensions; the last one may be shorter.

    In a bfloat16 matrix's rows or columns, it is a kernel when compiled for a Hopper.
    """

    in_columns = block == transposed(ROW)

    def kernel(x):
        from jmoe.ops.kernels import fp8_quantize

        def rows(x):
            return Quantized(*fp8_quantize.rows(x, power_of_two=power_of_two))

        if in_columns:
            return rows(x.T).mT
        return rows(x)

    def reference(x):
        tiles, scale, axes = blocks.scaled(x, block, E4M3, power_of_two)
        data = blocks.join(formats.to_e4m3(tiles), axes, x.shape)
        return Quantized(data, scale.squeeze(axes))

    fits = has_kernel(x, ROW if in_columns else block)
    return by_platform(kernel, reference, x, fits=fits)


def has_kernel(x: jax.Array, block: Block) -> bool:
    """Returns whether `jmoe.ops.kernels.fp8_quantize` can quantize a matrix's rows."""
    is_matrix = x.ndim == 2 and x.size > 0 and x.dtype == jnp.bfloat16
    return is_matrix and block == ROW


@functools.partial(jax.jit, static_argnames=("block", "power_of_two"))
def rounded(
    x: jax.Array, block: Block = ROW, *, power_of_two: bool = False
) -> jax.Array:
    """Returns what is left of x once quantized: `dequantize(quantize(x))`, bit for bit.

    It never is e4m3, conversions to which take CPUs longer than all the rest.
    """
    return blocks.rounded(x, block, E4M3, power_of_two=power_of_two).astype(x.dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def dequantize(x: Quantized, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns `data * scale`, multiplied in float32 and then converted."""
    block = blocks.block_of(x.data.shape, x.scale.shape)
    tiles, axes = blocks.cut(x.data.astype(jnp.float32), block)
    product = tiles * jnp.expand_dims(x.scale, axes)
    return blocks.join(product, axes, x.data.shape).astype(dtype)


def to_bits(x: Quantized) -> Quantized:
    """Returns e4m3 as uint8, to be kept: until `from_bits`, it can only be moved.

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
    """Returns a recipe's roundings; None leaves everything as it is."""

    if recipe is None:
        return Roundings(*[lambda x: x] * 3)
    blocks = recipe.activations, recipe.weights, recipe.gradients
    return Roundings(*(functools.partial(recipe.round, block=b) for b in blocks))


def matmul(a: Quantized, b: Quantized, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns `a @ b.T`, [M, N], of a [M, K] and b [N, K], summed in float32.

    Both operands have what is summed last, as tensor cores take e4m3. Where a has ROW
    scales and b ROW or SQUARE ones, and the `gpu` extra is installed, it is a kernel
    when compiled for a Hopper GPU (`jmoe.ops.by_platform`).
    """

    return _product(a, b, dtype, summed=1)


def outer(x: Quantized, dy: Quantized, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns `x.T @ dy`, [K, N], of x [M, K] and dy [M, N].

    It is the same kernel, of the transposes; elsewhere it is `dot.outer`.
    """
    return _product(x, dy, dtype, summed=0)


def _product(
    a: Quantized, b: Quantized, dtype: jax.typing.DTypeLike, *, summed: int
) -> jax.Array:
    """Returns the product over dimension `summed` of both."""

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
    """Returns `x @ w`, [..., N...] of x [..., K], in x's dtype.

    All three products are FP8.

    Any sizes will do: blocks at the ends are shorter. A w [K, N...] of several output
    dimensions is quantized as the matrix that they make together, after it was
    converted to x's dtype. Its gradient has its own dtype, straight from the sums.
    """
    return forward(x, w, recipe)[0]


def forward(x: jax.Array, w: jax.Array, recipe: Recipe):
    """Returns the product and what `backward` is given.

    The latter begins with x as [M, K], quantized, as bits.
    """
    x_MK = recipe.quantize(x.reshape(-1, x.shape[-1]), recipe.activations)
    y_MN, of_weights = multiply(x_MK, w, recipe, x.dtype)
    y = y_MN.reshape(*x.shape[:-1], *w.shape[1:])
    return y, (to_bits(x_MK), *of_weights)


def backward(recipe: Recipe, saved: Any, dy: jax.Array):
    """Returns the gradients of x and w."""
    x_MK, *of_weights = saved
    x_MK = dequantize(from_bits(x_MK), jnp.float32)
    x_MK = recipe.quantize(x_MK, transposed(recipe.activations))
    return gradients(recipe, x_MK, of_weights, dy)


def multiply(
    x_MK: Quantized, w: jax.Array, recipe: Recipe, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, Any]:
    """Returns the product, [M, N] in `dtype`, and what `gradients` reads of weights."""
    w_KN = w.astype(dtype).reshape(w.shape[0], -1)
    quantized = recipe.quantize(w_KN, recipe.weights)
    like_w = jnp.zeros((0, *w.shape[1:]), w.dtype)
    return matmul(x_MK, quantized.mT, dtype), (to_bits(quantized), like_w)


def gradients(recipe: Recipe, x_MK: Quantized, of_weights: Any, dy: jax.Array):
    """Returns the gradients of x and w, of x with blocks along M.

    That of x has dy's leading dimensions.
    """
    w, like_w = of_weights
    outputs = like_w.shape[1:]
    lead = dy.shape[: dy.ndim - len(outputs)]
    dy_MN = dy.reshape(-1, math.prod(outputs))
    dx_MK = matmul(recipe.quantize(dy_MN, recipe.gradients), from_bits(w), dy.dtype)
    dy_MN = recipe.quantize(dy_MN, transposed(recipe.gradients))
    dw_KN = outer(x_MK, dy_MN, like_w.dtype)
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
    """Returns what linear layers multiply by: one of RECIPES, or "native".

    The latter multiplies in x's dtype.
    """
    return dot.dot_general if precision == "native" else DotGeneral(RECIPES[precision])


def recipe_of(dot_general: Callable[..., jax.Array]) -> Recipe | None:
    """Returns the recipe of what linear layers multiply by; None: it isn't FP8.

    A user's own function says it by an attribute `recipe`, for products that don't go
    through it: those of the routed experts, and after SwiGLU or attention in FP8.

    Raises:
      ValueError: it is neither `lax.dot_general` nor one of this package's, and has no
        such attribute, or another kind of value there.
    """
    if dot_general in (lax.dot_general, dot.dot_general):
        return None
    recipe = getattr(dot_general, "recipe", dataclasses.MISSING)
    if recipe is None or isinstance(recipe, Recipe):
        return recipe
    found = "none" if recipe is dataclasses.MISSING else f"recipe={recipe!r}"
    raise ValueError(
        f"dot_general={dot_general!r} must have an attribute `recipe`, by which routed "
        "experts multiply: None, in their inputs' dtype, or a jmoe.ops.fp8.Recipe; it "
        f"has {found}."
    )
