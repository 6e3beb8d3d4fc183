"""Parameter names, and the groups of them that train.freeze and train.rates name."""

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    # Of sparse layers; dense MLPs belong to "text".
    "experts": ("layers.mlp.*",),
    "text": ("layers.*", "norm"),
}


class TrainableParams(NamedTuple):
    """A model split into trained and frozen parameters.

    merge(weights, frozen, key=None) gives the parameter tree with stacked layers; key: of dropout.
    """

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
        if any(fnmatch.fnmatchcase(name, p) or name.startswith(f"{p}.") for p in patterns):
            return group
    raise ValueError(name)


def matching(names: Iterable[str], wanted: str, sparse: bool) -> list[str]:
    """The names in a group, or that match a pattern (layers.attn.*) or a prefix (layers.attn)."""
    if wanted in GROUPS:
        return [name for name in names if group_of(name, sparse) == wanted]
    return [n for n in names if fnmatch.fnmatchcase(n, wanted) or n.startswith(f"{wanted}.")]


def matches(names: Iterable[str], wanted: str, key: str, sparse: bool) -> list[str]:
    """`matching`, or InputError, which names the recipe's key, if nothing matches."""
    names = list(names)
    if not (found := matching(names, wanted, sparse)):
        near = difflib.get_close_matches(wanted, [*GROUPS, *names], 3)
        hint = f"did you mean {', '.join(near)}?" if near else f"groups are {', '.join(GROUPS)}"
        tied = "; this model's head is tied: it is embeddings" if wanted == "head" else ""
        raise InputError(f"{key}: {wanted!r} names no parameter of this model{tied}; {hint}")
    return found


def frozen_names(names: Sequence[str], freeze: Iterable[str], sparse: bool) -> set[str]:
    """The names that `train.freeze` freezes. Raises InputError if nothing is left to train."""
    frozen = {n for wanted in freeze for n in matches(names, wanted, "train.freeze", sparse)}
    if len(frozen) == len(names):
        raise InputError("train.freeze: it freezes every parameter, nothing is left to train")
    return frozen


def check_trained(
    rates: Iterable[str], trained: Iterable[str], every: Iterable[str], why: str, sparse: bool
) -> None:
    """Raises InputError for a `train.rates` entry of parameters that are not trained, and why."""
    trained = list(trained)
    for wanted in rates:
        if not matching(trained, wanted, sparse):
            matches(every, wanted, "train.rates", sparse)
            raise InputError(
                f"train.rates: {wanted!r} is not trained: {why}; take it out (train.rates={{}} on a "
                "command line), or name what is trained"
            )


def learning_rates(names: Sequence[str], rates: Mapping[str, float], sparse: bool) -> Flat:
    """{name: learning rate factor} of trained parameters. Later entries of `rates` win."""
    factors = dict.fromkeys(names, 1.0)
    for wanted, factor in rates.items():
        for name in matches(names, wanted, "train.rates", sparse):
            factors[name] = factor
    return factors


def decays(name: str) -> bool:
    """Whether weight decay applies: to all but norms and biases."""
    last = name.rsplit(".", 1)[-1]
    norm = last in ("scale", "norm", "ln1", "ln2", "q_norm", "k_norm")
    return not (norm or last.endswith("bias"))
