"""TOML tables as frozen dataclasses. A field's annotation is the type of its key."""

import dataclasses
import difflib
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from qwen3vl_jax.errors import InputError

_T = TypeVar("_T")
# Keys of a recipe, and their names in transformers, TRL, PEFT, LLaMA-Factory, axolotl and ms-swift.
_NAMES = """
ckpt: model model_id model_name model_path model_name_or_path base_model; steps: max_steps train_steps
steps (--dry-run prints epochs): num_train_epochs num_epochs epochs; save_every: save_steps save_interval
data.sources: dataset datasets dataset_name dataset_path data_path data_files train_file train_data
data.workers: dataloader_num_workers num_workers; data.max_pixels: image_max_pixels
pack.rows: per_device_train_batch_size train_batch_size micro_batch_size batch_size
pack.length: max_seq_length max_seq_len max_length model_max_length cutoff_len sequence_len
train.freeze: freeze_vision_tower freeze_vit freeze_aligner; lora.rank: lora_r lora_rank r
lora.alpha: lora_alpha; lora.dropout: lora_dropout; lora.targets: lora_target target_modules
lora.base=int4: load_in_4bit; lora.base=int8: load_in_8bit; optimizer.name: optim
optimizer.learning_rate: lr learning_rate; optimizer.schedule: lr_scheduler_type lr_scheduler scheduler
optimizer.warmup: warmup_steps num_warmup_steps; optimizer.warmup (in steps): warmup_ratio
optimizer.weight_decay: weight_decay; optimizer.eps: adam_epsilon; optimizer.b1: adam_beta1
optimizer.b2: adam_beta2; optimizer.clip: max_grad_norm gradient_clipping grad_clip
step.accumulate: gradient_accumulation_steps grad_accum; step.dtype=bfloat16: bf16
step.dtype: fp16 mixed_precision torch_dtype; step.remat=full: gradient_checkpointing
evaluate.sources: eval_dataset eval_file validation_file; evaluate.every: eval_steps
checkpoints.keep: save_total_limit; report.every: logging_steps log_interval
report.wandb: report_to wandb_project run_name; mesh.fsdp: deepspeed fsdp_config; --out RUN_DIR: output_dir
"""
_PAIRS = [entry.split(": ") for entry in _NAMES.strip().replace("; ", "\n").splitlines()]
FOREIGN = {name: key for key, names in _PAIRS for name in names.split()}


def apply_change(kind: type, raw: dict[str, Any], change: str) -> None:
    """Writes one ``table.key=value`` into the raw tables. Raises InputError that names the change."""
    name, equals, text = change.partition("=")
    if not equals or not name.strip():
        raise InputError(f"{change!r}: expected key=value or table.key=value")
    _apply(kind, raw, name.strip().split("."), "", text, change)


def _apply(hint: Any, at: Any, parts: list[str], prefix: str, text: str, change: str) -> None:
    """Writes a change into a raw table or list `at`. parts: what is left of its key."""
    part, *rest = parts
    key: Any = part
    if dataclasses.is_dataclass(hint) and isinstance(at, dict):
        _check_keys([part], hint, prefix, change)
        inner = get_type_hints(hint)[part]
        if rest and part not in at:
            at[part] = list(getattr(hint, part, ())) if get_origin(inner) is tuple else {}
    elif get_origin(hint) is tuple and isinstance(at, list):
        if not part.isdecimal() or int(part) > len(at):
            raise InputError(f"{change}: {part!r} is no place in a list of {len(at)} (from 0)")
        key, inner = int(part), get_args(hint)[0]
        # The place after the last one is new.
        at += [{}] * (key == len(at))
    elif isinstance(at, dict) and (hint is Any or get_origin(hint) is dict):
        inner = Any if hint is Any else get_args(hint)[1]
        if inner is not Any:
            # Names of parameters have dots.
            key, rest = ".".join(parts), []
        at.setdefault(key, {})
    else:
        name = prefix.rstrip(".")
        raise InputError(f"{change}: {name} is no table, expected key=value or table.key=value")
    if rest:
        _apply(inner, at[key], rest, f"{prefix}{part}.", text, change)
        return
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except (ValueError, RecursionError):
        value = text
    # A string needs no quotes.
    at[key] = text if inner is str and not isinstance(value, str) else value
    _value(inner, at[key], f"{prefix}{key}", change)


def _check_keys(keys: Iterable[str], kind: Any, prefix: str, where: str) -> None:
    hints = get_type_hints(kind)
    for key in keys:
        if key not in hints:
            tables = {n: hint for n, hint in hints.items() if dataclasses.is_dataclass(hint)}
            inside = [f"{n}.{key}" for n, hint in tables.items() if key in get_type_hints(hint)]
            near = difflib.get_close_matches(key, hints, 1) or inside
            meant = FOREIGN.get(key) or (near and prefix + near[0])
            advice = f"did you mean {meant}?" if meant else f"known: {', '.join(hints)}"
            raise InputError(f"{where}: unknown key {prefix}{key}; {advice}")


def build(kind: type[_T], raw: Any, prefix: str, where: str) -> _T:
    """A dataclass from a table. Raises InputError for missing or unknown keys and wrong types."""
    fields, hints = dataclasses.fields(cast(Any, kind)), get_type_hints(kind)
    if not isinstance(raw, Mapping):
        found = f"{prefix.rstrip('.')} is {raw!r}, expected a table of keys"
        raise InputError(f"{where}: {found}, as {prefix}{fields[0].name}")
    _check_keys(raw, kind, prefix, where)
    for field in fields:
        needed = field.default is field.default_factory is dataclasses.MISSING
        if needed and field.name not in raw:
            raise InputError(f"{where}: {prefix}{field.name} is missing and has no default")
    return kind(**{k: _value(hints[k], v, f"{prefix}{k}", where) for k, v in raw.items()})


def _value(hint: Any, found: Any, name: str, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(cast(Any, hint), found, f"{name}.", where)
    origin, inner = get_origin(hint), get_args(hint)
    if origin is tuple and isinstance(found, (list, tuple)):
        return tuple(_value(inner[0], x, f"{name}[{i}]", where) for i, x in enumerate(found))
    if origin is dict and isinstance(found, Mapping):
        return {str(k): _value(inner[1], v, f"{name}.{k}", where) for k, v in found.items()}
    if hint is float and type(found) is int:
        return float(found)
    if hint is Any or type(found) is hint or (origin is Literal and found in inner):
        return found
    words = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    expected = words.get(hint, "a list" if origin is tuple else "a table")
    if origin is Literal:
        expected = f"one of {', '.join(inner)}"
    raise InputError(f"{where}: {name} is {found!r}, expected {expected}")
