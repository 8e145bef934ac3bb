"""Plans of lending, compiled for an H20: they cost a few small kernels."""

import functools

import jax.numpy as jnp
import pytest

from jmoe.balance import lending
from jmoe.plan import decision, hlo, programs
from tests.hopper.compiled import compile_text

pytestmark = pytest.mark.hopper


@pytest.mark.parametrize(("devices", "devices_per_node"), [(8, None), (16, 8), (64, 8)])
def test_a_plan_at_v3s_shape_takes_at_most_twenty_kernels(devices, devices_per_node):
    plan = functools.partial(lending.plan, slots=4, devices_per_node=devices_per_node)
    found = hlo.parse(compile_text(plan, ((devices, 256), jnp.int32))).kernels()
    assert 5 < len(found) <= 20
    # There is no loop, and nothing from a library.
    assert {kernel.opcode for kernel in found} == {"fusion"}


def test_a_plan_takes_a_thousandth_of_its_layers_least_time():
    """At 148 TFLOP/s, 4,096 tokens through 9 experts of V3 take 66 ms both ways."""
    cost = decision.plan_cost(programs.LAYERS["v3_layer_8_balanced"]())
    assert cost.kernels <= 20
    assert cost.floor_seconds == pytest.approx(0.0658, rel=0.01)
    assert cost.seconds <= 0.001 * cost.floor_seconds
