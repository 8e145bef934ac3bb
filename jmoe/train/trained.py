"""The model of a run, read from its directory without what only training needs."""

import contextlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jmoe.checkpoint import manifest
from jmoe.checkpoint import workdir as workdirs
from jmoe.checkpoint.pieces import Pieces
from jmoe.checkpoint.retention import Which
from jmoe.checkpoint.store import Store
from jmoe.checkpoint.unread import Leaves, Slices, Unread
from jmoe.config import RunConfig, override
from jmoe.data.tokenizer import Tokenizer
from jmoe.nn.model import abstract_variables
from jmoe.nn.quantized import quantize_weights
from jmoe.train.guard import not_finite, require_finite

TOKENIZER = "tokenizer.json"
CHECKPOINTS = "checkpoints"
_ONLY_FOR_TRAINING = ("opt_state", "step")
_OF_WEIGHTS = ("model", "data.tokenizer")


class Trained(NamedTuple):
    """`variables` has the collections `params` and `router_state`, as of `step`.

    Or they are yet to be read.
    """

    run: RunConfig
    tokenizer: Tokenizer
    variables: Any
    step: int


def load_trained(workdir: pathlib.Path, *, step: Which = None) -> Trained:
    """Reads a run's newest whole checkpoint, or that of `step`, or the best.

    It changes nothing.

    Raises:
      FileNotFoundError: `workdir` holds no run, or not this checkpoint.
      ValueError: a file of the run is damaged, or of another version of jmoe, or the
        weights aren't finite.
    """
    run, tokenizer = _read_run(workdir)
    with Store(workdir / CHECKPOINTS) as store:
        variables, _, found = store.restore(
            abstract_variables(run.model), step, ignore=_ONLY_FOR_TRAINING
        )
        require_finite(variables, store.locate(found))
    return Trained(run, tokenizer, variables, found)


def look_at_trained(workdir: pathlib.Path, *, step: Which = None) -> Trained:
    """Returns what `load_trained` does, but for weights that are yet to be read.

    All processes call it; each has compared its share of the sums.

    Raises:
      FileNotFoundError, ValueError: as `load_trained`, but for weights that aren't
        finite, which who reads them is told.
    """
    run, tokenizer = _read_run(workdir)
    shapes = abstract_variables(run.model)
    with Store(workdir / CHECKPOINTS) as store:
        found, _ = store.find(shapes, step, _ONLY_FOR_TRAINING)
        directory = store.locate(found)
    leaves = manifest.flatten(shapes)

    @contextlib.contextmanager
    def opened() -> Iterator[Leaves]:
        pieces = Pieces(directory)

        def fill(out: np.ndarray, path: str, index: Slices) -> None:
            out[:] = pieces.read(path, index)
            if not np.isfinite(out).all():
                raise ValueError(not_finite(directory, [path]))

        yield Leaves(leaves, fill)

    return Trained(run, tokenizer, Unread(opened), found)


def _read_run(workdir: pathlib.Path) -> tuple[RunConfig, Tokenizer]:
    if not (workdir / workdirs.CONFIG).is_file():
        raise FileNotFoundError(
            f"workdir={str(workdir)!r} holds no run: it has no {workdirs.CONFIG}."
        )
    run = workdirs.read_run(workdir)
    return run, Tokenizer.from_file(workdir / TOKENIZER)


def check_start(workdir: pathlib.Path, run: RunConfig) -> None:
    """Refuses to begin at random where imported weights are meant; changes nothing.

    Raises:
      ValueError: `run` was imported, and `workdir` isn't where.
    """
    if run.initial_weights == "random":
        return
    with Store(workdir / CHECKPOINTS) as store:
        if store.latest_step() is not None:
            return
    raise ValueError(
        f"initial_weights={run.initial_weights!r}, but workdir={str(workdir)!r} has no "
        "checkpoint to take them from. To go on from them, let workdir be the "
        "directory that scripts/import_hf.py made, or a copy of it; to begin with "
        "random weights, --set initial_weights=random."
    )


def reconfigured(trained: Trained, assignments: Sequence[str]) -> Trained:
    """Returns the model with `path.to.field=value` over its record.

    Raises:
      ValueError: a field is unknown, or one that its weights and tokens depend on.
    """
    run = override(trained.run, assignments)
    changes = workdirs.fixed_changes(trained.run, run, _OF_WEIGHTS)
    for name, (old, new) in changes.items():
        raise ValueError(f"{name}={new!r} must stay {old!r}, as the run was trained.")
    return trained._replace(run=run)


def quantized(trained: Trained, form: str) -> Trained:
    """Returns the model with weights in one of `jmoe.nn.quantized.FORMS`.

    Native weights stay as they are.

    Raises:
      ValueError: there is no such form.
    """
    if form == "native":
        return trained
    quantize = jax.jit(quantize_weights, static_argnums=(1, 2))
    params = quantize(trained.variables["params"], trained.run.model, form)
    return trained._replace(variables={**trained.variables, "params": params})
