"""The benchmark of busiest devices shares recorded loads out in four ways."""

import dataclasses

import numpy as np
import pytest

from experiments.benchmarks import balance_busiest, balance_cost
from experiments.benchmarks.balance_cost import DEVICES, PHASES, Uneven
from jmoe.config import ModelConfig


@pytest.fixture(scope="module")
def load_NLE():
    rng = np.random.default_rng(0)
    rate_LE = rng.dirichlet(np.ones(64), 2)
    return rng.multinomial(4096, rate_LE, size=(40, 2))


@pytest.mark.parametrize("copies", [False, True])
def test_what_stays_uneven_is_evened_by_placement_and_more_so_by_lending(
    load_NLE, copies
):
    ways = balance_busiest.four_ways(load_NLE, copies=copies)
    assert list(ways) == list(balance_busiest.WAYS)
    mean = {name: way.uneven.busiest[10:].mean() for name, way in ways.items()}
    assert mean["lending"] <= 1.021
    assert mean["both"] <= 1.021
    assert 1 <= mean["placement"] < 0.7 * mean["static"]
    assert ways["both"].loans[10:].mean() < ways["lending"].loans[10:].mean()
    assert not ways["static"].loans.any()
    assert not ways["placement"].loans.any()
    first_NL = ways["static"].uneven.busiest
    rows_NLP = load_NLE.reshape(40, 2, DEVICES, -1).sum(-1)
    np.testing.assert_allclose(first_NL, rows_NLP.max(-1) / rows_NLP.mean(-1))


def test_a_window_is_placed_by_those_before_it_alone(load_NLE):
    slot_NLR, _ = balance_busiest.place_over_time(load_NLE, 64)
    later_NLE = load_NLE.copy()
    later_NLE[20:] = later_NLE[20:, :, ::-1]
    other_NLR, _ = balance_busiest.place_over_time(later_NLE, 64)
    np.testing.assert_array_equal(slot_NLR[:30], other_NLR[:30])
    assert (slot_NLR[30:] != other_NLR[30:]).any()


def test_replicas_share_all_rows_of_an_expert_evenly():
    load_NLE = np.array([[[7, 5, 0]]])
    slot_NLR = np.array([[[0, 1, 0, 2, 0]]])
    load_NLR = balance_busiest.load_of_slots(load_NLE, slot_NLR)
    np.testing.assert_array_equal(load_NLR, [[[3, 5, 2, 0, 2]]])


def uneven(busiest: float, near: int = 0, far: int = 0, copies: int = 0) -> Uneven:
    one = np.ones((1, 1))
    return Uneven(busiest * one, near * one, far * one, copies)


@pytest.mark.parametrize("model", balance_busiest.MODELS)
def test_training_on_h20s_waits_for_the_busiest_devices_products(model):
    cfg, phase = ModelConfig.preset(model), PHASES["training"]
    even, busy = (balance_cost.expert_seconds(cfg, phase, uneven(x)) for x in (1, 2))
    assert balance_cost.bound(cfg, phase, uneven(2)) == "compute"
    assert busy[0] == 2 * even[0]
    other = balance_cost.other_seconds(cfg, phase)
    (seconds,) = balance_cost.step_seconds(cfg, phase, uneven(2))
    assert seconds == pytest.approx(other + busy[0, 0, 0] * cfg.num_moe_layers)


def test_loans_cost_links_and_memory_and_few_tokens_are_bound_by_memory():
    cfg, phase = ModelConfig.preset("v3"), PHASES["decoding"]
    _, read, sent = balance_cost.expert_seconds(cfg, phase, uneven(1))
    lent = balance_cost.expert_seconds(cfg, phase, uneven(1, near=1, far=1))
    expert = 3 * 7168 * 2048 * balance_cost.ITEM
    assert lent[1] - read == pytest.approx(2 * expert / 4e12)
    assert lent[2] - sent == pytest.approx(expert / balance_cost.NETWORK)
    assert balance_cost.bound(cfg, phase, uneven(1)) == "memory"
    copied = balance_cost.expert_seconds(cfg, phase, uneven(1, copies=1))
    assert copied[1] - read == pytest.approx(expert / 4e12)
    few = dataclasses.replace(cfg, num_layers=10)
    assert balance_cost.other_seconds(few, phase) < balance_cost.other_seconds(
        cfg, phase
    )
