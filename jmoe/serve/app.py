"""vLLM's own OpenAI server, as a Ray Serve application.

Each replica is an engine with vLLM's HTTP application. Ray's proxies pass requests on
to it, from behind our `front`. Ours too are two things that only all replicas can do
together: `/metrics` shows every replica, and SIGTERM drains: new requests get a 503,
those in flight are finished, then the program ends.
"""
# pyright: reportMissingImports=false

import contextlib
import logging
import os
import signal
import time
import types
from typing import Any

from jmoe.config.serve import ServeConfig
from jmoe.serve import lifecycle, proxy, replicas
from jmoe.serve.front import Access
from jmoe.serve.vllm_engine import VLLMEngine

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported

import ray  # noqa: E402
from ray import serve  # noqa: E402

APP = "jmoe"


class Replica:
    """One engine, and vLLM's HTTP application for it."""

    async def __init__(self, arguments: dict[str, Any]):
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.async_llm import AsyncLLM

        parser = make_arg_parser(FlexibleArgumentParser())
        parser.set_defaults(**arguments)
        self._args = parser.parse_args([])
        engine_args = AsyncEngineArgs.from_cli_args(self._args)
        self._engine = AsyncLLM.from_engine_args(engine_args)

    async def __serve_build_asgi_app__(self) -> Any:
        """Builds the application; Ray Serve calls it once the engine is there."""
        from starlette.routing import Route
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        tasks = await self._engine.get_supported_tasks()
        app = build_app(self._args, tasks, self._engine.model_config)
        await init_app_state(self._engine, app.state, self._args, tasks)
        # What vLLM tells to exit when an engine dies; here check_health is asked.
        app.state.server = types.SimpleNamespace()
        app.router.routes.insert(0, Route("/metrics", self._metrics_of_all))
        self._gate = lifecycle.Gate(app)
        return self._gate

    async def check_health(self) -> None:
        """Raises if it is ill; Ray Serve calls it, and replaces such a replica."""
        await self._engine.check_health()

    async def metrics(self) -> tuple[str, str]:
        """Returns this replica's name and Prometheus page."""
        import prometheus_client
        from vllm.v1.metrics.prometheus import get_prometheus_registry

        page = prometheus_client.generate_latest(get_prometheus_registry())
        return serve.get_replica_context().replica_id.unique_id, page.decode()

    async def drain(self, seconds: float) -> int:
        return await self._gate.close(seconds)

    async def _metrics_of_all(self, request: Any) -> Any:
        from starlette.responses import PlainTextResponse

        from jmoe.serve.metrics import merge

        pages = await serve.get_app_handle(APP).broadcast("metrics").results_async()
        return PlainTextResponse(merge(dict(pages)))

    def __del__(self):
        if hasattr(self, "_engine"):
            self._engine.shutdown()


def serve_until_stopped(
    cfg: ServeConfig, engine: VLLMEngine, device: str, access: Access
) -> None:
    """Starts Ray unless it runs already, serves, and drains at SIGTERM or Ctrl-C.

    Raises:
      ValueError: the port is taken, Ray serves already, or it has too few devices.
      RuntimeError: the engine didn't start.
    """
    lifecycle.bind(cfg).close()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray.init(include_dashboard=False, logging_level="error")
    try:
        _refuse_unfit_cluster(cfg, device)
        _serve(cfg, engine, device, access)
    finally:
        ray.shutdown()


def _serve(cfg: ServeConfig, engine: VLLMEngine, device: str, access: Access) -> None:
    try:
        with lifecycle.stop_signals():
            _start(cfg, engine, device, access)
            signal.pause()
    except lifecycle.Stopped:
        pass
    finally:
        with (
            contextlib.suppress(lifecycle.Stopped),
            lifecycle.stop_signals(),
        ):  # a second doesn't wait
            _stop(cfg)


def _start(cfg: ServeConfig, engine: VLLMEngine, device: str, access: Access) -> None:
    began = time.monotonic()
    serve.start(
        http_options=proxy.http_options(cfg),
        logging_config=replicas.LOGGING,
        controller_options={"runtime_env": {"env_vars": proxy.environment(access)}},
    )
    proxy.refuse_unguarded(cfg)
    options = replicas.deployment_options(cfg, engine, device)
    deployment = serve.deployment(serve.ingress()(Replica), **options)
    try:
        serve.run(deployment.bind(engine.arguments), name=APP, route_prefix="/")
    except RuntimeError as error:
        deployed = serve.status().applications[APP].deployments[Replica.__name__]
        reason = deployed.message.strip().splitlines()[-1]
        raise RuntimeError(f"No replica started: {reason}") from error
    print(
        f"Serving {cfg.name} at {lifecycle.url(cfg)} "
        f"({time.monotonic() - began:.0f} s to start).",
        flush=True,
    )


def _stop(cfg: ServeConfig) -> None:
    application = serve.status().applications.get(APP)
    if application is not None and application.status == "RUNNING":
        print(lifecycle.DRAINS, flush=True)
        handle = serve.get_app_handle(APP)
        cut_off = sum(handle.broadcast("drain", cfg.drain_seconds).results())
        if cut_off:
            print(f"Cut off {cut_off} requests after {cfg.drain_seconds:g} s.")
    serve.shutdown()
    print("Stopped.", flush=True)


def _refuse_unfit_cluster(cfg: ServeConfig, device: str) -> None:
    running = list(serve.status().applications)
    if running:
        raise ValueError(
            f"This Ray serves {', '.join(running)} already. RAY_ADDRESS=local starts "
            "another."
        )
    kind, count = replicas.needed(cfg, device)
    found = ray.cluster_resources().get(kind, 0)
    if found < count:
        raise ValueError(
            f"min_replicas={cfg.min_replicas} of {cfg.engine.num_devices} {kind}s each "
            f"need {count}; Ray has {found:g}."
        )
