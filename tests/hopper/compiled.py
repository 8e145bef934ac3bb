"""What the compiler for an H20 says of the kernels of a function."""

import pathlib
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from jmoe.plan import aot
from jmoe.plan.device import H20

SHARED_BYTES = 232448  # of an SM's memory, that a block of threads may have


class Kernel(NamedTuple):
    """One of them."""

    name: str
    products: list[str]  # tensor cores' instructions
    spills: list[int]  # bytes
    shared_bytes: int
    is_serialized: bool  # products wait for each other

    def check(self):
        """Asserts that it multiplies, and has what it needs."""
        assert self.products
        assert self.spills == [0, 0], self  # stores and loads
        assert self.shared_bytes <= SHARED_BYTES
        assert not self.is_serialized


def compile_text(function, *shapes) -> Any:
    """The compiled program's text, for arrays of these shapes and dtypes."""
    return compile_tree(function, [jax.ShapeDtypeStruct(*shape) for shape in shapes])


def compile_tree(function, arguments) -> Any:
    """The same, for arguments that are trees of `jax.ShapeDtypeStruct`."""
    mesh = jax.sharding.Mesh(np.array(aot.absent_devices(H20, 1)), ("device",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arrays = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), arguments
    )
    return jax.jit(function).lower(*arrays).compile().as_text()


def read(path: pathlib.Path) -> Kernel:
    """From what was dumped of it to files of this name."""
    ptx, ptxas, passes = (
        path.with_name(path.name + suffix).read_text()
        for suffix in (".ptx", ".ptxas", ".mlir-passes.log")
    )
    shared = re.findall(r"dynamic_shared_memory_size %c(\d+)_i32", passes)
    return Kernel(
        name=path.name,
        products=re.findall(r"wgmma\.mma_async[\w.]*", ptx),
        spills=[int(n) for n in re.findall(r"(\d+) bytes spill", ptxas)],
        shared_bytes=max(map(int, shared)),
        is_serialized="instructions are serialized" in ptxas,
    )
