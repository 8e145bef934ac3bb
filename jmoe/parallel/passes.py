"""A layer's three passes: F forward, B backward to its input, W to its weights.

Zero bubble schedules (Qi et al., arXiv 2401.10241) need the two halves of a backward
pass apart. Automatic differentiation gives them as one function, of which either half
could be asked for alone; but then both would compute what they share. So here the layer
and its gradient are traced once, as one list of equations, and each equation goes to
the pass that first needs it:

    F   what doesn't depend on the output's gradient
    B   what does, and the input's gradient needs
    W   the rest

What depends on neither the input nor the output's gradient, such as a weight in another
shape or an attention mask, is computed in each pass that reads it. Of the other values,
those that F leaves to B or W are *kept*, and those that B leaves to W are *owed*. No
other product is computed twice, except in a layer that asks for it (`jax.checkpoint`):
what is recomputed there belongs to the backward pass.

A loop is one equation, and goes to one pass.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

# A function of weights, what else is at hand, and the input. It returns what has a
# gradient, and what it measured, which has none.
Layer = Callable[[Any, Any, Any], tuple[Any, Any]]

_CALLS = {"jit", "pjit"}
_RECOMPUTED = {"remat2", "checkpoint"}  # names that `jax.checkpoint` has had

# A value is kept as what these make it from, where that is no larger, or kept as well.
_VIEWS = {
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "expand_dims",
    "reshape",
    "squeeze",
    "transpose",
}


class Passes(NamedTuple):
    """The three functions, and the shapes and dtypes of what passes between them.

    forward(weights, at_hand, x) -> output, measured, kept
    backward(weights, at_hand, kept, d_output) -> d_x, owed
    weight(weights, at_hand, kept, owed) -> d_weights
    """

    forward: Callable[[Any, Any, Any], tuple[Any, Any, list[jax.Array]]]
    backward: Callable[..., tuple[Any, list[jax.Array]]]
    weight: Callable[..., Any]
    kept: list[jax.ShapeDtypeStruct]
    owed: list[jax.ShapeDtypeStruct]


def split(layer: Layer, weights: Any, at_hand: Any, x: Any) -> Passes:
    """Returns the passes of `layer`, for arguments of these shapes and dtypes.

    On a mesh, it is to be called inside of the `jax.shard_map` that they run in.
    """

    def gradient(weights, at_hand, x, d_output):
        def of_weights_and_input(weights, x):
            return layer(weights, at_hand, x)

        output, pull, measured = jax.vjp(of_weights_and_input, weights, x, has_aux=True)
        return (output, measured), pull(d_output)

    output, measured = jax.eval_shape(layer, weights, at_hand, x)
    arguments = (weights, at_hand, x, output)
    traced, shapes = jax.make_jaxpr(gradient, return_shape=True)(*arguments)
    forward_shape, (weights_shape, x_shape) = shapes

    program = _flatten(traced)
    ids = iter(program.inputs)
    weight_ids, hand_ids, x_ids, d_output_ids = (
        [next(ids) for _ in jax.tree.leaves(tree)] for tree in arguments
    )
    results = iter(program.outputs)
    forward_out, d_weights_out, d_x_out = (
        [next(results) for _ in jax.tree.leaves(tree)]
        for tree in (forward_shape, weights_shape, x_shape)
    )

    anywhere, early, late = _by_dependence(program, x_ids, d_output_ids)
    in_b, rest = _needed(late, d_x_out)
    in_w, _ = _needed(rest, d_weights_out)
    made_early = _written(early) | set(x_ids)
    made_late = _written(in_b) | set(d_output_ids)
    after_b = _read(in_w) | _ids(d_weights_out)
    owed, in_w = _lighten(program, after_b & made_late, in_b, in_w)
    owed = [i for i in owed if i in made_late]  # what is early is kept for W too
    after_f = _read([*in_b, *in_w]) | _ids([*d_x_out, *d_weights_out])
    kept, in_bw = _lighten(program, after_f & made_early, early, [*in_b, *in_w])
    again = in_bw[: len(in_bw) - len(in_b) - len(in_w)]

    base = [*weight_ids, *hand_ids]

    def run(ops, inputs, outputs, values):
        needed, _ = _needed([*anywhere, *ops], outputs)
        return _evaluate(needed, dict(zip(inputs, values, strict=True)), outputs)

    def forward(weights, at_hand, x):
        found = run(
            early,
            [*base, *x_ids],
            [*forward_out, *kept],
            jax.tree.leaves((weights, at_hand, x)),
        )
        split_at = len(forward_out)
        tree = jax.tree.structure(forward_shape)
        output, measured = jax.tree.unflatten(tree, found[:split_at])
        return output, measured, found[split_at:]

    def backward(weights, at_hand, kept_values, d_output):
        found = run(
            [*again, *in_b],
            [*base, *kept, *d_output_ids],
            [*d_x_out, *owed],
            [*jax.tree.leaves((weights, at_hand)), *kept_values]
            + jax.tree.leaves(d_output),
        )
        split_at = len(d_x_out)
        d_x = jax.tree.unflatten(jax.tree.structure(x_shape), found[:split_at])
        return d_x, found[split_at:]

    def weight(weights, at_hand, kept_values, owed_values):
        found = run(
            [*again, *in_w],
            [*base, *kept, *owed],
            d_weights_out,
            [*jax.tree.leaves((weights, at_hand)), *kept_values, *owed_values],
        )
        return jax.tree.unflatten(jax.tree.structure(weights_shape), found)

    return Passes(
        forward=forward,
        backward=backward,
        weight=weight,
        kept=[program.shapes[i] for i in kept],
        owed=[program.shapes[i] for i in owed],
    )


class _Constant(NamedTuple):
    value: Any


class _Operation(NamedTuple):
    """An equation whose operands and results are values of the flat program."""

    equation: Any
    reads: tuple[int | _Constant, ...]
    writes: tuple[int, ...]
    recomputes: bool  # within a layer that is computed again, in its backward pass
    origin: Any  # JAX's note of the function that it is from


class _Program(NamedTuple):
    """Operations in order, and shapes by value."""

    operations: list[_Operation]
    inputs: list[int]
    outputs: list[int | _Constant]
    shapes: list[jax.ShapeDtypeStruct]


def _flatten(traced: Any) -> _Program:
    """Returns the traced function, with the functions that it calls written out."""
    shapes: list[jax.ShapeDtypeStruct] = []
    operations: list[_Operation] = []

    def new(variable: Any) -> int:
        aval = variable.aval
        shapes.append(jax.ShapeDtypeStruct(aval.shape, aval.dtype))
        return len(shapes) - 1

    def visit(closed: Any, inputs: Sequence[int | _Constant], recomputes: bool):
        jaxpr = closed.jaxpr
        known: dict[Any, int | _Constant] = dict(
            zip(jaxpr.constvars, map(_Constant, closed.consts), strict=True)
        )
        known |= zip(jaxpr.invars, inputs, strict=True)

        def find(atom: Any) -> int | _Constant:
            if isinstance(atom, core.Literal):
                return _Constant(atom.val)
            return known[atom]

        for equation in jaxpr.eqns:
            called = _called(equation)
            reads = tuple(map(find, equation.invars))
            if called is None:
                reads = tuple(
                    find(atom)
                    for atom in equation.invars
                    if not isinstance(atom, core.Literal)
                )
                writes = tuple(map(new, equation.outvars))
                operations.append(
                    _Operation(equation, reads, writes, recomputes, jaxpr.debug_info)
                )
            else:
                again = equation.primitive.name in _RECOMPUTED or recomputes
                writes = visit(called, reads, again)
            known |= zip(equation.outvars, writes, strict=True)
        return [find(atom) for atom in jaxpr.outvars]

    inputs = [new(variable) for variable in traced.jaxpr.invars]
    outputs = visit(traced, inputs, recomputes=False)
    return _Program(operations, inputs, outputs, shapes)


def _called(equation: Any) -> Any:
    """Returns the function that an equation does nothing but call."""
    if equation.primitive.name not in _CALLS | _RECOMPUTED:
        return None
    jaxpr = equation.params["jaxpr"]
    if isinstance(jaxpr, core.ClosedJaxpr):
        return jaxpr
    return core.ClosedJaxpr(jaxpr, ())


def _by_dependence(
    program: _Program, x_ids: Iterable[int], d_output_ids: Iterable[int]
) -> tuple[list[_Operation], list[_Operation], list[_Operation]]:
    """Divides operations by what they wait for.

    Some wait for nothing, some for the input, some for the output's gradient.

    What is computed again waits for that gradient: until then it isn't needed.
    """
    early, late = set(x_ids), set(d_output_ids)
    groups: tuple[list[_Operation], ...] = ([], [], [])
    for op in program.operations:
        reads = _ids(op.reads)
        if reads & late or (op.recomputes and reads & early):
            groups[2].append(op)
            late.update(op.writes)
        elif reads & early:
            groups[1].append(op)
            early.update(op.writes)
        else:
            groups[0].append(op)
    return groups


def _lighten(
    program: _Program,
    values: set[int],
    makers: Sequence[_Operation],
    readers: Sequence[_Operation],
) -> tuple[list[int], list[_Operation]]:
    """Returns what to hand over instead of `values`, and readers with views redone."""
    handed, again = set(values), []

    def bytes_of(i: int) -> int:
        shape = program.shapes[i]
        return math.prod(shape.shape) * shape.dtype.itemsize

    for op in reversed(makers):
        if op.equation.primitive.name not in _VIEWS or handed.isdisjoint(op.writes):
            continue
        (view,), (source,) = op.writes, _ids(op.reads)
        if source in handed or bytes_of(source) <= bytes_of(view):
            handed = handed - {view} | {source}
            again.append(op)
    return sorted(handed), [*reversed(again), *readers]


def _needed(
    operations: Sequence[_Operation], outputs: Iterable[int | _Constant]
) -> tuple[list[_Operation], list[_Operation]]:
    """Returns those of these operations that the outputs need, and the others."""
    wanted = _ids(outputs)
    needed, rest = [], []
    for op in reversed(operations):
        if wanted.isdisjoint(op.writes):
            rest.append(op)
        else:
            needed.append(op)
            wanted |= _ids(op.reads)
    return needed[::-1], rest[::-1]


def _evaluate(
    operations: Iterable[_Operation],
    values: dict[int, Any],
    outputs: Iterable[int | _Constant],
) -> list[Any]:
    def find(ref: int | _Constant) -> Any:
        return ref.value if isinstance(ref, _Constant) else values[ref]

    for op in operations:
        equation = op.equation
        variables = [v for v in equation.invars if not isinstance(v, core.Literal)]
        alone = core.Jaxpr(
            (), variables, equation.outvars, [equation], equation.effects, op.origin
        )
        run = core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))
        found = run(*map(find, op.reads))
        values.update(zip(op.writes, found, strict=True))
    return [find(ref) for ref in outputs]


def _ids(refs: Iterable[int | _Constant]) -> set[int]:
    return {ref for ref in refs if not isinstance(ref, _Constant)}


def _read(operations: Iterable[_Operation]) -> set[int]:
    return set(_flat(_ids(op.reads) for op in operations))


def _written(operations: Iterable[_Operation]) -> set[int]:
    return set(_flat(op.writes for op in operations))


def _flat(sets: Iterable[Iterable[int]]) -> Iterator[int]:
    for each in sets:
        yield from each
