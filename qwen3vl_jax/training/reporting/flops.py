"""Floating-point operations of a training step, counted from shapes, for MFU.

A multiply and an add are two. Norms, rotary embeddings, softmax and activations are left out, as in
every published count (PaLM, arXiv 2204.02311, appendix B). Dims as in layers.py.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax

from qwen3vl_jax.config import Config
from qwen3vl_jax.runtime.chips import peak_flops
from qwen3vl_jax.training.param_groups import Flat, group_of
from qwen3vl_jax.training.recipe import Recipe

# Where a batch passes each group: a trained one needs the gradient of all that is behind it, and of
# its own tower, which is many layers.
_PLACE = {"vision": 0, "merger": 1, "embeddings": 2, "text": 3, "head": 4}
_PLACE |= {"router": _PLACE["text"], "experts": _PLACE["text"]}
_TOWERS = (0, 3)
_ATTENTION = {"attention": "text", "vision_attention": "vision"}


@dataclasses.dataclass(frozen=True)
class Counts:
    """How much passes through the model."""

    tokens: int  # of the decoder
    pairs: int  # of a query and a key it sees, in one decoder layer
    patches: int  # of the ViT
    patch_pairs: int  # of two patches that see each other, in one ViT layer


def forward_flops(cfg: Config, work: Counts) -> dict[str, float]:
    """FLOPs of one forward pass by group of parameters; "attention" and "vision_attention" have none."""
    t, c = cfg.text, cfg.vision
    heads, keys = t.num_attention_heads * t.head_dim, t.num_key_value_heads * t.head_dim
    weights = {"text": t.hidden_size * (2 * heads + 2 * keys)}
    if t.num_experts:
        expert = 3 * t.hidden_size * t.moe_intermediate_size
        weights["router"] = t.hidden_size * t.num_experts
        weights["experts"] = t.num_experts_per_tok * expert
    else:
        weights["text"] += 3 * t.hidden_size * t.intermediate_size
    wide, mergers = c.hidden_size * c.merge_unit, 1 + len(c.deepstack_visual_indexes)
    block = 4 * c.hidden_size**2 + 2 * c.hidden_size * c.intermediate_size
    patch, rows = math.prod(c.patch_shape) * c.hidden_size, work.patches // c.merge_unit
    out = {name: 2.0 * work.tokens * t.num_hidden_layers * n for name, n in weights.items()}
    return out | {
        "attention": 4.0 * work.pairs * t.num_hidden_layers * heads,
        "head": 2.0 * work.tokens * t.vocab_size * t.hidden_size,
        "vision": 2.0 * work.patches * (patch + c.depth * block),
        "vision_attention": 4.0 * work.patch_pairs * c.depth * c.hidden_size,
        "merger": 2.0 * rows * mergers * (wide**2 + wide * c.out_hidden_size),
    }


def step_flops(
    cfg: Config,
    work: Counts,
    *,
    trained: Collection[str] = tuple(_PLACE),
    adapters: Mapping[str, int] | None = None,
    remat: str = "",
) -> float:
    """FLOPs of forward and backward: gradients of activations where they are needed, and of weights
    in the trained groups alone.

    trained: names of `param_groups.GROUPS`. adapters: {group: parameters of low-rank pairs on it}, of
    experts those that one token meets; such a group need not be in `trained`. remat: "" is what the
    model needs (for MFU: nothing counts twice); a name of `layers.REMAT` adds what that policy and
    the chunked loss compute again.
    """
    # One table, and two products with it.
    if cfg.tie_word_embeddings and "embeddings" in trained:
        trained = {*trained, "head"}
    parts, adapters = forward_flops(cfg, work), adapters or {}
    first = min((_PLACE[name] for name in (*trained, *adapters)), default=len(_PLACE))
    total = sum(parts.values())
    for name, flops in parts.items():
        # Attention multiplies two activations; other parts one and weights.
        back = _goes_back(name, first)
        total += flops * (back + (back if name in _ATTENTION else name in trained))
    passed = {"vision": work.patches, "merger": work.patches // cfg.vision.merge_unit}
    total += sum(6.0 * count * passed.get(name, work.tokens) for name, count in adapters.items())
    return total + (_again(cfg, parts, first, remat) if remat else 0.0)


def _goes_back(name: str, first: int) -> bool:
    """Whether the backward pass goes through a part, if the first trained group is at `first`."""
    place = _PLACE[_ATTENTION.get(name, name)]
    return place > first or (place == first and place in _TOWERS)


def _again(cfg: Config, parts: Mapping[str, float], first: int, remat: str) -> float:
    """What is computed a second time: the logits, and what the policy forgets of layers.

    "dots" keeps what `linear` and a kernel of attention give, so the experts come again (and attention
    where XLA runs it); "narrow" forgets each MLP's first product, "offload" attention. "full" forgets all,
    but an MLP's last product is not needed again, nor is the patch embedding, which stands before the
    layers.
    """
    t, c = cfg.text, cfg.vision
    attention = 2 * t.head_dim * (t.num_attention_heads + t.num_key_value_heads)
    mlp = 0 if t.num_experts else t.intermediate_size
    block = 4 * c.hidden_size + 2 * c.intermediate_size
    tower = math.prod(c.patch_shape) + c.depth * block
    wide = {
        "text": 2 * mlp / (attention + 3 * mlp),
        "vision": c.depth * c.intermediate_size / tower,
    }
    experts = {"router": 1.0, "experts": 1.0}
    cheap = {**experts, "vision_attention": 1.0, "attention": 1.0}
    full = {
        "text": (attention + 2 * mlp) / (attention + 3 * mlp),
        "vision": c.depth * (block - c.intermediate_size) / tower,
    }
    known = {"none": {}, "full": cheap | full, "narrow": experts | wide, "dots": experts}
    shares = known.get(remat, cheap)
    again = sum(parts.get(n, 0.0) * share for n, share in shares.items() if _goes_back(n, first))
    return again + parts["head"]


class Speed:
    """FLOPs of a run's steps by what its recipe trains, and what its devices could do at best."""

    def __init__(self, recipe: Recipe, cfg: Config, weights: Flat, devices: int = 1):
        self._flops = functools.partial(step_flops, cfg, **trained_parts(recipe, cfg, weights))
        peak = recipe.report.peak_tflops * 1e12
        peak = peak or peak_flops(jax.local_devices()[0].device_kind)
        self._padded, self._peak = self._flops(full_work(recipe)), peak and peak * devices

    def of(self, micro: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        """{"flops", "padded_flops", "peak_flops"} of a step, given packing.fill_of its micro batches."""
        names = [field.name for field in dataclasses.fields(Counts)]
        real = self._flops(Counts(*(int(sum(m[name] for m in micro)) for name in names)))
        return {"flops": real, "padded_flops": self._padded, "peak_flops": self._peak}


def full_work(recipe: Recipe) -> Counts:
    """What a step passes with its padding: every row full, one sample a row, one frame a ViT row."""
    pack, many = recipe.pack, recipe.step.accumulate
    tokens, patches = many * pack.rows * pack.length, many * pack.vision_rows * pack.vision_length
    pairs = tokens * (pack.length + 1) // 2
    return Counts(tokens, pairs, patches, patches * pack.vision_length)


def trained_parts(recipe: Recipe, cfg: Config, weights: Flat) -> dict[str, Any]:
    """What `step_flops` must know of what a recipe trains; weights: the trained ones."""
    sparse, found = bool(cfg.text.num_experts), Counter()
    for name, x in weights.items():
        found[group_of(name, sparse)] += math.prod(x.shape)
    if not recipe.lora.rank:
        return {"trained": set(found)}
    if sparse and "experts" in found:
        share = cfg.text.num_experts_per_tok / cfg.text.num_experts
        found["experts"] = round(found["experts"] * share)
    return {"trained": (), "adapters": dict(found)}
