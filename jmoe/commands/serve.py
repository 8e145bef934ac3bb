"""Serves a model over an OpenAI-compatible HTTP API.

python scripts/serve.py --model=runs/tiny --engine=jax --local
python scripts/serve.py --model=runs/tiny_hf --engine=jax --local \
    --set engine.weights=fp8
python scripts/serve.py --model=runs/tiny_hf
python scripts/serve.py --model=runs/tiny_hf --mtp --set max_replicas=4
python scripts/serve.py --model=runs/v3_hf --set engine.tensor_parallel=8 \
    --set engine.pipeline_parallel=2
python scripts/serve.py --model=runs/tiny_hf --set host=0.0.0.0 --set key_file=KEYS

As several processes, of which each has some of the devices: the same command for each,
with --local and the address of process 0, which serves, such as
--coordinator=10.0.0.1:4321 --num_processes=2 --process_id=0

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
from jmoe.monitor import binding
from jmoe.parallel import processes
from jmoe.serve import keys, vllm_app, vllm_engine
from jmoe.serve.deployed import Deployed
from jmoe.serve.front import Access
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
# Flags, as they differ between the processes of one server.
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, where processes meet."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many processes compute together, with --local."
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which of them this one is, from 0, which serves."
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
        return serve_on_ray(cfg, vllm_app.deployed(engine, host.device), access)
    except ModuleNotFoundError as error:
        return runtime.report_mistake(error)


def serve_own(directory: pathlib.Path) -> int:
    """Serves by jmoe's engine, in this process or in replicas."""
    runtime.keep_freed_memory()
    try:
        from jmoe.serve import api, jax_app, jax_config, jax_engine, local
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}; `pip install -e '.[serve-jax]'` has it.") from error
    step = parse_which(_STEP.value)
    model = jax_engine.read_model(directory)
    cfg = read_config(directory.absolute().name, model)
    jax_config.check(model, cfg)
    access = keys.read_access(cfg, os.environ)
    place = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if not _LOCAL.value:
        if place != (None, None, None):
            raise ValueError("--coordinator and its like need --local.")
        return serve_on_ray(cfg, jax_app.deployed(directory, cfg, step), access)
    with processes.join(*place):
        if processes.index() > 0:
            jax_app.follow(directory, cfg, step)
            return 0
        with binding.bind(cfg.host, cfg.port) as bound:
            served = jax_app.make_served(directory, cfg, step)
            try:
                app_ = api.make_app(served)
                asyncio.run(local.serve_until_signalled(app_, cfg, access, bound))
            finally:
                served.worker.close()
        jax_engine.release()
    return 0


def serve_on_ray(cfg: ServeConfig, deployed: Deployed, access: Access) -> int:
    try:
        from jmoe.serve.app import serve_until_stopped  # needs Ray

        serve_until_stopped(cfg, deployed, access)
    except (ModuleNotFoundError, RuntimeError) as error:  # Ray's, and the engine's
        return runtime.report_mistake(error)
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
