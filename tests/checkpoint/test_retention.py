"""Old checkpoints go, but not the best, nor those to be kept, nor the newest."""

import shutil

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest

from jmoe.checkpoint import manifest
from jmoe.checkpoint.retention import BEST, Retention
from jmoe.checkpoint.store import Store

ABSTRACT = {"x": jax.ShapeDtypeStruct((), "float32")}
FALLING_AND_RISING = {10: 3.0, 20: 2.0, 25: None, 30: 2.5, 40: 2.0, 50: 2.7, 60: 2.8}


def save_all(directory, losses, **kept) -> list[str]:
    """Saves a checkpoint of each step, and returns what is there in the end."""
    with Store(directory, **kept) as store:
        for step, loss in losses.items():
            known = {} if loss is None else {"validation_loss": loss}
            store.save(step, {"x": jnp.float32(step)}, {"batch": step}, **known)
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(
    ("kept", "left"),
    [
        ({"keep": 1}, "60"),
        ({"keep": 1, "keep_best": 1}, "20 60"),
        ({"keep": 1, "keep_best": 2}, "20 40 60"),
        ({"keep": 2, "keep_every": 25}, "25 50 60"),
        ({"keep": 1, "keep_best": 1, "keep_every": 30}, "20 30 60"),
    ],
    ids=str,
)
def test_what_any_rule_keeps_stays_and_nothing_else(tmp_path, kept, left):
    assert save_all(tmp_path, FALLING_AND_RISING, **kept) == left.split()


@hypothesis.given(
    losses=st.dictionaries(
        st.integers(0, 40), st.none() | st.floats(0, 9), min_size=1, max_size=12
    ),
    newest=st.integers(1, 3),
    best=st.integers(0, 3),
    every=st.none() | st.integers(1, 7),
)
def test_the_newest_the_best_and_those_for_ever_are_no_surplus(
    losses, newest, best, every
):
    surplus = Retention(newest=newest, best=best, every=every).surplus(losses)
    left = losses.keys() - surplus
    assert {*sorted(losses)[-newest:]} <= left
    assert all(step in left for step in losses if every and step % every == 0)
    evaluated = sorted((x, step) for step, x in losses.items() if x is not None)
    assert {step for _, step in evaluated[:best]} <= left
    assert len(left) <= newest + best + (0 if every is None else len(losses))


def test_a_validation_loss_is_in_the_manifest_and_absent_where_there_is_none(tmp_path):
    losses = {1: 2.25, 2: None, 3: float("nan"), 4: jnp.float32(0.1)}
    save_all(tmp_path, losses, keep=4)
    found = [manifest.read(tmp_path / str(step)) for step in losses]
    assert [x.get("validation_loss") for x in found][:3] == [2.25, None, None]
    assert found[3]["validation_loss"] == pytest.approx(0.1)
    path = tmp_path / "1" / manifest.FILE_NAME
    path.write_text(path.read_text().replace("2.25", "1.25"))
    with pytest.raises(manifest.DamagedCheckpointError, match="was altered"):
        manifest.read(tmp_path / "1")


def test_the_best_is_read_by_its_name_and_the_newest_stays_the_default(tmp_path):
    save_all(tmp_path, FALLING_AND_RISING, keep=1, keep_best=2)
    with Store(tmp_path) as store:
        assert store.restore(ABSTRACT, BEST)[1:] == ({"batch": 20}, 20)
        assert store.locate(BEST).name == "20"
        assert store.locate().name == "60" and store.latest_step() == 60


def test_a_damaged_checkpoint_is_not_the_best_and_no_rule_removes_it(tmp_path):
    save_all(tmp_path, FALLING_AND_RISING, keep=7)
    (tmp_path / "20" / manifest.FILE_NAME).write_text("{}")
    with Store(tmp_path, keep=1, keep_best=1) as store:
        assert store.locate(BEST).name == "40"
        _, position, _ = store.restore(ABSTRACT)
        store.save(70, {"x": jnp.float32(70)}, position)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["20", "40", "70"]


def test_where_nothing_was_evaluated_there_is_no_best(tmp_path):
    save_all(tmp_path, {1: None, 2: None})
    with Store(tmp_path) as store:
        for read in (store.locate, lambda step: store.restore(ABSTRACT, step)):
            with pytest.raises(FileNotFoundError, match="step='best': no whole check"):
                read(BEST)
        shutil.rmtree(tmp_path / "1")
        with pytest.raises(FileNotFoundError, match="No checkpoint of step 1"):
            store.locate(1)
