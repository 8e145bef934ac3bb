"""An engine's thread and its clients, with an engine that is told what to do."""

import asyncio
import threading
import time
from typing import Any

import pytest

from jmoe.decode.requests import Sampling
from jmoe.monitor.serving import ServingMeter
from jmoe.serve import worker as workers
from jmoe.serve.answers import Refused
from jmoe.serve.worker import Worker
from tests.serve.counting import QUEUE, SLOTS, Counting
from tests.serve.running import wait_until

LONG = 10**6


@pytest.fixture
def engine():
    return Counting()


@pytest.fixture
def worker(engine):
    worker = Worker(engine, ServingMeter("counting", 1, 1))
    yield worker
    engine.may_step.set()
    worker.close()


def request(new: int) -> Any:
    return [1], Sampling(max_new_tokens=new)


async def taken(worker: Worker, *new: int, **named: Any) -> dict[int, list[int]]:
    """What each of these requests got."""
    found: dict[int, list[int]] = {i: [] for i in range(len(new))}
    with worker.submit([request(n) for n in new], 60, **named) as ticket:
        async for increments in ticket:
            for increment in increments:
                found[increment.number] += increment.tokens
    return found


@pytest.mark.parametrize("is_streamed", [False, True])
def test_each_request_of_a_ticket_gets_its_tokens_once_and_in_order(
    worker, is_streamed
):
    got = asyncio.run(taken(worker, 3, 50, 1, is_streamed=is_streamed))
    assert got == {0: list(range(3)), 1: list(range(50)), 2: [0]}


def test_event_loops_in_several_threads_share_an_engine(worker):
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(asyncio.run(taken(worker, 20))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [{0: list(range(20))}] * 3


def test_the_thread_sleeps_while_there_is_nothing_to_do(engine, worker):
    asyncio.run(taken(worker, 5))
    wait_until(lambda: worker._thread.is_alive() and not engine.asked)
    worker.between_steps(lambda engine: None).result()
    time.sleep(0.05)
    before = engine.looks
    time.sleep(0.2)
    assert engine.looks == before and engine.steps == 5


def test_clients_that_ask_again_are_waited_for(engine, worker, monkeypatch):
    """Two whose answers end in one step share the next one too."""
    monkeypatch.setattr(workers, "AGAIN_SHARE", 1e9)
    monkeypatch.setattr(workers, "AGAIN_SECONDS", 5.0)

    async def ask_on(delay: float):
        for _ in range(5):
            await asyncio.sleep(delay)
            await taken(worker, 3)

    async def main():
        engine.may_step.clear()
        both = asyncio.gather(ask_on(0.0), ask_on(0.02))
        await asyncio.to_thread(wait_until, lambda: worker._count == 2)
        engine.may_step.set()
        await both

    asyncio.run(main())
    assert engine.submitted == 10 and engine.steps <= 5 * 3 + 1


def test_clients_that_do_not_are_waited_for_a_moment_only(engine, worker, monkeypatch):
    engine.pause = 0.01
    monkeypatch.setattr(workers, "AGAIN_SHARE", 20.0)
    monkeypatch.setattr(workers, "AGAIN_SECONDS", 0.2)

    async def main():
        with worker.submit([request(LONG)], 60):
            began = time.monotonic()
            await taken(worker, 2)
            before = engine.steps
            await asyncio.to_thread(wait_until, lambda: engine.steps >= before + 5)
            assert 0.2 < time.monotonic() - began < 5.0

    asyncio.run(main())


def test_more_requests_than_there_is_room_for_are_refused_until_some_end(
    engine, worker
):
    async def main():
        with worker.submit([request(LONG)] * QUEUE, 60) as ticket:
            with pytest.raises(Refused) as refused:
                worker.submit([request(1)], 60)
        assert refused.value.status == 429
        ((name, seconds),) = refused.value.headers
        assert name == "retry-after" and 1 <= int(seconds) <= 60
        del ticket
        await asyncio.to_thread(wait_until, lambda: not worker._count)
        assert await taken(worker, 2) == {0: [0, 1]}

    asyncio.run(main())


def test_fewer_requests_are_admitted_while_fewer_should_wait(engine, worker):
    async def main():
        engine.most_waiting = 1
        with worker.submit([request(LONG)] * (SLOTS + 1), 60):
            with pytest.raises(Refused) as refused:
                worker.submit([request(1)], 60)
            assert refused.value.status == 429
            engine.most_waiting = QUEUE
            with worker.submit([request(1)], 60):
                pass

    asyncio.run(main())


def test_how_long_to_wait_follows_from_how_long_requests_took(worker):
    worker._count, worker._busy = QUEUE, 100.0
    worker._ends.extend([80.0, 90.0])  # 2 in 20 seconds of steps; 3 wait
    assert worker._full().headers == (("retry-after", "30"),)


def test_more_requests_in_one_ticket_than_may_ever_be_there_are_a_mistake(worker):
    async def main():
        worker.submit([request(1)] * (QUEUE + 1), 60)

    with pytest.raises(ValueError, match=f"6 completions at once; at most {QUEUE}"):
        asyncio.run(main())


def test_who_leaves_frees_its_places_whether_its_requests_had_begun_or_not(
    engine, worker
):
    async def main():
        for streamed in (True, False):
            with worker.submit([request(LONG)] * 4, 60, streamed) as ticket:
                if streamed:
                    await anext(aiter(ticket))
            await asyncio.to_thread(wait_until, lambda: not engine.asked)
        await asyncio.to_thread(wait_until, lambda: not worker._count)
        assert not worker._places and not worker._news

    asyncio.run(main())


def test_a_late_answer_is_refused_at_its_deadline_and_its_place_is_free(engine, worker):
    async def main(seconds):
        with worker.submit([request(LONG)], seconds) as ticket:
            async for _ in ticket:
                pass

    engine.may_step.clear()  # not even an engine that hangs keeps a client waiting
    with pytest.raises(Refused) as refused:
        asyncio.run(main(0.05))
    assert refused.value.status == 504
    engine.may_step.set()
    wait_until(lambda: not engine.asked)


def test_a_client_that_takes_nothing_holds_bounded_memory_and_no_place(
    engine, worker, monkeypatch
):
    monkeypatch.setattr(workers, "MOST_HELD", 50)

    async def main():
        with worker.submit([request(LONG)], 60, is_streamed=True) as ticket:
            while engine.asked or not engine.steps:
                assert ticket._held <= 10_000
                await asyncio.sleep(0.01)
            with pytest.raises(Refused) as refused:
                async for _ in ticket:
                    pass
            assert refused.value.message == workers.SLOW.message and not ticket._got

    asyncio.run(main())


def test_tokens_that_come_behind_a_refusal_are_let_go_of():
    async def main():
        ticket = workers.Ticket(lambda _: None, 1, 60, is_streamed=True)
        ticket.refuse(workers.LATE)
        ticket.put([workers.Increment(0, [1], [0.0], [], None)])
        with ticket:
            assert not ticket._got

    asyncio.run(main())


def test_a_failed_engine_refuses_those_that_are_there_and_all_that_come(
    engine, worker, caplog
):
    async def main():
        engine.may_step.clear()
        waiting = asyncio.create_task(taken(worker, 5))
        await asyncio.sleep(0)
        engine.failure = RuntimeError("a device is gone")
        engine.may_step.set()
        with pytest.raises(Refused) as refused:
            await waiting
        assert refused.value.status == 503
        with pytest.raises(Refused) as refused:
            worker.submit([request(1)], 60)
        assert refused.value.status == 503 and "device" not in refused.value.message

    assert worker.is_well
    asyncio.run(main())
    assert not worker.is_well and "a device is gone" in caplog.text
    assert worker.between_steps(lambda engine: 1).cancelled()


def test_a_step_that_hangs_makes_it_unwell(engine, worker, monkeypatch):
    monkeypatch.setattr(workers, "HANGING_SECONDS", 0.0)

    async def main():
        engine.may_step.clear()
        with worker.submit([request(1)], 60):
            await asyncio.to_thread(wait_until, lambda: not worker.is_well)
            engine.may_step.set()

    asyncio.run(main())
    wait_until(lambda: worker.is_well)


def test_what_is_called_between_steps_sees_none_and_its_mistake_is_its_own(
    engine, worker
):
    def fails(engine):
        raise LookupError("no such expert")

    async def main():
        with worker.submit([request(LONG)], 60):
            first = worker.between_steps(lambda engine: engine.steps)
            second = worker.between_steps(fails)
            assert await asyncio.wrap_future(first) >= 0
            with pytest.raises(LookupError, match="no such expert"):
                await asyncio.wrap_future(second)
        assert await taken(worker, 2) == {0: [0, 1]}

    asyncio.run(main())


def test_closing_refuses_who_still_waits(engine, worker):
    async def main():
        waiting = asyncio.create_task(taken(worker, LONG))
        await asyncio.to_thread(wait_until, lambda: engine.steps)
        await asyncio.to_thread(worker.close)
        with pytest.raises(Refused) as refused:
            await waiting
        assert refused.value.message == workers.STOPPED.message

    asyncio.run(main())


def test_who_was_answered_finds_its_place_free(worker):
    async def main():
        for _ in range(50):
            await taken(worker, *[1] * QUEUE)

    asyncio.run(main())


def test_requests_are_metered(engine, worker):
    asyncio.run(taken(worker, 3, 4))
    totals = worker._meter.totals()
    assert totals.requests == 2 and totals.ended == {"length": 2}
    assert totals.answered_tokens == 7
