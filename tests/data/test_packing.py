"""Rows and segments against what a plain loop says."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jmoe.data.packing import PackedRows, as_batch


@given(st.integers(2, 200), st.integers(1, 20))
def test_every_token_after_the_first_is_predicted_once_and_in_order(size, length):
    stream_N = np.arange(size, dtype=np.uint16)
    rows = PackedRows(stream_N, length)
    predicted = [int(token) for i in range(len(rows)) for token in rows[i][1:]]
    assert predicted == list(range(1, 1 + len(rows) * length))
    assert size - 1 - len(predicted) < length  # only a tail too short for a row is left


def test_each_target_is_the_next_input():
    rows = PackedRows(np.arange(9, dtype=np.uint16), 4)
    assert [rows[i].tolist() for i in range(2)] == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    assert rows[0].dtype == np.int32


@given(st.lists(st.lists(st.integers(0, 2), min_size=9, max_size=9), min_size=1))
def test_segments_count_the_documents_of_a_row_from_zero(rows):
    segment_BT = as_batch(np.array(rows, np.int32), eos_id=0).segment_BT
    for row, segments in zip(rows, segment_BT.tolist(), strict=True):
        expected = [0]
        for token in row[1:]:
            expected.append(expected[-1] + (token == 0))
        assert segments == expected
    assert segment_BT.dtype == np.int32
