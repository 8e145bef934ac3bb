"""Kernels, compiled for an H20: with what they multiply, and what they need."""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.ops import fp8, grouped
from jmoe.ops.kernels import fp8_grouped, fp8_matmul
from jmoe.plan import aot
from jmoe.plan.device import H20

pytestmark = pytest.mark.hopper

SHARED_BYTES = 232448  # of an SM's memory, that a block of threads may have
E4M3 = "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3"


class Kernel(NamedTuple):
    """What the compiler says of one."""

    products: list[str]  # tensor cores' instructions
    spills: list[int]  # bytes
    shared_bytes: int
    is_serialized: bool  # products wait for each other


@pytest.fixture
def compile_kernels(tmp_path, monkeypatch):
    """Compiles a function of arrays of these shapes; all kernels it has."""
    for name, value in {"TO": str(tmp_path), "PTX": "1", "PTXAS": "1"}.items():
        monkeypatch.setenv(f"MOSAIC_GPU_DUMP_{name}", value)

    def compile_kernels(function, *shapes) -> list[Kernel]:
        compile_text(function, *shapes)
        return [read(path.with_suffix("")) for path in sorted(tmp_path.glob("*.ptx"))]

    return compile_kernels


def compile_text(function, *shapes) -> str:
    mesh = jax.sharding.Mesh(np.array(aot.absent_devices(H20, 1)), ("device",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arrays = [jax.ShapeDtypeStruct(*shape, sharding=everywhere) for shape in shapes]
    return jax.jit(function).lower(*arrays).compile().as_text()


def read(path) -> Kernel:
    ptx, ptxas, passes = (
        path.with_name(path.name + suffix).read_text()
        for suffix in (".ptx", ".ptxas", ".mlir-passes.log")
    )
    shared = re.findall(r"dynamic_shared_memory_size %c(\d+)_i32", passes)
    return Kernel(
        products=re.findall(r"wgmma\.mma_async[\w.]*", ptx),
        spills=[int(n) for n in re.findall(r"(\d+) bytes spill", ptxas)],
        shared_bytes=max(map(int, shared)),
        is_serialized="instructions are serialized" in ptxas,
    )


def check(kernel: Kernel):
    assert kernel.products and set(kernel.products) == {E4M3}
    assert kernel.spills == [0, 0]  # stores and loads
    assert kernel.shared_bytes <= SHARED_BYTES
    assert not kernel.is_serialized


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


@pytest.mark.parametrize(
    ("recipe", "kernels"),
    [("fp8", 3), ("fp8_power_of_two", 3), ("fp8_square_gradients", 2)],
)
def test_a_linear_layers_products_are_kernels(recipe, kernels):
    def gradients(x, w, dy):
        y, pull = jax.vjp(lambda x, w: fp8.fp8_dot(x, w, fp8.RECIPES[recipe]), x, w)
        return y, *pull(dy)

    M, K, N = 2048, 1536, 7168
    shapes = (M, K), (K, N), (M, N)
    text = compile_text(gradients, *((shape, jnp.bfloat16) for shape in shapes))
    found = re.findall(r'custom_call_target="mosaic_gpu\w*"', text)
    assert len(found) == kernels


@pytest.mark.parametrize("backend", ["ragged", "ragged_apart"])
def test_routed_experts_products_are_kernels(backend):
    """Of the first segment and in the loop over later ones: two, then all six."""
    experts, tokens, choices, hidden, mlp = 8, 1024, 4, 2048, 1408

    def gradients(x_TD, expert_TK, gate_TK, gate_up, down, dy_TD):
        def output(x_TD, gate_TK, gate_up, down):
            routed_mlp = grouped.BACKENDS[backend]
            recipe = fp8.RECIPES["fp8"]
            return routed_mlp(x_TD, expert_TK, gate_TK, gate_up, down, recipe=recipe)

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
