"""Where experts live: which devices hold one, and which hold copies of busy ones.

Tokens that choose an expert are split evenly over its replicas. With w_e the load of
expert e and c_e >= 1 its replicas, a device that holds the experts of its S slots has
the load

    sum over its slots of  w_e / c_e

and a layer takes as long as its busiest device. `place` looks for replica counts and
slots that make the busiest device's load small: the problem that DeepSeek's EPLB solves
(DeepSeek-V3, arXiv 2412.19437, section 3.4; github.com/deepseek-ai/EPLB). Its rule is
greedy: the next replica goes to the expert with the largest load per replica, then the
largest replica to the least loaded device that has room. Here it is where a search
starts that never makes the busiest device busier (`packing`). So a placement is never
less balanced than the rule's.

With several groups of experts (node-limited routing) all experts of a group live on one
node: groups are packed on nodes, and each node's experts on its devices.

Weights that move cost time. Given the previous placement, the search starts there
instead, stops as soon as the balance is good enough, and prefers what changes few
slots.

This is planning, on the host: NumPy, float64, deterministic. Layers are independent.
Devices of a node are consecutive, as are slots of a device and experts of a group.

Dimensions: L layers, E experts, R replicas (and so slots), G groups, N nodes that
groups are packed on, D devices.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jmoe.balance import packing

_REGROUPINGS = 4  # tried, of a layer's groups on nodes
_CHANGES = 128  # from scratch, one by one: more gain little and take long


class Placement(NamedTuple):
    """The expert that each slot holds, and the slots of each expert; int32.

    physical_to_logical: [L, R], the expert in each slot; a device's slots are
      consecutive.
    logical_to_physical: [L, E, R - E + 1], the slots of each expert, ascending; -1
      beyond its `replica_count`. The last dimension is the most replicas that an expert
      can have, so that no shape depends on the load.
    replica_count: [L, E], at least 1; a layer's add up to R.
    """

    physical_to_logical: np.ndarray
    logical_to_physical: np.ndarray
    replica_count: np.ndarray


class _Sizes(NamedTuple):
    """A layer's numbers; `nodes` is 1 where experts may live on any."""

    experts: int
    replicas: int
    groups: int
    nodes: int
    devices: int

    @property
    def node_devices(self) -> int:
        return self.devices // self.nodes

    @property
    def most(self) -> int:
        """The replicas that an expert may have, so that no device needs two of them."""
        return max(self.node_devices, -(-self.replicas // self.experts))


def place(
    load_LE: ArrayLike,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_devices: int,
    previous: Placement | None = None,
    *,
    tolerance: float = 1.05,
) -> Placement:
    """Returns a placement whose busiest device has little more than the mean load.

    Without `previous` it is made from scratch: no device is busier than the busiest
    is by DeepSeek's rule, and no device holds two replicas of an expert, unless the
    rule is better balanced for that or there are more replicas than there can be.

    With `previous`, a layer changes only where its busiest device has more than
    `tolerance` times what it would have from scratch, and then until it has not.

    A layer without any load stays as it is, or counts as one whose experts are equally
    busy; experts without load share what replicas the others don't need.

    Args:
      load_LE: what each expert has to do, in any unit: counts, or a `forecast`.
      num_replicas: slots of a layer; equally many for each device.
      num_groups: of experts, each of which stays on one node; 1: experts live anywhere.
      num_nodes: equally many devices and groups each.
      num_devices: of all nodes.
      previous: of the same sizes.
      tolerance: at least 1.

    Raises:
      ValueError: a load is negative or not finite, a size doesn't divide what it must,
      there are fewer replicas than experts, or `previous` is of other sizes.
    """
    load_LE = checked_load("load_LE", load_LE, 2)
    num_layers, num_experts = load_LE.shape
    _check_sizes(num_experts, num_replicas, num_groups, num_nodes, num_devices)
    if not 1 <= tolerance < math.inf:
        raise ValueError(f"tolerance={tolerance} must be at least 1 and finite.")
    nodes = num_nodes if num_groups > 1 else 1
    sizes = _Sizes(num_experts, num_replicas, num_groups, nodes, num_devices)
    if previous is None:
        slots = [_from_scratch(_weights(load_E), sizes) for load_E in load_LE]
    else:
        slots = list(_checked_slots(previous, num_layers, sizes))
        for layer in np.flatnonzero(load_LE.any(-1)):
            weight_E = _weights(load_LE[layer])
            slots[layer] = _from_previous(weight_E, slots[layer], tolerance, sizes)
    return from_slots(np.stack(slots), num_experts)


def device_load(
    load_LE: ArrayLike, placement: Placement, num_devices: int
) -> np.ndarray:
    """Returns what each device has to do, float64 [L, D], in the unit of `load_LE`."""
    share_LE = np.asarray(load_LE, np.float64) / placement.replica_count
    share_LR = np.take_along_axis(share_LE, placement.physical_to_logical, 1)
    return share_LR.reshape(len(share_LR), num_devices, -1).sum(-1)


def moves(previous: Placement, new: Placement) -> np.ndarray:
    """Returns which slots hold another expert than before, bool [L, R]."""
    return previous.physical_to_logical != new.physical_to_logical


def _weights(load_E: np.ndarray) -> np.ndarray:
    """Returns loads relative to a power of two near their maximum, all above 0.

    Dividing by a power of two is exact. Experts without load get too little to matter
    for any balance, which is enough to be told apart by how many replicas they have;
    where none has any, all get the same.
    """
    if not load_E.any():
        return np.ones(len(load_E))
    _, exponent = np.frexp(load_E.max())
    weight_E = np.ldexp(load_E, -exponent)
    return np.maximum(weight_E, 1e-15)


def _from_scratch(weight_E: np.ndarray, sizes: _Sizes) -> np.ndarray:
    """Returns the slots [R] of one layer, at least as balanced as the rule's."""
    devices = sizes.node_devices
    target = weight_E.sum() / sizes.devices

    def by_rule(weight_E: np.ndarray, slot_R: np.ndarray) -> np.ndarray:
        return packing.fill(weight_E, slot_R, devices, most=len(slot_R))

    def apart(weight_E: np.ndarray, slot_R: np.ndarray) -> np.ndarray:
        slot_R = packing.fill(weight_E, slot_R, devices, sizes.most)
        return packing.separate(weight_E, slot_R, devices)

    def searched(weight_E: np.ndarray, slot_R: np.ndarray) -> np.ndarray:
        slot_R = packing.exchange(weight_E, slot_R, devices, target)
        return packing.improve(weight_E, slot_R, devices, target, _CHANGES)

    def busiest(slot_R: np.ndarray) -> float:
        return _busiest(weight_E, slot_R, sizes)

    weight_G = weight_E.reshape(sizes.groups, -1).sum(1)
    no_group_G = np.full(sizes.groups, packing.EMPTY)
    group_G = packing.fill(weight_G, no_group_G, sizes.nodes, most=1)
    even_G = packing.improve(weight_G, group_G, sizes.nodes, target * devices, _CHANGES)
    empty_R = np.full(sizes.replicas, packing.EMPTY)
    rule_R = _on_nodes(by_rule, weight_E, empty_R, group_G, sizes)
    apart_R = _on_nodes(apart, weight_E, empty_R, even_G, sizes)
    options = [_on_nodes(searched, weight_E, apart_R, even_G, sizes)]
    if not np.array_equal(apart_R, rule_R):
        options.append(_on_nodes(searched, weight_E, rule_R, group_G, sizes))
    for group_G in _other_groups(weight_E, min(options, key=busiest), sizes):
        other_R = _on_nodes(apart, weight_E, empty_R, group_G, sizes)
        options.append(_on_nodes(searched, weight_E, other_R, group_G, sizes))
    bound = busiest(rule_R)

    def badness(slot_R: np.ndarray) -> tuple[bool, int, float]:
        repeats = packing.repeats(slot_R, sizes.devices).sum()
        return busiest(slot_R) > bound, repeats, busiest(slot_R)

    return min(options, key=badness)


def _other_groups(
    weight_E: np.ndarray, slot_R: np.ndarray, sizes: _Sizes
) -> list[np.ndarray]:
    """Returns the most even ways to swap a group of the busiest node with another's.

    They are few, and only such that can make the busiest device less busy.
    """
    load_ND = packing.device_load(weight_E, slot_R, sizes.devices)
    load_ND = load_ND.reshape(sizes.nodes, -1)
    node, load_N = load_ND.max(1).argmax(), load_ND.sum(1)
    group_NX = _groups(slot_R, sizes).reshape(sizes.nodes, -1)
    weight_G = weight_E.reshape(sizes.groups, -1).sum(1)
    ways = []
    for own in range(group_NX.shape[1]):
        for other, group in np.ndindex(group_NX.shape):
            less = weight_G[group_NX[node, own]] - weight_G[group_NX[other, group]]
            after = max(load_N[node] - less, load_N[other] + less)
            if other != node and after < load_ND.max() * sizes.node_devices:
                ways.append((after, own, other, group))
    found = []
    for _, own, other, group in sorted(ways)[:_REGROUPINGS]:
        swapped_NX = group_NX.copy()
        swapped_NX[node, own] = group_NX[other, group]
        swapped_NX[other, group] = group_NX[node, own]
        found.append(swapped_NX.ravel())
    return found


def _from_previous(
    weight_E: np.ndarray, previous_R: np.ndarray, tolerance: float, sizes: _Sizes
) -> np.ndarray:
    """Returns the slots [R] of one layer, with few of the previous ones changed.

    Where the search from these ends above what is allowed, they are those from scratch,
    on the devices that hold most of them.
    """
    tolerance *= 1 + packing.ROUNDING
    devices, mean = sizes.node_devices, weight_E.sum() / sizes.devices
    if _busiest(weight_E, previous_R, sizes) <= tolerance * mean:
        return previous_R  # no placement reaches less than the mean
    scratch_R = _from_scratch(weight_E, sizes)
    allowed = tolerance * _busiest(weight_E, scratch_R, sizes)

    def searched(weight_E: np.ndarray, slot_R: np.ndarray) -> np.ndarray:
        if (slot_R == packing.EMPTY).any():  # left by groups that go to other nodes
            slot_R = packing.fill(weight_E, slot_R, devices, sizes.most)
            slot_R = packing.separate(weight_E, slot_R, devices)
        return packing.improve(weight_E, slot_R, devices, allowed, len(slot_R))

    weight_G = weight_E.reshape(sizes.groups, -1).sum(1)
    group_G = packing.improve(
        *(weight_G, _groups(previous_R, sizes), sizes.nodes),
        *(allowed * devices, _CHANGES),
    )
    near_R = _on_nodes(searched, weight_E, previous_R, group_G, sizes)
    if _busiest(weight_E, near_R, sizes) <= allowed:
        return near_R
    scratch_R = packing.matched(scratch_R, previous_R, sizes.nodes)
    pairs = zip(
        np.split(scratch_R, sizes.nodes),
        np.split(previous_R, sizes.nodes),
        strict=True,
    )
    return np.concatenate([packing.aligned(new, old, devices) for new, old in pairs])


def _on_nodes(
    pack: Callable[[np.ndarray, np.ndarray], np.ndarray],
    weight_E: np.ndarray,
    slot_R: np.ndarray,
    group_G: np.ndarray,
    sizes: _Sizes,
) -> np.ndarray:
    """Applies `pack` to the weights and slots of each node.

    There, experts are numbered within the node, and those of other nodes' groups are
    gone. `group_G` are the groups of one node after the other.
    """
    expert_GM = np.arange(sizes.experts).reshape(sizes.groups, -1)
    packed = []
    for groups, slots in zip(
        np.split(group_G, sizes.nodes), np.split(slot_R, sizes.nodes), strict=True
    ):
        here = expert_GM[groups].ravel()
        index_E = np.full(sizes.experts, packing.EMPTY)
        index_E[here] = np.arange(len(here))
        slots = np.where(slots == packing.EMPTY, packing.EMPTY, index_E[slots])
        packed.append(here[pack(weight_E[here], slots)])
    return np.concatenate(packed)


def _groups(slot_R: np.ndarray, sizes: _Sizes) -> np.ndarray:
    """Returns the groups of one node after the other."""
    group_NS = (slot_R // (sizes.experts // sizes.groups)).reshape(sizes.nodes, -1)
    return np.concatenate([np.unique(group_S) for group_S in group_NS])


def _busiest(weight_E: np.ndarray, slot_R: np.ndarray, sizes: _Sizes) -> float:
    return packing.device_load(weight_E, slot_R, sizes.devices).max()


def from_slots(slot_LR: np.ndarray, num_experts: int) -> Placement:
    """Returns the placement with these experts in its slots, and its other maps."""
    num_layers, num_replicas = slot_LR.shape
    layer_L1 = np.arange(num_layers)[:, None]
    count_LE = np.zeros((num_layers, num_experts), np.int64)
    np.add.at(count_LE, (layer_L1, slot_LR), 1)
    order_LR = np.argsort(slot_LR, axis=1, kind="stable")
    expert_LR = np.take_along_axis(slot_LR, order_LR, 1)
    first_LE = np.cumsum(count_LE, axis=1) - count_LE
    rank_LR = np.arange(num_replicas) - np.take_along_axis(first_LE, expert_LR, 1)
    most = num_replicas - num_experts + 1
    slots_LEC = np.full((num_layers, num_experts, most), -1)
    slots_LEC[layer_L1, expert_LR, rank_LR] = order_LR
    return Placement(*(x.astype(np.int32) for x in (slot_LR, slots_LEC, count_LE)))


def checked_load(name: str, load: ArrayLike, dims: int) -> np.ndarray:
    """Returns a load as float64; ValueError if it is none or has other dimensions."""
    load = np.asarray(load, np.float64)
    if load.ndim != dims or not load.size:
        raise ValueError(
            f"{name} has the shape {load.shape}, but must have {dims} dimensions, none "
            "of them 0."
        )
    wrong = load[~((load >= 0) & (load < np.inf))]
    if wrong.size:
        raise ValueError(f"{name} has {wrong[0]}; loads are at least 0 and finite.")
    return load


def _check_sizes(
    num_experts: int,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_devices: int,
) -> None:
    given = {
        "num_replicas": num_replicas,
        "num_groups": num_groups,
        "num_nodes": num_nodes,
        "num_devices": num_devices,
    }
    for name, value in given.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    if num_replicas < num_experts:
        raise ValueError(
            f"num_replicas={num_replicas} must be at least the {num_experts} experts "
            "of load_LE: each needs a slot."
        )
    given["experts of load_LE"] = num_experts
    for whole, part in (
        ("num_replicas", "num_devices"),
        ("num_devices", "num_nodes"),
        ("experts of load_LE", "num_groups"),
    ):
        if given[whole] % given[part]:
            raise ValueError(
                f"{part}={given[part]} must divide {whole}={given[whole]}."
            )
    if num_groups > 1 and num_groups % num_nodes:
        raise ValueError(
            f"num_groups={num_groups} must be a multiple of num_nodes={num_nodes}, as "
            "a group stays on one node; or 1, and experts live anywhere."
        )


def _checked_slots(previous: Placement, num_layers: int, sizes: _Sizes) -> np.ndarray:
    """Returns `previous.physical_to_logical` as int64."""
    slot_LR = np.asarray(previous.physical_to_logical, np.int64)
    given = slot_LR.shape, np.shape(previous.replica_count)
    wanted = (num_layers, sizes.replicas), (num_layers, sizes.experts)
    if given != wanted:
        raise ValueError(
            f"previous has physical_to_logical of the shape {given[0]} and "
            f"replica_count of {given[1]}, but {wanted[0]} and {wanted[1]} are wanted: "
            "it is of other layers, experts or num_replicas."
        )
    everyone = np.arange(sizes.experts)
    for layer, slot_R in enumerate(slot_LR):
        if not np.array_equal(np.unique(slot_R), everyone):
            raise ValueError(
                f"previous doesn't have each of the {sizes.experts} experts in layer "
                f"{layer}, and no others."
            )
        if len(_groups(slot_R, sizes)) != sizes.groups:
            raise ValueError(
                f"previous has a group of experts on several nodes in layer {layer}: "
                f"it isn't of num_groups={sizes.groups}, num_nodes={sizes.nodes}."
            )
    return slot_LR
