"""Completes prompts by running the whole sequence again for each new token.

Shapes: B prompt, S position, V vocabulary. S has room for the longest prompt and its
new tokens, and comes in few sizes, so that few programs are compiled.
"""

import functools
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.config import ModelConfig
from jmoe.config.model import ROUTERS
from jmoe.decode.sampling import sample
from jmoe.nn.model import Transformer
from jmoe.parallel import vocabulary
from jmoe.train import compiled

# Of variables, tokens [B, S] and the position [B] of each row's last one: float32
# logits [B, V] of the token that follows.
NextLogits = Callable[[Any, jax.Array, jax.Array], jax.Array]

SIZE_STEP = 64  # of S; what lies behind a token is invisible to it


def generate(
    cfg: ModelConfig,
    variables: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Collection[int] = (),
    next_logits: NextLogits | None = None,
) -> list[list[int]]:
    """Returns each prompt's new tokens, up to and without the first of `stop_ids`.

    Each number of prompts, size and number of new tokens is a program of its own; all
    are freed when there are too many (`jmoe.train.compiled`).

    Args:
      variables: {"params": ..., "router_state": ...}.
      prompts: token ids; each at least one.
      temperature, top_p: see `jmoe.decode.sampling.sample`.
      next_logits: the model's, by default on one device; `jmoe.decode.on_mesh` has it
        for variables that are divided. All processes of a mesh call this function.

    Raises:
      ValueError: an empty prompt, a token outside the vocabulary, a negative or
        infinite temperature, top_p outside (0, 1], or more positions than there are.
    """
    _check(cfg, prompts, max_new_tokens, temperature, top_p)
    compiled.make_room()
    length_B = np.array([len(prompt) for prompt in prompts], np.int32)
    size = -(-(length_B.max() + max_new_tokens) // SIZE_STEP) * SIZE_STEP
    tokens_BS = np.zeros((len(prompts), min(size, cfg.max_positions)), np.int32)
    for row, prompt in zip(tokens_BS, prompts, strict=True):
        row[: len(prompt)] = prompt
    done_BS = np.asarray(
        _complete(
            next_logits or _on_one_device(cfg),
            variables,
            tokens_BS,
            length_B,
            max_new_tokens,
            seed,
            temperature,
            top_p,
        )
    )
    return [
        list(
            itertools.takewhile(
                lambda token: token not in stop_ids,
                row[length : length + max_new_tokens].tolist(),
            )
        )
        for row, length in zip(done_BS, length_B, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=(0, 6, 7))
def _complete(
    next_logits,
    variables,
    tokens_BS,
    length_B,
    max_new_tokens,
    seed,
    temperature,
    top_p,
):
    rows_B, key = jnp.arange(len(length_B)), jax.random.key(seed)

    def step(i, tokens_BS):
        logits_BV = next_logits(variables, tokens_BS, length_B + i - 1)
        next_B = sample(logits_BV, jax.random.fold_in(key, i), temperature, top_p)
        return tokens_BS.at[rows_B, length_B + i].set(next_B)

    return jax.lax.fori_loop(0, max_new_tokens, step, jnp.asarray(tokens_BS))


@functools.cache  # one function for a model, that is compiled once
def _on_one_device(cfg: ModelConfig) -> NextLogits:
    def next_logits(variables, tokens_BS, last_B):
        features: Any = Transformer(cfg).apply(variables, tokens_BS, method="features")
        return vocabulary.next_logits(features.hidden_BSD, features.head_DV, last_B)

    return next_logits


def _check(cfg, prompts, max_new_tokens, temperature, top_p):
    if not prompts or not all(prompts):
        raise ValueError("prompts must hold at least one prompt, none of them empty.")
    wrong = [t for prompt in prompts for t in prompt if not 0 <= t < cfg.vocab_size]
    if wrong:
        raise ValueError(
            f"Token {wrong[0]} of a prompt lies outside of vocab_size={cfg.vocab_size}."
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature={temperature} must be at least 0, and finite, and "
            f"top_p={top_p} above 0 and at most 1."
        )
    kind = cfg.moe.router.kind
    if reason := ROUTERS[kind].no_text:
        raise ValueError(
            f"model.moe.router.kind={kind!r} {reason}, and for new tokens there are "
            "none: such a model generates no text."
        )
    longest = max(map(len, prompts)) + max_new_tokens
    if longest > cfg.max_positions:
        raise ValueError(
            f"The longest prompt and max_new_tokens={max_new_tokens} make {longest} "
            f"positions; the model has max_positions={cfg.max_positions}."
        )
