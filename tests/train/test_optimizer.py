"""AdamW to the letter of its paper, Muon on matrices alone, decay where it belongs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta

from jmoe.config import OptimizerConfig, ScheduleConfig, override
from jmoe.config.model import LAYER_LOOPS
from jmoe.nn.model import Transformer
from jmoe.train.optimizer import OPTIMIZERS, make_optimizer, matrix_dims
from jmoe.train.schedules import learning_rate

# A leaf of every class, named and shaped as the model's: layers first, then experts.
SHAPES = {
    "embedding": (12, 8),
    "final_norm": {"scale": (8,)},
    "head": (8, 12),
    "moe": {
        "attention": {"query_up": {"kernel": (2, 4, 2, 8)}},
        "moe": {
            "experts": {"down": (2, 3, 8, 16), "gate_up": (2, 3, 16, 2, 8)},
            "router": {"kernel": (2, 8, 3)},
            "shared": {"down": {"kernel": (2, 8, 16)}},
        },
    },
}
MUON = {
    "moe.attention.query_up.kernel",
    "moe.moe.experts.down",
    "moe.moe.experts.gate_up",
    "moe.moe.shared.down.kernel",
}
DIMS = optax.contrib.MuonDimensionNumbers
STEPS = 8
CONSTANT = ScheduleConfig(name="constant", peak=0.01)


def draw(seed: int):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: np.float32(rng.normal(size=shape)),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def by_name(tree, is_leaf=None) -> dict:
    leaves = jax.tree.leaves_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in leaves}


def descend(cfg: OptimizerConfig, gradients: list):
    """Parameters before and after, and the optimizer's last state."""
    optimizer = make_optimizer(cfg, STEPS)

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
    _, got, _ = descend(cfg, gradients)
    for name, want in adamw_by_hand(cfg, gradients).items():
        np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_gradients_all_but_norms_decay(name):
    cfg = OptimizerConfig(name=name, schedule=CONSTANT, weight_decay=0.1)
    zero = jax.tree.map(np.zeros_like, draw(0))
    before, after, _ = descend(cfg, [zero])
    for path in before:
        factor = 1.0 if path.endswith("scale") else 1 - 0.01 * 0.1
        np.testing.assert_allclose(
            after[path], factor * before[path], rtol=1e-6, err_msg=path
        )


def test_muon_makes_the_step_of_every_matrix_nearly_orthogonal():
    cfg = OptimizerConfig(name="muon", schedule=CONSTANT, weight_decay=0.0)
    before, after, _ = descend(cfg, [draw(1)])
    for path in MUON:
        step = (before[path] - after[path]) / 0.01
        outputs = 2 if path.endswith(("query_up.kernel", "gate_up")) else 1
        *batch, fan_in = step.shape[: step.ndim - outputs]
        matrices = step.reshape(*batch, fan_in, -1)
        scale = 0.2 * max(matrices.shape[-2:]) ** 0.5  # which makes the RMS AdamW's
        singular = np.linalg.svd(matrices, compute_uv=False) / scale
        assert singular.shape[0] == 2 and (0.6 < singular).all(), path
        assert (singular < 1.3).all(), path


def test_under_muon_all_that_is_no_matrix_takes_adamws_steps():
    gradients = [draw(seed) for seed in (1, 2, 3)]
    cfgs = [OptimizerConfig(name=name, schedule=CONSTANT) for name in ("muon", "adamw")]
    (before, muon, _), (_, adamw, _) = (descend(cfg, gradients) for cfg in cfgs)
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
    before, want, _ = descend(exact, gradients)
    _, got, state = descend(rounded, gradients)
    stored = by_name(state)
    moments = {path for path in stored if {"mu", "nu"} & set(path.split("."))}
    assert len(moments) >= len(before)
    for path, x in stored.items():
        assert (x.dtype == jnp.bfloat16) == (path in moments), path
    for path in before:
        error = np.linalg.norm(got[path] - want[path])
        assert 0 < error < 0.02 * np.linalg.norm(want[path] - before[path]), path


# Inputs and outputs of the smallest model's matrices; all else is AdamW's.
MATRICES = {
    "query_down.kernel": (32, 16),
    "query_up.kernel": (16, 2 * 16),
    "kv_down.kernel": (32, 16 + 8),
    "kv_up.kernel": (16, 2 * 16),
    "out.kernel": (2 * 8, 32),
    "mlp.gate_up.kernel": (32, 2 * 48),
    "mlp.down.kernel": (48, 32),
    "shared.gate_up.kernel": (32, 2 * 16),
    "shared.down.kernel": (16, 32),
    "experts.gate_up": (32, 2 * 16),
    "experts.down": (16, 32),
    "project.kernel": (2 * 32, 32),
}
OTHERS = ("embedding", "head", "scale", "router.kernel")


@pytest.mark.parametrize("loop", LAYER_LOOPS)
def test_muon_gets_every_matrix_of_the_model_and_nothing_else(smallest, loop):
    cfg = override(smallest.model, [f"layer_loop={loop}"])
    tokens_BT = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(Transformer(cfg).init, jax.random.key(0), tokens_BT)
    params = meta.unbox(shapes)["params"]
    dims = by_name(matrix_dims(params), lambda x: x is None or isinstance(x, DIMS))
    found = {}
    for name, x in by_name(params).items():
        if dims[name] is None:
            assert name.endswith(OTHERS), name
            continue
        key = next(key for key in MATRICES if name.endswith(f".{key}"))
        outputs = math.prod(x.shape[i] for i in dims[name].output_axis)
        found[key] = x.shape[dims[name].reduction_axis], outputs
        assert found[key] == MATRICES[key], name
    assert found.keys() == MATRICES.keys()
