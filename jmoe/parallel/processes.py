"""A run as several processes: how they start, agree, and stop at the same step.

    with processes.join(coordinator, num_processes, process_id):
        processes.agree({"train": ...})
        ...

A program that was started alone needs none of it: all functions here then do nothing,
as if over a group of one. In a group they are calls that all processes make in the same
order; they go over the host's network (`jmoe.parallel.rendezvous`), not over devices.

A process that leaves `join` by an error ends the others with that error, where they
wait for it the next time, and within GRACE_S wherever they are. One that dies ends the
others at once, with one line that says which it was: nothing that they may be waiting
for, in a step or a save, will ever come. JAX would end them too, at the earliest by
SIGABRT and a page of C++, at the latest after its own 100 s, and not by name. Without
an error all leave together, once their devices have done all that they were given.
"""

import contextlib
import contextvars
import ctypes
import hashlib
import json
import os
import pathlib
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, NoReturn

from jmoe.parallel import channel, rendezvous
from jmoe.parallel.launchers import Place, find_place
from jmoe.parallel.process_group import Failure, ProcessGroup, RemoteError

JOIN_TIMEOUT_S = 300.0
GRACE_S = 10.0  # to end by oneself, after another process has failed
# Exit codes.
FAILED_ELSEWHERE = 2
MISSING = 4
_FLUSH_S = 1.0
_WORD_S = 5.0  # for word of who is missing, when a collective has failed
# How long JAX waits at its end for a process that failed elsewhere.
_SHUTDOWN_TIMEOUT_S = 10
_VERSIONS = ("jmoe", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
_LISTED_DIFFERENCES = 8

_ALONE = ProcessGroup()
_group = contextvars.ContextVar("group", default=_ALONE)


def index() -> int:
    """Returns which process this is; 0 prints and writes for all."""
    return _group.get().index


def count() -> int:
    """Returns how many processes there are."""
    return _group.get().size


def exchange(what: str, value: Any) -> list[Any]:
    """Returns the JSON values that all processes give, by process.

    Waits for all of them.

    Args:
      what: names the exchange in errors; the same on all processes.

    Raises:
      RemoteError: another process failed; says which, and how.
      ConnectionError: another process has ended.
    """
    return _group.get().exchange(what, value)


def from_first(what: str, make: Callable[[], Any]) -> Any:
    """Returns what `make` returns on process 0, the only one to call it.

    It is a JSON value.
    """
    return exchange(what, make() if index() == 0 else None)[0]


def sender(what: str) -> Callable[[Any], None]:
    """Returns what sends JSON values from process 0 to all others, for `receive`.

    Another thread may call it. It waits for nobody.
    """
    group = _group.get()
    return lambda value: group.send(what, value)


def receive(what: str) -> Any:
    """Returns the next value that process 0 sends; raises as `exchange` does."""
    return _group.get().receive(what)


@contextlib.contextmanager
def first_before_others(what: str) -> Iterator[None]:
    """Lets process 0 go through the block, then the others, who find what it made."""
    if index() > 0:
        exchange(what, None)
    yield
    if index() == 0:
        exchange(what, None)


def any_signal(mine: int, *, ask: bool) -> int:
    """Returns the signal that stops the run: any process's, or 0 if none has any.

    Args:
      ask: whether to ask the others, which makes all wait for the slowest; the same on
        all processes. Without it none stops. A lone process needs not ask.
    """
    if _group.get().is_alone:
        return mine
    return max(exchange("signals", mine)) if ask else 0


@contextlib.contextmanager
def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout_s: float | None = None,
) -> Iterator[None]:
    """Makes this process one of a group while the block runs; call it before JAX runs.

    What isn't given is taken from the launcher that started the process. Started alone,
    it does nothing.

    Args:
      coordinator: host:port of process 0. Processes meet there, then JAX uses it.
      timeout_s: how long to wait for all; by default JOIN_TIMEOUT_S.

    Raises:
      TimeoutError: not all processes came; names those that didn't.
      ValueError: the values are incomplete or impossible, or the processes differ in
        jmoe's code or in versions of libraries; names the difference.
    """
    place = find_place(coordinator, num_processes, process_id)
    if place is None:
        yield
        return
    timeout_s = JOIN_TIMEOUT_S if timeout_s is None else timeout_s
    group = rendezvous.join(*place, timeout_s, channel.read_secret())
    with membership(group):
        group.watch(lambda failure: _end_in_time(group, failure))
        agree({"versions": _versions(), "code": code_fingerprint()})
        stop_jax = _start_jax(place, group, timeout_s)
        try:
            yield
            _await_devices()
            exchange("the end", None)
            stop_jax()
        except BaseException as error:
            _abandon_jax()
            # An error of XLA's begins with its code, as UNKNOWN, INTERNAL, ABORTED.
            is_from_xla = re.match("[A-Z_]+: ", str(error)) is not None
            failure = group.await_failure(_WORD_S) if is_from_xla else None
            if failure is None:
                raise
            raise failure.as_error() from error


@contextlib.contextmanager
def membership(group: ProcessGroup) -> Iterator[None]:
    """Makes `group` that of this thread; tells it of an error that ends the block."""
    token = _group.set(group)
    try:
        yield
    except RemoteError:
        raise
    except BaseException as error:
        plain = isinstance(error, ValueError | OSError)
        group.fail(str(error) if plain else f"{type(error).__name__}: {error}")
        raise
    finally:
        _group.reset(token)
        group.close()


def _end_in_time(group: ProcessGroup, failure: Failure) -> None:
    if failure.is_missing:
        _end(failure.reason, MISSING)

    def end_if_here() -> None:
        if not group.has_left:
            _end(failure.reason, FAILED_ELSEWHERE)

    timer = threading.Timer(GRACE_S, end_if_here)
    timer.daemon = True
    timer.start()


def _end(reason: str, code: int) -> NoReturn:
    """Ends this process, whatever its threads are waiting for."""
    with contextlib.suppress(OSError):
        os.write(2, f"error: {reason}\n".encode(errors="backslashreplace"))
    flush = threading.Thread(target=sys.stdout.flush, daemon=True)
    flush.start()
    flush.join(_FLUSH_S)  # a reader may have stopped
    os._exit(code)


def agree(what: Mapping[str, Any]) -> None:
    """Refuses to go on where processes differ in `what`, nested JSON values.

    Raises:
      ValueError: on every process; names each value that differs, and who has which.
    """
    flat = _flatten(what)
    text = json.dumps(flat, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    if len(set(exchange("digests", digest))) == 1:
        return
    views = exchange("values", flat)
    names = sorted({name for view in views for name in view})
    lines = []
    for name in names:
        values = [view.get(name, "nothing") for view in views]
        if len(set(values)) > 1:
            lines.append(f"{name}: {_by_value(values)}")
    more = len(lines) - _LISTED_DIFFERENCES
    if more > 0:
        lines[_LISTED_DIFFERENCES:] = [f"and {more} more"]
    raise ValueError("\n  ".join(["The processes must agree, but differ in", *lines]))


def code_fingerprint(
    package: pathlib.Path = pathlib.Path(__file__).parents[1],
) -> dict[str, str]:
    """Returns a short hash of each source file of a package, by default of jmoe."""
    return {
        path.relative_to(package.parent).as_posix(): hashlib.sha256(
            path.read_bytes()
        ).hexdigest()[:8]
        for path in sorted(package.rglob("*.py"))
    }


def _start_jax(
    place: Place, group: ProcessGroup, timeout_s: float
) -> Callable[[], None]:
    """Makes all processes' devices one set; returns what ends it, in good order."""
    import jax

    # It would take SIGTERM from us, and from the system.
    jax.config.update("jax_enable_preemption_service", False)
    if place.process_id == 0:
        address = group.forward_jax()
    # JAX lets a process of some launchers see one GPU only, its own. But one that has
    # the host for itself has all of the host's GPUs.
    hosts = exchange("hosts", socket.gethostname())
    alone = hosts.count(hosts[place.process_id]) == 1
    if place.process_id > 0:
        address = group.forward_jax()
    jax.distributed.initialize(
        address,
        place.num_processes,
        place.process_id,
        coordinator_bind_address=address,
        cluster_detection_method="deactivate" if alone else None,
        initialization_timeout=int(timeout_s),
        shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT_S,
    )
    return jax.distributed.shutdown


def _await_devices() -> None:
    """Returns when all that all processes' devices were given to do is done.

    Who reads a result may have waited for one device's part of it, as Orbax does. Other
    devices may still be at work and need another process; if that has left, XLA waits
    for minutes. Devices do one thing after another, those of CPUs collectives at least:
    so this waits for one more of all.
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh((jax.device_count(),), ("all",), (AxisType.Auto,))
    one_each = jnp.ones(mesh.size, device=NamedSharding(mesh, PartitionSpec("all")))
    whole = NamedSharding(mesh, PartitionSpec())
    jax.jit(jnp.sum, out_shardings=whole)(one_each).block_until_ready()


def _abandon_jax() -> None:
    """Leaves JAX's service and its client as they are, for the process to end.

    At its end JAX would wait for all others, and end the process by SIGABRT when they
    don't come. It has no public way to be told that they won't.
    """
    from jax._src import distributed

    state = distributed.global_state
    for held in (state.client, state.service):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))  # its destructor waits too
    state.client = state.service = None


def _versions() -> dict[str, str]:
    return {package: metadata.version(package) for package in _VERSIONS}


def _flatten(value: Any, name: str = "") -> dict[str, str]:
    """Returns {"train": {"seed": 0}} as {"train.seed": "0"}; lists by index."""
    if not isinstance(value, Mapping | list | tuple) or not value:
        return {name: json.dumps(value)}
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    flat = {}
    for key, below in items:
        flat |= _flatten(below, f"{name}.{key}" if name else str(key))
    return flat


def _by_value(values: Sequence[str]) -> str:
    """Returns, say, "0 on processes 0-2, 1 on process 3"."""
    indices: dict[str, list[int]] = {}
    for process, value in enumerate(values):
        indices.setdefault(value, []).append(process)
    return ", ".join(
        f"{value} on process{'es' * (len(group) > 1)} {rendezvous.ranges(group)}"
        for value, group in indices.items()
    )
