"""RUN_DIR: its lock, saved steps, model files, and whether a recipe is that of the run."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from qwen3vl_jax.checkpoint import digests
from qwen3vl_jax.checkpoint.config_files import copy_files
from qwen3vl_jax.checkpoint.digests import META, DamagedError
from qwen3vl_jax.config import Config, is_run
from qwen3vl_jax.errors import InputError, ProblemsError
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.runtime import distributed
from qwen3vl_jax.runtime.compile_cache import KEPT_PROGRAMS
from qwen3vl_jax.storage import atomic_dir, json_text, paths
from qwen3vl_jax.storage.hub import resolve
from qwen3vl_jax.storage.paths import as_path, is_remote, make_folder, remove_tree
from qwen3vl_jax.training.new_tokens import add_tokens
from qwen3vl_jax.training.recipe import Recipe
from qwen3vl_jax.training.reporting.metrics_table import STEP, read_table

CHECKPOINTS, CONFIG, DAMAGED = "checkpoints", "config.toml", "damaged"
EVALUATION = "evaluation.csv"
# config.json, tokenizer and template of the model, with the new tokens.
MODEL = "model"
# Keys of the recipe that a resumed run may change.
FREE = """
    steps save_every report. evaluate. checkpoints. step.remat step.loss_chunk mesh. data.bad_fraction
    data.workers optimizer.learning_rate optimizer.schedule optimizer.warmup optimizer.final
    optimizer.weight_decay optimizer.clip
""".split()


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """The run's directory, created if missing, and locked by the first process; the others wait for it.

    Raises InputError for a directory with other files, for a path that Orbax cannot write, and while
    another run writes there. Remote paths are not locked: a killed run would leave its lock.
    """
    with ExitStack() as closing:
        if distributed.is_first():
            paths.for_orbax(out)
            if paths.kind(out) == "file":
                raise InputError(f"--out {out}: is a file, expected a directory")
            # A killed process leaves the second one; the third is there before the first.
            parts = {CONFIG, CONFIG + ".part", KEPT_PROGRAMS}
            others = paths.kind(out) and any(p.name not in parts for p in out.iterdir())
            if others and not (out / CONFIG).is_file():
                found = f"holds files and no {CONFIG} of a run"
                raise InputError(f"--out {out}: {found}; choose another one")
            make_folder(out)
            # Windows opens no directory, so there is nothing to lock.
            if not is_remote(out) and os.name != "nt":
                handle = os.open(out, os.O_RDONLY)
                closing.callback(os.close, handle)
                paths.lock(handle, out, f"--out {out}: another run is writing there")
        distributed.wait_for_all("locked")
        yield


def write_model_files(recipe: Recipe, target: Path) -> None:
    """Copies all files of recipe.ckpt but the weights, and adds train.new_tokens. Raises InputError."""
    source = resolve(recipe.ckpt)
    if is_run(source):
        how = f"write its weights first: python -m convert --to-hf {source} OUT_DIR"
        raise InputError(f"ckpt: got {source}, a run of train.py, expected a checkpoint; {how}")
    if is_remote(target) and (target / atomic_dir.CONFIG).is_file():
        # From a start of this run that saved no step.
        remove_tree(target)
    with atomic_dir.atomic_dir(target, force=True) as stage:
        copy_files(source, stage)
        if recipe.train.new_tokens:
            rows = Config.from_hf(source).text.vocab_size
            add_tokens(source, stage, recipe.train.new_tokens, rows)


def with_model(recipe: Recipe, out: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """A run's meta with the model's config. Raises ProblemsError if ckpt is no longer that model."""
    now = Config.from_hf(resolve(recipe.ckpt)).to_hf()
    if then := meta.get("model"):
        check_model(now, Config.from_hf(then).to_hf(), out)
    return {"model": now, **meta}


def open_model(recipe: Recipe, target: Path) -> tuple[Processor, list[int]]:
    """(processor, ids of train.new_tokens) of the files of `write_model_files`."""
    proc = Processor.from_pretrained(target)
    return proc, [proc.tokenizer.id_of(name) for name in recipe.train.new_tokens]


def saved_steps(run_dir: str | Path) -> list[int]:
    """The completely saved steps of a run, ascending."""
    folder = as_path(run_dir) / CHECKPOINTS
    found = folder.iterdir() if folder.is_dir() else ()
    # Orbax renames a complete step, or on gs:// writes a file last.
    last = "commit_success.txt" if is_remote(folder) else f"{META}/metadata"
    return sorted(int(p.name) for p in found if p.name.isdecimal() and (p / last).is_file())


def read_meta(run_dir: str | Path, step: int) -> dict[str, Any]:
    """The meta of a saved step. Raises DamagedError if it is not as it was saved."""
    return digests.read_meta(as_path(run_dir) / CHECKPOINTS / str(step))


def set_aside(run_dir: Path, after: int) -> None:
    """Moves the saved steps after `after`, from which the run continues, to RUN_DIR/damaged."""
    folder = run_dir / DAMAGED
    for step in saved_steps(run_dir):
        if step > after:
            make_folder(folder)
            remove_tree(folder / str(step))
            (run_dir / CHECKPOINTS / str(step)).rename(folder / str(step))


def scores(run_dir: str | Path) -> dict[int, float]:
    """{step: evaluation loss} of the saved steps with a finite one.

    The last step of a stopped run is saved before its evaluation, which is in evaluation.csv only.
    """
    rows = read_table(as_path(run_dir) / EVALUATION)
    later = {int(row[STEP]): float(row["loss"]) for row in rows if row.get("loss")}
    found: dict[int, float] = {}
    for step in saved_steps(run_dir):
        with suppress(DamagedError):
            score = read_meta(run_dir, step).get("score")
            score = later.get(step, math.nan) if score is None else score
            if math.isfinite(score):
                found[step] = score
    return found


def chosen_step(run_dir: str | Path, wanted: str) -> int:
    """The saved step for "last", "best" (lowest evaluation loss) or a number. Raises InputError."""
    steps = saved_steps(run_dir)
    if not steps:
        raise InputError(f"{run_dir}: expected a run of train.py, found no step in {CHECKPOINTS}/")
    if wanted == "last":
        return steps[-1]
    if wanted == "best":
        if not (scored := scores(run_dir)):
            raise InputError(f"{run_dir}: no saved step was evaluated, so none is best; take last")
        return min(scored, key=lambda step: (scored[step], -step))
    if not wanted.isdecimal() or int(wanted) not in steps:
        listed = ", ".join(map(str, steps))
        raise InputError(f"--step {wanted}: expected best, last or one of {listed}")
    return int(wanted)


def check_recipe(now: Mapping[str, Any], then: Mapping[str, Any], run_dir: str | Path) -> list[str]:
    """One text for each changed FREE key of two flat recipes. Raises ProblemsError if others changed."""
    differ = differences(now, then)
    # LoRA freezes everything else anyway.
    free = (*FREE, "train.freeze") if now.get("lora.rank") else tuple(FREE)
    if fixed := [text for name, text in differ.items() if not name.startswith(free)]:
        advice = "set it back or choose another --out"
        raise ProblemsError(f"{run_dir}: was started with another recipe", fixed, advice)
    return list(differ.values())


def check_model(now: Mapping[str, Any], then: Mapping[str, Any], run_dir: str | Path) -> None:
    """Raises ProblemsError if the model's config (a config.json dict) is not the run's."""
    if found := [*differences(_flat(now), _flat(then)).values()]:
        advice = "give it the ckpt it started with"
        raise ProblemsError(f"{run_dir}: was started with another model", found, advice)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix + key
        out |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return out


def differences(
    now: Mapping[str, Any],
    then: Mapping[str, Any],
    absent: str = "not there",
    write: Callable[[Any, str], str] = json_text.write_json,
) -> dict[str, str]:
    """{key: what it was and is} of the values that are not the same. write: (value, key) -> text."""

    def text(values: Mapping[str, Any], name: str) -> str:
        return write(values[name], name) if name in values else absent

    changed = (name for name in {**then, **now} if now.get(name) != then.get(name))
    return {n: f"{n} was {text(then, n)}, is now {text(now, n)}" for n in changed}
