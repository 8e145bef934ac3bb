"""A pipeline's executor against the same layers one after the other.

Shapes: P rank.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jmoe.config import MeshConfig
from jmoe.parallel import collectives, pipeline
from jmoe.parallel.mesh import make_mesh
from jmoe.parallel.schedule import SCHEDULES, build
from jmoe.parallel.schedule.ticks import SELF, as_ticks, forward_only
from jmoe.plan import copies
from tests.parallel.toy_pipeline import KINDS, B, Cut, D, M, arguments, enter, leave
from tests.programs import equations

each_schedule = pytest.mark.parametrize("name", SCHEDULES)
each_size = pytest.mark.parametrize("ranks", [2, 4])


def program(cut, run):
    """`run` of the model on a mesh of `pipe` alone, and each rank's result."""
    ranks = cut.schedule.num_ranks
    mesh = make_mesh(MeshConfig(pipe=ranks), jax.devices()[:ranks])

    def on_rank(weights, state, shared, batches):
        groups = cut.groups(weights, state, collectives.axis_index("pipe"))
        model = pipeline.Model(enter, leave, shared, groups, batches)
        return jax.tree.map(lambda x: x[None], run(model))

    return jax.shard_map(
        on_rank,
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec("pipe"),
        check_vma=False,
    )


@functools.cache
def training(name, ranks, *, recompute=False):
    """The program, traced: it can be read or compiled."""
    cut = Cut(build(name, ranks, M))
    run = functools.partial(pipeline.train, as_ticks(cut.schedule), recompute=recompute)
    return cut, jax.jit(program(cut, run)).trace(*arguments(cut))


@functools.cache
def evaluation(name, ranks):
    cut = Cut(build(name, ranks, M))
    run = functools.partial(pipeline.evaluate, as_ticks(forward_only(cut.schedule)))
    return cut, jax.jit(program(cut, run)).trace(*arguments(cut))


@functools.cache
def compiled(traced):
    return traced.lower().compile()


def result(cut, traced):
    return compiled(traced)(*arguments(cut))


def in_a_row(weights, state, shared, batches):
    """Gradients, and what is measured: after the layers, by microbatch; else sums."""

    def of_microbatch(weights, shared, batch):
        x, total, measured = enter(shared, batch), 0.0, {}
        for kind, layer in KINDS.items():
            found = []
            for i in range(len(state[kind])):
                own = jax.tree.map(lambda a, i=i: a[i], weights[kind])
                (x, objective), seen = layer(own, state[kind][i], batch, x)
                total += objective
                found.append(seen)
            measured[kind] = jax.tree.map(lambda *a: jnp.stack(a), *found)
        objective, left = leave(shared, batch, x)
        return total + objective, (left, measured)

    def add(_, batch):
        grad = jax.grad(of_microbatch, argnums=(0, 1), has_aux=True)
        return None, grad(weights, shared, batch)

    gradients, (left, measured) = jax.lax.scan(add, None, batches)[1]
    gradients, measured = jax.tree.map(lambda x: x.sum(0), (gradients, measured))
    return gradients, (left, measured)


@functools.cache
def wanted(num_stages):
    """The same for every schedule of as many stages."""
    schedule = build("1f1b", num_stages, M)
    return jax.device_get(jax.jit(in_a_row)(*arguments(Cut(schedule))))


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert g.dtype == w.dtype
        if np.issubdtype(w.dtype, np.integer):
            np.testing.assert_array_equal(g, w)
        else:
            np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5 * np.abs(w).max())


def over_ranks(tree):
    return jax.tree.map(lambda x: np.asarray(x).sum(0, dtype=x.dtype), tree)


def assert_trained(cut, found):
    (weights, shared), (left, measured) = wanted(cut.schedule.num_stages)
    assert_same(over_ranks(found.shared), shared)
    assert_same(over_ranks(found.left), left)
    for kind, of_rows, seen in zip(KINDS, found.groups, found.measured, strict=True):
        by_layer = functools.partial(
            jax.tree.map, functools.partial(cut.to_layers, kind)
        )
        assert_same(by_layer(of_rows), weights[kind])
        assert_same(by_layer(seen), measured[kind])


@each_size
@each_schedule
def test_every_schedule_finds_the_gradients_and_sums_of_layers_in_a_row(name, ranks):
    cut, traced = training(name, ranks)
    assert_trained(cut, result(cut, traced))


@each_size
@pytest.mark.parametrize("name", ["dualpipe", "dualpipe_v"])
def test_so_does_the_overlapped_loop_that_gpus_run(name, ranks, monkeypatch):
    taken = []

    def as_on_gpus(*operands, cpu, default):
        taken.append(default)
        return default(*operands)

    monkeypatch.setattr(jax.lax, "platform_dependent", as_on_gpus)
    cut, traced = training.__wrapped__(name, ranks)
    assert_trained(cut, result(cut, traced))
    assert taken


@each_schedule
def test_so_does_one_that_computes_its_stages_again(name):
    cut, traced = training(name, 2, recompute=True)
    assert_trained(cut, result(cut, traced))


def test_a_weight_whose_gradient_only_w_multiplies_gets_its_own_microbatchs_data(
    monkeypatch,
):
    def shifted(weights, state, batch, x):
        shift = batch["scale"][:, None] * weights["scale"]  # nothing that B asks for
        return (x + jnp.tanh(x @ weights["w"]) + shift, jnp.float32(0)), None

    monkeypatch.setitem(KINDS, "narrow", shifted)
    cut, traced = training.__wrapped__("zb_h1", 2)  # here W comes later than B
    narrow, _ = result(cut, traced).groups
    # A function of its own: JAX remembers what `in_a_row` was with other layers.
    (want, _), _ = jax.jit(lambda *given: in_a_row(*given))(*arguments(cut))
    for name, gradient in narrow.items():
        assert_same(cut.to_layers("narrow", gradient), want["narrow"][name])


@each_size
@each_schedule
def test_forward_passes_alone_find_the_same_sums(name, ranks):
    cut, traced = evaluation(name, ranks)
    found = result(cut, traced)
    _, (left, measured) = wanted(cut.schedule.num_stages)
    assert_same(over_ranks(found.left), left)
    for kind, seen in zip(KINDS, found.measured, strict=True):
        by_layer = functools.partial(cut.to_layers, kind)
        assert_same(jax.tree.map(by_layer, seen), measured[kind])


def permutations(jaxpr):
    """What is around each ppermute of a program."""
    for equation, inside in equations(jaxpr):
        if equation.primitive.name == "ppermute":
            yield inside


@each_size
@each_schedule
def test_a_tick_has_one_ppermute_for_each_way_and_none_that_a_rank_may_skip(
    name, ranks
):
    for get_traced, kept in ((training, lambda x: x), (evaluation, forward_only)):
        cut, traced = get_traced(name, ranks)
        ticks = as_ticks(kept(cut.schedule))
        ways = [way for way in ticks.ways("F") + ticks.ways("B") if way != SELF]
        found = list(permutations(traced.jaxpr.jaxpr))
        assert found == [("shard_map", "scan")] * len(ways)


@each_size
@each_schedule
def test_no_loop_copies_what_microbatches_have_left(name, ranks):
    cut, traced = training(name, ranks)
    _, _, count_PH = cut.rows["wide"]
    slots = as_ticks(cut.schedule).kept_slots
    hidden_bytes = slots * count_PH.max() * B * 2 * D * 4
    assert copies.largest_in_loops(compiled(traced).as_text()) < hidden_bytes
