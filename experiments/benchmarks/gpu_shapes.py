"""What the GPU benchmark measures: operations, at the sizes that models have them in.

A case is measured by several systems, each of which does one or more operations at its
size. Nothing here needs JAX or torch, for the parent process has neither.

Order is importance: time may end before the table does.
"""

import dataclasses

FORWARD, INPUTS, WEIGHTS = "forward", "input gradient", "weight gradient"
BOTH_PASSES = "forward and backward"

BF16_BYTES = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ceilings:
    """A square product and a copy, as large as it takes to reach the GPU's limits."""

    name: str = "ceilings"
    size: int = 8192
    copied: int = 2**30  # bytes, that are read and written

    def flops(self, operation: str) -> int:
        return 2 * self.size**3 if operation == "matmul" else 0

    def moved_bytes(self) -> int:
        return 2 * self.copied


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """A linear layer, [rows, inputs] to [rows, outputs], and its weight's gradient."""

    name: str
    rows: int
    inputs: int
    outputs: int

    def flops(self, operation: str) -> int:
        return 2 * self.rows * self.inputs * self.outputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grouped:
    """The gate and up map of a device's experts, which share `rows`; its gradients.

    skew: expert i's share of the rows falls as 1 / (i + 1), and the last has none;
      otherwise all have as many.
    compared: with other systems too; compiling all of those takes long.
    """

    name: str
    experts: int
    rows: int
    inputs: int
    outputs: int
    skew: bool = False
    compared: bool = False

    def flops(self, operation: str) -> int:
        return 2 * self.rows * self.inputs * self.outputs

    def sizes(self) -> list[int]:
        """Rows of each expert."""
        shares = [1 / (i + 1) if self.skew else 1.0 for i in range(self.experts)]
        if self.skew:
            shares[-1] = 0.0
        sizes = [int(self.rows * share / sum(shares)) for share in shares]
        sizes[0] += self.rows - sum(sizes)
        return sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """Causal attention of whole sequences."""

    name: str
    batch: int
    length: int
    heads: int
    qk_dim: int = 192
    value_dim: int = 128

    @property
    def scale(self) -> float:
        return self.qk_dim**-0.5

    def flops(self, operation: str) -> int:
        """The operations of pairs on and below the diagonal, nothing recomputed."""
        pairs = self.batch * self.heads * self.length * (self.length + 1) // 2
        passes = 3 if operation == BOTH_PASSES else 1
        return passes * 2 * pairs * (self.qk_dim + self.value_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode:
    """One more token of each sequence attends to `length` cached latents."""

    name: str
    batch: int
    length: int
    heads: int
    latent_dim: int = 576  # of which the first are the value
    value_dim: int = 512
    model_dim: int = 192  # of a query and key before they were absorbed: the scale's

    @property
    def scale(self) -> float:
        return self.model_dim**-0.5

    def flops(self, operation: str) -> int:
        pairs = self.batch * self.heads * self.length
        return 2 * pairs * (self.latent_dim + self.value_dim)

    def moved_bytes(self) -> int:
        """The cache, read once."""
        return self.batch * self.length * self.latent_dim * BF16_BYTES


Case = Ceilings | Dense | Grouped | Attention | Decode


def _v3(name: str, *, experts: int = 16, rows: int = 16_384, **more: bool) -> Grouped:
    return Grouped(
        name=f"V3, {experts} experts, {rows} rows, {name}",
        experts=experts,
        rows=rows,
        inputs=7168,
        outputs=2 * 2048,
        **more,
    )


def _v2_lite(name: str, *, rows: int = 24_576, **more: bool) -> Grouped:
    return Grouped(
        name=f"V2-Lite, 64 experts, {rows} rows, {name}",
        experts=64,
        rows=rows,
        inputs=2048,
        outputs=2 * 1408,
        **more,
    )


def _dense(rows: int, inputs: int, outputs: int) -> Dense:
    return Dense(
        name=f"dense {rows} x {inputs} x {outputs}",
        rows=rows,
        inputs=inputs,
        outputs=outputs,
    )


def _decode(batch: int, length: int, heads: int) -> Decode:
    return Decode(
        name=f"decode, {heads} heads, {batch} x {length}",
        batch=batch,
        length=length,
        heads=heads,
    )


CASES: tuple[Case, ...] = (
    Ceilings(),
    _dense(4096, 7168, 2 * 2048),
    _v3("balanced", compared=True),
    # The same programs as before, with other numbers: cheap.
    _v3("skewed", skew=True),
    Attention(name="attention, 16 heads", batch=4, length=4096, heads=16),
    _decode(32, 8192, 16),
    _decode(128, 4096, 128),
    _v2_lite("balanced", compared=True),
    _v2_lite("skewed", skew=True),
    Attention(name="attention, 128 heads", batch=1, length=4096, heads=128),
    _dense(4096, 7168, 18_432),
    _decode(8, 32_768, 16),
    _decode(1, 32_768, 16),
    _decode(1, 4096, 128),
    _v3("balanced", experts=32, rows=4096),
    _v3("balanced", rows=32_768),
    _v2_lite("balanced", rows=8192),
    _dense(4096, 2048, 7168),
)
