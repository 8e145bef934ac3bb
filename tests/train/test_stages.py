"""What layers are said to cost against what they compute, and whose they become."""

import itertools
import math

import jax
import jax.numpy as jnp
import pytest
from flax.core import meta
from jax.extend import core

from jmoe.config import PipelineConfig, override
from jmoe.nn.block import Block, Positions
from jmoe.nn.mixers import rotation
from jmoe.nn.tail import Tail
from jmoe.parallel.schedule import SCHEDULES
from jmoe.train import stages

LENGTH, BLOCK = 32, 8

SETTINGS = {
    "plain": [],
    "queries_whole": ["attention.query_latent_dim=none"],
    "two_mtp": ["mtp_depth=2", "moe.num_shared_experts=2", "moe.router.top_k=3"],
    "grouped_queries": [
        "attention.kind=gqa",
        "attention.num_heads=6",
        "attention.num_kv_heads=2",
        "attention.head_dim=12",
        "mtp_depth=1",
    ],
    "tied": ["tie_embeddings=true", "attention.nope_dim=12", "attention.value_dim=6"],
}

each_model = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def make(smallest, settings):
    """With routed experts whose products are no dot_general: they aren't counted."""
    common = [f"attention.block_size={BLOCK}", "moe.backend=ragged", "num_layers=3"]
    return override(smallest.model, [*common, *settings])


# Attention computes blocks on the diagonal whole, of which it needs half. So it costs
# what is said of a sequence that is longer by a block.
COUNTED = LENGTH + BLOCK


def operations(function, *arguments):
    """For a token: of the products of a function, two for each multiplication."""

    def count(jaxpr):
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                ((contracted, _), _), out = (
                    equation.params["dimension_numbers"],
                    equation.outvars[0].aval,
                )
                shape = equation.invars[0].aval.shape
                total += 2 * out.size * math.prod(shape[dim] for dim in contracted)
            times = equation.params.get("length", 1)  # of a scan
            for part in jax.tree.leaves(list(equation.params.values())):
                part = part.jaxpr if isinstance(part, core.ClosedJaxpr) else part
                total += times * count(part) if isinstance(part, core.Jaxpr) else 0
        return total

    return count(jax.make_jaxpr(function)(*arguments).jaxpr) / LENGTH


def run(module, *arguments):
    """Operations of the module's apply."""
    shapes = meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *arguments))
    return operations(module.apply, shapes, *arguments)


def block_arguments(cfg):
    x = jnp.zeros((1, LENGTH, cfg.hidden_dim))
    return x, Positions(rotation(cfg.attention, LENGTH)), jnp.int32(0)


def routed(cfg):
    """Three products, for each expert that a token visits."""
    return 6 * cfg.moe.router.top_k * cfg.hidden_dim * cfg.moe.expert_mlp_dim


@each_model
def test_a_layer_costs_what_its_products_do(smallest, settings):
    cfg = make(smallest, settings)
    dense, moe = (
        run(Block.of(cfg, stack.feed_forward), *block_arguments(cfg))
        for stack in cfg.stacks.values()
    )
    moe += routed(cfg)
    assert stages.layer_costs(cfg, COUNTED) == [dense, moe, moe]


@each_model
def test_the_tail_costs_what_its_products_and_the_logits_do(smallest, settings):
    cfg = make(smallest, settings)
    x, positions, _ = block_arguments(cfg)
    table = jnp.zeros((cfg.vocab_size, cfg.hidden_dim))
    tokens = jnp.zeros((1, LENGTH), jnp.int32)
    found = run(Tail(cfg), x, table, tokens, positions)
    logits = 2 * cfg.hidden_dim * cfg.vocab_size
    found += cfg.mtp_depth * routed(cfg) + (1 + cfg.mtp_depth) * logits
    assert stages.tail_cost(cfg, COUNTED) == found


def deep(smallest, dense=3, moe=14):
    return override(
        smallest.model, [f"num_layers={dense + moe}", f"num_dense_layers={dense}"]
    )


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dense", [0, 1, 3])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_direction_has_every_layer_once_and_in_order(
    smallest, name, dense, ranks
):
    cfg = deep(smallest, dense)
    schedule = stages.make_schedule(PipelineConfig(schedule=name), ranks, 4 * ranks)
    rows = stages.cut(cfg, schedule, LENGTH)
    assert list(rows) == ["dense", "moe"] if dense else ["moe"]
    for direction, hosts in enumerate(schedule.hosts):
        path = []
        for stage, rank in enumerate(hosts):
            hosted = schedule.hosted(rank).index((stage, direction))
            here = []
            for number_L, index_PR, start_PH, count_PH in rows.values():
                start, count = start_PH[rank, hosted], count_PH[rank, hosted]
                here += number_L[index_PR[rank][start : start + count]].tolist()
            assert here
            path += here
        assert path == list(range(cfg.num_layers))


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_rank_has_a_row_that_none_of_its_stages_has(smallest, name):
    schedule = stages.make_schedule(PipelineConfig(schedule=name), 4, 16)
    for _, index_PR, start_PH, count_PH in stages.cut(
        deep(smallest), schedule, LENGTH
    ).values():
        for index_R, starts, counts in zip(index_PR, start_PH, count_PH, strict=True):
            assert list(starts) == [0, *itertools.accumulate(counts)][:-1]
            assert (index_R >= 0).tolist() == [
                i < sum(counts) for i in range(len(index_R))
            ]
        assert max((index_PR >= 0).sum(1)) == index_PR.shape[1]


def test_a_stage_before_a_large_vocabulary_has_fewer_layers(smallest):
    schedule = stages.make_schedule(PipelineConfig(schedule="1f1b"), 4, 4)

    def last(vocab_size):
        cfg = override(deep(smallest), [f"vocab_size={vocab_size}"])
        return sum(
            rows.count_PH[-1, 0] for rows in stages.cut(cfg, schedule, LENGTH).values()
        )

    sizes = [last(vocab_size) for vocab_size in (16, 300, 1000, 100000)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1] == 1


def test_interleaving_takes_the_chunks_that_it_is_told(smallest):
    cfg = PipelineConfig(schedule="interleaved_1f1b", chunks=3)
    schedule = stages.make_schedule(cfg, 2, 4)
    assert schedule.hosts == ((0, 1, 0, 1, 0, 1),)
    for rows in stages.cut(deep(smallest), schedule, LENGTH).values():
        assert rows.count_PH.shape == rows.start_PH.shape == (2, 3)
