"""What our engine is asked for by the record that vLLM's is made of too."""

import dataclasses

import pytest

from jmoe.config import override
from jmoe.config.serve import ServeConfig
from jmoe.serve import jax_config, vllm_engine
from tests.smallest_run import get_config

MODEL = get_config().model


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("weights=fp4", "weights='fp4' is not one of native, fp8, int4-experts"),
        ("compiled=False", "engine.compiled=False is for engine='vllm'"),
        ("max_length=65", "max_length=65 must be at most .* max_positions=64"),
        ("expert_parallel=True", "needs engine.tensor_parallel above 1"),
        ("spare_experts=2", "spare_experts=2 needs engine.expert_parallel=True"),
    ],
)
def test_what_our_engine_does_not_have_is_refused_before_anything_is_loaded(
    setting, said
):
    cfg = override(ServeConfig(), [f"engine.{setting}"])
    with pytest.raises(ValueError, match=said):
        jax_config.check(MODEL, cfg)


SPREAD = {"engine.tensor_parallel": 2, "engine.expert_parallel": True}


@pytest.mark.parametrize(
    ("actions", "changed", "said"),
    [
        ({"step_seconds": 1}, {"engine.expert_parallel": False}, "'fp8', which needs"),
        ({}, {}, "'fp8', which needs engine.controller.step_seconds"),
        ({"actions": ("drop",)}, {}, "'drop', which needs engine.controller.device_ro"),
    ],
)
def test_actions_that_could_never_be_taken_are_refused(actions, changed, said):
    controller = {"actions": ("fp8",)} | actions
    settings = SPREAD | changed | {"engine.controller": controller}
    cfg = override(ServeConfig(), [f"{name}={x}" for name, x in settings.items()])
    with pytest.raises(ValueError, match=said):
        jax_config.check(MODEL, cfg)


def test_a_model_whose_tokens_always_travel_in_fp8_has_nothing_to_switch():
    controller = {"actions": ("fp8",), "step_seconds": 1}
    settings = SPREAD | {"engine.controller": controller}
    cfg = override(ServeConfig(), [f"{name}={x}" for name, x in settings.items()])
    jax_config.check(MODEL, cfg)
    model = override(MODEL, ["moe.exchange.dispatch_dtype=float8_e4m3fn"])
    with pytest.raises(ValueError, match="'fp8', but this model's tokens travel in"):
        jax_config.check(model, cfg)


def test_placement_and_drafts_without_a_module_are_refused():
    placed = override(
        ServeConfig(),
        [
            "engine.tensor_parallel=2",
            "engine.expert_parallel=True",
            "engine.placement={'redundant_experts': 2}",
        ],
    )
    with pytest.raises(ValueError, match="engine.placement is for engine='vllm'"):
        jax_config.check(MODEL, placed)
    uneven = override(placed, ["engine.placement=none", "engine.spare_experts=1"])
    with pytest.raises(ValueError, match="spare_experts=1 and the model's 8 experts"):
        jax_config.check(MODEL, uneven)
    plain = dataclasses.replace(MODEL, mtp_depth=0)
    drafting = override(ServeConfig(), ["engine.draft_tokens=2"])
    with pytest.raises(ValueError, match="draft_tokens=2 needs a model with MTP"):
        jax_config.check(plain, drafting)
    jax_config.check(MODEL, drafting)


@pytest.mark.parametrize(
    "setting",
    [
        "weights=fp8",
        "prompt_tokens=64",
        "queue=5",
        "deadline_seconds=9",
        "controller={}",
        "spare_experts=0",
    ],
    ids=str,
)
def test_what_only_our_engine_has_is_refused_for_vllm(tmp_path, setting):
    cfg = override(ServeConfig(), [f"engine.{setting}"])
    exported = vllm_engine.Exported(tmp_path, MODEL, False)
    host = vllm_engine.Host("cpu", (0, 1), False)
    field = setting.partition("=")[0]
    with pytest.raises(ValueError, match=f"{field}=.* is for --engine=jax"):
        vllm_engine.make_engine(exported, cfg, host)


def test_by_default_experts_are_placed_and_requests_admitted_that_come_in_time():
    cfg = override(ServeConfig(), ["engine.deadline_seconds=20"])
    found = jax_config.controller_of(cfg.engine)
    assert found.actions == ("place", "admit") and found.wait_seconds == 20
    cfg = override(cfg, ["engine.controller={'actions': ()}"])
    assert jax_config.controller_of(cfg.engine) == cfg.engine.controller
