"""A tensor that is not read yet, and trees (nested dicts and lists) of them. No jax in here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

TreePath = tuple[str | int, ...]  # a place in a parameter tree: ("layers", 3, "attn", "qkv")
Index = tuple[slice, ...]  # a part of an array: one slice without a step for each axis
VALUES, SCALE = "values", "scale"  # what stands at a place whose weight is held in 8 bits


@dataclasses.dataclass(frozen=True, eq=False)
class LazyTensor:
    """Shape and dtype now, values when `load()` is called: then, and only then, memory is used."""

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]
    read: Callable[[Sequence[Index]], list[np.ndarray]] | None = None  # see `parts`

    def parts(self, where: Sequence[Index]) -> list[np.ndarray]:
        """Copies of some parts of the values; what else is read is not held, where that can be."""
        if self.read is not None:
            return self.read(where)
        values = self.load()
        return [np.array(values[index]) for index in where]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


def nest(leaves: Iterable[tuple[TreePath, Any]], empty: Iterable[TreePath] = ()) -> Any:
    """A tree of dicts and lists from (path, leaf); `empty` are the paths of lists with nothing in."""
    tree: dict = {}
    for path, leaf in leaves:
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    for path in empty:
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = []
    return _lists(tree)


def _lists(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    if node and all(isinstance(key, int) for key in node):
        return [_lists(node[i]) for i in range(len(node))]
    return {key: _lists(value) for key, value in node.items()}


def flatten(tree: Any, path: TreePath = ()) -> list[tuple[TreePath, Any]]:
    """(path, leaf) of a tree of dicts, lists and tuples, in its order; the inverse of `nest`."""
    if isinstance(tree, dict):
        children: Iterable[tuple[str | int, Any]] = tree.items()
    elif isinstance(tree, (list, tuple)):
        children = enumerate(tree)
    else:
        return [(path, tree)]
    return [found for key, child in children for found in flatten(child, (*path, key))]


def eight_bit(paths: Iterable[TreePath]) -> set[TreePath]:
    """Those of the paths that are the values or the scale of a weight held in 8 bits."""
    places = {path[:-1] for path in paths if path[-1] == VALUES}
    return {(*place, key) for place in places for key in (VALUES, SCALE)}


def subtree(leaves: Mapping[TreePath, LazyTensor], path: TreePath) -> Any:
    """What stands at a path, loaded: an array, a tree of arrays, or None."""
    if path in leaves:
        return leaves[path].load()
    depth = len(path)
    found = [(p[depth:], leaf.load()) for p, leaf in leaves.items() if p[:depth] == path]
    return nest(found) if found else None


def at_path(tree: Any, path: TreePath) -> Any:
    """What stands at a path of a tree, or None."""
    for key in path:
        if isinstance(tree, dict) and key not in tree:
            return None
        tree = tree[key]
    return tree


def spell(path: TreePath) -> str:
    """A path as a person writes it: layers.3.attn.qkv."""
    return ".".join(map(str, path))
