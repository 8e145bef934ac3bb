"""Schedules to test, and a toy model of two kinds of layers to cut for any of them.

Stages have unequal numbers of layers, of one kind or of both.

Shapes: M microbatch, B row of one, D hidden, R row (a layer of a rank), P rank.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.parallel import pipeline
from jmoe.parallel.schedule import SCHEDULES, build

M, B, D, TOKENS = 8, 2, 4, 5
SIZES = (2, 3, 2, 1, 2, 1, 1, 3)  # layers of the stages


def narrow(weights, state, batch, x):
    """Adds nothing to the objective, and measures whole numbers."""
    y = x + jnp.tanh(x @ weights["w"]) * weights["scale"]
    return (y, jnp.float32(0)), (y > state).sum(0)


def wide(weights, state, batch, x):
    h = jnp.sin(x @ weights["up"]) * batch["scale"][:, None]
    return (x + h @ weights["down"], state * (h**2).mean()), {
        "used": jnp.bincount(jnp.argmax(h, -1), length=2 * D),
        "mean": h.mean(),
    }


KINDS = {"narrow": narrow, "wide": wide}


def enter(shared, batch):
    return jnp.cos(shared["table"][batch["tokens"]])


def leave(shared, batch, x):
    logits = x @ shared["table"].T + shared["bias"]
    loss = -jax.nn.log_softmax(logits)[jnp.arange(B), batch["targets"]]
    hits = (logits.argmax(-1) == batch["targets"]).sum()
    return (loss * batch["scale"]).sum(), {"loss": loss.sum(), "hits": hits}


def draw(*shape):
    rng = np.random.default_rng(sum(shape) + len(shape))
    return jnp.asarray(rng.normal(size=shape) / 2, jnp.float32)


SHARED = {"table": draw(TOKENS, D), "bias": draw(TOKENS)}
BATCHES = {
    "tokens": jnp.arange(M * B).reshape(M, B) * 7 % TOKENS,
    "targets": jnp.arange(M * B).reshape(M, B) * 3 % TOKENS,
    "scale": 1 + draw(M, B),
}


class Cut:
    """The toy model for a schedule: how many layers of each kind, and whose they are.

    The first quarter of the stages has narrow layers alone, the next stage one of them
    and wide ones, and the others wide ones.
    """

    def __init__(self, schedule):
        self.schedule = schedule
        bounds = [0, *itertools.accumulate(SIZES[: schedule.num_stages])]
        split_at = bounds[schedule.num_stages // 4] + 1
        self.span = {"narrow": (0, split_at), "wide": (split_at, bounds[-1])}
        self.rows = {
            kind: self._rows(bounds, *span) for kind, span in self.span.items()
        }

    def _rows(self, bounds, begin, end):
        """Each rank's layers, and the first and the number of each that it hosts."""
        layers, start, count = [], [], []
        for rank in range(self.schedule.num_ranks):
            stages = [
                [
                    i - begin
                    for i in range(*bounds[stage : stage + 2])
                    if begin <= i < end
                ]
                for stage, _ in self.schedule.hosted(rank)
            ]
            count.append([len(stage) for stage in stages])
            start.append([0, *itertools.accumulate(count[-1])][:-1])
            layers.append(sum(stages, []))
        room = max(map(len, layers))
        index = [rows + [-1] * (room - len(rows)) for rows in layers]
        return np.array(index), np.array(start), np.array(count)

    @property
    def weights(self):
        narrow, wide = (end - begin for begin, end in self.span.values())
        # Small steps: else so many layers make of a rounding, which is up to the CPU,
        # more than float32's precision.
        down = draw(wide, 2 * D, D) / 4
        return {
            "narrow": {"w": draw(narrow, D, D), "scale": draw(narrow, D)},
            "wide": {"up": draw(wide, D, 2 * D), "down": down},
        }

    @property
    def state(self):
        return {kind: draw(end - begin) for kind, (begin, end) in self.span.items()}

    def groups(self, weights, state, rank):
        found = []
        for kind, (index, start, count) in self.rows.items():
            own = jnp.asarray(index)[rank]
            take = functools.partial(jax.tree.map, lambda x, own=own: x[own])
            parts = take(weights[kind]), take(state[kind])
            found.append(pipeline.LayerGroup(KINDS[kind], *parts, start, count))
        return found

    def to_layers(self, kind, x_PR):
        """What ranks have of their rows, summed by layer; there is none in others."""
        index_PR, _, _ = self.rows[kind]
        begin, end = self.span[kind]
        x_PR = np.asarray(x_PR)
        assert not x_PR[index_PR < 0].any()
        sums = np.zeros((end - begin, *x_PR.shape[2:]), x_PR.dtype)
        np.add.at(sums, index_PR[index_PR >= 0], x_PR[index_PR >= 0])
        return sums


def schedules_of(sizes):
    """A parameter for each schedule and (ranks, microbatches) that it takes."""
    for name, (ranks, microbatches) in itertools.product(SCHEDULES, sizes):
        try:
            schedule = build(name, ranks, microbatches)
        except ValueError:
            continue
        yield pytest.param(schedule, id=f"{name}-{ranks}-{microbatches}")


def arguments(cut):
    return cut.weights, cut.state, SHARED, BATCHES
