"""Training in tests: a run on its mesh, step by step, against another one.

Shapes: A microbatch, B sequence, T position.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jmoe.config import RunConfig, override
from jmoe.data.packing import PADDING, Batch
from jmoe.nn.model import Transformer, make_variables
from jmoe.ops import fp8
from jmoe.train import layout as layouts
from jmoe.train import step as steps
from jmoe.train.optimizer import make_optimizer
from jmoe.train.state import TrainState

# Leaves the gradients as they are, and keeps them.
KEEP = optax.GradientTransformation(
    init=lambda params: params, update=lambda gradients, *_: (gradients, gradients)
)

# Of everything that this kind of attention may have; two devices divide the heads.
GROUPED_QUERIES = (
    "model.attention={'kind': 'gqa', 'num_heads': 4, 'num_kv_heads': 2, 'head_dim': 12,"
    " 'rope_dim': 8, 'qk_norm_eps': 1e-6, 'qkv_bias': True}"
)

# What sixteen devices are divided by, without a pipeline and with each schedule's.
MESHES = (
    "data=16",
    "expert=16",
    "tensor=16",
    "data=4,expert=4",
    "data=4,tensor=4",
    "expert=4,tensor=4",
    "data=2,expert=4,tensor=2",
    "data=2,expert=2,tensor=4,zero_stage=3",
)
PIPELINES = {
    "gpipe": "pipe=4,data=4",
    "1f1b": "pipe=2,expert=8",
    "interleaved_1f1b": "pipe=2,expert=4,tensor=2",
    "zb_h1": "pipe=4,data=2,tensor=2",
    "dualpipe": "pipe=4,expert=4",
    "dualpipe_v": "pipe=2,data=2,expert=2,tensor=2",
}

TIES = 2  # choices of a step that a rounding may decide


class Step(NamedTuple):
    """What one step measured, and its gradients, on the host."""

    metrics: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]


class Training(NamedTuple):
    """What each step measured, and the state after it, on the host."""

    steps: list[Step]
    states: list[TrainState]


@functools.lru_cache(maxsize=16)
def compiled_once(
    run: RunConfig,
) -> tuple[layouts.Layout, optax.TransformInitFn, steps.TrainStep]:
    """A run's layout, its optimizer's start and its step, which all its tests share.

    To trace and compile a step takes seconds, and to take it a fraction of one.
    """
    model = Transformer(run.model, fp8.dot_general(run.precision))
    layout = layouts.make_layout(model, layouts.run_mesh(run.mesh))
    optimizer = make_optimizer(run.optimizer, run.horizon, layout)
    optimizer = optax.chain(KEEP, optimizer)
    step = jax.jit(steps.make_train_step(model, optimizer, run, layout))
    return layout, functools.partial(on_host, jax.jit(optimizer.init)), step


def on_host(init: optax.TransformInitFn, params: optax.Params) -> optax.OptState:
    """What an optimizer begins with, as NumPy arrays.

    As others it would be put on a mesh by a small program for each of its shapes.
    """
    return jax.device_get(init(params))


class Trainer(NamedTuple):
    """The compiled step, and the state that a run begins with."""

    run: RunConfig
    layout: layouts.Layout
    step: steps.TrainStep
    state: TrainState

    @classmethod
    def of(cls, run, variables):
        layout, init, step = compiled_once(run)
        params = variables["params"]
        opt_state = init(params)
        state = TrainState(jnp.int32(0), params, variables["router_state"], opt_state)
        return cls(run, layout, step, put(layout, state))

    def take(self, state, seed) -> tuple[TrainState, Step]:
        rows = layouts.put_batch(self.layout, batch(self.run, seed))
        state, metrics = self.step(state, rows)
        return state, Step(*jax.device_get((metrics, state.opt_state[0])))

    def train(self, num_steps) -> Training:
        training, state = Training([], []), self.state
        for i in range(num_steps):
            state, step = self.take(state, seed=i)
            training.steps.append(step)
            training.states.append(jax.device_get(state))
        return training

    def train_beside(self, want: Training, of_a_tie: int = TIES) -> list[Step]:
        """Takes the same steps, and asserts that each is the other training's.

        But for steps in which a tie falls otherwise: which of two scores is larger that
        differ by a rounding is up to the CPU. Then no more than `of_a_tie` choices
        differ, and this training goes on from the other's state, or all that follows
        would differ. Such steps are few.
        """
        taken, state, ties = [], self.state, 0
        for i, (step, state_after) in enumerate(zip(*want, strict=True)):
            state, got = self.take(state, seed=i)
            if 0 < moved_choices(got, step) <= of_a_tie:
                state = put(self.layout, state_after)
                ties += 1
            else:
                assert_same(got, step)
            taken.append(got)
        assert ties <= len(taken) // 4
        return taken


def evaluate(run, variables) -> steps.Evaluation:
    """What the run's mesh finds of one microbatch, on the host."""
    trainer = Trainer.of(run, variables)
    state = trainer.state
    step = steps.make_eval_step(Transformer(run.model), run, trainer.layout)
    rows = jax.tree.map(lambda x: x[0], batch(run, seed=0))
    placed = layouts.put_batch(trainer.layout, rows)
    return jax.device_get(jax.jit(step)(state.params, state.router_state, placed))


def put(layout, state) -> TrainState:
    return jax.device_put(state, layouts.shardings(layout, state))


def on(run, mesh, *settings) -> RunConfig:
    axes = [f"mesh.{axis}" for axis in mesh.split(",") if axis]
    return override(run, [*axes, *settings])


def batch(run, seed) -> Batch:
    """A step's sequences, with two documents in each, [A, B, T + 1].

    Some end early, and of some a part is no target, of each microbatch as of each
    device another part.
    """
    count = run.train.batch_size // run.train.microbatch_size
    length = run.data.sequence_length + 1
    shape = (count, run.train.microbatch_size, length)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, run.model.vocab_size, shape, np.int32)
    place = np.arange(length)
    segment = np.broadcast_to(place >= 10, shape).astype(np.int32)
    missing, prompt = rng.integers(0, 5, (2, *shape[:2], 1))
    segment = np.where(place < length - missing, segment, PADDING)
    return Batch(tokens, segment.astype(np.int32), place >= prompt)


def random_variables(run):
    """Large enough for every part, biases too, to decide what is chosen."""
    rng = np.random.default_rng(0)

    def draw(path, shape):
        scale, mean = {"scale": (0.1, 1), "bias": (0.05, 0)}.get(path[-1].key, (0.2, 0))
        return np.float32(mean + scale * rng.normal(size=shape.shape))

    shapes = jax.eval_shape(lambda: make_variables(Transformer(run.model), 0))
    return jax.tree.map_with_path(draw, shapes)


def assert_same(got: Step, want: Step) -> None:
    """Losses and gradients but for rounding; counts and biases to the bit."""
    for name in {"loss", "mtp_loss", "aux_loss", "router_z_loss"} & want.metrics.keys():
        np.testing.assert_allclose(
            got.metrics[name], want.metrics[name], rtol=1e-5, err_msg=name
        )
    for name in ("load_LE", "bias_LE"):
        assert got.metrics[name].tobytes() == want.metrics[name].tobytes(), name
    jax.tree.map_with_path(
        lambda path, g, w: np.testing.assert_allclose(
            g, w, rtol=0, atol=1e-4 * np.abs(w).max(), err_msg=str(path)
        ),
        got.gradients,
        want.gradients,
    )


def moved_choices(got: Step, want: Step) -> int:
    """How many of the step's choices of an expert went to another one, at least."""
    counts = (np.asarray(step.metrics["load_LE"], np.int64) for step in (got, want))
    return int(np.abs(np.subtract(*counts)).sum()) // 2
