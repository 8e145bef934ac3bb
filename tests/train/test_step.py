"""One step: what it optimises, and what accumulation, remat and loops can't change.

Shapes: A microbatch, B sequence, T position, L MoE layer, E expert, V vocabulary.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta

from jmoe.config import RunConfig, override
from jmoe.data.packing import Batch
from jmoe.nn.model import Transformer, read_biases
from jmoe.nn.router import Stats
from jmoe.train import step as steps
from jmoe.train.state import TrainState

SEQUENCES, T = 8, 32
STEPS = 3
RATE = 0.02  # of plain gradient descent, which leaves gradients readable
BIAS_RATE, MTP_WEIGHT, AUXILIARY_WEIGHT = 1e-3, 0.5, 4.0
FROZEN, WITHOUT_MTP = 10, 5  # the steps from which these two rates are 0

# Microbatches, and how the model is computed. Together they vary all that may change
# how a step is computed and not what it is.
WHOLE = (1, "scan", "none")
VARIANTS = [(2, "scan", "block"), (4, "unroll", "save_dots")]


class Path(NamedTuple):
    """States after 0, 1, ... steps, with the layers apart, and each step's metrics."""

    states: list[TrainState]
    metrics: list[dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def run(smallest) -> RunConfig:
    return override(
        smallest,
        [
            "model.moe.router.auxiliary_loss=sequence",
            f"model.moe.router.auxiliary_weight={AUXILIARY_WEIGHT}",
            "train.steps=20",
            f"train.bias_rate={{'first': {BIAS_RATE}, 'last': 0.0, 'switch': 0.5}}",
            f"train.mtp_weight={{'first': {MTP_WEIGHT}, 'last': 0.0, 'switch': 0.25}}",
        ],
    )


@pytest.fixture(scope="module")
def variables(run):
    """Random and large enough for every part, biases too, to decide what is chosen."""
    rng = np.random.default_rng(0)
    tokens_BT = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(Transformer(run.model).init, jax.random.key(0), tokens_BT)

    def draw(path, shape):
        scale, mean = {"scale": (0.1, 1), "bias": (0.05, 0)}.get(path[-1].key, (0.2, 0))
        return jnp.float32(mean + scale * rng.normal(size=shape.shape))

    return jax.tree.map_with_path(draw, meta.unbox(shapes))


@pytest.fixture(scope="module")
def batch(run) -> Batch:
    """One microbatch of all sequences."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, run.model.vocab_size, (1, SEQUENCES, T + 1), np.int32)
    segment = np.broadcast_to(np.arange(T + 1) >= 10, tokens.shape).astype(np.int32)
    return Batch(tokens, segment)


@pytest.fixture(scope="module")
def walk(run, variables, batch):
    """Takes steps from any step on, by gradient descent and a program for a variant."""
    optimizer = optax.sgd(RATE)

    @functools.cache
    def program(variant):
        count, loop, remat = variant
        cfg = override(run, [f"model.layer_loop={loop}", f"model.remat={remat}"])
        step = steps.make_train_step(Transformer(cfg.model), optimizer, cfg)
        parts = jax.tree.map(lambda x: x.reshape(count, -1, T + 1), batch)
        return jax.jit(step), parts

    def walk(variant=WHOLE, *, start=0, num_steps=1) -> Path:
        step, parts = program(variant)
        layered = unstack if "unroll" in variant else lambda tree: tree
        apart = unstack if "scan" in variant else lambda tree: tree
        params, router_state = map(layered, (variables["params"], variables["router_state"]))
        state = TrainState(jnp.int32(start), params, router_state, optimizer.init(params))
        path = Path([], [])
        for _ in range(num_steps):
            path.states.append(state)
            state, metrics = step(state, parts)
            path.metrics.append(jax.device_get(metrics))
        path.states.append(state)
        states = [
            s.replace(params=apart(s.params), router_state=apart(s.router_state))
            for s in path.states
        ]
        return Path(states, path.metrics)

    return functools.cache(walk)


def unstack(tree):
    """A scanned model's collection as an unrolled model names it; one layer of each."""
    return {
        f"{name}_0" if name in ("dense", "moe") else name: (
            jax.tree.map(lambda x: x[0], part) if name in ("dense", "moe") else part
        )
        for name, part in tree.items()
    }
