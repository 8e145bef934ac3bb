"""A decoder's few rows through their experts, against every expert for every token."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jmoe.ops import fp8, grouped, grouped_few
from tests.ops.test_grouped import NOBODY, E, compare, dense, floats, random_choices
from tests.programs import equations

HIDDEN, MLP = 96, 63  # slices of sixteen terms, and of nine
few_rows, every_expert = map(jax.jit, (grouped_few.routed_mlp_few, dense))


def inputs(tokens, dtype=np.float32, hidden=HIDDEN, mlp=MLP):
    """Operands, where half of the choices are nobody."""
    expert_TK = random_choices(tokens, 3, [*range(E), *[NOBODY] * E])
    _, x_TD, gate_TK, *weights = floats(expert_TK.shape, dtype, hidden, mlp)
    return x_TD, jnp.asarray(expert_TK, jnp.int32), gate_TK, *weights


@pytest.mark.parametrize("tokens", [1, 8, 21, 90])
def test_few_rows_equal_the_dense_experts(tokens):
    got, want = (f(*inputs(tokens)) for f in (few_rows, every_expert))
    compare({"output": np.asarray(got)}, {"output": np.asarray(want)}, 2e-6)


def test_in_bfloat16_they_differ_by_its_rounding():
    operands = inputs(8, jnp.bfloat16)
    got = few_rows(*operands)
    assert got.dtype == jnp.bfloat16
    x_TD, *choices, gate_up, down = operands
    wide = [x.astype(jnp.float32) for x in (x_TD, gate_up, down)]
    want = every_expert(wide[0], *choices, *wide[1:])
    compare({"output": np.asarray(got)}, {"output": np.asarray(want)}, 2**-6)


def test_what_visits_nobody_may_be_anything():
    x_TD, expert_TK, *others = inputs(8)
    x_TD = jnp.where((expert_TK == NOBODY).all(1)[:, None], jnp.nan, x_TD)
    x_TD, expert_TK = x_TD.at[3].set(jnp.nan), expert_TK.at[3].set(NOBODY)
    got = few_rows(x_TD, expert_TK, *others)
    assert np.isfinite(got).all() and not got[3].any()


def test_no_experts_weights_are_copied():
    operands = inputs(1, hidden=256, mlp=256)
    compiled = few_rows.lower(*operands).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < operands[-1][0].nbytes / 2


def test_blocks_leave_them_rows_of_whole_weights_that_nothing_is_differentiated_by():
    def has_sizes(function, *operands):
        traced = jax.make_jaxpr(function)(*operands).jaxpr
        return any(x.primitive is lax.cond_p for x, _ in equations(traced))

    blocks, few = grouped.BACKENDS["blocks"], inputs(8)
    most = grouped_few.MAX_ROWS_OF_EXPERT * E // 3  # tokens, of three choices
    assert not has_sizes(blocks, *few)
    assert not has_sizes(blocks, *inputs(most))
    assert has_sizes(blocks, *inputs(most + 1))
    assert not grouped_few.suits(grouped_few.MAX_ROWS + 1, *jnp.ones((2, 256, 8, 8)))
    assert has_sizes(blocks, *inputs(8, mlp=37))
    assert has_sizes(jax.grad(lambda x: blocks(x, *few[1:]).sum()), few[0])
    stored = [fp8.quantize(w.reshape(E, w.shape[1], -1), fp8.SQUARE) for w in few[-2:]]
    assert has_sizes(blocks, *few[:-2], *stored)
