"""Measures jmoe against the alternatives, in one run on one machine.

python scripts/bench.py --suite=train_cpu
python scripts/bench.py --suite=decode_cpu
python scripts/bench.py --suite=convert
python scripts/bench.py --suite=balance
python scripts/bench.py --suite=mesh
python scripts/bench.py --suite=pipeline
python scripts/bench.py --suite=gpu
python scripts/bench.py --suite=faults
python scripts/bench.py --suite=serve

Each suite prints what was asked and what was measured, and writes it with the machine,
the versions and the commit to experiments/results/<suite>.json. A result that was
checked and is wrong is named at the end, and makes the exit code 1.
"""

import importlib
import pathlib
import sys

try:
    from jmoe.config import override
    from jmoe.train import runtime
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}; `pip install -e .` installs jmoe and what it needs.")

import rich.console
import rich.markup
from absl import app, flags

# The suites are no part of the package that is installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

# Modules with a `run(rounds, say) -> Report`, imported when they are asked for: each
# needs other libraries. One with a record `Settings` takes that too.
SUITES = {
    "balance": "experiments.benchmarks.balance",
    "convert": "experiments.benchmarks.convert",
    "decode_cpu": "experiments.benchmarks.decode_cpu",
    "faults": "experiments.benchmarks.faults",
    "gpu": "experiments.benchmarks.gpu",
    "mesh": "experiments.benchmarks.mesh",
    "pipeline": "experiments.benchmarks.pipeline",
    "serve": "experiments.benchmarks.serve",
    "train_cpu": "experiments.benchmarks.train_cpu",
}

_SUITE = flags.DEFINE_enum(
    "suite", None, list(SUITES), "What to measure.", required=True
)
_REPEATS = flags.DEFINE_integer(
    "repeats", 5, "Rounds in which all sides take a turn.", lower_bound=1
)
_SET = flags.DEFINE_multi_string(
    "set", [], "field=value of the suite's settings, where it has any; repeatable."
)


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}")
    runtime.log_warnings_only()
    console = rich.console.Console(highlight=False)
    suite = importlib.import_module(SUITES[_SUITE.value])
    settings = []
    if hasattr(suite, "Settings"):
        settings = [override(suite.Settings(), _SET.value)]
    elif _SET.value:
        raise ValueError(f"set={_SET.value[0]!r}: this suite has no settings.")
    report = suite.run(_REPEATS.value, console.print, *settings)
    console.print(report.table())
    console.print(f"Written to {report.write()}")
    for result in report.wrong:
        console.print(f"[red]wrong:[/] {rich.markup.escape(result)}")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    runtime.command(main)()
