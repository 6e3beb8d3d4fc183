"""`--dry-run`: what a recipe would train, hold and see, without reading or making a weight."""

import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qwen3vl_jax.checkpoint.auto_mesh import bytes_limit
from qwen3vl_jax.config import IGNORE_INDEX, SIZE, Config
from qwen3vl_jax.device_mesh import layout_mesh
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.processing.tokenizer import Tokenizer
from qwen3vl_jax.storage.paths import as_path, kind
from qwen3vl_jax.training import train_model
from qwen3vl_jax.training.data.loader import DataLoader, Refusal, check_answers, survey
from qwen3vl_jax.training.recipe import Recipe, check_sources
from qwen3vl_jax.training.reporting import memory_estimate
from qwen3vl_jax.training.run_dir import open_model, write_model_files
from qwen3vl_jax.training.state_sharding import check_mesh

# Everything of a checkpoint but its weights.
_SMALL_FILES = ["*.json", "*.txt", "*.jinja"]
# Batches drawn to measure fill and samples a step.
_BATCHES = 4
_TARGET, _OTHER, _SPECIAL = "bold green", "dim", " reverse"


def dry_run(recipe: Recipe, console: Console | None = None) -> None:
    """Prints parameters by group, memory by part, steps and epochs, and one sample with its mask.

    A Hub id whose files cannot be had is read as the released size in its name, and what that leaves
    out is said. Every record of data and evaluation is read, and each that gives no sample is named.
    Raises InputError for all that a run refuses; where that is the data, after all else is printed.
    """
    console = console or Console(soft_wrap=False, highlight=False)
    write = functools.partial(console.print, markup=False, soft_wrap=True)
    cfg, proc, missing = _opened(recipe)
    check_mesh(layout_mesh(recipe.mesh.sizes), cfg, train_model.shapes(cfg))
    if recipe.init == "checkpoint" and kind(as_path(recipe.ckpt)) == "folder":
        train_model.check_base(recipe, cfg)
    recipe = memory_estimate.with_remat(recipe, cfg, bytes_limit(jax.local_devices()[0]))
    parts = memory_estimate.held(recipe, cfg)
    console.print(_parameters(recipe, cfg, parts))
    console.print(_memory(recipe, cfg, parts))
    drawn, records, wrong = [], 0, list[InputError]()
    try:
        check_sources(recipe)
        if proc is not None:
            wrong += _survey(recipe, proc, write)
            # As the run would draw them.
            data = dataclasses.replace(recipe.data, workers=0)
            loader = DataLoader(data, recipe.pack, proc, recipe.seed)
            drawn, records = list(itertools.islice(loader, _BATCHES)), sum(map(len, loader.sources))
    except InputError as error:
        wrong.append(error)
    write(_steps(recipe, drawn, records))
    if proc is not None and drawn:
        write(rendered(proc.tokenizer, cfg, drawn[0], marks=console.color_system is None))
    for line in missing:
        write(line)
    if wrong:
        raise wrong[0]


def _survey(recipe: Recipe, proc: Processor, write: Callable[[str], None]) -> list[InputError]:
    """Names what training and evaluation leave out; gives why a run would refuse either."""

    def tell(refusal: Refusal) -> None:
        write(f"left out: {refusal.name}: {' '.join(refusal.reason.split())}")

    wrong, asked = [], recipe.evaluate
    held_out = dataclasses.replace(recipe.data, sources=asked.sources, shuffle=False)
    for data in [recipe.data, *([held_out] if asked.every else [])]:
        try:
            survey(data, recipe.pack, proc, tell)
            if data is held_out:
                check_answers(DataLoader(data, recipe.pack, proc, 0, once=True), asked.generate)
        except InputError as error:
            wrong.append(error)
    return wrong


def _opened(recipe: Recipe) -> tuple[Config, Processor | None, list[str]]:
    """(config, processor if its files are here, what is missing)."""
    ckpt = recipe.ckpt
    if kind(as_path(ckpt)) or not (size := SIZE.search(ckpt)):
        return *_with_new_tokens(recipe, ckpt), []
    from huggingface_hub import snapshot_download

    try:
        return *_with_new_tokens(recipe, snapshot_download(ckpt, allow_patterns=_SMALL_FILES)), []
    # What its HTTP library raises changes from version to version.
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        told = f"records are not checked and no sample is shown: {ckpt} cannot be had ({reason} ..)"
        return Config.named(size[0]), None, [f"{told}; sizes are those of a released {size[0]}"]


def _with_new_tokens(recipe: Recipe, directory: str) -> tuple[Config, Processor]:
    """What a run would work with: its model files, written to a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model"
        write_model_files(dataclasses.replace(recipe, ckpt=directory), target)
        proc, _ = open_model(recipe, target)
    return proc.config, proc


def _parameters(recipe: Recipe, cfg: Config, parts: memory_estimate.Held) -> Table:
    columns = "group", "trained", "frozen", "learning rate x"
    table = number_table(f"{recipe.ckpt}: parameters", *columns)
    groups = parts.by_group(recipe, cfg)
    for group, (trained, frozen, rates) in groups.items():
        table.add_row(group, f"{trained:,}", f"{frozen:,}", " ".join(f"{r:g}" for r in rates))
    trained, frozen = sum(row[0] for row in groups.values()), sum(row[1] for row in groups.values())
    table.add_section()
    share = f"{trained / max(trained + frozen, 1):.2%} trained"
    table.add_row("all", f"{trained:,}", f"{frozen:,}", share)
    return table


def number_table(title: str, first: str, *others: str) -> Table:
    """A table with no rows: a column of names, the others of numbers."""
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _memory(recipe: Recipe, cfg: Config, parts: memory_estimate.Held) -> Table:
    devices, found = recipe.mesh.devices, memory_estimate.memory(recipe, cfg, parts)
    title = f"memory of each of {devices:,} devices" if devices > 1 else "memory of the device"
    total = sum(found.values())
    unit, name = (2**30, "GiB") if total >= 2**30 else (2**20, "MiB")
    table = number_table(title, "part", name)
    for part, size in found.items():
        table.add_row(part, f"{size / unit:,.2f}")
    table.add_section()
    table.add_row("all, about", f"{total / unit:,.2f}")
    return table


def _steps(recipe: Recipe, drawn: list[Any], records: int) -> str:
    pack, many = recipe.pack, recipe.step.accumulate
    text = (
        f"steps: {recipe.steps:,}, each {many} x {pack.rows} rows of {pack.length:,} tokens = "
        f"{pack.rows * pack.length * many:,} places, and {many} x {pack.vision_rows} rows of "
        f"{pack.vision_length:,} patches"
    )
    if not drawn:
        return text
    names = ("fill", "vision_fill", "samples")
    fill, vision, samples = np.mean([[d.stats[name] for name in names] for d in drawn], 0)
    epochs = samples * many * recipe.steps / max(records, 1)
    return (
        f"{text}\nfilled: {fill:.0%} of tokens, {vision:.0%} of patches, {samples * many:.1f} samples "
        f"a step (of {len(drawn)} batches)\nepochs: about {epochs:.2f} of {records:,} records"
    )


def rendered(tokenizer: Tokenizer, cfg: Config, drawn: Any, marks: bool) -> Text:
    """The first sample of a batch: targets and special tokens in colour, or between marks."""
    batch = drawn.packed.batch
    row = int(np.argmax(batch.segment_ids[:, 0] > 0))
    inside = batch.segment_ids[row] == 1
    ids, labels = batch.tokens[row][inside], batch.labels[row][inside]
    name, targets = drawn.names[row][0], labels != IGNORE_INDEX
    text = Text(f"{name}: {len(ids)} tokens, {int(targets.sum())} of them are targets\n")
    text.append("[[target]], {{special token}}\n" if marks else "", style=_OTHER)
    pads, special = (cfg.image_token_id, cfg.video_token_id), set(tokenizer.added.values())
    for target, run in itertools.groupby(zip(ids.tolist(), targets.tolist()), lambda x: x[1]):
        text.append("[[" if target and marks else "")
        tokens = [token for token, _ in run]
        for token, same in itertools.groupby(tokens, lambda x: x if x in special else None):
            held = list(same)
            piece = tokenizer.decode(held, skip_special_tokens=False)
            if token in pads and len(held) > 1:
                piece = f"{tokenizer.token_of(token)} x {len(held)}"
            if token is not None and marks:
                piece = f"{{{{{piece}}}}}"
            style = _TARGET if target else _OTHER
            text.append(piece, style=style + _SPECIAL * (token is not None))
        text.append("]]" if target and marks else "")
    return text
