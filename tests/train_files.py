"""A tiny checkpoint with weights, conversations, and a recipe over both, for tests of train.py."""

import json
from pathlib import Path
from typing import Any

import hf_files
import tiny
import tomli_w
import toy_checkpoint
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
RECIPE: dict[str, Any] = {
    "steps": 24,
    "save_every": 5,
    "pack": {"rows": 2, "length": 96, "vision_rows": 2, "vision_length": 64},
    "optimizer": {"learning_rate": 1e-3, "warmup": 2, "ema": 0.9},
    "step": {"dtype": "float32", "loss_chunk": 512, "remat": "none"},
    "report": {"every": 4, "tensorboard": False},
    "mesh": {"fsdp": 1},
}


def checkpoint(
    directory: Path, moe: bool = False, weights: bool = True, spare: int = 0, layers: int = 2
) -> Path:
    """A Hugging Face directory that a processor and `load` both read, `layers` deep.

    spare: rows of the embedding that no token uses.
    """
    raw = toy_checkpoint.config(moe=moe)
    raw["text_config"] |= {"num_hidden_layers": layers}
    raw["vision_config"] |= {"depth": layers, "deepstack_visual_indexes": [layers - 1]}
    if moe:
        raw["text_config"]["num_experts"] = 8  # four devices share them
    raw["text_config"]["vocab_size"] += spare
    hf_files.write(directory, raw, tiny.weights(raw, 0))
    if not weights:
        (directory / "model.safetensors").unlink()
    toy_checkpoint.save_tokenizer(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(toy_checkpoint.IMAGES))
    (directory / "chat_template.jinja").write_text(toy_checkpoint.TEMPLATE, encoding="utf-8")
    return directory


def conversations(path: Path, count: int = 24, pictured: tuple[int, int] = (3, 1)) -> Path:
    """Short chats in a JSONL file, in each (group, first) the first ones about a picture beside it."""
    lines = []
    group, first = pictured
    for i in range(count):
        content: list[dict[str, Any]] = [{"type": "text", "text": f"say {i}"}]
        if i % group < first:
            name = f"{path.stem}_{i % 6}.png"
            Image.new("RGB", (12 + 4 * (i % 6), 16), (40 * (i % 6), 80, 90)).save(
                path.parent / name
            )
            content.insert(0, {"type": "image", "image": name})
        turns = [{"role": "user", "content": content}]
        turns += [{"role": "assistant", "content": f"{i} and {i}"}]
        lines.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_recipe(path: Path, ckpt: Path, chats: Path, **changes: Any) -> Path:
    """RECIPE over a checkpoint and a file of chats; tables in `changes` are merged."""
    raw = {"ckpt": str(ckpt), **RECIPE, "data": {"sources": [{"path": str(chats)}]}}
    for key, value in changes.items():
        raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
    path.write_text(tomli_w.dumps(raw))
    return path
