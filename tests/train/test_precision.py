"""Training with FP8 products: which tensors they touch, how far they lead astray."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.config import RunConfig, override
from jmoe.ops import fp8
from jmoe.train import layout as layouts
from tests.programs import equations
from tests.train.training import (
    GROUPED_QUERIES,
    Trainer,
    batch,
    on,
    random_variables,
)

VOCAB, EXPERTS, LENGTH = 312, 56, 40  # like no other dimension of the model
STEPS = 3


@pytest.fixture(scope="module")
def run(smallest) -> RunConfig:
    return override(
        smallest,
        [
            f"model.vocab_size={VOCAB}",
            "model.hidden_dim=160",  # more than a block
            "model.num_layers=3",
            f"model.moe.router.num_experts={EXPERTS}",
            f"data.sequence_length={LENGTH}",
            "train.batch_size=8",
            "train.microbatch_size=8",
            "train.ramp_start=none",
            "optimizer.schedule={'name': 'constant', 'peak': 1e-3}",
        ],
    )


def small_variables(run):
    scale = 0.25  # of weights that many numbers are summed with
    return jax.tree.map(lambda x: scale * x, random_variables(run))


@pytest.fixture(scope="module")
def variables(run):
    return small_variables(run)


@pytest.fixture(scope="module")
def native(run, variables):
    return Trainer.of(run, variables).train(STEPS).steps


@pytest.fixture(scope="module")
def in_fp8(run, variables):
    return Trainer.of(override(run, ["precision=fp8"]), variables).train(STEPS).steps


@pytest.fixture(scope="module")
def without_mtp(run):
    """Takes a step of the run with these settings and no MTP module."""
    run = override(run, ["model.mtp_depth=0"])
    variables = small_variables(run)

    def take(*settings):
        return Trainer.of(override(run, settings), variables).train(1).steps[0]

    return take


@pytest.fixture(scope="module")
def exact(without_mtp):
    return without_mtp()


def distance(got, want):
    """Returns the distance of the steps' gradients, as a part of their length."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    off = sum(float(np.square(g - w).sum()) for g, w in pairs)
    return np.sqrt(off / sum(float(np.square(w).sum()) for w in jax.tree.leaves(want)))


@pytest.mark.parametrize(
    ("recipe", "backend"),
    [*((recipe, "blocks") for recipe in fp8.RECIPES), ("fp8", "ragged")],
)
def test_a_step_is_off_by_what_e4m3_rounds(without_mtp, exact, recipe, backend):
    got = without_mtp(f"precision={recipe}", f"model.moe.backend={backend}")
    np.testing.assert_allclose(got.metrics["loss"], exact.metrics["loss"], rtol=5e-3)
    assert got.metrics["loss"] != exact.metrics["loss"]
    assert 1e-3 < distance(got.gradients, exact.gradients) < 0.15


@pytest.mark.parametrize("mesh", ["data=2,expert=4,tensor=2", "pipe=2,data=4,expert=2"])
def test_a_mesh_trains_in_fp8_as_one_device_does(run, variables, native, in_fp8, mesh):
    many = Trainer.of(on(run, mesh, "precision=fp8"), variables).train(STEPS).steps
    for got, want, exact in zip(many, in_fp8, native, strict=True):
        # Blocks end where a device's part does, so that a few numbers round otherwise.
        np.testing.assert_allclose(got.metrics["loss"], want.metrics["loss"], rtol=2e-3)
        astray = distance(want.gradients, exact.gradients)
        assert distance(got.gradients, want.gradients) < 1.5 * astray


def traced(run, variables):
    """The program of a step in FP8."""
    trainer = Trainer.of(override(run, ["precision=fp8"]), variables)
    rows = layouts.put_batch(trainer.layout, batch(run, seed=0))
    return trainer.step.trace(trainer.state, rows).jaxpr.jaxpr


def test_embedding_head_router_norms_and_softmax_stay_as_they_are(run, variables):
    shapes = set(quantized(traced(run, variables)))
    cfg = run.model
    hidden = cfg.hidden_dim
    assert shapes and not any(VOCAB in shape for shape in shapes)
    matrices = {shape[-2:] for shape in shapes}
    assert not {(hidden, EXPERTS), (EXPERTS, hidden)} & matrices
    assert (LENGTH, LENGTH) not in matrices
    # What is quantized: both sides of all linear layers and of the experts.
    tokens = run.train.batch_size * LENGTH
    assert {(tokens, hidden), (hidden, cfg.attention.kv_latent_dim + 8)} <= matrices
    assert (EXPERTS, hidden, 2 * cfg.moe.expert_mlp_dim) in shapes


@pytest.mark.parametrize(
    "settings", [[], [GROUPED_QUERIES]], ids=["latent attention", "grouped queries"]
)
def test_inputs_of_the_layer_after_attention_are_kept_in_e5m6(run, settings):
    run = override(run, settings)
    jaxpr = traced(run, random_variables(run))
    found = [e for e, _ in equations(jaxpr) if e.params.get("name") == "kept_in_e5m6"]
    attention = run.model.attention
    tokens = run.train.batch_size * LENGTH
    values = attention.num_heads * attention.value_dim
    kept = [e.outvars[0].aval for e in found]
    # Where differentiation needs none of it, a scalar stands for it.
    assert {x.shape for x in kept if x.dtype == jnp.bfloat16} == {(tokens, values)}


def quantized(jaxpr):
    """Shapes of all arrays that become e4m3, or what that leaves of them."""
    for equation, _ in equations(jaxpr):
        if equation.params.get("name") == "rounded":
            yield equation.outvars[0].aval.shape
        for out in equation.outvars:
            if getattr(out.aval, "dtype", None) == fp8.DTYPE:
                yield out.aval.shape


def test_a_precision_that_is_not_there_is_refused(run):
    with pytest.raises(ValueError, match="'int3' is not one of 'native', 'fp8'"):
        override(run, ["precision=int3"])
