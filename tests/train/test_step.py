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
from flax.core import meta

from jmoe.config import RunConfig, model, override
from jmoe.data.packing import Batch
from jmoe.nn.model import Transformer, read_biases
from jmoe.nn.router import Stats
from jmoe.train import step as steps
from jmoe.train.state import TrainState

SEQUENCES, T = 8, 32
RATE = 1e-3  # of plain gradient descent, which leaves gradients readable
BIAS_RATE, MTP_WEIGHT, AUXILIARY_WEIGHT = 1e-3, 0.5, 2.0
FROZEN, WITHOUT_MTP = 10, 15  # from these steps on, their rate or weight is 0

# Microbatches, loop and remat. Together they vary all that may change how a step is
# computed, and not what it is.
WHOLE = (1, "scan", "none")
VARIANTS = [(2, "scan", "block"), (4, "unroll", "save_dots")]


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
            "model.num_layers=3",
            "model.moe.router.auxiliary_loss=sequence",
            f"model.moe.router.auxiliary_weight={AUXILIARY_WEIGHT}",
            "train.steps=20",
            f"train.bias_rate={{'first': {BIAS_RATE}, 'last': 0.0, 'switch': 0.5}}",
            f"train.mtp_weight={{'first': {MTP_WEIGHT}, 'last': 0.0, 'switch': 0.75}}",
        ],
    )


@pytest.fixture(scope="module")
def variables(run):
    """Random, and large enough for every part, biases too, to decide what is chosen."""
    rng = np.random.default_rng(0)
    tokens_BT = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(Transformer(run.model).init, jax.random.key(0), tokens_BT)

    def draw(path, shape):
        scale, mean = {"scale": (0.1, 1), "bias": (0.05, 0)}.get(path[-1].key, (0.2, 0))
        return jnp.float32(mean + scale * rng.normal(size=shape.shape))

    return jax.tree.map_with_path(draw, meta.unbox(shapes))


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
    optimizer = optax.sgd(RATE)

    @functools.cache
    def program(count, loop, remat):
        cfg = override(run, [f"model.layer_loop={loop}", f"model.remat={remat}"])
        step = steps.make_train_step(Transformer(cfg.model), optimizer, cfg)
        return jax.jit(step), jax.tree.map(lambda x: x.reshape(count, -1, T + 1), batch)

    @functools.cache
    def take(variant=WHOLE, *, start=0, num_steps=1) -> list[Step]:
        step, parts = program(*variant)
        convert = {"scan": lambda tree: tree, "unroll": unstack}[variant[1]]
        params, router_state = convert(variables["params"]), variables["router_state"]
        state = TrainState(
            jnp.int32(start), params, convert(router_state), optimizer.init(params)
        )
        taken = []
        for _ in range(num_steps):
            before, (state, metrics) = state, step(state, parts)
            taken.append(Step(apart(before), apart(state), jax.device_get(metrics)))
        return taken

    return take


def unstack(tree):
    """A scanned model's collection as an unrolled model names its layers."""
    layers = {
        f"{kind}_{i}": jax.tree.map(lambda x, i=i: x[i], tree[kind])
        for kind in {"dense", "moe"} & tree.keys()
        for i in range(len(jax.tree.leaves(tree[kind])[0]))
    }
    return {name: tree[name] for name in tree.keys() - {"dense", "moe"}} | layers


def apart(state: TrainState) -> TrainState:
    return state.replace(
        params=unstack(state.params), router_state=unstack(state.router_state)
    )


def gradients(step: Step):
    return jax.tree.map(
        lambda a, b: (np.asarray(a) - b) / RATE, step.before.params, step.after.params
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
    jax.tree.map_with_path(
        lambda path, g, w: np.testing.assert_allclose(
            g, w, rtol=0, atol=1e-3 * np.abs(w).max() + 1e-4, err_msg=str(path)
        ),
        gradients(got),
        gradients(want),
    )


def test_a_step_descends_the_sum_of_all_losses_as_weighted(take_steps):
    first, second = take_steps(start=FROZEN, num_steps=2)  # the bias moves the loss too

    def total(metrics):
        return (
            metrics["loss"]
            + MTP_WEIGHT * metrics["mtp_loss"].mean()
            + AUXILIARY_WEIGHT * metrics["aux_loss"]
        )

    fall = total(first.metrics) - total(second.metrics)
    print(fall, RATE * first.metrics["grad_norm"] ** 2, first.metrics, second.metrics)
    np.testing.assert_allclose(fall, RATE * first.metrics["grad_norm"] ** 2, rtol=0.05)


def test_the_bias_takes_one_step_of_the_papers_rule_from_all_counts(take_steps, run):
    for variant in (WHOLE, *VARIANTS):
        (step,) = take_steps(variant)
        load_LE = step.metrics["load_LE"]
        top_k = run.model.moe.router.top_k
        assert load_LE.sum(-1).tolist() == 3 * [SEQUENCES * T * top_k]
        error_LE = load_LE.mean(-1, keepdims=True) - load_LE
        want_LE = biases(run, step.before) + np.float32(BIAS_RATE) * np.sign(error_LE)
        np.testing.assert_array_equal(biases(run, step.after), np.float32(want_LE))
        np.testing.assert_array_equal(step.metrics["bias_LE"], np.float32(want_LE))


def test_a_bias_rate_of_0_freezes_the_bias_and_nothing_else(take_steps, run):
    for start, rate in ((FROZEN - 1, BIAS_RATE), (FROZEN, 0.0)):
        (step,) = take_steps(start=start)
        assert step.metrics["bias_rate"] == np.float32(rate)
        moved = np.any(biases(run, step.before) != biases(run, step.after))
        assert moved == (rate > 0)
        assert np.any(gradients(step)["head"])


def test_the_mtp_modules_learn_until_their_weight_is_0(take_steps):
    for start in (WITHOUT_MTP - 1, WITHOUT_MTP):
        (step,) = take_steps(start=start)
        learnt = any(np.any(g) for g in jax.tree.leaves(gradients(step)["mtp_0"]))
        assert learnt == (start < WITHOUT_MTP)
        assert np.isfinite(step.metrics["mtp_loss"]).all()


def test_a_step_counts_itself(take_steps):
    (step,) = take_steps(start=FROZEN)
    assert step.after.step == FROZEN + 1
    assert step.after.step.dtype == jnp.int32


@pytest.mark.parametrize("rule", model.UPDATE_RULES)
def test_every_update_rule_gets_what_it_asks_for(run, variables, batch, rule):
    cfg = override(run, [f"model.moe.router.update_rule={rule}"])
    step = steps.make_train_step(Transformer(cfg.model), optax.sgd(RATE), cfg)
    state = TrainState(jnp.int32(0), **variables, opt_state=optax.sgd(RATE).init(0))
    parts = jax.tree.map(lambda x: x.reshape(2, -1, T + 1), batch)
    after, _ = jax.eval_shape(step, state, parts)
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_accumulation_averages_floats_and_adds_integers():
    def grad(part):
        value = jnp.float32(part.tokens_BT.sum())
        losses = steps.Losses(value, value[None], value)
        counts = part.tokens_BT.sum(0)
        return {"w": 2 * value}, (losses, Stats(counts, counts[0], counts, value))

    tokens_ABT = 2**24 + np.arange(12, dtype=np.int32).reshape(3, 2, 2)
    gradients, losses, stats = steps.accumulate(grad, Batch(tokens_ABT, tokens_ABT))
    mean = tokens_ABT.sum() / 3
    np.testing.assert_allclose(gradients["w"], 2 * mean, rtol=1e-6)
    np.testing.assert_allclose(losses.main, mean, rtol=1e-6)
    np.testing.assert_allclose(losses.mtp_D, [mean], rtol=1e-6)
    np.testing.assert_array_equal(stats.load_E, tokens_ABT.sum((0, 1)))  # exactly
    np.testing.assert_array_equal(stats.margin_EM, tokens_ABT.sum((0, 1)))


def cross_entropy(logits_BTV, target_BT) -> np.ndarray:
    logits_BTV = np.float64(logits_BTV)
    log_sum_BT = np.log(np.exp(logits_BTV).sum(-1))
    return log_sum_BT - np.take_along_axis(logits_BTV, target_BT[..., None], -1)[..., 0]


@pytest.mark.parametrize("masked", [False, True])
def test_losses_are_of_the_next_tokens_and_evaluation_sums_them(
    run, variables, batch, masked
):
    cfg = override(run, [f"data.segment_masks={masked}"])
    transformer = Transformer(run.model)

    @jax.jit
    def measure(variables, batch):
        tokens_BT, segment_BT = batch
        output = transformer.apply(
            variables, tokens_BT[:, :-1], segment_BT[:, :-1] if masked else None
        )
        evaluation = steps.make_eval_step(transformer, cfg)(
            variables["params"], variables["router_state"], batch
        )
        losses, _ = steps.microbatch_losses(
            transformer, variables["params"], variables["router_state"], batch, cfg
        )
        return output, evaluation, losses

    output, evaluation, losses = measure(variables, batch)
    tokens_BT = batch.tokens_BT
    want_BT = cross_entropy(output.logits, tokens_BT[:, 1:])
    np.testing.assert_allclose(losses.main, want_BT.mean(), rtol=1e-6)
    np.testing.assert_allclose(evaluation.loss, want_BT.sum(), rtol=1e-6)
    assert evaluation.tokens == SEQUENCES * T
    np.testing.assert_array_equal(evaluation.load_LE, output.stats.load_E)
    # At the last position there is no token after the next one.
    want_BT = cross_entropy(output.mtp_logits[0][:, :-1], tokens_BT[:, 2:])
    np.testing.assert_allclose(losses.mtp_D, [want_BT.mean()], rtol=1e-6)
