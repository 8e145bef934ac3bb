"""What a pipeline schedule is made of: passes, tasks, and a rank's tasks in order.

A model is cut into stages, one after the other. A pass takes one microbatch through one
stage: F forward, B backward to the stage's input, W backward to its weights. Splitting
the backward pass is due to zero bubble schedules (Qi et al., arXiv 2401.10241): the
stage before waits for B and nobody for W.

A task is what a rank does without looking up: one pass, or several as one program. Its
kind is written as in the papers, by the letters of its passes:

    F  B  W     one pass
    BW          a whole backward pass, which is what other papers call B
    F&BW, F&B   a forward pass of one microbatch, overlapped with a backward pass of
                another (DeepSeek-V3, arXiv 2412.19437, section 3.2.1)
"""

import dataclasses
from typing import NamedTuple

KINDS = ("F", "B", "W", "BW", "F&BW", "F&B")


class Pass(NamedTuple):
    """One microbatch through one stage, of the copy that a direction has of it."""

    kind: str  # F, B or W
    stage: int
    microbatch: int  # of all in the batch, whatever its direction
    direction: int = 0  # in which its microbatch travels: an index of Schedule.hosts

    def __str__(self) -> str:
        way = f", direction {self.direction}" if self.direction else ""
        return f"{self.kind} of microbatch {self.microbatch} in stage {self.stage}{way}"


@dataclasses.dataclass(frozen=True)
class Task:
    """Passes that a rank runs as one.

    Raises:
      ValueError: they are none of `KINDS`, or not of the microbatches that those need.
    """

    passes: tuple[Pass, ...]

    def __post_init__(self):
        forward, backward = self.forward, [p for p in self.passes if p.kind != "F"]
        if self.kind not in KINDS:
            raise ValueError(f"A task is one of {', '.join(KINDS)}, not {self.kind!r}.")
        if len({p[1:] for p in backward}) > 1:
            raise ValueError(f"{self}: B and W of a task are of one microbatch.")
        if forward and backward and forward.microbatch == backward[0].microbatch:
            raise ValueError(f"{self}: what overlaps is of two microbatches.")

    @property
    def kind(self) -> str:
        return "".join(p.kind for p in self.passes).replace("FB", "F&B")

    @property
    def forward(self) -> Pass | None:
        return next((p for p in self.passes if p.kind == "F"), None)

    @property
    def backward(self) -> Pass | None:
        return next((p for p in self.passes if p.kind == "B"), None)

    @property
    def weight(self) -> Pass | None:
        return next((p for p in self.passes if p.kind == "W"), None)

    def __str__(self) -> str:
        return " with ".join(map(str, self.passes))


def one(kind: str, stage: int, microbatch: int, direction: int = 0) -> Task:
    """Returns a task of a single microbatch: F, B, W or BW."""
    return Task(tuple(Pass(k, stage, microbatch, direction) for k in kind))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Says who does what, in which order; when, follows from what tasks take.

    Stages may be more than ranks, which then host several. With two directions there
    are two copies of each stage, and microbatches are halved: the first half travels in
    direction 0.
    """

    name: str
    num_microbatches: int
    hosts: tuple[tuple[int, ...], ...]  # hosts[direction][stage] is a rank
    tasks: tuple[tuple[Task, ...], ...]  # of each rank, in order
    max_activations: int  # promised: no rank holds the activations of more F at a time

    @property
    def num_ranks(self) -> int:
        return len(self.tasks)

    @property
    def num_stages(self) -> int:
        return len(self.hosts[0])

    @property
    def num_directions(self) -> int:
        """How many directions there are, and copies of the parameters."""
        return len(self.hosts)

    def microbatches(self, direction: int) -> range:
        """Returns the microbatches that travel in `direction`."""
        each = self.num_microbatches // self.num_directions
        return range(direction * each, (direction + 1) * each)

    def hosted(self, rank: int) -> tuple[tuple[int, int], ...]:
        """Returns the (stage, direction) whose parameters are on `rank`."""
        return tuple(
            (stage, direction)
            for direction, ranks in enumerate(self.hosts)
            for stage, host in enumerate(ranks)
            if host == rank
        )
