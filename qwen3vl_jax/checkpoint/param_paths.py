"""Paths in a parameter tree, and trees (nested dicts and lists) from paths. No jax in here.

A path is ("layers", 3, "attn", "qkv"); as text it is "layers.3.attn.qkv". Where layers are stacked,
the path has no layer index: ("layers", "attn", "qkv").
"""

from collections.abc import Iterable
from typing import Any

TreePath = tuple[str | int, ...]
_STACKS = (("layers",), ("vision", "blocks"))


def path_str(path: TreePath) -> str:
    """A path as text: layers.3.attn.qkv."""
    return ".".join(map(str, path))


def parse_path(text: str) -> TreePath:
    """The path of a text: the inverse of `path_str`."""
    return tuple(int(key) if key.isdecimal() else key for key in text.split("."))


def split_layer_index(path: TreePath) -> tuple[TreePath, int | None]:
    """(stacked path, layer index) of a path; (path, None) for a parameter outside the layers."""
    if (depth := _stack_depth(path)) is None:
        return path, None
    return (*path[:depth], *path[depth + 1 :]), int(path[depth])


def join_layer_index(path: TreePath, layers: int) -> list[TreePath]:
    """The path of each layer of a stacked path; [path] for a parameter outside the layers."""
    if (depth := _stack_depth(path)) is None:
        return [path]
    return [(*path[:depth], i, *path[depth:]) for i in range(layers)]


def _stack_depth(path: TreePath) -> int | None:
    """The position of the layer index in a path, None outside the layers."""
    return next((len(stack) for stack in _STACKS if path[: len(stack)] == stack), None)


def nest(leaves: Iterable[tuple[TreePath, Any]], empty: Iterable[TreePath] = ()) -> Any:
    """The tree of (path, leaf) pairs; `empty` are the paths of its empty lists."""
    tree: dict = {}
    for path, leaf in (*leaves, *((path, []) for path in empty)):
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return _lists(tree)


def _lists(node: Any) -> Any:
    """A tree whose dicts with integer keys are lists."""
    if not isinstance(node, dict):
        return node
    if node and all(isinstance(key, int) for key in node):
        return [_lists(node[i]) for i in range(len(node))]
    return {key: _lists(value) for key, value in node.items()}


def flatten(tree: Any, path: TreePath = ()) -> list[tuple[TreePath, Any]]:
    """(path, leaf) pairs of a tree of dicts, lists and tuples, in its order: the inverse of `nest`."""
    if not isinstance(tree, (dict, list, tuple)):
        return [(path, tree)]
    children = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return [found for key, child in children for found in flatten(child, (*path, key))]
