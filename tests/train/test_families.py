"""A model of every family trains on every mesh and schedule as on one device.

By default for a few steps, each family on one mesh and by one schedule; `test_mesh` and
`test_pipeline` have V3's blocks on all of them. All: `pytest -m long`.
"""

import dataclasses
import functools
import itertools

import pytest

from jmoe.config import MeshConfig, RunConfig, override
from tests.families.cases import TINY, with_heads_of
from tests.train.training import MESHES, PIPELINES, Trainer, on, random_variables

FEW, STEPS = 4, 20
TIES = 9  # three tokens' choices: what a tie decides, later layers go on with

# As small as sixteen devices can divide, with enough layers for every schedule.
SHAPE = (
    "hidden_dim=16",
    "num_layers=4",
    "layer_loop=scan",
    "dense_mlp_dim=16",
    "moe.expert_mlp_dim=16",
    "moe.router.num_experts=16",
)
OF_KIND = {
    "mla": (
        "attention.num_heads=16",
        "attention.nope_dim=2",
        "attention.rope_dim=4",
        "attention.value_dim=4",
    ),
    "gqa": (
        "attention.num_heads=32",
        "attention.num_kv_heads=16",
        "moe.router.num_groups=1",
        "moe.router.groups_per_token=1",
    ),
}
FAMILIES = [name for name in TINY if name != "kimi_k2"]  # it is V3 by another name
PLACES = {
    **{mesh: (mesh,) for mesh in MESHES},
    **{
        f"{schedule} on {mesh}": (
            mesh,
            f"pipeline.schedule={schedule}",
            f"pipeline.microbatches={2 * MeshConfig.parse(mesh).pipe}",
        )
        for schedule, mesh in PIPELINES.items()
    },
}


def kind(family) -> str:
    return TINY[family].attention.kind


# Where `tensor` divides the heads, or a schedule has weights twice.
BY_DEFAULT = {
    ("deepseek_v2", "data=2,expert=4,tensor=2"),
    ("deepseek_v2", "zb_h1 on pipe=4,data=2,tensor=2"),
    ("glm4_moe", "expert=4,tensor=4"),
    ("glm4_moe", "dualpipe_v on pipe=2,data=2,expert=2,tensor=2"),
    ("dots1", "data=2,expert=2,tensor=4,zero_stage=3"),
    ("dots1", "interleaved_1f1b on pipe=2,expert=4,tensor=2"),
    ("qwen3_moe", "data=4,tensor=4"),
    ("qwen3_moe", "dualpipe on pipe=4,expert=4"),
}
CASES = [
    *(pytest.param(*case, FEW) for case in sorted(BY_DEFAULT)),
    *(
        pytest.param(*case, STEPS, marks=pytest.mark.long)
        for case in itertools.product(FAMILIES, PLACES)
    ),
]


@pytest.fixture(scope="module")
def training(smallest):
    """Gives a family's run, initial variables and steps on one device."""

    @functools.cache
    def of(family, steps):
        run = make_run(smallest, family)
        variables = random_variables(run)
        return run, variables, Trainer.of(run, variables).train(steps)

    return of


def make_run(smallest, family) -> RunConfig:
    """Microbatches that a mesh divides, of which a pipeline makes smaller ones."""
    model = override(TINY[family], [*SHAPE, *OF_KIND[kind(family)]])
    if kind(family) == "gqa":  # a norm of fewer numbers would magnify roundings
        model = with_heads_of(model, 8)
    return override(
        dataclasses.replace(smallest, model=model),
        [
            "data.sequence_length=16",
            "train.steps=1000",
            "train.batch_size=32",
            "train.microbatch_size=16",
            "train.ramp_start=none",
            "train.bias_rate={'first': 1e-3, 'last': 0.0}",
            "train.loss_chunk=24",
            "optimizer.schedule={'name': 'constant', 'peak': 5e-4}",
        ],
    )


def test_every_family_is_tried_on_a_mesh_and_in_a_pipeline_by_default():
    as_v3 = dataclasses.replace(TINY["kimi_k2"], family="deepseek_v3")
    assert as_v3 == TINY["deepseek_v3"]
    for places in (MESHES, PLACES.keys() - {*MESHES}):
        tried = {family for family, place in BY_DEFAULT if place in places}
        assert tried | {"deepseek_v3"} == {*FAMILIES}


@pytest.mark.parametrize(("family", "place", "steps"), CASES)
def test_a_family_trains_there_as_on_one_device_with_the_same_counts_and_biases(
    training, family, place, steps
):
    run, variables, want = training(family, steps)
    trainer = Trainer.of(on(run, *PLACES[place]), variables)
    taken = trainer.train_beside(want, of_a_tie=TIES)
    assert len(taken) == steps
    assert not any(step.metrics["drop_rate_L"].any() for step in taken)
