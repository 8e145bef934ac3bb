"""Rows in parts: what is brought to devices on CPUs is what is sent there on GPUs.

Shapes: N token, D hidden, R row, K choice of a token.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jmoe.config import MeshConfig
from jmoe.parallel import collectives, travel
from jmoe.parallel import parts as subject
from jmoe.parallel.mesh import make_mesh
from tests.parallel import exchanging
from tests.parallel.exchanging import LIMITED, ROUTER, TOKENS, D, random_choices

ragged_on_cpu = exchanging.ragged_on_cpu

PEERS, ROWS, PARTS = 4, 70, 4


def moved(expert_NK, x_ND):
    """What arrives in each part, the sum of what returns, and how many there are."""

    def on_device(expert_NK, x_ND):
        gate_NK = jnp.ones(expert_NK.shape)
        choices = expert_NK, gate_NK, ROUTER, "position"
        trips = travel.plan(travel.count, *choices)
        paths = [subject.path(trips, ROWS, nth) for nth in range(PARTS)]
        arrived = [path.there(x_ND, path.route) for path in paths]
        returned = (
            path.back(rows, path.route)
            for path, rows in zip(paths, arrived, strict=True)
        )
        kept = sum(path.is_kept_NV.sum() for path in paths)
        return *arrived, sum(returned), subject.count(trips, ROWS)[None], kept[None]

    spec = PartitionSpec("expert")
    mesh = make_mesh(MeshConfig(expert=PEERS), jax.devices()[:PEERS])
    mapped = jax.shard_map(
        on_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    return jax.device_get(jax.jit(mapped)(expert_NK, x_ND))


CHOICES = {
    "random": random_choices(),
    "few peers": random_choices(LIMITED),
    "one device": np.tile([7, 4, 6, 5], (TOKENS, 1)).astype(np.int32),
    "nobody": np.full((TOKENS, 4), 16, np.int32),
}


@pytest.mark.parametrize("case", CHOICES)
def test_every_visit_is_in_one_part_and_comes_back_in_the_order_of_gpus(
    case, monkeypatch
):
    expert_NK = CHOICES[case]
    x_ND = np.random.default_rng(0).normal(size=(TOKENS, D)).astype(np.float32)
    *arrived, returned, count, kept = moved(expert_NK, x_ND)
    visits = [set(peers) - {PEERS} for peers in (expert_NK // 4).tolist()]
    most = max(sum(peer in of for of in visits) for peer in range(PEERS))
    assert (count == -(-most // ROWS)).all() and most <= PARTS * ROWS
    assert kept.sum() == sum(map(len, visits))
    times_N1 = np.array([[len(of)] for of in visits], np.float32)
    np.testing.assert_allclose(returned, times_N1 * x_ND, rtol=1e-6)
    monkeypatch.setattr(collectives, "platform", lambda: "gpu")
    *on_gpus, _, _, _ = moved(expert_NK, x_ND)
    for here, there in zip(arrived, on_gpus, strict=True):
        np.testing.assert_array_equal(here, there)
