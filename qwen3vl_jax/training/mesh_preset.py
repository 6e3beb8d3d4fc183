"""The mesh of a recipe without one, by the model and the number of devices."""

import math
from collections.abc import Mapping

from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.training.recipe import Mesh, Pack, Recipe

# Dense models are sharded over fsdp, MoE models over fsdp x expert. expert is the largest of these sizes
# that is at most fsdp, since tokens go to every device of that axis.
_EXPERT = (8, 4, 2)
# Limit of `sequence`: each part of a row needs the keys and values of all parts.
_SEQUENCE = 4
# Limit of fsdp, then data: the vision tower's 1,152 channels are 9 x 128.
_FSDP = 128


def asks_for_mesh(recipe: Recipe) -> bool:
    """Whether a recipe has a mesh: an axis that is not the default."""
    return recipe.mesh != Mesh()


def sizes_of(recipe: Recipe) -> dict[str, int]:
    """{axis: size} of a recipe's mesh. fsdp may be -1."""
    return {name: n or 1 for name, n in vars(recipe.mesh).items()}


def mesh_flags(mesh: Mesh, before: Mesh | None = None) -> str:
    """The command line form that makes a mesh of another one: mesh.fsdp=4 mesh.expert=2."""
    sizes = {name: (n, getattr(before or Mesh(), name)) for name, n in vars(mesh).items()}
    flags = [f"mesh.{k}={n}" for k, (n, old) in sizes.items() if n != 1 or old not in (0, 1)]
    return " ".join(flags) or "one device"


def preset(cfg: Config, pack: Pack, count: int, slices: int = 1) -> Mesh:
    """A mesh of `count` devices in equal `slices`. Only data spans slices.

    Devices that rows (or groups of rows) do not use go to tensor as far as it divides the heads, then to
    sequence. Raises InputError if devices are left.
    """
    rows = math.gcd(pack.rows, pack.vision_rows, pack.groups)
    # Parts of the rows of a slice.
    parts = math.gcd(max(rows // slices, 1), count // slices)
    tensor = math.gcd(count // (slices * parts), cfg.text.num_attention_heads)
    sequence = count // (slices * parts * tensor)
    if rows % slices or sequence > _SEQUENCE or pack.length % sequence:
        # One row a device always works.
        more = enough(pack, count)
        message = ", ".join(f"pack.{name} is {getattr(pack, name)}" for name in more)
        where = f"{count} devices" + f" in {slices} slices" * (slices > 1)
        advice = f"take {pack_flags(more)}, or fewer devices"
        raise InputError(f"{message}, which no mesh of {where} divides; {advice}")
    experts = cfg.text.num_experts
    fitting = (n for n in _EXPERT if experts and not experts % n and not parts % n)
    expert = next((n for n in fitting if n * n <= parts), 1)
    fsdp = math.gcd(parts // expert, _FSDP)
    data = slices * parts // (expert * fsdp)
    return Mesh(data=data, fsdp=fsdp, expert=expert, tensor=tensor, sequence=sequence)


def enough(pack: Pack, count: int) -> dict[str, int]:
    """{key of pack: value} that gives each of `count` devices the same number of rows."""
    names = ("rows", "vision_rows", "groups")
    return {k: -(-n // count) * count for k in names if (n := getattr(pack, k)) and n % count}


def pack_flags(sizes: Mapping[str, int]) -> str:
    """Keys of pack in command line form."""
    return " ".join(f"pack.{name}={n}" for name, n in sizes.items())
