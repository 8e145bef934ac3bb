"""Training whose experts get other homes is training without, wherever they are.

Shapes: L MoE layer, E expert.
"""

import shutil

import jax
import numpy as np
import optax
import pytest

from jmoe.config import override
from jmoe.monitor import run_files
from jmoe.train import homes as subject
from jmoe.train import loop
from tests.train.training import (
    Trainer,
    assert_same,
    on,
    put,
    random_variables,
)
from tests.train.whole_runs import last_state

STEPS = 2
BALANCED = "model.moe.exchange.backend=balanced"
FOUR = "pipeline.microbatches=4", "train.batch_size=64", "train.microbatch_size=32"
PLACES = {
    "data=4,expert=2,tensor=2,zero_stage=3": (),
    "data=4,expert=4": ("model.layer_loop=unroll", "optimizer.name=muon"),
    "expert=8,tensor=2": (BALANCED,),
    "data=2,expert=8": ("precision=fp8",),
    "pipe=2,data=2,expert=4": ("pipeline.schedule=1f1b",),
    "pipe=2,data=4,expert=2": ("pipeline.schedule=gpipe", BALANCED),
    "pipe=2,expert=4,tensor=2": ("pipeline.schedule=interleaved_1f1b",),
    "pipe=2,data=2,expert=2,tensor=2": ("pipeline.schedule=zb_h1",),
    "pipe=2,expert=8": ("pipeline.schedule=dualpipe", *FOUR),
    "pipe=2,expert=2,data=4": ("pipeline.schedule=dualpipe_v", *FOUR, BALANCED),
}
BY_DEFAULT = next(iter(PLACES))


@pytest.fixture(scope="module")
def run(smallest):
    return override(
        smallest,
        [
            "model.num_dense_layers=0",
            "model.moe.router.num_experts=16",
            "model.moe.router.num_groups=2",
            "train.batch_size=32",
            "train.microbatch_size=16",
            "train.ramp_start=none",
            "optimizer.schedule={'name': 'constant', 'peak': 1e-3}",
        ],
    )


@pytest.fixture
def compilations():
    """The names of the functions that are compiled from here on."""
    found = []

    def note(name, _, fun_name="", **__):
        if "backend_compile" in name:
            found.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield found
    jax.monitoring.unregister_event_duration_listener(note)


def homes_of(trainer) -> subject.Homes:
    run = override(trainer.run, ["train.reassign_every=1"])
    return subject.Homes(run, trainer.layout, lambda: trainer.state)


def other_homes(run, seed) -> np.ndarray:
    """Any that keep groups of experts together, [L, E]."""
    router, layers = run.model.moe.router, len(run.model.moe_layer_names)
    rng = np.random.default_rng(seed)
    place_GJ = np.arange(router.num_experts).reshape(router.num_groups, -1)
    drawn = (rng.permuted(rng.permutation(place_GJ), axis=1) for _ in range(layers))
    return np.array([home_GJ.ravel() for home_GJ in drawn], np.int32)


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(p, marks=() if p == BY_DEFAULT else pytest.mark.long)
        for p in PLACES
    ],
)
def test_experts_with_ever_other_homes_train_the_same_with_one_compiled_step(
    run, place, compilations
):
    layers = ["model.num_layers=4"] if "pipe" in place else []
    changed = on(run, place, *layers, *PLACES[place])
    trainer = Trainer.of(changed, random_variables(changed))
    homes, plain = homes_of(trainer), homes_of(trainer).begin(trainer.state)
    state = put(trainer.layout, jax.device_get(trainer.state))
    for i in range(STEPS):
        plain, want = trainer.take(plain, seed=i)
        state = homes.back(homes.begin(state), other_homes(changed, seed=i))
        state, got = trainer.take(state, seed=i)
        state, home_LE = homes.in_order(state)
        np.testing.assert_array_equal(home_LE, other_homes(changed, seed=i))
        gradients = jax.device_get(state.opt_state[0])
        assert_same(got._replace(gradients=gradients), want)
    assert compilations.count("jit(train_step)") == 1


@pytest.fixture(scope="module")
def uneven(quick):
    """Runs of a few steps on a mesh, whose biases don't move; by settings."""
    settings = [
        *(
            "mesh=expert=16",
            "model.moe.router.num_experts=32",
            "model.layer_loop=unroll",
        ),
        *("model.moe.router.num_groups=1", "model.moe.router.groups_per_token=1"),
        *("train.batch_size=16", "train.microbatch_size=16", "train.steps=8"),
        *("train.bias_rate.first=0.0", "train.log_every=1", "train.eval_every=8"),
        *("train.checkpoint_every=4", "train.reassign_above=0.0"),
    ]
    return lambda *others: override(quick, [*settings, *others])


@pytest.fixture(scope="module")
def runs(uneven, quickly, tmp_path_factory):
    """Directories of a run without other homes, with, and that with, stopped."""
    workdir, found = tmp_path_factory.mktemp("homes"), {}
    for name, every, steps in (("without", 0, 8), ("with", 2, 8), ("stopped", 2, 4)):
        found[name] = workdir / name
        settings = f"train.reassign_every={every}", f"train.steps={steps}"
        assert loop.train(uneven(*settings), found[name]) == 0
    return found


def assert_alike(run, got, want) -> None:
    """Biases, counts and positions to the bit, the rest but for rounding."""
    logged = (run_files.read_run(workdir).rows for workdir in (got, want))
    for row, other in zip(*logged, strict=True):
        assert row["step"] == other["step"]
        for name in row.keys() & other.keys() & {"loss", "val_loss"}:
            np.testing.assert_allclose(row[name], other[name], rtol=1e-5)
    balance = (list(run_files.read_rows(x / run_files.BALANCE)) for x in (got, want))
    assert next(balance) == next(balance)
    (state, *place), (other, *other_place) = (last_state(run, x) for x in (got, want))
    assert place[1:] == other_place[1:]
    jax.tree.map_with_path(
        lambda path, x, y: np.testing.assert_allclose(
            x, y, rtol=0, atol=1e-3 * np.abs(y).max(), err_msg=str(path)
        ),
        state,
        other,
    )


def test_a_run_that_re_assigns_homes_has_the_same_curve_and_checkpoints(uneven, runs):
    assert_alike(uneven(), runs["with"], runs["without"])
    logged = run_files.read_run(runs["with"])
    moved = [row for row in logged.rows if "experts_moved_L" in row]
    assert [row["step"] for row in moved] == [2, 4, 6]
    assert sum(row["experts_moved_L"][0] for row in moved) > 0
    for row in moved:
        assert row["home_max_vio_moved_L"][0] <= row["home_max_vio_L"][0]


def test_a_run_goes_on_as_if_its_experts_had_never_moved(uneven, runs, tmp_path):
    run = uneven("train.reassign_every=2")
    workdir = shutil.copytree(runs["stopped"], tmp_path / "run")
    assert loop.train(run, workdir) == 0
    assert_alike(run, workdir, runs["with"])


@pytest.mark.long
def test_a_run_that_lends_from_its_middle_on_has_the_same_curve(uneven, runs, tmp_path):
    run = uneven(BALANCED, "model.moe.exchange.lend_above=0.0")
    workdir = shutil.copytree(runs["stopped"], tmp_path / "run")
    assert loop.train(run, workdir) == 0
    assert_alike(run, workdir, runs["without"])
    logged = run_files.read_run(workdir).rows
    assert sum(row.get("experts_lent_L", [0])[0] for row in logged) > 0


def test_drops_that_would_depend_on_homes_are_refused(run):
    every, factor = "train.reassign_every=9", "model.moe.exchange.capacity_factor=1.1"
    subject.check(on(run, "expert=4", factor))
    subject.check(on(run, "expert=4", every, factor, BALANCED))
    subject.check(on(run, "expert=4", every))
    with pytest.raises(ValueError, match="capacity_factor=1.1 must be none.*every=9"):
        subject.check(on(run, "expert=4", every, factor))


def test_what_an_optimizer_keeps_of_experts_in_another_shape_is_refused(run):
    trainer = Trainer.of(on(run, BY_DEFAULT), random_variables(run))
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    state = trainer.state.replace(opt_state=factored.init(trainer.state.params))
    with pytest.raises(ValueError, match="keeps .opt_state.*experts.* of shape"):
        homes_of(trainer._replace(state=state))
