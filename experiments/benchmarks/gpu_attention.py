"""Attention that JAX does in the GPU benchmark: ours, cuDNN's, `tokamax`'s; decoding.

Shapes: B batch, T position, H head, Q query/key and V value dimension; of decoding, S
cached position, M page of a sequence, X latent dimension.
"""
# pyright: reportMissingImports=false

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from experiments.benchmarks.gpu_measure import ATTENTION, Subject
from experiments.benchmarks.gpu_shapes import BOTH_PASSES, FORWARD, Attention, Decode
from jmoe.config import MLAConfig
from jmoe.ops import attention as ops
from jmoe.ops import latent_attention, paged

BLOCK_SIZE = MLAConfig.block_size

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def attention(case: Attention) -> Iterator[Subject]:
    """Forward, and forward with the gradients of all three inputs."""
    B, T, H, Q = case.batch, case.length, case.heads, case.qk_dim
    shapes = (B, T, H, Q), (B, T, H, Q), (B, T, H, case.value_dim)

    def make(key: jax.Array) -> tuple[jax.Array, ...]:
        keys = jax.random.split(key, 4)
        # The last is the result's gradient.
        return tuple(
            jax.random.normal(k, shape, jnp.bfloat16)
            for k, shape in zip(keys, (*shapes, shapes[-1]), strict=True)
        )

    passes = {FORWARD: _forward, BOTH_PASSES: _forward_backward}
    for operation, of_passes in passes.items():
        reference = functools.partial(of_passes, _naive(case.scale))
        for system, attend in _systems(case).items():
            yield Subject(
                operation,
                system,
                make,
                functools.partial(of_passes, attend),
                functools.partial(_in_float32, reference) if system == "ours" else None,
                ATTENTION,
            )


def _systems(case: Attention) -> dict[str, Attend]:
    def ours(q_BTHQ, k_BTHQ, v_BTHV):
        return ops.attention(
            q_BTHQ, k_BTHQ, v_BTHV, None, scale=case.scale, block_size=BLOCK_SIZE
        )

    def cudnn(q_BTHQ, k_BTHQ, v_BTHV):
        # It wants values as wide as keys.
        missing = case.qk_dim - case.value_dim
        v_BTHQ = jnp.pad(v_BTHV, [(0, 0)] * 3 + [(0, missing)])
        out_BTHQ = jax.nn.dot_product_attention(
            q_BTHQ,
            k_BTHQ,
            v_BTHQ,
            scale=case.scale,
            is_causal=True,
            implementation="cudnn",
        )
        return out_BTHQ[..., : case.value_dim]

    def by_tokamax(q_BTHQ, k_BTHQ, v_BTHV):
        import tokamax

        return tokamax.dot_product_attention(
            q_BTHQ,
            k_BTHQ,
            v_BTHV,
            scale=case.scale,
            is_causal=True,
            implementation=("mosaic_gpu",),
        )

    systems = {"ours": ours, "cuDNN": cudnn}
    if importlib.util.find_spec("tokamax"):
        systems["tokamax"] = by_tokamax
    return systems


def _forward(attend: Attend, q_BTHQ, k_BTHQ, v_BTHV, d_out_BTHV):
    return _joined(attend(q_BTHQ, k_BTHQ, v_BTHV))


def _forward_backward(attend: Attend, q_BTHQ, k_BTHQ, v_BTHV, d_out_BTHV):
    out_BTHV, pull = jax.vjp(attend, q_BTHQ, k_BTHQ, v_BTHV)
    return tuple(map(_joined, (out_BTHV, *pull(d_out_BTHV))))


def _joined(x_BTHV: jax.Array) -> jax.Array:
    """[B, T, H * V]: tiles, in which results are compared, are of positions."""
    return x_BTHV.reshape(*x_BTHV.shape[:2], -1)


def _in_float32(function: Callable[..., Any], *arrays: jax.Array) -> Any:
    return function(*(x.astype(jnp.float32) for x in arrays))


def _naive(scale: float) -> Attend:
    """Softmax of all scores, one head of one sequence at a time."""

    @jax.checkpoint
    def of_head(arrays):
        q_TQ, k_TQ, v_TV = arrays
        dot = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
        logits_TT = scale * dot(q_TQ, k_TQ.T)
        position_T = jnp.arange(q_TQ.shape[0])
        logits_TT = jnp.where(position_T[:, None] >= position_T, logits_TT, -jnp.inf)
        return dot(jax.nn.softmax(logits_TT, axis=-1), v_TV)

    def attend(*arrays: jax.Array) -> jax.Array:
        batch, _, heads, _ = arrays[0].shape
        of_heads = tuple(
            x.swapaxes(1, 2).reshape(batch * heads, x.shape[1], x.shape[3])
            for x in arrays
        )
        out = lax.map(of_head, of_heads)
        return out.reshape(batch, heads, *out.shape[1:]).swapaxes(1, 2)

    return attend


def decode(case: Decode) -> Iterator[Subject]:
    """One query of each head and sequence to all that is cached."""
    B, S, H, X = case.batch, case.length, case.heads, case.latent_dim
    page = latent_attention.KERNEL_PAGE
    pages = -(-S // page)  # of a sequence, which lie one after the other

    def make(key: jax.Array) -> tuple[jax.Array, ...]:
        q_key, cache_key = jax.random.split(key)
        return (
            jax.random.normal(q_key, (B, H, X), jnp.bfloat16),
            jax.random.normal(cache_key, (B, pages * page, X), jnp.bfloat16),
            jnp.full(B, S, jnp.int32),
        )

    def ours(q_BHX, cache_BSX, length_B):
        table_BM = jnp.arange(B * pages, dtype=jnp.int32).reshape(B, pages)
        out_BQHV = latent_attention.latent_decode(
            q_BHX[:, None],
            cache_BSX.reshape(-1, page, X),
            paged.Sequences(table_BM, length_B[:, None] - 1),
            value_dim=case.value_dim,
            scale=case.scale,
        )
        return out_BQHV[:, 0]

    by_xla = functools.partial(_decode_by_xla, case)

    def reference(q_BHX, cache_BSX, length_B):
        q_BHX, cache_BSX = (x.astype(jnp.float32) for x in (q_BHX, cache_BSX))
        return by_xla(q_BHX, cache_BSX, length_B)

    yield Subject(FORWARD, "ours", make, ours, reference, ATTENTION)
    yield Subject(FORWARD, "XLA", make, by_xla)


def _decode_by_xla(case: Decode, q_BHX, cache_BSX, length_B):
    """All scores at once; each sequence's first `length_B` positions count."""
    dot = functools.partial(
        jnp.einsum,
        preferred_element_type=jnp.float32,
        precision=lax.Precision.HIGHEST,
    )
    logits_BHS = case.scale * dot("bhx,bsx->bhs", q_BHX, cache_BSX)
    is_there_BS = jnp.arange(cache_BSX.shape[1]) < length_B[:, None]
    logits_BHS = jnp.where(is_there_BS[:, None], logits_BHS, -jnp.inf)
    weight_BHS = jax.nn.softmax(logits_BHS, axis=-1).astype(cache_BSX.dtype)
    value_BSV = cache_BSX[..., : case.value_dim]
    return dot("bhs,bsv->bhv", weight_BHS, value_BSV).astype(q_BHX.dtype)
