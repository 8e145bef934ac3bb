"""How evenly devices share the experts' work, by what, and what that costs.

    python scripts/bench.py --suite=balance

Each part is a function of the rounds and of `say`, which is told what comes next. They
have nothing to do with each other but the question.
"""

from collections.abc import Callable

from experiments.benchmarks.balance_lending import lending, planning_time
from experiments.benchmarks.balance_part import Part
from experiments.benchmarks.balance_placement import placement
from experiments.benchmarks.balance_steps import steps
from experiments.benchmarks.report import Report

Say = Callable[[str], None]

# In the order in which they are shown. A name is that of the settings and samples, too.
PARTS: dict[str, Callable[[int, Say], Part]] = {
    "lending": lending,
    "planning_time": planning_time,
    "placement": placement,
    "steps": steps,
}


def run(rounds: int, say: Say) -> Report:
    """Measures everything; `say` is told what comes next."""
    parts = {name: part(rounds, say) for name, part in PARTS.items()}
    return Report(
        suite="balance",
        compared=(),
        settings={name: part.settings for name, part in parts.items()},
        figures=[figure for part in parts.values() for figure in part.figures],
        samples={name: part.samples for name, part in parts.items()},
        wrong=tuple(result for part in parts.values() for result in part.wrong),
    )
