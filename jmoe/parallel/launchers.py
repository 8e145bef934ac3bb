"""Where processes meet: as a flag says, or the launcher that started them.

A launcher, as Slurm's `srun` or Open MPI's `mpirun`, starts one program many times, and
tells each by variables which one it is.
"""

import os
from collections.abc import Mapping
from typing import NamedTuple

from jmoe.parallel.listener import split_address


class Launcher(NamedTuple):
    """Environment variables by which a launcher tells a process who it is."""

    name: str
    process_id: str
    num_processes: str | None  # None: it doesn't tell
    required: str | None = None  # without which the others mean something else


# The first that is there counts: MPI's processes may run inside a Slurm job. Slurm's
# variables count, as they do for JAX, only with the list of a step's nodes. Kubernetes'
# jobs may as well be independent programs: its variable counts only where the other
# values are given.
LAUNCHERS = (
    Launcher("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    Launcher("MPICH", "PMI_RANK", "PMI_SIZE"),
    Launcher("Slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NODELIST"),
    Launcher("Kubernetes", "JOB_COMPLETION_INDEX", None),
)


class Place(NamedTuple):
    """Says where processes meet, how many they are, and which of them this one is."""

    coordinator: str
    num_processes: int
    process_id: int


def find_place(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    environ: Mapping[str, str] = os.environ,
) -> Place | None:
    """Completes what is given by what a launcher says; None for a lone process.

    Raises:
      ValueError: something is missing or out of range; names it.
    """
    coordinator = coordinator or environ.get("JAX_COORDINATOR_ADDRESS")
    given = coordinator is not None or (num_processes, process_id) != (None, None)
    launcher = _launcher(environ)
    if launcher is not None and (given or launcher.num_processes is not None):
        if process_id is None:
            process_id = int(environ[launcher.process_id])
        if num_processes is None and launcher.num_processes is not None:
            num_processes = int(environ[launcher.num_processes])
    elif not given:
        return None
    if num_processes == 1 and process_id in (None, 0):
        return None
    if coordinator is None and None not in (num_processes, process_id):
        coordinator = _coordinator(num_processes, process_id)
    values = Place(coordinator, num_processes, process_id)  # pyright: ignore
    missing = [name for name, value in values._asdict().items() if value is None]
    if missing:
        known = ", ".join(launcher.name for launcher in LAUNCHERS)
        raise ValueError(
            f"Several processes need {', '.join(Place._fields)}. Not given, nor known "
            f"from a launcher ({known}): {', '.join(missing)}."
        )
    if values.num_processes < 1:
        raise ValueError(f"num_processes={num_processes} must be at least 1.")
    if not 0 <= values.process_id < values.num_processes:
        raise ValueError(f"process_id={process_id} must lie in [0, {num_processes}).")
    split_address(values.coordinator)
    return values


def _launcher(environ: Mapping[str, str]) -> Launcher | None:
    for launcher in LAUNCHERS:
        _, *needed = launcher
        if all(name is None or name in environ for name in needed):
            return launcher
    return None


def _coordinator(num_processes: int | None, process_id: int | None) -> str | None:
    """Returns process 0's address, as far as JAX knows the launcher.

    JAX has no public function that tells it without connecting.
    """
    from jax._src.clusters import ClusterEnv

    found = ClusterEnv.auto_detect_unset_distributed_params(
        None, num_processes, process_id, [], None, None
    )
    return found[0]
