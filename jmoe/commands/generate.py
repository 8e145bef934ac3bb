"""Completes a prompt with the model of a run.

python scripts/generate.py --workdir=runs/tiny --prompt="def f("
python scripts/generate.py --prompt="12 + 30 = " --temperature=0
python scripts/generate.py --num_samples=3 --max_new_tokens=200
python scripts/generate.py --weights=int4-experts
python scripts/generate.py --step=best
"""

from absl import flags

from jmoe.config import checks
from jmoe.data import cache
from jmoe.train import runtime

_WORKDIR = flags.DEFINE_string("workdir", "runs/tiny", "Directory of the run.")
_STEP = flags.DEFINE_string(
    "step", None, "Of which checkpoint, or best by validation; by default the newest."
)
_PROMPT = flags.DEFINE_string("prompt", "", "Text to go on from; may be empty.")
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
_WEIGHTS = flags.DEFINE_string(
    "weights", "native", "How they are kept: native, fp8 or int4-experts."
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Of the drawing.", lower_bound=0, upper_bound=checks.MAX_SEED
)


def main(argv: list[str]) -> int:
    runtime.set_up(argv)
    from jmoe.checkpoint.retention import parse_which
    from jmoe.decode.generate import generate
    from jmoe.train.trained import load_trained, quantized

    prompt = runtime.text(_PROMPT)
    runtime.start_jax()
    trained = load_trained(runtime.path(_WORKDIR), step=parse_which(_STEP.value))
    data, tokenizer = trained.run.data, trained.tokenizer
    runtime.keep_compiled(cache.directory(data) / runtime.COMPILED)
    samples = generate(
        trained.run.model,
        quantized(trained, _WEIGHTS.value).variables,
        [tokenizer.prompt(prompt)] * _NUM_SAMPLES.value,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_p=_TOP_P.value,
        seed=_SEED.value,
        stop_ids=tokenizer.stop_ids,
    )
    for number, new in enumerate(samples):
        if number:
            print("-" * 40)
        print(prompt + tokenizer.decode(new))
    return 0


start = runtime.command(main)
