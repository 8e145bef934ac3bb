"""Requests of one domain on 16 devices: experts where they were, or where load says.

One part of the suite `serve`. The model has random weights and 64 experts; its prompts
are the code of the running Python's own library, a byte a token. An engine on 16
virtual devices (`expert=16`) reads and answers them three times: with experts where
they begin, while a pilot (`jmoe.decode.pilot`) moves them as it measures load, and once
they have arrived. Each device has room for one more expert.

A layer takes as long as its busiest device does. So the ratio of tokens a second is, as
rows, that of the busiest devices' rows; and as time, that of what this CPU takes to
multiply so many rows by a device's experts, alone. What isn't in experts is the same on
all devices, and left out. The virtual devices share the machine's cores, so that their
own time says nothing of it.

Shapes: N step, L MoE layer, E expert, R place, P device, X sampled number of rows.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks.balance_part import Part
from experiments.benchmarks.report import Figure
from experiments.benchmarks.workers import Tasks, Worker, virtual_devices

DEVICES, EXPERTS, TOP_K = 16, 64, 4
CHUNK, PROMPT, NEW = 128, 384, 2  # tokens read at once, of a prompt, of its answer
LENDS = 4  # experts that a device borrows, at most
ROUNDS = 5  # of a product's time
WAYS = ("static", "moving", "placed")


class Served(NamedTuple):
    """What an engine did: [N, L, E] choices, [N, L, R] the expert in each place.

    stalls: seconds by which steps were later, as experts moved behind them. seconds: of
    steps. tokens: of the answers.
    """

    count_NLE: np.ndarray
    expert_NLR: np.ndarray
    stalls: list[float]
    seconds: list[float]
    tokens: list[list[int]]


def placement(requests: int, say: Callable[[str], None]) -> Part:
    """Answers so many requests in each of `WAYS`."""
    say(f"{requests} requests on {DEVICES} virtual devices, in {len(WAYS)} ways")
    side = f"{__name__}.{serve.__name__}"
    environment = virtual_devices(DEVICES)
    with Worker(side, environment=environment, requests=requests) as worker:
        found = {way: Served(*worker.run(way).result) for way in WAYS}
        lent_NLP = worker.run("lent").result
        seconds_X = worker.run("products").result
    rows = {way: rows_of(served) for way, served in found.items()}
    wrong = [
        f"answers are other ones: {way}"
        for way in WAYS
        if found[way].tokens != found["static"].tokens
    ]
    return Part(
        figures=list(figures(found, rows, lent_NLP, seconds_X)),
        settings={
            "devices": DEVICES,
            "experts": EXPERTS,
            "top_k": TOP_K,
            "prompt_tokens": PROMPT,
            "new_tokens": NEW,
            "requests": requests,
        },
        samples={
            way: {
                "busiest": (x.max(-1) / x.mean(-1)).mean(-1).tolist(),
                "stalls": found[way].stalls,
                "seconds": found[way].seconds,
            }
            for way, x in rows.items()
        },
        wrong=tuple(wrong),
    )


def figures(
    found: dict[str, Served],
    rows: dict[str, np.ndarray],
    lent_NLP: np.ndarray,
    seconds_X: dict[int, float],
) -> Iterator[Figure]:
    """Yields what the ways have in rows and in time, and what moving takes."""

    def seconds(rows_NLP: np.ndarray) -> float:
        known = sorted(seconds_X)
        times = [seconds_X[x] for x in known]
        return float(np.interp(rows_NLP.max(-1), known, times).sum())

    for way, rows_NLP in rows.items():
        yield Figure(
            name=f"busiest device over the mean, {way}",
            value=float(_busiest(rows_NLP)),
            unit="x",
            definition="rows, of all steps' layers that have a hundred a device",
        )
    yield Figure(
        name="tokens/s with re-placement over static, as rows",
        value=float(rows["static"].max(-1).sum() / rows["placed"].max(-1).sum()),
        unit="x",
        definition="rows of the busiest devices, summed over layers and steps",
        at_least=1.3,
    )
    yield Figure(
        name="tokens/s with re-placement over static, as time",
        value=seconds(rows["static"]) / seconds(rows["placed"]),
        unit="x",
        definition="what this CPU takes to multiply the busiest devices' rows, alone",
        at_least=1.3,
    )
    above = _busiest(lent_NLP) - 1
    yield Figure(
        name="busiest device above the mean, placed and lent",
        value=100 * float(above),
        unit="%",
        definition=f"as above; a device borrows up to {LENDS} experts for a step",
        at_most=1.0,
    )
    stalls, steps = found["moving"].stalls, found["moving"].seconds
    yield Figure(
        name="a step is later by, as experts move",
        value=1e3 * float(np.max(stalls)),
        unit="ms",
        definition=f"the most of {len(stalls)} steps; virtual devices on this CPU",
        at_most=1e3 * float(np.percentile(steps, 99)),
    )


def _busiest(rows_NLP: np.ndarray) -> float:
    mean_NL = rows_NLP.mean(-1)
    has_many_NL = mean_NL >= 100
    return float((rows_NLP.max(-1)[has_many_NL] / mean_NL[has_many_NL]).mean())


def rows_of(served: Served) -> np.ndarray:
    """Returns the choices that each device computes, [N, L, P]."""
    return _of_places(served).reshape(*served.count_NLE.shape[:2], DEVICES, -1).sum(-1)


def _of_places(served: Served) -> np.ndarray:
    """Returns the choices that come to each place, [N, L, R]: copies share evenly."""
    expert_NLR = served.expert_NLR
    same_NLRR = expert_NLR[..., :, None] == expert_NLR[..., None, :]
    rank_NLR = np.tril(same_NLRR, -1).sum(-1)
    count_NLR = np.take_along_axis(served.count_NLE, expert_NLR, -1)
    copies_NLR = same_NLRR.sum(-1)
    return count_NLR // copies_NLR + (rank_NLR < count_NLR % copies_NLR)


def serve(requests: int) -> Tasks:
    """Returns an engine's ways to answer, what is lent on top, and times of products.

    It runs where there are 16 devices.
    """
    import jax

    from jmoe.config.controller import PLACE, ControllerConfig
    from jmoe.decode.pilot import Pilot

    engine, watch, variables = _engine(jax.devices())
    placing = engine.programs.placing
    # Short windows: there are few requests.
    cfg = ControllerConfig(window_steps=8, cool_down=1, actions=(PLACE,))
    served: dict[str, Served] = {}

    def answer(way: str, pilot: Pilot | None = None) -> Served:
        counts, places, seconds = [], [], []

        def observe(stats: Any) -> None:
            counts.append(stats.count_LE)
            places.append(placing.placement.physical_to_logical)
            seconds.append(stats.seconds)
            if pilot is not None:
                pilot(stats)

        watch.append(observe)
        answers = {
            done.number: done.tokens for done in engine.complete(_requests(requests))
        }
        tokens = [answers[number] for number in range(requests)]
        stalls = pilot.stalls if pilot is not None else []
        arrays = np.stack(counts), np.stack(places)
        served[way] = Served(*arrays, stalls, seconds, tokens)
        return served[way]

    def moving() -> Served:
        pilot = Pilot(cfg, lambda action: None)
        pilot.take(engine)
        found = answer("moving", pilot)
        engine.programs.advance(placing.steps_left)
        return found

    return {
        "static": lambda: answer("static"),
        "moving": moving,
        "placed": lambda: answer("placed"),
        "lent": lambda: lent(served["placed"]),
        "products": lambda: product_seconds(engine.cfg, served["static"], variables),
    }


def _engine(devices: Sequence[Any]) -> tuple[Any, list[Callable[[Any], None]], Any]:
    """Returns an engine on all devices, whom it tells of steps, and its variables."""
    import jax

    from jmoe.config import override, presets
    from jmoe.config.mesh import MeshConfig
    from jmoe.decode.engine import Engine
    from jmoe.decode.limits import Limits
    from jmoe.decode.on_mesh import make_programs
    from jmoe.decode.placing import begin_with
    from jmoe.nn.model import Transformer, make_variables
    from jmoe.parallel.mesh import make_mesh
    from jmoe.train.layout import make_layout, shardings

    run = presets.tiny_run()
    settings = [
        "model.num_layers=3",
        "model.mtp_depth=0",
        f"model.moe.router.num_experts={EXPERTS}",
        f"model.moe.router.top_k={TOP_K}",
        "model.moe.router.num_groups=1",
        "model.moe.router.groups_per_token=1",
        "model.init_std=0.2",  # so that scores differ
    ]
    run = dataclasses.replace(run, mesh=MeshConfig(expert=DEVICES))
    run = override(run, settings)
    mesh = make_mesh(run.mesh, devices)
    layout = make_layout(Transformer(run.model), mesh)
    make = jax.jit(make_variables, static_argnums=(0, 1))
    variables = make(Transformer(run.model), 0)
    divided = jax.device_put(variables, shardings(layout, variables))
    limits = Limits(
        rows=(1,),
        prompts=(1,),
        chunks=(CHUNK,),
        max_length=PROMPT + CHUNK,
        page_size=CHUNK,
    )
    watch: list[Callable[[Any], None]] = [lambda stats: None]
    engine = Engine(
        run.model,
        divided,
        limits,
        programs=make_programs(
            run, mesh, placed=begin_with(run.model, DEVICES, DEVICES)
        ),
        observe=lambda stats: watch[-1](stats),
    )
    return engine, watch, variables


def _requests(count: int) -> Iterator[Any]:
    from jmoe.data import builtin
    from jmoe.decode.requests import Sampling

    documents = builtin.documents(("code",))
    for _ in range(count):
        text = next(documents).encode().ljust(PROMPT)
        yield list(text[:PROMPT]), Sampling(max_new_tokens=NEW)


def lent(served: Served) -> np.ndarray:
    """Returns the rows of each device if experts are lent on top, [N, L, P]."""
    import jax
    import jax.numpy as jnp

    from jmoe.balance import lending

    @jax.jit
    def rows(load_R: jax.Array) -> jax.Array:
        # Where rows come from changes nothing in who lends to whom.
        load_PR = jnp.zeros((DEVICES, load_R.size), jnp.int32).at[0].set(load_R)
        return lending.plan(load_PR, LENDS, 0.0).rows_EP.sum(0)

    load_NLR = _of_places(served)
    flat = load_NLR.reshape(-1, load_NLR.shape[-1]).astype(np.int32)
    found = np.stack([np.asarray(rows(load_R)) for load_R in flat])
    return found.reshape(*load_NLR.shape[:2], DEVICES)


def product_seconds(cfg: Any, served: Served, variables: Any) -> dict[int, float]:
    """Returns the time of products of ever more rows with one device's experts."""
    import jax
    import jax.numpy as jnp

    from jmoe.ops import grouped

    own = EXPERTS // DEVICES + 1
    experts = variables["params"]["moe"]["moe"]["experts"]
    weights = jax.device_put(
        tuple(experts[name][0, :own] for name in ("gate_up", "down")), jax.devices()[0]
    )
    most = int(rows_of(served).max())

    @jax.jit
    def products(x_ND, expert_N1, gate_N1, weights):
        backend = grouped.BACKENDS[cfg.moe.backend]
        return backend(x_ND, expert_N1, gate_N1, *weights, rows=len(x_ND))

    found = {}
    for count in sorted({max(most * n // 8, 1) for n in range(9)}):
        x_ND = jnp.ones((count, cfg.hidden_dim), cfg.dtype)
        expert_N1 = (jnp.arange(count, dtype=jnp.int32) % own)[:, None]
        operands = x_ND, expert_N1, jnp.ones((count, 1)), weights
        jax.block_until_ready(products(*operands))
        times = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            for _ in range(20):
                jax.block_until_ready(products(*operands))
            times.append((time.perf_counter() - began) / 20)
        found[count] = min(times)
    return found
