"""The table of feed-forward layers. Their costs: tests/train/test_stages.py."""

import typing

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.config import DenseConfig, FeedForwardConfig
from jmoe.nn.feed_forwards import FEED_FORWARDS
from jmoe.nn.measured import NOTHING
from jmoe.nn.moe import SwiGLU


def test_every_record_of_feed_forwards_has_a_row():
    kinds = [record.kind for record in typing.get_args(FeedForwardConfig)]
    assert kinds == list(FEED_FORWARDS)


def test_a_dense_layer_is_a_swiglu_with_its_parameters_and_measures_nothing():
    x_BSD = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)), jnp.float32)
    layer = FEED_FORWARDS["dense"].module(DenseConfig(mlp_dim=12), 0.5)
    variables = layer.init(jax.random.key(1), x_BSD)
    got, measured = layer.apply(variables, x_BSD)
    assert measured == NOTHING and got.any()
    np.testing.assert_array_equal(got, SwiGLU(12, 0.5).apply(variables, x_BSD))
