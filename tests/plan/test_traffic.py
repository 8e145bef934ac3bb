"""The collectives of small programs whose traffic is known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec

from jmoe.config import MeshConfig
from jmoe.parallel.mesh import make_mesh
from jmoe.plan import traffic

MESH = MeshConfig(data=2, expert=4, tensor=2)
ROWS, COLUMNS = 8, 24  # of a device
ARRAY_BYTES = 4 * ROWS * COLUMNS
TRIPS = 3
NEXT = [(0, 1), (1, 2), (2, 3), (3, 0)]


def compiled(function):
    """The HLO of a function of one device's [ROWS, COLUMNS], on all of MESH."""
    on_mesh = jax.shard_map(
        function,
        mesh=make_mesh(MESH),
        in_specs=PartitionSpec(("data", "expert", "tensor")),
        out_specs=PartitionSpec(("data", "expert", "tensor")),
        check_vma=False,
    )
    rows = jax.ShapeDtypeStruct((MESH.num_devices * ROWS, COLUMNS), jnp.float32)
    return jax.jit(on_mesh).lower(rows).compile().as_text()


def collectives(function):
    return traffic.collectives(compiled(function), MESH.shape)


KINDS = {
    "all-gather": lambda x: lax.all_gather(x, "expert")[0],
    "all-reduce": lambda x: lax.psum(x, ("data", "tensor")),
    "all-to-all": lambda x: lax.all_to_all(x, "expert", 0, 0, tiled=True),
    "collective-permute": lambda x: lax.ppermute(x, "expert", NEXT),
    "reduce-scatter": lambda x: jnp.tile(
        lax.psum_scatter(x, "tensor", tiled=True), (2, 1)
    ),
}
EXPECTED = {
    "all-gather": (("expert",), 3 * ARRAY_BYTES),
    "all-reduce": (("data", "tensor"), 2 * ARRAY_BYTES * 3 // 4),
    "all-to-all": (("expert",), ARRAY_BYTES * 3 // 4),
    "collective-permute": (("expert",), ARRAY_BYTES),
    "reduce-scatter": (("tensor",), ARRAY_BYTES // 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_collective_has_its_axes_and_what_one_device_sends(kind):
    (found,) = collectives(KINDS[kind])
    axes, sent = EXPECTED[kind]
    assert (found.kind, found.axes, found.moved_bytes) == (kind, axes, sent)
    assert found.devices == math.prod(MESH.shape[axis] for axis in axes)
    assert found.times == 1


def test_a_loops_collectives_count_as_often_as_it_runs_and_know_their_pass():
    def gradient(x):
        def layer(x, _):
            return jnp.sin(lax.all_to_all(x, "expert", 0, 0, tiled=True)), None

        def loss(x):
            return lax.scan(layer, x, length=TRIPS)[0].sum()

        return jax.grad(loss)(x) + lax.psum(x, "data")

    found = {c.phase: c for c in collectives(gradient)}
    assert {phase: (c.kind, c.times) for phase, c in found.items()} == {
        "forward": ("all-to-all", TRIPS),
        "backward": ("all-to-all", TRIPS),
        "step": ("all-reduce", 1),
    }


SCHEDULED = """
HloModule step, is_scheduled=true

%inner (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  ROOT %product.1 = f32[8,4]{1,0} dot(%a, %a), lhs_contracting_dims={1}
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], /*index=1*/f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %one = ((f32[8,4]), f32[8,4]{1,0}) all-to-all-start(%x), replica_groups=[2,2]<=[4]
  %fused = f32[8,4]{1,0} fusion(%x), kind=kCustom, calls=%inner
  %two = (f32[8,4], f32[16,4]) all-gather-start(%x), replica_groups={{0,2},{1,3}}
  %one-done = f32[8,4]{1,0} all-to-all-done(%one)
  %library = f32[8,4]{1,0} custom-call(%x), custom_call_target="__cublas$lt$matmul"
  %quantized = f32[8,4]{1,0} custom-call(%x), custom_call_target="mosaic_gpu_v2", QUANT
  %sorted = f32[8,4]{1,0} custom-call(%x), custom_call_target="__cub$DeviceRadixSort"
  %two-done = f32[16,4]{1,0} all-gather-done(%two)
  %after = f32[8,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}
  %sync = f32[8,4]{1,0} all-reduce(%x), replica_groups={}, to_apply=%inner
  ROOT %out = (s32[], f32[8,4]{1,0}) tuple(%i, %one-done)
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x.1 = f32[8,4]{1,0} parameter(0)
  %start = ((f32[8,4]{1,0}), f32[4,4]{1,0}, u32[]) async-start(%x.1), calls=%wrapped
  %loop = (s32[], f32[8,4]{1,0}) while(%x.1), condition=%cond, body=%body, METADATA
  %done = f32[4,4]{1,0} async-done(%start)
  ROOT %y = f32[8,4]{1,0} get-tuple-element(%loop), index=1
}
""".replace("QUANT", 'metadata={op_name="jit(f)/fp8_rows/mosaic_gpu"}').replace(
    "METADATA",
    'metadata={op_name="jit(f)/transpose(jvp())/while"}, '
    'backend_config={"known_trip_count":{"n":"5"}}',
)
WRAPPED = """
%wrapped (w: f32[8,4]) -> f32[4,4] {
  %w = f32[8,4]{1,0} parameter(0)
  ROOT %rs = f32[4,4]{1,0} reduce-scatter(%w), replica_groups={{0,1},{2,3}}
}
"""


def test_an_asynchronous_collective_counts_the_products_it_spans():
    text = WRAPPED + SCHEDULED
    found = traffic.collectives(text, {"data": 2, "tensor": 2})
    seen = {c.kind: (c.axes, c.gemms, c.times, c.phase) for c in found}
    assert seen == {
        "all-to-all": (("tensor",), 1, 5, "backward"),
        "all-gather": (("data",), 1, 5, "backward"),
        "all-reduce": (("data", "tensor"), None, 5, "backward"),
        "reduce-scatter": (("tensor",), 5 * 3, 1, "step"),
    }


def as_list(groups):
    rows = (",".join(map(str, row)) for row in groups)
    return "replica_groups={" + ",".join(f"{{{row}}}" for row in rows) + "}"


def as_iota(shape, along):
    rest = [i for i in range(len(shape)) if i not in along]
    order = ",".join(map(str, (*rest, *along)))
    members = math.prod(shape[i] for i in along)
    sizes = ",".join(map(str, shape))
    groups = math.prod(shape) // members
    return f"replica_groups=[{groups},{members}]<=[{sizes}]T({order})"


def as_mesh(shape, along):
    sizes = ",".join(f"'axis_{i}'={size}" for i, size in enumerate(shape))
    used = ",".join(f"'axis_{i}'" for i in along)
    return f"replica_groups=mesh[{sizes}] {{{used}}}"


@given(
    st.lists(st.integers(1, 4), min_size=4, max_size=4),
    st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True),
)
def test_groups_mean_the_same_in_each_of_the_ways_to_write_them(shape, along):
    numbers = np.arange(math.prod(shape)).reshape(shape)
    along = sorted(along)
    members = math.prod(shape[i] for i in along)
    groups = np.moveaxis(numbers, along, range(-len(along), 0)).reshape(-1, members)
    mesh = dict(zip(("data", "pipe", "expert", "tensor"), shape, strict=True))
    want = tuple(list(mesh)[i] for i in along if shape[i] > 1)
    for text in (as_list(groups), as_iota(shape, along), as_mesh(shape, along)):
        read = traffic._groups(text, math.prod(shape))
        np.testing.assert_array_equal(read, groups)
        assert traffic._axes(read, mesh, pairwise=False) == want


def test_a_mesh_of_xlas_own_in_another_order_is_read():
    text = "replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, x=1"
    want = [[0, 2, 4, 6], [1, 3, 5, 7]]
    np.testing.assert_array_equal(traffic._groups(text, 8), want)


@pytest.mark.parametrize(
    ("groups", "error"),
    [
        ("replica_groups={{0,3},{1,2}}", "not those along axes"),
        ("replica_groups=@somewhere", "unknown form"),
    ],
)
def test_groups_that_are_no_axes_are_refused(groups, error):
    text = WRAPPED.replace("replica_groups={{0,1},{2,3}}", groups) + SCHEDULED
    with pytest.raises(ValueError, match=error):
        traffic.collectives(text, {"data": 2, "tensor": 2})


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no whole program"):
        traffic.collectives("HloModule nothing", {"data": 2})
