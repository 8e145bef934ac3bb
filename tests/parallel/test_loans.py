"""Lent weights and their gradients against indexing whole arrays, on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jmoe.config import MeshConfig
from jmoe.ops import fp8
from jmoe.parallel import loans as subject
from jmoe.parallel.mesh import make_mesh
from tests.parallel.exchanging import emulated_ragged

P, E, S = 4, 12, 3
EXPERTS = PartitionSpec("expert")

BORROWED = {
    "nothing": np.full((P, S), E),
    "some": np.array([[3, E, E], [0, 1, 2], [E, E, E], [2, 8, E]]),
    "the same one by all": np.array([[5, E, E], [E, E, E], [5, E, E], [5, E, E]]),
    "all of one device": np.array([[9, 10, 11], [9, 10, 11], [9, 10, 11], [E, E, E]]),
}


@pytest.fixture(params=["padded", "ragged"])
def transport(request, monkeypatch):
    if request.param == "ragged":
        monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated_ragged)
        monkeypatch.setattr(subject.collectives, "platform", lambda: "gpu")


def on_mesh(form):
    """Parts and gradient of a jitted function of whole arrays."""
    mesh = make_mesh(MeshConfig(expert=P), jax.devices()[:P])

    def on_device(w, borrowed_PS, d_own, d_lent):
        parts, pull = jax.vjp(lambda w: subject.lend(w, borrowed_PS, form), w)
        return *parts, *pull((d_own, d_lent))

    specs = (EXPERTS, PartitionSpec(), EXPERTS, EXPERTS)
    return jax.jit(
        jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=specs,
            out_specs=(EXPERTS,) * 3,
            check_vma=False,
        )
    )


def arrays(shape=(5, 2, 3), dtype=np.float32):
    rng = np.random.default_rng(0)
    sizes = E, E, P * S
    return (jnp.asarray(rng.normal(size=(n, *shape)), dtype) for n in sizes)


@pytest.mark.parametrize("case", BORROWED)
def test_a_borrower_has_the_lenders_weights_and_the_lender_all_gradients(
    case, transport
):
    w, d_own, d_lent = arrays()
    borrowed_PS = BORROWED[case].astype(np.int32)
    run = on_mesh(subject.in_dtype(w.dtype))
    own, lent, d_w = run(w, borrowed_PS, d_own, d_lent)
    expert_X = borrowed_PS.reshape(-1)
    is_loan_X = (expert_X < E)[:, None, None, None]
    np.testing.assert_array_equal(own, w)
    np.testing.assert_array_equal(
        lent, np.where(is_loan_X, w[np.minimum(expert_X, E - 1)], 0)
    )
    want = np.array(d_own)
    for expert, gradient in zip(expert_X, np.array(d_lent), strict=True):
        if expert < E:
            want[expert] += gradient
    np.testing.assert_array_equal(d_w, want)


def test_gradients_come_home_again_to_the_bit(transport):
    given = arrays(dtype=jnp.bfloat16)
    w, *gradients = given
    borrowed_PS = BORROWED["all of one device"].astype(np.int32)
    run = on_mesh(subject.in_dtype(w.dtype))
    first, again = (run(w, borrowed_PS, *gradients)[2] for _ in range(2))
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("name", fp8.RECIPES)
def test_weights_lent_in_fp8_are_as_products_would_have_them_anyway(name, transport):
    recipe = fp8.RECIPES[name]
    w, *gradients = arrays((256, 2, 64), jnp.bfloat16)
    borrowed_PS = BORROWED["some"].astype(np.int32)
    run = on_mesh(subject.in_fp8(recipe, w.dtype))
    own, lent, _ = run(w, borrowed_PS, *gradients)
    np.testing.assert_array_equal(own, w)
    quantize = functools.partial(_quantized, recipe)
    got, want = quantize(lent), quantize(w)
    for slot, expert in enumerate(borrowed_PS.reshape(-1)):
        for a, b in zip(got, want, strict=True):
            if expert < E:
                np.testing.assert_array_equal(a[slot], b[expert])


def _quantized(recipe, w):
    found = recipe.quantize(w.reshape(*w.shape[:2], -1), recipe.weights)
    return [np.asarray(x, np.float32) for x in found]


@pytest.mark.parametrize(
    ("form", "size"),
    [
        (subject.in_dtype(jnp.bfloat16), 2 * (256 * 384 + 192 * 256)),
        # A byte each, and float32 scales of squares of 128.
        (
            subject.in_fp8(fp8.RECIPES["fp8"], jnp.bfloat16),
            256 * 384 + 4 * 6 + 192 * 256 + 4 * 4,
        ),
    ],
)
def test_the_size_of_an_expert_is_that_of_what_travels(form, size):
    shapes = (3, 256, 2, 192), (3, 192, 256)
    weights = [jnp.zeros(shape, jnp.bfloat16) for shape in shapes]
    assert subject.bytes_of_expert(weights, form) == size


def test_float32_weights_are_lent_as_products_in_bfloat16_have_them(transport):
    w, d_own, d_lent = arrays()
    borrowed_PS = BORROWED["some"].astype(np.int32)
    run = on_mesh(subject.in_dtype(jnp.bfloat16))
    own, lent, d_w = run(w, borrowed_PS, d_own, d_lent)
    np.testing.assert_array_equal(own, w)
    np.testing.assert_array_equal(lent[0], w[3].astype(jnp.bfloat16))
    assert lent.dtype == d_w.dtype == w.dtype
    np.testing.assert_array_equal(d_w[3], d_own[3] + d_lent[0])


def test_float32_weights_are_lent_in_fp8_as_products_of_bfloat16_quantize_them(
    transport,
):
    """Rounded to bfloat16 first, some numbers have another e4m3 next to them."""
    recipe = fp8.RECIPES["fp8"]
    w, d_own, d_lent = arrays((256, 2, 64))
    borrowed_PS = BORROWED["some"].astype(np.int32)
    own, lent, d_w = on_mesh(subject.in_fp8(recipe, jnp.bfloat16))(
        w, borrowed_PS, d_own, d_lent
    )
    np.testing.assert_array_equal(own, w)
    got, want = (_quantized(recipe, x.astype(jnp.bfloat16)) for x in (lent, w))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a[0], b[3])
    assert (_quantized(recipe, w)[0] != want[0]).mean() > 0.01
    assert lent.dtype == d_w.dtype == w.dtype
    np.testing.assert_array_equal(d_w[3], d_own[3] + d_lent[0])
