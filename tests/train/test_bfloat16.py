"""Training in bfloat16 against the same weights in float32, on one device and on many.

Every token visits all experts: a rounding then moves no choice, and what is left is
what the format rounds. The oracle's own roundings are 2**-16 of that.

Shapes: A microbatch, B sequence, T position.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.balance import bias
from jmoe.config import RunConfig, override
from jmoe.data.packing import Batch
from jmoe.nn.model import read_biases
from jmoe.train import layout as layouts
from tests.programs import equations
from tests.train.training import Step, Trainer, on, random_variables

ROUNDING = 2.0**-9  # of a number, by the format


@pytest.fixture(scope="module")
def run(smallest) -> RunConfig:
    return override(
        smallest,
        [
            "model.vocab_size=304",
            "model.attention.num_heads=4",
            "model.moe.router={'num_experts': 4, 'top_k': 4}",
            "train.ramp_start=none",
            "train.loss_chunk=512",
            "optimizer.schedule={'name': 'constant', 'peak': 1e-3}",
        ],
    )


def in_bfloat16(run) -> RunConfig:
    return override(run, ["model.dtype=bfloat16"])


def representable_variables(run):
    """What the format has: that all compute with the same weights."""
    scale = 0.5
    return jax.tree.map(
        lambda x: np.asarray(jnp.asarray(scale * x, jnp.bfloat16), np.float32),
        random_variables(run),
    )


def words(run) -> Batch:
    """Tokens as frequent as words: the first a sixth of them, the next a twelfth."""
    count = run.train.batch_size // run.train.microbatch_size
    shape = count, run.train.microbatch_size, run.data.sequence_length + 1
    frequency = 1 / np.arange(1, run.model.vocab_size + 1)
    rng = np.random.default_rng(0)
    tokens = rng.choice(run.model.vocab_size, shape, p=frequency / frequency.sum())
    return Batch(tokens.astype(np.int32), np.zeros(shape, np.int32))


def take_step(run, variables) -> Step:
    trainer = Trainer.of(run, variables)
    rows = layouts.put_batch(trainer.layout, words(run))
    state, metrics = trainer.step(trainer.state, rows)
    return Step(*jax.device_get((metrics, state.opt_state[0])))


def traced(run):
    """The program of that step."""
    trainer = Trainer.of(run, representable_variables(run))
    rows = layouts.put_batch(trainer.layout, words(run))
    return trainer.step.trace(trainer.state, rows).jaxpr.jaxpr


def distance(got, want) -> float:
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def assert_within_the_format(got: Step, want: Step) -> None:
    """Asserts it of each parameter, and the rows of the two most frequent tokens.

    Between weights and their gradients are some 60 roundings in two layers and an MTP
    module, forward and back. They are independent, so that sqrt(60) add up.
    """
    bound = 8 * ROUNDING
    for name in ("loss", "mtp_loss"):
        np.testing.assert_allclose(
            got.metrics[name], want.metrics[name], rtol=bound / 8, err_msg=name
        )
    jax.tree.map_with_path(
        lambda path, g, w: np.testing.assert_array_less(
            distance(g, w), bound, err_msg=jax.tree_util.keystr(path)
        ),
        got.gradients,
        want.gradients,
    )
    for got_D, want_D in zip(
        *(step.gradients["embedding"][:2] for step in (got, want)), strict=True
    ):
        assert distance(got_D, want_D) < bound


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
def test_each_gradient_is_float32s_within_the_format_at_the_frequency_of_words(
    run, tied
):
    """With 8,192 tokens in a microbatch, the first of them 1,300 times."""
    changed = override(
        run,
        [
            f"model.tie_embeddings={tied}",
            "data.sequence_length=64",
            "train.batch_size=128",
            "train.microbatch_size=128",
        ],
    )
    variables = representable_variables(changed)
    want = take_step(changed, variables)
    assert_within_the_format(take_step(in_bfloat16(changed), variables), want)


MESHES = {
    "one device": [""],
    "by expert": ["data=2,expert=4,tensor=2"],
    "by layer": ["data=4,expert=2,tensor=2,zero_stage=3"],
    "zb_h1": ["pipe=2,data=4,tensor=2", "pipeline.schedule=zb_h1"],
    "dualpipe": ["pipe=2,data=2,expert=4", "pipeline.schedule=dualpipe"],
}


def parametrize_meshes(*names):
    return pytest.mark.parametrize("mesh", [MESHES[n] for n in names], ids=names)


@pytest.fixture(scope="module")
def run_on_many(run) -> RunConfig:
    sizes = [
        "data.sequence_length=16",
        "train.batch_size=64",
        "train.microbatch_size=8",
    ]
    return override(run, sizes)


@pytest.fixture(scope="module")
def float32_step(run_on_many) -> Step:
    return take_step(run_on_many, representable_variables(run_on_many))


@pytest.fixture(scope="module")
def step_on(run_on_many):
    """Returns a mesh and its settings' step in bfloat16; each is taken once."""
    variables = representable_variables(run_on_many)

    @functools.cache
    def step_on(*mesh) -> Step:
        return take_step(on(in_bfloat16(run_on_many), *mesh), variables)

    return step_on


@parametrize_meshes(*MESHES)
def test_every_mesh_has_float32s_loss_and_gradients_within_the_format(
    step_on, float32_step, mesh
):
    got = step_on(*mesh)
    assert_within_the_format(got, float32_step)
    for name in ("load_LE", "bias_LE"):
        np.testing.assert_array_equal(got.metrics[name], float32_step.metrics[name])


@parametrize_meshes("one device", "by layer")
def test_gradients_of_layers_leave_each_microbatch_in_float32(step_on, mesh):
    """The last byte of most of them is then not zero, as it is of a few bfloat16s."""
    gradients = step_on(*mesh).gradients
    of_layers = {name: gradients[name] for name in ("dense", "moe")}
    for path, x in jax.tree.leaves_with_path(of_layers):
        numbers = x[x != 0]
        last_byte = numbers.view(np.uint32) & 0xFF
        assert (last_byte != 0).mean() > 0.9, jax.tree_util.keystr(path)


@parametrize_meshes("by expert", "by layer", "dualpipe")
def test_no_choice_is_lost_where_roundings_decide(run_on_many, mesh):
    """Then counts may differ, but not their sums; and biases follow from the counts."""
    router = "model.moe.router={'num_experts': 16, 'top_k': 3}"
    changed = override(in_bfloat16(run_on_many), [router])
    variables = random_variables(changed)
    got = take_step(on(changed, *mesh), variables).metrics
    load_LE = got["load_LE"]
    # The MTP module has no token to embed at the last position.
    length = changed.data.sequence_length
    seen_L = changed.train.batch_size * np.array([length, length - 1])
    np.testing.assert_array_equal(load_LE.sum(-1), 3 * seen_L)
    assert len(np.unique(load_LE)) > 8
    rule = bias.update_rule(changed.model.moe.router.update_rule)
    before_LE = read_biases(variables["router_state"], changed.model)
    want_LE = rule(before_LE, load_LE, rate=got["bias_rate"])
    np.testing.assert_array_equal(got["bias_LE"], want_LE)
    assert (got["bias_LE"] != before_LE).any()


def test_no_sum_but_of_two_gradients_is_in_bfloat16(run_on_many):
    sums = [
        (equation.primitive.name, x.aval)
        for equation, _ in equations(traced(in_bfloat16(run_on_many)))
        if equation.primitive.name in ("reduce_sum", "scatter-add", "cumsum")
        for x in equation.outvars
        # A dimension of one is dropped by a sum, too.
        if equation.primitive.name != "reduce_sum"
        or equation.invars[0].aval.size > x.aval.size
    ]
    assert len({name for name, _ in sums}) > 1
    assert [found for found in sums if found[1].dtype == jnp.bfloat16] == []


def reductions(jaxpr):
    """Over which axes each of a program's sums over devices is, and in which dtype."""
    for equation, _ in equations(jaxpr):
        if equation.primitive.name in ("psum", "psum_invariant", "reduce_scatter"):
            axes = equation.params.get("axes") or equation.params["axis_name"]
            for x in equation.invars:
                yield frozenset(axes), x.aval.dtype


@parametrize_meshes("by expert", "by layer", "zb_h1")
def test_gradients_of_parameters_are_summed_over_devices_in_float32(run_on_many, mesh):
    """What travels in bfloat16 are activations, among the devices of `tensor`."""
    changed = on(in_bfloat16(run_on_many), *mesh)
    found = set(reductions(traced(changed)))
    in_bf16 = {axes for axes, dtype in found if dtype == jnp.bfloat16}
    assert in_bf16 == {frozenset({"tensor"})}
    free = {a for a, devices in changed.mesh.shape.items() if devices > 1} - {"tensor"}
    in_float32 = {axes for axes, dtype in found if dtype == jnp.float32}
    assert frozenset().union(*in_float32) >= free
