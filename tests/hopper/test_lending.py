"""Plans of lending, compiled for an H20: they cost a few small kernels."""

import functools

import jax.numpy as jnp
import pytest

from jmoe.balance import lending
from jmoe.plan import hlo
from tests.hopper.compiled import compile_text

pytestmark = pytest.mark.hopper

# What is no kernel: it moves nothing.
FREE = {"bitcast", "constant", "get-tuple-element", "parameter", "tuple"}


def kernels(text: str) -> list[str]:
    """Returns the opcodes of all that runs, each as often as it does."""
    return [
        instruction.opcode
        for executed in hlo.parse(text).executed()
        for instruction in executed.instructions * executed.times
        if instruction.opcode not in FREE
    ]


@pytest.mark.parametrize(("devices", "devices_per_node"), [(8, None), (16, 8), (64, 8)])
def test_a_plan_at_v3s_shape_takes_at_most_twenty_kernels(devices, devices_per_node):
    plan = functools.partial(lending.plan, slots=4, devices_per_node=devices_per_node)
    found = kernels(compile_text(plan, ((devices, 256), jnp.int32)))
    assert 5 < len(found) <= 20
    assert set(found) == {"fusion"}  # no loop, and nothing from a library
