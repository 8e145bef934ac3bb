"""Our engine and its HTTP application, in this process or as a replica holds them."""

import importlib.util
import logging
import os
import pathlib
import signal

import absl.logging

from jmoe.checkpoint.retention import Which
from jmoe.config.serve import ServeConfig
from jmoe.data import cache
from jmoe.serve import api, jax_engine, replicas
from jmoe.serve.answering import Served
from jmoe.serve.deployed import Deployed, RunningEngine
from jmoe.train import runtime
from jmoe.train.trained import Trained

# Variables of this process by which JAX goes in a replica's, wherever that is.
_PASSED_ON = ("JAX_PLATFORMS", "XLA_FLAGS", "XDG_CACHE_HOME")
_CUDA = ("jax_cuda12_plugin", "jax_cuda13_plugin")


def deployed(directory: pathlib.Path, cfg: ServeConfig, step: Which) -> Deployed:
    """Returns replicas of our engine, each a process with devices of one machine."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    has_plugin = any(importlib.util.find_spec(name) for name in _CUDA)
    kind, resources = "CPU", replicas.cores
    if has_plugin and platforms != "cpu":
        kind, resources = "GPU", replicas.gpus
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    arguments = (str(directory.absolute()), cfg, step)
    return Deployed(start, arguments, environment, kind, resources)


async def start(directory: str, cfg: ServeConfig, step: Which) -> RunningEngine:
    runtime.keep_freed_memory()
    served = make_served(pathlib.Path(directory), cfg, step)

    async def check_health() -> None:
        if not served.worker.is_well:
            raise RuntimeError("The engine has failed, or hangs.")

    app = api.make_app(served)
    return RunningEngine(
        app, check_health, served.meter.prometheus, served.worker.close
    )


def make_served(directory: pathlib.Path, cfg: ServeConfig, step: Which) -> Served:
    """Returns a model that is read and ready; its worker is to be closed.

    Raises:
      FileNotFoundError: a part of it is missing.
      ValueError: it can't be served so.
    """
    return jax_engine.serve(load(directory, cfg, step), cfg)


def follow(directory: pathlib.Path, cfg: ServeConfig, step: Which) -> None:
    """Computes with process 0's engine, as one of several processes, until it ends.

    SIGTERM and Ctrl-C, which a launcher sends to all, are process 0's to heed. A second
    one ends this process.

    Raises:
      ValueError, ConnectionError: as `jax_engine.follow`.
    """

    def leave_it(number, frame):
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave_it)
    jax_engine.follow(load(directory, cfg, step), cfg)


def load(directory: pathlib.Path, cfg: ServeConfig, step: Which) -> Trained:
    """Returns a model that is read, in a process that is set up to serve it.

    From now on its log has what is decided; that of Ray's replicas too, whose processes
    don't begin as absl's programs do.
    """
    absl.logging.use_absl_handler()
    logging.getLogger(jax_engine.__name__).setLevel(logging.INFO)
    runtime.step_after_step()
    runtime.start_jax()
    trained = jax_engine.load(directory, cfg.engine, step)
    runtime.keep_compiled(cache.directory(trained.run.data) / runtime.COMPILED)
    return trained
