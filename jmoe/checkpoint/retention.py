"""Which checkpoints of a run stay: the newest, the best, and some for ever."""

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Final, Literal

from jmoe.checkpoint import manifest
from jmoe.checkpoint.manifest import DamagedCheckpointError

BEST: Final = "best"
Which = int | Literal["best"] | None  # a step, the best by validation, the newest

# The validation loss of each checkpoint, by step; None: it wasn't evaluated.
Losses = Mapping[int, float | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retention:
    """How many of the newest, how many of the lowest validation loss, and for ever
    those of steps that `every` divides.
    """

    newest: int = 2
    best: int = 0
    every: int | None = None

    def __post_init__(self):
        if self.newest < 1:
            raise ValueError(f"keep={self.newest} must be at least 1.")

    def surplus(self, losses: Losses) -> list[int]:
        """Returns the steps whose checkpoints nothing keeps, newest first."""
        newest = sorted(losses, reverse=True)
        kept = {*newest[: self.newest], *by_loss(losses)[: self.best]}
        if self.every is not None:
            kept |= {step for step in losses if step % self.every == 0}
        return [step for step in newest if step not in kept]


def parse_which(text: str | None) -> Which:
    """Returns which checkpoint a user's `step` means.

    Raises:
      ValueError: it is neither a step's number nor "best".
    """
    if text is None or text == BEST:
        return text
    if not re.fullmatch("[0-9]{1,18}", text):
        raise ValueError(f"step={text!r} must be a step's number or {BEST!r}.")
    return int(text)


def read_losses(checkpoints: Iterable[pathlib.Path]) -> Losses:
    """Returns the validation losses of those that are whole."""
    losses = {}
    for path in checkpoints:
        try:
            stored = manifest.read(path)
        except DamagedCheckpointError:
            continue
        losses[stored["step"]] = stored.get("validation_loss")
    return losses


def find_best(checkpoints: Iterable[pathlib.Path]) -> int:
    """Returns the step of the best whole one by validation loss.

    Raises:
      FileNotFoundError: none has any.
    """
    best = by_loss(read_losses(checkpoints))
    if not best:
        raise FileNotFoundError(
            f"step={BEST!r}: no whole checkpoint has a validation loss. One has where "
            "train.eval_every and train.checkpoint_every fall on the same step."
        )
    return best[0]


def by_loss(losses: Losses) -> list[int]:
    """Returns the steps that were evaluated, the best first, of equals the earlier."""
    found = [(loss, step) for step, loss in losses.items() if loss is not None]
    return [step for _, step in sorted(found)]
