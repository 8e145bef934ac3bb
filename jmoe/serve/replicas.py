"""What Ray Serve is asked for: how many replicas, on what, with how much patience."""

from typing import Any

from jmoe.config.serve import ServeConfig
from jmoe.serve.deployed import Deployed

LOGGING = {"log_level": "WARNING", "enable_access_log": False}
QUEUE_FACTOR = 16  # requests that a replica holds, as a multiple of those it computes


def deployment_options(cfg: ServeConfig, deployed: Deployed) -> dict[str, Any]:
    """Returns arguments of `ray.serve.deployment`."""
    options: dict[str, Any] = {
        "logging_config": LOGGING,
        "max_ongoing_requests": QUEUE_FACTOR * cfg.engine.max_sequences,
        "graceful_shutdown_timeout_s": cfg.drain_seconds,
        "health_check_period_s": 5,
        "max_constructor_retry_count": 1,  # what fails to start does so again
        **deployed.resources(cfg.engine.num_devices),
    }
    options["ray_actor_options"]["runtime_env"] = {
        "env_vars": dict(deployed.environment)
    }
    if cfg.max_replicas == cfg.min_replicas:
        options["num_replicas"] = cfg.min_replicas
    else:
        options["autoscaling_config"] = {
            "min_replicas": cfg.min_replicas,
            "max_replicas": cfg.max_replicas,
            "target_ongoing_requests": cfg.requests_per_replica,
        }
    return options


def cores(num_devices: int) -> dict[str, Any]:
    """Returns options of a replica that computes on so many of a machine's cores."""
    return {"ray_actor_options": {"num_cpus": num_devices}}


def gpus(num_devices: int) -> dict[str, Any]:
    """Returns options of a replica whose one process has so many GPUs of a machine."""
    return {"ray_actor_options": {"num_cpus": 1, "num_gpus": num_devices}}


def bundles(num_devices: int) -> dict[str, Any]:
    """Returns options of a replica whose workers are Ray actors, each with a GPU.

    It is a group of bundles, one a GPU, packed on as few machines as hold it.
    """
    first, *others = [{"GPU": 1.0} for _ in range(num_devices)]
    return {
        "ray_actor_options": {"num_cpus": 1},
        "placement_group_bundles": [first | {"CPU": 1.0}, *others],
        "placement_group_strategy": "PACK",
    }
