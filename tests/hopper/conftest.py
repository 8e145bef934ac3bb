"""Programs for 16 H20s, each compiled once; and kernels for one.

Two layers of V2-Lite at full width stand for its 27: the layers of a loop are compiled
once, however many there are.
"""

import dataclasses
from typing import NamedTuple

import pytest

from jmoe.config import ExchangeConfig, MeshConfig, ModelConfig, RunConfig
from jmoe.plan import aot, programs, summary
from jmoe.plan.device import H20
from tests.hopper import compiled


@pytest.fixture
def compile_kernels(tmp_path, monkeypatch):
    """Compiles a function of arrays of these shapes; all kernels it has."""
    for name, value in {"TO": str(tmp_path), "PTX": "1", "PTXAS": "1"}.items():
        monkeypatch.setenv(f"MOSAIC_GPU_DUMP_{name}", value)

    def compile_kernels(function, *shapes) -> list[compiled.Kernel]:
        compiled.compile_text(function, *shapes)
        names = [path.with_suffix("") for path in sorted(tmp_path.glob("*.ptx"))]
        return [compiled.read(name) for name in names]

    return compile_kernels


def shallow_run(mesh: MeshConfig, **exchange) -> RunConfig:
    model = dataclasses.replace(ModelConfig.preset("v2_lite"), num_layers=3)
    settings = dataclasses.asdict(programs.exchange_with(capacity_factor=1.05))
    exchanged = ExchangeConfig(**(settings | exchange))
    return programs.run_on(model, mesh, "shallow", exchange=exchanged)


class Shallow(NamedTuple):
    """A compiled program's summary and its text."""

    summary: summary.Summary
    text: str


def compile_shallow(run: RunConfig) -> Shallow:
    devices = aot.absent_devices(H20, run.mesh.num_devices)
    program = aot.compile_step(run, devices)
    return Shallow(summary.summarise(run, H20, program), program.text)


@pytest.fixture(scope="session")
def by_data_and_expert() -> Shallow:
    return compile_shallow(shallow_run(MeshConfig(data=2, expert=8)))


@pytest.fixture(scope="session")
def by_tensor_too() -> Shallow:
    mesh = MeshConfig(data=2, expert=4, tensor=2)
    return compile_shallow(
        shallow_run(mesh, backend="ragged", dispatch_dtype="float8_e4m3fn")
    )
