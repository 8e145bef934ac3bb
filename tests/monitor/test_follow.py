import json
import math
import socket

import numpy as np
import pytest

from jmoe.config import MonitorConfig, to_dict
from jmoe.monitor import run_files, server
from jmoe.monitor.follow import RunFollower, VllmFollower
from jmoe.monitor.metrics_log import MetricsLog
from jmoe.monitor.vllm import VllmMeter
from tests.monitor.test_vllm import page
from tests.monitor.watched import figure, lines
from tests.plain_run import plain_run

LOAD_LE = np.array([[0.4, 0.1, 0.3, 0.2]])


@pytest.fixture
def workdir(tmp_path):
    record = json.dumps(to_dict(plain_run()))
    (tmp_path / run_files.CONFIG).write_text(record)
    return tmp_path


def log(workdir, *steps, start_step=0, **metrics):
    with MetricsLog(workdir, start_step=start_step) as metrics_log:
        for step in steps:
            row = {"loss": 3 - step / 100, "max_vio_L": np.ones(1), **metrics}
            metrics_log.log(step, row, load_LE=LOAD_LE, bias_LE=0 * LOAD_LE)


def test_a_run_is_followed_by_what_it_logs(workdir):
    follower = RunFollower(workdir)
    assert follower.snapshot().status == "compiling"
    log(workdir, 10, 20)
    follower.look()
    snapshot = follower.snapshot()
    assert snapshot.model == "tiny" and snapshot.status.startswith("step 20 of 600")
    assert lines(snapshot, "Loss")["training"] == pytest.approx([2.9, 2.8])
    np.testing.assert_allclose(snapshot.load_LE, LOAD_LE * 4, rtol=1e-6)
    assert b"jmoe_train_step 20.0" in follower.prometheus()


def test_a_row_that_is_being_written_waits_for_its_end(workdir):
    log(workdir, 10)
    follower = RunFollower(workdir)
    row = json.dumps({"step": 20, "time": 1.5e9, "loss": 1.5})
    for part, step in ((row[:9], 10), (row[9:], 10), ("\n", 20)):
        with (workdir / run_files.METRICS).open("a") as file:
            file.write(part)
        follower.look()
        assert f"step {step} of" in follower.snapshot().status
    assert follower.snapshot().time == 1.5e9


def test_a_run_that_goes_on_from_a_checkpoint_has_one_line(workdir):
    log(workdir, 10, 20, 30, 40)
    follower = RunFollower(workdir)
    log(workdir, 30, start_step=20, loss=1.0)
    follower.look()
    assert lines(follower.snapshot(), "Loss")["training"][-1] == 1.0
    assert len(lines(follower.snapshot(), "Loss")["training"]) == 3


def test_a_loss_that_is_not_finite_is_followed_too(workdir):
    log(workdir, 10, loss=math.nan)
    assert '"value":"NaN"' in RunFollower(workdir).snapshot().to_json()


def test_a_finished_run_is_complete(workdir):
    log(workdir, 600)
    assert "complete" in RunFollower(workdir).snapshot().status


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no run: it has no config.json"):
        RunFollower(tmp_path)


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize("ending", ["", "v1", "metrics"])
def test_vllm_is_followed_by_its_metrics(port, ending):
    vllm = VllmMeter()
    vllm.add(page(new=10, running=3))
    with server.opened(MonitorConfig(port=port), vllm) as address:
        follower = VllmFollower(address + ending)
        vllm.add(page(new=20, running=5))
        follower.look()
    snapshot = follower.snapshot()
    assert snapshot.status == "5 running, 0 waiting"
    assert figure(snapshot, "tokens per second")[1] == "20 since the start"
    with pytest.raises(
        ValueError, match=f"endpoint='http://127.0.0.1:{port}/.*refused"
    ):
        follower.look()
    assert follower.snapshot().status == "5 running, 0 waiting"


@pytest.mark.parametrize("endpoint", ["", "127.0.0.1:8000", "file:///etc/passwd"])
def test_what_is_no_address_of_a_server_is_refused(endpoint):
    with pytest.raises(ValueError, match="must begin with http"):
        VllmFollower(endpoint)
