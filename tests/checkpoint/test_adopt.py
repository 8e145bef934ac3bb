"""Arrays that were written by hand become a checkpoint like any other."""

import zlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jmoe.checkpoint import adopt
from jmoe.checkpoint.manifest import DamagedCheckpointError
from jmoe.checkpoint.pieces import Pieces
from jmoe.checkpoint.store import Store

STEP = 4


def by_hand(directory, x):
    """`x` as a directory of one chunk for each index of its first dimension."""
    directory.mkdir(parents=True)
    text = adopt.description(x.shape, (1, *x.shape[1:]), x.dtype)
    (directory / adopt.DESCRIPTION).write_text(text)
    sums = {}
    for i, part in enumerate(x):
        name = ".".join([str(i)] + ["0"] * (x.ndim - 1))
        (directory / name).write_bytes(part.tobytes())
        sums[name] = (part.nbytes, zlib.crc32(part.tobytes()))
    return adopt.Array(directory, x.shape, x.dtype, sums)


@pytest.fixture(params=["float32", "bfloat16", "float8_e4m3fn"])
def adopted(request, tmp_path):
    """(the store's directory, the arrays as they are in numpy)."""
    dtype = np.dtype(getattr(ml_dtypes, request.param, request.param))
    x = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(dtype)
    arrays = {"params/a/b": x, "params/c": x[0]}
    written = {
        name: by_hand(tmp_path / "by_hand" / name, array)
        for name, array in arrays.items()
    }
    directory = tmp_path / "store[1]"
    adopt.adopt(directory, STEP, written, position={"sequences": 9})
    return directory, arrays


def test_it_is_restored_and_read_in_part(adopted):
    directory, arrays = adopted
    x = arrays["params/a/b"]
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    small = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    with Store(directory) as store:
        state, position, step = store.restore(
            {"params": {"a": {"b": shape}, "c": small}}
        )
        pieces = Pieces(store.locate())
    assert (position, step) == ({"sequences": 9}, STEP)
    assert np.asarray(state["params"]["a"]["b"]).tobytes() == x.tobytes()
    assert np.asarray(state["params"]["c"]).tobytes() == x[0].tobytes()
    assert pieces.read("params/a/b", (2, slice(1, 3))).tobytes() == x[2, 1:3].tobytes()


def test_training_goes_on_behind_it(adopted):
    directory, _ = adopted
    with Store(directory) as store:
        store.save(STEP + 1, {"x": jnp.arange(3)}, {})
        store.wait()
        assert store.latest_step() == STEP + 1


def test_a_chunk_that_was_altered_is_found(adopted):
    directory, arrays = adopted
    path = directory / str(STEP) / "params" / "a" / "b" / "1.0.0"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in arrays.items()}
    with Store(directory) as store, pytest.raises(DamagedCheckpointError):
        store.restore(shapes, STEP)
