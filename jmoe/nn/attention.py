"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Shapes: B batch, T position, D hidden, H head, Q = nope + rope query/key dimension,
V value dimension. Keys and values of all heads come from one small latent, which is all
that a decoder has to cache; one rotated key part is shared by the heads.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from jmoe.config import AttentionConfig
from jmoe.nn.linear import DotGeneral, Linear, RMSNorm
from jmoe.ops import attention, rope


class LatentAttention(nn.Module):
    """MLA on a full sequence: [B, T, D] -> [B, T, D]."""

    cfg: AttentionConfig
    init_std: float
    dot_general: DotGeneral = jax.lax.dot_general

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        segment_BT: jax.Array | None,
    ) -> jax.Array:
        cfg = self.cfg
        q_BTHQ = self._queries(x_BTD)
        q_nope, q_rope = jnp.split(q_BTHQ, [cfg.nope_dim], axis=-1)

        latent = self._linear("kv_down", cfg.kv_latent_dim + cfg.rope_dim)(x_BTD)
        latent, k_rope = jnp.split(latent, [cfg.kv_latent_dim], axis=-1)
        latent = RMSNorm(cfg.latent_norm_eps, dim="latent", name="kv_norm")(latent)
        kv_BTHX = self._heads("kv_up", cfg.nope_dim + cfg.value_dim)(latent)
        k_nope, v_BTHV = jnp.split(kv_BTHX, [cfg.nope_dim], axis=-1)

        q_rope = rope.rotate(q_rope, *rotation)
        k_rope = rope.rotate(k_rope[:, :, None], *rotation)
        k_rope = jnp.broadcast_to(k_rope, q_rope.shape)
        out_BTHV = attention.attention(
            jnp.concatenate([q_nope, q_rope], axis=-1),
            jnp.concatenate([k_nope, k_rope], axis=-1),
            v_BTHV,
            segment_BT,
            scale=cfg.softmax_scale,
            block_size=cfg.block_size,
        )
        out = out_BTHV.reshape(*x_BTD.shape[:2], cfg.num_heads * cfg.value_dim)
        return Linear(
            (x_BTD.shape[-1],),
            ("heads", "embed"),
            self.init_std,
            self.dot_general,
            name="out",
        )(out)

    def _queries(self, x_BTD: jax.Array) -> jax.Array:
        cfg = self.cfg
        if cfg.query_latent_dim is None:
            return self._heads("query", cfg.qk_dim, source="embed")(x_BTD)
        latent = self._linear("query_down", cfg.query_latent_dim)(x_BTD)
        latent = RMSNorm(cfg.latent_norm_eps, dim="latent", name="query_norm")(latent)
        return self._heads("query_up", cfg.qk_dim)(latent)

    def _linear(self, name: str, features: int) -> Linear:
        dims = ("embed", "latent")
        return Linear((features,), dims, self.init_std, self.dot_general, name=name)

    def _heads(self, name: str, per_head: int, source: str = "latent") -> Linear:
        features = (self.cfg.num_heads, per_head)
        dims = (source, "heads", None)
        return Linear(features, dims, self.init_std, self.dot_general, name=name)
