"""Other processes run the steps that process 0's engine decides, in its order."""

import json
import types

import jax
import numpy as np
import pytest

from jmoe.config.model import FLOAT8, WIRE_DTYPES
from jmoe.decode.followers import END, Leader, decode, encode, follow
from jmoe.decode.limits import StepSize
from jmoe.decode.live import Live, PromptChunk, make_chunks, make_nobody, make_rows
from jmoe.decode.on_mesh import OnMesh
from jmoe.decode.placing import begin_with
from jmoe.decode.requests import Completion, Sampling
from jmoe.parallel.shedding import NO_LIMIT
from tests.decode import placed
from tests.decode.test_step import LIMITS


class Recorded:
    """Programs that compute nothing, and know what they were asked."""

    parts, turns = 2, 1
    placing, may_drop = None, False
    dispatch_dtype, _ = dispatch_dtypes = WIRE_DTYPES

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


def test_all_that_process_0_does_is_sent_before_it_is_done():
    """Otherwise it would wait in a collective for those that wait for its word."""
    order = []

    class Ordered(Recorded):
        placing, may_drop = types.SimpleNamespace(take=lambda steps: []), True

        def run(self, rows, chunks):
            order.append("runs")

        def move(self, moves):
            order.append("moves")

        def set_limit(self, limit):
            order.append("limits")

        def set_dispatch_dtype(self, dtype):
            order.append(dtype)
            self.dispatch_dtype = dtype

    leader = Leader(Ordered(), lambda value: order.append(value[0]))
    leader.run(*step(1))
    leader.advance(1)
    leader.set_limit(2)
    leader.set_dispatch_dtype(FLOAT8)
    assert leader.dispatch_dtype == FLOAT8
    assert order[:4] == ["run", "runs", "move", "moves"]
    assert order[4:] == ["limit", "limits", "dtype", FLOAT8]


def test_a_leader_that_cannot_reach_the_others_runs_nothing():
    own = Recorded()

    def fail(_):
        raise ConnectionError("process 1 is missing")

    with pytest.raises(ConnectionError, match="process 1 is missing"):
        Leader(own, fail).run(*step(1))
    assert own.asked == []


def test_on_a_pipeline_experts_and_limits_of_followers_become_the_leaders(cfg):
    """Both are in this process, and have all of the mesh."""
    on_mesh, variables, _ = placed.engine(cfg)
    model = on_mesh.cfg
    run, layout, divided = placed.placed(placed.MESH, [], variables, model)
    begin = begin_with(model, placed.DEVICES, placed.SPARE)
    ways = None, begin, NO_LIMIT, WIRE_DTYPES
    made = run, layout.mesh, "native", divided, placed.LIMITS, *ways
    own, others = OnMesh(*made), OnMesh(*made)
    sent: list[str] = []
    leader = Leader(own, lambda value: sent.append(json.dumps(value)))
    leader.run(*make_nobody(placed.LIMITS, leader.parts, placed.LIMITS.sizes[0]))
    placing = leader.placing
    assert placing.begin(placing.plan(placed.any_placement(model, seed=5))) > 0
    leader.advance(1)
    leader.set_limit(3)
    leader.set_dispatch_dtype(FLOAT8)
    leader.advance(placing.steps_left)
    leader.flush()
    sent.append(json.dumps([END]))
    assert not same(own._weights, others._weights)
    follow(others, placed.LIMITS, map(json.loads, sent).__next__)
    assert same(own._weights, others._weights)
    assert same(placing.placement, others.placing.placement)
    assert own.dispatch_dtype == others.dispatch_dtype == FLOAT8
    assert leader.may_drop and not same(placing.placement, begin)
