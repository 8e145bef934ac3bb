"""Training with lent experts is training without, on every mesh and schedule.

By default for a few steps, on a mesh and in a pipeline; all: `pytest -m long`. As any
state is that of one device, a run may go on with another backend. A step has several
microbatches.
"""

import functools

import pytest

from jmoe.config import override
from jmoe.config.mesh import SCHEDULES
from tests.train.training import MESHES, PIPELINES, Trainer, on, random_variables

FEW, STEPS = 4, 20
BALANCED = ("model.moe.exchange.backend=balanced", "model.moe.exchange.lend_above=0.0")
PLACES = {
    **{mesh: () for mesh in MESHES if "expert" in mesh},
    **{
        mesh: (f"pipeline.schedule={schedule}",)
        for schedule, mesh in PIPELINES.items()
        if "expert" in mesh
    },
    # The schedules that are tried elsewhere without experts' devices.
    "pipe=2,data=2,expert=4": ("pipeline.schedule=gpipe",),
    "pipe=4,expert=2,tensor=2": ("pipeline.schedule=zb_h1",),
    # What a backward pass computes again, in chunks, layer by layer.
    "data=2,expert=8": (
        *("model.remat=block", "model.moe.remat=activations"),
        *("model.moe.exchange.chunks=2", "model.layer_loop=unroll"),
    ),
}
BY_DEFAULT = "data=2,expert=2,tensor=4,zero_stage=3", "pipe=4,expert=4"


@pytest.fixture(scope="module")
def training(smallest):
    """Gives the run, initial variables and steps on one device."""
    run = override(
        smallest,
        [
            "model.vocab_size=304",
            "data.sequence_length=16",
            "model.num_layers=5",
            "model.num_dense_layers=1",
            "model.attention.num_heads=16",
            "model.moe.router.num_experts=16",
            "train.steps=1000",
            "train.batch_size=128",
            "train.microbatch_size=16",
            "train.ramp_start=none",
            "train.bias_rate={'first': 1e-3, 'last': 0.0}",
            "train.loss_chunk=24",
            "optimizer.schedule={'name': 'constant', 'peak': 5e-4}",
        ],
    )
    variables = random_variables(run)

    @functools.cache
    def on_one_device(steps):
        return Trainer.of(run, variables).train(steps)

    return run, variables, on_one_device


@pytest.mark.parametrize(
    ("place", "steps"),
    [
        *((place, FEW) for place in BY_DEFAULT),
        *(pytest.param(place, STEPS, marks=pytest.mark.long) for place in PLACES),
    ],
)
def test_lent_experts_train_as_one_device_does_with_the_same_bits_in_counts_and_biases(
    training, place, steps
):
    run, variables, on_one_device = training
    changed = on(run, place, *PLACES[place], *BALANCED)
    taken = Trainer.of(changed, variables).train_beside(on_one_device(steps))
    assert not any(step.metrics["drop_rate_L"].any() for step in taken)
    for step in taken:
        lent = step.metrics["experts_lent_L"].sum()
        assert lent > 0 and lent == step.metrics["lent_PP"].sum()


def test_every_schedule_is_tried():
    tried = {setting for settings in PLACES.values() for setting in settings}
    assert {f"pipeline.schedule={schedule}" for schedule in SCHEDULES} <= tried
