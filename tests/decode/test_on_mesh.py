"""Completing prompts on a mesh is completing them on one device."""

import dataclasses
import functools
import math
import re
import runpy

import jax
import numpy as np
import pytest

from jmoe.config import GQAConfig, override
from jmoe.decode.engine import Engine
from jmoe.decode.generate import fitting_limits, generate
from jmoe.decode.limits import Limits
from jmoe.decode.live import make_nobody
from jmoe.decode.on_mesh import OnMesh, make_programs
from jmoe.decode.programs import OneDevice
from jmoe.decode.requests import Sampling
from jmoe.nn.model import Transformer
from jmoe.nn.quantized import quantize_weights
from jmoe.parallel.mesh import make_mesh
from jmoe.train import layout as layouts
from tests.decode.conftest import EXPERIMENT, random_variables

PROMPTS = [[7], [3, 250, 250], list(range(20, 40))]  # as many as divide over no mesh
NEW = 12
MESHES = {
    "": [],
    "data=2,expert=4,tensor=2": [],
    "data=4,expert=2,tensor=2": ["mesh.zero_stage=3"],
    "pipe=2,data=2,expert=2,tensor=2": [],
}


def placed(mesh, settings, variables, model=None):
    """A run on a mesh, its layout, and the variables as they lie there."""
    axes = [f"mesh.{axis}" for axis in mesh.split(",") if axis]
    sizes = ["train.microbatch_size=16", "train.batch_size=16", "train.ramp_start=none"]
    run = runpy.run_path(str(EXPERIMENT))["get_config"]()
    run = dataclasses.replace(run, model=model or run.model)
    run = override(run, [*sizes, *axes, *settings])
    devices = jax.devices()[: run.mesh.num_devices]
    layout = layouts.make_layout(Transformer(run.model), make_mesh(run.mesh, devices))
    return run, layout, jax.device_put(variables, layouts.shardings(layout, variables))


def counted(cfg, variables, limits, programs=OneDevice) -> np.ndarray:
    """How often each expert is chosen while the prompts are completed."""
    told = []
    watched = {"programs": programs, "observe": told.append}
    engine = Engine(cfg, variables, limits, **watched)
    sampling = Sampling(max_new_tokens=NEW)
    list(engine.complete((prompt, sampling) for prompt in PROMPTS))
    return sum(stats.count_LE for stats in told)


@pytest.mark.parametrize(("mesh", "settings"), MESHES.items(), ids=MESHES)
def test_a_mesh_finds_the_tokens_and_counts_of_one_device(
    cfg, variables, mesh, settings
):
    run, layout, divided = placed(mesh, settings, variables)
    programs = make_programs(run, layout.mesh)
    got = generate(cfg, divided, PROMPTS, max_new_tokens=NEW, programs=programs)
    assert got == generate(cfg, variables, PROMPTS, max_new_tokens=NEW)
    limits = fitting_limits(cfg, len(PROMPTS), max(map(len, PROMPTS)), NEW)
    want_LE = counted(cfg, variables, limits)
    np.testing.assert_array_equal(counted(cfg, divided, limits, programs), want_LE)


SMALL = Limits(
    rows=(2,),
    prompts=(2,),
    chunks=(8,),
    max_length=64,
    page_size=8,
    drafts=1,
    queue=4,
)
WIDE = [  # so that all divides over 8 devices
    "vocab_size=304",
    "dense_mlp_dim=64",
    "attention.num_heads=8",
    "num_layers=3",
]


def mixed(count: int) -> list:
    """Requests of many lengths, greedy and sampled, and one that can't be served."""
    found = []
    for i in range(count):
        prompt = [(5 * i + 3 * j) % 299 for j in range(1 + (7 * i) % 20)]
        drawn = {"temperature": 1.0, "seed": i, "top_k": 50} if i % 2 else {}
        penalty = {"repetition_penalty": 1.5} if i % 3 == 2 else {}
        new = 3 + (5 * i) % 8
        found.append((prompt, Sampling(max_new_tokens=new, **drawn, **penalty)))
    return [*found[:3], ([], Sampling()), *found[3:]]


def completed(engine: Engine, requests: list) -> list:
    """What is found, whatever the engine had to do besides."""
    other = engine.submit([1, 2, 3], Sampling(max_new_tokens=60))
    completing = engine.complete(requests)
    first = next(completing)
    assert engine.cancel(other)
    found = {done.number: done for done in (first, *completing)}
    engine.step()
    assert engine.is_idle
    pages = engine.limits.pages * engine.programs.turns
    assert {part.num_free for part in engine._pages} == {pages}
    return [(found[i].tokens, found[i].finish_reason) for i in range(len(requests))]


def test_a_pipeline_of_tensor_groups_finds_the_tokens_and_counts_of_one_device(cfg):
    model = override(cfg, WIDE)  # with experts on both ranks
    variables = random_variables(model)
    run, layout, divided = placed("pipe=2,tensor=8", [], variables, model)
    limits = dataclasses.replace(SMALL, rows=(4,))
    requests = mixed(9)
    programs = make_programs(run, layout.mesh)
    want_LE = counted(model, variables, limits)
    np.testing.assert_array_equal(counted(model, divided, limits, programs), want_LE)
    engine = Engine(model, divided, limits, programs=programs)
    assert engine.programs.turns == 2 and engine.programs.parts == 1
    got = completed(engine, requests)
    assert got == completed(Engine(model, variables, limits), requests)
    reasons = [reason for _, reason in got]
    assert reasons.count("error") == 1 and reasons.count("length") == 9
    assert_gathers_little(engine, model.hidden_dim)


def test_grouped_queries_and_drafts_of_many_devices_find_the_tokens_of_one(cfg):
    attention = GQAConfig(
        num_heads=4, num_kv_heads=2, head_dim=8, rope_dim=4, qkv_bias=True
    )
    model = dataclasses.replace(cfg, attention=attention, tie_embeddings=True)
    variables = random_variables(model)
    run, layout, divided = placed("data=2,expert=4,tensor=2", [], variables, model)
    requests = mixed(20)  # more than the 8 parts have slots
    programs = make_programs(run, layout.mesh)
    engine = Engine(model, divided, SMALL, programs=programs)
    assert engine.programs.parts == 8
    got = completed(engine, requests)
    assert got == completed(Engine(model, variables, SMALL), requests)


WHOLE_BLOCKS = [  # of FP8, and groups of 4 bits, on each of two devices
    "hidden_dim=128",
    "dense_mlp_dim=256",
    "moe.expert_mlp_dim=256",
    "attention.num_heads=4",
    "attention.nope_dim=64",
    "attention.rope_dim=64",
    "attention.value_dim=64",
]


@pytest.mark.parametrize(
    ("mesh", "sizes", "form"),
    [
        ("data=2,expert=8", [], "fp8"),
        # experts in 4 bits, and what else there is in FP8
        ("expert=4,tensor=2", WHOLE_BLOCKS, "int4-experts"),
    ],
    ids=["fp8", "int4"],
)
def test_weights_in_fewer_bits_on_a_mesh_find_the_tokens_of_one_device(
    cfg, mesh, sizes, form
):
    model = override(cfg, sizes)
    variables = random_variables(model)
    run, layout, divided = placed(mesh, [], variables, model)
    programs = make_programs(run, layout.mesh, form)
    complete = functools.partial(generate, prompts=PROMPTS, max_new_tokens=NEW)
    got = complete(model, divided, programs=programs)
    quantize = jax.jit(functools.partial(quantize_weights, cfg=model, form=form))
    quantized = {**variables, "params": quantize(variables["params"])}
    assert got == complete(model, quantized)
    assert got != complete(model, variables)


def compiled_step(made: OnMesh, limits: Limits, rows: int, chunk: int) -> str:
    size = limits.size(rows, min(chunk, 1), chunk)
    nobody = made._put(make_nobody(limits, made.parts, size))
    underway = made._programs.begin(nobody)
    operands = made._weights, made.state, underway, nobody
    return made._programs.step.lower(*operands).compile().as_text()


def assert_gathers_little(engine: Engine, hidden_dim: int) -> None:
    """In a step of decoding, devices gather hidden states and nothing larger."""
    rows = engine.limits.rows[-1]
    text = compiled_step(engine.programs, engine.limits, rows, 0)
    gathered = re.findall(r"= (.*) all-gather\(", text)
    shapes = re.findall(r"\[([\d,]+)\]", " ".join(gathered))
    sizes = [math.prod(map(int, shape.split(","))) for shape in shapes]
    assert max(sizes) == rows * (1 + engine.limits.drafts) * hidden_dim


def test_no_device_gets_more_of_a_parameter_than_it_computes_with(variables):
    run, layout, divided = placed("data=2,expert=4,tensor=2", [], variables)
    limits = Limits(rows=(2,), prompts=(1,), chunks=(16,), max_length=64)
    made = OnMesh(run, layout.mesh, "native", divided, limits)
    text = compiled_step(made, limits, 2, 16)
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
