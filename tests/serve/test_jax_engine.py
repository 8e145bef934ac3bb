"""Our own engine is made ready from a run, or from an exported model."""

import asyncio
import dataclasses
import logging

import jax
import pytest

from jmoe.checkpoint.unread import Unread
from jmoe.config import ModelConfig, override
from jmoe.config.serve import ServeConfig
from jmoe.decode.limits import Limits
from jmoe.decode.requests import Sampling
from jmoe.export import hf
from jmoe.serve import jax_engine
from tests.serve.own import RESTLESS, tokenizer, variables
from tests.smallest_run import get_config

MODEL = get_config().model
PAGE_TOKENS = Limits.page_size


def limits(*settings: str, model: ModelConfig = MODEL, gib: float = 1.0) -> Limits:
    cfg = override(ServeConfig(), [f"engine.{setting}" for setting in settings])
    return jax_engine.make_limits(model, cfg, gib * 2**30)


def test_by_default_there_is_room_for_64_sequences_of_the_models_longest():
    found = limits()
    assert (found.rows, found.slots, found.max_length) == ((1, 8, 64), 64, 64)
    assert found.chunks == (32,) and found.pages == 64
    assert found.queue == 64 + jax_engine.QUEUE
    assert found.drafts == 0 and found.top_logprobs == 20
    assert limits("max_sequences=3", "queue=2").queue == 5
    assert limits("max_sequences=3").rows == (1, 3)
    assert limits("draft_tokens=1", "max_length=32").drafts == 1


@pytest.mark.parametrize(
    ("most", "readings"),
    [
        (16, [(1, 16)]),
        (48, [(1, 32)]),
        (100, [(1, 32), (2, 32)]),
        (128, [(1, 32), (1, 128), (2, 32), (4, 32)]),
        (300, [(1, 32), (1, 128), (2, 32), (2, 128), (4, 32), (8, 32)]),
    ],
)
def test_a_step_reads_no_more_of_prompts_than_asked(most, readings):
    long = dataclasses.replace(MODEL, max_positions=4096)
    assert limits(f"prompt_tokens={most}", model=long).readings == tuple(readings)
    if most == 128:
        assert limits(model=long).readings == tuple(readings)


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


def test_a_served_engines_decisions_are_done_logged_shown_and_counted(caplog):
    caplog.set_level(logging.INFO, jax_engine.__name__)
    trained = jax_engine.Trained(get_config(), tokenizer(), variables(), 0)
    settings = ["engine.max_sequences=1", "engine.max_length=32", RESTLESS]
    served = jax_engine.serve(trained, override(ServeConfig(name="tiny"), settings))
    asked = [([1, 2, 3], Sampling(max_new_tokens=9))] * 8

    async def ask():
        with served.worker.submit(asked, 60) as ticket:
            return [one async for some in ticket for one in some]

    assert len(asyncio.run(ask())) == len(asked)
    served.worker.close()
    decision = served.meter.snapshot().decisions[0]
    assert decision.kind == "admit" and "wait for up to" in decision.reason
    assert decision.change.endswith("requests may wait")
    assert f"admit: {decision.reason}; {decision.change}" in caplog.messages
    assert b'jmoe_decisions_total{kind="admit"' in served.meter.prometheus()
    assert served.meter.totals().steps.count_B.sum() > 70
