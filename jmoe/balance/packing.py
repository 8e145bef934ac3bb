"""Experts packed on the devices of one pool: a rule to begin with, then a search.

`placement` says what the problem is. A pool is a layer's devices, or those of one node.
Here it is an array of slots, S consecutive ones a device, that hold experts:

    fill       DeepSeek's rule, for the slots that are empty
    separate   swaps until no device holds two replicas of one expert
    improve    changes single slots, or swaps two, while the busiest device gains
    aligned    the same packing, on devices and slots that already hold much of it

Dimensions: R slots (and so replicas), E experts, D devices, S = R / D slots of a
device, P pairs of devices.
"""

import heapq
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

EMPTY = -1  # a slot without an expert
ROUNDING = 1e-9  # relative; loads that are closer are equal


def device_load(weight_E: np.ndarray, slot_R: np.ndarray, num_devices: int):
    """Returns the load of each device, float64 [D], where no slot is empty."""
    count_E = np.bincount(slot_R, minlength=len(weight_E))
    return (weight_E / np.maximum(count_E, 1))[slot_R].reshape(num_devices, -1).sum(1)


def fill(
    weight_E: np.ndarray, slot_R: np.ndarray, num_devices: int, most: int
) -> np.ndarray:
    """Fills empty slots by DeepSeek's rule, with at most `most` replicas of an expert.

    Each next replica goes to the expert with the largest load per replica, which one
    without any always is. Then, in the order of their loads, replicas go to the least
    loaded device that has room. Where loads are equal, the first comes first.

    Args:
      weight_E: float64, above 0.
      slot_R: experts, or EMPTY; enough of these for the experts that have no slot.
    """
    slot_R = slot_R.copy()
    is_empty_R = slot_R == EMPTY
    added, count_E = _replicate(weight_E, slot_R[~is_empty_R], is_empty_R.sum(), most)
    share_E = weight_E / count_E
    share_R = np.where(is_empty_R, 0.0, share_E[slot_R])
    load_D = share_R.reshape(num_devices, -1).sum(1).tolist()
    room_D = [
        np.flatnonzero(row).tolist() for row in is_empty_R.reshape(num_devices, -1)
    ]
    least = [
        (load_D[device], device) for device in range(num_devices) if room_D[device]
    ]
    heapq.heapify(least)
    first = np.arange(num_devices) * (len(slot_R) // num_devices)
    for expert in added[np.argsort(-share_E[added], kind="stable")]:
        load, device = least[0]
        slot_R[first[device] + room_D[device].pop(0)] = expert
        if room_D[device]:
            heapq.heapreplace(least, (load + share_E[expert], device))
        else:
            heapq.heappop(least)
    return slot_R


def _replicate(
    weight_E: np.ndarray, held: np.ndarray, number: int, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the experts of `number` more replicas, and the counts with these [E]."""
    count = np.bincount(held, minlength=len(weight_E)).tolist()
    weight = weight_E.tolist()
    added = [expert for expert in range(len(weight)) if not count[expert]]
    for expert in added:
        count[expert] = 1
    largest = [
        (-weight[expert] / count[expert], expert)
        for expert in range(len(weight))
        if count[expert] < most
    ]
    heapq.heapify(largest)
    while len(added) < number:
        expert = largest[0][1]
        added.append(expert)
        count[expert] += 1
        if count[expert] < most:
            heapq.heapreplace(largest, (-weight[expert] / count[expert], expert))
        else:
            heapq.heappop(largest)
    return np.array(added, np.int64), np.array(count)


def repeats(slot_R: np.ndarray, num_devices: int) -> np.ndarray:
    """Returns which slots hold an expert that an earlier slot of the device holds."""
    slot_DS = slot_R.reshape(num_devices, -1)
    order_DS = np.argsort(slot_DS, axis=1, kind="stable")
    sorted_DS = np.take_along_axis(slot_DS, order_DS, 1)
    repeat_DS = np.zeros(slot_DS.shape, bool)
    np.put_along_axis(
        repeat_DS, order_DS[:, 1:], sorted_DS[:, 1:] == sorted_DS[:, :-1], 1
    )
    return repeat_DS.ravel()


def separate(weight_E: np.ndarray, slot_R: np.ndarray, num_devices: int) -> np.ndarray:
    """Swaps slots until no device holds two replicas of an expert.

    Experts with more replicas than there are devices are left. For any other, some
    device is without it and holds another that the swap brings to a device without
    that, or that is there twice itself: so each swap leaves fewer repeats. It is the
    one after which the busier of its two devices is least busy.
    """
    slot_R = slot_R.copy()
    device_R = np.arange(len(slot_R)) // (len(slot_R) // num_devices)
    count_E = np.bincount(slot_R, minlength=len(weight_E))
    share_E = weight_E / count_E
    while True:
        repeat_R = repeats(slot_R, num_devices)
        wrong = np.flatnonzero(repeat_R & (count_E[slot_R] <= num_devices))
        if not len(wrong):
            return slot_R
        slot, device = wrong[0], device_R[wrong[0]]
        has_it_D = (slot_R == slot_R[slot]).reshape(num_devices, -1).any(1)
        is_here_R = np.isin(slot_R, slot_R[device_R == device])
        allowed_R = ~has_it_D[device_R] & (~is_here_R | repeat_R)
        if not allowed_R.any():
            return slot_R
        load_D = share_E[slot_R].reshape(num_devices, -1).sum(1)
        more_R = share_E[slot_R[slot]] - share_E[slot_R]
        busier_R = np.maximum(load_D[device] - more_R, load_D[device_R] + more_R)
        other = np.where(allowed_R, busier_R, np.inf).argmin()
        slot_R[[slot, other]] = slot_R[[other, slot]]


def exchange(
    weight_E: np.ndarray, slot_R: np.ndarray, num_devices: int, target: float
) -> np.ndarray:
    """Swaps slots of many pairs of devices at once, round by round.

    A round pairs the busiest devices with the least busy, and swaps for each pair what
    leaves the busier of the two least busy. After a round that doesn't help the busiest
    of all, others are paired. No expert gets a second slot on a device.
    """
    count_E = np.bincount(slot_R, minlength=len(weight_E))
    slot_DS = slot_R.reshape(num_devices, -1).copy()
    share_DS = (weight_E / count_E)[slot_DS]
    busiest, missed = np.inf, 0
    while num_devices > 1 and missed <= _MISSES:
        load_D = share_DS.sum(1)
        missed = 0 if load_D.max() < busiest * (1 - ROUNDING) else missed + 1
        busiest = load_D.max()
        if busiest <= target * (1 + ROUNDING):
            break
        order_D = np.argsort(-load_D, kind="stable")
        busy_P = order_D[: num_devices // 2]
        idle_P = np.roll(order_D[::-1][: num_devices // 2], missed)
        less_PSS = share_DS[busy_P, :, None] - share_DS[idle_P, None]
        same_PSS = slot_DS[busy_P, :, None] == slot_DS[idle_P, None]
        allowed_PSS = ~(same_PSS.any(1)[:, None] | same_PSS.any(2)[:, :, None])
        busier_PSS = np.maximum(
            load_D[busy_P, None, None] - less_PSS, load_D[idle_P, None, None] + less_PSS
        )
        busier_PX = np.where(allowed_PSS, busier_PSS, np.inf).reshape(len(busy_P), -1)
        best_P = busier_PX.argmin(1)
        gains_P = busier_PX.min(1) < load_D[busy_P] * (1 - ROUNDING)
        busy, idle = busy_P[gains_P], idle_P[gains_P]
        one, other = np.divmod(best_P[gains_P], slot_DS.shape[1])
        for x_DS in (slot_DS, share_DS):
            x_DS[busy, one], x_DS[idle, other] = x_DS[idle, other], x_DS[busy, one]
    return slot_DS.ravel()


_MISSES = 8  # rounds of `exchange` without gain until it ends


class _State(NamedTuple):
    """A packing and what follows from it.

    One device, the busiest, has to gain: `here` is its load, and no device that a
    change makes busier may reach `limit`, just below that. `own` are its slots,
    `is_own_E` tells its experts, and `held_SR` which devices hold each of these, for
    each slot of such a device. `load_R` is the load of a slot's device, and `cost_R`
    its cost.
    """

    weight_E: np.ndarray
    slot_R: np.ndarray
    count_E: np.ndarray
    share_R: np.ndarray
    load_R: np.ndarray
    cost_R: np.ndarray
    own: np.ndarray
    is_own_E: np.ndarray
    held_SR: np.ndarray
    here: float
    limit: float
    target: float


def _cost(load: np.ndarray, target: float) -> np.ndarray:
    """Returns the square of what devices have above the target."""
    return np.square(np.maximum(load - target, 0))


def improve(
    weight_E: np.ndarray,
    slot_R: np.ndarray,
    num_devices: int,
    target: float,
    changes: int,
) -> np.ndarray:
    """Changes slots until no device has more than `target`, or no change helps.

    The next of at most `changes` is the one that takes most off the sum over devices of
    the square of what they have above the target, per slot that it changes, of those
    where

    - two slots are swapped, one of them of the busiest device, or
    - a slot of the busiest device holds another expert, and its old one fewer replicas,
    - or another slot holds an expert of the busiest device,

    and where the busiest device gains and no other becomes as busy. So the loads, in
    descending order, only fall. No expert gets a second slot on a device.
    """
    slot_R = slot_R.copy()
    once_E = np.ones(len(weight_E), bool)
    once_E[slot_R[repeats(slot_R, num_devices)]] = False
    for _ in range(changes):
        state = _state(weight_E, slot_R, num_devices, target)
        if state.limit <= target:
            break
        options = _swaps(state), _replacements(state, once_E)
        gain, slots, experts = max(options, key=lambda option: option[0])
        if gain <= 0:
            break
        slot_R[slots] = experts
    return slot_R


def _state(
    weight_E: np.ndarray, slot_R: np.ndarray, num_devices: int, target: float
) -> _State:
    slots = len(slot_R) // num_devices
    count_E = np.bincount(slot_R, minlength=len(weight_E))
    share_R = (weight_E / count_E)[slot_R]
    load_D = share_R.reshape(num_devices, -1).sum(1)
    busiest = int(load_D.argmax())
    own = np.arange(busiest * slots, (busiest + 1) * slots)
    is_own_E = np.zeros(len(weight_E), bool)
    is_own_E[slot_R[own]] = True
    held_SD = (slot_R.reshape(num_devices, -1) == slot_R[own, None, None]).any(-1)
    load_R, here = np.repeat(load_D, slots), load_D[busiest]
    return _State(
        *(weight_E, slot_R, count_E, share_R, load_R, _cost(load_R, target)),
        *(own, is_own_E, np.repeat(held_SD, slots, axis=1)),
        *(here, here * (1 - ROUNDING), target),
    )


Change = tuple[float, list[int], list[int]]  # gain a slot, slots, their new experts


def _swaps(s: _State) -> Change:
    """Returns the best swap of a slot of the busiest device with one elsewhere."""
    less_SR = s.share_R[s.own, None] - s.share_R
    there_SR = s.load_R + less_SR
    allowed_SR = (less_SR > s.here - s.limit) & (there_SR < s.limit)
    allowed_SR &= ~(s.held_SR | s.is_own_E[s.slot_R])
    after_SR = _cost(s.here - less_SR, s.target) + _cost(there_SR, s.target)
    before_R = s.cost_R[s.own[0]] + s.cost_R
    gain_SR = np.where(allowed_SR, (before_R - after_SR) / 2, -np.inf)
    own, other = np.unravel_index(gain_SR.argmax(), gain_SR.shape)
    slots = [int(s.own[own]), int(other)]
    return gain_SR[own, other], slots, s.slot_R[slots[::-1]].tolist()


def _replacements(s: _State, once_E: np.ndarray) -> Change:
    """Returns the best change of one slot's expert.

    Where the expert that goes and the one that comes share a third device, what they
    do there is bounded by the sum of what each does alone: a square is convex.
    """
    count_E, num_experts = s.count_E, len(s.weight_E)
    # A replica more relieves those that there are; one fewer burdens the others.
    relief_E = s.weight_E / (count_E * (count_E + 1))
    gain_R = s.cost_R - _cost(s.load_R - relief_E[s.slot_R], s.target)
    gain_E = np.bincount(s.slot_R, gain_R, num_experts)
    rise_R = s.load_R + s.share_R / np.maximum(count_E - 1, 1)[s.slot_R]
    loss_R = _cost(rise_R, s.target) - s.cost_R
    loss_R = np.bincount(s.slot_R, loss_R, num_experts)[s.slot_R] - loss_R
    over_R = rise_R >= s.limit
    over_elsewhere_R = np.bincount(s.slot_R, over_R, num_experts)[s.slot_R] - over_R
    may_go_R = ((count_E > 1) & once_E)[s.slot_R] & (over_elsewhere_R == 0)
    left_R, arrived_E = s.load_R - s.share_R, s.weight_E / (count_E + 1)

    def best(slots: np.ndarray, experts: np.ndarray, allowed: np.ndarray) -> Change:
        """Returns the best change of one of `slots` (rows) to one of `experts`."""
        load = left_R[slots, None] + arrived_E[experts]
        gain = (s.cost_R - loss_R)[slots, None] + gain_E[experts]
        allowed = allowed & may_go_R[slots, None] & once_E[experts] & (load < s.limit)
        gain = np.where(allowed, gain - _cost(load, s.target), -np.inf)
        row, column = np.unravel_index(gain.argmax(), gain.shape)
        return gain[row, column], [int(slots[row])], [int(experts[column])]

    gone = best(s.own, np.arange(num_experts), ~s.is_own_E)
    slots = np.flatnonzero(may_go_R)
    come = best(slots, s.slot_R[s.own], ~s.held_SR[:, slots].T) if len(slots) else gone
    return max(gone, come, key=lambda option: option[0])


def aligned(slot_R: np.ndarray, previous_R: np.ndarray, num_devices: int) -> np.ndarray:
    """Returns the packing on devices and slots where most of it is already."""
    slot_R = matched(slot_R, previous_R, num_devices)
    rows = zip(
        slot_R.reshape(num_devices, -1).tolist(),
        previous_R.reshape(num_devices, -1).tolist(),
        strict=True,
    )
    return np.concatenate([_in_place(wanted, there) for wanted, there in rows])


def matched(slot_R: np.ndarray, previous_R: np.ndarray, blocks: int) -> np.ndarray:
    """Returns the slots with equal blocks of them where they have most in common."""
    most = max(slot_R.max(), previous_R.max()) + 1
    held_BE = [_holds(slots, blocks, most) for slots in (previous_R, slot_R)]
    _, block_B = linear_sum_assignment(held_BE[0] @ held_BE[1].T, maximize=True)
    return slot_R.reshape(blocks, -1)[block_B].ravel()


def _holds(slot_R: np.ndarray, blocks: int, num_experts: int) -> np.ndarray:
    held_BE = np.zeros((blocks, num_experts))
    held_BE[np.repeat(np.arange(blocks), len(slot_R) // blocks), slot_R] = 1
    return held_BE


def _in_place(wanted: list[int], there: list[int]) -> np.ndarray:
    """Returns the experts `wanted` of a device, as far as it goes where they are."""
    left, slots = list(wanted), []
    for expert in there:
        slots.append(expert if expert in left else EMPTY)
        if expert in left:
            left.remove(expert)
    return np.array([left.pop(0) if s == EMPTY else s for s in slots])
