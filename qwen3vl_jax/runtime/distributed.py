"""Several processes as one program: how they start, exchange small data, and end together."""

import hashlib
import itertools
import json
import os
import re
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar, cast

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.runtime.cloud_host import HOSTS, has_server, slice_hosts
from qwen3vl_jax.runtime.console import EXPECTED, exit_now, report

_T = TypeVar("_T")
# Seconds of silence after which a process counts as gone. A cloud may pause a host to move it.
HEARTBEAT, HEARTBEAT_IN_CLOUD = 30, 100
PATIENCE = 5  # seconds before a process prints that it waits for the others to start
LONGEST = 30 * 24 * 3600 * 1000  # milliseconds at a barrier
GRACE = 10  # seconds for the others to be interrupted too
LOST = 4  # exit code of a process whose peers are gone
# The number of a call of `largest`, the same in all processes.
_ROUNDS = itertools.count()
_NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_EXPECTED = "expected --coordinator HOST:PORT --processes N --process I, or the variables "
_EXPECTED += ", ".join(_NAMES)
# Variables by which jax.distributed finds the others itself: Open MPI and PMI, GKE and TPU VMs, SLURM.
_KNOWN = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MEGASCALE_NUM_SLICES")
# In messages of JAX's collectives and its coordination service about a process that does not answer.
_GONE = re.compile(
    "connect|socket|network|remote process|heartbeat|unhealthy|unreachable|timed out"
    "|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED",
    re.IGNORECASE,
)


class Asked(NamedTuple):
    """The processes that the command line names; empty: jax finds them."""

    coordinator: str = ""  # HOST:PORT of process 0
    count: int = 0
    index: int = -1


def add_arguments(parser: Any) -> tuple[str, ...]:
    """Adds the options of a program of several processes; gives their names."""
    title = "several processes (under SLURM, MPI, GKE and on TPUs they find each other alone)"
    add = parser.add_argument_group(title).add_argument
    found_by_jax = "let jax find the other processes where nothing says that there are any"
    add("--distributed", action="store_true", help=found_by_jax)
    add("--coordinator", default="", metavar="HOST:PORT", help="address of process 0")
    add("--processes", type=int, default=0, metavar="N", help="number of processes")
    add("--process", type=int, default=-1, metavar="I", help="number of this one, from 0")
    return "distributed", "coordinator", "processes", "process"


def asked_of(args: Any, environ: Mapping[str, str] = os.environ) -> Asked | None:
    """The processes, or None for one alone. Raises InputError where something of them is missing.

    Options come first, then the variables of _NAMES, then what jax.distributed knows of the cluster.
    """
    coordinator = args.coordinator or environ.get(_NAMES[0], "")
    count = args.processes or _number(_NAMES[1], environ, 0)
    index = args.process if args.process >= 0 else _number(_NAMES[2], environ, -1)
    if coordinator or count or index >= 0:
        host, _, port = coordinator.rpartition(":")
        is_address = host and port.isdecimal() and 1 <= int(port) <= 65535
        if not (is_address and 0 <= index < count):
            found = f"coordinator {coordinator!r}, processes {count}, process {index}"
            raise InputError(f"several processes: {found}; {_EXPECTED}")
        return Asked(coordinator, count, index)
    # Started by srun, and not in a shell of salloc alone.
    srun = ("SLURM_NTASKS",) if "SLURM_STEP_NODELIST" in environ else ()
    many = any(environ.get(name, "1") not in ("", "1") for name in (*_KNOWN, *srun))
    # The variable counts also where the chips of the slice are not used: somebody has set it.
    many = many or "," in environ.get(HOSTS, "") or slice_hosts(environ) > 1
    return Asked() if many or args.distributed else None


def check_joined() -> None:
    """Raises InputError if jax sees several processes that have not joined, and so cannot save together."""
    import jax

    if (count := jax.process_count()) > 1 and not jax.distributed.is_initialized():
        advice = "which have not joined; give --distributed to all of them"
        raise InputError(f"several processes: jax sees {count}, {advice}")


def _number(name: str, environ: Mapping[str, str], default: int) -> int:
    """A variable that holds a number from 0. Raises InputError for another one."""
    text = environ.get(name, "")
    if text and not text.isdecimal():
        raise InputError(f"{name} is {text!r}, expected a number from 0")
    return int(text) if text else default


def start(asked: Asked | None) -> tuple[int, int]:
    """Joins the other processes before jax finds its devices; (this one's index, how many there are)."""
    if asked is None:
        return 0, 1
    import jax

    if (os.environ.get("JAX_PLATFORMS") or "").startswith("cpu"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    notice, known = "waiting for the other processes", {}
    if asked.coordinator:
        names = ("coordinator_address", "num_processes", "process_id")
        known: dict[str, Any] = dict(zip(names, asked, strict=True))
        notice = f"process {asked.index} of {asked.count}: {notice} at {asked.coordinator}"
    options = {"end": "", "file": sys.stderr}
    waits = threading.Timer(PATIENCE, print, [f"{notice}\n"], options)
    waits.daemon = True
    waits.start()
    silence = HEARTBEAT_IN_CLOUD if has_server() else HEARTBEAT
    limits = dict.fromkeys(("heartbeat_timeout_seconds", "shutdown_timeout_seconds"), silence)
    try:
        jax.distributed.initialize(**known, **limits)
    except (RuntimeError, ValueError) as error:
        reason = textwrap.shorten(str(error), 300, placeholder=" ..")
        hint = "" if asked.coordinator else f"; jax finds no cluster by itself here: {_EXPECTED}"
        raise InputError(f"several processes: {reason}{hint}") from error
    finally:
        waits.cancel()
    # "1", or "1(x4)" on four hosts, where SLURM or Open MPI started one process on each.
    tasks = map(os.environ.get, ("SLURM_STEP_TASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE"))
    has_its_host = re.fullmatch(r"1(\(x\d+\))?", next(filter(None, tasks), ""))
    if has_its_host and not os.environ.get("JAX_LOCAL_DEVICE_IDS"):
        for name in ("jax_cuda_visible_devices", "jax_rocm_visible_devices"):
            # By itself JAX would take one card.
            jax.config.update(name, "all")
    return jax.process_index(), jax.process_count()


def end_together(run: Callable[[], _T], kept: str = "the last checkpoint") -> _T:
    """run(), then a wait for the slowest process, which JAX would else take for lost.

    A failure ends this process at once, with one line if another process is gone, or after an interruption.
    kept: what the next start goes on from.
    """
    try:
        result = run()
        wait_for_all("end")
        return result
    except BaseException as error:
        if is_alone():
            raise
        code = _report(error, kept)
        if not isinstance(error, Exception):
            # JAX aborts those that find process 0 gone.
            with suppress(Exception):
                _barrier("interrupted", 1000 * GRACE)
        exit_now(code)


def is_alone() -> bool:
    """Whether this is the only process; asked before jax is imported, or has met its devices, too."""
    jax: Any = sys.modules.get("jax")
    return jax is None or not jax.distributed.is_initialized() or jax.process_count() == 1


def _report(error: BaseException, kept: str) -> int:
    """Prints why this process ends; gives its exit code."""
    import jax

    # It has printed its reason.
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, EXPECTED):
        return report(error, interrupted=f"interrupted: the same command goes on from {kept}")
    # A collective of its own process fails as a ValueError that begins with the status.
    status = isinstance(error, ValueError) and re.match("[A-Z_]+: ", str(error))
    jaxs = status or isinstance(error, jax.errors.JaxRuntimeError)
    if not (jaxs and _GONE.search(str(error))):
        traceback.print_exception(error)
        return 1
    print(_lost(str(error), kept), file=sys.stderr)
    return LOST


def _lost(words: str, kept: str) -> str:
    import jax

    reason = textwrap.shorten(words, 200, placeholder=" ..")
    return (
        f"error: process {jax.process_index()}: another process of this run is gone ({reason}); "
        f"start all of them again: they go on from {kept}"
    )


def lost_line(words: str) -> str:
    """The line for JAX's abort of this process with these words: "" unless another one is gone."""
    found = re.search(r"(UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|heartbeat|unhealthy)[^\n]*", words)
    return _lost(found[0], "the last checkpoint") if found and "coordination" in words else ""


def is_first() -> bool:
    """Whether this process writes the files that are written once."""
    import jax

    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """A barrier of any length, during which Ctrl-C is heard."""
    if is_alone():
        return
    # It is set in a thread: the main one hears no signals inside a call of JAX.
    met = Future()

    def wait() -> None:
        try:
            met.set_result(_barrier(name, LONGEST))
        except BaseException as error:
            met.set_exception(error)

    threading.Thread(target=wait, daemon=True).start()
    met.result()


def _barrier(name: str, milliseconds: int) -> None:
    from orbax.checkpoint import multihost

    multihost.get_barrier_sync_fn()(key=name, timeout_ms=milliseconds)


def from_first(value: Any) -> Any:
    """Broadcasts JSON data of process 0."""
    return all_of(value)[0]


def all_of(value: Any) -> list[Any]:
    """Gathers JSON data of every process, by its index."""
    if is_alone():
        return [value]
    import numpy as np
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = data
    found = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(found, sizes, strict=True)]


def largest(numbers: Sequence[int]) -> list[int]:
    """The largest of each number over all processes; all call it, in the same order.

    It goes through the coordinator, from host to host: `all_of` would wait for what devices compute.
    """
    if is_alone():
        return list(numbers)
    import jax
    from jax._src.distributed import global_state

    client: Any = global_state.client
    number, me = next(_ROUNDS), jax.process_index()
    client.key_value_set(f"largest/{number}/{me}", json.dumps(list(numbers)))
    keys = (f"largest/{number}/{i}" for i in range(jax.process_count()))
    found = [json.loads(client.blocking_key_value_get(key, LONGEST)) for key in keys]
    # All have sent this round's numbers, so they have read those of the round before.
    client.key_value_delete(f"largest/{number - 1}/{me}")
    return [max(each) for each in zip(*found, strict=True)]


def agreed(make: Callable[[], _T]) -> _T:
    """make(); where it raises an InputError in one process, all raise it."""
    made, refusal = None, ""
    try:
        made = make()
    except InputError as e:
        refusal = str(e)
    if errors := [text for text in all_of(refusal) if text]:
        raise InputError(errors[0])
    return cast(_T, made)


def check_alike(what: str, *seen: bytes) -> None:
    """Raises InputError in every process if one has other bytes than the first."""
    digest = hashlib.blake2b(digest_size=16)
    for part in seen:
        digest.update(part)
    found = all_of(digest.hexdigest())
    for unlike, one in enumerate(found):
        if one != found[0]:
            where = f"in process {unlike} than in process 0"
            raise InputError(f"{what} {where}; give all processes the same")
