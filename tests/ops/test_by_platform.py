"""When an op is a kernel. What kernels compute is tested beside their references."""

import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from jmoe.ops import by_platform as choice


class Device(NamedTuple):
    platform: str
    compute_capability: str = ""


CPU, HOPPER = Device("cpu"), Device("gpu", "9.0")
AMPERE, BLACKWELL = Device("gpu", "8.0"), Device("gpu", "10.0")


@pytest.mark.parametrize(
    ("devices", "suits"),
    [
        ([CPU], True),  # what is compiled there for a GPU is for a Hopper
        ([HOPPER, HOPPER], True),
        ([AMPERE], False),
        ([BLACKWELL], False),
        ([HOPPER, AMPERE], False),
    ],
)
def test_kernels_are_for_hoppers_alone(devices, suits):
    assert choice.suit(devices) == suits


@pytest.mark.parametrize(
    ("needs", "fits", "suits", "is_kernel"),
    [
        ("pytest", True, True, True),
        ("a_package_that_is_not_there", True, True, False),
        ("pytest", False, True, False),
        ("pytest", True, False, False),
    ],
)
def test_a_kernel_is_lowered_where_it_can_run_and_else_its_reference(
    needs, fits, suits, is_kernel, monkeypatch
):
    monkeypatch.setattr(choice, "suit", lambda devices: suits)

    def op(x):
        return choice.by_platform(jnp.sin, jnp.cos, x, needs=needs, fits=fits)

    traced = jax.jit(op).trace(1.0)
    lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert ("stablehlo.sine" in lowered) == is_kernel
    assert ("stablehlo.cosine" in lowered) != is_kernel


def test_elsewhere_it_is_the_reference():
    got = choice.by_platform(jnp.sin, jnp.cos, 1.0, needs="pytest")
    assert got == jnp.cos(1.0)


def test_a_package_is_found_and_not_imported():
    assert choice.has("antigravity")
    assert "antigravity" not in sys.modules
