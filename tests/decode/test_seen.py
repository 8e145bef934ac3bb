"""Which tokens occurred in a slot's sequence: its own, all of them, and no others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from jmoe.decode import seen
from jmoe.decode.limits import Limits, StepSize
from jmoe.decode.live import Live, PromptChunk, make_chunks
from jmoe.decode.requests import Completion, Sampling

SLOTS, VOCAB = 3, 10
LIMITS = Limits(rows=(SLOTS,), max_length=16, page_size=16)
SIZE = StepSize(SLOTS, prompts=2, chunk=4)


def chunk(slot: int, prompt: list[int], start: int, count: int) -> PromptChunk:
    live = Live(prompt, Sampling(), Completion(0), 0.0, slot=slot)
    return PromptChunk(live, start, count)


def read(seen_XV, *chunks: PromptChunk):
    return seen.read(seen_XV, make_chunks(LIMITS, [chunks], SIZE))


def occurred(seen_XV) -> list[set[int]]:
    return [set(np.flatnonzero(row_V).tolist()) for row_V in seen_XV]


def test_a_sequence_that_begins_forgets_what_its_slot_had_seen_and_others_do_not():
    seen_XV = jnp.ones((SLOTS, VOCAB), bool)
    seen_XV = read(seen_XV, chunk(1, [3, 4, 5, 6, 7, 8], 0, 3))
    every = set(range(VOCAB))
    assert occurred(seen_XV) == [every, {3, 4, 5}, every]
    seen_XV = read(seen_XV, chunk(1, [3, 4, 5, 6, 7, 8], 3, 2))
    assert occurred(seen_XV) == [every, {3, 4, 5, 6, 7}, every]


def test_sequences_that_are_read_together_see_each_its_own_tokens():
    seen_XV = jnp.ones((SLOTS, VOCAB), bool)
    seen_XV = read(seen_XV, chunk(2, [3, 4, 5, 6], 0, 3), chunk(0, [1], 0, 1))
    every = set(range(VOCAB))
    assert occurred(seen_XV) == [{1}, every, {3, 4, 5}]
    seen_XV = read(seen_XV, chunk(2, [3, 4, 5, 6], 3, 1), chunk(1, [9, 8], 0, 2))
    assert occurred(seen_XV) == [{1}, {8, 9}, {3, 4, 5, 6}]


def test_parts_of_one_prompt_that_are_read_together_are_all_seen():
    seen_XV = jnp.ones((SLOTS, VOCAB), bool)
    seen_XV = read(seen_XV, chunk(1, [3, 4, 5, 6], 0, 3), chunk(1, [3, 4, 5, 6], 3, 1))
    every = set(range(VOCAB))
    assert occurred(seen_XV) == [every, {3, 4, 5, 6}, every]


def test_a_chunk_of_nobody_changes_nothing():
    seen_XV = jnp.eye(SLOTS, VOCAB, dtype=bool)
    got_XV = read(seen_XV)
    np.testing.assert_array_equal(got_XV, seen_XV)


def test_only_tokens_that_are_there_are_noted():
    token_BQ = np.array([[1, 2], [0, 9], [5, 6]])
    is_there_BQ = np.array([[True, False], [True, True], [True, True]])
    slot_B = np.array([2, 0, SLOTS])  # the last is nobody's
    none_XV = jnp.zeros((SLOTS, VOCAB), bool)
    got_XV = seen.note(none_XV, slot_B, token_BQ, is_there_BQ)
    assert occurred(got_XV) == [{0, 9}, set(), {1}]


def test_devices_of_a_divided_vocabulary_each_note_their_own_part():
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Auto,))
    divided, whole = PartitionSpec(None, "tensor"), PartitionSpec()
    run = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    note = run(seen.note, in_specs=(divided, whole, whole, whole), out_specs=divided)
    token_BQ = np.array([[1, 4], [5, 9]])
    none_XV = jnp.zeros((SLOTS, VOCAB), bool)
    got_XV = jax.jit(note)(none_XV, np.array([0, 2]), token_BQ, token_BQ >= 0)
    assert occurred(got_XV) == [{1, 4}, set(), {5, 9}]
