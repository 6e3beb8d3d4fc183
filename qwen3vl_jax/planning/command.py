"""`train.py --plan`: compiles a recipe's step for a machine that is not here, and tells of it."""

import dataclasses
import math
import sys
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
from rich.console import Console

from qwen3vl_jax.checkpoint.auto_mesh import ROOM, auto_mesh
from qwen3vl_jax.checkpoint.lazy_tensor import device_bytes
from qwen3vl_jax.config import Config
from qwen3vl_jax.device_mesh import make_mesh
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.planning import compiling, program, report, search
from qwen3vl_jax.planning.machines import Machine
from qwen3vl_jax.planning.program import Program, Serving
from qwen3vl_jax.planning.report import Plan
from qwen3vl_jax.planning.topology import devices_of, first_devices
from qwen3vl_jax.training.mesh_preset import asks_for_mesh, mesh_flags
from qwen3vl_jax.training.recipe import Recipe, check_vision_length
from qwen3vl_jax.training.reporting.memory_estimate import with_remat

# A third of the time of a whole compile; the peak is within some percent of that.
LEVEL = "O1"


def plan_training(recipe: Recipe, machine: Machine, save: Path | None, tries: int) -> Plan:
    """Prints the plan of a run. tries: compiles spent on the largest batch, 0 leaves it out.

    Raises InputError for what cannot be compiled; a program without room is a verdict.
    """
    console, cfg = _console(), program.config_of(recipe.ckpt)
    # Once: more rows are tried with the same mesh and policy.
    recipe = fitted(recipe, cfg, machine)
    made = program_of(recipe, cfg, machine)
    done = watched(console, made, f"compiling {recipe.ckpt} for {machine}")
    plan = report.plan_of(machine, made, done)
    found = _largest(recipe, cfg, plan, tries, console) if tries else ""
    console.print(report.table(plan, f"{recipe.ckpt}: one step", found))
    saved(plan, save, console)
    return plan


def search_training(
    recipe: Recipe, machine: Machine, tries: int, console: Console | None = None
) -> list[tuple[search.Candidate, Plan]]:
    """Compiles `tries` of the likeliest meshes and remat policies, and prints them, the fastest first."""
    console, cfg = console or _console(), program.config_of(recipe.ckpt)
    # No mesh would do.
    check_vision_length(recipe.pack, cfg)
    found, plans, spent = search.candidates(recipe, cfg, machine), [], 0
    if asks_for_mesh(recipe):
        first = f"{mesh_flags(recipe.mesh)}, first that one if {machine} has it"
        print(f"--search: meshes in place of {first}", file=sys.stderr)
    for each in found:
        if spent == tries:
            break
        note = f"{spent + 1} of {min(tries, len(found))}: {each}"
        try:
            made = program_of(each.recipe, cfg, machine)
            spent += 1
            plan = report.plan_of(machine, made, watched(console, made, note, LEVEL))
        # Whatever tracing and the compilers raise: there are others.
        except Exception as error:
            print(f"{each}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
            continue
        print(f"{each}: {plan.cause or 'fits'} ({plan.done.seconds:.0f} s)", file=sys.stderr)
        plans.append((each, plan))
    plans.sort(key=lambda pair: pair[1].times_of_search.most)
    note = f"{recipe.ckpt} on {machine}: {len(found)} of the meshes and policies may fit"
    if tries:
        console.print(report.best(plans, f"{note}; compiled at {LEVEL}"))
    else:
        console.print(report.likeliest(found[:10], note, machine.chip.hbm))
    return plans


def plan_serving(
    ckpt: str,
    machine: Machine,
    sizes: Mapping[str, int] | None,
    asked: Serving,
    save: Path | None = None,
    console: Console | None = None,
) -> tuple[Plan, Plan]:
    """Prints the plans of a decode step and of a prefill; save: where the decode step goes.

    sizes: None is what infer.py takes without --mesh: one device where the weights have room there, else
    it spreads them. Raises InputError for what cannot be compiled.
    """
    console, cfg = console or _console(), program.config_of(ckpt)
    if asked.slots > (most := cfg.text.max_position_embeddings):
        raise InputError(f"--max-len is {asked.slots}, expected at most {most}, the model's limit")
    sizes = usual_sizes(cfg, machine, asked) if sizes is None else sizes
    devices = devices_of(machine)
    used = len(devices) if -1 in sizes.values() else math.prod(sizes.values())
    mesh, plans = make_mesh(sizes, first_devices(devices, used)), []
    kinds = {"a decode step": program.decoding, "prompts taken in": program.prefilling}
    for name, make in kinds.items():
        made = make(cfg, mesh, asked)
        done = watched(console, made, f"compiling {name} for {machine}")
        plans.append(report.plan_of(machine, made, done))
        note = f"{ckpt}: {name}, {asked.rows} rows of {asked.slots:,} tokens"
        note += f", {asked.weights} weights" if asked.weights else ""
        console.print(report.table(plans[-1], note))
        if make is program.decoding:
            saved(plans[0], save, console)
    return plans[0], plans[1]


def usual_sizes(cfg: Config, machine: Machine, asked: Serving) -> dict[str, int]:
    """The sizes of the mesh that infer.py takes without --mesh, {} for one device."""
    held = program.held_arrays(cfg, asked.dtype, asked.weights).values()
    size = sum(device_bytes(math.prod(x.shape), jnp.dtype(x.dtype)) for x in held)
    return {} if size <= ROOM * machine.chip.hbm else auto_mesh(cfg.text, machine.devices)


def program_of(recipe: Recipe, cfg: Config, machine: Machine) -> Program:
    """The step of a recipe over its mesh of a machine's devices. Raises InputError."""
    recipe = fitted(recipe, cfg, machine)
    devices = devices_of(machine)[: recipe.mesh.devices]
    return program.training_step(recipe, cfg, make_mesh(vars(recipe.mesh), devices))


def fitted(recipe: Recipe, cfg: Config, machine: Machine) -> Recipe:
    """The recipe with its mesh of a machine's devices, and a policy in place of remat "auto"."""
    mesh = search.mesh_of(recipe, cfg, machine)
    return with_remat(dataclasses.replace(recipe, mesh=mesh), cfg, machine.chip.hbm)


def watched(console: Console, made: Program, what: str, level: str = "") -> compiling.Compiled:
    """`compiled`, with a line about it: while it lasts on a terminal, before it elsewhere."""
    if console.is_terminal:
        with console.status(what):
            return compiling.compiled(made, level)
    print(f"{what} ..", file=sys.stderr)
    return compiling.compiled(made, level)


def saved(plan: Plan, path: Path | None, console: Console) -> None:
    """Writes the compiled program where one was asked for, or says that there is none."""
    if path is not None:
        told = "not written, the program does not fit"
        if plan.done.executable is not None:
            told = f"the compiled program, {compiling.save(plan.done, path) / 2**20:,.0f} MiB"
        console.print(f"{path}: {told}", markup=False)


def _largest(recipe: Recipe, cfg: Config, plan: Plan, tries: int, console: Console) -> str:
    """What is known of the largest pack.rows after some compiles."""
    parts = program.groups_of(recipe, plan.program.mesh.shape)
    held, room = sum(plan.program.held.values()), plan.machine.chip.hbm
    if held > room:
        return "none: what a device holds before the step is more than its memory"

    def peak(tried: Recipe) -> int | None:
        rows = tried.pack.rows
        made = program_of(tried, cfg, plan.machine)
        done = watched(console, made, f"compiling for {rows} rows at {LEVEL}", LEVEL)
        note = done.cause or f"{done.peak / 2**30:.2f} GiB"
        print(f"pack.rows={rows}: {note} ({done.seconds:.0f} s)", file=sys.stderr)
        return done.needed(room)

    known = plan.done.needed(room)
    return largest_text(*search.largest(recipe, parts, known, room, held, peak, tries))


def largest_text(fits: int, fails: int) -> str:
    """What `largest` found, in words."""
    return f"pack.rows={fits} fits, {fails} does not" if fits else f"none, {fails} rows do not fit"


def _console() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else 130)
