"""Candidates of --search, meshes and remat policies by estimated time; the largest batch that fits."""

import contextlib
import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from qwen3vl_jax.config import Config
from qwen3vl_jax.device_mesh import mesh_shape
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model.sharding import AXES
from qwen3vl_jax.planning.machines import GPUS_A_HOST, Machine
from qwen3vl_jax.planning.program import check_batch, work_of
from qwen3vl_jax.training import mesh_preset
from qwen3vl_jax.training.mesh_preset import asks_for_mesh, mesh_flags, preset
from qwen3vl_jax.training.recipe import Mesh, Recipe
from qwen3vl_jax.training.reporting import memory_estimate

# Tried beside the recipe's own. "offload" is not: it needs the host's memory.
REMATS = ("none", "dots", "narrow", "full")
# A candidate is left out if its estimated memory is more than this times the device's.
_SLACK = 1.25
# `largest` tries fewer rows than this times those of the recipe.
_LIMIT = 256
# The smallest step between sizes is this part of the rows that fit.
_NEAR = 8


class Candidate(NamedTuple):
    """A recipe with another mesh or policy, and the estimate of its time and memory."""

    recipe: Recipe
    seconds: float
    memory: int  # bytes of a device

    def __str__(self) -> str:
        return f"{mesh_flags(self.recipe.mesh)} step.remat={self.recipe.step.remat}"


def candidates(recipe: Recipe, cfg: Config, machine: Machine) -> list[Candidate]:
    """All that divide and are near the memory: those thought to fit first, of them each mesh once, with
    its fastest policy, before any again; a mesh that the recipe asks for leads, then the fastest by the
    estimate. Raises InputError for none.

    The recipe's batch is kept as it is: only how devices share the work changes.
    """
    parts, room = memory_estimate.held(recipe, cfg), machine.chip.hbm
    meshes, own, found = list(_meshes(machine, cfg)), None, []
    # The recipe's mesh may be of other devices, and rows too few for a preset.
    with contextlib.suppress(InputError):
        own = mesh_of(recipe, cfg, machine)
        meshes.insert(0, own)
    for mesh in dict.fromkeys(meshes):
        try:
            check_batch(recipe, cfg, vars(mesh))
        except InputError:
            continue
        for remat in dict.fromkeys((*{recipe.step.remat} - {"auto"}, *REMATS)):
            step = dataclasses.replace(recipe.step, remat=remat)
            tried = dataclasses.replace(recipe, mesh=mesh, step=step)
            memory = sum(memory_estimate.memory(tried, cfg, parts).values())
            if memory <= _SLACK * room:
                found.append(Candidate(tried, _seconds(tried, cfg, parts, machine), memory))
    if not found:
        raise InputError(
            f"--search: no mesh of {machine} divides pack.rows {recipe.pack.rows} and has room; take "
            "more devices, other rows, or step.weights=bfloat16"
        )
    own = own if asks_for_mesh(recipe) else None
    seen: Counter[tuple[bool, Mesh]] = Counter()
    ranked = []
    for c in sorted(found, key=lambda c: (c.seconds, c.memory)):
        over, mesh = c.memory > room, c.recipe.mesh
        ranked.append((over, seen[over, mesh], mesh != own, c))
        seen[over, mesh] += 1
    return [c for *_, c in sorted(ranked, key=lambda each: each[:3])]


def mesh_of(recipe: Recipe, cfg: Config, machine: Machine) -> Mesh:
    """The mesh that a recipe asks for, else the preset. Raises InputError for one of other devices.

    A smaller one is of the first GPUs of a host, as in a run; of a TPU slice all chips are taken.
    """
    if not asks_for_mesh(recipe):
        return preset(cfg, recipe.pack, machine.devices, machine.slices)
    sizes, count = mesh_preset.sizes_of(recipe), machine.devices
    if machine.chip.platform == "gpu" and count <= GPUS_A_HOST and -1 not in sizes.values():
        count = min(math.prod(sizes.values()), count)
    try:
        return Mesh(**dict(zip(AXES, mesh_shape(sizes, count), strict=True)))
    except InputError as error:
        wrong = f"{error}; " + "a plan is for all of them; " * (machine.chip.platform == "tpu")
    # The keys that make the preset of the recipe's mesh.
    pack, rows = recipe.pack, {}
    try:
        usual = preset(cfg, pack, machine.devices, machine.slices)
    # Too few rows.
    except InputError:
        rows = mesh_preset.enough(pack, machine.devices)
        usual = preset(cfg, dataclasses.replace(pack, **rows), machine.devices, machine.slices)
    flags = [mesh_flags(usual, recipe.mesh), mesh_preset.pack_flags(rows)]
    raise InputError(f"{wrong}for {machine} add {' '.join(filter(None, flags))} to the command")


def _meshes(machine: Machine, cfg: Config) -> Iterator[Mesh]:
    """Every mesh of a machine's devices that splits only `data` over its slices."""
    experts = range(1, 65 if cfg.text.num_experts else 2)
    for tensor, sequence, expert in itertools.product((1, 2, 4, 8), (1, 2, 4), experts):
        rows, rest = divmod(machine.devices, tensor * sequence * expert)
        for fsdp in range(1, rows + 1) if not rest else ():
            if rows % (fsdp * machine.slices) == 0:
                axes = {"tensor": tensor, "expert": expert, "sequence": sequence}
                yield Mesh(data=rows // fsdp, fsdp=fsdp, **axes)


def _seconds(recipe: Recipe, cfg: Config, parts: memory_estimate.Held, machine: Machine) -> float:
    """About how long a step takes: arithmetic, and the exchanges that a mesh is known to need."""
    mesh, chip, t = recipe.mesh, machine.chip, cfg.text
    count = mesh.devices
    compute = work_of(recipe, cfg, parts.weights).again / count / chip.flops
    passes = 3 if recipe.step.remat == "full" else 2  # forward, again, backward
    size = sum(math.prod(x.shape) for x in parts.weights.values())
    gathered = size / (mesh.tensor * mesh.expert) * recipe.step.accumulate
    weights = gathered * (2 * passes + 4) * (mesh.fsdp > 1) + 8 * size * (count > 1) / count
    rows = mesh.data * mesh.fsdp * mesh.expert
    places = recipe.pack.rows * recipe.pack.length * recipe.step.accumulate / rows
    stream = 2 * places * t.hidden_size * t.num_hidden_layers * passes  # bytes, once a pass
    inner = mesh.tensor * mesh.sequence
    shared = stream * (4 * (1 - 1 / mesh.tensor) + 2 * (1 - 1 / mesh.sequence))
    tokens = 2 * stream * (mesh.expert - 1) / inner
    lanes = sum(1 + ring for n, ring in zip(machine.shape, machine.rings, strict=True) if n > 1)
    seconds = compute + (weights + shared + tokens) / (chip.link * max(lanes, 1))
    if recipe.step.remat == "offload" and chip.host:
        # About what "dots" would keep is copied to the host and back.
        steps = (dataclasses.replace(recipe.step, remat=remat) for remat in ("dots", "full"))
        tried = (dataclasses.replace(recipe, step=step) for step in steps)
        kept, again = (sum(memory_estimate.memory(each, cfg, parts).values()) for each in tried)
        seconds += 2 * (kept - again) * recipe.step.accumulate / chip.host
    return seconds


# Gives the bytes that a recipe's step needs on a device; None: it does not fit, by an unknown amount.
Peak = Callable[[Recipe], int | None]


def of_size(recipe: Recipe, parts: int, times: int) -> Recipe:
    """The recipe with `times` rows of tokens for each of `parts`, and patches in proportion."""
    pack = recipe.pack
    rows = parts * times
    seen = -(-pack.vision_rows * rows // (pack.rows * parts)) * parts
    pack = dataclasses.replace(pack, rows=rows, vision_rows=seen)
    return dataclasses.replace(recipe, pack=pack)


def largest(
    recipe: Recipe, parts: int, known: int | None, room: int, held: int, peak: Peak, tries: int = 4
) -> tuple[int, int]:
    """(rows that fit, the fewest rows known not to) after at most `tries` compiles; 0 is none.

    known: bytes of the recipe itself, None as in Peak. room: bytes of a device. held: bytes that it holds
    before the step. Memory grows about evenly with rows, so the next try is where a line through the
    nearest known sizes meets `room`. After two tries that did not halve the interval it is the middle.
    """
    times, need, wide = max(recipe.pack.rows // parts, 1), known, 0
    fits, fails, points = 0, (limit := _LIMIT * times), {0: held}
    for left in range(tries, -1, -1):
        before = fails - fits
        if need is not None:
            points[times] = need
        if need is not None and need <= room:
            fits = times
        else:
            fails = times
        halved = 2 * (fails - fits) <= before or fails == limit
        wide = 0 if halved or wide == 2 or left == tries else wide + 1
        step = max(fits // _NEAR, 1)
        if not left or fails - fits <= step:
            break
        line = _crossing(points, fits, fails, room)
        times = (fits + fails) // 2
        # No nearer to an end than ends the search.
        if wide < 2 and line < fails:
            times = max(min(line, -(-_NEAR * fails // (_NEAR + 1))), fits + step)
        try:
            need = peak(of_size(recipe, parts, times))
        except InputError:
            need = None
    return fits * parts, fails * parts


def _crossing(points: dict[int, int], fits: int, fails: int, room: int) -> int:
    """The size at which a line through two known sizes meets `room`.

    The two are on either side of `room`, or else the nearest. If all fit, a line from 0 rows is drawn too
    and the smaller answer counts: peaks grow unevenly, and two close sizes may point anywhere.
    """
    under, over = sorted(n for n in points if n <= fits), sorted(n for n in points if n >= fails)
    mixed = [(over[0], fits or (*over[1:2], 0)[0])] if over else []
    pairs = mixed or [(fits, n) for n in (0, *under[-2:-1])]
    known = ((a, b, points[a] - points[b]) for a, b in pairs)
    met = (a + (room - points[a]) * (a - b) // rise for a, b, rise in known if rise * (a - b) > 0)
    return min([fails, *met])
