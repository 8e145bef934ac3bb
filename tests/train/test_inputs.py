"""What a run reads."""

import numpy as np
import pytest

from jmoe.data.packing import Batch
from jmoe.train.inputs import unigram_entropy


def test_the_unigram_entropy_is_that_of_the_predicted_tokens():
    tokens_BT = np.array([[9, 1, 1, 2, 3]])  # 9 is never predicted
    got = unigram_entropy([Batch(tokens_BT, tokens_BT)])
    assert got == pytest.approx(1.5 * np.log(2))
