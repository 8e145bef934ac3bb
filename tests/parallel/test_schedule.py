"""Schedules against the published figures, and against a definition of their own."""

import dataclasses
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.parallel.schedule import (
    SCHEDULES,
    Costs,
    Pass,
    Task,
    build,
    check,
    simulate,
)

each_schedule = pytest.mark.parametrize("name", SCHEDULES)

durations = st.integers(1, 60).map(lambda n: Fraction(n, 6))


@st.composite
def schedules(draw, names=tuple(SCHEDULES)):
    """Any schedule, of any size that it takes."""
    name = draw(st.sampled_from(names))
    ranks, extra = draw(st.integers(1, 9)), draw(st.integers(0, 10))
    if name == "interleaved_1f1b":
        chunks = draw(st.integers(2, 4))
        return build(name, ranks, ranks * (1 + extra // 4), chunks=chunks)
    if name == "dualpipe":
        ranks *= 2
        return build(name, ranks, 2 * ranks + 2 * extra)
    first = 2 * ranks if name == "dualpipe_v" else 1
    return build(name, ranks, first + extra)


@st.composite
def any_costs(draw):
    forward, first, weight = (draw(durations) for _ in range(3))
    backward = first + weight
    pair = draw(st.sampled_from([forward + backward, max(forward, backward)]))
    return Costs(
        forward=forward,
        backward=backward,
        weight=weight,
        pair=pair,
        latency=draw(st.just(0) | durations),
    )


@st.composite
def published_costs(draw):
    """Draws costs as the formulae take them.

    W is no longer than F, and F as long as B without W.
    """
    weight = draw(durations)
    forward = weight + draw(st.just(0) | durations)
    backward = forward + weight
    pair = backward + forward * draw(st.sampled_from([0, Fraction(1, 3), 1]))
    return Costs(forward=forward, backward=backward, weight=weight, pair=pair)


def published_bubble(name, ranks, costs):
    """Returns the bubble of ranks > 1, in stages' costs.

    A rank may hold more than one stage.

    arXiv 2104.04473, section 2.2, and 2412.19437, table 2. DualPipeV has that of a
    DualPipe with as many stages.
    """
    f, b, w, pair = costs.forward, costs.backward, costs.weight, costs.pair
    return {
        "gpipe": (ranks - 1) * (f + b),
        "1f1b": (ranks - 1) * (f + b),
        "interleaved_1f1b": (ranks - 1) * (f + b),
        "zb_h1": (ranks - 1) * (f + b - 2 * w),
        "dualpipe": (Fraction(ranks, 2) - 1) * (pair + b - 3 * w),
        "dualpipe_v": (ranks - 1) * (pair + b - 3 * w),
    }[name]


@settings(deadline=None)
@given(schedules())
def test_every_schedule_is_complete_free_of_deadlock_and_within_its_memory(schedule):
    check(schedule)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("extra", [0, 2, 12])
@each_schedule
@settings(max_examples=10, deadline=None)
@given(costs=published_costs())
def test_the_bubble_is_the_published_one_exactly(name, ranks, extra, costs):
    if name == "interleaved_1f1b":
        extra -= extra % ranks  # it takes no others
    timeline = simulate(build(name, ranks, 2 * ranks + extra), costs)
    assert timeline.bubble == published_bubble(name, ranks, costs)


@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_interleaving_divides_the_bubble_by_the_chunks(chunks):
    whole = Costs(forward=6, backward=13, weight=5)
    timeline = simulate(
        build("interleaved_1f1b", 4, 8, chunks=chunks),
        whole.times(Fraction(1, chunks)),
    )
    assert timeline.bubble == Fraction(3 * (6 + 13), chunks)
    assert timeline.makespan - timeline.bubble == 8 * (6 + 13)


@given(any_costs(), st.integers(1, 6), st.integers(0, 9))
def test_one_way_bubbles_hold_for_any_costs(costs, ranks, extra):
    costs = dataclasses.replace(costs, latency=0)
    for name in ("gpipe", "1f1b"):
        timeline = simulate(build(name, ranks, 1 + extra), costs)
        assert timeline.bubble == published_bubble(name, ranks, costs)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize(
    ("name", "peak", "parameters"),
    [
        ("gpipe", lambda n: 3 * n, 1),
        ("1f1b", lambda n: n, 1),
        ("interleaved_1f1b", lambda n: 3 * n - 1, 1),  # of stages half as large
        ("zb_h1", lambda n: n, 1),
        ("dualpipe", lambda n: n + 1, 2),
        ("dualpipe_v", lambda n: 2 * n + 1, 1),  # half as large
    ],
)
def test_memory_is_the_published_one(name, peak, parameters, ranks):
    schedule = build(name, ranks, 3 * ranks)
    timeline = simulate(schedule, Costs())
    assert timeline.peak_activations == schedule.max_activations == peak(ranks)
    assert timeline.parameters == parameters


@settings(deadline=None)
@given(schedules(), any_costs())
def test_a_task_starts_when_its_rank_and_what_it_needs_are_ready(schedule, costs):
    assert_prompt(simulate(schedule, costs))


def assert_prompt(timeline):
    schedule, latency = timeline.schedule, timeline.costs.latency
    ends = {
        step: (rank, span.end)
        for rank, spans in enumerate(timeline.spans)
        for span in spans
        for step in span.task.passes
    }
    for rank, spans in enumerate(timeline.spans):
        free = 0
        for task, start, end in spans:
            ready = [free]
            for needed in prerequisites(task, schedule.num_stages):
                host, done = ends[needed]
                ready.append(done + latency * (host != rank))
            assert start == max(ready)
            free = end
        assert [span.task for span in spans] == list(schedule.tasks[rank])


def prerequisites(task, num_stages):
    """Yields a microbatch's: F in all stages, then B in all, backwards; W after B."""
    for kind, stage, *rest in task.passes:
        path = [("F", s) for s in range(num_stages)]
        path += [("B", s) for s in reversed(range(num_stages))]
        if kind == "W":
            yield from [Pass("B", stage, *rest)] * (task.kind == "W")
        elif place := path.index((kind, stage)):
            yield Pass(*path[place - 1], *rest)
        if kind == "B":
            yield Pass("F", stage, *rest)


@settings(deadline=None)
@given(schedules(), any_costs())
def test_activations_never_exceed_the_bound_at_any_time(schedule, costs):
    for spans in simulate(schedule, costs).spans:
        freed = [span.end for span in spans if span.task.weight]
        begun = [span.start for span in spans if span.task.forward]
        for time in begun:
            live = sum(t <= time for t in begun) - sum(t <= time for t in freed)
            assert live <= schedule.max_activations


@settings(deadline=None)
@given(schedules(), st.data())
def test_an_order_that_was_changed_is_refused_or_can_be_run(schedule, data):
    rank = data.draw(st.integers(0, schedule.num_ranks - 1))
    tasks = list(schedule.tasks[rank])
    i, j = (data.draw(st.integers(0, len(tasks) - 1)) for _ in range(2))
    tasks[i], tasks[j] = tasks[j], tasks[i]
    changed = replaced(schedule, rank, tasks)
    try:
        check(changed)
    except ValueError:
        return
    assert_prompt(simulate(changed, Costs(latency=1)))


def replaced(schedule, rank, tasks):
    orders = list(schedule.tasks)
    orders[rank] = tuple(tasks)
    return dataclasses.replace(schedule, tasks=tuple(orders))


SMALL = build("1f1b", 2, 2)
FIRST, LAST = SMALL.tasks  # F0 F1 BW0 BW1 and F0 BW0 F1 BW1


@pytest.mark.parametrize(
    ("rank", "tasks", "complaint"),
    [
        (0, FIRST + LAST[:1], "rank 0 doesn't host F of microbatch 0 in stage 1"),
        (0, FIRST + FIRST[:1], "F of microbatch 0 in stage 0 is there twice"),
        (1, LAST[:-1], "B of microbatch 1 in stage 1 is missing"),
        (0, (*FIRST, Task((Pass("F", 0, 2),))), "is no F of microbatch 2 in stage 0"),
        (0, FIRST[::-1], "rank 0 has B of .* before F of microbatch 1 in stage 0"),
    ],
    ids=["host", "twice", "missing", "unknown", "order"],
)
def test_the_checker_names_what_is_wrong(rank, tasks, complaint):
    with pytest.raises(ValueError, match=f"^1f1b: .*{complaint}"):
        check(replaced(SMALL, rank, tasks))


def test_ranks_that_wait_for_each_other_are_named():
    one_by_one = replaced(SMALL, 0, (FIRST[0], FIRST[2], FIRST[1], FIRST[3]))
    check(one_by_one)  # slow, but sound
    with pytest.raises(ValueError) as refusal:
        check(replaced(one_by_one, 1, LAST[2:] + LAST[:2]))
    assert str(refusal.value) == (
        "1f1b: deadlock; waiting are rank 0 for B of microbatch 0 in stage 1, "
        "rank 1 for F of microbatch 1 in stage 0."
    )


def test_w_before_its_b_is_refused():
    schedule = build("zb_h1", 1, 1)
    forward, backward, weight = schedule.tasks[0]
    with pytest.raises(ValueError, match="rank 0 has W of .* before B of"):
        check(replaced(schedule, 0, (forward, weight, backward)))


def test_activations_beyond_the_bound_are_refused():
    schedule = dataclasses.replace(build("dualpipe", 4, 8), max_activations=4)
    with pytest.raises(ValueError, match="rank 0 holds .* of 5 .* max_activations=4"):
        check(schedule)


@pytest.mark.parametrize(
    ("passes", "complaint"),
    [
        ((Pass("B", 0, 0), Pass("F", 0, 1)), "not 'BF'"),
        ((Pass("B", 0, 0), Pass("W", 0, 1)), "of one microbatch"),
        ((Pass("F", 0, 0), Pass("B", 0, 0)), "of two microbatches"),
        ((), "not ''"),
    ],
)
def test_passes_that_make_no_task_are_refused(passes, complaint):
    with pytest.raises(ValueError, match=complaint):
        Task(passes)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("pipedream", 4, 8), "Unknown schedule 'pipedream'; known: gpipe, 1f1b, "),
        (("1f1b", 0, 8), "1f1b: num_ranks=0 must be at least 1"),
        (("gpipe", 4, 0), "gpipe: num_microbatches=0 must be at least 1"),
        (("dualpipe", 3, 8), "num_ranks=3 must be even"),
        (("dualpipe", 4, 9), "num_microbatches=9 must be even and at least 8"),
        (("dualpipe", 4, 6), "num_microbatches=6 must be even and at least 8"),
        (("dualpipe_v", 4, 7), "num_microbatches=7 must be at least 8"),
        (("interleaved_1f1b", 4, 6), "a multiple of the 4 ranks, such as 4 or 8"),
        (("interleaved_1f1b", 4, 3), "a multiple of the 4 ranks, such as 4 or 8"),
    ],
)
def test_what_a_schedule_cannot_take_is_said(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        build(*arguments)


def test_a_single_chunk_does_not_interleave():
    with pytest.raises(ValueError, match="chunks=1 must be at least 2"):
        build("interleaved_1f1b", 4, 8, chunks=1)


@pytest.mark.parametrize(
    ("costs", "complaint"),
    [
        ({"forward": 0}, "forward=0 must be above 0"),
        ({"latency": -1}, "latency=-1 must be at least 0"),
        ({"weight": 3}, "weight=3 must be at most backward=2"),
        ({"pair": 1}, "pair=1 must be at least forward=1 and backward=2"),
    ],
)
def test_costs_that_cannot_be_are_refused(costs, complaint):
    with pytest.raises(ValueError, match=complaint):
        Costs(**costs)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_later_a_paper_the_smaller_the_bubble(ranks):
    costs = Costs(forward=2, backward=4, weight=2)

    def bubble(name):
        return simulate(build(name, ranks, 2 * ranks), costs).bubble

    assert bubble("1f1b") > bubble("zb_h1") > bubble("dualpipe")
