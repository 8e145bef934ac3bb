"""Serves a model over an OpenAI-compatible HTTP API.

python scripts/serve.py --model=runs/tiny --engine=jax --local
python scripts/serve.py --model=runs/tiny_hf --engine=jax --local \
    --set engine.weights=fp8
python scripts/serve.py --model=runs/tiny_hf
python scripts/serve.py --model=runs/tiny_hf --mtp --set max_replicas=4
python scripts/serve.py --model=runs/v3_hf --set engine.tensor_parallel=8 \
    --set engine.pipeline_parallel=2
python scripts/serve.py --model=runs/tiny_hf --set host=0.0.0.0 --set key_file=KEYS

jmoe's own engine (--engine=jax) takes the directory of a run or an exported model; with
--local it runs in this process. vLLM takes exported models, and needs an environment
that scripts/make_serving_env.sh makes, or any that has vLLM and Ray. SIGTERM and Ctrl-C
finish what is in flight; a second one doesn't wait.
"""

import asyncio
import dataclasses
import os
import pathlib

from absl import app, flags

from jmoe.checkpoint.retention import parse_which
from jmoe.config import ModelConfig, override
from jmoe.config.serve import ServeConfig
from jmoe.data import cache
from jmoe.serve import keys, lifecycle, vllm_engine
from jmoe.train import runtime

_MODEL = flags.DEFINE_string(
    "model",
    "runs/tiny_hf",
    "Directory that scripts/export_hf.py wrote; for --engine=jax also one of a run.",
)
_ENGINE = flags.DEFINE_enum(
    "engine", "vllm", ["vllm", "jax"], "What computes the answers."
)
_LOCAL = flags.DEFINE_bool(
    "local", False, "Whether --engine=jax runs in this process, without Ray."
)
_STEP = flags.DEFINE_string(
    "step", None, "Of which checkpoint of a run, or best; by default the newest."
)
_MTP = flags.DEFINE_bool(
    "mtp", False, "Whether the model's MTP modules draft tokens for it to verify."
)
_SET = flags.DEFINE_multi_string(
    "set", [], "path.to.field=value of jmoe/config/serve.py; repeatable."
)


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}")
    runtime.log_warnings_only()
    if _ENGINE.value == "jax":
        return serve_own(runtime.path(_MODEL))
    for flag in (_LOCAL, _STEP):
        if flag.value:
            raise ValueError(f"--{flag.name} is for --engine=jax.")
    return serve_vllm(runtime.path(_MODEL))


def serve_vllm(directory: pathlib.Path) -> int:
    exported = vllm_engine.read_exported(directory)
    cfg = read_config(exported.directory.name, exported.model)
    access = keys.read_access(cfg, os.environ)
    try:
        host = vllm_engine.this_host()
        engine = vllm_engine.make_engine(exported, cfg, host)
        from jmoe.serve.app import serve_until_stopped  # needs Ray

        serve_until_stopped(cfg, engine, host.device, access)
    except (ModuleNotFoundError, RuntimeError) as error:  # vLLM's and Ray's
        return runtime.report_mistake(error)
    return 0


def serve_own(directory: pathlib.Path) -> int:
    """Serves by jmoe's engine, in this process."""
    if not _LOCAL.value:
        raise ValueError("--engine=jax needs --local.")
    runtime.keep_freed_memory()
    try:
        from jmoe.serve import api, jax_engine, local
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}; `pip install -e '.[serve-jax]'` has it.") from error
    step = parse_which(_STEP.value)
    model = jax_engine.read_model(directory)
    cfg = read_config(directory.absolute().name, model)
    jax_engine.check(model, cfg)
    access = keys.read_access(cfg, os.environ)
    with lifecycle.bind(cfg) as bound:
        runtime.start_jax()
        trained = jax_engine.load(directory, cfg.engine, step)
        runtime.keep_compiled(cache.directory(trained.run.data) / runtime.COMPILED)
        served = jax_engine.serve(trained, cfg)
        try:
            app_ = api.make_app(served)
            asyncio.run(local.serve_until_signalled(app_, cfg, access, bound))
        finally:
            served.worker.close()
    return 0


def read_config(name: str, model: ModelConfig) -> ServeConfig:
    """Returns what --set says over the defaults, which depend on the model."""
    cfg = ServeConfig(name=name)
    if _MTP.value:
        draft_tokens = max(model.mtp_depth, 1)
        drafting = dataclasses.replace(cfg.engine, draft_tokens=draft_tokens)
        cfg = dataclasses.replace(cfg, engine=drafting)
    return override(cfg, _SET.value)


start = runtime.command(main)
