"""The log of balance: exact, small at any size, and whole after a cut."""

import contextlib
import pathlib

import numpy as np
import pytest

from jmoe.monitor import run_files
from jmoe.monitor.balance_log import BalanceLog, read_records

V3 = (58, 256)  # MoE layers and routed experts of DeepSeek-V3


def values(step: int, shape=(2, 4)) -> np.ndarray:
    return np.random.default_rng(step).normal(size=shape).astype(np.float32)


def write(path: pathlib.Path, steps, *, start_step: int = 0, shape=(2, 4)) -> None:
    with contextlib.closing(BalanceLog(path, start_step=start_step)) as log:
        for step in steps:
            log.append(step, values(step, shape), -values(step, shape))


@pytest.fixture
def path(tmp_path) -> pathlib.Path:
    return tmp_path / run_files.BALANCE


def assert_holds(path: pathlib.Path, steps) -> None:
    records = np.load(path, mmap_mode="r")
    assert records["step"].tolist() == [*steps]
    for record in records:
        np.testing.assert_array_equal(record["load_LE"], values(record["step"]))
        np.testing.assert_array_equal(record["bias_LE"], -values(record["step"]))


def test_numpy_reads_at_any_time_what_was_logged_bit_for_bit(path):
    with contextlib.closing(BalanceLog(path, start_step=0)) as log:
        for count in range(1, 12):  # the header's number gets longer
            log.append(count, values(count), -values(count))
            assert_holds(path, range(1, count + 1))
        log.append(12, np.full((2, 4), np.nan), np.full((2, 4), -np.inf))
    last = np.load(path)[-1]
    assert np.isnan(last["load_LE"]).all() and (last["bias_LE"] == -np.inf).all()


def test_a_log_of_deepseek_v3_takes_less_than_30_kb(path):
    logs = 40
    write(path, range(1, logs + 1), shape=V3)
    assert path.stat().st_size < 30_000 * logs
    steps = np.load(path, mmap_mode="r")["step"]
    assert steps[0] == 1 and len(steps) >= logs / 5 and np.ptp(np.diff(steps)) == 0
    balance = run_files.read_run(path.parent).balance
    assert balance is not None and balance.load_NLE.shape == (len(steps), *V3)


@pytest.mark.parametrize("start_step", [0, 1, 2, 7, 8, 50, 99, 100, 1000])
def test_resuming_drops_the_records_after_the_checkpoint(path, start_step):
    write(path, range(2, 101, 2))
    kept = [step for step in range(2, 101, 2) if step <= start_step]
    write(path, [1001, 1002], start_step=start_step)
    assert_holds(path, [*kept, 1001, 1002])
    write(path, [], start_step=start_step)
    assert_holds(path, kept)
    write(path.with_name("of kept"), kept)
    if kept:
        assert path.read_bytes() == path.with_name("of kept").read_bytes()


class Counting:
    """A file that remembers how much was read of it at a time."""

    def __init__(self, file):
        self.file, self.read_sizes = file, []

    def read(self, size):
        self.read_sizes.append(size)
        return self.file.read(size)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_resuming_reads_little_of_a_large_file(path, monkeypatch):
    write(path, range(1, 1025))
    file = Counting(path.open("r+b"))
    monkeypatch.setattr(pathlib.Path, "open", lambda *_: file)
    BalanceLog(path, start_step=1000).close()
    assert sum(file.read_sizes) < 1000 and file.read_sizes.count(8) <= 11
    monkeypatch.undo()
    assert_holds(path, range(1, 1001))


def cut_a_record(path):
    path.write_bytes(path.read_bytes()[:-5])


def lose_the_content(path):
    """Loses what was appended last, as a power cut may."""
    size = np.load(path).itemsize
    path.write_bytes(path.read_bytes()[:-size] + bytes(size))


def add_what_the_header_lacks(path):
    path.write_bytes(path.read_bytes() + b"more")


@pytest.mark.parametrize(
    "damage", [cut_a_record, lose_the_content, add_what_the_header_lacks]
)
def test_what_a_cut_leaves_is_read_without_the_last_record_and_goes_on(path, damage):
    write(path, range(1, 6))
    damage(path)
    steps = [1, 2, 3, 4, 5] if damage is add_what_the_header_lacks else [1, 2, 3, 4]
    balance = run_files.read_run(path.parent).balance
    assert balance is not None and balance.step_N.tolist() == steps
    write(path, [5, 6], start_step=4)
    assert_holds(path, [1, 2, 3, 4, 5, 6])


def test_a_header_with_any_damage_is_no_error(path, caplog):
    write(path, [1, 2])
    whole = path.read_bytes()
    damaged = 0
    for at in range(len(whole) - 2 * np.load(path).itemsize):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        records = read_records(path)
        damaged += records is None
        run_files.read_run(path.parent)
        if records is None:
            write(path, [3], start_step=2)
            assert_holds(path, [3])
    assert damaged > 50 and f"{path} can't be read, and begins anew" in caplog.text


@pytest.mark.parametrize("array", [np.zeros(3), np.zeros((2, 2)), np.float32(1)])
def test_another_array_is_not_recorded_balance(path, array):
    np.save(path, array)
    assert (
        read_records(path) is None and run_files.read_run(path.parent).balance is None
    )
