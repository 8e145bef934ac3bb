"""Trains a model; run it again with the same --workdir to go on where it stopped.

python scripts/train.py
python scripts/train.py --experiment=experiments/my_run.py --workdir=runs/my_run
python scripts/train.py --set train.steps=2000 --set model.num_layers=6
"""

import pathlib
import runpy
import sys

from absl import app, flags, logging

from jmoe.train.memory import keep_freed_memory

_EXPERIMENT = flags.DEFINE_string(
    "experiment", "tiny", "A run preset, or a file with get_config() -> RunConfig."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run; by default runs/<name of the run>."
)
_SET = flags.DEFINE_multi_string(
    "set", [], "path.to.field=value, over the experiment's; repeatable."
)

PROMPTS = {
    "code": "def mean(values):\n",
    "prose": "The module defines",
    "arithmetic": "12 + 30 = ",
}


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}")
    keep_freed_memory()
    try:
        run = read_experiment(_EXPERIMENT.value, _SET.value)
        workdir = pathlib.Path(_WORKDIR.value or f"runs/{run.name}")
        from jmoe.train.loop import train  # JAX's start-up waits for a valid record

        signal = train(run, workdir, sample=sample)
    except (ValueError, FileNotFoundError) as error:
        logging.error("%s", error)
        return 2
    return 128 + signal if signal else 0


def read_experiment(name: str, assignments: list[str]):
    """The run that a preset or an experiment file describes, with overrides."""
    from jmoe.config import checks, override, presets

    if name.endswith(".py"):
        if not pathlib.Path(name).is_file():
            raise FileNotFoundError(f"experiment={name!r} is not a file.")
        run = runpy.run_path(name)["get_config"]()
    else:
        run = checks.lookup(presets.RUNS, name, "experiment")()
    return override(run, assignments)


def sample(run, state, tokenizer) -> list[tuple[str, str]]:
    """A short completion of a prompt from each domain of the embedded corpus."""
    from jmoe.decode.generate import generate

    variables = {"params": state.params, "router_state": state.router_state}
    prompts = [[tokenizer.eos_id, *tokenizer.encode(p)] for p in PROMPTS.values()]
    new = generate(
        run.model,
        variables,
        prompts,
        max_new_tokens=64,
        temperature=0.7,
        top_p=0.95,
        stop_id=tokenizer.eos_id,
    )
    return [(p, tokenizer.decode(n)) for p, n in zip(PROMPTS.values(), new)]


if __name__ == "__main__":
    sys.exit(app.run(main))
