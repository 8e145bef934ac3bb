"""An exchange on a mesh, and every expert applied to every token on one device.

`ragged_on_cpu` must be in the name space of a module of tests that uses these.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from jmoe.config import MeshConfig, RouterConfig
from jmoe.parallel import collectives, travel
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
    monkeypatch.setitem(
        travel.TRANSPORTS, "ragged", travel.ragged_rows(emulated_ragged)
    )


def mlps(x_RD, expert_RK, gate_RK, up_EDF, down_EFD):
    """A small MLP of each expert; nobody is the expert after the last."""
    chosen_RKE = jax.nn.one_hot(expert_RK, len(up_EDF))
    gate_RE = jnp.einsum("rk,rke->re", gate_RK, chosen_RKE)
    act_REF = jax.nn.silu(jnp.einsum("rd,edf->ref", x_RD, up_EDF))
    return jnp.einsum("re,ref,efd->rd", gate_RE, act_REF, down_EFD)


def experts(x_RD, groups):
    """`mlps` of the tokens of all the tensor group."""
    y = 0
    for expert_RK, gate_RK, weights, *_ in groups:
        tokens = (
            collectives.all_gather(x, "tensor", 0) for x in (x_RD, expert_RK, gate_RK)
        )
        y += mlps(*tokens, *weights)
    return collectives.reduce_scatter(y, "tensor", 0)


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
            tokens = x_ND, expert_NK, gate_NK
            got = subject.exchange(*tokens, experts, weights, cfg, router)
            return (got.y_ND * dy_ND).sum(), got

        gradients, got = jax.grad(loss, range(4), has_aux=True)(x_ND, gate_NK, *weights)
        d_x, d_gate, *d_weights = gradients
        d_weights = [collectives.psum(d, "data") for d in d_weights]
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
