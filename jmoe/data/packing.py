"""Rows of one length out of a stream of documents.

A stream holds documents one after the other, a separator opening each and closing the
last. Row i is `stream[i * T : (i + 1) * T + 1]` for T predicted tokens: rows overlap by
one token, so that in an epoch every token but the stream's first, and the fewer than T
at its end, is predicted exactly once.

Shapes: B rows; T tokens of a row, the last of them predicted only (of choices, T
inputs); N of the stream; L MoE layers; K experts that a token takes.
"""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Rows of tokens: the inputs are `[:, :-1]` and the targets `[:, 1:]`.

    tokens_BT: int32, T = sequence_length + 1. segment_BT: int32, the document inside
    the row, counted from 0; `PADDING` where there is no token, after a row's last one.
    is_target_BT: bool, whether the loss counts the prediction of this token (a prompt
    is read and not learned, say); None: of every token that isn't padding. choice_BLTK:
    int32, of each MoE layer the experts that each input is to take, for a router that
    is told (`jmoe.nn.choices.replayed`).

    A separator belongs to the document that it opens. So a document's first token is
    predicted from the separator alone, and attention confined to a segment sees
    nothing of its neighbours.
    """

    tokens_BT: np.ndarray
    segment_BT: np.ndarray
    is_target_BT: np.ndarray | None = None
    choice_BLTK: np.ndarray | None = None


PADDING = -1


class PackedRows:
    """Random access to the rows of a stream, as Grain asks for it."""

    def __init__(self, stream_N: np.ndarray, sequence_length: int):
        self._stream_N = stream_N
        self._stride = sequence_length

    def __len__(self) -> int:
        return (len(self._stream_N) - 1) // self._stride

    def __getitem__(self, index: int) -> np.ndarray:
        start = index * self._stride
        return self._stream_N[start : start + self._stride + 1].astype(np.int32)


def as_batch(tokens_BT: np.ndarray, eos_id: int) -> Batch:
    """Adds the segments, which begin at each separator."""
    opens_BT = np.cumsum(tokens_BT == eos_id, axis=1, dtype=np.int32)
    return Batch(tokens_BT, opens_BT - opens_BT[:, :1])
