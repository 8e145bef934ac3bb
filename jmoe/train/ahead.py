"""How far the host runs ahead of its devices."""

import collections
from typing import Any

import jax


class Ahead:
    """Waits for an older computation when too many are under way.

    A few that wait keep a device busy. More gain nothing, and XLA's client of several
    virtual CPU devices can't have more than 32: the thread that starts the next one
    then holds a place in the pool that the devices' own work needs, and devices wait
    for one that never comes to their collective (seen in jaxlib 0.10.2).

    Args:
      most: how many may be under way.
    """

    def __init__(self, most: int = 4):
        self._most = most
        self._results: collections.deque[Any] = collections.deque()

    def add(self, result: Any) -> None:
        """Takes what a computation that was just dispatched returns (a tree)."""
        self._results.append(result)
        if len(self._results) > self._most:
            jax.block_until_ready(self._results.popleft())
