"""Where layers are cut into stages, against all ways to cut them."""

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jmoe.parallel.partition import partition

costs = st.lists(st.integers(0, 30), min_size=1, max_size=8)
extras = st.integers(0, 60)


def all_cuts(num_layers, num_stages):
    for inner in itertools.combinations(range(1, num_layers), num_stages - 1):
        yield (0, *inner, num_layers)


def stage_costs(costs, bounds, first, last):
    found = [sum(costs[a:b]) for a, b in itertools.pairwise(bounds)]
    found[0] += first
    found[-1] += last
    return found


@settings(max_examples=200, deadline=None)
@example([9, 5, 6, 7, 5, 3], 3, 0, 0)  # what is most even isn't best
@given(costs, st.integers(1, 8), extras, extras)
def test_no_cut_has_a_cheaper_dearest_stage_nor_then_more_even_ones(
    costs, num_stages, first, last
):
    num_stages = min(num_stages, len(costs))
    bounds = partition(costs, num_stages, first=first, last=last)
    cuts = list(all_cuts(len(costs), num_stages))
    assert bounds in cuts  # each stage has a layer, and each layer a stage

    def cost(bounds):
        stages = stage_costs(costs, bounds, first, last)
        return max(stages), sum(stage**2 for stage in stages)

    assert cost(bounds) == min(map(cost, cuts))


@settings(max_examples=100, deadline=None)
@example([0.1] * 6, 3)
@example([0.1, 0.2, 0.3, 0.3], 2)
@given(st.lists(st.floats(1e-3, 1e15), min_size=1, max_size=8), st.integers(1, 8))
def test_rounding_leaves_some_cut_that_is_as_good_as_any(costs, num_stages):
    num_stages = min(num_stages, len(costs))
    bounds = partition(costs, num_stages)
    best = min(
        max(stage_costs(costs, cut, 0, 0)) for cut in all_cuts(len(costs), num_stages)
    )
    assert max(stage_costs(costs, bounds, 0, 0)) <= best * (1 + 1e-8)


def test_equal_layers_are_cut_evenly():
    assert partition([1.0] * 8, 4) == (0, 2, 4, 6, 8)


def test_a_head_that_costs_as_much_as_two_layers_has_two_fewer_beside_it():
    assert partition([1.0] * 10, 4, last=2) == (0, 3, 6, 9, 10)
    assert partition([1.0] * 10, 4, first=2) == (0, 1, 4, 7, 10)


def test_a_model_of_many_layers_is_cut_at_once():
    """DeepSeek-V3 on 16 ranks, whose 32 stages leave some with two layers."""
    bounds = partition([1.2] * 3 + [1.0] * 58, 32, last=1.9)
    sizes = [b - a for a, b in itertools.pairwise(bounds)]
    assert sizes.count(1) == 3 and set(sizes) == {1, 2} and sizes[-1] == 1


def test_more_stages_than_layers_are_refused_and_how_many_there_can_be_is_said():
    with pytest.raises(ValueError, match="4 stages .* 3 layers .* can be 1 to 3"):
        partition([1, 1, 1], 4)
