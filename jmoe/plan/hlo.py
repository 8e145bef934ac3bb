"""Reads the collectives of a compiled program off its text.

The text is XLA's optimised, scheduled HLO (`Compiled.as_text()`): within a computation,
instructions are in the order in which they start. An asynchronous collective is a pair
of instructions, `all-to-all-start` and `all-to-all-done` say, and overlaps with what is
between them. What matters there is how many matrix products it is: those take long
enough to hide it.

Sizes are of one device: the program is the same on all of them.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

PHASES = ("step", "forward", "backward")

# Custom calls that are matrix products: the libraries' and this project's kernels.
_GEMM_CALLS = ("__cublas$", "__cudnn$", "mosaic_gpu", "__triton")

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
_LISTED_GROUPS = re.compile(
    r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})?\}"
)
_IOTA_GROUPS = re.compile(
    r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
)
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]:]*)\]"  # its axes
    r"(?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))?"
    r" \{([^}:]*)\}"  # those along which a group lies
)
_MESH_AXIS = re.compile(r"'(\w+)'(?:=(\d+))?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective instruction of a program.

    shapes: what a device puts in, each time, `operand_bytes` in all. axes: of the mesh,
    along which its devices talk, `devices` in a group. times: it runs in a step, where
    a loop of unknown length counts once. phase: one of `PHASES`; "backward" includes what
    is computed again there, and "step" is what isn't differentiated. gemms: the
    matrix products between its start and its end; None if it isn't asynchronous.
    """

    kind: str
    shapes: tuple[str, ...]
    operand_bytes: int
    axes: tuple[str, ...]
    devices: int
    times: int
    phase: str
    gemms: int | None
    op_name: str

    @property
    def moved_bytes(self) -> int:
        """What a device sends to others each time, on the shortest way.

        For a ragged all-to-all, the most: how much of its rows leave is up to the data.
        """
        others = (self.devices - 1) / self.devices
        sent = {
            "all-gather": self.devices - 1,  # its part reaches each of the others
            "all-reduce": 2 * others,  # a reduce-scatter, then an all-gather
            "all-to-all": others,
            "reduce-scatter": others,
        }
        return round(self.operand_bytes * sent.get(self.kind, 1.0))


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


@dataclasses.dataclass(frozen=True)
class _Module:
    computations: Mapping[str, Sequence[_Instruction]]
    entry: str


def collectives(text: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """Every collective of a program, in the order of the schedule.

    Args:
      text: optimised HLO.
      mesh_shape: devices by axis, the outermost first; the program's devices are
        numbered along it.

    Raises:
      ValueError: the text isn't HLO, or groups devices as no axes of the mesh do.
    """
    module = _parse(text)
    count = _GemmCounter(module)
    found = []
    for computation, times in _executed(module, module.entry, 1):
        instructions = module.computations[computation]
        by_name = {instruction.name: instruction for instruction in instructions}
        done_at = {
            instruction.operands[0]: position
            for position, instruction in enumerate(instructions)
            if instruction.opcode.endswith("-done")
        }
        for position, instruction in enumerate(instructions):
            collective = _inner(module, instruction)
            if collective is None:
                continue
            end = done_at.get(instruction.name)
            between = None if end is None else instructions[position + 1 : end]
            shapes = tuple(by_name[name].shape for name in instruction.operands)
            found.append(
                _record(
                    collective,
                    instruction,
                    shapes,
                    mesh_shape,
                    times,
                    None if between is None else sum(map(count, between)),
                )
            )
    return found


def _inner(module: _Module, instruction: _Instruction) -> _Instruction | None:
    """The collective that an instruction is or starts, if any."""
    kind = instruction.opcode.removesuffix("-start")
    if kind in KINDS:
        return dataclasses.replace(instruction, opcode=kind)
    if kind == "async":
        called = _CALLED.findall(instruction.attributes)
        for inner in module.computations[called[0]]:
            if inner.opcode in KINDS:
                return inner
    return None


def _record(
    collective: _Instruction,
    instruction: _Instruction,
    shapes: tuple[str, ...],
    mesh_shape: Mapping[str, int],
    times: int,
    gemms: int | None,
) -> Collective:
    kind = collective.opcode
    if kind == "ragged-all-to-all":
        shapes = shapes[:1]  # then come the array to fill, offsets and sizes
    groups = _groups(collective.attributes, math.prod(mesh_shape.values()))
    pairwise = kind == "collective-permute"
    axes = _axes(groups, mesh_shape, pairwise=pairwise)
    named = _OP_NAME.search(instruction.attributes + collective.attributes)
    op_name = named[1] if named else ""
    return Collective(
        kind=kind,
        shapes=shapes,
        operand_bytes=sum(map(shape_bytes, shapes)),
        axes=axes,
        devices=math.prod(mesh_shape[axis] for axis in axes),
        times=times,
        phase=_phase(op_name),
        gemms=gemms,
        op_name=op_name,
    )


def _phase(op_name: str) -> str:
    if "transpose(" in op_name:
        return "backward"
    return "forward" if "jvp(" in op_name else "step"


def shape_bytes(shape: str) -> int:
    """Of an array, or of all arrays of a tuple, as HLO writes them."""
    bits = 0
    for dtype, dims in _SHAPE.findall(shape):
        size = math.prod(int(dim) for dim in dims.split(",") if dim)
        bits += size * _bits(dtype)
    return bits // 8


def _bits(dtype: str) -> int:
    if dtype in ("pred", "token"):
        return 8
    width = re.match(r"[a-z]+(\d+)", dtype)
    if width is None:
        raise ValueError(f"HLO's {dtype!r} is no type of known width.")
    return int(width[1])


class _GemmCounter:
    """How many matrix products an instruction runs, those of its loops included."""

    def __init__(self, module: _Module):
        self._module = module
        self._of_computation = functools.cache(self._sum)

    def __call__(self, instruction: _Instruction) -> int:
        if instruction.opcode == "dot":
            return 1
        if instruction.opcode == "custom-call":
            target = _TARGET.search(instruction.attributes)
            return int(target is not None and target[1].startswith(_GEMM_CALLS))
        called = _called(instruction)
        return _trips(instruction) * sum(map(self._of_computation, called))

    def _sum(self, computation: str) -> int:
        return sum(map(self, self._module.computations[computation]))


def _called(instruction: _Instruction) -> list[str]:
    """The computations that run as part of an instruction."""
    if instruction.opcode in ("while", "call", "fusion", "async-start"):
        return _CALLED.findall(instruction.attributes)
    if instruction.opcode == "conditional":
        branches = ",".join(_BRANCHES.findall(instruction.attributes + ","))
        return _NAME.findall(branches)
    return []


def _trips(instruction: _Instruction) -> int:
    known = _TRIPS.search(instruction.attributes)
    return int(known[1]) if known and instruction.opcode == "while" else 1


def _executed(
    module: _Module, computation: str, times: int
) -> Iterator[tuple[str, int]]:
    """Computations that can hold collectives, and how often each runs."""
    yield computation, times
    for instruction in module.computations[computation]:
        if instruction.opcode in ("while", "call", "conditional"):
            for called in _called(instruction):
                yield from _executed(module, called, times * _trips(instruction))


def _parse(text: str) -> _Module:
    computations: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] = []
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
        raise ValueError("The text has no ENTRY computation: it is not a whole HLO.")
    return _Module(computations, entry)


def _instruction(name: str, right: str) -> _Instruction:
    """From `shape opcode(operands), attributes`."""
    end = _closing(right) + 1 if right.startswith("(") else right.index(" ")
    opcode, _, rest = right[end:].strip().partition("(")
    close = _closing("(" + rest) - 1
    operands = tuple(_NAME.findall(rest[:close]))
    return _Instruction(name, right[:end], opcode, operands, rest[close + 1 :])


def _closing(text: str) -> int:
    """Where the parenthesis that `text` starts with closes."""
    depth = 0
    for bracket in re.finditer(r"[()]", text):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            return bracket.start()
    raise ValueError(f"HLO with an open parenthesis: {text[:80]!r}")


def _groups(attributes: str, devices: int) -> np.ndarray:
    """The devices that talk to each other, [groups, members]."""
    iota = _IOTA_GROUPS.search(attributes)
    if iota:
        shape, sizes, order = (_ints(part or "") for part in iota.groups())
        return _transposed(sizes, order).reshape(shape)
    named = _MESH_GROUPS.search(attributes)
    if named:
        return _groups_of_mesh(*named.groups(default=""))
    listed = _LISTED_GROUPS.search(attributes)
    if listed is None:
        raise ValueError(f"HLO with groups of unknown form: {attributes[:200]!r}")
    if not listed[1]:
        return np.arange(devices)[None]
    return np.array([_ints(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])])


def _groups_of_mesh(mesh: str, sizes: str, order: str, along: str) -> np.ndarray:
    """Groups along axes of a mesh of XLA's own making."""
    shape = {axis: int(size) for axis, size in _MESH_AXIS.findall(mesh)}
    used = [list(shape).index(axis) for axis, _ in _MESH_AXIS.findall(along)]
    flat = (math.prod(shape.values()),)
    numbers = _transposed(_ints(sizes) or flat, _ints(order))
    last = range(-len(used), 0)
    members = math.prod(list(shape.values())[axis] for axis in used)
    return np.moveaxis(numbers.reshape(tuple(shape.values())), used, last).reshape(
        -1, members
    )


def _transposed(sizes: tuple[int, ...], order: tuple[int, ...]) -> np.ndarray:
    """Devices, numbered in an array of `sizes`, with its dimensions in this order."""
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return numbers.transpose(order) if order else numbers


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(item) for item in text.split(",") if item)


def _axes(
    groups: np.ndarray, mesh_shape: Mapping[str, int], *, pairwise: bool
) -> tuple[str, ...]:
    """The axes along which the devices of a group differ."""
    sizes = tuple(mesh_shape.values())
    places = np.stack(np.unravel_index(groups, sizes))  # [axes, groups, members]
    differ = (places != places[:, :, :1]).any(axis=(1, 2))
    axes = tuple(axis for axis, used in zip(mesh_shape, differ, strict=True) if used)
    members = math.prod(mesh_shape[axis] for axis in axes)
    if not pairwise and members != groups.shape[1]:
        raise ValueError(
            f"Groups of {groups.shape[1]} devices, such as {groups[0].tolist()[:16]}, "
            f"are not those along axes of the mesh {dict(mesh_shape)}."
        )
    return axes
