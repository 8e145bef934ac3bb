"""4-bit weights against an oracle in numpy, and against what their levels allow.

Shapes: K input, N output.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.ops import int4

SHAPES = [(64, 5), (7, 3), (33, 4), (1, 2), (100, 1), (128, 40)]
GROUPS = (32, 64, 128)
TINY = np.finfo(np.float32).tiny

pack, unpack = jax.jit(int4._pack), jax.jit(int4._unpack)

each_shape = pytest.mark.parametrize("shape", SHAPES)
each_group = pytest.mark.parametrize("group", GROUPS)


def weights(shape, seed=0):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=shape) * np.exp(2 * rng.normal(size=shape))
    return w.astype(np.float32)


def rounded(scale):
    return np.float32(scale).astype(ml_dtypes.bfloat16).astype(np.float32)


def oracle_group(w_K):
    """Levels and scale of one group."""
    largest = w_K[np.abs(w_K).argmax()]
    candidates = []
    for span in np.arange(7, 9.25, 0.25):
        scale = rounded(largest * np.float32(-1 / span))
        scale = TINY if abs(scale) < TINY else scale
        level_K = np.clip(np.round(w_K / scale), -8, 7)
        error = np.square(np.float64(level_K * scale) - w_K).sum()
        candidates.append((error, level_K, scale))
    _, level_K, scale = min(candidates, key=lambda candidate: candidate[0])
    return level_K, scale


def oracle(w_KN, group):
    """Bytes and scales, weight by weight."""
    num_inputs, outputs = w_KN.shape
    starts = range(0, num_inputs, group)
    level = np.zeros((num_inputs + num_inputs % 2, outputs), np.uint8)
    scale = np.zeros((len(starts), outputs), ml_dtypes.bfloat16)
    for row, start in enumerate(starts):
        here = slice(start, min(start + group, num_inputs))
        for n in range(outputs):
            level[here, n], scale[row, n] = oracle_group(w_KN[here, n])
    code = (level + 8) & 15
    return code[::2] + 16 * code[1::2], scale


def round_trip(w, group=int4.GROUP, dtype=np.float32):
    return np.asarray(int4.dequantize(int4.quantize(jnp.asarray(w), group), dtype))


@each_group
@each_shape
def test_quantizing_is_the_oracles_to_the_bit(shape, group):
    w_KN = weights(shape)
    want, scale = oracle(w_KN, group)
    got = int4.quantize(w_KN, group)
    assert got.shape == shape
    assert np.asarray(got.data).tobytes() == want.tobytes()
    assert np.asarray(got.scale).tobytes() == scale.tobytes()


@each_group
@each_shape
def test_what_is_left_is_the_level_times_the_scale(shape, group):
    got = int4.quantize(jnp.asarray(weights(shape)), group)
    data, scale = np.asarray(got.data), np.asarray(got.scale, np.float32)
    level = np.stack([data & 15, data >> 4], 1).reshape(-1, shape[1])[: shape[0]]
    want = (level.astype(np.float32) - 8) * scale.repeat(group, 0)[: shape[0]]
    np.testing.assert_array_equal(int4.dequantize(got, jnp.float32), want)
    want = want.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(int4.dequantize(got, jnp.bfloat16), want)


@each_group
@each_shape
def test_the_error_is_half_a_step_but_for_what_is_cut_off(shape, group):
    w = weights(shape)
    packed = int4.quantize(jnp.asarray(w), group)
    scale = np.asarray(packed.scale, np.float32).repeat(group, 0)[: shape[0]]
    step, steps = np.abs(scale), w / scale
    beyond = np.maximum(np.maximum(steps - 7, -8 - steps), 0.5) * step
    error = np.abs(int4.dequantize(packed, jnp.float32) - w)
    assert (error <= beyond * (1 + 2**-20)).all()
    assert (np.abs(steps) <= 9 * (1 + 2**-8)).all()


@each_group
@each_shape
def test_the_squared_error_is_at_most_that_of_the_largest_over_7(shape, group):
    w = weights(shape)
    starts = np.arange(0, shape[0], group)
    largest = np.maximum.reduceat(np.abs(w), starts)
    step = rounded(largest * np.float32(1 / 7)).repeat(group, 0)[: shape[0]]
    plain = np.round(w / step).clip(-7, 7) * step

    def squares(got):
        return np.add.reduceat(np.square(np.float64(got) - w), starts)

    ours = squares(round_trip(w, group))
    assert (ours <= squares(plain) * (1 + 1e-5)).all()
    assert shape[0] == 1 or ours.sum() < squares(plain).sum()


@settings(deadline=None, max_examples=25)  # most of them compile anew
@given(
    st.lists(st.integers(-8, 7), min_size=1, max_size=9),
    st.integers(1, 3),
    st.integers(1, 5),
)
def test_levels_survive_packing(levels, outputs, group):
    level_KN = np.stack([np.roll(levels, n) for n in range(outputs)], 1)
    data = pack(jnp.asarray(level_KN))
    assert data.dtype == jnp.uint8 and data.shape == (-(-len(levels) // 2), outputs)
    np.testing.assert_array_equal(unpack(data)[: len(levels)], level_KN)
    # Weights that are levels times a scale, and reach -8, are what they were.
    exact = np.float32(0.5) * np.where(np.arange(len(levels)) % group, levels, -8)
    np.testing.assert_array_equal(round_trip(exact[:, None], group)[:, 0], exact)


@settings(deadline=None)
@given(st.lists(st.floats(-(2.0**126), 2.0**126, width=32), max_size=9))
def test_any_finite_numbers_stay_finite_and_close(numbers):
    w = np.zeros((34, 1), np.float32)
    w[: len(numbers), 0] = numbers
    step = np.abs(w).max() / 7 * (1 + 2**-8)
    error = np.square((round_trip(w) - w).astype(np.float64)).sum()
    assert error <= 32 * np.square(max(step / 2, TINY), dtype=np.float64)


def test_an_outlier_disturbs_only_its_own_group_and_output():
    w = weights((96, 3))
    spoiled = w.copy()
    spoiled[40, 1] = 1e6
    changed = round_trip(spoiled) != round_trip(w)
    assert changed[32:64, 1].any()
    changed[32:64, 1] = False
    assert not changed.any()


def test_zeros_stay_zeros():
    w = np.zeros((70, 2), np.float32)
    w[:32, 1] = 1.0
    np.testing.assert_array_equal(round_trip(w), w)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_hidden(bad):
    w = np.ones((96, 2), np.float32)
    w[40, 1] = bad
    scale = int4.quantize(jnp.asarray(w)).scale
    assert np.isnan(np.asarray(scale, np.float32)).tolist() == [
        [False, False],
        [False, True],
        [False, False],
    ]
    got = round_trip(w).copy()
    assert np.isnan(got[32:64, 1]).all()
    got[32:64, 1] = 1
    assert (got == 1).all()


def test_matrices_are_picked_by_the_leading_dimensions_of_each_array():
    w = weights((2, 3, 33, 4))
    packed = int4.quantize(jnp.asarray(w))
    assert packed.shape == w.shape
    of_one = jax.tree.map(lambda x: x[1, 2], packed)
    assert of_one.shape == w.shape[2:]
    np.testing.assert_array_equal(
        int4.dequantize(of_one, jnp.float32), round_trip(w[1, 2])
    )
    layers = jax.lax.map(lambda layer: int4.dequantize(layer, jnp.float32), packed)
    np.testing.assert_array_equal(layers, round_trip(w))


@each_group
def test_a_weight_takes_4_bits_and_its_part_of_a_scale(group):
    packed = int4.quantize(jnp.zeros((3, 256, 8)), group)
    bits = 8 * sum(x.nbytes for x in jax.tree.leaves(packed))
    assert bits == 3 * 256 * 8 * (4 + 16 / group)


@pytest.mark.parametrize(
    ("shape", "group", "complaint"),
    [((8,), 32, r"shape=\(8,\)"), ((8, 2), 0, "group=0"), ((8, 2), -1, "group=-1")],
)
def test_what_makes_no_groups_is_refused(shape, group, complaint):
    with pytest.raises(ValueError, match=complaint):
        int4.quantize(jnp.zeros(shape), group)
