"""The runs whose training steps are compiled for GPUs that aren't here.

Each is a published model on as many H20s as its name ends with. A microbatch has one
sequence of 4,096 tokens for each part of the batch, and a step has two, so that
gradients are accumulated.
"""

import dataclasses
from collections.abc import Callable, Mapping

from jmoe.config import MeshConfig, ModelConfig, RunConfig
from jmoe.config.data import DataConfig
from jmoe.config.model import ExchangeConfig
from jmoe.config.run import TrainConfig

SEQUENCE = 4096
MICROBATCHES = 2


def run_on(
    model: ModelConfig, mesh: MeshConfig, name: str, *, length: int = SEQUENCE
) -> RunConfig:
    """A run of `model` on `mesh` as GPUs want it, on sequences of `length`."""
    attention = dataclasses.replace(model.attention, block_size=512)
    # Of two chunks of tokens, one travels while the other computes.
    exchange = ExchangeConfig(chunks=2, capacity_factor=1.1)
    moe = dataclasses.replace(model.moe, backend="ragged", exchange=exchange)
    sequences = mesh.batch_parts
    return RunConfig(
        name=name,
        model=dataclasses.replace(model, attention=attention, moe=moe),
        data=DataConfig(sequence_length=length),
        train=TrainConfig(
            steps=10_000,
            batch_size=MICROBATCHES * sequences,
            microbatch_size=sequences,
        ),
        mesh=mesh,
    )


def v2_lite_16() -> RunConfig:
    """Two nodes: experts within a node, data over both."""
    mesh = MeshConfig(data=2, expert=8)
    return run_on(ModelConfig.preset("v2_lite"), mesh, "v2_lite_16")


def v3_16() -> RunConfig:
    """Too large for two nodes; how far, the program says."""
    mesh = MeshConfig(expert=16)
    return run_on(ModelConfig.preset("v3"), mesh, "v3_16")


def v3_2048() -> RunConfig:
    """As many GPUs as V3 was trained on, with no pipeline."""
    mesh = MeshConfig(data=4, expert=64, tensor=8)
    return run_on(ModelConfig.preset("v3"), mesh, "v3_2048")


PROGRAMS: Mapping[str, Callable[[], RunConfig]] = {
    "v2_lite_16": v2_lite_16,
    "v3_16": v3_16,
    "v3_2048": v3_2048,
}
