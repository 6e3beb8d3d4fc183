"""infer.py --profile: a trace of what follows the load, and the time on the device by part of the model."""

import bisect
import contextlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData, ProfileOptions
from rich.console import Console
from rich.table import Column, Table

from qwen3vl_jax.errors import InputError, one_line
from qwen3vl_jax.planning.hlo import parse

# The scopes of each part, of Flax modules and of jax.named_scope; "rest" is what has none of them.
PARTS = {"vision": "vision|VisionBlock", "merger": "PatchMerger", "attention": "Block/attn"}
PARTS |= {"mlp": "Block/mlp", "head": "head", "sampling": "sampling"}
_KEY = "jax_compilation_cache_include_metadata_in_key"
# Nanoseconds of each op of each program: (its name, which one of that name).
Times = dict[tuple[Any, Any], Counter[str]]


def part_of(scope: str) -> str:
    """The part of a scope as jit(decode_steps)/while/body/Block/attn/dot_general."""
    return next((part for part, s in PARTS.items() if re.search(f"[/(]({s})[/)]", scope)), "rest")


def parts_of(text: str) -> dict[str, str]:
    """The part of each op of a program, given as HLO text.

    An op that the compiler left without a scope has the part of what it reads, else of what reads it.
    """
    parts: dict[str, str] = {}
    for ops in parse(text).computations.values():
        for x in ops:
            scope = re.search('op_name="([^"]*)"', x.rest)
            read = (part for name in x.operands if (part := parts.get(name)) in PARTS)
            parts[x.name] = part_of(scope[1]) if scope else next(read, "")
        for x in reversed(ops):
            if parts[x.name] in PARTS:
                parts |= {name: parts[x.name] for name in x.operands if not parts.get(name)}
    return parts


def op_times(planes: Iterable[Any]) -> Times:
    """The times of the ops of a trace; a loop's are without those of its body."""
    times: Times = defaultdict(Counter)
    for plane in planes:
        lines = {line.name: line.events for line in plane.lines}
        runs = sorted((e.start_ns, e.name) for e in lines.get("XLA Modules", ()))
        for line in plane.lines:
            around: list[tuple[float, Counter[str], str]] = []
            for e in sorted(line.events, key=lambda e: (e.start_ns, -e.duration_ns)):
                stats = dict(e.stats)
                program = stats.get("hlo_module"), stats.get("program_id")
                op = stats.get("hlo_op")
                # On a TPU a line of its own has the programs; else each event names its own.
                if line.name == "XLA Ops" and runs and not op:
                    run = runs[max(bisect.bisect(runs, (e.start_ns, "~")) - 1, 0)][1]
                    program, op = (run.partition("(")[0], run), e.name.lstrip("%").split()[0]
                if op:
                    around = [each for each in around if each[0] > e.start_ns]
                    for _, outer, name in around[-1:]:
                        outer[name] -= e.duration_ns
                    times[program][op] += e.duration_ns
                    around.append((e.start_ns + e.duration_ns, times[program], op))
    return times


def table(times: Times, programs: dict[str, list[dict[str, str]]], mlp: str = "mlp") -> Table | str:
    """The times by part, or a line if no part is named. programs: `parts_of` those of each name."""
    found: Counter[str] = Counter()
    for (name, _), ops in times.items():
        # Of several programs of a name it is the one that has most of the ops.
        parts = max(programs.get(name, [{}]), key=lambda each: len(each.keys() & ops.keys()))
        for op, time in ops.items():
            found[parts.get(op) or "rest"] += time
    if not found.keys() & PARTS.keys():
        return "the profile names no parts"
    columns = (Column(name, justify="right") for name in ("ms", "share"))
    out = Table("part", *columns, title="time on the device", title_justify="left")
    for part in [part for part in (*PARTS, "rest") if part in found]:
        share = f"{found[part] / found.total():.1%}"
        out.add_row(mlp if part == "mlp" else part, f"{found[part] / 1e6:,.1f}", share)
    return out


@contextlib.contextmanager
def profiled(folder: str, mlp: str) -> Iterator[None]:
    """Traces the block; then the first process prints the table on stderr. Raises InputError."""
    options, first, before = ProfileOptions(), jax.process_index() == 0, getattr(jax.config, _KEY)
    options.python_tracer_level = 0
    Path(folder).mkdir(parents=True, exist_ok=True)
    if first:
        jax.profiler.start_trace(folder, profiler_options=options)
    # What the compile cache holds may have the scopes of an older version.
    jax.config.update(_KEY, True)
    try:
        yield
    finally:
        jax.config.update(_KEY, before)
        try:
            if first:
                jax.profiler.stop_trace()
        except (jax.errors.JaxRuntimeError, OSError) as e:
            raise InputError(f"--profile {folder}: not written: {one_line(e)[:200]}") from None
    if first:
        newest = max(Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
        device = "/host:CPU" if jax.default_backend() == "cpu" else r"/device:[GT]PU:\d+"
        planes = ProfileData.from_file(str(newest)).planes
        times = op_times(plane for plane in planes if re.fullmatch(device, plane.name))
        programs: dict[str, list[dict[str, str]]] = {name: [] for name, _ in times}
        ran = jax.devices()[0].client.live_executables()
        for module in (m for x in ran for m in x.hlo_modules() if m.name in programs):
            programs[module.name].append(parts_of(module.to_string()))
        Console(stderr=True).print(table(times, programs, mlp))
