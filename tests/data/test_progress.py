"""What is shown of tokenising: a line now and then, the time left, and the end."""

import io

import pytest
import rich.console

from jmoe.data.progress import Progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def shown():
    out = rich.console.Console(file=io.StringIO(), width=200, highlight=False)
    clock = Clock()
    return out, clock, lambda: out.file.getvalue().splitlines()


def test_where_nobody_watches_a_line_comes_every_half_minute(shown):
    out, clock, lines = shown
    with Progress("a[1].txt", 1000, out=out, clock=clock) as progress:
        clock.now = 29
        progress.add(10, 20_000)
        assert lines() == []
        clock.now = 40
        progress.finish(250)
        progress.finish(250)
        (line,) = lines()
        counts = "10 documents, 20.0k tokens, 500 tok/s"
        assert line == f"a[1].txt  {counts}  0:02:00 left"
    counts = "10 documents, 20.0k tokens, 500 tok/s"
    assert lines()[1:] == [f"Tokenised a[1].txt: {counts} in 0:00:40"]


def test_the_time_left_is_by_the_pace_of_this_attempt(shown):
    out, clock, lines = shown
    with Progress("a.txt", 1000, 600, out=out, clock=clock) as progress:
        clock.now = 31
        progress.add(1, 1)
        clock.now = 62
        progress.finish(100)
    assert [line.split()[-2:] for line in lines()[:2]] == [
        ["-:--:--", "left"],
        ["0:03:06", "left"],
    ]


def test_nothing_is_said_after_an_error_or_of_nothing(shown):
    out, clock, lines = shown
    with Progress("a.txt", 10, 10, out=out, clock=clock):
        pass
    with pytest.raises(OSError), Progress("a.txt", 10, out=out, clock=clock) as some:
        some.add(1, 1)
        raise OSError
    assert lines() == []


def test_who_watches_sees_a_live_line():
    out = rich.console.Console(file=io.StringIO(), width=120, force_terminal=True)
    out.file.isatty = lambda: True
    with Progress("a.txt", 10, out=out) as progress:
        progress.add(3, 99)
    assert "3 documents, 99 tokens" in out.file.getvalue()
