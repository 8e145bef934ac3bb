"""Lending of experts: every device computes as many rows as any other.

A row is one choice of an expert by a token. Experts live on devices, their *homes*, and
where they are chosen unevenly, the busiest device is waited for. So a device with more
than its share lends its busiest experts to devices with less, for one microbatch: they
get the weights and compute some of the rows. What is computed doesn't change, only
where. (Experts lent for a microbatch: LLEP, arXiv 2601.17111.)

Each borrower has one lender. As long as a device has more than its share, it fills up
others, each to its share, and the last of them may take it below its own: then the next
lender fills it up in turn. (So are alias tables made: Walker, 1977. In the order of
sums, who fills whom is known without doing one after the other.) Every device is filled
up at most once, hence from one lender's experts, of which there are E / P: with as many
slots, the balance is exact whatever the load is. In general position, none with fewer
than P - 1 borrowers is, and this one has at most as many.

A lender gives away the rows of its busiest expert first, then those of the next, to its
borrowers one after the other, so that few experts are lent. If a borrower has too few
slots for what it is to get, it takes the experts with the most rows, and the rest stays
at home.

All is computed from the counts of all devices, as integers: each device makes the same
plan. Whatever is ordered is so few that all pairs are compared, which takes fewer
kernels than sorting and cumulating.

Shapes: P device of the expert axis, where tokens come from and where rows are computed;
L device as a lender; E expert; M expert of one device; S slot for a borrowed expert;
N token of this device, K choice of a token, R row in the order of experts.
"""

from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jmoe.balance.load import max_violation
from jmoe.ops.rows import sort_rows

MAX_ROWS = 2**31 - 1  # of all devices together, so that sums are right in int32


class LendingPlan(NamedTuple):
    """Loans of experts, and how many rows of each expert each device computes.

    borrowed_PS: int32, the experts that each device borrows, the one with the most rows
      first; E where a slot is empty. They are distinct, none is the device's own, and
      empty slots come last.
    rows_EP: int32, how many of an expert's rows each device computes. They add up to
      the expert's load.
    """

    borrowed_PS: jax.Array
    rows_EP: jax.Array


class LendingMetrics(NamedTuple):
    """What lending did to one microbatch of one layer; scalars.

    max_violation_before, max_violation_after: float32, by how much the busiest device
      exceeds the mean, relative to it, if all experts are computed at home, and so.
    lent: int32, the loans: an expert that two devices borrow is lent twice.
    left_over: int32, rows by which devices exceed the mean (rounded up) after lending.
    """

    max_violation_before: jax.Array
    max_violation_after: jax.Array
    lent: jax.Array
    left_over: jax.Array


class _Flow(NamedTuple):
    """Rows that lenders give to borrowers; all int32 [P].

    lender_P: P where a device borrows nothing. start_P, rows_P: of the rows that its
    lender gives away, the first that it gets, and how many. given_P: how many rows it
    gives away itself.
    """

    lender_P: jax.Array
    start_P: jax.Array
    rows_P: jax.Array
    given_P: jax.Array


def check_rows(num_tokens: int, top_k: int, devices: int) -> None:
    """Raises ValueError if a microbatch has more rows than `plan` can count.

    Args:
      num_tokens: of each device.
    """
    rows = num_tokens * top_k * devices
    if rows > MAX_ROWS:
        raise ValueError(
            f"{devices} devices x {num_tokens} tokens x top_k={top_k} are {rows} rows: "
            f"lending counts them in int32, at most {MAX_ROWS}."
        )


def plan(
    load_PE: jax.Array,
    slots: int,
    threshold: float = 0.0,
    devices_per_node: int | None = None,
) -> LendingPlan:
    """Returns a plan by which no device exceeds the mean by more than `threshold`.

    With a threshold of 0, all devices have as many rows as any other, or one more: the
    busiest do where rows don't divide evenly. This holds where slots suffice. E / P
    always do; where a plan would need more than there are, rows stay at home.

    Args:
      load_PE: int, how many of each device's choices are of each expert. Device p is
        the home of experts p * E / P up to (p + 1) * E / P.
      slots: S, how many experts a device can borrow.
      threshold: a fraction of the mean, used to a thousandth. Nobody lends to be less
        above it, nor does anyone if nobody is more above it.
      devices_per_node: lending is within such groups of neighbours as far as it can
        be, and then between them. None if there is only one.

    Raises:
      ValueError: there is only one device, or experts or nodes don't divide evenly; the
        threshold is below 0; or the slots are, or are more than there are experts of
        other devices.
    """
    devices, experts = load_PE.shape
    _check(devices, experts, slots, threshold, devices_per_node)
    load_LM = load_PE.sum(0, dtype=jnp.int32).reshape(devices, -1)
    flow = _find_flow(load_LM.sum(1), threshold, devices_per_node or devices)
    before_LM = _sum_of_larger(load_LM)
    # What a borrower gets of each expert: the overlap of two intervals.
    start_PLM = jnp.maximum(flow.start_P[:, None, None], before_LM)
    end_P = flow.start_P + flow.rows_P
    end_PLM = jnp.minimum(end_P[:, None, None], before_LM + load_LM)
    is_lender_PL = flow.lender_P[:, None] == jnp.arange(devices)
    lent_PLM = jnp.where(is_lender_PL[:, :, None], end_PLM - start_PLM, 0)
    lent_PLM = jnp.maximum(lent_PLM, 0)
    slot_PLM = _are_larger(lent_PLM).sum(-1, dtype=jnp.int32)
    lent_PLM = jnp.where(slot_PLM < slots, lent_PLM, 0)
    lent_PE, slot_PE = (x.reshape(devices, experts) for x in (lent_PLM, slot_PLM))
    is_in_PSE = slot_PE[:, None] == jnp.arange(slots)[:, None]
    is_in_PSE &= lent_PE[:, None] > 0
    expert_E = jnp.arange(experts, dtype=jnp.int32)
    borrowed_PS = jnp.where(is_in_PSE, expert_E, experts).min(-1, initial=experts)
    at_home_E = load_LM.reshape(-1) - lent_PE.sum(0, dtype=jnp.int32)
    rows_PE = jnp.where(_is_home(devices, experts), at_home_E, lent_PE)
    return LendingPlan(borrowed_PS, rows_PE.T)


def _check(devices, experts, slots, threshold, devices_per_node):
    if devices == 1:
        raise ValueError("One device on the expert axis: there is nobody to lend to.")
    if experts % devices:
        raise ValueError(f"{experts} experts don't divide over {devices} devices.")
    elsewhere = experts - experts // devices
    if not 0 <= slots <= elsewhere:
        raise ValueError(
            f"slots={slots} must be from 0 to {elsewhere}, the number of experts that "
            "are other devices'."
        )
    if not threshold >= 0:
        raise ValueError(f"threshold={threshold} must be at least 0.")
    if devices_per_node is not None and (
        devices_per_node < 1 or devices % devices_per_node
    ):
        raise ValueError(
            f"devices_per_node={devices_per_node} doesn't divide the {devices} devices."
        )


def _find_flow(load_P: jax.Array, threshold: float, devices_per_node: int) -> _Flow:
    """Returns who fills up whom: within nodes first, then between them."""
    devices = load_P.size
    most_P = _most_rows(load_P, threshold)
    surplus_P = jnp.maximum(load_P - most_P, 0)
    room_P = jnp.maximum(most_P - load_P, 0)
    if devices_per_node == devices:
        return _fill(surplus_P, room_P, devices)
    near = _fill(surplus_P, room_P, devices_per_node)
    # Who is filled up by a node's last lender may take that one below its share. It is
    # then filled up from another node: it still has one lender.
    room_P += jnp.maximum(near.given_P - surplus_P, 0)
    room_P = jnp.where(near.lender_P < devices, 0, room_P)
    far = _fill(jnp.maximum(surplus_P - near.given_P, 0), room_P, devices)
    given_P = jnp.append(near.given_P, 0)
    return _Flow(
        jnp.minimum(near.lender_P, far.lender_P),
        near.start_P + far.start_P + given_P[far.lender_P],
        near.rows_P + far.rows_P,
        near.given_P + far.given_P,
    )


def _most_rows(load_P: jax.Array, threshold: float) -> jax.Array:
    """Returns how many rows each device may have.

    Where rows don't divide evenly, the busiest may have one more, so that none is lent
    only to have it elsewhere.
    """
    mean, more = jnp.divmod(load_P.sum(), load_P.size)
    above = Fraction(str(threshold)).limit_denominator(1000)
    # mean * above, in factors that fit: a product of sums could overflow.
    whole, rest = jnp.divmod(mean, above.denominator)
    extra = whole * above.numerator + rest * above.numerator // above.denominator
    has_one_more_P = _are_larger(load_P).sum(-1, dtype=jnp.int32) < more
    return mean + jnp.maximum(extra, has_one_more_P.astype(jnp.int32))


def _fill(surplus_P: jax.Array, room_P: jax.Array, devices_per_node: int) -> _Flow:
    """Returns who fills up whom within nodes, the most to give to the most room first.

    Of each node, room is laid out on one line and surplus on another. A device is
    filled up by the lender in whose stretch of the second its stretch of the first
    begins: up to its share, or as far as there is surplus anywhere.

    Shapes here: P and L device of a node.
    """
    devices = surplus_P.size
    surplus_GP, room_GP = (
        x_P.reshape(-1, devices_per_node) for x_P in (surplus_P, room_P)
    )
    to_fill_GP, first_GL = _sum_of_larger(jnp.stack([room_GP, surplus_GP]))
    end_GL = first_GL + surplus_GP
    wanted_GP = jnp.clip(surplus_P.sum() - to_fill_GP, 0, room_GP)
    is_past_GPL = to_fill_GP[:, :, None] < end_GL[:, None]
    filled_GP1 = jnp.where(wanted_GP > 0, to_fill_GP + wanted_GP, 0)[:, :, None]
    asked_GL = jnp.where(is_past_GPL, filled_GP1, 0).max(1)
    given_GL = jnp.where(surplus_GP > 0, jnp.maximum(asked_GL - first_GL, 0), 0)
    # A lender that gave away too much is filled up by the next, before all others.
    overdrawn_GP = jnp.maximum(given_GL - surplus_GP, 0)
    begins_GP = jnp.where(overdrawn_GP > 0, end_GL, to_fill_GP)
    is_wanting_GP = (wanted_GP > 0) | (overdrawn_GP > 0)
    begins_GP1 = jnp.where(is_wanting_GP, begins_GP, -1)[:, :, None]
    is_lender_GPL = (first_GL[:, None] <= begins_GP1) & (begins_GP1 < end_GL[:, None])
    device_GP = jnp.arange(devices, dtype=jnp.int32).reshape(room_GP.shape)
    lender_GP = jnp.where(is_lender_GPL, device_GP[:, None], devices).min(2)
    rows_GP = jnp.where(lender_GP < devices, wanted_GP + overdrawn_GP, 0)
    first_P = jnp.append(first_GL, 0)
    start_GP = jnp.maximum(begins_GP - first_P[lender_GP], 0)
    start_GP = jnp.where(lender_GP < devices, start_GP, 0)
    return _Flow(*(x.reshape(-1) for x in (lender_GP, start_GP, rows_GP, given_GL)))


def _are_larger(x_XM: jax.Array) -> jax.Array:
    """Returns [..., M, M]: whether the second of two comes before the first.

    The larger does, or that of the lower index.
    """
    index_M = jnp.arange(x_XM.shape[-1])
    this, other = x_XM[..., :, None], x_XM[..., None, :]
    return (other > this) | ((other == this) & (index_M < index_M[:, None]))


def _sum_of_larger(x_XM: jax.Array) -> jax.Array:
    """Returns the sum of what comes before each, the larger before the smaller."""
    return jnp.where(_are_larger(x_XM), x_XM[..., None, :], 0).sum(-1)


def _is_home(devices: int, experts: int) -> jax.Array:
    """Returns which experts live on which device, bool [P, E]."""
    home_E = jnp.arange(experts) // (experts // devices)
    return jnp.arange(devices)[:, None] == home_E


def assign(
    lending: LendingPlan,
    load_PE: jax.Array,
    expert_NK: jax.Array,
    source: jax.Array | int,
    before_E: jax.Array | int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Returns which device computes each of these choices, and its group there.

    All devices' choices of an expert together are divided as the plan says. A device
    computes its own as far as it may. Of the others, those of the first devices go to
    the first that may compute more.

    Args:
      load_PE: as `plan` got it.
      expert_NK: int32 in [0, E]; E is nobody.
      source: where these choices are.
      before_E: int32, how many of its choices of each expert come before these.

    Returns:
      computer_NK: int32 in [0, P]; P is nobody.
      group_NK: int32 in [0, E / P + S]: first the computer's own experts, then those
        that it borrows by slot; the last is nobody.
    """
    devices, experts = load_PE.shape
    load_EP = load_PE.astype(jnp.int32).T
    own_EP = jnp.minimum(load_EP, lending.rows_EP)
    own_E = own_EP[:, source]
    away_EP = load_EP - own_EP
    is_earlier_P = jnp.arange(devices) < source
    first_away_E = jnp.where(is_earlier_P, away_EP, 0).sum(1) - own_E
    free_until_EP = jnp.cumsum(lending.rows_EP - own_EP, axis=1)

    choice_R, _, load_E = sort_rows(expert_NK, experts, spare=0)
    first_row_E = jnp.cumsum(load_E) - load_E - before_E
    expert_R = expert_NK.reshape(-1)[choice_R]
    number_R = jnp.arange(choice_R.size, dtype=jnp.int32)
    known_R = jnp.minimum(expert_R, experts - 1)
    rank_R = number_R - first_row_E[known_R]
    place_R = rank_R + first_away_E[known_R]
    computer_R = (free_until_EP[known_R] <= place_R[:, None]).sum(1, dtype=jnp.int32)
    computer_R = jnp.where(rank_R < own_E[known_R], source, computer_R)
    computer_R = jnp.where(expert_R < experts, computer_R, devices)
    computer_R = (
        jnp.zeros_like(computer_R).at[choice_R].set(computer_R, unique_indices=True)
    )
    computer_NK = computer_R.reshape(expert_NK.shape)
    group_PE = jnp.pad(
        _groups(lending, devices),
        ((0, 1), (0, 1)),
        constant_values=experts // devices + lending.borrowed_PS.shape[1],
    )
    return computer_NK, group_PE[computer_NK, expert_NK]


def _groups(lending: LendingPlan, devices: int) -> jax.Array:
    """Returns the group of each expert where it is computed, int32 [P, E]."""
    experts = lending.rows_EP.shape[0]
    hosted = experts // devices
    expert_E = jnp.arange(experts, dtype=jnp.int32)
    slots = lending.borrowed_PS.shape[1]
    is_in_PSE = lending.borrowed_PS[:, :, None] == expert_E
    slot_S1 = jnp.arange(slots, dtype=jnp.int32)[:, None]
    slot_PE = jnp.where(is_in_PSE, slot_S1, slots).min(1, initial=slots)
    is_home_PE = _is_home(devices, experts)
    return jnp.where(is_home_PE, expert_E % hosted, hosted + slot_PE)


def measure(load_PE: jax.Array, lending: LendingPlan) -> LendingMetrics:
    """Returns what a plan for this load does to the devices' balance."""
    devices, experts = load_PE.shape
    before_P = load_PE.sum(0).reshape(devices, -1).sum(1)
    after_P = lending.rows_EP.sum(0)
    share = -(-before_P.sum() // devices)
    return LendingMetrics(
        max_violation(before_P),
        max_violation(after_P),
        (lending.borrowed_PS < experts).sum(dtype=jnp.int32),
        jnp.maximum(after_P - share, 0).sum(dtype=jnp.int32),
    )
