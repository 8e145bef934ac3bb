"""SIGTERM and Ctrl-C: heard at once, whatever the main thread is doing."""

import os
import select
import signal
import subprocess
import sys
import threading
import time

import pytest

from jmoe.train.stop_signals import StopSignals

# Waits where Python can't run a handler, as in a compilation; dies by itself if nothing
# ends it.
BUSY = """
import ctypes, signal, sys
from jmoe.train.stop_signals import StopSignals

with StopSignals(lambda text: print(text, flush=True)):
    print("ready", flush=True)
    left = 60
    while left:
        left = ctypes.CDLL(None).sleep(left)
"""


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name
)
def test_the_first_is_acknowledged_at_once_and_the_second_ends_the_process(number):
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        said = process.stdout.readline()
        assert said.startswith(f"{number.name}: stopping after this step")
        time.sleep(0.1)  # a finger's
        process.send_signal(number)
        _, err = process.communicate(timeout=10)
    assert process.returncode == 128 + number
    assert err.strip() == f"{number.name}: ended without saving."


def test_one_signal_that_is_sent_twice_is_one():
    """It is as `timeout` sends it. (If it counted twice, it would end this process.)"""
    said = []
    with StopSignals(said.append) as signals:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert signals.first == signal.SIGTERM
    assert len(said) == 1


def test_afterwards_signals_act_as_before():
    before = signal.getsignal(signal.SIGINT)
    with StopSignals(print) as signals:
        assert signal.getsignal(signal.SIGINT) != before
        signals.close()
        assert signal.getsignal(signal.SIGINT) == before
        assert signal.set_wakeup_fd(-1) == -1


def test_who_listened_before_hears_of_other_signals():
    """A notebook's event loop, for one, which wakes up by the same means."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    listened = signal.set_wakeup_fd(writing)
    before = signal.signal(signal.SIGUSR1, lambda number, _: None)
    try:
        with StopSignals(print) as signals:
            signal.raise_signal(signal.SIGUSR1)
        assert signals.first == 0
        assert select.select([reading], [], [], 0)[0]
        assert os.read(reading, 9) == bytes([signal.SIGUSR1])
    finally:
        signal.signal(signal.SIGUSR1, before)
        signal.set_wakeup_fd(listened)
        os.close(reading)
        os.close(writing)


def test_outside_the_main_thread_there_are_none():
    before = signal.getsignal(signal.SIGINT)

    def enter():
        with StopSignals(print) as signals:
            assert signals.first == 0 and signal.getsignal(signal.SIGINT) == before

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
