"""Steps that must not count: without finite gradients, or at a spike of the loss.

The device decides, before a step changes anything (`train.step`). The host reads what
became of a step LAG steps later, when it waits for nothing: it counts, says so, and
ends a run that skips too many in a row. By the policy to roll back, the step and those
after it are taken, and thrown away with the state (`train.roll_backs`).

A spike is a loss whose robust z-score, by median and median absolute deviation of the
WINDOW steps before it, exceeds `train.spike_score`. Losses of the last LAG steps aren't
among these, whether they are known or not, and a checkpoint has the losses: so
processes, and a run that goes on, decide alike.
"""

import collections
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.checkpoint import manifest
from jmoe.config import TrainConfig

LAG = 4
WINDOW = 128
ENOUGH = 32  # losses of which a deviation can be told
_SIGMA = 1.4826  # of a normal distribution, in median absolute deviations
_NAMED = 3


class Spoilt(NamedTuple):
    """The step before which a run must go back, and where its data ended."""

    step: int
    sequences: int
    reason: str


class _Pending(NamedTuple):
    """A step whose outcome isn't known yet: skipped, loss, norm of the gradients."""

    step: int
    sequences: int
    outcome: list[jax.Array]


class Guard:
    """What became of a run's steps.

    Args:
      saved: what `state` returned when the checkpoint was written, if there is any.
      say: shows a line.

    Attributes:
      skipped: steps that weren't taken, in the whole run.
      verdict: why the run must end, or None.
      spoilt: what it must go back from, or None. Later steps don't count.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        saved: Mapping[str, Any] | None,
        say: Callable[[str], None],
    ):
        saved = saved or {}
        self.skipped = saved.get("skipped", 0)
        self.verdict: str | None = None
        self.spoilt: Spoilt | None = None
        self._in_a_row = saved.get("in_a_row", 0)
        # Of the last steps whose loss is known; None: it wasn't finite.
        self._losses = collections.deque(saved.get("losses", ()), WINDOW + LAG)
        self._pending: collections.deque[_Pending] = collections.deque()
        self._cfg = cfg
        self._say = say

    @property
    def goes_on(self) -> bool:
        """Whether the next step may follow on those that are known."""
        return self.verdict is None and self.spoilt is None

    @property
    def state_is_good(self) -> bool:
        """Whether no step has spoilt the state; known of all after `catch_up`."""
        return self.spoilt is None and (self.verdict is None or self._cfg.skips_steps)

    def loss_limit(self) -> np.float32 | None:
        """Returns the loss above which the next step is a spike; None: none is.

        Infinite until ENOUGH losses are known.
        """
        if self._cfg.on_spike == "ignore":
            return None
        count = len(self._losses) - (LAG - len(self._pending))
        used = list(self._losses)[: max(count, 0)][-WINDOW:]
        losses = [loss for loss in used if loss is not None]
        if len(losses) < ENOUGH:
            return np.float32(math.inf)
        median = statistics.median(losses)
        deviation = statistics.median(abs(loss - median) for loss in losses)
        return np.float32(median + self._cfg.spike_score * _SIGMA * deviation)

    def add(self, step: int, measured: Mapping[str, jax.Array], sequences: int) -> None:
        """Takes what step `step` measured, and reads what an older one did.

        Args:
          sequences: the data's position after it.
        """
        outcome = [measured[name] for name in ("skipped", "loss", "grad_norm")]
        self._pending.append(_Pending(step, sequences, outcome))
        if len(self._pending) > LAG:
            self._read_oldest()

    def catch_up(self) -> None:
        """Waits for all steps and reads what became of them."""
        while self._pending:
            self._read_oldest()

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint must have, of JSON's numbers; catches up."""
        self.catch_up()
        return {
            "skipped": self.skipped,
            "in_a_row": self._in_a_row,
            "losses": list(self._losses),
        }

    def _read_oldest(self) -> None:
        pending = self._pending.popleft()
        if self.spoilt is not None:
            return
        is_skipped, loss, grad_norm = map(float, jax.device_get(pending.outcome))
        self._losses.append(loss if math.isfinite(loss) else None)
        if not is_skipped:
            self._in_a_row = 0
            return
        spike = math.isfinite(loss) and math.isfinite(grad_norm)
        what = "the loss is a spike" if spike else "loss or gradients aren't finite"
        figures = f"(loss {loss:.4g}, norm {grad_norm:.4g})"
        field = "on_spike" if spike else "on_nonfinite"
        if getattr(self._cfg, field) == "roll_back" and self.verdict is None:
            reason = f"Step {pending.step}: {what} {figures}."
            self.spoilt = Spoilt(pending.step, pending.sequences, reason)
            return
        self.skipped += 1
        self._in_a_row += 1
        skipped = " skipped" if self._cfg.skips_steps else ""
        text = f"Step {pending.step}{skipped}: {what} {figures}."
        if self._in_a_row == 1:
            self._say(text)
        if getattr(self._cfg, field) == "stop":
            self._stop(f"{text} train.{field}='stop'.")
        elif self._in_a_row >= self._cfg.max_skipped:
            number = f"{self._in_a_row} in a row, train.max_skipped"
            self._stop(f"{text} It is the last of {number}.")

    def _stop(self, verdict: str) -> None:
        self.verdict = self.verdict or verdict
        self._in_a_row = 0  # who goes on all the same has as many again


def require_finite(arrays: Any, where: Any) -> None:
    """Refuses a tree of arrays with numbers that aren't finite.

    Args:
      where: they were read from; named in the error.

    Raises:
      ValueError: names the first such arrays.
    """
    floats = {
        name: x
        for name, x in manifest.flatten(arrays).items()
        if jnp.issubdtype(x.dtype, jnp.floating)
    }
    finite = jax.device_get(jax.jit(_are_finite)(floats))
    broken = [name for name, is_finite in finite.items() if not is_finite]
    if broken:
        raise ValueError(not_finite(where, broken))


def not_finite(where: Any, names: Sequence[str]) -> str:
    """Returns what is said of a checkpoint of which these arrays aren't finite."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (
        f"{where} has NaN or infinite numbers in {', '.join(names[:_NAMED])}{more}; an "
        "older checkpoint may have none."
    )


def _are_finite(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.isfinite(x).all() for name, x in arrays.items()}
