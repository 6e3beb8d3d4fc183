"""The recipe of a run: a TOML file as frozen dataclasses. configs/sft_2b.toml documents every key.

Nothing here imports jax. Functions raise InputError for values that no run can have.
"""

import dataclasses
import importlib.util
import itertools
import math
import os
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.scores.metrics import metric_of
from qwen3vl_jax.storage.paths import BUNDLED, as_path, is_remote, kind
from qwen3vl_jax.training.toml_tables import apply_change, build


@dataclass(frozen=True)
class Source:
    """One file of records, or "python:module:Class" called with **options."""

    path: str
    weight: float = 1.0
    media: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    boxes: Literal["pixels", "norm1000"] = "pixels"
    ignore: tuple[str, ...] = ()


@dataclass(frozen=True)
class Data:
    sources: tuple[Source, ...] = ()
    shuffle: bool = True
    workers: int = 0
    bad_fraction: float = 0.01
    too_long: Literal["refuse", "cut"] = "refuse"
    weighting: Literal["token", "sqrt"] = "token"
    min_pixels: int = 0
    max_pixels: int = 0
    clip_max_pixels: int = 0
    fps: float = 0.0
    max_frames: int = 0
    add_vision_id: bool = False
    allow_special: bool = False


@dataclass(frozen=True)
class Pack:
    rows: int = 8
    length: int = 4096
    vision_rows: int = 8
    vision_length: int = 4096
    lookahead: int = 64
    groups: int = 0


@dataclass(frozen=True)
class Groups:
    """Keys of [train]; names are groups of param_groups.py or patterns."""

    freeze: tuple[str, ...] = ()
    rates: dict[str, float] = field(default_factory=dict)
    new_tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lora:
    rank: int = 0
    alpha: float = 0.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("text",)
    base: Literal["bfloat16", "float32", "int8", "fp8", "int4"] = "bfloat16"
    adapter: str = ""


@dataclass(frozen=True)
class Optimizer:
    name: Literal["adamw", "adafactor", "muon", "sgd"] = "adamw"
    learning_rate: float = 1e-5
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: int = 0
    final: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.0


@dataclass(frozen=True)
class Step:
    accumulate: int = 1
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    weights: Literal["float32", "bfloat16"] = "float32"
    rounding: Literal["stochastic", "compensated"] = "stochastic"
    gradients: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full", "narrow", "dots", "offload", "auto"] = "full"
    loss_chunk: int = 4096
    z_loss: float = 0.0
    balance_loss: float = 0.0
    vision_labels: float = 0.0
    attention_dropout: float = 0.0


@dataclass(frozen=True)
class Evaluate:
    every: int = 0
    sources: tuple[Source, ...] = ()
    batches: int = 0
    generate: int = 0
    max_new_tokens: int = 64
    metric: str = ""


@dataclass(frozen=True)
class Checkpoints:
    keep: int = 2
    keep_best: int = 1
    minutes: float = 0.0  # saves after so many minutes too; 0: by save_every alone


@dataclass(frozen=True)
class Report:
    every: int = 10
    tensorboard: bool = True
    wandb: str = ""
    samples: int = 2
    profile: tuple[int, ...] = ()
    peak_tflops: float = 0.0


@dataclass(frozen=True)
class Mesh:
    data: int = 1
    fsdp: int = 0
    tensor: int = 1
    expert: int = 1
    sequence: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        """{axis: size}; one of -1 (all devices that are left) counts as 1."""
        return {name: max(n, 1) for name, n in vars(self).items()}

    @property
    def devices(self) -> int:
        """The number of devices, by `sizes`."""
        return math.prod(self.sizes.values())


@dataclass(frozen=True)
class Recipe:
    """The recipe of a run, as `read_recipe` makes it."""

    ckpt: str
    steps: int
    save_every: int = 500
    seed: int = 0
    init: Literal["checkpoint", "normal", "fan_in"] = "checkpoint"
    deterministic: bool = False
    data: Data = Data()
    pack: Pack = Pack()
    train: Groups = Groups()
    lora: Lora = Lora()
    optimizer: Optimizer = Optimizer()
    step: Step = Step()
    evaluate: Evaluate = Evaluate()
    checkpoints: Checkpoints = Checkpoints()
    report: Report = Report()
    mesh: Mesh = Mesh()


_TRAIN_EXTRA = ("grain", "tomli_w", "matplotlib", "tensorboardX")
# Smallest values; 0 for other keys.
_ONES = """
    steps save_every pack.rows step.accumulate step.loss_chunk checkpoints.keep report.every
    mesh.data mesh.tensor mesh.expert mesh.sequence
""".split()
_LEAST = dict.fromkeys(_ONES, 1) | {"pack.length": 8, "pack.vision_length": 4, "mesh.fsdp": -1}
_BELOW_ONE = """
    data.bad_fraction lora.dropout optimizer.b1 optimizer.b2 optimizer.ema step.attention_dropout
""".split()


def read_recipe(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """The recipe of a TOML file, or of a name in configs/, after ``table.key=value`` changes.

    A change's value is TOML, or a bare string. Relative paths are looked up in the working directory,
    then in the recipe's folder, or that of configs/ for a name.
    """
    path, bundled = as_path(path), BUNDLED / "configs"
    folder = path.parent
    if not is_remote(path) and not path.exists():
        named = bundled / f"{path.name.removesuffix('.toml')}.toml"
        if len(path.parts) > 1 or not named.is_file():
            known = ", ".join(sorted(found.stem for found in bundled.glob("*.toml")))
            raise InputError(f"--config {path}: no such file; by name there are {known}")
        path, folder = named, BUNDLED
    try:
        raw = tomllib.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--config {path}: expected a TOML file, found: {reason}") from None
    for change in changes:
        apply_change(Recipe, raw, change)
    recipe = _with_found_paths(build(Recipe, raw, "", str(path)), folder)
    problems = itertools.chain(_wrong_numbers(recipe), _wrong_together(recipe))
    if (first := next(problems, None)) is not None:
        raise InputError(first)
    return recipe


def _with_found_paths(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with paths that are valid from the working directory."""

    def found(name: str) -> str:
        here = not name or name.startswith("python:") or is_remote(name) or os.path.exists(name)
        return name if here or not (folder / name).exists() else str(folder / name)

    def with_sources(table: Any) -> Any:
        sources = (replace(x, path=found(x.path), media=found(x.media)) for x in table.sources)
        return replace(table, sources=tuple(sources))

    ckpt, first = found(recipe.ckpt), Path(recipe.ckpt).parts[:1]
    if first and not is_remote(ckpt) and not os.path.exists(ckpt):
        looks = recipe.ckpt.startswith((".", "~", "/")) or len(Path(recipe.ckpt).parts) > 2
        if looks or any(Path(at, *first).is_dir() for at in (".", folder)):
            got = f"ckpt: got {recipe.ckpt!r}, expected a folder that is there"
            raise InputError(f"{got}, in the working directory or in {folder}, or a Hub id")
    data, evaluate = with_sources(recipe.data), with_sources(recipe.evaluate)
    lora = replace(recipe.lora, adapter=found(recipe.lora.adapter))
    return replace(recipe, ckpt=ckpt, data=data, evaluate=evaluate, lora=lora)


def _wrong_numbers(recipe: Recipe) -> Iterator[str]:
    numbers = {n: x for n, x in flat(recipe).items() if type(x) in (int, float)}
    for name, value in numbers.items():
        least, most = _LEAST.get(name, 0), 2**63 - 1 if name == "seed" else 2**31 - 1
        if type(value) is int and value > most:
            yield f"{name} is {value}, expected a number up to {most}"
        if type(value) is float and not math.isfinite(value):
            yield f"{name} is {value}, expected a finite number"
        if value < least:
            yield f"{name} is {value}, expected a number from {least}"
        if name in _BELOW_ONE and value >= 1:
            yield f"{name} is {value}, expected a number from 0 to below 1"
    for name, factor in recipe.train.rates.items():
        if not 0 <= factor < math.inf:
            yield f"train.rates.{name} is {factor}, expected a finite number from 0"


def _wrong_together(recipe: Recipe) -> Iterator[str]:
    pack, lora, step, warmup = recipe.pack, recipe.lora, recipe.step, recipe.optimizer.warmup
    places = max(pack.rows * pack.length, pack.vision_rows * pack.vision_length)
    if places > 2**28:
        yield f"pack: a batch of {places} tokens or patches, expected at most {2**28}"
    if recipe.mesh.devices > 2**20:
        yield f"mesh: got {dataclasses.astuple(recipe.mesh)}, expected at most {2**20} devices"
    if not recipe.ckpt:
        yield "ckpt is empty, expected the directory (or Hub id) of the model to train"
    if warmup >= recipe.steps:
        yield f"steps is {recipe.steps}, expected more than optimizer.warmup ({warmup})"
    if recipe.evaluate.every and not recipe.evaluate.sources:
        yield "evaluate.every is set and evaluate.sources is empty, expected files"
    if step.gradients == "bfloat16" and step.dtype != "bfloat16":
        expected = f"expected float32 while step.dtype is {step.dtype}; set step.dtype=bfloat16"
        yield f"step.gradients: got bfloat16, {expected}"
    if recipe.train.new_tokens and lora.rank:
        yield "train.new_tokens: LoRA trains no embedding rows; set lora.rank=0"
    if lora.adapter and not lora.rank:
        yield "lora.adapter is set and lora.rank is 0, expected the adapter's rank"
    for name in ("base", "alpha", "dropout"):
        if (value := getattr(lora, name)) != getattr(Lora, name) and not lora.rank:
            expected = "no such key while lora.rank is 0, which trains the weights themselves"
            advice = "set lora.rank, as configs/sft_8b_lora.toml does"
            yield f"lora.{name}: got {value}, expected {expected}; {advice}"
    for name, source in _named_sources(recipe):
        if not source.path or not 0 < source.weight < math.inf:
            yield f"{name}: expected a path and a weight above 0"


def few_bits(recipe: Recipe) -> str | None:
    """The base of a QLoRA run, read as values and scales: `weights` of `load`. None for other runs."""
    base = recipe.lora.base
    return base if recipe.lora.rank and base in ("int8", "fp8", "int4") else None


def _named_sources(recipe: Recipe) -> list[tuple[str, Source]]:
    tables = (("data", recipe.data.sources), ("evaluate", recipe.evaluate.sources))
    return [(f"{table}.sources.{i}", x) for table, found in tables for i, x in enumerate(found)]


def check_run(recipe: Recipe) -> None:
    """Raises InputError for a recipe that cannot start on this machine: packages, files, model."""
    for name in (*_TRAIN_EXTRA, *["wandb"] * bool(recipe.report.wandb)):
        if importlib.util.find_spec(name) is None:
            extra = "wandb" if name == "wandb" else "train"
            why = "report.wandb is set" if name == "wandb" else "training needs it"
            how = f"pip install 'qwen3vl-jax[{extra}]' (in a clone: pip install -e '.[{extra}]')"
            raise InputError(f"{name} is not installed and {why}: {how}")
    check_sources(recipe)
    if kind(as_path(recipe.ckpt)) == "folder":
        check_vision_length(recipe.pack, Config.from_hf(recipe.ckpt))


def check_vision_length(pack: Pack, cfg: Config) -> None:
    """Raises InputError if patch rows would split a group of patches that are merged."""
    unit, length = cfg.vision.merge_unit, pack.vision_length
    if pack.vision_rows and length % unit:
        raise InputError(f"pack.vision_length is {length}, expected a multiple of {unit}")


def check_sources(recipe: Recipe) -> None:
    """Raises InputError for no training source, a missing file or folder of one, an unknown metric."""
    if not recipe.data.sources:
        raise InputError("data.sources is empty, expected [[data.sources]] with a path")
    for name, source in _named_sources(recipe):
        if not source.path.startswith("python:") and not kind(as_path(source.path)):
            raise InputError(f"{name}.path is {source.path!r}: no such file")
        if source.media and kind(as_path(source.media)) != "folder":
            raise InputError(f"{name}.media is {source.media!r}: no such folder")
    if metric := recipe.evaluate.metric:
        metric_of(metric, "evaluate.metric")
        if recipe.evaluate.every and not recipe.evaluate.generate:
            expected = "expected none while evaluate.generate is 0, which answers nothing; set it"
            raise InputError(f"evaluate.metric: got {metric!r}, {expected}")


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A recipe, or a table of one, as {"table.key": value}. Dicts and tuples are values."""
    out: dict[str, Any] = {}
    for name, found in vars(value).items():
        inner = flat(found, f"{prefix}{name}.") if dataclasses.is_dataclass(found) else {}
        out |= inner or {prefix + name: found}
    return out
