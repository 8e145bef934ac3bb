"""How XLA is asked to compile a step."""

from typing import Any

GPU_OPTIONS: dict[str, Any] = {
    # Collectives start early and end late, with work between.
    "xla_gpu_enable_latency_hiding_scheduler": True,
    # With one under way at a time, a token exchange ends when the next one starts.
    "xla_gpu_experimental_parallel_collective_overlap_limit": 4,
    # Merging the products of two chunks would make each wait for both.
    "xla_gpu_dot_merger_threshold_mb": 0,
    # So would merging the collectives of two microbatches in a pipeline's tick.
    "xla_gpu_all_gather_combine_threshold_bytes": 0,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 0,
}


# On CPUs a decoder's products are sums (`jmoe.ops.grouped_few`), in vectors as wide as
# cores have them; by default XLA takes half of AVX-512's.
CPU_DECODER_OPTIONS: dict[str, Any] = {"xla_cpu_prefer_vector_width": 512}


def options(platform: str) -> dict[str, Any]:
    """Returns `compiler_options` of `jax.jit` for training on this platform."""
    return dict(GPU_OPTIONS) if platform in ("gpu", "cuda") else {}


def decoder_options(platform: str) -> dict[str, Any]:
    """Returns `compiler_options` of `jax.jit` for a decoder's steps."""
    return dict(CPU_DECODER_OPTIONS) if platform == "cpu" else {}
