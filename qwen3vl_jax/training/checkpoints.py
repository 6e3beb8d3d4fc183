"""A run's checkpoints: the whole state by Orbax, asynchronous, atomic, the last and the best kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.training.step import TrainState

FOLDER = "checkpoints"
WEIGHTS, AVERAGE, STATE, META = "weights", "average", "state", "meta"
SCORE = "loss"  # of the evaluation, by which the best are chosen

# Keys of the recipe that a resumed run may change; any other would give another run.
FREE = (
    "steps", "save_every", "deterministic", "report.", "evaluate.", "checkpoints.", "mesh.",
    "step.remat", "step.loss_chunk", "data.bad_fraction", "optimizer.learning_rate",
    "optimizer.schedule", "optimizer.warmup", "optimizer.final", "optimizer.weight_decay",
    "optimizer.clip",
)  # fmt: skip


class Checkpoints:
    """The folder RUN_DIR/checkpoints: one directory a step, each with weights, state and meta.

    keep: how many of the latest stay; keep_best: how many of those with the lowest evaluation loss.
    """

    def __init__(self, run_dir: str | Path, keep: int = 1, keep_best: int = 0):
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics[SCORE],
            reverse=True,
            n=keep_best,
            keep_checkpoints_without_metrics=False,
        )
        stays = policies.AnyPreservationPolicy([policies.LatestN(keep), best])
        options = ocp.CheckpointManagerOptions(preservation_policy=stays)
        self._manager = ocp.CheckpointManager(Path(run_dir).absolute() / FOLDER, options=options)

    @property
    def latest(self) -> int | None:
        """The last step that was saved wholly, None before the first."""
        return self._manager.latest_step()

    def save(self, state: TrainState, meta: Mapping[str, Any], score: float | None = None) -> None:
        """Saves in the background; meta is JSON data: the recipe and where the data stands."""
        parts = {
            WEIGHTS: ocp.args.StandardSave(state.weights),
            STATE: ocp.args.StandardSave(_rest(state)),
            META: ocp.args.JsonSave(dict(meta)),
        }
        if state.average is not None:
            parts[AVERAGE] = ocp.args.StandardSave(state.average)
        metrics = None if score is None else {SCORE: float(score)}
        self._manager.save(int(state.step), args=ocp.args.Composite(**parts), metrics=metrics)

    def meta(self, step: int) -> dict[str, Any]:
        """What `save` was given beside the state."""
        found = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        return found[META]

    def restore(self, step: int, state: TrainState) -> TrainState:
        """The state of a step, in the shapes and places of `state` (a new run's, which it replaces)."""
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        parts = {
            WEIGHTS: ocp.args.StandardRestore(target.weights),
            STATE: ocp.args.StandardRestore(_rest(target)),
        }
        if state.average is not None:
            parts[AVERAGE] = ocp.args.StandardRestore(target.average)
        found = self._manager.restore(step, args=ocp.args.Composite(**parts))
        return state.replace(weights=found[WEIGHTS], average=found.get(AVERAGE), **found[STATE])

    def wait(self) -> None:
        """Returns when everything that was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the folder."""
        self._manager.close()


def _rest(state: TrainState) -> dict[str, Any]:
    rest = {"step": state.step, "key": state.key, "optimizer": state.optimizer, "rest": state.rest}
    return {name: part for name, part in rest.items() if part is not None}


def saved_steps(run_dir: str | Path) -> list[int]:
    """The steps of a run that were saved wholly. Raises InputError for a folder without any."""
    folder = Path(run_dir) / FOLDER
    steps = ocp.utils.checkpoint_steps(folder.absolute()) if folder.is_dir() else []
    if not steps:
        raise InputError(f"{run_dir}: expected a run of train.py, found no checkpoint in {FOLDER}/")
    return sorted(steps)


def check_recipe(now: Mapping[str, Any], then: Mapping[str, Any], run_dir: str | Path) -> None:
    """Raises InputError that lists the keys (flat recipes) in which a run differs from its start."""
    differ = [
        f"  {name}: {then.get(name)!r} then, {now.get(name)!r} now"
        for name in {**then, **now}
        if then.get(name) != now.get(name) and not name.startswith(FREE)
    ]
    if differ:
        raise InputError(
            f"{run_dir} was started with another recipe, so it cannot go on with this one:\n"
            + "\n".join(differ)
            + "\nset these keys back, or choose another --out"
        )
