"""Arrays that a compiled program copies as they are."""

from jmoe.plan import hlo

_MOVES_ONLY = ("parameter", "copy", "bitcast", "tuple", "get-tuple-element")


def largest_in_loops(text: str) -> int:
    """Returns bytes of the largest array that a loop copies each time; 0 if none.

    A loop that can't update an array in place copies the whole of it.
    """
    program = hlo.parse(text)
    sizes = (
        hlo.shape_bytes(instruction.shape)
        for executed in program.executed()
        if executed.name != program.entry
        for instruction in executed.instructions
        if _is_copy(program, instruction)
    )
    return max(sizes, default=0)


def _is_copy(program: hlo.HloModule, instruction: hlo.HloInstruction) -> bool:
    if instruction.opcode in ("copy", "copy-done"):
        return True
    if instruction.opcode != "fusion":
        return False
    (called,) = instruction.called
    return all(i.opcode in _MOVES_ONLY for i in program.computations[called])
