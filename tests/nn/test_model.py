"""The model as a whole: what must not change with loop, remat, packing or dtype."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from jmoe.config import model as config
from jmoe.nn.model import Transformer, bias_paths, read_biases, with_biases
from jmoe.nn.tail import REMAT_POLICIES
from jmoe.ops import fp8

B, T = 2, 24
FIRST = 9  # tokens of each row's first document
TOKENS_BT = np.random.default_rng(1).integers(0, 48, (B, T))
SEGMENT_BT = np.tile(np.arange(T) >= FIRST, (B, 1)).astype(np.int32)

SCAN, UNROLL = ("layer_loop=scan",), ("layer_loop=unroll",)
SCAN_BLOCK = (*SCAN, "remat=block")
UNROLL_SAVE_DOTS = (*UNROLL, "remat=save_dots")


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.value_and_grad, argnums=1, has_aux=True)
def loss(cfg, variables, tokens_BT, segment_BT):
    """Cross-entropy of all depths, with everything that the model put out."""
    output = Transformer(cfg).apply(variables, tokens_BT, segment_BT)
    total = 0.0
    for k, logits in enumerate((output.logits, *output.mtp_logits), 1):
        log_p_BTV = nn.log_softmax(logits[:, :-k])
        target_BT1 = tokens_BT[:, k:, None]
        total -= jnp.take_along_axis(log_p_BTV, target_BT1, axis=-1).mean()
    return total, output


class Built(NamedTuple):
    cfg: config.ModelConfig
    variables: dict[str, Any]
    lowered: jax.stages.Lowered
    compiled: jax.stages.Compiled


@pytest.fixture(scope="module")
def build(small_config, random_variables, unstack):
    """The loss of a shape, compiled once, with the same variables in every layout.

    The shape's three MoE layers are two blocks and an MTP module.
    """
    moe_only = "num_layers=2", "num_dense_layers=0", "mtp_depth=1"

    @functools.cache
    def build(*assignments):
        cfg = small_config(*moe_only, *assignments)
        variables = random_variables(dataclasses.replace(cfg, layer_loop="scan"))
        if cfg.layer_loop == "unroll":
            variables = {name: unstack(tree) for name, tree in variables.items()}
        lowered = loss.lower(cfg, variables, TOKENS_BT, SEGMENT_BT)
        return Built(cfg, variables, lowered, lowered.compile())

    return build


@pytest.mark.parametrize("variant", [SCAN, SCAN_BLOCK, UNROLL_SAVE_DOTS], ids=" ".join)
def test_loop_and_remat_change_neither_loss_nor_gradients_nor_counts(
    build, unstack, relative_error, variant
):
    results = []
    for assignments in (UNROLL, variant):
        _, variables, _, compiled = build(*assignments)
        (value, output), gradients = compiled(variables, TOKENS_BT, SEGMENT_BT)
        load_LE = output.measured.load.load_E
        results.append((value, unstack(gradients["params"]), load_LE))
    (want, want_tree, want_LE), (got, got_tree, got_LE) = results
    assert relative_error(got, want) < 2e-6
    errors = jax.tree.map(relative_error, got_tree, want_tree)
    assert max(jax.tree.leaves(errors)) < 2e-6
    np.testing.assert_array_equal(got_LE, want_LE)


def test_remat_of_a_scanned_block_saves_memory(build):
    # Of unrolled blocks it saves some on a GPU only: XLA drops barriers on a CPU.
    full, less = (
        build(*assignments).compiled.memory_analysis().temp_size_in_bytes
        for assignments in (SCAN, SCAN_BLOCK)
    )
    assert less < 0.85 * full


def test_what_no_scan_repeats_has_a_barrier_between_its_two_passes(build):
    # Else the compiler merges them, and keeps what should be computed again.
    assert "optimization_barrier" in build(*UNROLL_SAVE_DOTS).lowered.as_text()
    mtp_alone = build(*SCAN_BLOCK).lowered.as_text()
    assert "optimization_barrier" in mtp_alone


@pytest.mark.parametrize("loop", [SCAN, UNROLL], ids=" ".join)
def test_stats_and_biases_come_in_the_order_of_the_layers(build, loop):
    cfg, variables, _, compiled = build(*loop)
    # Layer l sends every token to its own three experts.
    favours_LE = np.zeros((3, 8))
    for layer in range(3):
        favours_LE[layer, 2 * layer : 2 * layer + 3] = 1
    bias_LE = jnp.asarray(9 * favours_LE, jnp.float32)
    state = with_biases(variables["router_state"], bias_LE, cfg)
    variables = variables | {"router_state": state}
    (_, output), _ = compiled(variables, TOKENS_BT, SEGMENT_BT)
    # The MTP module's positions, but for those that no token of their document follows.
    followed = (SEGMENT_BT[:, 1:] == SEGMENT_BT[:, :-1]).sum()
    seen_L1 = np.array([[B * T], [B * T], [followed]])
    np.testing.assert_array_equal(output.measured.load.load_E, seen_L1 * favours_LE)
    for counts in output.measured.load[:3]:
        assert counts.dtype == jnp.int32
    assert output.measured.load.dropped_sending.tolist() == [0] * 3
    assert output.measured.load.dropped_receiving.tolist() == [0] * 3


@pytest.mark.parametrize("loop", config.LAYER_LOOPS)
@pytest.mark.parametrize("num_dense", [0, 1, 2])
def test_with_biases_is_the_inverse_of_read_biases(
    small_config, random_variables, loop, num_dense
):
    cfg = small_config(
        f"layer_loop={loop}", f"num_dense_layers={num_dense}", "mtp_depth=2"
    )
    state = random_variables(cfg)["router_state"]
    bias_LE = read_biases(state, cfg)
    assert bias_LE.shape == (3 - num_dense + 2, 8)
    if loop == "unroll":
        names = tuple(path[0] for path in bias_paths(cfg))
        assert names == cfg.moe_layer_names
    chex.assert_trees_all_equal(with_biases({}, bias_LE, cfg), state)
    np.testing.assert_array_equal(
        read_biases(with_biases(state, -bias_LE, cfg), cfg), -bias_LE
    )


def test_a_packed_document_gets_the_logits_it_gets_anywhere_else(build, relative_error):
    _, variables, _, compiled = build(*UNROLL)
    (_, output), _ = compiled(variables, TOKENS_BT, SEGMENT_BT)
    # The second document of row 0, moved to the front of row 1, another one after it.
    moved_BT, segment_BT = TOKENS_BT.copy(), SEGMENT_BT.copy()
    moved_BT[1] = np.roll(TOKENS_BT[0], -FIRST)
    segment_BT[1] = np.arange(T) >= T - FIRST
    (_, moved), _ = compiled(variables, moved_BT, segment_BT)
    assert relative_error(moved.logits[1, : T - FIRST], output.logits[0, FIRST:]) < 1e-5
    last = T - FIRST - 1  # the MTP module has no token to embed
    got, want = moved.mtp_logits[0][1, :last], output.mtp_logits[0][0, FIRST : T - 1]
    assert relative_error(got, want) < 1e-5


def test_a_bfloat16_model_keeps_float32_parameters_logits_and_gradients(build):
    small = (*UNROLL, "num_layers=1", "mtp_depth=0")
    _, variables, _, compiled = build(*small, "dtype=bfloat16")
    (value, output), gradients = compiled(variables, TOKENS_BT, SEGMENT_BT)
    (want, reference), _ = build(*small).compiled(variables, TOKENS_BT, SEGMENT_BT)
    np.testing.assert_allclose(value, want, rtol=0.02)
    error = np.abs(output.logits - reference.logits).mean()
    assert 1e-4 < error / np.abs(reference.logits).mean() < 0.05
    for x in jax.tree.leaves((output.logits, gradients)):
        assert x.dtype == jnp.float32 and jnp.isfinite(x).all()


def test_a_new_scanned_model_draws_each_layer_anew(small_config):
    cfg = small_config("init_std=0.05", "num_dense_layers=0")
    init = jax.jit(Transformer(cfg).init)
    key = jax.random.key(0, impl="rbg")  # threefry takes seconds to compile
    variables = nn.unbox(init(key, TOKENS_BT))
    for path, x in traverse_util.flatten_dict(variables["params"]).items():
        if path[-1] == "scale":
            assert (x == 1).all()
        else:
            np.testing.assert_allclose(x.std(), 0.05, rtol=0.2, err_msg=str(path))
    down_LEFD = variables["params"]["moe"]["moe"]["experts"]["down"]
    assert len({layer.tobytes() for layer in np.asarray(down_LEFD)}) == 3
    assert not read_biases(variables["router_state"], cfg).any()


@pytest.mark.parametrize("loop", config.LAYER_LOOPS)
def test_every_parameter_names_all_its_dimensions(small_config, loop):
    cfg = small_config(f"layer_loop={loop}", "mtp_depth=1")
    boxed = jax.eval_shape(Transformer(cfg).init, jax.random.key(0), TOKENS_BT)
    params = traverse_util.flatten_dict(boxed["params"])
    for path, box in params.items():
        assert len(box.names) == box.value.ndim, path
        stacked = loop == "scan" and path[0] in ("dense", "moe")
        assert (box.names[0] == "layers") == stacked, path


def test_an_injected_dot_general_computes_every_product_but_the_routers(small_config):
    cfg = small_config("layer_loop=unroll", "mtp_depth=1")
    seen = []

    def recording(x, kernel, dims, **options):
        seen.append(kernel.shape)
        return jax.lax.dot_general(x, kernel, dims, **options)

    recording.recipe = None
    model = Transformer(cfg, dot_general=recording)
    variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS_BT)
    params = traverse_util.flatten_dict(nn.unbox(variables["params"]))
    kernels = [
        x.shape
        for path, x in params.items()
        if path[-1] == "kernel" and path[-2] != "router"
    ]
    assert sorted(seen, key=str) == sorted(kernels, key=str)


@dataclasses.dataclass(frozen=True)
class Own:
    """A user's `dot_general`, of linear layers; the experts' is its recipe's."""

    multiply: Callable
    recipe: fp8.Recipe | None

    def __call__(self, *operands):
        return self.multiply(*operands)


def test_experts_multiply_by_the_recipe_of_an_injected_dot_general(
    small_config, random_variables
):
    cfg = small_config()
    in_fp8 = fp8.dot_general("fp8")

    def logits(dot_general):
        model = Transformer(cfg, dot_general)
        return jax.jit(model.apply)(random_variables(cfg), TOKENS_BT).logits

    native, quantized = logits(jax.lax.dot_general), logits(in_fp8)
    np.testing.assert_array_equal(logits(Own(jax.lax.dot_general, None)), native)
    np.testing.assert_array_equal(logits(Own(in_fp8, in_fp8.recipe)), quantized)
    of_experts_alone = logits(Own(jax.lax.dot_general, in_fp8.recipe))
    assert (of_experts_alone != native).any() and (of_experts_alone != quantized).any()


@pytest.mark.parametrize(
    ("dot_general", "found"),
    [
        (functools.partial(jax.lax.dot_general, precision="highest"), "it has none"),
        (Own(jax.lax.dot_general, "fp8"), "it has recipe='fp8'"),  # type: ignore
    ],
)
def test_an_injected_dot_general_that_says_nothing_of_experts_is_refused(
    small_config, dot_general, found
):
    model = Transformer(small_config(), dot_general)
    with pytest.raises(ValueError, match=f"must have an attribute `recipe`.*{found}"):
        jax.eval_shape(model.init, jax.random.key(0), TOKENS_BT)


def test_the_config_knows_the_same_remat_policies():
    assert tuple(REMAT_POLICIES) == config.REMAT_POLICIES
