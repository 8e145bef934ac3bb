"""Our engine without HTTP: a side of the suite `serve`, and what answers must be.

Its engine is made as a server makes it.
"""

import pathlib
import time
from collections.abc import Mapping, Sequence

from experiments.benchmarks.serve_model import Ask, Batch, Reference
from experiments.benchmarks.workers import Tasks
from jmoe.config import override
from jmoe.config.serve import ServeConfig
from jmoe.data.tokenizer import Tokenizer
from jmoe.decode.engine import Engine
from jmoe.decode.requests import Completion, Sampling
from jmoe.serve import jax_app, jax_engine


def engine(
    directory: pathlib.Path, settings: Sequence[str], batches: Mapping[str, Batch]
) -> Tasks:
    """Returns a task for each batch, which returns its tokens a second."""
    made, tokenizer = _load(directory, settings)

    def task(batch: Batch):
        requests = [
            (tokenizer.prompt(ask.prompt), Sampling(max_new_tokens=ask.new))
            for ask in batch.asks
        ]

        def run() -> float:
            began = time.perf_counter()
            done = complete(made, requests, batch.at_once)
            tokens = sum(len(completion.tokens) for completion in done)
            return tokens / (time.perf_counter() - began)

        return run

    return {name: task(batch) for name, batch in batches.items()}


def references(
    directory: pathlib.Path, settings: Sequence[str], asks: Sequence[Ask]
) -> Tasks:
    """`references` returns what follows each prompt, alone."""
    made, tokenizer = _load(directory, settings)

    def run() -> list[Reference]:
        requests = [
            (
                tokenizer.prompt(ask.prompt),
                Sampling(max_new_tokens=ask.new, logprobs=2),
            )
            for ask in asks
        ]
        return list(map(reference, complete(made, requests, at_once=1)))

    return {"references": run}


def complete(
    engine: Engine, requests: Sequence[tuple[list[int], Sampling]], at_once: int
) -> list[Completion]:
    """Returns the completions in the requests' order, so many underway at a time."""
    left, underway = iter(requests), 0
    done: list[Completion] = []
    while True:
        while underway < at_once and (request := next(left, None)) is not None:
            engine.submit(*request)
            underway += 1
        if not underway:
            return sorted(done, key=lambda completion: completion.number)
        ended = [x for x, _ in engine.step() if x.finish_reason]
        underway -= len(ended)
        done += ended


def reference(completion: Completion) -> Reference:
    """Returns the tokens of a completion that tells two likely ones of each."""
    pairs = (sorted(x.values(), reverse=True) for x in completion.top_logprobs)
    return Reference(completion.tokens, [first - second for first, second in pairs])


def _load(directory: pathlib.Path, settings: Sequence[str]) -> tuple[Engine, Tokenizer]:
    cfg = override(ServeConfig(), settings)
    trained = jax_app.load(directory, cfg, None)
    return jax_engine.make_engine(trained, cfg), trained.tokenizer
