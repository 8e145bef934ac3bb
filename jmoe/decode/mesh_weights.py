"""A decoder's weights on a mesh: where they lie, and how they get there.

They lie as a model computes with them: divided by the rules of their dimensions
(`jmoe.parallel.rules`), not by ZeRO. A pipeline's ranks have layers of their own: a row
of layers, one of each rank, is one tree of arrays with the rank as first dimension. A
rank that has no layer for a row has zeros, and no use for what it computes with them.

Where experts are placed (`jmoe.decode.placing`), a layer has weights for each place,
and in its router state the places of each expert.

Shapes: X rank of the pipeline, L MoE layer, E expert, C copy of one, R place.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jmoe.balance.placement import Placement
from jmoe.checkpoint.unread import Unread
from jmoe.config import ModelConfig
from jmoe.config.model import FeedForwardConfig
from jmoe.decode.mesh_pieces import THREADS, Disk, WeightPiece
from jmoe.decode.weights import (
    MTP,
    PARAMS,
    ROUTER_STATE,
    LayerPlace,
    Weights,
    assemble,
    ends,
    layer_of,
    places,
)
from jmoe.nn.feed_forwards import FEED_FORWARDS
from jmoe.nn.model import abstract_variables
from jmoe.nn.moe import EXPERTS
from jmoe.nn.parameter import Parameter
from jmoe.nn.quantized import quantize_weight
from jmoe.parallel.partition import partition
from jmoe.train.layout import WHOLE, Layout, lying, on_mesh
from jmoe.train.stages import layer_costs, tail_cost

PIPE = "pipe"


class LayerRow(NamedTuple):
    """Layers that the ranks compute at once; -1, and no place, where one has none."""

    feed_forward: FeedForwardConfig
    numbers: tuple[int, ...]
    places: tuple[LayerPlace | None, ...]

    def moe_layers(self, cfg: ModelConfig) -> tuple[int, ...]:
        """Returns the numbers among the model's MoE layers; -1 for none."""
        return tuple(max(n - cfg.num_dense_layers, -1) for n in self.numbers)


class Experts(NamedTuple):
    """A row's experts: their arrays, by rank and place, and home [X, E, C]."""

    weights: Any
    home: Any


def of_experts(layer: Any) -> Experts:
    """Returns the experts of a row that has them, and their places."""
    name = FEED_FORWARDS["moe"].name
    home = layer[ROUTER_STATE][name][EXPERTS]["home"]
    return Experts(layer[PARAMS][name][EXPERTS], home)


def with_experts(layer: Any, experts: Experts) -> Any:
    """Returns a row with other experts, and places."""
    name = FEED_FORWARDS["moe"].name
    params = layer[PARAMS]
    placed = {**params, name: {**params[name], EXPERTS: experts.weights}}
    return with_state({**layer, PARAMS: placed}, home=experts.home)


def with_state(layer: Any, **values: Any) -> Any:
    """Returns a row whose experts have other values in the router's state."""
    name, state = FEED_FORWARDS["moe"].name, layer[ROUTER_STATE]
    own = state[name].get(EXPERTS, {}) | values
    return {**layer, ROUTER_STATE: {**state, name: {**state[name], EXPERTS: own}}}


def cut(cfg: ModelConfig, ranks: int, length: int) -> tuple[LayerRow, ...]:
    """Returns rows of layers, for ranks whose layers cost about the same.

    Args:
      length: of sequences, by which attention costs.

    Raises:
      ValueError: there are more ranks than layers.
    """
    costs, last = layer_costs(cfg, length), tail_cost(cfg, length)
    bounds = partition(costs, ranks, last=last)
    every, rows = places(cfg), []
    for stack in cfg.stacks.values():
        begin, end = stack.layers.start, stack.layers.stop
        own = [
            [n for n in range(*bounds[rank : rank + 2]) if begin <= n < end]
            for rank in range(ranks)
        ]
        for i in range(max(map(len, own))):
            numbers = tuple(n[i] if i < len(n) else -1 for n in own)
            where = tuple(every[n] if n >= 0 else None for n in numbers)
            rows.append(LayerRow(stack.feed_forward, numbers, where))
    return tuple(rows)


class RowHomes(NamedTuple):
    """Says where a row's experts are: which is in a place, and each one's places."""

    expert_XR: np.ndarray
    home_XEC: np.ndarray


class _Origin(Protocol):
    """What weights are made of.

    layers, ends: return the trees of which `join`, where XLA compiles it, makes one of
    a piece: that of a layer or of one of each rank, and of what is no layer's.
    """

    def layers(
        self,
        piece: WeightPiece,
        own: Sequence[LayerPlace | None],
        homes: RowHomes | None,
    ) -> tuple[Any, ...]: ...

    def ends(self, piece: WeightPiece) -> tuple[Any, ...]: ...

    def join(
        self, piece: WeightPiece, trees: tuple[Any, ...], homes: RowHomes | None
    ) -> Any: ...


class _Held(NamedTuple):
    """Variables as a run's state has them, which move between devices."""

    cfg: ModelConfig
    variables: Any

    def layers(self, piece, own, homes):
        found = [where and layer_of(self.variables, where) for where in own]
        some = next(filter(None, found))
        # Of what a rank doesn't have, it has zeros.
        return tuple(tree or jax.tree.map(jnp.zeros_like, some) for tree in found)

    def ends(self, piece):
        params = {name: self.variables[PARAMS][name] for name in ends(self.cfg)}
        return ({PARAMS: params, ROUTER_STATE: {}},)

    def join(self, piece, trees, homes):
        if not piece.has_ranks:
            return trees[0]
        joined = jax.tree.map(lambda *x: jnp.stack(x), *trees)
        return joined if homes is None else _in_places(piece.records, joined, homes)


class _OnDisk(NamedTuple):
    """Variables that are read to where they are computed with."""

    disk: Disk

    def layers(self, piece, own, homes):
        return (self.disk.layers(piece, own, homes and homes.expert_XR),)

    def ends(self, piece):
        return ({PARAMS: self.disk.params(piece), ROUTER_STATE: {}},)

    def join(self, piece, trees, homes):
        return trees[0] if homes is None else with_state(trees[0], home=homes.home_XEC)


def place(
    cfg: ModelConfig,
    layout: Layout,
    rows: tuple[LayerRow, ...],
    form: str,
    variables: Any,
    placed: Placement | None = None,
) -> Weights:
    """Returns the weights as they lie on the mesh.

    It handles a layer of each rank at a time. XLA may hold an array of these whole on
    each device, while it moves between layouts. Variables that are unread are not
    moved: each process reads what its devices compute with.

    Args:
      form: one of `jmoe.nn.quantized.FORMS`.
      variables: as a run's state has them, or `Unread`.
      placed: where experts are; None: in order, and nothing else is known of them.

    Raises:
      ValueError: what was read isn't whole, or isn't finite.
    """
    given = cfg, layout, rows, form, placed
    if not isinstance(variables, Unread):
        return _place(*given, _Held(cfg, variables))
    with variables.open() as leaves, ThreadPoolExecutor(THREADS) as pool:
        return _place(*given, _OnDisk(Disk(layout.mesh, leaves, pool)))


def _place(
    cfg: ModelConfig,
    layout: Layout,
    rows: tuple[LayerRow, ...],
    form: str,
    placed: Placement | None,
    origin: _Origin,
) -> Weights:
    maker = functools.partial(_maker, cfg, layout, form, origin)
    makers: dict[FeedForwardConfig, Callable[..., Any]] = {}  # rows of a kind are alike
    layers = []
    for row in rows:
        piece, kind = _of_row(layout, row), row.feed_forward
        homes = None
        if placed is not None and kind.kind == "moe":
            numbers = list(row.moe_layers(cfg))
            expert_LR, home_LEC, _ = placed
            homes = RowHomes(expert_LR[numbers], home_LEC[numbers])
        if kind not in makers:
            makers[kind] = maker(piece)
        layers.append(makers[kind](origin.layers(piece, row.places, homes), homes))
    mtp = None
    if cfg.mtp_depth:
        piece = _of_mtp(layout)
        mtp = maker(piece)(origin.layers(piece, (MTP,), None), None)
    piece = _of_ends(cfg, layout)
    found = maker(piece)(origin.ends(piece), None)
    return assemble(found[PARAMS], tuple(layers), mtp)


def with_limit(
    layout: Layout, rows: tuple[LayerRow, ...], weights: Weights, limit: int
) -> Weights:
    """Returns the weights with a limit of each device's choices in a layer.

    It lies as what is compiled for it expects, whatever it is.
    """
    ranks = np.full(layout.mesh.shape[PIPE], limit, np.int32)
    sharding = NamedSharding(layout.mesh, PartitionSpec(PIPE))
    layers = []
    for row, layer in zip(rows, weights.layers, strict=True):
        if row.feed_forward.kind == "moe":
            # An array of each layer's own: what is donated is nobody else's.
            own = jax.make_array_from_callback(ranks.shape, sharding, ranks.__getitem__)
            layer = with_state(layer, limit=own)
        layers.append(layer)
    return weights._replace(layers=tuple(layers))


def abstract(
    cfg: ModelConfig,
    layout: Layout,
    rows: tuple[LayerRow, ...],
    form: str,
    placed: Placement | None = None,
) -> Weights:
    """Returns the arrays that `place` returns, as shapes that know where they lie."""
    make = functools.partial(place, cfg, layout, rows, form, placed=placed)
    shapes = jax.eval_shape(make, abstract_variables(cfg))
    return lying(layout, specs(cfg, layout, rows, form), shapes)


def device_bytes(weights: Any) -> int:
    """Returns what arrays take of one device, each of which knows where it lies."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(weights)
    )


def specs(
    cfg: ModelConfig, layout: Layout, rows: tuple[LayerRow, ...], form: str
) -> Weights:
    """Returns the weights' specs, of a weight in fewer bits one for all its arrays."""
    layers = tuple(_converted_specs(_of_row(layout, row), form) for row in rows)
    mtp = _converted_specs(_of_mtp(layout), form) if cfg.mtp_depth else None
    found = _converted_specs(_of_ends(cfg, layout), form)
    return assemble(found[PARAMS], layers, mtp)


def experts_specs(
    cfg: ModelConfig, layout: Layout, rows: tuple[LayerRow, ...], form: str
) -> Experts:
    """Returns the specs of any row's experts: all have the same."""
    row = next(row for row in rows if max(row.moe_layers(cfg)) >= 0)
    found = _converted_specs(_of_row(layout, row), form)
    weights = found[PARAMS][FEED_FORWARDS["moe"].name][EXPERTS]
    return Experts(weights, found[ROUTER_STATE])


def _of_row(layout: Layout, row: LayerRow) -> WeightPiece:
    name, index = next(filter(None, row.places))
    records, placements = layout.records[name], layout.placements[name]
    if index is not None:
        records = jax.tree.map(_unstacked, records)
        placements = jax.tree.map(lambda x: x.of_layer(), placements)
    specs = jax.tree.map(lambda x: PartitionSpec(PIPE, *x.whole), placements)
    return WeightPiece(records, specs, True, PartitionSpec(PIPE))


def _of_mtp(layout: Layout) -> WeightPiece:
    return _whole(layout.records[MTP.name], layout.placements[MTP.name])


def _of_ends(cfg: ModelConfig, layout: Layout) -> WeightPiece:
    records, placements = (
        {name: tree[name] for name in ends(cfg)}
        for tree in (layout.records, layout.placements)
    )
    return _whole(records, placements)


def _whole(records: Any, placements: Any) -> WeightPiece:
    return WeightPiece(
        records, jax.tree.map(lambda x: x.whole, placements), False, WHOLE
    )


def _unstacked(record: Parameter) -> Parameter:
    return dataclasses.replace(record, dims=record.dims[1:])


def _maker(
    cfg: ModelConfig, layout: Layout, form: str, origin: _Origin, piece: WeightPiece
) -> Callable[[tuple[Any, ...], RowHomes | None], Any]:
    """Returns what makes a piece's collections on the mesh of an origin's trees."""

    def convert(record: Parameter, w: jax.Array) -> Any:
        if form != "native" and record.formats:
            return quantize_weight(record, w, form)
        return w.astype(record.compute_dtype(cfg.dtype))

    def of_rank(record: Parameter, w: jax.Array) -> Any:
        if not piece.has_ranks:
            return convert(record, w)
        return jax.tree.map(lambda x: x[None], convert(record, w[0]))

    def of_device(params: Any) -> Any:
        return jax.tree.map(of_rank, piece.records, params)

    after = _converted_specs(piece, form)
    converted = on_mesh(of_device, layout, (piece.specs,), after[PARAMS])

    def make(trees: tuple[Any, ...], homes: RowHomes | None) -> Any:
        joined = origin.join(piece, trees, homes)
        return {**joined, PARAMS: converted(joined[PARAMS])}

    state = NamedSharding(layout.mesh, after[ROUTER_STATE])
    lie = jax.tree.map(lambda spec: NamedSharding(layout.mesh, spec), after[PARAMS])
    return jax.jit(make, out_shardings={PARAMS: lie, ROUTER_STATE: state})


def _in_places(records: Any, layer: Any, homes: RowHomes) -> Any:
    """Returns a row whose experts are in these places."""

    def placed(record: Parameter, w: jax.Array) -> jax.Array:
        if not record.of_experts:
            return w
        return jax.vmap(lambda w, expert_R: w[expert_R])(w, homes.expert_XR)

    params = jax.tree.map(placed, records, layer[PARAMS])
    weights = params[FEED_FORWARDS["moe"].name][EXPERTS]
    experts = Experts(weights, homes.home_XEC)
    return with_experts({**layer, PARAMS: params}, experts)


def _converted_specs(piece: WeightPiece, form: str) -> Any:
    """Returns the specs of a piece's collections; its router state is whole."""

    def convert(record: Parameter, spec: PartitionSpec) -> PartitionSpec:
        if form == "native" or not record.formats:
            return spec
        # A matrix in fewer bits has all its outputs in one dimension.
        first = record.num_lead + piece.has_ranks + 1
        outputs = [axis for axis in spec[first:] if axis is not None]
        return PartitionSpec(*spec[:first], outputs[0] if outputs else None)

    params = jax.tree.map(convert, piece.records, piece.specs)
    return {PARAMS: params, ROUTER_STATE: piece.state}
