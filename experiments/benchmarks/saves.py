"""How long a save holds up training, against a save that is waited for.

A step donates its state, as training does. It is timed alone, and while a checkpoint
is written: then it shares the host's cores with the writer, and on CPUs the memory too,
so that JAX copies what it would have donated.
"""

import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jmoe.checkpoint import pieces
from jmoe.checkpoint.store import Store

_ARRAYS = 32
_SHAPE = (8, 1024, 1024)  # float32: 32 MiB
_ROUNDS = 5


def measure(workdir: pathlib.Path) -> dict[str, float]:
    """Saves a state of 1 GiB below `workdir`; returns medians of five rounds.

    Returns:
      checkpoint_bytes: of all files.
      synchronous_seconds: of a save, until the checkpoint is on the disk.
      stall_seconds: of a save, until training may go on.
      stall_share: these seconds as a share of those.
      step_seconds, step_while_saving_seconds: of a step that rewrites the state.
      check_seconds: of comparing all sums with what the disk holds.
      restore_seconds: of a restore, that included.
    """
    make = jax.jit(lambda key: jax.random.normal(key, _SHAPE))
    state = [make(key) for key in jax.random.split(jax.random.key(0), _ARRAYS)]
    train = jax.jit(lambda x: jax.tree.map(lambda y: y * 0.999, x), donate_argnums=0)
    abstract = jax.eval_shape(lambda: state)
    seconds: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter()
        result = jax.block_until_ready(call(*arguments))
        seconds.setdefault(f"{name}_seconds", []).append(time.perf_counter() - start)
        return result

    with Store(workdir / "saves", keep=1) as store:

        def save_and_wait(step: int) -> None:
            store.save(step, state, {})
            store.wait()

        store.save(0, [jnp.zeros(())], {})  # what Orbax does once
        state = jax.block_until_ready(train(state))
        store.wait()
        for step in range(1, 2 * _ROUNDS, 2):
            timed("synchronous", save_and_wait, step)
            state = timed("step", train, state)
            timed("stall", store.save, step + 1, state, {})
            state = timed("step_while_saving", train, state)
            store.wait()
            stored = pieces.Pieces(store.locate())
            timed("check", stored.check_sums)
            timed("restore", store.restore, abstract)
    figures = {name: statistics.median(times) for name, times in seconds.items()}
    figures["stall_share"] = figures["stall_seconds"] / figures["synchronous_seconds"]
    figures["checkpoint_bytes"] = sum(size for size, _ in stored.files.values())
    return figures
