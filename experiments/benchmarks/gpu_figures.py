"""The GPU benchmark's figures: speeds, errors, and what is asked of both.

Ratios are of medians: contenders take their rounds one after another.
"""

from collections.abc import Iterator, Mapping, Sequence

from experiments.benchmarks import gpu_steps
from experiments.benchmarks.gpu_shapes import (
    BOTH_PASSES,
    FORWARD,
    INPUTS,
    WEIGHTS,
    Attention,
    Case,
    Ceilings,
    Decode,
    Dense,
    Grouped,
)
from experiments.benchmarks.gpu_timing import Contender, Measured, Outcome
from experiments.benchmarks.report import Figure

OURS_FP8 = "ours FP8"
DENSE = ("dense XLA", "dense torch")

# A kernel takes some microseconds to start: of fewer bytes, that is what is measured.
_BOUND_FROM_BYTES = 2**27


class Times:
    """Median seconds of a call, by case, operation and system."""

    def __init__(self, outcomes: Mapping[Contender, Outcome]):
        self.by_contender = {
            c: o.median for c, o in outcomes.items() if isinstance(o, Measured)
        }
        self._by_name = {c[:3]: median for c, median in self.by_contender.items()}

    def fastest(self, case: str, operation: str, *systems: str) -> float | None:
        """The least of these systems'; None where none of them has one."""
        names = ((case, operation, system) for system in systems)
        found = [self._by_name[name] for name in names if name in self._by_name]
        return min(found, default=None)

    def ratio(
        self, case: str, operation: str, above: Sequence[str], below: str
    ) -> float | None:
        """The fastest of `above` over `below`; None where one has none."""
        slower = self.fastest(case, operation, *above)
        faster = self.fastest(case, operation, below)
        return None if slower is None or faster is None else slower / faster


def figures(
    outcomes: Mapping[Contender, Outcome], cases: Sequence[Case]
) -> Iterator[Figure]:
    """First what there is to know, then what is asked."""
    times = Times(outcomes)
    by_name = {case.name: case for case in cases}
    ceilings = {
        "matmul": _ceiling(times, by_name, "matmul"),
        "copy": _ceiling(times, by_name, "copy"),
    }
    for contender in times.by_contender:
        if contender.case in by_name:
            yield from _speeds(times, contender, by_name[contender.case], ceilings)
    yield from _step_speeds(times, ceilings["matmul"])
    yield from errors(outcomes)
    for case in cases:
        yield from _asked(times, case, ceilings)
    yield from _steps(times)


def errors(outcomes: Mapping[Contender, Outcome]) -> Iterator[Figure]:
    """Yields the errors of all results that are checked; 1 where there is none."""
    for contender, outcome in outcomes.items():
        if not contender.is_checked:
            continue
        is_measured = isinstance(outcome, Measured)
        error = outcome.error if is_measured else None
        tolerance = outcome.tolerance if is_measured else None
        yield Figure(
            name=f"error of {contender}",
            value=1.0 if error is None else error,
            unit="",
            definition="||result - reference|| / ||reference|| of the worst tile of "
            "64 x 128, before and after the rounds; 1 is the most",
            at_most=0.0 if tolerance is None else tolerance,
        )


def _ceiling(times: Times, cases: Mapping[str, Case], operation: str) -> float | None:
    """Operations or bytes a second of the faster system."""
    case = cases["ceilings"]
    assert isinstance(case, Ceilings)
    seconds = times.fastest(case.name, operation, "XLA", "torch")
    if seconds is None:
        return None
    done = case.moved_bytes() if operation == "copy" else case.flops(operation)
    return done / seconds


def _speeds(
    times: Times,
    contender: Contender,
    case: Case,
    ceilings: Mapping[str, float | None],
) -> Iterator[Figure]:
    """A contender's speed, and the share of the ceiling if it is ours."""
    seconds = times.by_contender[contender]
    is_moving = isinstance(case, Decode) or contender.operation == "copy"
    if is_moving:
        assert isinstance(case, Decode | Ceilings)
        done, unit, scale = case.moved_bytes(), "GB/s", 1e9
    else:
        done, unit, scale = case.flops(contender.operation), "TFLOP/s", 1e12
    yield Figure(
        name=str(contender),
        value=done / seconds / scale,
        unit=unit,
        definition=f"{done:.4g} {'bytes' if is_moving else 'operations'} in "
        f"{seconds * 1e3:.4g} ms",
    )
    if not contender.system.startswith("ours"):
        return
    shares = {"matmul": case.flops(contender.operation)}
    if isinstance(case, Decode):
        shares["copy"] = case.moved_bytes()
    for name, done in shares.items():
        ceiling = ceilings[name]
        if ceiling is not None:
            yield Figure(
                name=f"{contender} / {name} ceiling",
                value=done / seconds / ceiling,
                unit="×",
                definition=f"over {ceiling:.4g} a second, in bfloat16, of this run",
            )


def _asked(
    times: Times, case: Case, ceilings: Mapping[str, float | None]
) -> Iterator[Figure]:
    match case:
        case Dense():
            yield from _dense(times, case)
        case Grouped():
            yield from _grouped(times, case)
        case Attention():
            yield from _attention(times, case)
        case Decode():
            yield from _decode(times, case, ceilings["copy"])


def _dense(times: Times, case: Dense) -> Iterator[Figure]:
    for operation in (FORWARD, WEIGHTS):
        yield from ratio_figure(
            f"{case.name}: {operation}, FP8 / bf16",
            times.ratio(case.name, operation, ("XLA", "torch"), OURS_FP8),
            "time of cuBLAS in bfloat16, the faster of XLA's and torch's, over that of "
            "our FP8 product of quantized operands",
            at_least=1.5,
        )


def _grouped(times: Times, case: Grouped) -> Iterator[Figure]:
    for operation in (FORWARD, INPUTS, WEIGHTS):
        name = f"{case.name}: {operation}"
        yield from ratio_figure(
            f"{name}, grouped / dense",
            times.ratio(case.name, operation, DENSE, "ours"),
            "time of a dense product of as many operations, the faster of XLA's and "
            "torch's, over that of our grouped one in bfloat16",
            at_least=0.8,
        )
        yield from ratio_figure(
            f"{name}, FP8 / bf16",
            times.ratio(case.name, operation, ("ours",), OURS_FP8),
            "time of our grouped product in bfloat16 over that in FP8; operands are "
            "quantized before, but for the weights' gradient",
            at_least=1.5,
        )


def _attention(times: Times, case: Attention) -> Iterator[Figure]:
    others = {
        c.system
        for c in times.by_contender
        if c.case == case.name and not c.system.startswith("ours")
    }
    for operation in (FORWARD, BOTH_PASSES):
        yield from ratio_figure(
            f"{case.name}: {operation}, ours / others",
            times.ratio(case.name, operation, tuple(others), "ours"),
            "time of the fastest other one over ours",
            at_least=1.0,
        )


def _decode(times: Times, case: Decode, copy: float | None) -> Iterator[Figure]:
    seconds = times.fastest(case.name, FORWARD, "ours")
    if seconds is None or copy is None:
        return
    is_asked = case.moved_bytes() >= _BOUND_FROM_BYTES
    yield from ratio_figure(
        f"{case.name}: bandwidth / copy",
        case.moved_bytes() / seconds / copy,
        "the cache's bytes a second over those that a copy reads and writes",
        at_least=0.7 if is_asked else None,
    )


def _step_speeds(times: Times, ceiling: float | None) -> Iterator[Figure]:
    """Yields speeds of training steps, and the share of them that operations need."""
    workload = gpu_steps.workload()
    flops = sum(linear.flops for linear in workload.step_linears())
    flops += workload.attention_flops(causal=True)
    for contender in gpu_steps.SIDES:
        seconds = times.by_contender.get(contender)
        if seconds is None:
            continue
        yield Figure(
            name=str(contender),
            value=workload.tokens / seconds,
            unit="tokens/s",
            definition=f"{workload.tokens} tokens in {seconds:.4g} s; forward, "
            "backward, clipping, AdamW",
        )
        if ceiling is not None:
            yield Figure(
                name=f"{contender} / matmul ceiling",
                value=flops / seconds / ceiling,
                unit="×",
                definition=f"{flops:.4g} operations, none of them done again, at "
                f"{ceiling:.4g} a second",
            )


def _steps(times: Times) -> Iterator[Figure]:
    case, operation, ours, _ = gpu_steps.OURS
    theirs = gpu_steps.EAGER.system, gpu_steps.COMPILED.system
    yield from ratio_figure(
        f"{case}: {operation}, ours / transformers",
        times.ratio(case, operation, theirs, ours),
        "time of transformers' step, the faster one, over ours in bfloat16",
        at_least=2.0,
    )
    yield from ratio_figure(
        f"{case}: {operation}, FP8 / bf16",
        times.ratio(case, operation, (ours,), gpu_steps.OURS_FP8.system),
        "time of our step in bfloat16 over that in FP8",
        at_least=1.2,
    )


def ratio_figure(
    name: str, value: float | None, definition: str, *, at_least: float | None
) -> Iterator[Figure]:
    """None where there is no value, for one of the two wasn't measured."""
    if value is not None:
        yield Figure(
            name=name, value=value, unit="×", definition=definition, at_least=at_least
        )
