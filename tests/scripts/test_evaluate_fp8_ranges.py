"""What e4m3's range loses of each tensor, counted while a model computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.config import override
from jmoe.evals.fp8_ranges import count, fp8_ranges
from jmoe.ops import fp8
from jmoe.train.trained import load_trained


def with_precision(trained, precision):
    run = override(trained.run, [f"precision={precision}"])
    return trained._replace(run=run)


@pytest.fixture(scope="module")
def loaded(trained):
    return load_trained(trained)


@pytest.fixture(scope="module")
def ranges(loaded):
    return fp8_ranges(with_precision(loaded, "fp8"))


def test_numbers_are_counted_by_what_they_become():
    scale = 2.0 / 448
    smallest = scale * 2**-10  # half of a step: a tie, which becomes zero
    x = np.zeros((2, 130), np.float32)
    x[0, :6] = 2.0, -1.95, 1.9, smallest, -1.01 * smallest, 0.0
    x[1, :2] = 1e-9, 1.0
    x[1, 128] = 1e-9  # alone in its block
    flushed, others, saturated, total = count(jnp.asarray(x), fp8.ROW).tolist()
    assert (flushed, others, saturated, total) == (2, 8, 4, 260)
    # As a power of two, the first scale is 1.75 times as large, and the largest is 256.
    *_, saturated, _ = count(jnp.asarray(x), fp8.ROW, power_of_two=True).tolist()
    assert saturated == 0


def test_every_product_in_fp8_is_there_and_nothing_else(loaded, ranges):
    paths = jax.tree_util.tree_leaves_with_path(loaded.variables["params"])
    names = [[key.key for key in path] for path, _ in paths]
    linear = {"/".join(n[:-1]) for n in names if n[-1] == "kernel"}
    linear = {name for name in linear if not name.endswith("router")}
    experts = {"/".join(n[:-1]) for n in names if "experts" in n}
    assert linear and experts and set(ranges) == linear | experts
    for module, tensors in ranges.items():
        inner = {"h", "dh", "act"} if module in experts else set()
        inner |= {"h"} if module.endswith("/down") else set()
        assert set(tensors) == {"x", "w", "dy"} | inner


def test_weights_are_those_of_all_layers(loaded, ranges):
    checked = 0
    for module, tensors in ranges.items():
        variables = loaded.variables["params"]
        for name in module.split("/"):
            variables = variables[name]
        if "kernel" in variables:
            kernel = variables["kernel"]
            layers = kernel[None] if module.startswith("mtp") else kernel
            matrices = layers.reshape(*layers.shape[:2], -1)
            counts = sum(count(w, fp8.SQUARE) for w in matrices).tolist()
            assert tensors["w"] == (counts[0] / counts[1], counts[2] / counts[3])
            checked += 1
    assert checked > 10


def test_one_scale_for_a_tensor_flushes_more_of_the_gradients(loaded, ranges):
    by_tensor = fp8_ranges(with_precision(loaded, "fp8_tensor"))

    def flushed(of):
        return np.mean([tensors["dy"].flushed for tensors in of.values()])

    assert flushed(by_tensor) > 2 * flushed(ranges)


def test_few_numbers_are_the_largest_where_scales_are_powers_of_two(loaded, ranges):
    def saturated(of, name):
        return np.mean([t["x"].saturated for m, t in of.items() if m.endswith(name)])

    assert saturated(ranges, "attention/out") < 0.5 * saturated(ranges, "kv_down")
    all_of_them = fp8_ranges(with_precision(loaded, "fp8_power_of_two"))
    assert saturated(all_of_them, "kv_down") < 0.5 * saturated(ranges, "kv_down")


def test_a_run_that_is_not_in_fp8_is_refused_by_name(loaded):
    with pytest.raises(ValueError, match="precision='native' is not FP8"):
        fp8_ranges(loaded)


def test_a_run_whose_experts_choose_is_refused_by_name(loaded):
    router = dataclasses.replace(
        loaded.run.model.moe.router,
        kind="expert_choice",
        auxiliary_loss="none",
        num_groups=1,
        groups_per_token=1,
    )
    run = with_precision(loaded, "fp8").run
    moe = dataclasses.replace(run.model.moe, router=router)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, moe=moe))
    with pytest.raises(ValueError, match="measured where tokens do"):
        fp8_ranges(loaded._replace(run=run))
