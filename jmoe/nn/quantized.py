"""A model's weights in fewer bits, for inference.

    native         as they are
    fp8            linear layers and routed experts as e4m3, with 128x128 blocks
    int4-experts   routed experts in 4 bits, other linear layers as `fp8`

Embedding, head, routers and norms stay in any case, as DeepSeek-V3 keeps them
(arXiv 2412.19437, section 3.3.1). Modules take such variables in place of arrays, and
dequantize a weight where they use it (`jmoe.ops.stored`).
"""

from typing import Any

import jax

from jmoe.config import ModelConfig
from jmoe.nn.model import is_of_layer
from jmoe.ops import fp8, int4

FORMS = ("native", "fp8", "int4-experts")


def quantize_weights(params: Any, cfg: ModelConfig, form: str) -> Any:
    """`params` in one of FORMS; jit or `eval_shape` it.

    A weight's dimensions become an input and an output dimension, after those of layers
    and experts.

    Raises:
      ValueError: there is no such form.
    """
    if form not in FORMS:
        raise ValueError(f"weights={form!r} is not one of {', '.join(FORMS)}.")

    def convert(path: Any, w: jax.Array) -> Any:
        names = [key.key for key in path]
        of_experts = "experts" in names
        is_linear = names[-1] == "kernel" and "router" not in names
        if form == "native" or not (of_experts or is_linear):
            return w
        lead = of_experts + _is_stacked(path, cfg)
        matrices = w.reshape(*w.shape[: lead + 1], -1)
        if of_experts and form == "int4-experts":
            return int4.quantize(matrices)
        return fp8.quantize(matrices, fp8.SQUARE)

    return jax.tree.map_with_path(convert, params)


def _is_stacked(path: Any, cfg: ModelConfig) -> bool:
    """Whether the weight has a first dimension of layers."""
    is_mtp = path[0].key.startswith("mtp")
    return cfg.layer_loop == "scan" and is_of_layer(path) and not is_mtp
