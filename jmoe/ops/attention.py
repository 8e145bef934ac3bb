"""Causal attention in blocks: memory grows with the sequence, not with its square.

Shapes: B batch, T position, H head, K head of keys and values, each of which equally
many heads share (a group; Ainslie et al., arXiv 2305.13245), Q query/key dimension, V
value dimension; within a block, q and k rows (`s` blocks of `block` positions each). A
group's queries are rows of one block, so that nothing is copied that they share.

The forward pass is FlashAttention's online softmax (arXiv 2205.14135, algorithm 1), the
backward one recomputes each block's probabilities from the saved log-sum-exp (its
appendix B.2). Both walk the same list of block pairs; pairs above the diagonal are not
in it, so a causal mask costs half the work instead of being thrown away.

Compiled for a Hopper GPU in bfloat16, with the `gpu` extra, both passes are kernels
instead, which `jmoe.ops.kernels.attention` calls (`jmoe.ops.by_platform`).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.ops.by_platform import by_platform, has_plugin

MASKED = -1e30  # finite, so that a fully masked block stays free of NaN

MAX_KERNEL_QK_DIM, MAX_KERNEL_VALUE_DIM = 192, 128


class _Blocks(NamedTuple):
    """How a sequence is cut: static, hashable."""

    count: int
    size: int
    scale: float
    group: int  # heads that share one of keys and values

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns query and key block of every pair on or below the diagonal."""
        return np.tril_indices(self.count)

    def cut(self, x_BT: Any, dims: tuple[int, ...]) -> jax.Array:
        """Returns [B, T, ...] as [B, s, block, ...], transposed to `dims`."""
        batch, length = x_BT.shape[:2]
        missing = [(0, 0), (0, self.count * self.size - length)]
        x_BT = jnp.pad(x_BT, missing + [(0, 0)] * (x_BT.ndim - 2))
        shape = batch, self.count, self.size, *x_BT.shape[2:]
        return x_BT.reshape(shape).transpose(dims)

    def join(self, x: jax.Array, dims: tuple[int, ...], length: int) -> jax.Array:
        """Returns what `cut` made of [B, length, ...], with the same `dims`."""
        x = x.transpose(np.argsort(dims))
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]

    def cut_queries(self, x_BTH: jax.Array) -> jax.Array:
        """Returns [B, T, H, ...] as [s, B, K, group * block, ...]."""
        x = self.cut(x_BTH, HEADS_FIRST[: x_BTH.ndim + 1])
        return x.reshape(*x.shape[:2], -1, self.group * self.size, *x.shape[4:])

    def join_queries(self, x: jax.Array, length: int) -> jax.Array:
        """Returns what `cut_queries` made of [B, length, H, ...]."""
        x = x.reshape(*x.shape[:2], -1, self.size, *x.shape[4:])
        return self.join(x, HEADS_FIRST[: x.ndim], length)


HEADS_FIRST = (1, 0, 3, 2, 4)  # [s, B, H, block, dim]
SEGMENTS = (1, 0, 2)


def attention(
    q_BTHQ: jax.Array,
    k_BTKQ: jax.Array,
    v_BTKV: jax.Array,
    segment_BT: jax.Array | None,
    *,
    scale: float,
    block_size: int,
) -> jax.Array:
    """Returns softmax attention to earlier positions of the same segment, [B, T, H, V].

    Head h has the keys and values of head h // (H / K).

    Args:
      segment_BT: int32; positions attend only within equal values, which lie next to
        each other. None: one segment.
      scale: multiplies the logits before the float32 softmax.
      block_size: positions scored at a time; a shorter sequence is one block. Kernels
        have their own.
    """
    length = q_BTHQ.shape[1]
    size = min(block_size, length)
    group = q_BTHQ.shape[2] // k_BTKQ.shape[2]
    blocks = _Blocks(-(-length // size), size, scale, group)
    in_bfloat16 = all(x.dtype == jnp.bfloat16 for x in (q_BTHQ, k_BTKQ, v_BTKV))
    if in_bfloat16 and has_plugin() and _fits(q_BTHQ.shape[-1], v_BTKV.shape[-1]):
        return _attend_by_platform(q_BTHQ, k_BTKQ, v_BTKV, segment_BT, blocks)
    out: jax.Array = _attend(*_cut(blocks, q_BTHQ, k_BTKQ, v_BTKV, segment_BT), blocks)
    return blocks.join_queries(out, length)


def _fits(qk_dim: int, value_dim: int) -> bool:
    """Returns whether kernels have enough shared memory for these dimensions."""
    return qk_dim <= MAX_KERNEL_QK_DIM and value_dim <= MAX_KERNEL_VALUE_DIM


def _cut(blocks, q_BTHQ, k_BTKQ, v_BTKV, segment_BT):
    q = blocks.cut_queries(q_BTHQ)
    k, v = (blocks.cut(x, HEADS_FIRST) for x in (k_BTKQ, v_BTKV))
    return q, k, v, None if segment_BT is None else blocks.cut(segment_BT, SEGMENTS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, segment, blocks):
    return _forward(q, k, v, segment, blocks)[0]


def _forward(q, k, v, segment, blocks):
    """Returns the output and its float32 level, in blocks as the arguments are.

    The level is the log-sum-exp of a row's scaled logits, divided by the scale: where
    logits lie, before they are scaled.
    """

    def visit(carry, pair):
        out, top, total = carry
        i, j = pair
        logits = _logits(q, k, segment, i, j, blocks)
        new_top = jnp.maximum(top[i], logits.max(-1))
        weight = jnp.exp(blocks.scale * (logits - new_top[..., None]))
        shrink = jnp.exp(blocks.scale * (top[i] - new_top))
        value = jnp.einsum(
            "bhqk,bhkv->bhqv",
            weight.astype(v.dtype),
            v[j],
            preferred_element_type=jnp.float32,
        )
        return (
            out.at[i].set(out[i] * shrink[..., None] + value),
            top.at[i].set(new_top),
            total.at[i].set(total[i] * shrink + weight.sum(-1)),
        ), None

    rows = q.shape[:-1]
    start = (
        jnp.zeros((*rows, v.shape[-1]), jnp.float32),
        jnp.full(rows, MASKED, jnp.float32),
        jnp.zeros(rows, jnp.float32),
    )
    (out, top, total), _ = _walk(visit, start, blocks)
    level = top + jnp.log(total) / blocks.scale
    return (out / total[..., None]).astype(v.dtype), level


def _logits(q, k, segment, i, j, blocks):
    """Returns logits that aren't scaled: that costs nothing where they are read."""
    logits = jnp.einsum(
        "bhqd,bhkd->bhqk", q[i], k[j], preferred_element_type=jnp.float32
    )
    within = jnp.arange(blocks.size)
    of_query = jnp.tile(within, blocks.group)
    seen = (i * blocks.size + of_query)[:, None] >= j * blocks.size + within
    if segment is not None:
        of_query = jnp.tile(segment[i], blocks.group)
        same_bqk = of_query[:, :, None] == segment[j][:, None, :]
        seen = (seen & same_bqk)[:, None]
    return jnp.where(seen, logits, MASKED)


def _walk(visit, start, blocks):
    i, j = blocks.pairs()
    if len(i) == 1:  # a single block needs no loop, and i = j = 0 fold into constants
        return visit(start, (0, 0))
    return jax.lax.scan(visit, start, (jnp.asarray(i), jnp.asarray(j)))


def _attend_fwd(q, k, v, segment, blocks):
    out, level = _forward(q, k, v, segment, blocks)
    return out, (q, k, v, segment, out, level)


def _attend_bwd(blocks, saved, d_out):
    q, k, v, segment, out, level = saved
    # Scores are computed again, not kept, though with one block no loop says so.
    q, d_out = jax.lax.optimization_barrier((q, d_out))
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)

    def visit(carry, pair):
        dq, dk, dv = carry
        i, j = pair
        logits = _logits(q, k, segment, i, j, blocks)
        weight = jnp.exp(blocks.scale * (logits - level[i][..., None]))
        d_weight = jnp.einsum(
            "bhqv,bhkv->bhqk", d_out[i], v[j], preferred_element_type=jnp.float32
        )
        d_logits = weight * (d_weight - delta[i][..., None])
        d_logits, weight = d_logits.astype(q.dtype), weight.astype(q.dtype)
        accumulate = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        return (
            dq.at[i].add(accumulate("bhqk,bhkd->bhqd", d_logits, k[j])),
            dk.at[j].add(accumulate("bhdq,bhqk->bhdk", q_across[i], d_logits)),
            dv.at[j].add(accumulate("bhvq,bhqk->bhvk", d_out_across[i], weight)),
        ), None

    # A CPU multiplies a block of scores by what lies across it faster than the block's
    # transpose.
    q_across, d_out_across = q.swapaxes(-1, -2), d_out.swapaxes(-1, -2)
    gradients = q, k.swapaxes(-1, -2), v.swapaxes(-1, -2)
    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in gradients)
    (dq, dk, dv), _ = _walk(visit, start, blocks)
    dq, dk = blocks.scale * dq, blocks.scale * dk
    dk, dv = dk.swapaxes(-1, -2), dv.swapaxes(-1, -2)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend_by_platform(q_BTHQ, k_BTKQ, v_BTKV, segment_BT, blocks):
    return _forward_by_platform(q_BTHQ, k_BTKQ, v_BTKV, segment_BT, blocks)[0]


def _forward_by_platform(q_BTHQ, k_BTKQ, v_BTKV, segment_BT, blocks):
    def kernel(*operands):
        from jmoe.ops.kernels import attention as kernels

        return kernels.forward(*operands, scale=blocks.scale)

    def reference(*operands):
        out, level = _forward(*_cut(blocks, *operands), blocks)
        length = q_BTHQ.shape[1]
        log_sum_BTH = blocks.join_queries(blocks.scale * level, length)
        return blocks.join_queries(out, length), log_sum_BTH.swapaxes(1, 2)

    operands = q_BTHQ, k_BTKQ, v_BTKV, segment_BT
    out_BTHV, log_sum_BHT = by_platform(kernel, reference, *operands)
    return out_BTHV, (*operands, out_BTHV, log_sum_BHT)


def _backward_by_platform(blocks, saved, d_out_BTHV):
    def kernel(*operands):
        from jmoe.ops.kernels import attention as kernels

        return kernels.backward(*operands, scale=blocks.scale)

    def reference(q_BTHQ, k_BTKQ, v_BTKV, segment_BT, out_BTHV, log_sum_BHT, d_out):
        out, d_out = (blocks.cut_queries(x) for x in (out_BTHV, d_out))
        level = blocks.cut_queries(log_sum_BHT.swapaxes(1, 2)) / blocks.scale
        saved = *_cut(blocks, q_BTHQ, k_BTKQ, v_BTKV, segment_BT), out, level
        dq, *of_keys, _ = _attend_bwd(blocks, saved, d_out)
        length = q_BTHQ.shape[1]
        dk, dv = (blocks.join(x, HEADS_FIRST, length) for x in of_keys)
        return blocks.join_queries(dq, length), dk, dv

    operands = *saved, d_out_BTHV
    dq, dk, dv = by_platform(kernel, reference, *operands)
    return dq, dk, dv, None


_attend_by_platform.defvjp(_forward_by_platform, _backward_by_platform)
