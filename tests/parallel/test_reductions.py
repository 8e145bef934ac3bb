"""Sums and maxima of parts: of microbatches, of rows, of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.config import MeshConfig
from jmoe.config.mesh import MESH_AXES
from jmoe.parallel import reductions
from jmoe.parallel.mesh import make_mesh
from jmoe.parallel.reductions import Max

RNG = np.random.default_rng(0)
COUNTS = RNG.integers(2**25, 2**26, (6, 3), np.int32)  # beyond float32's integers
HIGHEST = np.float32(-RNG.random((6, 3)))  # below zero, which is no highest of any


def parts() -> dict:
    return {"counts": jnp.asarray(COUNTS), "highest": Max(jnp.asarray(HIGHEST))}


def row(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def check(got, rows=slice(None)) -> None:
    np.testing.assert_array_equal(got["counts"], COUNTS[rows].sum(0))
    np.testing.assert_array_equal(got["highest"].value, HIGHEST[rows].max(0))


def test_parts_in_a_row_are_the_parts_one_after_the_other():
    whole = reductions.nothing(jax.eval_shape(lambda: row(parts(), 0)))
    for i in range(6):
        whole = reductions.merge(whole, row(parts(), i))
    check(whole)
    check(reductions.along(parts()))


def test_rows_go_to_their_places_those_of_one_place_together_others_nowhere():
    got = reductions.place(parts(), jnp.array([1, 0, 1, 4, 4, 4]), size=3)
    check(row(got, 0), [1])
    check(row(got, 1), [0, 2])
    assert not np.any(got["counts"][2])
    assert np.all(got["highest"].value[2] == -np.inf)


@pytest.mark.parametrize("axes", ["expert", MESH_AXES])
def test_devices_measure_together_what_one_would(axes):
    mesh = make_mesh(MeshConfig.parse("data=2,expert=4,tensor=2"))
    spec = jax.P(MESH_AXES)
    counts, highest = RNG.integers(0, 9, (16, 2), np.int32), np.float32(-RNG.random(16))

    def total(counts, highest):
        return reductions.over_devices({"n": counts, "m": Max(highest)}, axes)

    run = jax.shard_map(total, mesh=mesh, in_specs=spec, out_specs=spec)
    got = jax.jit(run)(counts, highest)
    dims = (1,) if axes == "expert" else (0, 1, 2)
    by_axis = counts.reshape(2, 4, 2, 2), highest.reshape(2, 4, 2)
    want_n = np.broadcast_to(by_axis[0].sum(dims, keepdims=True), (2, 4, 2, 2))
    want_m = np.broadcast_to(by_axis[1].max(dims, keepdims=True), (2, 4, 2))
    np.testing.assert_array_equal(got["n"], want_n.reshape(16, 2))
    np.testing.assert_array_equal(got["m"].value, want_m.reshape(16))


def test_values_are_plain_arrays():
    assert jax.tree.structure(reductions.values(parts())) == jax.tree.structure(
        {"counts": 0, "highest": 0}
    )
