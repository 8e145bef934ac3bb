"""Our own engine as a server's: a run's directory or an exported one, made ready.

What an engine is asked for is the record that vLLM's is made of too; what has no
meaning for ours is refused.
"""

import dataclasses
import functools
import logging
import pathlib
import time
from typing import Any

import jax
import numpy as np

from jmoe import families
from jmoe.balance.controller import Action
from jmoe.checkpoint import workdir as workdirs
from jmoe.checkpoint.retention import Which
from jmoe.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    to_dict,
)
from jmoe.config.controller import DROP, FP8, SERVING, ControllerConfig
from jmoe.config.model import FLOAT8
from jmoe.config.serve import EngineConfig, ServeConfig
from jmoe.decode import followers
from jmoe.decode import limits as decode_limits
from jmoe.decode.engine import Engine, MakePrograms
from jmoe.decode.limits import Limits
from jmoe.decode.on_mesh import make_programs
from jmoe.decode.pilot import MOVED, Pilot
from jmoe.decode.placing import begin_with
from jmoe.decode.programs import OneDevice, make_state
from jmoe.decode.stats import Observe, StepStats, ignore
from jmoe.export import safetensors
from jmoe.export.trained import load_exported
from jmoe.monitor.decisions import Decision
from jmoe.monitor.serving import ServingMeter
from jmoe.nn.model import Transformer
from jmoe.nn.quantized import check_form
from jmoe.parallel import processes
from jmoe.parallel.mesh import make_mesh
from jmoe.parallel.shedding import NO_LIMIT
from jmoe.serve.answering import Served
from jmoe.serve.chat import ChatTemplate, find_template
from jmoe.serve.worker import Worker
from jmoe.train.layout import make_layout, shardings
from jmoe.train.trained import Trained, load_trained, quantized

ROWS = (1, 8, 64, 512)  # of which steps are compiled, up to max_sequences
# A CPU computes what a step has room for at no less cost than what is there.
READING = {"cpu": {"prompts": (1, 2, 4, 8), "prompt_tokens": 512}}
QUEUE = 256
DEADLINE_SECONDS = 600.0
CPU_CACHE_GIB = 1.0
STEPS = "steps"  # what process 0 tells the others of its engine
SHARE_OF_FREE = 0.8  # of a device's memory that the weights leave, for the cache


def read_model(directory: pathlib.Path) -> ModelConfig:
    """Looks at a run, or an exported model, without reading its weights.

    Raises:
      FileNotFoundError: it is neither.
      ValueError: a damaged record, or a model of another kind.
    """
    if _is_exported(directory):
        return families.from_hf(safetensors.read_config(directory))
    if not (directory / workdirs.CONFIG).is_file():
        raise FileNotFoundError(
            f"model={str(directory)!r} holds neither a run nor an exported model: it "
            f"has no {workdirs.CONFIG}."
        )
    return workdirs.read_run(directory).model


def load(directory: pathlib.Path, cfg: EngineConfig, step: Which) -> Trained:
    """Reads weights and tokenizer.

    Raises:
      FileNotFoundError: a part of it is missing.
      ValueError: a file is damaged, or `step` is of a model that has no steps.
    """
    if _is_exported(directory):
        if step is not None:
            raise ValueError(f"step={step!r} is for runs; {directory} is exported.")
        trained = load_exported(directory, dtype=cfg.dtype)
    else:
        trained = load_trained(directory, step=step)
    if cfg.dtype is not None:
        model = dataclasses.replace(trained.run.model, dtype=cfg.dtype)
        run = dataclasses.replace(trained.run, model=model)
        trained = trained._replace(run=run)
    return trained


def serve(trained: Trained, cfg: ServeConfig) -> Served:
    """Returns the model, once its engine's programs are compiled.

    Raises:
      ValueError: sizes that the model or the devices don't have, or a chat template
        that isn't one.
    """
    tokenizer = trained.tokenizer
    source = find_template(tokenizer.files)
    template = None if source is None else ChatTemplate(source, tokenizer)
    model, mesh = trained.run.model, mesh_of(cfg.engine)
    experts = model.moe.router.num_experts
    layers = model.num_moe_layers  # the MTP module's are not counted
    meter = ServingMeter(cfg.name, layers, experts, mesh.expert)
    pilot = Pilot(controller_of(cfg.engine), functools.partial(_tell, meter))

    def observe(stats: StepStats) -> None:
        load_LP = pilot.device_load(stats.count_LE)
        told = {"device_LP": load_LP, "in_fp8": pilot.is_in_fp8}
        meter.step(**stats._asdict(), **told)
        pilot(stats)

    engine = make_engine(trained, cfg, observe)
    pilot.take(engine)
    return Served(
        name=cfg.name,
        worker=Worker(engine, meter),
        meter=meter,
        tokenizer=tokenizer,
        template=template,
        max_length=engine.limits.max_length,
        new_tokens=cfg.limits.new_tokens,
        deadline_seconds=_deadline(cfg.engine),
    )


def controller_of(cfg: EngineConfig) -> ControllerConfig:
    """Returns what may be done about load.

    By default requests that would wait for their whole deadline aren't admitted.
    """
    if cfg.controller is not None:
        return cfg.controller
    return dataclasses.replace(SERVING, wait_seconds=_deadline(cfg))


def _deadline(cfg: EngineConfig) -> float:
    asked = cfg.deadline_seconds
    return DEADLINE_SECONDS if asked is None else asked


def _tell(meter: ServingMeter, action: Action) -> None:
    """Tells people of what was decided, or has come of it."""
    told = action.kind, action.reason, action.change
    logging.getLogger(__name__).info("%s: %s; %s", *told)
    meter.decided(Decision(time.time(), *told))
    if action.kind == MOVED:
        meter.moved(action.value)


def make_engine(
    trained: Trained, cfg: ServeConfig, observe: Observe = ignore
) -> Engine:
    """Returns the engine, with its programs compiled.

    Args:
      observe: is told what each step did.

    Raises:
      ValueError: sizes that the model or the devices don't have.
    """
    model, text = trained.run.model, trained.tokenizer.decode
    variables, programs, limits = _prepare(trained, cfg)
    if processes.count() > 1:
        programs = followers.led(programs, processes.sender(STEPS))
    return Engine(
        model, variables, limits, text=text, programs=programs, observe=observe
    )


def follow(trained: Trained, cfg: ServeConfig) -> None:
    """Runs the steps of process 0's engine in another process, until `release`.

    Raises:
      ValueError: as `make_engine`; or another process has failed.
      ConnectionError: another process has ended.
    """
    variables, programs, limits = _prepare(trained, cfg)
    made = programs(trained.run.model, variables, limits)
    followers.follow(made, limits, lambda: processes.receive(STEPS))


def release() -> None:
    """Lets the processes go that follow this one's engine, which has ended."""
    if processes.count() > 1:
        processes.sender(STEPS)([followers.END])


def _prepare(trained: Trained, cfg: ServeConfig) -> tuple[Any, MakePrograms, Limits]:
    """Returns variables where they are to be, and what runs steps on them.

    The same on all processes.
    """
    asked, model = cfg.engine, trained.run.model
    processes.agree(
        {"engine": to_dict(asked), "model": to_dict(model), "step": trained.step}
    )
    form = asked.weights or "native"
    mesh = mesh_of(asked)
    if mesh.num_devices == 1 and processes.count() == 1:
        trained = quantized(trained, form)
        variables, programs = trained.variables, OneDevice
    else:
        variables, programs = _divided(trained, asked, form)
    cache_bytes = min(processes.exchange("cache", _cache_bytes(asked)))
    return variables, programs, make_limits(model, cfg, cache_bytes)


def check(model: ModelConfig, cfg: ServeConfig) -> None:
    """Refuses what our engine doesn't have, before anything is loaded.

    Raises:
      ValueError: names the field.
    """
    asked = cfg.engine
    check_form(asked.weights or "native")
    if asked.placement is not None:
        raise ValueError(
            "engine.placement is for engine='vllm'; jmoe's own has engine.controller."
        )
    if asked.spare_experts and not asked.expert_parallel:
        raise ValueError(
            f"engine.spare_experts={asked.spare_experts} needs "
            "engine.expert_parallel=True: copies are for experts on several devices."
        )
    experts, devices = model.moe.router.num_experts, mesh_of(asked).expert
    spare = asked.spare_experts or 0
    if (experts + spare) % devices:
        raise ValueError(
            f"engine.spare_experts={spare} and the model's {experts} experts must "
            f"divide over the {devices} devices that share them."
        )
    if asked.compiled is not None:
        raise ValueError(
            f"engine.compiled={asked.compiled} is for engine='vllm': jmoe's own "
            "engine is compiled always."
        )
    if asked.expert_parallel and asked.tensor_parallel == 1:
        raise ValueError(
            "engine.expert_parallel=True needs engine.tensor_parallel above 1: experts "
            "are spread over the devices that share a layer."
        )
    if asked.draft_tokens and not model.mtp_depth:
        raise ValueError(
            f"engine.draft_tokens={asked.draft_tokens} needs a model with MTP modules; "
            "this one has mtp_depth=0."
        )
    _check_controller(model, asked)
    decode_limits.check(model, Limits(max_length=asked.max_length or 2))


def _check_controller(model: ModelConfig, asked: EngineConfig) -> None:
    """Refuses actions that this engine could never take."""
    cfg = controller_of(asked)
    for action, limit in ((DROP, "device_rows"), (FP8, "step_seconds")):
        if action not in cfg.actions:
            continue
        told = f"engine.controller.actions has {action!r}, which"
        if not asked.expert_parallel:
            raise ValueError(
                f"{told} needs engine.expert_parallel=True: it is for experts on "
                "several devices."
            )
        if getattr(cfg, limit) is None:
            raise ValueError(
                f"{told} needs engine.controller.{limit}: without a limit there is "
                "nothing to do about it."
            )
    if FP8 in cfg.actions and model.moe.exchange.dispatch_dtype == FLOAT8:
        raise ValueError(
            "engine.controller.actions has 'fp8', but this model's tokens travel in "
            f"dispatch_dtype={FLOAT8!r} always."
        )


def mesh_of(cfg: EngineConfig) -> MeshConfig:
    """Returns the mesh of an engine.

    The devices that share a layer have a part of each of its matrices. With experts
    spread over them they have whole experts, and sequences of their own.
    """
    shared = "expert" if cfg.expert_parallel else "tensor"
    return MeshConfig(pipe=cfg.pipeline_parallel, **{shared: cfg.tensor_parallel})


def make_limits(model: ModelConfig, cfg: ServeConfig, cache_bytes: float) -> Limits:
    """Returns the sizes of the engine's programs, and of a cache of so many bytes.

    Args:
      cache_bytes: on each device.

    Raises:
      ValueError: the cache has no room for a sequence of `max_length`.
    """
    asked, mesh = cfg.engine, mesh_of(cfg.engine)
    slots = -(-asked.max_sequences // (mesh.batch_parts * mesh.pipe))
    queue = QUEUE if asked.queue is None else asked.queue
    places = slots * mesh.batch_parts * mesh.pipe
    max_length = asked.max_length or model.max_positions
    longest_chunk = min(max_length, Limits.chunks[-1])
    limits = Limits(
        rows=(*(size for size in ROWS if size < slots), slots),
        chunks=(*(x for x in Limits.chunks if x < longest_chunk), longest_chunk),
        max_length=max_length,
        **READING.get(jax.default_backend(), {}),
        drafts=asked.draft_tokens,
        top_logprobs=min(cfg.limits.logprobs, model.vocab_size),
        queue=places + queue,
    )
    size = limits.page_size
    pages = int(cache_bytes / (_page_bytes(model, limits, mesh) * mesh.pipe))
    if asked.max_length is None and 1 <= pages < limits.pages_of_one:
        limits = dataclasses.replace(limits, max_length=pages * size)
    if pages < limits.pages_of_one:
        raise ValueError(
            f"engine.cache_gib={cache_bytes / 2**30:.3g} has room for {pages * size} "
            f"tokens; one sequence may have max_length={limits.max_length}."
        )
    return dataclasses.replace(limits, num_pages=min(pages, limits.pages))


def _page_bytes(model: ModelConfig, limits: Limits, mesh: MeshConfig) -> float:
    """Returns what a page takes of a device's memory, in all of its layers."""
    one = dataclasses.replace(limits, num_pages=limits.pages_of_one)
    layers = -(-model.num_layers // mesh.pipe)
    state = jax.eval_shape(lambda: make_state(model, one, layers, 1))
    leaves = jax.tree.leaves((state.layers, state.mtp))
    return sum(x.size * x.dtype.itemsize for x in leaves) / one.pages


def _cache_bytes(cfg: EngineConfig) -> float:
    """Returns how much of a device the cache may take; its weights are there."""
    if cfg.cache_gib is not None:
        return cfg.cache_gib * 2**30
    stats = jax.local_devices()[0].memory_stats()
    if not stats or "bytes_limit" not in stats:  # a CPU
        return CPU_CACHE_GIB * 2**30
    return SHARE_OF_FREE * (stats["bytes_limit"] - stats["bytes_in_use"])


def _divided(
    trained: Trained, engine: EngineConfig, form: str
) -> tuple[Any, MakePrograms]:
    """Returns the variables on a mesh of all processes' devices, and its programs."""
    model, cfg, devices = trained.run.model, mesh_of(engine), jax.devices()
    asked = "engine.tensor_parallel x engine.pipeline_parallel"
    if cfg.num_devices > len(devices):
        raise ValueError(
            f"{asked} = {cfg.num_devices} devices; there are {len(devices)}."
        )
    count = processes.count()
    if count > 1 and cfg.num_devices < len(devices):
        raise ValueError(
            f"{asked} = {cfg.num_devices} devices must be all {len(devices)} that the "
            f"{count} processes have."
        )
    length = min(256, model.max_positions)
    parts = cfg.batch_parts
    run = RunConfig(
        name="served",
        model=model,
        data=DataConfig(sequence_length=length - length % cfg.tensor),
        train=TrainConfig(steps=1000, batch_size=parts, microbatch_size=parts),
        mesh=cfg,
    )
    mesh = make_mesh(cfg, devices[: cfg.num_devices])
    layout = make_layout(Transformer(model), mesh)
    variables = trained.variables
    divided = jax.tree.map(_spread, variables, shardings(layout, variables))
    more: dict[str, Any] = {}
    if cfg.expert > 1 and count == 1:
        actions = controller_of(engine).actions
        more["placed"] = begin_with(model, cfg.expert, engine.spare_experts or 0)
        more["limit"] = NO_LIMIT if DROP in actions else None
        if FP8 in actions:
            usual = model.moe.exchange.dispatch_dtype
            more["dispatch_dtypes"] = usual, FLOAT8
    return divided, make_programs(run, mesh, form, **more)


def _spread(x: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    """Returns an array that all processes have, in parts on the devices of all."""
    return jax.make_array_from_callback(
        x.shape, sharding, lambda part: np.asarray(x[part]), dtype=x.dtype
    )


def _is_exported(directory: pathlib.Path) -> bool:
    return any(directory.glob("*.safetensors"))
