"""Serves an exported model over an OpenAI-compatible HTTP API.

python scripts/serve.py --model=runs/tiny_hf
python scripts/serve.py --model=runs/tiny_hf --mtp --set max_replicas=4
python scripts/serve.py --model=runs/v3_hf --set engine.tensor_parallel=8 \
    --set engine.pipeline_parallel=2
python scripts/serve.py --model=runs/tiny_hf --set host=0.0.0.0 --set key_file=KEYS

It runs in an environment that scripts/make_serving_env.sh makes, or in any that has
vLLM and Ray. SIGTERM and Ctrl-C finish what is in flight; a second one doesn't wait.
"""

import dataclasses
import os

from absl import app, flags

from jmoe.config import override
from jmoe.config.serve import ServeConfig
from jmoe.serve import keys, vllm_engine
from jmoe.train import runtime

_MODEL = flags.DEFINE_string(
    "model", "runs/tiny_hf", "Directory that scripts/export_hf.py wrote."
)
_ENGINE = flags.DEFINE_enum("engine", "vllm", ["vllm"], "What computes the answers.")
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
    exported = vllm_engine.read_exported(runtime.path(_MODEL))
    cfg = read_config(exported)
    access = keys.read_access(cfg, os.environ)
    try:
        host = vllm_engine.this_host()
        engine = vllm_engine.make_engine(exported, cfg, host)
        from jmoe.serve.app import serve_until_stopped  # needs Ray

        serve_until_stopped(cfg, engine, host.device, access)
    except (ModuleNotFoundError, RuntimeError) as error:  # vLLM's and Ray's
        return runtime.report_mistake(error)
    return 0


def read_config(exported: vllm_engine.Exported) -> ServeConfig:
    """Returns what --set says over the defaults, which depend on the model."""
    cfg = ServeConfig(name=exported.directory.name)
    if _MTP.value:
        draft_tokens = max(exported.model.mtp_depth, 1)
        drafting = dataclasses.replace(cfg.engine, draft_tokens=draft_tokens)
        cfg = dataclasses.replace(cfg, engine=drafting)
    return override(cfg, _SET.value)


start = runtime.command(main)
