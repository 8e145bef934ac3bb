"""What ZeRO divides, and that gathering and reducing are each other's transposes.

Shapes: P device, or rank of `pipe`; R row (a layer that a rank has).
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import meta
from jax.sharding import PartitionSpec as P

from jmoe.config import MeshConfig, ModelConfig
from jmoe.nn.model import Transformer, init_variables
from jmoe.parallel import zero
from jmoe.parallel.mesh import make_mesh

SHAPE = {"data": 2, "pipe": 1, "expert": 4, "tensor": 2}


V3_MESHES = [
    {"data": 32, "pipe": 1, "expert": 64, "tensor": 1},
    {"data": 2, "pipe": 16, "expert": 64, "tensor": 1},
    {"data": 4, "pipe": 2, "expert": 16, "tensor": 16},
    {"data": 4, "pipe": 1, "expert": 64, "tensor": 8},
]


def placement(size, dims, shape=SHAPE) -> zero.ParameterPlacement:
    box = nn.LogicallyPartitioned(jax.ShapeDtypeStruct(size, jnp.float32), dims)
    return zero.place({"w": box}, shape)["w"]


@pytest.mark.parametrize(
    ("size", "dims", "stored"),
    [
        # Experts are copied over data alone, what is dense over expert too, ...
        ((8, 64, 2, 16), ("expert", "embed", None, "mlp"), "expert,data,-,tensor"),
        ((64, 256), ("embed", "mlp"), "data+expert,tensor"),
        ((32, 64), ("embed", "latent"), "-,data+expert+tensor"),
        # ... in a dimension that the rules divide too, if no other one has room.
        ((6, 64), ("embed", "mlp"), "-,tensor+data+expert"),
        # What has no dimension for all of them has several, ...
        ((8, 6), ("embed", None), "data+expert,tensor"),
        ((4, 6), ("embed", "mlp"), "expert,tensor"),
        # ... and is divided by as many devices as it can be.
        ((4, 6), ("embed", None), "expert,data"),
        ((3, 5), ("embed", None), "-,-"),
        # A stack of layers stays together.
        ((64, 16), ("layers", "embed"), "-,data+expert+tensor"),
    ],
)
def test_free_axes_divide_the_largest_dimension_that_they_fit(size, dims, stored):
    want = [None if x == "-" else tuple(x.split("+")) for x in stored.split(",")]
    assert placement(size, dims).stored == P(*want)


def test_every_axis_divides_or_sums_each_parameter():
    for size, dims in [
        ((8, 64, 16), ("expert", "embed", "mlp")),
        ((6, 4), (None,) * 2),
    ]:
        found = placement(size, dims)
        used = {axis for axis in found.whole if axis is not None}
        assert used | {*found.axes} | {*found.summed} == {"data", "expert", "tensor"}


def test_a_layer_of_a_stack_is_placed_as_the_stack_is():
    stack = placement((3, 64, 16), ("layers", "embed", "mlp"))
    layer = placement((64, 16), ("embed", "mlp"))
    assert stack.of_layer() == layer


def test_a_vector_is_divided_by_the_axes_that_have_the_most_devices():
    shape = {"data": 2, "pipe": 2, "expert": 8, "tensor": 1}
    found = placement((24,), ("embed",), shape)
    assert found.parts == ((0, ("expert",)),)
    assert found.summed == ("data", "pipe")


def test_the_largest_group_reduces_first_and_pipe_is_the_innermost_of_its_part():
    shape = {"data": 2, "pipe": 4, "expert": 2, "tensor": 4}
    found = placement((2, 6, 96), ("layers", "embed", None), shape)
    assert found.parts == ((2, ("expert", "tensor", "pipe")), (1, ("data",)))


@pytest.fixture(scope="module")
def v3():
    """DeepSeek-V3's parameters."""
    model = Transformer(ModelConfig.preset("v3"))
    return jax.eval_shape(lambda: init_variables(model, 0))["params"]


def devices_of(spec, shape) -> int:
    axes = jax.tree.leaves(tuple(spec))
    return math.prod(shape[axis] for axis in axes)


@pytest.mark.parametrize(
    "shape", V3_MESHES, ids=lambda shape: str(tuple(shape.values()))
)
def test_v3_is_divided_evenly_by_2048_devices_but_for_scales_of_norms(v3, shape):
    held = even = 0
    placements = jax.tree.leaves_with_path(zero.place(v3, shape))
    sizes = [math.prod(x.shape) for x in jax.tree.leaves(meta.unbox(v3))]
    for (path, placed), size in zip(placements, sizes, strict=True):
        held += size / devices_of(placed.stored, shape)
        even += size / math.prod(shape.values())
        assert (path[-1].key == "scale") == bool(placed.summed), path
    assert held <= 1.0001 * even


WHOLE = [
    ((32, 48), ("embed", None)),
    ((32, 6), ("embed", None)),
    ((8, 6), ("embed", None)),
    ((6, 64), ("embed", "mlp")),
    ((4, 12), ("embed", "mlp")),
    ((7, 5), ("embed", None)),
]


@pytest.mark.parametrize(("size", "dims"), WHOLE, ids=str)
def test_gathering_and_reducing_are_transposes(size, dims):
    """<gather(x), y> summed over devices is <x, reduce(y)> summed over devices."""
    mesh = make_mesh(MeshConfig.parse("data=2,expert=4,tensor=2"))
    placed = placement(size, dims, mesh.shape)
    rng = np.random.default_rng(0)
    x = rng.normal(size=size).astype(np.float32)
    parts = parts_of(mesh, placed.whole, size)
    y_P = rng.normal(size=(mesh.size, *x[parts[0]].shape)).astype(np.float32)

    def both(x, y_P):
        whole = zero.gather(x, placed)
        return whole[None], zero.reduce(y_P[0], placed)

    every = P(("data", "pipe", "expert", "tensor"))
    whole_P, reduced = jax.jit(
        jax.shard_map(
            both,
            mesh=mesh,
            in_specs=(placed.stored, every),
            out_specs=(every, placed.stored),
            check_vma=False,
        )
    )(x, y_P)
    want = np.zeros_like(x)
    for part, whole, y in zip(parts, whole_P, y_P, strict=True):
        np.testing.assert_array_equal(whole, x[part])
        want[part] += y
    np.testing.assert_allclose(reduced, want, rtol=1e-5, atol=1e-5)


ALL = "data=2,pipe=2,expert=2,tensor=2"
STACKS = [
    # Of five layers; the axes that divide them at rest.
    (ALL, (16, 3), ("embed", None), "data,pipe,expert,tensor"),
    (ALL, (4, 3), ("embed", None), "data,pipe"),
    (ALL, (2, 3), ("embed", None), "data"),
    (ALL, (3, 7), ("embed", None), ""),
    (ALL, (4, 16), ("expert", "embed"), "data,pipe,tensor"),
    (ALL, (4, 6), ("expert", "embed"), "data,pipe"),
    (ALL, (2, 6), ("expert", "embed"), "data"),
    ("pipe=2,expert=4", (3, 8), (None, "embed"), "pipe,expert"),
    ("pipe=2,expert=4", (8, 2), ("expert", "embed"), "pipe"),
    ("data=4,expert=2", (8, 3), ("embed", None), "data,expert"),
    ("pipe=2", (4, 3), ("embed", None), "pipe"),
]


@pytest.mark.parametrize(("spec", "size", "dims", "axes"), STACKS, ids=str)
def test_rows_are_gathered_to_their_ranks_and_their_gradients_summed_back(
    spec, size, dims, axes
):
    """Whatever divides the stack. Layer 3 is on two ranks, and layer 2 on none."""
    cfg = MeshConfig.parse(spec)
    mesh = make_mesh(cfg, jax.devices()[: cfg.num_devices])
    placed = placement((5, *size), ("layers", *dims), mesh.shape)
    assert ",".join(placed.axes) == axes
    index_PR = np.array([[3, 0, -1], [1, 4, 3]])[: cfg.pipe]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, *size)).astype(np.float32)
    parts = parts_of(mesh, placed.whole, (5, *size))
    y_P = rng.normal(size=(mesh.size, 3, *x[parts[0]].shape[1:])).astype(np.float32)

    def both(x, y_P):
        gathered = zero.gather_rows(x, placed, index_PR)
        return gathered[None], zero.reduce_rows(y_P[0], placed, index_PR, 5)

    every = P(("data", "pipe", "expert", "tensor"))
    gathered_P, reduced = jax.jit(
        jax.shard_map(
            both,
            mesh=mesh,
            in_specs=(placed.stored, every),
            out_specs=(every, placed.stored),
            check_vma=False,
        )
    )(x, y_P)
    want = np.zeros_like(x)
    ranks = np.indices(mesh.devices.shape)[1].ravel()
    for device, (part, rank) in enumerate(zip(parts, ranks, strict=True)):
        for row, layer in enumerate(index_PR[rank]):
            if layer >= 0:
                np.testing.assert_array_equal(gathered_P[device, row], x[part][layer])
                want[part][layer] += y_P[device, row]
    np.testing.assert_allclose(reduced, want, rtol=1e-5, atol=1e-5)


def parts_of(mesh, spec, size):
    """Each device's part of an array that is divided so, as slices."""
    found = []
    for place in itertools.product(*map(range, mesh.devices.shape)):
        at = dict(zip(mesh.axis_names, place, strict=True))
        slices = []
        for axis, length in zip(spec, size, strict=True):
            each = length // mesh.shape[axis] if axis else length
            first = at[axis] * each if axis else 0
            slices.append(slice(first, first + each))
        found.append(tuple(slices))
    return found
