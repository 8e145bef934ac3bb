"""Short training runs, whose losses and routings are recorded; and what serves text.

The model is the tiny one with V2-Lite's experts, 64 of which a token chooses 6, so that
its loads are those of 64 experts. One way of training it is ours: the bias balances,
and nothing is dropped. The others are traditional: no bias but an auxiliary loss, and
GShard's capacity for each expert, beyond which choices are dropped. All else is alike:
initial weights, batches, schedule.

Shapes: N training step, L MoE layer, E expert, B sequence, T position.
"""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.benchmarks import gshard
from experiments.benchmarks.report import ROOT
from jmoe.config import RunConfig, SourceConfig, override, presets, to_dict
from jmoe.data.loader import validation_batches
from jmoe.data.packing import Batch
from jmoe.data.tokenizer import Tokenizer
from jmoe.nn.model import Transformer
from jmoe.nn.moe import RoutedExperts
from jmoe.parallel.exchange import Exchanged
from jmoe.train.inputs import next_batch, open_inputs
from jmoe.train.layout import born, make_layout, put_batch, run_mesh
from jmoe.train.optimizer import make_optimizer
from jmoe.train.runtime import step_after_step
from jmoe.train.state import make_state
from jmoe.train.step import make_eval_step, make_train_step
from jmoe.train.stretch import evaluate

KEPT = ROOT / "runs" / "balance"
SERVED, SERVED_STEPS = ("arithmetic", "code"), 100
SHAPE = [
    "model.mtp_depth=0",
    "model.num_layers=3",
    "model.moe.router.num_experts=64",
    "model.moe.router.top_k=6",
    "model.moe.router.num_groups=1",
    "model.moe.router.groups_per_token=1",
    "model.moe.expert_mlp_dim=32",
    "train.steps=300",
    "train.eval_every=25",
    "train.eval_batches=16",
]
LOSS_FREE: list[str] = []
TRADITIONAL = [
    "train.bias_rate.first=0.0",
    "train.bias_rate.last=0.0",
    "model.moe.router.auxiliary_loss=switch",
    "model.moe.router.auxiliary_weight=0.01",
]


class Way(NamedTuple):
    """A way to train: settings, and a capacity factor if each expert has one."""

    settings: list[str]
    capacity_factor: float | None = None


WAYS = {
    "loss-free, dropless": Way(LOSS_FREE),
    "GShard, capacity 1.25": Way(TRADITIONAL, 1.25),
    "GShard, capacity 2": Way(TRADITIONAL, 2.0),
}
OURS = "loss-free, dropless"


class Recorded(NamedTuple):
    """What a run left: of each step, counts and the share of choices dropped.

    val_V: nats a token on held-out text, after the steps val_step_V. served: counts of
    the trained model's steps that read one domain's text, by domain.
    """

    load_NLE: np.ndarray
    dropped_N: np.ndarray
    val_step_V: np.ndarray
    val_V: np.ndarray
    served: Mapping[str, np.ndarray]


def config(way: str = OURS, seed: int = 0) -> RunConfig:
    """Returns the run that trains so."""
    settings = [*SHAPE, *WAYS[way].settings, f"train.seed={seed}"]
    return override(presets.tiny_run(), settings)


def tokens_a_step() -> int:
    """Returns how many tokens each step has, of training and of serving."""
    run = config()
    return run.train.batch_size * run.data.sequence_length


@contextlib.contextmanager
def with_capacity(capacity_factor: float | None, way: str = "index") -> Iterator[None]:
    """Within it, what is traced has GShard's experts in place of the model's own.

    They have the same parameters. None: the model's own.
    """
    if capacity_factor is None:
        yield
        return

    def intercept(apply: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        is_call = (
            isinstance(module, RoutedExperts) and context.method_name == "__call__"
        )
        if not is_call or module.is_initializing():
            return apply(*args, **kwargs)
        x_BSD, routing = args
        y_ND, dropped = gshard.capacity_experts(
            module.variables["params"],
            x_BSD.reshape(-1, x_BSD.shape[-1]),
            routing,
            module.cfg.router,
            capacity_factor=capacity_factor,
            way=way,
        )
        return Exchanged(y_ND, jnp.int32(0), dropped, {})

    with nn.intercept_methods(intercept):
        yield


def recorded(way: str = OURS, seed: int = 0) -> Recorded:
    """Returns what this run left, which is trained if `runs/` doesn't have it."""
    run, capacity_factor = config(way, seed), WAYS[way].capacity_factor
    domains = SERVED if way == OURS else ()
    described = f"{to_dict(run)} {capacity_factor} {SERVED} {SERVED_STEPS}"
    key = hashlib.sha256(described.encode()).hexdigest()[:16]
    path = KEPT / f"{key}.npz"
    if not path.exists():
        with with_capacity(capacity_factor):
            found = train(run, domains)
        KEPT.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        arrays: dict[str, Any] = {**found._asdict(), **found.served}
        del arrays["served"]
        np.savez(partial, **arrays)
        partial.rename(path)
    with np.load(path) as file:
        arrays = dict(file)
    served = {domain: arrays.pop(domain) for domain in domains}
    return Recorded(**arrays, served=served)


def train(run: RunConfig, domains: Sequence[str]) -> Recorded:
    """Trains a run from its start to its end, on one device; then it reads domains."""
    step_after_step()  # as scripts/train.py does
    model = Transformer(run.model)
    layout = make_layout(model, run_mesh(run.mesh))
    optimizer = make_optimizer(run.optimizer, run.horizon, layout)
    advance = jax.jit(make_train_step(model, optimizer, run, layout), donate_argnums=0)
    eval_step = jax.jit(make_eval_step(model, run, layout))
    state = born(
        layout, functools.partial(make_state, model, optimizer, run.train.seed)
    )
    inputs = open_inputs(run, layout.mesh, None)
    loads, dropped, val = [], [], {}
    for step in range(1, run.train.steps + 1):
        batch = put_batch(layout, next_batch(inputs.loader, 1))
        state, metrics = advance(state, batch)
        loads.append(np.asarray(metrics["load_LE"]))
        dropped.append(np.asarray(metrics["drop_rate_L"]).mean())
        if step % run.train.eval_every == 0:
            val[step] = evaluate(eval_step, state, inputs.held_out)["val_loss"]
    served = {
        domain: np.stack(
            [
                np.asarray(eval_step(state.params, state.router_state, batch).load_LE)
                for batch in prompts(run, inputs.tokenizer, domain)
            ]
        )
        for domain in domains
    }
    return Recorded(
        np.stack(loads),
        np.array(dropped),
        np.array(list(val)),
        np.array(list(val.values())),
        served,
    )


def prompts(run: RunConfig, tokenizer: Tokenizer, domain: str) -> list[Batch]:
    """Returns batches of a domain's text that no run is trained on."""
    sources = (SourceConfig(path=f"builtin:{domain}"),)
    return validation_batches(
        dataclasses.replace(run.data, sources=sources),
        tokenizer,
        batch_size=run.train.microbatch_size,
        num_batches=SERVED_STEPS,
    )
