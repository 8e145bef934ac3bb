"""A small model whose sizes are multiples of nothing, its variables, and its run."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.checkpoint import workdir as workdirs
from jmoe.checkpoint.store import Store
from jmoe.config import (
    DataConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
    RunConfig,
    TrainConfig,
    records,
)
from jmoe.data.tokenizer import train_bpe
from jmoe.export import safetensors
from jmoe.nn.model import abstract_variables

SMALL = ModelConfig(
    vocab_size=300,
    hidden_dim=162,  # FP8 blocks of 128, and what is left
    num_layers=3,
    num_dense_layers=1,
    dense_mlp_dim=141,
    mtp_depth=1,
    max_positions=128,
    attention=MLAConfig(
        num_heads=3,
        query_latent_dim=25,
        kv_latent_dim=131,
        nope_dim=30,
        rope_dim=8,
        value_dim=19,
    ),
    moe=MoEConfig(
        expert_mlp_dim=33,
        router=RouterConfig(num_experts=6, top_k=2, num_groups=2, groups_per_token=1),
    ),
)


@pytest.fixture(scope="session")
def small_config():
    """The small shape with `path.to.field=value` assignments applied."""
    return lambda *assignments: records.override(SMALL, assignments)


@pytest.fixture(scope="session")
def draw():
    """Variables in which no two numbers are the same: norms near 1, biases not 0."""

    def variables(cfg: ModelConfig, dtype=jnp.float32):
        rng = np.random.default_rng(0)

        def leaf(path, shape):
            noise = 0.1 * rng.standard_normal(shape.shape)
            noise += path[-1].key == "scale"
            is_bias = path[-1].key == "bias"
            return jnp.asarray(noise, jnp.float32 if is_bias else dtype)

        return jax.tree_util.tree_map_with_path(leaf, abstract_variables(cfg))

    return variables


@pytest.fixture(scope="session")
def same():
    """Asserts that two trees have the same types, shapes and bits."""

    def check(got, want):
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()

    return check


@pytest.fixture(scope="session")
def contents():
    """A directory's tensors by name: type, shape and bytes."""

    def read(directory):
        found = safetensors.read_headers(pathlib.Path(directory))
        return {
            name: (
                x.code,
                x.shape,
                x.file.read_bytes()[x.offset : x.offset + x.nbytes],
            )
            for name, x in found.items()
        }

    return read


@pytest.fixture
def workdir(small_run, tmp_path) -> pathlib.Path:
    """The directory of a run, with a checkpoint of step 7."""
    return shutil.copytree(small_run, tmp_path / "run")


@pytest.fixture(scope="session")
def small_run(tmp_path_factory, draw) -> pathlib.Path:
    """The same, not to be changed."""
    directory = tmp_path_factory.mktemp("small") / "run"
    run = RunConfig(
        name="small",
        model=SMALL,
        data=DataConfig(sequence_length=32),
        train=TrainConfig(steps=8, batch_size=4, microbatch_size=4),
    )
    workdirs.open_run(directory, run)
    train_bpe(["some text " * 9], 280).save(str(directory / "tokenizer.json"))
    rows = [{"step": 7, "val_loss": 2.5}, {"step": 8, "val_loss": 9.0}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "metrics.jsonl").write_text(text)
    with Store(directory / "checkpoints") as store:
        store.save(7, draw(SMALL), {})
    return directory
