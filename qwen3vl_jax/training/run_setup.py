"""What a run settles before its first step: mesh, groups of rows, recipe against the saved one, signals.

The saved arrays are read by checkpoints.py, the position in the data by data/loader.py.
"""

import dataclasses
import itertools
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import tomli_w
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from qwen3vl_jax.checkpoint.auto_mesh import bytes_limit
from qwen3vl_jax.checkpoint.digests import DamagedError
from qwen3vl_jax.config import Config
from qwen3vl_jax.device_mesh import make_mesh, slice_count
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model.sharding import max_parts
from qwen3vl_jax.runtime import cloud_host, distributed
from qwen3vl_jax.runtime.console import signals_in_thread
from qwen3vl_jax.storage import hub, json_text, remote_files
from qwen3vl_jax.storage.paths import absolute, as_path, kind
from qwen3vl_jax.training import environment, run_dir
from qwen3vl_jax.training.mesh_preset import asks_for_mesh, preset, sizes_of
from qwen3vl_jax.training.recipe import Recipe, Source, flat
from qwen3vl_jax.training.reporting import memory_estimate

_SAVING = "stopping: what was done is saved first; Ctrl-C again ends at once"
_ENDED = "interrupted: the same command goes on from the last checkpoint"


def with_mesh(recipe: Recipe, out: Path) -> Recipe:
    """The recipe with a mesh: its own, or the preset of all devices for the groups of the run in out."""
    if asks_for_mesh(recipe):
        return recipe
    cfg, devices, pack = Config.from_hf(hub.resolve(recipe.ckpt)), jax.devices(), recipe.pack
    for step in reversed(run_dir.saved_steps(out)):
        with suppress(DamagedError):
            position = run_dir.read_meta(out, step)["data"]
            pack = dataclasses.replace(pack, groups=len(position.get("groups", [0])))
            break
    mesh = preset(cfg, pack, len(devices), slice_count(devices))
    return dataclasses.replace(recipe, mesh=mesh)


def with_remat(recipe: Recipe, cfg: Config, notes: list[str]) -> Recipe:
    """The recipe with a policy in place of remat "auto", the same in all processes, and a note of it."""
    if recipe.step.remat != "auto":
        return recipe
    room = distributed.from_first(bytes_limit(jax.local_devices()[0]))
    found = memory_estimate.with_remat(recipe, cfg, room)
    why = "" if room else " (this device does not say how much memory it has)"
    notes.append(f"step.remat=auto: {found.step.remat}{why}")
    return found


def mesh_of(recipe: Recipe) -> Mesh | None:
    """The mesh of a run; None: the first device only. Raises InputError if devices are missing."""
    sizes = sizes_of(recipe)
    alone = math.prod(sizes.values()) == 1 and jax.process_count() == 1
    return None if alone else make_mesh(sizes)


def groups_of(recipe: Recipe, mesh: Mesh | None, meta: dict[str, Any]) -> int:
    """The number of groups of rows, each with its own samples. It never changes during a run.

    Raises InputError if the mesh does not split them.
    """
    parts = 1 if mesh is None else max_parts("batch", mesh.shape)
    saved = len(meta["data"].get("groups", [0])) if meta else 0
    groups = saved or recipe.pack.groups or parts
    if groups % parts:
        raise InputError(
            f"the run has {groups} groups of rows, expected a multiple of mesh.data x mesh.fsdp x "
            f"mesh.expert, which are {parts}; take fewer, or begin a run with pack.groups={parts}"
        )
    return groups


def check_fits(recipe: Recipe, meta: dict[str, Any], out: Path, done: int = 0) -> list[str]:
    """One line for each allowed change since the run started. Raises InputError for any other change.

    done: the number of saved steps; a run cannot be shorter.
    """
    if recipe.steps < done:
        expected = f"at least {done}, which {out} has done; choose another --out for a shorter run"
        raise InputError(f"steps: got {recipe.steps}, expected {expected}")
    # A recipe key that did not exist when the run was saved counts as its default.
    then = plain(flat(Recipe("", 1))) | meta["recipe"]
    for name in ("data.sources", "evaluate.sources"):
        then[name] = [plain(Source("")) | given for given in then[name]]
    now, then = (x | {"ckpt": absolute_ckpt(x["ckpt"])} for x in (plain(flat(recipe)), then))
    lines = run_dir.check_recipe(now, then, out)
    machine, now = meta["machine"], environment.describe().items()
    moved = [f"{n} {machine.get(n)} then, {x} now" for n, x in now if x != machine.get(n)]
    if moved:
        lines.append("not bit for bit, the machine differs: " + ", ".join(moved))
    left = recipe.steps > done
    why = f"going on from step {done}" if left else f"no step is left, {run_dir.CONFIG} stays"
    return [f"{why}: {line}" for line in lines]


def write_config(recipe: Recipe, out: Path) -> None:
    """Writes RUN_DIR/config.toml, in the first process."""
    if distributed.is_first():
        written = plain(recipe) | {"ckpt": absolute_ckpt(recipe.ckpt)}
        remote_files.write_atomic(out / run_dir.CONFIG, tomli_w.dumps(written).encode())


def absolute_ckpt(ckpt: str) -> str:
    """A model folder's absolute path. A Hub id stays as it is."""
    return str(absolute(ckpt)) if kind(as_path(ckpt)) == "folder" else ckpt


def plain(value: Any) -> Any:
    """A recipe's values as JSON and TOML types."""
    text = json_text.write_json(value, "recipe", default=dataclasses.asdict)
    return json_text.read_json(text, "recipe")


class Stopped(Exception):
    """A signal has ended an evaluation."""


class Stop:
    """Whether the run is to save and end."""

    asked = ""  # "", "SIGTERM" or "Ctrl-C"
    # Before the first step there is nothing to save, and Ctrl-C ends the program as usual.
    under_way = False

    def asked_at(self, step: int) -> bool:
        """Whether the run ends before the next step. All processes agree on the step."""
        self.under_way = True
        if jax.process_count() > 1 and not self.asked:
            self.asked = "SIGTERM" * multihost_utils.reached_preemption_sync_point(step)
        return bool(self.asked)

    def check(self) -> None:
        """Raises Stopped if a signal came."""
        if self.asked:
            raise Stopped


@contextmanager
def catch_signals() -> Iterator[Stop]:
    """Turns SIGTERM, and Ctrl-C once steps are under way, into a flag that the loop reads.

    A second Ctrl-C ends the process at once, also while it compiles. Raises KeyboardInterrupt at the end
    if Ctrl-C stopped the run. With several processes Ctrl-C becomes a SIGTERM, which all of them get.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may set a handler.
        yield stop
        return
    several, heard = jax.process_count() > 1, itertools.count(1)

    def ask(number: int, _: Any) -> None:
        if number == signal.SIGINT and not stop.under_way:
            raise KeyboardInterrupt
        if several:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            stop.asked = stop.asked or ("Ctrl-C" if number == signal.SIGINT else "SIGTERM")

    def hear(number: int) -> None:
        # In a thread: the main thread handles signals only between calls into jax.
        if number == signal.SIGINT and next(heard) > 1:
            # Shows it again.
            cursor = "\x1b[?25h" * sys.stderr.isatty()
            print(f"\n{cursor}{_ENDED}", file=sys.stderr, flush=True)
            os._exit(130)
        if number == signal.SIGINT and stop.under_way:
            print(f"\n{_SAVING}", file=sys.stderr, flush=True)

    def taken_away(notice: str) -> None:
        print(f"{notice}: saving, as after SIGTERM", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    with signals_in_thread(hear), ExitStack() as closing:
        # jax.distributed handles SIGTERM itself.
        for number in [signal.SIGINT] if several else [signal.SIGINT, signal.SIGTERM]:
            closing.callback(signal.signal, number, signal.signal(number, ask))
        closing.enter_context(cloud_host.watched(taken_away))
        yield stop
    if stop.asked == "Ctrl-C":
        raise KeyboardInterrupt
