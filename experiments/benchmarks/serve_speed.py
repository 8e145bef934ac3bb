"""How fast servers answer, beside each other and beside our engine without HTTP.

All sides take turns: in a round each has the same requests, so many underway at a time,
and none of these prompts comes a second time.
"""

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import uvloop

from experiments.benchmarks import serve_clients, serve_servers
from experiments.benchmarks.balance_part import Part
from experiments.benchmarks.report import Figure
from experiments.benchmarks.serve_clients import Answer, summary
from experiments.benchmarks.serve_model import DIRECTORY, Ask, Batch
from experiments.benchmarks.serve_servers import COMMON, SIDES, Server
from experiments.benchmarks.workers import Worker, ratio
from jmoe.train.runtime import keep_freed_memory

Say = Callable[[str], None]
AT_ONCE = (1, 8, 32)
OURS, VLLM = "ours", "vllm"
_PAUSE_SECONDS = 0.3  # threads of one side spin for a while after their work


def plan(asks: Iterator[Ask], requests: int, rounds: int) -> dict[str, Batch]:
    """Returns each round's requests for each number at once, by a name."""
    shares = [len(range(first, requests, rounds)) for first in range(rounds)]
    return {
        f"{at_once}_{index}": Batch(list(itertools.islice(asks, share)), at_once)
        for at_once in AT_ONCE
        for index, share in enumerate(shares)
    }


def against(
    asks: Iterator[Ask], requests: int, rounds: int, sides: Sequence[str], say: Say
) -> Part:
    """Measures servers, of which `ours` is one, beside each other."""
    missing = {side: serve_servers.needed(side) for side in sides}
    for side in [side for side in sides if missing[side]]:
        say(f"{side} needs {', '.join(missing[side])}: not installed, and left out")
    there = [side for side in sides if not missing[side]]
    batches = plan(asks, requests, rounds)
    with _servers(there, say) as servers:
        _warm_up(servers.values(), batches)
        say(f"{' and '.join(servers)}: {requests} requests, {AT_ONCE} at once")
        found = take_turns(
            {
                side: lambda name, server=server: ask(server, batches[name])
                for side, server in servers.items()
            },
            list(batches),
        )
    figures = [
        figure
        for at_once in AT_ONCE
        for figure in _figures_beside(_of(found, at_once), at_once)
    ]
    return Part(
        figures,
        settings={"sides": there, "requests": requests, "rounds": rounds},
        samples={
            side: {name: summary(answers) for name, answers in turns.items()}
            for side, turns in found.items()
        },
        wrong=tuple(_not_whole(found)),
    )


def of_http(asks: Iterator[Ask], requests: int, rounds: int, say: Say) -> Part:
    """Measures our server beside its engine, called directly."""
    batches = plan(asks, requests, rounds)
    with (
        _servers([OURS], say) as servers,
        Worker(
            "experiments.benchmarks.serve_direct.engine",
            setup=keep_freed_memory,
            directory=DIRECTORY,
            settings=COMMON,
            batches=batches,
        ) as direct,
    ):
        _warm_up(servers.values(), batches)
        direct.run(next(iter(batches)))
        say(f"with HTTP and without: {requests} requests, {AT_ONCE} at once")
        sides: dict[str, Callable[[str], Any]] = {
            "http": lambda name: ask(servers[OURS], batches[name]),
            "direct": lambda name: direct.run(name).result,
        }
        found = take_turns(sides, list(batches))
    figures = []
    rates: dict[str, dict[str, float]] = {
        "http": {name: _rate(answers) for name, answers in found["http"].items()},
        "direct": found["direct"],
    }
    for at_once in AT_ONCE:
        http, direct_ = (list(x.values()) for x in _of(rates, at_once).values())
        for side, values in (("over HTTP", http), ("called directly", direct_)):
            figures.append(
                Figure(
                    name=f"our engine {side}, {at_once} at once",
                    value=statistics.median(values),
                    unit="tokens/s",
                    definition="median over rounds; clients are on the same cores",
                )
            )
        figures.append(
            Figure(
                name=f"over HTTP / called directly, {at_once} at once",
                value=ratio(http, direct_),
                unit="×",
                definition="median over rounds of the ratio of tokens/s in a round",
                at_least=0.95,
            )
        )
    return Part(
        figures,
        settings={"requests": requests, "rounds": rounds},
        samples=rates,
        wrong=tuple(_not_whole({"http": found["http"]})),
    )


def take_turns(
    sides: Mapping[str, Callable[[str], Any]], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Returns what each side returns for each name; every other time backwards."""
    found: dict[str, dict[str, Any]] = {side: {} for side in sides}
    for index, name in enumerate(names):
        order = list(sides) if index % 2 == 0 else list(sides)[::-1]
        for side in order:
            time.sleep(_PAUSE_SECONDS)
            found[side][name] = sides[side](name)
    return found


def ask(server: Server, batch: Batch) -> list[Answer]:
    return uvloop.run(serve_clients.together(server.target, batch.asks, batch.at_once))


@contextlib.contextmanager
def _servers(sides: Sequence[str], say: Say) -> Iterator[dict[str, Server]]:
    with contextlib.ExitStack() as stack:
        servers = {}
        for side in sides:
            say(f"{side}: starting")
            running = serve_servers.running(SIDES[side], DIRECTORY)
            servers[side] = stack.enter_context(running)
        yield servers


def _warm_up(servers, batches: Mapping[str, Batch]) -> None:
    """Has each server compute as many at once as it will, with other prompts."""
    most = max(AT_ONCE)
    few = next(iter(batches.values())).asks[:1]
    turned = [Ask(few[0].prompt[::-1] + str(i), few[0].new) for i in range(most)]
    for server in servers:
        for _ in range(2):
            ask(server, Batch(turned, most))


def _of(found: Mapping[str, Mapping[str, Any]], at_once: int) -> dict[str, dict]:
    """Returns the turns with so many at once, by side."""
    return {
        side: {
            name: turn for name, turn in turns.items() if name.startswith(f"{at_once}_")
        }
        for side, turns in found.items()
    }


def _rate(answers: Sequence[Answer]) -> float:
    return summary(answers)["tokens_per_second"]


def _figures_beside(
    found: Mapping[str, Mapping[str, Sequence[Answer]]], at_once: int
) -> Iterator[Figure]:
    rates = {side: [_rate(x) for x in turns.values()] for side, turns in found.items()}
    whole = {
        side: summary([answer for x in turns.values() for answer in x])
        for side, turns in found.items()
    }
    for side in found:
        yield Figure(
            name=f"{side}, {at_once} at once",
            value=statistics.median(rates[side]),
            unit="tokens/s",
            definition="new tokens of all requests over the seconds until all are "
            "answered; median over rounds",
        )
        for what, key in (("between tokens", "gap"), ("to the first token", "first")):
            for percent in (50, 99):
                yield Figure(
                    name=f"{side}, {what}, {at_once} at once, p{percent}",
                    value=1e3 * whole[side][f"{key}_p{percent}"],
                    unit="ms",
                    definition="as a client sees it, over all rounds",
                )
    for side in [side for side in found if side != OURS]:
        asked = side == VLLM
        yield Figure(
            name=f"ours / {side}, {at_once} at once",
            value=ratio(rates[OURS], rates[side]),
            unit="×",
            definition="median over rounds of the ratio of tokens/s in a round",
            at_least=1.2 if asked else None,
        )
        yield Figure(
            name=f"ours / {side}, between tokens, {at_once} at once, p99",
            value=whole[OURS]["gap_p99"] / whole[side]["gap_p99"],
            unit="×",
            definition="of all gaps of all rounds",
            at_most=1.0 if asked else None,
        )


def _not_whole(found: Mapping[str, Mapping[str, Sequence[Answer]]]) -> Iterator[str]:
    for side, turns in found.items():
        for name, answers in turns.items():
            for answer in answers:
                if not answer.is_whole:
                    yield f"{side}, {name}: {answer.status} {answer.error[:200]}"
