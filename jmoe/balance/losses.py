"""Auxiliary losses of a router: the baselines of loss-free balancing, and the z-loss.

The balancing losses multiply the fraction f of choices that an expert got, in units of
a fair share, with the mean P of its normalised scores, and sum over the experts:

    loss = sum_e f_e P_e,   f_e = E / (K N) count_e,   P_e = mean_t s_te / sum_e' s_te'

They differ in the N tokens that are counted, and averaged, together:

    switch        a microbatch: GShard (arXiv 2006.16668) and Switch Transformer (arXiv
                  2101.03961, equations 4 to 6), whose K = 1 and softmax scores are
                  generalised; a step's loss is the mean over its microbatches
    sequence      a sequence, and what the scores alone would choose: DeepSeek-V3 (arXiv
                  2412.19437, equations 17 to 20); a step's is the mean over sequences
    global_batch  all of a step's microbatches (arXiv 2501.11873, section 3)

So `switch` depends on how a step is divided into microbatches, as it does in the
literature, and the others don't. Where f or P is uniform, a loss is 1. Counts have no
gradient: it flows through P alone, and lowers the scores of the experts that are chosen
most. Tokens that aren't real (padding) are in neither f nor P.

Of several microbatches, the counts of later ones aren't known when the gradient of the
first is taken. The paper sums into a buffer: a microbatch meets the counts of those up
to itself, so the loss depends on their order, of which a pipeline, with several on
their way at once, has none. Here `over_step` has exact counts of all, and the loss is
that of the step in one microbatch. It costs the step a forward pass of the layers
(`jmoe.train.accumulated`).

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
    """How tokens are spread over devices and microbatches; by default, they are not.

    over_batch, over_sequence, over_step: sum counts over the devices that share a
    microbatch, over those that share a sequence, and over all devices and microbatches
    of a step. batch_parts: into how many parts a microbatch's sequences are divided.
    """

    over_batch: Callable[[jax.Array], jax.Array] = _same
    over_sequence: Callable[[jax.Array], jax.Array] = _same
    over_step: Callable[[jax.Array], jax.Array] = _same
    batch_parts: int = 1


ALONE = Spread()

AuxiliaryLoss = Callable[[jax.Array, jax.Array, Spread], jax.Array]
"""`loss(score_BTE, expert_BTK, spread)`, unweighted, this device's share, a float32.

score_BTE: float32, the router's scores without bias, sigmoid or softmax.
expert_BTK: int32, the experts chosen, with bias and groups; E, nobody, for all of a
token's choices if the token isn't real.
"""


def none(
    score_BTE: jax.Array, expert_BTK: jax.Array, spread: Spread = ALONE
) -> jax.Array:
    """Returns 0, with no gradient."""
    return jnp.zeros((), jnp.float32)


def switch(
    score_BTE: jax.Array, expert_BTK: jax.Array, spread: Spread = ALONE
) -> jax.Array:
    """Returns GShard's and Switch Transformer's loss of a microbatch as one."""
    return _of_all(score_BTE, expert_BTK, spread.over_batch)


def global_batch(
    score_BTE: jax.Array, expert_BTK: jax.Array, spread: Spread = ALONE
) -> jax.Array:
    """Returns a microbatch's share of the loss of all of a step's tokens as one."""
    return _of_all(score_BTE, expert_BTK, spread.over_step)


def sequence(
    score_BTE: jax.Array, expert_BTK: jax.Array, spread: Spread = ALONE
) -> jax.Array:
    """Returns the mean of DeepSeek-V3's loss over a microbatch's sequences.

    Of `expert_BTK` only K counts, and which tokens are real.
    """
    num_experts, top_k = score_BTE.shape[-1], expert_BTK.shape[-1]
    _, unbiased_BTK = jax.lax.top_k(score_BTE, top_k)
    unbiased_BTK = jnp.where(expert_BTK < num_experts, unbiased_BTK, num_experts)
    count_BE = jax.vmap(lambda expert_TK: _count(expert_TK, num_experts))(unbiased_BTK)
    load_BE = spread.over_sequence(count_BE)
    return (
        jax.vmap(_share)(score_BTE, unbiased_BTK, load_BE).mean() / spread.batch_parts
    )


AUXILIARY_LOSSES: dict[str, AuxiliaryLoss] = {
    "none": none,
    "switch": switch,
    "sequence": sequence,
    "global_batch": global_batch,
}
# Their parts of all microbatches sum to a step's loss; of the others, it is the mean.
OF_WHOLE_STEPS = frozenset({"global_batch"})


def router_z(logit_BTE: jax.Array, is_real_BT: jax.Array | None = None) -> jax.Array:
    """Returns the sum over tokens of `logsumexp(logits)^2`, a float32.

    It keeps logits small (ST-MoE, arXiv 2202.08906, equation 5, which has the mean).
    """
    square_BT = jnp.square(jax.nn.logsumexp(logit_BTE, axis=-1))
    return square_BT.sum() if is_real_BT is None else (square_BT * is_real_BT).sum()


def _of_all(
    score_BTE: jax.Array,
    expert_BTK: jax.Array,
    count_together: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    num_experts, top_k = score_BTE.shape[-1], expert_BTK.shape[-1]
    score_TE = score_BTE.reshape(-1, num_experts)
    expert_TK = expert_BTK.reshape(-1, top_k)
    load_E = count_together(_count(expert_TK, num_experts))
    return _share(score_TE, expert_TK, load_E)


def _count(expert_TK: jax.Array, num_experts: int) -> jax.Array:
    return jnp.bincount(expert_TK.ravel(), length=num_experts)


def _share(score_TE: jax.Array, expert_TK: jax.Array, load_E: jax.Array) -> jax.Array:
    """Returns what these tokens add to the loss of all that `load_E` counts."""
    num_experts, top_k = score_TE.shape[-1], expert_TK.shape[-1]
    is_real_T = expert_TK[:, 0] < num_experts
    load_E = load_E.astype(jnp.float32)
    tokens = jnp.maximum(load_E.sum() / top_k, 1)
    chosen_E = load_E / (tokens * top_k / num_experts)
    normalised_TE = score_TE / score_TE.sum(-1, keepdims=True)
    mean_E = jnp.where(is_real_T[:, None], normalised_TE, 0).sum(0) / tokens
    return (chosen_E * mean_E).sum()
