"""Processes meet, all of them, or each learns why not."""

import os
import queue
import socket
import threading
import time

import pytest

from jmoe.parallel import listener, process_group, rendezvous
from tests.several_processes import SECRET, free_address, in_parallel

HERE = f"{socket.gethostname()}, pid {os.getpid()}"


def meet(
    address: str, count: int, index: int, timeout_s: float
) -> process_group.ProcessGroup:
    return rendezvous.join(address, count, index, timeout_s, SECRET)


def die(group: process_group.ProcessGroup) -> None:
    """Ends it as the system does a process that is killed: its connections close."""
    group._leaves = True  # it can't say anything more
    for channel in group._channels:
        channel.close()


@pytest.fixture
def address() -> str:
    return free_address()


@pytest.fixture
def groups(address):
    """Three processes that have met."""
    met = in_parallel(meet, *((address, 3, index, 20.0) for index in (2, 0, 1)))
    yield sorted(met, key=lambda group: group.index)
    for group in met:
        group.close()


def test_all_that_meet_get_everybodys_values_in_order(groups):
    for turn in ("first", "second"):
        values = [(group, turn, {"index": group.index}) for group in reversed(groups)]
        got = in_parallel(process_group.ProcessGroup.exchange, *values)
        assert got == [[{"index": 0}, {"index": 1}, {"index": 2}]] * 3


def test_a_lone_process_exchanges_with_itself():
    assert process_group.ProcessGroup().exchange("anything", 5) == [5]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_reaches_the_others_where_they_next_exchange(groups, failing):
    failed = groups.pop(failing)
    failed.fail("the disk is full")
    got = in_parallel(
        process_group.ProcessGroup.exchange, *((group, "x", 1) for group in groups)
    )
    assert [type(error) for error in got] == [process_group.RemoteError] * 2
    assert {str(error) for error in got} == {f"process {failing}: the disk is full"}


def test_a_failure_does_not_overtake_the_values_before_it(groups, monkeypatch):
    slow = groups[0]._channels[1]
    send = slow.send

    def send_late(message):
        time.sleep(0.3 if "values" in message else 0)
        send(message)

    def work(group):
        values = group.exchange("x", group.index)
        if group.index == 1:
            group.fail("the disk is full")
        return values

    monkeypatch.setattr(slow, "send", send_late)
    assert in_parallel(work, *((group,) for group in groups)) == [[0, 1, 2]] * 3


@pytest.mark.parametrize("ended", [0, 1])
def test_a_process_that_ends_is_named_to_those_that_wait_for_it(groups, ended):
    die(groups.pop(ended))
    got = in_parallel(
        process_group.ProcessGroup.exchange, *((group, "step 3", 1) for group in groups)
    )
    assert [type(error) for error in got] == [ConnectionError] * 2
    for error in got:
        assert str(error).startswith(f"process {ended} ({HERE}) is missing: ")


@pytest.mark.parametrize("ended", [0, 1])
def test_a_watch_learns_of_a_process_that_ends_whatever_the_others_do(groups, ended):
    failures = queue.SimpleQueue()
    die(groups.pop(ended))
    for group in groups:
        group.watch(failures.put)
    for failure in (failures.get(timeout=20), failures.get(timeout=20)):
        assert failure.is_missing and f"process {ended} ({HERE})" in failure.reason


def test_processes_that_leave_are_not_missing(groups):
    failures = []
    for group in groups:
        group.watch(failures.append)
    for group in groups:
        group.close()
    assert [group.await_failure(0.2) for group in groups] == [None] * 3
    assert failures == []


def test_a_host_that_is_gone_is_noticed_within_half_a_minute(groups):
    if not hasattr(socket, "TCP_USER_TIMEOUT"):
        pytest.skip("Only Linux has all of these options.")
    connection = groups[1]._channels[0].connection
    idle, between, times, unanswered = (
        connection.getsockopt(socket.IPPROTO_TCP, option)
        for option in (
            socket.TCP_KEEPIDLE,
            socket.TCP_KEEPINTVL,
            socket.TCP_KEEPCNT,
            socket.TCP_USER_TIMEOUT,
        )
    )
    assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) != 0
    assert idle + between * times <= 30 and unanswered <= 30_000


def test_those_that_come_learn_who_did_not(address):
    start = time.monotonic()
    got = in_parallel(meet, *((address, 6, index, 1.0) for index in (0, 2, 5)))
    assert time.monotonic() - start < 5
    assert [type(error) for error in got] == [TimeoutError] * 3
    expected = "Of 6 processes, number 1, 3-4 didn't come within 1 s."
    assert [str(error) for error in got] == [expected] * 3


def test_without_process_0_the_others_name_it(address):
    got = in_parallel(meet, *((address, 3, index, 0.5) for index in (1, 2)))
    for error in got:
        assert isinstance(error, TimeoutError)
        assert "Of 3 processes, number 0 didn't come within 0.5 s." in str(error)
        assert address in str(error)


def test_one_that_came_and_died_is_missing_and_may_come_again(address):
    def die_then_meet(index: int) -> process_group.ProcessGroup:
        if index == 1:
            time.sleep(0.3)  # process 0 listens
            hello = rendezvous._hello(1, 3)
            rendezvous._reach(address, SECRET, hello, time.monotonic() + 5).close()
            time.sleep(0.3)
        if index == 2:
            time.sleep(1.0)
        return meet(address, 3, index, 20.0)

    groups = in_parallel(die_then_meet, (0,), (1,), (2,))
    got = in_parallel(
        process_group.ProcessGroup.exchange, *((g, "x", g.index) for g in groups)
    )
    assert got == [[0, 1, 2]] * 3
    for group in groups:
        group.close()


def test_different_numbers_of_processes_are_told_to_all(address, monkeypatch):
    monkeypatch.setattr(rendezvous, "_LATE_S", 0.5)
    calls = ((address, count, index, 5.0) for count, index in ((3, 0), (3, 1), (4, 2)))
    got = in_parallel(meet, *calls)
    assert [type(error) for error in got] == [ValueError] * 3
    (text,) = {str(error) for error in got}
    assert text == "num_processes=3 on process 0, but 4 on process 2."


def test_two_processes_of_one_index_are_refused_on_all(address, monkeypatch):
    monkeypatch.setattr(rendezvous, "_LATE_S", 0.5)
    calls = ((address, 4, index, 5.0) for index in (0, 2, 2))
    got = in_parallel(meet, *calls)
    assert [type(error) for error in got] == [ValueError] * 3
    assert {str(error) for error in got} == {"Two processes have process_id=2."}


def test_an_address_where_something_else_listens_is_named(address):
    host, port = listener.split_address(address)
    with socket.create_server((host, port)) as server:

        def answer():
            connection, _ = server.accept()
            connection.sendall(b"220 smtp.example.org ESMTP\r\n")
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ValueError, match="something else than process 0 listens"):
            meet(address, 2, 1, 5.0)
        thread.join()
        with pytest.raises(OSError, match="process 0 can't listen there"):
            meet(address, 2, 0, 5.0)


def test_one_that_comes_after_all_have_met_is_told_so(address, groups):
    with pytest.raises(ValueError, match=f"The 3 processes at {address} have met"):
        meet(address, 3, 1, 5.0)


def test_another_secret_is_named_on_either_side(address):
    calls = ((address, 2, 0, 1.5, b"mine"), (address, 2, 1, 1.5, b"yours"))
    zero, one = in_parallel(rendezvous.join, *calls)
    assert isinstance(zero, TimeoutError) and isinstance(one, ValueError)
    assert "secret came from 127.0.0.1" in str(zero)
    assert "it has another secret (JMOE_SECRET, " in str(one)


def test_what_process_0_sends_keeps_its_order_and_waits_for_nobody(groups):
    for value in range(3):
        groups[0].send("steps", value)
    for group in groups[1:]:
        assert [group.receive("steps") for _ in range(3)] == [0, 1, 2]


def test_nothing_is_sent_once_a_process_has_failed(groups):
    groups[1].fail("out of memory")
    for group in (groups[0], groups[2]):
        assert group.await_failure(20.0) is not None
    with pytest.raises(process_group.RemoteError, match="process 1: out of memory"):
        groups[0].send("steps", 0)
    with pytest.raises(process_group.RemoteError, match="process 1: out of memory"):
        groups[2].receive("steps")
