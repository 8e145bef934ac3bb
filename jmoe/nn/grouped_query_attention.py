"""Grouped-query attention (Ainslie et al., arXiv 2305.13245).

Shapes: B batch, T position, S this device's positions, D hidden, H head, K head of keys
and values (both this device's), Q head dimension.

As GLM-4.5, dots.llm1 and Qwen3 have it: queries and keys may have biases and, head by
head, a norm before they are rotated, of which a part may be left as it is. On a mesh,
`tensor` divides the heads, which need all positions.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jmoe.config import GQAConfig
from jmoe.nn import cached as caches
from jmoe.nn.cached import Groups
from jmoe.nn.heads import project_out
from jmoe.nn.linear import DotGeneral, Linear, RMSNorm
from jmoe.nn.measured import NOTHING, Measured
from jmoe.nn.parameter import TO_HEADS
from jmoe.ops import attention, dot, paged, rope
from jmoe.parallel import collectives


class GroupedQueryAttention(nn.Module):
    """GQA, [B, S, D] -> [B, S, D], by rotations of T positions.

    Without `groups`, positions attend to earlier ones of their sequence; with them, to
    those that are cached too (`jmoe.nn.cached`).
    """

    cfg: GQAConfig
    init_std: float
    dot_general: DotGeneral = dot.dot_general

    @nn.compact
    def __call__(
        self,
        x_BSD: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        segment_BT: jax.Array | None,
        groups: Groups | None = None,
    ) -> tuple[jax.Array, Measured]:
        cfg = self.cfg
        x_BTD = collectives.all_gather(x_BSD, "tensor", 1)
        heads = collectives.share(cfg.num_heads, "tensor", "num_heads")
        kv_heads = collectives.share(cfg.num_kv_heads, "tensor", "num_kv_heads")
        q_BTHQ = self._heads("query", "heads", heads)(x_BTD)
        k_BTKQ = self._heads("key", "kv_heads", kv_heads)(x_BTD)
        v_BTKQ = self._heads("value", "kv_heads", kv_heads)(x_BTD)
        if cfg.qk_norm_eps is not None:
            q_BTHQ = RMSNorm(cfg.qk_norm_eps, dim=None, name="query_norm")(q_BTHQ)
            k_BTKQ = RMSNorm(cfg.qk_norm_eps, dim=None, name="key_norm")(k_BTKQ)
        q_BTHQ, k_BTKQ = (
            self._rotated(q_BTHQ, rotation),
            self._rotated(k_BTKQ, rotation),
        )
        if groups is None:
            out_BTHQ = attention.attention(
                q_BTHQ,
                k_BTKQ,
                v_BTKQ,
                segment_BT,
                scale=cfg.softmax_scale,
                block_size=cfg.block_size,
            )
        else:
            new = {"key": k_BTKQ, "value": v_BTKQ}
            attend = functools.partial(_attend, cfg, caches.remember(self, new, groups))
            out_BTHQ = caches.by_group(attend, groups, q_BTHQ)
        own = x_BSD.shape[-1], self.init_std, self.dot_general
        return project_out(out_BTHQ, *own), NOTHING

    def _heads(self, name: str, dim: str, heads: int) -> Linear:
        return Linear(
            (heads, self.cfg.head_dim),
            ("embed", dim, None),
            self.init_std,
            self.dot_general,
            TO_HEADS,
            use_bias=self.cfg.qkv_bias,
            name=name,
        )

    def _rotated(
        self, x_BTHQ: jax.Array, rotation: tuple[jax.Array, jax.Array]
    ) -> jax.Array:
        rotate = rope.ROTATIONS[self.cfg.rope_pairs]
        turned, left = jnp.split(x_BTHQ, [self.cfg.rope_dim], axis=-1)
        return jnp.concatenate([rotate(turned, *rotation), left], axis=-1)


def cost(cfg: GQAConfig, hidden_dim: int, length: int) -> float:
    """Returns a token's operations: projections, and the scores of earlier positions.

    The latter are half of all.
    """
    projections = 2 * (cfg.num_heads + cfg.num_kv_heads) * cfg.head_dim * hidden_dim
    scores = length / 2 * cfg.num_heads * 2 * cfg.head_dim
    return 2 * (projections + scores)


def cached(
    cfg: GQAConfig, dtype: jax.typing.DTypeLike
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns what a decoder keeps of a token: rotated keys, and values.

    On a mesh, those of this device's heads.
    """
    kv_heads = collectives.share(cfg.num_kv_heads, "tensor", "num_kv_heads")
    of_heads = jax.ShapeDtypeStruct((kv_heads, cfg.head_dim), dtype)
    return {"key": of_heads, "value": of_heads}


def prepared(cfg: GQAConfig, params: Any) -> dict[str, jax.Array]:
    """Returns what a decoder computes of the parameters once: nothing."""
    del cfg, params
    return {}


def _attend(cfg, pages, sequences, q_BQHX):
    """Returns each token's attention to what is cached, [B, Q, H, X]."""

    def read(page_WJ, is_there_WS):
        key_WSKX, value_WSKX = (
            paged.entries(pages[name], page_WJ, is_there_WS).astype(q_BQHX.dtype)
            for name in ("key", "value")
        )
        return key_WSKX.swapaxes(1, 2), value_WSKX.swapaxes(1, 2)

    batch, tokens, heads, dim = q_BQHX.shape
    kv_heads = pages["key"].shape[2]
    out = paged.attend(
        q_BQHX.reshape(batch, tokens, kv_heads, heads // kv_heads, dim),
        sequences,
        read,
        page_size=pages["key"].shape[1],
        value_dim=dim,
        scale=cfg.softmax_scale,
    )
    return out.reshape(q_BQHX.shape)
