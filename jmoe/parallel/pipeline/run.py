"""The scan over ticks, and what a rank does in one of them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.parallel import collectives, reductions
from jmoe.parallel.pipeline import arrays
from jmoe.parallel.pipeline.layers import Layers, Stash
from jmoe.parallel.pipeline.model import Model, Result
from jmoe.parallel.pipeline.table import Instruction, Row, own_rows
from jmoe.parallel.schedule.ticks import SELF, Ticks

AXIS = "pipe"


def train(ticks: Ticks, model: Model, *, recompute: bool = False) -> Result:
    """Runs all microbatches forward and backward.

    Args:
      recompute: keep only the stages' inputs from F to B, which computes what it needs
        again: a third more work, for a fraction of the memory.
    """
    rank = _Rank(model, again=recompute, overlaps=ticks.has("F&BW"))

    def tick(buffers: _Buffers, row: Row):
        buffers, y, d_x = rank.train(buffers, row)
        for_f = _hand_over(buffers.for_f, y, row.for_f)
        for_b = _hand_over(buffers.for_b, d_x, row.for_b)
        return buffers._replace(for_f=for_f, for_b=for_b), None

    rows = own_rows(ticks, model.groups, AXIS)
    return lax.scan(tick, rank.buffers(ticks), rows)[0].result


def evaluate(ticks: Ticks, model: Model) -> Result:
    """Runs all microbatches forward, without gradients.

    The ticks are of forward passes.
    """
    rank = _Rank(model, again=False, overlaps=False)

    def tick(buffers: _Buffers, row: Row):
        buffers, y = rank.evaluate(buffers, row)
        return buffers._replace(for_f=_hand_over(buffers.for_f, y, row.for_f)), None

    rows = own_rows(ticks, model.groups, AXIS)
    return lax.scan(tick, rank.buffers(ticks), rows)[0].result


def _hand_over(inbox: jax.Array, value: jax.Array, slots: dict[int, Any]) -> jax.Array:
    """Returns the inbox with what arrives in this tick.

    Runs one ppermute for each way to others.
    """
    ranks = collectives.axis_size(AXIS)
    for way, slot in slots.items():
        arrived = value
        if way != SELF:
            ring = [(rank, (rank + way) % ranks) for rank in range(ranks)]
            arrived = lax.ppermute(value, AXIS, ring)
        inbox = arrays.put(inbox, arrived, slot)
    return inbox


class _Buffers(NamedTuple):
    """What a rank carries from tick to tick.

    entered: the inputs of stages that are computed again. It and the inboxes have one
    slot more than the schedule uses, for ticks in which there is nothing to store.
    """

    for_f: jax.Array
    for_b: jax.Array
    entered: jax.Array
    shared: Any
    left: Any
    stashes: list[Stash]

    @property
    def result(self) -> Result:
        return Result(
            shared=self.shared,
            groups=[stash.gradients for stash in self.stashes],
            left=self.left,
            measured=[stash.measured for stash in self.stashes],
        )


class _Rank:
    """What one does in a tick."""

    def __init__(self, model: Model, *, again: bool, overlaps: bool):
        self._model, self._again, self._overlaps = model, again, overlaps
        first = jax.eval_shape(lambda: self._microbatch(0))
        self._x = jax.eval_shape(model.enter, model.shared, first)
        _, left = jax.eval_shape(model.leave, model.shared, first, self._x)
        count = jax.tree.leaves(model.microbatches)[0].shape[0]
        self._left = jax.tree.map(
            lambda m: jax.ShapeDtypeStruct((count, *m.shape), m.dtype), left
        )
        self._groups = [
            Layers(group, g, first, self._x, again=again)
            for g, group in enumerate(model.groups)
        ]

    def buffers(self, ticks: Ticks) -> _Buffers:
        """Returns empty buffers, all zeros."""

        def slots(count: int) -> jax.Array:
            return jnp.zeros((count, *self._x.shape), self._x.dtype)

        return _Buffers(
            for_f=slots(ticks.forward_slots + 1),
            for_b=slots(ticks.backward_slots + 1),
            entered=slots(ticks.kept_slots + 1 if self._again else 0),
            shared=arrays.zeros(self._model.shared, jnp.float32),
            left=reductions.nothing(self._left),
            stashes=[layers.stash(ticks) for layers in self._groups],
        )

    def train(
        self, buffers: _Buffers, row: Row
    ) -> tuple[_Buffers, jax.Array, jax.Array]:
        """Runs the tick's passes; returns F's output and B's gradient too."""
        f, b, w = row.f, row.b, row.w
        batch_f, batch_b, batch_w = map(
            self._microbatch, (f.microbatch, b.microbatch, w.microbatch)
        )
        stashes = list(buffers.stashes)
        *before, last = range(len(stashes))
        with jax.named_scope("forward"):
            x = self._enter(buffers, f, batch_f)
            entered = buffers.entered
            if self._again:
                stashes = self._recompute(stashes, entered, b, batch_b)
                entered = arrays.put(entered, x, f.kept)
            for g in before:
                stashes[g], x = self._groups[g].forward(stashes[g], x, 0, f, batch_f)
        with jax.named_scope("backward"):
            buffers, d = self._lose(buffers, b, batch_b)
        layers, pairs, stash = self._groups[last], row.pairs, stashes[last]
        # A loop that never runs would still have its arrays room kept for.
        if self._overlaps:
            stash, x, d = layers.overlap(stash, x, d, pairs, (f, batch_f), (b, batch_b))
        with jax.named_scope("forward"):
            stash, y = layers.forward(stash, x, pairs, f, batch_f)
        with jax.named_scope("backward"):
            stashes[last], d = layers.backward(stash, d, pairs, b, batch_b)
            for g in reversed(before):
                stashes[g], d = self._groups[g].backward(stashes[g], d, 0, b, batch_b)
            shared = self._enter_backward(buffers.shared, d, b, batch_b)
        with jax.named_scope("weight"):
            for g, layers in enumerate(self._groups):
                done = pairs if g == last else 0
                stashes[g] = layers.weight(stashes[g], done, w, batch_w)
        return buffers._replace(shared=shared, entered=entered, stashes=stashes), y, d

    def evaluate(self, buffers: _Buffers, row: Row) -> tuple[_Buffers, jax.Array]:
        """Runs the tick's F, and after the last stage the loss; returns F's output."""
        model, stashes = self._model, list(buffers.stashes)
        batch = self._microbatch(row.f.microbatch)
        x = self._enter(buffers, row.f, batch)
        for g, layers in enumerate(self._groups):
            stashes[g], x = layers.evaluate(stashes[g], x, row.f, batch)

        def leave(i, left):
            y = arrays.within(i, x)
            _, found = model.leave(model.shared, batch, y)
            return arrays.put(left, found, row.f.microbatch)

        left = lax.fori_loop(0, row.f.last, leave, buffers.left)
        return buffers._replace(left=left, stashes=stashes), x

    def _microbatch(self, index: Any) -> Any:
        return arrays.pick(self._model.microbatches, index)

    def _enter(self, buffers: _Buffers, f: Instruction, batch: Any) -> jax.Array:
        return lax.cond(
            f.first == 1,
            lambda: self._model.enter(self._model.shared, batch),
            lambda: arrays.pick(buffers.for_f, f.source),
        )

    def _enter_backward(
        self, gradients: Any, d: jax.Array, b: Instruction, batch: Any
    ) -> Any:
        model = self._model

        def add(i, gradients):
            _, pull = jax.vjp(lambda shared: model.enter(shared, batch), model.shared)
            return arrays.add(gradients, *pull(arrays.within(i, d)))

        return lax.fori_loop(0, b.first, add, gradients)

    def _recompute(
        self, stashes: list[Stash], entered: jax.Array, b: Instruction, batch: Any
    ) -> list[Stash]:
        x, found = arrays.pick(entered, b.kept), []
        for stash, layers in zip(stashes, self._groups, strict=True):
            stash, x = layers.recompute(stash, x, b, batch)
            found.append(stash)
        return found

    def _lose(
        self, buffers: _Buffers, b: Instruction, batch: Any
    ) -> tuple[_Buffers, jax.Array]:
        """Returns the gradient that B begins with: at the last, the objective's."""
        model = self._model

        def lose(i, carry):
            _, shared, left = carry
            y = arrays.pick(buffers.for_f, arrays.within(i, b.source))
            total, pull, found = jax.vjp(
                lambda shared, y: model.leave(shared, batch, y),
                model.shared,
                y,
                has_aux=True,
            )
            d_shared, d = pull(jnp.ones_like(total))
            left = arrays.put(left, found, b.microbatch)
            return d, arrays.add(shared, d_shared), left

        arrived = arrays.pick(buffers.for_b, b.source)
        carry = (arrived, buffers.shared, buffers.left)
        d, shared, left = lax.fori_loop(0, b.last, lose, carry)
        return buffers._replace(shared=shared, left=left), d
