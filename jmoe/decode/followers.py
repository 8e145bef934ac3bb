"""A mesh's programs on several processes: process 0 decides, the others follow.

All processes of a mesh run the same steps in the same order. The engine, which decides
what a step has, is process 0's. Before a step it sends the others the step's arrays, a
few KiB, and waits for none of them: whoever is behind finds the next step waiting. With
`Leader` around its programs an engine needs to know nothing of it.

So it is with what a pilot decides (`jmoe.decode.pilot`): where experts go is planned by
process 0 alone. The others get each step of the way when it is to be made, and how much
may be dropped, or the dtype in which tokens travel, when that changes.
"""

import base64
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from jmoe.balance.copies import CopyStep
from jmoe.decode.batch import DecodeRows, PrefillChunks
from jmoe.decode.limits import Limits, StepSize
from jmoe.decode.live import make_nobody
from jmoe.decode.on_mesh import OnMesh
from jmoe.decode.placing import Move
from jmoe.decode.step import StepResult

WARM_UP, RUN, FLUSH, END = "warm up", "run", "flush", "end"
MOVE, LIMIT, DTYPE = "move", "limit", "dtype"


class Leader:
    """Process 0's programs: each call is sent before it is made.

    Args:
      send: passes a JSON value to all other processes, in their order.
    """

    def __init__(self, programs: OnMesh, send: Callable[[Any], None]):
        self.parts, self.turns = programs.parts, programs.turns
        self.placing, self.may_drop = programs.placing, programs.may_drop
        self.dispatch_dtypes = programs.dispatch_dtypes
        self._programs, self._send = programs, send

    @property
    def dispatch_dtype(self) -> str:
        return self._programs.dispatch_dtype

    def warm_up(self, size: StepSize) -> None:
        self._send([WARM_UP, *size])
        self._programs.warm_up(size)

    def run(self, rows: DecodeRows, chunks: PrefillChunks) -> list[StepResult]:
        self._send([RUN, *encode(self.parts, rows, chunks)])
        return self._programs.run(rows, chunks)

    def flush(self) -> list[StepResult]:
        self._send([FLUSH])
        return self._programs.flush()

    def advance(self, steps: int) -> float:
        """Does as `OnMesh.advance`, on experts that are placed."""
        assert self.placing is not None, "as they were made with places"
        moves = self.placing.take(steps)
        self._send([MOVE, encode_moves(moves)])
        return self._programs.move(moves)

    def set_limit(self, limit: int) -> None:
        """Does as `OnMesh.set_limit`, where choices may be dropped."""
        assert self.may_drop, "as they were made with a limit"
        self._send([LIMIT, limit])
        self._programs.set_limit(limit)

    def set_dispatch_dtype(self, dtype: str) -> None:
        """Does as `OnMesh.set_dispatch_dtype`, of those that there are."""
        assert dtype in self.dispatch_dtypes, "as they were made with it"
        self._send([DTYPE, dtype])
        self._programs.set_dispatch_dtype(dtype)


def led(
    make: Callable[..., OnMesh], send: Callable[[Any], None]
) -> Callable[..., Leader]:
    """Returns what makes the same programs for process 0 of several."""
    return lambda *arguments: Leader(make(*arguments), send)


def follow(programs: OnMesh, limits: Limits, receive: Callable[[], Any]) -> None:
    """Makes the calls that process 0 sends, until it sends [END].

    Args:
      receive: returns the next value that was sent.
    """
    while True:
        call, *arguments = receive()
        if call == END:
            return
        if call == WARM_UP:
            programs.warm_up(StepSize(*arguments))
        elif call == RUN:
            programs.run(*decode(limits, programs.parts, *arguments))
        elif call == FLUSH:
            programs.flush()
        elif call == MOVE:
            programs.move(decode_moves(*arguments))
        elif call == LIMIT:
            programs.set_limit(*arguments)
        else:
            programs.set_dispatch_dtype(*arguments)


def encode(
    parts: int, rows: DecodeRows, chunks: PrefillChunks
) -> tuple[list[int], str]:
    """Returns a step's size, and its arrays' bytes as text."""
    size = StepSize(
        rows=len(rows.slot_B) // parts,
        prompts=len(chunks.slot_A) // parts,
        chunk=chunks.token_AC.shape[1],
    )
    data = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves((rows, chunks)))
    return list(size), base64.b64encode(data).decode()


def decode(
    limits: Limits, parts: int, size: list[int], text: str
) -> tuple[DecodeRows, PrefillChunks]:
    """Returns the inverse of `encode`, for an engine of the same limits."""
    leaves, tree = jax.tree.flatten(make_nobody(limits, parts, StepSize(*size)))
    data, at = base64.b64decode(text), 0
    found = []
    for leaf in leaves:
        x = np.frombuffer(data, leaf.dtype, leaf.size, at)
        found.append(x.reshape(leaf.shape))
        at += x.nbytes
    assert at == len(data), "of the same limits"
    return jax.tree.unflatten(tree, found)


def encode_moves(moves: Iterable[Move]) -> list[Any]:
    """Returns steps of the experts' way as JSON has them."""
    return [
        [row, [step and [x.tolist() for x in step] for step in steps]]
        for row, steps in moves
    ]


def decode_moves(moves: Iterable[Any]) -> list[Move]:
    """Returns the inverse of `encode_moves`."""
    return [Move(row, tuple(map(_copy_step, steps))) for row, steps in moves]


def _copy_step(arrays: Any) -> CopyStep | None:
    if arrays is None:
        return None
    return CopyStep(*(np.array(x, np.int32) for x in arrays))
