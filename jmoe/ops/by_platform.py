"""An op is a kernel when compiled for a Hopper GPU, and its reference elsewhere.

Chosen when lowered, which may be for a GPU that isn't here: that must be a Hopper, or
compiling fails. GPUs that are here may be of any kind.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax import lax

PLUGIN = "jax_cuda13_plugin"
"""What compiles kernels; the `gpu` extra installs it."""

# A compute capability; older GPUs and newer ones lack what kernels use.
HOPPER = "9.0"


@functools.cache
def has_plugin() -> bool:
    """Returns whether JAX's GPU plugin is installed; it is not imported."""
    return importlib.util.find_spec(PLUGIN) is not None


def suit(devices: Iterable[Any]) -> bool:
    """Returns whether those `jax.Device`s that are GPUs can run the kernels."""
    # Only GPUs have this attribute.
    return all(getattr(x, "compute_capability", HOPPER) == HOPPER for x in devices)


def by_platform(
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    *operands: Any,
    fits: bool = True,
) -> Any:
    """Returns the kernel's result if it can be compiled, `fits`, and on a Hopper.

    Otherwise the reference's, of the same shapes. The kernel is imported by `kernel`
    when it is traced, as its module can't be where the plugin is missing.
    """
    if not (fits and has_plugin() and suit(jax.local_devices())):
        return reference(*operands)
    return lax.platform_dependent(*operands, cuda=kernel, default=reference)
