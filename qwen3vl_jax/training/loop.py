"""The loop of a run: data, steps, evaluation, checkpoints, and the ways in which it may end."""

from __future__ import annotations

import dataclasses
import gc
import itertools
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qwen3vl_jax.checkpoint.digests import DamagedError
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.runtime import distributed
from qwen3vl_jax.runtime.console import memory_advice
from qwen3vl_jax.storage.hub import resolve
from qwen3vl_jax.storage.json_text import write_json
from qwen3vl_jax.training import (
    environment,
    evaluate,
    run_dir,
    train_model,
)
from qwen3vl_jax.training.checkpoints import Checkpoints, restore
from qwen3vl_jax.training.data.global_batches import GlobalFeed
from qwen3vl_jax.training.data.loader import DataLoader, LoadedBatch, check_answers
from qwen3vl_jax.training.data.packing import PackedBatch
from qwen3vl_jax.training.mesh_preset import asks_for_mesh, mesh_flags
from qwen3vl_jax.training.optimizer import make_schedule
from qwen3vl_jax.training.recipe import Data, Recipe, flat
from qwen3vl_jax.training.reporting import memory_estimate
from qwen3vl_jax.training.reporting.flops import Speed
from qwen3vl_jax.training.reporting.run_log import NullLogger, Profiler, RunLogger
from qwen3vl_jax.training.resume import (
    Stop,
    Stopped,
    catch_signals,
    check_fits,
    groups_of,
    locked,
    mesh_of,
    plain,
    with_mesh,
    write_config,
)
from qwen3vl_jax.training.run_dir import open_model, write_model_files


def train(recipe: Recipe, out: Path) -> None:
    """Runs a recipe in the directory `out`, from its last checkpoint if there is one.

    Returns when all steps are done, or after SIGTERM, which saves first. Raises InputError for what
    cannot start, for a directory of another run, and where a loss is not a number.
    """
    asked, recipe = recipe, with_mesh(recipe, out)
    mesh, notes, damaged = mesh_of(recipe), [], []
    if mesh is not None and not asks_for_mesh(asked):
        notes.append(f"no [mesh]: {mesh.size} devices, {mesh_flags(recipe.mesh)}")
    with (
        catch_signals() as stop,
        locked(out),
        nullcontext() if mesh is None else jax.set_mesh(mesh),
    ):
        for first in distributed.from_first(run_dir.saved_steps(out)[::-1] or [0]):
            try:
                return _go_on(recipe, out, first, mesh, stop, notes)
            except DamagedError as error:
                damaged.append(error)
                notes.append(f"{error}; it is moved to {out / run_dir.DAMAGED}")
        raise damaged[0]


def _go_on(
    recipe: Recipe, out: Path, first: int, mesh: Mesh | None, stop: Stop, notes: list[str]
) -> None:
    """Runs a recipe from a saved step. Raises DamagedError where that does not read whole."""
    meta = run_dir.read_meta(out, first) if first else {}
    changed = check_fits(recipe, meta, out, first) if first else []
    if not first:
        write_config(recipe, out)
    held: dict[str, int] = {}
    with memory_advice(held, "pack.rows, " * (not first) + "step.remat=full or step.loss_chunk"):
        run = Run(recipe, out, first, meta, mesh, held)
        if 0 < first < recipe.steps:  # else it says what was run
            write_config(recipe, out)
        try:
            with (
                RunLogger(out, recipe, first) if distributed.is_first() else NullLogger() as logger
            ):
                for line in [*changed, *notes]:
                    logger.log(line)
                try:
                    logger.refused(run.left_out)
                    run.loop(logger, stop)
                finally:
                    run.close()
                    logger.refused(run.feed.refused)
                logger.draw()
                done = f"stopped by {stop.asked}, saved" if stop.asked else "done"
                logger.log(f"{out}: step {run.number} of {recipe.steps}, {done}")
        finally:
            run.close()


class Run:
    """One run: everything it holds, and its loop. RUN_DIR is `out`.

    held takes bytes by part as soon as they are known, for a device that has no room for them.
    """

    def __init__(
        self, recipe: Recipe, out: Path, first: int, meta: dict[str, Any], mesh: Mesh | None,
        held: dict[str, int],
    ):  # fmt: skip
        self.recipe, self.out, self.number, self.mesh, self.closed = recipe, out, first, mesh, False
        self.groups = groups_of(recipe, mesh, meta)
        if not first:
            if distributed.is_first():
                write_model_files(recipe, out / run_dir.MODEL)
            distributed.wait_for_all("model files")
        self.proc, new_ids = open_model(recipe, out / run_dir.MODEL)
        self.cfg = self.proc.config
        self.left_out = self.check_held_out() if recipe.evaluate.every else []
        now = Config.from_hf(resolve(recipe.ckpt)).to_hf()
        self.meta = {"model": now, **meta}
        run_dir.check_model(now, Config.from_hf(self.meta["model"]).to_hf(), out)
        self.feed = self.make_feed(recipe.data, recipe.seed)
        if first:
            self.feed.set_state(self.meta["data"])
        held.update(
            memory_estimate.memory(recipe, self.cfg, memory_estimate.held(recipe, self.cfg))
        )
        trainable = train_model.prepare(recipe, self.cfg, new_ids, mesh)
        self.frozen, self.join = trainable.frozen, trainable.merge
        rule = train_model.build_optimizer(recipe, self.cfg, trainable.weights)
        like = train_model.shape_of_state(recipe, self.cfg, rule, trainable.weights, mesh)
        self.step = train_model.make_step(recipe, self.cfg, rule, self.join, like if mesh else None)
        if first:
            del trainable  # the weights make room before those of the checkpoint come
            self.state = restore(out, first, like)
            if distributed.is_first():
                run_dir.set_aside(out, after=first)
            distributed.wait_for_all("damaged steps")
        else:
            self.state = train_model.init_train_state(
                recipe, self.cfg, rule, trainable.weights, mesh
            )
        self.saved = Checkpoints(out, recipe.checkpoints.keep, recipe.checkpoints.keep_best)
        self.position: dict[str, Any] | None = None  # of the feed, before a draw that failed
        self.pending: list[tuple[int, dict[str, Any], list[LoadedBatch]]] = []
        # A device runs beside the host, which tells of a step while the next one runs.
        self.overlap = jax.default_backend() != "cpu"
        devices = 1 if mesh is None else mesh.size
        self.speed = Speed(recipe, self.cfg, self.state.weights, devices)
        # All at once: one asked for after a step would wait for the step that follows it.
        rates = make_schedule(recipe.optimizer, recipe.steps)(jnp.arange(recipe.steps))
        self.rates = np.broadcast_to(np.asarray(rates), recipe.steps)
        self.measure = evaluate.make_measure(self.cfg, recipe.step, self.join)
        self.inference = evaluate.make_inference(recipe.step, self.join)

    def close(self) -> None:
        """Waits for what is being saved, and ends the workers."""
        if not self.closed:
            self.closed = True
            self.feed.close()
            self.saved.close()

    def loop(self, logger: RunLogger | NullLogger, stop: Stop) -> None:
        """Every step that is left, or those until `stop` is asked; what was done is saved."""
        done = distributed.from_first(self.number in logger.evaluated)
        if self.due_evaluation(self.number) and not done:
            with suppress(Stopped):  # it ended before that
                self.saved.score(self.number, self.evaluate(logger, stop))
        profiler = Profiler(self.recipe.report.profile, self.out)
        gc.freeze()  # else each collection looks through all that jax and the model have loaded
        logger.restart_clock()
        begun = self.number
        while self.number < self.recipe.steps and not stop.asked_at(self.number):
            drawn = self.draw(stop)
            if not drawn:
                break
            self.number += 1
            packed = jax.tree.map(_joined, *(d.packed for d in drawn))
            if self.number == begun + 1:
                logger.compiling()
            profiler.before(self.number)
            self.state, metrics = self.step(self.state, self.frozen, packed)
            profiler.after(self.number, metrics)
            # Without their arrays, which would fill the device.
            told = [dataclasses.replace(d, packed=None) for d in drawn]
            self.pending.append((self.number, metrics, told))
            del drawn, packed
            self.tell(logger, behind=int(self.overlap))
            self.saved.check()
            due = self.number % self.recipe.save_every == 0 or self.number == self.recipe.steps
            looks = self.due_evaluation(self.number) and not stop.asked
            if due or looks:
                self.tell(logger)
                self.look_and_save(logger, stop, looks, due)
                logger.restart_clock()
        profiler.end()
        self.tell(logger)
        # The first process decides: a store's client may show others a listing of before.
        if stop.asked and not distributed.from_first(self.number in run_dir.saved_steps(self.out)):
            self.save(logger, None, due=True)

    def look_and_save(
        self, logger: RunLogger | NullLogger, stop: Stop, looks: bool, due: bool
    ) -> None:
        """Evaluates and saves; where evaluating fails or is cut short the step is saved all the same."""
        try:
            score = self.evaluate(logger, stop) if looks else None
        except BaseException as error:
            self.save(logger, None, due=True)
            if not isinstance(error, Stopped):
                raise
        else:
            self.save(logger, score, due)

    def due_evaluation(self, number: int) -> bool:
        """Whether the recipe asks for an evaluation after a step: the last one is always due."""
        every = self.recipe.evaluate.every
        return bool(every and number and (number % every == 0 or number == self.recipe.steps))

    def draw(self, stop: Stop) -> list[LoadedBatch]:
        """What the next step learns from, one a micro batch.

        Nothing where SIGTERM came and reading failed: schedulers send it to the workers too. What was
        drawn for the step counts as not drawn then.
        """
        self.position = self.feed.get_state()
        try:
            drawn = [next(self.feed) for _ in range(self.recipe.step.accumulate)]
        except Exception:
            if stop.asked:
                return []
            raise
        self.position = None
        return drawn

    def tell(self, logger: RunLogger | NullLogger, behind: int = 0) -> None:
        """Writes the steps down that were not yet, but for the last `behind`, which may still run."""
        while len(self.pending) > behind:
            number, metrics, drawn = self.pending.pop(0)
            values = jax.device_get(metrics)
            logger.step(number, self.row(number, values, drawn))

    def row(self, number: int, values: dict[str, Any], drawn: list[LoadedBatch]) -> dict[str, Any]:
        """What metrics.csv says of a step. Raises InputError where its loss is not a number."""
        if not (np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"])):
            raise self.not_finite(number, values, drawn)
        row = {"loss": values.pop("loss"), "lr": float(self.rates[number - 1])}
        row |= {"grad_norm": values.pop("grad_norm"), **values}
        stats = [{name: float(x) for name, x in d.stats.items()} for d in drawn]
        for name in ("fill", "vision_fill"):
            row[name] = float(np.mean([told[name] for told in stats]))
        for name in ("samples", "patches"):
            row[name] = int(sum(told[name] for told in stats))
        row |= self.speed.of(stats)
        row["memory_gib"] = environment.memory_gib(jax.local_devices()[0])
        return row

    def not_finite(
        self, number: int, values: dict[str, Any], drawn: list[LoadedBatch]
    ) -> InputError:
        """What stops a run whose loss is not a number; the step's samples are in a file by then."""
        which = f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""
        path = self.out / f"not_finite_step_{number}{which}.json"
        names = [name for d in drawn for row in d.names for name in row]
        found = {n: float(values[n]) for n in ("loss", "grad_norm")}
        text = {"step": number, **{n: str(x) for n, x in found.items()}, "samples": names}
        path.write_text(write_json(text, path.name, indent=2) + "\n")
        self.saved.wait()
        last = max(run_dir.saved_steps(self.out), default=0)
        return InputError(
            f"step {number}: the loss is {found['loss']:g} and the gradient's norm "
            f"{found['grad_norm']:g}; its {len(names)} samples are named in {path}. Lower "
            f"optimizer.learning_rate or look at these samples; the last checkpoint is of step {last}"
        )

    def evaluate(self, logger: RunLogger | NullLogger, stop: Stop) -> float | None:
        """The loss on the evaluation set, None where it is not finite; and answers if asked for.

        Raises Stopped where `stop` is asked in between; nothing is written then.
        """
        asked, weights = self.recipe.evaluate, self.state.average or self.state.weights
        feed = self.held_out()
        try:
            drawn = itertools.islice(feed, asked.batches or None)
            batches = (jax.tree.map(lambda x: x[0], d.packed) for d in drawn)
            values = evaluate.mean_loss(self.measure, weights, self.frozen, batches, stop.check)
            logger.refused(_refused_anywhere(feed))
            records = feed.records(asked.generate) if asked.generate else []
        finally:
            logger.refused(feed.refused)
            feed.close()
        answers = []
        if records:
            params = self.inference(weights, self.frozen)
            data, most = self.recipe.data, asked.max_new_tokens
            answers, refused = evaluate.answer(params, self.proc, data, records, most, stop.check)
            logger.refused(refused)
            values["exact"] = sum(a.exact for a in answers) / max(len(answers), 1)
        logger.evaluation(self.number, values, answers)
        if np.isfinite(values["loss"]):
            return values["loss"]
        logger.log("the evaluation's loss is not a number: this step cannot be the best")
        return None

    def check_held_out(self) -> list[tuple[str, str]]:
        """What evaluations will leave out. Raises InputError for sources that they cannot use.

        Reads what an evaluation reads, as it would else end the run hours later.
        """
        feed = self.held_out(self.recipe.data.bad_fraction)
        try:
            for _ in itertools.islice(feed, self.recipe.evaluate.batches or None):
                pass
            check_answers(feed, self.recipe.evaluate.generate)
            return feed.refused
        finally:
            feed.close()

    def make_feed(self, data: Data, seed: int, once: bool = False) -> DataLoader | GlobalFeed:
        """The batches of these sources; one device has them sent ahead."""
        if self.mesh is not None or self.groups > 1:
            return GlobalFeed(data, self.recipe.pack, self.proc, seed, self.groups, self.mesh, once)
        return DataLoader(data, self.recipe.pack, self.proc, seed, once=once, place=_to_device)

    def held_out(self, bad_fraction: float = 1.0) -> DataLoader | GlobalFeed:
        """One pass over the evaluation sources in their order, read in the recipe's way."""
        sources, told = self.recipe.evaluate.sources, self.recipe.data
        data: Data = dataclasses.replace(
            told, sources=sources, shuffle=False, workers=0, bad_fraction=bad_fraction
        )
        return self.make_feed(data, 0, once=True)

    def save(self, logger: RunLogger | NullLogger, score: float | None, due: bool) -> None:
        """Saves where a checkpoint is due, and where the evaluation was one of the best."""
        if due or self.saved.is_best(score):
            logger.refused(_refused_anywhere(self.feed))
            logger.sync()
            position = self.feed.whole_state(self.position or self.feed.get_state())
            self.meta |= {"recipe": plain(flat(self.recipe)), "data": position}
            self.meta |= {"machine": environment.describe(), "score": score}
            self.saved.save(self.state, self.meta, score)


def _refused_anywhere(feed: DataLoader | GlobalFeed) -> list[tuple[str, str]]:
    """What all processes left out or cut (all of them call it); `feed.refused` is of this one."""
    return [(name, reason) for told in distributed.all_of(feed.refused) for name, reason in told]


def _to_device(packed: PackedBatch) -> PackedBatch:
    """A micro batch with a leading axis, on its way to the device."""
    return jax.device_put(jax.tree.map(lambda x: x[None], packed))


def _joined(first: jax.Array, *others: jax.Array) -> jax.Array:
    """Micro batches [M ..] of a step."""
    return jnp.concatenate([first, *others]) if others else first
