"""Orbax directory -> Hugging Face directory: released names, dtypes and bytes."""

import dataclasses
import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from qwen3vl_jax.checkpoint import fp8, name_map, orbax_io, quantize, validate
from qwen3vl_jax.checkpoint.config_files import PARAMS, copy_files, read_config
from qwen3vl_jax.checkpoint.lazy_tensor import SCALE, Leaves
from qwen3vl_jax.checkpoint.param_paths import TreePath
from qwen3vl_jax.config import Config
from qwen3vl_jax.convert import SHARD_SIZE, Progress
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.storage.atomic_dir import atomic_dir, check_apart
from qwen3vl_jax.storage.json_text import write_json
from qwen3vl_jax.storage.remote_files import new_file
from qwen3vl_jax.storage.safetensors_files import DTYPE_NAMES, INDEX, SINGLE


@dataclasses.dataclass
class _Tensor:
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: str = ""
    offset: int = 0  # in its file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def to_hf(
    source: Path,
    out: Path,
    force: bool = False,
    shard_size: int = SHARD_SIZE,
    progress: Progress = lambda done, total: None,
) -> tuple[int, int]:
    """Writes safetensors, their index, and all other files; (tensors, bytes).

    Each tensor has the name, shape, dtype and bytes of the release. Raises InputError before it writes.
    """
    check_apart(source, out)
    cfg = Config.from_hf(source)
    if not (source / PARAMS).is_dir():
        raise InputError(f"{source}: holds no {PARAMS}, expected an Orbax checkpoint of convert")
    stored = orbax_io.open_tree(source / PARAMS)
    block = validate.check_stored(source, cfg, stored, read_config(source))
    if (kind := validate.stored_kind(stored)) in quantize.CODES:
        found = f"got {kind} weights, which Hugging Face files cannot hold"
        raise InputError(f"{source}: {found}; take the checkpoint that they were made from")
    return write_files(out, cfg, stored, (), source, force, shard_size, progress, block)


def write_files(
    out: Path,
    cfg: Config,
    stored: Leaves,
    first: Sequence[TreePath],
    files_from: Path,
    force: bool = False,
    shard_size: int = SHARD_SIZE,
    progress: Progress = lambda done, total: None,
    block: name_map.Block | None = None,
) -> tuple[int, int]:
    """Writes a parameter tree as safetensors, complete or not at all; (tensors, bytes).

    first: paths that are read first; the others are read so that one file after another is filled.
    files_from: a directory whose other files are copied. block: of FP8 weights.
    """
    known = {param.path: param for param in name_map.param_specs(cfg)}
    params = {path: known.get(path) or known[path[:-1]] for path in stored}
    parts = {path: _parts(params[path], path, leaf.dtype, block) for path, leaf in stored.items()}
    tensors = sorted((x for _, held in parts.values() for x in held), key=lambda x: x.name)
    shards = _shards(tensors, shard_size)
    total = sum(tensor.nbytes for tensor in tensors)
    with atomic_dir(out, force, needs=total) as stage, ExitStack() as files:
        left = {shard: len(held) for shard, held in shards.items()}
        closers, handles = {}, {}
        for shard, held in shards.items():
            closers[shard] = files.enter_context(ExitStack())
            handles[shard] = closers[shard].enter_context(new_file(stage / shard))
            _write_header(handles[shard].fileno(), shard, held)
        order = {path: (min(x.file for x in held), str(path)) for path, (_, held) in parts.items()}
        for path in (*first, *sorted(stored.keys() - set(first), key=order.__getitem__)):
            array, (sides, held) = stored[path].load(), parts[path]
            for tensor, (_, values) in zip(held, params[path].split(array, sides)):
                _write(handles[tensor.file].fileno(), tensor.offset, values)
                left[tensor.file] -= 1
                if not left[tensor.file]:
                    closers[tensor.file].close()
            progress(array.nbytes, total)
            # Before the next one is read.
            del array, values
        files.close()
        if len(shards) > 1:
            weight_map = {tensor.name: tensor.file for tensor in tensors}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (stage / INDEX).write_text(write_json(index, INDEX, indent=2) + "\n", encoding="utf-8")
        copy_files(files_from, stage, fp8=block is not None)
    return len(tensors), total


def _parts(
    param: name_map.ParamSpec, path: TreePath, dtype: np.dtype, block: name_map.Block | None
) -> tuple[name_map.Block, list[_Tensor]]:
    """(blocks of `ParamSpec.split`, tensors of the files) for a stored array: values, or FP8 scales."""
    if dtype not in DTYPE_NAMES:
        raise InputError(f"{param.parts[0].name}: dtype {dtype} has no name in safetensors")
    if block is None or path != (*param.path, SCALE):
        return name_map.EACH, [_Tensor(part.name, dtype, part.hf_shape) for part in param.parts]
    shapes = {part.name + fp8.SUFFIX: fp8.scale_shape(part.hf_shape, block) for part in param.parts}
    return block, [_Tensor(name, dtype, shape) for name, shape in shapes.items()]


def _shards(tensors: list[_Tensor], size: int) -> dict[str, list[_Tensor]]:
    """{file name: tensors} in the order of names, each file at most `size` bytes or one tensor."""
    groups, room = [[]], size
    for tensor in tensors:
        if groups[-1] and tensor.nbytes > room:
            groups.append([])
            room = size
        groups[-1].append(tensor)
        room -= tensor.nbytes
    count = len(groups)
    names = (f"model-{k:05d}-of-{count:05d}.safetensors" for k in range(1, count + 1))
    return dict(zip([SINGLE] if count == 1 else names, groups))


def _write_header(handle: int, file: str, tensors: list[_Tensor]) -> None:
    """Writes the header, sets each tensor's place, and extends the file to its full length."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    order, end = list(DTYPE_NAMES), 0
    for tensor in sorted(tensors, key=lambda x: (order.index(x.dtype), x.name)):
        tensor.file, tensor.offset, end = file, end, end + tensor.nbytes
        entry = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[tensor.name] = {**entry, "data_offsets": [tensor.offset, end]}
    text = write_json(header, "safetensors header", separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    for tensor in tensors:
        tensor.offset += start
    os.pwrite(handle, len(text).to_bytes(8, "little") + text, 0)
    os.truncate(handle, start + end)


def _write(handle: int, offset: int, tensor: np.ndarray) -> None:
    data = memoryview(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
    # One call writes at most 2 GiB.
    while data:
        done = os.pwrite(handle, data, offset)
        data, offset = data[done:], offset + done
