"""Reads compiled programs: XLA's optimised HLO, as `Compiled.as_text()` has it.

A program is a set of computations, one of which is the entry and calls others: loops'
bodies, branches, fusions. Within one, instructions are in the order of the schedule.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

# Custom calls that are matrix products: the libraries' and this project's kernels.
_GEMM_CALLS = ("__cublas$", "__cudnn$", "mosaic_gpu", "__triton")
# By their names, kernels of this project's that aren't: those of `fp8_quantize`.
_QUANTIZING = ("/fp8_rows/", "/fp8_columns/")

# What moves nothing, and so is no kernel.
_FREE = ("bitcast", "constant", "get-tuple-element", "parameter", "tuple")

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.$-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.$-]+) = (.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.$-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.$-]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{|(?:true|false)_computation=)([^}]*?)[},]"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class HloInstruction:
    """`name = shape opcode(operands), attributes`; operands are names."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def op_name(self) -> str:
        """The JAX function and transformations that it comes from; "" if unknown."""
        named = _OP_NAME.search(self.attributes)
        return named[1] if named else ""

    @property
    def called(self) -> list[str]:
        """The computations that run as part of it."""
        if self.opcode in ("while", "call", "fusion", "async-start"):
            return _CALLED.findall(self.attributes)
        if self.opcode == "conditional":
            branches = ",".join(_BRANCHES.findall(self.attributes + ","))
            return _NAME.findall(branches)
        return []

    @property
    def trips(self) -> int:
        """How often a loop runs; 1 if that isn't known, or it is no loop."""
        known = _TRIPS.search(self.attributes) if self.opcode == "while" else None
        return int(known[1]) if known else 1

    @property
    def is_optional(self) -> bool:
        """Whether it is a branch, or a loop of unknown length."""
        if self.opcode == "while":
            return not _TRIPS.search(self.attributes)
        return self.opcode == "conditional"


class Executed(NamedTuple):
    """A computation that isn't fused.

    times: it runs, where a loop of unknown length counts once. op_name: of what calls
    it. optional: it is within a branch or a loop of unknown length, so that devices
    may differ in whether and how often they run it.
    """

    name: str
    instructions: Sequence[HloInstruction]
    times: int
    op_name: str
    optional: bool


@dataclasses.dataclass(frozen=True)
class HloModule:
    """Computations by name, and which of them is run."""

    computations: Mapping[str, Sequence[HloInstruction]]
    entry: str

    def executed(self) -> Iterator[Executed]:
        """Yields all computations that aren't fused."""
        return self._executed(self.entry, 1, "", False)

    def _executed(self, name, times, op_name, optional):
        yield Executed(name, self.computations[name], times, op_name, optional)
        for instruction in self.computations[name]:
            if instruction.opcode in ("while", "call", "conditional"):
                inner = times * instruction.trips
                differs = optional or instruction.is_optional
                for called in instruction.called:
                    yield from self._executed(
                        called, inner, instruction.op_name or op_name, differs
                    )

    def kernels(self) -> list[HloInstruction]:
        """Returns all instructions that do something, each as often as it runs."""
        return [
            instruction
            for executed in self.executed()
            for instruction in [*executed.instructions] * executed.times
            if instruction.opcode not in _FREE
        ]

    def gemms(self, instruction: HloInstruction) -> collections.Counter[str]:
        """Returns the matrix products that an instruction runs, by op_name.

        Those of its loops are included.
        """
        found: collections.Counter[str] = collections.Counter()
        if _is_gemm(instruction):
            found[instruction.op_name] += 1
        for called in instruction.called:
            for inner in self.computations[called]:
                for op_name, count in self.gemms(inner).items():
                    found[op_name or instruction.op_name] += instruction.trips * count
        return found


def _is_gemm(instruction: HloInstruction) -> bool:
    if instruction.opcode != "custom-call":
        return instruction.opcode == "dot"
    target = _TARGET.search(instruction.attributes)
    if target is None or any(name in instruction.op_name for name in _QUANTIZING):
        return False
    return target[1].startswith(_GEMM_CALLS)


def parse(text: str) -> HloModule:
    """Returns a program's computations; ValueError if the text isn't a whole one."""
    computations: dict[str, list[HloInstruction]] = {}
    current: list[HloInstruction] = []
    entry = None
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = computations[header[2]] = []
            entry = header[2] if header[1] else entry
            continue
        assigned = _INSTRUCTION.match(line)
        if assigned:
            current.append(_instruction(assigned[1], assigned[2]))
    if entry is None:
        raise ValueError("The text has no ENTRY computation: it is no whole program.")
    return HloModule(computations, entry)


def _instruction(name: str, right: str) -> HloInstruction:
    end = _closing(right) + 1 if right.startswith("(") else right.index(" ")
    opcode, _, rest = right[end:].strip().partition("(")
    close = _closing("(" + rest) - 1
    operands = tuple(_NAME.findall(rest[:close]))
    return HloInstruction(name, right[:end], opcode, operands, rest[close + 1 :])


def _closing(text: str) -> int:
    """Returns where the parenthesis that `text` starts with closes."""
    depth = 0
    for bracket in re.finditer(r"[()]", text):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            return bracket.start()
    raise ValueError(f"HLO with an open parenthesis: {text[:80]!r}")


def shape_bytes(shape: str) -> int:
    """Returns the bytes of an array, or all arrays of a tuple, as HLO writes them."""
    bits = 0
    for dtype, dims in _SHAPE.findall(shape):
        size = math.prod(int(dim) for dim in dims.split(",") if dim)
        bits += size * _bits(dtype)
    return bits // 8


def dimensions(shape: str) -> tuple[int, ...]:
    """Returns the dimensions of an array's shape, such as those of `bf16[2,3]{1,0}`."""
    (dims,) = (dims for _, dims in _SHAPE.findall(shape))
    return tuple(int(size) for size in dims.split(",") if size)


def _bits(dtype: str) -> int:
    if dtype in ("pred", "token"):
        return 8
    width = re.match(r"[a-z]+(\d+)", dtype)
    if width is None:
        raise ValueError(f"HLO's {dtype!r} is no type of known width.")
    return int(width[1])
