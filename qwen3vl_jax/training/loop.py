"""A training run from its recipe to its last checkpoint: mesh, model, data, state, step, loop."""

import dataclasses
import functools
import gc
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qwen3vl_jax.checkpoint.digests import DamagedError
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.runtime import distributed
from qwen3vl_jax.runtime.console import memory_advice
from qwen3vl_jax.storage.json_text import write_json
from qwen3vl_jax.training import environment, evaluate, run_dir, run_setup, train_model
from qwen3vl_jax.training.checkpoints import Checkpoints, SaveTimer, restore
from qwen3vl_jax.training.data.global_batches import GlobalFeed, all_refused, bounded
from qwen3vl_jax.training.data.loader import DataLoader, LoadedBatch
from qwen3vl_jax.training.data.packing import PackedBatch, for_one_program
from qwen3vl_jax.training.mesh_preset import asks_for_mesh, mesh_flags
from qwen3vl_jax.training.optimizer import make_schedule
from qwen3vl_jax.training.recipe import Data, Recipe, flat
from qwen3vl_jax.training.reporting import memory_estimate
from qwen3vl_jax.training.reporting.flops import Speed
from qwen3vl_jax.training.reporting.run_log import NullLogger, Profiler, RunLogger, Times
from qwen3vl_jax.training.train_step import TrainState

Logger = RunLogger | NullLogger


def train(recipe: Recipe, out: Path) -> None:
    """Runs a recipe in the directory `out`, from its last checkpoint if there is one.

    Returns when all steps are done, or after SIGTERM, which saves first. Raises InputError for what
    cannot start, for a directory of another run, and where a loss is not a number.
    """
    asked, recipe = recipe, run_setup.with_mesh(recipe, out)
    mesh, notes, damaged = run_setup.mesh_of(recipe), [], []
    if mesh is not None and not asks_for_mesh(asked):
        notes.append(f"no [mesh]: {mesh.size} devices, {mesh_flags(recipe.mesh)}")
    with (
        run_setup.catch_signals() as stop,
        run_setup.locked(out),
        nullcontext() if mesh is None else jax.set_mesh(mesh),
    ):
        # From the latest saved step that reads without damage; 0 is a new run.
        for first in distributed.from_first(run_dir.saved_steps(out)[::-1] or [0]):
            try:
                return train_from(recipe, out, first, mesh, stop, notes)
            except DamagedError as error:
                damaged.append(error)
                notes.append(f"{error}; it is moved to {out / run_dir.DAMAGED}")
        raise damaged[0]


def train_from(
    recipe: Recipe, out: Path, first: int, mesh: Mesh | None, stop: run_setup.Stop, notes: list[str]
) -> None:
    """Runs a recipe from a saved step, or from 0. Raises DamagedError if that step is damaged."""
    # Resume: the recipe and the model must be those of the run.
    meta = run_dir.read_meta(out, first) if first else {}
    changed = run_setup.check_fits(recipe, meta, out, first) if first else []
    if not first:
        run_setup.write_config(recipe, out)
    groups = run_setup.groups_of(recipe, mesh, meta)

    # Model.
    processor, new_ids = run_dir.prepare_model_files(recipe, out, first)
    cfg, meta = processor.config, run_dir.with_model(recipe, out, meta)
    fitted = run_setup.with_remat(recipe, cfg, changed)
    sizes = memory_estimate.memory(fitted, cfg, memory_estimate.held(fitted, cfg))
    advice = "pack.rows, " * (not first) + "step.remat=full or step.loss_chunk"
    with memory_advice(sizes, advice), ExitStack() as closing:
        # Data. The evaluation sources are read once to check them.
        open_loader = loader_of(recipe, processor, groups, mesh)
        left_out = evaluate.check_held_out(recipe, open_loader) if recipe.evaluate.every else []
        loader = open_loader(recipe.data, recipe.seed)
        if first:
            loader.set_state(meta["data"])
        # State and step: the weights, the optimizer, and the jitted function that updates them.
        state, frozen, merge, step = start_state(fitted, cfg, new_ids, mesh, out, first)
        evaluation = evaluate.Evaluation(fitted, processor, open_loader, merge)
        checkpoints = Checkpoints(out, recipe.checkpoints.keep, recipe.checkpoints.keep_best)
        speed = Speed(recipe, cfg, state.weights, 1 if mesh is None else mesh.size)
        closing.callback(checkpoints.close)
        closing.callback(loader.close)

        # Loop.
        if 0 < first < recipe.steps:
            run_setup.write_config(recipe, out)
        with RunLogger(out, recipe, first) if distributed.is_first() else NullLogger() as logger:
            for line in [*changed, *notes]:
                logger.log(line)
            logger.refused(left_out)
            parts = loader, step, state, frozen, evaluation, checkpoints
            run = Run(recipe, out, first, meta, *parts, logger, stop, speed)
            del state, parts  # the step donates the state's arrays
            try:
                run_steps(run)
            finally:
                closing.close()
                logger.refused(loader.refused)
            logger.draw()
            done = f"stopped by {stop.asked}, saved" if stop.asked else "done"
            logger.log(f"{out}: step {run.number} of {recipe.steps}, {done}")


def loader_of(
    recipe: Recipe, processor: Processor, groups: int, mesh: Mesh | None
) -> evaluate.OpenLoader:
    """Opens the batches of sources. On one device they are sent ahead of their step."""

    def place(packed: PackedBatch) -> PackedBatch:
        return jax.device_put(jax.tree.map(lambda x: x[None], bounded(packed, [packed])))

    def open_loader(data: Data, seed: int, once: bool = False) -> DataLoader | GlobalFeed:
        if mesh is not None or groups > 1:
            return GlobalFeed(data, recipe.pack, processor, seed, groups, mesh, once)
        return DataLoader(data, recipe.pack, processor, seed, once=once, place=place)

    return open_loader


def start_state(
    recipe: Recipe, cfg: Config, new_ids: list[int], mesh: Mesh | None, out: Path, first: int
) -> tuple[TrainState, Any, Any, train_model.Step]:
    """(state, frozen weights, merge, step): a new run's, or a saved step's if `first` is not 0."""
    trainable = train_model.prepare(recipe, cfg, new_ids, mesh)
    frozen, merge = trainable.frozen, trainable.merge
    optimizer = train_model.build_optimizer(recipe, cfg, trainable.weights)
    like = train_model.shape_of_state(recipe, cfg, optimizer, trainable.weights, mesh)
    step = train_model.make_step(recipe, cfg, optimizer, merge, like if mesh else None)
    if not first:
        state = train_model.init_train_state(recipe, cfg, optimizer, trainable.weights, mesh)
        return state, frozen, merge, step
    # Frees the first weights before those of the checkpoint are read.
    del trainable
    state = restore(out, first, like)
    if distributed.is_first():
        run_dir.set_aside(out, after=first)
    distributed.wait_for_all("damaged steps")
    return state, frozen, merge, step


@dataclasses.dataclass
class Run:
    """The parts of a run that its loop uses, and how far it is."""

    recipe: Recipe
    out: Path
    # Steps done.
    number: int
    # What is saved beside each step.
    meta: dict[str, Any]
    loader: DataLoader | GlobalFeed
    step: train_model.Step
    state: TrainState
    frozen: Any
    evaluation: evaluate.Evaluation
    checkpoints: Checkpoints
    logger: Logger
    stop: run_setup.Stop
    speed: Speed
    # The loader's state before a draw that failed.
    position: dict[str, Any] | None = None
    # (step, metrics, batches without arrays, times) of steps that are not in metrics.csv yet.
    unwritten: list[tuple[int, dict[str, Any], list[LoadedBatch], dict[str, float]]] = (
        dataclasses.field(default_factory=list)
    )
    times: Times = dataclasses.field(default_factory=Times)

    @functools.cached_property
    def rates(self) -> np.ndarray:
        """The learning rate of every step. Computed at once: a device call would wait for a step."""
        steps = self.recipe.steps
        rates = make_schedule(self.recipe.optimizer, steps)(jnp.arange(steps))
        return np.broadcast_to(np.asarray(rates), steps)


def run_steps(run: Run) -> None:
    """Takes every step that is left, or those until `stop` is asked, and saves what was done."""
    recipe, stop, logger = run.recipe, run.stop, run.logger
    # A device runs beside the host, which writes a step down while the next one runs.
    behind = int(jax.default_backend() != "cpu")
    begun, _ = run.number, run.rates
    evaluated = distributed.from_first(begun in logger.evaluated)
    if evaluate.is_due(recipe, begun) and not evaluated:
        # The last run ended before this evaluation.
        with suppress(run_setup.Stopped):
            run.checkpoints.score(begun, evaluated_loss(run))
    profiler = Profiler(recipe.report.profile, run.out)
    timer, every = SaveTimer(recipe.checkpoints.minutes), recipe.save_every
    # Keeps the collector from scanning all that jax and the model have loaded.
    gc.freeze()
    logger.restart_clock()
    while run.number < recipe.steps and not stop.asked_at(run.number):
        with run.times.of("data"):
            batches = next_batches(run)
        if not batches:
            break
        run.number += 1
        packed = jax.tree.map(_concatenated, *for_one_program([batch.packed for batch in batches]))
        if run.number == begun + 1:
            logger.compiling()
        profiler.before(run.number)
        with run.times.of("compiling") if run.number == begun + 1 else nullcontext():
            run.state, metrics = run.step(run.state, run.frozen, packed)
        profiler.after(run.number, metrics)
        # Without their arrays, which would fill the device.
        batches = [dataclasses.replace(batch, packed=None) for batch in batches]
        run.unwritten.append((run.number, metrics, batches, run.times.since_last()))
        del batches, packed
        write_metrics(run, behind)
        run.checkpoints.check()
        due = timer.due(run.number) or run.number == recipe.steps or not run.number % every
        evaluates = evaluate.is_due(recipe, run.number) and not stop.asked
        if due or evaluates:
            write_metrics(run)
            if evaluate_and_save(run, evaluates, due):
                timer.restart()
            logger.restart_clock()
    profiler.end()
    write_metrics(run)
    if run.number > begun:
        logger.log(run.times.summary())
    # The first process decides: an object store may list older steps to the others.
    if stop.asked and not distributed.from_first(run.number in run_dir.saved_steps(run.out)):
        save(run, None, due=True)


def evaluated_loss(run: Run) -> float | None:
    """Evaluates the state: its loss, or None if that is not finite. Raises Stopped."""
    return run.evaluation.run(run.state, run.frozen, run.number, run.logger, run.stop.check)


def evaluate_and_save(run: Run, evaluates: bool, due: bool) -> bool:
    """Evaluates and saves; whether it saved. The step is saved too if evaluating fails or is stopped."""
    try:
        with run.times.of("evaluating"):
            score = evaluated_loss(run) if evaluates else None
    except BaseException as error:
        save(run, None, due=True)
        if not isinstance(error, run_setup.Stopped):
            raise
        return True
    return save(run, score, due)


def save(run: Run, score: float | None, due: bool) -> bool:
    """Saves if a checkpoint is due, or if the evaluation was one of the best; whether it did."""
    if saves := due or run.checkpoints.is_best(score):
        run.logger.refused(all_refused(run.loader))
        run.logger.sync()
        position = run.loader.global_state(run.position or run.loader.get_state())
        run.meta |= {"recipe": run_setup.plain(flat(run.recipe)), "data": position}
        run.meta |= {"machine": environment.describe(), "score": score}
        with run.times.of("saving"):
            run.checkpoints.save(run.state, run.meta, score)
    return saves


def next_batches(run: Run) -> list[LoadedBatch]:
    """The micro batches of the next step.

    Empty if SIGTERM came and reading failed: schedulers send SIGTERM to the workers too. The samples
    drawn for that step are then drawn again by the next run.
    """
    run.position = run.loader.get_state()
    try:
        batches = [next(run.loader) for _ in range(run.recipe.step.accumulate)]
    except Exception:
        if run.stop.asked:
            return []
        raise
    run.position = None
    return batches


def write_metrics(run: Run, behind: int = 0) -> None:
    """Logs the steps that are not logged yet, but for the last `behind`, which may still run."""
    while len(run.unwritten) > behind:
        number, metrics, batches, times = run.unwritten.pop(0)
        values = jax.device_get(metrics)
        run.logger.step(number, metrics_row(run, number, values, batches) | times)


def metrics_row(
    run: Run, number: int, values: dict[str, Any], batches: list[LoadedBatch]
) -> dict[str, Any]:
    """A step's row of metrics.csv. Raises InputError if its loss is not a number."""
    if not (np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"])):
        raise not_finite(run, number, values, batches)
    row = {"loss": values.pop("loss"), "lr": float(run.rates[number - 1])}
    row |= {"grad_norm": values.pop("grad_norm"), **values}
    stats = [{name: float(x) for name, x in batch.stats.items()} for batch in batches]
    for name in ("fill", "vision_fill"):
        row[name] = float(np.mean([each[name] for each in stats]))
    for name in ("samples", "patches"):
        row[name] = int(sum(each[name] for each in stats))
    row |= run.speed.of(stats)
    row["memory_gib"] = environment.memory_gib(jax.local_devices()[0])
    return row


def not_finite(
    run: Run, number: int, values: dict[str, Any], batches: list[LoadedBatch]
) -> InputError:
    """The error of a loss that is not a number; writes the names of the step's samples to a file."""
    which = f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""
    path = run.out / f"not_finite_step_{number}{which}.json"
    names = [name for batch in batches for row in batch.names for name in row]
    found = {n: float(values[n]) for n in ("loss", "grad_norm")}
    text = {"step": number, **{n: str(x) for n, x in found.items()}, "samples": names}
    path.write_text(write_json(text, path.name, indent=2) + "\n")
    run.checkpoints.wait()
    last = max(run_dir.saved_steps(run.out), default=0)
    return InputError(
        f"step {number}: the loss is {found['loss']:g} and the gradient's norm "
        f"{found['grad_norm']:g}; its {len(names)} samples are named in {path}. Lower "
        f"optimizer.learning_rate or look at these samples; the last checkpoint is of step {last}"
    )


def _concatenated(first: jax.Array, *others: jax.Array) -> jax.Array:
    """Micro batches [M ..] of a step."""
    return jnp.concatenate([first, *others]) if others else first
