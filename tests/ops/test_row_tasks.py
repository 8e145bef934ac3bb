"""Tasks of sorted rows: each row is in one, and idle experts have none."""

import jax
import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jmoe.ops import row_tasks

MOST = 3 * row_tasks.BLOCK  # rows of one expert
BLOCKS_OF = [row_tasks.block_rows(tokens) for tokens in (1, 70, MOST)]
plan_tasks = jax.jit(row_tasks.plan_tasks, static_argnums=(1, 2))


def test_a_block_is_no_larger_than_the_tokens_need():
    assert BLOCKS_OF == [32, 96, 256]


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(0, MOST), min_size=5, max_size=5), st.sampled_from(BLOCKS_OF)
)
@example([0] * 5, 32)
@example([96, 0, 192, 1, 97], 96)
@example([256, 0, 512, 1, 257], 256)
@example([MOST] * 5, 256)
def test_tasks_cover_each_row_once_and_idle_experts_cost_nothing(sizes, block):
    # The rest of the rows is nobody's.
    tasks = plan_tasks(np.array(sizes, np.int32), 5 * MOST, block)
    count = int(tasks.count)
    assert count == sum(-(-size // block) for size in sizes)
    own = [np.array(x)[:count] for x in (tasks.expert_M, tasks.start_M, tasks.rows_M)]
    covered = [
        (expert, row)
        for expert, start, rows in zip(*own, strict=True)
        for row in range(start, start + rows)
    ]
    owner = np.repeat(np.arange(5), sizes)
    assert covered == list(zip(owner, range(sum(sizes)), strict=True))
    assert own[2].max(initial=0) <= block


def test_rows_are_computed_in_the_smallest_size_that_holds_them():
    block, few = 2 * row_tasks.STEP, row_tasks.FEW

    def sizes(few):
        size_of = jax.jit(
            lambda rows: row_tasks.in_smallest_size(rows, block, np.int32, few)
        )
        return [int(size_of(rows)) for rows in (1, 2, 4, 5, 16, 17, 32, 33, 64)]

    assert sizes(few) == [1, 4, 4, 8, 16, 32, 32, 64, 64]
    assert sizes(()) == [32] * 7 + [64] * 2
