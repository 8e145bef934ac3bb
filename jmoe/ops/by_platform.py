"""An op is a kernel when compiled for a GPU, and its reference elsewhere.

Chosen when lowered, which may be for a GPU that isn't here.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

from jax import lax

# What must be installed, both by the `gpu` extra:
OURS = "jax_cuda13_plugin"  # for kernels of jmoe's own
TOKAMAX = "tokamax"


@functools.cache
def has(package: str) -> bool:
    """Whether it is installed; it is not imported."""
    return importlib.util.find_spec(package) is not None


def by_platform(
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    *operands: Any,
    needs: str,
    fits: bool = True,
) -> Any:
    """The kernel's result if what it `needs` is there, it `fits`, and on a GPU.

    Otherwise the reference's, of the same shapes. The kernel is imported by `kernel`
    when it is traced, as its module can't be where the package is missing.
    """
    if not (has(needs) and fits):
        return reference(*operands)
    return lax.platform_dependent(*operands, cuda=kernel, default=reference)
