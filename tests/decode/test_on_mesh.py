"""Completing prompts on a mesh is completing them on one device."""

import runpy

import jax
import numpy as np
import pytest

from jmoe.config import override
from jmoe.decode import generate as generating
from jmoe.decode.generate import generate
from jmoe.decode.on_mesh import make_next_logits
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
    next_logits = make_next_logits(run, layout)
    got = generate(cfg, divided, PROMPTS, max_new_tokens=NEW, next_logits=next_logits)
    assert got == generate(cfg, variables, PROMPTS, max_new_tokens=NEW)


def test_no_device_gets_more_of_a_parameter_than_it_computes_with(variables):
    run, layout, divided = placed("data=2,expert=4,tensor=2", [], variables)
    operands = divided, np.zeros((4, 64), np.int32), np.ones(4, np.int32), NEW, 0
    next_logits = make_next_logits(run, layout)
    program = generating._complete.lower(next_logits, *operands, 0.0, 1.0).compile()
    whole = {
        str(path): "[" + ",".join(map(str, x.shape)) + "]"
        for path, x in jax.tree.leaves_with_path(variables["params"])
        if {"experts", "head", "embedding"} & {key.key for key in path}
    }
    assert len(whole) > 3
    text = str(program.as_text())
    assert not [path for path, shape in whole.items() if f"f32{shape}" in text]
