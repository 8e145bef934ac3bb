"""Exchanged tokens against every expert applied to every token, on one device."""

import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.balance import dropping
from jmoe.config import ExchangeConfig, RouterConfig
from jmoe.parallel import exchange as subject
from tests.parallel import exchanging
from tests.parallel.exchanging import (
    BACKENDS,
    LIMITED,
    MESHES,
    ROUTER,
    TOKENS,
    D,
    arrays,
    compare,
    drops,
    on_mesh,
    oracle,
    random_choices,
)

ragged_on_cpu = exchanging.ragged_on_cpu


@BACKENDS
@pytest.mark.parametrize("mesh", MESHES)
def test_output_and_all_gradients_equal_the_dense_experts(mesh, backend):
    expert_NK = random_choices()
    expert_NK[5] = ROUTER.num_experts  # nobody
    expert_NK[77, 2] = ROUTER.num_experts
    run = on_mesh(MESHES[mesh], ExchangeConfig(backend=backend), ROUTER)
    got = run(expert_NK, *arrays())
    compare(got, oracle(expert_NK, *arrays()))
    assert drops(got) == [0, 0]


def one_expert(tokens):
    expert_NK = np.full((tokens, ROUTER.top_k), ROUTER.num_experts)
    expert_NK[:, 1] = 6
    return expert_NK


ADVERSARIAL = {
    "all_tokens_to_one_expert": one_expert(TOKENS),
    "all_tokens_to_one_device": np.tile([7, 4, 6, 5], (TOKENS, 1)),
    "all_tokens_to_as_many_devices_as_can_be": np.tile([3, 4, 8, 12], (TOKENS, 1)),
    "all_tokens_to_nobody": np.full((TOKENS, 4), 16),
}


@BACKENDS
@pytest.mark.parametrize("case", ADVERSARIAL)
def test_without_a_capacity_factor_nothing_is_dropped_whatever_is_chosen(case, backend):
    expert_NK = ADVERSARIAL[case].astype(np.int32)
    run = on_mesh(MESHES["expert=4"], ExchangeConfig(backend=backend), ROUTER)
    got = run(expert_NK, *arrays())
    compare(got, oracle(expert_NK, *arrays()))
    assert drops(got) == [0, 0]


@BACKENDS
def test_node_limited_routing_finds_room_in_smaller_buffers(backend):
    """Where a group is a device, a token of 2 groups visits 2 devices, not 4."""
    expert_NK = random_choices(LIMITED)
    mesh_cfg = MESHES["expert=4"]
    got = on_mesh(mesh_cfg, ExchangeConfig(backend=backend), LIMITED)(
        expert_NK, *arrays()
    )
    compare(got, oracle(expert_NK, *arrays()))
    capacities = [
        dropping.send_capacity(1.0, 48, router, 4) for router in (ROUTER, LIMITED)
    ]
    assert capacities == [35, 24]


@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize("backend", ["padded", "ragged"])
def test_chunks_change_nothing(backend, chunks):
    expert_NK, inputs = random_choices(), arrays()
    whole, cut = (
        on_mesh(MESHES["expert=4"], ExchangeConfig(backend=backend, chunks=n), ROUTER)
        for n in (1, chunks)
    )
    want, got = whole(expert_NK, *inputs), cut(expert_NK, *inputs)
    compare(got, want[:-2], 1e-6)
    found = cut.lower(expert_NK, *inputs).as_text().count("stablehlo.all_to_all")
    once = whole.lower(expert_NK, *inputs).as_text().count("stablehlo.all_to_all")
    assert found == chunks * once


def test_tokens_that_do_not_divide_into_chunks_are_refused():
    run = on_mesh(MESHES["expert=4"], ExchangeConfig(chunks=5), ROUTER)
    with pytest.raises(ValueError, match="chunks=5 must divide a device's 48 tokens"):
        run(random_choices(), *arrays())


def test_experts_that_do_not_divide_over_the_devices_are_refused():
    router = RouterConfig(num_experts=20, top_k=4)
    run = on_mesh(MESHES["expert=8"], ExchangeConfig(), router)
    with pytest.raises(ValueError, match="num_experts=20 must divide over expert=8"):
        run(random_choices(router), *arrays(RouterConfig(num_experts=24, top_k=4)))


@BACKENDS
def test_results_repeat_to_the_bit(backend):
    run = on_mesh(MESHES["expert=8"], ExchangeConfig(backend=backend), ROUTER)
    first, second = (run(random_choices(), *arrays()) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)


def test_outside_of_a_mesh_the_experts_are_called_directly():
    seen = []

    def experts(x_RD, groups):
        seen.append((x_RD, *groups[0][:3]))
        return x_RD

    inputs = (jnp.ones((3, D)), jnp.zeros((3, 4), jnp.int32), jnp.ones((3, 4)))
    weights = (jnp.ones(16),)
    cfg = ExchangeConfig(capacity_factor=1.0, chunks=2)
    got = subject.exchange(*inputs, experts, weights, cfg, ROUTER)
    assert all(x is y for x, y in zip(seen[0], (*inputs, weights), strict=True))
    assert got.y_ND is inputs[0]
    assert got.dropped_sending == got.dropped_receiving == 0
