"""Compiled programs, of which a process can hold a limited number.

Each program that XLA compiles for CPUs has memory mappings of its own: some ten of
them. Linux gives a process 65,530 by default, and at that number the next program ends
it by SIGSEGV. Training compiles a few programs; a notebook, a server or a suite of
tests that compiles ever new shapes gets there in hours.
"""

import gc
import pathlib

import jax
from absl import logging

MAPPINGS = pathlib.Path("/proc/self/maps")
LIMIT = pathlib.Path("/proc/sys/vm/max_map_count")


def make_room(share: float = 0.5) -> bool:
    """Frees all compiled programs once mappings exceed a share of the kernel's limit.

    Call it between pieces of work. What is called again is compiled again, or read from
    the directory that JAX keeps programs in, if it has one. A warning says what
    happened, and what would help. Where the system doesn't tell, it does nothing.

    Args:
      share: of the limit, in (0, 1).

    Returns:
      Whether programs were freed.
    """
    if not LIMIT.exists():
        return False
    limit, before = int(LIMIT.read_text()), count_mappings()
    if before <= share * limit:
        return False
    jax.clear_caches()
    gc.collect()
    logging.warning(
        "This process had %s memory mappings, most of them of compiled programs, and "
        "would end by SIGSEGV at %s. All programs were freed, which leaves %s. Fewer "
        "shapes, or `sysctl -w vm.max_map_count=%d`, make this rarer.",
        f"{before:,}",
        f"{limit:,}",
        f"{count_mappings():,}",
        4 * limit,
    )
    return True


def count_mappings() -> int:
    """Returns this process's number of memory mappings; 0 where it can't be known."""
    return MAPPINGS.read_bytes().count(b"\n") if MAPPINGS.exists() else 0
