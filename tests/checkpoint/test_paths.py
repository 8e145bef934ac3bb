"""Orbax finds its files in any directory; where not, nothing is published."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jmoe.checkpoint.store import Store


@pytest.mark.parametrize("name", ["a[1]", "[!x]", "a*b?", "**"])
def test_a_directory_may_have_a_patterns_name(tmp_path, name):
    state = {"x": jnp.arange(3), "key": jax.random.key(3)}
    with Store(tmp_path / name) as store:
        store.save(1, state, {})
        got, _, _ = store.restore(jax.eval_shape(lambda: state))
    assert np.array_equal(got["x"], state["x"])
    assert got["key"].dtype == state["key"].dtype
    same = map(jax.random.key_data, (got["key"], state["key"]))
    assert np.array_equal(*same)


def test_what_orbax_did_not_merge_is_never_a_checkpoint(tmp_path, monkeypatch):
    with Store(tmp_path, keep=1) as store:
        store.save(30, {"x": jnp.arange(3)}, {})
        store.wait()
        monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "finalize", lambda *_: None)
        store.save(40, {"x": jnp.arange(3)}, {})
        with pytest.raises(RuntimeError, match="did not merge .*40.orbax"):
            store.wait()
        assert store.latest_step() == 30
