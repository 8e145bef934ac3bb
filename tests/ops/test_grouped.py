"""Routed experts against every expert applied to every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from jmoe.ops import fp8, grouped, grouped_blocks, row_tasks

NAMES = "blocks blocks_remat ragged blocks_apart blocks_remat_apart ragged_apart"
BACKENDS = {
    name: functools.partial(
        grouped.BACKENDS[name.split("_")[0]],
        remat="remat" in name,
        apart="apart" in name,
    )
    for name in NAMES.split()
}
ALL_BACKENDS = pytest.mark.parametrize("backend", BACKENDS)
E, D, F = 7, 12, 6
NOBODY = E


def dense(x_TD, expert_TK, gate_TK, gate_up_ED2F, down_EFD):
    chosen_TKE = jax.nn.one_hot(expert_TK, E)  # nobody's row is all zeros
    gate_TE = jnp.einsum("tk,tke->te", gate_TK, chosen_TKE)
    hidden_TE2F = jnp.einsum("td,edxf->texf", x_TD, gate_up_ED2F)
    act_TEF = jax.nn.silu(hidden_TE2F[:, :, 0]) * hidden_TE2F[:, :, 1]
    return jnp.einsum("te,tef,efd->td", gate_TE, act_TEF, down_EFD)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(routed_mlp, expert_TK, dy_TD, x, gates, gate_up, down):
    def of_floats(x, gates, gate_up, down):
        return routed_mlp(x, expert_TK, gates, gate_up, down)

    y_TD, pull = jax.vjp(of_floats, x, gates, gate_up, down)
    return dict(
        zip(("y", "x", "gates", "gate_up", "down"), (y_TD, *pull(dy_TD)), strict=True)
    )


def floats(shape_TK, dtype=np.float32, hidden=D, mlp=F):
    """Output cotangent, tokens, gates (a quarter of them 0) and weights."""
    rng = np.random.default_rng(0)
    tokens, _ = shape_TK
    gate_TK = rng.uniform(0.1, 1, shape_TK) * (rng.random(shape_TK) < 0.75)
    shapes = (tokens, hidden), (tokens, hidden), (E, hidden, 2, mlp), (E, mlp, hidden)
    dy, x, gate_up, down = (jnp.asarray(rng.normal(size=s), dtype) for s in shapes)
    return dy, x, jnp.asarray(gate_TK, np.float32), gate_up, down


def random_choices(tokens, k, choices, seed=1):
    """Distinct choices for each token, as a router makes them."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.choice(choices, k, replace=False) for _ in range(tokens)])


TOKENS = row_tasks.BLOCK + 45  # no block divides them, and no block holds an expert's
CHOICES = {
    "random": random_choices(TOKENS, 3, E),
    "idle_experts": random_choices(TOKENS, 3, [0, 2, 5]),
    "one_choice": random_choices(TOKENS, 1, [1, 1, 1, 6]),
    "one_expert_gets_everything": np.full((TOKENS, 1), 4),
    "some_choose_nobody": random_choices(TOKENS, 3, [0, 1, 6, NOBODY, NOBODY]),
    "all_choose_nobody": np.full((TOKENS, 3), NOBODY),
    "one_token": random_choices(1, 3, E),
    "one_expert_fills_the_only_block": np.full((2 * row_tasks.STEP, 1), 4),
}


def compare(got, want, tolerance):
    """Errors are relative to a tensor's largest entry: sums cancel, their terms don't.

    Tensors by name.
    """
    for name, x in want.items():
        error = np.abs(got[name].astype(np.float32) - x).max()
        assert error <= tolerance * np.abs(x).max(), (name, error)


@ALL_BACKENDS
@pytest.mark.parametrize("case", CHOICES)
def test_output_and_all_gradients_equal_the_dense_experts(backend, case):
    expert_TK = jnp.asarray(CHOICES[case], jnp.int32)
    arrays = floats(expert_TK.shape)
    got = value_and_gradients(BACKENDS[backend], expert_TK, *arrays)
    compare(got, value_and_gradients(dense, expert_TK, *arrays), 2e-6)


@pytest.mark.parametrize("tokens", [1, 4, 21])
def test_without_gradients_few_tokens_equal_the_dense_experts(tokens):
    """Expert 2 has all of the tokens, expert 5 one, 0 those between."""
    expert_TK = np.full((tokens, 3), NOBODY)
    expert_TK[:, 0], expert_TK[:1, 1], expert_TK[tokens // 2 :, 2] = 2, 5, 0
    _, x_TD, gate_TK, *weights = floats(expert_TK.shape)
    operands = x_TD, jnp.asarray(expert_TK, jnp.int32), gate_TK, *weights
    got, want = BACKENDS["blocks"](*operands), dense(*operands)
    compare({"output": np.asarray(got)}, {"output": np.asarray(want)}, 2e-6)


@ALL_BACKENDS
def test_bfloat16_differs_from_float32_by_its_rounding(backend):
    expert_TK = jnp.asarray(CHOICES["some_choose_nobody"], jnp.int32)
    arrays = floats(expert_TK.shape, jnp.bfloat16)
    got = value_and_gradients(BACKENDS[backend], expert_TK, *arrays)
    kept = {name: x.dtype for name, x in got.items()}
    assert kept == dict.fromkeys(got, jnp.bfloat16) | {"gates": jnp.float32}
    arrays32 = [x.astype(jnp.float32) for x in arrays]
    compare(got, value_and_gradients(dense, expert_TK, *arrays32), 2**-6)


@ALL_BACKENDS
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_weights_gradient_of_equal_tokens_is_one_tokens_times_their_number(
    backend, dtype
):
    """Summed in float32 over tasks and segments, whatever x and weights are in.

    In a pipeline, segments of an overload add to a sum in the weights' dtype.
    """
    _, _, _, *weights = floats((1, 3), jnp.bfloat16)

    def gradients(tokens, dtype):
        expert_TK = jnp.tile(jnp.array([0, 2, 5]), (tokens, 1))
        half = -(-expert_TK.size // 2)
        routed_mlp = functools.partial(BACKENDS[backend], rows=half)
        x_TD = jnp.ones((tokens, D), jnp.bfloat16)
        gate_TK = jnp.full(expert_TK.shape, 0.75)
        held = (w.astype(dtype) for w in weights)
        return value_and_gradients(routed_mlp, expert_TK, x_TD, x_TD, gate_TK, *held)

    times = 5 * row_tasks.BLOCK + 45
    one, many = gradients(1, jnp.float32), gradients(times, dtype)
    roundings = 3 if backend == "ragged_apart" else 1  # three segments have rows
    rounding = (
        roundings * jnp.finfo(dtype).eps / 2 + times * 2.0**-24
    )  # each addition's
    for name in ("gate_up", "down"):
        assert many[name].dtype == dtype
        want = times * np.asarray(one[name], np.float64)
        error = np.abs(np.asarray(many[name], np.float64) - want)
        assert (error <= rounding * np.abs(want)).all()


@ALL_BACKENDS
def test_a_gate_of_zero_has_the_gradient_of_its_experts_output(backend):
    expert_TK = jnp.asarray(CHOICES["random"], jnp.int32)
    dy_TD, x_TD, gate_TK, *weights = floats(expert_TK.shape)
    got = value_and_gradients(
        BACKENDS[backend], expert_TK, dy_TD, x_TD, 0 * gate_TK, *weights
    )
    ones_T1 = jnp.ones((len(x_TD), 1))
    y_KTD = jnp.stack([dense(x_TD, e[:, None], ones_T1, *weights) for e in expert_TK.T])
    compare(got, {"gates": jnp.einsum("ktd,td->tk", y_KTD, dy_TD)}, 2e-6)
    assert not any(got[name].any() for name in ("y", "x", "gate_up", "down"))


BLOCKS = [name for name in BACKENDS if not name.startswith("ragged")]


def one_by_one(recipe, expert_TK, dy_TD, x_TD, gate_TK, gate_up_ED2F, down_EFD):
    """Each expert's FP8 products, on all of its rows at once, and their gradients."""
    left = fp8.roundings(fp8.RECIPES[recipe])

    def outer(x_RI, dy_RO):
        return left.activations(x_RI.T) @ left.gradients(dy_RO.T).T

    y_TD, dx_TD = jnp.zeros_like(x_TD), jnp.zeros_like(x_TD)
    d_gate_TK = jnp.zeros_like(gate_TK)
    d_gate_up, d_down = [], []
    for e in range(E):
        t, k = np.nonzero(np.asarray(expert_TK) == e)
        gate_R1 = gate_TK[t, k][:, None]
        gate_up_DX = left.weights(gate_up_ED2F[e].reshape(x_TD.shape[1], -1))
        down_FD = left.weights(down_EFD[e])
        x_RD = fp8.rounded(x_TD[t], power_of_two=True)
        swiglu = lambda h: jax.nn.silu(h[:, : len(down_FD)]) * h[:, len(down_FD) :]  # noqa: B023, E731
        h_RX = x_RD @ gate_up_DX
        y_TD = y_TD.at[t].add(gate_R1 * (left.activations(swiglu(h_RX)) @ down_FD))
        act_RF, pull = jax.vjp(swiglu, rounded(h_RX))  # as it was kept
        act_RF = left.activations(act_RF)
        d_act_RF = left.gradients(dy_TD[t]) @ down_FD.T
        d_gate_TK = d_gate_TK.at[t, k].set((d_act_RF * act_RF).sum(-1))
        (d_h_RX,) = pull(d_act_RF * gate_R1)
        dx_TD = dx_TD.at[t].add(left.gradients(d_h_RX) @ gate_up_DX.T)
        d_gate_up.append(outer(x_RD, d_h_RX).reshape(gate_up_ED2F.shape[1:]))
        d_down.append(outer(act_RF * gate_R1, dy_TD[t]))
    return {
        "y": y_TD,
        "x": dx_TD,
        "gates": d_gate_TK,
        "gate_up": jnp.stack(d_gate_up),
        "down": jnp.stack(d_down),
    }


def rounded(x):
    return fp8.dequantize(fp8.quantize(x, fp8.ROW), x.dtype)


def off_by(got, want):
    """How far each tensor is, of its own length."""
    return {
        name: np.linalg.norm(got[name] - x) / np.linalg.norm(x)
        for name, x in want.items()
    }


@pytest.mark.parametrize("backend", BLOCKS)
def test_fp8_experts_are_those_that_multiply_all_their_rows_at_once(backend):
    expert_TK = jnp.asarray(CHOICES["some_choose_nobody"], jnp.int32)
    arrays = floats(expert_TK.shape, hidden=200, mlp=150)
    routed_mlp = functools.partial(BACKENDS[backend], recipe=fp8.RECIPES["fp8"])
    got = value_and_gradients(routed_mlp, expert_TK, *arrays)
    want = one_by_one("fp8", expert_TK, *arrays)
    # A sum in another order may be rounded to the neighbouring e4m3 number.
    assert max(off_by(got, want).values()) < 1e-3
    exact = value_and_gradients(dense, expert_TK, *arrays)
    assert min(off_by(got, exact).values()) > 1e-2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("backend", ["blocks", "ragged"])
def test_tokens_that_came_in_fp8_are_not_rounded_again(backend, dtype):
    expert_TK = jnp.asarray(CHOICES["random"], jnp.int32)
    _, x_TD, *arrays = floats(expert_TK.shape, hidden=200, mlp=150)
    routed_mlp = functools.partial(BACKENDS[backend], recipe=fp8.RECIPES["fp8"])
    x_TD, gate_TK, *weights = (x.astype(dtype) for x in (x_TD, *arrays))
    arrived_TD = fp8.dequantize(fp8.quantize(x_TD, power_of_two=True), dtype)
    assert (arrived_TD != x_TD).any()
    here, there = (
        jax.jit(routed_mlp)(x, expert_TK, gate_TK.astype(jnp.float32), *weights)
        for x in (x_TD, arrived_TD)
    )
    np.testing.assert_array_equal(here, there)


@pytest.mark.parametrize("backend, kept", [("blocks", 1), ("blocks_remat", 0)])
def test_with_a_recipe_the_activations_are_kept_in_fp8_or_not_at_all(backend, kept):
    expert_TK = jnp.asarray(CHOICES["random"], jnp.int32)
    _, *arrays = floats(expert_TK.shape)

    def kept_with(recipe):
        def output(x, gates, gate_up, down):
            of_backend = BACKENDS[backend]
            return of_backend(x, expert_TK, gates, gate_up, down, recipe=recipe)

        leaves = jax.tree.leaves(jax.vjp(output, *arrays)[1])
        rows = expert_TK.size + row_tasks.BLOCK
        return [x.dtype for x in leaves if x.shape == (rows, 2 * F)]

    assert kept_with(None) == [jnp.float32] * kept
    assert kept_with(fp8.RECIPES["fp8"]) == [jnp.uint8] * kept  # e4m3's bits


@pytest.mark.parametrize("case", ["one_choice", "some_choose_nobody"])
def test_fp8_experts_by_segments_have_the_same_outputs_and_gradients_near_them(case):
    expert_TK = jnp.asarray(CHOICES[case], jnp.int32)
    arrays = floats(expert_TK.shape, hidden=200, mlp=150)
    whole, apart = (
        value_and_gradients(
            functools.partial(BACKENDS[name], recipe=fp8.RECIPES["fp8"]),
            expert_TK,
            *arrays,
        )
        for name in ("ragged", "ragged_apart")
    )
    assert max(off_by(apart, whole).values()) < 1e-3
    off = off_by(whole, one_by_one("fp8", expert_TK, *arrays))
    assert off["y"] < 1e-3
    # Of activations that weren't rounded to be kept.
    assert max(off.values()) < 0.1


@pytest.mark.parametrize("backend", ["blocks", "ragged"])
@pytest.mark.parametrize("recipe", fp8.RECIPES)
def test_each_recipes_experts_are_off_by_what_e4m3_rounds(recipe, backend):
    expert_TK = jnp.asarray(CHOICES["random"], jnp.int32)
    arrays = floats(expert_TK.shape, hidden=200, mlp=150)
    routed_mlp = functools.partial(BACKENDS[backend], recipe=fp8.RECIPES[recipe])
    got = value_and_gradients(routed_mlp, expert_TK, *arrays)
    off = off_by(got, value_and_gradients(dense, expert_TK, *arrays))
    assert 1e-2 < min(off.values()) and max(off.values()) < 0.12


def equations(backend):
    """Divides equations: before the output's gradient; for x and gates; the rest.

    A loop is one equation, and is in one of these.
    """

    expert_TK = CHOICES["random"]
    routed_mlp = functools.partial(
        BACKENDS[backend],
        rows=expert_TK.shape[0],  # `ragged` has a loop, too
    )

    def pull(dy_TD, *arrays):
        def of_floats(x_TD, *rest):
            return routed_mlp(x_TD, expert_TK, *rest)

        return jax.vjp(of_floats, *arrays)[1](dy_TD)

    jaxpr = jax.make_jaxpr(pull)(*floats(expert_TK.shape)).jaxpr
    given, before, of_inputs, of_weights = {jaxpr.invars[0]}, [], [], []
    for equation in jaxpr.eqns:
        if given.isdisjoint(variables(equation)):
            before.append(equation)
        else:
            given.update(equation.outvars)
    wanted = set(jaxpr.outvars[:2])
    for equation in reversed([x for x in jaxpr.eqns if x not in before]):
        if wanted.isdisjoint(equation.outvars):
            of_weights.append(equation)
        else:
            of_inputs.append(equation)
            wanted.update(variables(equation))
    return before, of_inputs, of_weights


def variables(equation):
    return [x for x in equation.invars if isinstance(x, core.Var)]


def count_products(several):
    """How many products equations run; of a loop, one turn counts."""
    products = 0
    for equation in several:
        products += equation.primitive.name in ("dot_general", "ragged_dot_general")
        parts = jax.tree.leaves(equation.params)  # a loop's body, a switch's branches
        functions = [x for x in parts if isinstance(x, core.Jaxpr | core.ClosedJaxpr)]
        products += max((count_products(x.eqns) for x in functions), default=0)
    return products


@ALL_BACKENDS
def test_with_loops_apart_x_and_the_gates_need_no_gradient_of_a_weight(backend):
    _, of_inputs, _ = equations(backend)
    made = {x.aval.shape for equation in of_inputs for x in equation.outvars}
    gradients = {(E, D, 2 * F), (E, F, D)}
    assert made & gradients == (set() if backend.endswith("_apart") else gradients)


@pytest.mark.parametrize(
    "backend, products",
    [
        # a task's; a task's; those of an expert's first task, and of a later one
        ("blocks_apart", (2, 2, 2 + 2)),
        ("blocks_remat_apart", (2, 3, 2 + 2)),
        # of the first segment, and of a later one, where both loops need the same two
        ("ragged_apart", (2 + 2, 3 + 3, 2 + 4)),
    ],
)
def test_loops_apart_compute_no_task_and_no_first_segment_twice(backend, products):
    assert tuple(map(count_products, equations(backend))) == products


@functools.partial(jax.jit, static_argnums=0)
def gradient_norms(routed_mlp, weights, x_TD, expert_TK, gate_TK):
    def last_output(weights):
        y_TD = x_TD
        for gate_up, down in weights:
            y_TD += routed_mlp(y_TD, expert_TK, gate_TK, gate_up, down)
        return (y_TD**2).sum()

    return jax.tree.map(jnp.linalg.norm, jax.grad(last_output)(weights))


# Of the backend for CPUs: the other's reference copies weights there.
def test_a_layers_gradients_take_no_memory_before_their_turn():
    def temporary_bytes(layers):
        shape = functools.partial(jax.ShapeDtypeStruct, dtype=np.float32)
        layer = shape((8, 256, 2, 128)), shape((8, 128, 256))
        choices = jax.ShapeDtypeStruct((16, 2), np.int32)
        arrays = [layer] * layers, shape((16, 256)), choices, shape((16, 2))
        lowered = gradient_norms.lower(grouped_blocks.routed_mlp_blocks, *arrays)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    gradient_bytes = 4 * 8 * 256 * 3 * 128
    assert temporary_bytes(3) - temporary_bytes(1) < gradient_bytes
