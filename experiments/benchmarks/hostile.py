"""What a served model does while clients misbehave.

`measure` sends hostile requests of every kind in `hostile_requests`, many at once,
beside normal ones. A hostile one must be answered by a 4xx or its connection closed; a
normal one must be answered as the first was, before any hostility.
"""

import concurrent.futures
import contextlib
import http.client
import json
import math
import pathlib
import ssl
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator, Sequence
from random import Random

from experiments.benchmarks.hostile_requests import (
    CLOSED,
    COMPLETIONS,
    KINDS,
    PATIENCE,
    Target,
)

AT_ONCE = 24  # hostile requests
NORMAL_AT_ONCE = 2
LEAST_NORMAL = 8  # of each client, however slow the machine is
SETTLE_SECONDS = 15.0  # within which memory that isn't kept is given back


def measure(
    url: str,
    *,
    key: str | None,
    pids: Sequence[int],
    count: int = 300,
    alone: int = LEAST_NORMAL,
) -> dict[str, float]:
    """Sends `count` hostile requests to a server, and normal ones meanwhile.

    Args:
      url: where it listens, as http://127.0.0.1:8000.
      key: an API key that it knows; None if it needs none.
      pids: of processes on this machine whose memory is watched.
      alone: normal requests of each client before there are hostile ones.

    Returns:
      `hostile` requests, of which so many were `answered` by a 4xx or `closed`, and
      `failed` the others: let through, answered by a 5xx, or still open after PATIENCE;
      `normal` requests, of which so many were `served` as the first was;
      `normal_slowest_seconds`; 99% took at most `normal_p99_seconds`, and before that
      `alone_p99_seconds`; `rss_growth_mib` of all processes together, and `alive`,
      1 if all of them still are.
    """
    target = find_target(url, key)
    expected, _ = _normal(target)
    before = sum(map(rss_mib, pids))
    with _normal_clients(target, alone) as undisturbed:
        pass
    with _normal_clients(target, LEAST_NORMAL) as answers:
        statuses = _hostile(target, count)
    answered = sum(400 <= status < 500 for _, status in statuses)
    closed = sum(status == CLOSED for _, status in statuses)
    failed = Counter(
        f"failed_{name}"
        for name, status in statuses
        if not 400 <= status < 500
        if status != CLOSED
    )
    return {
        "hostile": float(count),
        "answered": float(answered),
        "closed": float(closed),
        "failed": float(count - answered - closed),
        "normal": float(len(answers)),
        "served": float(sum(text == expected for text, _ in answers)),
        "normal_slowest_seconds": max(seconds for _, seconds in answers),
        "normal_p99_seconds": percentile([x for _, x in answers], 99),
        "alone_p99_seconds": percentile([x for _, x in undisturbed], 99),
        "rss_growth_mib": _settled_growth(pids, before),
        "alive": float(all(map(_is_alive, pids))),
        **{name: float(number) for name, number in failed.items()},
    }


def find_target(url: str, key: str | None) -> Target:
    """Returns where a server's requests go, with the model that it serves.

    Raises:
      ValueError: it doesn't tell.
    """
    parts = urllib.parse.urlsplit(url)
    tls = parts.scheme == "https"
    port = parts.port or (443 if tls else 80)
    target = Target(parts.hostname or "", port, tls, key)
    status, models = _ask(target, "GET", "/v1/models")
    if status != 200:
        raise ValueError(f"{url} answers {status} for its models: {models}")
    return target._replace(model=json.loads(models)["data"][0]["id"])


def _hostile(target: Target, count: int) -> list[tuple[str, int]]:
    """Returns each request's kind and outcome."""

    def send(index: int) -> tuple[str, int]:
        kind = KINDS[index % len(KINDS)]
        return kind.__name__, kind(target, Random(index))

    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(send, range(count)))


@contextlib.contextmanager
def _normal_clients(target: Target, least: int) -> Iterator[list[tuple[str, float]]]:
    """Has clients ask, one request after another, while the block runs.

    Gives a list that has all of their answers behind the block.

    Args:
      least: of each client's requests, however short the block is.
    """
    answers: list[tuple[str, float]] = []
    finished = threading.Event()

    def ask_on() -> None:
        asked = 0
        while asked < least or not finished.is_set():
            answers.append(_normal(target))
            asked += 1

    with concurrent.futures.ThreadPoolExecutor(NORMAL_AT_ONCE) as pool:
        clients = [pool.submit(ask_on) for _ in range(NORMAL_AT_ONCE)]
        try:
            yield answers
        finally:
            finished.set()
    for client in clients:
        client.result()


def _normal(target: Target) -> tuple[str, float]:
    """Returns the text of an answer, or what there is instead, and its seconds."""
    began = time.monotonic()
    try:
        status, body = _ask(target, "POST", COMPLETIONS, json.dumps(target.asked()))
    except OSError as error:
        return repr(error), time.monotonic() - began
    text = json.loads(body)["choices"][0]["text"] if status == 200 else body
    return text, time.monotonic() - began


def _ask(
    target: Target, method: str, path: str, body: str | None = None
) -> tuple[int, str]:
    address = (target.host, target.port)
    if target.tls:
        context = ssl._create_unverified_context()
        connection = http.client.HTTPSConnection(
            *address, timeout=PATIENCE, context=context
        )
    else:
        connection = http.client.HTTPConnection(*address, timeout=PATIENCE)
    headers = {"Content-Type": "application/json"}
    if target.key is not None:
        headers["Authorization"] = f"Bearer {target.key}"
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def percentile(values: Sequence[float], percent: float) -> float:
    """Returns the smallest of the values that so many percent don't exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(len(ordered) * percent / 100), 1) - 1]


def _settled_growth(pids: Sequence[int], before: float) -> float:
    """Returns the least growth seen while memory settles."""
    least = float("inf")
    deadline = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < deadline and least > 0:
        least = min(least, sum(map(rss_mib, pids)) - before)
        time.sleep(0.5)
    return least


def rss_mib(pid: int) -> float:
    """Returns a process's resident memory, 0 if it is gone."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    sizes = [line.split()[1] for line in lines if line.startswith("VmRSS:")]
    return float(sizes[0]) / 1024 if sizes else 0.0  # a zombie has none


def _is_alive(pid: int) -> bool:
    return rss_mib(pid) > 0
