"""Arrays of experts moved on a mesh, against indexing whole arrays.

Shapes: L layer, E expert or place, X whatever else.
"""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jmoe.balance import homes as places
from jmoe.config import MeshConfig
from jmoe.parallel import homes as subject
from jmoe.parallel.mesh import make_mesh
from jmoe.plan import traffic
from tests.parallel.exchanging import emulated_ragged

L, E, X = 3, 16, (50, 20)
DEVICES = {("expert",): 4, ("expert", "data"): 8}


@pytest.fixture(params=["padded", "ragged"])
def transport(request, monkeypatch):
    if request.param == "ragged":
        monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated_ragged)
        monkeypatch.setattr(subject.collectives, "platform", lambda: "gpu")


@functools.cache
def mesh():
    return make_mesh(MeshConfig(data=2, expert=4), jax.devices()[:8])


def program(axes):
    """A jitted function of whole arrays and moves."""
    spec = PartitionSpec(None, axes)
    return jax.jit(
        jax.shard_map(
            lambda x, moves: subject.move(x, moves, axes),
            mesh=mesh(),
            in_specs=(spec, PartitionSpec()),
            out_specs=spec,
            check_vma=False,
        ),
        donate_argnums=0,
    )


def arrays():
    rng = np.random.default_rng(0)
    home_LE = rng.permuted(places.in_order(L, E), axis=1)
    home_LE[1] = np.arange(E)  # one layer stays
    return rng.normal(size=(L, E, *X)).astype(np.float32), home_LE


@pytest.mark.parametrize("axes", DEVICES, ids="+".join)
def test_experts_arrive_at_their_homes_and_come_back(axes, transport):
    x_LEX, home_LE = arrays()
    in_order_LE, move = places.in_order(L, E), program(axes)
    want_LEX = np.empty_like(x_LEX)
    np.put_along_axis(want_LEX, home_LE[..., None, None], x_LEX, 1)
    there, back = (
        places.find_moves(*pair, DEVICES[axes])
        for pair in ((in_order_LE, home_LE), (home_LE, in_order_LE))
    )
    moved = move(jax.numpy.array(x_LEX), there)
    np.testing.assert_array_equal(moved, want_LEX)
    np.testing.assert_array_equal(move(moved, back), x_LEX)


def test_a_round_sends_one_expert_a_peer_gathers_nothing_and_has_no_second_copy():
    x_LEX, home_LE = arrays()
    moves = places.find_moves(places.in_order(L, E), home_LE, 4)
    compiled = program(("expert",)).lower(x_LEX, moves).compile()
    found = traffic.collectives(compiled.as_text(), mesh().shape)
    assert {x.kind for x in found} == {"all-to-all"}
    expert_bytes = x_LEX[0, 0].nbytes
    assert sum(x.operand_bytes for x in found) == 4 * expert_bytes
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == x_LEX.nbytes // 4
    assert memory.temp_size_in_bytes < 10 * expert_bytes < x_LEX.nbytes // 4
