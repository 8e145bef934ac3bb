"""Checkpoints that are whole or not there: asynchronous, atomic, checked.

A checkpoint is a directory named by its step. Orbax writes the arrays (uncompressed:
zstd takes over twice as long and saves 8% of float32 weights) under a temporary name,
we add `manifest.json` with the data loader's position and a checksum of each file, and
Orbax renames the directory. A run killed meanwhile leaves only the temporary name. All
is on the disk before it has its name, and the name is before anything older goes, so
that a power cut leaves the newest or the one before.

The state is any pytree of arrays. It is stored flat, by name ("params/embed/kernel"),
so that a checkpoint stays readable when a container's class changes, and in part.

Several processes (`jmoe.parallel.processes`) call the same methods, on one directory
that all of them see. Each writes and reads what its devices hold, sums what it wrote,
and compares the sums of its share of what is read; process 0 writes the manifest once
all have written, and removes.
"""

import functools
import json
import math
import operator
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from absl import logging

from jmoe.checkpoint import manifest, paths, removal, room, sealed, sums
from jmoe.checkpoint.manifest import DamagedCheckpointError
from jmoe.checkpoint.retention import (
    BEST,
    Retention,
    Which,
    find_best,
    read_losses,
)
from jmoe.data import durable
from jmoe.parallel import processes

PyTree = Any

_WRITE_TIMEOUT_S = 6 * 3600


class Store:
    """The checkpoints of one run: saves without holding up training, removes old ones.

    Opening a store and reading from it change nothing on disk. Saving removes what
    interrupted saves left unfinished and the whole checkpoints that are not among the
    newest `keep`, nor the `keep_best` of the lowest validation loss, nor of a step that
    `keep_every` divides. One that claims to be newer than the step saved or restored
    last is damaged or of another continuation of the run: it is set aside under another
    name, with a warning. Not thread-safe.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        *,
        keep: int = 2,
        keep_best: int = 0,
        keep_every: int | None = None,
    ):
        self._directory = pathlib.Path(directory).absolute()
        self._kept = Retention(newest=keep, best=keep_best, every=keep_every)
        self._current: int | None = None  # the step last saved or restored here
        self._writing = False
        self._failed: OSError | None = None  # a save that could not even begin
        self._handler = sealed.Handler(use_compression=False)
        self._writer = ocp.AsyncCheckpointer(
            self._handler,
            async_options=ocp.AsyncOptions(
                timeout_secs=_WRITE_TIMEOUT_S,
                create_directories_asynchronously=False,  # so that `save` can raise
            ),
            temporary_path_class=paths.Renamed,
        )
        self._remover = removal.Remover()

    def latest_step(self) -> int | None:
        """Returns the newest whole checkpoint; warns of newer ones that are damaged.

        Returns None where nothing was ever saved.

        Raises:
          FileNotFoundError: there are checkpoints, and none of them is whole.
        """
        return processes.from_first("newest checkpoint", self._newest)

    def _newest(self) -> int | None:
        for step in self._steps():
            try:
                manifest.read(self._path(step))
            except DamagedCheckpointError as error:
                logging.warning("Passed over: %s", error)
            else:
                return step
        if self._steps():
            raise self._none_whole()
        return None

    def save(
        self,
        step: int,
        state: PyTree,
        position: Mapping[str, Any],
        validation_loss: float = math.nan,
    ) -> None:
        """Starts to write `state` and the data loader's `position` as one checkpoint.

        Returns once the arrays may be donated or overwritten. (On CPU the writer shares
        their memory, and until it is done JAX copies where it would donate.) First
        waits for the save before, so that at most one state is in flight. The step
        saved or restored last isn't written again; what should be gone goes all the
        same.

        If the disk has no room, `wait` says so. Whoever saves again instead, as a run
        does that goes on, gets a warning: the checkpoint before is still there, and
        this save may find room. (One of several processes can't go on alone.)

        Args:
          step: the optimizer step; it names the checkpoint.
          state: any pytree of `jax.Array`.
          position: what JSON can hold.
          validation_loss: of this step; NaN: it wasn't evaluated.

        Raises:
          TypeError: `position` holds something else.
          ValueError: `step` comes before the one saved or restored last.
          Exception: whatever else made the save before this one fail.
        """
        step = operator.index(step)
        position = json.loads(json.dumps(position))  # the loader may change its own
        self._wait_or_warn()
        if step == self._current:
            if processes.index() == 0:
                # Whoever was killed just after this step's save has left these.
                self._remover.remove_left(self._directory)
                self._drop_surplus()
            return
        if self._current is not None and step < self._current:
            raise ValueError(
                f"step={step} must come after {self._current}, the step saved or "
                "restored last."
            )
        arrays = manifest.flatten(state)
        described = {
            "step": step,
            "position": position,
            "arrays": manifest.describe(arrays),
        }
        if math.isfinite(validation_loss):
            described["validation_loss"] = float(validation_loss)
        try:
            self._start(step, arrays, described)
        except Exception as error:
            self._failed = room.lacking(error, self._path(step))
            if self._failed is None:
                raise

    def _start(
        self, step: int, arrays: Mapping[str, jax.Array], described: dict[str, Any]
    ) -> None:
        if processes.index() == 0:
            durable.make_directory(self._directory)
            self._tidy(step)
        self._handler.manifest = described
        # Orbax fetches arrays by `np.asarray`, which JAX counts as implicit.
        with jax.transfer_guard_device_to_host("allow"):
            path = paths.Literal(self._path(step))
            self._writer.save(path, args=sealed.to_save(arrays))
        self._current = step
        self._writing = True

    def restore(
        self,
        abstract_state: PyTree,
        step: Which = None,
        *,
        ignore: Collection[str] = (),
    ) -> tuple[PyTree, dict[str, Any], int]:
        """Reads the newest whole checkpoint, warning of newer ones, or that of `step`.

        Args:
          abstract_state: a pytree of `jax.ShapeDtypeStruct`. Its shardings place the
            arrays (where it has none, on the default device), and they are converted
            where it has another floating-point dtype than was stored.
          step: this checkpoint and no other; BEST: the whole one of the lowest
            validation loss, of equals the earlier.
          ignore: parts of the stored state to leave unread, such as ["opt_state"].

        Returns:
          The state as `abstract_state` describes it, the loader's position, the step.

        Raises:
          FileNotFoundError: there is no such checkpoint, or no whole one.
          DamagedCheckpointError: the checkpoint of `step` is not what was written.
          ValueError: the stored arrays have other names, shapes or dtypes.
        """
        found, position = self.find(abstract_state, step, ignore)
        wanted = manifest.flatten(abstract_state)
        arrays = self._writer.restore(
            paths.Literal(self._path(found)), args=sealed.to_restore(wanted)
        )
        self._current = found
        treedef = jax.tree.structure(abstract_state)
        return treedef.unflatten(arrays[name] for name in wanted), position, found

    def find(
        self, abstract_state: PyTree, step: Which, ignore: Collection[str]
    ) -> tuple[int, dict[str, Any]]:
        """Returns the step of the checkpoint that `restore` reads, and the position.

        Sums are compared, and errors raised, as it does.
        """
        self.wait()
        wanted = manifest.describe(manifest.flatten(abstract_state))
        return self._choose(self._number(step), wanted, ignore)

    def locate(self, step: Which = None) -> pathlib.Path:
        """Returns the directory of the newest whole checkpoint, `step`'s or the best.

        For reading in part (`jmoe.checkpoint.pieces`); sums aren't compared.

        Raises:
          FileNotFoundError: there is no such checkpoint, or no whole one.
          DamagedCheckpointError: files of the checkpoint of `step` aren't whole.
        """
        step = self.latest_step() if step is None else self._number(step)
        if step is None:
            raise self._none_whole()
        self._require(step)
        manifest.read(self._path(step))
        return self._path(step)

    def wait(self) -> None:
        """Returns when the checkpoint being written is on disk; raises if it failed.

        Raises:
          OSError: the disk has no room; names the checkpoint.
        """
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed
        if not self._writing:
            return
        self._writing = False
        step, self._current = self._current, None  # if it fails, it can be saved again
        assert step is not None
        try:
            self._writer.wait_until_finished()
        except Exception as error:
            lacking = room.lacking(error, self._path(step))
            if lacking is None:
                raise
            raise lacking from error
        self._current = step
        if processes.index() == 0:
            self._drop_surplus()

    def _wait_or_warn(self) -> None:
        try:
            self.wait()
        except OSError as error:
            if jax.process_count() > 1 or not room.lacking(error, self._directory):
                raise
            logging.warning("Not saved: %s. The next save will try again.", error)

    def close(self) -> None:
        """Waits like `wait`, then ends the background threads."""
        try:
            self.wait()
        finally:
            self._writer.close()
            self._remover.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _path(self, step: int) -> pathlib.Path:
        return self._directory / str(step)

    def _steps(self) -> list[int]:
        """Returns steps that have a directory, whole or not, newest first."""
        names = (path.name for path in self._directory.glob("*") if path.is_dir())
        steps = (int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))
        return sorted(steps, reverse=True)

    def _none_whole(self) -> FileNotFoundError:
        complaint = f"No whole checkpoint in {self._directory}"
        steps = ", ".join(map(str, self._steps()))
        if not steps:
            return FileNotFoundError(f"{complaint}.")
        return FileNotFoundError(
            f"{complaint}: those of these steps are damaged: {steps}. They were left "
            "as they are. Put a whole copy of one in its place; or, to begin again at "
            "step 0, choose another workdir or move that directory away."
        )

    def _number(self, step: Which) -> int | None:
        """Returns the step of the best checkpoint, where this is asked for."""
        if step != BEST:
            return step
        paths = map(self._path, self._steps())
        return processes.from_first("best checkpoint", lambda: find_best(paths))

    def _require(self, step: int) -> None:
        steps = self._steps()
        if step not in steps:
            found = ", ".join(map(str, steps)) or "none"
            raise FileNotFoundError(
                f"No checkpoint of step {step} in {self._directory}; found: {found}."
            )

    def _choose(
        self, step: int | None, expected: Mapping[str, str], ignore: Collection[str]
    ) -> tuple[int, dict[str, Any]]:
        """Returns the step to read and the loader's position.

        Each process reads some files.

        All processes have the same parts to compare, and come to the same end.
        """
        passed = None
        while True:
            candidate, position, files = processes.from_first(
                "checkpoint to restore",
                functools.partial(self._candidate, step, passed, expected, ignore),
            )
            share = processes.index(), processes.count()
            sizes = {name: size for name, (size, _) in files.items()}
            parts = sums.read(self._path(candidate), sizes, *share)
            parts = sum(processes.exchange("sums of a checkpoint", parts), [])
            try:
                manifest.compare(self._path(candidate), files, parts)
            except DamagedCheckpointError as error:
                if step is not None:
                    raise
                if processes.index() == 0:
                    logging.warning("Passed over: %s", error)
                passed = candidate
            else:
                return candidate, position

    def _candidate(
        self,
        step: int | None,
        passed: int | None,
        expected: Mapping[str, str],
        ignore: Collection[str],
    ) -> tuple[int, dict[str, Any], dict[str, list[int]]]:
        """Returns step, position and files of the newest that may be whole.

        It comes before `passed`.
        """
        if step is not None:
            self._require(step)
        for candidate in self._steps() if step is None else [step]:
            if passed is not None and candidate >= passed:
                continue
            try:
                stored = manifest.read(self._path(candidate))
            except DamagedCheckpointError as error:
                if step is not None:
                    raise
                logging.warning("Passed over: %s", error)
                continue
            path = self._path(candidate)
            manifest.check_arrays(path, expected, stored["arrays"], ignore)
            return candidate, stored["position"], stored["files"]
        raise self._none_whole()

    def _tidy(self, step: int) -> None:
        """Leaves under steps' names only what this run can be continued from."""
        self._remover.remove_left(self._directory)
        first = step if self._current is None else self._current + 1
        for other in self._steps():
            if other >= first:
                aside = removal.rename(self._path(other), f"{other}.aside")
                logging.warning(
                    "Saving step %d, which does not follow on the checkpoint of step "
                    "%d: set that aside as %s.",
                    step,
                    other,
                    aside,
                )

    def _drop_surplus(self) -> None:
        whole = read_losses(map(self._path, self._steps()))  # others aren't ours
        for step in self._kept.surplus(whole):
            self._remover.remove(self._path(step))
