"""The whole decoder: embedding, dense blocks, MoE blocks, norm, head, MTP modules.

Shapes: B batch, T position, S this device's positions, D hidden, V vocabulary, L MoE
layer (the model's, then one for each MTP module), E expert.

The same code is the whole model on one device and, inside of `jax.shard_map` over a
mesh, one device's part of it. There, tokens are of all positions T, what is computed of
them is of S = T / tensor positions, and parameters are this device's parts.

Variables are `params` and `router_state`; the latter holds each MoE layer's selection
bias, is float32, and sees neither gradients nor the optimizer.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from jmoe.config import ModelConfig
from jmoe.config.model import Stack
from jmoe.nn.block import Block, Positions, positions
from jmoe.nn.linear import DotGeneral
from jmoe.nn.measured import Measured, join
from jmoe.nn.measured import stack as stack_measured
from jmoe.nn.noise import Noise
from jmoe.nn.parameter import Parameter, normal_param, records
from jmoe.nn.tail import Features, GatherLayer, Tail, prepare
from jmoe.ops import dot
from jmoe.parallel import collectives
from jmoe.parallel.vocabulary import embed


class Output(NamedTuple):
    """float32 logits [B, T, V], those of the MTP modules, and what layers measured."""

    logits: jax.Array
    mtp_logits: tuple[jax.Array, ...]
    measured: Measured


class Transformer(nn.Module):
    """`init(key, tokens_BT) -> variables`; `apply(variables, tokens_BT) -> Output`.

    `dot_general` is what linear layers multiply by: JAX's, one of
    `jmoe.ops.fp8.dot_general`, or a user's own, whose attribute `recipe` says by what
    routed experts multiply (`fp8.recipe_of`).

    `gather_layer` is for parameters that are divided further than the layers compute
    with them: it is called for one layer at a time, and again in its backward pass if
    that recomputes.
    """

    cfg: ModelConfig
    dot_general: DotGeneral = dot.dot_general
    gather_layer: GatherLayer | None = None

    def __call__(
        self,
        tokens_BT: jax.Array,
        segment_BT: jax.Array | None = None,
        is_real_BT: jax.Array | None = None,
    ) -> Output:
        """Returns one device's logits, for short sequences and small vocabularies."""
        features = self.features(tokens_BT, segment_BT, is_real_BT)

        def logits(hidden_BTD):
            head_DV = features.head_DV.astype(hidden_BTD.dtype)
            return jnp.dot(hidden_BTD, head_DV, preferred_element_type=jnp.float32)

        mtp_logits = tuple(map(logits, features.mtp_BSD))
        return Output(logits(features.hidden_BSD), mtp_logits, features.measured)

    @nn.compact
    def features(
        self,
        tokens_BT: jax.Array,
        segment_BT: jax.Array | None = None,
        is_real_BT: jax.Array | None = None,
        noise: Noise | None = None,
        choice_BLTK: jax.Array | None = None,
    ) -> Features:
        """Returns the final hidden states.

        Args:
          segment_BT: int32, documents that attention is confined to; None: it isn't.
          is_real_BT: bool, False for padding, which follows a row's last token, visits
            no expert and is in no count; None: there is no padding.
          noise: where random numbers come from, in training; None: there are none.
          choice_BLTK: int32, the experts that each MoE layer is to take, if the router
            is to be told (`nn.choices.replayed`).
        """
        cfg = self.cfg
        vocab = collectives.share(cfg.vocab_size, "tensor", "vocab_size")
        shape = (vocab, cfg.hidden_dim)
        # Tied, it is the head too.
        record = Parameter(dims=("vocab", "embed"), is_table=not cfg.tie_embeddings)
        table_VD = normal_param(self, "embedding", shape, cfg.init_std, record)
        known = positions(cfg, tokens_BT, segment_BT, is_real_BT, noise, choice_BLTK)
        x_BSD = embed(table_VD, tokens_BT, cfg.dtype)
        found = []
        for name, stack in cfg.stacks.items():
            x_BSD, measured = self._layers(name, stack, x_BSD, known)
            found.append(measured)
        tail = Tail(cfg, self.dot_general, self.gather_layer)
        nn.share_scope(self, tail)
        features = tail(x_BSD, table_VD, tokens_BT, known)
        return features._replace(measured=join(*found, features.measured))

    def _layers(
        self, name: str, stack: Stack, x_BSD: jax.Array, known: Positions
    ) -> tuple[jax.Array, Measured]:
        """Returns what blocks in a row compute, and what they measured, stacked."""
        gather = None if self.is_initializing() else self.gather_layer
        number_L = jnp.array(stack.layers, jnp.int32)
        if self.cfg.layer_loop == "scan":
            scanned: Any = nn.scan(
                prepare(Block, name, self.cfg, gather, scanned=True),
                variable_axes={"params": 0, "router_state": 0, "intermediates": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0),  # type: ignore[arg-type]
                length=stack.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            layers = scanned.of(
                self.cfg, stack.feed_forward, self.dot_general, name=name
            )
            return layers(x_BSD, known, number_L)
        measured = []
        for i, number in enumerate(number_L):
            own_name = f"{name}_{i}"
            block: Any = prepare(Block, own_name, self.cfg, gather, scanned=False)
            layer = block.of(
                self.cfg, stack.feed_forward, self.dot_general, name=own_name
            )
            x_BSD, found = layer(x_BSD, known, number)
            measured.append(found)
        return x_BSD, stack_measured(measured)


def init_variables(model: Transformer, seed: int) -> Any:
    """Returns a new model's collections, in boxes with their parameters' records."""
    return model.init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))


def make_variables(model: Transformer, seed: int) -> dict[str, Any]:
    """Returns a new model's `params` and `router_state`; jit or `eval_shape` it."""
    return meta.unbox(init_variables(model, seed))


@functools.lru_cache(maxsize=16)
def abstract_boxes(cfg: ModelConfig) -> Any:
    """Returns a model's collections without values, in boxes with records."""
    return jax.eval_shape(functools.partial(init_variables, Transformer(cfg), 0))


def abstract_variables(cfg: ModelConfig) -> Any:
    """Returns a model's variables without values."""
    return meta.unbox(abstract_boxes(cfg))


def parameter_records(cfg: ModelConfig) -> Any:
    """Returns a `Parameter` for each variable, as a tree like the collections."""
    return records(abstract_boxes(cfg))


def layer_names(cfg: ModelConfig) -> tuple[str, ...]:
    """Returns which of the model's submodules are layers, or stacks of them."""
    counts = {name: stack.num_layers for name, stack in cfg.stacks.items()}
    unrolled = [f"{name}_{i}" for name in counts for i in range(counts[name])]
    main = counts if cfg.layer_loop == "scan" else unrolled
    return (*main, *(f"mtp_{k}" for k in range(cfg.mtp_depth)))


def moe_layers(cfg: ModelConfig) -> dict[tuple[str, ...], int | slice]:
    """Returns where modules with experts are, and which of the loads' layers they are.

    One of a stack is all its layers, a slice.
    """
    count = cfg.num_moe_layers
    found: dict[tuple[str, ...], int | slice]
    if cfg.layer_loop == "scan":
        found = {("moe", "moe"): slice(0, count)}
    else:
        found = {(f"moe_{i}", "moe"): i for i in range(count)}
    tail = range(cfg.mtp_depth)
    return found | {(f"mtp_{k}", "block", "moe"): count + k for k in tail}


# Where in `router_state` such a module has what.
_BIAS, _LOAD, _HOME = ("router", "bias"), ("router", "load"), ("experts", "home")


def bias_paths(cfg: ModelConfig) -> list[tuple[str, ...]]:
    """Returns where the biases are in `router_state`, in the order of loads' layers."""
    return [(*path, *_BIAS) for path in moe_layers(cfg)]


def read_biases(router_state: Any, cfg: ModelConfig) -> jax.Array:
    """Returns every MoE layer's selection bias, float32 [L, E]."""
    bias_LE = _read(router_state, _BIAS, cfg)
    assert bias_LE is not None, "a router has biases"
    return bias_LE


def read_homes(router_state: Any, cfg: ModelConfig) -> jax.Array | None:
    """Returns where experts live, int32 [L, E]; None: in order (`balance.homes`)."""
    return _read(router_state, _HOME, cfg)


def with_biases(router_state: Any, bias_LE: jax.Array, cfg: ModelConfig) -> Any:
    """Returns `router_state` with these biases, float32 [L, E]."""
    return _with(router_state, _BIAS, bias_LE, cfg)


def with_loads(router_state: Any, load_LE: jax.Array, cfg: ModelConfig) -> Any:
    """Returns `router_state` with the counts of a whole step beside the biases.

    A loss that counts over all microbatches reads them (`balance.losses`).
    """
    return _with(router_state, _LOAD, load_LE, cfg)


def with_homes(router_state: Any, home_LE: jax.Array, cfg: ModelConfig) -> Any:
    """Returns `router_state` with experts' homes, int32 [L, E]."""
    return _with(router_state, _HOME, home_LE, cfg)


def _read(
    router_state: Any, name: tuple[str, str], cfg: ModelConfig
) -> jax.Array | None:
    found = []
    for path in moe_layers(cfg):
        node = router_state
        for key in (*path, *name):
            node = node.get(key)
            if node is None:
                return None
        found.append(node.reshape(-1, cfg.moe.router.num_experts))
    return jnp.concatenate(found)


def _with(
    router_state: Any, name: tuple[str, str], value_LE: jax.Array, cfg: ModelConfig
) -> Any:
    """Returns a copy of the tree with other rows at each module with experts."""
    state = jax.tree.map(lambda x: x, router_state)
    module, leaf = name
    for path, rows in moe_layers(cfg).items():
        node = state
        for key in (*path, module):
            node = node.setdefault(key, {})
        node[leaf] = value_LE[rows]
    return state
