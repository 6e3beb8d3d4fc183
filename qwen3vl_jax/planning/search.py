"""Meshes and remat policies worth compiling for a recipe on a machine, the likeliest first."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

from qwen3vl_jax.config import Config
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.planning.chips import Machine
from qwen3vl_jax.planning.program import check_batch, work_of
from qwen3vl_jax.training import estimate
from qwen3vl_jax.training.preset import preset, spelled
from qwen3vl_jax.training.recipe import Mesh, Recipe

REMATS = ("dots", "full")  # "none" needs several times the memory; "offload" the host's
_SLACK = 1.25  # how far the estimate of memory may be off before it rules a mesh out
_TENSOR, _SEQUENCE = (1, 2, 4, 8), (1, 2, 4)


class Candidate(NamedTuple):
    """A recipe with another mesh or policy, and what it is thought to need before any compile."""

    recipe: Recipe
    seconds: float
    memory: int  # bytes of a device

    def __str__(self) -> str:
        return f"{spelled(self.recipe.mesh)} step.remat={self.recipe.step.remat}"


def candidates(recipe: Recipe, cfg: Config, machine: Machine) -> list[Candidate]:
    """All that divide and may fit: the preset, what is thought to fit, the rest; in each the fastest
    by the estimate first. Raises InputError for none.

    The recipe's batch is kept as it is: only how devices share the work changes.
    """
    parts, room = estimate.held(recipe, cfg), machine.chip.hbm
    usual = preset(cfg, recipe.pack, machine.devices, machine.slices)
    found = []
    for mesh in _meshes(recipe, cfg, machine):
        for remat in REMATS:
            step = dataclasses.replace(recipe.step, remat=remat)
            tried = dataclasses.replace(recipe, mesh=mesh, step=step)
            memory = sum(estimate.memory(tried, cfg, parts).values())
            if memory <= _SLACK * room:
                found.append(Candidate(tried, _seconds(tried, cfg, parts, machine), memory))
    if not found:
        raise InputError(
            f"--search: no mesh of {machine} divides pack.rows {recipe.pack.rows} and has room; take "
            "more devices, other rows, or step.weights=bfloat16"
        )
    return sorted(
        found, key=lambda c: (c.recipe.mesh != usual, c.memory > room, c.seconds, c.memory)
    )


def _meshes(recipe: Recipe, cfg: Config, machine: Machine) -> Iterator[Mesh]:
    """Every mesh of a machine's devices that a batch can be cut for."""
    count = machine.devices
    experts = [n for n in _divisors(count) if n <= 64] if cfg.text.num_experts else [1]
    for tensor, sequence, expert in itertools.product(_TENSOR, _SEQUENCE, experts):
        inner = tensor * sequence * expert
        if count % inner:
            continue
        for fsdp in _divisors(count // inner):
            data = count // inner // fsdp
            sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "expert": expert,
                     "sequence": sequence}  # fmt: skip
            if data % machine.slices:
                continue
            try:
                check_batch(recipe, cfg, sizes)
            except InputError:
                continue
            yield Mesh(**sizes)


def _divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]


def _seconds(recipe: Recipe, cfg: Config, parts: estimate.Held, machine: Machine) -> float:
    """About how long a step takes: arithmetic, and the exchanges that a mesh is known to need."""
    mesh, chip, t = recipe.mesh, machine.chip, cfg.text
    compute = work_of(recipe, cfg, parts.weights).again / machine.devices / chip.flops
    passes = 3 if recipe.step.remat == "full" else 2  # forward, again, backward
    size = sum(math.prod(x.shape) for x in parts.weights.values())
    gathered = size / (mesh.tensor * mesh.expert) * recipe.step.accumulate
    weights = gathered * (2 * passes + 4) * (mesh.fsdp > 1) + 8 * size / machine.devices
    rows = mesh.data * mesh.fsdp * mesh.expert
    places = recipe.pack.rows * recipe.pack.length * recipe.step.accumulate / rows
    stream = 2 * places * t.hidden_size * t.num_hidden_layers * passes  # bytes, once a pass
    inner = mesh.tensor * mesh.sequence
    shared = stream * (4 * (1 - 1 / mesh.tensor) + 2 * (1 - 1 / mesh.sequence))
    tokens = 2 * stream * (mesh.expert - 1) / inner
    lanes = sum(1 + ring for n, ring in zip(machine.shape, machine.rings, strict=True) if n > 1)
    return compute + (weights + shared + tokens) / (chip.link * max(lanes, 1))
