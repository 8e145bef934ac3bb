"""A decoder's weights without values are those that lie on a mesh."""

import jax
import pytest

from jmoe.decode import mesh_weights
from tests.decode.test_on_mesh import placed


@pytest.mark.parametrize("form", ["native", "fp8"])
def test_weights_without_values_are_what_is_placed(cfg, variables, form):
    _, layout, divided = placed("pipe=2,data=2,expert=2,tensor=2", [], variables)
    rows = mesh_weights.cut(cfg, 2, 64)
    want = mesh_weights.place(cfg, layout, rows, form, divided)
    got = mesh_weights.abstract(cfg, layout, rows, form)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
