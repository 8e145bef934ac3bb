"""A decoder's step, compiled for H20s: what travels, and what stays where it is.

Four layers of V3, narrower and with fewer experts, stand for its 61.
"""

import dataclasses

import pytest

from experiments.benchmarks import hopper_decode
from jmoe.config import MeshConfig, override
from jmoe.plan import decoding, programs

pytestmark = pytest.mark.hopper

SMALL = [
    "model.vocab_size=32768",
    "model.hidden_dim=2048",
    "model.num_layers=4",
    "model.num_dense_layers=1",
    "model.dense_mlp_dim=2048",
    "model.attention.num_heads=16",
    "model.moe.expert_mlp_dim=512",
    "model.moe.router.num_experts=32",
]
KINDS = {"draft": {"drafts": 1}, "prefill": {"chunk": 256}}


@pytest.fixture(scope="module", params=KINDS)
def found(request) -> decoding.DecodingSummary:
    asked = programs.v3_decoding(request.param, **KINDS[request.param])
    mesh = MeshConfig(pipe=2, tensor=4)
    run = override(dataclasses.replace(asked.run, mesh=mesh), SMALL)
    limits = dataclasses.replace(asked.limits, num_pages=2048)
    return decoding.compile_decoding(dataclasses.replace(asked, run=run, limits=limits))


def test_no_weights_and_no_logits_travel(found):
    cfg, mesh = found.decoding.run.model, found.decoding.run.mesh
    assert {"all-gather", "reduce-scatter", "collective-permute"} <= {*found.traffic()}
    assert found.large_gathers() == []
    columns = cfg.vocab_size // mesh.tensor
    assert not [c for c in found.collectives if f"{columns}" in "".join(c.shapes)]


def test_ranks_of_the_pipeline_never_wait_for_one_that_skips_something(found):
    between = [c for c in found.collectives if "pipe" in c.axes]
    assert between
    assert not any(c.optional for c in between)


def test_each_layer_attends_to_latents_by_a_kernel(found):
    # A row of the first, dense layer, two of the others, and the MTP module.
    layers = 1 + 2 + (found.decoding.limits.drafts > 0)
    assert found.kernels == layers


def test_pages_are_written_where_they_are(found):
    memory = found.memory
    assert memory.aliased >= memory.cache
    assert memory.temporaries < memory.page_array


def test_the_compiler_agrees_on_what_a_device_holds(found):
    memory = found.memory
    held = memory.weights + memory.cache
    assert memory.cache < memory.arguments <= held + 2**24
    assert memory.total >= held + memory.temporaries


def test_one_layers_weights_at_a_time_are_dequantized(found):
    cfg, mesh = found.decoding.run.model, found.decoding.run.mesh
    experts = 3 * cfg.moe.router.num_experts * cfg.moe.expert_mlp_dim // mesh.tensor
    layer, memory = 2 * experts * cfg.hidden_dim, found.memory
    assert memory.temporaries < 2 * layer


def test_the_report_says_what_fits_and_that_nothing_large_is_gathered(found):
    report = hopper_decode.make_report([found])
    asked = [figure for figure in report.figures if figure.asked]
    assert len(asked) == 2
    assert all(figure.met for figure in asked)
