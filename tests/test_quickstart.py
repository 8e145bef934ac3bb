"""The notebook runs from top to bottom and shows what its text says.

It runs in a kernel of its own, as its reader's would, but for the folders: it works in
a temporary one, where it finds a finished run, and caches its data there.
"""

import jax
import jax.numpy as jnp
import pytest

from jmoe.checkpoint.store import Store
from jmoe.checkpoint.workdir import open_run
from jmoe.config import override, presets
from jmoe.data.tokenizer import train_bpe
from jmoe.nn.model import Transformer, make_variables
from tests import notebooks

NAME = "quickstart.ipynb"
EVERY_RULE_BALANCES = """
for max_vio in (history["max_vio"], quantile_history["max_vio"]):
    assert max_vio[10:20].mean() > 1.5
    assert max_vio[-10:].mean() < 1.0
assert history["loss"][-1] < 2.5
"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkout")
    save_blank_run(root / "runs" / "tiny", step=7)
    return notebooks.execute(NAME, root, EVERY_RULE_BALANCES)


def test_every_cell_runs_and_both_rules_balance_the_load(executed):
    kinds = {"stream", "display_data", "execute_result"}
    assert notebooks.kinds(executed) == kinds


def test_no_cell_warns(executed):
    assert notebooks.streams(executed) == {"stdout"}


def test_the_last_cell_opens_a_finished_run(executed):
    text = "".join(output.text for output in executed.cells[-2].outputs)
    assert text.startswith("tiny at step 7:\ndef f(")


def test_the_file_holds_no_results_of_any_one_machine():
    notebooks.assert_holds_no_results(NAME)


def save_blank_run(workdir, step):
    """What a run leaves behind, but for its optimizer; all weights are zero."""
    run = override(presets.tiny_run(), ["model.num_layers=2", "model.mtp_depth=0"])
    shapes = jax.eval_shape(lambda: make_variables(Transformer(run.model), seed=0))
    open_run(workdir, run)
    train_bpe(["def f("], vocab_size=300).save(str(workdir / "tokenizer.json"))
    with Store(workdir / "checkpoints") as store:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        store.save(step, zeros, {})
