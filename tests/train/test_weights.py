"""Training with sizes that a mesh's axes don't divide is training on one device.

What ZeRO can't divide has copies, and gradients that are summed besides.
"""

import jax
import pytest

from jmoe.config import RunConfig, override
from jmoe.nn.model import Transformer
from jmoe.train import layout as layouts
from tests.train.training import Trainer, on, random_variables

STEPS, A, B = 4, 2, 16
MESHES = [
    "data=2,expert=4,tensor=2",
    "data=2,expert=4,tensor=2,zero_stage=3",
    "data=2,pipe=2,expert=2,tensor=2",
]


@pytest.fixture(scope="module")
def run(smallest) -> RunConfig:
    """Sizes of 2 times an odd number, where the rules don't ask for more."""
    return override(
        smallest,
        [
            "model.vocab_size=304",
            "model.hidden_dim=34",
            "model.num_layers=5",
            "model.num_dense_layers=2",
            "model.attention.query_latent_dim=15",
            "model.attention.kv_latent_dim=18",
            "data.sequence_length=16",
            "train.steps=1000",
            f"train.batch_size={A * B}",
            f"train.microbatch_size={B}",
            "train.ramp_start=none",
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


@pytest.mark.parametrize("mesh", MESHES)
def test_what_does_not_divide_trains_as_on_one_device(run, variables, trained, mesh):
    Trainer.of(on(run, mesh), variables).train_beside(trained)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_stack_has_each_kind_of_what_does_not_divide(run, mesh):
    mesh = layouts.run_mesh(on(run, mesh).mesh)
    layout = layouts.make_layout(Transformer(run.model), mesh)
    placements = jax.tree.leaves(layout.placements["moe"])
    # Is it a matrix, in how many of its dimensions is it divided, and has it copies?
    found = {(len(p.whole) > 2, len(p.parts), bool(p.summed)) for p in placements}
    matrices = {(True, 2, False), (True, 1, True)}
    scales = {(False, 1, True), (False, 0, True)}
    assert matrices | scales <= found
