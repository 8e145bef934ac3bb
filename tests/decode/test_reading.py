"""Which parts of prompts a step reads: all that may be, soonest, the oldest first."""

import pytest

from jmoe.decode.limits import Limits
from jmoe.decode.live import Live
from jmoe.decode.reading import take_chunks
from jmoe.decode.requests import Completion, Sampling

LIMITS = Limits(rows=(8,), prompts=(1, 2, 4, 8), chunks=(64, 256), prompt_tokens=512)


def unread(*lengths: int, read: int = 0) -> list[Live]:
    """Requests with prompts of these lengths; of the first, so much is read."""
    lives = [
        Live([0] * length, Sampling(), Completion(i), 0.0, slot=i)
        for i, length in enumerate(lengths)
    ]
    lives[0].read = read
    return lives


def taken(*parts: list[Live]) -> tuple[list[list[tuple[int, int, int]]], int]:
    """Returns (slot, start, count) of each chunk."""
    chunks, size = take_chunks(LIMITS, parts)
    return [[(x.live.slot, x.start, x.count) for x in part] for part in chunks], size


@pytest.mark.parametrize(
    ("length", "prompts", "size"),
    [
        (1, 1, 64),
        (64, 1, 64),
        (65, 2, 64),
        (200, 1, 256),
        (257, 4, 64),  # and 1 more, which is less than room for 8
        (5000, 2, 256),
    ],
)
def test_a_prompt_alone_is_read_in_the_fewest_tokens_and_parts(length, prompts, size):
    (chunks,), chosen = taken(unread(length))
    assert chosen == size and len(chunks) == prompts
    assert sum(count for _, _, count in chunks) == min(length, prompts * size)


@pytest.mark.parametrize(
    ("length", "read", "size"),
    [(30, 0, 32), (100, 0, 32), (250, 0, 256), (3900, 0, 256), (3900, 3800, 256)],
)
def test_small_parts_are_for_prompts_of_which_little_is_behind_them(length, read, size):
    shapes = {"prompts": (1, 2, 4, 8), "chunks": (32, 256), "prompt_tokens": 256}
    limits = Limits(rows=(8,), **shapes)
    assert take_chunks(limits, [unread(length, read=read)])[1] == size
    assert take_chunks(limits, [unread(length, read=length - 20)])[1] == 32


def test_parts_of_a_prompt_follow_each_other_and_prompts_their_order():
    chunks, size = taken(unread(300, 40, 50, read=200))
    parts = [(0, 200, 64), (0, 264, 36), (1, 0, 40), (2, 0, 50)]
    assert (chunks, size) == ([parts], 64)


def test_what_has_no_room_waits():
    (chunks,), size = taken(unread(*(60,) * 5, 100, 100, 10))
    assert size == 64
    assert [slot for slot, _, _ in chunks] == [0, 1, 2, 3, 4, 5, 5, 6]


def test_the_device_with_most_to_read_decides_for_all():
    chunks, size = taken(unread(10), [], unread(*(60,) * 8))
    assert size == 64 and [len(part) for part in chunks] == [1, 0, 8]
    assert taken([], []) == ([[], []], 0)
