"""DeepSeek's rule for placing experts, the way they published it.

As github.com/deepseek-ai/EPLB describes it, with DeepSeek-V3 (arXiv 2412.19437, section
3.4): groups of experts are packed on nodes, a node's experts replicated, and the
replicas packed on its devices; where nodes don't divide the groups, all experts are one
group on one node. It is written for one layer and to be read, not to be fast.
"""

from collections.abc import Sequence

import numpy as np


def rule(
    load_E: Sequence[float],
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_devices: int,
) -> np.ndarray:
    """Returns the expert in each slot, int64 [num_replicas]."""
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    size = len(load_E) // num_groups
    group_loads = [sum(load_E[g * size : (g + 1) * size]) for g in range(num_groups)]
    slots = []
    for groups in _pack(group_loads, num_nodes):
        experts = [group * size + i for group in groups for i in range(size)]
        held = _replicate([load_E[e] for e in experts], num_replicas // num_nodes)
        shares = [load_E[experts[e]] / held.count(e) for e in held]
        for device in _pack(shares, num_devices // num_nodes):
            slots += [experts[held[replica]] for replica in device]
    return np.array(slots)


def _pack(loads: Sequence[float], packs: int) -> list[list[int]]:
    """Puts equally many in each pack: the largest next where there is least so far."""
    room = len(loads) // packs
    packed, total = [[] for _ in range(packs)], [0.0] * packs
    for index in sorted(range(len(loads)), key=lambda i: -loads[i]):
        open_packs = [p for p in range(packs) if len(packed[p]) < room]
        least = min(open_packs, key=lambda p: total[p])
        packed[least].append(index)
        total[least] += loads[index]
    return packed


def _replicate(loads: Sequence[float], num_replicas: int) -> list[int]:
    """Gives each next replica to the expert with the largest load per replica."""
    held, count = list(range(len(loads))), [1] * len(loads)
    while len(held) < num_replicas:
        most = max(range(len(loads)), key=lambda e: loads[e] / count[e])
        held.append(most)
        count[most] += 1
    return held
