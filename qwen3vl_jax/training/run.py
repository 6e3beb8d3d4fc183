"""The loop of a run: data, steps, evaluation, checkpoints, and the ways in which it may end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stop:
    """Whether SIGTERM has asked the run to save and end."""

    asked = False


@contextmanager
def on_sigterm() -> Iterator[Stop]:
    """Turns SIGTERM into a flag that the loop reads between two steps."""
    stop = Stop()

    def ask(*_: Any) -> None:
        stop.asked = True

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


class Run:
    """One run: everything it holds, and its loop. RUN_DIR is `out`."""

    def __init__(self, recipe: Recipe, out: Path):
        self.recipe, self.out = recipe, out
        self.proc = Processor.from_pretrained(recipe.ckpt)
        self.cfg: Config = self.proc.config
        keep = recipe.checkpoints
        self.saved = Checkpoints(out, keep.keep, keep.keep_best)
        self.first = self.saved.latest or 0
        self.meta: dict[str, Any] = {"best": None}
        if self.first:
            self.meta = self.saved.meta(self.first)
            check_recipe(plain(flat(recipe)), self.meta["recipe"], out)
        (out / "config.toml").write_text(tomli_w.dumps(plain(as_dict(recipe))))
        self.feed = Feed(recipe.data, recipe.pack, self.proc, recipe.seed)
        if self.first:
            self.feed.set_state(self.meta["data"])
        trainee = setup.cut(recipe, self.cfg, setup.initial_params(recipe, self.cfg))
        self.frozen, self.join = trainee.frozen, trainee.join
        self.state, self.step = setup.start(recipe, self.cfg, trainee)
        if self.first:
            self.state = self.saved.restore(self.first, self.state)
        self.measure = evaluate.make_measure(self.cfg, recipe.step, self.join)
        self.inference = evaluate.make_inference(recipe.step, self.join)

    def loop(self, watch: Watch, stop: Stop) -> None:
        """Every step that is left, or those until `stop` is asked."""
        recipe, behind = self.recipe, None
        for number in range(self.first + 1, recipe.steps + 1):
            packed, drawn = self.draw()
            self.state, metrics = self.step(self.state, self.frozen, packed)
            if behind is not None:  # the host waits for the step before this one: the device never does
                self.tell(watch, *behind)
            behind = (number, metrics, drawn)
            last = number == recipe.steps or stop.asked
            looked = recipe.evaluate.every and (last or number % recipe.evaluate.every == 0)
            if looked or last or number % recipe.save_every == 0:
                self.tell(watch, *behind)
                behind = None
                score = self.evaluate(watch, number) if looked and recipe.evaluate.sources else None
                self.save(score, due=last or number % recipe.save_every == 0)
            if stop.asked:
                break
        self.saved.wait()

    def draw(self) -> tuple[PackedBatch, list[Drawn]]:
        """The micro batches of the next step with a leading axis, and what was drawn for them."""
        drawn = [next(self.feed) for _ in range(self.recipe.step.accumulate)]
        return jax.tree.map(lambda *x: np.stack(x), *(d.packed for d in drawn)), drawn

    def tell(self, watch: Watch, number: int, metrics: dict[str, jax.Array], drawn: Any) -> None:
        """Writes a step down. Raises InputError where its loss is not a number."""
        values = {name: np.asarray(x) for name, x in metrics.items()}
        if not (np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"])):
            path = self.out / f"not_finite_step_{number}.json"
            names = [name for d in drawn for row in d.names for name in row]
            path.write_text(json.dumps({"step": number, "samples": names}, indent=2) + "\n")
            raise InputError(
                f"step {number}: the loss is {values['loss']}, the gradient's norm "
                f"{values['grad_norm']}; the samples of this step are in {path}. Lower "
                "optimizer.learning_rate or look at these samples; the last checkpoint is untouched"
            )
        watch.step(number, values, drawn)

    def evaluate(self, watch: Watch, number: int) -> float:
        """The loss on the evaluation set, and answers where the recipe asks for some."""
        weights = self.state.average or self.state.weights
        feed = Feed(self.evaluation_data(), self.recipe.pack, self.proc, 0, once=True)
        batches = (d.packed for d in itertools.islice(feed, self.recipe.evaluate.batches or None))
        values = evaluate.mean_loss(self.measure, weights, self.frozen, batches)
        answers = []
        if count := self.recipe.evaluate.generate:
            params = self.inference(weights, self.frozen)
            records = feed.records(count)
            answers = evaluate.answer(
                params, self.proc, records, self.recipe.evaluate.max_new_tokens
            )
            values["exact"] = sum(a.exact for a in answers) / max(len(answers), 1)
        watch.evaluation(number, values, answers)
        return values["loss"]

    def save(self, score: float | None, due: bool) -> None:
        """Saves where a checkpoint is due, and where the evaluation was the best so far."""
        best = self.meta["best"]
        better = score is not None and (best is None or score < best)
        if better:
            self.meta["best"] = score
        if due or (better and self.recipe.checkpoints.keep_best):
            self.meta |= {"recipe": plain(flat(self.recipe)), "data": self.feed.get_state()}
            self.saved.save(self.state, self.meta, score)
