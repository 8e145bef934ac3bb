"""Which layers a pipeline's ranks have, and their weights without values."""

import jax
import pytest

from jmoe.config import records
from jmoe.decode import mesh_weights
from jmoe.decode.weights import LayerPlace, feed_forwards, places
from tests.decode.test_on_mesh import placed

DENSE, MOE = 3, 7


@pytest.fixture(params=["scan", "unroll"])
def model(cfg, request):
    sizes = [f"num_layers={DENSE + MOE}", f"num_dense_layers={DENSE}"]
    return records.override(cfg, [*sizes, f"layer_loop={request.param}"])


def by_rank(rows, ranks: int) -> list[list[int]]:
    return [
        [row.numbers[rank] for row in rows if row.numbers[rank] >= 0]
        for rank in range(ranks)
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3, DENSE + MOE])
def test_ranks_have_all_layers_in_their_order(model, ranks):
    found = by_rank(mesh_weights.cut(model, ranks, 64), ranks)
    assert sum(found, []) == list(range(DENSE + MOE))
    assert all(found)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_layers_of_a_row_are_alike_and_come_from_their_places(model, ranks):
    kinds, every = feed_forwards(model), places(model)
    for row in mesh_weights.cut(model, ranks, 64):
        assert any(where is not None for where in row.places)
        for number, where in zip(row.numbers, row.places, strict=True):
            assert (number < 0) == (where is None)
            if where is not None:
                assert where == every[number] and kinds[number] == row.feed_forward


def test_places_count_each_kind_of_layers_from_0(cfg):
    sizes = ["num_layers=3", "num_dense_layers=1"]
    scanned, unrolled = (
        places(records.override(cfg, [*sizes, f"layer_loop={loop}"]))
        for loop in ("scan", "unroll")
    )
    assert scanned == [
        LayerPlace("dense", 0),
        LayerPlace("moe", 0),
        LayerPlace("moe", 1),
    ]
    names = ["dense_0", "moe_0", "moe_1"]
    assert unrolled == [LayerPlace(name, None) for name in names]


def test_ranks_without_a_layer_are_refused(model):
    with pytest.raises(ValueError, match="10 .*11|11 .*10"):
        mesh_weights.cut(model, DENSE + MOE + 1, 64)


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
