"""Processes make what one makes, go on where another was killed, and end with it."""

import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from jmoe.config import to_dict
from jmoe.data import corpus, parts, readers, text, workers

# Tokenises a source by two processes, whose ids it prints, and hangs before the end.
PROGRAM = """
import json, pathlib, subprocess, sys, time
from jmoe.config import DataConfig, from_dict
from jmoe.config import to_dict
from jmoe.data import corpus, readers, text, workers
from jmoe.data.progress import Progress
from jmoe.data.tokenizer import Tokenizer

class Popen(subprocess.Popen):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        print(self.pid, flush=True)

subprocess.Popen = Popen
readers.PIECE_BYTES, workers._count_cores = 2000, lambda: 2
Progress.finish = lambda *_: time.sleep(600)
config, tokenizer, cache = sys.argv[1:]
(source,) = text.open_sources(from_dict(DataConfig, json.loads(config)))
corpus.tokenize(source, Tokenizer.from_file(tokenizer), pathlib.Path(cache))
"""


@pytest.fixture
def source(write_source, data_config, monkeypatch):
    """Returns a source of several pieces."""
    monkeypatch.setattr(readers, "PIECE_BYTES", 2000)
    (found,) = text.open_sources(data_config(write_source("fish", 600)))
    assert 10 < len(found.pieces()) < 30
    return found


@pytest.fixture
def cores(monkeypatch):
    def set_to(count):
        monkeypatch.setattr(workers, "_count_cores", lambda: count)

    return set_to


def test_the_result_is_that_of_one_process_and_of_one_piece(
    source, cores, tokenizer, tmp_path, monkeypatch
):
    found = []
    for count, size in ((2, 2000), (1, 2000), (1, 10**9)):
        cores(count)
        monkeypatch.setattr(readers, "PIECE_BYTES", size)
        cache = tmp_path / f"{count} {size}"
        found.append(corpus.tokenize(source, tokenizer, cache))
    for other in found[1:]:
        assert all(map(np.array_equal, found[0], other))


def test_a_process_that_is_killed_is_told_of_and_what_is_finished_stays(
    source, cores, tokenizer, tmp_path, monkeypatch
):
    started = []
    tell = workers._Worker._tell
    monkeypatch.setattr(
        workers._Worker, "_tell", lambda self, x: started.append(self) or tell(self, x)
    )

    reports = []

    def kill(*_):
        reports.append(tmp_path)
        if len(reports) == 6:
            started[0]._process.kill()

    cores(2)
    made = parts.Parts(tmp_path, tokenizer, "text", "refuse")
    tasks = list(enumerate(source.pieces()))
    with pytest.raises(ChildProcessError, match="fish.txt: the process .* code -9"):
        list(workers.make_parts(made, tasks, kill))
    assert any(made.report(number) for number, _ in tasks)
    assert all(worker._process.poll() is not None for worker in started)


def test_a_mistake_of_a_process_is_that_of_the_first_piece(
    source, cores, tokenizer, tmp_path
):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "' + "good" * 1000 + '"}\nbad\n{"text": 3}\n')
    pieces = readers.pieces(path)
    cores(2)
    made = parts.Parts(tmp_path, tokenizer, "text", "refuse")
    with pytest.raises(ValueError, match="bad.jsonl: byte offset 4013: not JSON"):
        list(workers.make_parts(made, list(enumerate(pieces)), lambda *_: None))
    (tmp_path / "none").mkdir()
    made = parts.Parts(tmp_path / "none" / "below", tokenizer, "text", "skip")
    with pytest.raises(FileNotFoundError, match="none/below/000000.token"):
        list(workers.make_parts(made, list(enumerate(pieces)), lambda *_: None))


def is_running(pid: int) -> bool:
    try:
        return bool(pathlib.Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def wait_until(condition, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_after_a_kill_finished_pieces_are_kept_and_no_process_is_left(
    source, cores, tokenizer, data_config, tmp_path, monkeypatch
):
    tokenizer.save(tmp_path / "tokenizer.json")
    config = json.dumps(to_dict(data_config(tmp_path / "fish.txt")))
    arguments = [config, tmp_path / "tokenizer.json", tmp_path / "cache"]
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    count, reports = len(source.pieces()), "cache/corpora/*.partial/*.json"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        try:
            pids = [int(program.stdout.readline()) for _ in range(2)]
            wait_until(lambda: len(list(tmp_path.glob(reports))) == count)
        finally:
            program.kill()
    wait_until(lambda: not any(map(is_running, pids)))

    for path in sorted(tmp_path.glob(reports))[3:6]:
        path.unlink()  # as if these had been under way
    made, make = [], parts.Parts.make
    monkeypatch.setattr(
        parts.Parts,
        "make",
        lambda self, number, *rest: made.append(number) or make(self, number, *rest),
    )
    cores(1)
    again = corpus.tokenize(source, tokenizer, tmp_path / "cache")
    assert made == [3, 4, 5]
    assert os.listdir(tmp_path / "cache" / "corpora") == [again.key]
    whole = corpus.tokenize(source, tokenizer, tmp_path / "other")
    assert all(map(np.array_equal, again[1:], whole[1:]))
