"""Which tensor of a `DeepseekV3ForCausalLM` is which piece of our variables.

The tables below are the only place where the two are matched; export and import both
expand them. A name of ours is a path in `params` or `router_state`, one of Hugging
Face's is what its checkpoints say. What the expansion adds:

- a stack of layers (`layer_loop="scan"`) and a stack of experts are sliced one by one;
- a fused gate and up projection, which has a dimension of 2, is two tensors;
- a kernel [in, ...] becomes a matrix [out, in].

`model.layers.{num_layers + k}` is MTP module k, with our `project` as its `eh_proj`:
both concatenate the embedding's half before the hidden state's. Embedding and head are
repeated there, as in DeepSeek's own checkpoint.

What is stored in FP8 where anything is: the matrices of attention and of all MLPs.
Embedding, head, norms, routers and `eh_proj` stay bfloat16, selection biases float32.
That, too, is DeepSeek's choice: with it, V3 has the 91,991 tensors that were published.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from jmoe.checkpoint import manifest
from jmoe.config import ModelConfig
from jmoe.nn.model import Transformer, make_variables

# In a block, each a matrix product: {our path: their name, or those of its two halves}.
PRODUCTS = {
    "attention/query/kernel": "self_attn.q_proj.weight",
    "attention/query_down/kernel": "self_attn.q_a_proj.weight",
    "attention/query_up/kernel": "self_attn.q_b_proj.weight",
    "attention/kv_down/kernel": "self_attn.kv_a_proj_with_mqa.weight",
    "attention/kv_up/kernel": "self_attn.kv_b_proj.weight",
    "attention/out/kernel": "self_attn.o_proj.weight",
    "mlp/gate_up/kernel": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp/down/kernel": "mlp.down_proj.weight",
    "moe/shared/gate_up/kernel": (
        "mlp.shared_experts.gate_proj.weight",
        "mlp.shared_experts.up_proj.weight",
    ),
    "moe/shared/down/kernel": "mlp.shared_experts.down_proj.weight",
    "moe/experts/gate_up": (
        "mlp.experts.{expert}.gate_proj.weight",
        "mlp.experts.{expert}.up_proj.weight",
    ),
    "moe/experts/down": "mlp.experts.{expert}.down_proj.weight",
}
# In a block, what keeps its precision.
SMALL = {
    "attention_norm/scale": "input_layernorm.weight",
    "attention/query_norm/scale": "self_attn.q_a_layernorm.weight",
    "attention/kv_norm/scale": "self_attn.kv_a_layernorm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "moe/router/kernel": "mlp.gate.weight",
    "moe/router/bias": "mlp.gate.e_score_correction_bias",
}
# In an MTP module, beside its block.
MTP = {
    "embedding_norm/scale": "enorm.weight",
    "hidden_norm/scale": "hnorm.weight",
    "project/kernel": "eh_proj.weight",
    "norm/scale": "shared_head.norm.weight",
}
# In the model, and under which name in each MTP module.
MODEL = {
    "embedding": ("model.embed_tokens.weight", "embed_tokens.weight"),
    "final_norm/scale": ("model.norm.weight", None),
    "head": ("lm_head.weight", "shared_head.head.weight"),
}
ROWS_FIRST = ("embedding",)  # already [out, in]
COLLECTIONS = ("params", "router_state")

ALL = slice(None)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One tensor of a Hugging Face checkpoint, and the piece of our variables it holds.

    shape is theirs; layer, expert and half select the piece of the leaf at `path`.
    """

    name: str
    shape: tuple[int, ...]
    path: str  # "params/moe/attention/out/kernel"
    layer: int | None = None
    expert: int | None = None
    half: int | None = None  # of a fused pair
    transposed: bool = False  # the piece, as [in, out], is their transpose
    is_product: bool = False  # may be stored in FP8
    is_copy: bool = False  # repeats a tensor that belongs to the model

    @property
    def is_float32(self) -> bool:
        """Whether it has float32 whatever the rest has."""
        return self.path.startswith("router_state/")

    @property
    def index(self) -> tuple[int | slice, ...]:
        """Of the piece in the leaf."""
        lead = tuple(i for i in (self.layer, self.expert) if i is not None)
        return lead if self.half is None else (*lead, ALL, self.half)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def expand(cfg: ModelConfig) -> list[Tensor]:
    """Every tensor of the checkpoint of `cfg`, layer by layer."""
    leaves = abstract_leaves(cfg)
    tensors = list(_expand(cfg, leaves))
    assert {tensor.path for tensor in tensors} == leaves.keys(), "a leaf has no name"
    return tensors


def redundant(cfg: ModelConfig) -> list[Tensor]:
    """What a checkpoint may repeat and ours never do: the head of tied embeddings."""
    if not cfg.tie_embeddings:
        return []
    copies = _rows(abstract_leaves(cfg), "embedding", MODEL["head"][0])
    return [dataclasses.replace(copy, is_copy=True) for copy in copies]


@functools.lru_cache(maxsize=4)
def abstract_leaves(cfg: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """The model's variables by path, without their values."""
    return manifest.flatten(abstract_variables(cfg))


def abstract_variables(cfg: ModelConfig) -> Any:
    """The model's variables, without their values."""
    return jax.eval_shape(functools.partial(make_variables, Transformer(cfg), seed=0))


def _expand(cfg: ModelConfig, leaves: Mapping[str, Any]) -> Iterator[Tensor]:
    for ours, (theirs, _) in MODEL.items():
        yield from _rows(leaves, ours, theirs)
    for number in range(cfg.num_layers):
        block, layer = _block(cfg, number)
        yield from _block_rows(leaves, block, f"model.layers.{number}", layer)
    for depth in range(cfg.mtp_depth):
        ours, theirs = f"mtp_{depth}", f"model.layers.{cfg.num_layers + depth}"
        for inside, name in MTP.items():
            yield from _rows(leaves, f"{ours}/{inside}", f"{theirs}.{name}")
        yield from _block_rows(leaves, f"{ours}/block", theirs, None)
        head = "embedding" if cfg.tie_embeddings else "head"
        for path, name in (("embedding", "embedding"), (head, "head")):
            copies = _rows(leaves, path, f"{theirs}.{MODEL[name][1]}")
            yield from (dataclasses.replace(copy, is_copy=True) for copy in copies)


def _block(cfg: ModelConfig, number: int) -> tuple[str, int | None]:
    """Where the layer is: in which module, and where in its stack."""
    dense = number < cfg.num_dense_layers
    kind = "dense" if dense else "moe"
    position = number if dense else number - cfg.num_dense_layers
    if cfg.layer_loop == "scan":
        return kind, position
    return f"{kind}_{position}", None


def _block_rows(
    leaves: Mapping[str, Any], ours: str, theirs: str, layer: int | None
) -> Iterator[Tensor]:
    for inside, name in (SMALL | PRODUCTS).items():
        pair = (name,) if isinstance(name, str) else name
        yield from _rows(
            leaves,
            f"{ours}/{inside}",
            *(f"{theirs}.{part}" for part in pair),
            layer=layer,
            is_product=inside in PRODUCTS,
        )


def _rows(
    leaves: Mapping[str, Any],
    ours: str,
    *theirs: str,
    layer: int | None = None,
    is_product: bool = False,
) -> Iterator[Tensor]:
    """What a row of a table stands for; nothing where the model has no such leaf."""
    for path in (f"{collection}/{ours}" for collection in COLLECTIONS):
        if path not in leaves:
            continue
        shape = leaves[path].shape[layer is not None :]
        experts: Sequence[int | None] = [None]
        if "{expert}" in theirs[0]:
            experts, shape = range(shape[0]), shape[1:]
        if len(theirs) == 2:
            shape = (shape[0], *shape[2:])
        transposed = len(shape) > 1 and ours not in ROWS_FIRST
        if transposed:
            shape = (math.prod(shape[1:]), shape[0])
        for expert, (half, name) in itertools.product(experts, enumerate(theirs)):
            yield Tensor(
                name=name.format(expert=expert),
                shape=tuple(shape),
                path=path,
                layer=layer,
                expert=expert,
                half=half if len(theirs) == 2 else None,
                transposed=transposed,
                is_product=is_product,
            )
