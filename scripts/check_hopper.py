"""Compiles steps for GPUs that aren't here, and shows what they would take.

python scripts/check_hopper.py
python scripts/check_hopper.py --program=v2_lite_16
python scripts/check_hopper.py --suite=pipeline
python scripts/check_hopper.py --suite=decode
python scripts/check_hopper.py --suite=balance

It needs no GPU. Where JAX can't compile for GPUs, it makes an environment that can,
once (scripts/make_hopper_env.sh, 5 GB), and goes on in that. What it shows, it also
writes to experiments/results/hopper.json, hopper_pipeline.json, hopper_decode.json or
hopper_balance.json.
"""

import importlib
import importlib.util
import os
import pathlib
import subprocess
import sys

try:
    from jmoe.train import runtime
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}; `pip install -e .` installs jmoe and what it needs.")

import rich.console
from absl import flags

from jmoe.config import DataConfig
from jmoe.data import cache
from jmoe.plan import programs

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for experiments, which are not installed

SUITES = {
    "mesh": programs.PROGRAMS,
    "pipeline": programs.PIPELINES,
    "decode": programs.DECODERS,
    "balance": {**programs.LAYERS, **programs.LENDING_STEPS},
}
# Modules with a `run(names, console) -> Report`.
REPORTS = {
    "mesh": "experiments.benchmarks.hopper",
    "pipeline": "experiments.benchmarks.hopper_pipeline",
    "decode": "experiments.benchmarks.hopper_decode",
    "balance": "experiments.benchmarks.hopper_balance",
}

_SUITE = flags.DEFINE_enum(
    "suite",
    "mesh",
    list(SUITES),
    "Which programs: training steps without a pipeline, or with one by every schedule; "
    "or a decoder's steps; or layers and steps that lend experts, and such that don't.",
)
_PROGRAM = flags.DEFINE_multi_enum(
    "program",
    None,
    [name for suite in SUITES.values() for name in suite],
    "Which of the suite's to compile; repeatable. By default all.",
)
_ENVIRONMENT = flags.DEFINE_string(
    "environment", None, "Where to make it; by default in the user's cache directory."
)

NEEDED = "jax_plugins.xla_cuda13"  # JAX's CUDA plugin, which compiles for GPUs


def main(argv: list[str]) -> int:
    runtime.set_up(argv)
    # GPUs that are here aren't asked, and programs for absent ones can't be cached.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    if not _is_installed(NEEDED):
        go_on_in(_environment())
    return check()


def check() -> int:
    """Compiles all programs asked for; 0 if they meet what is asked of them.

    Raises:
      ValueError: a program is asked for that isn't of the suite.
    """
    suite = SUITES[_SUITE.value]
    chosen = _PROGRAM.value or list(suite)
    if others := sorted(set(chosen) - set(suite)):
        raise ValueError(
            f"--program={others[0]} isn't of --suite={_SUITE.value}, which has "
            f"{', '.join(suite)}."
        )
    console = rich.console.Console(highlight=False)
    # Not before the environment is set up, as JAX reads it when it is imported.
    module = importlib.import_module(REPORTS[_SUITE.value])
    report = module.run(chosen, console)
    console.print(report.table())
    console.print(f"Written to {report.write()}")
    return 0 if all(figure.met is not False for figure in report.figures) else 1


def go_on_in(environment: pathlib.Path) -> None:
    """Makes the environment, if it isn't there, and replaces this process by it.

    Raises:
      ValueError: it can't be made; why, has been printed.
    """
    make = ROOT / "scripts" / "make_hopper_env.sh"
    made = subprocess.run(
        [str(make), str(environment)], env=os.environ | {"PYTHON": sys.executable}
    )
    if made.returncode:
        raise ValueError(
            "JAX can't compile for GPUs here, and an environment where it can wasn't "
            "made; see above. pip install 'jmoe[gpu]' makes any Python one."
        )
    python = str(environment / "bin" / "python")
    os.execv(python, [python, *sys.argv])


def _environment() -> pathlib.Path:
    if _ENVIRONMENT.value is not None:
        return runtime.path(_ENVIRONMENT)
    return cache.directory(DataConfig()) / "hopper"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it is in
        return False


if __name__ == "__main__":
    runtime.command(main)()
