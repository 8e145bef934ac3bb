"""How much of a device an engine's cache may take, and what a page of it takes."""

import dataclasses

import jax

from jmoe.config import MeshConfig, ModelConfig
from jmoe.config.serve import CPU_CACHE_GIB, EngineConfig
from jmoe.decode.limits import Limits
from jmoe.decode.programs import make_state

SHARE_OF_FREE = 0.8  # of a device's memory that the weights leave


def page_bytes(model: ModelConfig, limits: Limits, mesh: MeshConfig) -> float:
    """Returns what a page takes of a device's memory, in all of its layers."""
    one = dataclasses.replace(limits, num_pages=limits.pages_of_one)
    layers = -(-model.num_layers // mesh.pipe)
    state = jax.eval_shape(lambda: make_state(model, one, layers, 1))
    leaves = jax.tree.leaves((state.layers, state.mtp))
    return sum(x.size * x.dtype.itemsize for x in leaves) / one.pages


def cache_bytes(cfg: EngineConfig, to_come: int) -> float:
    """Returns how much of a device the cache may take.

    Args:
      to_come: bytes of weights that aren't there yet.
    """
    if cfg.cache_gib is not None:
        return cfg.cache_gib * 2**30
    stats = jax.local_devices()[0].memory_stats()
    if not stats or "bytes_limit" not in stats:  # a CPU
        return CPU_CACHE_GIB * 2**30
    free = stats["bytes_limit"] - stats["bytes_in_use"] - to_come
    return SHARE_OF_FREE * free
