"""The host's loop: who takes part in a step, where requests end, what they leave."""

import collections
import dataclasses
import itertools

import jax
import numpy as np
import pytest
from scipy import stats

from jmoe.decode.engine import Engine, QueueFull
from jmoe.decode.requests import Sampling
from tests.decode import oracle
from tests.decode.test_step import DRAFTING, LIMITS, always_alike, prompt


def text_of(tokens) -> str:
    return " ".join(map(str, tokens))


@pytest.fixture
def engine(cfg, variables) -> Engine:
    return Engine(cfg, variables, LIMITS, text=text_of)


def requests(*lengths: int, new: int = 6) -> list[oracle.Request]:
    return [(prompt(length), Sampling(max_new_tokens=new)) for length in lengths]


def assert_empty(engine: Engine) -> None:
    """All slots and pages are free, and nobody waits."""
    assert engine.is_idle
    assert engine._pages[0].num_free == engine.limits.pages
    assert sorted(engine._slots[0]) == list(range(engine.limits.slots))


def finish(engine: Engine) -> None:
    while not engine.is_idle:
        oracle.step(engine)


def test_a_request_ends_at_its_last_token_and_leaves_all_it_had(engine):
    found = oracle.complete(engine, requests(5, 40, 1) + requests(3, new=1))
    assert [len(found[i].tokens) for i in range(4)] == [6, 6, 6, 1]
    assert {done.finish_reason for done in found.values()} == {"length"}
    assert_empty(engine)


def test_a_request_ends_before_its_stop_token(engine):
    whole = oracle.complete(engine, requests(5, 9))
    stop = whole[0].tokens[3]
    stopping = Sampling(max_new_tokens=6, stop_ids=(299, stop))
    found = oracle.complete(engine, [(prompt(5), stopping), *requests(9)])
    end = whole[0].tokens.index(stop)
    assert found[0].tokens == whole[0].tokens[:end]
    assert len(found[0].logprobs) == len(found[0].times) == end
    assert found[0].finish_reason == "stop"
    assert found[1].tokens == whole[1].tokens
    assert_empty(engine)


def test_a_request_that_stops_at_its_first_token_has_none(engine):
    first = oracle.complete(engine, requests(5))[0].tokens[0]
    stopping = Sampling(max_new_tokens=6, stop_ids=(first,))
    found = oracle.complete(engine, [(prompt(5), stopping)])
    assert found[0].tokens == [] and found[0].finish_reason == "stop"
    assert_empty(engine)


def test_a_request_ends_with_the_token_that_completes_a_stop_text(engine):
    whole = oracle.complete(engine, requests(5))[0].tokens
    stop = f"{whole[2]} {whole[3]}"
    stopping = Sampling(max_new_tokens=6, stop_texts=("none", stop))
    done = oracle.complete(engine, [(prompt(5), stopping)])[0]
    assert done.tokens == whole[:4] and done.finish_reason == "stop"
    assert_empty(engine)


@pytest.mark.parametrize(
    "steps", [0, 1, 2, 5], ids=["waits", "is read", "new", "later"]
)
def test_a_request_is_cancelled_at_any_time_and_others_are_unharmed(
    cfg, variables, engine, steps
):
    others = requests(5, 20, new=9)
    numbers = [engine.submit(*others[0])]
    cancelled = engine.submit(prompt(33), Sampling(max_new_tokens=10))
    numbers.append(engine.submit(*others[1]))
    for _ in range(steps):
        oracle.step(engine)
    assert engine.cancel(cancelled) and not engine.cancel(cancelled)
    found = {}
    while not engine.is_idle:
        found |= {done.number: done for done, _ in oracle.step(engine)}
    assert found[cancelled].finish_reason == "cancelled"
    assert (len(found[cancelled].tokens) > 0) == (steps > 1)
    oracle.assert_recomputed(
        cfg, variables, others, [found[number] for number in numbers]
    )
    assert_empty(engine)
    assert not engine.cancel(cancelled) and not engine.cancel(99)


def test_more_than_may_wait_are_refused_and_the_others_complete(cfg, variables):
    engine = Engine(cfg, variables, dataclasses.replace(LIMITS, queue=3))
    for request in requests(1, 2, 3):
        engine.submit(*request)
    with pytest.raises(QueueFull, match="queue=3"):
        engine.submit(*requests(4)[0])
    oracle.step(engine)
    engine.submit(*requests(4)[0])
    finish(engine)
    assert_empty(engine)


def test_a_request_that_is_cancelled_while_it_waits_makes_room_at_once(cfg, variables):
    engine = Engine(cfg, variables, dataclasses.replace(LIMITS, queue=1))
    for request in requests(1, 1, 1, 1, 5, new=9):  # the last has no slot
        number = engine.submit(*request)
        engine.step()
    with pytest.raises(QueueFull):
        engine.submit(*requests(3)[0])
    engine.cancel(number)
    engine.step()
    engine.submit(*requests(3)[0])
    finish(engine)
    assert_empty(engine)


def test_requests_get_pages_in_their_order_and_wait_for_them(cfg, variables):
    engine = Engine(cfg, variables, LIMITS)
    asked = requests(40, 33, 40, 1, 50, 48, 3, 2, new=8)
    numbers = [engine.submit(*request) for request in asked]
    began, found, fewest = [], {}, LIMITS.pages
    while not engine.is_idle:
        found |= {done.number: done for done, _ in oracle.step(engine)}
        here = [live.completion.number for live in engine._live]
        began += [number for number in here if number not in began]
        fewest = min(fewest, engine._pages[0].num_free)
    assert began == numbers
    assert fewest < 48 // LIMITS.page_size  # so one had to wait though there were slots
    oracle.assert_recomputed(cfg, variables, asked, found)
    assert_empty(engine)


def test_what_cannot_be_served_ends_with_the_reason_and_others_complete(
    cfg, variables, engine
):
    good = requests(5, 9, 3)
    bad = {
        1: ([], Sampling()),
        2: ([1, 300], Sampling(max_new_tokens=2)),
        4: (prompt(60), Sampling(max_new_tokens=5)),
    }
    every = [good[0], bad[1], bad[2], good[1], bad[4], good[2]]
    found = {done.number: done for done in engine.complete(every)}
    assert sorted(found) == list(range(6))
    for number, complaint in {1: "empty", 2: "Token 300", 4: "there are 64"}.items():
        assert found[number].finish_reason == "error"
        assert complaint in found[number].error and not found[number].tokens
    oracle.assert_recomputed(cfg, variables, good, [found[i] for i in (0, 3, 5)])
    assert_empty(engine)


def test_requests_are_taken_from_an_endless_iterator_as_there_is_room(cfg, variables):
    engine = Engine(cfg, variables, dataclasses.replace(LIMITS, queue=2))
    taken = []

    def endless():
        for number in itertools.count():
            taken.append(number)
            yield prompt(1 + number % 5), Sampling(max_new_tokens=3)

    completing = engine.complete(endless())
    some = [next(completing).number for _ in range(12)]
    assert len(set(some)) == 12
    assert len(taken) <= 12 + LIMITS.slots + 2
    completing.close()
    engine.step()
    assert_empty(engine)


def test_an_iterator_of_completions_that_is_left_frees_everything(engine):
    completing = engine.complete(requests(1, 5, 40, 9, 3, 50, 17))
    next(completing)
    assert not engine.is_idle
    completing.close()
    ended = engine.step()
    assert {done.finish_reason for done, _ in ended} == {"cancelled"}
    assert_empty(engine)
    assert [done.number for done in engine.complete(requests(5))] == [0]


def test_updates_add_up_to_the_completion_and_each_step_gives_one_token(engine):
    number = engine.submit(prompt(20), Sampling(max_new_tokens=7, logprobs=2))
    grown, seen = 0, []
    while not engine.is_idle:
        for done, new in engine.step():
            assert done.number == number and new == 1
            grown += new
            seen.append(list(done.tokens))
    assert grown == 7 and seen == [done.tokens[: i + 1] for i in range(7)]
    assert done.times == sorted(done.times) and done.times[0] > 0
    assert done.times[0] < done.times[-1]
    assert done.steps == 6 and done.accepted == []


def test_the_likeliest_tokens_are_those_of_a_whole_pass(cfg, variables, engine):
    sampling = Sampling(max_new_tokens=5, logprobs=2, temperature=1.0, seed=8)
    done = oracle.complete(engine, [(prompt(5), sampling)])[0]
    logits_TV = oracle.logits(cfg, variables, [*prompt(5), *done.tokens])
    logprob_TV = np.asarray(jax.nn.log_softmax(logits_TV))[4:9]
    assert len(done.top_logprobs) == 5
    for logprob_V, likely in zip(logprob_TV, done.top_logprobs, strict=True):
        assert list(likely) == np.argsort(-logprob_V)[:2].tolist()
        np.testing.assert_allclose(
            list(likely.values()), logprob_V[list(likely)], atol=1e-4
        )


def test_a_request_without_log_probabilities_is_told_none(engine):
    done = oracle.complete(engine, requests(5))[0]
    assert done.top_logprobs == [] and len(done.logprobs) == 6


def test_the_same_seed_draws_the_same_tokens_alone_and_among_others(engine):
    def asked(seed):
        return prompt(9), Sampling(max_new_tokens=10, temperature=1.0, seed=seed)

    alone = oracle.complete(engine, [asked(5)])[0].tokens
    among = oracle.complete(engine, [*requests(40, 1), asked(6), asked(5), asked(5)])
    assert among[3].tokens == among[4].tokens == alone
    assert among[2].tokens != alone


def test_long_prompts_stall_no_one(engine):
    number = engine.submit(prompt(1), Sampling(max_new_tokens=12))
    engine.step()
    for request in requests(40, 20):
        engine.submit(*request)
    for _ in range(3):  # as many as there are chunks of the longest
        assert number in {done.number for done, new in engine.step() if new}
    finish(engine)


def test_prompts_are_read_side_by_side_as_many_as_may_be_and_the_oldest_first(
    cfg, variables
):
    engine = Engine(cfg, variables, dataclasses.replace(LIMITS, chunks=(16,)))
    for request in requests(20, 33, 4, 17, new=4):
        engine.submit(*request)
    read, began = [], []
    while len(began) < 4:
        began += [done.number for done, _ in engine.step() if len(done.tokens) == 1]
        read.append([live.read for live in engine._live])
    assert read == [[20, 16, 0, 0], [20, 33, 4, 0], [20, 33, 4, 17]]
    assert began == [0, 1, 2, 3]
    finish(engine)
    assert_empty(engine)


TWO_DRAFTS = dataclasses.replace(DRAFTING, drafts=2)


def likelihoods(cfg, variables, tokens, ahead, temperature, top_k) -> dict:
    """Each continuation of so many tokens, and its exact probability."""
    if not ahead:
        return {(): 1.0}
    logits_V = oracle.logits(cfg, variables, tokens)[len(tokens) - 1] / temperature
    likely = np.argsort(-logits_V)[:top_k].tolist()
    share = np.exp(np.float64(logits_V[likely]))
    found = {}
    for token, p in zip(likely, share / share.sum(), strict=True):
        given = [*tokens, token], ahead - 1, temperature, top_k
        for rest, q in likelihoods(cfg, variables, *given).items():
            found[token, *rest] = p * q
    return found


@pytest.mark.parametrize("limits", [LIMITS, TWO_DRAFTS], ids=["plain", "with drafts"])
def test_texts_of_many_seeds_are_as_frequent_as_they_are_likely(cfg, variables, limits):
    drawn = {"temperature": 1.5, "top_k": 3}
    want = likelihoods(cfg, variables, [5], 3, **drawn)
    requests = [([5], Sampling(max_new_tokens=3, seed=i, **drawn)) for i in range(300)]
    done = Engine(cfg, variables, limits).complete(requests)
    count = collections.Counter(tuple(one.tokens) for one in done)
    assert count.keys() <= want.keys() and len(want) == 27
    found = [count[text] for text in want]
    assert stats.chisquare(found, 300 * np.array(list(want.values()))).pvalue > 1e-3


def test_drafts_that_are_always_right_are_all_accepted(cfg, variables):
    engine = Engine(cfg, always_alike(variables), TWO_DRAFTS)
    engine.submit(prompt(5), Sampling(max_new_tokens=12, temperature=1.0))
    news = [new for _ in range(5) for _, new in engine.step()]
    assert news == [1, 3, 3, 3, 2]
    assert_empty(engine)


def test_drafts_are_counted_by_how_far_they_are_right(cfg, variables):
    engine = Engine(cfg, always_alike(variables, mtp=0.5), TWO_DRAFTS)
    sampled = Sampling(max_new_tokens=40, temperature=1.0, seed=1)
    done = next(engine.complete([(prompt(5), sampled)]))
    first, second = done.accepted
    assert 0 < second < first < done.steps
    # The last step may find more than are asked for.
    assert 40 <= 1 + done.steps + first + second <= 42


MIXED = dataclasses.replace(LIMITS, rows=(1, 4), prompts=(1, 3))


def test_a_mixed_load_compiles_nothing_after_the_start(cfg, variables, compilations):
    told: list = []
    engine = Engine(cfg, variables, MIXED, compiled=lambda *one: told.append(one))
    assert [size for size, _ in told] == list(MIXED.sizes)
    assert all(seconds > 0 for _, seconds in told)
    run, sizes = engine.programs.run, set()

    def noted(rows, chunks):
        sizes.add((len(rows.slot_B), *chunks.token_AC.shape))
        return run(rows, chunks)

    engine.programs.run = noted
    compilations.clear()
    for request in requests(5, 16, 1, 16, new=9):
        engine.submit(*request)
        engine.step()
    engine.cancel(1)
    sampled = Sampling(
        max_new_tokens=9, temperature=1.0, top_k=3, top_p=0.9, repetition_penalty=2.0
    )
    others = [*requests(40, 3, 2, 33), (prompt(9), sampled), ([], Sampling())]
    assert len(list(engine.complete(others))) == len(others)
    for few in (requests(2), requests(2, 2)):
        assert len(list(engine.complete(few))) == len(few)
    assert sizes == set(MIXED.sizes) and len(sizes) == 6
    assert compilations == []
    jax.jit(lambda x: x + 1)(np.zeros(7919))
    assert len(compilations) == 1  # it would have been noticed


@pytest.mark.parametrize(
    ("tokens", "fields", "complaint"),
    [
        ([], {}, "must not be empty"),
        ([1, -1], {}, "Token -1 .* vocab_size=300"),
        ([300], {}, "Token 300 .* vocab_size=300"),
        (
            [1] * 60,
            {"max_new_tokens": 5},
            "60 tokens and max_new_tokens=5 make 65 .* 64",
        ),
        ([1], {"logprobs": 4}, "logprobs=4 must be at most top_logprobs=3"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_at_once(
    engine, tokens, fields, complaint
):
    sampling = Sampling(**{"max_new_tokens": 4, **fields})
    with pytest.raises(ValueError, match=complaint):
        engine.submit(tokens, sampling)
    assert_empty(engine)


def test_stop_texts_need_a_tokenizer(cfg, variables):
    engine = Engine(cfg, variables, LIMITS)
    with pytest.raises(ValueError, match="stop_texts need .* tokenizer"):
        engine.submit([1], Sampling(max_new_tokens=4, stop_texts=("x",)))
    assert_empty(engine)
