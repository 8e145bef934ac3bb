"""Completing prompts: the model's own choice, token by token, whatever the batch."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jmoe.decode.generate import generate
from jmoe.nn.model import Transformer
from jmoe.train import compiled

PROMPTS = [[7], [3, 250, 250], list(range(20, 40))]
NEW = 12


@pytest.fixture(scope="module")
def complete(cfg, variables):
    return functools.partial(generate, cfg, variables)


@pytest.fixture(scope="module")
def greedy(complete) -> list[list[int]]:
    return complete(PROMPTS, max_new_tokens=NEW)


def test_greedy_tokens_are_those_that_a_full_pass_finds_most_likely(
    cfg, variables, greedy
):
    tokens_BT = np.zeros((len(PROMPTS), len(PROMPTS[-1]) + NEW), np.int32)
    for row, prompt, new in zip(tokens_BT, PROMPTS, greedy, strict=True):
        row[: len(prompt) + NEW] = prompt + new
    output = jax.jit(Transformer(cfg).apply)(variables, tokens_BT)
    likely_BT = np.asarray(output.logits.argmax(-1))
    for row, prompt, new in zip(likely_BT, PROMPTS, greedy, strict=True):
        assert row[len(prompt) - 1 :][:NEW].tolist() == new
    assert len({tuple(new) for new in greedy}) == len(PROMPTS)


def test_a_prompt_is_completed_the_same_alone_and_beside_others(complete, greedy):
    for prompt, new in zip(PROMPTS, greedy, strict=True):
        assert complete([prompt], max_new_tokens=NEW) == [new]


def test_fewer_new_tokens_are_the_first_of_more(complete, greedy):
    short = complete(PROMPTS, max_new_tokens=5)
    assert short == [new[:5] for new in greedy]


def test_a_completion_ends_before_the_stop_token(complete, greedy):
    stop = greedy[1][4]
    got = complete(PROMPTS, max_new_tokens=NEW, stop_ids=(stop,))
    assert got[1] == greedy[1][: greedy[1].index(stop)]
    for ids, new in zip(got, greedy, strict=True):
        assert stop not in ids and ids == new[: len(ids)]


def test_a_completion_first_frees_programs_that_are_too_many(
    complete, greedy, tmp_path, monkeypatch
):
    other = jax.jit(lambda x: 2 * x)
    other(1)
    monkeypatch.setattr(compiled, "LIMIT", tmp_path / "max_map_count")
    compiled.LIMIT.write_text("100")
    assert complete(PROMPTS, max_new_tokens=NEW) == greedy
    assert other._cache_size() == 0


def test_the_smallest_nucleus_is_greedy(complete, greedy):
    assert complete(PROMPTS, max_new_tokens=NEW, temperature=1.0, top_p=1e-6) == greedy


def test_a_seed_decides_the_draw_and_each_row_draws_its_own(complete):
    draw = functools.partial(
        complete, [PROMPTS[0]] * 3, max_new_tokens=NEW, temperature=1.0
    )
    first = draw(seed=1)
    assert draw(seed=1) == first != draw(seed=2)
    assert len({tuple(new) for new in first}) == 3
    assert all(len(set(new)) > NEW // 2 for new in first)  # nor each step the same


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_change_no_token(complete, temperature):
    draw = functools.partial(complete, PROMPTS, max_new_tokens=NEW, seed=3)
    plain = draw(temperature=temperature)
    assert draw(temperature=temperature, drafts=1) == plain


def test_a_prompt_has_the_seed_of_its_place(complete):
    draw = functools.partial(complete, max_new_tokens=NEW, temperature=1.0)
    second = draw(PROMPTS, seed=4)[1]
    assert draw([PROMPTS[1]], seed=5) == [second] != draw([PROMPTS[1]], seed=4)


def test_a_model_can_be_filled_to_its_last_position(cfg, complete):
    (new,) = complete([[1, 2]], max_new_tokens=cfg.max_positions - 2)
    assert len(new) == cfg.max_positions - 2


@pytest.mark.parametrize(
    ("prompts", "options", "complaint"),
    [
        ([], {}, "at least one prompt"),
        ([[1], []], {}, "must not be empty"),
        ([[1], [300]], {}, "Token 300 .* vocab_size=300"),
        ([[-1]], {}, "Token -1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ([[1]], {"max_new_tokens": 64}, "65 positions; there are 64"),
        ([[1]], {"temperature": -0.1}, "temperature=-0.1"),
        ([[1]], {"temperature": float("nan")}, "temperature=nan"),
        ([[1]], {"top_p": 0.0}, "top_p=0.0"),
        ([[1]], {"top_p": 1.1}, "top_p=1.1"),
    ],
)
def test_a_mistaken_argument_is_named(complete, prompts, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        complete(prompts, **{"max_new_tokens": NEW, **options})


def test_a_model_without_a_module_that_drafts_is_asked_for_none(cfg, variables):
    without = dataclasses.replace(cfg, mtp_depth=0)
    with pytest.raises(ValueError, match="drafts=1 needs a model with an MTP module"):
        generate(without, variables, [[1]], max_new_tokens=1, drafts=1)


@pytest.mark.parametrize("kind", ["expert_choice", "replayed"])
def test_a_model_that_cannot_choose_for_new_tokens_generates_none(cfg, variables, kind):
    groups = {"num_groups": 1, "groups_per_token": 1}
    router = dataclasses.replace(cfg.moe.router, kind=kind, **groups)
    moe = dataclasses.replace(cfg.moe, router=router)
    with pytest.raises(ValueError, match=f"kind='{kind}' .*generates no text"):
        generate(dataclasses.replace(cfg, moe=moe), variables, [[1]], max_new_tokens=1)
