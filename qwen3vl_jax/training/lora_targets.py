"""LoRA in a run: which weights lora.targets adapts, the adapter's first values, the frozen base."""

import difflib
import fnmatch
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from qwen3vl_jax.checkpoint.adapter_map import Adapter, LoraTarget, lora_targets
from qwen3vl_jax.checkpoint.adapters import attach
from qwen3vl_jax.checkpoint.peft_io import load_adapter
from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model.structs import Params
from qwen3vl_jax.training import param_groups
from qwen3vl_jax.training.optimizer import named_key
from qwen3vl_jax.training.param_groups import Flat, TrainableParams
from qwen3vl_jax.training.recipe import Recipe, few_bits


def split_lora(recipe: Recipe, cfg: Config, params: Params) -> TrainableParams:
    """LoRA matrices to train (dtype step.weights), over frozen parameters with stacked layers.

    The base has the dtype lora.base. Weights of few bits stay as they were read; the others beside
    them get step.dtype. Raises InputError for targets and adapters that do not fit.
    """
    adapter, weights = first_values(recipe, cfg)
    for wanted in recipe.train.freeze:
        if found := param_groups.matching(weights, wanted, bool(cfg.text.num_experts)):
            both = f"{wanted!r} names {found[0]}, which lora.targets trains"
            raise InputError(f"train.freeze: {both}; drop one of them")
    flat, unflatten = param_groups.flatten(params)
    coded = {name.removesuffix(".values") for name in flat if name.endswith(".values")}
    if bool(coded) != bool(few_bits(recipe)):
        found = "8 bits or fewer" if coded else "16 or 32 bits"
        raise InputError(f"lora.base is {recipe.lora.base}, the parameters are held in {found}")
    still = recipe.step.dtype if coded else recipe.lora.base
    frozen = {n: x if n.rpartition(".")[0] in coded else x.astype(still) for n, x in flat.items()}
    weights = {n: jnp.asarray(x, recipe.step.weights) for n, x in weights.items()}

    def merge(weights: Flat, frozen: Flat, key: jax.Array | None = None) -> Params:
        keys = key if key is None else functools.partial(named_key, named_key(key, "lora"))
        return attach(unflatten(frozen), cfg, weights, adapter, keys)

    return TrainableParams(weights, frozen, merge)


def adapter_of(recipe: Recipe, cfg: Config) -> Adapter:
    """Ranks and alphas of a run's adapter, as `peft_io.save_adapter` takes them.

    Those of lora.adapter, and new ones for the lora.targets that it lacks.
    """
    lora, wanted = recipe.lora, targeted(recipe.lora.targets, cfg)
    new = Adapter.uniform(wanted, lora.rank, lora.alpha or lora.rank, dropout=lora.dropout)
    if not lora.adapter:
        return new
    old = load_adapter(lora.adapter, cfg)[1]
    if outside := [name for name in old.ranks if name not in new.ranks]:
        found = f"adapts {outside[0]}, which lora.targets {list(lora.targets)} does not name"
        raise InputError(f"lora.adapter {lora.adapter}: {found}; add it there")
    found = sorted({rank for ranks in old.ranks.values() for rank in ranks if rank})
    if lora.rank not in found:
        raise InputError(f"lora.rank is {lora.rank}, that of {lora.adapter} is {found[-1]}")
    alphas = sorted({alpha for layers in old.alphas.values() for alpha in layers})
    if lora.alpha and lora.alpha not in alphas:
        raise InputError(f"lora.alpha is {lora.alpha:g}, that of {lora.adapter} is {alphas[-1]:g}")
    fill = lora.alpha or alphas[-1]
    filled = {name: (fill,) * len(layers) for name, layers in new.alphas.items()}
    return Adapter({**new.ranks, **old.ranks}, {**filled, **old.alphas}, lora.dropout, old.rslora)


def first_values(recipe: Recipe, cfg: Config) -> tuple[Adapter, Flat]:
    """(settings, fp32 matrices) before the first step: those of lora.adapter, and new ones.

    A new A is uniform within 1 / sqrt(inputs), as in PEFT, with a key from its name. A new B is 0.
    """
    adapter, known = adapter_of(recipe, cfg), lora_targets(cfg)
    given: Flat = dict(load_adapter(recipe.lora.adapter, cfg)[0]) if recipe.lora.adapter else {}
    key = named_key(jax.random.key(recipe.seed), "lora")
    for name, ranks in adapter.ranks.items():
        if f"{name}.a" in given:
            continue
        (shape_a, shape_b), bound = known[name].shapes(max(ranks)), known[name].inner ** -0.5
        a = jax.random.uniform(named_key(key, name), shape_a, jnp.float32, -bound, bound)
        # A is zero in layers [L ..] of rank 0.
        here = jnp.asarray(ranks if known[name].stacked else ranks[0]) > 0
        here = here.reshape(here.shape + (1,) * (a.ndim - here.ndim))
        given |= {f"{name}.a": jnp.where(here, a, 0), f"{name}.b": jnp.zeros(shape_b, jnp.float32)}
    return adapter, {f"{n}.{s}": given[f"{n}.{s}"] for n in adapter.ranks for s in "ab"}


def targeted(targets: Iterable[str], cfg: Config) -> dict[str, tuple[bool, ...]]:
    """{LoRA target: which of its layers are adapted}, by group names, patterns or PEFT module names.

    Examples: "text", "layers.attn.*", "q_proj", "model.language_model.layers.0.self_attn.q_proj".
    Raises InputError for a name of nothing that LoRA can adapt.
    """
    known, sparse = lora_targets(cfg), bool(cfg.text.num_experts)
    wanted: dict[str, tuple[bool, ...]] = {}
    for target in targets:
        same = "merger" if target == "mergers" else target
        found = {name: _named(module, same, sparse) for name, module in known.items()}
        if not any(map(any, found.values())):
            raise InputError(_unknown(target, known))
        for name, layers in found.items():
            before = wanted.get(name, layers)
            wanted[name] = tuple(a or b for a, b in zip(before, layers, strict=True))
    if not wanted:
        raise InputError("lora.targets is empty, expected groups (text) or modules (q_proj)")
    return {name: layers for name, layers in wanted.items() if any(layers)}


def _named(module: LoraTarget, target: str, sparse: bool) -> tuple[bool, ...]:
    """For each layer, whether a target names the module."""
    if target in param_groups.GROUPS:
        return (param_groups.group_of(module.weight, sparse) == target,) * len(module.modules)
    match = fnmatch.fnmatchcase
    here = match(module.name, target) or match(module.weight, target)
    here = here or module.name.startswith(f"{target}.")
    names = module.targets
    return tuple(here or f".{n}".endswith(f".{target}") or match(n, target) for n in names)


def _unknown(target: str, known: dict[str, LoraTarget]) -> str:
    inside = {param_groups.group_of(module.weight, True) for module in known.values()}
    names = [*param_groups.GROUPS, *known, *(module.part for module in known.values())]
    near = difflib.get_close_matches(target, names, 4)
    near = dict.fromkeys(n for n in near if n in inside or n not in param_groups.GROUPS)
    hint = f"did you mean {', '.join(near)}?" if near else "for example text, vision or q_proj"
    return f"lora.targets: {target!r} names nothing an adapter can sit on in this model; {hint}"
