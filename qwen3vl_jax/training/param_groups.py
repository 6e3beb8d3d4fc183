"""Parameter names, and the groups of them that train.freeze and train.rates name."""

import difflib
import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model.structs import Params

Flat = dict[str, Any]  # {"layers.attn.qkv": array}, in the order of jax's flattening
MergeParams = Callable[..., Params]  # (weights, frozen, key=None) -> parameters with stacked layers

# A name belongs to the first group that matches.
GROUPS: dict[str, tuple[str, ...]] = {
    "merger": ("vision.merger.*", "vision.deepstack.*"),
    "vision": ("vision.*",),
    "embeddings": ("embed",),
    "head": ("head",),
    "router": ("layers.*router",),
    "experts": ("layers.mlp.*",),  # of sparse layers; dense MLPs belong to "text"
    "text": ("layers.*", "norm"),
}


class TrainableParams(NamedTuple):
    """A model split into trained and frozen parameters. The key of `merge` is that of dropout."""

    weights: Flat
    frozen: Flat
    merge: MergeParams


def flatten(params: Any) -> tuple[Flat, Callable[[Mapping[str, Any]], Any]]:
    """A tree of stacked layers as {name: leaf}, and the function that makes the tree of such a dict."""
    found, treedef = jax.tree.flatten_with_path(params)
    flat = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in found}
    names = list(flat)
    return flat, lambda leaves: jax.tree.unflatten(treedef, [leaves[name] for name in names])


def group_of(name: str, sparse: bool) -> str:
    """The group of a parameter. sparse: the decoder's MLPs are experts."""
    for group, patterns in GROUPS.items():
        if group in ("experts", "router") and not sparse:
            continue
        if any(_named(name, pattern) for pattern in patterns):
            return group
    raise ValueError(name)


def _named(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def matching(names: Iterable[str], wanted: str, sparse: bool) -> list[str]:
    """The names in a group, or that match a pattern (layers.attn.*) or a prefix (layers.attn)."""
    group = wanted in GROUPS
    return [n for n in names if (group_of(n, sparse) == wanted if group else _named(n, wanted))]


def matches(names: Collection[str], wanted: str, key: str, sparse: bool) -> list[str]:
    """`matching`, or InputError, which names the recipe's key, if nothing matches."""
    if not (found := matching(names, wanted, sparse)):
        near = difflib.get_close_matches(wanted, [*GROUPS, *names], 3)
        hint = f"did you mean {', '.join(near)}?" if near else f"groups are {', '.join(GROUPS)}"
        tied = "; this model's head is tied: it is embeddings" if wanted == "head" else ""
        raise InputError(f"{key}: {wanted!r} names no parameter of this model{tied}; {hint}")
    return found


def frozen_names(names: Collection[str], freeze: Iterable[str], sparse: bool) -> set[str]:
    """The names that `train.freeze` freezes. Raises InputError if nothing is left to train."""
    frozen = {n for wanted in freeze for n in matches(names, wanted, "train.freeze", sparse)}
    if len(frozen) == len(names):
        raise InputError("train.freeze: it freezes every parameter, nothing is left to train")
    return frozen


def learning_rates(
    names: Iterable[str],
    rates: Mapping[str, float],
    sparse: bool,
    every: Collection[str] = (),
    why: str = "",
) -> Flat:
    """{name: learning rate factor} of trained parameters. Later entries of `rates` win.

    Raises InputError for rates of no parameter, and for those of the others of `every`: why they are
    not trained.
    """
    factors = dict.fromkeys(names, 1.0)
    for wanted, factor in rates.items():
        if not (found := matching(factors, wanted, sparse)):
            matches(every or factors, wanted, "train.rates", sparse)
            advice = "take it out (train.rates={} on a command line), or name what is trained"
            raise InputError(f"train.rates: {wanted!r} is not trained: {why}; {advice}")
        factors |= dict.fromkeys(found, factor)
    return factors


def decays(name: str) -> bool:
    """Whether weight decay applies: to all but norms and biases."""
    norms = ("scale", "norm", "ln1", "ln2", "q_norm", "k_norm")
    return not name.endswith("bias") and name.rsplit(".", 1)[-1] not in norms
