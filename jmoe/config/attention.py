"""How positions are mixed: a record for each kind of attention, told apart by `kind`.

Names follow DeepSeek-V2 (arXiv 2405.04434) and GQA (Ainslie et al., arXiv 2305.13245).
`jmoe.nn.mixers` has what computes each kind.
"""

import dataclasses
import math

from jmoe.config import checks

ROPE_PAIRS = ("interleaved", "halves")


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN (arXiv 2309.00071): rotary frequencies stretched to a longer context."""

    factor: float
    original_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = 1.0
    mscale_all_dim: float | None = 1.0

    def __post_init__(self):
        checks.at_least(self, factor=1.0, original_positions=1)
        checks.finite(self, "beta_fast", "mscale", "mscale_all_dim")
        if not 0 < self.beta_slow <= self.beta_fast:
            raise ValueError(
                f"beta_slow={self.beta_slow} must be above 0 and at most "
                f"beta_fast={self.beta_fast}."
            )


def yarn_mscale(factor: float, mscale: float) -> float:
    """Returns YaRN's attention temperature.

    It is `0.1 * mscale * ln(factor) + 1` above factor 1.
    """
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention; `query_latent_dim=None` leaves queries full."""

    kind: str = "mla"
    num_heads: int
    query_latent_dim: int | None
    kv_latent_dim: int
    nope_dim: int  # per head, without position
    rope_dim: int  # per head, rotated; the key's part is shared by all heads
    value_dim: int
    rope_theta: float = 10_000.0
    yarn: YarnConfig | None = None
    latent_norm_eps: float = 1e-6  # not norm_eps: DeepSeek fixes it
    # Keys, and queries, that are scored at a time. XLA for CPUs gives smaller blocks
    # one core each.
    block_size: int = 512

    def __post_init__(self):
        checks.one_of(self, kind=("mla",))
        checks.at_least(
            self,
            num_heads=1,
            kv_latent_dim=1,
            nope_dim=1,
            rope_dim=2,
            value_dim=1,
            rope_theta=1.0,
            latent_norm_eps=0.0,
            block_size=1,
        )
        if self.query_latent_dim is not None:
            checks.at_least(self, query_latent_dim=1)
        _check_pairs(self.rope_dim)

    @property
    def qk_dim(self) -> int:
        return self.nope_dim + self.rope_dim

    @property
    def softmax_scale(self) -> float:
        """The softmax's scale: 1/sqrt(d), times YaRN's temperature.

        That only where it is kept out of cos and sin.
        """
        return _softmax_scale(self.qk_dim, self.yarn)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GQAConfig:
    """Grouped-query attention: equally many query heads share each key/value head.

    The first `rope_dim` of a head's dimensions are rotated, in pairs that lie side by
    side (`rope_pairs="interleaved"`, as MLA has them) or half of `rope_dim` apart
    ("halves").
    """

    kind: str = "gqa"
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_dim: int
    rope_theta: float = 10_000.0
    rope_pairs: str = "halves"
    yarn: YarnConfig | None = None
    qk_norm_eps: float | None = None  # of each head's queries and keys; None: no norm
    qkv_bias: bool = False
    block_size: int = 512  # as MLAConfig has it

    def __post_init__(self):
        checks.one_of(self, kind=("gqa",), rope_pairs=ROPE_PAIRS)
        checks.at_least(
            self,
            num_heads=1,
            num_kv_heads=1,
            head_dim=2,
            rope_dim=2,
            rope_theta=1.0,
            block_size=1,
        )
        if self.qk_norm_eps is not None:
            checks.at_least(self, qk_norm_eps=0.0)
        _check_pairs(self.rope_dim)
        if self.rope_dim > self.head_dim:
            raise ValueError(
                f"rope_dim={self.rope_dim} must be at most head_dim={self.head_dim}."
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of "
                f"num_kv_heads={self.num_kv_heads}, which equally many of them share."
            )

    @property
    def qk_dim(self) -> int:
        return self.head_dim

    @property
    def value_dim(self) -> int:
        return self.head_dim

    @property
    def softmax_scale(self) -> float:
        """The softmax's scale: 1/sqrt(d), times YaRN's temperature.

        That only where it is kept out of cos and sin.
        """
        return _softmax_scale(self.head_dim, self.yarn)


AttentionConfig = MLAConfig | GQAConfig


def _check_pairs(rope_dim: int) -> None:
    if rope_dim % 2:
        raise ValueError(f"rope_dim={rope_dim} must be even, to rotate pairs.")


def _softmax_scale(qk_dim: int, yarn: YarnConfig | None) -> float:
    scale = qk_dim**-0.5
    if yarn is not None and yarn.mscale_all_dim:
        scale *= yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2
    return scale
