"""One step: what it optimises, and what accumulation, remat and loops can't change.

Shapes: A microbatch, B sequence, T position, L MoE layer, E expert, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jmoe.config import RunConfig, override
from jmoe.data.packing import Batch
from jmoe.nn.measured import Load, Measured
from jmoe.nn.model import Transformer, read_biases
from jmoe.parallel.reductions import Max
from jmoe.train import step as steps
from jmoe.train.accumulated import accumulate
from jmoe.train.layout import make_layout, run_mesh
from jmoe.train.losses import Losses
from jmoe.train.microbatch import Microbatch
from jmoe.train.state import TrainState
from tests.train.training import random_variables

SEQUENCES, T = 8, 32
RATE = 0.01
BIAS_RATE, MTP_WEIGHT, AUXILIARY_WEIGHT = 1e-3, 0.5, 2.0
FACTOR_L1 = np.float32([[0], [1], [2]])  # of the bias rate: moe_0, moe_1 and mtp_0
FROZEN, WITHOUT_MTP = 10, 15  # from these steps on, their rate or weight is 0

# Microbatches, loop and remat. Together they vary all that may change how a step is
# computed, and not what it is.
WHOLE = (1, "scan", "none")
VARIANTS = [(2, "scan", "block"), (4, "unroll", "save_dots")]

# Plain gradient descent; its state is the last gradient.
DESCENT = optax.GradientTransformation(
    init=lambda params: params,
    update=lambda gradients, *_: (
        jax.tree.map(lambda x: -RATE * x, gradients),
        gradients,
    ),
)


class Step(NamedTuple):
    """A state and its next, layers apart, and what was measured between them."""

    before: TrainState
    after: TrainState
    metrics: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def run(smallest) -> RunConfig:
    return override(
        smallest,
        [
            "model.num_dense_layers=0",
            "model.moe.router.auxiliary_loss=sequence",
            f"model.moe.router.auxiliary_weight={AUXILIARY_WEIGHT}",
            "train.steps=20",
            f"train.bias_rate={{'first': {BIAS_RATE}, 'last': 0.0, 'switch': 0.5}}",
            "train.bias_rate_factors=[{'layers': 'moe_0', 'factor': 0}, "
            "{'layers': 'mtp_*', 'factor': 2}]",
            f"train.mtp_weight={{'first': {MTP_WEIGHT}, 'last': 0.0, 'switch': 0.75}}",
        ],
    )


@pytest.fixture(scope="module")
def variables(run):
    return random_variables(run)


@pytest.fixture(scope="module")
def batch(run) -> Batch:
    """Two documents in every sequence, [B, T + 1]."""
    rng = np.random.default_rng(1)
    tokens_BT = rng.integers(0, run.model.vocab_size, (SEQUENCES, T + 1), np.int32)
    segment_BT = np.broadcast_to(np.arange(T + 1) >= 10, tokens_BT.shape)
    return Batch(tokens_BT, segment_BT.astype(np.int32))


@pytest.fixture(scope="module")
def take_steps(run, variables, batch):
    """Steps of gradient descent on one batch, by a variant's program."""

    @functools.cache
    def program(count, loop, remat):
        cfg = override(run, [f"model.layer_loop={loop}", f"model.remat={remat}"])
        return jax.jit(train_step(cfg)), jax.tree.map(
            lambda x: x.reshape(count, -1, T + 1), batch
        )

    @functools.cache
    def take(variant=WHOLE, *, start=0, num_steps=1) -> list[Step]:
        step, parts = program(*variant)
        convert = {"scan": lambda tree: tree, "unroll": unstack}[variant[1]]
        converted = {name: convert(tree) for name, tree in variables.items()}
        state = TrainState(jnp.int32(start), **converted, opt_state=converted["params"])
        taken = []
        for _ in range(num_steps):
            before, (state, metrics) = state, step(state, parts)
            taken.append(Step(apart(before), apart(state), jax.device_get(metrics)))
        return taken

    return take


def train_step(cfg: RunConfig) -> steps.TrainStep:
    model = Transformer(cfg.model)
    layout = make_layout(model, run_mesh(cfg.mesh))
    return steps.make_train_step(model, DESCENT, cfg, layout)


def unstack(tree):
    """A scanned model's collection as an unrolled model names its layers."""
    layers = {
        f"{kind}_{i}": jax.tree.map(lambda x, i=i: x[i], tree[kind])
        for kind in {"dense", "moe"} & tree.keys()
        for i in range(len(jax.tree.leaves(tree[kind])[0]))
    }
    return {name: tree[name] for name in tree.keys() - {"dense", "moe"}} | layers


def apart(state: TrainState) -> TrainState:
    """On the host, with the layers of a scan apart."""
    state = jax.device_get(state)
    return state.replace(
        params=unstack(state.params),
        router_state=unstack(state.router_state),
        opt_state=unstack(state.opt_state),
    )


def assert_close(got, want) -> None:
    """Relative to each array's largest entry."""
    jax.tree.map_with_path(
        lambda path, g, w: np.testing.assert_allclose(
            g, w, rtol=0, atol=1e-5 * np.abs(w).max(), err_msg=str(path)
        ),
        got,
        want,
    )


def biases(run, state: TrainState) -> np.ndarray:
    cfg = override(run, ["model.layer_loop=unroll"]).model
    return np.asarray(read_biases(state.router_state, cfg))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_counts_and_biases_are_the_same_to_the_bit_however_a_step_is_computed(
    take_steps, run, variant
):
    wanted, got = (take_steps(v, num_steps=3) for v in (WHOLE, variant))
    for want, step in zip(wanted, got, strict=True):
        np.testing.assert_array_equal(step.metrics["load_LE"], want.metrics["load_LE"])
        assert biases(run, step.after).tobytes() == biases(run, want.after).tobytes()
    assert len({biases(run, step.after).tobytes() for step in wanted}) == 3


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_losses_and_gradients_are_the_same_however_a_step_is_computed(
    take_steps, variant
):
    ((want,), (got,)) = (take_steps(v) for v in (WHOLE, variant))
    for name in ("loss", "mtp_loss", "aux_loss", "grad_norm"):
        np.testing.assert_allclose(
            got.metrics[name], want.metrics[name], rtol=1e-5, err_msg=name
        )
    assert_close(got.after.opt_state, want.after.opt_state)


def cross_entropy(logits_BTV, target_BT) -> jax.Array:
    log_p_BTV = jax.nn.log_softmax(logits_BTV)
    return -jnp.take_along_axis(log_p_BTV, target_BT[..., None], axis=-1)


def test_a_step_descends_the_weighted_sum_of_the_losses(
    take_steps, run, variables, batch
):
    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def oracle(params):
        output = Transformer(run.model).apply(
            variables | {"params": params}, batch.tokens_BT[:, :-1]
        )
        main = cross_entropy(output.logits, batch.tokens_BT[:, 1:]).mean()
        # The last position has a next token, but none after that.
        logits_BTV = output.mtp_logits[0][:, :-1]
        mtp = cross_entropy(logits_BTV, batch.tokens_BT[:, 2:]).mean()
        auxiliary = output.measured.losses["aux_loss"].value.sum()
        total = main + MTP_WEIGHT * mtp + AUXILIARY_WEIGHT * auxiliary
        return total, {"loss": main, "mtp_loss": mtp[None], "aux_loss": auxiliary}

    want, losses = jax.device_get(oracle(variables["params"]))
    (step,) = take_steps()
    for name, value in losses.items():
        np.testing.assert_allclose(step.metrics[name], value, rtol=1e-6, err_msg=name)
    norm = sum((x.astype(float) ** 2).sum() for x in jax.tree.leaves(want)) ** 0.5
    np.testing.assert_allclose(step.metrics["grad_norm"], norm, rtol=1e-5)
    assert_close(step.after.opt_state, unstack(want))


def test_each_layers_bias_takes_one_step_of_the_papers_rule_from_all_counts(
    take_steps, run
):
    for variant in (WHOLE, *VARIANTS):
        (step,) = take_steps(variant)
        load_LE = step.metrics["load_LE"]
        top_k = run.model.moe.router.top_k
        # The MTP module has no token to embed at the last position.
        seen_L = np.array([T, T, T - 1])
        assert load_LE.sum(-1).tolist() == (SEQUENCES * seen_L * top_k).tolist()
        error_LE = load_LE.mean(-1, keepdims=True) - load_LE
        rate_L1 = np.float32(BIAS_RATE) * FACTOR_L1
        want_LE = biases(run, step.before) + rate_L1 * np.sign(error_LE)
        np.testing.assert_array_equal(biases(run, step.after), np.float32(want_LE))
        np.testing.assert_array_equal(step.metrics["bias_LE"], np.float32(want_LE))


def test_a_bias_rate_of_0_freezes_the_bias_and_nothing_else(take_steps, run):
    for start, rate in ((FROZEN - 1, BIAS_RATE), (FROZEN, 0.0)):
        (step,) = take_steps(start=start)
        assert step.metrics["bias_rate"] == np.float32(rate)
        moved = np.any(biases(run, step.before) != biases(run, step.after))
        assert moved == (rate > 0)
        assert np.any(step.before.params["head"] != step.after.params["head"])


def test_the_mtp_modules_learn_until_their_weight_is_0(take_steps):
    for start in (WITHOUT_MTP - 1, WITHOUT_MTP):
        (step,) = take_steps(start=start)
        # The auxiliary loss reaches all of the module but its last norm.
        gradient_D = step.after.opt_state["mtp_0"]["norm"]["scale"]
        assert np.any(gradient_D) == (start < WITHOUT_MTP)
        assert np.isfinite(step.metrics["mtp_loss"]).all()


def test_a_step_counts_itself(take_steps):
    (step,) = take_steps(start=FROZEN)
    assert step.after.step == FROZEN + 1
    assert step.after.step.dtype == jnp.int32


def test_a_rule_that_needs_histograms_gets_them(run, variables, batch):
    cfg = override(run, ["model.moe.router.update_rule=quantile"])
    step = train_step(cfg)
    state = TrainState(jnp.int32(0), **variables, opt_state=variables["params"])
    parts = jax.tree.map(lambda x: x.reshape(2, -1, T + 1), batch)
    after, _ = jax.eval_shape(step, state, parts)  # the rule raises without
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_accumulation_adds_floats_in_float32_and_integers_exactly():
    def grad(part):
        tokens_BT = part.batch.tokens_BT
        value, counts = jnp.float32(tokens_BT.sum()), tokens_BT.sum(0)
        losses = Losses(value, value[None], {})
        load = Load(counts, counts[0], counts[0], counts)
        highest = {"highest": Max(-jnp.float32(tokens_BT.max()))}
        return {"w": 2 * value}, (losses, Measured(load, {}, highest))

    tokens_ABT = 2**24 + np.arange(12, dtype=np.int32).reshape(3, 2, 2)
    parts = Microbatch(Batch(tokens_ABT, tokens_ABT))
    gradients, losses, measured = accumulate(grad, parts)
    total = tokens_ABT.sum()
    np.testing.assert_allclose(gradients["w"], 2 * total, rtol=1e-6)
    np.testing.assert_allclose(losses.main, total, rtol=1e-6)
    np.testing.assert_allclose(losses.mtp_D, [total], rtol=1e-6)
    np.testing.assert_array_equal(measured.load.load_E, tokens_ABT.sum((0, 1)))
    np.testing.assert_array_equal(measured.load.margin_EM, tokens_ABT.sum((0, 1)))
    assert measured.metrics["highest"].value == -tokens_ABT[0].max()


def test_an_evaluation_sums_the_losses_within_documents(run, variables, batch):
    settings = ["model.mtp_depth=0", "train.bias_rate_factors=[]"]
    cfg = override(run, ["data.segment_masks=True", *settings])
    transformer = Transformer(cfg.model)
    variables = {
        name: {key: x for key, x in tree.items() if key != "mtp_0"}
        for name, tree in variables.items()
    }
    layout = make_layout(transformer, run_mesh(cfg.mesh))
    eval_step = steps.make_eval_step(transformer, cfg, layout)

    @jax.jit
    def measure(variables, batch):
        output = transformer.apply(variables, *(x[:, :-1] for x in batch[:2]))
        return output, eval_step(variables["params"], variables["router_state"], batch)

    output, evaluation = measure(variables, batch)
    total = cross_entropy(output.logits, batch.tokens_BT[:, 1:]).sum()
    np.testing.assert_allclose(evaluation.loss, total, rtol=1e-6)
    assert evaluation.tokens == SEQUENCES * T
    np.testing.assert_array_equal(evaluation.load_LE, output.measured.load.load_E)
