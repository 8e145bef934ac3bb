"""Checkpoints: bit-exact, atomic, and never silently lost."""

import pathlib
import shutil
import threading

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jmoe.checkpoint import manifest
from jmoe.checkpoint.manifest import DamagedCheckpointError
from jmoe.checkpoint.store import Store


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: tuple


def make_state(step: int) -> State:
    params = {"w": jax.random.normal(jax.random.key(step), (256, 64))}
    return State(jnp.int32(step), params, optax.adamw(1e-3).init(params))


def abstract(tree):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )


def assert_same_bits(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("three_steps")
    with Store(directory, keep=3) as store:
        for step in (10, 20, 30):
            store.save(step, make_state(step), {"batch": step})
    return directory


@pytest.fixture
def saved(three_steps, tmp_path) -> pathlib.Path:
    """A directory with whole checkpoints of steps 10, 20 and 30."""
    return shutil.copytree(three_steps, tmp_path / "checkpoints")


def largest_file(directory: pathlib.Path) -> pathlib.Path:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def cut_arrays(checkpoint):
    path = largest_file(checkpoint)
    path.write_bytes(path.read_bytes()[:-100])


def lose_arrays(checkpoint):
    largest_file(checkpoint).unlink()


def flip_a_bit(checkpoint):
    path = largest_file(checkpoint)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def lose_manifest(checkpoint):
    (checkpoint / manifest.FILE_NAME).unlink()


def cut_manifest(checkpoint):
    path = checkpoint / manifest.FILE_NAME
    path.write_text(path.read_text()[:50])


def edit_position(checkpoint):
    path = checkpoint / manifest.FILE_NAME
    edited = path.read_text().replace('"batch": ', '"batch": 1')
    assert edited != path.read_text()
    path.write_text(edited)


def copy_another_step(checkpoint):
    shutil.rmtree(checkpoint)
    shutil.copytree(checkpoint.with_name("10"), checkpoint)


def lose_everything(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


DAMAGES = (
    cut_arrays,
    lose_arrays,
    lose_manifest,
    cut_manifest,
    edit_position,
    copy_another_step,
    lose_everything,
    flip_a_bit,
)


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    key = jax.random.key(0)
    dtypes = ("float32", "bfloat16", "int32", "uint32", "int8", "float8_e4m3fn")
    state = {
        "arrays": [jax.random.normal(key, (3, 5)).astype(dtype) for dtype in dtypes],
        "special": jnp.array([jnp.nan, -jnp.nan, -0.0, jnp.inf, 1e-42]),
        "scalars": (jnp.int32(7), jnp.float32(0.1), jnp.bool_(True)),
        "keys": {"typed": jax.random.split(key), "raw": jax.random.key_data(key)},
        "nothing": None,
    }
    with Store(tmp_path) as store:
        store.save(1, state, {})
        got, _, _ = store.restore(abstract(state))
    assert_same_bits(got, state)


def test_a_state_comes_back_with_its_step_position_and_classes(saved):
    with Store(saved) as store:
        state, position, step = store.restore(abstract(make_state(0)))
        assert_same_bits(state, make_state(30))
        assert (position, step) == ({"batch": 30}, 30)
        state, position, step = store.restore(abstract(make_state(0)), step=20)
        assert_same_bits(state, make_state(20))
        assert (position, step) == ({"batch": 20}, 20)


def test_buffers_may_be_donated_and_the_position_changed_right_after_save(tmp_path):
    train = jax.jit(
        lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0
    )
    state = [jax.random.normal(jax.random.key(i), (1024, 1024)) for i in range(8)]
    expected, wanted = [np.array(x) for x in state], abstract(state)
    position = {"batch": 1}
    with Store(tmp_path) as store:
        for step in (1, 2):  # the second time with arrays that Orbax made
            store.save(step, state, position)
            position["batch"] = 2
            jax.block_until_ready(train(state))
            state, found, _ = store.restore(wanted)
            assert_same_bits(state, expected)
            assert found == {"batch": step}


def test_save_returns_before_the_checkpoint_is_on_disk(tmp_path, monkeypatch):
    done, write = threading.Event(), manifest.write
    monkeypatch.setattr(manifest, "write", lambda *args: done.wait() and write(*args))
    with Store(tmp_path) as store:
        store.save(1, {"x": jnp.ones(3)}, {})
        assert store.latest_step() is None
        done.set()
        store.wait()
        assert store.latest_step() == 1


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (8, 2)])
def test_a_checkpoint_restores_onto_any_mesh(tmp_path, shape):
    def place(tree, shape):
        axis_types = (AxisType.Auto,) * 2
        devices = jax.devices()[: shape[0] * shape[1]]
        mesh = jax.make_mesh(shape, ("a", "b"), axis_types=axis_types, devices=devices)
        specs = {"split": P("a", "b"), "half": P("b"), "replicated": P()}
        return {
            k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in tree.items()
        }

    names = ("split", "half", "replicated")
    host = {
        k: np.arange(256.0, dtype="float32").reshape(16, 16) + i
        for i, k in enumerate(names)
    }
    target = place(host, shape)
    with Store(tmp_path) as store:
        store.save(1, place(host, (4, 2)), {})
        got, _, _ = store.restore(abstract(target))
    assert_same_bits(got, target)
    assert [got[k].sharding for k in names] == [target[k].sharding for k in names]


def test_arrays_without_a_sharding_go_to_the_default_device(saved):
    with Store(saved) as store:
        got, _, _ = store.restore(jax.eval_shape(make_state, 0))
    assert got.params["w"].devices() == {jax.devices()[0]}
    assert_same_bits(got, make_state(30))


def test_floats_convert_to_the_dtype_asked_for_and_integers_do_not(saved):
    wanted = abstract(make_state(0)).replace(step=jax.ShapeDtypeStruct((), "float32"))
    wanted.params["w"] = jax.ShapeDtypeStruct((256, 64), "bfloat16")
    with Store(saved) as store:
        with pytest.raises(
            ValueError, match=r"step: expected float32\[\], found int32"
        ):
            store.restore(wanted)
        got, _, _ = store.restore(wanted.replace(step=abstract(jnp.int32(0))))
    assert_same_bits(got.params["w"], make_state(30).params["w"].astype("bfloat16"))


def test_part_of_a_state_can_be_left_unread(saved):
    wanted = abstract(make_state(0)).replace(opt_state=())
    with Store(saved) as store:
        with pytest.raises(ValueError, match="opt_state/0/count: expected nothing"):
            store.restore(wanted)
        got, _, _ = store.restore(wanted, ignore=["opt_state"])
    assert_same_bits(got, make_state(30).replace(opt_state=()))


def test_another_state_is_refused_by_name_before_its_arrays_are_read(saved):
    flip_a_bit(saved / "30")  # would be noticed on reading
    params = {f"x{i}": jax.ShapeDtypeStruct((i,), "int8") for i in range(20)}
    params["w"] = jax.ShapeDtypeStruct((8, 64), "float32")
    wanted = abstract(make_state(0)).replace(params=params)
    with Store(saved) as store, pytest.raises(ValueError) as caught:
        store.restore(wanted)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"Checkpoint {saved}/30 holds another state:"
    assert lines[1] == "  params/w: expected float32[8,64], found float32[256,64]"
    assert lines[2] == "  params/x0: expected int8[0], found nothing"
    assert len(lines) == 10 and lines[-1] == "  and 13 more"


def test_the_newest_checkpoints_are_kept(tmp_path):
    with Store(tmp_path, keep=2) as store:
        for step in (1, 2, 3, 9, 10):
            store.save(step, {"x": jnp.float32(step)}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "9"]


def test_the_step_saved_or_restored_last_is_not_written_again(saved):
    written = (saved / "30").stat().st_ctime_ns
    with Store(saved, keep=3) as store:
        state, position, step = store.restore(abstract(make_state(0)))
        store.save(step, state, position)
        with pytest.raises(ValueError, match="step=29 must come after 30"):
            store.save(29, state, position)
    assert (saved / "30").stat().st_ctime_ns == written


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning_and_kept(
    saved, damage, caplog
):
    damage(saved / "30")
    left = sorted(saved.rglob("*"))
    with Store(saved, keep=1) as store:
        assert store.latest_step() == (30 if damage is flip_a_bit else 20)
        state, position, step = store.restore(abstract(make_state(0)))
        assert (position, step) == ({"batch": 20}, 20)
        assert_same_bits(state, make_state(20))
        assert f"Passed over: Checkpoint {saved}/30 is damaged" in caplog.text
        assert sorted(saved.rglob("*")) == left

        store.save(25, make_state(25), {"batch": 25})
    names = sorted(path.name for path in saved.iterdir())
    assert names == ["25", "30.aside"]
    assert "set that aside as" in caplog.text


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_asked_for_by_step_is_an_error_that_names_it(
    saved, damage
):
    damage(saved / "20")
    with Store(saved) as store:
        with pytest.raises(DamagedCheckpointError, match=f"{saved}/20 is damaged"):
            store.restore(abstract(make_state(0)), step=20)
        assert store.latest_step() == 30


def test_a_checkpoint_that_is_not_there_is_an_error_that_lists_those_that_are(saved):
    with Store(saved) as store, pytest.raises(FileNotFoundError, match="30, 20, 10"):
        store.restore(abstract(make_state(0)), step=15)


@pytest.mark.parametrize("damage", [cut_manifest, flip_a_bit])
def test_where_none_is_whole_the_error_says_what_to_do_and_nothing_changes(
    saved, damage
):
    for step in (10, 20, 30):
        damage(saved / str(step))
    left = {path: path.stat().st_mtime_ns for path in saved.rglob("*")}
    with Store(saved) as store:
        with pytest.raises(FileNotFoundError, match="damaged: 30, 20, 10. .* move"):
            if damage is flip_a_bit:  # which only reading all finds
                store.restore(abstract(make_state(0)))
            store.latest_step()
    assert {path: path.stat().st_mtime_ns for path in saved.rglob("*")} == left


def test_a_damaged_checkpoint_takes_no_whole_ones_place(saved):
    flip_a_bit(saved / "30")
    with Store(saved, keep=2) as store:
        store.restore(abstract(make_state(0)))
        store.save(40, make_state(40), {"batch": 40})
    names = sorted(path.name for path in saved.iterdir())
    assert names == ["20", "30.aside", "40"]


def test_another_continuation_of_the_run_is_set_aside_whole(saved):
    with Store(saved) as store:
        store.restore(abstract(make_state(0)), step=10)
        store.save(20, make_state(21), {"batch": 21})
    with Store(saved) as store:
        assert_same_bits(store.restore(abstract(make_state(0)))[0], make_state(21))
    (saved / "20").rename(saved / "replaced")
    (saved / "20.aside").rename(saved / "20")
    with Store(saved) as store:
        got, _, _ = store.restore(abstract(make_state(0)), step=20)
    assert_same_bits(got, make_state(20))


@pytest.fixture
def no_transfers():
    jax.config.update("jax_transfer_guard", "disallow")  # in every thread
    yield
    jax.config.update("jax_transfer_guard", None)


def test_saving_and_restoring_work_where_transfers_are_disallowed(
    tmp_path, no_transfers
):
    mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Auto,))
    state = {
        "split": jax.device_put(np.ones((8, 2)), NamedSharding(mesh, P("a"))),
        "replicated": jax.device_put(np.ones((8, 2)), NamedSharding(mesh, P())),
        "scalar": jax.device_put(np.int32(3), NamedSharding(mesh, P())),
    }
    with Store(tmp_path) as store:
        store.save(1, state, {})
        got, _, _ = store.restore(abstract(state))
    assert_same_bits(got, state)


def test_keeping_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep=0 must be at least 1"):
        Store(tmp_path, keep=0)
