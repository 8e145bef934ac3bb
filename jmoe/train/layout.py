"""How a run's state and batches lie on its mesh.

Parameters are float32 at rest, divided by the rules of their dimensions and by ZeRO;
what an optimizer keeps of a parameter lies as the parameter does; the rest is small,
and whole on every device. Batches are divided by sequence.

Shapes: A microbatch, B sequence, T position.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax.core import meta
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jmoe.config import MeshConfig, MoEConfig
from jmoe.data.packing import Batch
from jmoe.nn.model import Transformer, abstract_boxes
from jmoe.nn.parameter import Parameter, records
from jmoe.parallel import balanced, zero
from jmoe.parallel.mesh import BATCH_AXES, make_mesh

WHOLE = PartitionSpec()


class Layout(NamedTuple):
    """A mesh, and three trees like the model's parameters.

    placements: of `zero.ParameterPlacement`. records: of `nn.parameter.Parameter`.
    shapes: of `jax.ShapeDtypeStruct`.
    """

    mesh: Mesh
    placements: Any
    records: Any
    shapes: Any

    @property
    def stored(self) -> Any:
        """The parameters' specs at rest."""
        return jax.tree.map(lambda placement: placement.stored, self.placements)


def make_layout(model: Transformer, mesh: Mesh) -> Layout:
    """Returns where each parameter of `model` lies on `mesh`, and what it is.

    Raises:
      ValueError: a dimension doesn't divide over its axis; names the parameter.
    """
    boxed = abstract_boxes(model.cfg)["params"]
    placements = zero.place(boxed, mesh.shape)
    return Layout(mesh, placements, records(boxed), meta.unbox(boxed))


def on_mesh(
    function: Callable[..., Any], layout: Layout, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """Returns a function of whole arrays, from one of a device's parts of them."""
    if layout.mesh.size == 1:
        return function
    return jax.shard_map(
        function,
        mesh=layout.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,
    )


def run_mesh(cfg: MeshConfig) -> Mesh:
    """Returns a run's mesh: of all devices, or of this process's first if for one."""
    alone = cfg.num_devices == 1 and jax.process_count() == 1
    return make_mesh(cfg, jax.devices()[:1] if alone else None)


def check_exchange(cfg: MoEConfig, mesh: Mesh) -> None:
    """Refuses an exchange that the mesh doesn't have; ValueError."""
    exchange, peers = cfg.exchange, mesh.shape["expert"]
    if peers == 1:
        return
    if exchange.backend == "ragged" and mesh.devices.flat[0].platform == "cpu":
        raise ValueError(
            "model.moe.exchange.backend='ragged' needs GPUs: on CPU there is no ragged "
            "all-to-all. 'padded' and 'gather' are for any device."
        )
    if exchange.backend == "balanced":
        balanced.num_slots(exchange, cfg.router, peers)
        if exchange.node_size and peers % exchange.node_size:
            raise ValueError(
                f"model.moe.exchange.node_size={exchange.node_size} must divide the "
                f"devices of expert={peers}."
            )


def shardings(layout: Layout, tree: Any) -> Any:
    """Returns a `NamedSharding` for each array of a state, or of a part of one.

    An array whose path ends in a parameter's, and that has its shape, lies as the
    parameter does. Others are whole on every device, such as the factors that some
    optimizers keep of a moment.
    """
    parameter_of = parameters_by_path(layout)

    def choose(path: Any, x: Any) -> NamedSharding:
        found = parameter_of(path)
        if found is None or found.shape != x.shape:
            return NamedSharding(layout.mesh, WHOLE)
        return NamedSharding(layout.mesh, found.spec)

    return jax.tree.map_with_path(choose, tree)


class ParameterAtRest(NamedTuple):
    """What there is to know of a parameter at rest; path: its keys."""

    path: tuple[str, ...]
    record: Parameter
    shape: tuple[int, ...]
    spec: PartitionSpec


def parameters_by_path(layout: Layout) -> Callable[[Any], ParameterAtRest | None]:
    """Returns a function from an array's path in a state to the parameter it is for.

    That is the one whose path it ends in; None: none's.
    """
    leaves = map(
        jax.tree.leaves_with_path, (layout.records, layout.shapes, layout.stored)
    )
    of_path = {
        _names(path): ParameterAtRest(_names(path), record, x.shape, spec)
        for (path, record), (_, x), (_, spec) in zip(*leaves, strict=True)
    }

    def find(path: Any) -> ParameterAtRest | None:
        names = _names(path)
        ends = (of_path.get(names[start:]) for start in range(len(names)))
        return next(filter(None, ends), None)

    return find


def abstract(layout: Layout, make: Callable[[], Any]) -> Any:
    """Returns the arrays that `make` returns, as shapes that know where they lie."""
    shapes = jax.eval_shape(make)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings(layout, shapes),
    )


def lying(layout: Layout, specs: Any, shapes: Any) -> Any:
    """Returns shapes that know where they lie, each by a spec of its own or a tree's.

    Args:
      specs: of `shapes`, or of trees in it.
    """

    def put(spec: PartitionSpec, tree: Any) -> Any:
        sharding = NamedSharding(layout.mesh, spec)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    return jax.tree.map(put, specs, shapes)


def born(layout: Layout, make: Callable[[], Any]) -> Any:
    """Returns what `make` returns, each array made where it lies; waits for it."""
    where = shardings(layout, jax.eval_shape(make))
    # Done before the step compiles, or its memory would lie in the step's way.
    return jax.block_until_ready(jax.jit(make, out_shardings=where)())


def batch_sharding(layout: Layout, lead: int) -> NamedSharding:
    """Returns the sharding of sequences, divided, behind `lead` other dimensions."""
    return NamedSharding(layout.mesh, PartitionSpec(*(None,) * lead, BATCH_AXES))


def put_batch(layout: Layout, batch: Batch) -> Batch:
    """Returns this process's rows, [..., B, T], as its part of a batch on the mesh."""
    sharding = batch_sharding(layout, batch.tokens_BT.ndim - 2)

    def put(x: Any) -> jax.Array:
        # Where there are several processes, JAX counts it as implicit.
        with jax.transfer_guard_host_to_device("allow"):
            return jax.make_array_from_process_local_data(sharding, x)

    return jax.tree.map(put, batch)


def put_whole(layout: Layout, tree: Any) -> Any:
    """Puts host arrays, the same on every process, whole on every device."""
    sharding = NamedSharding(layout.mesh, WHOLE)
    # Where there are several processes, JAX counts it as implicit.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(sharding, x), tree
        )


def _names(path: Any) -> tuple[Any, ...]:
    """Returns the keys of a path, whatever kind of node each is of."""
    simple = functools.partial(jax.tree_util.keystr, simple=True)
    return tuple(simple((key,)) for key in path)
