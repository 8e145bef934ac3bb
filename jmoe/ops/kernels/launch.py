"""How all kernels are launched."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

WARPGROUPS = 2  # of a block of threads that multiply; one more fetches


def launcher(
    kernel: Callable[..., None],
    name: str,
    out: Any,
    shared: Sequence[Any],
    grid: Mapping[str, int],
    *,
    cluster: int | None = None,
    warpgroups: int = WARPGROUPS + 1,
    approx_math: bool = False,
) -> Any:
    """Returns a function of arrays from a kernel of refs, out's and shared memory's.

    Args:
      out: the results' shapes and dtypes, a tree.
      shared: what a block of threads has of shared memory.
      grid: blocks, or clusters of them, by the names of their axes.
      cluster: blocks of one, along the axis "cluster"; None: there is no such axis.
      warpgroups: of a block, along the axis "warpgroup"; there is none of one.
      approx_math: whether exponentials and logarithms may be the GPU's own.
    """
    axes: dict[str, Any] = {}
    if cluster is not None:
        axes |= {"cluster": (cluster,), "cluster_names": ("cluster",)}
    if warpgroups > 1:
        axes |= {"num_threads": warpgroups, "thread_name": "warpgroup"}
    return plgpu.kernel(
        kernel,
        out_type=out,
        scratch_types=shared,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        kernel_name=name,
        # Layouts are inferred: the default from JAX 0.12 on.
        compiler_params=plgpu.CompilerParams(
            approx_math=approx_math,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        **axes,
    )
