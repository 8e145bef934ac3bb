"""What layers measured, stacked and joined by the layers that have it."""

import jax.numpy as jnp

from jmoe.nn.measured import (
    NOTHING,
    PER_TOKEN,
    Load,
    Loss,
    Measured,
    beside,
    join,
    stack,
    to_log,
)
from jmoe.parallel.reductions import Max


def layer(value: int, **metrics) -> Measured:
    count = jnp.int32(value)
    load = Load(count[None], count, count, count[None])
    return Measured(load, {"z": Loss(jnp.float32(value), 2.0, PER_TOKEN)}, metrics)


def test_layers_are_stacked_in_their_order_and_those_without_a_load_left_out():
    dense = stack([NOTHING._replace(metrics={"highest": Max(jnp.float32(7))})] * 2)
    moe = stack([layer(1), layer(2)])
    mtp = stack([layer(3, highest=Max(jnp.float32(9)))])
    whole = join(dense, moe, mtp)
    assert whole.load.load_E.tolist() == [[1], [2], [3]]
    assert whole.losses["z"].value.tolist() == [1, 2, 3]
    assert (whole.losses["z"].weight, whole.losses["z"].per) == (2.0, PER_TOKEN)
    assert whole.metrics["highest"].value.tolist() == [7, 7, 9]


def test_parts_of_a_layer_are_one_that_has_what_each_measured():
    index = {"index": Loss(jnp.float32(5), 1.0, PER_TOKEN)}
    mixer = Measured(None, index, {"highest": Max(jnp.float32(7))})
    feed_forward = layer(1, dropped=jnp.int32(3))
    whole = beside(mixer, feed_forward)
    assert whole.load == feed_forward.load
    assert whole.losses == index | feed_forward.losses
    assert whole.metrics == mixer.metrics | feed_forward.metrics
    assert beside(mixer, NOTHING) == mixer


def test_of_no_layer_there_is_nothing():
    assert join() == join(NOTHING, stack([NOTHING])) == NOTHING


def test_scalars_are_logged_by_layer_and_arrays_summed_over_layers():
    layers = [layer(i, high=Max(jnp.float32(i)), of_PP=jnp.eye(2)) for i in range(3)]
    logged = to_log(stack(layers).metrics)
    assert logged["high_L"].tolist() == [0, 1, 2]
    assert logged["of_PP"].tolist() == [[3, 0], [0, 3]]
    assert len(logged) == 2
