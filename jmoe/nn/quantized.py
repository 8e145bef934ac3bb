"""A model's weights in fewer bits, for inference.

    native         as they are
    fp8            linear layers and routed experts as e4m3, with 128x128 blocks
    int4-experts   routed experts in 4 bits, other linear layers as `fp8`

Embedding, head, routers, norms and MTP's projections stay in any case, as DeepSeek-V3
keeps them (arXiv 2412.19437, section 3.3.1): a parameter's record says what it may be
stored in. Modules take such variables in place of arrays, and dequantize a weight where
they use it (`jmoe.ops.stored`).
"""

from typing import Any

import jax

from jmoe.config import ModelConfig
from jmoe.nn.model import parameter_records
from jmoe.nn.parameter import INT4, Parameter
from jmoe.ops import fp8, int4, stored

FORMS = ("native", "fp8", "int4-experts")


def quantize_weights(params: Any, cfg: ModelConfig, form: str) -> Any:
    """Returns `params` in one of FORMS; jit or `eval_shape` it.

    A weight's dimensions become an input and an output dimension, after those of layers
    and experts.

    Args:
      params: all of a model's, or some of the entries of its tree.

    Raises:
      ValueError: there is no such form.
    """
    check_form(form)

    def convert(record: Parameter, w: jax.Array) -> Any:
        return quantize_weight(record, w, form)

    records = parameter_records(cfg)["params"]
    return {name: jax.tree.map(convert, records[name], w) for name, w in params.items()}


def quantize_weight(record: Parameter, w: jax.Array, form: str) -> stored.Weight:
    """Returns one parameter in one of FORMS, if it may have fewer bits there."""
    if form == "native" or not record.formats:
        return w
    matrices = w.reshape(*w.shape[: record.num_lead + 1], -1)
    if form == "int4-experts" and INT4 in record.formats:
        return int4.quantize(matrices)
    return fp8.quantize(matrices, fp8.SQUARE)


def check_form(form: str) -> None:
    """Refuses what isn't one of FORMS; ValueError."""
    if form not in FORMS:
        raise ValueError(f"weights={form!r} is not one of {', '.join(FORMS)}.")
