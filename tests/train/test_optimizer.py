"""AdamW to the letter of its paper, Muon on matrices alone, decay where it belongs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta

from jmoe.config import MeshConfig, OptimizerConfig, ScheduleConfig
from jmoe.config.run import MAX_BFLOAT16_BETA
from jmoe.nn.parameter import (
    MATRIX,
    TO_HEADS,
    TWO_MATRICES,
    Boxed,
    Parameter,
    records,
)
from jmoe.parallel import zero
from jmoe.train import layout as layouts
from jmoe.train.muon import SCALES
from jmoe.train.optimizer import OPTIMIZERS, make_optimizer, store_moments
from jmoe.train.schedules import learning_rate


def matrix(dims):
    return Parameter(dims=(), matrix=dims, is_hidden=True)


# A parameter of every class, named and shaped as the model's: layers, then experts.
DESCRIBED = {
    "embedding": ((12, 8), Parameter(dims=())),
    "final_norm": {"scale": ((8,), Parameter(dims=(), decays=False))},
    "head": ((8, 12), Parameter(dims=())),
    "moe": {
        "attention": {
            "query_up": {
                "kernel": ((2, 4, 2, 8), matrix(TO_HEADS)),
            }
        },
        "moe": {
            "experts": {
                "down": ((2, 3, 8, 16), matrix(MATRIX)),
                "gate_up": ((2, 3, 16, 2, 8), matrix(TWO_MATRICES)),
            },
            "router": {"kernel": ((2, 8, 3), Parameter(dims=()))},
            "shared": {"down": {"kernel": ((2, 8, 16), matrix(MATRIX))}},
        },
    },
}
BOXED = jax.tree.map(
    lambda given: Boxed(
        jax.ShapeDtypeStruct(given[0], jnp.float32),
        (None,) * len(given[0]),
        record=given[1],
    ),
    DESCRIBED,
    is_leaf=lambda x: isinstance(x, tuple),
)
MUON = {
    "moe.attention.query_up.kernel",
    "moe.moe.experts.down",
    "moe.moe.experts.gate_up",
    "moe.moe.shared.down.kernel",
}
STEPS = 8
CONSTANT = ScheduleConfig(name="constant", peak=0.01)
MESH = layouts.run_mesh(MeshConfig())
LAYOUT = layouts.Layout(
    MESH, zero.place(BOXED, MESH.shape), records(BOXED), meta.unbox(BOXED)
)


def draw(seed: int):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: np.float32(rng.normal(size=x.shape)), meta.unbox(BOXED)
    )


def by_name(tree) -> dict:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in leaves}


def descend(optimizer: optax.GradientTransformation, gradients: list):
    """Parameters before and after, and the optimizer's last state."""

    @jax.jit
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    before = params = draw(0)
    state = optimizer.init(params)
    for gradient in gradients:
        params, state = step(params, state, gradient)
    return by_name(before), jax.device_get(by_name(params)), state


def adamw_by_hand(cfg: OptimizerConfig, gradients: list) -> dict[str, np.ndarray]:
    """Algorithm 2 of arXiv 1711.05101, in float64, after clipping by global norm."""
    params = {name: x.astype(np.float64) for name, x in by_name(draw(0)).items()}
    first, second = (dict.fromkeys(params, 0.0) for _ in range(2))
    rate = learning_rate(cfg.schedule, STEPS)
    for t, gradient in enumerate(map(by_name, gradients), 1):
        norm = np.sqrt(sum((g.astype(float) ** 2).sum() for g in gradient.values()))
        for name, g in gradient.items():
            g = g.astype(float) * min(1.0, cfg.clip_norm / norm)
            first[name] = cfg.beta1 * first[name] + (1 - cfg.beta1) * g
            second[name] = cfg.beta2 * second[name] + (1 - cfg.beta2) * g**2
            corrected = first[name] / (1 - cfg.beta1**t)
            scale = np.sqrt(second[name] / (1 - cfg.beta2**t)) + cfg.epsilon
            decay = 0.0 if name.endswith("scale") else cfg.weight_decay
            step = corrected / scale + decay * params[name]
            params[name] = params[name] - float(rate(t - 1)) * step
    return params


@pytest.mark.parametrize("clip_norm", [0.5, np.inf])
def test_adamw_takes_the_papers_steps(clip_norm):
    schedule = ScheduleConfig(name="cosine", peak=0.05, warmup_steps=2)
    cfg = OptimizerConfig(schedule=schedule, clip_norm=clip_norm, epsilon=1e-3)
    # Sizes that differ from step to step, or clipping would change nothing.
    gradients = [jax.tree.map(lambda g, s=s: g / s, draw(s)) for s in range(1, STEPS)]
    _, got, _ = descend(make_optimizer(cfg, STEPS, LAYOUT), gradients)
    for name, want in adamw_by_hand(cfg, gradients).items():
        np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_gradients_all_but_norms_decay(name):
    cfg = OptimizerConfig(name=name, schedule=CONSTANT, weight_decay=0.1)
    zero = jax.tree.map(np.zeros_like, draw(0))
    before, after, _ = descend(make_optimizer(cfg, STEPS, LAYOUT), [zero])
    for path in before:
        factor = 1.0 if path.endswith("scale") else 1 - 0.01 * 0.1
        np.testing.assert_allclose(
            after[path], factor * before[path], rtol=1e-6, err_msg=path
        )


def optax_muon(cfg: OptimizerConfig) -> optax.GradientTransformation:
    """optax's own Muon of the same matrices; what is none, it leaves to Adam."""

    def numbers(box: Boxed):
        if not box.record.is_hidden:
            return None
        return optax.contrib.MuonDimensionNumbers(
            *(
                tuple(dim + box.value.ndim for dim in dims)
                for dims in (box.record.matrix.fan_in, box.record.matrix.fan_out)
            )
        )

    dims = jax.tree.map(numbers, BOXED, is_leaf=lambda x: isinstance(x, Boxed))
    muon = optax.contrib.muon(
        learning_rate(cfg.schedule, STEPS),
        weight_decay=cfg.weight_decay,
        consistent_rms={"rms": 0.2, "spectral": None}[cfg.muon_scale],
        muon_weight_dimension_numbers=dims,
    )
    return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), muon)


@pytest.mark.parametrize("scale", SCALES)
def test_muon_takes_the_steps_that_optaxs_takes(scale):
    schedule = ScheduleConfig(name="cosine", peak=0.05, warmup_steps=2)
    cfg = OptimizerConfig(name="muon", schedule=schedule, muon_scale=scale)
    gradients = [draw(seed) for seed in range(1, STEPS)]
    before, got, _ = descend(make_optimizer(cfg, STEPS, LAYOUT), gradients)
    _, want, _ = descend(optax_muon(cfg), gradients)
    for path in MUON:
        moved = np.abs(got[path] - before[path]).max()
        np.testing.assert_allclose(
            got[path], want[path], rtol=0, atol=1e-5 * moved, err_msg=path
        )


def test_under_muon_all_that_is_no_matrix_takes_adamws_steps():
    gradients = [draw(seed) for seed in (1, 2, 3)]
    cfgs = [OptimizerConfig(name=name, schedule=CONSTANT) for name in ("muon", "adamw")]
    (before, muon, _), (_, adamw, _) = (
        descend(make_optimizer(cfg, STEPS, LAYOUT), gradients) for cfg in cfgs
    )
    for path in before:
        same = np.allclose(muon[path], adamw[path], rtol=1e-6, atol=1e-7)
        assert same == (path not in MUON), path


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bfloat16_moments_are_stored_as_such_and_steer_nearly_alike(name):
    gradients = [draw(seed) for seed in range(1, STEPS)]
    exact, rounded = (
        OptimizerConfig(name=name, schedule=CONSTANT, moment_dtype=dtype)
        for dtype in ("float32", "bfloat16")
    )
    before, want, _ = descend(make_optimizer(exact, STEPS, LAYOUT), gradients)
    _, got, state = descend(make_optimizer(rounded, STEPS, LAYOUT), gradients)
    stored = by_name(state)
    moments = {path for path in stored if {"mu", "nu"} & set(path.split("."))}
    assert len(moments) >= len(before)
    for path, x in stored.items():
        assert (x.dtype == jnp.bfloat16) == (path in moments), path
    for path in before:
        error = np.linalg.norm(got[path] - want[path])
        assert 0 < error < 0.02 * np.linalg.norm(want[path] - before[path]), path


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_computes_in_float32_with_the_moments_that_are_stored(name):
    cfg = OptimizerConfig(name=name, schedule=CONSTANT, clip_norm=np.inf)
    exact = make_optimizer(cfg, STEPS, LAYOUT)
    rounded = store_moments(exact, jnp.bfloat16)
    params, state = draw(0), rounded.init(draw(0))
    for seed in (1, 2, 3):
        opened = jax.tree.map(
            lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, state
        )
        want, _ = exact.update(draw(seed), opened, params)
        got, state = rounded.update(draw(seed), state, params)
        # Far below 2^-9, what another rounding of a moment would make.
        jax.tree.map(
            lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5), got, want
        )


def stored_after_a_fall(beta: float) -> tuple[np.ndarray, np.ndarray]:
    """AdamW's nu 3,000 steps after gradients fell 100 times: as bfloat16, and exact.

    Of gradients that differ, so that every mantissa occurs.
    """
    after = 0.01 * np.linspace(1, 2, 128)
    adam = store_moments(optax.scale_by_adam(0.9, beta), jnp.bfloat16)
    state = adam.init(jnp.zeros(after.shape))
    state = state._replace(nu=jnp.ones(after.shape, jnp.bfloat16))

    def step(state, _):
        return adam.update(jnp.float32(after), state)[1], None

    state, _ = jax.jit(lambda state: jax.lax.scan(step, state, length=3000))(state)
    left = beta**3000
    return np.asarray(state.nu, np.float64), left + (1 - left) * after**2


@pytest.mark.parametrize("beta", [0.95, 0.99, MAX_BFLOAT16_BETA])
def test_bfloat16_moments_follow_gradients_that_fall(beta):
    """Until a step, (1 - beta) of what is left, is half a unit in the last place."""
    got, want = stored_after_a_fall(beta)
    largest = 2**-8 / (1 - beta)  # of what is left, as a share of the moment
    assert (np.abs(got - want) <= largest * got * (1 + 1e-6)).all()
    assert largest <= 1 / 2


@pytest.mark.parametrize("beta", [0.995, 0.998, 0.9995])
def test_bfloat16_moments_that_are_refused_would_freeze(beta):
    got, want = stored_after_a_fall(beta)
    assert (got / want).max() > 2
    with pytest.raises(ValueError, match="bfloat16's last place"):
        OptimizerConfig(beta2=beta, moment_dtype="bfloat16")
