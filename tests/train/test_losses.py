"""Which tokens a step learns from, and what each counts, against loops over them.

Shapes: A microbatch, B sequence, T position, V vocabulary, D depth of prediction.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.config import RunConfig, override
from jmoe.data.packing import PADDING, Batch
from jmoe.nn.measured import NOTHING, Loss
from jmoe.nn.model import Transformer
from jmoe.train import layout as layouts
from jmoe.train import losses
from tests.train.training import Trainer, batch, on, random_variables

DEPTH = 2
MTP_WEIGHT, AUXILIARY_WEIGHT, Z_WEIGHT = 0.5, 0.5, 0.01
MESHES = [
    "",
    "data=4,tensor=4,zero_stage=3",
    "data=2,expert=2,tensor=4",
    "pipe=2,data=2,tensor=4",
]


@pytest.fixture(scope="module")
def run(smallest) -> RunConfig:
    return override(
        smallest,
        [
            f"model.mtp_depth={DEPTH}",
            "model.vocab_size=304",
            "model.attention.num_heads=4",
            "data.sequence_length=16",
            "data.segment_masks=true",
            "train.batch_size=12",
            "train.microbatch_size=4",
            "train.ramp_start=none",
            f"train.mtp_weight={{'first': {MTP_WEIGHT}, 'last': 0.0}}",
            "model.moe.router.auxiliary_loss=global_batch",
            f"model.moe.router.auxiliary_weight={AUXILIARY_WEIGHT}",
            f"model.moe.router.z_loss_weight={Z_WEIGHT}",
            "optimizer.schedule={'name': 'constant', 'peak': 1e-3}",
        ],
    )


@pytest.fixture(scope="module")
def variables(run):
    return random_variables(run)


def reaches(segment_T, t, depth):
    """Whether t and the next `depth` inputs are tokens of one document."""
    seen = segment_T[t : t + depth + 1]
    last_input = len(segment_T) - 2
    return t + depth <= last_input and len({*seen.tolist()}) == 1 and seen[0] >= 0


def target_weights(batch, depth):
    """What the prediction of each position's token t + 1 + depth counts, float64."""
    weight_ABT = np.zeros(batch.tokens_BT[..., 1:].shape)
    for a, b, t in np.ndindex(*weight_ABT.shape):
        segment_T, then = batch.segment_BT[a, b], t + 1 + depth
        if not reaches(segment_T, t, depth) or segment_T[then] == PADDING:
            continue
        weight_ABT[a, b, t] = batch.is_target_BT[a, b, then]
    return weight_ABT / weight_ABT.sum()


def oracle(run, variables, batch):
    """Losses of each depth, in float64, those of the routers, the objective's gradient.

    Of all of the step's sequences as one microbatch.
    """
    weights = [target_weights(batch, depth) for depth in range(DEPTH + 1)]
    scale = [1.0, *[MTP_WEIGHT / DEPTH] * DEPTH]
    num_tokens = (batch.segment_BT[..., :-1] != PADDING).sum()

    def measure(params):
        rows = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batch)
        output = Transformer(run.model).apply(
            variables | {"params": params},
            rows.tokens_BT[:, :-1],
            rows.segment_BT[:, :-1],
            rows.segment_BT[:, :-1] >= 0,
        )
        found = []
        for depth, logits in enumerate((output.logits, *output.mtp_logits)):
            target = np.roll(rows.tokens_BT, -1 - depth, axis=1)[:, :-1, None]
            log_p_BTV = jax.nn.log_softmax(logits)
            found.append(jnp.take_along_axis(log_p_BTV, target, axis=-1)[..., 0])
        lost = {k: x.value.sum() for k, x in output.measured.losses.items()}
        lost["router_z_loss"] /= num_tokens
        return found, lost

    def objective(params):
        found, lost = measure(params)
        total = sum(
            -s * (w.reshape(x.shape) * x).sum()
            for s, w, x in zip(scale, weights, found, strict=True)
        )
        total += AUXILIARY_WEIGHT * lost["aux_loss"] + Z_WEIGHT * lost["router_z_loss"]
        return total, (found, lost)

    grad = jax.jit(jax.grad(objective, has_aux=True))
    gradient, (found, lost) = jax.device_get(grad(variables["params"]))
    values = [
        -(w.reshape(x.shape) * np.float64(x)).sum()
        for w, x in zip(weights, found, strict=True)
    ]
    return values, lost, gradient


def take(trainer, rows):
    """A step on these rows: the state after it, and what it measured."""
    return trainer.step(trainer.state, layouts.put_batch(trainer.layout, rows))


@pytest.fixture(scope="module")
def want(run, variables):
    return oracle(run, variables, batch(run, seed=0))


@pytest.fixture(scope="module")
def step_on(run, variables):
    """Takes a step on a mesh, once for all tests."""

    @functools.cache
    def take(mesh):
        trainer = Trainer.of(on(run, mesh, "pipeline.schedule=gpipe"), variables)
        return trainer.take(trainer.state, seed=0)[1]

    return take


@pytest.mark.parametrize("mesh", MESHES)
def test_every_counted_token_of_a_step_counts_the_same(step_on, want, mesh):
    """Whatever the microbatch and the device that has it; MTP depths are averaged.

    So do a router's choices and logits.
    """
    got = step_on(mesh)
    values, lost, gradient = want
    np.testing.assert_allclose(got.metrics["loss"], values[0], rtol=1e-6)
    np.testing.assert_allclose(got.metrics["mtp_loss"], values[1:], rtol=1e-6)
    for name in ("aux_loss", "router_z_loss"):
        np.testing.assert_allclose(got.metrics[name], lost[name], rtol=1e-5)
    jax.tree.map_with_path(
        lambda path, g, w: np.testing.assert_allclose(
            g, w, rtol=0, atol=2e-5 * np.abs(w).max(), err_msg=str(path)
        ),
        got.gradients,
        gradient,
    )


@pytest.mark.parametrize("mesh", MESHES)
def test_experts_count_the_tokens_that_are_there_and_no_others(run, step_on, mesh):
    rows = batch(run, seed=0)
    want = []
    for depth in (0, 1, 2):
        places = np.ndindex(*rows.tokens_BT[..., 1:].shape)
        want.append(sum(reaches(rows.segment_BT[a, b], t, depth) for a, b, t in places))
    counts = step_on(mesh).metrics["load_LE"].sum(-1) / run.model.moe.router.top_k
    assert counts.tolist() == want and want[0] > want[1] > want[2]


def test_what_stands_in_the_padding_changes_nothing(run, variables):
    trainer, rows = Trainer.of(run, variables), batch(run, seed=0)
    is_padding = rows.segment_BT == PADDING
    other = rows._replace(tokens_BT=np.where(is_padding, 7, rows.tokens_BT))
    assert (other.tokens_BT != rows.tokens_BT).any()
    (_, want), (_, got) = (take(trainer, r) for r in (rows, other))
    for name in ("loss", "mtp_loss", "load_LE", "bias_LE"):
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_a_document_ends_what_deeper_modules_predict_only_where_it_is_apart(run):
    segment_BT = np.array([[0, 0, 0, 1, 1, 1]], np.int32)
    rows = Batch(np.zeros_like(segment_BT), segment_BT)

    def found(depth, masked):
        cfg = override(run, [f"data.segment_masks={masked}"])
        return np.asarray(losses.is_target(rows, depth, cfg))[0].astype(int).tolist()

    # Token 3 opens a document: depth 0 predicts it from its neighbour, as the end.
    assert found(0, True) == [1, 1, 1, 1, 1]
    assert found(1, True) == [1, 1, 0, 1, 0]
    assert found(1, False) == [1, 1, 1, 1, 0]
    assert found(2, True) == [1, 0, 0, 0, 0]


def test_a_step_without_any_target_has_no_loss_and_no_gradient(run, variables):
    rows = batch(run, seed=0)
    empty = rows._replace(is_target_BT=np.zeros_like(rows.is_target_BT))
    weights = ["auxiliary_weight=0", "z_loss_weight=0"]
    unbound = override(run, [f"model.moe.router.{weight}" for weight in weights])
    trainer = Trainer.of(unbound, variables)
    state, got = take(trainer, empty)
    assert got["loss"] == 0 and not np.any(got["mtp_loss"])
    for gradient in jax.tree.leaves(state.opt_state[0]):
        assert not np.any(gradient)


def test_layers_add_their_means_over_tokens_and_over_microbatches(run):
    norms = losses.Normalisers((), jnp.float32(8), 4)
    loss_L = jnp.float32([2, 6, 16])
    lost = {per: Loss(loss_L, 3.0, per) for per in ("token", "microbatch", "step")}
    got = losses.layer_losses(NOTHING._replace(losses=lost), run, norms)
    means = {name: float(loss.value) for name, loss in got.layers.items()}
    assert means == {"token": 24 / 8, "microbatch": 24 / 4, "step": 24}
    assert losses.layer_objective(got) == 3 * (3 + 6 + 24)
    twice = losses.add_losses(got, losses.layer_losses(NOTHING, run, norms))
    assert twice.layers["step"].value == 24
    assert losses.layer_objective(losses.layer_losses(NOTHING, run, norms)) == 0


def test_a_replayed_step_counts_the_experts_that_it_was_told(run, variables):
    router = {"kind": "replayed", "auxiliary_loss": "none"}
    settings = [f"model.moe.router.{name}={value}" for name, value in router.items()]
    settings += ["pipeline.schedule=gpipe"]
    told = on(run, "pipe=2,data=2,tensor=4", *settings)
    rows, router = batch(told, seed=0), told.model.moe.router
    layers = told.model.num_moe_layers + DEPTH
    shape = (*rows.tokens_BT.shape[:2], layers, rows.tokens_BT.shape[2] - 1, 1)
    experts = np.tile(np.arange(router.num_experts, dtype=np.int32), shape)
    choices = np.random.default_rng(0).permuted(experts, axis=-1)[..., : router.top_k]
    trainer = Trainer.of(told, variables)
    _, got = take(trainer, rows._replace(choice_BLTK=choices))
    is_real = rows.segment_BT[..., :-1] != PADDING
    for layer in range(told.model.num_moe_layers):
        of_layer = choices[:, :, layer][is_real]
        want = np.bincount(of_layer.ravel(), minlength=router.num_experts)
        np.testing.assert_array_equal(got["load_LE"][layer], want)
