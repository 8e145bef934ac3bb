"""Decoding is measured on the same work everywhere, and against the bytes it takes."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.benchmarks import (
    decode_bytes,
    decode_cpu,
    decode_figures,
    decode_ours,
)
from experiments.benchmarks.decode_work import Decoding, mixed_requests
from experiments.benchmarks.workers import Turn
from jmoe.config import ModelConfig, override
from jmoe.nn.model import Transformer, abstract_variables, make_variables

CFG = override(
    ModelConfig.preset("bench_s"),
    [
        "num_layers=2",
        "hidden_dim=32",
        "vocab_size=64",
        "dense_mlp_dim=48",
        "moe.expert_mlp_dim=16",
        "moe.router.num_experts=16",
    ],
)
SMALL = Decoding(model=CFG, prompt=8, new=4, batches=(1, 2))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Random weights, as all sides read them."""
    path = tmp_path_factory.mktemp("decode") / "model"
    decode_ours.export(str(path), CFG)["export"]()
    return str(path)


@pytest.fixture(scope="module")
def ours(directory):
    return decode_ours.generate(directory, SMALL)


def test_fewer_prompts_are_the_first_of_many():
    many, few = SMALL.prompts(2), SMALL.prompts(1)
    assert many.shape == (2, SMALL.prompt)
    np.testing.assert_array_equal(many[:1], few)


def test_mixed_requests_are_of_all_lengths():
    lengths = np.array([[len(x.prompt), x.new] for x in mixed_requests(CFG, 200, 64)])
    assert lengths.min() < 10 and lengths.max() > 58 and lengths.max() <= 64
    assert abs(np.median(lengths) - 64 / 8**0.5) < 5


def test_a_step_reads_every_weight_once_where_tokens_choose_all_experts():
    cfg = override(CFG, ["mtp_depth=1"])
    params = abstract_variables(cfg)["params"]
    sizes = {
        name: sum(x.size for x in jax.tree.leaves(params[name])) for name in params
    }
    drafting = sizes.pop("mtp_0") + sizes["head"]
    del sizes["embedding"]
    assert decode_bytes.step_bytes(cfg).of(16) == 4 * sum(sizes.values())
    assert decode_bytes.draft_bytes(cfg).of(16) == 4 * drafting
    tied = dataclasses.replace(cfg, tie_embeddings=True)
    assert decode_bytes.step_bytes(tied) == decode_bytes.step_bytes(cfg)


def test_experts_that_several_tokens_choose_are_read_once():
    expert_LBTK = np.array([[[[0, 1], [0, 1]], [[1, 2], [3, 4]]]])
    assert decode_bytes.of_batch(expert_LBTK, 1) == 2
    assert decode_bytes.of_batch(expert_LBTK, 2) == 3.5
    assert decode_bytes.of_drafts(expert_LBTK, 2) == 3  # 0 and 1; 1 to 4
    assert decode_bytes.of_drafts(expert_LBTK[:, 1:], 2) == 4


def test_a_drafts_bytes_by_chance_are_those_of_even_choices():
    cfg = override(CFG, ["mtp_depth=1"])
    rng = np.random.default_rng(0)
    shape = cfg.num_moe_layers, 1, 2000, cfg.moe.router.top_k
    # Each step's tokens choose without replacement, and independently.
    order = rng.permuted(np.tile(np.arange(16), (*shape[:3], 1)), axis=-1)
    two = decode_bytes.of_drafts(order[..., : shape[-1]], 2)
    own, drafting = decode_bytes.step_bytes(cfg), decode_bytes.draft_bytes(cfg)
    with_draft = own.of(two) + drafting.of(two / cfg.num_moe_layers)
    want = with_draft / own.of(cfg.num_moe_layers * shape[-1])
    assert decode_bytes.draft_ratio(cfg) == pytest.approx(want, rel=0.01)


def test_choices_are_those_that_the_router_counts():
    variables = jax.jit(make_variables, static_argnums=(0, 1))(Transformer(CFG), 0)
    tokens_BT = SMALL.prompts(2)
    measured = jax.jit(Transformer(CFG).apply)(variables, tokens_BT).measured
    expert_LBTK = decode_bytes.choices(CFG, variables, tokens_BT)
    assert expert_LBTK.shape == (1, 2, SMALL.prompt, 6)
    got = np.bincount(expert_LBTK.ravel(), minlength=16)
    np.testing.assert_array_equal(got, measured.load.load_E[0])


def test_a_calls_first_tokens_are_those_of_a_longer_one(ours):
    for batch in SMALL.batches:
        first, whole = ours[f"prefill_{batch}"](), ours[f"generate_{batch}"]()
        assert [len(x) for x in whole] == [SMALL.new] * batch
        assert first == [x[:1] for x in whole]


def test_bytes_lie_between_one_tokens_and_the_whole_models(ours):
    found = ours["bytes"]()
    least, most = (decode_bytes.step_bytes(CFG).of(n) for n in (6, 16))
    assert least == found["step"]["1"] <= found["step"]["2"] <= most
    assert found["with_draft"] > found["step"]["1"]
    assert all(1 < ratio < 2 for ratio in found["draft_shapes"].values())
    assert found["cache_token"] == 2 * (128 + 32) * 4


def test_transformers_completes_as_we_do(directory, ours, monkeypatch):
    pytest.importorskip("torch", reason="needs the test extra's torch")
    pytest.importorskip("transformers", reason="needs the test extra's transformers")
    from experiments.benchmarks import decode_transformers

    not_compiled = [way for way in decode_transformers.WAYS if not way[1]]
    monkeypatch.setattr(decode_transformers, "WAYS", not_compiled)
    theirs = decode_transformers.generate(directory, SMALL)
    for name in ("prefill_2", "generate_1", "generate_2"):
        assert theirs[name]() == ours[name]()
    assert theirs["kept"]().keys() == {"1", "2"}


def test_requests_have_the_same_tokens_together(directory):
    tasks = decode_ours.requests(directory, count=3, longest=8)
    assert tasks["together"]() == tasks["one_by_one"]()


def test_a_long_prompts_steps_are_told_apart(directory):
    (found,) = (
        task() for task in decode_ours.arrival(directory, 2, 4, chunks=3).values()
    )
    assert {name: len(seconds) for name, seconds in found.items()} == {
        "alone": 3,
        "beside": 3,
        "undisturbed": 3,
    }


def turn(*seconds, result=None):
    return Turn(list(seconds), result, 1, 1)


def turns():
    """Two rounds, in the second of which the machine is half as fast."""
    calls = {
        f"{side}_{call}_{batch}": [
            turn(factor * seconds, result=[[0] * 4] * batch) for factor in (1, 2)
        ]
        for side, factor_of_side in (("ours", 1), ("theirs", 3))
        for call, seconds in (
            ("prefill", 0.1 * factor_of_side),
            ("generate", 0.4 * factor_of_side),
        )
        for batch in SMALL.batches
    }
    found = {
        "step": {"1": 2**30 / 100, "2": 2**30 / 50},
        "experts": {"1": 6.0, "2": 10.0},
        "with_draft": 2**30 / 50,
        "draft_shapes": {"dense": 1.2},
        "cache_token": 640,
    }
    return {**calls, "bytes": [turn(1.0, result=found)], "read": [turn(1.0), turn(2.0)]}


def by_name(figures):
    return {figure.name: figure for figure in figures}


def test_speeds_are_of_new_tokens_and_ratios_within_a_round():
    found = by_name(decode_figures.side_figures(turns(), SMALL))
    assert found["decoding at batch 2, ours"].value == pytest.approx(8 / 0.6)
    assert found["prefill at batch 1, ours"].value == pytest.approx(8 / 0.15)
    gain = found["decoding at batch 1, ours / theirs"]
    assert (gain.value, gain.met) == (pytest.approx(3), True)
    assert found["decoding at batch 2, ours / theirs"].at_least is None


def test_the_floor_is_the_bytes_of_a_step_at_the_rate_of_its_round():
    found = by_name(decode_figures.side_figures(turns(), SMALL))
    assert found["step's floor at batch 1"].value == pytest.approx(15)
    # Three steps take 0.3 s: 0.1 a step, and 10 ms would do.
    assert found["floor / ours at batch 1"].value == pytest.approx(0.1)
    assert found["floor / ours at batch 1"].met is False


def test_a_line_through_steps_has_the_slope_that_they_have(tmp_path):
    contexts = (100, 200, 400)
    steps = [turn(1.0, result=[0.001 + 1e-6 * n for n in contexts])]
    found = turns() | {"steps": steps}
    figures = by_name(decode_figures.context_figures(found, contexts))
    assert figures["step without context"].value == pytest.approx(1)
    rate = 0.75 * 2**30
    ratio = figures["that rise over the cache's bytes"].value
    assert ratio == pytest.approx(1e-6 * rate / 640)
    assert figures["R² of the line"].value == pytest.approx(1)
    decode_figures.draw_context(found, contexts, tmp_path / "context.png")
    assert (tmp_path / "context.png").stat().st_size > 1000


def drafts(accepted, steps, seconds, tokens):
    result = {"tokens": tokens, "steps": steps, "accepted": accepted}
    return [turn(seconds, result=result)]


def test_drafts_that_were_right_are_told_by_position():
    tokens = [[1, 2, 3, 4], [5, 6, 7, 8]]
    found = turns() | {
        "drafts_0": drafts([], 6, 2.0, tokens),
        "drafts_1": drafts([2], 4, 1.0, tokens),
        "drafts_2": drafts([2, 1], 4, 4.0, tokens),
    }
    figures = by_name(decode_figures.draft_figures(found))
    assert figures["acceptance of draft 1 of 1"].value == 0.5
    assert figures["acceptance of draft 2 of 2"].value == 0.25
    assert figures["tokens a step, 2 drafts"].value == 1.75
    assert figures["speed with drafts / plain"].value == 2
    assert figures["bytes of a step with a draft / without, bench_s"].value == 2
    assert figures["most that a draft can gain, bench_s"].value == 1
    at_this = figures["most at the trained model's acceptance, dense"].value
    assert at_this == pytest.approx(1.5 / 1.2)


def test_tokens_that_differ_are_named():
    same = [turn(1.0, result=[[1]])]
    equal = turns() | {
        **{f"drafts_{i}": drafts([], 1, 1.0, [[1]]) for i in range(3)},
        "together": same,
        "one_by_one": same,
    }
    assert decode_figures.wrong(equal, SMALL) == ()
    other = [turn(1.0, result=[[1] * 4])] * 2
    said = decode_figures.wrong(
        equal
        | {
            "theirs_generate_1": other,
            "drafts_2": drafts([], 1, 1.0, [[2]]),
            "together": other,
        },
        SMALL,
    )
    assert all(any(x in text for text in said) for x in ("batch 1", "drafts_2"))
    assert len(said) == 3


def test_the_suite_needs_what_it_measures_against(monkeypatch):
    monkeypatch.setattr(decode_cpu.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="against torch and transformers"):
        decode_cpu.run(1, print)
