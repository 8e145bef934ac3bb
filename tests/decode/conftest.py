"""A model whose next token is far from a tie: random weights of order 1."""

import pathlib
import runpy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from jmoe.config import ModelConfig
from jmoe.nn.model import Transformer

EXPERIMENT = pathlib.Path(__file__).parents[1] / "smallest_run.py"


def random_variables(cfg: ModelConfig) -> Any:
    rng = np.random.default_rng(0)
    tokens_BT = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(Transformer(cfg).init, jax.random.key(0), tokens_BT)
    return jax.tree.map(
        lambda x: np.float32(rng.normal(size=x.shape) / x.shape[0] ** 0.5),
        meta.unbox(shapes),
    )


@pytest.fixture(scope="session")
def cfg() -> ModelConfig:
    return runpy.run_path(str(EXPERIMENT))["get_config"]().model


@pytest.fixture(scope="session")
def variables(cfg):
    return random_variables(cfg)


@pytest.fixture
def compilations():
    """Names of what is compiled from here on."""
    found = []

    def note(event, _, **told):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(told.get("fun_name", event))

    jax.monitoring.register_event_duration_secs_listener(note)
    yield found
    jax.monitoring.unregister_event_duration_listener(note)
