"""Homes of experts, and how they move from one assignment to the next.

Each device has as many experts as any other, at *places* that are numbered through all
devices: with P devices, place h is device h * P / E's. An expert's *home* is the place
where its weights are. At first, expert e's is place e. Between two steps experts may
get other homes, so that devices have to do alike: the same problem as that of replicas
(`jmoe.balance.placement`), with one replica of each.

Weights then move in *rounds*. In a round, a device gives away at most one expert, and
gets one for it, at the same place: moves from device to device are so many in as out,
and so divide into sets in which each device has one each way (D. König, 1916; Birkhoff,
1946). So nothing but an expert's weights ever waits on a device, and there are as many
rounds as the busiest device has experts to give away. What has to be at another place
of its device changes places there, after that.

This is planning, on the host: NumPy, deterministic. Layers are independent.

Shapes: T window of time, L layer, E expert or place, P device, R round.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from jmoe.balance import placement
from jmoe.balance.forecast import forecast
from jmoe.config import RouterConfig


class Moves(NamedTuple):
    """The way of all experts from their homes to others; int32.

    rounds_L: of a layer, at most E / P. from_LRP, to_LRP: the places that a round's
      p-th expert leaves and gets; E where there are fewer.
    sorts_L: 1 if experts then change places within devices. source_LE: for each place,
      the one that its expert comes from.
    """

    rounds_L: np.ndarray
    from_LRP: np.ndarray
    to_LRP: np.ndarray
    sorts_L: np.ndarray
    source_LE: np.ndarray


class Reassigned(NamedTuple):
    """New homes, int32 [L, E], and of each layer what they change.

    moved_L: experts that get another device. before_L, after_L: by how much the busiest
      device exceeds the mean, relative to it, of the load that is expected.
    """

    home_LE: np.ndarray
    moved_L: np.ndarray
    before_L: np.ndarray
    after_L: np.ndarray


def in_order(num_layers: int, num_experts: int) -> np.ndarray:
    """Returns the homes that experts have at first, int32 [L, E]."""
    return np.tile(np.arange(num_experts, dtype=np.int32), (num_layers, 1))


def keeping_groups(
    router: RouterConfig, devices: int, places: int | None = None
) -> RouterConfig:
    """Returns the router as the devices' places tell of it, wherever experts live.

    Where a token may choose from few groups only, groups stay on *nodes*: as many parts
    of the devices as divide devices and groups evenly. A token then visits few nodes,
    and more is not known of its choices. So a node's places are a group here.

    Args:
      places: None: one for each expert.
    """
    limit = router.most_groups
    nodes = math.gcd(router.num_groups, devices) if limit < router.num_groups else 1
    return dataclasses.replace(
        router,
        num_experts=router.num_experts if places is None else places,
        num_groups=nodes,
        groups_per_token=min(limit, nodes),
    )


def num_places(home: jax.Array) -> int:
    """Returns how many places there are, for homes [E], or those of copies [E, C].

    With R places, an expert has at most R - E + 1 copies. That is C: so no shape
    depends on which expert has how many.
    """
    most = 1 if home.ndim == 1 else home.shape[1]
    return len(home) + most - 1


def of_choices(
    expert_NK: jax.Array, home: jax.Array, first: jax.Array | int = 0
) -> jax.Array:
    """Returns the homes of chosen experts; E, nobody, becomes the number of places.

    Where an expert has copies (`jmoe.balance.copies`), tokens take turns.

    Args:
      home: int32 [E], or [E, C], the places of each expert's copies, -1 beyond.
      first: the number of the first token, by which it takes its turn.
    """
    nobody = num_places(home)
    if home.ndim == 1:
        return jnp.append(home, nobody)[expert_NK]
    home_EC = jnp.pad(home, ((0, 1), (0, 0)), constant_values=nobody)
    count_E = (home_EC >= 0).sum(-1)
    turn_N = first + jnp.arange(len(expert_NK))
    return home_EC[expert_NK, turn_N[:, None] % count_E[expert_NK]]


def reassign(
    load_TLE: np.ndarray,
    home_LE: np.ndarray,
    router: RouterConfig,
    devices: int,
    above: float,
) -> Reassigned:
    """Returns homes for the load to expect, few of which are other than before.

    A layer whose busiest device has at most `above` more than the mean, relative to it,
    stays as it is, or than the busiest has that a search from scratch finds.

    Args:
      load_TLE: counts in windows of equal length, the last one last.

    Raises:
      ValueError: the experts don't divide over the devices, or as
        `jmoe.balance.placement.place` says.
    """
    load_LE = forecast(load_TLE)
    num_experts = router.num_experts
    nodes = keeping_groups(router, devices).num_groups
    groups = router.num_groups if nodes > 1 else 1
    placed = placement.place(
        *(load_LE, num_experts, groups, nodes, devices),
        placement.Placement(
            np.argsort(home_LE, axis=1), home_LE[..., None], np.ones_like(home_LE)
        ),
        tolerance=1 + above,
    )
    wanted_LE = placed.logical_to_physical[..., 0]
    new_LE = np.stack(
        [
            _in_rounds(home_E, wanted_E, devices).home_E
            for home_E, wanted_E in zip(home_LE, wanted_LE, strict=True)
        ]
    )
    size = num_experts // devices
    return Reassigned(
        new_LE,
        (new_LE // size != home_LE // size).sum(1),
        _violation(load_LE, home_LE, devices),
        _violation(load_LE, new_LE, devices),
    )


def _violation(load_LE: np.ndarray, home_LE: np.ndarray, devices: int) -> np.ndarray:
    at_home_LE = np.zeros_like(load_LE)
    np.put_along_axis(at_home_LE, home_LE, load_LE, 1)
    load_LP = at_home_LE.reshape(len(load_LE), devices, -1).sum(-1)
    mean_L = load_LP.mean(-1)
    return (load_LP.max(-1) - mean_L) / np.where(mean_L > 0, mean_L, 1)


def find_moves(home_LE: np.ndarray, wanted_LE: np.ndarray, devices: int) -> Moves:
    """Returns how experts get from these homes to those, exactly.

    Raises:
      ValueError: homes aren't each place once, or don't divide over the devices.
    """
    num_layers, num_experts = _check(home_LE, wanted_LE, devices)
    most = num_experts // devices
    moves = Moves(
        np.zeros(num_layers, np.int32),
        np.full((num_layers, most, devices), num_experts, np.int32),
        np.full((num_layers, most, devices), num_experts, np.int32),
        np.zeros(num_layers, np.int32),
        in_order(num_layers, num_experts),
    )
    for layer, (home_E, wanted_E) in enumerate(zip(home_LE, wanted_LE, strict=True)):
        moved = _in_rounds(home_E, wanted_E, devices)
        moves.rounds_L[layer] = len(moved.pairs)
        for nth, (from_P, to_P) in enumerate(moved.pairs):
            moves.from_LRP[layer, nth], moves.to_LRP[layer, nth] = from_P, to_P
        moves.sorts_L[layer] = not np.array_equal(moved.home_E, wanted_E)
        moves.source_LE[layer, wanted_E] = moved.home_E
    return moves


class _Moved(NamedTuple):
    """Rounds, and the homes after them."""

    pairs: list[tuple[np.ndarray, np.ndarray]]
    home_E: np.ndarray


def _in_rounds(home_E: np.ndarray, wanted_E: np.ndarray, devices: int) -> _Moved:
    """Moves experts to the devices of their wanted homes, at whatever place."""
    size = len(home_E) // devices
    old_E, new_E = home_E // size, wanted_E // size
    home_E, device_P = home_E.copy(), np.arange(devices)
    moving = {pair: [] for pair in np.ndindex(devices, devices)}
    left_PP = np.zeros((devices, devices), np.int64)
    for expert in np.flatnonzero(old_E != new_E):
        moving[old_E[expert], new_E[expert]].append(expert)
        left_PP[old_E[expert], new_E[expert]] += 1
    rounds = left_PP.sum(1).max()
    left_PP[device_P, device_P] = rounds - left_PP.sum(1)  # stay, in so many of them
    pairs = []
    for _ in range(rounds):
        _, goes_P = linear_sum_assignment(left_PP > 0, maximize=True)
        left_PP[device_P, goes_P] -= 1
        from_P, to_P = np.full((2, devices), len(home_E), np.int32)
        leaving = {p: moving[p, goes_P[p]].pop() for p in device_P if goes_P[p] != p}
        for device, expert in leaving.items():
            from_P[device] = home_E[expert]
            to_P[device] = home_E[leaving[goes_P[device]]]
        for device, expert in leaving.items():
            home_E[expert] = to_P[device]
        pairs.append((from_P, to_P))
    return _Moved(pairs, home_E)


def _check(home_LE: np.ndarray, wanted_LE: np.ndarray, devices: int) -> tuple[int, int]:
    num_layers, num_experts = home_LE.shape
    if num_experts % devices:
        raise ValueError(
            f"{num_experts} experts must divide over {devices} devices, evenly."
        )
    for name, places_LE in (("home_LE", home_LE), ("wanted_LE", wanted_LE)):
        if not np.array_equal(np.sort(places_LE, 1), in_order(num_layers, num_experts)):
            raise ValueError(
                f"{name} must have each of the {num_experts} places once in each of "
                f"{num_layers} layers."
            )
    return num_layers, num_experts
