"""Experts may be anywhere, and move while requests are decoded: tokens are the same."""

import itertools

import numpy as np
import pytest

from jmoe.balance import placement
from jmoe.config import ExchangeConfig, override
from jmoe.config.model import ACTIVATIONS, FLOAT8
from jmoe.decode.engine import Engine
from jmoe.decode.on_mesh import make_programs
from jmoe.decode.placing import Placing, begin_with
from jmoe.parallel.shedding import NO_LIMIT
from tests.decode.placed import (
    DEVICES,
    LIMITS,
    SPARE,
    any_placement,
    completed,
    engine,
    fp8_engine,
    placed,
    switching_engine,
)


def test_on_a_pipeline_experts_move_between_steps_and_no_token_changes(cfg):
    on_mesh, variables, _ = engine(cfg)
    want = completed(Engine(on_mesh.cfg, variables, LIMITS))
    assert completed(on_mesh) == want
    programs, steps, moved = on_mesh.programs, [], []
    compiled = programs._programs.step._cache_size()

    def move():
        if not programs.placing.steps_left:
            wanted = any_placement(on_mesh.cfg, seed=len(moved))
            moved.append(programs.placing.begin(programs.placing.plan(wanted)))
        steps.append(programs.advance(steps=1))

    assert completed(on_mesh, move) == want
    assert sum(moved) > 10 and all(seconds > 0 for seconds in steps)
    assert programs._programs.step._cache_size() == compiled
    assert programs._programs.move._cache_size() == 1


def test_on_a_pipeline_experts_arrive_where_they_are_wanted(cfg):
    on_mesh, _, _ = engine(cfg)
    placing, wanted = on_mesh.programs.placing, any_placement(on_mesh.cfg, seed=99)
    placing.begin(placing.plan(wanted))
    on_mesh.programs.advance(placing.steps_left)
    assert placing.begin(placing.plan(wanted)) == 0
    held, asked = (
        np.sort(x.physical_to_logical.reshape(on_mesh.cfg.num_moe_layers, DEVICES, -1))
        for x in (placing.placement, wanted)
    )
    np.testing.assert_array_equal(held, asked)


def test_on_a_pipeline_a_placement_for_another_model_is_refused_and_nothing_moves(cfg):
    on_mesh, _, _ = engine(cfg)
    placing, model = on_mesh.programs.placing, on_mesh.cfg
    before = placing.placement.physical_to_logical
    other = begin_with(override(model, ["num_layers=4"]), DEVICES, SPARE)
    with pytest.raises(ValueError, match="3 MoE layers of 8 experts.*has 2 of 8"):
        placing.plan(other)
    with pytest.raises(ValueError, match="8 experts in 8 places is no other one"):
        placing.plan(begin_with(model, DEVICES))
    with pytest.raises(ValueError, match="3 MoE layers of 8 experts.*has 2 of 8"):
        Placing(model, placing._layout, [], placing._move_row, other)
    assert placing.steps_left == 0
    np.testing.assert_array_equal(placing.placement.physical_to_logical, before)


def test_on_a_pipeline_a_limit_drops_choices_and_none_when_it_is_gone(cfg):
    on_mesh, _, watcher = engine(cfg)
    programs, told, top_k = on_mesh.programs, [], on_mesh.cfg.moe.router.top_k
    want, compiled = completed(on_mesh), programs._programs.step._cache_size()
    watcher.observe = told.append
    for limit in (2, NO_LIMIT):
        told.clear()
        programs.set_limit(limit)
        assert (completed(on_mesh) == want) or limit < NO_LIMIT
        dropped_L = sum(stats.dropped_L for stats in told)
        tokens = sum(stats.rows + stats.prompt_tokens for stats in told)
        assert (dropped_L <= tokens * (top_k - 1)).all()
        assert (dropped_L > 0).all() == (limit < NO_LIMIT)
        load_LP = programs.placing.device_load(told[0].count_LE)
        assert load_LP.shape == (2, DEVICES)
    assert programs._programs.step._cache_size() == compiled


def test_tokens_travel_in_fp8_between_two_steps_and_nothing_is_compiled(
    cfg, compilations
):
    switching, _ = switching_engine(cfg)
    usual, programs = completed(switching), switching.programs
    compilations.clear()
    programs.set_dispatch_dtype(FLOAT8)
    fp8 = completed(switching)
    for dtype, want in ((FLOAT8, fp8), (ACTIVATIONS, usual)) * 2:
        programs.set_dispatch_dtype(dtype)
        assert completed(switching) == want
    turns = itertools.cycle(programs.dispatch_dtypes)
    mixed = completed(switching, lambda: programs.set_dispatch_dtype(next(turns)))
    assert list(map(len, mixed)) == list(map(len, usual))
    assert not compilations
    assert usual != fp8 == completed(fp8_engine(cfg))


def test_tokens_travel_only_in_forms_that_were_compiled(cfg):
    with pytest.raises(ValueError, match="'activations' is not one of 'float8_e4m3fn'"):
        fp8_engine(cfg).programs.set_dispatch_dtype(ACTIVATIONS)


LENDING = ExchangeConfig(backend="balanced", lend_above=0.0)


@pytest.mark.long
@pytest.mark.parametrize(
    ("form", "exchange"), [("native", None), ("fp8", None), ("native", LENDING)]
)
def test_copies_on_tensor_groups_find_the_tokens_of_experts_in_order(
    cfg, form, exchange
):
    on_mesh, variables, _ = engine(cfg)
    model = on_mesh.cfg
    run, layout, divided = placed("expert=4,tensor=2", [], variables, model)
    found = []
    for where, way in ((None, None), (begin_with(model, 4, SPARE), exchange)):
        programs = make_programs(run, layout.mesh, form, way, where)
        made = Engine(model, divided, LIMITS, programs=programs)
        found.append(completed(made))
    assert found[0] == found[1]
    placing = made.programs.placing
    held_LR = placing.placement.physical_to_logical
    wanted = placement.from_slots(np.roll(held_LR, 3, axis=1), 8)  # the next device
    assert placing.begin(placing.plan(wanted)) == held_LR.size
    made.programs.advance(placing.steps_left)
    assert completed(made) == found[0]
