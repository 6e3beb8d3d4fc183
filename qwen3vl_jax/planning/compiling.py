"""One ahead-of-time compile: what it needed, what XLA refused, and what it warned of."""

import contextlib
import os
import pickle
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.model.attention_gpu import cudnn, gpu_refusal
from qwen3vl_jax.model.sharding import platform
from qwen3vl_jax.planning.program import Program
from qwen3vl_jax.training.environment import memory_gib

_OVER = (  # (what, how much, of how much) in XLA's words
    r"required for (HLO temporaries|[^()]*?) \((\S+)\) exceeds available HBM \((\S+?)\)",
    r"(Used) (\S+) of (\S+) hbm",
)
_HEAD = 128  # size of the heads of every released decoder
_HOPPER = 9.0  # compute capability
_RESHARDED = re.compile(r"Involuntary full rematerialization.*?HLO operation:? %?(.*)")


class Compiled(NamedTuple):
    """What came of a program; executable None where there is no room for it."""

    executable: Any
    cause: str  # XLA's own, "" for none
    resharded: Counter[str]  # arrays that every device gets whole, from one layout to another
    seconds: float
    cpu_seconds: float
    rss: float  # bytes, the most of this process
    kernels: str = ""  # why attention is not by the kernel that a GPU has for it

    @property
    def peak(self) -> int:
        """Bytes of a device's memory at the fullest moment."""
        return self.executable.memory_analysis().peak_memory_in_bytes

    def needed(self, room: int) -> int | None:
        """The peak, or what XLA says of a program that it refuses, over `room`; None where it does not."""
        if not self.cause:
            return self.peak
        if not (found := re.search(r" ([\d.]+)([KMGT]?) of \S+ HBM$", self.cause)):
            return None
        return max(round(float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")), room + 1)


def compiled(program: Program, level: str = "") -> Compiled:
    """Compiles a program. level: XLA's (O0, O1), "" for that of a real run.

    Raises InputError for what XLA refuses for another cause than memory.
    """
    begin, cpu = time.perf_counter(), time.process_time()
    executable, cause, kernels = None, "", ""
    with _settings(level), hopper_attention(), jax.set_mesh(program.mesh), _stderr() as lines:
        try:
            kernels = gpu_refusal("bfloat16", _HEAD) if platform() == "gpu" else ""
            executable = program.fn.lower(*program.args).compile()
        except jax.errors.JaxRuntimeError as error:
            cause = refusal(str(error))
    text = "".join(lines)
    sys.stderr.write(errors(text))
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
    rss = memory_gib(jax.devices("cpu")[0]) * 2**30
    return Compiled(executable, cause, resharded(text), seconds, cpu_seconds, rss, kernels)


def refusal(message: str) -> str:
    """The numbers of XLA's message about memory. Raises InputError for another one."""
    for pattern in _OVER:
        if found := re.search(pattern, message):
            what = "the program" if found[1] == "Used" else found[1]
            return f"{what} {found[2]} of {found[3]} HBM"
    first = " ".join(message.split())[:300]
    if "RESOURCE_EXHAUSTED" in message and "vmem" not in message:
        return first
    raise InputError(f"XLA does not compile the program: {first}")


def resharded(text: str) -> Counter[str]:
    """The operations that XLA warns of, from what it writes to stderr, and how often."""
    found: Counter[str] = Counter()
    for line in _RESHARDED.findall(text):
        named = re.search(r'op_name="([^"]*)"', line)
        shape = re.search(r"= (\w+\[[\d,]*\])", line)
        name = named[1] if named else line.split(" = ")[0][:120]
        found[f"{shape[1]} {name}" if shape else name] += 1
    return found


def errors(text: str) -> str:
    """The lines of XLA's log that are more than warnings."""
    return "".join(line for line in text.splitlines(True) if re.match(r"[EF]\d{4} ", line))


@contextlib.contextmanager
def _settings(level: str) -> Iterator[None]:
    """XLA's level, and no compile cache: a program from it, saved again, does not run."""
    wanted: dict[str, Any] = {"jax_enable_compilation_cache": False}
    wanted |= {"jax_optimization_level": level} if level else {}
    before = {name: getattr(jax.config, name) for name in wanted}
    try:
        _update(wanted)
        yield
    finally:
        _update(before)


def _update(settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    # JAX reads the setting of the cache once, until this.
    compilation_cache.reset_cache()


@contextlib.contextmanager
def hopper_attention() -> Iterator[None]:
    """Makes JAX lower cuDNN's attention for a Hopper GPU; else it asks which GPU this machine has.

    Not for several threads.
    """
    try:
        module = cudnn()
        asked = module.check_compute_capability
    except (ImportError, AttributeError):
        # A JAX that has moved it: the plan has XLA's blocks, and says so.
        yield
        return
    module.check_compute_capability = lambda wanted: float(wanted) <= _HOPPER
    # It keeps its answers, which are another machine's.
    gpu_refusal.cache_clear()
    try:
        yield
    finally:
        module.check_compute_capability = asked
        gpu_refusal.cache_clear()


@contextlib.contextmanager
def _stderr() -> Iterator[list[str]]:
    """Takes what the compiler's own code writes to stderr into the list, at the end; Python's is shown."""
    lines: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    shown = open(kept, "w", closefd=False, buffering=1)  # noqa: SIM115
    with tempfile.TemporaryFile() as file, contextlib.redirect_stderr(shown):
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            shown.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines.append(file.read().decode(errors="replace"))


def save(done: Compiled, path: Path) -> int:
    """Writes a compiled program for `load`; returns its bytes. Raises InputError where jax cannot."""
    try:
        data = pickle.dumps(serialize_executable.serialize(done.executable))
    # It depends on the back end, whose errors have no common class.
    except Exception as error:
        raise InputError(f"--save {path}: this program cannot be saved: {error}") from None
    path.write_bytes(data)
    return len(data)


def load(path: Path) -> Any:
    """The program that `save` wrote, to be called with arrays of its shapes and shardings.

    jax reads it only where it has the devices it was compiled for, as many and of that kind, and the
    same version of jax and of the compiler (libtpu). A file is a pickle: whoever writes it can run
    anything here. Raises InputError where it cannot be read.
    """
    try:
        return serialize_executable.deserialize_and_load(*pickle.loads(path.read_bytes()))
    # As in `save`.
    except Exception as error:
        raise InputError(
            f"{path}: cannot be loaded on {jax.device_count()} x {jax.devices()[0].device_kind}: "
            f"expected a file of --save for these devices and versions, found: {error}"
        ) from None
