"""Attention's kernels, compiled for an H20: with what they multiply and need."""

import jax
import jax.numpy as jnp
import pytest

from jmoe.config import GQAConfig
from jmoe.nn.grouped_query_attention import GroupedQueryAttention
from jmoe.nn.mixers import rotation
from jmoe.ops import paged
from jmoe.ops.attention import attention
from jmoe.ops.latent_attention import KERNEL_PAGE, latent_decode

pytestmark = pytest.mark.hopper

SIZES = {  # batch, length, heads, those of keys, query/key and value dimension
    "v3": (1, 4096, 128, 128, 192, 128),
    "v2_lite": (2, 4096, 16, 16, 192, 128),
    "qwen3_30b": (2, 4096, 32, 4, 128, 128),
    "small": (3, 100, 4, 2, 24, 16),
}


@pytest.mark.parametrize("segments", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_both_passes_are_three_kernels_and_spill_nothing(
    sizes, segments, compile_kernels
):
    batch, length, heads, kv_heads, qk_dim, v_dim = sizes

    def gradients(q, k, v, segment_BT, d_out):
        def attend(q, k, v):
            documents = segment_BT if segments else None
            return attention(q, k, v, documents, scale=0.1, block_size=512)

        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(d_out)

    q, k, v, d_out = (
        ((batch, length, *of_head), jnp.bfloat16)
        for of_head in [
            (heads, qk_dim),
            (kv_heads, qk_dim),
            (kv_heads, v_dim),
            (heads, v_dim),
        ]
    )
    segments_BT = (batch, length), jnp.int32
    kernels = compile_kernels(gradients, q, k, v, segments_BT, d_out)
    assert len(kernels) == 3
    for kernel in kernels:
        kernel.check()
        assert all("bf16.bf16" in product for product in kernel.products)


def test_a_layer_of_grouped_queries_attends_by_the_three_kernels(compile_kernels):
    """Qwen3-30B-A3B's, in bfloat16."""
    hidden, length = 2048, 4096
    cfg = GQAConfig(
        num_heads=32, num_kv_heads=4, head_dim=128, rope_dim=128, qk_norm_eps=1e-6
    )
    module = GroupedQueryAttention(cfg, 0.02)

    def gradients(x_BTD, query, key, value, out):
        def attend(x_BTD, kernels):
            params = {name: {"kernel": w} for name, w in kernels.items()}
            norms = {"scale": jnp.ones(128)}
            params |= {"query_norm": norms, "key_norm": norms}
            positions = rotation(cfg, length), None
            return module.apply({"params": params}, x_BTD, *positions)[0]

        kernels = {"query": query, "key": key, "value": value, "out": out}
        y_BTD, pull = jax.vjp(attend, x_BTD, kernels)
        return pull(y_BTD)

    kernels = compile_kernels(
        gradients,
        ((1, length, hidden), jnp.bfloat16),
        ((hidden, 32, 128), jnp.float32),
        ((hidden, 4, 128), jnp.float32),
        ((hidden, 4, 128), jnp.float32),
        ((32 * 128, hidden), jnp.float32),
    )
    assert len(kernels) == 3
    for kernel in kernels:
        kernel.check()


def test_a_document_starts_where_its_run_of_positions_does():
    from jmoe.ops.kernels import attention as kernels

    start_BT = kernels._starts(jnp.array([[4, 4, 0, 0, 0, 1], [2] * 6], jnp.int32))
    assert start_BT[:, :6].tolist() == [[0, 0, 2, 2, 2, 5], [0] * 6]
    assert start_BT.shape == (2, kernels.TILE)


def test_in_float32_there_is_no_kernel(compile_kernels):
    shape = (1, 256, 2, 64), jnp.float32

    def attend(q, k, v):
        return attention(q, k, v, None, scale=0.1, block_size=128)

    assert compile_kernels(attend, shape, shape, shape) == []


@pytest.mark.parametrize(
    ("sequences", "heads"), [(1, 16), (32, 8), (32, 32), (1, 128), (64, 64)]
)
def test_decoding_from_latents_is_a_kernel_that_spills_nothing(
    sequences, heads, compile_kernels
):
    pages, latent_dim, rope_dim = 64, 512, 64
    dim = latent_dim + rope_dim

    def decode(q_BQHX, pages_PKX, table_BM, position_BQ):
        where = paged.Sequences(table_BM, position_BQ)
        return latent_decode(q_BQHX, pages_PKX, where, value_dim=latent_dim, scale=0.1)

    (kernel,) = compile_kernels(
        decode,
        ((sequences, 1, heads, dim), jnp.bfloat16),
        ((sequences * pages, KERNEL_PAGE, dim), jnp.bfloat16),
        ((sequences, pages), jnp.int32),
        ((sequences, 1), jnp.int32),
    )
    kernel.check()
