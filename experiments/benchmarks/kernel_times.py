"""What a GPU's time goes to, as JAX's profiler sees it."""

import collections
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax

MOST = 60  # kernels that are told


def kernel_times(call: Callable[[], Any]) -> list[tuple[str, float, int]]:
    """The kernels that took longest in one call: name, milliseconds, launches.

    `call` returns once its work is done. On a CPU, there are none.
    """
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            call()
        (path,) = pathlib.Path(directory).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
    total: dict[str, float] = collections.defaultdict(float)
    launches: dict[str, int] = collections.defaultdict(int)
    for plane in profile.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                total[event.name] += event.duration_ns / 1e6
                launches[event.name] += 1
    names = sorted(total, key=lambda name: total[name], reverse=True)[:MOST]
    return [(name, total[name], launches[name]) for name in names]
