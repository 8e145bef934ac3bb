"""A mesh's programs on several processes: process 0 decides, the others follow.

All processes of a mesh run the same steps in the same order. The engine, which decides
what a step has, is process 0's. Before a step it sends the others the step's arrays, a
few KiB, and waits for none of them: whoever is behind finds the next step waiting. With
`Leader` around its programs an engine needs to know nothing of it.
"""

import base64
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jmoe.decode.batch import DecodeRows, PrefillChunks
from jmoe.decode.engine import MakePrograms, Programs
from jmoe.decode.limits import Limits, StepSize
from jmoe.decode.live import make_nobody
from jmoe.decode.step import StepResult

WARM_UP, RUN, FLUSH, END = "warm up", "run", "flush", "end"


class Leader:
    """Process 0's programs: each call is sent before it is made.

    Args:
      send: passes a JSON value to all other processes, in their order.
    """

    def __init__(self, programs: Programs, send: Callable[[Any], None]):
        self.parts, self.turns = programs.parts, programs.turns
        self._programs, self._send = programs, send

    def warm_up(self, size: StepSize) -> None:
        self._send([WARM_UP, *size])
        self._programs.warm_up(size)

    def run(self, rows: DecodeRows, chunks: PrefillChunks) -> list[StepResult]:
        self._send([RUN, *encode(self.parts, rows, chunks)])
        return self._programs.run(rows, chunks)

    def flush(self) -> list[StepResult]:
        self._send([FLUSH])
        return self._programs.flush()


def led(make: MakePrograms, send: Callable[[Any], None]) -> MakePrograms:
    """Returns what makes the same programs for process 0 of several."""
    return lambda *arguments: Leader(make(*arguments), send)


def follow(programs: Programs, limits: Limits, receive: Callable[[], Any]) -> None:
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
        else:
            programs.flush()


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
