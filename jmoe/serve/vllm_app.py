"""vLLM's engine and its own OpenAI server, as a replica holds them."""
# pyright: reportMissingImports=false

import types
from typing import Any

from jmoe.serve import replicas
from jmoe.serve.deployed import Deployed, RunningEngine
from jmoe.serve.vllm_engine import VLLMEngine


def deployed(engine: VLLMEngine, device: str) -> Deployed:
    """Returns replicas of vLLM, on the device that the installed one was built for.

    On GPUs its workers are Ray actors of their own, on CPUs its own processes.
    """
    kind, resources = "GPU", replicas.bundles
    if device == "cpu":
        kind, resources = "CPU", replicas.cores
    arguments = (engine.arguments,)
    return Deployed(start, arguments, engine.environment, kind, resources)


async def start(arguments: dict[str, Any]) -> RunningEngine:
    """Starts an engine with arguments of vLLM's AsyncEngineArgs."""
    import prometheus_client
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    parser = make_arg_parser(FlexibleArgumentParser())
    parser.set_defaults(**arguments)
    args = parser.parse_args([])
    assert args is not None
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(args))
    tasks = await engine.get_supported_tasks()
    app = build_app(args, tasks, engine.model_config)
    await init_app_state(engine, app.state, args, tasks)
    # What vLLM tells to exit when an engine dies; here check_health is asked.
    app.state.server = types.SimpleNamespace()

    def page() -> bytes:
        return prometheus_client.generate_latest(get_prometheus_registry())

    return RunningEngine(app, engine.check_health, page, engine.shutdown)
