"""A Hugging Face directory as the arrays of the parameter tree, or the list of what does not fit."""

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qwen3vl_jax.checkpoint.config_files import QUANTIZATION, read_config
from qwen3vl_jax.checkpoint.fp8 import SUFFIX, block_of, dequantize_into, misfit
from qwen3vl_jax.checkpoint.lazy_tensor import SCALE, VALUES, Index, LazyTensor
from qwen3vl_jax.checkpoint.name_map import TEXT, Block, ParamSpec, param_specs, released_name
from qwen3vl_jax.checkpoint.param_paths import TreePath, path_str
from qwen3vl_jax.checkpoint.validate import MismatchError, check_weights
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.storage.atomic_dir import CONFIG
from qwen3vl_jax.storage.safetensors_files import DTYPES, FP8, Files, Stored, read_tensors


@dataclasses.dataclass(frozen=True)
class Weight:
    """A stored tensor in the released layout, and its scales if it is FP8, which `keep` leaves."""

    files: Files
    tensor: Stored
    scales: Stored | None
    block: Block | None
    keep: bool = False

    @property
    def dtype(self) -> np.dtype:
        """The dtype of `load`: as stored, or bf16 for dequantized FP8."""
        as_stored = self.scales is None or self.keep
        return (DTYPES | FP8)[self.tensor.dtype if as_stored else "BF16"]

    def load(self) -> np.ndarray:
        """The values: a read-only view of the file, or a dequantized copy."""
        if self.scales is None or self.keep:
            return self.files.view(self.tensor)
        out = np.empty(self.tensor.shape, self.dtype)
        self.read_into(out)
        return out

    def sliceable(self) -> np.ndarray:
        """The values for slicing: of a remote file only the slices are fetched."""
        return self.load() if self.scales and not self.keep else self.files.sliced(self.tensor)

    def load_scales(self) -> np.ndarray:
        """The scales of kept FP8: a read-only view of the file."""
        assert self.scales is not None
        return self.files.view(self.scales)

    def read_into(self, out: np.ndarray) -> None:
        """Writes the values into `out` (same shape and dtype, any strides) without another copy."""
        codes = self.files.view(self.tensor)
        if self.scales is None or self.block is None or self.keep:
            out[...] = codes
        else:
            dequantize_into(codes, self.files.view(self.scales), self.block, out)


@dataclasses.dataclass(frozen=True)
class Experts:
    """[E, in, out] from matrices [out, in] of single experts; gate and up lie side by side.

    weights: `parts` matrices for each of the E experts, or one stored tensor [E, out, in].
    """

    weights: Sequence[Weight]
    shape: tuple[int, int, int]
    parts: int = 1

    @property
    def dtype(self) -> np.dtype:
        return self.weights[0].dtype

    @property
    def keep(self) -> bool:
        return self.weights[0].keep

    @property
    def fused(self) -> bool:
        return len(self.weights[0].tensor.shape) == 3

    def load(self) -> np.ndarray:
        """The values, transposed into a copy."""
        out = np.empty(self.shape, self.dtype)
        if self.fused:
            self.weights[0].read_into(out.transpose(0, 2, 1))
            return out
        width = self.shape[2] // self.parts
        for k, weight in enumerate(self.weights):
            expert, part = divmod(k, self.parts)
            weight.read_into(out[expert, :, part * width : (part + 1) * width].T)
        return out

    # Slices of a transposed tensor lie everywhere in its file.
    sliceable = load

    def load_scales(self) -> np.ndarray:
        """The scales of kept FP8, transposed as the values are."""
        if self.fused:
            return self.weights[0].load_scales().transpose(0, 2, 1)
        scales = [weight.load_scales().T for weight in self.weights]
        experts = (scales[i : i + self.parts] for i in range(0, len(scales), self.parts))
        return np.stack([np.concatenate(expert, axis=1) for expert in experts])


LAYOUTS = ("released", "transformers5")
_HEAD, _EMBED = "lm_head.weight", TEXT + "embed_tokens.weight"
# Rows of the embedding and the head that are compared at a time.
_ROWS = 4096
log = logging.getLogger("qwen3vl_jax")


def open_hf(
    directory: Path, cfg: Config, layout: str | None = None, weights: str | None = None
) -> dict[TreePath, LazyTensor]:
    """The arrays of a Hugging Face directory by tree path; only headers are read.

    weights: None dequantizes FP8 to bf16 at load, "fp8" keeps values and scale, "int8" refuses FP8.
    layout: of fused experts, "released" or "transformers5", needed only where their shape is ambiguous.
    Raises InputError for files that cannot be read, MismatchError for tensors that do not fit.
    """
    if layout not in (None, *LAYOUTS):
        raise InputError(f"expert layout: got {layout!r}, expected {' or '.join(LAYOUTS)}")
    return _Matcher(directory, cfg, layout, weights).match()


class _Matcher:
    """Matches stored tensors to parameters; the weight of a tensor with a problem is None."""

    def __init__(self, directory: Path, cfg: Config, layout: str | None, weights: str | None):
        self.directory, self.cfg, self.layout = directory, cfg, layout
        self.keep = weights == "fp8"
        self.files = Files()
        self.problems: list[str] = []
        self.weights: dict[str, Weight | Experts | None] = {}
        self.block = block_of(directory, read_config(directory))
        found = self._by_released_name(read_tensors(directory))
        self.scales = {name: found.pop(name) for name in list(found) if name.endswith(SUFFIX)}
        self.found = found
        held = "fp8" if any(tensor.dtype in FP8 for tensor in found.values()) else None
        check_weights(directory, held, weights)

    def match(self) -> dict[TreePath, LazyTensor]:
        """Every array of the tree; raises MismatchError with all problems at once."""
        if self.cfg.text.num_experts:
            for i in range(self.cfg.text.num_hidden_layers):
                self._experts(f"{TEXT}layers.{i}.mlp.experts.")
        self._tied_head()
        wanted = param_specs(self.cfg)
        if not self.cfg.tie_word_embeddings and _HEAD not in self.found:
            text = "%s: no %s (a base model): it can embed, not generate"
            log.warning(text, self.directory, _HEAD)
            wanted = [param for param in wanted if param.path != ("head",)]
        leaves: dict[TreePath, LazyTensor] = {}
        for param in wanted:
            leaves |= self._leaves(param)
        for tensor in (*self.found.values(), *self.scales.values()):
            self.problems.append(f"unknown {tensor.where} {list(tensor.shape)}")
        if self.problems:
            raise MismatchError(self.directory, self.problems)
        return leaves

    def _by_released_name(self, tensors: list[Stored]) -> dict[str, Stored]:
        groups: dict[str, list[Stored]] = defaultdict(list)
        for tensor in tensors:
            if tensor.dtype in FP8 and self.block is None:
                lacks = f"but {CONFIG} has no {QUANTIZATION} with the size of its blocks"
                advice = f"fetch {CONFIG} again or take the bf16 release"
                raise InputError(f"{tensor.where}: {tensor.dtype}, {lacks}; {advice}")
            if (name := released_name(tensor.name)) is not None:
                groups[name].append(tensor)
        for name, group in groups.items():
            if len(group) > 1:
                places = " and ".join(tensor.where for tensor in group)
                self.problems.append(f"duplicated {name}: {places}")
        return {name: group[0] for name, group in groups.items()}

    def _take(self, name: str, shape: tuple[int, ...]) -> Weight | None:
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
            return Weight(self.files, tensor, scales, self.block, self.keep and scales is not None)
        return None

    def _leaves(self, param: ParamSpec) -> dict[TreePath, LazyTensor]:
        """A parameter's array, or values and scale of a kept one; {} where a problem was noted."""
        for part in param.parts:
            if part.name not in self.weights:
                self.weights[part.name] = self._take(part.name, part.hf_shape)
        weights = [weight for part in param.parts if (weight := self.weights[part.name])]
        if len(weights) < len(param.parts):
            return {}
        if len({weight.dtype for weight in weights}) > 1:
            found = ", ".join(f"{p.name} {w.dtype}" for p, w in zip(param.parts, weights))
            where = path_str(param.path)
            self.problems.append(f"dtype of {where}: found {found}, expected one for all parts")
            return {}

        def load() -> np.ndarray:
            return param.assemble([weight.load() for weight in weights])

        def read(where: Sequence[Index]) -> list[np.ndarray]:
            tensors = [weight.sliceable() for weight in weights]
            return [param.cut(tensors, index) for index in where]

        leaf = LazyTensor(param.shape, weights[0].dtype, load, read)
        block = self.block
        if not weights[0].keep or block is None:
            return {param.path: leaf}

        def scale() -> np.ndarray:
            return param.assemble_scales([weight.load_scales() for weight in weights], block)

        return {
            (*param.path, VALUES): leaf,
            (*param.path, SCALE): LazyTensor(param.scale_shape(block), DTYPES["F32"], scale),
        }

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
        a, b = (self.files.view(tensor).view(np.uint8) for tensor in (one, other))
        cuts = range(0, len(a), _ROWS)
        return all(np.array_equal(a[i : i + _ROWS], b[i : i + _ROWS]) for i in cuts)

    def _experts(self, prefix: str) -> None:
        """One layer's experts: fused as released, fused as in transformers 5, or one by one."""
        t = self.cfg.text
        e, d, m = t.num_experts, t.hidden_size, t.moe_intermediate_size
        shapes = {"gate_up_proj": (e, d, 2 * m), "down_proj": (e, m, d)}
        if f"{prefix}0.gate_proj.weight" in self.found:
            names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
            for fused, shape in shapes.items():
                self.weights[prefix + fused] = self._single(prefix, names[fused], shape)
            return
        stored = self.found.get(prefix + "gate_up_proj")
        if stored is None:
            return
        if self.layout is None and d == 2 * m and stored.shape == (e, d, d):
            may_be = "may be the released layout or that of transformers 5"
            why = f"{may_be} (hidden_size is twice moe_intermediate_size)"
            advice = f"give --expert-layout {' or '.join(LAYOUTS)}"
            raise InputError(f"{stored.where}: got {list(stored.shape)}, which {why}; {advice}")
        # gate_up decides for both: the shape of down is ambiguous where hidden_size equals
        # moe_intermediate_size.
        transposed = self.layout is None and stored.shape == (e, 2 * m, d)
        if transposed or self.layout == LAYOUTS[1]:
            for fused, shape in shapes.items():
                count, inner, outer = shape
                weight = self._take(prefix + fused, (count, outer, inner))
                if weight:
                    self._check_blocks(weight, weight.tensor.where)
                self.weights[prefix + fused] = Experts([weight], shape) if weight else None

    def _single(
        self, prefix: str, names: tuple[str, ...], shape: tuple[int, int, int]
    ) -> Experts | None:
        """Experts from a tensor for each expert; notes a problem and gives None."""
        count, inner, outer = shape
        width = outer // len(names)
        wanted = [f"{prefix}{j}.{name}.weight" for j in range(count) for name in names]
        weights = [self._take(name, (width, inner)) for name in wanted]
        stored = [weight for weight in weights if weight]
        if len(stored) < len(wanted):
            return None
        if len({weight.dtype for weight in stored}) > 1:
            self.problems.append(f"dtype of {prefix}*: found several, expected one")
            return None
        self._check_blocks(stored[0], f"{prefix}*", width if len(names) > 1 else 0)
        return Experts(stored, shape, len(names))

    def _check_blocks(self, weight: Weight, where: str, width: int = 0) -> None:
        """Notes blocks of kept FP8 that do not transpose: not square, or cut at `width`."""
        if weight.keep and self.block and (len(set(self.block)) > 1 or width % self.block[0]):
            layout = "the released layout of experts, in which FP8 is kept"
            unfit = f"blocks of {where}: {list(self.block)} do not fit {layout}"
            self.problems.append(f"{unfit}; load or convert it without weights fp8")
