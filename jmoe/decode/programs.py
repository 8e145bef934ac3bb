"""A decoder's compiled programs, on one device, with their weights and their state.

Shapes: P page, K position in a page, X slot, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jmoe.config import ModelConfig
from jmoe.decode.batch import DecodeRows, PrefillChunks
from jmoe.decode.limits import Limits, StepSize
from jmoe.decode.live import make_nobody
from jmoe.decode.step import State, StepResult, step
from jmoe.decode.weights import prepare
from jmoe.nn import block, mtp
from jmoe.parallel import collectives, compiler
from jmoe.parallel.vocabulary import AXIS


@functools.cache
def compiled_step(platform: str) -> Any:
    """Returns the step for a device of this platform."""
    return jax.jit(
        step,
        static_argnums=(0, 1),
        donate_argnums=(3,),
        compiler_options=compiler.decoder_options(platform),
    )


class OneDevice:
    """Programs of one size each, which JAX keeps by the shapes of rows and chunks.

    parts: how many devices have sequences of their own. turns: how many sets of
    sequences take turns; no sequence may take part in two steps that aren't done.
    """

    parts = 1
    turns = 1

    def __init__(self, cfg: ModelConfig, variables: Any, limits: Limits):
        self._cfg, self._limits = cfg, limits
        # JAX compiles a program again for arrays that were told where to be, as those
        # of a checkpoint; so all of them are, from the first step on.
        weights = jax.device_put(prepare(cfg, variables))
        state = make_state(cfg, limits, cfg.num_layers, self.turns)
        (device,) = weights.embedding.devices()
        self._step = compiled_step(device.platform)
        self._weights, self.state = jax.device_put((weights, state), device)

    def warm_up(self, size: StepSize) -> None:
        """Compiles steps of a size, by one in which nobody takes part."""
        self.run(*make_nobody(self._limits, self.parts, size))

    def run(self, rows: DecodeRows, chunks: PrefillChunks) -> list[StepResult]:
        """Runs a step, and returns what the steps that are done found, in their order.

        As NumPy arrays.
        """
        operands = self._weights, self.state, rows, chunks
        self.state, found = self._step(self._cfg, self._limits.top_logprobs, *operands)
        return [jax.device_get(found)]

    def flush(self) -> list[StepResult]:
        """Returns what steps that aren't done yet will have found."""
        return []


def make_state(cfg: ModelConfig, limits: Limits, num_layers: int, turns: int) -> State:
    """Returns the state of a decoder that has read nothing.

    Args:
      num_layers: that are on this device. turns: as `OneDevice` has it.
    """
    size = limits.pages * turns, limits.page_size
    layers = tuple(block.empty_cache(cfg, *size) for _ in range(num_layers))
    mtp_cache = mtp.empty_cache(cfg, *size) if limits.drafts else None
    vocab = collectives.share(cfg.vocab_size, AXIS, "vocab_size")
    return State(layers, mtp_cache, jnp.zeros((limits.slots * turns, vocab), bool))
