"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Shapes: B batch, T position, S this device's positions, D hidden, H head (this
device's), Q = nope + rope query/key dimension, V value dimension, C latent.

Keys and values of all heads come from one small latent, which is all that a decoder has
to cache; one rotated key part is shared by the heads. On a mesh, `tensor` divides the
heads, which need all positions. What is gathered for them are the latents, a third of
the hidden state or less.

Of cached positions, either the keys and values are computed again, or what computes
them is absorbed into queries and outputs (section 2.1.2), which score the latents
themselves: the cheaper way for the few new tokens of a sequence that is being decoded.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jmoe.config import MLAConfig
from jmoe.nn import cached as caches
from jmoe.nn.cached import Groups
from jmoe.nn.heads import project_out
from jmoe.nn.linear import DotGeneral, Linear, RMSNorm
from jmoe.nn.measured import NOTHING, Measured
from jmoe.nn.parameter import TO_HEADS
from jmoe.ops import attention, dot, paged, rope, stored
from jmoe.ops.latent_attention import latent_decode
from jmoe.parallel import collectives


class LatentAttention(nn.Module):
    """MLA, [B, S, D] -> [B, S, D], by rotations of T positions.

    Without `groups`, positions attend to earlier ones of their sequence; with them, to
    those that are cached too (`jmoe.nn.cached`).
    """

    cfg: MLAConfig
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
        q_BTHQ = self._queries(x_BSD)
        q_nope, q_rope = jnp.split(q_BTHQ, [cfg.nope_dim], axis=-1)
        q_rope = rope.rotate_interleaved(q_rope, *rotation)

        latent = self._linear("kv_down", cfg.kv_latent_dim + cfg.rope_dim)(x_BSD)
        latent, k_rope = jnp.split(latent, [cfg.kv_latent_dim], axis=-1)
        latent = RMSNorm(cfg.latent_norm_eps, dim="latent", name="kv_norm")(latent)
        latent, k_rope = _all(latent), _all(k_rope)[:, :, None]
        k_rope = rope.rotate_interleaved(k_rope, *rotation)
        up = self._heads("kv_up", cfg.nope_dim + cfg.value_dim)
        q_BTHQ = jnp.concatenate([q_nope, q_rope], axis=-1)
        if groups is None:
            out_BTHV = attention.attention(
                q_BTHQ,
                *_expand(cfg, up(latent), k_rope),
                segment_BT,
                scale=cfg.softmax_scale,
                block_size=cfg.block_size,
            )
        else:
            new = jnp.concatenate([latent, k_rope[:, :, 0]], axis=-1)
            pages_PKX = caches.remember(self, {"latent": new}, groups)["latent"]
            up_CHX = up.kernel_array(x_BSD.dtype)
            halves = self.variables.get(caches.PREPARED) or _halves(cfg, up_CHX)
            attend = functools.partial(_attend, cfg, pages_PKX, up_CHX, halves)
            out_BTHV = caches.by_group(attend, groups, q_BTHQ)
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
    """Returns what a decoder keeps of a token: the normed latent and the rotated key.

    In one array, as a key of the absorbed form is.
    """
    return {"latent": jax.ShapeDtypeStruct((cfg.kv_latent_dim + cfg.rope_dim,), dtype)}


def prepared(cfg: MLAConfig, params: Any) -> dict[str, jax.Array]:
    """Returns what the absorbed form multiplies by; nothing if it has fewer bits."""
    kernel = params["kv_up"]["kernel"]
    return {} if isinstance(kernel, stored.FewerBits) else _halves(cfg, kernel)


def _halves(cfg: MLAConfig, up_CHX: jax.Array) -> dict[str, jax.Array]:
    """Returns what computes keys, [H, C, nope], and values, [H, V, C].

    Laid out as XLA for CPUs multiplies by them: otherwise it lays them out anew in each
    step, which takes as long as all the projections.
    """
    key_CHX, value_CHV = jnp.split(up_CHX, [cfg.nope_dim], axis=-1)
    return {"key": key_CHX.swapaxes(0, 1), "value": value_CHV.transpose(1, 2, 0)}


def absorbs(cfg: MLAConfig, tokens: int) -> bool:
    """Returns whether so many new tokens of a sequence score latents for less.

    That is more work for each token and cached position, and none for the position.
    """
    wider = 2 * cfg.kv_latent_dim + cfg.rope_dim - cfg.qk_dim - cfg.value_dim
    return tokens * wider < cfg.kv_latent_dim * (cfg.nope_dim + cfg.value_dim)


def _attend(cfg, pages_PKX, up_CHX, halves, sequences, q_BQHX):
    """Returns each token's attention to what is cached, [B, Q, H, V]."""
    if absorbs(cfg, sequences.position_BQ.shape[1]):
        return _attend_absorbed(cfg, pages_PKX, halves, sequences, q_BQHX)
    return _attend_expanded(cfg, pages_PKX, up_CHX, sequences, q_BQHX)


def _attend_absorbed(cfg, pages_PKX, halves, sequences, q_BQHX):
    q_nope, q_rope = jnp.split(q_BQHX, [cfg.nope_dim], axis=-1)
    q_latent = jnp.einsum("bqhx,hcx->bqhc", q_nope, halves["key"])
    out_BQHC = latent_decode(
        jnp.concatenate([q_latent, q_rope], axis=-1),
        pages_PKX,
        sequences,
        value_dim=cfg.kv_latent_dim,
        scale=cfg.softmax_scale,
    )
    return jnp.einsum("bqhc,hvc->bqhv", out_BQHC, halves["value"])


def _attend_expanded(cfg, pages_PKX, up_CHX, sequences, q_BQHX):
    def read(page_WJ, is_there_WS):
        entry_WSX = paged.entries(pages_PKX, page_WJ, is_there_WS).astype(up_CHX.dtype)
        latent, k_rope = jnp.split(entry_WSX, [cfg.kv_latent_dim], axis=-1)
        up = jnp.einsum("wsc,chx->wshx", latent, up_CHX)
        k_WSHQ, v_WSHV = _expand(cfg, up, k_rope[:, :, None])
        return k_WSHQ.swapaxes(1, 2), v_WSHV.swapaxes(1, 2)

    out_BQHV = paged.attend(
        q_BQHX[:, :, :, None],
        sequences,
        read,
        page_size=pages_PKX.shape[1],
        value_dim=cfg.value_dim,
        scale=cfg.softmax_scale,
    )
    return out_BQHV[:, :, :, 0]


def _expand(
    cfg: MLAConfig, kv_BTHX: jax.Array, k_rope_BT1R: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns each head's keys and values, of what it computes and what all share."""
    k_nope, v_BTHV = jnp.split(kv_BTHX, [cfg.nope_dim], axis=-1)
    # In float32, as then its gradient is too, which sums over the heads.
    shape = *k_nope.shape[:3], cfg.rope_dim
    k_rope = jnp.broadcast_to(k_rope_BT1R.astype(jnp.float32), shape)
    k_BTHQ = jnp.concatenate([k_nope, k_rope.astype(k_nope.dtype)], axis=-1)
    return k_BTHQ, v_BTHV


def _all(x_BSX: jax.Array) -> jax.Array:
    """Returns all positions, for this device's heads."""
    return collectives.all_gather(x_BSX, "tensor", 1)
