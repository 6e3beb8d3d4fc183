"""The table of parameters: the path in the tree, the Hugging Face tensors, and the axes of both.

Axes are letters; letters in brackets are one axis in the file. "D (N H)" is [D, N*H] in the file and
[D, N, H] in the tree: a reshape, which is a view, both ways. A parameter may hold several tensors.

Text: V vocabulary, D hidden, N query heads, K key/value heads, G = N / K, H head, F feed-forward,
E experts, M expert width. Vision: L positions, W hidden, A heads, B head, U feed-forward, C channels,
T frames, P patch side, X = merge^2 * W, O merger output.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qwen3vl_jax.checkpoint.lazy_tensor import Index
from qwen3vl_jax.checkpoint.param_paths import TreePath, nest, parse_path
from qwen3vl_jax.config import Config

TEXT, VISION, HEAD = "model.language_model.", "model.visual.", "lm_head."
TAP = VISION + "deepstack_merger_list.{i}."

Block = tuple[int, int]  # the values that one FP8 scale covers along the file's last two axes
EACH: Block = (1, 1)

# Of a merger; ? is the width of its norm.
_MERGER = """
    norm.scale  norm.weight        ?
    norm.bias   norm.bias          ?
    fc1         linear_fc1.weight  X X
    fc1_bias    linear_fc1.bias    X
    fc2         linear_fc2.weight  O X
    fc2_bias    linear_fc2.bias    O
"""
# (section, start of its paths in the tree, start of its names in the file): a line for each tensor has the
# rest of both, and the axes. Tensors of one path are joined along the axis that is 1 in the last of them.
_TABLE = {
    ("top", "", TEXT): """
        embed  embed_tokens.weight  V D
        norm   norm.weight          D
    """,
    ("head", "", HEAD): "head weight V D",
    ("layer", "layers.{i}.", TEXT + "layers.{i}."): """
        ln1          input_layernorm.weight           D
        ln2          post_attention_layernorm.weight  D
        attn.qkv     self_attn.q_proj.weight          (K G H) D
        attn.qkv     self_attn.k_proj.weight          (K 1 H) D
        attn.qkv     self_attn.v_proj.weight          (K 1 H) D
        attn.o       self_attn.o_proj.weight          D (N H)
        attn.q_norm  self_attn.q_norm.weight          H
        attn.k_norm  self_attn.k_norm.weight          H
    """,
    ("bias", "layers.{i}.attn.", TEXT + "layers.{i}.self_attn."): """
        qkv_bias  q_proj.bias  (K G H)
        qkv_bias  k_proj.bias  (K 1 H)
        qkv_bias  v_proj.bias  (K 1 H)
        o_bias    o_proj.bias  D
    """,
    ("dense", "layers.{i}.mlp.", TEXT + "layers.{i}.mlp."): """
        gate_up  gate_proj.weight  (1 F) D
        gate_up  up_proj.weight    (1 F) D
        down     down_proj.weight  D F
    """,
    ("moe", "layers.{i}.mlp.", TEXT + "layers.{i}.mlp."): """
        router   gate.weight           E D
        gate_up  experts.gate_up_proj  E D 2M
        down     experts.down_proj     E M D
    """,
    ("top", "vision.", VISION): """
        patch.weight  patch_embed.proj.weight  W C T P P
        patch.bias    patch_embed.proj.bias    W
        pos           pos_embed.weight         L W
    """,
    ("block", "vision.blocks.{i}.", VISION + "blocks.{i}."): """
        ln1.scale      norm1.weight           W
        ln1.bias       norm1.bias             W
        ln2.scale      norm2.weight           W
        ln2.bias       norm2.bias             W
        attn.qkv       attn.qkv.weight        (3 A B) W
        attn.qkv_bias  attn.qkv.bias          (3 A B)
        attn.o         attn.proj.weight       W (A B)
        attn.o_bias    attn.proj.bias         W
        mlp.fc1        mlp.linear_fc1.weight  U W
        mlp.fc1_bias   mlp.linear_fc1.bias    U
        mlp.fc2        mlp.linear_fc2.weight  W U
        mlp.fc2_bias   mlp.linear_fc2.bias    W
    """,
    ("top", "vision.merger.", VISION + "merger."): _MERGER.replace("?", "W"),
    ("tap", "vision.deepstack.{i}.", TAP): _MERGER.replace("?", "X"),
}


@dataclasses.dataclass(frozen=True)
class HFTensor:
    """One Hugging Face tensor: its name and, for each axis in the file, the tree's axes in it.

    Its FP8 scales for blocks [A, B] have the same axes, shorter; values are scales of blocks [1, 1].
    """

    name: str
    axes: tuple[tuple[int, ...], ...]

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape in the file."""
        return tuple(map(math.prod, self.axes))

    def shape(self, block: Block = EACH) -> tuple[int, ...]:
        """The shape in the tree; a scale covers gcd(axis, block): a block across heads becomes several."""
        cut = zip(self.axes, self._covered(block))
        return tuple(n for axis, (_, few) in cut for n in (*axis[:-1], axis[-1] // few))

    def to_tree(self, x: np.ndarray, block: Block = EACH) -> np.ndarray:
        """The tree's array from the file's; of values a view."""
        for i, (side, few) in enumerate(self._covered(block)):
            if side != few:
                x = np.take(x, np.arange(0, self.hf_shape[i], few) // side, axis=i)
        return x.reshape(self.shape(block))

    def to_file(self, x: np.ndarray, block: Block = EACH) -> np.ndarray:
        """The file's array from the tree's: the exact inverse of `to_tree`."""
        covered = self._covered(block)
        fine = x.reshape([n // few for n, (_, few) in zip(self.hf_shape, covered)])
        return fine[tuple(slice(None, None, side // few) for side, few in covered)]

    def _covered(self, block: Block) -> list[tuple[int, int]]:
        """(values under a file's scale, values under a tree's scale) for each axis of the file."""
        sides = (1,) * (len(self.axes) - 2) + block
        return [(side, math.gcd(axis[-1], side)) for axis, side in zip(self.axes, sides)]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One array of the parameter tree and the Hugging Face tensors in it, side by side along `axis`."""

    path: TreePath
    parts: tuple[HFTensor, ...]
    axis: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self.scale_shape(EACH)

    def scale_shape(self, block: Block) -> tuple[int, ...]:
        """The shape of the array's FP8 scales."""
        sizes = zip(*(part.shape(block) for part in self.parts))
        return tuple(sum(n) if i == self.axis else n[0] for i, n in enumerate(sizes))

    @property
    def summed(self) -> range:
        """The input axes of a matrix: the file has [out, in], or experts [E, in, out]."""
        before, inner, *_ = self.parts[0].axes
        return range(len(before), len(before) + len(inner))

    @property
    def channels(self) -> tuple[int, ...]:
        """The shape of one scale per output channel: 1 along the input axes."""
        return tuple(1 if i in self.summed else n for i, n in enumerate(self.shape))

    def assemble(self, tensors: list[np.ndarray], block: Block = EACH) -> np.ndarray:
        """The tree's array, or its scales, from the file's tensors: a view of one, a copy of several."""
        parts = [part.to_tree(x, block) for x, part in zip(tensors, self.parts)]
        return parts[0] if self.axis is None else np.concatenate(parts, self.axis)

    def cut(self, tensors: list[np.ndarray], where: Sequence[Index]) -> list[np.ndarray]:
        """Copies of `assemble(tensors)[index]`; all is copied only if an index cuts the parts' axis."""
        out, axis = [], self.axis
        for index in where:
            if axis is None or index[axis].indices(n := self.shape[axis]) != (0, n, 1):
                out.append(np.array(self.assemble(tensors)[index]))
            else:
                parts = [part.to_tree(x)[index] for x, part in zip(tensors, self.parts)]
                out.append(np.concatenate(parts, axis))
        return out

    def split(self, x: np.ndarray, block: Block = EACH) -> Iterator[tuple[str, np.ndarray]]:
        """(name, tensor) pairs of the file: the exact inverse of `assemble`."""
        pieces = [x]
        if self.axis is not None:
            ends = np.cumsum([part.shape()[self.axis] for part in self.parts])
            pieces = np.split(x, ends[:-1], self.axis)
        for part, piece in zip(self.parts, pieces):
            yield part.name, part.to_file(piece, block)


def _sizes(cfg: Config) -> dict[str, int]:
    t, v = cfg.text, cfg.vision
    queries, keys, wide = t.num_attention_heads, t.num_key_value_heads, t.moe_intermediate_size
    text = {"V": t.vocab_size, "D": t.hidden_size, "F": t.intermediate_size}
    heads = {"N": queries, "K": keys, "G": queries // keys, "H": t.head_dim}
    experts = {"E": t.num_experts, "M": wide, "2M": 2 * wide}
    patches = {"L": v.num_position_embeddings, **dict(zip("CTP", v.patch_shape))}
    vision = {"W": v.hidden_size, "A": v.num_heads, "B": v.head_dim, "U": v.intermediate_size}
    merger = {"X": v.merge_unit * v.hidden_size, "O": v.out_hidden_size}
    return {"1": 1, "3": 3, **text, **heads, **experts, **patches, **vision, **merger}


def param_specs(cfg: Config) -> list[ParamSpec]:
    """Every array of a config's parameter tree."""
    sizes, layers, is_moe = _sizes(cfg), cfg.text.num_hidden_layers, cfg.text.num_experts > 0
    # How often each section of the table occurs.
    counts = {"top": 1, "head": int(not cfg.tie_word_embeddings), "layer": layers}
    counts |= {"bias": layers * cfg.text.attention_bias}
    counts |= {"dense": layers * (not is_moe), "moe": layers * is_moe}
    counts |= {"block": cfg.vision.depth, "tap": len(cfg.vision.deepstack_visual_indexes)}

    def axes(spec: str) -> tuple[tuple[int, ...], ...]:
        groups = re.findall(r"\(.*?\)|\S+", spec)
        return tuple(tuple(sizes[x] for x in group.strip("()").split()) for group in groups)

    found = []
    for (section, path, name), text in _TABLE.items():
        lines = (line.split(maxsplit=2) for line in text.strip().splitlines())
        for leaf, tensors in itertools.groupby(lines, lambda line: line[0]):
            named = [(name + rest, spec) for _, rest, spec in tensors]
            letters = re.findall(r"\w+", named[-1][1])
            axis = letters.index("1") if "1" in letters else None
            for i in range(counts[section]):
                parts = tuple(HFTensor(tensor.format(i=i), axes(spec)) for tensor, spec in named)
                found.append(ParamSpec(parse_path((path + leaf).format(i=i)), parts, axis))
    return found


def tree_of(cfg: Config, leaves: Mapping[TreePath, Any]) -> Any:
    """The parameter tree of a config from its leaves by path; no DeepStack gives an empty list."""
    taps = cfg.vision.deepstack_visual_indexes
    return nest(leaves.items(), empty=() if taps else [("vision", "deepstack")])


def released_name(name: str) -> str | None:
    """The released name of a re-exported tensor; None for a rotary table's buffer."""
    if name.endswith("inv_freq"):
        return None
    bare = re.sub(r"^(?:(?:module|model)\.)+", "", name)
    if bare.startswith("visual."):
        return "model." + bare
    bare = re.sub(r"^language_model\.(?:model\.)?", "", bare)
    return bare if bare.startswith(HEAD) else TEXT + bare
