"""A step's arrays: each sequence's own, and of nobody what touches nothing."""

import numpy as np

from jmoe.decode.limits import Limits, StepSize
from jmoe.decode.live import NOWHERE, Live, PromptChunk, make_chunks, make_rows
from jmoe.decode.requests import Completion, Sampling

LIMITS = Limits(rows=(1, 3), chunks=(4,), max_length=12, page_size=4, drafts=2)
SAMPLING = Sampling(
    max_new_tokens=3,
    temperature=0.5,
    top_k=7,
    top_p=0.25,
    min_p=0.125,
    repetition_penalty=1.5,
    seed=2**32 - 1,
)


def live(**where) -> Live:
    completion = Completion(0, tokens=[8, 9])
    prompt = [1, 2, 3, 4, 5, 6]
    given = {"slot": 2, "pages": [5, 0], "read": len(prompt), "tail": [9, 70, 71]}
    return Live(prompt, SAMPLING, completion, 0.0, **{**given, **where})


def assert_nobody(arrays, i: int) -> None:
    """Slot and pages are none, so that what is written of it goes nowhere."""
    slot, table = arrays[0], arrays[-2]
    assert slot[i] == NOWHERE
    assert (table[i] == NOWHERE).all()
    assert arrays.draws.temperature[i] == 0 and arrays.draws.penalty[i] == 1


def test_a_row_has_the_last_token_and_the_drafts_at_their_position():
    rows = make_rows(LIMITS, [[], [live()]], 2)
    assert rows.token_BQ.shape == (4, 3) and rows.table_BM.shape == (4, 3)
    assert rows.token_BQ[2].tolist() == [9, 70, 71]
    assert rows.position_B.tolist() == [-1, -1, 7, -1]
    assert (rows.slot_B[2], rows.end_B[2]) == (2, 9)
    assert rows.table_BM[2].tolist() == [5, 0, NOWHERE]
    assert [float(x[2]) for x in rows.draws] == [0.5, 7, 0.25, 0.125, 1.5, 2**32 - 1]
    for nobody in (0, 1, 3):
        assert_nobody(rows, nobody)


def test_a_chunk_has_the_prompts_next_tokens_and_the_one_behind_them():
    first, last = live(read=0), live(read=0, slot=0)
    two = [PromptChunk(last, 4, 2), PromptChunk(first, 0, 3)]
    parts = [[PromptChunk(first, 0, 4)], [], two]
    chunks = make_chunks(LIMITS, parts, StepSize(1, prompts=2, chunk=4))
    assert chunks.token_AC[0].tolist() == [1, 2, 3, 4]
    assert chunks.token_AC[4, :2].tolist() == [5, 6]
    assert chunks.token_AC[5, :3].tolist() == [1, 2, 3]
    assert chunks.start_A.tolist() == [0, 0, 0, 0, 4, 0]
    assert chunks.count_A.tolist() == [4, 0, 0, 0, 2, 3]
    assert chunks.next_A[[0, 4, 5]].tolist() == [5, -1, 4]
    assert chunks.end_A[[0, 4, 5]].tolist() == [9, 9, 9]
    assert chunks.slot_A.tolist() == [2, NOWHERE, NOWHERE, NOWHERE, 0, 2]
    for nobody in (1, 2, 3):
        assert_nobody(chunks, nobody)


def test_without_chunks_there_is_no_array_of_them():
    chunks = make_chunks(LIMITS, [[], []], StepSize(1))
    assert chunks.token_AC.shape == (0, 0)
    assert all(len(x) == 0 for x in chunks.draws)


def test_arrays_have_the_same_dtypes_whoever_takes_part():
    """Else a program would be compiled again."""
    one = StepSize(1, prompts=1, chunk=4)
    pairs = [
        (make_rows(LIMITS, [[]], 1), make_rows(LIMITS, [[live()]], 1)),
        (
            make_chunks(LIMITS, [[]], one),
            make_chunks(LIMITS, [[PromptChunk(live(read=0), 0, 4)]], one),
        ),
    ]
    for nobody, somebody in pairs:
        for x, y in zip(nobody[:-1], somebody[:-1], strict=True):
            assert isinstance(x, np.ndarray) and x.dtype == y.dtype
        for x, y in zip(nobody.draws, somebody.draws, strict=True):
            assert x.dtype == y.dtype and x.shape == y.shape
