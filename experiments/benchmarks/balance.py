"""How evenly devices share the experts' work, by what, and what that costs.

    python scripts/bench.py --suite=balance
    python scripts/bench.py --suite=balance --set "parts=('placement', 'steps')"

Each part is a function of the rounds and of `say`, which is told what comes next. They
have nothing to do with each other but the question, and take from seconds to many
minutes: so each is in balance.json as a report of its own, with its own date and
commit, and what isn't measured now stays there as it is.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import rich.console

from experiments.benchmarks import balance_picture
from experiments.benchmarks.balance_busiest import busiest
from experiments.benchmarks.balance_gshard import against_gshard
from experiments.benchmarks.balance_lending import lending, planning_time
from experiments.benchmarks.balance_part import Part
from experiments.benchmarks.balance_placement import placement
from experiments.benchmarks.balance_steps import steps
from experiments.benchmarks.report import RESULTS, Report
from jmoe.config import checks

Say = Callable[[str], None]

# In the order in which they are shown.
PARTS: dict[str, Callable[[int, Say], Part]] = {
    "lending": lending,
    "planning_time": planning_time,
    "placement": placement,
    "busiest": busiest,
    "gshard": against_gshard,
    "steps": steps,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Which parts are measured."""

    parts: tuple[str, ...] = tuple(PARTS)

    def __post_init__(self):
        for part in self.parts:
            checks.lookup(PARTS, part, "part")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reports:
    """A report of each part that was measured."""

    by_part: Mapping[str, Report]

    @property
    def wrong(self) -> tuple[str, ...]:
        """What was checked and isn't right."""
        return tuple(flaw for part in self.by_part.values() for flaw in part.wrong)

    def table(self) -> rich.console.Group:
        """Returns the parts' tables."""
        return rich.console.Group(*(part.table() for part in self.by_part.values()))

    def write(self, directory: pathlib.Path = RESULTS) -> pathlib.Path:
        """Writes these parts into balance.json, draws what it has, returns its path."""
        path = directory / "balance.json"
        parts: dict[str, Any] = {}
        if path.exists():
            parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
        parts |= {name: report.to_json() for name, report in self.by_part.items()}
        found = {
            "suite": "balance",
            "parts": {x: parts[x] for x in PARTS if x in parts},
        }
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found, indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
        balance_picture.draw(found["parts"], path.with_suffix(".png"))
        return path


def run(rounds: int, say: Say, settings: Settings) -> Reports:
    """Measures these parts; `say` is told what comes next."""
    return Reports(
        by_part={name: _report(name, rounds, say) for name in settings.parts}
    )


def _report(name: str, rounds: int, say: Say) -> Report:
    part = PARTS[name](rounds, say)
    return Report(
        suite=f"balance, {name}",
        compared=(),
        settings=part.settings,
        figures=part.figures,
        samples=part.samples,
        wrong=part.wrong,
    )
