"""Loops over a stage's layers: forward, backward, for the weights, and overlapped.

A loop takes the layers of an instruction from the `begin`th on: forward from a stage's
first layer, backward from its last.

Stages that are computed again (`recompute`) keep nothing of F but its input. What B and
W read of their layers is then stored by B, in the slot for what B owes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jmoe.parallel import reductions
from jmoe.parallel.passes import split
from jmoe.parallel.pipeline import arrays
from jmoe.parallel.pipeline.model import LayerGroup
from jmoe.parallel.pipeline.table import Instruction
from jmoe.parallel.schedule.ticks import Ticks


class Stash(NamedTuple):
    """What a group's loops read and write; kept, owed: [slot, layer in stage, ...]."""

    kept: list[jax.Array]
    owed: list[jax.Array]
    gradients: Any
    measured: Any


class Layers:
    """A group's loops.

    Args:
      index: of the group in an instruction.
      batch, x: a microbatch and a layer's input, or their shapes.
    """

    def __init__(
        self, group: LayerGroup, index: int, batch: Any, x: Any, *, again: bool
    ):
        self._group, self._index, self._again = group, index, again

        def layer(weights, at_hand, x):
            state, batch = at_hand
            return group.layer(weights, state, batch, x)

        weights, state = (
            jax.eval_shape(lambda tree=tree: arrays.pick(tree, 0))
            for tree in (group.weights, group.state)
        )
        _, self._measured = jax.eval_shape(layer, weights, (state, batch), x)
        self._passes = split(layer, weights, (state, batch), x)

    def stash(self, ticks: Ticks) -> Stash:
        """Returns an empty stash, all zeros."""

        def zeros(slots: int, shapes: list[jax.ShapeDtypeStruct]) -> list[jax.Array]:
            lead = (slots, int(self._group.count.max()))
            return [jnp.zeros((*lead, *s.shape), s.dtype) for s in shapes]

        rows = jax.tree.leaves(self._group.weights)[0].shape[0]
        kept_slots = ticks.owed_slots if self._again else ticks.kept_slots
        return Stash(
            kept=zeros(kept_slots, self._passes.kept),
            owed=zeros(ticks.owed_slots, self._passes.owed),
            gradients=arrays.zeros(self._group.weights, jnp.float32),
            measured=reductions.nothing(self._measured, (rows,)),
        )

    def forward(
        self, stash: Stash, x: jax.Array, begin: Any, f: Instruction, batch: Any
    ) -> tuple[Stash, jax.Array]:
        """Runs F: returns the layers' output, with what is kept and measured stored."""

        def body(i, carry):
            stash, x = carry
            return self._forward(stash, x, i, f, batch)

        return lax.fori_loop(begin, f.count_G[self._index], body, (stash, x))

    def recompute(
        self, stash: Stash, x: jax.Array, b: Instruction, batch: Any
    ) -> tuple[Stash, jax.Array]:
        """Runs F again, ahead of B; it has been measured already."""

        def body(i, carry):
            kept, x = carry
            weights, at_hand = self._at(b, i, batch)
            (y, _), _, keeps = self._passes.forward(weights, at_hand, x)
            return arrays.write(kept, keeps, b.owed, i), y

        kept, y = lax.fori_loop(0, b.count_G[self._index], body, (stash.kept, x))
        return stash._replace(kept=kept), y

    def backward(
        self, stash: Stash, d: jax.Array, begin: Any, b: Instruction, batch: Any
    ) -> tuple[Stash, jax.Array]:
        """Runs B: returns the layers' input's gradient, with what is owed stored."""

        def body(i, carry):
            owed, d = carry
            d_x, owes = self._backward(self._read_kept(stash, b, i), d, b, i, batch)
            return arrays.write(owed, owes, b.owed, self._from_last(b, i)), d_x

        owed, d = lax.fori_loop(begin, b.count_G[self._index], body, (stash.owed, d))
        return stash._replace(owed=owed), d

    def weight(self, stash: Stash, begin: Any, w: Instruction, batch: Any) -> Stash:
        """Runs W: adds the weights' gradients to those of other microbatches."""

        def body(i, gradients):
            layer = self._from_last(w, i)
            kept = self._read_kept(stash, w, i)
            owed = arrays.read(stash.owed, w.owed, layer)
            kept, owed = arrays.within(i, (kept, owed))
            d_weights = self._passes.weight(*self._at(w, layer, batch), kept, owed)
            return arrays.add_at(gradients, d_weights, self._row(w, layer))

        gradients = lax.fori_loop(begin, w.count_G[self._index], body, stash.gradients)
        return stash._replace(gradients=gradients)

    def overlap(
        self,
        stash: Stash,
        x: jax.Array,
        d: jax.Array,
        pairs: Any,
        forward: tuple[Instruction, Any],
        backward: tuple[Instruction, Any],
    ) -> tuple[Stash, jax.Array, jax.Array]:
        """Runs F of one microbatch and BW of another, `pairs` layers of each.

        Args:
          forward, backward: instruction and microbatch.
        """
        (f, batch_f), (b, batch_b) = forward, backward

        def both_ways(i, kept, stash, x, d):
            with jax.named_scope("backward"):
                d, owed = self._backward(kept, d, b, i, batch_b)
            with jax.named_scope("weight"):
                layer = self._from_last(b, i)
                at = self._at(b, layer, batch_b)
                d_weights = self._passes.weight(*at, kept, owed)
                row = self._row(b, layer)
                gradients = arrays.add_at(stash.gradients, d_weights, row)
            stash = stash._replace(gradients=gradients)
            with jax.named_scope("forward"):
                stash, x = self._forward(stash, x, i, f, batch_f)
            return stash, x, d

        # F must write after B and W have read, or all that is stored would be copied.
        def fenced(stash, x, d):
            def body(i, carry):
                stash, x, d = carry
                kept = self._read_kept(stash, b, i)
                stored, kept = lax.optimization_barrier((stash.kept, kept))
                return both_ways(i, kept, stash._replace(kept=stored), x, d)

            return lax.fori_loop(0, pairs, body, (stash, x, d))

        # XLA for CPUs drops the barrier too early. So there, the next layer's is read
        # from what F has written.
        def ahead(stash, x, d):
            def body(i, carry):
                stash, x, d, kept = carry
                stash, x, d = both_ways(i, kept, stash, x, d)
                return stash, x, d, self._read_kept(stash, b, i + 1)

            carry = (stash, x, d, self._read_kept(stash, b, 0))
            return lax.fori_loop(0, pairs, body, carry)[:3]

        return lax.platform_dependent(stash, x, d, cpu=ahead, default=fenced)

    def evaluate(
        self, stash: Stash, x: jax.Array, f: Instruction, batch: Any
    ) -> tuple[Stash, jax.Array]:
        """Returns the layers' output, with what is measured stored."""

        def body(i, carry):
            stash, x = carry
            return self._measure(stash, x, i, f, batch)

        return lax.fori_loop(0, f.count_G[self._index], body, (stash, x))

    def _measure(self, stash, x, i, f, batch) -> tuple[Stash, jax.Array]:
        weights, (state, _) = self._at(f, i, batch)
        (y, _), found = self._group.layer(weights, state, batch, x)
        measured = _merge_at(stash.measured, found, self._row(f, i))
        return stash._replace(measured=measured), y

    def _forward(self, stash, x, i, f, batch) -> tuple[Stash, jax.Array]:
        if self._again:
            return self._measure(stash, x, i, f, batch)
        weights, at_hand = self._at(f, i, batch)
        (y, _), found, keeps = self._passes.forward(weights, at_hand, x)
        measured = _merge_at(stash.measured, found, self._row(f, i))
        kept = arrays.write(stash.kept, keeps, f.kept, i)
        return stash._replace(kept=kept, measured=measured), y

    def _backward(self, kept, d, b, i, batch):
        """Returns the gradient of b's i-th layer's input, and what is owed."""
        layer = self._from_last(b, i)
        objective = jnp.float32(1.0)  # the gradient of what the layer adds to it
        return self._passes.backward(*self._at(b, layer, batch), kept, (d, objective))

    def _read_kept(self, stash: Stash, step: Instruction, i: Any) -> list[jax.Array]:
        """Returns what F kept of the i-th layer of a pass from the last layer on."""
        slot = step.owed if self._again else step.kept
        return arrays.read(stash.kept, slot, self._from_last(step, i))

    def _from_last(self, step: Instruction, i: Any) -> Any:
        """Returns the stage's layer that is i before its last."""
        return step.count_G[self._index] - 1 - i

    def _at(self, step: Instruction, i: Any, batch: Any) -> tuple[Any, Any]:
        """Returns weights of the stage's layer i, and what else it finds at hand."""
        row = self._row(step, i)
        state = arrays.pick(self._group.state, row)
        return arrays.pick(self._group.weights, row), (state, batch)

    def _row(self, step: Instruction, i: Any) -> Any:
        return step.start_G[self._index] + i


def _merge_at(total: Any, part: Any, index: Any) -> Any:
    """Returns what was measured with one row's part of it merged."""
    merged = reductions.merge(arrays.pick(total, index), part)
    return arrays.put(total, merged, index)
