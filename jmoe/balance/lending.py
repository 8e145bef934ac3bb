"""Lending of experts: every device computes as many rows as any other.

A row is one choice of an expert by a token. Experts live on devices, their *homes*, and
where they are chosen unevenly, the busiest device is waited for. So a device with more
than its share lends its busiest experts to devices with less, for one microbatch: they
get the weights and compute some of the rows. What is computed doesn't change, only
where. (Experts lent for a microbatch: LLEP, arXiv 2601.17111.)

Each borrower has one lender (`jmoe.balance.lenders`), so that it needs at most as many
slots as a device has experts. A lender gives away the rows of its busiest expert first,
then those of the next, so that few experts are lent. If a borrower has too few slots
for what it is to get, it takes the experts with the most rows, and the rest stays at
home.

All is computed from the counts of all devices, as integers: each device makes the same
plan. There is no loop over loans.

Shapes: P device of the expert axis, where tokens come from and where rows are computed;
L device as a lender; E expert; M expert of one device; S slot for a borrowed expert;
N token of this device, K choice of a token, R row in the order of experts.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.balance.lenders import MAX_ROWS, Flow, are_larger, find_flow
from jmoe.balance.load import max_violation
from jmoe.ops.rows import sort_rows


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
    always do; where a plan would need more than there are, rows stay at home: even if
    another device was to fill up what they leave, and does.

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
    flow = find_flow(load_LM.sum(1), threshold, devices_per_node or devices)
    # If all others borrow from one device, they split at most so many of its experts.
    pieces = experts // devices + devices - 2
    dealt = [0] if pieces <= (devices - 1) * slots else [0, 1, slots // 2, slots]
    lent_LPM, slot_LPM = _share_out(load_LM, flow, slots, sorted(set(dealt)))
    lent_PE, slot_PE = (
        x.swapaxes(0, 1).reshape(devices, experts) for x in (lent_LPM, slot_LPM)
    )
    is_in_PSE = slot_PE[:, None] == jnp.arange(slots)[:, None]
    is_in_PSE &= lent_PE[:, None] > 0
    expert_E = jnp.arange(experts, dtype=jnp.int32)
    borrowed_PS = jnp.where(is_in_PSE, expert_E, experts).min(-1)
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
    if not 0 <= threshold < math.inf:
        raise ValueError(f"threshold={threshold} must be at least 0, and finite.")
    if devices_per_node is not None and (
        devices_per_node < 1 or devices % devices_per_node
    ):
        raise ValueError(
            f"devices_per_node={devices_per_node} doesn't divide the {devices} devices."
        )


def _share_out(
    load_LM: jax.Array, flow: Flow, slots: int, dealt: Sequence[int]
) -> tuple[jax.Array, jax.Array]:
    """Returns how many rows of each expert each borrower gets, and its slot there.

    Both are [L, P, M]. What has no slot isn't lent. A lender's experts are laid out on
    a line, the busiest first, and cut. As the last borrowers then get many small ones,
    some experts may be dealt before, a number of `dealt` to each borrower. Each lender
    takes the number by which it gives away the most rows, or of equals the one with the
    fewest loans.

    Shapes here: T number of dealt experts.
    """
    lent_TLPM = _deal_and_cut(load_LM, flow, slots, np.array(dealt, np.int32))
    slot_TLPM = are_larger(lent_TLPM).sum(-1, dtype=jnp.int32)
    lent_TLPM = jnp.where(slot_TLPM < slots, lent_TLPM, 0)
    lent_LPM, slot_LPM = lent_TLPM[0], slot_TLPM[0]
    if len(dealt) == 1:
        return lent_LPM, slot_LPM
    rows_TL = lent_TLPM.sum((2, 3))
    loans_TL = (lent_TLPM > 0).sum((2, 3), dtype=jnp.int32)
    rows_L, loans_L = rows_TL[0], loans_TL[0]
    for t in range(1, len(dealt)):  # of few: without a kernel to find the best
        is_better_L = (rows_TL[t] == rows_L) & (loans_TL[t] < loans_L)
        is_better_L |= rows_TL[t] > rows_L
        rows_L = jnp.where(is_better_L, rows_TL[t], rows_L)
        loans_L = jnp.where(is_better_L, loans_TL[t], loans_L)
        is_better_L11 = is_better_L[:, None, None]
        lent_LPM = jnp.where(is_better_L11, lent_TLPM[t], lent_LPM)
        slot_LPM = jnp.where(is_better_L11, slot_TLPM[t], slot_LPM)
    return lent_LPM, slot_LPM


def _deal_and_cut(
    load_LM: jax.Array, flow: Flow, slots: int, dealt_T: np.ndarray
) -> jax.Array:
    """Returns how many rows borrowers get, [T, L, P, M], however many loans that is.

    The smallest of the experts that are needed are dealt, in the order of borrowers and
    back; then the rest is cut to fill them up.
    """
    devices, hosted = load_LM.shape
    is_larger_LMM = are_larger(load_LM)
    before_LM = jnp.where(is_larger_LMM, load_LM[:, None], 0).sum(-1)
    is_lender_LP = jnp.arange(devices)[:, None] == flow.lender_P
    if not dealt_T.any():
        return _cut(load_LM, before_LM, is_lender_LP, flow.start_P, flow.rows_P)[None]
    rank_LM = is_larger_LMM.sum(-1, dtype=jnp.int32)
    is_earlier_PP = flow.start_P < flow.start_P[:, None]
    is_earlier_PP &= flow.lender_P == flow.lender_P[:, None]
    turn_P = is_earlier_PP.sum(-1, dtype=jnp.int32)
    borrowers_L = is_lender_LP.sum(-1, dtype=jnp.int32)
    needed_L = (before_LM < flow.given_P[:, None]).sum(-1, dtype=jnp.int32)
    turn_TLM = _turns(rank_LM, needed_L, borrowers_L, slots, dealt_T)
    is_of_TLPM = turn_TLM[:, :, None] == turn_P[:, None]

    # A borrower has room for what it is to get but what it was dealt before.
    is_own_TLMM = turn_TLM[..., None, :] == turn_TLM[..., None]
    is_own_TLMM &= rank_LM[:, None] < rank_LM[:, :, None]
    had_TLMM = jnp.where(is_own_TLMM, load_LM[:, None], 0)
    is_of_TLMP = (turn_TLM[..., None] == turn_P) & is_lender_LP[:, None]
    rows_TLMP = jnp.where(is_of_TLMP, flow.rows_P, 0)
    room_TLM = jnp.concatenate([rows_TLMP, -had_TLMM], -1).sum(-1)
    dealt_TLM = jnp.where(turn_TLM < devices, jnp.clip(room_TLM, 0, load_LM), 0)

    # What there was no room for is cut, too. One sum over a lender's experts yields
    # what is dealt of an expert's larger ones, to a borrower, and to those before it.
    is_larger_TLMM = jnp.broadcast_to(is_larger_LMM, is_own_TLMM.shape)
    is_before_TLPM = turn_TLM[:, :, None] < turn_P[:, None]
    is_summed_TLXM = jnp.concatenate([is_larger_TLMM, is_of_TLPM, is_before_TLPM], 2)
    dealt_TLX = jnp.where(is_summed_TLXM, dealt_TLM[:, :, None], 0).sum(-1)
    larger_TLM, own_TLP, before_TLP = jnp.split(
        dealt_TLX, [hosted, hosted + devices], axis=2
    )
    is_of_TLPM &= is_lender_LP[:, :, None]  # others have the same turns
    return jnp.where(is_of_TLPM, dealt_TLM[:, :, None], 0) + _cut(
        load_LM - dealt_TLM,
        before_LM - larger_TLM,
        is_lender_LP,
        flow.start_P - before_TLP,
        flow.rows_P - own_TLP,
    )


def _turns(
    rank_LM: jax.Array,
    needed_L: jax.Array,
    borrowers_L: jax.Array,
    slots: int,
    dealt_T: np.ndarray,
) -> jax.Array:
    """Returns at whose turn among its lender's borrowers an expert is dealt, [T, L, M].

    As many as there are devices where it isn't.
    """
    nobody, hosted = rank_LM.shape
    dealt_TL = dealt_T[:, None] * borrowers_L
    lent_TL = jnp.minimum(jnp.clip(needed_L, dealt_TL, slots * borrowers_L), hosted)
    place_TLM = rank_LM - jnp.maximum(lent_TL - dealt_TL, 0)[:, :, None]
    lap_TLM, turn_TLM = jnp.divmod(place_TLM, jnp.maximum(borrowers_L, 1)[:, None])
    back_TLM = borrowers_L[:, None] - 1 - turn_TLM
    turn_TLM = jnp.where(lap_TLM % 2 == 0, turn_TLM, back_TLM)
    is_dealt_TLM = (place_TLM >= 0) & (place_TLM < dealt_TL[:, :, None])
    return jnp.where(is_dealt_TLM, turn_TLM, nobody)


def _cut(
    load_XLM: jax.Array,
    before_XLM: jax.Array,
    is_lender_LP: jax.Array,
    start_XP: jax.Array,
    rows_XP: jax.Array,
) -> jax.Array:
    """Returns what a borrower gets of each expert: the overlap of two intervals.

    `before_XLM` is where an expert's rows start on its lender's line, `start_XP` where
    a borrower's do.
    """
    start_XP1, end_XP1 = start_XP[..., None], (start_XP + rows_XP)[..., None]
    before_XL1M, load_XL1M = before_XLM[..., None, :], load_XLM[..., None, :]
    end_XLPM = jnp.minimum(end_XP1, before_XL1M + load_XL1M)
    overlap_XLPM = jnp.maximum(end_XLPM - jnp.maximum(start_XP1, before_XL1M), 0)
    return jnp.where(is_lender_LP[:, :, None], overlap_XLPM, 0)


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


def loans_between(lending: LendingPlan) -> jax.Array:
    """Returns how many experts of each device each device borrows, int32 [L, P]."""
    devices, experts = len(lending.borrowed_PS), len(lending.rows_EP)
    home_PS = lending.borrowed_PS // (experts // devices)
    is_lender_LPS = jnp.arange(devices)[:, None, None] == home_PS
    return is_lender_LPS.sum(-1, dtype=jnp.int32)
