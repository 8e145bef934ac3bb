"""Notebooks, run as their readers run them, in a checkout with nothing in it."""

import os
import pathlib

import jax
import pytest

from tests.several_processes import xla_flags

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

FOLDER = pathlib.PurePath("experiments") / "notebooks"
ROOT = pathlib.Path(__file__).parents[1]


def read(name: str):
    return nbformat.read(ROOT / FOLDER / name, as_version=4)


def execute(name: str, checkout: pathlib.Path, last_cell: str):
    """Returns a notebook that was run in a kernel of its own, with one more cell.

    It works in its folder of `checkout`, and caches its data there.
    """
    notebook = read(name)
    notebook.cells.append(nbformat.v4.new_code_cell(last_cell))
    folder = checkout / FOLDER
    folder.mkdir(parents=True)
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(folder)}}
    )
    environment = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"],
        "XDG_CACHE_HOME": str(checkout),
        "XLA_FLAGS": xla_flags(devices=1),  # as a reader has
    }
    client.execute(env=os.environ | environment)
    return notebook


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(notebook) -> set[str]:
    """Returns what kinds of outputs there are: streams, pictures, values."""
    return {output.output_type for cell in code(notebook) for output in cell.outputs}


def streams(notebook) -> set[str]:
    """Returns what was written to; "stderr" if anything warned."""
    outputs = [o for cell in code(notebook) for o in cell.outputs if "name" in o]
    return {output.name for output in outputs}


def assert_holds_no_results(name: str) -> None:
    """Nor anything else of the machine that it was written on."""
    notebook = read(name)
    for cell in code(notebook):
        assert not cell.outputs and cell.execution_count is None
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
