"""Rotary positions against transformers and against complex multiplication."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.config.attention import YarnConfig
from jmoe.ops import rope

YARNS = {
    "none": None,
    "v3": YarnConfig(factor=40.0, original_positions=4096),
    "v2_lite": YarnConfig(
        factor=40.0, original_positions=4096, mscale=0.707, mscale_all_dim=0.707
    ),
    "unequal_mscales": YarnConfig(
        factor=8.0, original_positions=64, mscale=1.0, mscale_all_dim=0.5
    ),
    "no_mscales": YarnConfig(
        factor=4.0, original_positions=512, mscale=None, mscale_all_dim=None
    ),
    "only_mscale": YarnConfig(
        factor=4.0, original_positions=512, mscale=0.7, mscale_all_dim=None
    ),
    "only_mscale_all_dim": YarnConfig(
        factor=4.0, original_positions=512, mscale=None, mscale_all_dim=0.7
    ),
    "no_ramp": YarnConfig(factor=4.0, original_positions=3),
    "other_betas": YarnConfig(
        factor=2.0, original_positions=2048, beta_fast=16.0, beta_slow=4.0
    ),
}


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("rope_dim", [8, 64])
@pytest.mark.parametrize("name", YARNS)
def test_frequencies_and_amplitude_are_those_of_transformers(name, rope_dim):
    pytest.importorskip("torch", reason="compares with torch")
    transformers = pytest.importorskip(
        "transformers", reason="compares with transformers"
    )
    deepseek = transformers.models.deepseek_v3.modeling_deepseek_v3
    yarn = YARNS[name]
    scaling = {"rope_type": "default"}
    if yarn is not None:
        scaling = {
            "rope_type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_positions,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale_all_dim,
        }
    config = transformers.DeepseekV3Config(
        qk_rope_head_dim=rope_dim, rope_parameters=scaling | {"rope_theta": 5000.0}
    )
    theirs = deepseek.DeepseekV3RotaryEmbedding(config)
    got_P = rope.inverse_frequencies(rope_dim, 5000.0, yarn)
    np.testing.assert_allclose(got_P, theirs.inv_freq.numpy(), rtol=1e-6)
    np.testing.assert_allclose(rope.amplitude(yarn), theirs.attention_scaling)


def test_stretching_by_one_changes_nothing():
    yarn = YarnConfig(factor=1.0, original_positions=64, mscale_all_dim=None)
    got = rope.rotation(jnp.arange(9), 8, 10_000.0, yarn)
    want = rope.rotation(jnp.arange(9), 8, 10_000.0, None)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


def test_slow_pairs_are_stretched_by_the_factor_and_fast_ones_left_alone():
    yarn = YARNS["v3"]
    ratio_P = rope.inverse_frequencies(64, 10_000.0, yarn) / rope.inverse_frequencies(
        64, 10_000.0, None
    )
    turns_P = 4096 * rope.inverse_frequencies(64, 10_000.0, None) / (2 * np.pi)
    np.testing.assert_allclose(ratio_P[turns_P > 64], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio_P[turns_P < 0.5], 1 / 40, rtol=1e-6)
    assert (np.diff(ratio_P) <= 1e-7).all()


@pytest.mark.parametrize(
    ("pairs", "first", "second"),
    [
        ("interleaved", slice(0, None, 2), slice(1, None, 2)),
        ("halves", slice(0, 4), slice(4, 8)),
    ],
)
@pytest.mark.parametrize("name", ["none", "no_mscales"])
def test_pairs_turn_as_complex_numbers_by_position_times_frequency(
    name, pairs, first, second
):
    x_BTHR, yarn = random(2, 5, 3, 8), YARNS[name]
    position_BT = np.array([[0, 1, 2, 3, 4], [7, 7, 100, 0, 31]])
    cos_BTP, sin_BTP = rope.rotation(position_BT, 8, 10_000.0, yarn)
    got = rope.ROTATIONS[pairs](x_BTHR, cos_BTP, sin_BTP)
    angle_BTP = position_BT[..., None] * rope.inverse_frequencies(8, 10_000.0, yarn)
    turn_BTP = rope.amplitude(yarn) * np.exp(1j * angle_BTP)
    turned = (x_BTHR[..., first] + 1j * x_BTHR[..., second]) * turn_BTP[:, :, None]
    want = np.concatenate([turned.real, turned.imag], -1)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rotate", rope.ROTATIONS.values(), ids=rope.ROTATIONS)
@pytest.mark.parametrize("shift", [1, 50])
def test_products_of_queries_and_keys_see_only_their_distance(shift, rotate):
    q_BTHR, k_BTHR = random(1, 6, 2, 8), random(1, 6, 2, 8, seed=1)

    def products(position_T):
        turn = rope.rotation(position_T[None], 8, 10_000.0, None)
        q, k = rotate(q_BTHR, *turn), rotate(k_BTHR, *turn)
        return jnp.einsum("bqhr,bkhr->bhqk", q, k)

    got, want = products(jnp.arange(6) + shift), products(jnp.arange(6))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rotate", rope.ROTATIONS.values(), ids=rope.ROTATIONS)
def test_bfloat16_is_rotated_in_float32_and_keeps_its_dtype(rotate):
    x_BTHR = jnp.asarray(random(1, 64, 2, 16), jnp.bfloat16)
    turn = rope.rotation(jnp.arange(64)[None], 16, 10_000.0, None)
    assert all(x.dtype == jnp.float32 for x in turn)
    got = jax.jit(rotate)(x_BTHR, *turn)
    assert got.dtype == jnp.bfloat16
    want = rotate(x_BTHR.astype(jnp.float32), *turn)
    np.testing.assert_allclose(got.astype(np.float32), want, rtol=2**-8, atol=1e-6)
