"""Training on sixteen devices against training on one.

Shapes: A microbatch, B sequence, T position, L MoE layer, E expert.
"""

import functools

import jax
import numpy as np
import pytest

from jmoe.config import RunConfig, override
from jmoe.nn.model import Transformer, make_variables
from jmoe.plan import traffic
from jmoe.train import layout as layouts
from jmoe.train.optimizer import make_optimizer
from tests.train.training import (
    GROUPED_QUERIES,
    MESHES,
    Trainer,
    assert_same,
    batch,
    evaluate,
    on,
    on_host,
    random_variables,
)

STEPS, A, B = 8, 2, 16
ONE = ""
LENDING = "model.moe.exchange.backend=balanced", "model.moe.exchange.lend_above=0.0"

# Of these, a mesh of all three axes has both.
PAIRS = {"data=4,expert=4", "data=4,tensor=4"}
each_mesh = pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(mesh, marks=pytest.mark.long if mesh in PAIRS else ())
        for mesh in MESHES
    ],
)


@pytest.fixture(scope="module")
def run(smallest) -> RunConfig:
    """Sixteen of what sixteen devices divide."""
    return override(
        smallest,
        [
            "model.vocab_size=304",
            "data.sequence_length=16",
            "model.attention.num_heads=16",
            "model.moe.router.num_experts=16",
            "model.moe.router.auxiliary_loss=switch",
            "model.moe.router.auxiliary_weight=0.5",
            "train.steps=1000",
            f"train.batch_size={A * B}",
            f"train.microbatch_size={B}",
            "train.ramp_start=none",
            "train.bias_rate={'first': 1e-3, 'last': 0.0}",
            "train.loss_chunk=24",
            "optimizer.schedule={'name': 'constant', 'peak': 1e-3}",
        ],
    )


@pytest.fixture(scope="module")
def variables(run):
    return random_variables(run)


@pytest.fixture(scope="module")
def trained(run, variables):
    """A training on one device."""
    return Trainer.of(run, variables).train(STEPS)


@each_mesh
def test_a_mesh_trains_as_one_device_does_with_the_same_bits_in_counts_and_biases(
    run, variables, trained, mesh
):
    taken = Trainer.of(on(run, mesh), variables).train_beside(trained)
    assert not any(step.metrics["drop_rate_L"].any() for step in taken)


def test_the_steps_compared_differ_from_each_other(trained):
    taken = trained.steps
    assert len({step.metrics["bias_LE"].tobytes() for step in taken}) == STEPS
    assert np.std([step.metrics["loss"] for step in taken]) > 0.01


@pytest.mark.parametrize(
    "settings",
    [
        (
            "model.moe.router.auxiliary_loss=sequence",
            "model.moe.router.update_rule=quantile",
            "data.segment_masks=true",
            "model.tie_embeddings=true",
        ),
        (
            "model.attention.query_latent_dim=none",
            "model.moe.exchange.chunks=2",
            "model.layer_loop=unroll",
            "model.remat=block",
            "model.moe.router.kind=noisy",
            "model.moe.router.noise_std=0.2",
            "model.moe.router.hash_layers=1",
        ),
        (
            "model.moe.router.auxiliary_loss=global_batch",
            "model.moe.router.z_loss_weight=0.01",
            "model.mtp_depth=2",
            "train.bias_rate_factors=[{'layers': 'mtp_1', 'factor': 0}]",
        ),
        (
            GROUPED_QUERIES,
            "model.num_layers=1",
            "model.num_dense_layers=0",
            "model.mtp_depth=0",
            "model.remat=block",
            "mesh.zero_stage=3",
        ),
    ],
    ids=[
        "sequence loss, quantile rule, masks, tied",
        "full queries, chunks, unrolled, noise",
        "global batch's loss, z-loss, two MTP modules",
        "grouped queries, recomputed, ZeRO-3",
    ],
)
def test_other_models_train_on_a_mesh_as_on_one_device(run, settings):
    changed = override(run, settings)
    make = functools.partial(make_variables, Transformer(changed.model), 0)
    variables = jax.device_get(jax.jit(make)())
    want = Trainer.of(changed, variables).train(1)
    mesh = "data=2,expert=4,tensor=2"
    got = Trainer.of(on(changed, mesh), variables).train(1)
    assert_same(got.steps[0], want.steps[0])


@pytest.fixture(scope="module")
def evaluation(run, variables):
    """One on one device."""
    return evaluate(run, variables)


@pytest.mark.parametrize(
    ("mesh", "settings"),
    [
        ("data=16", ()),
        ("data=2,expert=4,tensor=2", ()),
        ("data=2,expert=4,tensor=2", LENDING),
    ],
)
def test_an_evaluation_is_the_same_on_a_mesh(
    run, variables, evaluation, mesh, settings
):
    want, got = evaluation, evaluate(on(run, mesh, *settings), variables)
    np.testing.assert_allclose(got.loss, want.loss, rtol=1e-5)
    assert got.tokens == want.tokens
    np.testing.assert_array_equal(got.load_LE, want.load_LE)


def test_an_exchange_that_only_gpus_have_is_refused_where_it_would_be_needed(run):
    moe = on(run, ONE, "model.moe.exchange.backend=ragged").model.moe
    layouts.check_exchange(moe, layouts.run_mesh(on(run, "data=16").mesh))
    with pytest.raises(ValueError, match="backend='ragged' needs GPUs"):
        layouts.check_exchange(moe, layouts.run_mesh(on(run, "expert=16").mesh))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("slots=99", "exchange.slots=99 must be at most"),
        ("node_size=3", "exchange.node_size=3 must divide the devices of expert=16"),
    ],
)
def test_loans_that_the_mesh_has_no_room_for_are_refused_before_a_run(
    run, setting, message
):
    settings = "model.moe.exchange.backend=balanced", f"model.moe.exchange.{setting}"
    moe = on(run, ONE, *settings).model.moe
    layouts.check_exchange(moe, layouts.run_mesh(on(run, "data=16").mesh))
    with pytest.raises(ValueError, match=message):
        layouts.check_exchange(moe, layouts.run_mesh(on(run, "expert=16").mesh))


def test_heads_of_keys_that_do_not_divide_are_refused_by_name(run):
    changed = on(run, "tensor=4,data=4", GROUPED_QUERIES)
    mesh = layouts.run_mesh(changed.mesh)
    message = "/key/.*: dimension 'kv_heads' of size 2 must divide over tensor=4"
    with pytest.raises(ValueError, match=message):
        layouts.make_layout(Transformer(changed.model), mesh)


def bytes_on_a_device(tree) -> int:
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("data", [2, 4, 8])
def test_zero_divides_weights_and_moments_by_the_data_axis(run, variables, data):
    def stored(spec):
        mesh = layouts.make_mesh(on(run, spec).mesh, jax.devices()[: 2 * data])
        layout = layouts.make_layout(Transformer(run.model), mesh)
        params = variables["params"]
        optimizer = make_optimizer(run.optimizer, 10, layout)
        opt_state = on_host(jax.jit(optimizer.init), params)
        where = layouts.shardings(layout, (params, opt_state))
        return bytes_on_a_device(jax.device_put((params, opt_state), where))

    total = 3 * sum(x.nbytes for x in jax.tree.leaves(variables["params"]))
    assert stored(f"data={data},tensor=2") == pytest.approx(total / data / 2, rel=0.05)


@pytest.mark.parametrize(("stage", "times"), [(1, 1), (3, A)])
def test_gradients_are_reduced_once_a_step_or_by_layer(run, variables, stage, times):
    trainer = Trainer.of(on(run, f"data=16,zero_stage={stage}"), variables)
    rows = layouts.put_batch(trainer.layout, batch(run, seed=0))
    text = trainer.step.lower(trainer.state, rows).compile().as_text()
    found = traffic.collectives(text, trainer.layout.mesh.shape)
    received = sum(
        x.times * x.operand_bytes // x.devices
        for x in found
        if x.kind == "reduce-scatter"
    )
    layers = {"dense", "moe", "mtp_0"}
    expected = sum(
        x.nbytes * (times if path[0].key in layers else 1) // 16
        for path, x in jax.tree.leaves_with_path(variables["params"])
    )
    assert received == pytest.approx(expected, rel=0.02)
