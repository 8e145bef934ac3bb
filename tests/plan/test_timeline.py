"""Drawings of schedules show what the simulation says, and the table its figures."""

import io
from fractions import Fraction
from xml.etree import ElementTree

import pytest
import rich.console
from PIL import Image

from jmoe.parallel.schedule import SCHEDULES, Costs, build, simulate
from jmoe.plan import timeline, timeline_picture, timeline_text

SVG = "{http://www.w3.org/2000/svg}"


def console(width, color_system=None):
    return rich.console.Console(
        file=io.StringIO(), width=width, color_system=color_system, force_terminal=True
    )


def rows(timelines, width):
    """The ranks of each timeline as letters, with their margin of two columns."""
    lines = [line.plain for line in timeline_text.lines(timelines, console(width))]
    return [line[2:] for line in lines if line[:1].isdigit()]


def test_letters_show_a_schedule_as_it_is_written_on_paper():
    shown = rows([timeline.make("zb_h1", 2, 3, Costs())], width=2 + 10 * 2)
    assert shown == ["F0F1  B0W0F2B1W1B2W2", "  F0B0F1B1W0F2B2W1W2"]


def test_letters_show_both_directions_and_what_overlaps():
    shown = rows([timeline.make("dualpipe", 2, 4, Costs())], width=2 + 12 * 2)
    assert shown == [
        "F0f2F1bw2-f3&BW0bw3-B1W1",
        "f2F0f3BW0-F1&bw2BW1-b3w3",
    ]


@pytest.mark.parametrize("color_system", [None, "truecolor"])
@pytest.mark.parametrize("width", [20, 80, 211])
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_line_is_wider_than_the_terminal(name, width, color_system):
    made = timeline.make(name, 4, 16, Costs(forward=1, backward=Fraction(7, 3)))
    out = console(width, color_system)
    ranks = list(timeline_text.lines([made], out))[1:5]
    assert width / 2 < max(map(len, ranks)) <= width


def test_colours_say_which_kind_and_which_stage_it_is():
    made = timeline.make("dualpipe", 2, 4, Costs())
    lines = list(timeline_text.lines([made], console(80, "truecolor")))
    colours = {span.style.bgcolor.name for line in lines[1:3] for span in line.spans}
    pairs = timeline.COLOURS.values()
    assert colours == {colour for pair in pairs for colour in pair}


@pytest.mark.parametrize("width", range(20, 100, 9))
def test_numbers_on_colours_never_touch(width):
    made = timeline.make("zb_h1", 4, 12, Costs())
    lines = list(timeline_text.lines([made], console(width, "truecolor")))
    shown = "".join(line.plain[1:] for line in lines[1:5]).split()
    assert set(shown) <= set(map(str, range(12)))


def test_stages_of_a_rank_have_shades_between_the_two():
    schedule = build("interleaved_1f1b", 2, 2, chunks=3)
    parts = [timeline.parts(schedule, 1, task)[0] for task in schedule.tasks[1]]
    assert {part.shade for part in parts} == {0, Fraction(1, 2), 1}
    assert len({part.colour for part in parts}) == 3 * 2


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_pass_is_drawn_with_its_microbatch(name, tmp_path):
    made = timeline.make(name, 2, 24, Costs())
    path = timeline_picture.draw([made], tmp_path / "picture.svg")
    tree = ElementTree.parse(path)
    texts = [element.text.strip() for element in tree.iter(f"{SVG}text")]
    assert name in texts
    for microbatch in range(24):
        drawn = [part for part in all_parts(made) if part.microbatch == microbatch]
        # Ranks and times have numbers, too.
        assert texts.count(str(microbatch)) >= len(drawn) > 0


def test_numbers_too_small_to_read_are_left_out(tmp_path):
    costs = Costs(forward=100, backward=100, weight=Fraction(1, 5))
    made = timeline.make("zb_h1", 2, 4, costs)
    path = timeline_picture.draw([made], tmp_path / "picture.svg")
    texts = [element.text for element in ElementTree.parse(path).iter(f"{SVG}text")]
    assert texts.count("3") == 2 * 2  # F and B, but not W, of both ranks


def all_parts(made):
    for rank, tasks in enumerate(made.schedule.tasks):
        for task in tasks:
            yield from timeline.parts(made.schedule, rank, task)


def test_an_svg_is_the_same_each_time(tmp_path):
    made = [timeline.make(name, 2, 4, Costs()) for name in SCHEDULES]
    files = [timeline_picture.draw(made, tmp_path / f"{i}.svg") for i in range(2)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_longer_a_schedule_the_wider_its_picture(tmp_path):
    sizes = []
    for count in (4, 64):
        path = tmp_path / f"{count}.png"
        timeline_picture.draw([timeline.make("zb_h1", 2, count, Costs())], path)
        with Image.open(path) as image:
            sizes.append(image.size)
    assert sizes[1][0] > 2 * sizes[0][0] and sizes[1][1] == sizes[0][1]


def test_other_formats_are_refused(tmp_path):
    made = [timeline.make("1f1b", 2, 4, Costs())]
    with pytest.raises(ValueError, match="picture.pdf' must end in .svg or .png"):
        timeline_picture.draw(made, tmp_path / "picture.pdf")


@pytest.mark.parametrize("name", SCHEDULES)
def test_all_schedules_are_of_the_same_model(name):
    costs = Costs(forward=3, backward=7, weight=3)
    made = timeline.make(name, 4, 8, costs)
    assert made.makespan * 4 - sum(made.idle) == 4 * 8 * (3 + 7)


def test_the_table_has_the_figures_of_all_and_the_best_in_bold():
    made = [timeline.make(n, 4, 8, Costs()) for n in ("1f1b", "zb_h1", "dualpipe_v")]
    out = console(100)
    out.print(timeline.table(made))
    lines = [line.split() for line in out.file.getvalue().splitlines()]
    figures = {
        line[1]: line[3:12:2] for line in lines if line[1:2] and line[2:3] == ["│"]
    }
    assert figures["1f1b"] == ["33", "9", "27.3%", "4", "1x"]
    assert figures["zb_h1"] == ["27", "3", "11.1%", "4", "1x"]
    assert figures["dualpipe_v"] == ["27", "3", "11.1%", "4.5", "1x"]


def test_costs_are_read_exactly():
    costs = timeline.parse_costs("forward=0.1, backward=1/3,weight=.2,latency=1")
    assert costs == Costs(
        forward=Fraction(1, 10),
        backward=Fraction(1, 3),
        weight=Fraction(1, 5),
        latency=1,
    )
    assert timeline.parse_costs("") == Costs()


@pytest.mark.parametrize("item", ["forwards=1", "forward", "forward=x", "forward=1/0"])
def test_costs_that_cannot_be_read_are_named(item):
    with pytest.raises(ValueError, match=f"'{item}' must read cost=number, .* forward"):
        timeline.parse_costs(f"backward=2,{item}")


def test_smaller_stages_still_wait_as_long_for_each_other():
    costs = Costs(latency=Fraction(1, 2))
    assert costs.times(Fraction(1, 2)).latency == costs.latency
    slow = timeline.make("dualpipe_v", 2, 4, costs)
    assert (
        slow.makespan > simulate(slow.schedule, Costs().times(Fraction(1, 2))).makespan
    )
