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
that all of them see. Each writes and reads what its devices hold; process 0 decides
which checkpoint is read, writes the manifest once all have written, and removes.
"""

import concurrent.futures
import json
import operator
import pathlib
import re
import shutil
from collections.abc import Collection, Mapping
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from absl import logging

from jmoe.checkpoint import manifest, paths, room
from jmoe.checkpoint.manifest import DamagedCheckpointError
from jmoe.data import durable
from jmoe.parallel import processes

PyTree = Any

_UNFINISHED = ocp.path.atomicity_types.TMP_DIR_SUFFIX
_WRITE_TIMEOUT_S = 6 * 3600
_CHUNK_BYTES = 32 << 20


class Store:
    """The checkpoints of one run: saves without holding up training, keeps the newest.

    Opening a store and reading from it change nothing on disk. Saving removes what
    interrupted saves left unfinished and the whole checkpoints beyond the newest
    `keep`. One that claims to be newer than the step saved or restored last is damaged
    or of another continuation of the run: it is set aside under another name, with a
    warning. Not thread-safe.
    """

    def __init__(self, directory: pathlib.Path, *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep={keep} must be at least 1.")
        self._directory = pathlib.Path(directory).absolute()
        self._keep = keep
        self._current: int | None = None  # the step last saved or restored here
        self._writing = False
        self._failed: OSError | None = None  # a save that could not even begin
        self._handler = _SealingHandler(use_compression=False)
        self._writer = ocp.AsyncCheckpointer(
            self._handler,
            async_options=ocp.AsyncOptions(
                timeout_secs=_WRITE_TIMEOUT_S,
                create_directories_asynchronously=False,  # so that `save` can raise
            ),
            temporary_path_class=paths.Renamed,
        )
        self._remover = concurrent.futures.ThreadPoolExecutor(1)

    def latest_step(self) -> int | None:
        """The newest whole checkpoint; warns of newer ones that are damaged.

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

    def save(self, step: int, state: PyTree, position: Mapping[str, Any]) -> None:
        """Starts to write `state` and the data loader's `position` as one checkpoint.

        Returns once the arrays may be donated or overwritten. (On CPU the writer shares
        their memory, and until it is done JAX copies where it would donate.) First
        waits for the save before, so that at most one state is in flight. The step
        saved or restored last isn't written again.

        If the disk has no room, `wait` says so. Whoever saves again instead, as a run
        does that goes on, gets a warning: the checkpoint before is still there, and
        this save may find room. (One of several processes can't go on alone.)

        Args:
          step: the optimizer step; it names the checkpoint.
          state: any pytree of `jax.Array`.
          position: what JSON can hold.

        Raises:
          TypeError: `position` holds something else.
          ValueError: `step` comes before the one saved or restored last.
          Exception: whatever else made the save before this one fail.
        """
        step = operator.index(step)
        position = json.loads(json.dumps(position))  # the loader may change its own
        self._wait_or_warn()
        if step == self._current:
            return
        if self._current is not None and step < self._current:
            raise ValueError(
                f"step={step} must come after {self._current}, the step saved or "
                "restored last."
            )
        try:
            self._start(step, manifest.flatten(state), position)
        except Exception as error:
            self._failed = room.lacking(error, self._path(step))
            if self._failed is None:
                raise

    def _start(
        self, step: int, arrays: Mapping[str, jax.Array], position: Mapping[str, Any]
    ) -> None:
        if processes.index() == 0:
            durable.make_directory(self._directory)
            self._tidy(step)
        self._handler.manifest = {
            "step": step,
            "position": position,
            "arrays": manifest.describe(arrays),
        }
        # Orbax fetches arrays by `np.asarray`, which JAX counts as implicit.
        save_args = {name: _chunked(array) for name, array in arrays.items()}
        with jax.transfer_guard_device_to_host("allow"):
            path = paths.Literal(self._path(step))
            self._writer.save(path, args=_Save(arrays, save_args))
        self._current = step
        self._writing = True

    def restore(
        self,
        abstract_state: PyTree,
        step: int | None = None,
        *,
        ignore: Collection[str] = (),
    ) -> tuple[PyTree, dict[str, Any], int]:
        """Reads the newest whole checkpoint, warning of newer ones, or that of `step`.

        Args:
          abstract_state: a pytree of `jax.ShapeDtypeStruct`. Its shardings place the
            arrays (where it has none, on the default device), and they are converted
            where it has another floating-point dtype than was stored.
          step: this checkpoint and no other.
          ignore: parts of the stored state to leave unread, such as ["opt_state"].

        Returns:
          The state as `abstract_state` describes it, the loader's position, the step.

        Raises:
          FileNotFoundError: there is no such checkpoint, or no whole one.
          DamagedCheckpointError: the checkpoint of `step` is not what was written.
          ValueError: the stored arrays have other names, shapes or dtypes.
        """
        self.wait()
        wanted = manifest.flatten(abstract_state)
        found, position = processes.from_first(
            "checkpoint to restore", lambda: self._choose(step, wanted, ignore)
        )
        targets = {name: _placed(array) for name, array in wanted.items()}
        arguments = _Restore(
            targets,
            restore_args=ocp.checkpoint_utils.construct_restore_args(targets),
            partial_restore=True,  # that nothing else is missing has been checked
        )
        arrays = self._writer.restore(paths.Literal(self._path(found)), args=arguments)
        self._current = found
        treedef = jax.tree.structure(abstract_state)
        return treedef.unflatten(arrays[name] for name in wanted), position, found

    def locate(self, step: int | None = None) -> pathlib.Path:
        """The directory of the newest whole checkpoint, or of `step`'s.

        For reading in part (`jmoe.checkpoint.pieces`); sums aren't compared.

        Raises:
          FileNotFoundError: there is no such checkpoint, or no whole one.
          DamagedCheckpointError: files of the checkpoint of `step` aren't whole.
        """
        if step is None:
            step = self.latest_step()
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
            self._remover.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _path(self, step: int) -> pathlib.Path:
        return self._directory / str(step)

    def _steps(self) -> list[int]:
        """Steps that have a directory, whole or not, newest first."""
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

    def _require(self, step: int) -> None:
        steps = self._steps()
        if step not in steps:
            found = ", ".join(map(str, steps)) or "none"
            raise FileNotFoundError(
                f"No checkpoint of step {step} in {self._directory}; found: {found}."
            )

    def _choose(
        self, step: int | None, wanted: Mapping[str, Any], ignore: Collection[str]
    ) -> tuple[int, dict[str, Any]]:
        """The step to read and the loader's position, all checks passed."""
        if step is not None:
            self._require(step)
        expected = manifest.describe(wanted)
        for candidate in self._steps() if step is None else [step]:
            path = self._path(candidate)
            try:
                stored = manifest.read(path)
                manifest.check_arrays(path, expected, stored["arrays"], ignore)
                manifest.check_sums(path, stored["files"])
            except DamagedCheckpointError as error:
                if step is not None:
                    raise
                logging.warning("Passed over: %s", error)
            else:
                return candidate, stored["position"]
        raise self._none_whole()

    def _tidy(self, step: int) -> None:
        """Leaves under steps' names only what this run can be continued from."""
        for path in self._directory.glob(f"[0-9]*{_UNFINISHED}"):
            logging.warning("Removing %s, left by an interrupted save.", path)
            self._remove(path)
        for path in self._directory.glob("[0-9]*.removed*"):
            self._remover.submit(shutil.rmtree, path, ignore_errors=True)
        first = step if self._current is None else self._current + 1
        for other in self._steps():
            if other >= first:
                aside = _rename(self._path(other), f"{other}.aside")
                logging.warning(
                    "Saving step %d, which does not follow on the checkpoint of step "
                    "%d: set that aside as %s.",
                    step,
                    other,
                    aside,
                )

    def _drop_surplus(self) -> None:
        whole = []
        for step in self._steps():
            try:
                manifest.read(self._path(step))
            except DamagedCheckpointError:
                continue  # not ours to remove
            whole.append(step)
        for step in whole[self._keep :]:
            self._remove(self._path(step))

    def _remove(self, path: pathlib.Path) -> None:
        """Takes `path` away at once, and off the disk in the background."""
        step = path.name.partition(".")[0]
        removed = _rename(path, f"{step}.removed")
        self._remover.submit(shutil.rmtree, removed, ignore_errors=True)


class _SealingHandler(ocp.PyTreeCheckpointHandler):
    """Writes a manifest beside the arrays just before Orbax renames the directory."""

    manifest: dict[str, Any]

    def finalize(self, directory) -> None:
        super().finalize(directory)
        path = pathlib.Path(directory)
        if not (path / paths.MERGED).is_file():
            raise RuntimeError(
                f"Orbax did not merge what the processes wrote to {path}, so that it "
                "can't be read; it was not made a checkpoint."
            )
        manifest.write(path, self.manifest)


# Orbax looks a handler up by the class of its arguments.
@ocp.args.register_with_handler(_SealingHandler, for_save=True)
class _Save(ocp.args.PyTreeSave):
    pass


@ocp.args.register_with_handler(_SealingHandler, for_restore=True)
class _Restore(ocp.args.PyTreeRestore):
    pass


def _chunked(array: jax.Array) -> ocp.SaveArgs:
    """Stores a large array so that a layer, and an expert of it, can be read alone.

    Orbax would make a chunk of each device's part. By itself it cuts the longest
    dimension first, and so through all layers and experts.
    """
    if array.nbytes <= _CHUNK_BYTES:
        return ocp.SaveArgs()
    sizes = [array.nbytes]
    for length in array.shape[:-2]:  # a matrix is left to Orbax
        if sizes[-1] <= _CHUNK_BYTES:
            break
        sizes.append(sizes[-1] // length)
    axes = tuple(range(len(sizes) - 1))
    return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=axes)


def _placed(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    if array.sharding is not None:
        return array
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=default)


def _rename(path: pathlib.Path, name: str) -> pathlib.Path:
    """Renames `path` beside itself to `name`, numbered if that is taken."""
    target, count = path.with_name(name), 1
    while target.exists():
        target, count = path.with_name(f"{name}-{count}"), count + 1
    return path.rename(target)
