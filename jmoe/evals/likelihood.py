"""How likely a model finds given tokens: sums of log-probabilities, in batches.

Pairs of a context and what follows it are sorted by length and packed into batches of
few shapes, each of about as many tokens, so that few programs are compiled and little
is padding. What lies behind a sequence is invisible to it.

Shapes: B sequence, S position, N = B * S, D hidden, V vocabulary.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.config import ModelConfig
from jmoe.config.model import ROUTERS
from jmoe.nn.model import Transformer

BATCH_TOKENS = 4096
SHORTEST = 64  # positions; sizes are this, times powers of two
CHUNK = 1024  # tokens whose logits exist at one time

Pair = tuple[Sequence[int], Sequence[int]]  # a context, and tokens that follow it


class Likelihood(NamedTuple):
    """Nats; is_greedy: each token was the most likely one."""

    log_prob: float
    is_greedy: bool


class _Fitted(NamedTuple):
    """What a pair becomes: tokens, of which the last `scored` are predicted."""

    number: int
    tokens: list[int]
    scored: int


def likelihoods(
    cfg: ModelConfig, variables: Any, pairs: Sequence[Pair]
) -> Iterator[tuple[int, Likelihood]]:
    """Yields a pair's number and how likely its second part is, in any order.

    Of a context that is too long, what is nearest to the second part counts.

    Raises:
      ValueError: an empty context, a token outside of the vocabulary, a second part of
        more tokens than the model has positions, or a router that must know what
        follows.
    """
    kind = cfg.moe.router.kind
    if reason := ROUTERS[kind].no_text:
        raise ValueError(
            f"model.moe.router.kind={kind!r} {reason}: such a model gives a token no "
            "likelihood by those before it alone."
        )
    fitted = sorted(
        (_fit(cfg, number, *pair) for number, pair in enumerate(pairs)),
        key=lambda each: len(each.tokens),
        reverse=True,
    )
    while fitted:
        size = _size(cfg, len(fitted[0].tokens) - 1)
        rows = max(1, BATCH_TOKENS // size)
        batch, fitted = fitted[:rows], fitted[rows:]
        yield from _score(cfg, variables, batch, (rows, size))


def _fit(
    cfg: ModelConfig, number: int, context: Sequence[int], following: Sequence[int]
) -> _Fitted:
    if not context:
        raise ValueError(f"Pair {number} has an empty context.")
    if len(following) > cfg.max_positions:
        raise ValueError(
            f"Pair {number} has {len(following)} tokens to predict; the model has "
            f"max_positions={cfg.max_positions}."
        )
    tokens = [*context, *following][-(cfg.max_positions + 1) :]
    for token in tokens:
        if not 0 <= token < cfg.vocab_size:
            raise ValueError(
                f"Token {token} of pair {number} lies outside of "
                f"vocab_size={cfg.vocab_size}."
            )
    return _Fitted(number, tokens, len(following))


def _size(cfg: ModelConfig, length: int) -> int:
    size = SHORTEST
    while size < length:
        size *= 2
    return min(size, cfg.max_positions)


def _score(
    cfg: ModelConfig, variables: Any, batch: list[_Fitted], shape: tuple[int, int]
) -> Iterator[tuple[int, Likelihood]]:
    input_BS, target_BS = np.zeros((2, *shape), np.int32)
    for row, pair in enumerate(batch):
        length = len(pair.tokens) - 1
        input_BS[row, :length] = pair.tokens[:-1]
        target_BS[row, :length] = pair.tokens[1:]
    found = jax.device_get(_predict(cfg, variables, input_BS, target_BS))
    for row, pair in enumerate(batch):
        end = len(pair.tokens) - 1
        log_prob, is_best = (x_BS[row, end - pair.scored : end] for x_BS in found)
        total = float(log_prob.sum(dtype=np.float64))
        yield pair.number, Likelihood(total, bool(is_best.all()))


@functools.partial(jax.jit, static_argnums=0)
def _predict(
    cfg: ModelConfig, variables: Any, input_BS: jax.Array, target_BS: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns targets' log-probabilities, float32, and whether they are the best."""
    features: Any = Transformer(cfg).apply(variables, input_BS, method="features")

    hidden_ND = features.hidden_BSD.reshape(-1, features.hidden_BSD.shape[-1])
    head_DV = features.head_DV.astype(hidden_ND.dtype)

    def of_token(token):
        hidden_D, target = token
        logits_V = jnp.dot(hidden_D, head_DV, preferred_element_type=jnp.float32)
        return jax.nn.log_softmax(logits_V)[target], logits_V.argmax() == target

    tokens = hidden_ND, target_BS.reshape(-1)
    found = jax.lax.map(of_token, tokens, batch_size=CHUNK)
    return jax.tree.map(lambda x_N: x_N.reshape(target_BS.shape), found)
