"""An engine's OpenAI server as a Ray Serve application, whichever engine it is.

Each replica holds an engine with its HTTP application. Ray's proxies pass requests on
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
from collections.abc import Awaitable, Callable
from typing import Any

from jmoe.config.serve import ServeConfig
from jmoe.monitor import binding
from jmoe.serve import lifecycle, proxy, replicas
from jmoe.serve.deployed import Deployed, RunningEngine
from jmoe.serve.front import Access

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported

import ray  # noqa: E402
from ray import serve  # noqa: E402

APP = "jmoe"


class Replica:
    """One engine, and the HTTP application for it."""

    async def __init__(
        self, start: Callable[..., Awaitable[RunningEngine]], arguments: tuple[Any, ...]
    ):
        """Starts the engine; see `Deployed`."""
        self._engine = await start(*arguments)

    async def __serve_build_asgi_app__(self) -> Any:
        """Builds the application; Ray Serve calls it once the engine is there."""
        from starlette.routing import Route

        app = self._engine.app
        app.router.routes.insert(0, Route("/metrics", self._metrics_of_all))
        self._gate = lifecycle.Gate(app)
        return self._gate

    async def check_health(self) -> None:
        """Raises if it is ill; Ray Serve calls it, and replaces such a replica."""
        await self._engine.check_health()

    async def metrics(self) -> tuple[str, str]:
        """Returns this replica's name and Prometheus page."""
        name = serve.get_replica_context().replica_id.unique_id
        return name, self._engine.page().decode()

    async def drain(self, seconds: float) -> int:
        return await self._gate.close(seconds)

    async def _metrics_of_all(self, request: Any) -> Any:
        from starlette.responses import PlainTextResponse

        from jmoe.serve.metrics import merge

        pages = await serve.get_app_handle(APP).broadcast("metrics").results_async()
        return PlainTextResponse(merge(dict(pages)))

    def __del__(self):
        if hasattr(self, "_engine"):
            self._engine.close()


def serve_until_stopped(cfg: ServeConfig, deployed: Deployed, access: Access) -> None:
    """Starts Ray unless it runs already, serves, and drains at SIGTERM or Ctrl-C.

    Raises:
      ValueError: the port is taken, Ray serves already, or it has too few devices.
      RuntimeError: the engine didn't start.
    """
    binding.bind(cfg.host, cfg.port).close()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray.init(include_dashboard=False, logging_level="error")
    try:
        _refuse_unfit_cluster(cfg, deployed)
        _serve(cfg, deployed, access)
    finally:
        ray.shutdown()


def _serve(cfg: ServeConfig, deployed: Deployed, access: Access) -> None:
    try:
        with lifecycle.stop_signals():
            _start(cfg, deployed, access)
            signal.pause()
    except lifecycle.Stopped:
        pass
    finally:
        with (
            contextlib.suppress(lifecycle.Stopped),
            lifecycle.stop_signals(),
        ):  # a second doesn't wait
            _stop(cfg)


def _start(cfg: ServeConfig, deployed: Deployed, access: Access) -> None:
    began = time.monotonic()
    serve.start(
        http_options=proxy.http_options(cfg),
        logging_config=replicas.LOGGING,
        controller_options={"runtime_env": {"env_vars": proxy.environment(access)}},
    )
    proxy.refuse_unguarded(cfg)
    options = replicas.deployment_options(cfg, deployed)
    deployment = serve.deployment(serve.ingress()(Replica), **options)
    try:
        bound = deployment.bind(deployed.start, deployed.arguments)
        serve.run(bound, name=APP, route_prefix="/")
    except RuntimeError as error:
        status = serve.status().applications[APP].deployments[Replica.__name__]
        reason = status.message.strip().splitlines()[-1]
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


def _refuse_unfit_cluster(cfg: ServeConfig, deployed: Deployed) -> None:
    running = list(serve.status().applications)
    if running:
        raise ValueError(
            f"This Ray serves {', '.join(running)} already. RAY_ADDRESS=local starts "
            "another."
        )
    kind, size = deployed.kind, cfg.engine.num_devices
    count = cfg.min_replicas * size
    found = ray.cluster_resources().get(kind, 0)
    if found < count:
        raise ValueError(
            f"min_replicas={cfg.min_replicas} of {size} {kind}s each need {count}; Ray "
            f"has {found:g}."
        )
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    largest = max(node.get(kind, 0) for node in alive)
    if deployed.resources is not replicas.bundles and largest < size:
        raise ValueError(
            f"A replica is one process, and needs its {size} {kind}s on one machine; "
            f"the largest that Ray has here has {largest:g}."
        )
