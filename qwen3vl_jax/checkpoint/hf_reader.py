"""A Hugging Face directory as the arrays of the parameter tree, or the list of what does not fit."""

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qwen3vl_jax.checkpoint.config_files import QUANTIZATION, read_config
from qwen3vl_jax.checkpoint.fp8 import SUFFIX, block_of, dequantize_into, misfit
from qwen3vl_jax.checkpoint.lazy_tensor import SCALE, VALUES, LazyTensor, Leaves, Shape
from qwen3vl_jax.checkpoint.name_map import TEXT, Block, ParamSpec, param_specs, released_name
from qwen3vl_jax.checkpoint.param_paths import path_str
from qwen3vl_jax.checkpoint.validate import MismatchError, check_weights
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.storage.atomic_dir import CONFIG
from qwen3vl_jax.storage.safetensors_files import DTYPES, FP8, Stored, read_tensors


@dataclasses.dataclass(frozen=True)
class Weight:
    """A stored tensor in the released layout, with scales if it is FP8; block: to dequantize it."""

    tensor: Stored
    scales: Stored | None
    block: Block | None

    @property
    def dtype(self) -> np.dtype:
        """The dtype of `load`: as stored, or bf16 for dequantized FP8."""
        return (DTYPES | FP8)["BF16" if self.block else self.tensor.dtype]

    @property
    def keep(self) -> bool:
        """Whether it stays FP8."""
        return self.scales is not None and self.block is None

    def load(self) -> np.ndarray:
        """The values: a read-only view of the file, or a dequantized copy."""
        if self.block is None:
            return self.tensor.view()
        out = np.empty(self.tensor.shape, self.dtype)
        self.read_into(out)
        return out

    def sliceable(self) -> np.ndarray:
        """The values for slicing: of a remote file only the slices are fetched."""
        return self.load() if self.block else self.tensor.sliced()

    def load_scales(self) -> np.ndarray:
        """The scales of FP8: a read-only view of the file."""
        assert self.scales is not None
        return self.scales.view()

    def read_into(self, out: np.ndarray) -> None:
        """Writes the values into `out` (same shape and dtype, any strides) without another copy."""
        if self.block is None:
            out[...] = self.tensor.view()
        else:
            dequantize_into(self.tensor.view(), self.load_scales(), self.block, out)


class Experts:
    """[E, in, out] from a tensor [E, out, in], or each expert's [out, in] with gate and up side by side."""

    def __init__(self, weights: Sequence[Weight], shape: Shape):
        self.weights, self.shape = weights, shape
        self.dtype, self.keep = weights[0].dtype, weights[0].keep

    def load(self) -> np.ndarray:
        """The values, transposed into a copy."""
        out = np.empty(self.shape, self.dtype)
        if len(self.weights[0].tensor.shape) == 3:
            self.weights[0].read_into(out.transpose(0, 2, 1))
            return out
        count, inner, _ = self.shape
        places = out.reshape(count, inner, len(self.weights) // count, -1).transpose(0, 2, 3, 1)
        for weight, place in zip(self.weights, (place for expert in places for place in expert)):
            weight.read_into(place)
        return out

    # Slices of a transposed tensor lie everywhere in its file.
    sliceable = load

    def load_scales(self) -> np.ndarray:
        """The scales of kept FP8, transposed as the values are."""
        scales = np.stack([weight.load_scales() for weight in self.weights])
        rows, columns = scales.shape[-2:]
        scales = scales.reshape(self.shape[0], -1, rows, columns).transpose(0, 3, 1, 2)
        return scales.reshape(self.shape[0], columns, -1)


LAYOUTS = ("released", "transformers5")
_HEAD, _EMBED = "lm_head.weight", TEXT + "embed_tokens.weight"
log = logging.getLogger("qwen3vl_jax")


def open_hf(
    directory: Path, cfg: Config, layout: str | None = None, weights: str | None = None
) -> Leaves:
    """The arrays of a Hugging Face directory by tree path; only headers are read.

    weights: None dequantizes FP8 to bf16 at load, "fp8" keeps values and scale, "int8" refuses FP8.
    layout: of fused experts, "released" or "transformers5", needed only where their shape is ambiguous.
    Raises InputError for files that cannot be read, MismatchError for tensors that do not fit.
    """
    if layout not in (None, *LAYOUTS):
        raise InputError(f"expert layout: got {layout!r}, expected {' or '.join(LAYOUTS)}")
    return _Matcher(directory, cfg, layout, weights).match()


class _Matcher:
    """Matches stored tensors to parameters; experts of tensors with a problem are None."""

    def __init__(self, directory: Path, cfg: Config, layout: str | None, weights: str | None):
        self.directory, self.cfg, self.layout = directory, cfg, layout
        self.keep = weights == "fp8"
        self.problems: list[str] = []
        self.experts: dict[str, Experts | None] = {}
        self.block = block_of(directory, read_config(directory))
        groups: dict[str, list[Stored]] = defaultdict(list)
        for tensor in read_tensors(directory):
            if tensor.dtype in FP8 and self.block is None:
                lacks = f"{CONFIG} has no {QUANTIZATION} with the size of its blocks"
                lacks += f"; fetch {CONFIG} again or take the bf16 release"
                raise InputError(f"{tensor.where}: {tensor.dtype}, but {lacks}")
            if (name := released_name(tensor.name)) is not None:
                groups[name].append(tensor)
        for name, group in groups.items():
            if len(group) > 1:
                places = " and ".join(tensor.where for tensor in group)
                self.problems.append(f"duplicated {name}: {places}")
        found = {name: group[0] for name, group in groups.items()}
        self.scales = {name: found.pop(name) for name in list(found) if name.endswith(SUFFIX)}
        self.found = found
        held = "fp8" if any(tensor.dtype in FP8 for tensor in found.values()) else None
        check_weights(directory, held, weights)

    def match(self) -> Leaves:
        if self.cfg.text.num_experts:
            for i in range(self.cfg.text.num_hidden_layers):
                self._experts(f"{TEXT}layers.{i}.mlp.experts.")
        self._tied_head()
        wanted = param_specs(self.cfg)
        if not self.cfg.tie_word_embeddings and _HEAD not in self.found:
            what = "(a base model): it can embed, not generate"
            log.warning("%s: no %s %s", self.directory, _HEAD, what)
            wanted = [param for param in wanted if param.path != ("head",)]
        leaves: Leaves = {}
        for param in wanted:
            leaves |= self._leaves(param)
        for tensor in (*self.found.values(), *self.scales.values()):
            self.problems.append(f"unknown {tensor.where} {list(tensor.shape)}")
        if self.problems:
            raise MismatchError(self.directory, self.problems)
        return leaves

    def _take(self, name: str, shape: Shape) -> Weight | None:
        """Uses up a stored tensor and its scales; notes a problem and gives None."""
        tensor, scales = self.found.pop(name, None), self.scales.pop(name + SUFFIX, None)
        if tensor is None:
            but = f" (only its scales: {scales.where})" if scales else ""
            self.problems.append(f"missing {name} {list(shape)}{but}")
        elif tensor.shape != shape:
            found = f"found {list(tensor.shape)}, expected {list(shape)}"
            self.problems.append(f"shape of {tensor.where}: {found}")
        elif tensor.dtype not in DTYPES | FP8:
            found = f"found {tensor.dtype}, expected {', '.join(DTYPES | FP8)}"
            self.problems.append(f"dtype of {tensor.where}: {found}")
        elif problem := misfit(tensor, scales, self.block):
            self.problems.append(problem)
        else:
            return Weight(tensor, scales, self.block if scales and not self.keep else None)
        return None

    def _leaves(self, param: ParamSpec) -> Leaves:
        """A parameter's array, or values and scale of a kept one; {} where a problem was noted."""
        names = {part.name: part.hf_shape for part in param.parts}
        found = [self.experts[n] if n in self.experts else self._take(n, names[n]) for n in names]
        weights = [weight for weight in found if weight]
        if len(weights) < len(names):
            return {}
        if len({weight.dtype for weight in weights}) > 1:
            found = ", ".join(f"{name} {weight.dtype}" for name, weight in zip(names, weights))
            where = path_str(param.path)
            self.problems.append(f"dtype of {where}: found {found}, expected one for all parts")
            return {}
        values = LazyTensor(
            param.shape,
            weights[0].dtype,
            lambda: param.assemble([weight.load() for weight in weights]),
            lambda where: param.cut([weight.sliceable() for weight in weights], where),
        )
        if not weights[0].keep or (block := self.block) is None:
            return {param.path: values}
        scale = LazyTensor(
            param.scale_shape(block),
            DTYPES["F32"],
            lambda: param.assemble([weight.load_scales() for weight in weights], block),
        )
        return {(*param.path, VALUES): values, (*param.path, SCALE): scale}

    def _tied_head(self) -> None:
        """Drops a tied head that repeats the embedding. Raises InputError if it differs."""
        head, embed = self.found.get(_HEAD), self.found.get(_EMBED)
        if not self.cfg.tie_word_embeddings or head is None or embed is None:
            return
        scales = (self.scales.get(name + SUFFIX) for name in (_HEAD, _EMBED))
        if not (self._same(head, embed) and self._same(*scales)):
            differs = f"{_HEAD} differs from {_EMBED}, but config.json ties them"
            advice = "set tie_word_embeddings to false there to keep both"
            raise InputError(f"{self.directory}: {differs}; {advice}")
        del self.found[_HEAD]
        self.scales.pop(_HEAD + SUFFIX, None)

    def _same(self, one: Stored | None, other: Stored | None) -> bool:
        """Whether two tensors have equal dtype, shape and bytes, or both are absent."""
        if one is None or other is None:
            return one is other
        if (one.shape, one.dtype) != (other.shape, other.dtype) or one.dtype not in DTYPES | FP8:
            return False
        # In parts: a comparison takes half the memory of what it compares.
        a, b = (np.array_split(x.view().view(np.uint8), 64) for x in (one, other))
        return all(map(np.array_equal, a, b))

    def _experts(self, prefix: str) -> None:
        """One layer's experts: fused as released, fused as in transformers 5, or one by one."""
        t = self.cfg.text
        e, d, m = t.num_experts, t.hidden_size, t.moe_intermediate_size
        one_by_one = f"{prefix}0.gate_proj.weight" in self.found
        fused = self.found.get(prefix + "gate_up_proj")
        if not one_by_one:
            if fused is None:
                return
            if self.layout is None and d == 2 * m and fused.shape == (e, d, d):
                why = "may be the released layout or that of transformers 5 (hidden_size is twice "
                why += f"moe_intermediate_size); give --expert-layout {' or '.join(LAYOUTS)}"
                raise InputError(f"{fused.where}: got {list(fused.shape)}, which {why}")
            # gate_up decides for both: down is ambiguous where hidden_size is moe_intermediate_size.
            if (self.layout or LAYOUTS[fused.shape == (e, 2 * m, d)]) != LAYOUTS[1]:
                return
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
        for name, (inner, outer) in {"gate_up_proj": (d, 2 * m), "down_proj": (m, d)}.items():
            wanted, shape = [prefix + name], (e, outer, inner)
            if one_by_one:
                wanted = [f"{prefix}{j}.{part}.weight" for j in range(e) for part in parts[name]]
                shape = (outer // len(parts[name]), inner)
            self.experts[prefix + name] = self._transposed(wanted, shape, (e, inner, outer))

    def _transposed(self, names: list[str], hf_shape: Shape, shape: Shape) -> Experts | None:
        """Experts from tensors that have one shape; notes a problem and gives None."""
        weights = [weight for name in names if (weight := self._take(name, hf_shape))]
        if len(weights) < len(names):
            return None
        first, where = weights[0], names[0].partition("experts.")[0] + "experts.*"
        if len({weight.dtype for weight in weights}) > 1:
            self.problems.append(f"dtype of {where}: found several, expected one")
            return None
        beside = hf_shape[-2] if hf_shape[-2] < shape[2] else 0
        # Kept blocks have to be square to be transposed, and parts end where a block ends.
        if first.keep and self.block and (len(set(self.block)) > 1 or beside % self.block[0]):
            where = where if len(weights) > 1 else first.tensor.where
            unfit = "do not fit the released layout of experts, in which FP8 is kept"
            advice = "load or convert it without weights fp8"
            self.problems.append(f"blocks of {where}: {list(self.block)} {unfit}; {advice}")
        return Experts(weights, shape)
