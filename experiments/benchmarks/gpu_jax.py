"""JAX's side of the GPU benchmark: processes that measure contenders when asked."""

import contextlib
import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments.benchmarks import gpu_attention, gpu_products, gpu_shapes
from experiments.benchmarks.gpu_measure import Subject, prepare
from experiments.benchmarks.gpu_timing import (
    Contender,
    Failed,
    Measured,
    Outcome,
    first_line,
)
from experiments.benchmarks.workers import Tasks

Prepared = Callable[[int], Measured]

AHEAD = ("ours", "tokamax")
"""Systems whose programs XLA doesn't time while it compiles them, or hardly."""

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
    cases: Sequence[gpu_shapes.Case], seed: int
) -> dict[Contender, Callable[[], Prepared]]:
    """What prepares each."""
    found = {}
    for case in cases:
        # Contenders of one case are given the same numbers.
        key = jax.random.fold_in(
            jax.random.key(seed), zlib.crc32(case.name.encode()) >> 1
        )
        for subject in subjects(case):
            is_checked = subject.reference is not None
            name = Contender(case.name, subject.operation, subject.system, is_checked)
            found[name] = functools.partial(prepare, subject, key)
    return found


def side(
    cases: Sequence[gpu_shapes.Case], seed: int, rounds: int, share: tuple[int, int]
) -> Tasks:
    """A process that measures a share of them: the i-th of n parts.

    `contenders` lists them, `device` says what JAX computes on, `prepare` compiles
    what doesn't need the GPU for itself, and the others measure.
    """
    # For `tokamax`, which asks for some, and would read the parent's.
    flags.FLAGS.mark_as_parsed()
    found = contenders(cases, seed)
    part, parts = share
    names = list(found)[part * len(found) // parts : (part + 1) * len(found) // parts]
    prepared: dict[Contender, Prepared] = {}

    def prepare_all() -> None:
        for name in names:
            if name.system.startswith(AHEAD):
                with contextlib.suppress(Exception):  # it will be told when measured
                    prepared[name] = found[name]()

    def measure(name: Contender) -> Outcome:
        ready = prepared.pop(name, None)
        return attempt(lambda: (ready or found[name]())(rounds))

    tasks: dict[str, Callable[[], Any]] = {
        str(name): functools.partial(measure, name) for name in names
    }
    return tasks | {
        "contenders": lambda: names,
        "device": device,
        "prepare": prepare_all,
    }


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
