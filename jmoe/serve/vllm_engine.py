"""What vLLM is asked for, from our own record, and what it must not be asked for.

vLLM starts some combinations that then answer wrongly, without a word. They are refused
here, before anything starts, each with its reason. None of this imports vLLM.

On CPUs the rotary custom op is turned off: without YaRN it computes wrong positions.
Attention over the latent itself ("MLA") exists for DeepSeek's own sizes only; for
others vLLM computes keys and values of every head, as transformers does.
"""

import importlib.metadata
import json
import os
import pathlib
from typing import Any, NamedTuple

from jmoe import families
from jmoe.config import MLAConfig, ModelConfig
from jmoe.config.serve import CPU_CACHE_GIB, EngineConfig, ServeConfig
from jmoe.serve import engine_checks

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
LATENT_SIZES = (512, 64)  # kv_latent_dim and rope_dim of vLLM's MLA kernels
CPU_HEAD_DIMS = (32, 48, 64, 80, 96, 112, 128, 160, 192, 256)  # of vLLM's CPU attention
CPU_HIDDEN_MULTIPLE = 32  # of its CPU expert kernel

# Fields of the engine's record that have no meaning for vLLM.
_OF_OURS = (
    "weights",
    "prompt_tokens",
    "queue",
    "deadline_seconds",
    "controller",
    "spare_experts",
)

# The model is a directory: nothing is to be fetched, and nothing is to be reported.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore",
}


class Host(NamedTuple):
    """What an engine runs on: `device` is what the installed vLLM was built for."""

    device: str  # "cpu" or "cuda"
    cores: tuple[int, ...]
    has_amx: bool


class Exported(NamedTuple):
    """A directory in Hugging Face's layout."""

    directory: pathlib.Path
    model: ModelConfig
    is_fp8: bool


class VLLMEngine(NamedTuple):
    """`arguments` of vLLM's AsyncEngineArgs, and its process's environment."""

    arguments: dict[str, Any]
    environment: dict[str, str]


def this_host() -> Host:
    """Returns what there is of this machine.

    Raises:
      ModuleNotFoundError: vLLM isn't installed.
    """
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(
            "engine='vllm' needs vLLM and Ray, which aren't installed here. "
            "scripts/make_serving_env.sh DIR makes an environment with both."
        ) from error
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.is_file() else []
    device = "cpu" if version.endswith("cpu") else "cuda"
    return Host(device, tuple(sorted(os.sched_getaffinity(0))), "amx_tile" in flags)


def read_exported(directory: pathlib.Path) -> Exported:
    """Looks at an exported model without reading its weights.

    Raises:
      FileNotFoundError: a part of it is missing.
      ValueError: a config that isn't JSON, or not of our architecture.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"model={str(directory)!r} is not a directory.")
    missing = [
        pattern
        for pattern in (CONFIG, TOKENIZER, "*.safetensors")
        if not any(directory.glob(pattern))
    ]
    if missing:
        raise FileNotFoundError(
            f"model={str(directory)!r} holds no exported model: it lacks "
            f"{', '.join(missing)}. scripts/export_hf.py writes one from a run."
        )
    try:
        hf = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{directory / CONFIG} is not JSON: {error}.") from error
    quantization = hf.get("quantization_config") or {}
    is_fp8 = quantization.get("quant_method") == "fp8"
    return Exported(directory.resolve(), families.from_hf(hf), is_fp8)


def make_engine(exported: Exported, serving: ServeConfig, host: Host) -> VLLMEngine:
    """Returns what vLLM gets, once everything that it would get wrong is refused.

    Raises:
      ValueError: sizes that don't divide, drafts without an MTP module, and what vLLM
        computes wrongly or not at all on this device.
    """
    cfg = serving.engine
    _refuse_anywhere(exported.model, cfg)
    if host.device == "cpu":
        _refuse_on_cpus(exported, cfg, host)
        special = _cpu_arguments(cfg)
        environment = ENVIRONMENT | _threads(serving, host)
    else:
        special = _cuda_arguments(cfg)
        environment = ENVIRONMENT
    is_latent = isinstance(exported.model.attention, MLAConfig)
    if is_latent and not has_latent_kernels(exported.model):
        environment = environment | {"VLLM_MLA_DISABLE": "1"}
    arguments = {
        "model": str(exported.directory),
        "served_model_name": [serving.name],
        "max_model_len": cfg.max_length or exported.model.max_positions,
        "max_num_seqs": cfg.max_sequences,
        "tensor_parallel_size": cfg.tensor_parallel,
        "pipeline_parallel_size": cfg.pipeline_parallel,
        "enable_expert_parallel": cfg.expert_parallel,
        "max_logprobs": serving.limits.logprobs,
        "seed": 0,
        **special,
    }
    if serving.limits.new_tokens is not None:  # also where a request leaves it open
        bound = {"max_new_tokens": serving.limits.new_tokens}
        arguments["override_generation_config"] = bound
    if cfg.draft_tokens:
        arguments["speculative_config"] = {
            "method": "mtp",
            "num_speculative_tokens": cfg.draft_tokens,
        }
    return VLLMEngine(arguments, environment)


def has_latent_kernels(model: ModelConfig) -> bool:
    cfg = model.attention
    is_latent = isinstance(cfg, MLAConfig)
    return is_latent and (cfg.kv_latent_dim, cfg.rope_dim) == LATENT_SIZES


def _cpu_arguments(cfg: EngineConfig) -> dict[str, Any]:
    eager_ops = ["all", "-rotary_embedding"]
    return {
        "dtype": cfg.dtype or "float32",
        "distributed_executor_backend": "mp",
        "enforce_eager": not cfg.compiled,
        "compilation_config": {"custom_ops": ["none"] if cfg.compiled else eager_ops},
        "kv_cache_memory_bytes": _bytes(cfg.cache_gib or CPU_CACHE_GIB),
    }


def _cuda_arguments(cfg: EngineConfig) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "dtype": cfg.dtype or "auto",
        "distributed_executor_backend": "ray",
        "enforce_eager": cfg.compiled is False,
    }
    if cfg.cache_gib is not None:
        arguments["kv_cache_memory_bytes"] = _bytes(cfg.cache_gib)
    if cfg.placement is not None:
        arguments["enable_eplb"] = True
        arguments["eplb_config"] = {
            "window_size": cfg.placement.window_steps,
            "step_interval": cfg.placement.interval_steps,
            "num_redundant_experts": cfg.placement.redundant_experts,
        }
    return arguments


def _bytes(gib: float) -> int:
    return int(gib * 2**30)


def _threads(serving: ServeConfig, host: Host) -> dict[str, str]:
    """Returns which cores each rank computes on, as in "0,1|2,3".

    By itself vLLM wants a NUMA node for each. Replicas that share a machine share its
    cores out in number only.
    """
    ranks = serving.engine.num_devices * serving.max_replicas
    share = max(len(host.cores) // ranks, 1)
    if serving.max_replicas > 1:
        return {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(share)}
    lists = (host.cores[rank * share : (rank + 1) * share] for rank in range(ranks))
    joined = "|".join(",".join(map(str, cores)) for cores in lists)
    return {"VLLM_CPU_OMP_THREADS_BIND": joined}


def _refuse_anywhere(model: ModelConfig, cfg: EngineConfig) -> None:
    for field in _OF_OURS:
        if (value := getattr(cfg, field)) is not None:
            raise ValueError(f"{field}={value!r} is for --engine=jax.")
    engine_checks.check(model, cfg)
    heads, tensor = model.attention.num_heads, cfg.tensor_parallel
    if heads % tensor:
        raise ValueError(
            f"tensor_parallel={tensor} must divide the model's num_heads={heads}."
        )
    if cfg.pipeline_parallel > model.num_layers:
        raise ValueError(
            f"pipeline_parallel={cfg.pipeline_parallel} must be at most the model's "
            f"num_layers={model.num_layers}."
        )
    spare = cfg.placement.redundant_experts if cfg.placement else 0
    if cfg.expert_parallel and (model.moe.router.num_experts + spare) % tensor:
        raise ValueError(
            f"num_experts={model.moe.router.num_experts} and redundant_experts={spare} "
            f"together must divide by tensor_parallel={tensor}."
        )
    if model.mtp_depth and cfg.draft_tokens % model.mtp_depth:
        raise ValueError(
            f"draft_tokens={cfg.draft_tokens} must be a multiple of the model's "
            f"mtp_depth={model.mtp_depth}."
        )
    value_dim, qk_dim = model.attention.value_dim, model.attention.qk_dim
    if value_dim > qk_dim and not has_latent_kernels(model):
        raise ValueError(
            f"value_dim={value_dim} must be at most nope_dim + rope_dim = {qk_dim}: "
            "vLLM would cut values to the length of keys."
        )


def _refuse_on_cpus(exported: Exported, cfg: EngineConfig, host: Host) -> None:
    model = exported.model
    if cfg.placement is not None:
        raise ValueError(
            "placement is for GPUs: vLLM's EPLB moves experts between CUDA devices."
        )
    if cfg.expert_parallel:
        raise ValueError(
            "expert_parallel=True is for GPUs: on CPUs vLLM starts, and then answers "
            "wrongly or dies. tensor_parallel works."
        )
    if cfg.pipeline_parallel > 1:
        raise ValueError(
            f"pipeline_parallel={cfg.pipeline_parallel} is for GPUs: on CPUs vLLM "
            "starts, and then dies of its first request. tensor_parallel works."
        )
    if exported.is_fp8 and not host.has_amx:
        raise ValueError(
            "A checkpoint in block FP8 needs a GPU or a CPU with AMX, which this one "
            "lacks. Export it in float32 or bfloat16."
        )
    if cfg.num_devices > len(host.cores):
        raise ValueError(
            f"tensor_parallel={cfg.tensor_parallel} must be at most the "
            f"{len(host.cores)} cores here."
        )
    if model.hidden_dim % CPU_HIDDEN_MULTIPLE:
        raise ValueError(
            f"hidden_dim={model.hidden_dim} must be a multiple of "
            f"{CPU_HIDDEN_MULTIPLE} for vLLM's expert kernel on CPUs."
        )
    if not has_latent_kernels(model) and model.attention.qk_dim not in CPU_HEAD_DIMS:
        size, besides = "head_dim", ""
        if isinstance(model.attention, MLAConfig):
            size = "nope_dim + rope_dim"
            besides = "; nor are kv_latent_dim and rope_dim 512 and 64, which it has"
        raise ValueError(
            f"{size} = {model.attention.qk_dim} is not one of "
            f"{', '.join(map(str, CPU_HEAD_DIMS))}, which vLLM's attention on CPUs has"
            f"{besides}."
        )
