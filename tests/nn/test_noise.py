"""Noise follows from step, layer, row and position, wherever it is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.config import MeshConfig
from jmoe.nn import noise
from jmoe.parallel.mesh import make_mesh

B, T = 8, 6


def draw(row_B, seed=0, step=3, layer=1, length=T):
    found = noise.of_step(seed, step, row_B).of_layer(layer)
    return found.draw(length, lambda key: jax.random.normal(key, (2,)))


def test_it_is_another_for_each_seed_step_layer_row_and_position():
    first = draw(jnp.arange(B))
    others = [draw(jnp.arange(B), **{name: 5}) for name in ("seed", "step", "layer")]
    numbers = np.concatenate([first, *others]).ravel()
    assert len(np.unique(numbers)) == numbers.size
    assert abs(numbers.mean()) < 0.2 and abs(numbers.std() - 1) < 0.2


def test_a_row_has_its_own_whatever_is_drawn_beside_it():
    whole = draw(jnp.arange(B))
    np.testing.assert_array_equal(draw(jnp.array([5, 2])), whole[jnp.array([5, 2])])


@pytest.mark.parametrize(
    "axes", ["data=2,expert=4,tensor=2", "data=16", "tensor=2,data=8"]
)
def test_on_a_mesh_it_is_what_one_device_draws(axes):
    mesh = make_mesh(MeshConfig.parse(axes))
    rows, length = 16, T

    def part(row_B):
        return draw(row_B, length=length // mesh.shape["tensor"])

    run = jax.shard_map(
        part,
        mesh=mesh,
        in_specs=jax.P(("data", "expert")),
        out_specs=jax.P(("data", "expert"), "tensor"),
    )
    np.testing.assert_array_equal(
        jax.jit(run)(jnp.arange(rows)), draw(jnp.arange(rows))
    )
