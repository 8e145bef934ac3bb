"""Matrix products that JAX does in the GPU benchmark: ours, XLA's, `tokamax`'s.

Dense ones in FP8, and products of each expert's rows in bfloat16 and FP8, forward and
both gradients. References are float32, of what bfloat16 or e4m3 operands stand for, one
expert after another.

Shapes: M row, I input, O output, E expert; K summed and N output of a dense product.
"""
# pyright: reportMissingImports=false

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.benchmarks.gpu_measure import FP8_PRODUCT, Subject
from experiments.benchmarks.gpu_shapes import (
    FORWARD,
    INPUTS,
    WEIGHTS,
    Ceilings,
    Dense,
    Grouped,
)
from jmoe.ops import fp8, grouped_fp8, grouped_ragged, segments
from jmoe.ops.rows import DOT, DOT_TRANSPOSED, OUTER

RECIPE = fp8.RECIPES["fp8"]


def ceilings(case: Ceilings) -> Iterator[Subject]:
    """XLA's product of two squares, and its copy."""
    square = case.size, case.size

    def copied(key: jax.Array) -> tuple[jax.Array]:
        return (jax.random.randint(key, (case.copied // 4,), 0, 2**30, jnp.int32),)

    yield Subject("matmul", "XLA", _normals(square, square), jnp.matmul)
    # Not the same numbers: XLA would copy nothing.
    yield Subject("copy", "XLA", copied, lambda x: x + 1)


def dense(case: Dense) -> Iterator[Subject]:
    """A linear layer's products: FP8 operands lie ready, or all is done at each call.

    The gradient of the input is a product like the forward one.
    """
    M, I, O = case.rows, case.inputs, case.outputs  # noqa: E741
    bf16 = {
        FORWARD: (_normals((M, I), (I, O)), jnp.matmul),
        WEIGHTS: (_normals((M, I), (M, O)), lambda x, dy: x.T @ dy),
    }
    blocks = {FORWARD: ((M, I), (O, I), fp8.SQUARE), WEIGHTS: ((I, M), (O, M), fp8.ROW)}
    for operation, (left, right, block) in blocks.items():
        make = _quantized((left, fp8.ROW), (right, block))
        yield Subject(
            operation, "ours FP8", make, _fp8_product, _wide_product, FP8_PRODUCT
        )
        yield Subject(operation, "XLA", *bf16[operation])
    yield Subject(
        FORWARD,
        "ours FP8 with quantizing",
        bf16[FORWARD][0],
        lambda x_MI, w_IO: fp8.forward(x_MI, w_IO, RECIPE)[0],
        _rounded_product,
        FP8_PRODUCT,
    )


def _fp8_product(a: fp8.Quantized, b: fp8.Quantized) -> jax.Array:
    return fp8.matmul(a, b, jnp.bfloat16)


def _wide_product(a: fp8.Quantized, b: fp8.Quantized) -> jax.Array:
    return _wide_matmul(*(fp8.dequantize(x, jnp.float32) for x in (a, b.mT)))


def _rounded_product(x_MI: jax.Array, w_IO: jax.Array) -> jax.Array:
    wide = x_MI.astype(jnp.float32), w_IO.astype(jnp.float32)
    rounded = fp8.roundings(RECIPE)
    return _wide_matmul(rounded.activations(wide[0]), rounded.weights(wide[1]))


def grouped(case: Grouped) -> Iterator[Subject]:
    """Products of experts' rows, each operation by each of the systems."""
    for operation in _Operands(case).by_operation:
        yield from _ours(case, operation)
        yield from _ours_fp8(case, operation)
        yield from _dense_of_as_many(case, operation)
        if case.compared:
            yield from _others(case, operation)


class _Operands:
    """Says what each operation's shapes are, of a case's rows, and XLA's product."""

    def __init__(self, case: Grouped):
        M, I, O, E = case.rows, case.inputs, case.outputs, case.experts  # noqa: E741
        self.size_E = np.array(case.sizes(), np.int32)
        self.by_operation = {
            FORWARD: ((M, I), (E, I, O), DOT),
            INPUTS: ((M, O), (E, I, O), DOT_TRANSPOSED),
            WEIGHTS: ((M, I), (M, O), OUTER),
        }

    def make(self, operation: str) -> Callable[[jax.Array], tuple[Any, ...]]:
        """Two bfloat16 arrays and the rows of each expert, from a key."""
        left, right, _ = self.by_operation[operation]
        return lambda key: (*_normals(left, right)(key), jnp.asarray(self.size_E))


def _ours(case: Grouped, operation: str) -> Iterator[Subject]:
    """In bfloat16, as the `ragged` backend has them."""
    make = _Operands(case).make(operation)
    wide = {FORWARD: _wide_dot, INPUTS: _wide_transposed, WEIGHTS: _wide_outer}
    product = functools.partial(_of_ragged, operation, None)
    yield Subject(operation, "ours", make, product, wide[operation])


def _ours_fp8(case: Grouped, operation: str) -> Iterator[Subject]:
    """Yields products of operands that lie ready, and of rows quantized in each.

    The weights' gradient always quantizes its operands.
    """
    make = _Operands(case).make(operation)
    in_use = functools.partial(_of_ragged, operation, RECIPE)
    if operation == WEIGHTS:
        yield Subject(operation, "ours FP8", make, in_use, _rounded_outer, FP8_PRODUCT)
        return

    def with_weights(key):
        left, w_EIO, size_E = make(key)
        return left, fp8.quantize(w_EIO, fp8.SQUARE), size_E

    def ready(key):
        left, w, size_E = with_weights(key)
        # As the kernel takes them: what is summed is last.
        return fp8.quantize(left), w.mT if operation == FORWARD else w, size_E

    def kernel(x, w, size_E):
        return grouped_fp8.dot(x, w, size_E, jnp.bfloat16)

    def reference(x, w, size_E):
        return _wide_transposed(_wide(x), _wide(w), size_E)

    def rounded(left, w, size_E):
        wide = _wide_dot if operation == FORWARD else _wide_transposed
        rounded_left = RECIPE.round(left.astype(jnp.float32), RECIPE.activations)
        return wide(rounded_left, _wide(w), size_E)

    yield Subject(operation, "ours FP8", ready, kernel, reference, FP8_PRODUCT)
    if case.compared:
        system = "ours FP8 with quantizing"
        yield Subject(operation, system, with_weights, in_use, rounded, FP8_PRODUCT)


def _of_ragged(operation, recipe, left, right, size_E):
    """The `ragged` backend's product for this operation."""
    products = {
        FORWARD: grouped_ragged._dot,
        INPUTS: grouped_ragged._dot_transposed,
        WEIGHTS: functools.partial(grouped_ragged._outer, dtype=left.dtype),
    }
    segment = _segment(left.shape[0], size_E)
    return products[operation](recipe, left, right, segment)


def _dense_of_as_many(case: Grouped, operation: str) -> Iterator[Subject]:
    """XLA's product of all rows with one expert's weights."""
    M, I, O = case.rows, case.inputs, case.outputs  # noqa: E741
    make, product = {
        FORWARD: (_normals((M, I), (I, O)), jnp.matmul),
        INPUTS: (_normals((M, O), (I, O)), lambda dy, w: dy @ w.T),
        WEIGHTS: (_normals((M, I), (M, O)), lambda x, dy: x.T @ dy),
    }[operation]
    yield Subject(operation, "dense XLA", make, product)


def _others(case: Grouped, operation: str) -> Iterator[Subject]:
    """JAX's, forward: it takes as long as all experts for all rows; and `tokamax`'s."""
    operands = _Operands(case)
    make, dimensions = operands.make(operation), operands.by_operation[operation][2]

    def ragged_dot(left, right, size_E):
        return lax.ragged_dot_general(left, right, size_E, dimensions)

    if operation == FORWARD:
        yield Subject(operation, "lax.ragged_dot", make, ragged_dot)
    if importlib.util.find_spec("tokamax") is None:
        return

    def by_tokamax(left, right, size_E):
        import tokamax

        # By its own name: the general one is chosen by the device that is there.
        return tokamax.ragged_dot_general(
            left, right, size_E, dimensions, implementation=("mosaic_gpu",)
        )

    yield Subject(operation, "tokamax", make, by_tokamax)


def _segment(rows: int, size_E: jax.Array) -> segments.Segment:
    """Returns a segment of all rows, each of them some expert's."""
    row_M = jnp.arange(rows, dtype=jnp.int32)
    return segments.Segment(jnp.int32(0), row_M, row_M, jnp.ones(rows, bool), size_E)


def _normals(*shapes: tuple[int, ...]) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
    """bfloat16 arrays of standard normal numbers, from a key."""

    def make(key: jax.Array) -> tuple[jax.Array, ...]:
        keys = jax.random.split(key, len(shapes))
        return tuple(
            jax.random.normal(k, shape, jnp.bfloat16)
            for k, shape in zip(keys, shapes, strict=True)
        )

    return make


def _quantized(
    *operands: tuple[tuple[int, ...], fp8.Block],
) -> Callable[[jax.Array], tuple[fp8.Quantized, ...]]:
    shapes, blocks = zip(*operands, strict=True)
    make = _normals(*shapes)
    return lambda key: tuple(map(fp8.quantize, make(key), blocks))


def _wide(x: fp8.Quantized) -> jax.Array:
    return fp8.dequantize(x, jnp.float32)


def _wide_matmul(a_MK: jax.Array, b_KN: jax.Array) -> jax.Array:
    a_MK, b_KN = (x.astype(jnp.float32) for x in (a_MK, b_KN))
    return jnp.matmul(a_MK, b_KN, precision=lax.Precision.HIGHEST)


def _wide_dot(x_MI: jax.Array, w_EIO: jax.Array, size_E: jax.Array) -> jax.Array:
    """float32 [M, O]: one expert after another, with all rows."""
    start = jnp.zeros((x_MI.shape[0], w_EIO.shape[2]), jnp.float32)

    def add(y_MO, expert):
        w_IO, *own = expert
        is_own_M1 = _is_own(x_MI.shape[0], *own)
        return jnp.where(is_own_M1, _wide_matmul(x_MI, w_IO), y_MO), None

    return lax.scan(add, start, (w_EIO, *_bounds(size_E)))[0]


def _wide_transposed(dy_MO, w_EIO, size_E):
    return _wide_dot(dy_MO, w_EIO.mT, size_E)


def _wide_outer(x_MI: jax.Array, dy_MO: jax.Array, size_E: jax.Array) -> jax.Array:
    """float32 [E, I, O], likewise."""

    def of_expert(own):
        own_x_MI = jnp.where(_is_own(x_MI.shape[0], *own), x_MI, 0)
        return _wide_matmul(own_x_MI.T, dy_MO)

    return lax.map(of_expert, _bounds(size_E))


def _rounded_outer(x_MI: jax.Array, dy_MO: jax.Array, size_E: jax.Array) -> jax.Array:
    """Returns outer products of operands in blocks of 128 of an expert's rows."""

    def of_expert(own):
        def along_rows(rows, block):
            its_rows = jnp.where(_is_own(rows.shape[0], *own), rows, 0)
            return RECIPE.round(its_rows.T.astype(jnp.float32), block)

        x_IM = along_rows(x_MI, RECIPE.activations)
        dy_OM = along_rows(dy_MO, RECIPE.gradients)
        return _wide_matmul(x_IM, dy_OM.T)

    return lax.map(of_expert, _bounds(size_E))


def _bounds(size_E: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each expert's first row, and the one after its last."""
    end_E = jnp.cumsum(size_E)
    return end_E - size_E, end_E


def _is_own(rows: int, first: jax.Array, end: jax.Array) -> jax.Array:
    """Which rows are those of an expert, [M, 1]."""
    row_M1 = jnp.arange(rows)[:, None]
    return (row_M1 >= first) & (row_M1 < end)
