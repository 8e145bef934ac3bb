"""What our engine is asked for by the record that vLLM's is made of too.

What has no meaning for ours is refused, before anything is loaded.
"""

import dataclasses

from jmoe.config import MeshConfig, ModelConfig
from jmoe.config.controller import DROP, FP8, SERVING, ControllerConfig
from jmoe.config.model import FLOAT8
from jmoe.config.serve import EngineConfig, ServeConfig
from jmoe.decode import limits as decode_limits
from jmoe.decode.limits import Limits
from jmoe.nn.quantized import check_form
from jmoe.serve import engine_checks

DEADLINE_SECONDS = 600.0


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
    engine_checks.check(model, asked)
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


def controller_of(cfg: EngineConfig) -> ControllerConfig:
    """Returns what may be done about load.

    By default requests that would wait for their whole deadline aren't admitted.
    """
    if cfg.controller is not None:
        return cfg.controller
    return dataclasses.replace(SERVING, wait_seconds=deadline(cfg))


def deadline(cfg: EngineConfig) -> float:
    asked = cfg.deadline_seconds
    return DEADLINE_SECONDS if asked is None else asked
