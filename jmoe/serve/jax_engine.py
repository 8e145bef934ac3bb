"""Our own engine as a server's: a run's directory or an exported one, made ready."""

import dataclasses
import functools
import logging
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax

from jmoe import families
from jmoe.balance.controller import Action
from jmoe.checkpoint import workdir as workdirs
from jmoe.checkpoint.retention import Which
from jmoe.config import (
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    to_dict,
)
from jmoe.config.controller import DROP, FP8
from jmoe.config.model import FLOAT8
from jmoe.config.serve import EngineConfig, ServeConfig
from jmoe.decode import followers, mesh_weights
from jmoe.decode.engine import Engine, MakePrograms
from jmoe.decode.limits import Limits, StepSize
from jmoe.decode.on_mesh import make_programs
from jmoe.decode.pilot import MOVED, Pilot
from jmoe.decode.placing import begin_with
from jmoe.decode.programs import OneDevice
from jmoe.decode.stats import Observe, StepStats, ignore
from jmoe.export import safetensors
from jmoe.export.trained import load_exported, look_at_exported
from jmoe.monitor.decisions import Decision
from jmoe.monitor.serving import ServingMeter
from jmoe.nn.model import Transformer
from jmoe.parallel import processes
from jmoe.parallel.mesh import make_mesh
from jmoe.parallel.shedding import NO_LIMIT
from jmoe.serve import cache_room
from jmoe.serve.answering import Served
from jmoe.serve.chat import ChatTemplate, find_template
from jmoe.serve.jax_config import controller_of, deadline, mesh_of
from jmoe.serve.worker import Worker
from jmoe.train.layout import make_layout
from jmoe.train.trained import Trained, load_trained, look_at_trained, quantized

ROWS = (1, 8, 64, 512)  # of which steps are compiled, up to max_sequences
# A CPU's step takes longer by each token that it has room for, there or not, and no
# less a token where they are many: so there is little room that may stay empty, and for
# few tokens in all, so that others' come sooner. Where 8 are decoded, 128 were read no
# slower than 256; where 32 are, all is 3% slower.
READING = {"cpu": {"prompts": (1, 2, 4, 8), "chunks": (32, 128), "prompt_tokens": 128}}
QUEUE = 256
STEPS = "steps"  # what process 0 tells the others of its engine


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
    """Reads tokenizer and weights, which a mesh will read when it gets them.

    Raises:
      FileNotFoundError: a part of it is missing.
      ValueError: a file is damaged, or `step` is of a model that has no steps.
    """
    alone = _is_alone(cfg)
    if _is_exported(directory):
        if step is not None:
            raise ValueError(f"step={step!r} is for runs; {directory} is exported.")
        read = load_exported if alone else look_at_exported
        trained = read(directory, dtype=cfg.dtype)
    else:
        read = load_trained if alone else look_at_trained
        trained = read(directory, step=step)
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
        deadline_seconds=deadline(cfg.engine),
    )


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
    print(f"Compiling {len(limits.sizes)} sizes of steps.", flush=True)
    return Engine(
        *(model, variables, limits),
        text=text,
        programs=programs,
        observe=observe,
        compiled=_tell_compiled,
    )


def _tell_compiled(size: StepSize, seconds: float) -> None:
    """Tells whoever waits for the start; programs that were kept take less."""
    read = f", {size.prompts} x {size.chunk} tokens read" if size.prompts else ""
    print(f"  {size.rows} decoded{read}: {seconds:.1f} s", flush=True)


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


def _prepare(
    trained: Trained, cfg: ServeConfig
) -> tuple[Any, Callable[..., Any], Limits]:
    """Returns variables, read or not, and what makes of them what runs steps.

    The same on all processes; on several it makes `OnMesh`.
    """
    asked, model = cfg.engine, trained.run.model
    processes.agree(
        {"engine": to_dict(asked), "model": to_dict(model), "step": trained.step}
    )
    form = asked.weights or "native"
    if _is_alone(asked):
        trained, to_come = quantized(trained, form), 0
        programs: Callable[..., Any] = OneDevice
    else:
        programs, to_come = _on_mesh(model, asked, form)
    cache_bytes = min(
        processes.exchange("cache", cache_room.cache_bytes(asked, to_come))
    )
    return trained.variables, programs, make_limits(model, cfg, cache_bytes)


def _is_alone(cfg: EngineConfig) -> bool:
    """Returns whether an engine has one device."""
    return mesh_of(cfg).num_devices == 1 and processes.count() == 1


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
    limits = Limits(
        rows=(*(size for size in ROWS if size < slots), slots),
        max_length=max_length,
        **_reading(asked, max_length),
        drafts=asked.draft_tokens,
        top_logprobs=min(cfg.limits.logprobs, model.vocab_size),
        queue=places + queue,
    )
    size = limits.page_size
    pages = int(cache_bytes / (cache_room.page_bytes(model, limits, mesh) * mesh.pipe))
    if asked.max_length is None and 1 <= pages < limits.pages_of_one:
        limits = dataclasses.replace(limits, max_length=pages * size)
    if pages < limits.pages_of_one:
        raise ValueError(
            f"engine.cache_gib={cache_bytes / 2**30:.3g} has room for {pages * size} "
            f"tokens; one sequence may have max_length={limits.max_length}."
        )
    return dataclasses.replace(limits, num_pages=min(pages, limits.pages))


def _reading(asked: EngineConfig, max_length: int) -> dict[str, Any]:
    """Returns of the limits those of prompts, which are the device's or as asked."""
    sizes: dict[str, Any] = {"chunks": Limits.chunks}
    sizes |= READING.get(jax.default_backend(), {})
    longest = max_length
    if asked.prompt_tokens is not None:
        sizes["prompt_tokens"] = asked.prompt_tokens
        longest = min(longest, asked.prompt_tokens)
    chunks = tuple(size for size in sizes["chunks"] if size <= longest)
    return sizes | {"chunks": chunks or (longest,)}


def _on_mesh(
    model: ModelConfig, engine: EngineConfig, form: str
) -> tuple[MakePrograms, int]:
    """Returns the programs of a mesh of all processes' devices.

    And the bytes of the weights that each device will have.
    """
    cfg, devices = mesh_of(engine), jax.devices()
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
    more: dict[str, Any] = {}
    if cfg.expert > 1:
        actions = controller_of(engine).actions
        more["placed"] = begin_with(model, cfg.expert, engine.spare_experts or 0)
        more["limit"] = NO_LIMIT if DROP in actions else None
        if FP8 in actions:
            usual = model.moe.exchange.dispatch_dtype
            more["dispatch_dtypes"] = usual, FLOAT8
    layout = make_layout(Transformer(model), mesh)
    rows = mesh_weights.cut(model, cfg.pipe, engine.max_length or model.max_positions)
    weights = mesh_weights.abstract(model, layout, rows, form, more.get("placed"))
    bytes_of_each = mesh_weights.device_bytes(weights)
    return make_programs(run, mesh, form, **more), bytes_of_each


def _is_exported(directory: pathlib.Path) -> bool:
    return any(directory.glob("*.safetensors"))
