"""A served model: its speed beside vLLM, what HTTP costs, and what it withstands.

    python scripts/bench.py --suite=serve
    python scripts/bench.py --suite=serve --set "parts=('overload',)" --set seconds=60

A `bench_s` model with random weights is exported once, and served in float32 on CPUs.
Clients are on the same machine, and ask for greedy tokens after prompts that are a
user's (`prompts`, a .jsonl file as scripts/generate.py reads it) or the code of the
running Python's own library. There are five parts, which may be measured one by one;
those that aren't stay in the file as they were measured last.

against   servers beside each other: `requests` at 1, 8 and 32 at once. `ours` is
          --engine=jax --local; `vllm` is vLLM's own server, with the arguments that
          scripts/serve.py gives it; `ours_on_ray` and `vllm_on_ray` are both by
          scripts/serve.py. vLLM is left out where it isn't installed: run the suite by
          the Python of scripts/make_serving_env.sh.
http      our server beside its engine, called directly
overload  three times the requests that it can answer: with the controller, which
          admits fewer where they wait for more than 4 s, and without
hostile   requests of every kind in `hostile_requests`, beside normal ones
placement experts of a model on 16 virtual devices, where they were and where load puts
          them (`serve_placement`)
"""

import dataclasses
import datetime
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from experiments.benchmarks import report, serve_model
from experiments.benchmarks.balance_part import Part
from experiments.benchmarks.report import RESULTS, Figure, Report
from experiments.benchmarks.serve_hostile import attacked
from experiments.benchmarks.serve_model import DIRECTORY, Ask
from experiments.benchmarks.serve_overload import overload
from experiments.benchmarks.serve_placement import placement
from experiments.benchmarks.serve_servers import SIDES
from experiments.benchmarks.serve_speed import OURS, VLLM, against, of_http
from experiments.benchmarks.workers import Worker
from jmoe.config import checks

NAME = "serve"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Which parts there are, and how long each is."""

    parts: tuple[str, ...] = ("against", "http", "overload", "hostile", "placement")
    prompts: str | None = None  # a file; the running Python's code
    requests: int = 200  # at each number at once
    new: int = 64  # tokens of each
    sides: tuple[str, ...] = (OURS, VLLM)  # of `against`
    seconds: float = 600.0  # of overload, with each setting of the server
    hostile: int = 1000  # requests

    def __post_init__(self):
        checks.at_least(self, requests=1, new=2, hostile=1)
        checks.above_zero(self, "seconds")
        for field, known in {"parts": PARTS, "sides": SIDES}.items():
            for value in getattr(self, field):
                if value not in known:
                    listed = ", ".join(map(repr, known))
                    raise ValueError(f"{field} has {value!r}, not one of {listed}.")
        if OURS not in self.sides:
            raise ValueError(f"sides={self.sides} must have {OURS!r}.")


Say = Callable[[str], None]
CONTROLLED: Mapping[str, tuple[str, ...]] = {
    "controlled": ("engine.controller={'wait_seconds': 4.0}",),
    "uncontrolled": ("engine.controller={'actions': ()}",),
}


def _against(asks: Iterator[Ask], rounds: int, say: Say, cfg: Settings) -> Part:
    return against(asks, cfg.requests, rounds, cfg.sides, say)


def _http(asks: Iterator[Ask], rounds: int, say: Say, cfg: Settings) -> Part:
    return of_http(asks, cfg.requests, rounds, say)


def _overload(asks: Iterator[Ask], _: int, say: Say, cfg: Settings) -> Part:
    return overload(asks, cfg.seconds, CONTROLLED, say)


def _hostile(_: Iterator[Ask], __: int, say: Say, cfg: Settings) -> Part:
    return attacked(cfg.hostile, say)


def _placement(_: Iterator[Ask], __: int, say: Say, cfg: Settings) -> Part:
    return placement(cfg.requests, say)


PARTS: dict[str, Callable[[Iterator[Ask], int, Say, Settings], Part]] = {
    "against": _against,
    "http": _http,
    "overload": _overload,
    "hostile": _hostile,
    "placement": _placement,
}


def run(rounds: int, say: Say, settings: Settings) -> Report:
    """Measures the parts that are asked for; `say` is told what comes next."""
    if not DIRECTORY.is_dir():
        say("exporting a bench_s model")
        side = f"{serve_model.__name__}.{serve_model.export.__name__}"
        with Worker(side, directory=DIRECTORY) as worker:
            worker.run("export")
    texts = serve_model.prompts(settings.prompts)
    asks = (Ask(text, settings.new) for text in texts)
    records = kept()
    for name in settings.parts:
        part = PARTS[name](asks, rounds, say, settings)
        records[name] = record(part, settings)
    records = {name: records[name] for name in PARTS if name in records}
    return Report(
        suite=NAME,
        compared=("vllm", "ray", "uvicorn"),
        settings={"model": "bench_s", "max_length": serve_model.MAX_LENGTH},
        figures=[Figure(**x) for each in records.values() for x in each["figures"]],
        samples=records,
        wrong=tuple(line for each in records.values() for line in each["wrong"]),
    )


def record(part: Part, cfg: Settings) -> dict[str, Any]:
    """Returns a part as it is kept in the file, with when and of what it was made."""
    now = datetime.datetime.now(datetime.UTC)
    asked = {"new": cfg.new, "prompts": cfg.prompts}
    return {
        "date": now.isoformat(timespec="seconds"),
        "commit": report.commit(),
        "machine": report.machine(),
        **part._asdict(),
        "settings": asked | part.settings,
        "figures": [dataclasses.asdict(figure) for figure in part.figures],
    }


def kept() -> dict[str, Any]:
    """Returns the parts that the suite's file has."""
    path = RESULTS / f"{NAME}.json"
    return json.loads(path.read_text())["samples"] if path.is_file() else {}
