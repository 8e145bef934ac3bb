"""When an op is a kernel. What kernels compute is tested beside their references."""

import sys
import types

import jax
import jax.numpy as jnp
import pytest

from jmoe.ops import by_platform as choice

HOPPER, AMPERE, BLACKWELL = (
    types.SimpleNamespace(compute_capability=number)
    for number in ("9.0", "8.0", "10.0")
)


@pytest.mark.parametrize(
    ("devices", "suits"),
    [
        ([HOPPER, HOPPER], True),
        ([AMPERE], False),
        ([BLACKWELL], False),
        ([HOPPER, AMPERE], False),
    ],
)
def test_kernels_are_for_hoppers_alone(devices, suits):
    assert choice.suit(devices) == suits


@pytest.mark.parametrize(
    ("has_plugin", "fits", "suits", "is_kernel"),
    [
        (True, True, True, True),
        (False, True, True, False),
        (True, False, True, False),
        (True, True, False, False),
    ],
)
def test_a_kernel_is_lowered_where_it_can_run_and_else_its_reference(
    has_plugin, fits, suits, is_kernel, monkeypatch
):
    monkeypatch.setattr(choice, "suit", lambda devices: suits)
    monkeypatch.setattr(choice, "has_plugin", lambda: has_plugin)

    def op(x):
        return choice.by_platform(jnp.sin, jnp.cos, x, fits=fits)

    traced = jax.jit(op).trace(1.0)
    lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert ("stablehlo.sine" in lowered) == is_kernel
    assert ("stablehlo.cosine" in lowered) != is_kernel


def test_without_a_gpu_what_is_compiled_for_one_is_for_a_hopper():
    assert choice.suit(jax.devices())


def test_elsewhere_it_is_the_reference(monkeypatch):
    monkeypatch.setattr(choice, "has_plugin", lambda: True)
    got = choice.by_platform(jnp.sin, jnp.cos, 1.0)
    assert got == jnp.cos(1.0)


def test_the_plugin_is_found_and_not_imported(monkeypatch):
    monkeypatch.setattr(choice, "PLUGIN", "antigravity")
    assert choice.has_plugin.__wrapped__()
    assert "antigravity" not in sys.modules
