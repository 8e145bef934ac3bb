"""From logits to tokens, each row by parameters of its own.

A token is drawn by the Gumbel-max trick (Maddison et al., arXiv 1411.0030): the most
likely one once each logit has noise added, which depends on the request's seed, the
token's position and its id alone. So a request draws the same tokens whoever shares its
batch. And a draft that is drawn from another model's logits by the same noise is likely
to be the token itself, while what is drawn doesn't depend on the draft (Daliri et al.,
arXiv 2408.07978): verifying drafts is comparing tokens, and leaves the distribution as
it is, as rejection sampling would (Leviathan et al., arXiv 2211.17192).

Nothing is sorted: the k-th largest logit, and the smallest of a nucleus, are found by
bisection. So each device of a `tensor` group keeps its part of the vocabulary, and what
travels are a few numbers a row.

Shapes: B row, V vocabulary (this device's part), N most likely tokens that are asked
for.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.parallel import collectives
from jmoe.parallel.vocabulary import AXIS

BITS = 32  # of a float32, by which a threshold is found


Values = Any  # NumPy's array on the host, JAX's in a step


class Draws(NamedTuple):
    """How each row's token is drawn, [B] each; float32 but for seeds and `top_k`.

    temperature: divides the logits; 0 takes the most likely token. top_k: draws from
    so many of the most likely; 0 from all. top_p: from the fewest that together are
    this likely (arXiv 1904.09751). min_p: from those at least so likely as this times
    the most likely (arXiv 2407.01082). penalty: divides positive logits of tokens that
    occurred, and multiplies negative ones (CTRL, arXiv 1909.05858). seed: uint32.
    """

    temperature: Values
    top_k: Values
    top_p: Values
    min_p: Values
    penalty: Values
    seed: Values


class Sampled(NamedTuple):
    """Tokens, int32 [B]; their log-probabilities, and those of the likeliest [B, N].

    By the model's own distribution, before any parameter changes it; float32.
    """

    token: jax.Array
    logprob: jax.Array
    top_token: jax.Array
    top_logprob: jax.Array


def sample(
    logits_BV: jax.Array,
    draws: Draws,
    position_B: jax.Array,
    seen: Callable[[], jax.Array],
    num_top: int = 0,
) -> Sampled:
    """Returns each row's token, the same on all devices of the tensor group.

    Args:
      logits_BV: float32.
      position_B: int32, of the token that is drawn, in its sequence.
      seen: returns bool [B, V], which tokens occurred; called where a row asks for it.
      num_top: N.
    """
    own_BV = lax.cond(
        (draws.penalty != 1).any(),
        lambda: _penalized(logits_BV, seen(), draws.penalty),
        lambda: logits_BV,
    )
    token_B = lax.cond(
        (draws.temperature > 0).any(),
        lambda: _drawn(own_BV, draws, position_B),
        lambda: _most_likely(own_BV)[1],
    )
    return Sampled(token_B, *_logprobs(logits_BV, token_B, num_top))


def _penalized(logits_BV, seen_BV, penalty_B):
    penalty_B1 = penalty_B[:, None]
    less_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(seen_BV, less_BV, logits_BV)


def _drawn(logits_BV, draws, position_B):
    is_drawn_B1 = (draws.temperature > 0)[:, None]
    # Differences: large logits by a temperature close to 0 would be infinite, and tie.
    below_BV = logits_BV - _most_likely(logits_BV)[0][:, None]
    coldest = jnp.finfo(jnp.float32).tiny
    tempered_BV = below_BV / jnp.maximum(draws.temperature, coldest)[:, None]
    kept_BV = _filtered(tempered_BV, draws)
    noisy_BV = kept_BV + _noise(draws.seed, position_B, logits_BV.shape[1])
    return _most_likely(jnp.where(is_drawn_B1, noisy_BV, logits_BV))[1]


def _filtered(logits_BV: jax.Array, draws: Draws) -> jax.Array:
    """Returns -inf in place of what isn't drawn from: by k, then p, then min.

    Args:
      logits_BV: of which the whole vocabulary's largest is 0.
    """
    top_B = jnp.zeros(len(logits_BV))
    share_BV = jnp.exp(logits_BV)

    def few(least_B):
        is_in_BV = logits_BV >= least_B[:, None]
        return collectives.psum(is_in_BV.sum(-1), AXIS) >= draws.top_k

    lowest_B = jnp.full(top_B.shape, -jnp.inf)
    k_B = lax.cond(
        (draws.top_k > 0).any(),
        lambda: jnp.where(draws.top_k > 0, _largest(few, top_B), lowest_B),
        lambda: lowest_B,
    )

    def nucleus():
        of_k_BV = jnp.where(logits_BV >= k_B[:, None], share_BV, 0)
        total_B = collectives.psum(of_k_BV.sum(-1), AXIS)

        def misses(least_B):
            """Returns whether what is as likely reaches p without the next lower."""
            above_BV = jnp.where(logits_BV >= least_B[:, None], of_k_BV, 0)
            return collectives.psum(above_BV.sum(-1), AXIS) >= draws.top_p * total_B

        return jnp.where(draws.top_p < 1, _largest(misses, top_B), lowest_B)

    p_B = lax.cond((draws.top_p < 1).any(), nucleus, lambda: lowest_B)
    least_B = jnp.maximum(jnp.maximum(k_B, p_B), jnp.log(draws.min_p))
    return jnp.where(logits_BV >= least_B[:, None], logits_BV, -jnp.inf)


def _largest(holds: Callable[[jax.Array], jax.Array], top_B: jax.Array) -> jax.Array:
    """Returns the largest number up to `top_B` for which `holds`, as for all below."""

    def visit(_, bounds):
        low_B, high_B = bounds  # holds; holds for nothing above
        middle_B = low_B + (high_B - low_B + 1) // 2
        is_low_B = holds(_from_order(middle_B))
        return (
            jnp.where(is_low_B, middle_B, low_B),
            jnp.where(is_low_B, high_B, middle_B - 1),
        )

    lowest_B = jnp.full(top_B.shape, _to_order(jnp.float32(-jnp.inf)))
    low_B, _ = lax.fori_loop(0, BITS, visit, (lowest_B, _to_order(top_B)))
    return _from_order(low_B)


def _to_order(x: jax.Array) -> jax.Array:
    """Returns uint32 that are ordered as float32 are."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits < sign, bits | sign, ~bits)


def _from_order(order: jax.Array) -> jax.Array:
    """Returns float32; the inverse of `_to_order`."""
    sign = jnp.uint32(1 << 31)
    bits = jnp.where(order < sign, ~order, order & ~sign)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _noise(seed_B: jax.Array, position_B: jax.Array, size: int) -> jax.Array:
    """Returns Gumbel noise of this device's part of the vocabulary, [B, V]."""
    token_V = collectives.axis_index(AXIS) * size + jnp.arange(size)

    def of_token(seed, position, token):
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(jax.random.fold_in(key, token), (), jnp.float32)

    of_row = jax.vmap(of_token, (None, None, 0))
    return jax.vmap(of_row, (0, 0, None))(seed_B, position_B, token_V)


def _most_likely(x_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns each row's largest number, and the first token that has it."""
    own_B = x_BV.max(-1)
    top_B = collectives.pmax(own_B, AXIS)
    # XLA for CPUs takes many times as long for `argmax`.
    token_V = jnp.arange(x_BV.shape[1], dtype=jnp.int32)
    token_B = jnp.where(x_BV == own_B[:, None], token_V, token_V[-1]).min(-1)
    token_B += collectives.axis_index(AXIS) * x_BV.shape[1]
    # Of the devices that have it, the first.
    token_B = jnp.where(own_B == top_B, -token_B, jnp.iinfo(jnp.int32).min)
    return top_B, -collectives.pmax(token_B, AXIS)


def _logprobs(logits_BV, token_B, num_top):
    top_B = collectives.pmax(logits_BV.max(-1), AXIS)
    sum_B = collectives.psum(jnp.exp(logits_BV - top_B[:, None]).sum(-1), AXIS)
    norm_B = top_B + jnp.log(sum_B)
    size = logits_BV.shape[1]
    first = collectives.axis_index(AXIS) * size
    own_B = token_B - first
    is_here_B = (own_B >= 0) & (own_B < size)
    index_B1 = jnp.clip(own_B, 0, size - 1)[:, None]
    chosen_B = jnp.take_along_axis(logits_BV, index_B1, axis=-1)[:, 0]
    chosen_B = collectives.psum(jnp.where(is_here_B, chosen_B, 0), AXIS)
    if not num_top:
        none_B0 = jnp.zeros((len(token_B), 0))
        return chosen_B - norm_B, none_B0.astype(jnp.int32), none_B0
    likely_BN, index_BN = lax.top_k(logits_BV, min(num_top, size))
    # Of all devices' likeliest tokens, the likeliest.
    likely_BN = collectives.all_gather(likely_BN, AXIS, 1)
    index_BN = collectives.all_gather(first + index_BN, AXIS, 1)
    likely_BN, order_BN = lax.top_k(likely_BN, num_top)
    index_BN = jnp.take_along_axis(index_BN, order_BN, axis=-1)
    return chosen_B - norm_B, index_BN, likely_BN - norm_B[:, None]
