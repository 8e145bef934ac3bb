"""Whatever happens to the newer of two checkpoints, it isn't read as something else."""

import pathlib
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.checkpoint.store import Store
from tests.faults import damage

STATE = {"x": jnp.arange(5000.0), "y": {"z": jnp.arange(7, dtype=jnp.int32)}}
ABSTRACT = jax.eval_shape(lambda: STATE)
EVERY_KIND = {**damage.KINDS, **damage.FORGED}


def state(step: int):
    return jax.tree.map(lambda x: x * step, STATE)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("pair") / "checkpoints"
    with Store(directory) as store:
        for step in (38, 40):
            store.save(step, state(step), {"sequences": 8 * step})
    return directory


def harmed(pair, tmp_path, kind, seed) -> tuple[pathlib.Path, str]:
    directory = tmp_path / f"{kind} {seed}"
    shutil.copytree(pair, directory)
    found = damage.Checkpoints(directory / "40", directory / "38")
    return directory, EVERY_KIND[kind](found, random.Random(seed))


def content(directory: pathlib.Path) -> dict[str, bytes]:
    paths = damage.files(directory)
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("kind", damage.KINDS)
def test_what_is_read_is_the_newer_as_written_or_the_older_with_a_warning(
    pair, tmp_path, kind, caplog
):
    directory, _ = harmed(pair, tmp_path, kind, seed=0)
    with Store(directory) as store:
        got, position, step = store.restore(ABSTRACT)
    assert step == 40 or (step == 38 and "Passed over" in caplog.text)
    assert position == {"sequences": 8 * step}
    same = jax.tree.map(np.array_equal, got, state(step))
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_each_kind_of_harm_changes_the_newer_alone_and_a_seed_repeats_it(
    pair, tmp_path, kind
):
    one, said = harmed(pair, tmp_path / "one", kind, seed=3)
    two, again = harmed(pair, tmp_path / "two", kind, seed=3)
    assert said == again and content(one) == content(two) != content(pair)
    assert content(one / "38") == content(pair / "38")
