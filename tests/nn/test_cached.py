"""Attention to a cache, step by step, against attention to whole sequences.

The cache's pages are in any order, and NaN before they are written; so is what is fed
where there is no token.

Shapes: B sequence, S position, T token of a step, D hidden.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from jmoe.config import GQAConfig, MLAConfig, YarnConfig
from jmoe.nn import latent_attention
from jmoe.nn.mixers import MIXERS, rotation
from jmoe.ops import paged
from tests import caches

LENGTHS, HIDDEN, PAGE = [14, 9, 8], 24, 4
PADDING = 2  # tokens behind a step's groups
CHUNK = 5  # that is cheaper expanded

YARN = YarnConfig(factor=4.0, original_positions=4, mscale=1.0, mscale_all_dim=0.5)
LATENT = {
    "num_heads": 3,
    "kv_latent_dim": 24,
    "nope_dim": 3,
    "rope_dim": 6,
    "value_dim": 5,
}
GROUPED = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 8}
CASES = {
    "mla": MLAConfig(**LATENT, query_latent_dim=None),
    "mla, query latent, YaRN": MLAConfig(**LATENT, query_latent_dim=12, yarn=YARN),
    "gqa, part rotated, norm, biases": GQAConfig(
        **GROUPED, rope_dim=4, qk_norm_eps=0.01, qkv_bias=True
    ),
    "gqa, interleaved": GQAConfig(**GROUPED, rope_dim=8, rope_pairs="interleaved"),
}

# What each step computes: groups of sequences with equal numbers of tokens, of which a
# sequence may have fewer. First chunks of prompts, then one of another beside tokens
# one by one, then tokens with drafts. What a later step computes again was a wrong
# draft.
STEPS = [
    [(CHUNK, {0: (0, 5), 1: (0, 4)})],
    [(1, {0: (5, 1), 1: (4, 1)}), (CHUNK, {2: (0, 5)})],
    [(1, {0: (6, 1), 1: (5, 1)}), (CHUNK, {2: (5, 1)})],
    [(3, {0: (7, 3), 2: (5, 3), 1: (6, 0)})],
    [(3, {0: (8, 3), 2: (5, 2), 1: (6, 3)})],
    [(CHUNK, {2: (7, 1), 0: (9, 5)})],
]


@functools.cache
def parameters(cfg):
    """Random ones, large enough for every one of them to show."""
    module = MIXERS[cfg.kind].module(cfg, 0.02)
    x_BSD = jnp.zeros((1, 2, HIDDEN))
    shapes = jax.eval_shape(
        module.init, jax.random.key(0), x_BSD, rotation(cfg, 2), None
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: np.float32(0.1 + 0.3 * rng.normal(size=x.shape)),
        meta.unbox(shapes["params"]),
    )


def hidden(dtype=jnp.float32):
    x_BSD = np.random.default_rng(1).normal(size=(3, max(LENGTHS), HIDDEN))
    return x_BSD.astype(dtype)


@functools.partial(jax.jit, static_argnums=0)
def whole(cfg, params, x_BSD):
    module = MIXERS[cfg.kind].module(cfg, 0.02)
    known = rotation(cfg, x_BSD.shape[1]), None
    return module.apply({"params": params}, x_BSD, *known)[0]


@functools.partial(jax.jit, static_argnums=0)
def step(cfg, collections, cache, x_TD, position_T, groups):
    mixer = MIXERS[cfg.kind]
    (y_1TD, _), changed = mixer.module(cfg, 0.02).apply(
        {**collections, "cache": cache},
        x_TD[None],
        mixer.rotation(cfg, jnp.maximum(position_T, 0)[None]),
        None,
        groups,
        mutable=["cache"],
    )
    return y_1TD[0], changed["cache"]


def tokens_of(plan, table_BM):
    """A step's groups, and whose tokens it has, and where, [T]."""
    groups, places = [], []
    for tokens, of_sequence in plan:
        position_BQ = np.full((len(of_sequence), tokens), -1, np.int32)
        for row, (start, count) in zip(position_BQ, of_sequence.values(), strict=True):
            row[:count] = np.arange(start, start + count)
        table = table_BM[list(of_sequence)]
        groups.append(paged.Sequences(table, position_BQ))
        b_BQ = np.repeat(list(of_sequence), tokens)
        places.append((b_BQ, position_BQ.ravel()))
    b_T, position_T = np.concatenate([*places, [[0] * PADDING, [-1] * PADDING]], axis=1)
    return tuple(groups), b_T, position_T


def in_steps(cfg, x_BSD, dtype, **collections):
    """What all steps compute, of the last that computed it, and the cache."""
    collections = {"params": parameters(cfg), **collections}
    table_BM, pages = caches.table(LENGTHS, PAGE)
    kept = MIXERS[cfg.kind].cached(cfg, dtype)
    cache = {
        name: np.full((pages, PAGE, *x.shape), np.nan, x.dtype)
        for name, x in kept.items()
    }
    planned = [tokens_of(plan, table_BM) for plan in STEPS]
    last_BS = np.full(x_BSD.shape[:2], -1)
    for number, (_, b_T, position_T) in enumerate(planned):
        last_BS[b_T[position_T >= 0], position_T[position_T >= 0]] = number
    out_BSD = np.full(x_BSD.shape, np.nan, np.float32)
    for number, (groups, b_T, position_T) in enumerate(planned):
        is_there = position_T >= 0
        is_wrong = last_BS[b_T, position_T] > number
        x_TD = x_BSD[b_T, position_T] + is_wrong[:, None].astype(x_BSD.dtype)
        x_TD[~is_there] = np.nan
        told = position_T.astype(np.int32), groups
        y_TD, cache = step(cfg, collections, cache, x_TD, *told)
        y_TD = np.asarray(y_TD)
        assert not y_TD[~is_there].any(), number
        out_BSD[b_T[is_there], position_T[is_there]] = y_TD[is_there]
    return out_BSD, cache


def whole_outputs(cfg, x_BSD):
    """What the whole gives at each sequence's positions; NaN behind them."""
    out_BSD = np.array(whole(cfg, parameters(cfg), x_BSD), np.float32)
    for row, length in zip(out_BSD, LENGTHS, strict=True):
        row[length:] = np.nan
    return out_BSD


@pytest.mark.parametrize("cfg", CASES.values(), ids=CASES)
def test_a_sequence_in_steps_equals_the_whole(cfg):
    got, _ = in_steps(cfg, hidden(), jnp.float32)
    want = whole_outputs(cfg, hidden())
    assert np.nanstd(want) > 0.1
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["mla", "gqa, interleaved"])
def test_in_bfloat16_steps_differ_by_its_rounding(kind):
    cfg, x_BSD = CASES[kind], hidden(jnp.bfloat16)
    got, cache = in_steps(cfg, x_BSD, jnp.bfloat16)
    assert {x.dtype for x in cache.values()} == {jnp.dtype(jnp.bfloat16)}
    exact = whole_outputs(cfg, x_BSD.astype(jnp.float32))
    of_whole = np.nanmax(abs(whole_outputs(cfg, x_BSD) - exact))
    assert np.nanmax(abs(got - exact)) < 2 * of_whole


def test_a_step_reads_what_was_prepared_of_parameters_in_their_place():
    cfg = CASES["mla"]
    prepared = MIXERS[cfg.kind].prepared(cfg, parameters(cfg))
    got, _ = in_steps(cfg, hidden(), jnp.float32, prepared=prepared)
    want = whole_outputs(cfg, hidden())
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    nothing = jax.tree.map(jnp.zeros_like, prepared)
    other, _ = in_steps(cfg, hidden(), jnp.float32, prepared=nothing)
    assert np.nanmax(abs(other - want)) > 0.1


def test_steps_are_of_both_forms():
    """MLA has two, and the other kind one."""
    for cfg in list(CASES.values())[:2]:
        forms = [latent_attention.absorbs(cfg, tokens) for tokens in (1, 3, CHUNK)]
        assert forms == [True, True, False]


@pytest.mark.parametrize("tokens", [1, CHUNK])
def test_absorbed_projections_give_what_expanded_ones_do(tokens):
    cfg = CASES["mla, query latent, YaRN"]
    rng = np.random.default_rng(0)
    dim = cfg.kv_latent_dim + cfg.rope_dim
    cache_BSX = rng.normal(size=(len(LENGTHS), max(LENGTHS), dim))
    pages_PKX, table_BM = caches.scatter(cache_BSX, LENGTHS, PAGE)
    position_BQ = np.int32(LENGTHS)[:, None] - tokens + np.arange(tokens)
    params = parameters(cfg)
    operands = (
        paged.Sequences(jnp.asarray(table_BM), jnp.asarray(position_BQ, jnp.int32)),
        jnp.float32(rng.normal(size=(len(LENGTHS), tokens, cfg.num_heads, cfg.qk_dim))),
    )
    absorbed, expanded = (
        jax.jit(form, static_argnums=0)(cfg, jnp.asarray(pages_PKX), of_up, *operands)
        for form, of_up in (
            (latent_attention._attend_absorbed, latent_attention.prepared(cfg, params)),
            (latent_attention._attend_expanded, params["kv_up"]["kernel"]),
        )
    )
    assert expanded.std() > 0.1
    np.testing.assert_allclose(absorbed, expanded, rtol=1e-5, atol=1e-5)


def test_the_cache_has_a_latent_and_a_rotated_key_a_token_and_no_more():
    cfg = CASES["mla"]
    _, cache = in_steps(cfg, hidden(), jnp.float32)
    _, pages = caches.table(LENGTHS, PAGE)
    (latent,) = cache.values()
    assert latent.shape == (pages, PAGE, cfg.kv_latent_dim + cfg.rope_dim)
    # And as many entries as there are tokens.
    assert np.isfinite(latent).all(-1).sum() == sum(LENGTHS)
    assert np.isfinite(latent).any(-1).sum() == sum(LENGTHS)
