"""What an exchange sends, and in which form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.config import ExchangeConfig, MeshConfig
from jmoe.ops import fp8
from jmoe.parallel import exchange as subject
from jmoe.parallel import travel
from jmoe.parallel.mesh import make_mesh
from tests.parallel import exchanging
from tests.parallel.exchanging import (
    BACKENDS,
    LIMITED,
    MESHES,
    ROUTER,
    TOKEN_SPEC,
    TOKENS,
    arrays,
    compare,
    on_mesh,
    random_choices,
)

ragged_on_cpu = exchanging.ragged_on_cpu


def scaled(x_RD, groups, own):
    """Experts that only weigh: a row is the token, times the gates of its choices."""
    counts = [own, *(4 for _ in groups[1:])]  # and slots
    sum_R1 = sum(
        jnp.where(group.expert_RK < count, group.gate_RK, 0).sum(1, keepdims=True)
        for group, count in zip(groups, counts, strict=True)
    )
    return (x_RD * sum_R1).astype(x_RD.dtype)


def on_peers(on_device, peers):
    """A jitted function of whole arrays, from one of a device's tokens."""
    mesh = make_mesh(MeshConfig(expert=peers), jax.devices()[:peers])
    mapped = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=TOKEN_SPEC,
        out_specs=TOKEN_SPEC,
        check_vma=False,
    )
    return jax.jit(mapped)


def weighed(cfg, dtype=np.float32, peers=4, dim=200):
    """Returns inputs, outputs and gradients of experts that only weigh."""
    rng = np.random.default_rng(2)
    dy, x = (jnp.asarray(rng.normal(size=(TOKENS, dim)), dtype) for _ in range(2))
    expert_NK, gate_NK = random_choices(), rng.random((TOKENS, 4), np.float32)
    experts = functools.partial(scaled, own=16 // peers)

    def on_device(expert_NK, dy, x, gate_NK):
        def run(x, gate_NK):
            return subject.exchange(
                x, expert_NK, gate_NK, experts, (), cfg, ROUTER
            ).y_ND

        y, pull = jax.vjp(run, x, gate_NK)
        return y, *pull(dy)

    run = on_peers(on_device, peers)
    return (dy, x, gate_NK), run(expert_NK, dy, x, gate_NK)


@BACKENDS
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_fp8_rounds_tokens_once_on_the_way_there_and_nothing_else(backend, dtype):
    cfg = ExchangeConfig(backend=backend, dispatch_dtype="float8_e4m3fn")
    (dy, x, gate_NK), (y, d_x, d_gate) = weighed(cfg, dtype)
    assert y.dtype == d_x.dtype == dtype and d_gate.dtype == np.float32
    arrived = fp8.rounded(x, power_of_two=True).astype(np.float32)
    sum_N1 = gate_NK.sum(1, keepdims=True)
    # bfloat16 rounds each row that returns, and their sum.
    tolerance = 1e-6 if dtype == np.float32 else 2**-7
    dy, x = dy.astype(np.float32), x.astype(np.float32)
    compare((y, d_x), (arrived * sum_N1, dy * sum_N1), tolerance)
    d_gate_N1 = (dy * arrived).sum(1, keepdims=True)
    compare((d_gate,), (np.broadcast_to(d_gate_N1, d_gate.shape),), tolerance)
    error = np.abs(y.astype(np.float32) - x * sum_N1)
    largest = np.abs(x).max(1, keepdims=True)
    scale = 2 * largest / fp8.LARGEST  # at most, as it is rounded to a power of two
    allowed = np.maximum(np.abs(x) / 16, scale * 2**-10)
    allowed += tolerance * largest
    assert (error <= allowed * sum_N1).all() and (error > allowed * sum_N1 / 4).any()


@pytest.mark.parametrize("router", [ROUTER, LIMITED], ids=["any_groups", "two_groups"])
@pytest.mark.parametrize("backend", ["padded", "ragged"])
def test_a_token_arrives_once_at_each_device_of_its_experts(backend, router):
    """And brings all its choices there along."""
    peers, expert_NK = 8, random_choices(router)

    def on_device(x_ND, expert_NK, gate_NK):
        arrived = []

        def experts(x_RD, groups):
            (expert_RK, *_) = groups[0]
            assert expert_RK.shape[1] == 2  # no more than this device has experts
            is_own_RK = expert_RK < 2
            arrived.append((is_own_RK.any(1).sum()[None], is_own_RK.sum()[None]))
            return x_RD

        cfg = ExchangeConfig(backend=backend)
        subject.exchange(x_ND, expert_NK, gate_NK, experts, (), cfg, router)
        return arrived[0]

    run = on_peers(on_device, peers)
    _, x_ND, gate_NK, *_ = arrays()
    rows, choices = run(x_ND, expert_NK, gate_NK)
    pairs = {(n, e // 2) for n, e_K in enumerate(expert_NK.tolist()) for e in e_K}
    assert rows.sum() == len(pairs) < expert_NK.size
    load_E = np.bincount(expert_NK.ravel(), minlength=16)
    np.testing.assert_array_equal(choices, load_E.reshape(peers, 2).sum(1))


@pytest.mark.parametrize("dtype", ["activations", "float8_e4m3fn"])
def test_the_real_ragged_all_to_all_and_its_gradient_compile_for_gpus(
    monkeypatch, dtype
):
    """There and back, twice, as far as it can be seen without a GPU's compiler."""
    real = travel.ragged_rows(jax.lax.ragged_all_to_all)
    monkeypatch.setitem(travel.TRANSPORTS, "ragged", real)
    cfg = ExchangeConfig(backend="ragged", capacity_factor=1.5, dispatch_dtype=dtype)
    run = on_mesh.__wrapped__(MESHES["expert=4"], cfg, ROUTER)
    traced = run.trace(random_choices(), *arrays())
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # Forward: tokens, their choices, and back. Backward: the same.
    assert text.count("@ragged_all_to_all(") == 6
