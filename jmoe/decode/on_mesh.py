"""A decoder's programs on a mesh.

`tensor` divides heads, MLPs, vocabulary and a step's tokens; `expert` divides experts;
the devices of `data` and `expert` have sequences of their own. `pipe` divides layers:
in each call, a rank computes its layers for the tokens that the rank before it had in
the call before. So as many sets of sequences as there are ranks take turns, and keep
all ranks busy. What a call returns is of the tokens that were given to an earlier one.

What a decoder remembers is each device's own, and has all devices as its first
dimension.

Shapes: B sequence being decoded, A sequence being read, S this device's tokens, D
hidden, L MoE layer, E expert.
"""

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jmoe.balance.placement import Placement
from jmoe.config import ExchangeConfig, ModelConfig, RunConfig
from jmoe.config.mesh import MESH_AXES
from jmoe.decode import batch as batches
from jmoe.decode import layers, mesh_weights, packing
from jmoe.decode.batch import DecodeRows, PrefillChunks
from jmoe.decode.engine import MakePrograms
from jmoe.decode.layers import Counts
from jmoe.decode.limits import Limits, StepSize
from jmoe.decode.live import make_nobody
from jmoe.decode.mesh_weights import PIPE, LayerRow
from jmoe.decode.placing import Move, Placing, RowMoves, make_mover
from jmoe.decode.programs import make_state
from jmoe.decode.step import StepResult, finish
from jmoe.decode.weights import Layer, Weights
from jmoe.nn.model import Transformer
from jmoe.nn.quantized import check_form
from jmoe.parallel import collectives, compiler
from jmoe.parallel.mesh import BATCH_AXES, TOKEN_AXES
from jmoe.train.layout import WHOLE, Layout, lying, make_layout, on_mesh, put_whole

OWN = PartitionSpec(MESH_AXES)  # each device's own, by the first dimension
SEQUENCES = PartitionSpec(BATCH_AXES)

Given = tuple[DecodeRows, PrefillChunks]


class Underway(NamedTuple):
    """Tokens that later ranks of a pipeline have: what was given, the newest first.

    x: the hidden states that come to a rank next; counts: what the ranks before have
    counted of their tokens, on each device.
    """

    given: tuple[Given, ...]
    x: jax.Array
    counts: Counts


def make_programs(
    run: RunConfig,
    mesh: Mesh,
    form: str = "native",
    exchange: ExchangeConfig | None = None,
    placed: Placement | None = None,
    limit: int | None = None,
    dispatch_dtypes: tuple[str, ...] = (),
) -> MakePrograms:
    """Returns what makes an engine's programs for a run's mesh.

    Its variables are as the run's state has them on the mesh.

    Args:
      form: in which the weights are kept, one of `jmoe.nn.quantized.FORMS`.
      exchange: None: it drops nobody's tokens, and lends no experts. A step's tokens
        are so few that room for all is little, and weights are more.
      placed: where experts begin, which may then be changed (`OnMesh.placing`); None:
        they are where the run's state has them, for good.
      limit: of the choices that a device computes in a layer of a step, which may then
        be changed (`OnMesh.set_limit`); None: there is none, for good.
      dispatch_dtypes: among which that of tokens on their way to experts may be changed
        (`OnMesh.set_dispatch_dtype`), the first of them to begin with. Each has steps
        of its own, so that all sizes are compiled as often. Empty: the exchange's is
        there for good.

    Raises:
      ValueError: there is no such form, or the placement isn't for this model and mesh.
    """
    check_form(form)

    def make(cfg: ModelConfig, variables: Any, limits: Limits) -> "OnMesh":
        assert cfg == run.model, "the run's own model"
        placing = placed, limit, dispatch_dtypes
        return OnMesh(run, mesh, form, variables, limits, exchange, *placing)

    return make


class OnMesh:
    """Programs for all sizes, as `jmoe.decode.programs.OneDevice` has them.

    placing: where experts are; None: where the run's state has them, for good.
    dispatch_dtype: in which tokens travel to experts.
    """

    def __init__(
        self,
        run: RunConfig,
        mesh: Mesh,
        form: str,
        variables: Any,
        limits: Limits,
        exchange: ExchangeConfig | None = None,
        placed: Placement | None = None,
        limit: int | None = None,
        dispatch_dtypes: tuple[str, ...] = (),
    ):
        self.parts, self.turns = run.mesh.batch_parts, run.mesh.pipe
        self._limits = limits
        exchange = exchange or with_room_for_all(run)
        self._by_dtype: dict[str, MeshPrograms] = {}
        for dtype in dispatch_dtypes or (exchange.dispatch_dtype,):
            way = dataclasses.replace(exchange, dispatch_dtype=dtype)
            self._by_dtype[dtype] = compile_for(run, mesh, form, limits, way)
        # They differ in steps alone.
        self.dispatch_dtype, self._programs = next(iter(self._by_dtype.items()))
        layout, rows = self._programs.layout, self._programs.rows
        self.placing: Placing | None = None
        if placed is not None:
            move = self._programs.move
            self.placing = Placing(run.model, layout, rows, move, placed)
        place = functools.partial(mesh_weights.place, run.model, layout, rows, form)
        self._weights = place(variables, placed)
        if self.placing is not None:
            self._weights = self.placing.stay(self._weights)
        self.may_drop = limit is not None
        if limit is not None:
            self.set_limit(limit)
        self.state = self._programs.start()
        self._size = StepSize(0)  # of the steps that aren't done
        self._underway: Underway | None = None
        # Whether anybody took part in each of the last steps, the oldest first.
        self._calls: collections.deque[bool] = collections.deque()

    def warm_up(self, size: StepSize) -> None:
        """Compiles steps of a size, by some in which nobody takes part."""
        used = self.dispatch_dtype
        for dtype in self._by_dtype:
            self.dispatch_dtype = dtype
            self.run(*make_nobody(self._limits, self.parts, size))
            self.flush()
        self.dispatch_dtype = used

    def run(self, rows: DecodeRows, chunks: PrefillChunks) -> list[StepResult]:
        """Returns what the steps that are done found, the same on all processes.

        Steps of one size follow each other closely; before another, all are done.
        """
        size = StepSize(
            rows=len(rows.slot_B) // self.parts,
            prompts=len(chunks.slot_A) // self.parts,
            chunk=chunks.token_AC.shape[1],
        )
        done = self.flush() if size != self._size else []
        if self._underway is None:
            self._size = size
            self._underway = self._programs.begin(self._put(self._nobody()))
        return done + self._call((rows, chunks), True)

    def flush(self) -> list[StepResult]:
        """Returns what steps that aren't done yet will have found."""
        done = []
        while any(self._calls):
            done += self._call(self._nobody(), False)
        self._calls.clear()
        self._underway = None
        return done

    def set_limit(self, limit: int) -> None:
        """Lets devices compute so many choices of a layer (`jmoe.parallel.shedding`).

        Raises:
          ValueError: there is no limit for good.
        """
        if not self.may_drop:
            raise ValueError("nothing can be dropped: the programs were made without.")
        layout, rows = self._programs.layout, self._programs.rows
        set_limit = functools.partial(mesh_weights.with_limit, layout, rows)
        self._weights = set_limit(self._weights, limit)

    @property
    def dispatch_dtypes(self) -> tuple[str, ...]:
        """What tokens may travel to experts in, the usual dtype first."""
        return tuple(self._by_dtype)

    def set_dispatch_dtype(self, dtype: str) -> None:
        """Lets tokens travel to experts in another dtype, from the next step on.

        Raises:
          ValueError: there are no steps for it.
        """
        if dtype not in self._by_dtype:
            raise ValueError(
                f"dispatch_dtype={dtype!r} is not one of "
                f"{', '.join(map(repr, self._by_dtype))}, for which there are programs."
            )
        self.dispatch_dtype = dtype

    def advance(self, steps: int) -> float:
        """Takes so many steps to where experts are going; returns their seconds.

        Between two steps of decoding.

        Raises:
          ValueError: experts are where they are for good.
        """
        return self.move(self._movable.take(steps))

    def move(self, moves: Sequence[Move]) -> float:
        """Makes steps of an experts' way, and returns their seconds.

        All processes of the mesh make the same ones, between the same two steps of
        decoding; one of them has set out on the way.

        Raises:
          ValueError: experts are where they are for good.
        """
        placing, began = self._movable, time.perf_counter()
        self._weights = placing.make(self._weights, moves)
        jax.block_until_ready(self._weights.layers)
        return time.perf_counter() - began

    @property
    def _movable(self) -> Placing:
        if self.placing is None:
            raise ValueError("experts can't move: the programs were made without.")
        return self.placing

    def _call(self, given: Given, is_anybody: bool) -> list[StepResult]:
        operands = self._weights, self.state, self._underway, self._put(given)
        step = self._by_dtype[self.dispatch_dtype].step
        self.state, self._underway, found = step(*operands)
        self._calls.append(is_anybody)
        if len(self._calls) < self.turns:
            return []
        return [jax.device_get(found)] if self._calls.popleft() else []

    def _nobody(self) -> Given:
        """Returns a step's arrays in which no sequence takes part."""
        return make_nobody(self._limits, self.parts, self._size)

    def _put(self, given: Given) -> Given:
        return put_whole(self._programs.layout, given)


class MeshPrograms(NamedTuple):
    """What a mesh runs, compiled when it is called with arrays of a new size.

    layout: of the run's parameters. rows: of layers (`mesh_weights`). start: returns a
    state. begin: of a step's arrays, what is underway before any. step: of weights,
    state, what is underway and what is given, the new ones and what was found. move:
    moves a row's experts (`jmoe.decode.placing`). abstract: of a step's arrays without
    values, all that `step` takes, likewise.
    """

    layout: Layout
    rows: tuple[LayerRow, ...]
    start: Callable[[], Any]
    begin: Callable[[Given], Underway]
    step: Callable[..., tuple[Any, Underway, StepResult]]
    move: Callable[[Any, RowMoves], Any]
    abstract: Callable[[Given], tuple[Weights, Any, Underway, Given]]


@functools.lru_cache(maxsize=16)
def compile_for(
    run: RunConfig,
    mesh: Mesh,
    form: str,
    limits: Limits,
    exchange: ExchangeConfig,
) -> MeshPrograms:
    """Returns the programs of a run's model on this mesh; see `make_programs`."""
    moe = dataclasses.replace(run.model.moe, exchange=exchange)
    cfg = dataclasses.replace(run.model, moe=moe)
    layout = make_layout(Transformer(cfg), mesh)
    rows = mesh_weights.cut(cfg, run.mesh.pipe, limits.max_length)
    own = functools.partial(jax.tree.map, lambda x: x[None])

    def start() -> Any:
        return own(make_state(cfg, limits, len(rows), run.mesh.pipe))

    def begin(given: Given) -> Underway:
        x_TD = jnp.zeros((len(batches.join(*given).token_T), cfg.hidden_dim), cfg.dtype)
        x_SD = collectives.local_part(x_TD, "tensor", 0)
        shape = cfg.num_moe_layers, cfg.moe.router.num_experts
        counts = Counts(jnp.zeros(shape, jnp.int32), jnp.zeros(shape[:1], jnp.int32))
        return Underway((given,) * (run.mesh.pipe - 1), own(x_SD), own(counts))

    def step(weights: Weights, state: Any, underway: Underway, given: Given) -> Any:
        state, came = jax.tree.map(lambda x: x[0], (state, underway[1:]))
        every = (given, *underway.given)
        own_layers = _own_layers(rows, weights)
        passed, caches = _blocks(cfg, weights, own_layers, state.layers, came, every)
        state = state._replace(layers=())
        state, found = _finish(cfg, limits, weights, state, *passed, every[-1])
        state = state._replace(layers=caches)
        onward = jax.tree.map(lambda x: collectives.ppermute(x, PIPE)[None], passed)
        return own(state), Underway(every[:-1], *onward), found

    placed = mesh_weights.specs(cfg, layout, rows, form)
    flight: Any = Underway(SEQUENCES, OWN, OWN)  # type: ignore[arg-type]
    taken = placed, OWN, flight, SEQUENCES
    starts = jax.jit(on_mesh(start, layout, (), OWN))
    begins = jax.jit(on_mesh(begin, layout, (SEQUENCES,), flight))
    steps = jax.jit(
        on_mesh(step, layout, taken, (OWN, flight, WHOLE)),
        donate_argnums=(1, 2),
        compiler_options=compiler.decoder_options(mesh.devices.flat[0].platform),
    )

    move = make_mover(layout, mesh_weights.experts_specs(cfg, layout, rows, form))

    def abstract(given: Given) -> Any:
        weights = mesh_weights.abstract(cfg, layout, rows, form)
        state, underway = jax.eval_shape(starts), jax.eval_shape(begins, given)
        return lying(layout, taken, (weights, state, underway, given))

    return MeshPrograms(layout, rows, starts, begins, steps, move, abstract)


def with_room_for_all(run: RunConfig) -> ExchangeConfig:
    """Returns what drops nobody's tokens; they travel as the run has them travel."""
    return ExchangeConfig(dispatch_dtype=run.model.moe.exchange.dispatch_dtype)


def _own_layers(rows: tuple[LayerRow, ...], weights: Weights) -> list[Layer]:
    """Returns this rank's layers; the number of one that it doesn't have is below 0."""
    rank = collectives.axis_index(PIPE)
    found = []
    for row, of_ranks in zip(rows, weights.layers, strict=True):
        number = jnp.array(row.numbers, jnp.int32)[rank]
        own = jax.tree.map(lambda x: x[0], of_ranks)
        found.append(Layer(row.feed_forward, number, own))
    return found


def _blocks(cfg, weights, own, caches, came, every):
    """Returns hidden states and counts behind this rank's layers, and their caches."""
    rank, (x_SD, counts) = collectives.axis_index(PIPE), came
    rows, chunks = jax.tree.map(lambda *x: jnp.stack(x)[rank], *every)
    batch = batches.join(rows, chunks)
    known = layers.known(cfg, batch.token_T, batch.position_T, batch.groups)
    first_SD = layers.embedded(cfg, weights, batches.join(*every[0]).token_T)
    x_SD = jnp.where(rank == 0, first_SD, x_SD)
    counts = jax.tree.map(lambda x: jnp.where(rank == 0, 0, x), counts)
    kept = []
    for layer, cache in zip(own, caches, strict=True):
        out_SD, cache, count = layers.block(cfg, layer, cache, x_SD, known)
        # All ranks compute every row, as the longest must: a choice would cost copies
        # of the pages that go through it.
        is_own = layer.number >= 0
        x_SD = jnp.where(is_own, out_SD, x_SD)
        if count is not None:
            at = jnp.where(is_own, layer.number - cfg.num_dense_layers, 0)
            here = jax.tree.map(lambda x, own=is_own: jnp.where(own, x, 0), count)
            counts = jax.tree.map(lambda x, y, at=at: x.at[at].add(y), counts, here)
        kept.append(cache)
    return (x_SD, counts), tuple(kept)


def _finish(cfg, limits, weights, state, x_SD, counts, given):
    """Returns what the last rank finds, of all devices' sequences, and its state.

    Other ranks compute the same of what means nothing, for which no one waits.
    """
    is_last = collectives.axis_index(PIPE) == collectives.axis_size(PIPE) - 1
    counts = jax.tree.map(lambda x: jnp.where(is_last, x, 0), counts)
    counts = collectives.psum(counts, (PIPE, *TOKEN_AXES))
    told = x_SD, counts, *given
    state, found = finish(cfg, limits.top_logprobs, weights, state, *told)
    drawn = found._replace(count_LE=None, dropped_L=None)  # joined, not summed
    packed_N = collectives.psum(jnp.where(is_last, packing.packed(drawn), 0), PIPE)
    packed_PN = collectives.all_gather(packed_N[None], BATCH_AXES, 0)
    return state, packing.unpacked(packed_PN, drawn)._replace(**counts._asdict())
