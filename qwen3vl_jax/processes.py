"""Several processes as one program: their start, what they agree on, and their common end."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from qwen3vl_jax.errors import InputError

_T = TypeVar("_T")
HEARTBEAT = 30  # seconds without a sign of life after which a process counts as gone
SHUTDOWN = (
    300  # seconds that the others wait for process 0, which still draws and writes at the end
)
LOST = 4  # exit code of a process whose peers are gone
# Variables by which jax.distributed finds the others itself: SLURM, Open MPI and PMI, GKE and TPU VMs.
_KNOWN = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MEGASCALE_NUM_SLICES")
_HOSTS = "TPU_WORKER_HOSTNAMES"


class Asked(NamedTuple):
    """What the command line says of the processes; empty: the environment's variables."""

    coordinator: str = ""  # HOST:PORT of process 0
    count: int = 0
    index: int = -1


def add_arguments(parser: Any) -> None:
    """The options of a program of several processes."""
    group = parser.add_argument_group(
        "several processes (found by themselves under SLURM, MPI, GKE)"
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        help="jax finds the others (hosts of a Cloud TPU slice)",
    )
    group.add_argument("--coordinator", default="", help="HOST:PORT of process 0")
    group.add_argument("--processes", type=int, default=0, help="how many there are")
    group.add_argument("--process", type=int, default=-1, help="which of them this is, from 0")


def asked_of(args: Any, environ: Mapping[str, str] = os.environ) -> Asked | None:
    """Who the processes are, or None for one alone. Raises InputError for half an answer.

    Options first, then JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, then what
    jax.distributed knows of the cluster.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    coordinator = args.coordinator or environ.get(names[0], "")
    count = args.processes or _number(names[1], environ, 0)
    index = args.process if args.process >= 0 else _number(names[2], environ, -1)
    if coordinator or count or index >= 0:
        if not (coordinator and 0 <= index < count):
            raise InputError(
                f"several processes: coordinator {coordinator!r}, processes {count}, process {index}; "
                "expected --coordinator HOST:PORT --processes N --process I, or the variables "
                + ", ".join(names)
            )
        return Asked(coordinator, count, index)
    many = any(environ.get(name, "1") not in ("", "1") for name in _KNOWN)
    many = many or args.distributed
    return Asked() if many or "," in environ.get(_HOSTS, "") else None


def _number(name: str, environ: Mapping[str, str], default: int) -> int:
    """A variable that holds a number from 0. Raises InputError for another one."""
    text = environ.get(name, "")
    if text and not text.isdecimal():
        raise InputError(f"{name} is {text!r}, expected a number from 0")
    return int(text) if text else default


def start(asked: Asked | None) -> tuple[int, int]:
    """Joins the others; (this process's index, how many there are). Nothing to do for one alone.

    Call it before jax meets a device. A process that is gone ends the others within two minutes.
    """
    if asked is None:
        return 0, 1
    import jax

    if (os.environ.get("JAX_PLATFORMS") or "").startswith("cpu"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    known: dict[str, Any] = {}
    if asked.coordinator:
        known = dict(
            zip(("coordinator_address", "num_processes", "process_id"), asked, strict=True)
        )
    try:
        jax.distributed.initialize(
            **known, heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=SHUTDOWN
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(f"several processes: {' '.join(str(error).split())[:300]}") from error
    return jax.process_index(), jax.process_count()


def end_together(run: Callable[[], _T], kept: str = "the last checkpoint") -> _T:
    """run(), whose failure because of another process that is gone ends this one with one line.

    kept: what the next start goes on from. It ends at once, for the usual way out waits for the others.
    """
    import jax

    try:
        return run()
    except Exception as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, InputError):
            told = f"error: {' '.join(str(error).split())}"
        elif isinstance(error, jax.errors.JaxRuntimeError):
            reason = " ".join(str(error).split())[:200]
            told = (
                f"error: process {jax.process_index()}: another process of this run is gone ({reason}); "
                f"start all of them again: they go on from {kept}"
            )
        else:
            raise
        print(told, file=sys.stderr, flush=True)
        os._exit(2 if isinstance(error, InputError) else LOST)


def is_first() -> bool:
    """Whether this process writes what one of them writes."""
    import jax

    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when every process has come here."""
    import jax

    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def from_first(value: Any) -> Any:
    """JSON data of process 0, given to all."""
    return all_of(value)[0]


def all_of(value: Any) -> list[Any]:
    """JSON data of every process, by its index, given to all."""
    import jax
    import numpy as np

    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = data
    found = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(found, sizes, strict=True)]
