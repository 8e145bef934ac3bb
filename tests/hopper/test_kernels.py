"""Kernels, compiled for an H20: with what they multiply, and what they need."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from jmoe.ops import fp8, grouped
from jmoe.ops.after_attention import after_attention
from jmoe.ops.kernels import fp8_grouped, fp8_matmul, fp8_quantize
from jmoe.ops.kernels import grouped as grouped_kernels
from tests.hopper.compiled import Kernel, compile_text

pytestmark = pytest.mark.hopper

BF16 = "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16"
E4M3 = "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3"


def check(kernel: Kernel):
    kernel.check()
    assert set(kernel.products) == {E4M3}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("block", ["row", "square"])
@pytest.mark.parametrize("sizes", [(4096, 4096, 7168), (7168, 1536, 4000)])
def test_a_product_takes_e4m3_and_spills_nothing(sizes, block, dtype, compile_kernels):
    M, N, K = sizes
    blocks = fp8.num_blocks(K)
    rows = N if block == "row" else fp8.num_blocks(N)
    (kernel,) = compile_kernels(
        functools.partial(fp8_matmul.matmul, dtype=dtype),
        ((M, K), fp8.DTYPE),
        ((M, blocks), jnp.float32),
        ((N, K), fp8.DTYPE),
        ((rows, blocks), jnp.float32),
    )
    check(kernel)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("product", ["dot", "outer"])
@pytest.mark.parametrize("sizes", [(8192, 7168, 4096), (1000, 2048, 7168)])
def test_grouped_products_are_alike(sizes, product, dtype, compile_kernels):
    M, I, O = sizes  # noqa: E741
    experts = 32
    squares, along_rows = map(fp8.num_blocks, (O, M))
    inputs = fp8.num_blocks(I)
    shapes = {
        "dot": [
            ((M, I), fp8.DTYPE),
            ((M, inputs), jnp.float32),
            ((experts, O, I), fp8.DTYPE),
            ((experts, squares, inputs), jnp.float32),
        ],
        "outer": [
            ((I, M), fp8.DTYPE),
            ((I, along_rows), jnp.float32),
            ((O, M), fp8.DTYPE),
            ((O, along_rows), jnp.float32),
        ],
    }
    (kernel,) = compile_kernels(
        functools.partial(getattr(fp8_grouped, product), dtype=dtype),
        *shapes[product],
        ((experts,), jnp.int32),
    )
    check(kernel)


OF_BFLOAT16 = {
    "dot": grouped_kernels.dot,
    "dot_transposed": grouped_kernels.dot_transposed,
    "outer": functools.partial(grouped_kernels.outer, dtype=jnp.bfloat16),
    "outer in float32": functools.partial(grouped_kernels.outer, dtype=jnp.float32),
}


@pytest.mark.parametrize("product", OF_BFLOAT16)
@pytest.mark.parametrize("sizes", [(8192, 7168, 4096), (1000, 2048, 2816), (9, 130, 7)])
def test_those_of_bfloat16_spill_nothing_either(sizes, product, compile_kernels):
    M, I, O = sizes  # noqa: E741
    shapes = {
        "dot": [(M, I), (32, I, O)],
        "dot_transposed": [(M, O), (32, I, O)],
        "outer": [(M, I), (M, O)],
    }
    (kernel,) = compile_kernels(
        OF_BFLOAT16[product],
        *((shape, jnp.bfloat16) for shape in shapes[product.split()[0]]),
        ((32,), jnp.int32),
    )
    kernel.check()
    assert set(kernel.products) == {BF16}


@pytest.mark.parametrize("power_of_two", [False, True], ids=["any", "power of two"])
@pytest.mark.parametrize("kind", ["rows", "columns"])
@pytest.mark.parametrize("sizes", [(8192, 7168), (9, 130)])
def test_quantizing_spills_nothing(sizes, kind, power_of_two, compile_kernels):
    tiles = [] if kind == "rows" else [((70, 4), jnp.int32)]
    quantize = getattr(fp8_quantize, kind)
    (kernel,) = compile_kernels(
        functools.partial(quantize, power_of_two=power_of_two),
        (sizes, jnp.bfloat16),
        *tiles,
    )
    assert kernel.spills == [0, 0]


@pytest.mark.parametrize(
    ("recipe", "kernels"),
    # Rows of bfloat16 are quantized by kernels too: x, dy and dy's transpose.
    [("fp8", 3 + 3), ("fp8_power_of_two", 3 + 3), ("fp8_square_gradients", 2 + 1)],
)
def test_a_linear_layers_products_are_kernels(recipe, kernels):
    assert kernels_of(fp8.dot_general(recipe)) == kernels


def test_after_attention_what_was_kept_is_quantized_by_a_kernel_too():
    assert kernels_of(after_attention(fp8.dot_general("fp8"))) == 3 + 4


def kernels_of(dot_general):
    """How many a linear layer's three products have."""

    def gradients(x, w, dy):
        y, pull = jax.vjp(
            lambda x, w: dot_general(x, w, (((1,), (0,)), ((), ()))), x, w
        )
        return y, *pull(dy)

    M, K, N = 2048, 1536, 7168
    shapes = (M, K), (K, N), (M, N)
    text = compile_text(gradients, *((shape, jnp.bfloat16) for shape in shapes))
    return len(re.findall(r'custom_call_target="mosaic_gpu\w*"', text))


@pytest.mark.parametrize("apart", [False, True])
def test_routed_experts_products_are_kernels(apart):
    """Those of the first segment are two, those of the loop over later ones all six."""
    experts, tokens, choices, hidden, mlp = 8, 1024, 4, 2048, 1408

    def gradients(x_TD, expert_TK, gate_TK, gate_up, down, dy_TD):
        def output(x_TD, gate_TK, gate_up, down):
            options = {"recipe": fp8.RECIPES["fp8"], "rows": tokens, "apart": apart}
            routed_mlp = functools.partial(grouped.BACKENDS["ragged"], **options)
            return routed_mlp(x_TD, expert_TK, gate_TK, gate_up, down)

        y_TD, pull = jax.vjp(output, x_TD, gate_TK, gate_up, down)
        return y_TD, *pull(dy_TD)

    text = compile_text(
        gradients,
        ((tokens, hidden), jnp.bfloat16),
        ((tokens, choices), jnp.int32),
        ((tokens, choices), jnp.float32),
        ((experts, hidden, 2, mlp), jnp.bfloat16),
        ((experts, mlp, hidden), jnp.bfloat16),
        ((tokens, hidden), jnp.bfloat16),
    )
    found = re.findall(r'custom_call_target="mosaic_gpu\w*"', text)
    assert len(found) >= 2 * (2 + 5)
    assert "ragged-dot" not in text
