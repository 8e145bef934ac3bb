"""What vLLM is asked for, and what it must not be asked for. vLLM isn't needed."""

import dataclasses
import importlib.metadata
import json
import pathlib
import subprocess
import sys

import pytest

from jmoe import families
from jmoe.config import ModelConfig, override
from jmoe.config.serve import ServeConfig
from jmoe.serve import vllm_engine
from jmoe.serve.vllm_engine import Exported, Host, make_engine

CPU = Host("cpu", cores=(0, 1, 2, 3), has_amx=False)
CUDA = Host("cuda", cores=tuple(range(64)), has_amx=True)
TINY = ModelConfig.preset("tiny")


def exported(*assignments: str, is_fp8: bool = False) -> Exported:
    return Exported(pathlib.Path("/m"), override(TINY, assignments), is_fp8)


def asked(host: Host, *assignments: str, model: Exported | None = None):
    cfg = override(ServeConfig(name="m"), assignments)
    return make_engine(model or exported(), cfg, host)


def refused(host: Host, *assignments: str, model: Exported | None = None) -> str:
    with pytest.raises(ValueError) as error:
        asked(host, *assignments, model=model)
    return str(error.value)


def test_on_cpus_it_computes_in_float32_without_the_wrong_rotary_op():
    arguments, environment = asked(CPU)
    assert arguments["dtype"] == "float32" and arguments["enforce_eager"]
    assert "-rotary_embedding" in arguments["compilation_config"]["custom_ops"]
    assert arguments["max_model_len"] == TINY.max_positions
    assert arguments["served_model_name"] == ["m"]
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0,1,2,3"


def test_compiled_on_cpus_no_custom_op_is_left():
    arguments = asked(CPU, "engine.compiled=True").arguments
    assert not arguments["enforce_eager"]
    assert arguments["compilation_config"] == {"custom_ops": ["none"]}


def test_each_rank_on_cpus_has_cores_of_its_own():
    arguments, environment = asked(CPU, "engine.tensor_parallel=2")
    assert arguments["tensor_parallel_size"] == 2
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0,1|2,3"


def test_replicas_that_share_a_machine_share_its_cores():
    environment = asked(CPU, "max_replicas=2").environment
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert environment["OMP_NUM_THREADS"] == "2"


def test_sixteen_gpus_on_two_machines_with_experts_placed_by_load():
    arguments, environment = asked(
        CUDA,
        "engine.tensor_parallel=8",
        "engine.pipeline_parallel=2",
        "engine.expert_parallel=True",
        "engine.placement={'redundant_experts': 32, 'window_steps': 50}",
        model=Exported(pathlib.Path("/v3"), ModelConfig.preset("v3"), True),
    )
    assert arguments["tensor_parallel_size"] == 8
    assert arguments["pipeline_parallel_size"] == 2
    assert arguments["enable_expert_parallel"] and arguments["enable_eplb"]
    assert arguments["eplb_config"] == {
        "window_size": 50,
        "step_interval": 3000,
        "num_redundant_experts": 32,
    }
    assert arguments["distributed_executor_backend"] == "ray"
    assert arguments["dtype"] == "auto" and not arguments["enforce_eager"]
    assert "VLLM_CPU_OMP_THREADS_BIND" not in environment


def test_drafts_are_asked_for_only_when_told():
    assert "speculative_config" not in asked(CPU).arguments
    drafting = asked(CPU, "engine.draft_tokens=1").arguments
    assert drafting["speculative_config"] == {
        "method": "mtp",
        "num_speculative_tokens": 1,
    }


def test_limits_on_answers_hold_in_the_engine_too():
    limited = asked(CUDA, "limits.logprobs=5", "limits.new_tokens=7").arguments
    assert limited["max_logprobs"] == 5
    assert limited["override_generation_config"] == {"max_new_tokens": 7}
    assert "override_generation_config" not in asked(CUDA).arguments


@pytest.mark.parametrize("name, disabled", [("v3", False), ("tiny", True)])
def test_latent_attention_is_for_deepseeks_sizes(name, disabled):
    model = Exported(pathlib.Path("/m"), ModelConfig.preset(name), False)
    _, environment = asked(CUDA, model=model)
    assert environment.get("VLLM_MLA_DISABLE") == ("1" if disabled else None)


def test_no_environment_reaches_for_the_network():
    for host in (CPU, CUDA):
        environment = asked(host).environment
        assert environment["HF_HUB_OFFLINE"] == "1"
        assert environment["VLLM_NO_USAGE_STATS"] == "1"


@pytest.mark.parametrize(
    ("assignments", "reason"),
    [
        (
            ["engine.expert_parallel=True", "engine.tensor_parallel=2"],
            "expert_parallel=True is for GPUs: on CPUs vLLM starts, and then answers",
        ),
        (
            [
                "engine.expert_parallel=True",
                "engine.tensor_parallel=2",
                "engine.placement={}",
            ],
            "placement is for GPUs: vLLM's EPLB moves experts between CUDA devices.",
        ),
        (["engine.pipeline_parallel=2"], "pipeline_parallel=2 is for GPUs: on CPUs"),
        (
            ["engine.tensor_parallel=4"],
            "tensor_parallel=4 must be at most the 2 cores here.",
        ),
    ],
)
def test_cpus_are_refused_what_vllm_gets_wrong_there(assignments, reason):
    assert reason in refused(CPU._replace(cores=(0, 1)), *assignments)
    assert asked(CUDA, *assignments)


@pytest.mark.parametrize(
    ("assignments", "reason"),
    [
        (
            ["attention.nope_dim=40"],
            "nope_dim + rope_dim = 56 is not one of 32, 48, 64, 80,",
        ),
        (["hidden_dim=144"], "hidden_dim=144 must be a multiple of 32"),
    ],
)
def test_sizes_that_vllms_cpu_kernels_lack_are_refused(assignments, reason):
    model = exported(*assignments)
    assert reason in refused(CPU, model=model)
    assert asked(CUDA, model=model)


def test_heads_that_share_keys_need_a_size_of_the_list_and_no_latent_kernels():
    grouped = ("attention.kind=gqa", "attention.num_kv_heads=2")
    model = exported(*grouped, "attention.head_dim=32")
    assert "VLLM_MLA_DISABLE" not in asked(CPU, model=model).environment
    model = exported(*grouped, "attention.head_dim=40")
    assert "head_dim = 40 is not one of 32, 48," in refused(CPU, model=model)


def test_deepseeks_latent_sizes_need_no_head_size_of_the_list():
    model = exported(
        "attention.kv_latent_dim=512", "attention.rope_dim=64", "attention.nope_dim=8"
    )
    assert asked(CPU, model=model).environment.get("VLLM_MLA_DISABLE") is None


def test_block_fp8_needs_amx_on_a_cpu():
    model = exported(is_fp8=True)
    assert "block FP8 needs a GPU or a CPU with AMX" in refused(CPU, model=model)
    assert asked(CPU._replace(has_amx=True), model=model)


@pytest.mark.parametrize(
    ("model", "assignments", "reason"),
    [
        ([], ["engine.tensor_parallel=3"], "must divide the model's num_heads=4."),
        ([], ["engine.pipeline_parallel=5"], "at most the model's num_layers=4."),
        ([], ["engine.expert_parallel=True"], "needs engine.tensor_parallel above"),
        (
            [],
            [
                "engine.expert_parallel=True",
                "engine.tensor_parallel=4",
                "engine.placement={'redundant_experts': 2}",
            ],
            "num_experts=32 and redundant_experts=2 together must divide by",
        ),
        (["mtp_depth=0"], ["engine.draft_tokens=1"], "this one has mtp_depth=0."),
        (["mtp_depth=2"], ["engine.draft_tokens=3"], "multiple of the model's mtp_de"),
        ([], ["engine.max_length=2048"], "at most the model's max_positions=1024."),
        (["attention.value_dim=64"], [], "vLLM would cut values to the length of keys"),
    ],
)
def test_what_no_device_can_do_is_refused_on_each(model, assignments, reason):
    for host in (CPU, CUDA):
        assert reason in refused(host, *assignments, model=exported(*model))


@pytest.fixture
def directory(tmp_path) -> pathlib.Path:
    (tmp_path / "config.json").write_text(json.dumps(families.to_hf(TINY)))
    (tmp_path / "tokenizer.json").touch()
    (tmp_path / "model.safetensors").touch()
    return tmp_path


def test_an_exported_directory_tells_its_model_and_whether_it_is_in_fp8(directory):
    read = vllm_engine.read_exported(directory)
    assert dataclasses.replace(read.model, hf_extras="{}") == TINY
    assert not read.is_fp8
    quantized = families.to_hf(TINY) | {"quantization_config": {"quant_method": "fp8"}}
    (directory / "config.json").write_text(json.dumps(quantized))
    assert vllm_engine.read_exported(directory).is_fp8


def test_a_host_that_others_reach_is_refused_before_anything_starts(directory):
    script = pathlib.Path(__file__).parents[2] / "scripts" / "serve.py"
    command = [sys.executable, script, f"--model={directory}", "--set=host=0.0.0.0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: host='0.0.0.0' is reached by others, so that keys")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_part_of_it_is_named(directory, name):
    (directory / name).unlink()
    missing = name.replace("model.", "*.").replace(".", r"\.").replace("*", r"\*")
    with pytest.raises(FileNotFoundError, match=f"it lacks {missing}. scripts/export"):
        vllm_engine.read_exported(directory)


def test_what_is_no_directory_or_no_json_or_another_architecture_is_named(directory):
    with pytest.raises(FileNotFoundError, match="nowhere' is not a directory."):
        vllm_engine.read_exported(directory / "nowhere")
    (directory / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type='llama' is not a family"):
        vllm_engine.read_exported(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON: "):
        vllm_engine.read_exported(directory)


def test_the_host_is_what_the_installed_vllm_computes_on():
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        with pytest.raises(ModuleNotFoundError, match="make_serving_env.sh DIR makes"):
            vllm_engine.this_host()
    else:
        host = vllm_engine.this_host()
        assert (host.device == "cpu") == version.endswith("+cpu") and host.cores
