"""A run and an export that jmoe 0.1 has written are read, compute the same, and go on.

`fixtures/v0_1.tar.gz` has a run of four steps with `moe.backend=blocks_remat`, by now
two fields; what it exported; and logits of its weights, as 0.1 computed them.
"""

import functools
import json
import pathlib
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.config import override
from jmoe.export import hf
from jmoe.nn.model import Transformer
from jmoe.train import loop
from jmoe.train.trained import load_trained

ARCHIVE = pathlib.Path(__file__).parent / "fixtures" / "v0_1.tar.gz"
TOKENS_BT = np.arange(24, dtype=np.int32).reshape(2, 12) * 7 % 264
SHOWN = 16  # logits of each position


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("v0_1")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(directory, filter="data")
    return directory


@functools.partial(jax.jit, static_argnums=0)
def logits(cfg, variables):
    output = Transformer(cfg).apply(variables, TOKENS_BT)
    return jnp.stack([output.logits, *output.mtp_logits])[..., :SHOWN]


@pytest.mark.parametrize("name", ["run", "export"])
def test_its_weights_compute_what_they_did(old, name):
    if name == "run":
        found = load_trained(old / name)
        cfg, variables = found.run.model, found.variables
        assert (cfg.moe.backend, cfg.moe.remat) == ("blocks", "activations")
    else:
        cfg, variables = hf.load(old / name)
    assert (cfg.family, cfg.attention.kind) == ("deepseek_v3", "mla")
    got = logits(cfg, variables)
    np.testing.assert_allclose(got, np.load(old / "logits.npy"), rtol=1e-5, atol=1e-6)


def test_its_run_goes_on(old):
    before = load_trained(old / "run")
    settings = [
        "train.steps=6",
        "schedule.beyond=hold",
        f"data.sources.0.path={old / 'corpus.txt'}",
    ]
    run = override(before.run, [*settings, f"data.cache_dir={old / 'cache'}"])
    loop.train(run, old / "run")
    after = load_trained(old / "run")
    assert (before.step, after.step) == (4, 6)
    last = (old / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["step"] == 6
