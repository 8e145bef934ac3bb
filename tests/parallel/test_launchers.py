"""Who is one of several processes, and where they meet."""

import pytest

from jmoe.parallel import launchers

OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}
SLURM = {
    "SLURM_JOB_ID": "8193",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NODELIST": "node[07-10],other",
}


@pytest.mark.parametrize(
    ("flags", "environ", "expected"),
    [
        ((None, None, None), {}, None),
        ((None, 1, None), {}, None),
        (("a:1", 2, 1), {}, ("a:1", 2, 1)),
        (("a:1", 2, 1), SLURM, ("a:1", 2, 1)),
        ((None, 2, 0), {"JAX_COORDINATOR_ADDRESS": "b:2"}, ("b:2", 2, 0)),
        (("a:1", None, None), OPEN_MPI, ("a:1", 4, 1)),
        (("a:1", None, None), {"PMI_RANK": "0", "PMI_SIZE": "2"}, ("a:1", 2, 0)),
        ((None, None, None), {"PMI_RANK": "0", "PMI_SIZE": "1"}, None),
        # MPI's processes in a Slurm job have the variables of both
        (("a:1", None, None), SLURM | OPEN_MPI, ("a:1", 4, 1)),
        ((None, None, None), SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        # within an allocation, but not started by srun
        ((None, None, None), {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),
        # one of many jobs of an array, each on its own
        ((None, None, None), {"JOB_COMPLETION_INDEX": "3"}, None),
        (("a:1", 4, None), {"JOB_COMPLETION_INDEX": "3"}, ("a:1", 4, 3)),
    ],
)
def test_what_is_not_given_comes_from_the_launcher(flags, environ, expected):
    assert launchers.find_place(*flags, environ=environ) == expected


def test_slurm_tells_where_process_0_is(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    place = launchers.find_place(None, None, None)
    assert place == ("node07:61441", 8, 3)  # JAX derives the port from the job's number


@pytest.mark.parametrize(
    ("flags", "environ", "complaint"),
    [
        (("a:1", None, None), {}, "launcher .*: num_processes, process_id.$"),
        (("a:1", 2, None), {}, "launcher .*: process_id.$"),
        ((None, 2, 0), {}, "launcher .*: coordinator.$"),
        ((None, None, 1), {}, "launcher .*: coordinator, num_processes.$"),
        ((None, None, None), OPEN_MPI, "launcher .*: coordinator.$"),
        (("a:1", None, None), {"JOB_COMPLETION_INDEX": "3"}, ": num_processes.$"),
        (("a:1", 2, 2), {}, r"process_id=2 must lie in \[0, 2\)"),
        (("a:1", 2, -1), {}, r"process_id=-1 must lie in \[0, 2\)"),
        (("a:1", 1, 1), {}, r"process_id=1 must lie in \[0, 1\)"),
        (("a:1", 0, 0), {}, "num_processes=0 must be at least 1"),
        (("a", 2, 0), {}, "coordinator='a' must read host:port"),
        (("a:1", None, None), OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "4"}, "process_id=4"),
    ],
)
def test_incomplete_or_impossible_places_are_refused(flags, environ, complaint):
    with pytest.raises(ValueError, match=complaint):
        launchers.find_place(*flags, environ=environ)
