"""Weights in fewer bits: which ones, and what a model computes with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.nn import quantized
from jmoe.nn.model import Transformer
from jmoe.ops import fp8, int4, stored

SHAPE = ("hidden_dim=160", "num_layers=3", "mtp_depth=1")
TOKENS_BT = np.random.default_rng(0).integers(0, 48, (2, 12))
FEWER_BITS = [form for form in quantized.FORMS if form != "native"]

each_form = pytest.mark.parametrize("form", FEWER_BITS)


@pytest.fixture(scope="module", params=["scan", "unroll"])
def model(request, small_config, random_variables):
    cfg = small_config(*SHAPE, f"layer_loop={request.param}")
    return cfg, random_variables(cfg)


def is_stored(w):
    return isinstance(w, stored.Weight)


def quantize(model, form):
    cfg, variables = model
    return quantized.quantize_weights(variables["params"], cfg, form)


def what_they_stand_for(model, form):
    """Returns arrays of the weights' shapes."""
    return jax.tree.map(
        lambda kept, w: stored.as_array(kept, w.dtype).reshape(w.shape),
        quantize(model, form),
        model[1]["params"],
        is_leaf=is_stored,
    )


@functools.partial(jax.jit, static_argnums=0)
def logits(cfg, variables):
    output = Transformer(cfg).apply(variables, TOKENS_BT)
    return output.logits, *output.mtp_logits


@each_form
def test_a_model_computes_with_what_its_weights_stand_for(model, form):
    cfg, variables = model
    got = logits(cfg, {**variables, "params": quantize(model, form)})
    want = logits(cfg, {**variables, "params": what_they_stand_for(model, form)})
    exact = logits(cfg, variables)
    for kept, arrays, plain in zip(got, want, exact, strict=True):
        np.testing.assert_allclose(kept, arrays, rtol=1e-4, atol=1e-4)
        assert np.abs(kept - plain).max() > 1e-2


@each_form
def test_each_matrix_has_scales_of_its_own(model, form):
    """A layer's or expert's weights come out as if it were quantized alone."""
    cfg, variables = model
    if cfg.layer_loop != "scan":
        pytest.skip("layers are apart already")
    whole = quantize(model, form)["moe"]
    for layer in range(2):
        alone = jax.tree.map(
            lambda x, i=layer: x[i : i + 1], variables["params"]["moe"]
        )
        want = quantized.quantize_weights({"moe": alone}, cfg, form)["moe"]
        got = jax.tree.map(lambda x, i=layer: x[i : i + 1], whole)
        jax.tree.map(np.testing.assert_array_equal, got, want)


@each_form
def test_what_v3_keeps_whole_stays_and_nothing_else_does(model, form):
    kept = jax.tree.leaves_with_path(quantize(model, form), is_leaf=is_stored)
    for path, w in kept:
        names = {key.key for key in path}
        if names & {"embedding", "head", "router", "scale", "project"}:
            assert isinstance(w, jax.Array)
        elif "experts" in names and form == "int4-experts":
            assert isinstance(w, int4.Packed)
        else:
            assert isinstance(w, fp8.Quantized)


def test_native_weights_are_the_same_arrays(model):
    pairs = zip(
        jax.tree.leaves(quantize(model, "native")),
        jax.tree.leaves(model[1]["params"]),
        strict=True,
    )
    assert all(got is w for got, w in pairs)


@each_form
def test_all_backends_take_them(model, form, small_config):
    cfg, variables = model
    params = quantize(model, form)
    want = logits(cfg, {**variables, "params": params})
    ragged = small_config(*SHAPE, f"layer_loop={cfg.layer_loop}", "moe.backend=ragged")
    got = logits(ragged, {**variables, "params": params})
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_form_that_is_not_there_is_refused(model):
    with pytest.raises(ValueError, match="'int3' is not one of native, fp8"):
        quantize(model, "int3")


def test_stored_weights_have_the_shape_of_their_matrix():
    w = jnp.ones((3, 40, 24))
    assert fp8.quantize(w, fp8.SQUARE).shape == int4.quantize(w).shape == w.shape
    kept = int4.quantize(w)
    assert stored.as_matrices(kept, jnp.bfloat16) is kept
    converted = stored.as_matrices(w.reshape(3, 40, 2, 12), jnp.bfloat16)
    assert converted.shape == w.shape and converted.dtype == jnp.bfloat16
