"""Kernels on a Hopper GPU, checked and timed beside the alternatives; training steps.

    python scripts/bench.py --suite=gpu

On one GPU, in one call of under nine minutes:

- what the GPU can do at most: a large product in bfloat16, and a copy;
- our products, attention and decoding, each checked against a float32 reference on
  random inputs, which are new ones in every call, and timed with the alternatives: XLA
  with cuBLAS and cuDNN, `lax.ragged_dot`, `tokamax`, torch;
- training steps of the `small` preset in bfloat16 and FP8, and of transformers' model
  of the same size.

JAX and torch live in processes of their own. First, several of JAX's compile side by
side, which takes most of the time. Then they compute in turn, one contender at a time,
and those that XLA tunes on the GPU are compiled then. One that breaks its process, or
hangs, costs its own result only. Contenders come in order of importance, and none is
started once its time is over; those are listed.
"""

import contextlib
import importlib.util
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any

from rich import markup

from experiments.benchmarks import gpu_figures, gpu_steps
from experiments.benchmarks.gpu_shapes import CASES
from experiments.benchmarks.gpu_side import Side
from experiments.benchmarks.gpu_timing import (
    Clock,
    Contender,
    Failed,
    Measured,
    Outcome,
)
from experiments.benchmarks.report import Report
from experiments.benchmarks.workers import cores
from jmoe.ops.by_platform import HOPPER

SECONDS = 510  # of the whole call
KERNEL_SECONDS = 270  # after which only training steps are started
PREPARE_SECONDS = 150  # that compiling may take
CONTENDER_SECONDS = 60  # that one may take at most: compiling, checking, timing
MOST_PROCESSES = 12  # that compile

OPTIONAL = ("tokamax", "torch", "transformers")

_JAX = "experiments.benchmarks.gpu_jax.side"
_TORCH = "experiments.benchmarks.gpu_torch.side"


def run(rounds: int, say: Callable[[str], None]) -> Report:
    """Measures everything; `say` is told what comes next.

    Raises:
      ValueError: there is no Hopper GPU that JAX could use.
    """
    clock, of_kernels = Clock(SECONDS), Clock(KERNEL_SECONDS)
    seed = secrets.randbelow(2**31)
    options = {"cases": CASES, "seed": seed, "rounds": rounds}
    parts = max(1, min(MOST_PROCESSES, cores() - 2))
    with contextlib.ExitStack() as stack:
        ours = [
            stack.enter_context(Side(_JAX, **options, share=(part, parts)))
            for part in range(parts)
        ]
        device = find_device(ours[0])
        say(f"{device['name']}; inputs are random, from seed {seed}")
        missing = [name for name in OPTIONAL if not importlib.util.find_spec(name)]
        for name in missing:
            say(f"{name} is not installed: nothing is measured against it")
        theirs = stack.enter_context(Side(_TORCH, **options))
        sides = ours if "torch" in missing else [*ours, theirs]
        contenders = find_contenders(sides, say)
        say(f"compiling, in {parts} processes")
        prepare(ours, say)
        outcomes, left_out = measure(contenders, of_kernels, say)
    of_steps: dict[Contender, Outcome] = {}
    kernels: dict[str, Any] = {}
    for steps in (gpu_steps.OF_JAX, gpu_steps.OF_TORCH):
        if clock.left() <= 0:
            left_out += steps
            _tell_left_out(steps, say)
            continue
        started = gpu_steps.start(steps, missing, clock)
        found, their_kernels = gpu_steps.measure(started, rounds, clock, say)
        of_steps, kernels = of_steps | found, kernels | their_kernels
    return make_report(
        outcomes | of_steps,
        settings={
            "device": device,
            "seed": seed,
            "rounds": rounds,
            "not_installed": missing,
            "left_out": list(map(str, left_out)),
            **gpu_steps.settings(),
        },
        kernels=kernels,
    )


def prepare(sides: Sequence[Side], say: Callable[[str], None]) -> None:
    """Lets all of them compile at the same time."""

    def prepare_one(side: Side) -> str | None:
        try:
            side.ask("prepare", PREPARE_SECONDS)
        except RuntimeError as error:  # then each is compiled when it is measured
            return str(error)
        return None

    with futures.ThreadPoolExecutor(len(sides)) as pool:
        for trouble in filter(None, pool.map(prepare_one, sides)):
            say(markup.escape(trouble))


def make_report(
    outcomes: Mapping[Contender, Outcome], settings: Any, kernels: Any = None
) -> Report:
    """Figures of what was measured, and the reasons of what was not."""
    failed = {c: o for c, o in outcomes.items() if isinstance(o, Failed)}
    wrong = [f"{c}: {o.reason}" for c, o in failed.items() if c.is_checked] + [
        f"{c}: an error of {o.error:.2g}, and {o.tolerance:g} is allowed"
        for c, o in outcomes.items()
        if isinstance(o, Measured) and not o.is_right
    ]
    return Report(
        suite="gpu",
        compared=("jax-cuda13-plugin", *OPTIONAL),
        settings=settings,
        figures=list(gpu_figures.figures(outcomes, CASES)),
        samples={
            "seconds": {
                str(c): o.seconds
                for c, o in outcomes.items()
                if isinstance(o, Measured)
            },
            "failed": {str(c): o.reason for c, o in failed.items()},
            "kernels of a step: name, milliseconds, launches": kernels or {},
        },
        wrong=tuple(wrong),
    )


def find_device(ours: Side) -> Mapping[str, Any]:
    """What JAX computes on.

    Raises:
      ValueError: it isn't a Hopper GPU, or JAX can't start.
    """
    try:
        device = ours.ask("device")
    except RuntimeError as error:
        raise ValueError(
            "suite='gpu' needs a Hopper GPU, and JAX can't start here: its own message "
            "is above."
        ) from error
    check_device(device)
    return device


def check_device(device: Mapping[str, Any]) -> None:
    """Refuses, with ValueError, all but Hopper GPUs: kernels are compiled for those."""
    found = f"{device['name']} ({device['platform']})"
    if device["platform"] not in ("gpu", "cuda"):
        raise ValueError(
            f"suite='gpu' needs a Hopper GPU; JAX computes on {found} here. If there "
            "is one, pip install -e '.[gpu]' brings what JAX needs for it."
        )
    if device["compute_capability"] != HOPPER:
        raise ValueError(
            f"suite='gpu' needs a Hopper GPU, of compute capability {HOPPER}; {found} "
            f"has {device['compute_capability']}."
        )


def find_contenders(
    sides: Sequence[Side], say: Callable[[str], None]
) -> list[tuple[Contender, Side]]:
    """All of them, in the order of CASES, and who is to be asked."""
    found: list[tuple[Contender, Side]] = []
    for side in sides:
        try:
            found += [(contender, side) for contender in side.ask("contenders")]
        except RuntimeError as error:  # a package that is installed, and broken
            say(f"Nothing is measured there: {markup.escape(str(error))}")
    order = {case.name: i for i, case in enumerate(CASES)}
    return sorted(found, key=lambda pair: order[pair[0].case])


def measure(
    contenders: Sequence[tuple[Contender, Side]],
    clock: Clock,
    say: Callable[[str], None],
) -> tuple[dict[Contender, Outcome], list[Contender]]:
    """What each of them has shown, and those that were left out, for time was over."""
    outcomes: dict[Contender, Outcome] = {}
    left_out, case = [], None
    last = {side: i for i, (_, side) in enumerate(contenders)}
    for i, (contender, side) in enumerate(contenders):
        if clock.left() <= 0:
            left_out.append(contender)
            continue
        if contender.case != case:
            case = contender.case
            say(f"{case} ({clock.left():.0f} s left for kernels)")
        start = time.monotonic()
        try:
            outcomes[contender] = side.ask(str(contender), CONTENDER_SECONDS)
        except RuntimeError as error:
            outcomes[contender] = Failed(str(error))
        _tell(contender, outcomes[contender], time.monotonic() - start, say)
        if last[side] == i:
            side.close()
    _tell_left_out(left_out, say)
    return outcomes, left_out


def _tell_left_out(contenders: Sequence[Contender], say: Callable[[str], None]) -> None:
    for contender in contenders:
        say(f"left out, for time was over: {contender}")


def _tell(
    contender: Contender, outcome: Outcome, seconds: float, say: Callable[[str], None]
) -> None:
    """One line, so that what is known stays known if the call is cut off."""
    what = f"  {contender.operation}, {contender.system}"
    if isinstance(outcome, Failed):
        say(f"{what}: {markup.escape(outcome.reason)}")
        return
    error = "" if outcome.error is None else f", error {outcome.error:.2g}"
    say(f"{what}: {outcome.median * 1e3:.4g} ms{error} ({seconds:.0f} s)")
