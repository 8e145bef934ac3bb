"""Weights read from a disk lie on a mesh as those do that were moved there."""

import collections
import contextlib
import math

import jax
import numpy as np
import pytest

from jmoe.checkpoint import manifest
from jmoe.checkpoint.unread import Leaves, Unread
from jmoe.config import override
from jmoe.decode import mesh_weights
from tests.decode.conftest import random_variables
from tests.decode.placed import any_placement
from tests.decode.test_on_mesh import placed


def on_disk(variables, asked: list) -> Unread:
    """The variables as if on a disk; what is read of them is noted."""
    leaves = manifest.flatten(variables)

    def fill(out, path, index):
        asked.append((path, index))
        out[:] = leaves[path][index]

    return Unread(lambda: contextlib.nullcontext(Leaves(leaves, fill)))


@pytest.mark.parametrize(
    ("mesh", "settings", "form", "has_places"),
    [
        ("pipe=2,expert=2", [], "native", True),
        ("expert=2", ["layer_loop=unroll"], "native", True),
        ("pipe=2,data=2,expert=2,tensor=2", [], "fp8", False),
    ],
    ids=["places", "unrolled", "fp8"],
)
def test_on_a_pipeline_what_is_read_is_what_would_be_moved(
    cfg, mesh, settings, form, has_places
):
    model = override(cfg, ["num_layers=3", "dtype=bfloat16", *settings])
    variables = random_variables(model)
    _, layout, divided = placed(mesh, [], variables, model)
    rows = mesh_weights.cut(model, layout.mesh.shape["pipe"], 64)
    where = any_placement(model, seed=1) if has_places else None
    want, got = (
        mesh_weights.place(model, layout, rows, form, x, where)
        for x in (divided, on_disk(variables, []))
    )
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype and x.sharding.is_equivalent_to(y.sharding, x.ndim)
        np.testing.assert_array_equal(x, y)
    abstract = mesh_weights.abstract(model, layout, rows, form, where)
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(got))
    assert mesh_weights.device_bytes(abstract) == held


def test_on_a_pipeline_everything_is_read_once_and_an_expert_at_a_time(cfg):
    model, asked = override(cfg, ["num_layers=3"]), []
    variables = random_variables(model)
    _, layout, _ = placed("pipe=2,expert=2", [], variables, model)
    rows, unread = mesh_weights.cut(model, 2, 64), on_disk(variables, asked)
    assert any(None in row.places for row in rows)  # where nothing is read
    mesh_weights.place(model, layout, rows, "native", unread)
    read = collections.Counter()
    for path, index in asked:
        size = math.prod(part.stop - part.start for part in index)
        read[path] += size
        if "experts" in path:
            experts = model.moe.router.num_experts
            stacked = model.num_moe_layers if path.startswith("params/moe/") else 1
            assert size == manifest.flatten(variables)[path].size // experts // stacked
    want = {path: x.size for path, x in manifest.flatten(variables).items()}
    assert read == want


def test_on_a_pipeline_what_cannot_be_read_is_told(cfg):
    variables = random_variables(cfg)

    def fill(out, path, index):
        raise ValueError(f"file 3 is cut short, in {path}")

    leaves = Leaves(manifest.flatten(variables), fill)
    damaged = Unread(lambda: contextlib.nullcontext(leaves))
    _, layout, _ = placed("pipe=2,expert=2", [], variables, cfg)
    rows = mesh_weights.cut(cfg, 2, 64)
    with pytest.raises(ValueError, match="file 3 is cut short, in params/"):
        mesh_weights.place(cfg, layout, rows, "native", damaged)
