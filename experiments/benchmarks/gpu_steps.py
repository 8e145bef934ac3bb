"""Training steps on a GPU: jmoe's in bfloat16 and FP8, and transformers'.

Both sides train the `small` preset without its extra prediction, which transformers
doesn't have, on the same tokens: forward, backward, clipping, AdamW. jmoe keeps float32
weights and moments, as it always does; transformers' model is all bfloat16, which is
its fastest. Its step is taken as it is, and by torch.compile; the faster one counts.

Each is a process that has the GPU to itself, and none starts once time is over.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rich import markup

from experiments.benchmarks.gpu_side import environment
from experiments.benchmarks.gpu_timing import (
    Clock,
    Contender,
    Failed,
    Measured,
    Outcome,
    first_line,
)
from experiments.benchmarks.workers import Worker
from experiments.benchmarks.workload import Workload
from jmoe.config import ModelConfig, override

CHANGES = ("mtp_depth=0", "moe.backend=ragged")
BATCH, LENGTH = 8, 2048
STEPS_A_TURN = 5

_OURS = "experiments.benchmarks.ours.train_step"
_THEIRS = "experiments.benchmarks.theirs.train_step_on_gpu"


class Side(NamedTuple):
    """A function that makes the `step` task, its arguments, and what it needs."""

    function: str
    options: Mapping[str, Any]
    needs: tuple[str, ...] = ()


def _step(system: str) -> Contender:
    return Contender("small", "training step", system)


OURS, OURS_FP8 = _step("ours"), _step("ours FP8")
EAGER, COMPILED = _step("transformers"), _step("transformers, compiled")

_OF_TORCH = ("torch", "transformers")
SIDES = {
    OURS: Side(_OURS, {"precision": "native"}),
    EAGER: Side(_THEIRS, {"kind": "eager"}, _OF_TORCH),
    OURS_FP8: Side(_OURS, {"precision": "fp8"}),
    COMPILED: Side(_THEIRS, {"kind": "compiled"}, _OF_TORCH),
}


def workload() -> Workload:
    """One step's model and tokens."""
    model = override(ModelConfig.preset("small"), list(CHANGES))
    return Workload(model=model, batch=BATCH, length=LENGTH)


def settings() -> dict[str, Any]:
    """Of the steps, for the report."""
    return {"step_model": ["small", *CHANGES], "step_batch": [BATCH, LENGTH]}


def measure(
    rounds: int, clock: Clock, missing: Sequence[str], say: Callable[[str], None]
) -> tuple[dict[Contender, Outcome], list[Contender]]:
    """What each took, and those that were left out, for time was over."""
    outcomes: dict[Contender, Outcome] = {}
    left_out = []
    for contender, side in SIDES.items():
        if lacking := [name for name in side.needs if name in missing]:
            outcomes[contender] = Failed(f"{' and '.join(lacking)} is not installed")
            continue
        if clock.left() <= 0:
            say(f"left out, for time was over: {contender}")
            left_out.append(contender)
            continue
        say(f"{contender} ({clock.left():.0f} s left)")
        try:
            outcomes[contender] = _measure(side, rounds, clock)
        except RuntimeError as error:
            outcomes[contender] = Failed(first_line(error))
            say(f"  {markup.escape(str(error))}")
    return outcomes, left_out


def _measure(side: Side, rounds: int, clock: Clock) -> Measured:
    options = {"workload": workload(), **side.options}
    with Worker(
        side.function, environment=environment(), limit=clock.left(), **options
    ) as worker:
        turns = [
            worker.run("step", STEPS_A_TURN, limit=max(clock.left(), 0))
            for _ in range(rounds)
        ]
    return Measured([statistics.median(turn.seconds) for turn in turns])
