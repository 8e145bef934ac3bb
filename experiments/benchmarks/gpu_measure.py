"""How one of JAX's contenders is measured in the GPU benchmark.

Inputs are random, made on the GPU from the run's seed, and several sets of them take
turns: a second call finds nothing in the cache. A contender's calls on all sets are one
program, so that the host starts one and the GPU does many.

The result on the first set is compared with the reference's twice: before anything else
has run, when memory holds no earlier result of the same, and after all rounds.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.benchmarks.gpu_timing import WRONG, Measured, time_calls

TILE = (64, 128)  # in which errors are compared: rows and columns
_SETS_BYTES = 2**27  # of inputs at least, twice what the cache holds
_MOST_SETS = 32

# How much of a result's worst tile may be wrong. Products round the result to bfloat16,
# 0.2% of it; tensor cores sum products of e4m3 with 14 bits; attention rounds
# probabilities and their gradients too. One wrong number in a tile is more than 1%.
PRODUCT, FP8_PRODUCT, ATTENTION = 0.008, 0.012, 0.012


class Subject(NamedTuple):
    """A contender's function, what it is given, and what its result is compared with.

    make: random inputs from a key; `function` and `reference` take them.
    reference: in float32, of matrices or stacks of them; None: not compared.
    """

    operation: str
    system: str
    make: Callable[[jax.Array], tuple[Any, ...]]
    function: Callable[..., Any]
    reference: Callable[..., Any] | None = None
    tolerance: float = PRODUCT


def prepare(subject: Subject, key: jax.Array) -> Callable[[int], Measured]:
    """Compiles all it takes; what is returned measures it, in so many rounds."""
    inputs = jax.eval_shape(subject.make, key)
    count = num_sets(subject)
    make = jax.jit(subject.make).lower(key).compile()
    run = over_sets(subject.function).lower([inputs] * count).compile()
    start_check = checker(subject, inputs)

    def measure(rounds: int) -> Measured:
        sets = [make(k) for k in jax.random.split(key, count)]
        result = jax.block_until_ready(run(sets))
        check = start_check(sets[0])
        errors = [check(result[0])]
        del result
        seconds = time_calls(
            lambda: run(sets), jax.block_until_ready, rounds, calls=count
        )
        errors.append(check(run(sets)[0]))
        if subject.reference is None:
            return Measured(seconds)
        return Measured(seconds, max(errors), subject.tolerance)

    return measure


def num_sets(subject: Subject) -> int:
    """Returns how many sets of inputs there are: too many to stay in the cache."""
    shapes = jax.tree.leaves(jax.eval_shape(subject.make, jax.random.key(0)))
    size = sum(x.size * x.dtype.itemsize for x in shapes)
    return min(max(math.ceil(_SETS_BYTES / size), 2), _MOST_SETS)


def over_sets(function: Callable[..., Any]) -> Callable[[Sequence[Any]], list[Any]]:
    """A jitted function of sets of inputs, the results of each."""
    alone = jax.jit(function)  # so that it is lowered once
    return jax.jit(lambda sets: [alone(*inputs) for inputs in sets])


def checker(
    subject: Subject, shapes: tuple[Any, ...]
) -> Callable[[tuple[Any, ...]], Callable[[Any], float]]:
    """Returns what takes inputs, then a result on them, to the error; compiled here.

    WRONG, if the result isn't finite or is worse.
    """
    if subject.reference is None:
        return lambda inputs: lambda result: 0.0
    reference = jax.jit(subject.reference).lower(*shapes).compile()
    compared = (
        jax.eval_shape(f, *shapes) for f in (subject.function, subject.reference)
    )
    compare = worst_tile.lower(*compared).compile()

    def start(inputs: tuple[Any, ...]) -> Callable[[Any], float]:
        want = reference(*inputs)

        def error(result: Any) -> float:
            worst = float(compare(result, want))
            return worst if worst < WRONG else WRONG

        return error

    return start


@jax.jit
def worst_tile(got: Any, want: Any) -> jax.Array:
    """The largest of all tiles' ||got - want|| / ||want||, of trees of [..., M, N].

    A kernel's mistakes are in some tiles, or rows, and drown in a norm over everything.
    """
    worst = jnp.float32(0)
    for of_got, of_want in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert of_got.shape == of_want.shape
        of_want = of_want.astype(jnp.float32)
        off = _norms(of_got.astype(jnp.float32) - of_want)
        # Where all is zero, so must be the result.
        tiny = jnp.finfo(jnp.float32).tiny
        worst = jnp.maximum(worst, (off / jnp.maximum(_norms(of_want), tiny)).max())
    return worst


def _norms(x: jax.Array) -> jax.Array:
    """Returns the norms of tiles; the last ones are shorter."""
    rows, columns = x.shape[-2:]
    padding = [(0, 0)] * (x.ndim - 2) + [(0, -rows % TILE[0]), (0, -columns % TILE[1])]
    x = jnp.pad(x, padding)
    lead, (rows, columns) = x.shape[:-2], x.shape[-2:]
    tiles = x.reshape(*lead, rows // TILE[0], TILE[0], columns // TILE[1], TILE[1])
    return jnp.sqrt(jnp.square(tiles).sum((-3, -1)))
