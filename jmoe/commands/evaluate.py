"""Evaluates a model: on held-out text, on problems, for speed, or on others' tasks.

python scripts/evaluate.py --workdir=runs/tiny
python scripts/evaluate.py --weights=native --weights=int4-experts
python scripts/evaluate.py --set train.eval_batches=256 --step=best
python scripts/evaluate.py --set precision=fp8
python scripts/evaluate.py --task=math500 --data=math500.jsonl --max_new_tokens=512
python scripts/evaluate.py --task=math500 --data=math500.jsonl --samples=4 \\
  --temperature=0.6 --endpoint=http://localhost:8000/v1
python scripts/evaluate.py --task=decoding_speed --data=prompts.jsonl
python scripts/evaluate.py --task=arc_easy --limit=100
python scripts/evaluate.py --task=my_task.yaml --model=runs/tiny_hf

--task=perplexity, the default, compares forms of the weights; of a run in FP8 it also
shows, tensor by tensor, how much is lost to e4m3's range. math500 scores answers to
problems, and writes each for reading; a rerun goes on where it stopped. decoding_speed
decodes prompts one by one and many at a time, plain and with drafts. Anything else is a
task of EleutherAI's lm-evaluation-harness, or a YAML file that describes one.
"""

import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from absl import flags

from jmoe.commands import evaluation_tables as tables
from jmoe.config import checks
from jmoe.data import cache, durable
from jmoe.train import runtime

if TYPE_CHECKING:
    from jmoe.evals.completions import Complete, LocalModel
    from jmoe.train.trained import Trained

HARNESS = "harness"
ANSWER_TOKENS = 8192  # DeepSeek-V3's evaluations (arXiv 2412.19437, section 5.3.1)
SPEED_TOKENS = 128
HERE = pathlib.Path("evaluations")  # in a workdir, or in the current directory

_WORKDIR = flags.DEFINE_string("workdir", "runs/tiny", "Directory of the run.")
_MODEL = flags.DEFINE_string(
    "model", None, "A Hugging Face directory, instead of a run."
)
_STEP = flags.DEFINE_string(
    "step", None, "Of which checkpoint, or best by validation; by default the newest."
)
_WEIGHTS = flags.DEFINE_multi_string(
    "weights", None, "native, fp8 or int4-experts; repeatable. By default all."
)
_SET = flags.DEFINE_multi_string("set", [], "path.to.field=value; repeatable.")
_TASK = flags.DEFINE_string(
    "task",
    "perplexity",
    "perplexity, math500, decoding_speed, or a task of lm-evaluation-harness.",
)
_DATA = flags.DEFINE_string("data", None, "A .jsonl file of the task's problems.")
_LIMIT = flags.DEFINE_integer(
    "limit", None, "Only the first so many problems.", lower_bound=1
)
_SAMPLES = flags.DEFINE_integer(
    "samples", 1, "Answers to each problem.", lower_bound=1, upper_bound=4096
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "Divides the logits; 0 takes the most likely token."
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens",
    None,
    "The longest answer, as far as the model has positions; by default 8192, and 128 "
    "where it is about speed.",
    lower_bound=1,
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Of the drawing.", lower_bound=0, upper_bound=checks.MAX_SEED
)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "A file for the answers, which is else in evaluations/, or the figures.",
)
_ENDPOINT = flags.DEFINE_string(
    "endpoint", None, "A server to ask instead, such as http://localhost:8000/v1."
)
_ENDPOINT_MODEL = flags.DEFINE_string(
    "endpoint_model", "", "Its model's name, where it has several."
)
_ENDPOINT_API = flags.DEFINE_string(
    "endpoint_api", "chat", "Chat, or completions of a model without a chat template."
)
_CONCURRENCY = flags.DEFINE_integer(
    "concurrency",
    16,
    "Requests at a time: a server's, or for speed.",
    lower_bound=1,
    upper_bound=4096,
)

OF_A_MODEL = ("workdir", "model", "step", "weights", "set")
OF_AN_ENDPOINT = ("endpoint", "endpoint_model", "endpoint_api", "concurrency")
# What else each task takes; those of the harness have any other name.
OPTIONS = {
    "perplexity": (),
    "math500": (
        *OF_AN_ENDPOINT,
        *("data", "limit", "samples", "temperature", "max_new_tokens", "seed", "out"),
    ),
    "decoding_speed": ("data", "limit", "max_new_tokens", "concurrency", "out"),
    HARNESS: ("limit", "out"),
}


def main(argv: list[str]) -> int:
    runtime.set_up(argv)
    _refuse_idle_flags()
    TASKS.get(_TASK.value, harness)()
    return 0


def perplexity() -> None:
    """Shows the loss on held-out text with each form of the weights."""
    from jmoe.evals.fp8_ranges import fp8_ranges
    from jmoe.evals.perplexity import perplexity
    from jmoe.nn.quantized import FORMS
    from jmoe.ops.fp8 import RECIPES

    trained = _load()
    found = {form: perplexity(trained, form) for form in _WEIGHTS.value or list(FORMS)}
    ranges = fp8_ranges(trained) if trained.run.precision in RECIPES else None
    tables.show_perplexities(found)
    if ranges is not None:
        tables.show_ranges(ranges)


def math500() -> None:
    """Shows the accuracy on problems by level and subject, and writes the answers."""
    from jmoe.decode.requests import Sampling
    from jmoe.evals import math500
    from jmoe.evals.judge import Judge
    from jmoe.evals.sample_file import SampleFile

    sampling = Sampling(
        temperature=_TEMPERATURE.value,
        max_new_tokens=_MAX_NEW_TOKENS.value or ANSWER_TOKENS,
        seed=_SEED.value,
    )
    data = _data()
    problems = math500.read_problems(data)[: _LIMIT.value]
    is_chat = _ENDPOINT.value is not None and _ENDPOINT_API.value == "chat"
    prompt = math500.message if is_chat else math500.opening
    asked = math500.plan(problems, sampling, _SAMPLES.value, prompt)
    with Judge() as judge:
        model, directory, complete = _local() if _ENDPOINT.value is None else _server()
        settings = {
            "data": hashlib.sha256(data.read_bytes()).hexdigest(),
            "model": model,
            "prompt": prompt(""),
            **dataclasses.asdict(sampling),
        }
        with SampleFile(_out(directory, settings), settings) as file:
            samples, left = math500.split(asked, file.known)
            with tables.counting(_TASK.value, len(asked), len(samples)) as tell:
                for sample in math500.evaluate(left, complete, judge):
                    file.append(sample)
                    samples.append(sample)
                    right = sum(sample.is_correct for sample in samples)
                    tell(len(samples), f"{right} right")
    tables.show_math500(math500.score(samples), _SAMPLES.value, file.path)


def decoding_speed() -> None:
    """Shows tokens a second and waits for them, plain and with drafts."""
    from jmoe.decode.requests import Sampling
    from jmoe.evals import decoding_speed

    data = _data()
    model, name = _local_model()
    new = _MAX_NEW_TOKENS.value or SPEED_TOKENS
    most = model.cfg.max_positions - new
    prompts = decoding_speed.read_prompts(data, model.tokenizer, most)[: _LIMIT.value]
    at_a_time = min(_CONCURRENCY.value, len(prompts))
    found = {}
    with tables.counting(_TASK.value) as tell:
        for drafts in range(1 + (model.cfg.mtp_depth > 0)):
            engine = decoding_speed.make_engine(
                model.cfg,
                model.variables,
                prompts,
                new_tokens=new,
                at_a_time=at_a_time,
                drafts=drafts,
            )
            for count in sorted({1, at_a_time}):
                found[drafts, count] = decoding_speed.measure(
                    engine,
                    prompts,
                    Sampling(max_new_tokens=new),
                    one_by_one=count == 1,
                )
                tell(len(found), "measured")
    if _OUT.value is not None:
        rows = [
            {"drafts": drafts, "requests_at_a_time": count, **speed.figures()}
            for (drafts, count), speed in found.items()
        ]
        _write_json({"model": name, "speeds": rows})
    tables.show_speeds(found)


def harness() -> None:
    """Shows what lm-evaluation-harness finds of one of its tasks."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            f"task={_TASK.value!r} is none of {', '.join(TASKS)}, and "
            "lm-evaluation-harness, whose task it may be, isn't installed: "
            "pip install 'jmoe[lm-eval]'."
        )
    from jmoe.evals import lm_eval

    model, _ = _local_model()
    with tables.counting(_TASK.value) as tell:
        found = lm_eval.evaluate(model, _TASK.value, limit=_LIMIT.value, progress=tell)
    if _OUT.value is not None:
        _write_json(found["results"])
    tables.show_harness(found["results"])


TASKS: dict[str, Callable[[], None]] = {
    "perplexity": perplexity,
    "math500": math500,
    "decoding_speed": decoding_speed,
}


def _refuse_idle_flags() -> None:
    """Raises ValueError for a flag that says nothing to the task."""
    task = _TASK.value if _TASK.value in TASKS else HARNESS
    idle = {name for names in OPTIONS.values() for name in names} - {*OPTIONS[task]}
    if _ENDPOINT.value is not None:
        idle.update(OF_A_MODEL)
    elif task == "math500":
        idle.update({*OF_AN_ENDPOINT} - {"endpoint"})
    if _MODEL.value is not None:
        idle.update(("workdir", "step"))
    for name in sorted(idle):
        if flags.FLAGS[name].present:
            raise ValueError(
                f"--{name} says nothing with the other flags, task={_TASK.value!r}."
            )


def _load() -> "Trained":
    """Returns the run's model, or a Hugging Face directory's."""
    from jmoe.checkpoint.retention import parse_which
    from jmoe.export.trained import load_exported
    from jmoe.train.trained import load_trained, reconfigured

    runtime.start_jax()
    if _MODEL.value is not None:
        trained = load_exported(runtime.path(_MODEL))
    else:
        step = parse_which(_STEP.value)
        trained = load_trained(runtime.path(_WORKDIR), step=step)
    trained = reconfigured(trained, _SET.value)
    runtime.keep_compiled(cache.directory(trained.run.data) / runtime.COMPILED)
    return trained


def _local_model() -> "tuple[LocalModel, str]":
    """Returns the model as `LocalModel`, and what tells it apart from others."""
    from jmoe.evals.completions import LocalModel
    from jmoe.train.trained import quantized

    forms = _WEIGHTS.value or ["native"]
    if len(forms) > 1:
        raise ValueError(
            f"weights={','.join(forms)}: task={_TASK.value!r} takes one form."
        )
    trained = _load()
    variables = quantized(trained, forms[0]).variables
    model = LocalModel(trained.run.model, variables, trained.tokenizer)
    return model, f"{trained.run.name}, step {trained.step}, {forms[0]} weights"


def _local() -> "tuple[str, pathlib.Path, Complete]":
    """Returns the model's name, where its answers go, and its completions."""
    model, name = _local_model()
    if _MODEL.value is not None:
        return name, HERE, model.complete
    return name, runtime.path(_WORKDIR) / HERE, model.complete


def _server() -> "tuple[str, pathlib.Path, Complete]":
    """Returns the same of a server's model."""
    from jmoe.evals.endpoint import KEY_VARIABLE, Endpoint, EndpointConfig

    assert _ENDPOINT.value is not None
    cfg = EndpointConfig(
        endpoint=_ENDPOINT.value,
        model=_ENDPOINT_MODEL.value,
        api=_ENDPOINT_API.value,
        concurrency=_CONCURRENCY.value,
    )
    server = Endpoint(cfg, os.environ.get(KEY_VARIABLE))
    return f"{server.model} of {cfg.endpoint}", HERE, server.complete


def _data() -> pathlib.Path:
    if _DATA.value is None:
        raise ValueError(f"task={_TASK.value!r} needs --data, a .jsonl file.")
    return runtime.path(_DATA)


def _write_json(found: Any) -> None:
    """Writes figures to --out."""
    text = json.dumps(found, indent=2, default=str) + "\n"
    durable.write_text(runtime.path(_OUT), text)


def _out(directory: pathlib.Path, settings: dict[str, Any]) -> pathlib.Path:
    """Returns where samples go: of each settings to a file of its own."""
    if _OUT.value is not None:
        return runtime.path(_OUT)
    key = cache.key(*map(str, settings.values()))[:8]
    return directory / f"{_TASK.value}-{key}.jsonl"


start = runtime.command(main)
