"""How a model is cut into a pipeline's stages, and which layers each rank then has.

Stages are cut by what their layers cost, in operations for a token: a mixture of
experts costs less than a dense layer as wide as all of them, and the head as much as
several layers.

Shapes: P rank, H hosted stage, R row (a layer that a rank has).
"""

from typing import NamedTuple

import numpy as np

from jmoe.config import AttentionConfig, ModelConfig, PipelineConfig, RunConfig
from jmoe.parallel.partition import partition
from jmoe.parallel.schedule import Schedule, build


class Rows(NamedTuple):
    """Which layers of one stack the ranks have.

    number_L: the layers' numbers in the model. index_PR: which of them a rank has, -1
    where it has fewer than R. start_PH, count_PH: the rows of each stage that a rank
    hosts.
    """

    number_L: np.ndarray
    index_PR: np.ndarray
    start_PH: np.ndarray
    count_PH: np.ndarray


def check(run: RunConfig) -> None:
    """That every step's microbatches fit the schedule, and the layers its stages.

    Raises:
      ValueError: they don't.
    """
    given = run.pipeline.microbatches
    for count in run.train.ramp.values() if given is None else [given]:
        schedule = make_schedule(run.pipeline, run.mesh.pipe, count)
        cut(run.model, schedule, run.data.sequence_length)


def make_schedule(cfg: PipelineConfig, ranks: int, microbatches: int) -> Schedule:
    """ValueError: the schedule can't take as many ranks or microbatches."""
    options = {"chunks": cfg.chunks} if cfg.schedule == "interleaved_1f1b" else {}
    return build(cfg.schedule, ranks, microbatches, **options)


def cut(cfg: ModelConfig, schedule: Schedule, length: int) -> dict[str, Rows]:
    """The rows of each stack, for stages that cost about the same.

    Raises:
      ValueError: there are more stages than layers.
    """
    bounds = partition(
        layer_costs(cfg, length), schedule.num_stages, last=tail_cost(cfg, length)
    )
    stacks = {"dense": (0, cfg.num_dense_layers)} if cfg.num_dense_layers else {}
    stacks["moe"] = (cfg.num_dense_layers, cfg.num_layers)
    return {
        name: _rows(schedule, bounds, begin, end)
        for name, (begin, end) in stacks.items()
    }


def _rows(schedule: Schedule, bounds: tuple[int, ...], begin: int, end: int) -> Rows:
    found, start_PH, count_PH = [], [], []
    for rank in range(schedule.num_ranks):
        rows, starts, counts = [], [], []
        for stage, _ in schedule.hosted(rank):
            first, stop = (min(max(b, begin), end) for b in bounds[stage : stage + 2])
            starts.append(len(rows))
            counts.append(stop - first)
            rows += range(first - begin, stop - begin)
        found.append(rows)
        start_PH.append(starts)
        count_PH.append(counts)
    most = max(map(len, found))
    index_PR = [rows + [-1] * (most - len(rows)) for rows in found]
    number_L = np.arange(begin, end, dtype=np.int32)
    return Rows(number_L, *map(np.array, (index_PR, start_PH, count_PH)))


def layer_costs(cfg: ModelConfig, length: int) -> list[float]:
    """Of each layer, dense ones first: operations of its forward pass, for a token."""
    attention = _attention_cost(cfg.attention, cfg.hidden_dim, length)
    dense = 6 * cfg.hidden_dim * cfg.dense_mlp_dim
    moe = _moe_cost(cfg)
    return [attention + dense] * cfg.num_dense_layers + [
        attention + moe
    ] * cfg.num_moe_layers


def tail_cost(cfg: ModelConfig, length: int) -> float:
    """Of what follows the layers: the logits, and the MTP modules with theirs."""
    head = 2 * cfg.hidden_dim * cfg.vocab_size
    project = 4 * cfg.hidden_dim**2
    attention = _attention_cost(cfg.attention, cfg.hidden_dim, length)
    return head + cfg.mtp_depth * (head + project + attention + _moe_cost(cfg))


def _moe_cost(cfg: ModelConfig) -> float:
    visited = cfg.moe.router.top_k + cfg.moe.num_shared_experts
    router = 2 * cfg.hidden_dim * cfg.moe.router.num_experts
    return router + 6 * visited * cfg.hidden_dim * cfg.moe.expert_mlp_dim


def _attention_cost(cfg: AttentionConfig, hidden_dim: int, length: int) -> float:
    """Its projections, and half of all scores: those of earlier positions."""
    queries = cfg.num_heads * cfg.qk_dim
    latent = cfg.query_latent_dim
    query = hidden_dim * queries if latent is None else latent * (hidden_dim + queries)
    down = hidden_dim * (cfg.kv_latent_dim + cfg.rope_dim)
    up = cfg.kv_latent_dim * cfg.num_heads * (cfg.nope_dim + cfg.value_dim)
    out = cfg.num_heads * cfg.value_dim * hidden_dim
    scores = length / 2 * cfg.num_heads * (cfg.qk_dim + cfg.value_dim)
    return 2 * (query + down + up + out + scores)
