"""A run's weights as one file for `torch.load`: a plain state dict of tensors.

Its names are those of the checkpoints of the model's family. The weights are written as
safetensors first, and torch gets them mapped from there: what the system has no room
for, it drops and reads again.
"""

import pathlib
import shutil
from typing import Any

import numpy as np

from jmoe.data import durable
from jmoe.export import safetensors
from jmoe.export.export_run import export_run


def export_torch(workdir: pathlib.Path, out: pathlib.Path, **options: Any) -> None:
    """Writes the file `out`; `options` and errors are those of `export_run`.

    Raises:
      ValueError: `out` exists, or torch isn't installed.
    """
    try:
        import torch
    except ImportError:
        raise ValueError("format='pt' needs torch, not installed here.") from None
    if out.exists():
        raise ValueError(f"out={str(out)!r} exists already; choose another.")
    directory = out.with_name(out.name + ".safetensors")
    export_run(workdir, directory, **options)
    try:
        with durable.replacing(out) as unfinished:
            torch.save(_mapped(directory), unfinished)
    finally:
        shutil.rmtree(directory)


def _mapped(directory: pathlib.Path) -> dict[str, Any]:
    """Returns the directory's tensors, read when they are touched."""
    import torch

    maps: dict[pathlib.Path, np.ndarray] = {}
    tensors = {}
    for name, found in safetensors.read_headers(directory).items():
        if found.file not in maps:  # writable for torch's sake, never on the disk
            maps[found.file] = np.memmap(found.file, np.uint8, mode="c")
        assert found.dtype is not None  # it was just written
        tensors[name] = torch.frombuffer(
            maps[found.file],
            dtype=getattr(torch, found.dtype.name),
            count=int(np.prod(found.shape)),
            offset=found.offset,
        ).reshape(found.shape)
    return tensors
