"""What a choice would come to, as the command line shows it."""

import pytest
from PIL import Image

from jmoe.parallel.schedule import SCHEDULES
from jmoe.plan import programs

SMALL = ("schedules", "--pp=2", "--microbatches=4")


def test_all_schedules_are_drawn_and_compared(script):
    outcome = script("plan", *SMALL)
    assert outcome.code == 0, outcome.err
    for name in SCHEDULES:
        assert f"\n{name}\n" in "\n" + outcome.out and f"│ {name} " in outcome.out


def test_a_picture_is_written_instead_of_lines(script, tmp_path):
    path = tmp_path / "schedules.png"
    outcome = script("plan", *SMALL, "--schedule=dualpipe", f"--out={path}")
    assert outcome.code == 0 and "│ dualpipe " in outcome.out
    assert "\ndualpipe\n" not in outcome.out
    with Image.open(path) as image:
        assert min(image.size) > 200


def test_what_ranks_and_microbatches_do_not_allow_is_left_out_and_said(script):
    outcome = script("plan", "schedules", "--pp=3", "--microbatches=7")
    out = " ".join(outcome.out.split())
    assert outcome.code == 0 and "│ 1f1b " in out and "│ dualpipe " not in out
    assert "Left out: dualpipe: num_ranks=3 must be even" in out
    assert "Left out: interleaved_1f1b: num_microbatches=7 must be a multiple" in out


def test_costs_and_chunks_change_the_figures(script):
    def figures(*arguments):
        return script("plan", *SMALL, "--schedule=interleaved_1f1b", *arguments).out

    assert len({figures(), figures("--chunks=3"), figures("--costs=forward=3")}) == 3


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--schedule=dualpipe", "--pp=3"), "dualpipe: num_ranks=3 must be even"),
        (("--costs=speed=1",), "'speed=1' must read cost=number"),
        (("--pp=0",), "num_ranks=0 must be at least 1"),
        (("--out=schedules.pdf",), "must end in .svg or .png"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(script, arguments, complaint):
    assert complaint in script("plan", *SMALL, *arguments).mistake()


@pytest.mark.parametrize("arguments", [(), ("memories",), ("schedules", "more")])
def test_a_wrong_command_is_told_what_there_is(script, arguments):
    outcome = script("plan", *arguments)
    assert outcome.code == 1
    assert "schedules" in outcome.out + outcome.err


def test_a_models_memory_is_listed_by_part(script):
    outcome = script("plan", "memory", "--model=v3", "--weights=int4-experts")
    assert outcome.code == 0, outcome.err
    rows = [[cell.strip() for cell in row.split("│")[1:-1]] for row in lines(outcome)]
    sizes = {row[0]: float(row[3]) for row in rows}
    total = sizes.pop("all")
    assert total == pytest.approx(sum(sizes.values()), abs=0.1) and total <= 436
    assert max(sizes, key=sizes.get) == "routed experts"
    assert "A decoder keeps 71,424 bytes of each token." in outcome.out


def test_runs_of_published_models_are_listed_with_what_a_device_holds(
    script, monkeypatch
):
    chosen = ("qwen3_30b_16", "glm4_air_16")  # all take their time
    few = {name: programs.PROGRAMS[name] for name in chosen}
    monkeypatch.setattr(programs, "PROGRAMS", few)
    monkeypatch.setenv("COLUMNS", "120")
    outcome = script("plan", "training")
    assert outcome.code == 0, outcome.err
    rows = [[cell.strip() for cell in row.split("│")[1:-1]] for row in lines(outcome)]
    assert [row[:2] for row in rows] == [
        ["qwen3_30b_16", "data=2 expert=8"],
        ["glm4_air_16", "expert=16"],
    ]
    for _, _, *sizes, share in rows:
        *parts, total = (float(size.replace(",", "")) for size in sizes)
        assert total == pytest.approx(sum(parts), abs=0.2)
        assert int(share.rstrip("%")) == pytest.approx(total / 0.96, abs=0.6)


def lines(outcome):
    return [line for line in outcome.out.splitlines() if line.startswith("│")]


@pytest.mark.parametrize(
    ("argument", "complaint"),
    [
        ("--model=v4", "'v4'"),
        ("--weights=int3", "'int3' is not one of native, fp8, int4-experts"),
    ],
)
def test_a_model_or_form_that_is_not_there_is_named(script, argument, complaint):
    assert complaint in script("plan", "memory", argument).mistake()
