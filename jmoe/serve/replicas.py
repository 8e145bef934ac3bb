"""What Ray Serve is asked for: how many replicas, on what, with how much patience."""

from typing import Any

from jmoe.config.serve import ServeConfig
from jmoe.serve.vllm_engine import VLLMEngine

LOGGING = {"log_level": "WARNING", "enable_access_log": False}
QUEUE_FACTOR = 16  # requests that a replica holds, as a multiple of those it computes


def deployment_options(
    cfg: ServeConfig, engine: VLLMEngine, device: str
) -> dict[str, Any]:
    """Returns arguments of `ray.serve.deployment`.

    On GPUs a replica is a group of bundles, one a GPU, packed on as few machines as
    hold it: vLLM's workers are Ray actors there. On CPUs they are its own processes.
    """
    num_devices = cfg.engine.num_devices
    actor = {"runtime_env": {"env_vars": engine.environment}}
    options: dict[str, Any] = {
        "logging_config": LOGGING,
        "max_ongoing_requests": QUEUE_FACTOR * cfg.engine.max_sequences,
        "graceful_shutdown_timeout_s": cfg.drain_seconds,
        "health_check_period_s": 5,
        "max_constructor_retry_count": 1,  # what fails to start does so again
    }
    if device == "cpu":
        options["ray_actor_options"] = actor | {"num_cpus": num_devices}
    else:
        first, *others = [{"GPU": 1.0} for _ in range(num_devices)]
        options["ray_actor_options"] = actor | {"num_cpus": 1}
        options["placement_group_bundles"] = [first | {"CPU": 1.0}, *others]
        options["placement_group_strategy"] = "PACK"
    if cfg.max_replicas == cfg.min_replicas:
        options["num_replicas"] = cfg.min_replicas
    else:
        options["autoscaling_config"] = {
            "min_replicas": cfg.min_replicas,
            "max_replicas": cfg.max_replicas,
            "target_ongoing_requests": cfg.requests_per_replica,
        }
    return options


def needed(cfg: ServeConfig, device: str) -> tuple[str, int]:
    """Returns the resource, and how much, that Ray must have for the first replicas."""
    kind = "CPU" if device == "cpu" else "GPU"
    return kind, cfg.min_replicas * cfg.engine.num_devices
