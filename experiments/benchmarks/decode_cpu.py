"""Decoding on the CPU: jmoe, vLLM, transformers, and the machine's own limit.

    python scripts/bench.py --suite=decode_cpu

On the `bench_s` shape with the same random weights, in float32, greedily, 128 new
tokens after prompts of 128, for 1, 8 and 32 prompts at a time:

- whole calls, and calls for the first token alone, of which the prompts' speed is told;
- a decoding step's floor: the bytes of the weights that it reads, of the experts that
  its tokens choose, at the rate that memory was read at in the same round.

They take turns at all of the machine's cores, as in `train_cpu`. vLLM is left out where
it isn't installed: run the suite by the Python of scripts/make_serving_env.sh.

And of jmoe alone: many requests of mixed lengths, one after the other and together; a
step behind contexts of 128 to 8,192 tokens; steps that read a long prompt beside
others' tokens; and drafts of the MTP module, on a model that is trained first
(experiments/tiny_deep.py, about 12 minutes) if it isn't there.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from experiments import tiny_deep
from experiments.benchmarks import decode_figures, decode_vllm
from experiments.benchmarks.decode_work import Decoding
from experiments.benchmarks.report import RESULTS, ROOT, Report
from experiments.benchmarks.train_cpu import KEEP_FREED_MEMORY
from experiments.benchmarks.workers import Seat, Turn, Worker, take_turns
from jmoe.config import ModelConfig
from jmoe.train.runtime import keep_freed_memory

DIRECTORY = ROOT / "runs" / "decode_cpu"
TRAINED = ROOT / "runs" / "tiny_deep"
CONTEXTS = (128, 1024, 2048, 4096, 6144, 8192)

_COMPARED = ("torch", "transformers", "vllm")
_NEEDED = ("torch", "transformers")
_OURS = "experiments.benchmarks.decode_ours"
_REQUESTS = {"count": 64, "longest": 128}
_ARRIVAL = {"rows": 8, "chunk": 128, "chunks": 16}
_DRAFTS = {"prompts": 8, "prompt": 64, "new": 128}
_ONE_ENGINE_ROUNDS = 3  # where sides are parts of one engine, whose speed drifts less


def run(rounds: int, say: Callable[[str], None]) -> Report:
    """Measures everything; `say` is told what comes next.

    Raises:
      ValueError: torch or transformers isn't installed.
    """
    missing = [name for name in _NEEDED if not importlib.util.find_spec(name)]
    if missing:
        raise ValueError(
            f"suite='decode_cpu' measures against {' and '.join(missing)}, not "
            "installed here; pip install -e '.[test]' brings them."
        )
    decoding = Decoding(model=ModelConfig.preset("bench_s"))
    directory = str(DIRECTORY / "bench_s")
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    with _ours("export", directory=directory, cfg=decoding.model) as worker:
        worker.run("export")
    train(say)
    few = min(rounds, _ONE_ENGINE_ROUNDS)
    found = measure_sides(directory, decoding, rounds, say)
    say("64 requests, one by one and together")
    found |= alternate("requests", few, directory=directory, **_REQUESTS)
    say("long contexts")
    found |= alternate("context", few, directory=directory, lengths=CONTEXTS)
    say("a long prompt beside others")
    found |= alternate("arrival", few, directory=directory, **_ARRIVAL)
    say("drafts")
    found |= alternate("drafts", rounds, workdir=str(TRAINED), **_DRAFTS)
    return report(found, decoding, rounds)


def train(say: Callable[[str], None]) -> None:
    """Trains the model of experiments/tiny_deep.py, or finds it trained.

    Raises:
      RuntimeError: it can't be trained.
    """
    steps = tiny_deep.get_config().train.steps
    if (TRAINED / "checkpoints" / str(steps)).is_dir():
        return
    say("experiments/tiny_deep.py: 12 minutes, the first time")
    script = [sys.executable, str(ROOT / "scripts" / "train.py")]
    done = subprocess.run(
        [*script, "--experiment=experiments/tiny_deep.py", f"--workdir={TRAINED}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"scripts/train.py failed: {done.stderr[-2000:]}")


def measure_sides(
    directory: str, decoding: Decoding, rounds: int, say: Callable[[str], None]
) -> dict[str, list[Turn]]:
    """Turns of `read`, and of each side's calls as `<side>_<call>_<batch>`.

    Also `bytes` and `kept`, one each: what a step reads, and how transformers decodes.
    """
    sides = {"ours": lambda: _ours("generate", directory=directory, decoding=decoding)}
    if importlib.util.find_spec("vllm"):
        sides["vllm"] = lambda: Worker(
            "experiments.benchmarks.decode_vllm.generate",
            environment=decode_vllm.environment(),
            directory=directory,
            decoding=decoding,
        )
    else:
        say("vLLM isn't installed here, and left out: see scripts/make_serving_env.sh")
    sides["theirs"] = lambda: Worker(
        "experiments.benchmarks.decode_transformers.generate",
        environment=KEEP_FREED_MEMORY,
        directory=directory,
        decoding=decoding,
    )
    workers: dict[str, Worker] = {}
    try:
        for name, start in sides.items():
            say(f"{name}: compiling")
            workers[name] = start()
        workers["read"] = Worker(
            "experiments.benchmarks.decode_bytes.read",
            environment={"OPENBLAS_NUM_THREADS": "1"},  # each core is a thread's
        )
        say("all sides")
        found = {
            "bytes": [workers["ours"].run("bytes")],
            "kept": [workers["theirs"].run("kept")],
        }
        return found | take_turns(_seats(workers, list(sides), decoding), rounds)
    finally:
        for worker in workers.values():
            worker.__exit__()


def _seats(
    workers: dict[str, Worker], sides: Sequence[str], decoding: Decoding
) -> dict[str, Seat]:
    seats = {"read": Seat(workers["read"], "read", 3)}
    for batch in decoding.batches:
        for name in ("prefill", "generate"):
            calls = 3 if batch == 1 else 1
            task = f"{name}_{batch}"
            seats |= {f"{x}_{task}": Seat(workers[x], task, calls) for x in sides}
    return seats


def alternate(side: str, rounds: int, **options: Any) -> dict[str, list[Turn]]:
    """Turns of all tasks of one of jmoe's sides."""
    with _ours(side, **options) as worker:
        seats = {name: Seat(worker, name) for name in decode_figures.TASKS[side]}
        return take_turns(seats, rounds)


def report(found: dict[str, list[Turn]], decoding: Decoding, rounds: int) -> Report:
    """Returns the figures, and draws the steps behind long contexts."""
    picture = RESULTS / "decode_context.png"
    decode_figures.draw_context(found, CONTEXTS, picture)
    return Report(
        suite="decode_cpu",
        compared=_COMPARED,
        settings={
            "model": "bench_s",
            "prompt": decoding.prompt,
            "new": decoding.new,
            "batches": decoding.batches,
            "rounds": rounds,
            "requests": _REQUESTS,
            "contexts": CONTEXTS,
            "arrival": _ARRIVAL,
            "drafts": _DRAFTS,
            "transformers": found["kept"][0].result,
        },
        figures=[
            *decode_figures.side_figures(found, decoding),
            *decode_figures.request_figures(found),
            *decode_figures.context_figures(found, CONTEXTS),
            *decode_figures.arrival_figures(found),
            *decode_figures.draft_figures(found),
        ],
        samples={
            "seconds": {
                name: [turn.seconds for turn in turns] for name, turns in found.items()
            },
            "bytes": found["bytes"][0].result,
            "context": [turn.result for turn in found["steps"]],
            "arrival": [turn.result for turn in found["arrival"]],
        },
        wrong=decode_figures.wrong(found, decoding),
    )


def _ours(side: str, **options: Any) -> Worker:
    return Worker(f"{_OURS}.{side}", setup=keep_freed_memory, **options)
