"""jmoe's sides of the decoding benchmark, all of them by `jmoe.decode.engine`.

Shapes: B sequence, T position.
"""

import pathlib
import shutil
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments import tiny_deep
from experiments.benchmarks import decode_bytes
from experiments.benchmarks.decode_work import (
    Decoding,
    Request,
    mixed_requests,
    random_tokens,
)
from experiments.benchmarks.workers import Tasks
from jmoe.config import DataConfig, ModelConfig, override
from jmoe.data import cache
from jmoe.data.loader import validation_batches
from jmoe.decode.acceptance import acceptance
from jmoe.decode.engine import Engine
from jmoe.decode.limits import Limits
from jmoe.decode.requests import Completion, Sampling
from jmoe.export import hf
from jmoe.nn import block
from jmoe.nn.model import Transformer, make_variables
from jmoe.train import runtime
from jmoe.train.trained import load_trained

# Of which the bytes of a step with a draft are counted: from many layers of experts to
# one, behind dense ones.
SHAPES = {
    "tiny_deep": tiny_deep.get_config().model,
    "v3": ModelConfig.preset("v3"),
    "bench_s, 32 layers, 1 of experts": override(
        ModelConfig.preset("bench_s"),
        ["num_layers=32", "num_dense_layers=31", "mtp_depth=1"],
    ),
}


def export(directory: str, cfg: ModelConfig) -> Tasks:
    """`export` writes random weights, always the same, as everyone reads them."""

    def task() -> None:
        shutil.rmtree(directory, ignore_errors=True)
        make = jax.jit(make_variables, static_argnums=(0, 1))
        hf.save(directory, cfg, make(Transformer(cfg), 0))

    return {"export": task}


def generate(directory: str, decoding: Decoding) -> Tasks:
    """`prefill_B` and `generate_B` of each batch return tokens; `bytes`: see there."""
    cfg, variables = _load(directory)
    limits = Limits(
        rows=decoding.batches,
        prompts=decoding.batches,
        chunks=(decoding.prompt,),
        max_length=decoding.length,
    )
    engine = Engine(cfg, variables, limits)

    def task(batch: int, new: int):
        requests = [Request(x, new) for x in decoding.prompts(batch).tolist()]
        return lambda: [done.tokens for done in complete(engine, requests)]

    tasks = {
        f"{name}_{batch}": task(batch, new)
        for batch in decoding.batches
        for name, new in (("prefill", 1), ("generate", decoding.new))
    }

    def count() -> dict[str, Any]:
        """Returns bytes of steps, by the experts that the model really chooses."""
        most = max(decoding.batches)
        new_BT = np.array(tasks[f"generate_{most}"]())[:, :-1]
        tokens_BT = np.concatenate([decoding.prompts(most), new_BT], axis=1)
        expert_LBTK = decode_bytes.choices(cfg, variables, tokens_BT)
        decoded = expert_LBTK[:, :, decoding.prompt :]
        batches = {b: decode_bytes.of_batch(decoded, b) for b in decoding.batches}
        own = decode_bytes.step_bytes(cfg)
        drafting = decode_bytes.draft_bytes(override(cfg, ["mtp_depth=1"]))
        two = decode_bytes.of_drafts(decoded, 2)
        return {
            "step": {str(b): own.of(experts) for b, experts in batches.items()},
            "experts": {str(b): experts for b, experts in batches.items()},
            "with_draft": own.of(two) + drafting.of(two / cfg.num_moe_layers),
            "draft_shapes": {
                name: decode_bytes.draft_ratio(shape) for name, shape in SHAPES.items()
            },
            "cache_token": cfg.num_layers * block.cached_bytes(cfg),
        }

    return {**tasks, "bytes": count}


def requests(directory: str, count: int, longest: int) -> Tasks:
    """`one_by_one` and `together` complete the same requests; return the new tokens."""
    cfg, variables = _load(directory)
    limits = Limits(rows=(1, 8, 32), chunks=(longest,), max_length=2 * longest)
    engine = Engine(cfg, variables, limits)
    mixed = mixed_requests(cfg, count, longest)

    def one_by_one() -> list[list[int]]:
        return [complete(engine, [request])[0].tokens for request in mixed]

    def together() -> list[list[int]]:
        return [done.tokens for done in complete(engine, mixed)]

    return {"one_by_one": one_by_one, "together": together}


def context(directory: str, lengths: Sequence[int], new: int = 24) -> Tasks:
    """`steps` returns the median seconds of a step behind so many tokens, one row."""
    longest = max(lengths) + new
    cfg, variables = _load(directory)
    cfg = override(cfg, [f"max_positions={longest}"])
    limits = Limits(rows=(1,), prompts=(1,), chunks=(512,), max_length=longest)
    engine = Engine(cfg, variables, limits)
    prompt = random_tokens(cfg, max(lengths)).tolist()

    def steps() -> list[float]:
        found = []
        for length in lengths:
            (done,) = complete(engine, [Request(prompt[:length], new)])
            found.append(statistics.median(np.diff(done.times)))
        return found

    return {"steps": steps}


def arrival(directory: str, rows: int, chunk: int, chunks: int) -> Tasks:
    """`arrival` returns seconds of the steps in which a long prompt is read.

    Of each chunk: `alone`, with nobody else there, and `beside` the tokens of `rows`
    requests. And `undisturbed`, of the steps before.
    """
    length = chunk * chunks + 1
    cfg, variables = _load(directory)
    limits = Limits(rows=(rows,), chunks=(chunk,), max_length=length)
    engine = Engine(cfg, variables, limits)
    tokens = random_tokens(cfg, length - 1).tolist()
    one = Sampling(max_new_tokens=1)
    endless = Sampling(max_new_tokens=length - 8)

    def task() -> dict[str, list[float]]:
        engine.submit(tokens, one)
        alone = [_seconds(engine) for _ in range(chunks)]
        others = [engine.submit(tokens[i : i + 8], endless) for i in range(rows - 1)]
        for _ in range(rows):
            engine.step()
        undisturbed = [_seconds(engine) for _ in range(chunks)]
        engine.submit(tokens, one)
        beside = [_seconds(engine) for _ in range(chunks)]
        for number in others:
            engine.cancel(number)
        while not engine.is_idle:
            engine.step()
        return {"alone": alone, "beside": beside, "undisturbed": undisturbed}

    task()
    return {"arrival": task}


def drafts(workdir: str, prompts: int, prompt: int, new: int) -> Tasks:
    """`drafts_0`, `drafts_1`, ...: complete held-out text, one request after another.

    Each returns the tokens, steps, and how often each draft was right.
    """
    _keep_compiled()
    trained = load_trained(pathlib.Path(workdir))
    cfg = trained.run.model
    (held_out,) = validation_batches(
        trained.run.data, trained.tokenizer, batch_size=prompts, num_batches=1
    )
    texts = held_out.tokens_BT[:, :prompt].tolist()

    def task(count: int):
        limits = Limits(
            rows=(1,),
            prompts=(1,),
            chunks=(prompt,),
            max_length=prompt + new,
            drafts=count,
        )
        engine = Engine(cfg, trained.variables, limits)

        def run() -> dict[str, Any]:
            done = [complete(engine, [Request(text, new)])[0] for text in texts]
            drafted = acceptance(done)
            return {
                "tokens": [each.tokens for each in done],
                "steps": drafted.steps,
                "accepted": list(drafted.accepted),
            }

        run()
        return run

    return {f"drafts_{count}": task(count) for count in (0, 1, 2)}


def complete(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    """Returns the completions of greedy requests, in their order."""
    asked = [(x.prompt, Sampling(max_new_tokens=x.new)) for x in requests]
    return sorted(engine.complete(asked), key=lambda done: done.number)


def _seconds(engine: Engine) -> float:
    start = time.perf_counter()
    engine.step()
    return time.perf_counter() - start


def _load(directory: str) -> tuple[ModelConfig, Any]:
    _keep_compiled()
    return hf.load(directory)


def _keep_compiled() -> None:
    runtime.keep_compiled(cache.directory(DataConfig()) / runtime.COMPILED)
