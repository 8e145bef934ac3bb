"""The table of names: complete, the same for every layer loop, as published."""

import math
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from jmoe import families
from jmoe.export import dry_run, layout, names, published, write
from jmoe.export.numerics import FLOAT32

ROOT = pathlib.Path(__file__).parents[2]
SHAPES = {
    "v3": [],
    "full_queries": ["attention.query_latent_dim=none"],
    "tied": ["tie_embeddings=true", "mtp_depth=2"],
    "no_dense_layer": ["num_dense_layers=0", "moe.num_shared_experts=0"],
    "wide_shared": ["moe.num_shared_experts=3", "mtp_depth=0"],
}
each_shape = pytest.mark.parametrize("assignments", SHAPES.values(), ids=SHAPES)


@each_shape
@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_every_number_of_every_leaf_has_one_place(small_config, assignments, loop):
    cfg = small_config(f"layer_loop={loop}", *assignments)
    seen = {p: np.zeros(x.shape, int) for p, x in names.abstract_leaves(cfg).items()}
    for tensor in names.expand(cfg):
        piece = seen[tensor.path][tensor.index]
        assert piece.size == tensor.size
        if not tensor.is_copy:
            seen[tensor.path][tensor.index] += 1
    assert all((count == 1).all() for count in seen.values())


@each_shape
def test_scanned_and_unrolled_layers_have_the_same_names(small_config, assignments):
    found = [
        {t.name: t.shape for t in names.expand(small_config(loop, *assignments))}
        for loop in ("layer_loop=scan", "layer_loop=unroll")
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("shape", ["v3", "full_queries", "tied"])
def test_the_models_own_tensors_are_those_that_transformers_saves(
    small_config, shape, tmp_path, contents
):
    transformers = pytest.importorskip("transformers", reason="compares with it")
    cfg = small_config("mtp_depth=0", *SHAPES[shape][:1])
    hf = transformers.DeepseekV3Config(**families.to_hf(cfg))
    transformers.DeepseekV3ForCausalLM(hf).save_pretrained(tmp_path)
    saved = {name: shape for name, (_, shape, _) in contents(tmp_path).items()}
    assert {t.name: t.shape for t in names.expand(cfg)} == saved


@pytest.fixture(scope="module")
def made():
    return dry_run.plan_preset("v3", "fp8")


def test_the_plan_of_v3_is_what_was_published(made):
    assert published.differences(made.entries) == []
    assert len(made.entries) == 91_991
    assert dry_run.summary(made).startswith("91,991 tensors of 684.5B parameters")


@pytest.mark.parametrize("change", ["missing", "other shape", "other type", "unknown"])
def test_a_plan_that_differs_from_the_published_one_is_found(made, change):
    entries = made.entries
    last = entries.pop()
    changed = {
        "missing": [],
        "other shape": [last._replace(shape=(*last.shape, 1))],
        "other type": [last._replace(dtype=FLOAT32)],
        "unknown": [last, last._replace(name="model.layers.62.mlp.gate.weight")],
    }
    assert published.differences(entries + changed[change])


# Asks the program itself: what the system says of a child's peak may be the parent's.
DRY_RUN = """
import atexit, pathlib, runpy, sys

def print_peak():
    print("peak", pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1])

atexit.register(print_peak)
sys.argv = ["export_hf.py", "--dry_run", "--model=v3"]
runpy.run_path("scripts/export_hf.py", run_name="__main__")
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").is_file(), reason="no /proc")
def test_the_plan_of_v3_takes_under_30_seconds_and_a_gigabyte():
    command = [sys.executable, "-c", DRY_RUN]
    start = time.monotonic()
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 30
    plan, _, peak = out.stdout.partition("peak")
    assert "those of the published files" in plan
    kilobytes, unit = peak.split()[:2]
    assert unit == "kB" and int(kilobytes) * 1024 < 1e9


@pytest.mark.parametrize("dtype", write.FORMATS)
@pytest.mark.parametrize("shard_bytes", [1, 200_000, 10**9])
def test_a_shards_tensors_fill_it_in_one_piece_each_aligned(
    small_config, dtype, shard_bytes
):
    cfg = small_config()
    leaf_dtypes = dict.fromkeys(names.abstract_leaves(cfg), FLOAT32)
    made = write.plan(
        names.expand(cfg), leaf_dtypes, dtype=dtype, shard_bytes=shard_bytes
    )
    for shard in made.shards:
        end = len(shard.header)
        assert end % layout.PAGE == 0
        for name, start in sorted(shard.offsets.items(), key=lambda item: item[1]):
            entry = shard.entries[name]
            assert start == end and start % entry.dtype.itemsize == 0
            end += entry.nbytes
        assert end == shard.size
    products = {t.name for t in names.expand(cfg) if t.is_product}
    scales = [e for e in made.entries if e.name.endswith(layout.SCALE)]
    assert len(scales) == (len(products) if dtype == "fp8" else 0)
    assert all(math.prod(e.shape) for e in made.entries)
