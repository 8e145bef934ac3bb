"""How a model is cut into a pipeline's stages, and which layers each rank then has.

Stages are cut by what their layers cost, in operations for a token: a mixture of
experts costs less than a dense layer as wide as all of them, and the head as much as
several layers.

Shapes: P rank, H hosted stage, R row (a layer that a rank has).
"""

from typing import NamedTuple

import numpy as np

from jmoe.config import FeedForwardConfig, ModelConfig, PipelineConfig, RunConfig
from jmoe.nn.feed_forwards import FEED_FORWARDS
from jmoe.nn.mixers import MIXERS
from jmoe.parallel.partition import partition
from jmoe.parallel.schedule import Schedule, build


class RankLayers(NamedTuple):
    """Says which layers of one stack the ranks have.

    number_L: the layers' numbers in the model. index_PR: which of them a rank has, -1
    where it has fewer than R. start_PH, count_PH: the rows of each stage that a rank
    hosts.
    """

    number_L: np.ndarray
    index_PR: np.ndarray
    start_PH: np.ndarray
    count_PH: np.ndarray


def check(run: RunConfig) -> None:
    """Checks that microbatches of each step fit the schedule, and layers its stages.

    Raises:
      ValueError: they don't.
    """
    given = run.pipeline.microbatches
    for count in run.train.ramp.values() if given is None else [given]:
        schedule = make_schedule(run.pipeline, run.mesh.pipe, count)
        cut(run.model, schedule, run.data.sequence_length)


def make_schedule(cfg: PipelineConfig, ranks: int, microbatches: int) -> Schedule:
    """Makes a run's schedule; ValueError for ranks or microbatches it can't take."""
    options = {"chunks": cfg.chunks} if cfg.schedule == "interleaved_1f1b" else {}
    return build(cfg.schedule, ranks, microbatches, **options)


def cut(cfg: ModelConfig, schedule: Schedule, length: int) -> dict[str, RankLayers]:
    """Returns the rows of each stack, for stages that cost about the same.

    Raises:
      ValueError: there are more stages than layers.
    """
    bounds = partition(
        layer_costs(cfg, length), schedule.num_stages, last=tail_cost(cfg, length)
    )
    return {
        name: _rows(schedule, bounds, stack.layers)
        for name, stack in cfg.stacks.items()
    }


def _rows(schedule: Schedule, bounds: tuple[int, ...], layers: range) -> RankLayers:
    begin, end = layers.start, layers.stop
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
    number_L = np.array(layers, np.int32)
    return RankLayers(number_L, *map(np.array, (index_PR, start_PH, count_PH)))


def layer_costs(cfg: ModelConfig, length: int) -> list[float]:
    """Returns operations of each layer's forward pass for a token, dense first."""
    return [
        _block_cost(cfg, stack.feed_forward, length)
        for stack in cfg.stacks.values()
        for _ in stack.layers
    ]


def tail_cost(cfg: ModelConfig, length: int) -> float:
    """Returns what follows the layers costs: logits, and MTP modules with theirs."""
    head = 2 * cfg.hidden_dim * cfg.vocab_size
    project = 4 * cfg.hidden_dim**2
    block = _block_cost(cfg, cfg.moe, length)
    return head + cfg.mtp_depth * (head + project + block)


def _block_cost(
    cfg: ModelConfig, feed_forward: FeedForwardConfig, length: int
) -> float:
    mixer = MIXERS[cfg.attention.kind].cost(cfg.attention, cfg.hidden_dim, length)
    kind = FEED_FORWARDS[feed_forward.kind]
    return mixer + kind.cost(feed_forward, cfg.hidden_dim)
