"""Several pieces of work at once, in bounded memory; the first error ends all."""

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

THREADS = 4
SHARDS_AT_ONCE = 2  # one is brought to the disk while the next is begun
MEMORY = 256 << 20  # of pieces that are in the works


class Budget:
    """Lets pieces in as long as they fit; one that never would, once it is alone."""

    def __init__(self, limit: int = MEMORY):
        self._limit = limit
        self._used = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, nbytes: int) -> Iterator[None]:
        """Waits for room, and takes it meanwhile."""
        with self._changed:
            while self._used and self._used + nbytes > self._limit:
                self._changed.wait()
            self._used += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._used -= nbytes
                self._changed.notify_all()


def each(
    pool: concurrent.futures.Executor, work: Callable[[T], None], items: Iterable[T]
) -> None:
    """Does the work on every item; an error is raised once nothing runs any more."""
    futures = [pool.submit(work, item) for item in items]
    try:
        for future in concurrent.futures.as_completed(futures):
            future.result()
    except BaseException:
        for future in futures:
            future.cancel()
        concurrent.futures.wait(futures)
        raise
