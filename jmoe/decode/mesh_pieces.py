"""Pieces of a decoder's weights, and how they come from a disk to a mesh.

Each process reads what its own devices compute with (`jmoe.checkpoint.unread`): of a
pipeline its ranks' layers, of experts those in its places, of other matrices a part.

Shapes: X rank of the pipeline, R place of an expert.
"""

import concurrent.futures
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jmoe.checkpoint import unread
from jmoe.checkpoint.unread import Leaves, Slices
from jmoe.decode.weights import PARAMS, ROUTER_STATE, LayerPlace
from jmoe.nn.parameter import Parameter

THREADS = 4


class WeightPiece(NamedTuple):
    """Some of the parameters: what they are, and their specs as they are computed with.

    has_ranks: whether each rank of the pipeline has its own, by the first dimension.
    state: the spec of all arrays of the router's state.
    """

    records: Any
    specs: Any
    has_ranks: bool
    state: PartitionSpec


class _Source(NamedTuple):
    """A leaf's path, and of a stack's the layer that is meant, as a slice."""

    path: str
    lead: Slices


class Disk:
    """Reads pieces to a mesh, several experts of a device's at once."""

    def __init__(self, mesh: Mesh, leaves: Leaves, pool: concurrent.futures.Executor):
        self._mesh, self._leaves, self._pool = mesh, leaves, pool

    def layers(
        self,
        piece: WeightPiece,
        places: Sequence[LayerPlace | None],
        expert_XR: np.ndarray | None = None,
    ) -> Any:
        """Returns the collections of a layer, or those of one of each rank.

        Args:
          places: of the layers; None: a rank has none, and gets zeros.
          expert_XR: the expert in each place; None: they are in order.
        """

        def read(path: Any, record: Parameter, spec: PartitionSpec) -> jax.Array:
            sources = [_source(PARAMS, place, _name(path)) for place in places]
            experts = expert_XR if record.of_experts else None
            return self._array(piece, spec, sources, record.of_experts, experts)

        params = jax.tree.map_with_path(read, piece.records, piece.specs)
        some = next(filter(None, places))
        head, state = f"{ROUTER_STATE}/{some.name}/", {}
        for path in self._leaves.leaves:
            if path.startswith(head):
                name = path.removeprefix(head)
                sources = [_source(ROUTER_STATE, place, name) for place in places]
                _set(state, name, self._array(piece, piece.state, sources))
        return {PARAMS: params, ROUTER_STATE: state}

    def params(self, piece: WeightPiece) -> Any:
        """Returns parameters that aren't layers'."""

        def read(path: Any, _: Parameter, spec: PartitionSpec) -> jax.Array:
            return self._array(piece, spec, [_Source(f"{PARAMS}/{_name(path)}", ())])

        return jax.tree.map_with_path(read, piece.records, piece.specs)

    def _array(
        self,
        piece: WeightPiece,
        spec: PartitionSpec,
        sources: Sequence[_Source | None],
        of_experts: bool = False,
        expert_XR: np.ndarray | None = None,
    ) -> jax.Array:
        """Returns one array on the mesh, of each rank's source if there are ranks."""
        path, lead = next(filter(None, sources))
        dtype, shape = self._leaves.leaves[path].dtype, self._leaves.leaves[path].shape
        shape = shape[len(lead) :]
        if of_experts:
            expert_XR = _in_order(len(sources), shape[0], expert_XR)
            shape = (expert_XR.shape[1], *shape[1:])

        def read(index: Slices) -> np.ndarray:
            ranks, inner = slice(0, 1), index
            if piece.has_ranks:
                ranks, *inner = index
            sizes = [part.stop - part.start for part in (ranks, *inner)]
            out = np.zeros(sizes, dtype)
            for own, rank in zip(out, range(ranks.start, ranks.stop), strict=True):
                source = sources[rank]
                if source is None:
                    continue
                if expert_XR is None:
                    self._fill(own, source, tuple(inner))
                else:
                    experts = expert_XR[rank][inner[0]]
                    self._fill_experts(own, source, experts, tuple(inner[1:]))
            return out if piece.has_ranks else out[0]

        if piece.has_ranks:
            shape = (len(sources), *shape)
        return unread.put(shape, dtype, NamedSharding(self._mesh, spec), read)

    def _fill(self, out: np.ndarray, source: _Source, index: Slices) -> None:
        path, lead = source
        out = out[None] if lead else out
        self._leaves.fill(out, path, (*lead, *index))

    def _fill_experts(
        self, out: np.ndarray, source: _Source, experts: np.ndarray, index: Slices
    ) -> None:
        def fill(at: int, expert: int) -> None:
            own = slice(expert, expert + 1), *index
            self._fill(out[at : at + 1], source, own)

        list(self._pool.map(fill, itertools.count(), experts.tolist()))


def _in_order(ranks: int, count: int, expert_XR: np.ndarray | None) -> np.ndarray:
    """Returns the expert in each place, also where all are in order."""
    if expert_XR is not None:
        return expert_XR
    return np.broadcast_to(np.arange(count), (ranks, count))


def _source(collection: str, place: LayerPlace | None, name: str) -> _Source | None:
    if place is None:
        return None
    lead = () if place.index is None else (slice(place.index, place.index + 1),)
    return _Source(f"{collection}/{place.name}/{name}", lead)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _set(tree: dict[str, Any], name: str, value: Any) -> None:
    """Sets tree["a"]["b"] of the name "a/b"."""
    *parents, last = name.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = value
