"""The notebook of chosen experts draws each choice of a model, and no other."""

import base64
import io

import jax
import matplotlib.image
import pytest

from jmoe.checkpoint.store import Store
from jmoe.checkpoint.workdir import open_run
from jmoe.data.tokenizer import train_bpe
from jmoe.nn.model import Transformer, make_variables
from tests import notebooks
from tests.smallest_run import get_config

NAME = "experts.ipynb"
TILES_ARE_THE_CHOICES = """
for (axis, bars), expert_TK in zip(grid, expert_LTK, strict=True):
    bands = num_groups // 2
    tiles = axis.patches[bands:]
    drawn = {tuple(np.rint(tile.get_center()).astype(int)) for tile in tiles}
    chosen = zip(*np.nonzero(expert_TK < num_experts), strict=True)
    assert drawn == {(t, expert_TK[t, k]) for t, k in chosen}
    assert sum(bar.get_width() for bar in bars.patches[bands:]) == len(tiles)
assert len(drawn) == 2 * (len(tokens) - 1)  # an MTP module's last token visits none
assert len(axis.get_xticklabels()) == len(tokens)
assert met_VE.max() <= 1 and met_VE[:, 0].max() > 0
"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkout")
    save_new_run(root / "runs" / "tiny")
    return notebooks.execute(NAME, root, TILES_ARE_THE_CHOICES)


def test_every_cell_runs_and_draws_the_choices_without_a_warning(executed):
    assert notebooks.kinds(executed) == {"stream", "display_data"}
    assert notebooks.streams(executed) == {"stdout"}


def test_the_picture_is_wide_and_not_blank(executed):
    (picture,) = [
        output.data["image/png"]
        for cell in notebooks.code(executed)
        for output in cell.outputs
        if output.output_type == "display_data"
    ]
    pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(picture)))
    assert pixels.shape[1] > 800 and pixels[..., :3].std() > 0.05


def test_the_file_holds_no_results_of_any_one_machine():
    notebooks.assert_holds_no_results(NAME)


def save_new_run(workdir) -> None:
    """What a run leaves behind that was never trained."""
    run = get_config()
    model = Transformer(run.model)
    open_run(workdir, run)
    tokenizer = train_bpe(["def mean(values):"], run.model.vocab_size)
    tokenizer.save(str(workdir / "tokenizer.json"))
    with Store(workdir / "checkpoints") as store:
        store.save(0, jax.jit(lambda: make_variables(model, seed=0))(), {})
