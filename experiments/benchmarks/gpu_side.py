"""Processes of the GPU benchmark, which outlive what breaks them."""

import os
from typing import Any

from experiments.benchmarks.workers import Worker
from jmoe.config import DataConfig
from jmoe.data import cache
from jmoe.train import runtime

# Memory goes to who asks first: two processes share the GPU.
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}

START_SECONDS = 90  # that a process may take until it can be asked


def environment() -> dict[str, str]:
    """Makes JAX keep what it compiles, where the user chose or the package does.

    Cases that differ in numbers only share programs, and so does the next call. Of a
    product's implementations, XLA takes the fastest of cuBLAS's; it would compile many
    of its own first.
    """
    compiled = cache.directory(DataConfig()) / runtime.COMPILED
    directory, flags = "JAX_COMPILATION_CACHE_DIR", os.environ.get("XLA_FLAGS", "")
    return {
        directory: os.environ.get(directory, str(compiled)),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": f"{flags} --xla_gpu_enable_triton_gemm=false".strip(),
    }


class Side:
    """A worker that is started when asked, and again after it broke."""

    def __init__(self, function: str, **options: Any):
        self._function, self._options = function, options
        self._worker: Worker | None = None

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, task: str, limit: float = START_SECONDS) -> Any:
        """The task's result.

        Raises:
          RuntimeError: the process ended, or took longer than `limit` seconds.
        """
        try:
            if self._worker is None:
                self._worker = Worker(
                    self._function,
                    environment=environment() | SHARED,
                    limit=START_SECONDS,
                    **self._options,
                )
            return self._worker.run(task, limit=limit).result
        except RuntimeError:
            self.close()
            raise

    def close(self) -> None:
        """Ends the process, whose memory is then free."""
        if self._worker is not None:
            self._worker.__exit__()
        self._worker = None
