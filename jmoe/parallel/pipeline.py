"""Runs a model's training step, or its forward pass alone, by a pipeline schedule.

To be called inside of the `jax.shard_map` over the mesh; every rank of the axis `pipe`
runs the same program:

    scan over ticks:
        loops over the layers of the stages whose F, B and W are due
        hand results to neighbours: one ppermute for each way that the schedule uses

What a rank does in a tick is in a table. It is read as the loops' bounds, so that a
rank with no F in this tick loops no times, and stages need not have as many layers as
each other. No loop has a collective over `pipe`, so that ranks may differ in what they
do. In an overlapped tick (F&BW of DualPipe), a loop takes a layer of one microbatch
forward and a layer of another backward at a time: while one waits for an exchange, the
other multiplies.

The loss is taken where the backward pass begins: B of the last stage takes the stage's
output to the loss, and back, as one. So neither logits nor the head's gradient wait for
their turn. Gradients are summed over microbatches in float32, on each rank; over
devices, nothing is summed here.

Shapes: M microbatch, G group, R row (a layer of one group that a rank has).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jmoe.parallel import collectives
from jmoe.parallel.passes import split
from jmoe.parallel.schedule.tasks import KINDS
from jmoe.parallel.schedule.ticks import SELF, Entry, Ticks

AXIS = "pipe"


class Group(NamedTuple):
    """The layers of one kind that this rank has.

    layer: of a layer's weights, its state, a microbatch and the input; returns
    ((output, what the layer adds to the objective), what it measured). weights, state:
    [R, ...]; the state has no gradient. start, count: int [rank, hosted], first row and
    number of layers, by the stages that the ranks host.
    """

    layer: Callable[[Any, Any, Any, Any], tuple[tuple[Any, jax.Array], Any]]
    weights: Any
    state: Any
    start: np.ndarray
    count: np.ndarray


class Model(NamedTuple):
    """A model in pieces.

    enter: of `shared` weights and a microbatch, the first layer's input. leave: of
    these and the last layer's output, (objective, what was measured). groups: in the
    order of the layers; F and B overlap in the last one. microbatches: [M, ...].
    """

    enter: Callable[[Any, Any], jax.Array]
    leave: Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]
    shared: Any
    groups: Sequence[Group]
    microbatches: Any


class Result(NamedTuple):
    """Sums over the microbatches that this rank had a part in.

    Gradients are float32, of `shared` and of each group's rows; what was measured is of
    `leave`, and of each group's rows.
    """

    shared: Any
    groups: list[Any]
    left: Any
    measured: list[Any]


def train(ticks: Ticks, model: Model) -> Result:
    """All microbatches forward and backward."""
    stage = _Stage(model)

    def tick(buffers: _Buffers, row: _Row):
        buffers, y, d_x = stage.train(buffers, row)
        for_f = _hand_over(buffers.for_f, y, row.for_f)
        for_b = _hand_over(buffers.for_b, d_x, row.for_b)
        return buffers._replace(for_f=for_f, for_b=for_b), None

    start = stage.buffers(ticks)
    return lax.scan(tick, start, _own_rows(ticks, model))[0].result


def evaluate(ticks: Ticks, model: Model) -> Result:
    """All microbatches forward, and no gradients. The ticks are of forward passes."""
    stage = _Stage(model)

    def tick(buffers: _Buffers, row: _Row):
        buffers, y = stage.evaluate(buffers, row)
        return buffers._replace(for_f=_hand_over(buffers.for_f, y, row.for_f)), None

    start = stage.buffers(ticks)
    return lax.scan(tick, start, _own_rows(ticks, model))[0].result


class _Instruction(NamedTuple):
    """A pass of this tick, or zeros. first, last: whether its stage is, as 0 or 1."""

    start_G: Any
    count_G: Any
    microbatch: Any
    source: Any
    kept: Any
    owed: Any
    first: Any
    last: Any


class _Row(NamedTuple):
    """A rank's tick. pairs: layers of F and B to overlap.

    for_f, for_b: by the way something comes, the inbox slot for it.
    """

    f: _Instruction
    b: _Instruction
    w: _Instruction
    pairs: Any
    for_f: dict[int, Any]
    for_b: dict[int, Any]


class _Store(NamedTuple):
    """What a group's loops read and write; kept, owed: [slot, layer in stage, ...]."""

    kept: list[jax.Array]
    owed: list[jax.Array]
    gradients: Any
    measured: Any


class _Buffers(NamedTuple):
    """What a rank carries from tick to tick.

    An inbox has one slot more than the schedule uses, for what isn't meant for it.
    """

    for_f: jax.Array
    for_b: jax.Array
    shared: Any
    left: Any
    stores: list[_Store]

    @property
    def result(self) -> Result:
        return Result(
            shared=self.shared,
            groups=[store.gradients for store in self.stores],
            left=self.left,
            measured=[store.measured for store in self.stores],
        )


class _Stage:
    """What a rank does in one tick."""

    def __init__(self, model: Model):
        self.model = model
        first = self._microbatch(0)
        self.x = jax.eval_shape(model.enter, model.shared, first)
        self.groups = [_Layers(group, first, self.x) for group in model.groups]

    def _microbatch(self, index: Any) -> Any:
        return _pick(self.model.microbatches, index)

    def buffers(self, ticks: Ticks) -> _Buffers:
        """All zeros."""

        def inbox(slots: int) -> jax.Array:
            return jnp.zeros((slots + 1, *self.x.shape), self.x.dtype)

        model, first = self.model, self._microbatch(0)
        _, left = jax.eval_shape(model.leave, model.shared, first, self.x)
        return _Buffers(
            for_f=inbox(ticks.forward_slots),
            for_b=inbox(ticks.backward_slots),
            shared=_zeros(model.shared, jnp.float32),
            left=_zeros(left),
            stores=[layers.store(ticks) for layers in self.groups],
        )

    def train(
        self, buffers: _Buffers, row: _Row
    ) -> tuple[_Buffers, jax.Array, jax.Array]:
        """Runs the tick's passes; returns F's output and B's gradient too."""
        stores = list(buffers.stores)
        *before, last = range(len(stores))
        batch_f, batch_b, batch_w = (
            self._microbatch(i.microbatch) for i in (row.f, row.b, row.w)
        )
        with jax.named_scope("forward"):
            x = self._enter(buffers.for_f, row.f, batch_f)
            for g in before:
                stores[g], x = self.groups[g].forward(
                    stores[g], x, 0, g, row.f, batch_f
                )
        with jax.named_scope("backward"):
            buffers, d = self._lose(buffers, row.b, batch_b)
        layers, store = self.groups[last], stores[last]
        store, x, d = layers.overlap(store, x, d, last, row, batch_f, batch_b)
        with jax.named_scope("forward"):
            store, y = layers.forward(store, x, row.pairs, last, row.f, batch_f)
        with jax.named_scope("backward"):
            store, d = layers.backward(store, d, row.pairs, last, row.b, batch_b)
            stores[last] = store
            for g in reversed(before):
                stores[g], d = self.groups[g].backward(
                    stores[g], d, 0, g, row.b, batch_b
                )
            shared = self._enter_backward(buffers.shared, d, row.b, batch_b)
        with jax.named_scope("weight"):
            for g, layers in enumerate(self.groups):
                done = row.pairs if g == last else 0
                stores[g] = layers.weight(stores[g], done, g, row.w, batch_w)
        return buffers._replace(shared=shared, stores=stores), y, d

    def evaluate(self, buffers: _Buffers, row: _Row) -> tuple[_Buffers, jax.Array]:
        stores = list(buffers.stores)
        batch = self._microbatch(row.f.microbatch)
        x = self._enter(buffers.for_f, row.f, batch)
        for g, layers in enumerate(self.groups):
            stores[g], x = layers.evaluate(stores[g], x, g, row.f, batch)

        def leave(_, left):
            _, found = self.model.leave(self.model.shared, batch, x)
            return _add(left, found)

        left = lax.fori_loop(0, row.f.last, leave, buffers.left)
        return buffers._replace(left=left, stores=stores), x

    def _enter(self, for_f: jax.Array, f: _Instruction, batch: Any) -> jax.Array:
        return lax.cond(
            f.first == 1,
            lambda: self.model.enter(self.model.shared, batch),
            lambda: _pick(for_f, f.source),
        )

    def _lose(
        self, buffers: _Buffers, b: _Instruction, batch: Any
    ) -> tuple[_Buffers, jax.Array]:
        """The gradient that B begins with: at the last stage, that of the objective."""
        model = self.model

        def lose(_, carry):
            _, shared, left = carry

            def objective(shared, y):
                return model.leave(shared, batch, y)

            y = _pick(buffers.for_f, b.source)
            total, pull, found = jax.vjp(objective, model.shared, y, has_aux=True)
            d_shared, d = pull(jnp.ones_like(total))
            return d, _add(shared, d_shared), _add(left, found)

        arrived = _pick(buffers.for_b, b.source)
        carry = (arrived, buffers.shared, buffers.left)
        d, shared, left = lax.fori_loop(0, b.last, lose, carry)
        return buffers._replace(shared=shared, left=left), d

    def _enter_backward(
        self, gradients: Any, d: jax.Array, b: _Instruction, batch: Any
    ) -> Any:
        def add(_, gradients):
            _, pull = jax.vjp(lambda s: self.model.enter(s, batch), self.model.shared)
            return _add(gradients, *pull(d))

        return lax.fori_loop(0, b.first, add, gradients)


class _Layers:
    """A group's loops. Each takes the layers that an instruction has from `begin` on.

    Backward, the first layer is the stage's last one.
    """

    def __init__(self, group: Group, batch: Any, x: Any):
        self.group = group

        def layer(weights, at_hand, x):
            return group.layer(weights, *at_hand, x)

        example = _pick(group.weights, 0), (_pick(group.state, 0), batch), x
        _, self.measured = jax.eval_shape(layer, *example)
        self.passes = split(layer, *example)

    def store(self, ticks: Ticks) -> _Store:
        def stash(slots: int, shapes: list[Any]) -> list[jax.Array]:
            lead = (slots, int(self.group.count.max()))
            return [jnp.zeros((*lead, *s.shape), s.dtype) for s in shapes]

        rows = jax.tree.leaves(self.group.weights)[0].shape[0]
        return _Store(
            kept=stash(ticks.kept_slots, self.passes.kept),
            owed=stash(ticks.owed_slots, self.passes.owed),
            gradients=_zeros(self.group.weights, jnp.float32),
            measured=jax.tree.map(
                lambda m: jnp.zeros((rows, *m.shape), m.dtype), self.measured
            ),
        )

    def _at(self, row: jax.Array, batch: Any) -> tuple[Any, Any]:
        return _pick(self.group.weights, row), (_pick(self.group.state, row), batch)

    def _forward(
        self, store: _Store, x: jax.Array, i: Any, g: int, f: _Instruction, batch: Any
    ) -> tuple[_Store, jax.Array]:
        row = f.start_G[g] + i
        (y, _), found, kept = self.passes.forward(*self._at(row, batch), x)
        measured = _add_at(store.measured, found, row)
        kept = _write(store.kept, kept, (f.kept, i))
        return store._replace(kept=kept, measured=measured), y

    def _backward(
        self, store: _Store, d: jax.Array, i: Any, g: int, b: _Instruction, batch: Any
    ) -> tuple[jax.Array, list[jax.Array], jax.Array]:
        layer = b.count_G[g] - 1 - i
        kept = _read(store.kept, (b.kept, layer))
        at = self._at(b.start_G[g] + layer, batch)
        d_x, owed = self.passes.backward(*at, kept, (d, jnp.float32(1.0)))
        return d_x, owed, layer

    def forward(
        self, store: _Store, x: jax.Array, begin: Any, g: int, f: _Instruction, batch
    ) -> tuple[_Store, jax.Array]:
        def body(i, carry):
            return self._forward(*carry, i, g, f, batch)

        return lax.fori_loop(begin, f.count_G[g], body, (store, x))

    def evaluate(
        self, store: _Store, x: jax.Array, g: int, f: _Instruction, batch: Any
    ) -> tuple[_Store, jax.Array]:
        def body(i, carry):
            measured, x = carry
            row = f.start_G[g] + i
            weights, at_hand = self._at(row, batch)
            (y, _), found = self.group.layer(weights, *at_hand, x)
            return _add_at(measured, found, row), y

        measured, y = lax.fori_loop(0, f.count_G[g], body, (store.measured, x))
        return store._replace(measured=measured), y

    def backward(
        self, store: _Store, d: jax.Array, begin: Any, g: int, b: _Instruction, batch
    ) -> tuple[_Store, jax.Array]:
        def body(i, carry):
            owed, d = carry
            d_x, owes, layer = self._backward(store, d, i, g, b, batch)
            return _write(owed, owes, (b.owed, layer)), d_x

        owed, d = lax.fori_loop(begin, b.count_G[g], body, (store.owed, d))
        return store._replace(owed=owed), d

    def weight(
        self, store: _Store, begin: Any, g: int, w: _Instruction, batch: Any
    ) -> _Store:
        def body(i, gradients):
            layer = w.count_G[g] - 1 - i
            row = w.start_G[g] + layer
            kept = _read(store.kept, (w.kept, layer))
            owed = _read(store.owed, (w.owed, layer))
            d_weights = self.passes.weight(*self._at(row, batch), kept, owed)
            return _add_at(gradients, d_weights, row)

        gradients = lax.fori_loop(begin, w.count_G[g], body, store.gradients)
        return store._replace(gradients=gradients)

    def overlap(
        self, store: _Store, x: Any, d: Any, g: int, row: _Row, batch_f: Any, batch_b
    ) -> tuple[_Store, jax.Array, jax.Array]:
        """A layer forward, and one of another microbatch backward, at a time."""

        def body(i, carry):
            store, x, d = carry
            f, b = row.f, row.b
            with jax.named_scope("backward"):
                d, owed, layer = self._backward(store, d, i, g, b, batch_b)
            at = b.start_G[g] + layer
            kept = _read(store.kept, (b.kept, layer))
            with jax.named_scope("weight"):
                d_weights = self.passes.weight(*self._at(at, batch_b), kept, owed)
            gradients = _add_at(store.gradients, d_weights, at)
            # What F writes, it writes after B has read, or all would be copied.
            freed, _ = lax.optimization_barrier((store.kept, kept))
            store = store._replace(gradients=gradients, kept=freed)
            with jax.named_scope("forward"):
                store, x = self._forward(store, x, i, g, f, batch_f)
            return store, x, d

        return lax.fori_loop(0, row.pairs, body, (store, x, d))


def _own_rows(ticks: Ticks, model: Model) -> _Row:
    """This rank's table, [tick, ...]."""
    rank = collectives.axis_index(AXIS)
    return jax.tree.map(lambda x: jnp.asarray(x)[:, rank], table(ticks, model.groups))


def table(ticks: Ticks, groups: Sequence[Group]) -> _Row:
    """int32 arrays [tick, rank, ...]."""
    size = (ticks.count, ticks.schedule.num_ranks)

    def instructions() -> _Instruction:
        found = {name: np.zeros(size, np.int32) for name in _Instruction._fields}
        found["start_G"] = np.zeros((*size, len(groups)), np.int32)
        found["count_G"] = np.zeros((*size, len(groups)), np.int32)
        return _Instruction(**found)

    def inboxes(kind: str, slots: int) -> dict[int, np.ndarray]:
        return {way: np.full(size, slots, np.int32) for way in ticks.ways(kind)}

    row = _Row(
        f=instructions(),
        b=instructions(),
        w=instructions(),
        pairs=np.zeros(size, np.int32),
        for_f=inboxes("F", ticks.forward_slots),
        for_b=inboxes("B", ticks.backward_slots),
    )
    for tick, ranks in enumerate(ticks.entries):
        for rank, entries in enumerate(ranks):
            for entry in entries:
                _fill(row, ticks, groups, (tick, rank), entry)
            task = ticks.tasks[tick][rank]
            if task is not None and task.kind == KINDS[4]:
                counts = row.f.count_G[tick, rank, -1], row.b.count_G[tick, rank, -1]
                row.pairs[tick, rank] = min(counts)
    return row


def _fill(
    row: _Row,
    ticks: Ticks,
    groups: Sequence[Group],
    at: tuple[int, int],
    entry: Entry,
) -> None:
    tick, rank = at
    step, into = entry.step, getattr(row, entry.step.kind.lower())
    for g, group in enumerate(groups):
        into.start_G[tick, rank, g] = group.start[rank, entry.hosted]
        into.count_G[tick, rank, g] = group.count[rank, entry.hosted]
    into.microbatch[at] = step.microbatch
    into.source[at] = entry.source or 0
    into.kept[at] = entry.kept
    into.owed[at] = entry.owed or 0
    into.first[at] = step.stage == 0
    into.last[at] = step.stage == ticks.schedule.num_stages - 1
    if entry.delivery is not None:
        way, slot = entry.delivery
        inbox = row.for_f if step.kind == "F" else row.for_b
        inbox[way][tick, (rank + way) % ticks.schedule.num_ranks] = slot


def _hand_over(inbox: jax.Array, value: jax.Array, slots: dict[int, Any]) -> jax.Array:
    """The inbox with what arrives in this tick. One ppermute for each way to others."""
    ranks = collectives.axis_size(AXIS)
    for way, slot in slots.items():
        arrived = value
        if way != SELF:
            ring = [(rank, (rank + way) % ranks) for rank in range(ranks)]
            arrived = lax.ppermute(value, AXIS, ring)
        inbox = lax.dynamic_update_index_in_dim(inbox, arrived, slot, 0)
    return inbox


def _pick(tree: Any, index: Any) -> Any:
    return jax.tree.map(
        lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), tree
    )


def _zeros(tree: Any, dtype: Any = None) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, dtype or x.dtype), tree)


def _add(total: Any, part: Any) -> Any:
    return jax.tree.map(lambda t, p: t + p.astype(t.dtype), total, part)


def _add_at(total: Any, part: Any, row: Any) -> Any:
    """Adds `part` to one row of `total`."""

    def add(t: jax.Array, p: jax.Array) -> jax.Array:
        old = lax.dynamic_index_in_dim(t, row, keepdims=False)
        return lax.dynamic_update_index_in_dim(t, old + p.astype(t.dtype), row, 0)

    return jax.tree.map(add, total, part)


def _read(stash: list[jax.Array], at: tuple[Any, Any]) -> list[jax.Array]:
    """What is stored for a slot and a layer."""

    def read(x: jax.Array) -> jax.Array:
        found = lax.dynamic_slice(x, _corner(x, at), (1, 1, *x.shape[2:]))
        return found.reshape(x.shape[2:])

    return [read(x) for x in stash]


def _write(
    stash: list[jax.Array], values: list[jax.Array], at: tuple[Any, Any]
) -> list[jax.Array]:
    return [
        lax.dynamic_update_slice(x, value[None, None], _corner(x, at))
        for x, value in zip(stash, values, strict=True)
    ]


def _corner(x: jax.Array, at: tuple[Any, Any]) -> tuple[Any, ...]:
    return (*at, *(0,) * (x.ndim - 2))
