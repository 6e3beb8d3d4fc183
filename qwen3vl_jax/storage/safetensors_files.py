"""Safetensors files: headers first, values when used: memory-mapped, or remote the needed bytes."""

import dataclasses
import functools
import math
import mmap
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.storage.atomic_dir import PARTIAL
from qwen3vl_jax.storage.json_text import read_json, read_json_file
from qwen3vl_jax.storage.paths import file_size, files_under, is_remote, reached, read_range

# In the order of safetensors files: wide dtypes first, so that all tensors are aligned.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
FP8 = {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)}  # comes with scales
_READ = DTYPES | FP8
DTYPE_NAMES = {dtype: name for name, dtype in _READ.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_OTHER_WEIGHTS = (".safetensors", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data")
_INDEXES = (".safetensors.index.json", ".bin.index.json")
_MAX_HEADER = 100_000_000  # the format's own limit


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of a file, from its header: name, dtype, shape, first byte and size. Unread."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    memory: Callable[[], mmap.mmap]  # of the whole file, mapped when a tensor is first viewed

    @property
    def where(self) -> str:
        """The tensor's name and file, for a message."""
        return f"{self.name} in {self.file.name}"

    def view(self) -> np.ndarray:
        """The tensor as a read-only view of its file; a copy if remote or unaligned. Raises InputError."""
        dtype = _READ[self.dtype]
        if self.nbytes == 0:
            return np.empty(self.shape, dtype)
        if is_remote(self.file):
            return _fetched(self, 0, self.nbytes).reshape(self.shape)
        memory = self.memory()
        # Read ahead: single page faults are slow on a cold disk.
        if hasattr(memory, "madvise"):
            page = self.start // mmap.PAGESIZE * mmap.PAGESIZE
            memory.madvise(mmap.MADV_WILLNEED, page, self.start + self.nbytes - page)
        flat = np.frombuffer(memory, dtype, math.prod(self.shape), self.start)
        return (flat if flat.flags.aligned else flat.copy()).reshape(self.shape)

    def sliced(self) -> np.ndarray:
        """The tensor for slicing: a view, or for a remote file a stand-in that fetches single slices."""
        if is_remote(self.file) and self.nbytes:
            return cast(np.ndarray, _Slices(self, self.shape, {}))
        return self.view()


def is_weight_file(name: str) -> bool:
    """Whether a file holds weights of any framework; others are copied beside a checkpoint."""
    lower = name.lower()
    pickled = lower.endswith(PICKLES) and not lower.startswith("training_args")
    return pickled or lower.endswith(_OTHER_WEIGHTS + _INDEXES)


def read_header(path: Path) -> list[Stored]:
    """The tensors of one safetensors file. Raises InputError where it is missing, cut or inconsistent."""
    try:
        size = file_size(path)
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little") if len(prefix) == 8 else size
            if length > min(_MAX_HEADER, size - 8):
                sizes = f"({size} bytes, its header alone should have {length})"
                found = f"truncated or no safetensors file {sizes}; fetch it again"
                raise InputError(f"{path}: {found}")
            text = file.read(length)
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); fetch it again") from e
    header = read_json(text, f"{path}: the safetensors header")
    if not isinstance(header, dict):
        raise InputError(f"{path}: the safetensors header is no object; fetch it again")
    header.pop("__metadata__", None)
    memory = functools.cache(functools.partial(_mapped, path))
    stored = [_entry(path, name, entry, 8 + length, memory) for name, entry in header.items()]
    end = max((t.start + t.nbytes for t in stored), default=8 + length)
    if end != size:
        what = "truncated" if end > size else "too long"
        raise InputError(f"{path}: {what}: {size} bytes, its header says {end}; fetch it again")
    if sum(t.nbytes for t in stored) != size - 8 - length:
        raise InputError(f"{path}: tensors of its header overlap or repeat; fetch it again")
    return stored


def _entry(path: Path, name: str, entry: Any, base: int, memory: Callable) -> Stored:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        fits = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
        if dtype in _READ:
            fits = fits and end - begin == math.prod(shape) * _READ[dtype].itemsize
        if not (fits and isinstance(dtype, str)):
            raise ValueError
    except (KeyError, TypeError, ValueError) as e:
        wrong = f"its header's entry for {name} contradicts itself: {entry}"
        raise InputError(f"{path}: {wrong}") from e
    return Stored(path, name, dtype, shape, base + begin, end - begin, memory)


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _fetched(tensor: Stored, start: int, size: int) -> np.ndarray:
    with reached(tensor.file):
        data = read_range(tensor.file, tensor.start + start, size)
    if len(data) != size:
        raise InputError(f"{tensor.where}: found {len(data)} bytes of {size}; fetch it again")
    return np.frombuffer(data, _READ[tensor.dtype])


@dataclasses.dataclass(frozen=True)
class _Slices:
    """The array methods of `ParamSpec.cut` over a remote tensor; keeps the outermost rows it fetched."""

    tensor: Stored
    shape: tuple[int, ...]
    kept: dict[tuple[int, int], np.ndarray]

    def reshape(self, shape: tuple[int, ...]) -> "_Slices":
        return dataclasses.replace(self, shape=shape)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self[(slice(None),) * len(self.shape)]

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        outer = next((i for i, n in enumerate(self.shape) if n > 1), 0)
        start, stop, _ = index[outer].indices(self.shape[outer])
        row = self.tensor.nbytes // self.shape[outer]
        if (start, stop) not in self.kept:
            self.kept[start, stop] = _fetched(self.tensor, start * row, (stop - start) * row)
        shape = (*self.shape[:outer], stop - start, *self.shape[outer + 1 :])
        part = self.kept[start, stop].reshape(shape)
        return part[(*index[:outer], slice(None), *index[outer + 1 :])]


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a Hugging Face directory. Raises InputError if one or all are missing."""
    if (index := directory / INDEX).is_file():
        try:
            shards = sorted(set(read_json_file(index)["weight_map"].values()))
            plain = all(os.path.basename(shard) == shard for shard in shards)
        except (KeyError, TypeError, AttributeError) as e:
            what = "not a safetensors index with a weight_map; fetch it again"
            raise InputError(f"{index}: {what}") from e
        if not shards or not plain:
            what = f"its weight_map names no shard, or a file outside {directory}"
            raise InputError(f"{index}: {what}")
        if missing := [shard for shard in shards if not (directory / shard).is_file()]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            what = f"shard {missing[0]}{more} of {len(shards)} is missing"
            raise InputError(f"{directory}: {what}; fetch it again")
        return [directory / shard for shard in shards]
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    found = sorted(p for p in directory.glob("*.safetensors") if p.is_file())
    if adapters := [p.name for p in found if p.name.startswith("adapter_")]:
        raise InputError(f"{directory}: holds an adapter ({adapters[0]}), expected a whole model")
    if found:
        return found
    refuse_pickles(directory, [p.name for p in directory.iterdir()])
    raise InputError(f"{directory}: no weights found, expected {SINGLE} or {INDEX}")


def refuse_pickles(where: object, names: Iterable[str]) -> None:
    """Raises InputError if the files of a checkpoint without safetensors include pickles."""
    if pickles := sorted(name for name in names if name.endswith(PICKLES)):
        found = f"holds weights only as a pickle ({pickles[0]})"
        why = "expected safetensors (reading a pickle runs the code in it)"
        raise InputError(f"{where}: {found}, {why}; save it again with safe_serialization")


def read_tensors(directory: Path) -> list[Stored]:
    """Every tensor of a Hugging Face directory, from the headers alone. Raises InputError."""
    return [tensor for file in weight_files(directory) for tensor in read_header(file)]


def holds_head(directory: Path) -> bool | None:
    """Whether a Hugging Face directory holds a head; None without readable safetensors."""
    try:
        return any(tensor.name.endswith("lm_head.weight") for tensor in read_tensors(directory))
    except (InputError, OSError):
        return None


def side_files(directory: Path, leave_out: Iterable[str] = ()) -> list[Path]:
    """Every file of a checkpoint without weights, relative to it: config, tokenizer, ..."""
    found = files_under(directory, {".git", ".cache", PARTIAL, *leave_out})
    return [path for path in found if not is_weight_file(path.name)]
