"""A training run from its recipe to its last checkpoint: mesh, model, data, state, step, loop."""

import dataclasses
import functools
import gc
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import field
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
from qwen3vl_jax.training.reporting import flops, memory_estimate
from qwen3vl_jax.training.reporting.run_log import NullLogger, Profiler, RunLogger, Times
from qwen3vl_jax.training.train_step import TrainState


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
        run_dir.locked(out),
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
    # To go on, the recipe and the model must be those of the run.
    meta = run_dir.read_meta(out, first) if first else {}
    changed = run_setup.check_fits(recipe, meta, out, first) if first else []
    groups = run_setup.groups_of(recipe, mesh, meta)
    if not first:
        run_setup.write_config(recipe, out)
        if distributed.is_first():
            run_dir.write_model_files(recipe, out / run_dir.MODEL)
        distributed.wait_for_all("model files")
    processor, new_ids = run_dir.open_model(recipe, out / run_dir.MODEL)
    cfg, meta = processor.config, run_dir.with_model(recipe, out, meta)
    fitted = run_setup.with_remat(recipe, cfg, changed)
    sizes = memory_estimate.memory(fitted, cfg, memory_estimate.held(fitted, cfg))
    advice = "pack.rows, " * (not first) + "step.remat=full or step.loss_chunk"
    with memory_advice(sizes, advice), ExitStack() as closing:
        # The evaluation sources are read once to check them.
        open_loader = loader_of(recipe, processor, groups, mesh)
        left_out = evaluate.check_held_out(recipe, open_loader) if recipe.evaluate.every else []
        loader = open_loader(recipe.data, recipe.seed)
        if first:
            loader.set_state(meta["data"])
        state, frozen, merge, step = start_state(fitted, cfg, new_ids, mesh, out, first)
        evaluation = evaluate.make_evaluation(fitted, processor, open_loader, merge)
        checkpoints = Checkpoints(out, recipe.checkpoints.keep, recipe.checkpoints.keep_best)
        speed = flops.Speed(recipe, cfg, state.weights, 1 if mesh is None else mesh.size)
        closing.callback(checkpoints.close)
        closing.callback(loader.close)
        if 0 < first < recipe.steps:
            run_setup.write_config(recipe, out)
        with RunLogger(out, recipe, first) if distributed.is_first() else NullLogger() as logger:
            for line in [*changed, *notes]:
                logger.log(line)
            logger.refused(left_out)
            parts = loader, step, state, frozen, evaluation, checkpoints
            run = Run(recipe, out, first, meta, *parts, logger, stop, speed)
            # The step donates the state's arrays.
            del state, parts
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
    weights, frozen, merge = train_model.prepare(recipe, cfg, new_ids, mesh)
    optimizer = train_model.build_optimizer(recipe, cfg, weights)
    like = train_model.shape_of_state(recipe, cfg, optimizer, weights, mesh)
    step = train_model.make_step(recipe, cfg, optimizer, merge, like if mesh else None)
    if not first:
        state = train_model.init_train_state(recipe, cfg, optimizer, weights, mesh)
        return state, frozen, merge, step
    # Frees the first weights before those of the checkpoint are read.
    del weights
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
    number: int  # steps done
    meta: dict[str, Any]  # what is saved beside each step
    loader: DataLoader | GlobalFeed
    step: train_model.Step
    state: TrainState
    frozen: Any
    evaluation: evaluate.Evaluation
    checkpoints: Checkpoints
    logger: RunLogger | NullLogger
    stop: run_setup.Stop
    speed: flops.Speed
    position: dict[str, Any] | None = None  # the loader's state before a draw that failed
    # (step, metrics, batches without arrays, times) of steps that are not in metrics.csv yet.
    unwritten: list[tuple[int, Any, list[LoadedBatch], Any]] = field(default_factory=list)
    times: Times = field(default_factory=Times)

    @functools.cached_property
    def rates(self) -> np.ndarray:
        """The learning rate of every step. Computed at once: a device call would wait for a step."""
        steps = self.recipe.steps
        rates = make_schedule(self.recipe.optimizer, steps)(jnp.arange(steps))
        return np.broadcast_to(np.asarray(rates), steps)

    def evaluated_loss(self) -> float | None:
        """Evaluates the state: its loss, or None if that is not finite. Raises Stopped."""
        return self.evaluation(self.state, self.frozen, self.number, self.logger, self.stop.check)


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
            run.checkpoints.score(begun, run.evaluated_loss())
    profiler = Profiler(recipe.report.profile, run.out)
    timer, every = SaveTimer(recipe.checkpoints.minutes), recipe.save_every
    programs: set[Any] = set()
    # Keeps the collector from scanning all that jax and the model have loaded.
    gc.freeze()
    logger.restart_clock()
    while run.number < recipe.steps and not stop.asked_at(run.number):
        with run.times.of("data"):
            packed, batches = next_batches(run)
        if not batches:
            break
        run.number += 1
        # On a GPU a batch with many samples or images a row has a program of its own.
        program = jax.tree.structure(packed)
        if new := program not in programs:
            programs.add(program)
            logger.compiling()
        profiler.before(run.number)
        with run.times.of("compiling") if new else nullcontext():
            run.state, metrics = run.step(run.state, run.frozen, packed)
        profiler.after(run.number, metrics)
        run.unwritten.append((run.number, metrics, batches, run.times.since_last()))
        del packed
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
        save(run, None)


def evaluate_and_save(run: Run, evaluates: bool, due: bool) -> bool:
    """Evaluates, and saves if a checkpoint is due or the loss is one of the best; whether it saved.

    The step is saved too if evaluating fails or is stopped.
    """
    score = None
    try:
        with run.times.of("evaluating"):
            score = run.evaluated_loss() if evaluates else None
    except run_setup.Stopped:
        due = True
    except BaseException:
        save(run, None)
        raise
    if saves := due or run.checkpoints.is_best(score):
        save(run, score)
    return saves


def save(run: Run, score: float | None) -> None:
    """Saves the state, the position in the data, and what the logger holds."""
    run.logger.refused(all_refused(run.loader))
    run.logger.sync()
    position = run.loader.global_state(run.position or run.loader.get_state())
    run.meta |= {"recipe": run_setup.plain(flat(run.recipe)), "data": position}
    run.meta |= {"machine": environment.describe(), "score": score}
    with run.times.of("saving"):
        run.checkpoints.save(run.state, run.meta, score)


def next_batches(run: Run) -> tuple[Any, list[LoadedBatch]]:
    """The micro batches [M ..] of the next step, and what is known of them, without arrays.

    Empty if SIGTERM came and reading failed: schedulers send SIGTERM to the workers too. The samples
    drawn for that step are then drawn again by the next run.
    """
    run.position = run.loader.get_state()
    try:
        batches = [next(run.loader) for _ in range(run.recipe.step.accumulate)]
    except Exception:
        if run.stop.asked:
            return None, []
        raise
    run.position = None
    packed, *others = for_one_program([batch.packed for batch in batches])
    if others:
        packed = jax.tree.map(lambda *parts: jnp.concatenate(parts), packed, *others)
    return packed, [dataclasses.replace(batch, packed=None) for batch in batches]


def write_metrics(run: Run, behind: int = 0) -> None:
    """Logs the steps that are not logged yet, but for the last `behind`, which may still run.

    Raises InputError if a step's loss is not a number.
    """
    while len(run.unwritten) > behind:
        number, metrics, batches, times = run.unwritten.pop(0)
        values = jax.device_get(metrics)
        loss, norm = values.pop("loss"), values.pop("grad_norm")
        if not (np.isfinite(loss) and np.isfinite(norm)):
            raise not_finite(run, number, float(loss), float(norm), batches)
        row = {"loss": loss, "lr": float(run.rates[number - 1]), "grad_norm": norm, **values}
        stats = [{name: float(x) for name, x in batch.stats.items()} for batch in batches]
        row |= {n: float(np.mean([each[n] for each in stats])) for n in ("fill", "vision_fill")}
        row |= {n: int(sum(each[n] for each in stats)) for n in ("samples", "patches")}
        row |= run.speed.of(stats)
        row["memory_gib"] = environment.memory_gib(jax.local_devices()[0])
        run.logger.step(number, row | times)


def not_finite(
    run: Run, number: int, loss: float, norm: float, batches: list[LoadedBatch]
) -> InputError:
    """The error of a loss that is not a number; writes the names of the step's samples to a file."""
    which = f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""
    path = run.out / f"not_finite_step_{number}{which}.json"
    names = [name for batch in batches for row in batch.names for name in row]
    found = {"step": number, "loss": str(loss), "grad_norm": str(norm), "samples": names}
    path.write_text(write_json(found, path.name, indent=2) + "\n")
    run.checkpoints.wait()
    last = max(run_dir.saved_steps(run.out), default=0)
    what = f"step {number}: the loss is {loss:g} and the gradient's norm {norm:g}"
    where = f"its {len(names)} samples are named in {path}"
    advice = "Lower optimizer.learning_rate or look at these samples"
    return InputError(f"{what}; {where}. {advice}; the last checkpoint is of step {last}")
