"""What our server does with three times the requests that it can answer.

Requests come at random, whatever became of those before. Each must be answered, with
the tokens that the engine finds by itself, or refused, by its deadline; and memory must
stay as it is.
"""

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import uvloop

from experiments.benchmarks import serve_clients, serve_servers
from experiments.benchmarks.balance_part import Part
from experiments.benchmarks.hostile import percentile, rss_mib
from experiments.benchmarks.report import Figure
from experiments.benchmarks.serve_clients import Answer, summary
from experiments.benchmarks.serve_model import DIRECTORY, Ask, Reference, differs
from experiments.benchmarks.serve_servers import COMMON, MAX_SEQUENCES, Server, ours
from experiments.benchmarks.workers import Worker
from jmoe.train.runtime import keep_freed_memory

TIMES = 3  # what it can do
DEADLINE = 20.0  # seconds of a request
MARGIN = 2.0  # seconds that a refusal at the deadline may take to arrive
REFUSALS = (429, 503, 504)
QUEUE = 64
PROMPTS = 64  # different ones
_FLAT = 2.0  # MiB a minute
_SETTINGS = (f"engine.queue={QUEUE}", f"engine.deadline_seconds={DEADLINE:g}")
_SHOWN = 20


def overload(
    asks: Iterator[Ask],
    seconds: float,
    variants: Mapping[str, Sequence[str]],
    say: Callable[[str], None],
) -> Part:
    """Measures servers that are told `variants`, settings by a name."""
    asked = list(itertools.islice(asks, PROMPTS))
    with Worker(
        "experiments.benchmarks.serve_direct.references",
        setup=keep_freed_memory,
        directory=DIRECTORY,
        settings=COMMON,
        asks=asked,
    ) as worker:
        found = worker.run("references").result
    expected = dict(zip((ask.prompt for ask in asked), found, strict=True))
    figures, samples, wrong = [], {}, []
    for name, settings in variants.items():
        say(f"{TIMES} times what it can do, {seconds:g} s, {name}")
        with serve_servers.running(ours, DIRECTORY, *_SETTINGS, *settings) as server:
            measured, bad = measure(server, asked, expected, seconds)
        figures += _figures(measured, name)
        samples[name] = measured
        wrong += [f"{name}: {line}" for line in bad[:_SHOWN]]
    told = {
        "seconds": seconds,
        "deadline_seconds": DEADLINE,
        "queue": QUEUE,
        "variants": {name: list(settings) for name, settings in variants.items()},
    }
    return Part(figures, told, samples, tuple(wrong))


def measure(
    server: Server,
    asks: Sequence[Ask],
    expected: Mapping[str, Reference],
    seconds: float,
) -> tuple[dict[str, float], list[str]]:
    """Returns what became of the requests, in numbers, and those that went wrong."""
    warm = serve_clients.together(server.target, asks, MAX_SEQUENCES)
    uvloop.run(warm)
    able = uvloop.run(
        serve_clients.together(server.target, [*asks, *asks], MAX_SEQUENCES)
    )
    can = summary(able)
    rate = TIMES * can["requests"] / can["seconds"]
    with _Memory(server.pids) as memory:
        answers = uvloop.run(
            serve_clients.arriving(
                server.target,
                itertools.cycle(asks),
                rate,
                seconds,
                patience=DEADLINE + 2 * MARGIN,
            )
        )
    outcomes = [outcome(answer, expected[answer.ask.prompt]) for answer in answers]
    counted = Counter(outcomes)
    whole = [x for x, how in zip(answers, outcomes, strict=True) if how == "answered"]
    measured = {
        "can_per_second": can["requests"] / can["seconds"],
        "asked_per_second": len(answers) / seconds,
        "requests": len(answers),
        **{how: counted[how] for how in OUTCOMES},
        "parted": sum(x.tokens != expected[x.ask.prompt].tokens for x in whole),
        "answered_per_second": len(whole) / seconds,
        "answered_p99_seconds": percentile([x.seconds for x in whole] or [0.0], 99),
        "slowest_seconds": max(answer.seconds for answer in answers),
        "mib_a_minute": memory.slope(),
        "grown_mib": memory.grown(),
        "stuck": serve_servers.unfinished(server),
        "well": float(serve_servers.is_well(server.url)),
    }
    bad = [
        f"{how}: status {answer.status}, {answer.seconds:.1f} s, {answer.error[:200]}"
        for answer, how in zip(answers, outcomes, strict=True)
        if how in ("lost", "wrong", "late")
    ]
    return measured, bad


OUTCOMES = ("answered", "refused", "lost", "wrong", "late")


def outcome(answer: Answer, expected: Reference) -> str:
    """Returns one of OUTCOMES."""
    is_answered = answer.is_whole
    if is_answered and differs(answer.tokens, expected):
        return "wrong"
    is_refused = answer.status in REFUSALS or _is_cut_by_deadline(answer)
    if not (is_answered or is_refused):
        return "lost"
    if answer.seconds > DEADLINE + MARGIN:
        return "late"
    return "answered" if is_answered else "refused"


def _is_cut_by_deadline(answer: Answer) -> bool:
    """Whether a stream that had begun was told that its time is over."""
    return answer.status == 200 and "deadline" in answer.error


class _Memory:
    """Processes' resident memory, once a second, while it is entered."""

    def __init__(self, pids: Sequence[int]):
        self._pids = pids
        self._ended = threading.Event()
        self.seconds: list[float] = []
        self.mib: list[float] = []
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "_Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def slope(self) -> float:
        """Returns MiB a minute, of a line through the last three quarters."""
        first = len(self.mib) // 4
        if len(self.mib) - first < 2:
            return 0.0
        line = np.polyfit(self.seconds[first:], self.mib[first:], 1)
        return 60 * float(line[0])

    def grown(self) -> float:
        return self.mib[-1] - self.mib[0]

    def _watch(self) -> None:
        began = time.monotonic()
        while True:
            self.seconds.append(time.monotonic() - began)
            self.mib.append(sum(map(rss_mib, self._pids)))
            if self._ended.wait(1.0):
                return


def _figures(measured: Mapping[str, float], name: str) -> Iterator[Figure]:
    yield Figure(
        name=f"requests, {name}",
        value=measured["requests"],
        unit="",
        definition=f"{measured['asked_per_second']:.1f} a second at random, where it "
        f"can answer {measured['can_per_second']:.1f}",
    )
    for how, definition in {
        "answered": "whole, with the engine's own greedy tokens up to a near tie",
        "refused": f"by {', '.join(map(str, REFUSALS))} or at the deadline, in time",
    }.items():
        yield Figure(
            name=f"{how}, {name}",
            value=measured[how] / measured["requests"],
            unit="share",
            definition=definition,
        )
    for how, definition in {
        "lost": "neither answered nor refused",
        "wrong": "answered by other tokens than the engine's greedy ones",
        "late": f"after the deadline of {DEADLINE:g} s and {MARGIN:g} s more",
        "stuck": "requests that still have a slot, or wait, when all clients are gone",
    }.items():
        yield Figure(
            name=f"{how}, {name}",
            value=measured[how],
            unit="",
            definition=definition,
            at_most=0,
        )
    yield Figure(
        name=f"answered a second over what it can, {name}",
        value=measured["answered_per_second"] / measured["can_per_second"],
        unit="×",
        definition="goodput under overload over that of as many requests as it has "
        "slots",
    )
    yield Figure(
        name=f"memory's slope, {name}",
        value=measured["mib_a_minute"],
        unit="MiB/minute",
        definition="of a line through the server's resident memory, but for the first "
        "quarter of the time",
        at_most=_FLAT,
    )
