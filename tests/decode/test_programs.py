"""A decoder's programs: each size is compiled once, wherever its weights come from."""

import jax
import numpy as np

from jmoe.decode import programs
from jmoe.decode.limits import Limits, StepSize
from jmoe.decode.live import make_nobody
from jmoe.decode.programs import OneDevice

LIMITS = Limits(rows=(1,), chunks=(16,), max_length=64)


def test_a_size_is_compiled_once_for_weights_of_a_host_and_of_a_checkpoint(
    cfg, variables
):
    placed = jax.device_put(variables, jax.devices()[0])  # as a checkpoint's are
    given = make_nobody(LIMITS, 1, StepSize(1))
    step = programs.compiled_step(jax.default_backend())
    step.clear_cache()
    for weights in (variables, jax.tree.map(np.asarray, variables), placed):
        made = OneDevice(cfg, weights, LIMITS)
        for _ in range(2):
            made.run(*given)
    assert step._cache_size() == 1
