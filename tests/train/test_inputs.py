"""What a run reads."""

import numpy as np
import pytest

from jmoe.data.packing import Batch
from jmoe.train.inputs import unigram_entropy
from tests.several_processes import together


def test_the_unigram_entropy_is_that_of_the_predicted_tokens():
    tokens_BT = np.array([[9, 1, 1, 2, 3]])  # 9 is never predicted
    got = unigram_entropy([Batch(tokens_BT, tokens_BT)])
    assert got == pytest.approx(1.5 * np.log(2))


def test_processes_count_each_part_of_the_batches_once():
    token_BT = np.array([[9, 1, 1, 2, 3], [0, 1, 5, 2, 2]])
    rows = (token_BT[:1], token_BT[:1], token_BT[1:])  # the first two share a part
    views = [(part, row) for part, row in zip((0, 0, 1), rows, strict=True)]
    got = together(lambda v: unigram_entropy([Batch(v[1], v[1])], part=v[0]), *views)
    assert got == [unigram_entropy([Batch(token_BT, token_BT)])] * 3
