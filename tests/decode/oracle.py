"""What a decoder must find: each token drawn of the whole sequence, computed again.

And a decoder's cache as bad as it may be: NaN wherever no sequence has a token.

Shapes: T position, V vocabulary, P page, K position in a page, L MoE layer, E expert.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.config import ModelConfig
from jmoe.decode.engine import Engine, Update
from jmoe.decode.requests import Completion, Sampling
from jmoe.decode.sampling import Draws, Sampled, sample
from jmoe.nn.model import Transformer

LENGTH = 64  # of all sequences, with what is behind their end

Request = tuple[Sequence[int], Sampling]


@functools.partial(jax.jit, static_argnums=0)
def _applied(cfg, variables, tokens_BT, is_real_BT):
    output = Transformer(cfg).apply(variables, tokens_BT, None, is_real_BT)
    return output.logits[0], output.measured.load.load_E[: cfg.num_moe_layers]


def _padded(tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    padded_BT = np.zeros((1, LENGTH), np.int32)
    padded_BT[0, : len(tokens)] = tokens
    return padded_BT, np.arange(LENGTH)[None] < len(tokens)


def logits(cfg: ModelConfig, variables: Any, tokens: Sequence[int]) -> np.ndarray:
    """The training model's at each position, [T, V]; those behind the end mean none."""
    return np.asarray(_applied(cfg, variables, *_padded(tokens))[0])


def load(cfg: ModelConfig, variables: Any, tokens: Sequence[int]) -> np.ndarray:
    """How many tokens choose each expert of the training model's layers, [L, E]."""
    return np.asarray(_applied(cfg, variables, *_padded(tokens))[1])


@jax.jit
def _drawn(logits_TV, draws, seen_TV):
    position_T = jnp.arange(1, LENGTH + 1)
    return sample(logits_TV, draws, position_T, lambda: seen_TV)


def recomputed(
    cfg: ModelConfig, variables: Any, tokens: Sequence[int], sampling: Sampling
) -> Sampled:
    """What is drawn behind each position, of all tokens up to it."""
    logits_TV = logits(cfg, variables, tokens)
    is_token_TV = np.zeros(logits_TV.shape, bool)
    is_token_TV[np.arange(len(tokens)), tokens] = True
    values = (
        np.float32(sampling.temperature),
        np.int32(sampling.top_k),
        np.float32(sampling.top_p),
        np.float32(sampling.min_p),
        np.float32(sampling.repetition_penalty),
        np.uint32(sampling.seed),
    )
    draws = Draws(*(np.full(LENGTH, value) for value in values))
    found = _drawn(logits_TV, draws, np.maximum.accumulate(is_token_TV))
    return jax.tree.map(np.asarray, found)


def assert_recomputed(
    cfg: ModelConfig, variables: Any, requests: Iterable[Request], completions: Any
) -> None:
    """Each completion has the tokens, and log-probabilities, of whole sequences."""
    for number, (prompt, sampling) in enumerate(requests):
        done = completions[number]
        want = recomputed(cfg, variables, [*prompt, *done.tokens], sampling)
        new = slice(len(prompt) - 1, len(prompt) - 1 + len(done.tokens))
        assert done.tokens == want.token[new].tolist(), number
        np.testing.assert_allclose(done.logprobs, want.logprob[new], atol=1e-4)
        assert done.finish_reason == "length"
        assert len(done.tokens) == sampling.max_new_tokens


def spoil(engine: Engine) -> None:
    """Fills with NaN what no sequence has in the cache, and what is behind its end."""
    limits, size = engine.limits, engine.limits.page_size
    is_kept_PK = np.zeros((limits.pages, size), bool)
    for live in engine._live:
        for position in range(live.position if live.is_read else live.read):
            is_kept_PK[live.pages[position // size], position % size] = True

    def spoil(x):
        spoiled = np.array(x)
        spoiled[~is_kept_PK] = np.nan
        return jax.device_put(spoiled, x.sharding)

    state = engine.programs.state
    layers, mtp = jax.tree.map(spoil, (state.layers, state.mtp))
    engine.programs.state = state._replace(layers=layers, mtp=mtp)


def step(engine: Engine) -> list[Update]:
    """A step of an engine whose cache is spoiled."""
    spoil(engine)
    return engine.step()


def complete(engine: Engine, requests: Iterable[Request]) -> dict[int, Completion]:
    """Completes requests, each submitted a step after the one before it.

    By their order. So some are being decoded while others are read.
    """
    left, found, ordinal = list(requests), {}, {}
    while left or not engine.is_idle:
        if left:
            ordinal[engine.submit(*left.pop(0))] = len(ordinal)
        for completion, _ in step(engine):
            found[ordinal[completion.number]] = completion
    return found
