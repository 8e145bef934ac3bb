"""Schedules in which all microbatches enter at the first stage, and leave at the last.

Forward passes go out ahead until the pipeline is filled (warm-up), then each waits for
a backward pass, and in the end only backward passes are left.
"""

from collections.abc import Callable

from jmoe.parallel.schedule.tasks import Schedule, Task, one


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """Runs all forward, then all backward, latest first (GPipe, arXiv 1811.06965)."""

    def order(rank: int) -> list[Task]:
        forward = [one("F", rank, i) for i in range(num_microbatches)]
        return forward + [one("BW", rank, i) for i in reversed(range(num_microbatches))]

    return _schedule("gpipe", num_ranks, num_microbatches, order, num_microbatches)


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """Alternates forward and backward: few activations live (arXiv 1806.03377)."""

    def order(rank: int) -> list[Task]:
        forward = [one("F", rank, i) for i in range(num_microbatches)]
        backward = [one("BW", rank, i) for i in range(num_microbatches)]
        return alternate(forward, backward, ahead=num_ranks - rank - 1)

    most = min(num_ranks, num_microbatches)
    return _schedule("1f1b", num_ranks, num_microbatches, order, most)


def zb_h1(num_ranks: int, num_microbatches: int) -> Schedule:
    """Defers W of 1F1B to where ranks would idle (arXiv 2401.10241, section 2.3).

    A rank has as many fewer forward passes ahead as it is further down. By as many it
    delays W, so that all hold as many activations as the first one does in 1F1B.
    """

    def order(rank: int) -> list[Task]:
        forward = [one("F", rank, i) for i in range(num_microbatches)]
        backward = [one("B", rank, i) for i in range(num_microbatches)]
        weight = [one("W", rank, i) for i in range(num_microbatches)]
        tasks, done = [], 0
        for task in alternate(forward, backward, ahead=num_ranks - rank - 1):
            tasks.append(task)
            done += task.kind == "B"
            if task.kind == "B" and done > rank:
                tasks.append(weight[done - rank - 1])
        return tasks + weight[max(done - rank, 0) :]

    most = min(num_ranks, num_microbatches)
    return _schedule("zb_h1", num_ranks, num_microbatches, order, most)


def interleaved_1f1b(
    num_ranks: int, num_microbatches: int, chunks: int = 2
) -> Schedule:
    """Runs 1F1B with several stages a rank (arXiv 2104.04473, section 2.2).

    A microbatch visits all ranks `chunks` times, in smaller steps. A rank takes as many
    microbatches through one of its stages as there are ranks, then through the next.

    Raises:
      ValueError: there are fewer than 2 chunks, or microbatches are no multiple of
        ranks.
    """
    if chunks < 2:
        raise ValueError(f"interleaved_1f1b: chunks={chunks} must be at least 2.")
    if num_microbatches % num_ranks:
        below = num_microbatches // num_ranks * num_ranks
        raise ValueError(
            f"interleaved_1f1b: num_microbatches={num_microbatches} must be a multiple "
            f"of the {num_ranks} ranks, such as {below or num_ranks} or "
            f"{(below or num_ranks) + num_ranks}."
        )

    def order(rank: int) -> list[Task]:
        visits = [
            (chunk, first + i)
            for first in range(0, num_microbatches, num_ranks)
            for chunk in range(chunks)
            for i in range(num_ranks)
        ]
        forward = [one("F", chunk * num_ranks + rank, i) for chunk, i in visits]
        backward = [
            one("BW", (chunks - 1 - chunk) * num_ranks + rank, i) for chunk, i in visits
        ]
        ahead = 2 * (num_ranks - rank - 1) + (chunks - 1) * num_ranks
        return alternate(forward, backward, ahead)

    most = min((chunks + 1) * num_ranks - 1, chunks * num_microbatches)
    return _schedule(
        "interleaved_1f1b", num_ranks, num_microbatches, order, most, chunks
    )


def alternate(forward: list[Task], backward: list[Task], ahead: int) -> list[Task]:
    """Returns `ahead` forward tasks, one and one, then backward tasks that remain."""
    ahead = min(ahead, len(forward))
    pairs = zip(forward[ahead:], backward, strict=False)
    steady = [task for pair in pairs for task in pair]
    return forward[:ahead] + steady + backward[len(forward) - ahead :]


def _schedule(
    name: str,
    num_ranks: int,
    num_microbatches: int,
    order: Callable[[int], list[Task]],
    max_activations: int,
    chunks: int = 1,
) -> Schedule:
    return Schedule(
        name=name,
        num_microbatches=num_microbatches,
        hosts=(tuple(range(num_ranks)) * chunks,),
        tasks=tuple(tuple(order(rank)) for rank in range(num_ranks)),
        max_activations=max_activations,
    )
