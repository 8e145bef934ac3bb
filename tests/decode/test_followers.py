"""Other processes run the steps that process 0's engine decides, in its order."""

import jax
import numpy as np
import pytest

from jmoe.decode.followers import END, Leader, decode, encode, follow
from jmoe.decode.limits import StepSize
from jmoe.decode.live import Live, PromptChunk, make_chunks, make_rows
from jmoe.decode.requests import Completion, Sampling
from tests.decode.test_step import LIMITS


class Recorded:
    """Programs that compute nothing, and know what they were asked."""

    parts, turns = 2, 1

    def __init__(self):
        self.asked = []

    def warm_up(self, size):
        self.asked.append(size)

    def run(self, rows, chunks):
        self.asked.append((rows, chunks))
        return ["found"]

    def flush(self):
        self.asked.append("flush")
        return []


def step(position: int):
    size = LIMITS.size(1, 1, 3)
    sampling = Sampling(temperature=0.7, seed=2**32 - 1, top_p=0.3)
    prompt = [5, 6, 7, 8]
    live = Live(prompt, sampling, Completion(0), 0.0, slot=1, pages=[2, 0], read=4)
    live.tail = [9] + [3] * LIMITS.drafts
    live.completion.tokens = [1] * position
    read = Live(prompt, sampling, Completion(1), 0.0, slot=0, pages=[1])
    rows = make_rows(LIMITS, [[live], []], size.rows)
    return rows, make_chunks(LIMITS, [[], [PromptChunk(read, 0, 3)]], size)


def same(left, right) -> bool:
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def test_a_steps_arrays_come_as_they_were_sent():
    sent = step(position=3)
    assert same(decode(LIMITS, 2, *encode(2, *sent)), sent)
    assert not same(decode(LIMITS, 2, *encode(2, *step(position=4))), sent)


def test_followers_make_the_leaders_calls_in_its_order_until_it_ends():
    sent, own, others = [], Recorded(), Recorded()
    leader = Leader(own, sent.append)
    size = StepSize(3, 2, 16)
    leader.warm_up(size)
    calls = [step(1), step(2), "flush", step(3)]
    for call in calls:
        if call == "flush":
            assert leader.flush() == []
        else:
            assert leader.run(*call) == ["found"]
    sent += [[END], "is not looked at"]
    follow(others, LIMITS, iter(sent).__next__)
    assert others.asked[0] == own.asked[0] == size
    for asked, called in zip(others.asked[1:], calls, strict=True):
        assert asked == called if "flush" in (asked, called) else same(asked, called)


def test_a_step_is_sent_before_process_0_runs_it():
    """Otherwise it would wait in a collective for those that wait for its word."""
    order = []

    class Ordered(Recorded):
        def run(self, rows, chunks):
            order.append("runs")
            return []

    Leader(Ordered(), lambda value: order.append(value[0])).run(*step(1))
    assert order == ["run", "runs"]


def test_a_leader_that_cannot_reach_the_others_runs_nothing():
    own = Recorded()

    def fail(_):
        raise ConnectionError("process 1 is missing")

    with pytest.raises(ConnectionError, match="process 1 is missing"):
        Leader(own, fail).run(*step(1))
    assert own.asked == []
