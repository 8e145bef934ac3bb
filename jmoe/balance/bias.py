"""How the selection bias moves: one rule, once an optimizer step, outside the gradient.

A router chooses experts by `score + bias` and weighs them by the score alone, so the
bias can move load without moving the loss. A rule sees only statistics that add up
exactly over microbatches and devices: the counts of the whole global batch and, for
`quantile`, a histogram. The bias's path is then the same on every mesh. With c the load
of an expert, m the mean load and u the rate:

    sign           b += u sign(m - c)              arXiv 2408.15664, algorithm 1
    sign_centered  the same step, less its mean over the experts
    proportional   b += u (m - c) / m
    quantile       b -= (q - mean of q) / 4        after kexue.fm/archives/11619

A token's *margin* for an expert is how far the expert's biased score lies above the
point where the token's choice of it would flip: positive where it is chosen, negative
where it isn't. `q` is the value that a fair share of an expert's margins exceed: lower
the bias by it, and the expert gets its fair share of this batch, as long as the others
keep theirs. The published rule takes the full step, which is coordinate descent in the
dual of the balanced assignment problem, but follows the noise of every batch. A quarter
of it averages over about seven batches, and still takes a MaxVio of 4 to the noise of
one batch in 20 steps (tests/balance/test_bias.py simulates this).

Dimensions: T tokens, E experts, M bins. Rules act on the last dimensions, so arrays
may lead with a layer dimension (bias_LE, load_LE, margin_LEM), as may `vmap`.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.config import checks

NUM_BINS = 128  # of a margin histogram; 64 to 1,024 balance equally well

_QUANTILE_STEP = 0.25
_ZOOM = 8  # the bins at 0 are (1 + _ZOOM)**2 = 81 times as narrow as those at -1 and 1


class UpdateRule(Protocol):
    """A step of the bias. Each layer moves on its own.

    Args:
      bias_E: float32.
      load_E: int32, how many (token, choice) pairs of the global batch went to each
        expert; an empty batch moves nothing. Only a single count has to fit in int32.
      rate: scalar, or [L, 1] for arrays that lead with layers, may be traced; 0
        freezes the bias. `quantile` knows no other rates: every one but 0 is the same.
      margin_EM: int32, `margin_histogram` summed over the tokens that `load_E` counts.
        The rules in `MARGIN_RULES` raise ValueError without it, the others ignore it.

    Returns:
      The new bias, float32, of the same shape.
    """

    def __call__(
        self,
        bias_E: jax.Array,
        load_E: jax.Array,
        *,
        rate: float | jax.Array,
        margin_EM: jax.Array | None = None,
    ) -> jax.Array: ...


def sign(
    bias_E: jax.Array,
    load_E: jax.Array,
    *,
    rate: float | jax.Array,
    margin_EM: jax.Array | None = None,
) -> jax.Array:
    """Steps up below the mean load, down above it, by one size: the paper's rule."""
    return bias_E + rate * _direction(load_E)


def sign_centered(
    bias_E: jax.Array,
    load_E: jax.Array,
    *,
    rate: float | jax.Array,
    margin_EM: jax.Array | None = None,
) -> jax.Array:
    """Steps by `sign` without the step's mean.

    That mean moves no choice but lets the bias drift.
    """
    direction_E = _direction(load_E)
    return bias_E + rate * (direction_E - direction_E.mean(-1, keepdims=True))


def proportional(
    bias_E: jax.Array,
    load_E: jax.Array,
    *,
    rate: float | jax.Array,
    margin_EM: jax.Array | None = None,
) -> jax.Array:
    """Steps by the shortfall of load, relative to the mean load."""
    whole, rest = _mean_load(load_E)
    shortfall_E = (whole - load_E) + rest
    return bias_E + rate * shortfall_E / jnp.where(whole + rest > 0, whole + rest, 1)


def quantile(
    bias_E: jax.Array,
    load_E: jax.Array,
    *,
    rate: float | jax.Array,
    margin_EM: jax.Array | None = None,
) -> jax.Array:
    """Lowers each bias by a part of what its fair share of tokens had to spare."""
    if margin_EM is None:
        raise ValueError(
            "margin_EM=None, but the rule 'quantile' needs the margin_histogram of the "
            "tokens that load_E counts."
        )
    excess_E = _fair_quantile(margin_EM, load_E)
    step_E = _QUANTILE_STEP * (excess_E - excess_E.mean(-1, keepdims=True))
    return bias_E - jnp.where(jnp.equal(rate, 0), 0.0, step_E)


UPDATE_RULES: dict[str, UpdateRule] = {
    "sign": sign,
    "sign_centered": sign_centered,
    "proportional": proportional,
    "quantile": quantile,
}
MARGIN_RULES = frozenset({"quantile"})  # histograms are computed for these alone


def update_rule(name: str) -> UpdateRule:
    """Returns the rule called `name`; ValueError lists the known ones."""
    return checks.lookup(UPDATE_RULES, name, "update rule")


def selection_threshold(score_TE: jax.Array, top_k: int) -> jax.Array:
    """Returns the score at which a token's choice of its `top_k` largest would flip.

    With biased scores as `score_TE`, the margins are `score_TE - threshold_T[:, None]`.
    Where groups of experts are chosen first, an expert needs both, so that

        margin_TE = min(biased_TE - selection_threshold(reachable_TE, top_k),
                        group_TG - selection_threshold(group_TG, groups_per_token))

    with `reachable_TE` the biased scores, -inf outside of the chosen groups, and each
    group's second term repeated for its experts. (Leaving that term out, and so calling
    experts of other groups hopeless, keeps 2 groups of 8 from ever balancing.)

    Returns:
      float32 [T]: midway between the top_k-th and the next score, or -inf where there
      is no next one.
    """
    if top_k == score_TE.shape[-1]:
        return jnp.full(score_TE.shape[:-1], -jnp.inf)
    # Without the barrier XLA's CPU compiler merges the slices into top_k, no longer
    # knows it as such, and sorts: 188 ms instead of 12 for 8,192 tokens, 256 experts.
    best_TK = jax.lax.optimization_barrier(jax.lax.top_k(score_TE, top_k + 1)[0])
    return (best_TK[..., -2] + best_TK[..., -1]) / 2


def bin_edges(num_bins: int) -> np.ndarray:
    """Returns the edges of `margin_histogram`'s bins: float32 [num_bins + 1].

    They go from -1 to 1.

    Uniform in u, where margin = u / (9 - 8 |u|). So they are narrowest around 0, where
    margins decide. 0 itself is an edge: bins from `num_bins // 2` on count the load.
    """
    _check_bins(num_bins)
    u = np.arange(-num_bins // 2, num_bins // 2 + 1) / (num_bins / 2)
    return (u / (1 + _ZOOM - _ZOOM * np.abs(u))).astype(np.float32)


def margin_histogram(
    margin_TE: jax.Array,
    is_real_T: jax.Array | None = None,
    *,
    num_bins: int = NUM_BINS,
) -> jax.Array:
    """Counts each expert's margins over the tokens, in the bins of `bin_edges`.

    Integers, so that histograms of parts of a batch add up to the whole one's, exactly.
    Margins beyond -1 or 1, infinite ones too, count in the outermost bins. As margins
    are relative to the present bias, wide bins make steps rougher but not their end:
    bins above 0 count the load itself, so that a balanced expert's quantile is 0.

    Args:
      margin_TE: float32, positive where the token chose the expert.
      is_real_T: bool, which tokens to count; None: all.
      num_bins: even, or ValueError.

    Returns:
      int32 [E, num_bins].
    """
    _check_bins(num_bins)
    num_experts = margin_TE.shape[-1]
    margin_TE = jnp.clip(margin_TE, -1, 1)
    u_TE = (1 + _ZOOM) * margin_TE / (1 + _ZOOM * jnp.abs(margin_TE))
    bin_TE = ((u_TE + 1) * (num_bins / 2)).astype(jnp.int32)
    bin_TE = jnp.minimum(bin_TE, num_bins - 1) + num_bins * jnp.arange(num_experts)
    if is_real_T is not None:  # what lies beyond the last bin isn't counted
        bin_TE = jnp.where(is_real_T[:, None], bin_TE, num_experts * num_bins)
    count = jnp.bincount(bin_TE.ravel(), length=num_experts * num_bins)
    return count.reshape(num_experts, num_bins)


def _check_bins(num_bins: int) -> None:
    if num_bins < 2 or num_bins % 2:
        raise ValueError(f"num_bins={num_bins} must be even and at least 2.")


def _mean_load(load_E: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the mean load as an int32 and a float32 in [0, 1), each [..., 1].

    The total of a large batch may not fit in int32; quotients and remainders do.
    """
    num_experts = load_E.shape[-1]
    rest = (load_E % num_experts).sum(-1, keepdims=True)
    whole = (load_E // num_experts).sum(-1, keepdims=True) + rest // num_experts
    return whole, (rest % num_experts) / num_experts


def _direction(load_E: jax.Array) -> jax.Array:
    """Returns sign(mean - load) as float32, compared exactly.

    Integers are below the mean where they are below it rounded up, and above it where
    they are above it rounded down. Float32 would call 2**24 + 1 balanced among 2**24.
    """
    whole, rest = _mean_load(load_E)
    below_E = load_E < whole + (rest > 0)
    above_E = load_E > whole
    return below_E.astype(jnp.float32) - above_E.astype(jnp.float32)


def _fair_quantile(margin_EM: jax.Array, load_E: jax.Array) -> jax.Array:
    """Returns the margin that as many tokens exceed as the mean load has.

    It is interpolated.
    """
    whole, rest = _mean_load(load_E)
    tail_EM = jax.lax.cumsum(margin_EM, axis=margin_EM.ndim - 1, reverse=True)
    surplus_EM = (tail_EM - whole[..., None]) - rest[..., None]
    # Tails only shrink: the quantile lies in the last bin that opens with a surplus.
    bin_E1 = jnp.maximum((surplus_EM > 0).sum(-1, keepdims=True) - 1, 0)
    surplus_E1 = jnp.take_along_axis(surplus_EM, bin_E1, axis=-1)
    inside_E1 = jnp.take_along_axis(margin_EM, bin_E1, axis=-1)
    edge = jnp.asarray(bin_edges(margin_EM.shape[-1]))
    low_E1, high_E1 = edge[bin_E1], edge[bin_E1 + 1]
    fraction_E1 = surplus_E1 / jnp.maximum(inside_E1, 1)
    return (low_E1 + fraction_E1 * (high_E1 - low_E1))[..., 0]
