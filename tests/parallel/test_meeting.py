"""Processes meet, all of them, or each learns why not."""

import socket
import threading
import time

import pytest

from jmoe.parallel import meeting
from tests.several_processes import free_address, in_parallel


@pytest.fixture
def address() -> str:
    return free_address()


@pytest.fixture
def groups(address):
    """Three processes that have met."""
    met = in_parallel(meeting.meet, *((address, 3, index, 20.0) for index in (2, 0, 1)))
    yield sorted(met, key=lambda group: group.index)
    for group in met:
        group.close()


def test_all_that_meet_get_everybodys_values_in_order(groups):
    for turn in ("first", "second"):
        values = [(group, turn, {"index": group.index}) for group in reversed(groups)]
        got = in_parallel(meeting.Group.exchange, *values)
        assert got == [[{"index": 0}, {"index": 1}, {"index": 2}]] * 3


def test_a_lone_process_exchanges_with_itself():
    assert meeting.Group().exchange("anything", 5) == [5]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_reaches_the_others_where_they_next_exchange(groups, failing):
    failed = groups.pop(failing)
    failed.fail("the disk is full")
    got = in_parallel(meeting.Group.exchange, *((group, "x", 1) for group in groups))
    assert [type(error) for error in got] == [meeting.ElsewhereError] * 2
    assert {str(error) for error in got} == {f"process {failing}: the disk is full"}


@pytest.mark.parametrize("ended", [0, 1])
def test_a_process_that_ends_is_named_to_those_that_wait_for_it(groups, ended):
    groups.pop(ended).close()
    got = in_parallel(
        meeting.Group.exchange, *((group, "step 3", 1) for group in groups)
    )
    assert [type(error) for error in got] == [ConnectionError] * 2
    for error in got:
        assert (
            str(error) == f"process {ended} has ended, and is waited for at 'step 3'."
        )


def test_those_that_come_learn_who_did_not(address):
    start = time.monotonic()
    got = in_parallel(meeting.meet, *((address, 6, index, 1.0) for index in (0, 2, 5)))
    assert time.monotonic() - start < 5
    assert [type(error) for error in got] == [TimeoutError] * 3
    expected = "Of 6 processes, number 1, 3-4 didn't come within 1 s."
    assert [str(error) for error in got] == [expected] * 3


def test_without_process_0_the_others_name_it(address):
    got = in_parallel(meeting.meet, *((address, 3, index, 0.5) for index in (1, 2)))
    for error in got:
        assert isinstance(error, TimeoutError)
        assert "Of 3 processes, number 0 didn't come within 0.5 s." in str(error)
        assert address in str(error)


def test_one_that_came_and_died_is_missing_and_may_come_again(address):
    def die_then_meet(index: int) -> meeting.Group:
        if index == 1:
            time.sleep(0.3)  # process 0 listens
            line = meeting._connect(address, time.monotonic() + 5)
            line.send([meeting._GREETING, 1, 3])
            line.close()
            time.sleep(0.3)
        if index == 2:
            time.sleep(1.0)
        return meeting.meet(address, 3, index, 20.0)

    groups = in_parallel(die_then_meet, (0,), (1,), (2,))
    got = in_parallel(meeting.Group.exchange, *((g, "x", g.index) for g in groups))
    assert got == [[0, 1, 2]] * 3
    for group in groups:
        group.close()


def test_different_numbers_of_processes_are_told_to_all(address, monkeypatch):
    monkeypatch.setattr(meeting, "_LATE_S", 0.5)
    calls = ((address, count, index, 5.0) for count, index in ((3, 0), (3, 1), (4, 2)))
    got = in_parallel(meeting.meet, *calls)
    assert [type(error) for error in got] == [ValueError] * 3
    (text,) = {str(error) for error in got}
    assert text == "num_processes=3 on process 0, but 4 on process 2."


def test_two_processes_of_one_index_are_refused_on_all(address, monkeypatch):
    monkeypatch.setattr(meeting, "_LATE_S", 0.5)
    calls = ((address, 4, index, 5.0) for index in (0, 2, 2))
    got = in_parallel(meeting.meet, *calls)
    assert [type(error) for error in got] == [ValueError] * 3
    assert {str(error) for error in got} == {"Two processes have process_id=2."}


def test_strangers_are_passed_over(address):
    def knock(index: int):
        if index >= 0:
            return meeting.meet(address, 2, index, 20.0)
        time.sleep(0.2)
        for message in (b"GET / HTTP/1.1\r\n\r\n", b"[1, 2]\n", b"", b"\xff\n"):
            with socket.create_connection(meeting.split_address(address)) as stranger:
                stranger.sendall(message)
        return None

    late = threading.Timer(0.6, lambda: None)
    late.start()
    zero, one, _ = in_parallel(knock, (0,), (1,), (-1,))
    assert (zero.index, one.index) == (0, 1)
    zero.close()
    one.close()


def test_an_address_where_something_else_listens_is_named(address):
    host, port = meeting.split_address(address)
    with socket.create_server((host, port)) as server:

        def answer():
            connection, _ = server.accept()
            connection.sendall(b"220 smtp.example.org ESMTP\r\n")
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ValueError, match="something else than process 0 listens"):
            meeting.meet(address, 2, 1, 5.0)
        thread.join()
        with pytest.raises(OSError, match="process 0 can't listen there"):
            meeting.meet(address, 2, 0, 5.0)


@pytest.mark.parametrize("address", ["localhost", ":80", "host:", "host:0", "h:70000"])
def test_an_address_is_a_host_and_a_port(address):
    with pytest.raises(ValueError, match=f"coordinator='{address}' must read host:"):
        meeting.split_address(address)


def test_addresses_of_either_kind_are_understood():
    assert meeting.split_address("[::1]:80") == ("::1", 80)
    assert meeting.split_address("node-7.cluster:4321") == ("node-7.cluster", 4321)
