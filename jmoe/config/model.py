"""The model's shape: layers, experts, router, balancing rule.

Every record is frozen, keyword-only and checks itself, so that an impossible shape is
refused before anything is compiled. Names follow DeepSeek-V2 (arXiv 2405.04434) and
DeepSeek-V3 (arXiv 2412.19437); `jmoe.families` maps them to Hugging Face's.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jmoe.config import checks
from jmoe.config.attention import AttentionConfig

DTYPES = ("float32", "bfloat16")
SCORES = ("sigmoid", "softmax", "sqrt_softplus")
GROUP_SCORES = ("top2_sum", "max")
REMAT_POLICIES = ("none", "block", "save_dots")
LAYER_LOOPS = ("scan", "unroll")
EXPERT_BACKENDS = ("auto", "blocks", "ragged")
EXPERT_REMATS = ("none", "activations")
EXCHANGES = ("padded", "ragged", "gather", "balanced")
DROP_ORDERS = ("score", "position")
ACTIVATIONS, FLOAT8 = WIRE_DTYPES = "activations", "float8_e4m3fn"
UPDATE_RULES = ("sign", "sign_centered", "proportional", "quantile")
MARGIN_RULES = ("quantile",)  # they need more than counts
AUXILIARY_LOSSES = ("none", "switch", "sequence", "global_batch")


class RouterKind(NamedTuple):
    """What others must know of a kind of router; how it chooses, `jmoe.nn.choices` has.

    as_token_choice: whether it chooses so where nothing is trained: the only way that
      Hugging Face's files can tell of.
    by_bias: whether the selection bias has a part in its choices.
    within_groups: whether a token's choices lie in `groups_per_token` groups.
    by_experts: whether experts choose their tokens, not tokens their experts.
    no_text: why it can't choose for the newest token of a text; empty: it can.
    """

    as_token_choice: bool = False
    by_bias: bool = False
    within_groups: bool = False
    by_experts: bool = False
    no_text: str = ""


ROUTERS: Mapping[str, RouterKind] = {
    "token_choice": RouterKind(as_token_choice=True, by_bias=True, within_groups=True),
    "noisy": RouterKind(as_token_choice=True, by_bias=True, within_groups=True),
    "expert_choice": RouterKind(
        by_experts=True, no_text="compares tokens with later ones"
    ),
    "hash": RouterKind(),
    "balanced": RouterKind(within_groups=True),
    "replayed": RouterKind(no_text="is told the experts"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How experts are chosen and weighed; by default with a gradient-free bias.

    `kind` is one of `jmoe.nn.choices`. `noise_std` is that of `noisy`, in units of the
    scores. `hash_layers`: the first so many MoE layers go by the tokens' ids, whatever
    the kind, as DeepSeek-V4's do.
    """

    kind: str = "token_choice"

    num_experts: int
    top_k: int
    num_groups: int = 1  # experts are split evenly into groups (one per node)
    groups_per_token: int = 1  # a token may only visit this many groups
    score: str = "sigmoid"
    group_score: str = "top2_sum"
    normalize_gates: bool = True  # divide a token's gates by their sum
    gate_scale: float = 1.0  # multiplies the gates after that
    update_rule: str = "sign"
    auxiliary_loss: str = "none"
    auxiliary_weight: float = 0.0
    z_loss_weight: float = 0.0  # of `balance.losses.router_z`
    noise_std: float = 0.0
    hash_layers: int = 0

    def __post_init__(self):
        checks.at_least(
            self,
            num_experts=1,
            top_k=1,
            num_groups=1,
            groups_per_token=1,
            gate_scale=0.0,
            auxiliary_weight=0.0,
            z_loss_weight=0.0,
            noise_std=0.0,
            hash_layers=0,
        )
        checks.one_of(
            self,
            kind=tuple(ROUTERS),
            score=SCORES,
            group_score=GROUP_SCORES,
            update_rule=UPDATE_RULES,
            auxiliary_loss=AUXILIARY_LOSSES,
        )
        if self.num_experts % self.num_groups:
            raise ValueError(
                f"num_experts={self.num_experts} must divide into "
                f"num_groups={self.num_groups} equal groups."
            )
        if self.groups_per_token > self.num_groups:
            raise ValueError(
                f"groups_per_token={self.groups_per_token} exceeds "
                f"num_groups={self.num_groups}."
            )
        reachable = self.groups_per_token * self.group_size
        if self.top_k > reachable:
            raise ValueError(
                f"top_k={self.top_k} exceeds the {reachable} experts reachable "
                f"through groups_per_token={self.groups_per_token}."
            )
        self._check_kind()
        sums_pairs = self.num_groups > 1 and self.group_score == "top2_sum"
        if sums_pairs and self.group_size < 2:
            raise ValueError(
                "group_score='top2_sum' needs at least 2 experts a group; "
                f"num_experts={self.num_experts} over num_groups={self.num_groups} "
                f"gives {self.group_size}."
            )

    def _check_kind(self) -> None:
        if (self.kind == "noisy") != (self.noise_std > 0):
            raise ValueError(
                f"noise_std={self.noise_std} must be above 0 with kind='noisy', and 0 "
                f"with any other; it is {self.kind!r}."
            )
        if self.update_rule in MARGIN_RULES and not ROUTERS[self.kind].by_bias:
            counting = [rule for rule in UPDATE_RULES if rule not in MARGIN_RULES]
            raise ValueError(
                f"update_rule={self.update_rule!r} must be one of "
                f"{', '.join(map(repr, counting))} with kind={self.kind!r}: the bias "
                "has no part in its choices, which could tell how far to move it."
            )
        is_limited = self.groups_per_token < self.num_groups
        if self.kind == "balanced" and is_limited and not self.even_groups:
            raise ValueError(
                f"top_k={self.top_k} must divide evenly over groups of "
                f"{self.group_size} experts, at most "
                f"groups_per_token={self.groups_per_token} of them, with "
                "kind='balanced'."
            )
        if not ROUTERS[self.kind].by_experts:
            return
        excluded = {
            "auxiliary_loss": "none",
            "groups_per_token": self.num_groups,
            "hash_layers": 0,
        }
        for field, allowed in excluded.items():
            if getattr(self, field) != allowed:
                raise ValueError(
                    f"{field}={getattr(self, field)!r} must be {allowed!r} with "
                    f"kind={self.kind!r}: experts choose among all tokens, and are "
                    "loaded alike."
                )

    @property
    def group_size(self) -> int:
        return self.num_experts // self.num_groups

    @property
    def even_groups(self) -> int:
        """How many groups a token can visit with as many choices in each; 0: none."""
        even = (
            n
            for n in range(1, self.groups_per_token + 1)
            if self.top_k % n == 0 and self.top_k // n <= self.group_size
        )
        return max(even, default=0)

    @property
    def most_groups(self) -> int:
        """How many groups the choices of one token may lie in."""
        is_limited = ROUTERS[self.kind].within_groups and not self.hash_layers
        return self.groups_per_token if is_limited else self.num_groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExchangeConfig:
    """How tokens reach the devices that host their experts; see parallel/exchange.py.

    `capacity_factor` multiplies the balanced load of a device: the tokens that visit it
    if all experts are alike, each counted once, whatever the number of its choices
    there. What is beyond that is dropped, and counted. None: there is always room.

    With `balanced`, devices lend experts, and nothing is dropped: `capacity_factor` is
    the size of buffers, which are filled as often as need be; none: a fifth more than
    is expected, and what chance adds to few tokens. A device borrows up to `slots`
    experts; none: as many as it has, and no more than 4. Nobody lends to be less than a
    fraction `lend_above` above the mean. Within nodes of `node_size` devices experts
    are lent first; none: all are alike.
    """

    backend: str = "padded"
    capacity_factor: float | None = None
    drop_order: str = "score"  # which tokens go last: the lowest scores, or positions
    chunks: int = 1  # parts of the tokens, of which one travels while another computes
    dispatch_dtype: str = "activations"  # on the way to the experts
    slots: int | None = None
    lend_above: float = 0.02
    node_size: int | None = None

    def __post_init__(self):
        checks.one_of(
            self,
            backend=EXCHANGES,
            drop_order=DROP_ORDERS,
            dispatch_dtype=WIRE_DTYPES,
        )
        checks.at_least(self, chunks=1, lend_above=0)
        for name in ("slots", "node_size"):
            if getattr(self, name) is not None:
                checks.at_least(self, **{name: 1})
        factor = self.capacity_factor
        if factor is not None and not 1 <= factor < math.inf:
            raise ValueError(
                f"capacity_factor={factor} must be at least 1 and finite, or none: "
                "below 1, tokens that use all experts alike wouldn't find room."
            )
        if self.backend == "gather" and self.capacity_factor is not None:
            raise ValueError(
                f"capacity_factor={self.capacity_factor} must be none with "
                "backend='gather', which brings all tokens to every device."
            )


_BACKENDS_OF_0_1 = {
    "blocks_remat": {"backend": "blocks", "remat": "activations"},
    "blocks_apart": {"backend": "blocks"},
    "blocks_remat_apart": {"backend": "blocks", "remat": "activations"},
    "ragged_apart": {"backend": "ragged"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """One MLP that every token visits."""

    kind: str = "dense"
    mlp_dim: int

    def __post_init__(self):
        checks.one_of(self, kind=("dense",))
        checks.at_least(self, mlp_dim=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Fine-grained routed experts beside shared ones that every token visits.

    `backend` is that of the grouped matmul, by default the platform's; `remat` is what
    of the experts a backward pass computes again, which `ragged` always does with their
    activations. See ops/grouped.py.
    """

    kind: str = "moe"
    router: RouterConfig
    expert_mlp_dim: int
    num_shared_experts: int = 1
    backend: str = "auto"
    remat: str = "none"
    exchange: ExchangeConfig = ExchangeConfig()

    def __post_init__(self):
        checks.at_least(self, expert_mlp_dim=1, num_shared_experts=0)
        checks.one_of(self, kind=("moe",), backend=EXPERT_BACKENDS, remat=EXPERT_REMATS)

    @classmethod
    def updated(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns a record's fields, of which jmoe 0.1 may have written some.

        Its names of backends said, besides, what they computed again, and whether they
        were a pipeline's.
        """
        name = values.get("backend")
        if name not in _BACKENDS_OF_0_1:
            return values
        return {**values, **_BACKENDS_OF_0_1[name]}


FeedForwardConfig = DenseConfig | MoEConfig


class Stack(NamedTuple):
    """Layers in a row that are alike, by their numbers in the model."""

    feed_forward: FeedForwardConfig
    layers: range

    @property
    def num_layers(self) -> int:
        return len(self.layers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A DeepSeek-V3-style decoder: `num_dense_layers` dense blocks, then MoE blocks."""

    vocab_size: int
    hidden_dim: int
    num_layers: int
    num_dense_layers: int
    dense_mlp_dim: int
    attention: AttentionConfig
    moe: MoEConfig
    max_positions: int = 4096
    mtp_depth: int = 0  # multi-token prediction modules
    tie_embeddings: bool = False
    norm_eps: float = 1e-6
    init_std: float = 0.006
    dtype: str = "float32"  # of activations; parameters are always float32
    remat: str = "none"
    layer_loop: str = "scan"
    family: str = "deepseek_v3"  # how it reads in Hugging Face's files: jmoe.families
    hf_extras: str = "{}"  # keys of a Hugging Face config that jmoe doesn't read, JSON

    def __post_init__(self):
        checks.at_least(
            self,
            vocab_size=2,
            hidden_dim=1,
            num_layers=1,
            num_dense_layers=0,
            dense_mlp_dim=1,
            max_positions=1,
            mtp_depth=0,
            norm_eps=0.0,
            init_std=0.0,
        )
        checks.at_most(self, vocab_size=2**31 - 1)  # ids are int32
        checks.one_of(self, dtype=DTYPES, remat=REMAT_POLICIES, layer_loop=LAYER_LOOPS)
        if self.num_dense_layers >= self.num_layers:
            raise ValueError(
                f"num_dense_layers={self.num_dense_layers} must be below "
                f"num_layers={self.num_layers}: at least one layer is a MoE layer."
            )
        if not _is_json_object(self.hf_extras):
            raise ValueError(f"hf_extras={self.hf_extras!r} must be a JSON object.")

    @property
    def num_moe_layers(self) -> int:
        """The MoE blocks of the main model; each MTP module adds one of its own."""
        return self.num_layers - self.num_dense_layers

    @property
    def moe_layer_names(self) -> tuple[str, ...]:
        """What loads and biases are of, in their order: `moe_0` on, then `mtp_0` on."""
        main = (f"moe_{i}" for i in range(self.num_moe_layers))
        return (*main, *(f"mtp_{k}" for k in range(self.mtp_depth)))

    @property
    def stacks(self) -> dict[str, Stack]:
        """The main model's layers in their order, by the name of their parameters."""
        dense = DenseConfig(mlp_dim=self.dense_mlp_dim)
        stacks = {
            "dense": Stack(dense, range(self.num_dense_layers)),
            "moe": Stack(self.moe, range(self.num_dense_layers, self.num_layers)),
        }
        return {name: stack for name, stack in stacks.items() if stack.layers}

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        """Returns the shape called `name`; ValueError lists the known ones."""
        from jmoe.config import presets  # presets are made of these records

        return checks.lookup(presets.MODELS, name, "model preset")()


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        return False
