"""What our engine is asked for by the record that vLLM's is made of too."""

import dataclasses

import jax
import pytest

from jmoe.checkpoint.unread import Unread
from jmoe.config import ModelConfig, override
from jmoe.config.serve import ServeConfig
from jmoe.decode.limits import Limits
from jmoe.export import hf
from jmoe.serve import jax_engine, vllm_engine
from tests.serve.own import tokenizer, variables
from tests.smallest_run import get_config

MODEL = get_config().model
PAGE_TOKENS = Limits.page_size


def limits(*settings: str, model: ModelConfig = MODEL, gib: float = 1.0) -> Limits:
    cfg = override(ServeConfig(), [f"engine.{setting}" for setting in settings])
    return jax_engine.make_limits(model, cfg, gib * 2**30)


def test_by_default_there_is_room_for_64_sequences_of_the_models_longest():
    found = limits()
    assert (found.rows, found.slots, found.max_length) == ((1, 8, 64), 64, 64)
    assert found.chunks == (64,) and found.pages == 64
    assert found.queue == 64 + jax_engine.QUEUE
    assert found.drafts == 0 and found.top_logprobs == 20
    assert limits("max_sequences=3", "queue=2").queue == 5
    assert limits("max_sequences=3").rows == (1, 3)
    assert limits("draft_tokens=1", "max_length=32").drafts == 1


def test_places_are_shared_out_to_what_has_sequences_of_its_own():
    divided = ["tensor_parallel=4", "max_sequences=30"]
    assert limits(*divided).slots == 30
    spread = limits(*divided, "expert_parallel=True")
    assert spread.slots == 8 and spread.queue == 32 + jax_engine.QUEUE
    assert limits("pipeline_parallel=2", "max_sequences=30").slots == 15


def test_a_cache_has_as_many_pages_as_its_bytes_hold_on_each_device():
    long = dataclasses.replace(MODEL, max_positions=4096)
    entry = MODEL.attention.kv_latent_dim + MODEL.attention.rope_dim
    page = PAGE_TOKENS * entry * 4 * MODEL.num_layers
    gib = 100 * page / 2**30
    assert limits(model=long, gib=gib).pages == 100
    assert limits("pipeline_parallel=2", model=long, gib=gib).pages == 100
    assert limits(model=long, gib=gib / 4).max_length == 25 * PAGE_TOKENS
    with pytest.raises(ValueError, match="cache_gib=.* room for 1600 tokens.*=2000"):
        limits("max_length=2000", model=long, gib=gib / 4)
    with pytest.raises(ValueError, match="cache_gib=.* room for 0 tokens"):
        limits(model=long, gib=0.5 * page / 2**30)


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
        jax_engine.check(MODEL, cfg)


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
        jax_engine.check(MODEL, cfg)


def test_a_model_whose_tokens_always_travel_in_fp8_has_nothing_to_switch():
    controller = {"actions": ("fp8",), "step_seconds": 1}
    settings = SPREAD | {"engine.controller": controller}
    cfg = override(ServeConfig(), [f"{name}={x}" for name, x in settings.items()])
    jax_engine.check(MODEL, cfg)
    model = override(MODEL, ["moe.exchange.dispatch_dtype=float8_e4m3fn"])
    with pytest.raises(ValueError, match="'fp8', but this model's tokens travel in"):
        jax_engine.check(model, cfg)


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
        jax_engine.check(MODEL, placed)
    uneven = override(placed, ["engine.placement=none", "engine.spare_experts=1"])
    with pytest.raises(ValueError, match="spare_experts=1 and the model's 8 experts"):
        jax_engine.check(MODEL, uneven)
    plain = dataclasses.replace(MODEL, mtp_depth=0)
    drafting = override(ServeConfig(), ["engine.draft_tokens=2"])
    with pytest.raises(ValueError, match="draft_tokens=2 needs a model with MTP"):
        jax_engine.check(plain, drafting)
    jax_engine.check(MODEL, drafting)


@pytest.mark.parametrize(
    "setting",
    [
        "weights=fp8",
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
    found = jax_engine.controller_of(cfg.engine)
    assert found.actions == ("place", "admit") and found.wait_seconds == 20
    cfg = override(cfg, ["engine.controller={'actions': ()}"])
    assert jax_engine.controller_of(cfg.engine) == cfg.engine.controller


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported") / "tiny"
    hf.save(directory, MODEL, variables())
    for name, content in tokenizer().files.items():
        (directory / name).write_bytes(content)
    return directory


def test_an_exported_model_is_read_with_its_tokenizer(exported):
    model = jax_engine.read_model(exported)
    assert model.num_layers == MODEL.num_layers
    cfg = override(ServeConfig(), ["engine.dtype=bfloat16"])
    trained = jax_engine.load(exported, cfg.engine, None)
    assert trained.run.model.dtype == "bfloat16"
    assert trained.tokenizer.files.keys() == tokenizer().files.keys()
    with pytest.raises(ValueError, match="step=5 is for runs"):
        jax_engine.load(exported, cfg.engine, 5)


def test_weights_are_read_at_once_for_one_device_and_later_for_a_mesh(exported):
    one, mesh = ServeConfig(), override(ServeConfig(), ["engine.tensor_parallel=2"])
    read = jax_engine.load(exported, one.engine, None).variables
    assert isinstance(read["params"]["embedding"], jax.Array)
    unread = jax_engine.load(exported, mesh.engine, None).variables
    assert isinstance(unread, Unread)


def test_what_holds_no_model_or_no_tokenizer_is_told(exported, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a run nor an exported model"):
        jax_engine.read_model(tmp_path / "nothing")
    for path in exported.iterdir():
        if not path.name.startswith("tokenizer"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(FileNotFoundError, match="tokenizer='.*json': no such file"):
        jax_engine.load(tmp_path, ServeConfig().engine, None)


def test_more_devices_than_there_are_are_refused():
    trained = jax_engine.Trained(get_config(), tokenizer(), variables(), 0)
    cfg = override(ServeConfig(), ["engine.tensor_parallel=1024"])
    with pytest.raises(ValueError, match="= 1024 devices; there are"):
        jax_engine.make_engine(trained, cfg)


def test_a_damaged_template_is_refused_before_the_engine_is_made(tmp_path, monkeypatch):
    files = tokenizer().files | {"chat_template.jinja": b"{% for %}"}
    monkeypatch.setattr(tokenizer(), "files", files)
    trained = jax_engine.Trained(get_config(), tokenizer(), variables(), 0)
    with pytest.raises(ValueError, match="none of Jinja's"):
        jax_engine.serve(trained, ServeConfig())
