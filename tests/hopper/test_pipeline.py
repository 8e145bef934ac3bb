"""A pipeline's step, compiled for 16 H20s: who waits for whom, and what hides what.

A few layers of V2-Lite at full width stand for its 27.
"""

import dataclasses

import pytest

from experiments.benchmarks import hopper_pipeline
from jmoe.config import MeshConfig, ModelConfig
from jmoe.parallel.schedule.ticks import as_ticks
from jmoe.plan import pipelined, programs
from jmoe.train.stages import make_schedule
from tests.hopper.conftest import compile_shallow

pytestmark = pytest.mark.hopper

MIB = 2**20
BOTH = pytest.mark.parametrize("program", ["by_expert", "by_tensor"])


def compile_pipeline(mesh: MeshConfig, schedule: str, *, layers: int, **remat: str):
    model = dataclasses.replace(ModelConfig.preset("v2_lite"), num_layers=layers)
    run = programs.pipelined("shallow", mesh, schedule, model=model, **remat)
    return compile_shallow(run).summary


@pytest.fixture(scope="module")
def by_expert():
    return compile_pipeline(programs.BY_EXPERT, "dualpipe", layers=9)


@pytest.fixture(scope="module")
def by_tensor():
    return compile_pipeline(programs.BY_TENSOR, "dualpipe", layers=5)


@pytest.fixture
def dualpipe(program, request):
    return request.getfixturevalue(program)


@BOTH
def test_each_direction_hides_behind_the_products_of_the_other(dualpipe):
    rows = pipelined.overlaps(dualpipe.collectives)
    mesh = dualpipe.run.mesh
    kinds = ["all-to-all"] if mesh.expert > 1 else ["all-gather", "reduce-scatter"]
    want = {(phase, kind) for phase in ("forward", "backward") for kind in kinds}
    assert {(row.phase, row.kind) for row in rows} == want
    for row in rows:
        assert row.crossing >= 0.5, row


@BOTH
def test_no_rank_of_the_pipeline_waits_for_one_that_skips_a_loop(dualpipe):
    assert pipelined.waiting(dualpipe.collectives) == []
    within = [c for c in dualpipe.collectives if c.optional]
    assert {c.axes for c in within if c.moved_bytes} == {
        tuple(
            axis for axis in ("expert", "tensor") if dualpipe.run.mesh.shape[axis] > 1
        )
    }


@BOTH
def test_results_are_handed_over_once_a_tick_for_each_way(dualpipe):
    run = dualpipe.run
    count = run.train.batch_size // run.train.microbatch_size
    ticks = as_ticks(make_schedule(run.pipeline, run.mesh.pipe, count))
    handed = [c for c in dualpipe.collectives if c.kind == "collective-permute"]
    ways = sum(way != 0 for kind in "FB" for way in ticks.ways(kind))
    # One instruction may hand over several arrays.
    arrays = [(c.axes, c.times) for c in handed for _ in c.shapes]
    assert arrays == [(("pipe",), ticks.count)] * ways


@BOTH
def test_no_loop_copies_what_microbatches_have_left(dualpipe):
    run = dualpipe.run
    between = 2 * run.data.sequence_length * run.model.hidden_dim // run.mesh.tensor
    stash = between * (run.mesh.pipe + 1) * (run.model.num_moe_layers // run.mesh.pipe)
    assert dualpipe.copied_bytes < stash


@BOTH
def test_the_report_says_that_nothing_waits_and_nothing_is_copied(dualpipe):
    report = hopper_pipeline.make_report([dualpipe])
    asked = [figure for figure in report.figures if figure.asked]
    assert len(asked) == 2
    assert all(figure.met for figure in asked)


@pytest.fixture(scope="module")
def temporaries():
    """Bytes by schedule, where F leaves all that it computes, or the stages' inputs."""
    mesh = MeshConfig(pipe=4, expert=4)

    def of(schedule: str, **remat: str) -> int:
        found = compile_pipeline(mesh, schedule, layers=5, remat="none", **remat)
        assert pipelined.overlapped(found.collectives) == []
        return found.memory.temporaries

    return {
        "gpipe": of("gpipe"),
        "1f1b": of("1f1b"),
        "stage": of("1f1b", stage_remat="stage"),
    }


def test_memory_is_what_the_schedule_and_the_remat_leave(temporaries):
    assert temporaries["gpipe"] > 1.5 * temporaries["1f1b"]
    assert temporaries["1f1b"] > temporaries["stage"]
