"""What is in a traced program."""

from collections.abc import Iterator

import jax
from jax.extend import core


def equations(
    jaxpr: core.Jaxpr, inside: tuple[str, ...] = ()
) -> Iterator[tuple[core.JaxprEqn, tuple[str, ...]]]:
    """All equations, also of the functions that it calls; what each is inside of."""
    for equation in jaxpr.eqns:
        yield equation, inside
        for part in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr),
        ):
            if isinstance(part, core.ClosedJaxpr):
                part = part.jaxpr
            if isinstance(part, core.Jaxpr):
                yield from equations(part, (*inside, equation.primitive.name))
