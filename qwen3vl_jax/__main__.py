"""`python -m qwen3vl_jax`: versions, devices, memory and attention back ends, for a bug report.

`python -m qwen3vl_jax 8b` (2b, 4b, 32b, 30b-a3b, 235b-a22b): what a released size needs, by part.
"""

import functools
import importlib.metadata
import math
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

from qwen3vl_jax.runtime.console import one_line_errors
from qwen3vl_jax.version import __version__

PACKAGES = "jax jaxlib flax optax orbax-checkpoint safetensors tokenizers numpy pillow tokamax"
OPTIONAL = {"tokamax": "not installed (optional: pip install 'qwen3vl-jax[moe]')"}


def versions() -> list[tuple[str, str]]:
    """Names and versions of Python, of this package and of its dependencies, installed or not."""
    rows = [("qwen3vl_jax", __version__), ("python", platform.python_version())]
    for name in PACKAGES.split():
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, OPTIONAL.get(name, "not installed")))
    return rows


def memory_of(device: Any) -> str:
    """The memory of one of JAX's devices, in use of its limit."""
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return f"shared with the host, {host_memory()}"
    return f"{_gib(stats.get('bytes_in_use', 0))} of {_gib(stats['bytes_limit'])} GiB"


def host_memory() -> str:
    """The host's memory and cores, if the system tells them."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return "size unknown"
    return f"{_gib(total)} GiB, {os.cpu_count()} cores"


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f}"


def needs(size: str) -> list[tuple[str, ...]]:
    """Parameters and bytes by part of a released size. Raises InputError for another name."""
    from qwen3vl_jax.config import Config

    cfg = Config.named(size)
    import jax

    from qwen3vl_jax.parameters import init_params

    tree = jax.eval_shape(functools.partial(init_params, cfg=cfg), jax.random.key(0))
    parts = {"vision tower and mergers": tree.pop("vision"), "decoder layers": tree.pop("layers")}
    parts["embedding, final norm, head"] = tree
    counts = {k: sum(math.prod(x.shape) for x in jax.tree.leaves(v)) for k, v in parts.items()}
    counts["all"] = sum(counts.values())
    rows = [(k, f"{n:,}", f"{_gib(2 * n)} GiB", f"{_gib(4 * n)} GiB") for k, n in counts.items()]
    t = cfg.text
    token = 2 * t.num_hidden_layers * t.num_key_value_heads * t.head_dim
    per_1024 = [f"{2**10 * token * width / 2**20:.0f} MiB" for width in (2, 4)]
    return [*rows, ("cache, 1,024 tokens", "", *per_1024)]


def show(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(markup=False).print(table)  # [cuda] is an extra's name, not a style


def backends() -> list[tuple[str, bool, str]]:
    """Each attention back end: (name, whether it is available here, why not or what it serves)."""
    from qwen3vl_jax.model.attention_gpu import gpu_refusal
    from qwen3vl_jax.model.sharding import platform

    here = platform()
    blocks = "every platform, dtype and layout; online softmax, empty blocks skipped"
    no_gpu = gpu_refusal("bfloat16", 128) if here == "gpu" else f"needs a GPU, this is {here}"
    gpu = (
        "packed rows, prompts, images, videos, tokens behind a cache; Pallas: decode steps; 16 bits"
    )
    no_tpu = "" if here == "tpu" else f"needs a TPU, this is {here}"
    tpu = no_tpu or "128 queries a row or more; Pallas: decode steps"
    rows = [("xla blocks", True, blocks), ("cudnn", not no_gpu, no_gpu or gpu)]
    return [*rows, ("splash", not no_tpu, tpu)]


def main(argv: list[str] | None = None) -> int:
    """Prints three tables, or one of a size; returns 0, or 2 where JAX finds no device."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("-h", "--help"):
        print(f"usage: python -m qwen3vl_jax [SIZE]\n\n{__doc__}")
        return 0
    if argv:
        with one_line_errors():
            show(argv[0], ("part", "parameters", "bf16", "fp32"), needs(argv[0]))
        return 0
    show("versions", ("package", "version"), versions())
    import jax

    try:
        found = [(str(x), x.device_kind, memory_of(x)) for x in jax.local_devices()]
    except RuntimeError as error:  # a platform was asked for that is not there
        print(f"error: JAX finds no device: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    show(f"devices (host: {host_memory()})", ("device", "kind", "memory"), found)
    rows = [(name, "yes" if usable else "no", why) for name, usable, why in backends()]
    show("attention back ends", ("name", "available", "why"), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
