"""Loss-free balancing without drops, beside the traditional scheme, at equal loss.

One part of the suite `balance`. Traditional is what GShard (arXiv 2006.16668) began: an
auxiliary loss balances, each expert has a capacity, and choices beyond it are dropped.
All places are computed, taken or not, so that a factor of 2 computes twice the rows.
Both train the same model on the same batches from the same weights, of two seeds.
What either needs is counted up to the same validation loss, the higher of their ends.

Two claims are held against that: 2.5 times the throughput of the traditional scheme,
and 30% less compute. Traditional is given by its capacity factor, and by how tokens get
to their places: by einsums with one-hot tensors, as published, or by indices, as others
do since. Tokens a second are measured where the model trains, on CPUs; for larger
shapes on 16 H20s there is the floor of `balance_cost`.

Operations are those of matrix products, forward and backward, none of them twice.
"""

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.benchmarks import (
    balance_busiest,
    balance_cost,
    balance_runs,
    balance_steps,
    gshard,
)
from experiments.benchmarks.balance_cost import Padding, Phase, Uneven
from experiments.benchmarks.balance_part import Part
from experiments.benchmarks.balance_runs import OURS, WAYS, Recorded
from experiments.benchmarks.report import Figure
from experiments.benchmarks.workers import (
    Seat,
    Tasks,
    Turn,
    Worker,
    per_round,
    ratio,
    take_turns,
)
from experiments.benchmarks.workload import Workload
from jmoe.config import ModelConfig, RunConfig
from jmoe.train.runtime import keep_freed_memory

SEEDS = (0, 1)
STEPS_A_TURN = 5
FASTER, LESS_COMPUTE = 2.5, 0.7
LARGE = ("v2_lite", "v3")
# One-hot products of a layer: there and back, the gradient of what goes there, and
# those of both factors of what comes back.
_EINSUMS = 5


class Scheme(NamedTuple):
    """How experts are computed: by which run, and how tokens reach their places."""

    run: str
    way: str = ""

    @property
    def name(self) -> str:
        return f"{self.run}, by {self.way}" if self.way else self.run

    @property
    def factor(self) -> float | None:
        return WAYS[self.run].capacity_factor


TRADITIONAL = tuple(
    Scheme(run, way)
    for run, way in itertools.product(WAYS, gshard.WAYS)
    if WAYS[run].capacity_factor
)
SCHEMES = (Scheme(OURS), *TRADITIONAL)


def against_gshard(rounds: int, say: Callable[[str], None]) -> Part:
    """Trains in all ways, if it isn't kept, and measures steps of each."""
    runs = {}
    for way, seed in itertools.product(WAYS, SEEDS):
        say(f"{way}, seed {seed}, is trained, if it isn't kept: a minute or two")
        runs.setdefault(way, []).append(balance_runs.recorded(way, seed))
    say("training steps take turns")
    turns = measure(rounds)
    lent = balance_busiest.four_ways(runs[OURS][0].load_NLE, copies=False)
    return Part(
        figures=list(figures(runs, turns, lent["lending"].uneven)),
        settings={
            "model": balance_runs.SHAPE,
            "traditional": balance_runs.TRADITIONAL,
            "groups": gshard.GROUPS,
            "seeds": SEEDS,
            "rounds": rounds,
            "steps_a_round": STEPS_A_TURN,
        },
        samples={
            "validation": {
                way: {
                    "tokens": tokens_at(of_way[0]).tolist(),
                    "gflop_a_token": _least_operations(way) / 1e9,
                    "losses": [run.val_V.tolist() for run in of_way],
                }
                for way, of_way in runs.items()
            },
            "seconds": {name: per_round(turns[name]) for name in turns},
        },
    )


def measure(
    rounds: int, steps_a_turn: int = STEPS_A_TURN
) -> Mapping[str, Sequence[Turn]]:
    """Returns turns of all schemes' training steps."""
    workers: dict[str, Worker] = {}
    try:
        for scheme in SCHEMES:
            workers[scheme.name] = Worker(
                "experiments.benchmarks.balance_gshard.training",
                setup=keep_freed_memory,
                run=balance_runs.config(scheme.run),
                scheme=scheme,
            )
        seats = {n: Seat(w, "step", steps_a_turn) for n, w in workers.items()}
        return take_turns(seats, rounds)
    finally:
        for worker in workers.values():
            worker.__exit__()


def training(run: RunConfig, scheme: Scheme) -> Tasks:
    """`step` trains on by a scheme."""
    with balance_runs.with_capacity(scheme.factor, scheme.way):
        return balance_steps.training(run)


def tokens_at(run: Recorded) -> np.ndarray:
    """Returns how many tokens it had seen at each evaluation."""
    return run.val_step_V * balance_runs.tokens_a_step()


def tokens_to(loss: float, runs: Sequence[Recorded]) -> float:
    """Returns after how many tokens the mean of the runs first had this loss."""
    val_V = np.mean([run.val_V for run in runs], axis=0)
    lowest_V = np.minimum.accumulate(val_V)
    return float(np.interp(-loss, -lowest_V, tokens_at(runs[0])))


def operations(cfg: ModelConfig, tokens: int, scheme: Scheme) -> float:
    """Returns the operations of a training step, a token.

    Args:
      tokens: of a device, in `gshard.GROUPS` groups.
    """
    workload = Workload(model=cfg, batch=1, length=tokens)
    linears = {x.name: x.flops for x in workload.step_linears()}
    total = sum(linears.values()) + workload.attention_flops(causal=True)
    if scheme.factor is None:
        return total / tokens
    extra = padding(cfg, tokens, scheme)
    experts = sum(n for name, n in linears.items() if name.startswith("expert"))
    total += experts * (extra.rows - 1) + extra.flops * cfg.num_moe_layers
    return total / tokens


def _least_operations(run: str) -> float:
    """Returns operations of a token in this run, by the scheme that needs the least."""
    cfg, tokens = balance_runs.config().model, balance_runs.tokens_a_step()
    return min(operations(cfg, tokens, s) for s in SCHEMES if s.run == run)


def padding(cfg: ModelConfig, tokens: int, scheme: Scheme) -> Padding:
    """Returns what a device computes and sends beyond what is needed, in training."""
    assert scheme.factor is not None, "ours has none"
    router = cfg.moe.router
    places = gshard.capacity(tokens, router, gshard.GROUPS, scheme.factor)
    slots = places * router.num_experts
    rows = slots * gshard.GROUPS / (tokens * router.top_k)
    einsums = _EINSUMS * 2 * tokens * slots * cfg.hidden_dim
    return Padding(rows, rows * router.top_k, einsums * (scheme.way == "einsum"))


def figures(
    runs: Mapping[str, Sequence[Recorded]],
    turns: Mapping[str, Sequence[Turn]],
    lent: Uneven,
) -> Iterator[Figure]:
    """Yields losses, speeds and operations, and what becomes of the two claims."""
    yield from loss_figures(runs)
    needed = {way: _needed(runs[OURS], runs[way]) for way in WAYS}
    seconds = {scheme: per_round(turns[scheme.name]) for scheme in SCHEMES}
    for scheme in SCHEMES:
        yield Figure(
            name=f"training, {scheme.name}",
            value=balance_runs.tokens_a_step() / statistics.median(seconds[scheme]),
            unit="tokens/s",
            definition="the model that is trained, on one CPU device",
        )
    for scheme in TRADITIONAL:
        of_step = ratio(seconds[scheme], seconds[SCHEMES[0]])
        yield Figure(
            name=f"throughput over {scheme.name}",
            value=of_step * needed[scheme.run],
            unit="x",
            definition="time to the same validation loss, the other's over ours: a "
            "step's, the median over rounds, times the tokens that it takes; of a step "
            f"alone {of_step:.3g}",
            at_least=FASTER,
        )
    yield from _compute(needed)
    yield from _on_h20s(needed, lent)


def loss_figures(runs: Mapping[str, Sequence[Recorded]]) -> Iterator[Figure]:
    """Yields losses at the end, what was dropped, and tokens to the same loss."""
    for way, of_way in runs.items():
        ends = [float(run.val_V[-1]) for run in of_way]
        yield Figure(
            name=f"validation loss, {way}",
            value=statistics.mean(ends),
            unit="nats a token",
            definition=f"mean of {len(ends)} seeds after "
            f"{tokens_at(of_way[0])[-1]:,} tokens; standard deviation "
            f"{statistics.stdev(ends):.4f}",
        )
        if WAYS[way].capacity_factor is None:
            continue
        dropped = np.mean([run.dropped_N for run in of_way], axis=0)
        last = dropped[-len(dropped) // 4 :]
        pairs = zip(runs[OURS], of_way, strict=True)
        each = ", ".join(f"{_needed([ours], [other]):.3g}" for ours, other in pairs)
        yield Figure(
            name=f"choices dropped, {way}",
            value=100 * float(dropped.mean()),
            unit="%",
            definition=f"of all in training; {100 * last.mean():.2f}% in the last "
            "quarter",
        )
        yield Figure(
            name=f"tokens to the same validation loss, {way}, over ours",
            value=_needed(runs[OURS], of_way),
            unit="x",
            definition="the loss is the higher of the two at their ends, of the mean "
            f"of seeds; with each seed {each}",
        )


def _needed(ours: Sequence[Recorded], theirs: Sequence[Recorded]) -> float:
    """Returns the tokens to the same loss, theirs over ours."""
    target = max(
        statistics.fmean(run.val_V[-1] for run in runs) for runs in (ours, theirs)
    )
    return tokens_to(target, theirs) / tokens_to(target, ours)


def _compute(needed: Mapping[str, float]) -> Iterator[Figure]:
    shapes = {
        "the trained model": (balance_runs.config().model, balance_runs.tokens_a_step())
    }
    tokens = balance_cost.PHASES["training"].tokens
    shapes |= {name: (ModelConfig.preset(name), tokens) for name in LARGE}
    for name, (cfg, tokens) in shapes.items():
        ours = operations(cfg, tokens, SCHEMES[0])
        yield Figure(
            name=f"operations of a token, {name}, ours",
            value=ours / 1e9,
            unit="GFLOP",
            definition="of matrix products in a training step",
        )
        for scheme in TRADITIONAL:
            of_token = ours / operations(cfg, tokens, scheme)
            yield Figure(
                name=f"compute over {scheme.name}'s, {name}",
                value=of_token / needed[scheme.run],
                unit="x",
                definition="operations to the same validation loss, ours over the "
                "other's; the tokens that they take are those of the trained model; "
                f"of a token alone {of_token:.3g}",
                at_most=LESS_COMPUTE,
            )


def _on_h20s(needed: Mapping[str, float], lent: Uneven) -> Iterator[Figure]:
    phase: Phase = balance_cost.PHASES["training"]
    even = Uneven(np.ones((1, 1)), np.zeros((1, 1)), np.zeros((1, 1)), 0)
    for name, scheme in itertools.product(LARGE, TRADITIONAL):
        cfg = ModelConfig.preset(name)
        ours = balance_cost.step_seconds(cfg, phase, lent).mean()
        extra = padding(cfg, phase.tokens, scheme)
        theirs = balance_cost.step_seconds(cfg, phase, even, extra).mean()
        of_step = float(theirs / ours)
        yield Figure(
            name=f"throughput over {scheme.name}, {name} on 16 H20s",
            value=of_step * needed[scheme.run],
            unit="x",
            definition="time to the same validation loss by the steps' floors, ours "
            "with experts lent as recorded; all products at the same rate; of a step "
            f"alone {of_step:.3g}",
            at_least=FASTER,
        )
