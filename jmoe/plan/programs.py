"""The runs and decoders whose steps are compiled for GPUs that aren't here.

Each is a published model on as many H20s as its name says. A microbatch has one
sequence of 4,096 tokens for each part of the batch. A step has two, so that gradients
are accumulated; with a pipeline, four for each of its ranks. A decoder's steps have
the tokens that `Decoding` says.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

from jmoe.config import MeshConfig, ModelConfig, PipelineConfig, RunConfig
from jmoe.config.data import DataConfig
from jmoe.config.mesh import SCHEDULES
from jmoe.config.model import ExchangeConfig
from jmoe.config.train import TrainConfig
from jmoe.decode.limits import Limits, StepSize

LENGTH = 4096
MICROBATCHES = 2


def run_on(
    model: ModelConfig,
    mesh: MeshConfig,
    name: str,
    *,
    exchange: ExchangeConfig,
    length: int = LENGTH,
) -> RunConfig:
    """Returns a run of `model` on `mesh`, with experts as GPUs want them."""
    moe = dataclasses.replace(model.moe, backend="ragged", exchange=exchange)
    sequences = mesh.batch_parts
    count = MICROBATCHES if mesh.pipe == 1 else 4 * mesh.pipe
    return RunConfig(
        name=name,
        model=dataclasses.replace(model, moe=moe),
        data=DataConfig(sequence_length=length),
        train=TrainConfig(
            steps=10_000,
            batch_size=count * sequences,
            microbatch_size=sequences,
        ),
        mesh=mesh,
    )


def exchange_with(capacity_factor: float) -> ExchangeConfig:
    """Returns two chunks of tokens, of which one travels while the other computes."""
    return ExchangeConfig(chunks=2, capacity_factor=capacity_factor)


def v2_lite(*, nodes: int) -> RunConfig:
    """Puts V2-Lite's experts within a node of 8, and data over the nodes.

    A chunk has 2,048 tokens, so that chance hardly ever brings a device 1.05 times as
    many visits as the next.
    """
    model, mesh = ModelConfig.preset("v2_lite"), MeshConfig(data=nodes, expert=8)
    exchange = exchange_with(capacity_factor=1.05)
    return run_on(model, mesh, f"v2_lite_{8 * nodes}", exchange=exchange)


def v2_lite_muon() -> RunConfig:
    """Returns `v2_lite` on two nodes, with Muon."""
    run = v2_lite(nodes=2)
    optimizer = dataclasses.replace(run.optimizer, name="muon")
    return dataclasses.replace(run, name="v2_lite_16_muon", optimizer=optimizer)


def on_two_nodes(name: str, mesh: MeshConfig) -> RunConfig:
    """Returns a preset's run on 16 GPUs, with bfloat16 moments, as large ones need."""
    exchange = exchange_with(capacity_factor=1.05)
    run = run_on(ModelConfig.preset(name), mesh, f"{name}_16", exchange=exchange)
    optimizer = dataclasses.replace(run.optimizer, moment_dtype="bfloat16")
    return dataclasses.replace(run, optimizer=optimizer)


def v3_16() -> RunConfig:
    """Puts V3 on two nodes, for which it is too large; how far, the program says."""
    model, mesh = ModelConfig.preset("v3"), MeshConfig(expert=16)
    exchange = exchange_with(capacity_factor=1.05)
    return run_on(model, mesh, "v3_16", exchange=exchange)


def v3_2048() -> RunConfig:
    """Puts V3 on as many GPUs as it was trained on, with no pipeline.

    A chunk has 256 tokens, of which chance sends a device many more than the next.
    """
    model, mesh = ModelConfig.preset("v3"), MeshConfig(data=4, expert=64, tensor=8)
    exchange = exchange_with(capacity_factor=1.5)
    return run_on(model, mesh, "v3_2048", exchange=exchange)


def v3_2048_ep64() -> RunConfig:
    """Puts V3 on as many; nothing but ZeRO divides what isn't an expert.

    No dimension has room for all devices, and so several are divided. It doesn't fit:
    each device sums whole gradients, of its experts and of all else, over microbatches.
    """
    model, mesh = ModelConfig.preset("v3"), MeshConfig(data=32, expert=64)
    exchange = exchange_with(capacity_factor=1.05)
    return run_on(model, mesh, "v3_2048_ep64", exchange=exchange)


def pipelined(
    name: str,
    mesh: MeshConfig,
    schedule: str,
    *,
    remat: str = "block",
    stage_remat: str = "none",
    model: ModelConfig | None = None,
) -> RunConfig:
    """Puts V2-Lite, or another `model`, through a pipeline.

    Args:
      remat: the model's; stage_remat: the pipeline's.
    """
    model = dataclasses.replace(model or ModelConfig.preset("v2_lite"), remat=remat)
    exchange = ExchangeConfig()
    if mesh.expert > 1:
        exchange = exchange_with(capacity_factor=1.05)
    pipeline = PipelineConfig(schedule=schedule, remat=stage_remat)
    run = run_on(model, mesh, name, exchange=exchange)
    return dataclasses.replace(run, pipeline=pipeline)


WITHIN_NODES = MeshConfig(data=2, expert=8)
OVER_NODES = MeshConfig(expert=16)
PROGRAMS: Mapping[str, Callable[[], RunConfig]] = {
    "v2_lite_16": functools.partial(v2_lite, nodes=2),
    "v3_16": v3_16,
    "moonlight_16": functools.partial(on_two_nodes, "moonlight", WITHIN_NODES),
    "qwen3_30b_16": functools.partial(on_two_nodes, "qwen3_30b", WITHIN_NODES),
    "glm4_air_16": functools.partial(on_two_nodes, "glm4_air", OVER_NODES),
    "dots1_16": functools.partial(on_two_nodes, "dots1", OVER_NODES),
    "kimi_k2_16": functools.partial(on_two_nodes, "kimi_k2", OVER_NODES),
    "v3_2048": v3_2048,
    "v3_2048_ep64": v3_2048_ep64,
}

BY_EXPERT = MeshConfig(pipe=4, expert=4)
BY_TENSOR = MeshConfig(pipe=2, tensor=8)


def _pipelines() -> Iterator[tuple[str, Callable[[], RunConfig]]]:
    """Yields every schedule on one mesh, with all that F can leave to B.

    DualPipe is there on two.
    """

    def named(name: str, mesh: MeshConfig, schedule: str, **remat: str):
        return name, functools.partial(pipelined, name, mesh, schedule, **remat)

    for schedule in SCHEDULES:
        yield named(f"{schedule}_pp4_ep4", BY_EXPERT, schedule)
        yield named(f"{schedule}_pp4_ep4_all_kept", BY_EXPERT, schedule, remat="none")
    for schedule in ("1f1b", "dualpipe"):
        name = f"{schedule}_pp4_ep4_stage_remat"
        yield named(name, BY_EXPERT, schedule, remat="none", stage_remat="stage")
    yield named("dualpipe_pp2_tp8", BY_TENSOR, "dualpipe")


PIPELINES: Mapping[str, Callable[[], RunConfig]] = dict(_pipelines())


# One lends experts, one drops tokens, and one has room for whatever comes.
COMPARED: Mapping[str, ExchangeConfig] = {
    "balanced": ExchangeConfig(backend="balanced"),
    "capacity": ExchangeConfig(backend="ragged", capacity_factor=1.05),
    "dropless": ExchangeConfig(backend="padded"),
}


def compared(preset: str, devices: int, kind: str, name: str) -> RunConfig:
    """Puts a preset's experts on so many devices, with one of `COMPARED`."""
    model, mesh = ModelConfig.preset(preset), MeshConfig(expert=devices)
    return run_on(model, mesh, name, exchange=COMPARED[kind])


def _compared(
    preset: str, what: str, devices: int, *kinds: str
) -> Iterator[tuple[str, Callable[[], RunConfig]]]:
    for kind in kinds:
        name = f"{what}_{devices}_{kind}"
        yield name, functools.partial(compared, preset, devices, kind, name)


def lending_in_fp8(name: str) -> RunConfig:
    """Returns V2-Lite on 8 devices, which lend its experts in FP8."""
    run = compared("v2_lite", 8, "balanced", name)
    return dataclasses.replace(run, precision="fp8")


IN_FP8 = "v2_lite_8_fp8_balanced"

# Of these, one layer is compiled,
LAYERS: Mapping[str, Callable[[], RunConfig]] = {
    **dict(_compared("v3", "v3_layer", 8, "balanced", "capacity")),
    **dict(_compared("v3", "v3_layer", 16, *COMPARED)),
    **dict(_compared("v3", "v3_layer", 64, *COMPARED)),
}
# and of these the step.
LENDING_STEPS: Mapping[str, Callable[[], RunConfig]] = {
    **dict(_compared("v2_lite", "v2_lite", 8, "balanced", "capacity")),
    IN_FP8: functools.partial(lending_in_fp8, IN_FP8),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """A decoder's step of one size.

    run: says the model and the mesh. form: of the weights, one of
    `jmoe.nn.quantized.FORMS`. rows: sequences that are decoded, in each part of a
    batch. chunk: tokens of a prompt that are read beside them; 0: none.
    """

    run: RunConfig
    form: str
    limits: Limits
    rows: int
    chunk: int = 0

    @property
    def size(self) -> StepSize:
        return StepSize(self.rows, min(self.chunk, 1), self.chunk)

    @property
    def tokens(self) -> int:
        """How many tokens each part of a batch computes."""
        return self.rows * (1 + self.limits.drafts) + self.chunk

    @property
    def positions(self) -> int:
        """How many positions the cache has room for, in each part of a batch."""
        return self.run.mesh.pipe * self.limits.pages * self.limits.page_size


def v3_decoding(name: str, *, drafts: int = 0, chunk: int = 0) -> Decoding:
    """Puts V3's weights in FP8 on 16 H20s, beside a cache of 2**20 positions.

    32 sequences of each of the pipeline's two turns are decoded at once.
    """
    mesh, rows, length = MeshConfig(pipe=2, tensor=8), 32, 8192
    limits = Limits(
        rows=(rows,),
        chunks=(256,),
        max_length=length,
        num_pages=2**20 // (mesh.pipe * Limits.page_size),
        drafts=drafts,
    )
    run = run_on(ModelConfig.preset("v3"), mesh, name, exchange=ExchangeConfig())
    return Decoding(run=run, form="fp8", limits=limits, rows=rows, chunk=chunk)


def _decoders() -> Iterator[tuple[str, Callable[[], Decoding]]]:
    """Yields one token of each sequence, one with a draft, and a prompt's beside it."""
    kinds = {"decode": {}, "decode_draft": {"drafts": 1}, "prefill": {"chunk": 256}}
    for kind, sizes in kinds.items():
        name = f"v3_fp8_tp8_pp2_{kind}"
        yield name, functools.partial(v3_decoding, name, **sizes)


DECODERS: Mapping[str, Callable[[], Decoding]] = dict(_decoders())
