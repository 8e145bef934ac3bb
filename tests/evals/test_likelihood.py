"""Log-probabilities in batches are those of each sequence alone."""

import jax
import numpy as np
import pytest

from jmoe.config import override
from jmoe.evals import likelihood
from jmoe.evals.likelihood import likelihoods
from jmoe.nn.model import Transformer
from tests import smallest_run

LENGTHS = [(1, 1), (5, 2), (30, 4), (1, 63), (62, 2), (3, 0), (7, 3)]


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    return [tuple(rng.integers(1, 300, n).tolist() for n in ns) for ns in LENGTHS]


@pytest.fixture(scope="module")
def oracle(cfg, variables):
    """Returns log-probabilities [S, V] of what follows each token of a sequence."""
    apply = jax.jit(Transformer(cfg).apply)

    def log_probs(tokens):
        padded = np.zeros((1, cfg.max_positions), np.int32)
        padded[0, : len(tokens)] = tokens
        logits_SV = apply(variables, padded).logits[0, : len(tokens)]
        return np.asarray(jax.nn.log_softmax(logits_SV), np.float64)

    return log_probs


def test_sums_and_greediness_are_those_of_one_full_pass(cfg, variables, pairs, oracle):
    got = dict(likelihoods(cfg, variables, pairs))
    assert sorted(got) == list(range(len(pairs)))
    for number, (context, following) in enumerate(pairs):
        log_SV = oracle([*context, *following][:-1])[len(context) - 1 :]
        want = sum(log_SV[i, token] for i, token in enumerate(following))
        assert got[number].log_prob == pytest.approx(want, abs=1e-3)
    assert got[5] == (0.0, True)  # of nothing


def test_the_most_likely_text_is_greedy_and_any_other_is_not(cfg, variables, oracle):
    context = [4, 8, 15]
    for _ in range(3):
        context.append(int(oracle(context)[-1].argmax()))
    greedy = context[:3], context[3:]
    other = context[:3], [*context[3:5], (context[5] + 1) % 300]
    found = dict(likelihoods(cfg, variables, [greedy, other]))
    assert [found[i].is_greedy for i in range(2)] == [True, False]


def test_a_context_that_is_too_long_loses_its_beginning(cfg, variables, pairs):
    context, following = pairs[4]
    longer = [9] * 40 + context
    kept = (longer[-(cfg.max_positions + 1 - len(following)) :], following)
    found = dict(likelihoods(cfg, variables, [(longer, following), kept]))
    assert found[0] == found[1]


def test_few_shapes_are_compiled_whatever_the_lengths(cfg, variables, monkeypatch):
    shapes = set()
    predict = likelihood._predict

    def watched(cfg, variables, input_BS, target_BS):
        shapes.add(input_BS.shape)
        return predict(cfg, variables, input_BS, target_BS)

    monkeypatch.setattr(likelihood, "_predict", watched)
    pairs = [([1] * n, [2]) for n in range(1, 60)] * 3
    assert len(dict(likelihoods(cfg, variables, pairs))) == len(pairs)
    assert shapes == {(likelihood.BATCH_TOKENS // 64, 64)}


@pytest.mark.parametrize(
    ("pair", "complaint"),
    [
        (([], [1]), "Pair 1 has an empty context"),
        (([1], [2] * 65), "Pair 1 has 65 tokens to predict; .* max_positions=64"),
        (([1], [300]), "Token 300 of pair 1 lies outside of vocab_size=300"),
    ],
)
def test_what_has_no_likelihood_is_refused(cfg, variables, pair, complaint):
    with pytest.raises(ValueError, match=complaint):
        list(likelihoods(cfg, variables, [([1], [2]), pair]))


def test_a_model_whose_experts_choose_is_refused_by_name(variables):
    router = ("auxiliary_loss=none", "num_groups=1", "groups_per_token=1")
    chosen = [*router, "kind=expert_choice"]
    run = override(
        smallest_run.get_config(), [f"model.moe.router.{each}" for each in chosen]
    )
    with pytest.raises(ValueError, match="kind='expert_choice' compares tokens with"):
        list(likelihoods(run.model, variables, [([1], [2])]))
