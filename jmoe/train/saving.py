"""When a run writes a checkpoint, and what is in it besides the state."""

import math
import pathlib
import time
from collections.abc import Callable

from jmoe.checkpoint.store import Store
from jmoe.config import TrainConfig
from jmoe.data.loader import Loader
from jmoe.parallel import processes
from jmoe.train.guard import Guard
from jmoe.train.state import TrainState

GUARD = "guard"  # its state, beside the data loader's position


def open_store(directory: pathlib.Path, cfg: TrainConfig) -> Store:
    """Returns the store, a context manager, that keeps what `cfg` says."""
    return Store(
        directory,
        keep=cfg.keep_checkpoints,
        keep_best=cfg.keep_best,
        keep_every=cfg.keep_every,
    )


class Saver:
    """Saves every so many steps, and every so many minutes.

    What time it is, process 0 says for all, so that all save at one step.

    Args:
      clock: seconds since some fixed moment.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        store: Store,
        loader: Loader,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._cfg = cfg
        self._store = store
        self._loader = loader
        self._clock = clock
        self._last = clock()

    def is_due(self, step: int) -> bool:
        """Returns whether to save at `step`; all processes ask at the same steps."""
        cfg = self._cfg
        if step % cfg.checkpoint_every == 0 or step == cfg.steps:
            return True
        if cfg.checkpoint_minutes is None or step % cfg.signal_every:
            return False
        wait_s = 60 * cfg.checkpoint_minutes
        return processes.from_first(
            "time to save", lambda: self._clock() - self._last >= wait_s
        )

    def save(
        self, step: int, state: TrainState, watch: Guard, loss: float = math.nan
    ) -> None:
        """Starts to write a checkpoint, but of no state that a step has spoilt.

        Args:
          loss: of an evaluation at `step`; NaN: there was none.
        """
        position = {**self._loader.get_state(), GUARD: watch.state()}
        if watch.state_is_good:
            self._store.save(step, state, position, loss)
        self._last = self._clock()
