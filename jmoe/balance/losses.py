"""Auxiliary balancing losses: the baselines that loss-free balancing is compared with.

Both multiply the fraction f of choices that an expert got, in units of a fair share,
with the mean P of its normalised scores, and sum over the experts:

    loss = sum_e f_e P_e,   f_e = E / (K T) count_e,   P_e = mean_t s_te / sum_e' s_te'

`switch` counts the choices that were made, over the whole batch: GShard (arXiv
2006.16668) and Switch Transformer (arXiv 2101.03961, equations 4 to 6), whose K = 1 and
softmax scores are generalised. `sequence` counts what the scores alone would choose,
sequence by sequence, and takes the mean: DeepSeek-V3 (arXiv 2412.19437, equations 17 to
20). Where f or P is uniform, the loss is 1. Counts have no gradient: it flows through P
alone, and lowers the scores of the experts that are chosen most.

On a mesh, a device has a part of the tokens. It counts with all others, and returns its
share of the loss: as P is a mean over tokens, the shares' sum is the loss.

Dimensions: B sequences, T tokens of each, E experts, K choices of a token.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


def _same(x: jax.Array) -> jax.Array:
    return x


class Spread(NamedTuple):
    """How a batch's tokens are spread over devices; by default, on one.

    over_batch, over_sequence: sum counts over the devices that share the batch, or a
    sequence. batch_parts, sequence_parts: how many those are.
    """

    over_batch: Callable[[jax.Array], jax.Array] = _same
    over_sequence: Callable[[jax.Array], jax.Array] = _same
    batch_parts: int = 1
    sequence_parts: int = 1


ALONE = Spread()

AuxiliaryLoss = Callable[[jax.Array, jax.Array, Spread], jax.Array]
"""`loss(score_BTE, expert_BTK, spread)`, unweighted, this device's share, a float32.

score_BTE: float32, the router's scores without bias, sigmoid or softmax.
expert_BTK: int32, the experts chosen, with bias and groups.
"""


def none(
    score_BTE: jax.Array, expert_BTK: jax.Array, spread: Spread = ALONE
) -> jax.Array:
    """No loss: 0, with no gradient."""
    return jnp.zeros((), jnp.float32)


def switch(
    score_BTE: jax.Array, expert_BTK: jax.Array, spread: Spread = ALONE
) -> jax.Array:
    """GShard's and Switch Transformer's loss of the whole batch as one."""
    num_experts, top_k = score_BTE.shape[-1], expert_BTK.shape[-1]
    score_TE = score_BTE.reshape(-1, num_experts)
    expert_TK = expert_BTK.reshape(-1, top_k)
    load_E = spread.over_batch(_count(expert_TK, num_experts))
    return _imbalance(score_TE, load_E, top_k, spread.batch_parts)


def sequence(
    score_BTE: jax.Array, expert_BTK: jax.Array, spread: Spread = ALONE
) -> jax.Array:
    """DeepSeek-V3's loss of each sequence, averaged; of `expert_BTK` only K counts."""
    num_experts, top_k = score_BTE.shape[-1], expert_BTK.shape[-1]
    _, unbiased_BTK = jax.lax.top_k(score_BTE, top_k)
    count_BE = jax.vmap(lambda expert_TK: _count(expert_TK, num_experts))(unbiased_BTK)
    load_BE = spread.over_sequence(count_BE)

    def share(score_TE, load_E):
        return _imbalance(score_TE, load_E, top_k, spread.sequence_parts)

    batch_groups = spread.batch_parts // spread.sequence_parts
    return jax.vmap(share)(score_BTE, load_BE).mean() / batch_groups


AUXILIARY_LOSSES: dict[str, AuxiliaryLoss] = {
    "none": none,
    "switch": switch,
    "sequence": sequence,
}


def _count(expert_TK: jax.Array, num_experts: int) -> jax.Array:
    return jnp.bincount(expert_TK.ravel(), length=num_experts)


def _imbalance(
    score_TE: jax.Array, load_E: jax.Array, top_k: int, parts: int
) -> jax.Array:
    """The share of one of `parts` devices, from all devices' counts."""
    num_tokens, num_experts = score_TE.shape
    chosen_E = load_E / (parts * num_tokens * top_k / num_experts)
    normalised_TE = score_TE / score_TE.sum(-1, keepdims=True)
    return (chosen_E * normalised_TE.mean(0)).sum() / parts
