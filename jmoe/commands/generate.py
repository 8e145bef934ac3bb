"""Completes prompts with the model of a run, or of a Hugging Face directory.

python scripts/generate.py --workdir=runs/tiny --prompt="def f("
python scripts/generate.py --prompt="12 + 30 = " --temperature=0
python scripts/generate.py --num_samples=3 --max_new_tokens=200
python scripts/generate.py --prompts=prompts.jsonl --output=completions.jsonl
python scripts/generate.py --interactive --drafts=1
python scripts/generate.py --model=runs/tiny_hf --weights=int4-experts
python scripts/generate.py --step=best

A file of prompts has one a line: as text or, in a .jsonl file, as the field `prompt` of
an object. --interactive completes each line that is typed or piped.
"""

import contextlib
import dataclasses
import sys
from typing import TYPE_CHECKING, TextIO

import rich.console
from absl import flags

from jmoe.config import checks
from jmoe.data import cache
from jmoe.train import runtime

if TYPE_CHECKING:
    from jmoe.decode.limits import Limits
    from jmoe.decode.prompts import Prompt
    from jmoe.decode.requests import Sampling
    from jmoe.decode.terminal import Completer
    from jmoe.train.trained import Trained

_WORKDIR = flags.DEFINE_string("workdir", "runs/tiny", "Directory of the run.")
_MODEL = flags.DEFINE_string(
    "model", None, "Hugging Face directory to take the model from, instead of a run."
)
_STEP = flags.DEFINE_string(
    "step", None, "Of which checkpoint, or best by validation; by default the newest."
)
_WEIGHTS = flags.DEFINE_string(
    "weights", "native", "How they are kept: native, fp8 or int4-experts."
)
_PROMPT = flags.DEFINE_string("prompt", "", "Text to go on from; may be empty.")
_PROMPTS = flags.DEFINE_string("prompts", None, "File of texts to go on from.")
_INTERACTIVE = flags.DEFINE_bool(
    "interactive", False, "Goes on from each line of standard input."
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "New file for what becomes of --prompts; by default it is printed."
)
_NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples", 1, "How many continuations.", lower_bound=1, upper_bound=4096
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 100, "The longest continuation, unless the document ends before."
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.7, "Divides the logits; 0 takes the most likely token."
)
_TOP_P = flags.DEFINE_float(
    "top_p", 0.95, "Draws from the likeliest tokens that together have this share."
)
_TOP_K = flags.DEFINE_integer(
    "top_k", 0, "Draws from so many of the likeliest tokens; 0: from all."
)
_MIN_P = flags.DEFINE_float(
    "min_p", 0.0, "Draws from tokens at least this share as likely as the likeliest."
)
_REPETITION_PENALTY = flags.DEFINE_float(
    "repetition_penalty", 1.0, "Above 1, makes tokens that have occurred less likely."
)
_STOP = flags.DEFINE_multi_string(
    "stop", [], "Text that ends a continuation, and is no part of it; repeatable."
)
_SEED = flags.DEFINE_integer(
    "seed",
    0,
    "Of the first continuation's draws; each next has the next.",
    lower_bound=0,
    upper_bound=checks.MAX_SEED,
)
_DRAFTS = flags.DEFINE_integer(
    "drafts",
    0,
    "How many tokens the MTP module foretells for the model to verify.",
    lower_bound=0,
)
_SET = flags.DEFINE_multi_string(
    "set", [], "field=value of jmoe/decode/limits.py; repeatable."
)


def main(argv: list[str]) -> int:
    runtime.set_up(argv)
    from jmoe.decode.prompts import read_prompts

    check_flags()
    sampling = read_sampling()
    prompt = runtime.text(_PROMPT)
    prompts = None if _PROMPTS.value is None else read_prompts(runtime.path(_PROMPTS))
    runtime.start_jax()
    trained = load()
    runtime.keep_compiled(cache.directory(trained.run.data) / runtime.COMPILED)
    sampling = dataclasses.replace(sampling, stop_ids=trained.tokenizer.stop_ids)
    if _INTERACTIVE.value:
        return complete_lines(trained, sampling)
    if prompts is not None:
        return complete_file(trained, sampling, prompts)
    return complete_one(trained, sampling, prompt)


def check_flags() -> None:
    """Raises ValueError for flags that exclude each other, or name what can't be."""
    from jmoe.config import override
    from jmoe.decode.limits import Limits

    override(Limits(), _SET.value)
    given = [flag.name for flag in (_PROMPT, _PROMPTS, _INTERACTIVE) if flag.present]
    if len(given) > 1:
        raise ValueError(f"--{given[0]} and --{given[1]} exclude each other.")
    if _MODEL.value is not None:
        for flag in (_WORKDIR, _STEP):
            if flag.present:
                raise ValueError(f"--model and --{flag.name} exclude each other.")
    if _OUTPUT.value is not None:
        if _PROMPTS.value is None:
            raise ValueError("--output is for what becomes of --prompts.")
        if runtime.path(_OUTPUT).exists():
            raise ValueError(f"output={_OUTPUT.value!r} exists already.")


def read_sampling() -> "Sampling":
    """Returns what the flags say of how tokens are drawn."""
    from jmoe.decode.requests import Sampling

    return Sampling(
        max_new_tokens=_MAX_NEW_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        min_p=_MIN_P.value,
        repetition_penalty=_REPETITION_PENALTY.value,
        seed=_SEED.value,
        stop_texts=runtime.texts(_STOP),
    )


def load() -> "Trained":
    """Returns the model that the flags name, with its weights as they ask."""
    from jmoe.checkpoint.retention import parse_which
    from jmoe.export.trained import load_exported
    from jmoe.train.trained import load_trained, quantized

    if _MODEL.value is not None:
        trained = load_exported(runtime.path(_MODEL))
    else:
        step = parse_which(_STEP.value)
        trained = load_trained(runtime.path(_WORKDIR), step=step)
    return quantized(trained, _WEIGHTS.value)


def make_completer(
    trained: "Trained", sampling: "Sampling", limits: "Limits"
) -> "Completer":
    """Compiles the model for these limits, or what --set makes of them."""
    from jmoe.config import override
    from jmoe.decode.engine import Engine
    from jmoe.decode.terminal import Completer

    limits = override(limits, _SET.value)
    decode = trained.tokenizer.decode
    with rich.console.Console(stderr=True).status("Compiling"):  # where one watches
        engine = Engine(trained.run.model, trained.variables, limits, text=decode)
    return Completer(engine, trained.tokenizer, sampling, _NUM_SAMPLES.value)


def complete_one(trained: "Trained", sampling: "Sampling", prompt: str) -> int:
    from jmoe.decode.generate import fitting_limits
    from jmoe.decode.requests import check_prompt
    from jmoe.decode.terminal import show_one

    cfg, ids = trained.run.model, trained.tokenizer.prompt(prompt)
    check_prompt(cfg, ids, sampling.max_new_tokens, cfg.max_positions)
    sizes = _NUM_SAMPLES.value, len(ids), sampling.max_new_tokens, _DRAFTS.value
    limits = fitting_limits(cfg, *sizes)
    show_one(make_completer(trained, sampling, limits), prompt)
    return 0


def complete_lines(trained: "Trained", sampling: "Sampling") -> int:
    from jmoe.decode.generate import CHUNKS, fitting_limits
    from jmoe.decode.limits import Limits
    from jmoe.decode.terminal import interact

    cfg = trained.run.model
    sizes = _NUM_SAMPLES.value, min(cfg.max_positions, Limits.max_length), 0
    limits = fitting_limits(cfg, *sizes, _DRAFTS.value)
    limits = dataclasses.replace(limits, chunks=CHUNKS)  # prompts of any length
    all_worked = interact(make_completer(trained, sampling, limits))
    return 0 if all_worked else runtime.MISTAKE


def complete_file(
    trained: "Trained", sampling: "Sampling", prompts: "list[Prompt]"
) -> int:
    """Completes what it can; what it can't is told in its line, and counted."""
    from jmoe.decode.bulk import complete_prompts, encode
    from jmoe.decode.generate import fitting_limits
    from jmoe.decode.terminal import summarize

    cfg = trained.run.model
    ids = encode(trained.tokenizer, prompts, str(_PROMPTS.value))
    room = cfg.max_positions - sampling.max_new_tokens
    longest = max([len(x) for x in ids if len(x) <= room], default=1)
    sizes = len(prompts) * _NUM_SAMPLES.value, longest, sampling.max_new_tokens
    limits = fitting_limits(cfg, *sizes, _DRAFTS.value)
    completer = make_completer(trained, sampling, limits)
    with results() as out:
        found = complete_prompts(completer, prompts, ids, out)
    summarize(found, always=True)
    failed = sum(completion.finish_reason == "error" for completion in found)
    if failed:
        told = (
            f"{failed} of {len(found)} completions failed: see `error` in their lines."
        )
        return runtime.report_mistake(ValueError(told))
    return 0


def results() -> contextlib.AbstractContextManager[TextIO]:
    """Returns where the lines of --prompts go."""
    if _OUTPUT.value is None:
        return contextlib.nullcontext(sys.stdout)
    return runtime.path(_OUTPUT).open("x", encoding="utf-8")


start = runtime.command(main)
