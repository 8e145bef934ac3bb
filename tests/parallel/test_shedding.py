"""A device's limit is data: with it choices go and are counted, without it none do."""

import jax.numpy as jnp
import numpy as np

from jmoe.parallel import shedding


def test_without_a_limit_nothing_is_dropped_and_with_one_it_is_counted():
    place_NK, gate_NK = jnp.array([[0, 1], [1, 0]]), jnp.array([[0.9, 0.1], [0.2, 0.8]])
    same, none = shedding.shed(place_NK, gate_NK, jnp.int32(shedding.NO_LIMIT), 2)
    np.testing.assert_array_equal(same, place_NK)
    kept, count = shedding.shed(place_NK, gate_NK, jnp.int32(3), 2)
    assert kept.tolist() == [[0, 2], [1, 0]] and (int(none), int(count)) == (0, 1)
