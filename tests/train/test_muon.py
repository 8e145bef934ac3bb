"""Muon on meshes: what one device computes, of each matrix once, with little traffic.

Shapes: N matrix, I fan-in, O fan-out.
"""

import math
import re

import jax
import numpy as np
import optax
import pytest

from jmoe.config import RunConfig, override
from jmoe.nn.model import Transformer, make_variables
from jmoe.plan import hlo, traffic
from jmoe.train import layout as layouts
from jmoe.train.muon import SCALES, scale_by_muon
from tests.train.training import (
    GROUPED_QUERIES,
    Trainer,
    on,
    on_host,
    random_variables,
)

MESHES = [
    "data=4",
    "expert=16",
    "data=2,expert=4,tensor=2",
    "data=2,expert=2,tensor=4,zero_stage=3",
    "data=2,pipe=2,expert=2,tensor=2",
]


@pytest.fixture(scope="module")
def run(smallest) -> RunConfig:
    """Three MoE layers of 16 experts, which sixteen devices divide unevenly."""
    return override(
        smallest,
        [
            "model.vocab_size=304",
            "model.num_layers=4",
            "data.sequence_length=16",
            "model.attention.num_heads=4",
            "model.moe.router.num_experts=16",
            "train.batch_size=16",
            "train.microbatch_size=16",
            "train.ramp_start=none",
            "optimizer.name=muon",
            "optimizer.schedule={'name': 'constant', 'peak': 1e-3}",
        ],
    )


def layout_of(run: RunConfig, mesh: str = "") -> layouts.Layout:
    cfg = on(run, mesh).mesh
    devices = jax.devices()[: cfg.num_devices]
    return layouts.make_layout(Transformer(run.model), layouts.make_mesh(cfg, devices))


def is_expert(path) -> bool:
    return any(key.key == "experts" for key in path)


def draw(run: RunConfig, seed: int, chosen=lambda path: True):
    """Numbers in place of the hidden matrices, or of some; the rest is masked out."""
    shapes = jax.eval_shape(lambda: make_variables(Transformer(run.model), 0))["params"]
    rng = np.random.default_rng(seed)

    def numbers(path, record, x):
        if not record.is_hidden or not chosen(path):
            return optax.MaskedNode()
        return np.float32(rng.normal(size=x.shape))

    return jax.tree.map_with_path(numbers, layout_of(run).records, shapes)


def put(layout: layouts.Layout, tree):
    return jax.device_put(tree, layouts.shardings(layout, tree))


def updates_of(run: RunConfig, mesh: str = "", scale: str = "rms"):
    """Returns the last of three steps' updates."""
    layout = layout_of(run, mesh)
    muon = scale_by_muon(layout, SCALES[scale])
    state = put(layout, on_host(jax.jit(muon.init), draw(run, 0)))
    step, updates = jax.jit(muon.update), None
    for seed in (1, 2, 3):
        updates, state = step(put(layout, draw(run, seed)), state)
    return jax.device_get(updates)


@pytest.fixture(scope="module")
def one_device(run):
    return updates_of(run)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_makes_the_updates_that_one_device_makes(run, one_device, mesh):
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=0, atol=1e-5),
        updates_of(run, mesh),
        one_device,
    )


@pytest.mark.parametrize("scale", SCALES)
def test_every_matrix_of_an_update_is_nearly_orthogonal_times_its_scale(run, scale):
    def check(record, x):
        if isinstance(x, optax.MaskedNode):
            return
        dims = record.matrix
        order = [dim + x.ndim for dim in (*dims.batch(x.ndim), *dims.both)]
        x_NIO = x.transpose(order).reshape(-1, *dims.sizes(x.shape))
        fan_in, fan_out = x_NIO.shape[1:]
        factor = {
            "rms": 0.2 * math.sqrt(max(fan_in, fan_out)),  # Moonlight's
            "spectral": math.sqrt(max(1, fan_out / fan_in)),  # Jordan's
        }[scale]
        singular = np.linalg.svd(x_NIO / factor, compute_uv=False)
        # Of a random square matrix, five steps leave a singular value or two small.
        assert singular.max() < 1.3 and np.quantile(singular, 0.1) > 0.6

    updates = updates_of(run, "data=2,expert=4,tensor=2", scale)
    jax.tree.map(check, layout_of(run).records, updates)


def compiled(run: RunConfig, mesh: str, chosen=lambda path: True) -> str:
    layout = layout_of(run, mesh)
    muon = scale_by_muon(layout, SCALES["rms"])
    gradients = put(layout, draw(run, 0, chosen))
    state = put(layout, on_host(jax.jit(muon.init), gradients))
    return jax.jit(muon.update).lower(gradients, state).compile().as_text()


@pytest.mark.parametrize("mesh", MESHES[-3:])
def test_matrices_are_swapped_and_neither_gathered_nor_summed(run, mesh):
    shape = on(run, mesh).mesh.shape
    found = traffic.collectives(compiled(run, mesh), shape)
    assert {c.kind for c in found} == {"all-to-all"}
    experts = traffic.collectives(compiled(run, mesh, is_expert), shape)
    assert not any("expert" in c.axes for c in experts)


def multiplications(text: str) -> int:
    """Counts those of all products of matrices that a device computes."""
    program = hlo.parse(text)

    def of(instructions) -> int:
        shape_of, total = {x.name: sizes(x.shape) for x in instructions}, 0
        for x in instructions:
            if x.opcode == "fusion":
                total += sum(of(program.computations[name]) for name in x.called)
            if x.opcode == "dot":
                contracted = re.findall(r"lhs_contracting_dims={(\d+)}", x.attributes)
                length = shape_of[x.operands[0]][int(contracted[0])]
                total += math.prod(shape_of[x.name]) * length
        return total

    return sum(x.times * of(x.instructions) for x in program.executed())


def sizes(shape: str) -> list[int]:
    """Returns an array's sizes; of a tuple, those of its first one."""
    return [int(n) for n in re.search(r"\[([\d,]*)\]", shape)[1].split(",") if n]


@pytest.mark.parametrize("mesh", ["data=2,expert=8", "expert=16", "data=4,expert=4"])
def test_each_of_sixteen_devices_makes_a_sixteenth_of_the_experts_orthogonal(run, mesh):
    alone = multiplications(compiled(run, "", is_expert))
    # Gate, up and down of 16 experts in three layers and the MTP module: [32, 16].
    fewer, more = 16, 32
    each = 5 * (2 * fewer**2 * more + fewer**3)
    assert alone == 3 * 16 * 4 * each
    assert 16 * multiplications(compiled(run, mesh, is_expert)) == alone


@pytest.mark.parametrize(
    ("mesh", "settings"),
    [
        ("data=2,expert=4,tensor=2", []),
        ("data=2,pipe=2,tensor=2,expert=2", [GROUPED_QUERIES]),
    ],
    ids=["latent attention", "grouped queries"],
)
def test_training_with_muon_on_a_mesh_is_training_on_one_device(run, mesh, settings):
    changed = override(run, settings)
    variables = random_variables(changed)
    want = Trainer.of(changed, variables).train(2)
    got = Trainer.of(on(changed, mesh), variables)
    got.train_beside(want)
