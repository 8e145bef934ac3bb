"""A run's weights that are read later are those that are read at once."""

import shutil

import jax
import numpy as np
import pytest

from jmoe.checkpoint import manifest
from jmoe.checkpoint import workdir as workdirs
from jmoe.checkpoint.store import Store
from jmoe.nn.model import abstract_variables
from jmoe.train.trained import load_trained, look_at_trained
from tests.decode.conftest import random_variables
from tests.serve.own import tokenizer
from tests.smallest_run import get_config


def saved(directory, step: int, change=lambda path, x: x) -> None:
    arrays = {
        path: jax.numpy.asarray(change(path, x))
        for path, x in manifest.flatten(random_variables(get_config().model)).items()
    }
    structure = jax.tree.structure(abstract_variables(get_config().model))
    with Store(directory / "checkpoints", keep=9) as store:
        store.save(step, structure.unflatten(arrays.values()), {})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """With a checkpoint of step 4, half of whose numbers are others, and of step 5."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    workdirs.open_run(directory, get_config())
    tokenizer().save(directory / "tokenizer.json")
    saved(directory, 4, lambda path, x: 2 * x)
    saved(directory, 5)
    return directory


def read(trained) -> dict:
    """All of what wasn't read, a half of each array at a time."""
    found = {}
    with trained.variables.open() as (leaves, fill):
        for path, leaf in leaves.items():
            found[path] = np.full(leaf.shape, np.nan, leaf.dtype)
            cut = leaf.shape[0] // 2
            for rows in (slice(0, cut), slice(cut, leaf.shape[0])):
                rest = (slice(0, size) for size in leaf.shape[1:])
                fill(found[path][rows], path, (rows, *rest))
    return found


@pytest.mark.parametrize("step", [None, 4])
def test_weights_that_are_read_later_are_the_same(run, step):
    now, later = load_trained(run, step=step), look_at_trained(run, step=step)
    assert (later.run, later.step) == (now.run, now.step) == (now.run, step or 5)
    want, got = manifest.flatten(now.variables), read(later)
    assert got.keys() == want.keys()
    for path, x in want.items():
        assert got[path].dtype == x.dtype
        np.testing.assert_array_equal(got[path], x)


def test_a_damaged_checkpoint_is_passed_over_before_anything_is_read(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    files = manifest.read(copy / "checkpoints" / "5")["files"]
    name = max(files, key=lambda name: files[name][0])
    path = copy / "checkpoints" / "5" / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert look_at_trained(copy).step == 4
    with pytest.raises(manifest.DamagedCheckpointError, match="was altered"):
        look_at_trained(copy, step=5)


def test_what_is_not_finite_is_named_when_it_is_read(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")

    def spoil(path, x):
        return np.where(np.arange(x.size).reshape(x.shape) == 3, np.inf, x)

    saved(copy, 6, lambda path, x: spoil(path, x) if "gate_up" in path else x)
    with pytest.raises(ValueError, match="6 has NaN or infinite numbers in .*gate_up"):
        read(look_at_trained(copy))
