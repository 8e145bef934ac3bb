"""In which numbers a compiled step adds up: between devices, and on each of them.

What a program sums in bfloat16 loses small addends, and no test of a small model shows
it. So it is read off the compiled program, by the places that `docs/numerics.md` names,
and a test holds that document to it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from jmoe.plan import hlo
from jmoe.plan.hlo import HloInstruction
from jmoe.plan.traffic import Collective

DTYPES = {
    "f32": "float32",
    "bf16": "bfloat16",
    "s32": "int32",
    "u32": "uint32",
    "pred": "bool",
    "f8e4m3fn": "float8_e4m3fn",
    "u8": "uint8",
}

FLOATS = {"float32", "bfloat16", "float8_e4m3fn"}

# What a collective carries, by its JAX name and kind; the first that fits.
CARRIED = (
    ("tokens, choices and gates to experts", r"/dispatch/", ""),
    ("results from experts", r"/combine/", ""),
    ("between stages", "", "collective-permute"),
    ("layers' weights to their ranks, gradients back", "", "all-to-all"),
    ("counts, losses, norms, softmax", "", "all-reduce"),
    ("positions of a layer", r"(Transformer|Tail|block|moe|dense|mtp)", ""),
    ("logits and what they need", r"(jvp\(\)|leave|while)/", "all-gather"),
    ("logits and what they need", r"(jvp\(\)|leave|while)/", "reduce-scatter"),
    ("weights", "", "all-gather"),
    ("gradients of weights", "", "reduce-scatter"),
)

# Where a device adds up or takes a function, by the JAX name.
PLACES = (
    ("router", r"/router/"),
    ("norm", r"norm/"),
    ("SwiGLU", r"\(silu\)"),
    ("attention", r"/attention/"),
    ("experts", r"/experts/"),
)
ELSEWHERE = "elsewhere"
FUNCTIONS = ("exponential", "log", "rsqrt", "cosine", "sine")


class Travel(NamedTuple):
    """What goes between devices, by which collective, in which dtype."""

    carried: str
    kind: str
    dtype: str
    axes: tuple[str, ...]


class Local(NamedTuple):
    """What a device computes, in which dtype.

    operation: "sum", one of `FUNCTIONS`, or "cast from" another floating dtype.
    """

    place: str
    operation: str
    dtype: str


def travels(found: list[Collective]) -> set[Travel]:
    """Returns what a program's collectives carry."""
    return {
        Travel(_carried(collective), collective.kind, _dtype(shape), collective.axes)
        for collective in found
        for shape in collective.shapes
    }


def _carried(collective: Collective) -> str:
    for what, name, kind in CARRIED:
        if kind in ("", collective.kind) and re.search(name, collective.op_name):
            return what
    return f"{collective.kind} of {collective.op_name}"


def local(text: str) -> set[Local]:
    """Returns what one device sums, casts and takes functions of; fused or not.

    Args:
      text: optimised HLO.
    """
    return set(_local(hlo.parse(text).computations))


def _local(computations: Mapping[str, Sequence[HloInstruction]]) -> Iterator[Local]:
    roots = {name: inside[-1].opcode for name, inside in computations.items()}
    for instructions in computations.values():
        dtypes = {one.name: _dtype(one.shape) for one in instructions}
        for instruction in instructions:
            operation = _operation(instruction, roots, dtypes)
            if operation is not None:
                place = _place(instruction.op_name)
                yield Local(place, operation, _dtype(instruction.shape))


def _operation(
    instruction: HloInstruction, roots: Mapping[str, str], dtypes: Mapping[str, str]
) -> str | None:
    if instruction.opcode in FUNCTIONS:
        return instruction.opcode
    if instruction.opcode == "convert":
        source = dtypes[instruction.operands[0]]
        is_float = {source, _dtype(instruction.shape)} <= FLOATS
        return f"cast from {source}" if is_float else None
    applied = re.search(r"to_apply=%?([\w.$-]+)", instruction.attributes)
    adds = applied is not None and roots[applied[1]] == "add"
    is_local = instruction.opcode in ("reduce", "scatter", "reduce-window")
    return "sum" if is_local and adds else None


def _place(op_name: str) -> str:
    return next((p for p, name in PLACES if re.search(name, op_name)), ELSEWHERE)


def _dtype(shape: str) -> str:
    name = shape.strip("( ").partition("[")[0]
    return DTYPES.get(name, name)
