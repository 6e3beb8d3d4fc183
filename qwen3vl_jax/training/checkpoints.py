"""Checkpoints of a run: the whole state, saved by Orbax in the background; keeps the last and best."""

import contextlib
import dataclasses
import gc
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from qwen3vl_jax.checkpoint.digests import (
    DamagedError,
    check_digests,
    digests,
    saved_digests,
    with_checksum,
)
from qwen3vl_jax.checkpoint.orbax_io import open_tree, readable, writable
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.runtime import distributed
from qwen3vl_jax.storage.paths import as_path, for_orbax, is_remote, remove_tree
from qwen3vl_jax.training.param_groups import flatten
from qwen3vl_jax.training.run_dir import CHECKPOINTS, META, DiffersError, scores
from qwen3vl_jax.training.train_step import TrainState

# Steps that are measured, to save by minutes.
_MEASURED = 5
WEIGHTS, AVERAGE, STATE = "weights", "average", "state"


@dataclasses.dataclass
class _Best(policies.PreservationPolicy):
    """Keeps the steps with the lowest scores. A step may be evaluated after it was saved."""

    scores: Mapping[int, float]
    count: int

    def should_preserve(
        self, checkpoints: Sequence[policies.PolicyCheckpointInfo], *, context: Any
    ) -> list[bool]:
        steps = [info.step for info in checkpoints]
        scored = [step for step in steps if step in self.scores]
        best = sorted(scored, key=lambda step: (self.scores[step], -step))[: self.count]
        return [step in best for step in steps]


def _unraisable(found: Any, before: Any = sys.unraisablehook) -> None:
    """Hides errors of writes that Orbax no longer waits for after another one failed."""
    left = getattr(getattr(found.object, "cr_code", None), "co_filename", "")
    if "orbax" not in left and str(found.exc_value) != "Event loop is closed":
        before(found)


class Checkpoints:
    """RUN_DIR/checkpoints: a directory for each saved step, with weights, state and meta.

    keep: latest steps to keep; keep_best: steps with the lowest evaluation loss to keep as well.
    """

    def __init__(self, run_dir: str | Path, keep: int = 1, keep_best: int = 0):
        self._scores, self._keep_best = scores(run_dir), keep_best
        kept = [policies.LatestN(keep), _Best(self._scores, keep_best)]
        stays = policies.AnyPreservationPolicy(kept)
        # Unfinished steps are those of a killed process.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=stays, cleanup_tmp_directories=True
        )
        sys.unraisablehook, self._failed = _unraisable, False
        self._folder = as_path(run_dir) / CHECKPOINTS
        self._manager = ocp.CheckpointManager(for_orbax(self._folder), options=options)

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
        """Saves in the background. meta is JSON data: recipe, data position, machine, score."""
        parts = _parts(state)
        found = {name: digests(flatten(part)[0]) for name, part in parts.items()}
        saved: dict[str, Any] = {n: ocp.args.StandardSave(part) for n, part in parts.items()}
        meta = {**meta, "score": score, "digests": found}
        saved[META] = ocp.args.JsonSave(with_checksum(meta))
        self.score(int(state.step), score)
        _check_room(self._folder, state)
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
            if self._failed and distributed.is_first():
                for part in self._folder.glob("*.orbax-checkpoint-tmp*"):
                    remove_tree(part)
            if self._failed:
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

    Clocks differ, so the first process decides: after _MEASURED steps, and then again each time that
    half of what it thought was left is done, or twice as many steps as before.
    """

    def __init__(self, minutes: float):
        self._seconds = 60 * minutes
        # The first step, its time, and the step at which the first process is asked next.
        self._first, self._begun, self._next = -1, 0.0, 0

    def due(self, step: int) -> bool:
        """Whether to save after this step. To be asked at every step."""
        if not self._seconds:
            return False
        if self._first < 0:
            self._first, self._begun, self._next = step, time.monotonic(), step + _MEASURED
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

    Raises DamagedError, in every process, for a step whose files are damaged, and DiffersError, which
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
        kept = saved_digests(where / name)
        if kept is not None:
            check_digests(where / name, digests(flatten(part)[0]), kept)
    others = found[STATE]
    always = others["step"], others["key"], found[WEIGHTS], others["optimizer"]
    return TrainState(*always, others.get("rest"), found.get(AVERAGE))


def _restored(where: Path, target: Any) -> Any:
    # Each process reads alone: one that finds damage comes to no barrier.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    with (
        readable(where),
        ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer,
    ):
        return checkpointer.restore(for_orbax(where), args=ocp.args.StandardRestore(target))


def _check_shapes(where: Path, state: TrainState) -> None:
    then = {path[0]: _shape(x) for path, x in open_tree(where / WEIGHTS).items()}
    now = {n: _shape(x) for n, x in state.weights.items()}
    found = [
        f"{name} was {then.get(name, 'not trained')}, is now {now.get(name, 'not trained')}"
        for name in {**then, **now}
        if then.get(name) != now.get(name)
    ]
    if found:
        raise DiffersError(where, "set of weights", "choose another --out", found)


def _check_room(folder: Path, state: TrainState) -> None:
    """Raises InputError if the disk has no room for a state of this size."""
    needs = sum(x.nbytes for x in jax.tree.leaves(state))
    if not is_remote(folder) and (free := shutil.disk_usage(folder).free) < needs:
        raise InputError(
            f"{folder}: {free:,} bytes free, {needs:,} needed for a step; make room there: the same "
            f"command goes on from the last step that was saved"
        )


def _shape(x: Any) -> str:
    return f"{jax.numpy.dtype(x.dtype).name}{list(x.shape)}"


def _parts(state: TrainState) -> dict[str, Any]:
    """The trees of a state by the folder that each is saved in."""
    rest = {"step": state.step, "key": state.key, "optimizer": state.optimizer}
    if state.compensation is not None:
        # The key "rest" is that of the files.
        rest["rest"] = state.compensation
    parts = {WEIGHTS: state.weights, STATE: rest}
    return parts if state.average is None else {**parts, AVERAGE: state.average}
