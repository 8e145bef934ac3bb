"""The model card: what a run measured, in words where it has no number."""

import pathlib

import pytest

from jmoe.config import ModelConfig
from jmoe.export.card import model_card
from jmoe.monitor.run_files import Run


@pytest.mark.parametrize(
    ("logged", "shown"),
    [(2.34567, "2.346"), ("NaN", "NaN: the run has diverged")],
)
def test_the_card_says_the_last_loss_or_that_it_is_none(logged, shown):
    rows = [{"step": 1, "val_loss": 5.0}, {"step": 2, "val_loss": logged}]
    run = Run(
        directory=pathlib.Path("runs/tiny"),
        config={},
        info={},
        rows=rows,
        samples=[],
        balance=None,
    )
    card = model_card(ModelConfig.preset("tiny"), run, 2, written_as="float32")
    assert f"| validation loss, nats a token | {shown} |" in card
