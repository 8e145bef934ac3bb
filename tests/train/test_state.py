"""A new run's state: what is in it, how much of it, and that its seed decides it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jmoe.config import override
from jmoe.nn.model import Transformer
from jmoe.train import layout as layouts
from jmoe.train.optimizer import make_optimizer
from jmoe.train.state import count_parameters, make_state


def model_and_optimizer(run):
    model = Transformer(run.model)
    layout = layouts.make_layout(model, layouts.run_mesh(run.mesh))
    return model, make_optimizer(run.optimizer, run.horizon, layout)


def abstract_state(run):
    model, optimizer = model_and_optimizer(run)
    return jax.eval_shape(lambda: make_state(model, optimizer, 0))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_optimizer_knows_parameters_and_no_bias(smallest, name):
    state = abstract_state(override(smallest, [f"optimizer.name={name}"]))

    def names(tree):
        paths = [path for path, _ in jax.tree.leaves_with_path(tree)]
        return {key.key for path in paths for key in path if hasattr(key, "key")}

    assert "bias" in names(state.router_state)
    assert "bias" not in names(state.params) | names(state.opt_state)
    assert "kernel" in names(state.params) & names(state.opt_state)
    assert state.step.dtype == jnp.int32
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def test_a_new_state_follows_from_its_seed(smallest):
    run = override(smallest, ["model.num_layers=1", "model.num_dense_layers=0"])
    run = override(run, ["model.mtp_depth=0"])
    model, optimizer = model_and_optimizer(run)
    make = jax.jit(lambda seed: make_state(model, optimizer, seed))
    first, again, other = map(jax.device_get, map(make, (0, 0, 1)))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, first, again)))
    assert not np.array_equal(first.params["head"], other.params["head"])
    assert first.step == 0
    assert not any(np.any(x) for x in jax.tree.leaves(first.router_state))


def test_parameters_are_counted_once_and_experts_by_how_many_are_active(smallest):
    state, model = abstract_state(smallest), smallest.model
    expert = 3 * model.hidden_dim * model.moe.expert_mlp_dim
    embedding = model.vocab_size * model.hidden_dim
    total, active = count_parameters(state.params, model)
    assert total == sum(x.size for x in jax.tree.leaves(state.params))
    # Of 8 experts a token meets 2, in a block and in the MTP module's.
    assert active == total - embedding - 2 * (8 - 2) * expert


def test_a_tied_embedding_is_active_as_the_head(smallest):
    tied = override(smallest, ["model.tie_embeddings=true"])
    total, active = count_parameters(abstract_state(tied).params, tied.model)
    apart = count_parameters(abstract_state(smallest).params, smallest.model)
    assert active == apart[1]
    assert total == apart[0] - tied.model.vocab_size * tied.model.hidden_dim


def test_a_factored_moment_is_whole_on_every_device(smallest):
    mesh = ["mesh=expert=4,tensor=4", "train.microbatch_size=4"]
    run = override(smallest, [*mesh, "model.attention.num_heads=4"])
    layout = layouts.make_layout(Transformer(run.model), layouts.run_mesh(run.mesh))
    params = abstract_state(run).params
    state = jax.eval_shape(optax.adafactor(1e-3).init, params)
    where = layouts.shardings(layout, state)
    whole = {x.shape for x in jax.tree.leaves(layout.shapes)}
    for x, sharding in zip(*map(jax.tree.leaves, (state, where)), strict=True):
        assert sharding.shard_shape(x.shape) is not None  # it divides evenly
        assert sharding.spec == layouts.WHOLE or x.shape in whole
