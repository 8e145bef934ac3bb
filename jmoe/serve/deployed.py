"""What a replica of Ray Serve's holds, and what it takes to start one."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple


class RunningEngine(NamedTuple):
    """An engine that runs, with its HTTP application.

    app: Starlette's, or one that has its routes. check_health: raises if the engine is
    ill. page: returns its own metrics in Prometheus's text format. close: ends it.
    """

    app: Any
    check_health: Callable[[], Awaitable[None]]
    page: Callable[[], bytes]
    close: Callable[[], None]


class Deployed(NamedTuple):
    """What replicas are made of, on whatever machine Ray starts them.

    start: called there with `arguments`, which can be pickled. environment: of the
    process. kind: "CPU" or "GPU", of which one has as many as its engine has devices.
    resources: returns the options by which Ray gives it so many.
    """

    start: Callable[..., Awaitable[RunningEngine]]
    arguments: tuple[Any, ...]
    environment: Mapping[str, str]
    kind: str
    resources: Callable[[int], dict[str, Any]]
