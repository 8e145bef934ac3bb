"""Experts that get other homes, compiled for H20s: only what moves is sent."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jmoe.balance import homes as places
from jmoe.config import MeshConfig
from jmoe.parallel import homes
from jmoe.parallel.mesh import make_mesh
from jmoe.plan import aot, traffic
from jmoe.plan.device import H20

pytestmark = pytest.mark.hopper

L, E, D, F = 8, 64, 512, 256


@pytest.mark.parametrize("axes", [("expert",), ("data", "expert")], ids="+".join)
def test_experts_go_straight_to_their_devices_in_a_layers_room_beside_the_array(axes):
    mesh = make_mesh(MeshConfig(data=2, expert=8), aot.absent_devices(H20, 16))
    devices = 8 if axes == ("expert",) else 16
    spec = PartitionSpec(None, axes)

    def lying(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    in_order_LE = places.in_order(L, E)
    moves = jax.tree.map(
        lambda x: lying(x.shape, x.dtype, PartitionSpec()),
        places.find_moves(in_order_LE, in_order_LE, devices),
    )
    move = jax.shard_map(
        lambda x, moves: homes.move(x, moves, axes),
        mesh=mesh,
        in_specs=(spec, PartitionSpec()),
        out_specs=spec,
        check_vma=False,
    )
    program = jax.jit(move, donate_argnums=0)
    compiled = program.lower(lying((L, E, D, F), jnp.float32, spec), moves).compile()
    (found,) = traffic.collectives(compiled.as_text(), mesh.shape)
    assert (found.kind, found.devices) == ("ragged-all-to-all", devices)
    expert, own = 4 * D * F, L * E // devices
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == own * expert
    assert memory.temp_size_in_bytes < 1.1 * own / L * expert
