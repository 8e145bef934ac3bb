"""Functions of whole matrices on meshes: of each matrix once, in its place.

Shapes: N matrix, I fan-in, O fan-out.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jmoe.config import MeshConfig
from jmoe.ops.matrices import MatrixDims
from jmoe.parallel.matrices import map_matrices
from jmoe.parallel.mesh import make_mesh
from jmoe.plan import traffic

MATRIX = MatrixDims(fan_in=(-2,), fan_out=(-1,))
HEADS = MatrixDims(fan_in=(-3,), fan_out=(-2, -1))
TWO = MatrixDims(fan_in=(-3,), fan_out=(-1,))
OF_16 = "data=2,pipe=2,expert=2,tensor=2"
STACKS = [
    # Five layers on devices that don't divide them; then fewer matrices than devices.
    ("data=4", (5, 8, 6), P(None, "data"), MATRIX),
    ("data=4", (8, 6), P("data", None), MATRIX),
    # Experts divided; shares over one axis, two, and two dimensions.
    ("data=2,expert=4,tensor=2", (3, 8, 4, 6), P(None, "expert", "data"), MATRIX),
    ("data=2,expert=8", (3, 32, 6), P(None, ("data", "expert")), MATRIX),
    (OF_16, (3, 4, 8, 6), P(None, "expert", ("data", "pipe"), "tensor"), MATRIX),
    # In an order that isn't the mesh's, and with an axis of one device.
    ("data=4,tensor=2", (3, 16, 6), P(None, ("tensor", "data")), MATRIX),
    ("expert=16", (32, 4, 6), P("expert", ("data",)), MATRIX),
    # Dimensions between a matrix's, whole or divided.
    ("data=2,expert=4,tensor=2", (2, 8, 4, 2, 6), P(None, "expert", "data"), TWO),
    (OF_16, (8, 2, 4), P(("data", "pipe"), "tensor", "expert"), TWO),
    ("data=2,tensor=4", (3, 6, 4, 2), P(None, "data", "tensor"), HEADS),
    (OF_16, (4, 6, 4, 2), P(("data", "expert"), None, "tensor", "pipe"), HEADS),
    ("", (3, 4, 6), P(), MATRIX),
]
each_stack = pytest.mark.parametrize(("spec", "size", "where", "dims"), STACKS, ids=str)


def mixed(x_NIO):
    """Mixes all of a matrix, and the place of each number in it."""
    place_IO = jnp.arange(math.prod(x_NIO.shape[1:])).reshape(x_NIO.shape[1:])
    return x_NIO * x_NIO.sum((1, 2), keepdims=True) + place_IO * x_NIO[:, :1, :1]


def by_hand(x, dims):
    """`mixed` of one matrix after another."""
    front = [*dims.batch(x.ndim), *dims.both]
    moved = x.transpose([dim + x.ndim for dim in front])
    matrices = moved.reshape(-1, *dims.sizes(x.shape))
    found = np.stack([np.asarray(mixed(m[None])[0]) for m in matrices])
    return found.reshape(moved.shape).transpose(np.argsort([d + x.ndim for d in front]))


def on_mesh(spec, where, dims, **options):
    def of_part(x):
        return map_matrices(mixed, x, where, dims, **options)

    cfg = MeshConfig.parse(spec)
    if cfg.num_devices == 1:
        return jax.jit(of_part)
    mesh = make_mesh(cfg, jax.devices()[: cfg.num_devices])
    mapped = jax.shard_map(
        of_part, mesh=mesh, in_specs=(where,), out_specs=where, check_vma=False
    )
    return jax.jit(mapped)


@each_stack
@pytest.mark.parametrize("round_bytes", [1, 2**26], ids=["many rounds", "one"])
def test_every_matrix_is_mapped_once_and_back_in_its_place(
    spec, size, where, dims, round_bytes
):
    x = np.random.default_rng(0).normal(size=size).astype(np.float32)
    got = on_mesh(spec, where, dims, round_bytes=round_bytes)(x)
    np.testing.assert_allclose(got, by_hand(x, dims), rtol=1e-5, atol=1e-5)
    assert not np.allclose(got, x)


def test_a_round_holds_no_more_than_it_may_and_the_last_one_what_is_left():
    found = []

    def watched(x_NIO):
        found.append(x_NIO.shape)
        return x_NIO

    x = np.arange(7 * 4 * 6, dtype=np.float32).reshape(7, 4, 6)
    got = map_matrices(watched, x, P(), MATRIX, round_bytes=3 * 4 * 6 * 4 + 1)
    np.testing.assert_array_equal(got, x)
    assert {shape[0] for shape in found} == {3, 1}


def test_rounds_bound_what_travels_and_the_stack_is_overwritten():
    mesh, where = make_mesh(MeshConfig(data=2, expert=8)), P("expert", "data")
    lie = NamedSharding(mesh, where)
    x = jax.ShapeDtypeStruct((8 * 64, 32, 16), jnp.float32, sharding=lie)
    limit, stack = 8 * 32 * 16 * 4, 64 * 16 * 16 * 4

    def of_part(x):
        return map_matrices(mixed, x, where, MATRIX, round_bytes=limit)

    mapped = jax.shard_map(
        of_part, mesh=mesh, in_specs=(where,), out_specs=where, check_vma=False
    )
    program = jax.jit(mapped, donate_argnums=0).lower(x).compile()
    found = traffic.collectives(program.as_text(), mesh.shape)
    assert {(c.kind, c.axes, c.times) for c in found} == {("all-to-all", ("data",), 4)}
    assert all(c.operand_bytes <= limit for c in found)
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == stack
    assert memory.temp_size_in_bytes < stack


def test_dimensions_that_make_no_matrix_number_matrices():
    assert TWO.batch(5) == (-5, -4, -2)
    assert TWO.sizes((7, 8, 4, 2, 6)) == (4, 6)
    assert HEADS.sizes((7, 4, 2, 6)) == (4, 12)
