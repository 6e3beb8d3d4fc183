"""LoRA targets: every PEFT module of a model, and the array of the tree that holds it."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from qwen3vl_jax.checkpoint.name_map import HFTensor, ParamSpec, param_specs
from qwen3vl_jax.checkpoint.param_paths import TreePath, path_str, split_layer_index
from qwen3vl_jax.config import Config

_NOT_ADAPTED = ("embed", "pos", "weight")  # tables, and the patch embedding's kernel
Matrices = Mapping[str, Any]  # {NAME.a, NAME.b} of targets, layers stacked


@dataclasses.dataclass(frozen=True)
class LoraTarget:
    """One PEFT module (q_proj) in all layers of a tower, as part of one array of the tree.

    Its matrices are A [rank inner] and B [outer rank], experts' [E rank inner] and [E outer rank].
    Where the tower is stacked, all have a leading axis of layers.
    """

    weight: str  # the array's name with layers stacked: "layers.attn.qkv"
    part: str  # "q_proj"
    modules: tuple[str, ...]  # one a layer: "model.language_model.layers.0.self_attn.q_proj"
    paths: tuple[TreePath, ...]  # the array's path in a tree whose layers are lists, one a layer
    parameter: str | None  # of a module that is no Linear: "gate_up_proj", the router's "weight"
    stacked: bool
    experts: int  # 0 for a single matrix
    inner: int
    outer: int
    axis: int | None  # the array's axis (without layers) along which parts lie side by side
    spans: tuple[tuple[str, int, int], ...]  # (name, start, stop) of every part along that axis

    @property
    def name(self) -> str:
        """layers.attn.qkv.q_proj. The matrices are NAME.a and NAME.b."""
        return f"{self.weight}.{self.part}"

    @property
    def targets(self) -> tuple[str, ...]:
        """The names in PEFT's target_modules or target_parameters, one a layer."""
        tail = f".{self.parameter}" if self.parameter else ""
        return tuple(module + tail for module in self.modules)

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B over all layers."""
        lead = (len(self.modules),) if self.stacked else ()
        lead = (*lead, self.experts) if self.experts else lead
        return (*lead, rank, self.inner), (*lead, self.outer, rank)


def lora_targets(cfg: Config) -> dict[str, LoraTarget]:
    """Every LoRA target of a model by name, in the order of its parameters."""
    grouped: dict[tuple[str, str], list[tuple[ParamSpec, HFTensor]]] = {}
    for param in param_specs(cfg):
        if param.path[-1] not in _NOT_ADAPTED and len(param.parts[0].axes) > 1:
            weight = path_str(split_layer_index(param.path)[0])
            for part in param.parts:
                grouped.setdefault((weight, _label(part)), []).append((param, part))
    targets = (_target(*names, found) for names, found in grouped.items())
    return {target.name: target for target in targets}


def _label(part: HFTensor) -> str:
    return part.name.removesuffix(".weight").rsplit(".", 1)[-1]


def _target(weight: str, label: str, found: list[tuple[ParamSpec, HFTensor]]) -> LoraTarget:
    param, part = found[0]
    module, _, last = part.name.rpartition(".")
    *experts, outer, inner = part.hf_shape
    sizes = [0 if param.axis is None else p.shape()[param.axis] for p in param.parts]
    ends = zip(param.parts, sizes, itertools.accumulate(sizes))
    return LoraTarget(
        weight=weight,
        part=label,
        modules=tuple(part.name.rpartition(".")[0] for _, part in found),
        paths=tuple(param.path for param, _ in found),
        parameter=None if last == "weight" and not module.endswith(".mlp.gate") else last,
        stacked=split_layer_index(param.path)[1] is not None,
        experts=experts[0] if experts else 0,
        inner=outer if experts else inner,
        outer=inner if experts else outer,
        axis=param.axis,
        spans=tuple((_label(p), end - size, end) for p, size, end in ends),
    )


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Ranks (0 for none) and alphas by target and layer; matrices have a target's largest rank."""

    ranks: dict[str, tuple[int, ...]]
    alphas: dict[str, tuple[float, ...]]
    dropout: float = 0.0
    rslora: bool = False  # scale alpha / sqrt(rank) instead of alpha / rank, arXiv 2312.03732

    def scales(self, name: str) -> list[float]:
        """The factor of B A x in each layer of a target."""
        power = 0.5 if self.rslora else 1.0
        pairs = zip(self.alphas[name], self.ranks[name], strict=True)
        return [alpha / rank**power if rank else 0.0 for alpha, rank in pairs]

    @staticmethod
    def uniform(
        wanted: dict[str, tuple[bool, ...]], rank: int, alpha: float, **rest: Any
    ) -> "Adapter":
        """One rank and alpha in every wanted layer of each target."""
        ranks = {name: tuple(rank * here for here in layers) for name, layers in wanted.items()}
        alphas = {name: (alpha,) * len(layers) for name, layers in wanted.items()}
        return Adapter(ranks, alphas, **rest)
