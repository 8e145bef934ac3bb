"""Completing prompts on a mesh is completing them on one device."""

import runpy

import jax
import pytest

from jmoe.config import override
from jmoe.decode.generate import generate
from jmoe.decode.limits import Limits
from jmoe.decode.live import make_chunks, make_rows
from jmoe.decode.on_mesh import OnMesh, make_programs
from jmoe.nn.model import Transformer
from jmoe.train import layout as layouts
from tests.decode.conftest import EXPERIMENT

PROMPTS = [[7], [3, 250, 250], list(range(20, 40))]  # as many as divide over no mesh
NEW = 12
MESHES = {
    "": [],
    "data=2,expert=4,tensor=2": [],
    "data=4,expert=2,tensor=2": ["mesh.zero_stage=3"],
    "pipe=2,data=2,expert=2,tensor=2": [],
}


def placed(mesh, settings, variables):
    """A run on a mesh, its layout, and the variables as they lie there."""
    axes = [f"mesh.{axis}" for axis in mesh.split(",") if axis]
    sizes = ["train.microbatch_size=8", "train.ramp_start=none"]
    run = runpy.run_path(str(EXPERIMENT))["get_config"]()
    run = override(run, [*sizes, *axes, *settings])
    layout = layouts.make_layout(Transformer(run.model), layouts.run_mesh(run.mesh))
    return run, layout, jax.device_put(variables, layouts.shardings(layout, variables))


@pytest.mark.parametrize(("mesh", "settings"), MESHES.items(), ids=MESHES)
def test_a_mesh_finds_the_tokens_of_one_device(cfg, variables, mesh, settings):
    run, layout, divided = placed(mesh, settings, variables)
    programs = make_programs(run, layout.mesh)
    got = generate(cfg, divided, PROMPTS, max_new_tokens=NEW, programs=programs)
    assert got == generate(cfg, variables, PROMPTS, max_new_tokens=NEW)


def test_no_device_gets_more_of_a_parameter_than_it_computes_with(variables):
    run, layout, divided = placed("data=2,expert=4,tensor=2", [], variables)
    limits = Limits(rows=(2,), chunks=(16,), max_length=64)
    made = OnMesh(run, layout.mesh, "native", divided, limits)
    nobody = made._put(given(limits, made.parts, 2, 16))
    underway = made._programs.begin(nobody)
    operands = made._weights, made.state, underway, nobody
    text = made._programs.step.lower(*operands).compile().as_text()
    whole = {
        str(path): "[" + ",".join(map(str, x.shape[1:])) + "]"
        for path, x in jax.tree.leaves_with_path(variables["params"]["moe"])
        if "experts" in {key.key for key in path}
    }
    assert len(whole) == 2
    assert not [path for path, shape in whole.items() if f"f32{shape}" in text]
    assert "all-gather" in text
    vocab, hidden = variables["params"]["embedding"].shape
    # Nor whole logits, nor noise of the whole vocabulary.
    assert f"[{vocab},{hidden}]" not in text and f",{vocab}]" not in text


def given(limits, parts, rows, chunk):
    """The arrays of a step in which nobody takes part."""
    nobody = [[] for _ in range(parts)]
    made = make_rows(limits, nobody, rows)
    return made, make_chunks(limits, [None] * parts, chunk)
