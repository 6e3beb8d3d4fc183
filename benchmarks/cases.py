"""Commands that write, for benchmarks.full_disk and benchmarks.kills: one `Case` for each.

A case is run as a child process: its inputs lie in one folder, what it writes in another.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 600  # seconds that a command may take


@dataclasses.dataclass(frozen=True)
class Case:
    """A command, where it reads and writes, and what it must leave.

    prepare(inputs) makes its inputs, once. command(inputs, disk) gives the arguments of Python.
    result(disk) is what a finished command has left, compared with ==. begun(disk): whether the part
    has begun in which it is killed. kept(disk): a count of what is finished, which never sinks.
    """

    prepare: Callable[[Path], None]
    command: Callable[[Path, Path], list[str]]
    result: Callable[[Path], Any]
    begun: Callable[[Path], bool]
    kept: Callable[[Path], int] = lambda disk: 0


@dataclasses.dataclass(frozen=True)
class Ended:
    """A command's exit code (-9: killed here), its stderr, and how long it worked."""

    code: int
    said: str
    seconds: float  # from when it had begun until the last was kept, or to its end
    kept: int  # the most that `Case.kept` gave while it ran

    def faults(self, code: int) -> list[str]:
        """What is wrong with an end by `code`: for 2, one line that says why."""
        found = [f"exit code {self.code}, expected {code}"] if self.code != code else []
        if "Traceback" in self.said:
            found.append("a traceback")
        if code == 2 and self.said.count("error: ") != 1:
            found.append("not one line that says why")
        return found + [self.said[-2000:]] * bool(found)


def start(case: Case, inputs: Path, disk: Path) -> subprocess.Popen[str]:
    """The command as a child of this process."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    env["JAX_COMPILATION_CACHE_DIR"] = str(inputs / "cache")
    command = [sys.executable, *case.command(inputs, disk)]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def run(
    case: Case,
    inputs: Path,
    disk: Path,
    kill_after: float = LIMIT,
    watch: Callable[[], object] = lambda: None,
) -> Ended:
    """Runs the command to its end, or kills it (-9) so many seconds after it has begun."""
    child = start(case, inputs, disk)
    since, begun, most = time.perf_counter(), 0.0, 0
    finished = 0.0
    try:
        while child.poll() is None:
            now = time.perf_counter()
            begun = begun or (case.begun(disk) and now)
            if (begun and now - begun >= kill_after) or now - since >= LIMIT:
                break
            if (kept := case.kept(disk)) > most:
                most, finished = kept, time.perf_counter()
            watch()
            time.sleep(0.005)
    finally:
        child.kill()
        said = child.communicate()[1]
    seconds = (finished or time.perf_counter()) - begun if begun else 0.0
    return Ended(child.returncode, said, seconds, most)


def size(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def _answered(disk: Path) -> int:
    """Whole lines of answers in a batch's OUT, or before that is there in OUT.partial."""
    for name, answer in (("out.jsonl", b""), ("out.jsonl.partial", b'{"line"')):
        if (path := disk / name).exists():
            # What a full disk tore off is no line: the log takes it back.
            return sum(answer in line for line in path.read_bytes().split(b"\n")[:-1])
    return 0


def _prompts(inputs: Path) -> None:
    """60 prompts; by their long names OUT takes some 15 pages, and OUT.partial as many."""
    lines = (
        {
            "id": f"q{i}" + 800 * ".",
            "messages": [{"role": "user", "content": f"Hi {i}"}],
            "temperature": float(i % 2),
            "max_new_tokens": 20 + i % 7,
        }
        for i in range(60)
    )
    (inputs / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _answer(inputs: Path, disk: Path) -> list[str]:
    files = ["--input", str(inputs / "in.jsonl"), "--output", str(disk / "out.jsonl")]
    return ["infer.py", *files, "--dtype", "float32", "--rows", "4"]


BATCH = Case(
    _prompts,
    _answer,
    lambda disk: {path.name: path.read_bytes() for path in disk.iterdir()},
    lambda disk: _answered(disk) > 0,
    _answered,
)


def _converted(out: Path) -> Any:
    """The files of a directory that convert wrote; those of an Orbax tree have names by chance."""
    from qwen3vl_jax.checkpoint.orbax_io import verify_tree

    if (params := out / "params").is_dir():
        verify_tree(params)
    files = [path for path in out.rglob("*") if path.is_file() and path.parent.name != "d"]
    kept = [p for p in files if params not in p.parents or p.name == "digests.json"]
    return {str(path.relative_to(out)): path.read_bytes() for path in kept}


def _is_being_written(disk: Path) -> bool:
    return (disk / ".out.partial").is_dir() or (disk / "out").is_dir()


DEMO = ROOT / "demo" / "checkpoint"
CONVERT = Case(
    lambda inputs: None,
    lambda inputs, disk: ["-m", "convert", str(DEMO), str(disk / "out")],
    lambda disk: _converted(disk / "out"),
    _is_being_written,
)


def _recipe(inputs: Path) -> None:
    """A run of 8 steps over chats without images, which saves every second one."""
    turns = ({"role": role, "content": f"{role} 7 8 9 " * 9} for role in ("user", "assistant"))
    (inputs / "chats.jsonl").write_text(f"{json.dumps({'messages': list(turns)})}\n" * 40)
    (inputs / "recipe.toml").write_text(
        f"ckpt = {json.dumps(str(DEMO))}\nsteps = 8\nsave_every = 2\n"
        f"data.sources = [{{path = {json.dumps(str(inputs / 'chats.jsonl'))}}}]\n"
        "data.workers = 0\npack.rows = 2\npack.length = 256\n"
        'checkpoints.keep = 2\nmesh.fsdp = 1\nstep.remat = "none"\ntrain.freeze = ["vision"]\n'
    )


def _train(inputs: Path, out: Path) -> list[str]:
    return ["train.py", "--config", str(inputs / "recipe.toml"), "--out", str(out)]


def _last_step(disk: Path) -> int:
    from qwen3vl_jax.training.run_dir import saved_steps

    return max(saved_steps(disk / "run"), default=0)


def _trained(disk: Path) -> Any:
    """The losses of a run, and the digests of its last step."""
    from qwen3vl_jax.training.reporting.metrics_table import read_table
    from qwen3vl_jax.training.run_dir import read_meta

    rows = [(row["step"], row["loss"]) for row in read_table(disk / "run" / "metrics.csv")]
    return rows, read_meta(disk / "run", _last_step(disk))["digests"]


TRAIN = Case(
    _recipe,
    lambda inputs, disk: _train(inputs, disk / "run"),
    _trained,
    lambda disk: _last_step(disk) > 0,
    _last_step,
)


def _run_to_export(inputs: Path) -> None:
    _recipe(inputs)
    subprocess.run([sys.executable, *_train(inputs, inputs / "run")], cwd=ROOT, check=True)


EXPORT = Case(
    _run_to_export,
    lambda inputs, disk: ["-m", "convert", "--to-hf", str(inputs / "run"), str(disk / "out")],
    lambda disk: _converted(disk / "out"),
    _is_being_written,
)

CASES = {"batch": BATCH, "convert": CONVERT, "train": TRAIN, "export": EXPORT}
