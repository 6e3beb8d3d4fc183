"""LoRA targets: every PEFT module of a model, and the array of the tree that holds it."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from qwen3vl_jax.checkpoint.name_map import HFTensor, ParamSpec, param_specs
from qwen3vl_jax.checkpoint.param_paths import TreePath, path_str, split_layer_index
from qwen3vl_jax.config import Config

# Tables, and the patch embedding's kernel.
_NOT_ADAPTED = ("embed", "pos", "weight")


# {NAME.a, NAME.b} of targets, layers stacked.
Matrices = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class LoraTarget:
    """One PEFT module (q_proj) in all layers of a tower, as part of one array of the tree.

    Its matrices are A [rank inner] and B [outer rank], experts' [E rank inner] and [E outer rank].
    Where the tower is stacked, all have a leading axis of layers.
    """

    # The array's name with layers stacked: "layers.attn.qkv".
    weight: str
    # "q_proj"
    part: str
    # One a layer: "model.language_model.layers.0.self_attn.q_proj".
    modules: tuple[str, ...]
    # The array's path in a tree whose layers are lists, one a layer.
    paths: tuple[TreePath, ...]
    # The parameter of a module that is no Linear: "gate_up_proj", the router's "weight".
    parameter: str | None
    stacked: bool
    # 0 for a single matrix.
    experts: int
    inner: int
    outer: int
    # The array's axis (without layers) along which parts lie side by side.
    axis: int | None
    # (name, start, stop) of every part of the array along that axis.
    spans: tuple[tuple[str, int, int], ...]

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
    grouped: dict[str, list[tuple[ParamSpec, int]]] = {}
    for param in param_specs(cfg):
        if param.path[-1] not in _NOT_ADAPTED and len(param.parts[0].axes) > 1:
            for k, part in enumerate(param.parts):
                name = f"{_flat_name(param.path)}.{_label(part)}"
                grouped.setdefault(name, []).append((param, k))
    return {name: _target(found) for name, found in grouped.items()}


def _flat_name(path: TreePath) -> str:
    return path_str(split_layer_index(path)[0])


def _label(part: HFTensor) -> str:
    return part.name.removesuffix(".weight").rsplit(".", 1)[-1]


def _target(found: list[tuple[ParamSpec, int]]) -> LoraTarget:
    param, k = found[0]
    *experts, _, _ = shape = param.parts[k].hf_shape
    _, parameter = _module(param.parts[k].name)
    outer, inner = shape[::-1][:2] if experts else shape
    return LoraTarget(
        weight=_flat_name(param.path),
        part=_label(param.parts[k]),
        modules=tuple(_module(param.parts[k].name)[0] for param, k in found),
        paths=tuple(param.path for param, _ in found),
        parameter=parameter,
        stacked=split_layer_index(param.path)[1] is not None,
        experts=experts[0] if experts else 0,
        inner=inner,
        outer=outer,
        axis=param.axis,
        spans=tuple(_spans(param)),
    )


def _module(name: str) -> tuple[str, str | None]:
    """(module, parameter) of a released tensor's name; parameter is None for a Linear's weight."""
    module, _, last = name.rpartition(".")
    if last == "weight":
        return module, "weight" if module.endswith(".mlp.gate") else None
    return module, last


def _spans(param: ParamSpec) -> Iterator[tuple[str, int, int]]:
    start = 0
    for part in param.parts:
        stop = start + (0 if param.axis is None else part.shape[param.axis])
        yield _label(part), start, stop
        start = stop


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Ranks (0 for none) and alphas by target and layer; matrices have a target's largest rank."""

    ranks: dict[str, tuple[int, ...]]
    alphas: dict[str, tuple[float, ...]]
    dropout: float = 0.0
    # Scale alpha / sqrt(rank) instead of alpha / rank, arXiv 2312.03732.
    rslora: bool = False

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
