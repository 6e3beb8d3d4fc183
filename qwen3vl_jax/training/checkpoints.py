"""Checkpoints of a run: the whole state, saved by Orbax in the background; keeps the last and best."""

import contextlib
import gc
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import CheckpointManagerOptions as Options
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from qwen3vl_jax.checkpoint import digests
from qwen3vl_jax.checkpoint.digests import DamagedError
from qwen3vl_jax.checkpoint.orbax_io import open_tree, readable, writable
from qwen3vl_jax.errors import InputError, ProblemsError
from qwen3vl_jax.runtime import distributed
from qwen3vl_jax.storage.paths import as_path, for_orbax, is_remote, remove_tree
from qwen3vl_jax.training.param_groups import flatten
from qwen3vl_jax.training.run_dir import CHECKPOINTS, META, differences, scores
from qwen3vl_jax.training.train_step import TrainState

WEIGHTS, AVERAGE, STATE = "weights", "average", "state"


def _unraisable(found: Any, before: Any = sys.unraisablehook) -> None:
    """Hides errors of writes that Orbax no longer waits for after another one failed."""
    left = getattr(getattr(found.object, "cr_code", None), "co_filename", "")
    if "orbax" not in left and str(found.exc_value) != "Event loop is closed":
        before(found)


class Checkpoints(PreservationPolicy):
    """RUN_DIR/checkpoints: a directory for each saved step, with weights, state and meta.

    keep: latest steps to keep, from 1; keep_best: steps with the lowest evaluation loss to keep too.
    """

    def __init__(self, run_dir: str | Path, keep: int = 1, keep_best: int = 0):
        self._scores, self._keep, self._keep_best = scores(run_dir), keep, keep_best
        # Unfinished steps are those of a killed process.
        options = Options(preservation_policy=self, cleanup_tmp_directories=True)
        sys.unraisablehook, self._failed = _unraisable, False
        self._folder = as_path(run_dir) / CHECKPOINTS
        self._manager = ocp.CheckpointManager(for_orbax(self._folder), options=options)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax asks which saved steps stay. A step may be evaluated after it was saved."""
        steps = [info.step for info in checkpoints]
        scored = [step for step in steps if step in self._scores]
        best = sorted(scored, key=lambda step: (self._scores[step], -step))[: self._keep_best]
        return [step in best or step in steps[-self._keep :] for step in steps]

    def is_best(self, score: float | None) -> bool:
        """Whether a step with this evaluation loss would be one of the best."""
        if score is None:
            return False
        return sum(other <= score for other in self._scores.values()) < self._keep_best

    def score(self, step: int, score: float | None) -> None:
        """Takes note of a step's evaluation loss, None for one that no step can be the best by."""
        if score is not None:
            self._scores[step] = score

    def save(self, state: TrainState, meta: Mapping[str, Any], score: float | None = None) -> None:
        """Saves in the background. meta is JSON data. Raises InputError if the disk has no room."""
        parts = _parts(state)
        found = {name: digests.digests(flatten(part)[0]) for name, part in parts.items()}
        saved: dict[str, Any] = {n: ocp.args.StandardSave(part) for n, part in parts.items()}
        meta = digests.with_checksum({**meta, "score": score, "digests": found})
        saved[META] = ocp.args.JsonSave(meta)
        self.score(int(state.step), score)
        needs, folder = sum(x.nbytes for x in jax.tree.leaves(state)), self._folder
        if not is_remote(folder) and (free := shutil.disk_usage(folder).free) < needs:
            found = f"{free:,} bytes free, {needs:,} needed for a step"
            advice = "the same command goes on from the last step that was saved"
            raise InputError(f"{folder}: {found}; make room there: {advice}")
        with self._saving():
            self._manager.save(int(state.step), args=ocp.args.Composite(**saved))

    def wait(self) -> None:
        """Waits until everything is on disk. Raises InputError for a full disk."""
        with self._saving():
            self._manager.wait_until_finished()

    def check(self) -> None:
        """Raises InputError if the step being saved found no room."""
        with self._saving():
            self._manager.check_for_errors()

    def close(self) -> None:
        """Waits for the last save. Removes what could not be saved."""
        try:
            with self._saving():
                self._manager.close()
        finally:
            if self._failed:
                left = self._folder.glob("*.orbax-checkpoint-tmp*")
                for part in left if distributed.is_first() else ():
                    remove_tree(part)
                # Frees what Orbax left of its writes while `_unraisable` is set.
                gc.collect()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            with writable(self._folder):
                yield
        except InputError:
            self._failed = True
            raise


class SaveTimer:
    """Says at which step checkpoints.minutes have passed: the same one in every process.

    Clocks differ, so the first process decides: after 5 steps, and then again each time that half of what
    it thought was left is done, or twice as many steps as before.
    """

    def __init__(self, minutes: float):
        # The first step, its time, and the step at which the first process is asked next.
        self._seconds, self._first, self._begun, self._next = 60 * minutes, -1, 0.0, 0

    def due(self, step: int) -> bool:
        """Whether to save after this step. To be asked at every step."""
        if not self._seconds:
            return False
        if self._first < 0:
            self._first, self._begun, self._next = step, time.monotonic(), step + 5
        if step < self._next:
            return False
        passed, done = time.monotonic() - self._begun, step - self._first
        left = (self._seconds - passed) * done / max(passed, 1e-3)
        more = distributed.from_first(0 if left < 1 else max(1, min(int(left / 2), done)))
        self._next = step + more
        return more == 0

    def restart(self) -> None:
        """Begins anew, after a save."""
        self._first = -1


def restore(run_dir: str | Path, step: int, state: TrainState) -> TrainState:
    """A saved state, in the shapes and shardings of `state` (arrays or ShapeDtypeStructs).

    Raises DamagedError, in every process, for a step whose files are damaged, and ProblemsError, which
    lists the differences, if other weights were trained.
    """
    where = as_path(run_dir) / CHECKPOINTS / str(step)
    parts = _parts(jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
    found, error = {}, None
    try:
        _check_shapes(where, state)
        found = {name: _restored(where / name, part) for name, part in parts.items()}
    except DamagedError as e:
        error = e
    if messages := [text for text in distributed.all_of(error and str(error)) if text]:
        raise error or DamagedError(where, messages)
    for name, part in found.items():
        if (kept := digests.saved_digests(where / name)) is not None:
            digests.check_digests(where / name, digests.digests(flatten(part)[0]), kept)
    others = found[STATE]
    always = others["step"], others["key"], found[WEIGHTS], others["optimizer"]
    return TrainState(*always, others.get("rest"), found.get(AVERAGE))


def _restored(where: Path, target: Any) -> Any:
    # Each process reads alone: one that finds damage comes to no barrier.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    with readable(where), ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
        return reader.restore(for_orbax(where), args=ocp.args.StandardRestore(target))


def _check_shapes(where: Path, state: TrainState) -> None:
    saved = {str(path[0]): x for path, x in open_tree(where / WEIGHTS).items()}
    now, then = (
        {n: f"{jax.numpy.dtype(x.dtype).name}{list(x.shape)}" for n, x in arrays.items()}
        for arrays in (state.weights, saved)
    )
    if found := [*differences(now, then, "not trained", lambda shape, _: shape).values()]:
        what = f"{where}: was started with another set of weights"
        raise ProblemsError(what, found, "choose another --out")


def _parts(state: TrainState) -> dict[str, Any]:
    """The trees of a state by the folder that each is saved in."""
    rest = {"step": state.step, "key": state.key, "optimizer": state.optimizer}
    if state.compensation is not None:
        # The files have this key.
        rest["rest"] = state.compensation
    average = {} if state.average is None else {AVERAGE: state.average}
    return {WEIGHTS: state.weights, STATE: rest, **average}
