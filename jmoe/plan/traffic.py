"""A compiled program's collectives: who talks to whom, how much, and what hides it.

An asynchronous collective is a pair of instructions, `all-to-all-start` and
`all-to-all-done` say, and overlaps with what is between them. What matters there is how
many matrix products it is: those take long enough to hide it.

Sizes are of one device: the program is the same on all of them.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from jmoe.plan import hlo
from jmoe.plan.hlo import HloInstruction, HloModule

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
PHASES = ("step", "forward", "backward", "weight")

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
_PASS = re.compile(r"(?:^|/)(forward|backward|weight)(?:/|$)")
_MESH_AXIS = re.compile(r"'(\w+)'(?:=(\d+))?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective instruction of a program.

    shapes: what a device puts in, each time, `operand_bytes` in all. axes: of the mesh,
    along which its devices talk, `devices` in a group. times: it runs in a step, where
    a loop of unknown length counts once. phase: one of `PHASES`; "backward" includes
    what is computed again there, "weight" is that of a pipeline which computes weights'
    gradients apart, and "step" is what isn't differentiated. spans: the matrix products
    between its start and its end, by phase; None if it isn't asynchronous.
    computation, optional: where it is, and whether devices may skip that; see
    `hlo.Executed`.
    """

    kind: str
    shapes: tuple[str, ...]
    operand_bytes: int
    axes: tuple[str, ...]
    devices: int
    times: int
    phase: str
    spans: Mapping[str, int] | None
    op_name: str
    computation: str = ""
    optional: bool = False

    @property
    def gemms(self) -> int | None:
        """How many matrix products it spans."""
        return None if self.spans is None else sum(self.spans.values())

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


def collectives(text: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """Returns every collective of a program, in the order of the schedule.

    Args:
      text: optimised HLO.
      mesh_shape: devices by axis, the outermost first; the program's devices are
        numbered along it.

    Raises:
      ValueError: the text isn't HLO, or groups devices as no axes of the mesh do.
    """
    program = hlo.parse(text)
    found = []
    for executed in program.executed():
        instructions = executed.instructions
        by_name = {instruction.name: instruction for instruction in instructions}
        ends = {
            instruction.operands[0]: place
            for place, instruction in enumerate(instructions)
            if instruction.opcode.endswith("-done")
        }
        for place, instruction in enumerate(instructions):
            collective = _collective(program, instruction)
            if collective is None:
                continue
            between = instructions[place + 1 : ends.get(instruction.name, 0)]
            is_pair = instruction.name in ends
            operands = [by_name[name] for name in instruction.operands]
            # Some say nothing of where they come from, but what they send does.
            known = (instruction, collective, *operands[:1])
            names = (*(x.op_name for x in known), executed.op_name)
            found.append(
                _record(
                    collective,
                    [operand.shape for operand in operands],
                    mesh_shape,
                    executed,
                    spans=_spans(program, between) if is_pair else None,
                    op_name=next(filter(None, names), ""),
                )
            )
    return found


def _spans(program: HloModule, between: Sequence[HloInstruction]) -> Mapping[str, int]:
    """Returns the matrix products of these instructions, by phase."""
    spans = collections.Counter()
    for instruction in between:
        for op_name, count in program.gemms(instruction).items():
            spans[_phase(op_name)] += count
    return dict(spans)


def _collective(
    program: HloModule, instruction: HloInstruction
) -> HloInstruction | None:
    """Returns the collective that an instruction is or starts, if any."""
    kind = instruction.opcode.removesuffix("-start")
    if kind in KINDS:
        return dataclasses.replace(instruction, opcode=kind)
    if kind == "async":
        (called,) = instruction.called
        for inner in program.computations[called]:
            if inner.opcode in KINDS:
                return inner
    return None


def _record(
    collective: HloInstruction,
    shapes: Sequence[str],
    mesh_shape: Mapping[str, int],
    executed: hlo.Executed,
    *,
    spans: Mapping[str, int] | None,
    op_name: str,
) -> Collective:
    kind = collective.opcode
    if kind == "ragged-all-to-all":
        shapes = shapes[:1]  # then come the array to fill, offsets and sizes
    groups = _groups(collective.attributes, math.prod(mesh_shape.values()))
    axes = _axes(groups, mesh_shape, pairwise=kind == "collective-permute")
    return Collective(
        kind=kind,
        shapes=tuple(shapes),
        operand_bytes=sum(map(hlo.shape_bytes, shapes)),
        axes=axes,
        devices=math.prod(mesh_shape[axis] for axis in axes),
        times=executed.times,
        phase=_phase(op_name),
        spans=spans,
        op_name=op_name,
        computation=executed.name,
        optional=executed.optional,
    )


def _phase(op_name: str) -> str:
    """Returns the phase, by the pipeline's scopes or else by differentiation's."""
    scope = _PASS.search(op_name)
    if scope:
        return scope[1]
    if "transpose(" in op_name:
        return "backward"
    return "forward" if "jvp(" in op_name else "step"


def _groups(attributes: str, devices: int) -> np.ndarray:
    """Returns the devices that talk to each other, [groups, members]."""
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
    """Returns devices, numbered in an array of `sizes`, with its dimensions so."""
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return numbers.transpose(order) if order else numbers


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(item) for item in text.split(",") if item)


def _axes(
    groups: np.ndarray, mesh_shape: Mapping[str, int], *, pairwise: bool
) -> tuple[str, ...]:
    """Returns the axes along which the devices of a group differ."""
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
