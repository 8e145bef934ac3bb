"""Training steps on a GPU: jmoe's in bfloat16 and FP8, and transformers'.

Both sides train the `small` preset without its extra prediction, which transformers
doesn't have, on the same tokens: forward, backward, clipping, AdamW. Neither side
computes activations again. jmoe keeps float32
weights and moments, as it always does; transformers' model is all bfloat16, which is
its fastest. Its step is taken as it is, and by torch.compile; the faster one counts.

Each is a process of its own. Two start side by side, and then take turns.
"""

import contextlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

from rich import markup

from experiments.benchmarks.gpu_side import SHARED, environment
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

CHANGES = ("mtp_depth=0", "moe.backend=ragged", "remat=none")
BATCH, LENGTH = 8, 2048
STEPS_A_TURN = 5
PROFILE_SECONDS = 30

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

OF_JAX, OF_TORCH = (OURS, OURS_FP8), (EAGER, COMPILED)

_NEEDED = ("torch", "transformers")
SIDES = {
    OURS: Side(_OURS, {"precision": "native"}),
    EAGER: Side(_THEIRS, {"kind": "eager"}, _NEEDED),
    OURS_FP8: Side(_OURS, {"precision": "fp8"}),
    COMPILED: Side(_THEIRS, {"kind": "compiled"}, _NEEDED),
}


def workload() -> Workload:
    """One step's model and tokens."""
    model = override(ModelConfig.preset("small"), list(CHANGES))
    return Workload(model=model, batch=BATCH, length=LENGTH)


def settings() -> dict[str, Any]:
    """Returns the steps' settings, for the report."""
    return {"step_model": ["small", *CHANGES], "step_batch": [BATCH, LENGTH]}


def start(
    contenders: Sequence[Contender], missing: Sequence[str], clock: Clock
) -> dict[Contender, Worker | Failed]:
    """Processes that have compiled and taken their first steps, made side by side."""

    def start_one(contender: Contender) -> Worker | Failed:
        side = SIDES[contender]
        if lacking := [name for name in side.needs if name in missing]:
            return Failed(f"{' and '.join(lacking)} is not installed")
        try:
            return Worker(
                side.function,
                environment=environment() | SHARED,
                limit=max(clock.left(), 0),
                workload=workload(),
                **side.options,
            )
        except RuntimeError as error:
            return Failed(first_line(error))

    with futures.ThreadPoolExecutor(len(contenders)) as pool:
        return dict(zip(contenders, pool.map(start_one, contenders), strict=True))


def measure(
    workers: Mapping[Contender, Worker | Failed],
    rounds: int,
    clock: Clock,
    say: Callable[[str], None],
) -> tuple[dict[Contender, Outcome], dict[str, Any]]:
    """What each took, in turns, and what the GPU's time went to; ends the processes."""
    kernels: dict[str, Any] = {}
    outcomes: dict[Contender, Outcome] = {
        name: worker for name, worker in workers.items() if isinstance(worker, Failed)
    }
    turns: dict[Contender, list[float]] = {}
    running = {n: w for n, w in workers.items() if isinstance(w, Worker)}
    for _ in range(rounds):
        for name, worker in running.items():
            if name in outcomes:
                continue
            try:
                turn = worker.run("step", STEPS_A_TURN, limit=max(clock.left(), 0))
            except RuntimeError as error:
                outcomes[name] = Failed(first_line(error))
            else:
                turns.setdefault(name, []).append(statistics.median(turn.seconds))
    for name, worker in running.items():
        if name in OF_JAX and name not in outcomes:
            with contextlib.suppress(RuntimeError):  # there are figures without it
                limit = min(max(clock.left(), 0), PROFILE_SECONDS)
                kernels[str(name)] = worker.run("kernels", limit=limit).result
        worker.__exit__()
        outcomes.setdefault(name, Measured(turns.get(name, [])))
    for name, outcome in outcomes.items():
        told = outcome.reason if isinstance(outcome, Failed) else f"{outcome.median} s"
        say(f"{name}: {markup.escape(told)}")
    return outcomes, kernels
