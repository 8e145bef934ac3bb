"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Shapes: B batch, T position, S this device's positions, D hidden, H head (this
device's), Q = nope + rope query/key dimension, V value dimension.

Keys and values of all heads come from one small latent, which is all that a decoder has
to cache; one rotated key part is shared by the heads. On a mesh, `tensor` divides the
heads, which need all positions. What is gathered for them are the latents, a third of
the hidden state or less.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from jmoe.config import MLAConfig
from jmoe.nn.heads import project_out
from jmoe.nn.linear import DotGeneral, Linear, RMSNorm
from jmoe.nn.measured import NOTHING, Measured
from jmoe.nn.parameter import TO_HEADS
from jmoe.ops import attention, dot, rope
from jmoe.parallel import collectives


class LatentAttention(nn.Module):
    """MLA on a full sequence: [B, S, D] -> [B, S, D], by rotations for T positions."""

    cfg: MLAConfig
    init_std: float
    dot_general: DotGeneral = dot.dot_general

    @nn.compact
    def __call__(
        self,
        x_BSD: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        segment_BT: jax.Array | None,
    ) -> tuple[jax.Array, Measured]:
        cfg = self.cfg
        q_BTHQ = self._queries(x_BSD)
        q_nope, q_rope = jnp.split(q_BTHQ, [cfg.nope_dim], axis=-1)

        latent = self._linear("kv_down", cfg.kv_latent_dim + cfg.rope_dim)(x_BSD)
        latent, k_rope = jnp.split(latent, [cfg.kv_latent_dim], axis=-1)
        latent = RMSNorm(cfg.latent_norm_eps, dim="latent", name="kv_norm")(latent)
        kv_BTHX = self._heads("kv_up", cfg.nope_dim + cfg.value_dim)(_all(latent))
        k_nope, v_BTHV = jnp.split(kv_BTHX, [cfg.nope_dim], axis=-1)

        q_rope = rope.rotate_interleaved(q_rope, *rotation)
        k_rope = rope.rotate_interleaved(_all(k_rope)[:, :, None], *rotation)
        # In float32, as then its gradient is too, which sums over the heads.
        k_rope = jnp.broadcast_to(k_rope.astype(jnp.float32), q_rope.shape)
        k_rope = k_rope.astype(q_rope.dtype)
        out_BTHV = attention.attention(
            jnp.concatenate([q_nope, q_rope], axis=-1),
            jnp.concatenate([k_nope, k_rope], axis=-1),
            v_BTHV,
            segment_BT,
            scale=cfg.softmax_scale,
            block_size=cfg.block_size,
        )
        own = x_BSD.shape[-1], self.init_std, self.dot_general
        return project_out(out_BTHV, *own), NOTHING

    def _queries(self, x_BSD: jax.Array) -> jax.Array:
        cfg = self.cfg
        if cfg.query_latent_dim is None:
            return self._heads("query", cfg.qk_dim, source="embed")(_all(x_BSD))
        latent = self._linear("query_down", cfg.query_latent_dim)(x_BSD)
        latent = RMSNorm(cfg.latent_norm_eps, dim="latent", name="query_norm")(latent)
        return self._heads("query_up", cfg.qk_dim)(_all(latent))

    def _linear(self, name: str, features: int) -> Linear:
        dims = ("embed", "latent")
        return Linear((features,), dims, self.init_std, self.dot_general, name=name)

    def _heads(self, name: str, per_head: int, source: str = "latent") -> Linear:
        heads = collectives.share(self.cfg.num_heads, "tensor", "num_heads")
        features = (heads, per_head)
        dims = (source, "heads", None)
        return Linear(
            features, dims, self.init_std, self.dot_general, TO_HEADS, name=name
        )


def cost(cfg: MLAConfig, hidden_dim: int, length: int) -> float:
    """Returns a token's operations: projections, and the scores of earlier positions.

    The latter are half of all.
    """
    queries = cfg.num_heads * cfg.qk_dim
    latent = cfg.query_latent_dim
    query = hidden_dim * queries if latent is None else latent * (hidden_dim + queries)
    down = hidden_dim * (cfg.kv_latent_dim + cfg.rope_dim)
    up = cfg.kv_latent_dim * cfg.num_heads * (cfg.nope_dim + cfg.value_dim)
    out = cfg.num_heads * cfg.value_dim * hidden_dim
    scores = length / 2 * cfg.num_heads * (cfg.qk_dim + cfg.value_dim)
    return 2 * (query + down + up + out + scores)


def cached(
    cfg: MLAConfig, dtype: jax.typing.DTypeLike
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns what a decoder keeps of a token: the normed latent, the rotated key."""
    return {
        "latent": jax.ShapeDtypeStruct((cfg.kv_latent_dim,), dtype),
        "rope_key": jax.ShapeDtypeStruct((cfg.rope_dim,), dtype),
    }


def _all(x_BSX: jax.Array) -> jax.Array:
    """Returns all positions, for this device's heads."""
    return collectives.all_gather(x_BSX, "tensor", 1)
