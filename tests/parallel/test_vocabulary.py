"""Embedding and cross-entropy, whole or divided, against what holds all logits.

Shapes: N token, D hidden, V vocabulary, B sequence, T position.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jmoe.config import MeshConfig
from jmoe.parallel.mesh import make_mesh
from jmoe.parallel.vocabulary import embed, linear_cross_entropy
from jmoe.plan import traffic

N, D, V = 13, 8, 40


def plain(x_ND, head_DV, target_N, weight_N, chunk=None):
    log_p_NV = jax.nn.log_softmax(x_ND @ head_DV)
    return -(weight_N * log_p_NV[jnp.arange(len(target_N)), target_N]).sum()


def inputs(n=N, d=D, v=V, dtype=np.float32):
    rng = np.random.default_rng(0)
    weight_N = rng.uniform(0.5, 2, n) * (rng.random(n) < 0.7)
    return (
        jnp.asarray(rng.normal(size=(n, d)), dtype),
        jnp.asarray(rng.normal(size=(d, v)), dtype),
        jnp.asarray(rng.integers(0, v, n), np.int32),
        jnp.asarray(weight_N, np.float32),
    )


@functools.partial(jax.jit, static_argnums=(0, 5))
def value_and_gradients(loss, x_ND, head_DV, target_N, weight_N, chunk=None):
    """Computes them of half the loss, whose cotangent then isn't 1."""

    def halved(x_ND, head_DV):
        return 0.5 * loss(x_ND, head_DV, target_N, weight_N, chunk)

    return jax.value_and_grad(halved, (0, 1))(x_ND, head_DV)


@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
def test_value_and_gradients_equal_the_plain_loss_for_any_chunk(chunk):
    want, wants = value_and_gradients(plain, *inputs())
    got, gots = value_and_gradients(linear_cross_entropy, *inputs(), chunk)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for x, y in zip(gots, wants, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [4, 100])
def test_the_call_without_gradients_gives_the_same_value(chunk):
    got = jax.jit(linear_cross_entropy, static_argnums=4)(*inputs(), chunk)
    assert got.shape == () and got.dtype == jnp.float32
    np.testing.assert_allclose(got, plain(*inputs()), rtol=1e-6)


def test_a_token_of_weight_zero_counts_nowhere():
    x_ND, head_DV, target_N, weight_N = inputs()
    zero_N = weight_N == 0
    assert zero_N.any() and not zero_N.all()
    want = value_and_gradients(linear_cross_entropy, *inputs(), 4)
    moved = (jnp.where(zero_N[:, None], 7.0, x_ND), head_DV, target_N, weight_N)
    got = value_and_gradients(linear_cross_entropy, *moved, 4)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert not got[1][0][zero_N].any()


def test_logits_in_the_thousands_overflow_nothing():
    x_ND, *rest = inputs()
    want, wants = value_and_gradients(plain, 1e3 * x_ND, *rest)
    got, gots = value_and_gradients(linear_cross_entropy, 1e3 * x_ND, *rest, 4)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for x, y in zip(gots, wants, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-3)


def test_bfloat16_inputs_keep_a_float32_loss_and_sum_the_head_in_float32():
    # 512 equal steps of the head's gradient: a bfloat16 sum would stall at 256.
    x_ND, head_DV, target_N, _ = inputs(n=512, dtype=jnp.bfloat16)
    arrays = jnp.ones_like(x_ND), head_DV, jnp.full_like(target_N, 3), jnp.ones(512)
    got, gots = value_and_gradients(linear_cross_entropy, *arrays, 1)
    floats = [x.astype(jnp.float32) for x in arrays[:2]]
    want, wants = value_and_gradients(plain, *floats, *arrays[2:])
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for x, y in zip(gots, wants, strict=True):
        assert x.dtype == jnp.bfloat16
        error = abs(x.astype(np.float32) - y).max() / abs(y).max()
        assert error < 2**-7


def test_the_gradient_never_holds_all_logits():
    arrays = inputs(n=512, v=1024)
    compiled = value_and_gradients.lower(linear_cross_entropy, *arrays, 16).compile()
    logit_bytes = 512 * 1024 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < logit_bytes / 4


def divided(function, devices, in_specs, out_specs):
    """`function` of the parts that `devices` of the tensor axis have."""
    mesh = make_mesh(MeshConfig.parse(f"tensor={devices}"), jax.devices()[:devices])
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    return jax.jit(mapped)


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("chunk", [3, 100])
def test_a_divided_vocabulary_gives_the_same_loss_and_gradients(devices, chunk):
    arrays = inputs(n=16)

    def share(x_ND, head_DV, target_N, weight_N):
        def loss(x_ND, head_DV):
            return 0.5 * linear_cross_entropy(x_ND, head_DV, target_N, weight_N, chunk)

        plain_value = loss(x_ND, head_DV)
        return plain_value, *jax.value_and_grad(loss, (0, 1))(x_ND, head_DV)

    rows, columns = P("tensor"), P(None, "tensor")
    in_specs = (rows, columns, rows, rows)
    share = divided(share, devices, in_specs, (P(), P(), (rows, columns)))
    without_gradients, got, gots = share(*arrays)
    want, wants = value_and_gradients(plain, *arrays)
    np.testing.assert_allclose([got, without_gradients], want, rtol=1e-6)
    for x, y in zip(gots, wants, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_divided_logits_in_the_thousands_overflow_nothing():
    x_ND, *rest = inputs(n=16)

    def share(*arrays):
        return linear_cross_entropy(*arrays, 4)

    rows = P("tensor")
    share = divided(share, 4, (rows, P(None, "tensor"), rows, rows), P())
    want, _ = value_and_gradients(plain, 1e3 * x_ND, *rest)
    np.testing.assert_allclose(0.5 * share(1e3 * x_ND, *rest), want, rtol=1e-5)


@pytest.mark.parametrize("devices", [2, 8])
def test_a_divided_table_embeds_each_position_where_it_belongs(devices):
    rng = np.random.default_rng(0)
    table_VD = rng.normal(size=(V, D)).astype(np.float32)
    weight_BTD = rng.normal(size=(3, 16, D)).astype(np.float32)
    tokens_BT = rng.integers(0, V, (3, 16)).astype(np.int32)

    def share(table_VD, tokens_BT, weight_BTD):
        def weighed(table_VD):
            rows_BSD = embed(table_VD, tokens_BT, jnp.float32)
            return (rows_BSD * weight_BTD).sum(), rows_BSD

        return jax.grad(weighed, has_aux=True)(table_VD)

    rows, positions = P("tensor"), P(None, "tensor")
    share = divided(share, devices, (rows, P(), positions), (rows, positions))
    gradient_VD, rows_BTD = share(table_VD, tokens_BT, weight_BTD)
    np.testing.assert_array_equal(rows_BTD, table_VD[tokens_BT])
    want_VD = np.zeros_like(table_VD)
    np.add.at(want_VD, tokens_BT, weight_BTD)
    np.testing.assert_allclose(gradient_VD, want_VD, rtol=1e-5, atol=1e-6)


TABLES = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
DEVICES = pytest.mark.parametrize("devices", [1, 4])


def table_gradient(table_VD, tokens_BT, d_rows_BTD, devices):
    """By the devices of the tensor axis, each of which has its positions' cotangent."""

    def share(table_VD, tokens_BT, d_rows_BSD):
        def rows(table_VD):
            return embed(table_VD, tokens_BT, d_rows_BSD.dtype)

        return jax.vjp(rows, table_VD)[1](d_rows_BSD)[0]

    rows, positions = P("tensor"), P(None, "tensor")
    share = divided(share, devices, (rows, P(), positions), rows)
    return share(table_VD, tokens_BT, d_rows_BTD)


@DEVICES
@TABLES
@pytest.mark.parametrize("times", [512, 4096])
def test_a_tokens_gradients_all_count(times, dtype, devices):
    """A bfloat16 sum of ones stalls at 256."""
    tokens_BT = jnp.full((4, times // 4), 3)
    ones_BTD = jnp.ones((*tokens_BT.shape, D), jnp.bfloat16)
    got_VD = table_gradient(jnp.zeros((V, D), dtype), tokens_BT, ones_BTD, devices)
    assert got_VD.dtype == dtype
    want_VD = np.zeros((V, D))
    want_VD[3] = times
    np.testing.assert_array_equal(np.asarray(got_VD, np.float64), want_VD)


@DEVICES
@TABLES
def test_gradients_of_text_are_float64_sums_rounded_once(dtype, devices):
    """There are 16,384 tokens, as frequent as words: a fifth of them are the first."""
    rng = np.random.default_rng(0)
    frequency_V = 1 / np.arange(1, 401)
    tokens_BT = rng.choice(400, (4, 4096), p=frequency_V / frequency_V.sum())
    d_rows_BTD = jnp.asarray(1 + rng.normal(size=(*tokens_BT.shape, D)), jnp.bfloat16)
    got_VD = table_gradient(jnp.zeros((400, D), dtype), tokens_BT, d_rows_BTD, devices)
    want_VD, size_VD = np.zeros((2, 400, D))
    exact_BTD = np.asarray(d_rows_BTD, np.float64)
    np.add.at(want_VD, tokens_BT, exact_BTD)
    np.add.at(size_VD, tokens_BT, np.abs(exact_BTD))
    count_V = np.bincount(tokens_BT.ravel(), minlength=400)
    of_sum = 2.0**-24 * count_V[:, None] * size_VD  # each float32 addition rounds
    rounding = jnp.finfo(dtype).eps / 2
    error_VD = np.abs(np.asarray(got_VD, np.float64) - want_VD)
    assert (error_VD <= rounding * np.abs(want_VD) + of_sum).all()


def test_a_divided_loss_gathers_neither_logits_nor_the_head():
    n, v, devices, chunk = 256, 1024, 4, 16
    mesh = make_mesh(MeshConfig.parse(f"tensor={devices}"), jax.devices()[:devices])

    def share(x_ND, head_DV, target_N):
        def loss(x_ND, head_DV):
            weight_N = jnp.ones(x_ND.shape[0])
            return linear_cross_entropy(x_ND, head_DV, target_N, weight_N, chunk)

        return jax.grad(loss, (0, 1))(x_ND, head_DV)

    rows, columns = P("tensor"), P(None, "tensor")
    share = divided(share, devices, (rows, columns, rows), (rows, columns))
    x_ND, head_DV, target_N, _ = inputs(n=n, v=v)
    text = share.lower(x_ND, head_DV, target_N).compile().as_text()
    moved = {c.kind: c.operand_bytes for c in traffic.collectives(text, mesh.shape)}
    assert moved  # a chunk's rows, at most, of hidden state or of two numbers
    assert max(moved.values()) <= devices * chunk * D * 4
