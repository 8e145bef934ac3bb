"""Experts in several places, and the way from one placement to another, step by step.

A server moves experts while it answers, a few at a time: between two *steps* of the way
every expert is somewhere, and tokens find it. In a step a device gets at most one
expert's weights, and they overwrite those of a copy that isn't needed any more, or of
an expert that another device gets in the same step. So no device holds more than it
has places for, and one that comes.

Who overwrites whom is found by following what a device would lose: the last copy of an
expert must come to a device that wants it, which must give up a place for it, and so
on, until one gives up what exists elsewhere, or the first is met again.

This is planning, on the host: deterministic. Of one layer.

Shapes: R place, P device, E expert.
"""

import collections
from typing import NamedTuple

import numpy as np


class CopyStep(NamedTuple):
    """One step: int32 [P] places of what each device gets, and where it puts it.

    All are read before any is written; R where a device gets nothing. expert_R: the
    experts in all places, behind the step.
    """

    source_P: np.ndarray
    target_P: np.ndarray
    expert_R: np.ndarray


class _Left(NamedTuple):
    """What is still to be done: by device, experts to get and places to give up.

    count: how many copies of each expert there are behind the steps so far.
    """

    wanted: list[list[int]]
    places: list[list[int]]
    count: collections.Counter[int]


def steps(expert_R: np.ndarray, wanted_R: np.ndarray, devices: int) -> list[CopyStep]:
    """Returns the way from one placement to another, which may be no step at all.

    What stays on its device keeps its place; so devices end with the experts that are
    wanted, at whatever place.

    Raises:
      ValueError: the placements are of different experts or sizes, or their places
        don't divide over the devices.
    """
    _check(expert_R, wanted_R, devices)
    held_R, size = expert_R.copy(), len(expert_R) // devices
    left = _to_do(expert_R, wanted_R, devices)
    found = []
    while any(left.wanted):
        gets = _one_each(held_R, left)
        source_P, target_P = np.full((2, devices), len(held_R), np.int32)
        sent = collections.Counter()
        for device, (expert, place) in gets.items():
            sources = np.flatnonzero(held_R == expert).tolist()
            source_P[device] = min(sources, key=lambda at: (sent[at // size], at))
            sent[int(source_P[device]) // size] += 1
            target_P[device] = place
        for device, (expert, place) in gets.items():
            held_R[place] = expert
            left.wanted[device].remove(expert)
            left.places[device].remove(place)
        found.append(CopyStep(source_P, target_P, held_R.copy()))
    return found


def _to_do(expert_R: np.ndarray, wanted_R: np.ndarray, devices: int) -> _Left:
    wanted, places = [], []
    size = len(expert_R) // devices
    for first in range(0, len(expert_R), size):
        own = slice(first, first + size)
        comes = collections.Counter(wanted_R[own].tolist())
        gives = []
        for place, expert in enumerate(expert_R[own].tolist(), start=first):
            if comes[expert]:
                comes[expert] -= 1
            else:
                gives.append(place)
        wanted.append(sorted(comes.elements()))
        places.append(gives)
    return _Left(wanted, places, collections.Counter(expert_R.tolist()))


def _one_each(held_R: np.ndarray, left: _Left) -> dict[int, tuple[int, int]]:
    """Returns the expert that devices get next, and the place that it takes."""
    gets: dict[int, tuple[int, int]] = {}
    for device, wanted in enumerate(left.wanted):
        if not wanted or device in gets:
            continue
        way = _way(device, held_R, left, gets)
        for expert, place in way.values():
            left.count[expert] += 1
            left.count[int(held_R[place])] -= 1
        gets |= way
    return gets


def _way(
    first: int, held_R: np.ndarray, left: _Left, taken: dict[int, tuple[int, int]]
) -> dict[int, tuple[int, int]]:
    """Returns devices that get experts together, from `first` on; nobody if not now."""
    device, expert = first, left.wanted[first][0]
    way: dict[int, tuple[int, int]] = {}
    while True:
        last_copies = []
        for place in left.places[device]:
            lost = int(held_R[place])
            if left.count[lost] > 1:
                way[device] = expert, place
                return way
            last_copies.append((lost, place))
        following = (
            (lost, place, other)
            for lost, place in last_copies
            for other, wanted in enumerate(left.wanted)
            if lost in wanted and other not in taken
        )
        lost, place, other = next(following, (-1, -1, -1))
        if other < 0:
            return {}
        way[device] = expert, place
        if other in way:  # it gets this one; who came before isn't part of the circle
            circle = list(way)[list(way).index(other) :]
            way[other] = lost, way[other][1]
            return {device: way[device] for device in circle}
        device, expert = other, lost


def _check(expert_R: np.ndarray, wanted_R: np.ndarray, devices: int) -> None:
    if len(expert_R) != len(wanted_R) or set(expert_R) != set(wanted_R):
        raise ValueError(
            f"A placement of {len(set(wanted_R))} experts in {len(wanted_R)} places is "
            f"no other one of {len(set(expert_R))} experts in {len(expert_R)} places."
        )
    if len(expert_R) % devices:
        raise ValueError(
            f"{len(expert_R)} places must divide over {devices} devices, evenly."
        )
