"""Training through a pipeline on sixteen devices is training on one.

Every schedule has a mesh of its own, so that each axis occurs beside `pipe`. Five
layers of two kinds make stages unequal, and leave some without a dense layer.
"""

import functools
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jmoe.checkpoint.store import Store
from jmoe.config import RunConfig, override
from jmoe.config import mesh as config
from jmoe.data.packing import Batch
from jmoe.nn.model import Transformer, make_variables
from jmoe.parallel.mesh import BATCH_AXES
from jmoe.parallel.schedule import SCHEDULES
from jmoe.train import layout as layouts
from jmoe.train import microbatch, pipelined, stages
from tests.train.training import (
    GROUPED_QUERIES,
    PIPELINES,
    Trainer,
    assert_same,
    batch,
    evaluate,
    on,
    random_variables,
)

STEPS = 6
MICROBATCHES = 8


@pytest.fixture(scope="module")
def run(smallest) -> RunConfig:
    return override(
        smallest,
        [
            "model.vocab_size=304",
            "data.sequence_length=16",
            "model.num_layers=5",
            "model.num_dense_layers=2",
            "model.attention.num_heads=4",
            "model.moe.router.num_experts=16",
            "model.moe.router.auxiliary_loss=switch",
            "model.moe.router.auxiliary_weight=0.5",
            "train.steps=1000",
            f"train.batch_size={8 * MICROBATCHES}",
            "train.microbatch_size=8",
            "train.ramp_start=none",
            "train.bias_rate={'first': 1e-3, 'last': 0.0}",
            "train.loss_chunk=24",
            "optimizer.schedule={'name': 'constant', 'peak': 5e-4}",
        ],
    )


@pytest.fixture(scope="module")
def variables(run):
    return random_variables(run)


@pytest.fixture(scope="module")
def unsharded(run, variables):
    return Trainer.of(run, variables).train(STEPS)


def scheduled(run, schedule) -> RunConfig:
    """The run by this schedule, on its mesh."""
    return on(run, PIPELINES[schedule], f"pipeline.schedule={schedule}")


@pytest.mark.parametrize("schedule", PIPELINES)
def test_a_pipeline_trains_as_one_device_does_with_the_same_bits_in_counts_and_biases(
    run, variables, unsharded, schedule
):
    trainer = Trainer.of(scheduled(run, schedule), variables)
    taken = trainer.train_beside(unsharded)
    assert not any(step.metrics["drop_rate_L"].any() for step in taken)


def test_every_schedule_has_a_mesh_and_a_name_in_the_config():
    assert tuple(SCHEDULES) == config.SCHEDULES == tuple(PIPELINES)


@pytest.mark.parametrize(
    "settings",
    [
        (
            "pipeline.remat=stage",
            "pipeline.microbatches=8",
            "train.microbatch_size=32",
            "model.moe.router.auxiliary_loss=sequence",
            "model.moe.router.update_rule=quantile",
            "data.segment_masks=true",
            "model.tie_embeddings=true",
            "model.moe.router.kind=noisy",
            "model.moe.router.noise_std=0.2",
            "model.moe.router.hash_layers=1",
        ),
        (
            "pipeline.schedule=dualpipe",
            "pipeline.remat=stage",
            "model.remat=block",
            "model.num_dense_layers=0",
            GROUPED_QUERIES,
            "model.mtp_depth=0",
            "model.moe.router.kind=expert_choice",
            "model.moe.router.auxiliary_loss=none",
            "model.moe.router.num_groups=1",
            "model.moe.router.groups_per_token=1",
        ),
        (
            "model.moe.router.auxiliary_loss=global_batch",
            "model.moe.router.z_loss_weight=0.01",
            "model.mtp_depth=2",
            "train.bias_rate_factors=[{'layers': 'mtp_1', 'factor': 0}]",
            "pipeline.schedule=zb_h1",
        ),
    ],
    ids=[
        "stages computed again, masks, tied, noise",
        "overlapped, grouped queries, blocks computed again, experts choose",
        "global batch's loss, z-loss, two MTP modules",
    ],
)
def test_other_models_train_in_a_pipeline_as_on_one_device(run, settings):
    changed = override(run, settings)
    make = functools.partial(make_variables, Transformer(changed.model), 0)
    variables = jax.device_get(jax.jit(make)())
    want = Trainer.of(changed, variables).train(1)
    mesh = "pipe=2,data=2,expert=4"
    got = Trainer.of(on(changed, mesh), variables).train(1)
    assert_same(got.steps[0], want.steps[0])


def test_a_pass_that_counts_for_the_global_batchs_loss_makes_no_logits(run):
    """The compiler would not leave them away: they are made in a loop of ticks."""
    small = [f"model.{it}" for it in ("num_layers=2", "num_dense_layers=0")]

    def products(loss):
        settings = [
            *small,
            "model.mtp_depth=0",
            f"model.moe.router.auxiliary_loss={loss}",
        ]
        changed = on(run, "pipe=2,data=8", *settings)
        trainer = Trainer.of(changed, random_variables(changed))
        rows = layouts.put_batch(trainer.layout, batch(changed, seed=0))
        text = trainer.step.lower(trainer.state, rows).as_text()
        made = re.findall(r"dot_general.*-> tensor<(.*)>", text)
        vocab = f"x{run.model.vocab_size}xf32"
        return len(made), sum(shape.endswith(vocab) for shape in made)

    (fewer, logits), (more, same) = products("sequence"), products("global_batch")
    assert fewer < more and logits == same > 0


@pytest.fixture(scope="module")
def evaluation(run, variables):
    """One on one device."""
    return evaluate(run, variables)


@pytest.mark.parametrize("mesh", ["pipe=2,data=8", "pipe=4,expert=2,tensor=2"])
def test_an_evaluation_in_a_pipeline_is_that_of_one_device(
    run, variables, evaluation, mesh
):
    want, got = evaluation, evaluate(on(run, mesh), variables)
    np.testing.assert_allclose(got.loss, want.loss, rtol=1e-5)
    assert got.tokens == want.tokens
    np.testing.assert_array_equal(got.load_LE, want.load_LE)


def test_hidden_states_in_a_pipeline_are_those_of_one_device(run, variables):
    changed = on(run, "pipe=2,data=2,expert=2,tensor=2")
    trainer, model = Trainer.of(changed, variables), Transformer(run.model)
    hidden_states = layouts.on_mesh(
        pipelined.make_hidden_states(model, changed, trainer.layout),
        trainer.layout,
        (trainer.layout.stored, layouts.WHOLE, P(BATCH_AXES)),
        P(BATCH_AXES, "tensor"),
    )
    tokens_BT = batch(run, seed=0).tokens_BT[0, :, :-1]
    state = trainer.state
    got = jax.jit(hidden_states)(state.params, state.router_state, tokens_BT)
    features = jax.jit(functools.partial(model.apply, method="features"))
    want = features(variables, tokens_BT).hidden_BSD
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("schedule", [None, "dualpipe_v"])
def test_a_pipelines_checkpoint_goes_on_in_another_shape(
    run, variables, tmp_path, schedule
):
    one = Trainer.of(scheduled(run, "dualpipe"), variables)
    other = Trainer.of(scheduled(run, schedule) if schedule else run, variables)
    saved, _ = one.take(one.state, seed=0)
    _, want = one.take(saved, seed=1)
    with Store(tmp_path) as store:
        store.save(1, saved, {})
        restored, _, _ = store.restore(layouts.abstract(other.layout, lambda: saved))
    jax.tree.map(np.testing.assert_array_equal, restored, saved)
    _, got = other.take(restored, seed=1)
    assert_same(got, want)


# From 2 microbatches to 8.
RAMP = ("train.ramp_start=16", "train.ramp_steps=60")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["pipeline.schedule=2f2b"], "'2f2b' is not one of 'gpipe', '1f1b'"),
        (["pipeline.microbatches=12"], "=12 must be a multiple of the 8 that"),
        (["pipeline.microbatches=128"], "divide the 64 sequences"),
        # A ramp's first batches are of 2, then of 3 microbatches.
        (
            [*RAMP, "pipeline.microbatches=16"],
            "pipeline.microbatches=16 must be a multiple of the 3 that",
        ),
        (
            [*RAMP, "train.ramp_increment=16", "pipeline.microbatches=48"],
            "divide the 16 sequences that each part of a batch of 16 has",
        ),
        (["mesh.zero_stage=3"], "zero_stage=3 must be 1 with pipe=2"),
        (["model.layer_loop=unroll"], "layer_loop='unroll' must be 'scan' with"),
        (["pipeline.remat=block"], "remat='block' is not one of 'none', 'stage'"),
    ],
)
def test_a_pipeline_that_no_mesh_can_run_is_refused(run, settings, message):
    with pytest.raises(ValueError, match=message):
        on(run, "pipe=2", *settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["mesh.pipe=3", "pipeline.schedule=dualpipe"], "num_ranks=3 must be even"),
        (
            ["mesh.pipe=8", "pipeline.schedule=dualpipe"],
            "num_microbatches=8 must be even and at least 16",
        ),
        (
            ["mesh.pipe=2", "pipeline.schedule=dualpipe", *RAMP],
            "num_microbatches=2 must be even and at least 4",
        ),
        (
            ["mesh.pipe=2", "pipeline.schedule=dualpipe", *RAMP, "train.ramp_start=32"],
            "num_microbatches=5 must be even and at least 4",
        ),
        (["mesh.pipe=6"], "6 stages are more than the 5 layers"),
        (
            ["mesh.pipe=4", "pipeline.schedule=interleaved_1f1b"],
            "8 stages are more than the 5 layers",
        ),
    ],
)
def test_a_schedule_that_cannot_take_the_run_is_refused(run, settings, message):
    changed = override(run, settings)
    with pytest.raises(ValueError, match=message):
        stages.check(changed)


def test_every_batch_of_a_ramp_that_is_accepted_can_be_divided(run):
    ramp = ("train.ramp_start=32", "train.ramp_steps=9", "train.ramp_increment=32")
    changed = on(run, "pipe=2,data=2", *ramp, "pipeline.microbatches=16")
    stages.check(changed)
    assert list(changed.train.ramp.values()) == [4, 8]
    for count in changed.train.ramp.values():
        rows = np.zeros((count, 8 // changed.mesh.batch_parts, 17), np.int32)
        divided = microbatch.divide(microbatch.Microbatch(Batch(rows, rows)), 16)
        assert divided.batch.tokens_BT.shape == (16, count * 4 // 16, 17)
