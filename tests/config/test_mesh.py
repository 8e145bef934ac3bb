"""The mesh's record and its short form."""

import pytest

from jmoe.config import MeshConfig, override, presets

ALL = "data=2,expert=4,tensor=2"


def test_a_short_form_names_the_axes_with_more_than_one_device():
    assert MeshConfig.parse(ALL) == MeshConfig(data=2, expert=4, tensor=2)
    assert MeshConfig.parse(" expert=16 ") == MeshConfig(expert=16)
    assert MeshConfig.parse("") == MeshConfig()


@pytest.mark.parametrize(
    "spec", ["data", "data=", "data=-2", "rows=2", "data=2,data=4"]
)
def test_a_malformed_form_is_refused_by_its_item(spec):
    with pytest.raises(ValueError, match=r"mesh='.*' must read axis=devices"):
        MeshConfig.parse(spec)


def test_a_run_takes_the_short_form_or_an_axis():
    run = presets.RUNS["tiny"]()
    assert override(run, [f"mesh={ALL}"]).mesh == MeshConfig.parse(ALL)
    assert override(run, ["mesh.data=2"]).mesh == MeshConfig(data=2)


def test_devices_are_counted_in_all_and_over_the_batch():
    mesh = MeshConfig.parse(ALL)
    assert (mesh.num_devices, mesh.batch_parts) == (16, 8)


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("mesh.pipe=0", "pipe=0 must be at least 1"),
        ("mesh.data=0", "data=0 must be at least 1"),
        ("mesh.expert=0", "expert=0 must be at least 1"),
        ("mesh.tensor=0", "tensor=0 must be at least 1"),
        ("mesh.zero_stage=2", "zero_stage=2 is not one of 1, 3"),
        ("mesh.data=3", "train.microbatch_size=16 must divide over mesh.data=3 x"),
        ("mesh.tensor=3", "data.sequence_length=128 must divide over mesh.tensor=3"),
        ("mesh=rows=2", "mesh='rows=2': 'rows=2' must read axis=devices"),
        ("pipeline.schedule=2f2b", "schedule='2f2b' is not one of 'gpipe', '1f1b'"),
        ("pipeline.remat=block", "remat='block' is not one of 'none', 'stage'"),
        ("pipeline.chunks=1", "chunks=1 must be at least 2"),
        ("pipeline.microbatches=0", "microbatches=0 must be at least 1"),
    ],
)
def test_a_mesh_that_a_run_cannot_have_is_refused(assignment, said):
    with pytest.raises(ValueError, match=said):
        override(presets.RUNS["tiny"](), [assignment])
