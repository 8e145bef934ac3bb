"""vLLM answers with a model of every family; it needs vLLM (`pytest -m serving`)."""

import json
import pathlib
import subprocess
import sys

import pytest

from jmoe.config import override
from jmoe.decode.generate import generate
from jmoe.export import hf
from tests.families.cases import TINY, with_heads_of
from tests.parity import exportable_variables

pytestmark = pytest.mark.serving
PROGRAM = pathlib.Path(__file__).parent / "vllm_program.py"
NEW = 30
PROMPTS = ([0], [7, 3, 40, 11], [5, 44, 2, 9, 31, 17, 28, 6, 13])


def model(family):
    """Returns a model with heads of a size that vLLM has on CPUs."""
    cfg = TINY[family]
    if cfg.attention.kind == "mla":
        cfg = override(cfg, ["attention.nope_dim=24"])
    else:
        cfg = with_heads_of(cfg, 32)
    return cfg, exportable_variables(cfg)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Gives what vLLM continues the prompts with, by family."""
    directories = []
    for family in TINY:
        directory = tmp_path_factory.mktemp("exported") / family
        hf.save(directory, *model(family))
        (directory / "tokenizer.json").touch()
        directories.append(str(directory))
    asked = json.dumps([[path, PROMPTS] for path in directories])
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(NEW), asked], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return dict(zip(TINY, found, strict=True))


@pytest.mark.parametrize("family", TINY)
def test_vllm_answers_with_a_familys_export_as_jmoe_does(answers, family):
    want = generate(*model(family), PROMPTS, max_new_tokens=NEW)
    assert answers[family] == want
    assert len({token for tokens in want for token in tokens}) > 10
