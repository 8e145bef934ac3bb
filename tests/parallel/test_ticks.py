"""Schedules in ticks: who does what when, and where it is stored meanwhile.

What has to be true of any schedule is stated here from scratch, by tick and rank, and
held against the named ones and against random orders.
"""

import collections
import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.parallel.schedule import KINDS, SCHEDULES, Costs, Pass, Task, build, simulate
from jmoe.parallel.schedule.ticks import DOWN, SELF, UP, as_ticks, forward_only
from tests.parallel.toy_pipeline import schedules_of

SIZES = [(1, 1), (1, 3), (2, 4), (2, 7), (3, 6), (4, 8), (4, 16), (5, 3), (8, 20)]
UNIT = Costs(forward=1, backward=2, weight=1)

each_schedule = pytest.mark.parametrize("schedule", list(schedules_of(SIZES)))


@st.composite
def in_any_order(draw):
    """A schedule's passes one by one, each rank's in an order that can be run."""
    name = draw(st.sampled_from(list(SCHEDULES)))
    ranks = 2 * draw(st.integers(1, 2))
    schedule = build(name, ranks, 2 * ranks)
    passes = {s for tasks in schedule.tasks for task in tasks for s in task.passes}
    order: list[list[Task]] = [[] for _ in range(ranks)]
    done: set[Pass] = set()
    ready = {step for step in passes if not set(before(schedule, step))}
    choose = draw(st.randoms(use_true_random=False)).choice
    while ready:
        step = choose(sorted(ready))
        done.add(step)
        order[schedule.hosts[step.direction][step.stage]].append(Task((step,)))
        ready = {step for step in passes - done if set(before(schedule, step)) <= done}
    return dataclasses.replace(schedule, tasks=tuple(map(tuple, order)))


def before(schedule, step):
    """A microbatch goes F through all stages, then B through all backwards."""
    if step.kind == "F" and step.stage:
        yield step._replace(stage=step.stage - 1)
    if step.kind == "B":
        yield step._replace(kind="F")
        if step.stage < schedule.num_stages - 1:
            yield step._replace(stage=step.stage + 1)
    if step.kind == "W":
        yield step._replace(kind="B")


def places(ticks):
    """Returns each pass's (tick, rank) and its entry."""
    found = {}
    for tick, ranks in enumerate(ticks.entries):
        for rank, entries in enumerate(ranks):
            for entry in entries:
                assert entry.step not in found
                found[entry.step] = (tick, rank), entry
    return found


def assert_placed(schedule, ticks):
    """Each pass once, on its rank, in the first tick that its order and needs allow."""
    found = places(ticks)
    assert set(found) == {
        step for tasks in schedule.tasks for task in tasks for step in task.passes
    }
    free = [0] * schedule.num_ranks
    for tick, ranks in enumerate(ticks.tasks):
        assert any(ranks)
        for rank, task in enumerate(ranks):
            entries = ticks.entries[tick][rank]
            steps = task.passes if task else ()
            assert tuple(entry.step for entry in entries) == steps
            if task is None:
                continue
            assert task.kind != "BW"
            needed = {s for step in steps for s in before(schedule, step)} - {*steps}
            assert tick == max(
                [free[rank], *(found[step][0][0] + 1 for step in needed)]
            )
            free[rank] = tick + 1
            for entry in entries:
                hosted = schedule.hosted(rank)[entry.hosted]
                assert hosted == (entry.step.stage, entry.step.direction)
    for rank, tasks in enumerate(schedule.tasks):
        order = [step for task in tasks for step in task.passes]
        ticked = [
            step
            for ranks in ticks.tasks
            if ranks[rank] is not None
            for step in ranks[rank].passes
        ]
        assert ticked == order


def assert_stored(schedule, ticks):
    """Nothing is overwritten while it is needed, and no slot is more than needed."""
    found = places(ticks)
    tick_of = {step: tick for step, ((tick, _), _) in found.items()}
    lives = collections.defaultdict(list)  # (first, last, slot) of each store and rank
    for step, ((tick, rank), entry) in found.items():
        first, b, w = (step._replace(kind=kind) for kind in "FBW")
        assert entry.kept == found[first][1].kept
        if step.kind == "F":
            last = max(tick_of.get(later, tick) for later in (first, b, w))
            lives["kept", rank].append((tick, last, entry.kept))
        if step.kind == "B":
            lives["owed", rank].append((tick, tick_of[w], entry.owed))
        if step.kind == "W":
            assert entry.owed == found[b][1].owed
            assert entry.source is entry.delivery is None
            continue
        taker = next_of(schedule, step)
        if taker not in tick_of:
            assert entry.delivery is None
            continue
        host = schedule.hosts[taker.direction][taker.stage]
        assert entry.delivery.way in (SELF, UP, DOWN)
        assert (rank + entry.delivery.way - host) % schedule.num_ranks == 0
        assert entry.delivery.slot == found[taker][1].source
        kind = "forward" if step.kind == "F" else "backward"
        lives[kind, host].append((tick + 1, tick_of[taker], entry.delivery.slot))
    for kind in ("kept", "owed", "forward", "backward"):
        ranks = [lives[kind, rank] for rank in range(schedule.num_ranks)]
        most = [
            sum(first <= tick <= last for first, last, _ in found)
            for found in ranks
            for tick in range(ticks.count)
        ]
        for slots in ranks:
            used = [(s, t) for a, b, s in slots for t in range(a, b + 1)]
            assert len(used) == len(set(used))
        assert getattr(ticks, f"{kind}_slots") == max(most)
        assert all(slot < max(most) for found in ranks for *_, slot in found)


def next_of(schedule, step):
    """Who takes what F or B makes: the last stage's B begins with its F's output."""
    if step.kind == "F" and step.stage == schedule.num_stages - 1:
        return step._replace(kind="B")
    return step._replace(stage=step.stage + (1 if step.kind == "F" else -1))


@each_schedule
def test_a_schedule_in_ticks_is_complete_prompt_and_overwrites_nothing(schedule):
    ticks = as_ticks(schedule)
    assert_placed(schedule, ticks)
    assert_stored(schedule, ticks)
    assert ticks.kept_slots <= schedule.max_activations


@each_schedule
def test_so_are_its_forward_passes_alone(schedule):
    forward = forward_only(schedule)
    ticks = as_ticks(forward)
    assert_placed(forward, ticks)
    assert_stored(forward, ticks)
    steps = [step for tasks in schedule.tasks for task in tasks for step in task.passes]
    assert set(places(ticks)) == {step for step in steps if step.kind == "F"}
    assert (ticks.kept_slots, ticks.owed_slots, ticks.backward_slots) == (1, 0, 0)
    assert ticks.ways("B") == ()


@settings(max_examples=60, deadline=None)
@given(in_any_order())
def test_any_order_that_can_be_run_is_sound_in_ticks(schedule):
    ticks = as_ticks(schedule)
    assert_placed(schedule, ticks)
    assert_stored(schedule, ticks)


@each_schedule
def test_ticks_know_their_kinds_of_tasks(schedule):
    ticks = as_ticks(schedule)
    kinds = {task.kind for tasks in ticks.schedule.tasks for task in tasks}
    assert {kind for kind in KINDS if ticks.has(kind)} == kinds
    assert "BW" not in kinds
    assert ("F&BW" in kinds) == schedule.name.startswith("dualpipe")


def test_an_order_that_cannot_be_run_is_refused():
    schedule = build("1f1b", 2, 2)
    backwards = tuple(tasks[::-1] for tasks in schedule.tasks)
    with pytest.raises(ValueError, match="1f1b: rank 0 has B of .* before F of"):
        as_ticks(dataclasses.replace(schedule, tasks=backwards))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("rounds", [2, 3, 5])
def test_ticks_are_as_many_as_the_formulae_say(ranks, rounds):
    """A stage's F, B and W are a tick each, and an overlapped pair is one."""
    m, p = rounds * ranks, ranks

    def count(name, *, forward=False, **options):
        schedule = build(name, p, m, **options)
        return as_ticks(forward_only(schedule) if forward else schedule).count

    assert count("gpipe", forward=True) == m + p - 1
    assert count("1f1b", forward=True) == m + p - 1
    assert count("interleaved_1f1b", chunks=3, forward=True) == 3 * m + p - 1
    assert count("gpipe") == count("1f1b") == 3 * m + 2 * (p - 1)
    assert count("interleaved_1f1b", chunks=3) == 3 * 3 * m + 2 * (p - 1)
    assert count("zb_h1") == 3 * m + p - 1
    assert count("dualpipe_v", forward=True) == 2 * m + 2 * (p - 1)
    if p > 1:
        assert count("dualpipe", forward=True) == m + p - 2


@each_schedule
def test_ticks_take_no_less_than_tasks_that_start_when_they_can(schedule):
    ticks = as_ticks(schedule)
    costs = Costs(forward=3, backward=7, weight=2, pair=8)
    assert ticks.time(costs) >= simulate(ticks.schedule, costs).makespan


@pytest.mark.parametrize(("ranks", "microbatches"), SIZES)
def test_where_all_tasks_take_as_long_ticks_cost_nothing(ranks, microbatches):
    schedule = build("zb_h1", ranks, microbatches)
    ticks = as_ticks(schedule)
    assert ticks.time(UNIT) == ticks.count == simulate(schedule, UNIT).makespan


def test_a_tick_takes_as_long_as_its_longest_task():
    ticks = as_ticks(build("1f1b", 2, 1))
    costs = Costs(forward=2, backward=7, weight=4)
    kinds = [[task and task.kind for task in ranks] for ranks in ticks.tasks]
    assert kinds == [["F", None], [None, "F"], [None, "B"], ["B", "W"], ["W", None]]
    assert ticks.time(costs) == 2 + 2 + 3 + 4 + 4


@pytest.mark.parametrize("name", ["dualpipe", "dualpipe_v"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_more_microbatches_the_more_ticks_overlap(name, ranks):
    """For each more that a rank takes through a stage: one F&BW, and nothing else."""
    few, many = (as_ticks(build(name, ranks, m)) for m in (4 * ranks, 4 * ranks + 4))

    def kinds(ticks, rank):
        tasks = (ranks[rank] for ranks in ticks.tasks)
        return collections.Counter(task.kind for task in tasks if task)

    each = 4 if name == "dualpipe" else 8
    for rank in range(ranks):
        assert kinds(many, rank) - kinds(few, rank) == {"F&BW": each}
    assert many.count - few.count == each


def test_ticks_without_an_overlap_to_fill_are_as_few_as_ever():
    """Beyond the microbatches; as counted, since no paper has them."""
    beyond = [as_ticks(build("dualpipe", p, 2 * p)).count - 2 * p for p in (2, 4, 8)]
    assert beyond == [6, 11, 22]


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("gpipe", {UP, SELF}, {DOWN}),
        ("interleaved_1f1b", {UP, SELF}, {DOWN}),
        ("dualpipe", {UP, DOWN, SELF}, {UP, DOWN}),
        ("dualpipe_v", {UP, DOWN, SELF}, {UP, DOWN, SELF}),
    ],
)
def test_results_take_the_ways_that_stages_lie(name, forward, backward):
    ticks = as_ticks(build(name, 4, 8))
    assert set(ticks.ways("F")) == forward
    assert set(ticks.ways("B")) == backward


@pytest.mark.parametrize("schedule", list(schedules_of([(1, 4)])))
def test_a_single_rank_sends_to_nobody(schedule):
    ticks = as_ticks(schedule)
    assert {*ticks.ways("F"), *ticks.ways("B")} <= {SELF}
