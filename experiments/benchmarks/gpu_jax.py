"""JAX's side of the GPU benchmark: a process that measures contenders when asked."""

import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments.benchmarks import gpu_attention, gpu_products, gpu_shapes
from experiments.benchmarks.gpu_measure import Subject, measure
from experiments.benchmarks.gpu_timing import (
    Contender,
    Failed,
    Measured,
    Outcome,
    first_line,
)
from experiments.benchmarks.workers import Tasks

_SUBJECTS: dict[type, Callable[[Any], Iterator[Subject]]] = {
    gpu_shapes.Ceilings: gpu_products.ceilings,
    gpu_shapes.Dense: gpu_products.dense,
    gpu_shapes.Grouped: gpu_products.grouped,
    gpu_shapes.Attention: gpu_attention.attention,
    gpu_shapes.Decode: gpu_attention.decode,
}


def subjects(case: gpu_shapes.Case) -> Iterator[Subject]:
    """All that JAX does of a case."""
    return _SUBJECTS[type(case)](case)


def contenders(
    cases: Sequence[gpu_shapes.Case], seed: int, rounds: int
) -> dict[Contender, Callable[[], Measured]]:
    """What measures each."""
    found = {}
    for case in cases:
        # Contenders of one case are given the same numbers.
        key = jax.random.fold_in(
            jax.random.key(seed), zlib.crc32(case.name.encode()) >> 1
        )
        for subject in subjects(case):
            is_checked = subject.reference is not None
            name = Contender(case.name, subject.operation, subject.system, is_checked)
            found[name] = functools.partial(measure, subject, key, rounds)
    return found


def side(cases: Sequence[gpu_shapes.Case], seed: int, rounds: int) -> Tasks:
    """`contenders` lists them, `device` says what JAX computes on, others measure."""
    # For `tokamax`, which asks for some, and would read the parent's.
    flags.FLAGS.mark_as_parsed()
    found = contenders(cases, seed, rounds)
    tasks = {str(name): functools.partial(attempt, run) for name, run in found.items()}
    return tasks | {"contenders": lambda: list(found), "device": device}


def device() -> dict[str, Any]:
    """The first one's platform, name and, of a GPU, compute capability."""
    first = jax.devices()[0]
    capability = getattr(first, "compute_capability", None)
    return {
        "platform": first.platform,
        "name": first.device_kind,
        "compute_capability": None if capability is None else str(capability),
    }


def attempt(run: Callable[[], Measured]) -> Outcome:
    """Its result, or why there is none; raises if this process can't go on."""
    try:
        return run()
    except Exception as error:  # whatever another package raises is its result
        outcome = Failed(first_line(error))
        # A kernel that went astray takes all that this process has on the GPU along.
        jax.block_until_ready(jnp.zeros(8) + 1)
        return outcome
