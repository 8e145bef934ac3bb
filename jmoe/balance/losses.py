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

Dimensions: B sequences, T tokens of each, E experts, K choices of a token.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

AuxiliaryLoss = Callable[[jax.Array, jax.Array], jax.Array]
"""`loss(score_BTE, expert_BTK)`, unweighted, as a float32 scalar.

score_BTE: float32, the router's scores without bias, sigmoid or softmax.
expert_BTK: int32, the experts chosen, with bias and groups.
"""


def none(score_BTE: jax.Array, expert_BTK: jax.Array) -> jax.Array:
    """No loss: 0, with no gradient."""
    return jnp.zeros((), jnp.float32)


def switch(score_BTE: jax.Array, expert_BTK: jax.Array) -> jax.Array:
    """GShard's and Switch Transformer's loss of the whole batch as one."""
    num_experts, top_k = score_BTE.shape[-1], expert_BTK.shape[-1]
    score_TE = score_BTE.reshape(-1, num_experts)
    return _imbalance(score_TE, expert_BTK.reshape(-1, top_k))


def sequence(score_BTE: jax.Array, expert_BTK: jax.Array) -> jax.Array:
    """DeepSeek-V3's loss of each sequence, averaged; of `expert_BTK` only K counts."""
    _, unbiased_BTK = jax.lax.top_k(score_BTE, expert_BTK.shape[-1])
    return jax.vmap(_imbalance)(score_BTE, unbiased_BTK).mean()


AUXILIARY_LOSSES: dict[str, AuxiliaryLoss] = {
    "none": none,
    "switch": switch,
    "sequence": sequence,
}


def _imbalance(score_TE: jax.Array, expert_TK: jax.Array) -> jax.Array:
    num_experts = score_TE.shape[-1]
    count_E = jnp.bincount(expert_TK.ravel(), length=num_experts)
    chosen_E = count_E / (expert_TK.size / num_experts)
    normalised_TE = score_TE / score_TE.sum(-1, keepdims=True)
    return (chosen_E * normalised_TE.mean(0)).sum()
