"""Which parts of which prompts a step reads.

A step takes as long as the weights of almost all experts take to be read, and longer by
the tokens that it has room for, whether they are there or not. So prompts are read side
by side, and what one is too long for is cut into several parts of one step: they attend
to each other by the cache, into which all are written first. Small parts leave little
room empty; but each of them reads all pages of its prompt up to itself once more, which
is little at a prompt's beginning only.
"""

from collections.abc import Sequence

from jmoe.decode.limits import Limits
from jmoe.decode.live import Live, PromptChunk

# What takes as long as so many tokens: the weights' being read, and a page's by a part.
# Measured with a `bench_s` model on two CPU cores: 0.45 ms a token, 60 ms, 0.8 ms.
_WEIGHTS, _PAGE = 128, 2


def take_chunks(
    limits: Limits, unread: Sequence[Sequence[Live]]
) -> tuple[list[list[PromptChunk]], int]:
    """Returns the next parts of these prompts, the first ones' first, and their size.

    The size is one of the limits' chunks: that by which all prompts are read soonest; 0
    if there is no prompt.

    Args:
      unread: requests whose prompts aren't read, of each device that has sequences of
        its own.
    """
    if not any(unread):
        return [[] for _ in unread], 0
    prompts, chunk = min(limits.readings, key=lambda x: _until_read(limits, unread, *x))
    return [_cut(lives, prompts, chunk) for lives in unread], chunk


def _until_read(
    limits: Limits, unread: Sequence[Sequence[Live]], prompts: int, chunk: int
) -> tuple[float, int]:
    """Returns how long it takes, in tokens; of equals, fewer parts are better.

    Steps are of this size, but for the last, which is as small as it may be.
    """
    parts = max(sum(-(-_left(live) // chunk) for live in lives) for lives in unread)
    whole, rest = divmod(parts, prompts)
    room = whole * prompts + (limits.size(0, rest, chunk).prompts if rest else 0)
    steps = whole + (rest > 0)
    pages = max(sum(_pages(limits, live, chunk) for live in lives) for lives in unread)
    return room * chunk + steps * _WEIGHTS + pages * _PAGE, prompts


def _cut(lives: Sequence[Live], prompts: int, chunk: int) -> list[PromptChunk]:
    found: list[PromptChunk] = []
    for live in lives:
        for start in range(live.read, len(live.prompt), chunk):
            if len(found) == prompts:
                return found
            count = min(chunk, len(live.prompt) - start)
            found.append(PromptChunk(live, start, count))
    return found


def _pages(limits: Limits, live: Live, chunk: int) -> float:
    """Returns how many pages all parts of a prompt read that are left, together."""
    parts = -(-_left(live) // chunk)
    return parts * (live.read + chunk * (parts + 1) / 2) / limits.page_size


def _left(live: Live) -> int:
    return len(live.prompt) - live.read
