"""Recorded choices: what a model takes again to compute the same, by whatever loop."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.nn.model import Transformer, make_variables
from jmoe.nn.recorded import record_choices
from tests.smallest_run import get_config

SMALLEST = get_config().model
TOKENS_BT = np.random.default_rng(0).integers(300, size=(2, 12))


def of_kind(cfg, kind: str, **changes):
    router = dataclasses.replace(cfg.moe.router, kind=kind, **changes)
    return dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, router=router))


@pytest.fixture(scope="module")
def deeper():
    return dataclasses.replace(SMALLEST, num_layers=3)


@pytest.fixture(scope="module")
def variables(deeper):
    return jax.jit(lambda: make_variables(Transformer(deeper), seed=1))()


@pytest.fixture(scope="module")
def recorded(deeper, variables):
    return jax.jit(record_choices, static_argnums=0)(deeper, variables, TOKENS_BT)


def test_a_model_that_replays_them_computes_the_same(deeper, variables, recorded):
    def hidden(cfg, choice_BLTK):
        apply = functools.partial(Transformer(cfg).apply, method="features")
        features: Any = apply(variables, TOKENS_BT, choice_BLTK=choice_BLTK)
        return features.hidden_BSD, features.mtp_BSD[0][:, :-1]

    replay = of_kind(deeper, "replayed")
    chosen = jax.jit(functools.partial(hidden, deeper, None))()
    again, other = jax.jit(lambda x: (hidden(replay, x), hidden(replay, (x + 1) % 8)))(
        recorded.expert_BLTK
    )
    for one, same in zip(chosen, again, strict=True):
        np.testing.assert_allclose(one, same, atol=1e-6)
    assert all(abs(a - b).max() > 1e-3 for a, b in zip(chosen, other, strict=True))


def test_layers_are_in_their_order_however_they_are_looped_over(
    deeper, variables, recorded
):
    unrolled = dataclasses.replace(deeper, layer_loop="unroll")
    params, state = dict(variables["params"]), dict(variables["router_state"])
    for tree in (params, state):
        for name in [name for name in ("dense", "moe") if name in tree]:
            stack = tree.pop(name)
            for i in range(len(jax.tree.leaves(stack)[0])):
                tree[f"{name}_{i}"] = jax.tree.map(lambda x, i=i: x[i], stack)
    apart = {"params": params, "router_state": state}
    got = jax.jit(record_choices, static_argnums=0)(unrolled, apart, TOKENS_BT)
    assert got.expert_BLTK.shape == (2, 3, 12, 2)  # two MoE layers and an MTP module
    np.testing.assert_array_equal(got.expert_BLTK, recorded.expert_BLTK)
    np.testing.assert_allclose(got.gate_BLTK, recorded.gate_BLTK, atol=1e-6)


def test_gates_sum_to_one_and_who_visits_no_expert_has_none_of_them(recorded):
    np.testing.assert_allclose(recorded.gate_BLTK.sum(-1), 1.0, atol=1e-5)
    is_nobody = recorded.expert_BLTK == SMALLEST.moe.router.num_experts
    assert is_nobody[:, -1, -1].all() and not is_nobody[:, :-1].any()
    assert not jnp.isin(recorded.expert_BLTK, -1).any()


def test_experts_that_choose_have_no_tokens_choices(deeper, variables):
    picking = of_kind(deeper, "expert_choice", num_groups=1, groups_per_token=1)
    with pytest.raises(ValueError, match="kind='expert_choice': experts choose"):
        jax.eval_shape(functools.partial(record_choices, picking), variables, TOKENS_BT)
