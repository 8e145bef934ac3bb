"""Trains a model; run it again with the same --workdir to go on where it stopped.

python scripts/train.py
python scripts/train.py --experiment=experiments/my_run.py --workdir=runs/my_run
python scripts/train.py --set train.steps=2000 --set model.num_layers=6

As several processes, of which each sees some of the devices: the same command for each,
with the address of process 0, such as
--coordinator=10.0.0.1:4321 --num_processes=2 --process_id=0
Slurm (srun) and MPI's launchers tell a process the last two, Slurm the first as well;
Kubernetes' indexed jobs tell the last.
"""

import pathlib
import runpy
import traceback
from collections.abc import Sequence
from typing import Any

from absl import flags

from jmoe.checkpoint import workdir as workdirs
from jmoe.config import RunConfig, checks, override, presets
from jmoe.config.model import ROUTERS
from jmoe.data import cache
from jmoe.parallel import processes
from jmoe.train import runtime

_EXPERIMENT = flags.DEFINE_string(
    "experiment",
    "tiny",
    "A run preset, a file with get_config() -> RunConfig, or a run's config.json.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run; by default runs/<name of the run>."
)
_SET = flags.DEFINE_multi_string(
    "set", [], "path.to.field=value, over the experiment's; repeatable."
)
# Flags, as they differ between machines and between the processes of one run.
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, which must be free there."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many processes train together."
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which of them this one is, from 0."
)

# One of each domain of the embedded corpus.
PROMPTS = ("def mean(values):\n", "The module defines", "12 + 30 = ")
SAMPLE_TOKENS = 64


def main(argv: list[str]) -> int:
    runtime.set_up(argv)
    runtime.outlive_output()
    place = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    with processes.join(*place):
        run = read_experiment(_EXPERIMENT.value, _SET.value)
        if _WORKDIR.value is None:
            workdir = pathlib.Path("runs", run.name)
        else:
            workdir = runtime.path(_WORKDIR)
        from jmoe.train.loop import train  # JAX's start-up waits for a valid record

        runtime.step_after_step()
        runtime.start_jax()
        runtime.keep_compiled(cache.directory(run.data) / runtime.COMPILED)
        signal = train(run, workdir, sample=sample)
    return 128 + signal if signal else 0


def read_experiment(name: str, assignments: Sequence[str]) -> RunConfig:
    """Returns the run that a preset or an experiment file describes, with overrides."""
    if name.endswith(".json"):
        run = workdirs.read_record(checks.local_path("experiment", name))
    elif not name.endswith(".py"):
        run = checks.lookup(presets.RUNS, name, "experiment")()
    else:
        run = _run_file(checks.local_path("experiment", name))
    if not isinstance(run, RunConfig):
        raise ValueError(f"experiment={name!r} has no get_config() -> RunConfig.")
    return override(run, assignments)


def _run_file(path: pathlib.Path) -> Any:
    """Returns what a file's get_config() returns; None if it has none."""
    if not path.is_file():
        raise FileNotFoundError(f"experiment={str(path)!r} is not a file.")
    try:
        return runpy.run_path(str(path)).get("get_config", lambda: None)()
    except Exception as error:  # whatever the user's own code may raise
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        where = f", line {lines[-1]}" if lines else ""
        kind = type(error).__name__
        raise ValueError(f"experiment={str(path)!r}{where}: {kind}: {error}") from error


def sample(run, layout, variables, tokenizer) -> list[tuple[str, str]]:
    """Returns short completions, as far as the model can make them."""
    from jmoe.decode.generate import generate
    from jmoe.decode.on_mesh import make_programs

    if ROUTERS[run.model.moe.router.kind].no_text:
        return []
    prompts = [tokenizer.prompt(text) for text in PROMPTS]
    room = run.model.max_positions - max(map(len, prompts))
    if room < 1:
        return []
    new = generate(
        run.model,
        variables,
        prompts,
        max_new_tokens=min(SAMPLE_TOKENS, room),
        temperature=0.7,
        top_p=0.95,
        stop_ids=tokenizer.stop_ids,
        programs=make_programs(run, layout.mesh),
    )
    return list(zip(PROMPTS, map(tokenizer.decode, new), strict=True))


start = runtime.command(main)
