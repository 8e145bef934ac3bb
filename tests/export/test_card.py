"""The model card: what a run measured, in words where it has no number."""

import pathlib

import pytest

from jmoe.config import ModelConfig
from jmoe.data.tokenizer import Tokenizer, train_bpe
from jmoe.export.card import model_card, tokenizer_files
from jmoe.monitor.run_files import Run


def of_preset(preset, rows):
    run = Run(
        directory=pathlib.Path("runs/tiny"),
        config={},
        info={},
        rows=rows,
        samples=[],
        balance=None,
    )
    return model_card(ModelConfig.preset(preset), run, 2, written_as="float32")


@pytest.mark.parametrize(
    ("logged", "shown"),
    [(2.34567, "2.346"), ("NaN", "NaN: the run has diverged")],
)
def test_the_card_says_the_last_loss_or_that_it_is_none(logged, shown):
    rows = [{"step": 1, "val_loss": 5.0}, {"step": 2, "val_loss": logged}]
    card = of_preset("tiny", rows)
    assert f"| validation loss, nats a token | {shown} |" in card


@pytest.mark.parametrize(
    ("preset", "architecture", "has_biases"),
    [("tiny", "DeepseekV3", True), ("qwen3_30b", "Qwen3Moe", False)],
)
def test_the_card_names_the_class_and_a_rule_where_there_are_biases_to_move(
    preset, architecture, has_biases
):
    card = of_preset(preset, [])
    assert f"A `{architecture}ForCausalLM`: " in card
    assert ("loss-free load balancing (rule `sign`)" in card) == has_biases


def test_a_chat_template_beside_a_runs_tokenizer_is_exported_with_what_is_told_of_it():
    trained = train_bpe([], vocab_size=257)
    alone = Tokenizer(trained, eos_id=0)
    template = {"chat_template.jinja": b"{{ messages[0].content }}"}
    files = {**alone.files, **template}
    beside = Tokenizer(trained, eos_id=0, files=files)
    want = {**tokenizer_files(alone, 64), **template}
    assert tokenizer_files(beside, 64) == want
    assert want["tokenizer_config.json"]["bos_token"] == "<|endoftext|>"
    published = {**files, "tokenizer_config.json": b"{}"}
    came = Tokenizer(trained, eos_id=0, files=published)
    assert tokenizer_files(came, 64) == published
