"""The files a run logs to: they survive a kill, a resume and a diverging loss."""

import json
import pathlib
import struct

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from jmoe.monitor import run_files
from jmoe.monitor.metrics_log import MetricsLog
from tests.faults import full


def _lines(path: pathlib.Path) -> list[dict]:
    def refuse(constant: str):
        raise ValueError(f"{constant} is not JSON")

    lines = path.read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def _events(run_dir: pathlib.Path) -> list:
    """All events of a run: length, checksum, message, checksum; again and again."""
    events = []
    for path in sorted((run_dir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def _log_steps(run_dir: pathlib.Path, *, start_step: int, steps: range) -> None:
    with MetricsLog(run_dir, start_step=start_step) as log:
        for step in steps:
            balance = np.full((2, 4), step, dtype=np.float32)
            log.log(step, {"loss": -step}, load_LE=balance, bias_LE=balance)


def test_a_row_reads_back_as_it_was_logged(tmp_path):
    loss = np.float32(2.3456789)
    with MetricsLog(tmp_path, start_step=0) as log:
        metrics = {"loss": loss, "tokens": 2**40, "max_vio_L": np.array([0.5, 2.0])}
        log.log(3, {**metrics, "lent_PP": np.eye(2, dtype=int)})
        (row,) = run_files.read_rows(tmp_path / "metrics.jsonl")  # flushed already
    assert np.float32(row["loss"]) == loss
    assert (row["step"], row["tokens"], row["max_vio_L"]) == (3, 2**40, [0.5, 2.0])
    assert row["lent_PP"] == [[1, 0], [0, 1]]
    assert row["time"] > 1.7e9


def test_followers_are_called_with_every_row_as_it_was_logged(tmp_path):
    followed = []

    def follow(step, metrics, *, load_LE, bias_LE):
        followed.append((step, metrics, load_LE, bias_LE))

    load_LE, bias_LE = np.ones((1, 4)), np.zeros((1, 4))
    with MetricsLog(tmp_path, start_step=0, followers=[follow]) as log:
        log.log(1, {"loss": 2.5}, load_LE=load_LE, bias_LE=bias_LE)
        log.log(1, {"val_loss": 2.75})
    assert followed[0][2] is load_LE and followed[0][3] is bias_LE
    assert [row[:2] for row in followed] == [
        (1, {"loss": 2.5}),
        (1, {"val_loss": 2.75}),
    ]
    assert followed[1][2:] == (None, None)


def test_numbers_that_are_not_finite_survive_in_valid_json(tmp_path):
    values = [np.nan, np.inf, -np.inf, 1.5]
    with MetricsLog(tmp_path, start_step=0) as log:
        log.log(1, {"loss": np.float32(np.nan), "max_vio_L": values})
    _lines(tmp_path / "metrics.jsonl")
    run = run_files.read_run(tmp_path)
    np.testing.assert_array_equal(run.last("loss"), [np.nan])
    np.testing.assert_array_equal(run.last("max_vio_L"), values)


def test_resuming_drops_the_rows_after_the_checkpoint(tmp_path):
    _log_steps(tmp_path, start_step=0, steps=range(1, 8))
    _log_steps(tmp_path, start_step=4, steps=range(5, 7))
    steps = [row["step"] for row in _lines(tmp_path / "metrics.jsonl")]
    assert steps == np.load(tmp_path / "balance.npy")["step"].tolist() == [*range(1, 7)]


def test_resuming_parses_only_the_rows_it_drops(tmp_path, monkeypatch):
    path, parse, parsed = tmp_path / "metrics.jsonl", run_files.parse_row, []
    rows = [json.dumps({"step": step, "text": "x" * 99}) + "\n" for step in range(1000)]
    path.write_text("".join(rows))
    monkeypatch.setattr(
        run_files, "parse_row", lambda line: parsed.append(line) or parse(line)
    )
    MetricsLog(tmp_path, start_step=990).close()
    assert path.read_text() == "".join(rows[:991])
    assert parsed == rows[:989:-1]


@pytest.mark.parametrize(
    "content", ["", "\n", "{}", '{"step":9}\n{"step":8}\n', "x\n\ny"]
)
def test_resuming_before_all_rows_leaves_none(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    MetricsLog(tmp_path, start_step=7).close()
    assert path.read_text() == ""


def test_resuming_discards_a_line_that_was_cut_short(tmp_path):
    _log_steps(tmp_path, start_step=0, steps=range(1, 4))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step":4,"loss":1.2')
    assert [row["step"] for row in run_files.read_rows(path)] == [1, 2, 3]
    _log_steps(tmp_path, start_step=4, steps=range(5, 6))
    assert path.read_bytes().startswith(whole)
    assert [row["step"] for row in _lines(path)] == [1, 2, 3, 5]


def test_a_whole_row_without_its_newline_is_kept_apart_from_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":1,"loss":1.0}')
    _log_steps(tmp_path, start_step=1, steps=range(2, 3))
    assert [row["step"] for row in _lines(path)] == [1, 2]


def test_rows_of_one_step_are_read_as_one(tmp_path):
    with MetricsLog(tmp_path, start_step=0) as log:
        log.log(1, {"loss": 3.0})
        log.log(1, {"val_loss": 4.0})
    run = run_files.read_run(tmp_path)
    assert len(run.rows) == 1
    assert (run.last("loss"), run.last("val_loss")) == ([3.0], [4.0])


def test_loads_are_read_in_fair_shares(tmp_path):
    load_LE = np.array([[1 / 3, 2 / 3], [0.5, 0.5]])
    with MetricsLog(tmp_path, start_step=0) as log:
        log.log(1, {}, load_LE=load_LE, bias_LE=np.zeros((2, 2)))
    balance = run_files.read_run(tmp_path).balance
    assert balance is not None
    np.testing.assert_allclose(balance.load_NLE[0], 2 * load_LE, rtol=1e-7)


def test_a_load_without_its_bias_is_refused_by_name(tmp_path):
    with (
        MetricsLog(tmp_path, start_step=0) as log,
        pytest.raises(ValueError, match="load_LE is given alone"),
    ):
        log.log(1, {}, load_LE=np.ones((1, 2)))


def test_tensorboard_gets_every_curve_and_forgets_what_is_repeated(tmp_path):
    with MetricsLog(tmp_path, start_step=0) as log:
        lent_PP = np.eye(2, dtype=int)
        log.log(5, {"loss": 2.5, "max_vio_L": [0.25, 0.75], "lent_PP": lent_PP})
        (event,) = [event for event in _events(tmp_path) if event.summary.value]
    got = {value.tag: value.simple_value for value in event.summary.value}
    assert event.step == 5
    assert got == {"metrics/loss": 2.5, "max_vio_L/00": 0.25, "max_vio_L/01": 0.75}
    MetricsLog(tmp_path, start_step=4).close()
    restarts = [e.step for e in _events(tmp_path) if e.session_log.status]
    assert restarts == [1, 5]


def test_a_full_disk_ends_no_run_and_what_was_measured_comes_later(tmp_path, caplog):
    even = np.full((2, 4), 0.25)
    with (
        full.Disk(tmp_path, room=600) as disk,
        MetricsLog(tmp_path, start_step=0) as log,
    ):
        for step in range(1, 10):
            log.log(step, {"loss": 1.0}, load_LE=even, bias_LE=even)
        log.sync()
        disk.room = 10**5
        log.log(10, {"loss": 1.0}, load_LE=even, bias_LE=even)
    assert [row["step"] for row in _lines(tmp_path / "metrics.jsonl")] == [
        *range(1, 11)
    ]
    balance = run_files.read_run(tmp_path).balance
    assert balance is not None and balance.step_N[-1] == 10
    np.testing.assert_array_equal(balance.load_NLE, 1)
    for name in ("metrics.jsonl", "balance.npy"):
        assert caplog.text.count(f"{name} can't be written") == 1
        assert caplog.text.count(f"{name} can be written again") == 1


def test_events_go_on_in_another_file_after_one_that_could_not_be_written(
    tmp_path, caplog
):
    with (
        full.Disk(tmp_path / "tensorboard", room=10**5) as disk,
        MetricsLog(tmp_path, start_step=0) as log,
    ):
        log.log(1, {"loss": 1.0})
        disk.room = 7
        log.log(2, {"loss": 1.0})
        log.log(3, {"loss": 1.0})
        disk.room = 10**5
        log.log(4, {"loss": 1.0})
    assert caplog.text.count("tensorboard can't be written") == 1
    assert caplog.text.count("tensorboard can be written again") == 1
    newest = max((tmp_path / "tensorboard").iterdir(), key=lambda path: path.name)
    assert newest.name.endswith(".3")
    assert [row["step"] for row in _lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
