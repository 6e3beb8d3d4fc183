"""Digests of saved tensors, to detect damage when they are read.

A digest is the crc32 of a tensor's dtype, shape and sums. The sums add the bits of its values, as
unsigned integers that wrap around, along all axes but the last. Adding runs at memory speed, and each
device adds its own shard. One changed value always changes the digest. Rows, layers or experts that
swap places do not, nor do changes that cancel in a sum.
"""

import contextlib
import functools
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from qwen3vl_jax.errors import InputError, ProblemsError
from qwen3vl_jax.storage.json_text import read_json, read_json_file, write_json

# The file of digests in a tree that write_tree wrote.
DIGESTS = "digests.json"
# The JSON of a run's step, with the digests of its trees by name.
META = "meta"
# Arrays from so many bytes on are added by so many threads.
_LARGE, _THREADS = 1 << 24, 4


class DamagedError(ProblemsError):
    """A checkpoint that is not as it was written."""

    def __init__(self, where: Path | str, problems: list[str]):
        super().__init__(f"{where}: damaged", problems)


def digest(x: np.ndarray) -> str:
    """The digest of an array: 8 hexadecimal digits."""
    bits = x.view(f"u{x.dtype.itemsize}")
    if x.nbytes < _LARGE or x.ndim < 2:
        return _finished(x, _added(bits))
    with ThreadPoolExecutor(_THREADS) as pool:
        parts = list(pool.map(_added, np.array_split(bits, _THREADS)))
    return _finished(x, np.add.reduce(parts, 0, bits.dtype))


def _added(bits: np.ndarray) -> np.ndarray:
    if bits.ndim < 2 or not bits.size:
        return np.add.reduce(bits, tuple(range(bits.ndim - 1)), bits.dtype)
    width = bits.shape[-1]
    fold = 16 if bits.size % (16 * width) == 0 and width * bits.itemsize <= 4096 else 1
    # Long rows add faster.
    wide = np.add.reduce(bits.reshape(-1, fold * width), 0, bits.dtype)
    return np.add.reduce(wide.reshape(fold, width), 0, bits.dtype)


def digests(arrays: Mapping[str, Any]) -> dict[str, str]:
    """The digests of jax.Arrays by name; for arrays on a mesh every process has to call it."""
    import jax

    first = next(iter(arrays.values()))
    if first.sharding.device_set == {jax.local_devices(backend="cpu")[0]}:
        return {name: digest(np.asarray(x)) for name, x in arrays.items()}
    device_sums = _device_sums(getattr(first.sharding, "mesh", None))
    sums = jax.device_get(device_sums(dict(arrays)))
    return {name: _finished(x, sums[name]) for name, x in arrays.items()}


@functools.cache
def _device_sums(mesh: Any) -> Any:
    import jax
    import jax.numpy as jnp

    from qwen3vl_jax.device_mesh import replicated

    def sums(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"u{x.dtype.itemsize}"))
        return bits.sum(range(x.ndim - 1), dtype=bits.dtype)

    everywhere = replicated(mesh) if mesh else None
    return jax.jit(functools.partial(jax.tree.map, sums), out_shardings=everywhere)


def _finished(x: Any, sums: np.ndarray) -> str:
    described = f"{x.dtype.name} {list(x.shape)}".encode()
    return f"{zlib.crc32(np.ascontiguousarray(sums).data.cast('B'), zlib.crc32(described)):08x}"


def saved_digests(directory: Path) -> dict[str, str] | None:
    """The digests saved with an Orbax tree, None for one of an older release. Raises DamagedError."""
    own = directory / DIGESTS
    try:
        if own.is_file():
            return read_json_file(own)
        if not (directory.parent / META).is_dir():
            return None
        return read_meta(directory.parent).get("digests", {}).get(directory.name)
    except InputError as e:
        raise DamagedError(directory, [str(e)]) from e


def with_checksum(meta: Mapping[str, Any]) -> dict[str, Any]:
    """JSON data with its own crc32, for `read_meta`."""
    # As it will be read: tuples become lists.
    plain = read_json(write_json(meta, META), META)
    return plain | {"crc32": zlib.crc32(write_json(plain, META, sort_keys=True).encode())}


def read_meta(step: Path) -> dict[str, Any]:
    """The JSON data saved with a step. Raises DamagedError if its crc32 differs."""
    path = step / META / "metadata"
    try:
        found = read_json_file(path)
    except InputError as error:
        raise DamagedError(step, [str(error)]) from None
    kept = found.pop("crc32", None)
    if kept is not None and with_checksum(found)["crc32"] != kept:
        raise DamagedError(step, [f"{META} is not as it was saved"])
    return found


def saved_trees(step: Path) -> list[str]:
    """The names of a step's trees: those with digests, or else its folders."""
    with contextlib.suppress(DamagedError):
        if names := read_meta(step).get("digests"):
            return sorted(names)
    return sorted(p.name for p in step.iterdir() if p.is_dir() and p.name != META)


def check_digests(directory: Path, found: Mapping[str, str], kept: Mapping[str, Any]) -> None:
    """Raises DamagedError with a list of the tensors whose digests differ from the saved ones."""
    if names := sorted(n for n in {**kept, **found} if kept.get(n) != found.get(n)):
        raise DamagedError(directory, [f"{name} is not as it was saved" for name in names])
