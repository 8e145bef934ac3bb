"""The benchmarks measure what they say; how fast anything is, no test can hold."""

import dataclasses
import functools
import importlib
import json
import runpy
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from flax import traverse_util
from flax.core import meta

from experiments.benchmarks import gshard, ours, train_cpu
from experiments.benchmarks.report import ROOT, Figure, Report
from experiments.benchmarks.workers import Seat, Turn, Worker, take_turns
from experiments.benchmarks.workload import Workload
from jmoe.config import ModelConfig, override
from jmoe.nn.model import Transformer
from tests.scripts.conftest import forget_flags

SMALL = Workload(
    model=override(
        ModelConfig.preset("bench_s"),
        [
            "num_layers=2",
            "hidden_dim=32",
            "vocab_size=64",
            "dense_mlp_dim=48",
            "moe.expert_mlp_dim=16",
            # A capacity factor of 2 then has room for every choice there is.
            "moe.router.num_experts=12",
            "moe.router.num_groups=4",
            "moe.router.groups_per_token=2",
        ],
    ),
    batch=2,
    length=16,
)
SIDE = """
import os

LOG = []

def tasks(name):
    def turn():
        LOG.append(name)
        return list(LOG)

    return {name: turn, "pid": os.getpid, "variable": lambda: os.environ["BENCH"]}

def broken():
    raise KeyError("this side")
"""


@pytest.fixture
def side(tmp_path, monkeypatch):
    """The module name of a side that needs neither JAX nor torch."""
    (tmp_path / "bench_side.py").write_text(SIDE)
    monkeypatch.syspath_prepend(tmp_path)
    return "bench_side"


def test_every_suite_can_be_run():
    forget_flags()
    suites = runpy.run_path(str(ROOT / "scripts" / "bench.py"))["SUITES"]
    assert all(callable(importlib.import_module(name).run) for name in suites.values())


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["attention.query_latent_dim=none", "num_dense_layers=0"],
        ["moe.num_shared_experts=0", "attention.value_dim=8"],
        ["moe.num_shared_experts=2", "num_layers=3", "num_dense_layers=2"],
    ],
)
def test_a_step_multiplies_each_token_with_every_kernel_it_meets(changes):
    """A product and its two gradients: 6 operations a token and parameter."""
    workload = dataclasses.replace(SMALL, model=override(SMALL.model, changes))
    router = workload.model.moe.router
    tokens_BT = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(
        Transformer(workload.model).init, jax.random.key(0), tokens_BT
    )
    met = 0
    kernels: Any = traverse_util.flatten_dict(meta.unbox(shapes["params"]))
    for path, x in kernels.items():
        share = router.top_k / router.num_experts if "experts" in path else 1
        if path[-1] not in ("embedding", "scale"):
            met += x.size * share
    flops = sum(linear.flops for linear in workload.step_linears())
    assert flops == pytest.approx(6 * workload.tokens * met)


def test_causal_attention_needs_each_pair_once():
    cfg = SMALL.model.attention
    pairs = sum(k <= q for q in range(SMALL.length) for k in range(SMALL.length))
    layers_and_heads = SMALL.model.num_layers * cfg.num_heads * SMALL.batch
    flops = 6 * layers_and_heads * pairs * (cfg.qk_dim + cfg.value_dim)
    assert SMALL.attention_flops(causal=True) == flops
    square = SMALL.attention_flops(causal=False)
    assert square * pairs == flops * SMALL.length**2


def test_both_sides_take_turns_and_rounds_alternate(side):
    with Worker(f"{side}.tasks", name="a") as a, Worker(f"{side}.tasks", name="b") as b:
        pids = {worker.run("pid").result for worker in (a, b)}
        turns = take_turns({"a": Seat(a, "a", 2), "b": Seat(b, "b")}, rounds=2)
    assert len(pids) == 2
    assert [turn.result for turn in turns["a"]] == [["a"] * 2, ["a"] * 4]
    assert [len(turn.seconds) for turn in turns["a"] + turns["b"]] == [2, 2, 1, 1]
    assert all(turn.peak_bytes > 1e6 for turn in turns["b"])


def test_a_side_has_an_environment_of_its_own(side, monkeypatch):
    monkeypatch.setenv("BENCH", "outside")
    with Worker(f"{side}.tasks", environment={"BENCH": "inside"}, name="a") as worker:
        assert worker.run("variable").result == "inside"
    with Worker(f"{side}.tasks", name="a") as worker:
        assert worker.run("variable").result == "outside"


def test_a_side_that_fails_is_named(side):
    with pytest.raises(RuntimeError, match=r"bench_side.broken ended with exit code 1"):
        Worker(f"{side}.broken")


def test_the_capacity_layer_computes_what_ours_does_where_there_is_room_for_all():
    layers, inputs = ours.moe_layers(SMALL)
    got, want = (
        jax.jit(functools.partial(ours.forward_backward, layers[name]))(*inputs)
        for name in ("gshard", "ours")
    )
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-6)


def test_a_full_expert_drops_the_later_tokens_of_a_group():
    cfg = SMALL.model.moe.router
    _, (params, x_BTD, _) = ours.moe_layers(SMALL)
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    all_ND, first_ND = (
        gshard.capacity_layer(
            params, jnp.zeros(cfg.num_experts), x_ND, cfg, capacity_factor=factor
        )
        for factor in (2.0, 0.1)  # places for all 8 tokens of a group, and for 1
    )
    same_N = np.isclose(first_ND, all_ND, rtol=1e-4, atol=1e-6).all(-1)
    assert same_N.reshape(gshard.GROUPS, -1)[:, 0].all()
    assert not same_N.reshape(gshard.GROUPS, -1)[:, -1].any()


def test_experts_in_place_are_each_an_mlp_of_its_own_rows():
    _, (params, x_BTD, _) = ours.moe_layers(SMALL)
    experts = params["experts"]
    rows_EMD = jnp.tile(x_BTD, (6, 1, 1)).reshape(12, 16, 32)
    got_EMD = ours.batched_mlp(experts, rows_EMD)
    gate_DF, up_DF = experts["gate_up"][3].swapaxes(0, 1)
    hidden_MF = jax.nn.silu(rows_EMD[3] @ gate_DF) * (rows_EMD[3] @ up_DF)
    want_MD = hidden_MF @ experts["down"][3]
    np.testing.assert_allclose(got_EMD[3], want_MD, rtol=1e-5, atol=1e-6)


def test_every_linear_map_has_three_matmuls_to_time():
    linears = SMALL.routed_linears()
    seconds = ours.plain_matmuls(linears)["seconds"]()
    assert [len(matmuls) for matmuls in seconds] == [3] * len(linears)
    assert all(s > 0 for matmuls in seconds for s in matmuls.values())


def test_both_sides_train_the_same_model(monkeypatch):
    torch = pytest.importorskip("torch", reason="needs the test extra's torch")
    pytest.importorskip("transformers", reason="needs the test extra's transformers")
    from experiments.benchmarks import theirs

    monkeypatch.setattr(torch, "compile", lambda function: function)  # takes a minute
    mine, other = ours.train_step(SMALL), theirs.train_step(SMALL, adamw="fused")
    assert mine["parameters"]() == other["parameters"]()
    got, want = ([side["step"]() for _ in range(3)] for side in (mine, other))
    np.testing.assert_allclose(got, want, rtol=0.01)  # weights are random, and differ
    assert got[0] > got[-1] and want[0] > want[-1]


def turn(*seconds, result=None, peak=1):
    return Turn(list(seconds), result, int(peak * 2**30), 2**29)


def matmuls(*seconds):
    return turn(1.0, result=[{"output": s} for s in seconds])


STEP = {
    "ours": [turn(4.0, 4.0), turn(8.0, 8.0), turn(5.0, 5.0, peak=3)],
    "theirs": [turn(6.0, 6.0), turn(8.0, 8.0), turn(5.5, 5.5, peak=2)],
    "matmuls": [matmuls(*[1.0] * 13)] * 3,
}


def by_name(figures):
    return {figure.name: figure for figure in figures}


def test_a_ratio_compares_the_sides_within_a_round():
    figure = by_name(train_cpu.step_figures(STEP, SMALL))[
        "training speed, ours / theirs"
    ]
    assert figure.value == pytest.approx(1.1)  # of 1.5, 1.0 and 1.1
    assert figure.met


def test_a_missed_target_is_said_to_be_missed():
    figure = by_name(train_cpu.memory_figures(STEP))["peak memory, ours / theirs"]
    assert figure.value == 1.5
    assert figure.met is False


def test_the_floor_is_the_steps_operations_at_the_rate_of_its_matmuls():
    linears = SMALL.step_linears()
    seconds = sum(linear.count for linear in linears)
    flops = sum(linear.flops for linear in linears)
    share = 1 + SMALL.attention_flops(causal=True) / flops
    found = by_name(train_cpu.floor_figures(STEP, SMALL))
    assert found["plain matmul rate"].value == pytest.approx(flops / seconds / 1e9)
    assert found["step's floor"].value == pytest.approx(seconds * share)
    assert found["floor / ours"].value == pytest.approx(seconds * share / 5.0)


def test_the_layers_targets_are_against_matmuls_and_gshard():
    turns = {
        "ours": [turn(0.27, 0.27, 9.0)],
        "theirs": [turn(0.54)],
        "compiled": [turn(0.81)],
        "gshard": [turn(0.6)],
        "in_place": [turn(0.24)],
        "matmuls": [matmuls(0.05, 0.1, 0.05)],
    }
    found = by_name(train_cpu.layer_figures(turns, SMALL))
    assert found["MoE layer, ours"].value == pytest.approx(270)
    ratio = found["MoE layer, ours / matmuls"]
    assert (ratio.value, ratio.met) == (pytest.approx(1.35), True)
    ratio = found["MoE layer, gshard / ours"]
    assert (ratio.value, ratio.met) == (pytest.approx(0.6 / 0.27), False)
    assert found["MoE layer, theirs / ours"].value == pytest.approx(2.0)
    assert found["MoE layer, in_place / matmuls"].value == pytest.approx(1.2)


def report():
    make = functools.partial(Figure, unit="×", definition="a over b")
    return Report(
        suite="example",
        compared=(),
        settings={"rounds": 1},
        figures=[
            make(name="speed", value=1234.5, unit="tokens/s"),
            make(name="gain", value=1.2, at_least=1.0),
            make(name="cost", value=1.2, at_most=1.0),
        ],
        samples={"seconds": [[0.1]]},
    )


def test_the_json_says_what_was_measured_where_and_with_what(tmp_path):
    written = json.loads(report().write(tmp_path / "new").read_text())
    assert (tmp_path / "new" / "example.json").exists()
    assert [figure["met"] for figure in written["figures"]] == [None, True, False]
    assert written["figures"][1]["at_least"] == 1.0
    assert written["machine"]["cores"] >= 1
    assert written["machine"]["memory_bytes"] > 2**20
    assert {"python", "jmoe", "jax"} <= written["versions"].keys()
    assert written.keys() >= {"command", "commit", "date", "settings", "samples"}


def test_the_table_puts_what_was_asked_beside_what_was_measured():
    console = rich.console.Console(width=80)
    with console.capture() as capture:
        console.print(report().table())
    speed, gain, cost = capture.get().splitlines()[-4:-1]
    assert "1,234" in speed
    assert all(text in gain for text in ("≥ 1", "1.2", "met"))
    assert all(text in cost for text in ("≤ 1", "1.2", "missed"))
