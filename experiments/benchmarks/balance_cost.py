"""What uneven devices cost a step on 16 H20s: a floor, by operations, bytes and links.

A layer's experts take as long as the slowest device does, and that as the longest of

    compute   its rows times the experts' operations, at the peak of matrix products
    memory    its experts' weights, own and borrowed, once a pass, and its rows'
              inputs, hidden values and outputs, at the memory's bandwidth
    network   its rows' tokens there and back, and what it borrows or lends, over
              links within a node and between nodes

as if each hid the others. What isn't in experts is the same on all devices, and takes
the longer of its operations and of reading its weights once a pass. All is bfloat16.
H20s are in nodes of 8: NVLink has 450 GB/s each way, and a GPU 400 Gbit/s to other
nodes. V3 doesn't fit so few for training: its figures are of the shape alone.
"""

from typing import NamedTuple

import numpy as np

from experiments.benchmarks.workload import Workload
from jmoe.balance import dropping
from jmoe.config import ModelConfig
from jmoe.plan.device import H20

DEVICES, NODE = 16, 8
FLOPS = H20.bfloat16_flops
LINK, NETWORK = 450e9, 50e9  # bytes a second each way, of a device
ITEM = 2  # bytes
BOUNDS = ("compute", "memory", "network")


class Phase(NamedTuple):
    """What a step does.

    tokens: of a device. passes: through the weights, a forward pass being one. trips:
    of tokens, to the experts or back. borrowed: how often an expert's weights travel
    to who borrows it; or their gradient back.
    """

    tokens: int
    passes: int
    trips: int
    borrowed: int


PHASES = {
    # The backward pass has two products for each of the forward's, takes outputs'
    # gradients there and inputs' back, borrows again, and gives gradients back.
    "training": Phase(tokens=4096, passes=3, trips=4, borrowed=3),
    "prefill": Phase(tokens=4096, passes=1, trips=2, borrowed=1),
    "decoding": Phase(tokens=32, passes=1, trips=2, borrowed=1),
}


class Uneven(NamedTuple):
    """How uneven devices are in each step and layer, [N, L].

    busiest: rows of the busiest device over the mean. near, far: the most experts that
    one device borrows or lends, within its node and to other nodes. copies: experts
    that a device holds beside its share of them.
    """

    busiest: np.ndarray
    near: np.ndarray
    far: np.ndarray
    copies: int


class Padding(NamedTuple):
    """What is computed and sent beyond what is needed.

    rows: that are computed, of those that are needed. sent: times that a token travels
    to experts; None: once to each device that it needs. flops: besides experts', of a
    device in a layer and step.
    """

    rows: float = 1.0
    sent: float | None = None
    flops: float = 0.0


NONE = Padding()


def expert_seconds(
    cfg: ModelConfig, phase: Phase, uneven: Uneven, padding: Padding = NONE
) -> np.ndarray:
    """Returns what experts take by each of `BOUNDS`, [3, N, L].

    Args:
      uneven: as recorded, of a model that may have other experts.
    """
    router, hidden, mlp = cfg.moe.router, cfg.hidden_dim, cfg.moe.expert_mlp_dim
    rows = padding.rows * phase.tokens * router.top_k * uneven.busiest
    expert_bytes = 3 * hidden * mlp * ITEM
    compute = (phase.passes * rows * 6 * hidden * mlp + padding.flops) / FLOPS

    own = router.num_experts / DEVICES + uneven.copies
    held = own + uneven.near + uneven.far
    row_bytes = (2 * hidden + 3 * mlp) * ITEM
    moved = phase.passes * (held * expert_bytes + rows * row_bytes)

    sent = padding.sent or float(dropping.expected_visits(router, DEVICES))
    token_bytes = phase.trips * phase.tokens * sent * uneven.busiest * hidden * ITEM
    loan_bytes = phase.borrowed * expert_bytes
    near = token_bytes * (NODE - 1) / DEVICES + loan_bytes * uneven.near
    far = token_bytes * (DEVICES - NODE) / DEVICES + loan_bytes * uneven.far
    network = np.maximum(near / LINK, far / NETWORK)
    return np.stack([compute, moved / H20.memory_bandwidth, network])


def other_seconds(cfg: ModelConfig, phase: Phase) -> float:
    """Returns what everything but routed experts takes, on every device."""
    workload = Workload(model=cfg, batch=1, length=phase.tokens)
    linears = [x for x in workload.step_linears() if not x.name.startswith("expert")]
    flops = sum(x.flops for x in linears) + workload.attention_flops(causal=True)
    weights = sum(x.count * x.inputs * x.outputs for x in linears)
    read = phase.passes * weights * ITEM / H20.memory_bandwidth
    return max(flops / 3 * phase.passes / FLOPS, read)


def step_seconds(
    cfg: ModelConfig, phase: Phase, uneven: Uneven, padding: Padding = NONE
) -> np.ndarray:
    """Returns what steps take, [N]; the model's layers are as the recorded ones."""
    longest_NL = expert_seconds(cfg, phase, uneven, padding).max(0)
    experts_N = longest_NL.mean(1) * cfg.num_moe_layers
    return experts_N + other_seconds(cfg, phase)


def bound(cfg: ModelConfig, phase: Phase, uneven: Uneven) -> str:
    """Returns which of `BOUNDS` experts take the longest by, on average."""
    seconds = expert_seconds(cfg, phase, uneven).mean((1, 2))
    return BOUNDS[int(seconds.argmax())]
