"""The passes of a layer against its vjp, and what each of them computes and keeps."""

import functools
import itertools
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from jmoe.config import override
from jmoe.nn.block import Block, Positions
from jmoe.nn.mixers import rotation
from jmoe.parallel.passes import split
from tests.parallel.toy_layers import ALL, LAYERS, D, F, N, arguments
from tests.programs import equations

each_layer = pytest.mark.parametrize("name", ALL)


def cotangents(output):
    """Different ones of every element."""
    number = itertools.count(1)
    return jax.tree.map(
        lambda x: jnp.cos(next(number) + jnp.arange(x.size, dtype=x.dtype)).reshape(
            x.shape
        ),
        output,
    )


@functools.cache
def traced(name):
    """Jaxprs of the three passes, and of the vjp."""
    weights, row, x = arguments()
    return jaxprs(ALL[name], weights, row, x)


def jaxprs(layer, weights, at_hand, x):
    passes = split(layer, weights, at_hand, x)
    output, _, kept = jax.eval_shape(passes.forward, weights, at_hand, x)
    _, owed = jax.eval_shape(passes.backward, weights, at_hand, kept, output)
    return [
        jax.make_jaxpr(passes.forward)(weights, at_hand, x),
        jax.make_jaxpr(passes.backward)(weights, at_hand, kept, output),
        jax.make_jaxpr(passes.weight)(weights, at_hand, kept, owed),
        jax.make_jaxpr(functools.partial(at_once, layer))(weights, at_hand, x, output),
    ]


def at_once(layer, weights, at_hand, x, d_output):
    """What the passes find together."""
    output, pull, measured = jax.vjp(
        lambda weights, x: layer(weights, at_hand, x), weights, x, has_aux=True
    )
    return output, measured, *pull(d_output)


def in_turn(layer, weights, at_hand, x, d_output):
    passes = split(layer, weights, at_hand, x)
    output, measured, kept = passes.forward(weights, at_hand, x)
    d_x, owed = passes.backward(weights, at_hand, kept, d_output)
    shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (*kept, *owed)]
    assert shapes == [*passes.kept, *passes.owed]
    return output, measured, passes.weight(weights, at_hand, kept, owed), d_x


def products(jaxpr):
    """The dot_generals of a function, and of those that it calls."""
    for equation, _ in equations(jaxpr):
        if equation.primitive.name == "dot_general":
            yield equation


def counts(traces):
    return [len(list(products(trace.jaxpr))) for trace in traces]


@each_layer
def test_the_passes_in_turn_find_what_the_vjp_does(name):
    weights, row, x = arguments()
    d_output = cotangents(jax.eval_shape(ALL[name], weights, row, x)[0])
    both = (functools.partial(way, ALL[name]) for way in (at_once, in_turn))
    want, got = jax.jit(lambda *given: tuple(way(*given) for way in both))(
        weights, row, x, d_output
    )
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert g.dtype == w.dtype
        np.testing.assert_allclose(g, w, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", sorted(ALL.keys() - {"no_input_matters", "weights_multiplied"})
)
def test_no_product_is_in_two_passes(name):
    *passes, vjp = counts(traced(name))
    assert sum(passes) == vjp


@pytest.mark.parametrize("name", ["plain", "nested_jit"])
def test_a_layer_that_is_recomputed_is_so_once_and_in_b(name):
    """Its last product makes the output, which no gradient needs."""
    forward, backward, weight, _ = counts(traced(name))
    again = counts(traced(f"{name}_recomputed"))[:3]
    assert again == [forward, backward + forward - 1, weight]


def test_each_pass_has_the_products_that_are_its_own():
    """Two of a layer with two weights, in each pass."""
    assert counts(traced("plain"))[:3] == [2, 2, 2]


@pytest.mark.parametrize(
    "name", ["plain", "nested_jit", "custom_vjp", "recomputed_part", "plain_recomputed"]
)
def test_only_w_makes_what_has_a_weights_shape(name):
    _, backward, weight, _ = traced(name)
    assert weight_shaped(weight) == {(D, F), (F, D)}
    assert not weight_shaped(backward)


def weight_shaped(trace):
    made = {equation.outvars[0].aval.shape for equation in products(trace.jaxpr)}
    return made & {(D, F), (F, D)}


@each_layer
def test_what_weights_alone_make_is_not_kept(name):
    weights, row, x = arguments()
    passes = split(ALL[name], weights, row, x)
    weight_sizes = {D * F, D, D * D}
    assert not {value.size for value in passes.kept} & weight_sizes


def test_views_are_kept_as_what_they_are_of():
    """However many of them there are between a value and what reads it."""

    def layer(w, row, x):
        h = jnp.sin(x).astype(jnp.bfloat16)
        wide = jnp.broadcast_to(h.astype(jnp.float32)[:, None], (N, 3, D))
        return jnp.sin(wide * w["s"]), None

    weights, row, x = arguments()
    passes = split(layer, weights, row, x)
    kept = [(value.shape, value.dtype.name) for value in passes.kept]
    cosines = [((N, D), "float32"), ((N, 3, D), "float32")]
    assert sorted(kept) == sorted([((N, D), "bfloat16"), *cosines])


def test_views_are_owed_as_what_they_are_of():
    def layer(w, row, x):
        return (x @ w["a"]).sum(0), None

    passes = split(layer, *arguments())
    assert [value.shape for value in passes.owed] == [(F,)]
    assert [value.shape for value in passes.kept] == [(N, D)]


def test_what_is_kept_is_not_owed_besides():
    """Though W of a layer that is recomputed reads what B has made of its input."""

    def layer(w, row, x):
        return jnp.sin(x.astype(jnp.float32) @ w["a"]), None

    weights, row, x = arguments()
    passes = split(jax.checkpoint(layer), weights, row, x.astype(jnp.bfloat16))
    assert [value.dtype for value in passes.kept] == [jnp.bfloat16]
    assert [value.shape for value in passes.owed] == [(N, F)]
    plain = split(LAYERS["plain"], weights, row, x)
    assert sorted(value.shape for value in plain.owed) == [(N, D), (N, F)]


def test_a_narrow_copy_of_what_is_kept_takes_no_room():
    def layer(w, row, x):
        narrow = x.astype(jnp.bfloat16) @ w["a"].astype(jnp.bfloat16)
        return x * x * w["s"] + narrow.sum().astype(x.dtype), None

    weights, row, x = arguments()
    kept = split(layer, weights, row, x).kept
    assert {value.dtype.name for value in kept if value.shape == (N, D)} == {"float32"}


@pytest.fixture(scope="module", params=["none", "block"])
def remat(request):
    return request.param


GROUPED_QUERIES = [
    "attention.kind=gqa",
    "attention.num_kv_heads=1",
    "attention.head_dim=20",
    "attention.qk_norm_eps=1e-6",
    "attention.qkv_bias=true",
]
BLOCKS = {"dense": GROUPED_QUERIES, "moe": []}


@pytest.fixture(scope="module", params=BLOCKS)
def block(request, remat):
    """A block of the smallest run: a layer, and arguments for it."""
    path = pathlib.Path(__file__).parents[1] / "smallest_run.py"
    cfg = runpy.run_path(str(path))["get_config"]().model
    # Experts take 32 rows at a time, and that is to be no size of a weight.
    cfg = override(cfg, ["hidden_dim=36", "moe.backend=blocks", *BLOCKS[request.param]])
    module = Block.of(cfg, cfg.stacks[request.param].feed_forward, apart=True)
    sequences, length = 3, 20
    x = jax.random.normal(jax.random.key(0), (sequences, length, cfg.hidden_dim))
    segments = jnp.broadcast_to(jnp.arange(length) >= 10, (sequences, length))
    segments = segments.astype(jnp.int32)
    rng = np.random.default_rng(0)
    positions = Positions(rotation(cfg.attention, length), segments)
    boxed = jax.eval_shape(module.init, jax.random.key(0), x, positions, jnp.int32(1))
    variables = jax.tree.map(
        lambda s: jnp.asarray(0.2 * rng.normal(size=s.shape), s.dtype),
        meta.unbox(boxed),
    )

    def layer(params, at_hand, x):
        state, positions = at_hand
        variables = {"params": params, "router_state": state}
        y, measured = module.apply(variables, x, positions, jnp.int32(1))
        auxiliary = sum(loss.value for loss in measured.losses.values())
        return (y, jnp.float32(auxiliary)), measured

    at_hand = (variables.get("router_state", {}), positions)
    layer = jax.checkpoint(layer) if remat == "block" else layer
    return layer, variables["params"], at_hand, x


def test_a_blocks_passes_find_what_its_vjp_does(block):
    layer, params, at_hand, x = block
    d_output = cotangents(jax.eval_shape(layer, params, at_hand, x)[0])

    @jax.jit
    def both(*given):
        return at_once(layer, *given), in_turn(layer, *given)

    want, got = both(params, at_hand, x, d_output)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        if jnp.issubdtype(w.dtype, jnp.integer):
            np.testing.assert_array_equal(g, w)
        else:
            assert jnp.abs(g - w).max() <= 1e-5 * jnp.abs(w).max() + 1e-12


def test_no_product_of_a_block_is_in_two_passes(block):
    *passes, vjp = counts(jaxprs(*block))
    assert sum(passes) == vjp
    assert min(passes) > 0


def test_b_of_a_block_makes_no_weights_gradient(block):
    layer, params, at_hand, x = block
    _, backward, weight, _ = jaxprs(*block)
    shapes = {tuple(sorted(p.shape)) for p in jax.tree.leaves(params) if p.ndim > 1}

    def made(trace):
        found = {eqn.outvars[0].aval.shape for eqn in products(trace.jaxpr)}
        return {tuple(sorted(shape)) for shape in found} & shapes

    assert made(weight) and not made(backward)


def test_what_a_block_keeps_is_no_weight(block, remat):
    layer, params, at_hand, x = block
    passes = split(*block)
    weight_sizes = {p.size for p in jax.tree.leaves(params) if p.ndim > 1}
    assert not {value.size for value in passes.kept} & weight_sizes
    if remat == "block":
        assert [(v.shape, v.dtype) for v in passes.kept] == [(x.shape, x.dtype)]


def test_a_block_keeps_no_scores_of_attention(block):
    *_, x = block
    length = x.shape[1]
    assert all(value.shape[-2:] != (length, length) for value in split(*block).kept)
