"""`scripts/check_hopper.py` where it can't compile for GPUs."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is not None,
    reason="it can compile here",
)
def test_an_environment_that_cannot_be_made_ends_it_with_the_reason(tmp_path):
    (tmp_path / "file").write_text("not an environment")
    done = subprocess.run(
        [sys.executable, "scripts/check_hopper.py", f"--environment={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert f"{tmp_path} holds something else" in done.stderr
    assert "error: JAX can't compile for GPUs here" in done.stderr
    assert (tmp_path / "file").exists()
