"""Exchanged tokens against every expert applied to every token, on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from jmoe.balance import dropping
from jmoe.config import ExchangeConfig, MeshConfig, RouterConfig
from jmoe.ops import fp8
from jmoe.parallel import collectives
from jmoe.parallel import exchange as subject
from jmoe.parallel.mesh import make_mesh

D, F = 8, 4
ROUTER = RouterConfig(num_experts=16, top_k=4)
LIMITED = RouterConfig(num_experts=16, top_k=4, num_groups=4, groups_per_token=2)
TOKENS = 192  # of all devices
ALL = ("data", "expert", "tensor")
TOKEN_SPEC = PartitionSpec(ALL)


def emulated_ragged(rows_SX, arrived_RX, from_P, send_P, to_P, receive_P, *, axis_name):
    """`lax.ragged_all_to_all`, which CPUs lack; refuses sizes that don't agree."""
    me, nowhere = lax.axis_index(axis_name), len(arrived_RX)
    rows_PSX = lax.all_gather(rows_SX, axis_name)
    from_P, size_P, to_P = (
        lax.all_gather(x, axis_name)[:, me] for x in (from_P, send_P, to_P)
    )
    at_PS = jnp.arange(len(rows_SX)) - from_P[:, None]
    arrives_PS = (at_PS >= 0) & (at_PS < size_P[:, None])
    at_PS = jnp.where(arrives_PS, at_PS + to_P[:, None], nowhere)
    arrived_RX = arrived_RX.at[at_PS].set(rows_PSX, mode="drop")
    agreed = (size_P == receive_P).all()
    return jnp.where(agreed, arrived_RX, jnp.ones_like(arrived_RX) * 255)


@pytest.fixture(autouse=True)
def ragged_on_cpu(monkeypatch):
    emulated = functools.partial(subject.ragged_rows, all_to_all=emulated_ragged)
    monkeypatch.setitem(subject.BACKENDS, "ragged", emulated)


def mlps(x_RD, expert_RK, gate_RK, up_EDF, down_EFD):
    """A small MLP of each expert; nobody is the expert after the last."""
    chosen_RKE = jax.nn.one_hot(expert_RK, len(up_EDF))
    gate_RE = jnp.einsum("rk,rke->re", gate_RK, chosen_RKE)
    act_REF = jax.nn.silu(jnp.einsum("rd,edf->ref", x_RD, up_EDF))
    return jnp.einsum("re,ref,efd->rd", gate_RE, act_REF, down_EFD)


@functools.cache
def on_mesh(mesh_cfg, cfg, router):
    """Outputs, gradients and each device's drops, jitted, of whole arrays."""
    mesh = make_mesh(mesh_cfg, jax.devices()[: mesh_cfg.num_devices])
    weight_specs = (
        PartitionSpec("expert", None, "tensor"),
        PartitionSpec("expert", "tensor", None),
    )

    def on_device(expert_NK, dy_ND, x_ND, gate_NK, *weights):
        def loss(x_ND, gate_NK, *weights):
            def experts(*tokens_R):
                tokens = (collectives.gather(x, "tensor", 0) for x in tokens_R)
                return collectives.scatter_sum(mlps(*tokens, *weights), "tensor", 0)

            got = subject.exchange(x_ND, expert_NK, gate_NK, experts, cfg, router)
            return (got.y_ND * dy_ND).sum(), got

        gradients, got = jax.grad(loss, range(4), has_aux=True)(x_ND, gate_NK, *weights)
        d_x, d_gate, *d_weights = gradients
        d_weights = [collectives.total(d, "data") for d in d_weights]
        drops = (got.dropped_sending[None], got.dropped_receiving[None])
        return got.y_ND, d_x, d_gate, *d_weights, *drops

    return jax.jit(
        jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(*[TOKEN_SPEC] * 4, *weight_specs),
            out_specs=(*[TOKEN_SPEC] * 3, *weight_specs, *[TOKEN_SPEC] * 2),
            check_vma=False,
        )
    )


@jax.jit
def oracle(expert_NK, dy_ND, *arrays):
    y_ND, pull = jax.vjp(lambda x, g, *w: mlps(x, expert_NK, g, *w), *arrays)
    return y_ND, *pull(dy_ND)


def arrays(router=ROUTER, tokens=TOKENS):
    """Output cotangent, tokens, gates and weights."""
    rng = np.random.default_rng(0)
    experts = router.num_experts
    shapes = (tokens, D), (tokens, D), (experts, D, F), (experts, F, D)
    dy, x, up, down = (rng.normal(size=s).astype(np.float32) for s in shapes)
    return dy, x, rng.random((tokens, router.top_k), np.float32), up, down


def random_choices(router=ROUTER, tokens=TOKENS):
    rng = np.random.default_rng(1)
    score_NGS = rng.random((tokens, router.num_groups, router.group_size))
    group_NG = rng.random((tokens, router.num_groups)).argsort(1)
    score_NGS -= group_NG[:, :, None] >= router.groups_per_token
    score_NE = score_NGS.reshape(tokens, -1)
    return (-score_NE).argsort(1)[:, : router.top_k].astype(np.int32)


def compare(got, want, tolerance=1e-5):
    """Errors are relative to a tensor's largest entry: sums cancel, their terms don't.

    Of outputs and gradients, which come before the drops.
    """
    for i, x in enumerate(want):
        error = np.abs(got[i] - x).max()
        assert error <= tolerance * np.abs(x).max(), (i, error)


def drops(got):
    return [int(np.asarray(n).sum()) for n in got[-2:]]


BACKENDS = pytest.mark.parametrize("backend", subject.BACKENDS)
MESHES = {
    "expert=1": MeshConfig(),
    "expert=2": MeshConfig(expert=2),
    "expert=4": MeshConfig(expert=4),
    "expert=8": MeshConfig(expert=8),
    "expert=16": MeshConfig(expert=16),
    "expert=2,tensor=4": MeshConfig(expert=2, tensor=4),
    "data=2,expert=4,tensor=2": MeshConfig(data=2, expert=4, tensor=2),
}


@BACKENDS
@pytest.mark.parametrize("mesh", MESHES)
def test_output_and_all_gradients_equal_the_dense_experts(mesh, backend):
    expert_NK = random_choices()
    expert_NK[5] = ROUTER.num_experts  # nobody
    expert_NK[77, 2] = ROUTER.num_experts
    run = on_mesh(MESHES[mesh], ExchangeConfig(backend=backend), ROUTER)
    got = run(expert_NK, *arrays())
    compare(got, oracle(expert_NK, *arrays()))
    assert drops(got) == [0, 0]


def one_expert(tokens):
    expert_NK = np.full((tokens, ROUTER.top_k), ROUTER.num_experts)
    expert_NK[:, 1] = 6
    return expert_NK


ADVERSARIAL = {
    "all_tokens_to_one_expert": one_expert(TOKENS),
    "all_tokens_to_one_device": np.tile([7, 4, 6, 5], (TOKENS, 1)),
    "all_tokens_to_as_many_devices_as_can_be": np.tile([3, 4, 8, 12], (TOKENS, 1)),
    "all_tokens_to_nobody": np.full((TOKENS, 4), 16),
}


@BACKENDS
@pytest.mark.parametrize("case", ADVERSARIAL)
def test_without_a_capacity_factor_nothing_is_dropped_whatever_is_chosen(case, backend):
    expert_NK = ADVERSARIAL[case].astype(np.int32)
    run = on_mesh(MESHES["expert=4"], ExchangeConfig(backend=backend), ROUTER)
    got = run(expert_NK, *arrays())
    compare(got, oracle(expert_NK, *arrays()))
    assert drops(got) == [0, 0]


def kept_choices(expert_NK, gate_NK, peers, order, room_of):
    """Choices that keep their place, bool [N, K], visit by visit.

    room_of: from the visits of one device to one peer, how many keep it.
    """
    kept_NK = np.zeros(expert_NK.shape, bool)
    peer_NK = expert_NK // (ROUTER.num_experts // peers)
    per_device = len(expert_NK) // peers
    for device in range(peers):
        for peer in range(peers):
            tokens = device * per_device + np.arange(per_device)
            tokens = tokens[(peer_NK[tokens] == peer).any(1)]
            if order == "score":
                sums = (gate_NK * (peer_NK == peer))[tokens].sum(1)
                tokens = tokens[np.argsort(-sums)]
            for token in tokens[: room_of(device, peer)]:
                kept_NK[token] |= peer_NK[token] == peer
    return kept_NK


@pytest.mark.parametrize("order", dropping.DROP_ORDERS)
def test_beyond_their_capacity_senders_drop_the_last_of_the_order_and_no_more(order):
    cfg = ExchangeConfig(capacity_factor=0.6, drop_order=order)
    expert_NK, (dy, x, gate_NK, *weights) = random_choices(), arrays()
    got = on_mesh(MESHES["expert=4"], cfg, ROUTER)(expert_NK, dy, x, gate_NK, *weights)
    room = dropping.send_room(0.6, TOKENS // 4, ROUTER, 4)
    assert room == 29  # 0.6 * 48 tokens * 4 visits / 4 peers, rounded up
    kept_NK = kept_choices(expert_NK, gate_NK, 4, order, lambda device, peer: room)
    want = oracle(np.where(kept_NK, expert_NK, 16), dy, x, gate_NK, *weights)
    compare(got, want)
    lost = (~kept_NK).reshape(4, -1).sum(1)
    np.testing.assert_array_equal(got[-2], lost)
    assert lost.sum() > 0 and not got[-1].any()


@pytest.mark.parametrize("order", dropping.DROP_ORDERS)
def test_ragged_receivers_drop_what_is_beyond_their_share_and_no_more(order):
    cfg = ExchangeConfig(backend="ragged", capacity_factor=0.6, drop_order=order)
    expert_NK, (dy, x, gate_NK, *weights) = random_choices(), arrays()
    expert_NK[:60] = [0, 1, 2, 4]  # of two devices; more than the first two can take
    got = on_mesh(MESHES["expert=4"], cfg, ROUTER)(expert_NK, dy, x, gate_NK, *weights)
    room = dropping.receive_room(0.6, TOKENS // 4, ROUTER, 4)
    assert room == 116
    is_visit_SNP = (expert_NK // 4).reshape(4, 48, 4, 1) == np.arange(4)
    count_SP = is_visit_SNP.any(2).sum(1).astype(np.int32)
    share_SP = [dropping.share_room(count_S, room) for count_S in jnp.array(count_SP.T)]
    kept_NK = kept_choices(
        expert_NK, gate_NK, 4, order, lambda device, peer: share_SP[peer][device]
    )
    want = oracle(np.where(kept_NK, expert_NK, 16), dy, x, gate_NK, *weights)
    compare(got, want)
    np.testing.assert_array_equal(got[-1], (~kept_NK).reshape(4, -1).sum(1))
    assert got[-1].any() and not got[-2].any()


def test_a_capacity_that_suffices_drops_nothing_and_one_less_does():
    expert_NK = random_choices()
    is_visit_SNP = (expert_NK // 4).reshape(4, 48, 4, 1) == np.arange(4)
    fullest = is_visit_SNP.any(2).sum(1).max()
    for room, dropped in ((fullest, False), (fullest - 1, True)):
        cfg = ExchangeConfig(capacity_factor=float(room / 48))
        assert dropping.send_room(cfg.capacity_factor, 48, ROUTER, 4) == room
        got = on_mesh(MESHES["expert=4"], cfg, ROUTER)(expert_NK, *arrays())
        assert (sum(drops(got)) > 0) == dropped


@BACKENDS
def test_node_limited_routing_finds_room_in_smaller_buffers(backend):
    """Where a group is a device, 2 of 4 groups need half the slots of 4 choices."""
    expert_NK = random_choices(LIMITED)
    mesh_cfg = MESHES["expert=4"]
    got = on_mesh(mesh_cfg, ExchangeConfig(backend=backend), LIMITED)(
        expert_NK, *arrays()
    )
    compare(got, oracle(expert_NK, *arrays()))
    halves = [dropping.send_room(1.0, 48, router, 4) for router in (ROUTER, LIMITED)]
    assert halves == [48, 24]


@pytest.mark.parametrize("dtype", ["activations", "float8_e4m3fn"])
def test_the_real_ragged_all_to_all_and_its_gradient_compile_for_gpus(
    monkeypatch, dtype
):
    """As far as this can be seen without a GPU's compiler: there and back, twice."""
    monkeypatch.setitem(subject.BACKENDS, "ragged", subject.ragged_rows)
    cfg = ExchangeConfig(backend="ragged", capacity_factor=1.5, dispatch_dtype=dtype)
    run = on_mesh.__wrapped__(MESHES["expert=4"], cfg, ROUTER)
    traced = run.trace(random_choices(), *arrays())
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # Forward: tokens, their choices, and back. Backward: the same.
    assert text.count("@ragged_all_to_all(") == 6


@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize("backend", ["padded", "ragged"])
def test_chunks_change_nothing(backend, chunks):
    expert_NK, inputs = random_choices(), arrays()
    whole, cut = (
        on_mesh(MESHES["expert=4"], ExchangeConfig(backend=backend, chunks=n), ROUTER)
        for n in (1, chunks)
    )
    want, got = whole(expert_NK, *inputs), cut(expert_NK, *inputs)
    compare(got, want[:-2], 1e-6)
    found = cut.lower(expert_NK, *inputs).as_text().count("stablehlo.all_to_all")
    once = whole.lower(expert_NK, *inputs).as_text().count("stablehlo.all_to_all")
    assert found == chunks * once


def test_the_capacity_of_a_chunk_is_that_of_its_tokens():
    cfg = ExchangeConfig(capacity_factor=0.5, chunks=2)
    expert_NK = np.tile([0, 1, 2, 3], (TOKENS, 1)).astype(np.int32)
    got = on_mesh(MESHES["expert=4"], cfg, ROUTER)(expert_NK, *arrays())
    room = dropping.send_room(0.5, TOKENS // 4 // 2, ROUTER, 4)
    np.testing.assert_array_equal(got[-2], [2 * 4 * (24 - room)] * 4)


def test_tokens_that_do_not_divide_into_chunks_are_refused():
    run = on_mesh(MESHES["expert=4"], ExchangeConfig(chunks=5), ROUTER)
    with pytest.raises(ValueError, match="chunks=5 must divide a device's 48 tokens"):
        run(random_choices(), *arrays())


def test_experts_that_do_not_divide_over_the_devices_are_refused():
    router = RouterConfig(num_experts=20, top_k=4)
    run = on_mesh(MESHES["expert=8"], ExchangeConfig(), router)
    with pytest.raises(ValueError, match="num_experts=20 must divide over expert=8"):
        run(random_choices(router), *arrays(RouterConfig(num_experts=24, top_k=4)))


def scaled(x_RD, expert_RK, gate_RK, own):
    """Experts that only weigh: a row is the token, times the gates of its choices."""
    sum_R1 = jnp.where(expert_RK < own, gate_RK, 0).sum(1, keepdims=True)
    return (x_RD * sum_R1).astype(x_RD.dtype)


def weighed(cfg, dtype=np.float32, peers=4, dim=200):
    """Of experts that only weigh: the inputs, outputs and gradients."""
    rng = np.random.default_rng(2)
    dy, x = (jnp.asarray(rng.normal(size=(TOKENS, dim)), dtype) for _ in range(2))
    expert_NK, gate_NK = random_choices(), rng.random((TOKENS, 4), np.float32)
    experts = functools.partial(scaled, own=16 // peers)

    def on_device(expert_NK, dy, x, gate_NK):
        def run(x, gate_NK):
            return subject.exchange(x, expert_NK, gate_NK, experts, cfg, ROUTER).y_ND

        y, pull = jax.vjp(run, x, gate_NK)
        return y, *pull(dy)

    mesh = make_mesh(MeshConfig(expert=peers), jax.devices()[:peers])
    run = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=TOKEN_SPEC,
        out_specs=TOKEN_SPEC,
        check_vma=False,
    )
    return (dy, x, gate_NK), jax.jit(run)(expert_NK, dy, x, gate_NK)


@BACKENDS
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_fp8_rounds_tokens_once_on_the_way_there_and_nothing_else(backend, dtype):
    cfg = ExchangeConfig(backend=backend, dispatch_dtype="float8_e4m3fn")
    (dy, x, gate_NK), (y, d_x, d_gate) = weighed(cfg, dtype)
    assert y.dtype == d_x.dtype == dtype and d_gate.dtype == np.float32
    arrived = fp8.dequantize(fp8.quantize(x), dtype).astype(np.float32)
    sum_N1 = gate_NK.sum(1, keepdims=True)
    # bfloat16 rounds each row that returns, and their sum.
    tolerance = 1e-6 if dtype == np.float32 else 2**-7
    dy, x = dy.astype(np.float32), x.astype(np.float32)
    compare((y, d_x), (arrived * sum_N1, dy * sum_N1), tolerance)
    d_gate_N1 = (dy * arrived).sum(1, keepdims=True)
    compare((d_gate,), (np.broadcast_to(d_gate_N1, d_gate.shape),), tolerance)
    error = np.abs(y.astype(np.float32) - x * sum_N1)
    largest = np.abs(x).max(1, keepdims=True)
    allowed = np.maximum(np.abs(x) / 16, largest / fp8.LARGEST * 2**-10)
    allowed += tolerance * largest
    assert (error <= allowed * sum_N1).all() and (error > allowed * sum_N1 / 4).any()


@pytest.mark.parametrize("router", [ROUTER, LIMITED], ids=["any_groups", "two_groups"])
@pytest.mark.parametrize("backend", ["padded", "ragged"])
def test_a_token_arrives_once_at_each_device_of_its_experts(backend, router):
    """And brings all its choices there along."""
    peers, expert_NK = 8, random_choices(router)

    def on_device(x_ND, expert_NK, gate_NK):
        arrived = []

        def experts(x_RD, expert_RK, gate_RK):
            is_own_RK = expert_RK < 2
            arrived.append((is_own_RK.any(1).sum()[None], is_own_RK.sum()[None]))
            return x_RD

        cfg = ExchangeConfig(backend=backend)
        subject.exchange(x_ND, expert_NK, gate_NK, experts, cfg, router)
        return arrived[0]

    mesh = make_mesh(MeshConfig(expert=peers), jax.devices()[:peers])
    run = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=TOKEN_SPEC,
        out_specs=TOKEN_SPEC,
        check_vma=False,
    )
    _, x_ND, gate_NK, *_ = arrays()
    rows, choices = jax.jit(run)(x_ND, expert_NK, gate_NK)
    pairs = {(n, e // 2) for n, e_K in enumerate(expert_NK.tolist()) for e in e_K}
    assert rows.sum() == len(pairs) < expert_NK.size
    load_E = np.bincount(expert_NK.ravel(), minlength=16)
    np.testing.assert_array_equal(choices, load_E.reshape(peers, 2).sum(1))


@BACKENDS
def test_results_repeat_to_the_bit(backend):
    run = on_mesh(MESHES["expert=8"], ExchangeConfig(backend=backend), ROUTER)
    first, second = (run(random_choices(), *arrays()) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)


def test_outside_of_a_mesh_the_experts_are_called_directly():
    seen = []

    def experts(*tokens):
        seen.append(tokens)
        return tokens[0]

    inputs = (jnp.ones((3, D)), jnp.zeros((3, 4), jnp.int32), jnp.ones((3, 4)))
    cfg = ExchangeConfig(capacity_factor=0.1, chunks=2)
    got = subject.exchange(*inputs, experts, cfg, ROUTER)
    assert all(x is y for x, y in zip(seen[0], inputs, strict=True))
    assert got.y_ND is inputs[0]
    assert got.dropped_sending == got.dropped_receiving == 0
