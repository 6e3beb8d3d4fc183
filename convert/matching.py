"""Which stored tensors make which array of the parameter tree, or the list of what does not fit."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from convert.mapping import TEXT, Row, released_name, rows
from convert.readers import DTYPES, Files, Stored, read_tensors
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.tensors import LazyTensor, TreePath, spell

LAYOUTS = ("released", "transformers5")
_HEAD, _EMBED = "lm_head.weight", TEXT + "embed_tokens.weight"
_ROWS = 4096  # of the embedding, compared at a time
log = logging.getLogger("qwen3vl_jax")


class MismatchError(InputError):
    """Tensors that do not fit the config: one line, and every problem in `problems`."""

    def __init__(self, where: Path | str, problems: list[str]):
        self.problems = problems
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        super().__init__(f"{where}: tensors do not fit config.json: {problems[0]}{more}")


@dataclasses.dataclass(frozen=True)
class _Source:
    """A tensor in the released layout: its dtype, and how it is read from what is stored."""

    dtype: np.dtype
    load: Callable[[], np.ndarray]


def open_hf(directory: Path, cfg: Config, layout: str | None = None) -> dict[TreePath, LazyTensor]:
    """The arrays of a Hugging Face directory's parameter tree, by path; only headers are read.

    layout: how fused experts lie ("released" or "transformers5"), needed only where their shape does
    not tell. A file without a head gives a tree without one, and a warning in the log.
    Raises InputError for files that cannot be read, MismatchError for tensors that do not fit.
    """
    if layout not in (None, *LAYOUTS):
        raise InputError(f"expert layout is {layout!r}, expected {' or '.join(LAYOUTS)}")
    _refuse_quantised(directory)
    return _Matcher(directory, cfg, layout).match()


def check_stored(where: Path, cfg: Config, stored: Mapping[TreePath, LazyTensor]) -> None:
    """Raises MismatchError unless the arrays of an Orbax checkpoint are those of the config.

    An untied head may be absent (a base model).
    """
    wanted = {row.path: row.shape for row in rows(cfg)}
    if ("head",) not in stored:
        wanted.pop(("head",), None)
    problems = [
        f"missing {spell(path)} {list(wanted[path])}" for path in wanted.keys() - stored.keys()
    ]
    problems += [f"unknown {spell(path)}" for path in stored.keys() - wanted.keys()]
    for path in wanted.keys() & stored.keys():
        if stored[path].shape != wanted[path]:
            found = f"found {list(stored[path].shape)}, expected {list(wanted[path])}"
            problems.append(f"shape of {spell(path)}: {found}")
    if problems:
        raise MismatchError(where, sorted(problems))


def _refuse_quantised(directory: Path) -> None:
    raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    quantised = raw.get("quantization_config")
    if not quantised:
        return
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
    if method == "fp8":
        raise InputError(f"{directory}: FP8 weights come in a later version; take the bf16 release")
    raise InputError(f"{directory}: weights quantised by {method!r}, expected bf16, f16 or f32")


class _Matcher:
    """What is stored and not yet used (`found`), what was (`sources`; None: a problem was noted)."""

    def __init__(self, directory: Path, cfg: Config, layout: str | None):
        self.directory, self.cfg, self.layout = directory, cfg, layout
        self.files = Files()
        self.problems: list[str] = []
        self.sources: dict[str, _Source | None] = {}
        self.found = self._by_released_name(read_tensors(directory))

    def match(self) -> dict[TreePath, LazyTensor]:
        """Every array of the tree; raises MismatchError with all problems at once."""
        if self.cfg.text.num_experts:
            for i in range(self.cfg.text.num_hidden_layers):
                self._experts(f"{TEXT}layers.{i}.mlp.experts.")
        self._tied_head()
        wanted = rows(self.cfg)
        if not self.cfg.tie_word_embeddings and _HEAD not in self.found:
            log.warning(
                "%s: no %s (a base model): it can embed, not generate", self.directory, _HEAD
            )
            wanted = [row for row in wanted if row.path != ("head",)]
        leaves = {row.path: self._leaf(row) for row in wanted}
        for tensor in self.found.values():
            self.problems.append(f"unknown {tensor.where} {list(tensor.shape)}")
        if self.problems:
            raise MismatchError(self.directory, self.problems)
        return {path: leaf for path, leaf in leaves.items() if leaf is not None}

    def _by_released_name(self, tensors: list[Stored]) -> dict[str, Stored]:
        groups: dict[str, list[Stored]] = defaultdict(list)
        for tensor in tensors:
            if tensor.dtype.startswith("F8_") or tensor.name.endswith("_scale_inv"):
                raise InputError(
                    f"{tensor.where}: FP8 weights come in a later version; take the bf16 release"
                )
            name = released_name(tensor.name)
            if name is not None:
                groups[name].append(tensor)
        for name, group in groups.items():
            if len(group) > 1:
                places = " and ".join(tensor.where for tensor in group)
                self.problems.append(f"duplicated {name}: {places}")
        return {name: group[0] for name, group in groups.items()}

    def _take(self, name: str, shape: tuple[int, ...]) -> Stored | None:
        """Uses up a stored tensor; notes what is wrong with it and gives None."""
        tensor = self.found.pop(name, None)
        if tensor is None:
            self.problems.append(f"missing {name} {list(shape)}")
        elif tensor.shape != shape:
            found = f"found {list(tensor.shape)}, expected {list(shape)}"
            self.problems.append(f"shape of {tensor.where}: {found}")
        elif tensor.dtype not in DTYPES:
            found = f"found {tensor.dtype}, expected {', '.join(DTYPES)}"
            self.problems.append(f"dtype of {tensor.where}: {found}")
        else:
            return tensor
        return None

    def _leaf(self, row: Row) -> LazyTensor | None:
        for part in row.parts:
            if part.name not in self.sources:
                tensor = self._take(part.name, part.hf_shape)
                self.sources[part.name] = tensor and self._source(tensor)
        sources = [source for part in row.parts if (source := self.sources[part.name])]
        if len(sources) < len(row.parts):
            return None
        if len({source.dtype for source in sources}) > 1:
            found = ", ".join(f"{p.name} {s.dtype}" for p, s in zip(row.parts, sources))
            self.problems.append(f"dtype of {spell(row.path)}: {found}; expected one for all parts")
        loads = [source.load for source in sources]
        return LazyTensor(
            row.shape, sources[0].dtype, lambda: row.assemble([load() for load in loads])
        )

    def _source(self, tensor: Stored, turned: bool = False) -> _Source:
        def load() -> np.ndarray:
            view = self.files.view(tensor)
            return np.ascontiguousarray(view.transpose(0, 2, 1)) if turned else view

        return _Source(DTYPES[tensor.dtype], load)

    def _tied_head(self) -> None:
        """Drops the head of a tied file where it repeats the embedding; raises where it does not."""
        head, embed = self.found.get(_HEAD), self.found.get(_EMBED)
        if not self.cfg.tie_word_embeddings or head is None or embed is None:
            return
        same = head.shape == embed.shape and head.dtype == embed.dtype and head.dtype in DTYPES
        if same:
            a, b = (self.files.view(t).view(np.uint8) for t in (head, embed))
            cuts = range(0, len(a), _ROWS)
            same = all(np.array_equal(a[i : i + _ROWS], b[i : i + _ROWS]) for i in cuts)
        if not same:
            raise InputError(
                f"{self.directory}: {_HEAD} differs from {_EMBED}, but config.json ties them; set "
                f"tie_word_embeddings to false there to keep both"
            )
        del self.found[_HEAD]

    def _experts(self, prefix: str) -> None:
        """One layer's experts: as released, as transformers 5 writes them, or one by one."""
        t = self.cfg.text
        e, d, m = t.num_experts, t.hidden_size, t.moe_intermediate_size
        shapes = {"gate_up_proj": (e, d, 2 * m), "down_proj": (e, m, d)}
        if f"{prefix}0.gate_proj.weight" in self.found:
            names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
            for fused, shape in shapes.items():
                self.sources[prefix + fused] = self._gathered(prefix, names[fused], shape)
            return
        stored = self.found.get(prefix + "gate_up_proj")
        if stored is None:
            return
        if self.layout is None and d == 2 * m and stored.shape == (e, d, d):
            raise InputError(
                f"{stored.where}: {list(stored.shape)} may be the released layout or that of "
                f"transformers 5 (hidden_size is twice moe_intermediate_size): say which "
                f"(--expert-layout {' or '.join(LAYOUTS)})"
            )
        # gate_up decides for both: down alone tells nothing where d == m.
        found_turned = self.layout is None and stored.shape == (e, 2 * m, d)
        if found_turned or self.layout == LAYOUTS[1]:
            for fused, (_, inner, outer) in shapes.items():
                tensor = self._take(prefix + fused, (e, outer, inner))
                self.sources[prefix + fused] = tensor and self._source(tensor, turned=True)

    def _gathered(
        self, prefix: str, names: tuple[str, ...], shape: tuple[int, int, int]
    ) -> _Source | None:
        """[E, in, out] from each expert's own [out, in] matrices (gate and up side by side)."""
        e, inner, outer = shape
        width = outer // len(names)
        wanted = [f"{prefix}{j}.{name}.weight" for j in range(e) for name in names]
        tensors = [self._take(name, (width, inner)) for name in wanted]
        stored = [tensor for tensor in tensors if tensor]
        if len(stored) < len(wanted):
            return None
        if len({tensor.dtype for tensor in stored}) > 1:
            self.problems.append(f"dtype of {prefix}*: found several, expected one")
            return None
        dtype = DTYPES[stored[0].dtype]

        def load() -> np.ndarray:
            out = np.empty(shape, dtype)
            for k, tensor in enumerate(stored):
                j, part = divmod(k, len(names))
                out[j, :, part * width : (part + 1) * width] = self.files.view(tensor).T
            return out

        return _Source(dtype, load)
