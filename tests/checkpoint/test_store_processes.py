"""Checkpoints of several processes: written by all, read by any number."""

import pathlib

import pytest

from jmoe.checkpoint import manifest
from jmoe.checkpoint.store import Store
from tests import several_processes
from tests.checkpoint import store_program

PROGRAM = pathlib.Path(store_program.__file__)


def run(action: str, directory: pathlib.Path, shape: str, count: int = 2):
    address = several_processes.free_address()
    return several_processes.ended(
        [
            several_processes.start(
                [PROGRAM, action, directory, shape, address, str(count), str(index)]
            )
            for index in range(count)
        ]
    )


@pytest.fixture(scope="module")
def by_two(tmp_path_factory) -> pathlib.Path:
    """Checkpoints that two processes of two devices wrote, one after the other."""
    directory = tmp_path_factory.mktemp("by_two") / "checkpoints"
    assert run("save", directory, "2,2") == [(0, "", "")] * 2
    return directory


def test_two_processes_leave_one_whole_checkpoint(by_two):
    assert [path.name for path in by_two.iterdir()] == ["3"]
    stored = manifest.read(by_two / "3")
    manifest.check_sums(by_two / "3", stored["files"])
    assert set(stored["arrays"]) == set(store_program.SPECS)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (4, 4), (1, 8)])
def test_one_process_restores_what_two_wrote_on_any_mesh(by_two, shape):
    store_program.assert_restored(by_two, shape)


@pytest.mark.parametrize("shape", ["4,1", "1,4"])
def test_two_processes_restore_on_another_mesh(by_two, shape):
    assert run("restore", by_two, shape) == [(0, "", "")] * 2


def test_two_processes_restore_what_one_wrote(tmp_path):
    with Store(tmp_path) as store:
        store.save(3, store_program.placed((4, 4)), {"batch": 3})
    assert run("restore", tmp_path, "2,2") == [(0, "", "")] * 2


def test_a_checkpoint_that_is_not_there_is_an_error_on_both(tmp_path):
    for code, _, err in run("restore", tmp_path, "2,2"):
        assert code == 1 and f"No whole checkpoint in {tmp_path}" in err
