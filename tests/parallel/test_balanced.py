"""What is particular to the balanced exchange; `test_exchange` compares all of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jmoe.config import ExchangeConfig, MeshConfig, RouterConfig
from jmoe.ops import fp8, grouped
from jmoe.parallel import balanced as subject
from jmoe.parallel import collectives, exchange, loans, reductions
from jmoe.parallel.mesh import make_mesh
from tests.parallel import exchanging
from tests.parallel.exchanging import (
    LIMITED,
    MESHES,
    ROUTER,
    TOKEN_SPEC,
    TOKENS,
    D,
    F,
    arrays,
    compare,
    experts,
    on_mesh,
    oracle,
    random_choices,
)

ragged_on_cpu = exchanging.ragged_on_cpu

PEERS = 4
CHOICES = {
    "random": random_choices(),
    "one expert": np.tile([6, 16, 16, 16], (TOKENS, 1)),
    "one device": np.tile([7, 4, 6, 5], (TOKENS, 1)),
    "nobody": np.full((TOKENS, 4), 16),
    "few": np.where(np.arange(TOKENS)[:, None] < 5, random_choices(), 16),
}


@functools.cache
def measured(cfg, tensor=1, recipe=None):
    """Rows of each group, of each device's, and what was measured; all of it jitted."""
    shape = MeshConfig(expert=PEERS, tensor=tensor)
    mesh = make_mesh(shape, jax.devices()[: shape.num_devices])

    def on_device(x_ND, expert_NK, gate_NK, *weights):
        rows = []

        def counting(x_RD, groups):
            owned = [
                (group.expert_RK < len(group.weights[0])).sum() for group in groups
            ]
            rows.append(jnp.stack(owned)[None])
            return experts(x_RD, groups)

        tokens = x_ND, expert_NK, gate_NK
        given = *tokens, counting, weights, cfg, ROUTER
        got = exchange.exchange(*given, recipe=recipe)
        metrics = reductions.over_devices(got.metrics, ("expert", "tensor"))
        return rows[0], reductions.values(metrics)

    return jax.jit(
        jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(*[TOKEN_SPEC] * 3, *[PartitionSpec("expert")] * 2),
            out_specs=(TOKEN_SPEC, PartitionSpec()),
            check_vma=False,
        )
    )


@pytest.mark.parametrize(
    ("case", "tensor"), [*((case, 1) for case in CHOICES), ("random", 2)]
)
def test_every_device_computes_as_many_rows_or_one_more_whatever_is_chosen(
    case, tensor
):
    """In one part, where buffers hold all visits; a tensor group as one device."""
    cfg = ExchangeConfig(backend="balanced", lend_above=0.0, capacity_factor=100.0)
    expert_NK = CHOICES[case].astype(np.int32)
    _, x_ND, gate_NK, *weights = arrays()
    rows_P2, metrics = measured(cfg, tensor)(x_ND, expert_NK, gate_NK, *weights)
    rows_P2 = np.asarray(rows_P2).reshape(PEERS, tensor, 2).sum(1)
    rows_P = rows_P2.sum(1)
    assert rows_P.sum() == (expert_NK < 16).sum()
    assert rows_P.max() - rows_P.min() <= 1
    assert metrics["rows_left_over"] == 0
    lent = np.count_nonzero(rows_P2[:, 1])
    assert metrics["experts_lent"] >= lent
    assert (metrics["experts_lent"] == 0) == (metrics["device_max_vio"] == 0)


def test_what_is_measured_says_how_uneven_devices_were_and_are():
    cfg = ExchangeConfig(backend="balanced", slots=1, lend_above=0.0)
    _, x_ND, gate_NK, *weights = arrays()
    expert_NK = CHOICES["one device"].astype(np.int32)
    _, metrics = measured(cfg)(x_ND, expert_NK, gate_NK, *weights)
    # Each of the others borrows one of the four experts, and computes all of it.
    assert metrics["device_max_vio"] == 3 and metrics["device_max_vio_lent"] == 0
    assert metrics["experts_lent"] == 3 and metrics["rows_left_over"] == 0
    lent_PP = np.zeros((PEERS, PEERS))
    lent_PP[1, [0, 2, 3]] = 1
    np.testing.assert_array_equal(metrics["lent_PP"], lent_PP)
    up_EDF, down_EFD = weights
    assert metrics["bytes_lent"] == 3 * (up_EDF[0].nbytes + down_EFD[0].nbytes)


def test_rows_for_which_there_is_no_slot_are_told():
    """60 of 240 are even; those with one slot get 60, 60 and 40 at most."""
    cfg = ExchangeConfig(backend="balanced", slots=1, lend_above=0.0)
    expert_NK = np.full((TOKENS, 4), 16, np.int32)
    for choice, rows in enumerate([100, 60, 40, 40]):
        expert_NK[:rows, choice] = 4 + choice
    _, x_ND, gate_NK, *weights = arrays()
    _, metrics = measured(cfg)(x_ND, expert_NK, gate_NK, *weights)
    assert metrics["rows_left_over"] == 20


def test_where_products_are_in_fp8_experts_are_lent_so():
    cfg, recipe = ExchangeConfig(backend="balanced", slots=1), fp8.RECIPES["fp8"]
    _, x_ND, gate_NK, *weights = arrays()
    expert_NK = CHOICES["one device"].astype(np.int32)
    run = measured.__wrapped__(cfg, recipe=recipe)
    _, metrics = run(x_ND, expert_NK, gate_NK, *weights)
    in_fp8 = loans.bytes_of_expert(weights, loans.in_fp8(recipe, x_ND.dtype))
    assert metrics["bytes_lent"] == metrics["experts_lent"] * in_fp8
    assert in_fp8 < sum(w[0].nbytes for w in weights)


@pytest.mark.parametrize("mesh", ["expert=4", "data=2,expert=4,tensor=2"])
@pytest.mark.parametrize("case", ["random", "one expert", "one device"])
def test_rows_and_weights_by_ragged_all_to_alls_give_the_same(case, mesh, monkeypatch):
    """As on GPUs, with buffers for what is expected and no more."""
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", exchanging.emulated_ragged)
    monkeypatch.setattr(collectives, "platform", lambda: "gpu")
    cfg = ExchangeConfig(backend="balanced", capacity_factor=1.0, lend_above=0.0)
    expert_NK = CHOICES[case].astype(np.int32)
    got = on_mesh.__wrapped__(MESHES[mesh], cfg, ROUTER)(expert_NK, *arrays())
    compare(got, oracle(expert_NK, *arrays()))


@pytest.mark.parametrize("factor", [1.0, 4.0])
@pytest.mark.parametrize("chunks", [1, 2])
def test_what_buffers_do_not_hold_goes_in_further_parts(factor, chunks):
    expert_NK = random_choices(LIMITED)
    cfg = ExchangeConfig(backend="balanced", capacity_factor=factor, chunks=chunks)
    got = on_mesh(MESHES["expert=4"], cfg, LIMITED)(expert_NK, *arrays())
    compare(got, oracle(expert_NK, *arrays()))


@pytest.mark.parametrize("remat", [False, True])
def test_borrowed_weights_are_fetched_again_where_they_are_not_kept(remat):
    """What a backward pass is given has them or not, and yields the same."""
    cfg = ExchangeConfig(backend="balanced", slots=3, lend_above=0.0)
    dy_ND, x_ND, gate_NK, *weights = arrays()
    mesh = make_mesh(MeshConfig(expert=PEERS), jax.devices()[:PEERS])
    kept = []

    def on_device(expert_NK, dy_ND, x_ND, gate_NK, *weights):
        def run(x_ND, gate_NK, *weights):
            tokens = x_ND, expert_NK, gate_NK
            given = *tokens, experts, weights, cfg, ROUTER
            return exchange.exchange(*given, remat=remat).y_ND

        y_ND, pull = jax.vjp(run, x_ND, gate_NK, *weights)
        kept.extend(leaf.shape for leaf in jax.tree.leaves(pull))
        return y_ND, *pull(dy_ND)

    mapped = jax.shard_map(
        on_device, mesh=mesh, in_specs=TOKEN_SPEC, out_specs=TOKEN_SPEC, check_vma=False
    )
    expert_NK = CHOICES["one device"].astype(np.int32)
    got = jax.jit(mapped)(expert_NK, dy_ND, x_ND, gate_NK, *weights)
    compare(got, oracle(expert_NK, dy_ND, x_ND, gate_NK, *weights))
    assert ((3, D, F) in kept) == (not remat)


RECIPE, ONE_CHOICE = fp8.RECIPES["fp8"], RouterConfig(num_experts=8, top_k=1)


def experts_in_fp8(x_RD, groups):
    """A layer's, where there is no tensor group."""
    mlp = functools.partial(grouped.BACKENDS["blocks"], recipe=RECIPE)
    return sum(mlp(x_RD, g.expert_RK, g.gate_RK, *g.weights) for g in groups)


def through_experts_in_fp8(backend, *arrays):
    """Results, and how many experts each device counts as lent."""
    cfg = ExchangeConfig(backend=backend, lend_above=0.0)
    mesh = make_mesh(MeshConfig(expert=PEERS), jax.devices()[:PEERS])

    def on_device(x_ND, expert_NK, gate_NK, *weights):
        given = x_ND, expert_NK, gate_NK, experts_in_fp8, weights, cfg, ONE_CHOICE
        found = exchange.exchange(*given, recipe=RECIPE)
        return found.y_ND, jnp.array([found.metrics.get("experts_lent", 0)])

    mapped = jax.shard_map(
        on_device, mesh=mesh, in_specs=TOKEN_SPEC, out_specs=TOKEN_SPEC, check_vma=False
    )
    return (np.asarray(x, np.float32) for x in jax.jit(mapped)(*arrays))


def test_in_fp8_a_borrower_computes_what_an_experts_home_computes():
    """By the same e4m3 and scales, of float32 weights in products of bfloat16.

    A token has one choice, so that nothing is summed over devices; in which order a
    product sums is up to its size.
    """
    rng = np.random.default_rng(0)
    experts, dim, mlp = ONE_CHOICE.num_experts, 144, 136  # more than a block
    shapes = (64, dim), (experts, dim, 2, mlp), (experts, mlp, dim)
    x_ND, *weights = (rng.normal(size=s).astype(np.float32) for s in shapes)
    expert_NK = rng.integers(2, 4, (64, 1), np.int32)  # of one device
    given = jnp.asarray(x_ND, jnp.bfloat16), expert_NK, rng.random((64, 1), np.float32)
    home_ND, none = through_experts_in_fp8("padded", *given, *weights)
    lent_ND, lent = through_experts_in_fp8("balanced", *given, *weights)
    assert none.sum() == 0 and lent.sum() >= 3
    assert (lent_ND == home_ND).mean() > 0.99
    bound = 1e-5 * np.abs(home_ND).max()
    np.testing.assert_allclose(lent_ND, home_ND, rtol=2**-7, atol=bound)


def test_more_slots_than_other_devices_have_experts_are_refused():
    cfg = ExchangeConfig(backend="balanced", slots=13)
    with pytest.raises(ValueError, match="slots=13 must be at most 12"):
        on_mesh(MESHES["expert=4"], cfg, ROUTER)(random_choices(), *arrays())


def test_slots_are_four_or_as_many_as_a_device_has_experts():
    cfg = ExchangeConfig(backend="balanced")
    many = RouterConfig(num_experts=64, top_k=4)
    assert subject.num_slots(cfg, ROUTER, 8) == 2
    assert subject.num_slots(cfg, many, 4) == 4


@pytest.mark.parametrize("tensor", [1, 2])
def test_rows_that_int32_cannot_count_are_refused(tensor):
    """Those of a tensor group's devices together."""
    cfg = ExchangeConfig(backend="balanced")
    shapes = [(2**31 // 4, 8), (2**31 // 4, 4), (2**31 // 4, 4)]
    x, expert, gate = (jax.ShapeDtypeStruct(s, np.float32) for s in shapes)
    expert = jax.ShapeDtypeStruct(expert.shape, np.int32)
    weights = [jax.ShapeDtypeStruct(s, np.float32) for s in [(16, 8, 4), (16, 4, 8)]]
    with pytest.raises(ValueError, match="lending counts them in int32"):
        run = measured.__wrapped__(cfg, tensor)
        jax.eval_shape(run, x, expert, gate, *weights)
