"""A step computes what the training model does of whole sequences."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jmoe.config import GQAConfig, records
from jmoe.decode.engine import Engine
from jmoe.decode.limits import Limits
from jmoe.decode.requests import Sampling
from jmoe.nn import latent_attention
from jmoe.nn.quantized import quantize_weights
from tests.decode import oracle
from tests.decode.conftest import random_variables

LIMITS = Limits(
    rows=(4,),
    prompts=(3,),
    chunks=(4, 16),
    max_length=64,
    page_size=4,
    num_pages=24,
    top_logprobs=3,
)
ONE_CHUNK = dataclasses.replace(LIMITS, chunks=(16,), top_logprobs=0)
DRAFTING = dataclasses.replace(ONE_CHUNK, drafts=1)


def prompt(length: int) -> list[int]:
    return [(7 * length + 13 * i) % 300 for i in range(length)]


def greedy(*lengths: int, new: int = 6) -> list[oracle.Request]:
    """Requests of prompts of these lengths, which have ever more new tokens."""
    return [
        (prompt(length), Sampling(max_new_tokens=new + i))
        for i, length in enumerate(lengths)
    ]


SAMPLED = [
    (prompt(5), Sampling(max_new_tokens=12, temperature=1.0, seed=3)),
    (prompt(9), Sampling(max_new_tokens=9, temperature=2.0, top_k=20, seed=2**32 - 1)),
    (prompt(1), Sampling(max_new_tokens=12, repetition_penalty=3.0)),
    (
        prompt(20),
        Sampling(max_new_tokens=12, temperature=1.5, top_p=0.7, min_p=0.01, seed=1),
    ),
    (
        prompt(3),
        Sampling(max_new_tokens=20, temperature=0.3, repetition_penalty=1.5, seed=7),
    ),
    (prompt(17), Sampling(max_new_tokens=2)),
]


def check(cfg, variables, limits, requests) -> dict:
    engine = Engine(cfg, variables, limits)
    found = oracle.complete(engine, requests)
    oracle.assert_recomputed(cfg, variables, requests, found)
    return found


def test_chunks_of_all_lengths_and_both_forms_find_the_tokens_of_a_whole_pass(
    cfg, variables
):
    forms = [latent_attention.absorbs(cfg.attention, size) for size in LIMITS.chunks]
    assert forms == [True, False]
    # Absorbed alone, then expanded; several chunks, the last of either kind.
    check(cfg, variables, LIMITS, greedy(1, 3, 4, 5, 15, 16, 17, 20, 40, 33, 2))


def test_sampled_tokens_are_drawn_of_a_whole_pass(cfg, variables):
    found = check(cfg, variables, LIMITS, SAMPLED)
    assert len(set(found[0].tokens)) > 6


@pytest.mark.parametrize("limits", [LIMITS, DRAFTING], ids=["plain", "with a draft"])
def test_prompts_that_are_read_side_by_side_change_no_token(cfg, variables, limits):
    requests = SAMPLED + greedy(33, 20, 40, 2)
    engine = Engine(cfg, variables, limits)
    numbers = [engine.submit(*request) for request in requests]
    assert numbers == list(range(10))
    found = {}
    while not engine.is_idle:
        found |= {done.number: done for done, _ in oracle.step(engine)}
    oracle.assert_recomputed(cfg, variables, requests, found)


def test_pages_of_one_position_change_no_token(cfg, variables):
    limits = dataclasses.replace(ONE_CHUNK, page_size=1, num_pages=90)
    check(cfg, variables, limits, greedy(20, 1, 5, 33, 17, new=4))


def test_pages_may_lie_in_any_order(cfg, variables):
    engine = Engine(cfg, variables, LIMITS)
    engine._pages[0]._free = np.random.default_rng(0).permutation(LIMITS.pages).tolist()
    requests = greedy(20, 1, 33, 5, 18, 16)
    found = oracle.complete(engine, requests)
    oracle.assert_recomputed(cfg, variables, requests, found)


@pytest.mark.parametrize(("drafts", "page_size"), [(1, 4), (2, 4), (3, 64)])
def test_drafts_change_no_token(cfg, variables, drafts, page_size):
    limits = dataclasses.replace(
        DRAFTING, drafts=drafts, page_size=page_size, num_pages=24
    )
    found = check(cfg, variables, limits, SAMPLED + greedy(16, 33, 1))
    assert all(len(done.accepted) == drafts for done in found.values())
    tried = [done for done in found.values() if len(done.tokens) > 2]
    assert all(done.steps for done in tried)


def test_drafts_of_a_module_that_foretells_are_right(cfg, variables):
    limits = dataclasses.replace(DRAFTING, drafts=2)
    variables = always_alike(variables)
    requests = [
        (prompt(5), Sampling(max_new_tokens=13)),
        (prompt(20), Sampling(max_new_tokens=13, temperature=1.0, seed=4)),
    ]
    found = check(cfg, variables, limits, requests)
    for done in found.values():
        assert done.steps == 4 and done.accepted == [4, 4]
    assert len(set(found[1].tokens)) > 6


def always_alike(variables, mtp: float = 0.0):
    """Variables of a model to which all tokens are equally likely.

    mtp: how far from that its MTP module is.
    """

    def scaled(tree, by):
        return jax.tree.map(lambda x: by * x, tree)

    params = dict(variables["params"])
    params["final_norm"] = scaled(params["final_norm"], 0)
    params["mtp_0"] = {
        **params["mtp_0"],
        "norm": scaled(params["mtp_0"]["norm"], mtp),
    }
    return {**variables, "params": params}


@pytest.mark.parametrize("form", ["fp8", "int4-experts"])
def test_weights_in_fewer_bits_are_those_of_the_training_model(cfg, variables, form):
    quantize = jax.jit(functools.partial(quantize_weights, cfg=cfg, form=form))
    params = quantize(variables["params"])
    quantized = {**variables, "params": params}
    found = check(cfg, quantized, DRAFTING, greedy(20, 1, 5, 33))
    native = oracle.complete(Engine(cfg, variables, DRAFTING), greedy(20, 1, 5, 33))
    assert any(found[i].tokens != native[i].tokens for i in found)


GQA = GQAConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_dim=4,
    qkv_bias=True,
    qk_norm_eps=1e-6,
)
FAMILIES = {
    "grouped queries, tied embeddings": (
        {"attention": GQA, "tie_embeddings": True},
        [],
    ),
    "unrolled layers without a query latent, hashed": (
        {},
        [
            "layer_loop=unroll",
            "num_layers=3",
            "attention.query_latent_dim=none",
            "moe.router.kind=hash",
        ],
    ),
    "stacked layers, one hashed, the others noisy": (
        {},
        [
            "num_layers=4",
            "num_dense_layers=2",
            "moe.router.hash_layers=1",
            "moe.router.kind=noisy",
            "moe.router.noise_std=0.5",
        ],
    ),
}


@pytest.mark.parametrize(("fields", "settings"), FAMILIES.values(), ids=FAMILIES)
def test_models_of_all_kinds_find_the_tokens_of_a_whole_pass(cfg, fields, settings):
    cfg = records.override(dataclasses.replace(cfg, **fields), settings)
    check(cfg, random_variables(cfg), DRAFTING, greedy(20, 1, 17, 5, 33))


def test_log_probabilities_in_bfloat16_are_those_of_a_whole_pass(cfg, variables):
    cfg = dataclasses.replace(cfg, dtype="bfloat16")
    engine = Engine(cfg, variables, ONE_CHUNK)
    for number, done in oracle.complete(engine, greedy(20, 1, 5, 33)).items():
        tokens = [*prompt([20, 1, 5, 33][number]), *done.tokens]
        logits_TV = oracle.logits(cfg, variables, tokens)
        start = len(tokens) - len(done.tokens)
        want_TV = jax.nn.log_softmax(np.float32(logits_TV[start - 1 :]))
        want = [want_TV[i, token] for i, token in enumerate(done.tokens)]
        np.testing.assert_allclose(done.logprobs, want, atol=0.05)
