"""Shows, before anything runs, what a choice would come to.

python scripts/plan.py schedules --pp=8 --microbatches=20
python scripts/plan.py schedules --pp=4 --schedule=1f1b --schedule=dualpipe --out=s.svg
python scripts/plan.py schedules --costs=forward=2,backward=4.5,weight=1.5,latency=0.1
python scripts/plan.py memory --model=v3 --weights=int4-experts
python scripts/plan.py training

schedules: timelines of pipeline schedules, in the terminal or as a picture, and a table
that compares them. Costs are those of 1 / ranks of the model: the forward pass, the
whole backward pass, its part for the weights, a forward and a backward pass overlapped
(pair), and the time from the end of a task to where another rank has its result.

memory: what a model's weights take for inference, by part, in one of three forms, and
what a decoder keeps of a token.

training: what runs of published models, on as many GPUs as their names say, hold on a
device between steps. `scripts/check_hopper.py` compiles the steps.
"""

import rich.console
from absl import app, flags

from jmoe.parallel.schedule import SCHEDULES
from jmoe.plan import timeline, timeline_text
from jmoe.train import runtime

_PP = flags.DEFINE_integer("pp", 8, "Pipeline ranks.")
_MICROBATCHES = flags.DEFINE_integer(
    "microbatches", None, "Of a step; by default 2 a rank."
)
_SCHEDULE = flags.DEFINE_multi_enum(
    "schedule", None, list(SCHEDULES), "Which to show; repeatable. By default all."
)
_CHUNKS = flags.DEFINE_integer("chunks", 2, "Stages a rank, of interleaved_1f1b.")
_COSTS = flags.DEFINE_string(
    "costs", "forward=1,backward=2,weight=1", "What passes take; pair and latency too."
)
_MODEL = flags.DEFINE_string("model", "v3", "Preset whose memory to show.")
_WEIGHTS = flags.DEFINE_string(
    "weights", "native", "How they are kept: native, fp8 or int4-experts."
)
_OUT = flags.DEFINE_string("out", None, "Picture to write, .svg or .png.")


def main(argv: list[str]) -> int:
    runtime.set_up([argv[0], *argv[2:]])
    if len(argv) < 2 or argv[1] not in COMMANDS:
        raise app.UsageError(f"What to show comes first: {', '.join(COMMANDS)}.")
    COMMANDS[argv[1]]()
    return 0


def schedules() -> None:
    """Makes all that were asked for, or all that ranks and microbatches allow."""
    timelines, left_out = [], []
    for name in _SCHEDULE.value or SCHEDULES:
        try:
            timelines.append(_make(name))
        except ValueError as error:
            if _SCHEDULE.value:
                raise
            left_out.append(error)
    if not timelines:
        raise left_out[0]
    console = rich.console.Console(highlight=False)
    if _OUT.value is not None:
        from jmoe.plan import timeline_picture  # matplotlib takes its time

        written = timeline_picture.draw(timelines, runtime.path(_OUT))
        console.print(f"Written to {written}")
    else:
        for line in timeline_text.lines(timelines, console):
            console.print(line)
    console.print(timeline.table(timelines))
    for error in left_out:
        console.print(f"Left out: {error}")


def _make(name: str) -> timeline.Timeline:
    microbatches = _MICROBATCHES.value
    if microbatches is None:
        microbatches = 2 * _PP.value
    options = {"chunks": _CHUNKS.value} if name == "interleaved_1f1b" else {}
    costs = timeline.parse_costs(_COSTS.value)
    return timeline.make(name, _PP.value, microbatches, costs, **options)


def memory() -> None:
    """Shows what all of a model's weights take, without making one."""
    from jmoe.config import ModelConfig
    from jmoe.plan import memory as plan

    cfg = ModelConfig.preset(_MODEL.value)
    parts = plan.weights(cfg, _WEIGHTS.value)
    title = f"{_MODEL.value}, weights={_WEIGHTS.value}"
    console = rich.console.Console(highlight=False)
    console.print(plan.table(parts, title))
    console.print(f"A decoder keeps {plan.cached_bytes(cfg):,} bytes of each token.")


def training() -> None:
    """Shows what each device holds of the runs that are compiled for absent GPUs."""
    from jmoe.plan import held, programs

    runs = (make() for make in programs.PROGRAMS.values())
    rich.console.Console(highlight=False).print(held.table(runs))


COMMANDS = {"schedules": schedules, "memory": memory, "training": training}

start = runtime.command(main)
