"""What Ray Serve is asked for. Ray isn't needed."""

from jmoe.config import override
from jmoe.config.serve import ServeConfig
from jmoe.serve import jax_app, vllm_app
from jmoe.serve.replicas import deployment_options
from jmoe.serve.vllm_engine import VLLMEngine

ENGINE = VLLMEngine({}, {"HF_HUB_OFFLINE": "1"})
TWO_MACHINES = ("engine.tensor_parallel=8", "engine.pipeline_parallel=2")


def options(device: str, *assignments: str) -> dict:
    cfg = override(ServeConfig(), assignments)
    return deployment_options(cfg, vllm_app.deployed(ENGINE, device))


def test_a_replica_on_gpus_has_a_bundle_for_each_and_packs_them():
    asked = options("cuda", *TWO_MACHINES)
    bundles = asked["placement_group_bundles"]
    assert [bundle["GPU"] for bundle in bundles] == [1.0] * 16
    assert bundles[0]["CPU"] >= asked["ray_actor_options"]["num_cpus"]
    assert asked["placement_group_strategy"] == "PACK"


def test_a_replica_on_cpus_has_one_for_each_rank_and_no_bundles():
    asked = options("cpu", "engine.tensor_parallel=2")
    assert asked["ray_actor_options"]["num_cpus"] == 2
    assert "placement_group_bundles" not in asked


def test_the_engines_environment_reaches_its_process():
    for device in ("cpu", "cuda"):
        actor = options(device)["ray_actor_options"]
        assert actor["runtime_env"] == {"env_vars": ENGINE.environment}


def test_replicas_are_fixed_in_number_unless_there_is_room_to_grow():
    fixed = options("cpu", "min_replicas=2", "max_replicas=2")
    assert fixed["num_replicas"] == 2 and "autoscaling_config" not in fixed
    growing = options("cpu", "max_replicas=4", "requests_per_replica=8")
    assert "num_replicas" not in growing
    assert growing["autoscaling_config"] == {
        "min_replicas": 1,
        "max_replicas": 4,
        "target_ongoing_requests": 8,
    }


def test_a_replica_that_leaves_may_finish_for_as_long_as_a_drain_lasts():
    assert options("cpu", "drain_seconds=7")["graceful_shutdown_timeout_s"] == 7


def test_our_engine_is_one_process_with_all_of_its_devices(monkeypatch, tmp_path):
    cfg = override(ServeConfig(), ["engine.tensor_parallel=8"])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    on_cpus = deployment_options(cfg, jax_app.deployed(tmp_path, cfg, None))
    assert on_cpus["ray_actor_options"]["num_cpus"] == 8
    variables = on_cpus["ray_actor_options"]["runtime_env"]["env_vars"]
    assert variables["JAX_PLATFORMS"] == "cpu"
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setattr(jax_app, "_CUDA", ("jax",))  # as if there were such a plugin
    on_gpus = deployment_options(cfg, jax_app.deployed(tmp_path, cfg, None))
    assert on_gpus["ray_actor_options"]["num_gpus"] == 8
    assert "placement_group_bundles" not in on_gpus
