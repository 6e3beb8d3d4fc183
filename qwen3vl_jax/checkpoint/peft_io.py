"""PEFT adapters: adapter_config.json and adapter_model.safetensors, read and written.

Experts have the layout of PEFT's ParamWrapper: A [E r, inner] by expert and rank, B [outer, r E] by rank
and expert. The two parameters of one module are nested, the inner one under "base_layer".
"""

import collections
import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from qwen3vl_jax.checkpoint.adapter_map import Adapter, LoraTarget, Matrices, lora_targets
from qwen3vl_jax.checkpoint.name_map import released_name
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.storage.atomic_dir import atomic_dir
from qwen3vl_jax.storage.json_text import read_json_file, write_json
from qwen3vl_jax.storage.paths import AnyPath, as_path
from qwen3vl_jax.storage.safetensors_files import DTYPES, Stored, read_header, refuse_pickles

SETTINGS, MATRICES = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _NESTED = "base_model.model.", ".base_layer"
_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)(?P<nested>(?:\.base_layer)*)"
    r"\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight"
)
_TABLE = re.compile(r".*\b(?:lm_head|embed_tokens)(?:\.base_layer)?\.weight")
# Settings of adapters that are more than two matrices a module, or whose base is not the release.
_REFUSED = re.compile(
    "use_(dora|qalora|bdlora)|lora_bias|fan_in_fan_out|modules_to_save|trainable_token_indices"
    "|layer_replication|alora_invocation_tokens|(arrow|velora|kasa|monteclora|megatron)_config"
)
_PLAIN_STARTS = (True, False, None, "gaussian", "eva")  # init_lora_weights, base unchanged

_Pair = tuple[np.ndarray, np.ndarray]  # A and B


def save_adapter(
    out: AnyPath, cfg: Config, weights: Matrices, adapter: Adapter, base_name: str = ""
) -> None:
    """Writes a directory that PEFT loads onto transformers' model, complete or not at all.

    weights: {NAME.a, NAME.b} of `lora_targets`, layers stacked. Raises InputError if `out` exists.
    """
    known, ranks = lora_targets(cfg), adapter.ranks
    tensors: dict[str, np.ndarray] = {}
    for name in ranks:
        target, down = known[name], f"{name.removesuffix('gate_up.gate_up_proj')}down.down_proj"
        a, b = (np.asarray(weights[f"{name}.{side}"]) for side in "ab")
        for i, (module, rank) in enumerate(zip(target.modules, ranks[name], strict=True)):
            if not rank:
                continue
            here = i if target.stacked else ...
            one_a, one_b = a[here][..., :rank, :], b[here][..., :rank]
            if target.experts:
                one_a = one_a.reshape(-1, target.inner)
                one_b = one_b.transpose(1, 2, 0).reshape(target.outer, -1)
            inner = target.parameter == "gate_up_proj" and any(ranks.get(down, ())[i : i + 1])
            key = f"{_PREFIX}{module}{_NESTED if inner else ''}"
            tensors[f"{key}.lora_A.weight"] = np.ascontiguousarray(one_a)
            tensors[f"{key}.lora_B.weight"] = np.ascontiguousarray(one_b)
    settings = _settings(known, adapter) | {"base_model_name_or_path": base_name or None}
    with atomic_dir(as_path(out), needs=sum(x.nbytes for x in tensors.values())) as stage:
        (stage / MATRICES).write_bytes(save(tensors, metadata={"format": "pt"}))
        text = write_json(settings, SETTINGS, indent=2) + "\n"
        (stage / SETTINGS).write_text(text, encoding="utf-8")


def _settings(known: Mapping[str, LoraTarget], adapter: Adapter) -> dict[str, Any]:
    """The dict of adapter_config.json, without dropout for experts: PEFT cannot load both."""
    flat = {
        (known[name].parameter is not None, target): pair
        for name, ranks in adapter.ranks.items()
        for target, *pair in zip(known[name].targets, ranks, adapter.alphas[name], strict=True)
        if pair[0]
    }
    (rank, alpha), _ = collections.Counter(tuple(pair) for pair in flat.values()).most_common(1)[0]
    unlike = {target: pair for (_, target), pair in flat.items() if pair != [rank, alpha]}
    names = [[target for kind, target in flat if kind is fused] for fused in (False, True)]
    every = [target for known_target in known.values() for target in known_target.targets]
    ranks = {re.escape(target): rank for target, (rank, _) in unlike.items()}
    alphas = {re.escape(target): _json_number(alpha) for target, (_, alpha) in unlike.items()}
    dropout = 0.0 if names[1] else adapter.dropout
    found = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True}
    found |= {"r": rank, "lora_alpha": _json_number(alpha), "lora_dropout": dropout}
    found |= {"target_modules": _shortened(names[0], every), "rank_pattern": ranks}
    found |= {"alpha_pattern": alphas, "bias": "none", "fan_in_fan_out": False}
    found |= {"init_lora_weights": True, "modules_to_save": None, "use_dora": False}
    found |= {"use_rslora": adapter.rslora}
    return found | ({"target_parameters": _shortened(names[1], every)} if names[1] else {})


def _json_number(x: float) -> float:
    """8 for 8.0, as PEFT writes alphas."""
    return int(x) if x == int(x) else x


def _shortened(names: list[str], every: list[str]) -> list[str]:
    """Module names, shortened to their ending after the layer index where that is unambiguous."""
    wanted, chosen = set(names), {}
    for name in names:
        ending = re.split(r"\.\d+\.", name)[-1]
        named = {other for other in every if f".{other}".endswith(f".{ending}")}
        chosen[ending if named <= wanted else name] = None
    return list(chosen)


def load_adapter(directory: AnyPath, cfg: Config) -> tuple[dict[str, np.ndarray], Adapter]:
    """({NAME.a, NAME.b}, settings) of a PEFT directory: matrices of `lora_targets`, layers stacked.

    Layers without an adapter, and ranks below a target's largest, are zero. Raises InputError for files
    that cannot be read or do not fit, and for more than two matrices a module (DoRA, biases).
    """
    directory = as_path(directory)
    settings, known = _read_settings(directory), lora_targets(cfg)
    by_module = collections.defaultdict(list)
    for target in known.values():
        for i, module in enumerate(target.modules):
            by_module[module].append((target, i))
    layers: dict[str, dict[int, _Pair]] = collections.defaultdict(dict)
    for module, a, b in _read_pairs(directory, (cfg.text.vocab_size, cfg.text.hidden_size)):
        if module not in by_module:
            near = difflib.get_close_matches(module, by_module, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"{directory}: this model has no module {module} to adapt{hint}")
        target, i, pair = _matched(directory, module, by_module[module], a, b)
        if i in layers[target.name]:
            raise InputError(f"{directory}: {module} is adapted twice")
        layers[target.name][i] = pair
    ranks, alphas, weights = {}, {}, {}
    for name, target in known.items():
        if found := layers.get(name):
            pairs = [found.get(i) for i in range(len(target.modules))]
            ranks[name] = tuple(pair[0].shape[-2] if pair else 0 for pair in pairs)
            alphas[name] = tuple(_alpha(settings, module) for module in target.targets)
            weights |= zip((f"{name}.a", f"{name}.b"), _stacked(target, found, max(ranks[name])))
    dropout = float(settings.get("lora_dropout") or 0.0)
    return weights, Adapter(ranks, alphas, dropout, bool(settings.get("use_rslora")))


def _read_settings(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory, expected a PEFT adapter's")
    if not (directory / SETTINGS).is_file():
        raise InputError(f"{directory}: has no {SETTINGS}, expected a PEFT adapter's directory")
    settings = read_json_file(directory / SETTINGS)
    for key, given, wanted in (("peft_type", None, "LORA"), ("bias", "none", "none")):
        if (found := settings.get(key, given)) != wanted:
            raise InputError(f"{directory}: {key}: got {found!r}, expected {wanted!r}")
    for key, found in settings.items():
        if found and _REFUSED.fullmatch(key):
            expected = "expected plain LoRA, two matrices a module; "
            expected += "merge the adapter with PEFT and load the whole model"
            raise InputError(f"{directory}: {key}: got {found!r}, {expected}")
    if (start := settings.get("init_lora_weights", True)) not in _PLAIN_STARTS:
        why = "which changed the base weights; save the adapter with PEFT's "
        why += "path_initial_model_for_weight_conversion"
        raise InputError(f"{directory}: init_lora_weights: got {start!r}, {why}")
    return settings


def _read_pairs(directory: Path, table: tuple[int, ...]) -> Iterator[tuple[str, Any, Any]]:
    """(module, A, B) of every pair in the file; table: the shape of the embedding."""
    if not (file := directory / MATRICES).is_file():
        refuse_pickles(directory, [path.name for path in directory.glob("adapter_model.bin")])
    found: dict[tuple[str, str], dict[str, Stored]] = collections.defaultdict(dict)
    for tensor in read_header(file):
        match = _KEY.fullmatch(tensor.name)
        # PEFT saves a copy of the base's head or embedding beside an adapter of lm_head.
        if _TABLE.fullmatch(tensor.name) and tensor.shape == table:
            continue
        if match is None or tensor.dtype not in DTYPES:
            raise InputError(f"{directory}: {tensor.name} ({tensor.dtype}) is no matrix of a LoRA")
        name = released_name(f"{match['module']}.weight") or ""
        found[name.removesuffix(".weight"), match["nested"]][match["side"]] = tensor
    if not found:
        raise InputError(f"{file}: holds no matrices")
    for (module, _), sides in found.items():
        if len(sides) < 2:
            raise InputError(f"{directory}: {module} has lora_{next(iter(sides))} alone")
        yield module, sides["A"].view(), sides["B"].view()


def _matched(
    where: Path, module: str, options: list[tuple[LoraTarget, int]], a: np.ndarray, b: np.ndarray
) -> tuple[LoraTarget, int, _Pair]:
    """The target and layer of a pair by its shapes, and the pair in our axes. Raises InputError."""
    sides = (a.shape[-1], b.shape[0]) if a.ndim == b.ndim == 2 else ()
    # An older PEFT read experts [E, in, out] as [E, out, in]: A is then of the output side.
    for swapped in (False, True) if options[0][0].experts else (False,):
        for target, i in options:
            count = max(target.experts, 1)
            wanted = (target.outer, target.inner) if swapped else (target.inner, target.outer)
            if sides != wanted or len(a) != b.shape[1] or len(a) % count or not len(a):
                continue
            if not target.experts:
                return target, i, (a, b)
            a, b = a.reshape(count, -1, a.shape[1]), b.reshape(len(b), -1, count)
            if swapped:
                return target, i, (b.transpose(2, 1, 0), a.transpose(0, 2, 1))
            return target, i, (a, b.transpose(2, 0, 1))
    wanted = " or ".join(f"[r {target.inner}] and [{target.outer} r]" for target, _ in options)
    found = f"A {list(a.shape)} and B {list(b.shape)}"
    raise InputError(f"{where}: {module}: got {found}, expected {wanted}")


def _alpha(settings: Mapping[str, Any], target: str) -> float:
    """The alpha of a module: the first alpha_pattern that matches the end of its name, or lora_alpha."""
    patterns = (settings.get("alpha_pattern") or {}).items()
    found = (alpha for pattern, alpha in patterns if re.match(rf"(.*\.)?({pattern})$", target))
    return float(next(found, settings.get("lora_alpha", 8)))


def _stacked(target: LoraTarget, layers: Mapping[int, _Pair], rank: int) -> _Pair:
    """A and B of a target with layers stacked, zero in layers without an adapter."""
    dtype = np.result_type(*(side.dtype for pair in layers.values() for side in pair))
    a, b = (np.zeros(shape, dtype) for shape in target.shapes(rank))
    for i, (one_a, one_b) in layers.items():
        here = i if target.stacked else ...
        a[here][..., : one_a.shape[-2], :] = one_a
        b[here][..., : one_b.shape[-1]] = one_b
    return a, b
