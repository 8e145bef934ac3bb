"""What neither engine can do is refused by both, in the same words."""

import pytest

from jmoe.config import override
from jmoe.config.serve import ServeConfig
from jmoe.serve import jax_config, vllm_engine
from tests.smallest_run import get_config

MODEL = override(get_config().model, ["mtp_depth=0"])


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("expert_parallel=True", "engine.expert_parallel=True needs engine.tensor_par"),
        ("draft_tokens=2", "engine.draft_tokens=2 needs a model with MTP modules"),
        ("max_length=65", "engine.max_length=65 must be at most the .*positions=64"),
    ],
)
def test_both_engines_refuse_in_the_same_words(tmp_path, setting, said):
    cfg = override(ServeConfig(), [f"engine.{setting}"])
    exported = vllm_engine.Exported(tmp_path, MODEL, False)
    with pytest.raises(ValueError, match=said) as ours:
        jax_config.check(MODEL, cfg)
    with pytest.raises(ValueError, match=said) as theirs:
        vllm_engine.make_engine(exported, cfg, vllm_engine.Host("cpu", (0, 1), False))
    assert str(ours.value) == str(theirs.value)
