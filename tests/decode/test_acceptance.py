"""Acceptance: sums over completions, whatever their lengths."""

import pytest

from jmoe.decode.acceptance import acceptance
from jmoe.decode.requests import Completion


def test_steps_and_right_drafts_are_summed_over_completions():
    found = acceptance(
        [
            Completion(0, steps=6, accepted=[4, 1]),
            Completion(1, steps=2, accepted=[2, 1]),
        ]
    )
    assert (found.steps, found.accepted) == (8, (6, 2))
    assert found.rates == (0.75, 0.25)
    assert found.tokens_a_step == pytest.approx(2.0)


def test_where_nothing_was_drafted_a_step_gives_a_token():
    assert acceptance([]).tokens_a_step == 1
    assert acceptance([Completion(0, steps=3)]).rates == ()
    assert acceptance([Completion(0, accepted=[0])]).rates == (0,)
