"""Routed experts with a fixed capacity, the way GShard wrote them (arXiv 2006.16668).

Tokens are cut into groups. In a group, each expert takes at most `capacity` tokens, in
the order of the sequence, and the choices beyond that are dropped. All places are
computed, taken or not. Listing 1 of the paper brings tokens there and back by one-hot
tensors and einsums, which is a quarter or more of the work where experts are narrow; by
indices it costs next to nothing, and computes the same.

Shapes: N token, G group, S = N / G tokens a group, E expert, C capacity, D hidden,
2 gate and up halves, F MLP dimension, K = top_k.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jmoe.config import RouterConfig
from jmoe.nn.choices import Routing, route

GROUPS = 4
CAPACITY_FACTOR = 2.0

# Gate and up halves [E, D, 2, F] and down [E, F, D], by these names.
Weights = Mapping[str, Any]


def capacity(
    num_tokens: int, cfg: RouterConfig, groups: int, capacity_factor: float
) -> int:
    """Returns an expert's places in a group: its fair share, times the factor."""
    fair_share = num_tokens / groups * cfg.top_k / cfg.num_experts
    return math.ceil(capacity_factor * fair_share)


def places(expert_GSK: jax.Array, num_experts: int) -> jax.Array:
    """Returns each choice's place among those of its expert in the group, int32."""
    one_hot_GSKE = jax.nn.one_hot(expert_GSK, num_experts, dtype=jnp.int32)
    chosen_GSE = one_hot_GSKE.sum(2)
    place_GSE = jnp.cumsum(chosen_GSE, axis=1) - chosen_GSE
    return (place_GSE[:, :, None] * one_hot_GSKE).sum(-1)


def by_einsum(
    weights: Weights,
    x_GSD: jax.Array,
    expert_GSK: jax.Array,
    gate_GSK: jax.Array,
    places_each: int,
) -> jax.Array:
    """Returns the experts' weighted sums [G, S, D], as the paper computes them."""
    num_experts = weights["down"].shape[0]
    expert_GSKE = jax.nn.one_hot(expert_GSK, num_experts)
    # A token beyond its expert's capacity has a place that no C equals.
    place_GSKC = jax.nn.one_hot(places(expert_GSK, num_experts), places_each)
    dispatch_GSEC = jnp.einsum("gske,gskc->gsec", expert_GSKE, place_GSKC)
    gate_GSE = jnp.einsum("gsk,gske->gse", gate_GSK, expert_GSKE)
    combine_GSEC = gate_GSE[..., None] * dispatch_GSEC
    x_EGCD = jnp.einsum("gsec,gsd->egcd", dispatch_GSEC, x_GSD)
    y_EGCD = _experts(weights, x_EGCD)
    return jnp.einsum("gsec,egcd->gsd", combine_GSEC, y_EGCD)


def by_index(
    weights: Weights,
    x_GSD: jax.Array,
    expert_GSK: jax.Array,
    gate_GSK: jax.Array,
    places_each: int,
) -> jax.Array:
    """Returns the same, where tokens go to their places and back by indices."""
    num_experts, size = weights["down"].shape[0], x_GSD.shape[1]
    place_GSK = places(expert_GSK, num_experts)
    slots = num_experts * places_each
    slot_GSK = expert_GSK * places_each + place_GSK
    slot_GSK = jnp.where(place_GSK < places_each, slot_GSK, slots)  # nowhere

    def bring(x_SD: jax.Array, slot_SK: jax.Array) -> jax.Array:
        token_SK = jnp.broadcast_to(jnp.arange(size)[:, None], slot_SK.shape)
        token_X = jnp.full(slots, size).at[slot_SK].set(token_SK, mode="drop")
        return x_SD.at[token_X].get(mode="fill", fill_value=0)

    def carry_back(y_XD: jax.Array, slot_SK: jax.Array, gate_SK: jax.Array):
        y_SKD = y_XD.at[slot_SK].get(mode="fill", fill_value=0)
        return jnp.einsum("sk,skd->sd", gate_SK, y_SKD)

    x_GXD = jax.vmap(bring)(x_GSD, slot_GSK)
    in_places = (len(x_GXD), num_experts, places_each, x_GXD.shape[-1])
    x_EGCD = x_GXD.reshape(in_places).swapaxes(0, 1)
    y_GXD = _experts(weights, x_EGCD).swapaxes(0, 1).reshape(x_GXD.shape)
    return jax.vmap(carry_back)(y_GXD, slot_GSK, gate_GSK)


WAYS: Mapping[str, Callable[..., jax.Array]] = {
    "einsum": by_einsum,
    "index": by_index,
}


def capacity_experts(
    weights: Weights,
    x_ND: jax.Array,
    routing: Routing,
    cfg: RouterConfig,
    *,
    groups: int = GROUPS,
    capacity_factor: float = CAPACITY_FACTOR,
    way: str = "einsum",
) -> tuple[jax.Array, jax.Array]:
    """Returns routed experts' weighted sums [N, D], and how many choices were dropped.

    Args:
      capacity_factor: places of an expert, relative to its fair share of a group.
      way: one of `WAYS`.
    """
    x_GSD, expert_GSK, gate_GSK = (
        x.reshape(groups, -1, x.shape[-1])
        for x in (x_ND, routing.expert_NK, routing.gate_NK)
    )
    places_each = capacity(len(x_ND), cfg, groups, capacity_factor)
    y_GSD = WAYS[way](weights, x_GSD, expert_GSK, gate_GSK, places_each)
    place_GSK = places(expert_GSK, cfg.num_experts)
    dropped = (place_GSK >= places_each).sum(dtype=jnp.int32)
    return y_GSD.reshape(x_ND.shape), dropped


def capacity_layer(
    weights: Any, bias_E: jax.Array, x_ND: jax.Array, cfg: RouterConfig, **options: Any
) -> jax.Array:
    """Router and routed experts of `jmoe.nn.moe.MoE`, with its parameters, [N, D].

    Args:
      options: of `capacity_experts`.
    """
    score_NE = jax.nn.sigmoid(x_ND @ weights["router"]["kernel"])
    routing, _ = route(score_NE, bias_E, cfg)
    return capacity_experts(weights["experts"], x_ND, routing, cfg, **options)[0]


def _experts(weights: Weights, x_EGCD: jax.Array) -> jax.Array:
    h_EGC2F = jnp.einsum("egcd,edxf->egcxf", x_EGCD, weights["gate_up"])
    h_EGCF = jax.nn.silu(h_EGC2F[..., 0, :]) * h_EGC2F[..., 1, :]
    return jnp.einsum("egcf,efd->egcd", h_EGCF, weights["down"])
