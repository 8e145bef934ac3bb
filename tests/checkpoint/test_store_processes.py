"""Checkpoints of several processes: written by all, read by any number."""

import collections
import json
import pathlib
import shutil

import pytest

from jmoe.checkpoint import manifest
from jmoe.checkpoint.store import Store
from jmoe.parallel import processes
from tests import several_processes
from tests.checkpoint import store_program

PROGRAM = pathlib.Path(store_program.__file__)
COUNT_BYTES = """
import collections, json, pathlib, sys
from jmoe.checkpoint import sums
from tests.checkpoint import store_program

read, sizes = sums._read_block, collections.Counter()

def counting(directory, name, start, stop):
    part = read(directory, name, start, stop)
    step, *below = (directory / name).relative_to(sys.argv[2]).parts
    sizes["/".join(below)] += part.size
    return part

sums._read_block = counting
store_program.main(*sys.argv[1:])
print(json.dumps(sizes))
"""


def run(action: str, directory: pathlib.Path, shape: str, program=(PROGRAM,)):
    address = several_processes.free_address()
    return several_processes.ended(
        [
            several_processes.start(
                [*program, action, directory, shape, address, "2", index]
            )
            for index in "01"
        ]
    )


def bytes_read(action: str, directory: pathlib.Path) -> list[dict[str, int]]:
    """By process: how many bytes of which file it summed."""
    results = run(action, directory, "2,2", ("-c", COUNT_BYTES))
    assert [result.code for result in results] == [0, 0], results
    return [json.loads(result.out) for result in results]


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
        assert code in (1, processes.FAILED_ELSEWHERE)
        assert f"No whole checkpoint in {tmp_path}" in err


def test_each_process_sums_what_it_wrote_and_half_of_what_is_restored(tmp_path):
    by_first, by_second = bytes_read("save", tmp_path)
    files = manifest.read(tmp_path / "3")["files"]
    sizes = {name: size for name, (size, _) in files.items()}
    own = {name for name in sizes if name.startswith("ocdbt.process_1/d/")}
    assert own and own <= by_second.keys() and not own & by_first.keys()
    assert all(name.startswith("ocdbt.process_1/") for name in by_second)

    first, second = map(collections.Counter, bytes_read("restore", tmp_path))
    assert first + second == sizes
    assert abs(first.total() - second.total()) <= 1


@pytest.mark.parametrize("place", ["first", "last"])
def test_damage_is_refused_by_both_whoever_reads_it(by_two, tmp_path, place):
    copy = shutil.copytree(by_two, tmp_path / "checkpoints")
    files = manifest.read(copy / "3")["files"]
    name = list(files)[0 if place == "first" else -1]
    data = bytearray((copy / "3" / name).read_bytes())
    data[0] ^= 1
    (copy / "3" / name).write_bytes(data)
    (first, _, said), (second, _, _) = run("restore", copy, "2,2")
    assert (first, second) == (1, 1)
    assert f"{name} was altered" in said and "No whole checkpoint" in said
