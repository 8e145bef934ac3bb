"""Collectives on a device alone, on a mesh, and as each other's transposes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jmoe.config import MeshConfig
from jmoe.config.mesh import MESH_AXES
from jmoe.parallel import collectives
from jmoe.parallel.mesh import make_mesh

MESH = "data=2,expert=4,tensor=2"


def on_every_device(function, *arrays):
    """What `function` returns of each device's row of the arrays, stacked."""
    rows = P(MESH_AXES)

    def of_row(*parts):
        return jax.tree.map(lambda x: x[None], function(*(x[0] for x in parts)))

    mapped = jax.shard_map(
        of_row,
        mesh=make_mesh(MeshConfig.parse(MESH)),
        in_specs=rows,
        out_specs=rows,
        check_vma=False,
    )
    return jax.jit(mapped)(*arrays)


def random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_a_device_alone_has_the_whole_of_everything():
    x = jnp.arange(6.0).reshape(2, 3)
    assert collectives.axis_size(MESH_AXES) == 1
    assert collectives.axis_index("expert") == 0
    assert collectives.share(7, "tensor", "heads") == 7
    for same in (
        collectives.all_gather(x, "tensor", 1),
        collectives.reduce_scatter(x, MESH_AXES, 0),
        collectives.local_part(x, "tensor", 1),
        collectives.psum(x, MESH_AXES),
        collectives.pmax(x, "data"),
        collectives.all_to_all(x, "expert", 0, 1),
    ):
        assert same is x


def test_on_a_mesh_sizes_and_places_are_the_axes():
    places = on_every_device(
        lambda x: jnp.array([collectives.axis_index(axis) for axis in MESH_AXES]),
        random(16, 1),
    )
    want = np.stack(np.unravel_index(np.arange(16), (2, 1, 4, 2)), axis=1)
    np.testing.assert_array_equal(places, want)
    sizes = on_every_device(
        lambda x: jnp.array([collectives.axis_size(a) for a in (MESH_AXES, "expert")]),
        random(16, 1),
    )
    assert sizes.tolist() == [[16, 4]] * 16


@pytest.mark.parametrize("axes", ["tensor", "expert", ("data", "expert"), MESH_AXES])
def test_a_gather_joins_the_parts_in_the_order_of_the_axes(axes):
    shape = tuple(make_mesh(MeshConfig.parse(MESH)).shape.values())
    x = random(16, 2, 3)
    got = on_every_device(lambda x: collectives.all_gather(x, axes, 0), x)
    inner = [MESH_AXES.index(a) for a in ((axes,) if isinstance(axes, str) else axes)]
    by_axis = np.moveaxis(x.reshape(*shape, 2, 3), inner, range(-2 - len(inner), -2))
    groups = by_axis.reshape(*by_axis.shape[: 4 - len(inner)], -1, 3)
    for i, place in enumerate(np.ndindex(shape)):
        outer = tuple(p for d, p in enumerate(place) if d not in inner)
        np.testing.assert_array_equal(got[i], groups[outer])


@pytest.mark.parametrize("axes", ["tensor", ("data", "expert"), MESH_AXES])
def test_a_scattered_sum_is_the_gathers_transpose(axes):
    def pull_back(x, y):
        gathered, transpose = jax.vjp(lambda x: collectives.all_gather(x, axes, 0), x)
        rows = y[: gathered.shape[0]]
        return transpose(rows)[0], collectives.reduce_scatter(rows, axes, 0)

    x, y = random(16, 2, 3), random(16, 32, 3)
    got, want = on_every_device(pull_back, x, y)
    np.testing.assert_array_equal(got, want)


def test_a_part_is_what_a_gather_would_join():
    x = np.broadcast_to(random(4, 6), (16, 4, 6))
    got = on_every_device(
        lambda x: collectives.all_gather(
            collectives.local_part(x, "tensor", 1), "tensor", 1
        ),
        x,
    )
    np.testing.assert_array_equal(got, x)


def test_totals_and_maxima_take_no_gradient():
    def gradients(x):
        def of(function):
            return jax.grad(lambda x: (x * function(x, MESH_AXES)).sum())(x)

        return of(collectives.psum), of(collectives.pmax)

    x = random(16, 5)
    total, largest = on_every_device(gradients, x)
    np.testing.assert_allclose(total, np.broadcast_to(x.sum(0), x.shape), rtol=1e-5)
    np.testing.assert_array_equal(largest, np.broadcast_to(x.max(0), x.shape))


def test_an_all_to_all_is_its_own_inverse_and_delivers_row_p_to_device_p():
    def swap(x):
        return collectives.all_to_all(x, "expert", 0, 0)

    x = random(16, 4, 3)
    once = on_every_device(swap, x)
    mesh = (2, 4, 2, 4, 3)
    np.testing.assert_array_equal(
        np.asarray(once).reshape(mesh), x.reshape(mesh).transpose(0, 3, 2, 1, 4)
    )
    twice = on_every_device(lambda x: swap(swap(x)), x)
    np.testing.assert_array_equal(twice, x)


def test_what_does_not_divide_is_refused_by_its_name():
    with pytest.raises(ValueError, match="num_heads=6 must divide over expert=4"):
        on_every_device(
            lambda x: jnp.zeros(collectives.share(6, "expert", "num_heads")),
            random(16, 1),
        )
