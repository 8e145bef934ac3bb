"""How much a decoder holds: what the record, and a model, refuse."""

import dataclasses
import itertools

import pytest

from jmoe.config import records
from jmoe.decode.limits import Limits, check, few_parts

REFUSED = [
    ({"rows": ()}, "rows=() must be numbers above 0 in ascending order."),
    ({"rows": (0, 4)}, "rows=(0, 4) must be numbers above 0 in ascending order."),
    ({"rows": (8, 4)}, "rows=(8, 4) must be numbers above 0 in ascending order."),
    ({"rows": (4, 4)}, "rows=(4, 4) must be numbers above 0 in ascending order."),
    ({"prompts": (0,)}, "prompts=(0,) must be numbers above 0 in ascending order."),
    ({"chunks": ()}, "chunks=() must be numbers above 0 in ascending order."),
    ({"chunks": (64, 16)}, "chunks=(64, 16) must be numbers above 0 in ascending "),
    (
        {"prompts": (2, 4), "chunks": (4, 16), "prompt_tokens": 31},
        "prompt_tokens=31 must be at least 32, so that prompts=2 part of chunks=16 tok",
    ),
    ({"max_length": 1}, "max_length=1 must be at least 2."),
    ({"page_size": 0}, "page_size=0 must be at least 1."),
    (
        {"max_length": 65, "page_size": 16, "num_pages": 4},
        "num_pages=4 must be at least 5, so that one sequence of max_length=65 has",
    ),
    ({"drafts": -1}, "drafts=-1 must be at least 0."),
    ({"top_logprobs": -1}, "top_logprobs=-1 must be at least 0."),
    ({"queue": 0}, "queue=0 must be at least 1."),
]


@pytest.mark.parametrize(("fields", "complaint"), REFUSED)
def test_an_impossible_size_is_named_with_what_is_allowed(fields, complaint):
    with pytest.raises(ValueError) as refused:
        Limits(**fields)
    assert str(refused.value).startswith(complaint)


def test_every_field_is_tried():
    tried = {name for fields, _ in REFUSED for name in fields}
    assert tried == {field.name for field in dataclasses.fields(Limits)}


def test_all_slots_have_room_for_the_longest_unless_pages_are_fewer():
    limits = Limits(rows=(1, 3), max_length=65, page_size=16)
    assert (limits.slots, limits.pages_of_one, limits.pages) == (3, 5, 15)
    assert dataclasses.replace(limits, num_pages=5).pages == 5


def test_each_step_has_the_smallest_size_that_has_room():
    limits = Limits(rows=(1, 3, 9), prompts=(1, 4), chunks=(2, 5))
    needed = itertools.product(range(10), range(1, 5), range(1, 6))
    for rows, prompts, chunk in [*needed, *((rows, 0, 0) for rows in range(10))]:
        assert limits.size(rows, prompts, chunk) == min(
            size
            for size in limits.sizes
            if size.rows >= rows and size.prompts >= prompts and size.chunk >= chunk
            if (size.prompts > 0) == (prompts > 0)
        )


def test_prompts_are_read_beside_all_numbers_of_rows_but_the_fewest():
    sizes = Limits(rows=(1, 4, 8), prompts=(1, 3, 16), chunks=(64, 256)).sizes
    assert len(sizes) == len(set(sizes)) == 3 + 2 * 3 * 2
    assert {size.prompts for size in sizes if size.rows == 1} == {0}
    for rows in (4, 8):
        found = {size.prompts for size in sizes if size.rows == rows}
        assert found == {0, 1, 3, 16}
    assert {size.prompts for size in Limits(rows=(1,)).sizes} == {0, 1, 4}


def test_an_engine_of_few_sequences_may_be_compiled_for_few_parts():
    assert few_parts(1) == (1,) and few_parts(3) == (1, 3)
    assert few_parts(8) == Limits.prompts
    assert few_parts(2, (8,)) == (2,)


def test_no_size_reads_more_tokens_than_others_may_wait_for():
    limits = Limits(rows=(8,), prompts=(1, 2, 4, 8), chunks=(64, 256))
    few = dataclasses.replace(limits, prompt_tokens=512)
    assert set(few.readings) == {
        (prompts, chunk) for prompts, chunk in limits.readings if prompts * chunk <= 512
    }
    assert len(few.readings) == 6 and len(limits.readings) == 8
    assert {(size.prompts, size.chunk) for size in few.sizes} == {(0, 0), *few.readings}


@pytest.mark.parametrize(
    ("fields", "settings", "complaint"),
    [
        (
            {"max_length": 65},
            [],
            "max_length=65 must be at most the model's max_positions=64.",
        ),
        (
            {"drafts": 1},
            ["mtp_depth=0"],
            "drafts=1 needs a model with an MTP module; this one has mtp_depth=0.",
        ),
        (
            {"top_logprobs": 301},
            [],
            "top_logprobs=301 must be at most vocab_size=300.",
        ),
    ],
)
def test_what_a_model_does_not_have_is_refused(cfg, fields, settings, complaint):
    fields = {"max_length": 64, **fields}
    with pytest.raises(ValueError) as refused:
        check(records.override(cfg, settings), Limits(**fields))
    assert str(refused.value) == complaint


def test_what_a_model_has_passes(cfg):
    check(cfg, Limits(max_length=64, drafts=5, top_logprobs=300))


@pytest.mark.parametrize("kind", ["expert_choice", "replayed"])
def test_routers_that_cannot_choose_for_new_tokens_are_refused(cfg, kind):
    groups = ["moe.router.num_groups=1", "moe.router.groups_per_token=1"]
    cfg = records.override(cfg, [*groups, f"moe.router.kind={kind}"])
    with pytest.raises(ValueError, match=f"kind='{kind}' .*generates no text"):
        check(cfg, Limits(max_length=64))
