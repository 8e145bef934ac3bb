"""A part of a stored array costs little more than itself."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.checkpoint.manifest import DamagedCheckpointError
from jmoe.checkpoint.pieces import Pieces
from jmoe.checkpoint.store import Store

# layers, experts, and a matrix of each: 48 MiB, more than a chunk
LARGE = (3, 8, 512, 2, 512)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """(the checkpoint's directory, what was stored)."""
    directory = tmp_path_factory.mktemp("stored")
    x = np.arange(np.prod(LARGE), dtype=np.float32).reshape(LARGE)
    params = {"experts": x, "scale": np.arange(5, dtype=np.float32)}
    with Store(directory) as store:
        store.save(3, {"params": jax.tree.map(jnp.asarray, params)}, {})
        store.wait()
        return store.locate(), params


def bytes_read() -> int:
    lines = pathlib.Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


@pytest.mark.parametrize("index", [(1,), (2, 5), (0, slice(2, 7)), ()], ids=str)
def test_any_leading_part_can_be_read(stored, index):
    directory, want = stored
    pieces = Pieces(directory)
    np.testing.assert_array_equal(
        pieces.read("params/experts", index), want["experts"][index]
    )
    np.testing.assert_array_equal(pieces.read("params/scale", ()), want["scale"])
    assert pieces.shapes["params/experts"] == LARGE
    assert pieces.dtypes["params/scale"] == np.float32


def test_a_layer_of_a_large_array_costs_a_layer(stored):
    directory, want = stored
    pieces = Pieces(directory)
    pieces.read("params/scale", ())
    before = bytes_read()
    pieces.read("params/experts", (1,))
    size = want["experts"][1].nbytes
    assert size <= bytes_read() - before < 1.2 * size


def test_a_checkpoint_is_located_or_refused_as_it_is_restored(tmp_path):
    with Store(tmp_path) as store:
        with pytest.raises(FileNotFoundError, match="No whole checkpoint"):
            store.locate()
        store.save(2, {"x": jnp.arange(3)}, {})
        store.wait()
        assert store.locate() == store.locate(2) == tmp_path / "2"
        with pytest.raises(FileNotFoundError, match="No checkpoint of step 5"):
            store.locate(5)
        (tmp_path / "2" / "manifest.json").unlink()
        with pytest.raises(DamagedCheckpointError):
            store.locate(2)


def test_a_checkpoint_that_is_removed_while_sums_are_compared_is_damaged(tmp_path):
    with Store(tmp_path) as store:
        store.save(2, {"x": jnp.arange(3)}, {})
    pieces = Pieces(tmp_path / "2")
    shutil.rmtree(tmp_path / "2")
    with pytest.raises(DamagedCheckpointError, match="is missing"):
        pieces.check_sums()
