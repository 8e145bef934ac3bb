"""Work that is shared out: bounded memory, the first error, and its progress."""

import concurrent.futures
import io
import re
import threading
import time

import pytest
import rich.console

from jmoe.export.progress import TransferProgress
from jmoe.export.work import Budget, each


def test_what_is_in_the_works_stays_within_the_budget_or_is_alone():
    budget, lock, used, peaks = Budget(100), threading.Lock(), [], []

    def one(size):
        with budget.hold(size):
            with lock:
                used.append(size)
                peaks.append(sum(used))
                alone = len(used) == 1
            assert alone or peaks[-1] <= 100
            time.sleep(0.001)
            with lock:
                used.remove(size)

    sizes = [10, 30, 60, 99, 250, 1] * 10
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        each(pool, one, sizes)
    assert len(peaks) == len(sizes) and max(peaks) == 250


def test_the_first_error_ends_the_rest():
    done = []

    def one(item):
        if item == 1:
            raise KeyError("this one")
        time.sleep(0.01)
        done.append(item)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        with pytest.raises(KeyError, match="this one"):
            each(pool, one, range(1000))
        assert len(done) < 1000


@pytest.mark.parametrize("watched", [True, False])
def test_progress_shows_bytes_and_their_rate(watched):
    out = io.StringIO()
    console = rich.console.Console(
        file=out, force_terminal=watched, width=120, highlight=False
    )
    out.isatty = lambda: watched
    with TransferProgress("to there", console) as progress:
        advance = progress.start(4_000_000_000)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(advance, [1_000_000] * 4000))
    text = out.getvalue()
    assert re.search(r"to there: 4\.00 GB in \d:\d\d:\d\d, [\d.]+ GB/s\n$", text)
    assert ("4.0/4.0 GB" in text) == watched


def test_progress_that_failed_says_nothing_of_success():
    out = io.StringIO()
    with pytest.raises(OSError):
        with TransferProgress("to there", rich.console.Console(file=out)) as progress:
            progress.start(10)
            raise OSError("full")
    assert out.getvalue() == ""
