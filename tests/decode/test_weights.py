"""A decoder's weights: what of them is computed once."""

import jax
import numpy as np

from jmoe.decode.weights import prepare
from jmoe.nn.quantized import quantize_weights


def test_each_block_has_what_its_attention_computes_of_its_parameters_once(
    cfg, variables
):
    weights = prepare(cfg, variables)
    of_mtp = {name: weights.mtp[name]["block"] for name in ("params", "prepared")}
    for layer in (*weights.layers, of_mtp):
        kernel_CHX = layer["params"]["attention"]["kv_up"]["kernel"]
        made = layer["prepared"]["attention"]
        key_CHX = made["key"].swapaxes(0, 1)
        value_CHX = made["value"].transpose(2, 0, 1)
        halves = np.concatenate([key_CHX, value_CHX], axis=-1)
        np.testing.assert_array_equal(halves, kernel_CHX)


def test_weights_in_fewer_bits_stay_in_these(cfg, variables):
    params = quantize_weights(variables["params"], cfg, "fp8")
    weights = prepare(cfg, {**variables, "params": params})
    assert not jax.tree.leaves([layer["prepared"] for layer in weights.layers])
