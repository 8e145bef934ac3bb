"""Hostile requests of every kind to our own engine's server, beside normal ones."""

from collections.abc import Callable, Iterator, Mapping

from experiments.benchmarks import faults_serving, hostile, serve_servers
from experiments.benchmarks.balance_part import Part
from experiments.benchmarks.report import Figure
from experiments.benchmarks.serve_model import DIRECTORY
from experiments.benchmarks.serve_servers import ours

WARM_UP = 48  # requests, after which memory is used again
ALONE = 50  # normal requests of each client without hostile ones


def attacked(count: int, say: Callable[[str], None]) -> Part:
    """Measures a server that lets go of slow clients early, which saves minutes."""
    with serve_servers.running(ours, DIRECTORY, *faults_serving.LIMITS) as server:
        say(f"{count} hostile requests")
        asked = {"key": None, "pids": server.pids}
        hostile.measure(server.url, **asked, count=WARM_UP)
        result = hostile.measure(server.url, **asked, count=count, alone=ALONE)
        result["stuck"] = serve_servers.unfinished(server)
        result["well"] = float(serve_servers.is_well(server.url))
    figures = [*faults_serving.figures(result, count), *_figures(result)]
    return Part(figures, {"hostile": count, "alone": ALONE}, result)


def _figures(result: Mapping[str, float]) -> Iterator[Figure]:
    yield Figure(
        name="stuck slots",
        value=result["stuck"],
        unit="",
        definition="requests that the server still computes, or that wait, once all "
        "clients are gone",
        at_most=0,
    )
    yield Figure(
        name="normal requests' p99 beside hostile ones / without",
        value=result["normal_p99_seconds"] / result["alone_p99_seconds"],
        unit="×",
        definition=f"of two clients' whole answers; without: {ALONE} each, before; the "
        "hostile clients have the same cores",
        at_most=2,
    )
