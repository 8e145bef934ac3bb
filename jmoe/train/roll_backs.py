"""Going back before a step that spoilt a run, and on without the data that led to it.

As PaLM was trained (arXiv 2204.02311, section 5.1): from a checkpoint before the spike,
leaving out the batches between it and the spike, and the spike's own. The same data
made no spike from another state, so the data alone aren't bad; together with the state
they met, they are. Steps, and with them schedules, count on from the checkpoint.

So a roll-back is one fact: after optimizer step `step`, the data go on behind the batch
of the step that spoilt the run. `roll_backs.jsonl` has it before the run goes on, and a
run that starts again at that checkpoint, or comes to that step from an older one,
leaves out the same data. It ends as if nothing had stopped it, to the bit.
"""

import json
import pathlib
from typing import Any

from jmoe.data import durable
from jmoe.data.loader import Loader
from jmoe.monitor import run_files
from jmoe.parallel import processes
from jmoe.train.guard import Spoilt


class RollBacks:
    """The roll-backs of a run. All processes have one; process 0 writes the file.

    Args:
      most: how many there may be to one step.
    """

    def __init__(self, workdir: pathlib.Path, most: int):
        self._path = workdir / run_files.ROLL_BACKS
        self._most = most
        self._rows: list[dict[str, Any]] = processes.from_first(
            "roll-backs", lambda: list(run_files.read_rows(self._path))
        )

    def count(self, step: int) -> int:
        """Returns how many the path to `step` has."""
        return sum(row["step"] < step for row in self._rows)

    def left_out(self, step: int) -> int:
        """Returns how many sequences the path to `step` leaves out."""
        ranges = (row["sequences"] for row in self._rows if row["step"] < step)
        return sum(end - begin for begin, end in ranges)

    def leave_out(self, step: int, loader: Loader) -> None:
        """Moves the loader behind what is left out after `step`, where it stands."""
        position, end = loader.get_state(), self._end(step)
        if end is not None and end > int(position["sequences"]):
            loader.set_state({**position, "sequences": end})

    def add(self, step: int, loader: Loader, spoilt: Spoilt) -> str:
        """Takes down that the run goes on from `step`; what is to be said of it.

        Args:
          loader: stands where the checkpoint of `step` says.

        Raises:
          FloatingPointError: it is one too many.
        """
        # Of later steps are those of a path that the run has left.
        rows = [row for row in self._rows if row["step"] <= step]
        number = sum(row["step"] == step for row in rows)
        if number >= self._most:
            raise FloatingPointError(
                f"{spoilt.reason} It has gone back to step {step} as often as it may, "
                f"train.max_roll_backs={self._most}."
            )
        begin = self._end(step) or int(loader.get_state()["sequences"])
        row = {
            "step": step,
            "sequences": [begin, spoilt.sequences],
            "spoilt": spoilt.step,
            "reason": spoilt.reason,
        }
        self._rows = [*rows, row]
        if processes.index() == 0:
            text = "".join(json.dumps(row) + "\n" for row in self._rows)
            durable.write_text(self._path, text)
        return (
            f"{spoilt.reason} Back to step {step}, and on without "
            f"{spoilt.sequences - begin:,} sequences, up to those of that step."
        )

    def _end(self, step: int) -> int | None:
        """Returns where the data go on after `step`; None: where they are."""
        ends = [row["sequences"][1] for row in self._rows if row["step"] == step]
        return ends[-1] if ends else None
