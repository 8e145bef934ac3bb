"""An exported model's weights that are read later are those that are read at once."""

import numpy as np
import pytest

from jmoe.checkpoint import manifest
from jmoe.export import hf, layout
from jmoe.export.trained import load_exported, look_at_exported


@pytest.fixture
def exported(small_config, small_run, draw, tmp_path):
    def save(*assignments, **options):
        cfg = small_config(*assignments)
        tokenizer = small_run / "tokenizer.json"
        hf.save(tmp_path / "hf", cfg, draw(cfg), tokenizer=tokenizer, **options)
        return tmp_path / "hf"

    return save


@pytest.mark.parametrize(
    ("fp8", "dtype"), [(False, None), (False, "bfloat16"), (True, "float32")]
)
def test_weights_that_are_read_later_are_the_same(exported, fp8, dtype):
    directory = exported(fp8=fp8)
    now, later = (
        read(directory, dtype=dtype) for read in (load_exported, look_at_exported)
    )
    assert (later.run, later.step) == (now.run, now.step)
    want = manifest.flatten(now.variables)
    with later.variables.open() as (leaves, fill):
        assert leaves.keys() == want.keys()
        for path, x in want.items():
            rows = slice(len(x) // 2, len(x))
            index = rows, *(slice(0, size) for size in x.shape[1:])
            half = np.zeros((len(x) - len(x) // 2, *x.shape[1:]), leaves[path].dtype)
            fill(half, path, index)
            assert half.dtype == x.dtype and leaves[path].shape == x.shape
            assert half.tobytes() == np.asarray(x[rows]).tobytes()


def test_what_is_wrong_with_weights_is_told_when_they_are_read(exported):
    directory = exported("mtp_depth=0")
    later, path = look_at_exported(directory), directory / layout.SINGLE
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=layout.SINGLE), later.variables.open():
        pass
    path.write_bytes(whole[:-4] + np.float32(np.nan).tobytes())
    with (
        later.variables.open() as (leaves, fill),
        pytest.raises(ValueError, match="NaN"),
    ):
        for name, leaf in leaves.items():
            index = tuple(slice(0, size) for size in leaf.shape)
            fill(np.zeros(leaf.shape, leaf.dtype), name, index)
