"""How fast a run trains."""

import contextlib
import time
from collections.abc import Iterator

import jax


class Meter:
    """Counts tokens, and time without what isn't training.

    Args:
      tokens: that the run was trained on until `step`.
    """

    def __init__(self, step: int, tokens: int):
        self._tokens = tokens
        self._since = (step, tokens, time.perf_counter())
        self._compiling = True

    def add(self, tokens: int) -> None:
        self._tokens += tokens

    def read(self, step: int) -> dict[str, float]:
        """Returns speed since the last reading.

        The first stretch compiles and has none.
        """
        last_step, last_tokens, then = self._since
        now = time.perf_counter()
        self._since = (step, self._tokens, now)
        speed = {
            "tokens_per_second": (self._tokens - last_tokens) / (now - then),
            "step_seconds": (now - then) / (step - last_step),
        }
        known = {} if self._compiling else speed
        self._compiling = False
        return {"tokens": self._tokens, **known}

    @contextlib.contextmanager
    def paused(self, step: jax.Array) -> Iterator[None]:
        """Leaves out the time inside, once the steps under way are done.

        Args:
          step: of the state that these steps lead to; it is waited for.
        """
        jax.block_until_ready(step)
        start = time.perf_counter()
        yield
        last_step, tokens, then = self._since
        self._since = (last_step, tokens, then + time.perf_counter() - start)
