"""Writes Hugging Face directories of tiny models, whole or broken, and lists what a directory holds."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tiny
from safetensors.numpy import save_file

from qwen3vl_jax.storage.safetensors_files import read_tensors

Tensors = dict[str, np.ndarray]
SIDE_FILES = {"tokenizer.json": "{}", "chat_template.jinja": "{{ x }}", "extra/notes.txt": "n\n"}
SMALL = {"text": {"num_hidden_layers": 2}, "vision": {"depth": 2, "deepstack_visual_indexes": [1]}}


def small(variant: str = "base", moe: bool = False, **text: Any) -> tuple[dict[str, Any], Tensors]:
    """(config.json, weights) of a model of two layers; every tensor in bf16 but some norms."""
    raw = tiny.config_dict(variant, moe)
    raw["text_config"] |= {**SMALL["text"], **text}
    if variant != "no_taps":
        raw["vision_config"] |= SMALL["vision"]
    return raw, mixed(tiny.weights(raw, 0))


def mixed(tensors: Tensors) -> Tensors:
    """bf16, with some tensors in the two other dtypes that files hold."""

    def dtype(name: str):
        if name.endswith("norm.weight"):
            return np.float32
        return np.float16 if "merger" in name else ml_dtypes.bfloat16

    return {name: tensor.astype(dtype(name)) for name, tensor in tensors.items()}


def write(directory: Path, raw: dict[str, Any], tensors: Tensors, shards: int = 1) -> Path:
    """A complete directory: config, side files, one safetensors file or several with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    for name, text in SIDE_FILES.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    names = sorted(tensors)
    index = {}
    for k in range(shards):
        file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        held = names[k::shards]
        save_file({n: tensors[n] for n in held}, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(held, file)
    text_index = json.dumps({"metadata": {}, "weight_map": index})
    (directory / "model.safetensors.index.json").write_text(text_index)
    return directory


def read(directory: Path) -> Tensors:
    """Every tensor of a directory, by the name in the file."""
    return {tensor.name: np.array(tensor.view()) for tensor in read_tensors(directory)}


def assert_same(got: Tensors, want: Tensors) -> None:
    """The same names, dtypes, shapes and bytes."""
    assert got.keys() == want.keys(), sorted(got.keys() ^ want.keys())
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        assert got[name].shape == want[name].shape, name
        assert got[name].tobytes() == want[name].tobytes(), name


def listing(directory: Path) -> list[str]:
    """Every path below a directory, hidden ones too."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def turned(tensors: Tensors) -> Tensors:
    """Fused experts as transformers 5 lays them out in memory, and saves them."""
    return {
        name: np.ascontiguousarray(tensor.transpose(0, 2, 1)) if ".experts." in name else tensor
        for name, tensor in tensors.items()
    }


def one_by_one(tensors: Tensors) -> Tensors:
    """Experts as matrices of their own, [out, in], as quantisers export them."""
    out = {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            out[name] = tensor
            continue
        prefix, fused = name.rsplit(".", 1)
        parts = ("gate_proj", "up_proj") if fused == "gate_up_proj" else ("down_proj",)
        for j, expert in enumerate(tensor):
            for part, piece in zip(parts, np.split(expert, len(parts), axis=1)):
                out[f"{prefix}.{j}.{part}.weight"] = np.ascontiguousarray(piece.T)
    return out
