"""Processes that meet, as threads of this one: they share nothing but sockets."""

import concurrent.futures
import socket
from collections.abc import Callable
from typing import Any

import pytest


def in_parallel(function: Callable[..., Any], *arguments: tuple) -> list[Any]:
    """What `function` returns or raises for each of the arguments, all at once."""
    with concurrent.futures.ThreadPoolExecutor(len(arguments)) as pool:
        futures = [pool.submit(function, *given) for given in arguments]
    return [future.exception() or future.result() for future in futures]


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def address() -> str:
    return free_address()


@pytest.fixture(scope="session")
def parallel():
    return in_parallel
