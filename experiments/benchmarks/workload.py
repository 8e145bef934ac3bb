"""What every side of a benchmark is given, and the matmuls that it cannot do without.

Shapes: B batch, T position, D hidden, E expert, F MLP dimension, K = top_k, H head,
Q query/key and V value dimension of a head.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from jmoe.config import DataConfig, MLAConfig, ModelConfig, RunConfig, TrainConfig


class Linear(NamedTuple):
    """`count` maps of [rows, inputs] to [rows, outputs]."""

    name: str
    rows: int
    inputs: int
    outputs: int
    count: int = 1

    @property
    def flops(self) -> int:
        """The operations of the product and of the gradients of its operands."""
        return 3 * 2 * self.count * self.rows * self.inputs * self.outputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One optimizer step: `batch` sequences of `length` predicted tokens."""

    model: ModelConfig
    batch: int
    length: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def run(self, microbatch_size: int | None = None, **fields: Any) -> RunConfig:
        """Returns jmoe's run, with other `fields` than the defaults.

        microbatch_size: all.
        """
        train = TrainConfig(
            steps=1000,
            batch_size=self.batch,
            microbatch_size=microbatch_size or self.batch,
        )
        data = DataConfig(sequence_length=self.length)
        return RunConfig(
            name="bench", model=self.model, data=data, train=train, **fields
        )

    def token_ids(self) -> np.ndarray:
        """The same random int32 [B, T + 1] for everyone."""
        rng = np.random.default_rng(0)
        shape = (self.batch, self.length + 1)
        return rng.integers(self.model.vocab_size, size=shape, dtype=np.int32)

    def routed_linears(self) -> list[Linear]:
        """Returns one MoE layer's router and experts, as if tokens were sorted."""
        cfg = self.model.moe
        hidden, mlp = self.model.hidden_dim, cfg.expert_mlp_dim
        rows = self.tokens * cfg.router.top_k
        return [
            Linear("router", self.tokens, hidden, cfg.router.num_experts),
            Linear("expert gate and up", rows, hidden, 2 * mlp),
            Linear("expert down", rows, mlp, hidden),
        ]

    def step_linears(self) -> list[Linear]:
        """Returns a whole training step's; what attention adds is `attention_flops`."""
        cfg, moe_layers = self.model, self.model.num_moe_layers
        routed = [x._replace(count=moe_layers) for x in self.routed_linears()]
        shared = cfg.moe.num_shared_experts * cfg.moe.expert_mlp_dim
        head = Linear("head", self.tokens, cfg.hidden_dim, cfg.vocab_size)
        linears = [
            *self._attention_linears(),
            *self._mlp_linears("dense", cfg.dense_mlp_dim, cfg.num_dense_layers),
            *self._mlp_linears("shared", shared, moe_layers),
            *routed,
            head,
        ]
        return [linear for linear in linears if linear.flops]

    def _attention_linears(self) -> list[Linear]:
        cfg, hidden = self.model.attention, self.model.hidden_dim
        assert isinstance(cfg, MLAConfig), "no other kind is compared"
        latent = cfg.query_latent_dim
        queries = cfg.num_heads * cfg.qk_dim
        shapes = {
            "query down": (hidden, latent or 0),
            "query up": (latent or hidden, queries),
            "key and value down": (hidden, cfg.kv_latent_dim + cfg.rope_dim),
            "key and value up": (
                cfg.kv_latent_dim,
                cfg.num_heads * (cfg.nope_dim + cfg.value_dim),
            ),
            "attention out": (cfg.num_heads * cfg.value_dim, hidden),
        }
        layers = self.model.num_layers
        return [Linear(n, self.tokens, *s, layers) for n, s in shapes.items()]

    def _mlp_linears(self, name: str, mlp: int, count: int) -> list[Linear]:
        hidden = self.model.hidden_dim
        return [
            Linear(f"{name} gate and up", self.tokens, hidden, 2 * mlp, count),
            Linear(f"{name} down", self.tokens, mlp, hidden, count),
        ]

    def attention_flops(self, *, causal: bool) -> int:
        """The operations of scores, weighted values and gradients, none repeated.

        A causal model needs the pairs on and below the diagonal; an implementation that
        masks the full square computes all of them.
        """
        cfg, length = self.model.attention, self.length
        pairs = length * (length + 1) // 2 if causal else length**2
        per_pair = 3 * 2 * (cfg.qk_dim + cfg.value_dim)
        return self.model.num_layers * self.batch * cfg.num_heads * pairs * per_pair
