"""Routed experts with a fixed capacity, the way GShard wrote them (arXiv 2006.16668).

Tokens are cut into groups. In a group, each expert takes at most `capacity` tokens, in
the order of the sequence; one-hot tensors bring them there and back as einsums, and the
choices beyond that are dropped. Listing 1 of the paper.

Shapes: N token, G group, S = N / G tokens a group, E expert, C capacity, D hidden,
2 gate and up halves, F MLP dimension, K = top_k.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jmoe.config import RouterConfig
from jmoe.nn.choices import route

GROUPS = 4
CAPACITY_FACTOR = 2.0


def capacity_layer(
    weights: Any,
    bias_E: jax.Array,
    x_ND: jax.Array,
    cfg: RouterConfig,
    *,
    groups: int = GROUPS,
    capacity_factor: float = CAPACITY_FACTOR,
) -> jax.Array:
    """Router and routed experts of `jmoe.nn.moe.MoE`, with its parameters, [N, D].

    Args:
      capacity_factor: places of an expert, relative to its fair share of a group.
    """
    x_GSD = x_ND.reshape(groups, -1, x_ND.shape[-1])
    fair_share = x_GSD.shape[1] * cfg.top_k / cfg.num_experts
    capacity = math.ceil(capacity_factor * fair_share)
    score_NE = jax.nn.sigmoid(x_ND @ weights["router"]["kernel"])
    routing, _ = route(score_NE, bias_E, cfg)
    one_hot_NKE = jax.nn.one_hot(routing.expert_NK, cfg.num_experts)
    chosen_GSE = one_hot_NKE.sum(1).reshape(groups, -1, cfg.num_experts)
    gate_NE = jnp.einsum("nk,nke->ne", routing.gate_NK, one_hot_NKE)
    gate_GSE = gate_NE.reshape(chosen_GSE.shape)

    # A token beyond its expert's capacity has a place that no C equals.
    place_GSE = jnp.where(chosen_GSE > 0, jnp.cumsum(chosen_GSE, axis=1) - 1, -1)
    dispatch_GSEC = jax.nn.one_hot(place_GSE.astype(jnp.int32), capacity)
    combine_GSEC = gate_GSE[..., None] * dispatch_GSEC
    x_EGCD = jnp.einsum("gsec,gsd->egcd", dispatch_GSEC, x_GSD)
    y_EGCD = _experts(weights["experts"], x_EGCD)
    return jnp.einsum("gsec,egcd->gsd", combine_GSEC, y_EGCD).reshape(x_ND.shape)


def _experts(weights: Any, x_EGCD: jax.Array) -> jax.Array:
    h_EGC2F = jnp.einsum("egcd,edxf->egcxf", x_EGCD, weights["gate_up"])
    h_EGCF = jax.nn.silu(h_EGC2F[..., 0, :]) * h_EGC2F[..., 1, :]
    return jnp.einsum("egcf,efd->egcd", h_EGCF, weights["down"])
