"""What an engine tells of its steps is what they did."""

import numpy as np
import pytest

from jmoe.decode.engine import Engine
from jmoe.decode.stats import StepStats
from tests.decode import oracle
from tests.decode.test_step import DRAFTING, LIMITS, greedy

REQUESTS = greedy(5, 40, 1, 17, 3)


def watched(cfg, variables, limits) -> tuple[dict, list[StepStats]]:
    told: list[StepStats] = []
    engine = Engine(cfg, variables, limits, observe=told.append)
    return oracle.complete(engine, REQUESTS), told


def test_counts_of_all_steps_are_the_training_models_load_of_the_same_tokens(
    cfg, variables
):
    found, told = watched(cfg, variables, LIMITS)
    # The token that is drawn last goes through no layer.
    computed = [
        [*prompt, *found[i].tokens[:-1]] for i, (prompt, _) in enumerate(REQUESTS)
    ]
    want_LE = sum(oracle.load(cfg, variables, tokens) for tokens in computed)
    np.testing.assert_array_equal(sum(stats.count_LE for stats in told), want_LE)
    for stats in told:
        tokens = stats.rows + stats.prompt_tokens
        assert (stats.count_LE.sum(-1) == tokens * cfg.moe.router.top_k).all()


@pytest.mark.parametrize("limits", [LIMITS, DRAFTING], ids=["plain", "with a draft"])
def test_tokens_requests_and_drafts_are_all_counted_once(cfg, variables, limits):
    found, told = watched(cfg, variables, limits)
    prompts = sum(len(prompt) for prompt, _ in REQUESTS)
    assert sum(stats.prompt_tokens for stats in told) == prompts
    new = sum(len(done.tokens) for done in found.values())
    assert sum(stats.new_tokens for stats in told) == new
    steps = sum(done.steps for done in found.values())
    assert sum(stats.rows for stats in told) == steps
    assert sum(stats.drafted for stats in told) == steps * limits.drafts
    accepted = sum(sum(done.accepted) for done in found.values())
    assert sum(stats.accepted for stats in told) == accepted


def test_what_is_held_is_told_as_it_is_behind_the_step(cfg, variables):
    told: list[StepStats] = []
    engine = Engine(cfg, variables, LIMITS, observe=told.append)
    for _ in range(LIMITS.slots + 2):
        engine.submit(*REQUESTS[0])
    engine.step()
    held = LIMITS.slots * -(-len(REQUESTS[0][0] + [0] * 6) // LIMITS.page_size)
    (stats,) = told
    assert (stats.live, stats.waiting) == (LIMITS.slots, 2)
    assert (stats.pages_used, stats.pages) == (held, LIMITS.pages)
    while not engine.is_idle:
        engine.step()
    assert (told[-1].live, told[-1].waiting, told[-1].pages_used) == (0, 0, 0)
    assert 0 < sum(stats.seconds for stats in told)
    steps = len(told)
    engine.step()
    assert len(told) == steps  # there was nothing to do
