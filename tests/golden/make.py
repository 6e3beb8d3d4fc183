"""Makes tests/golden/*.npz from transformers 4.57.1, the release the published models came with.

    python -m venv /tmp/golden && /tmp/golden/bin/pip install -r tests/golden/requirements.txt
    /tmp/golden/bin/python tests/golden/make.py            # writes dense, moe and prompts.npz
    /tmp/golden/bin/python tests/golden/make.py --check    # remakes and compares, writes nothing

Its outputs differ from those of transformers 5 in form: hidden_states and attentions of the whole
generation class, position ids of 1 at padding, and a delta that subtracts the padded row length;
and a clip's frames take the place of the template's vision_start .. vision_end pair.

dense.npz and moe.npz hold no weight: tests/tiny.py makes them from (variant "golden", seed), and
weights_crc32 says that two machines made the same ones. Arrays, for a batch of four left-padded rows
(picture, text, clip, clips with a picture) of T columns:
  config (JSON), seed, weights_crc32, in.* (the inputs),
  features, taps.{k}             the vision tower on the pictures [cells, D]
  video_features, video_taps.{k} the same on the clips
  position_ids [3, B, T], rope_deltas [B, 1]       as 4.57.1 returns them
  hidden_states [L+1, B, T, D]   embeddings with vision rows written, then after each layer with its
                                 DeepStack addition; the last is before the final norm
  attentions [L, B, N, T, T]     eager probabilities; rows and columns of padding mean nothing
  logits [B, T, V]               of the whole prompt
  greedy [B, 32]                 generate(do_sample=False) with end tokens off
prompts.npz has what Qwen3VLProcessor makes of each conversation of FILMED in tests/chats.py, with the
tokenizer and template of tests/toy_checkpoint.py (tokenizer_crc32 is of its vocabulary):
  {name}.input_ids [1, T], {name}.image_grid_thw, {name}.video_grid_thw,
  {name}.position_ids [3, 1, T], {name}.rope_deltas [1, 1]
All are float32 or int64.

--check also loads checkpoints with config files of our writing, and the demo's: the head must be the
stored one, or the embedding where it is tied.
"""

import argparse
import functools
import itertools
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

import chats  # noqa: E402
import golden_io  # noqa: E402
import tiny  # noqa: E402
import torchvision_shim  # noqa: E402, F401
import toy_checkpoint as toy  # noqa: E402

ROWS = ("short", "text", "clip", "clips_and_picture")
STEPS = 32
TOLERANCE = 1e-5  # of an array's largest magnitude, between two machines


def build(moe: bool) -> tuple[dict[str, Any], Any]:
    """The config as a dict and the float32 eager model of transformers 4.57.1."""
    import torch
    import transformers

    kind = "Qwen3VLMoe" if moe else "Qwen3VL"
    config = tiny.config_dict("golden", moe)
    hf_config = getattr(transformers, f"{kind}Config")(**config)
    hf_config._attn_implementation = "eager"
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(hf_config)
    weights = tiny.weights(config, golden_io.SEED)
    model.load_state_dict({name: torch.from_numpy(a) for name, a in weights.items()}, strict=True)
    return config, model.eval()


def outputs(moe: bool) -> dict[str, np.ndarray]:
    """Every array of one golden file."""
    import torch

    config, model = build(moe)
    inputs = tiny.pad_batch([tiny.inputs(config, row) for row in ROWS])
    tensors = {k: torch.from_numpy(a) for k, a in inputs.items() if k != "mm_token_type_ids"}
    arrays: dict[str, Any] = {f"in.{name}": a for name, a in inputs.items()}
    with torch.no_grad():
        for prefix, pixels, grid in (
            ("", "pixel_values", "image_grid_thw"),
            ("video_", "pixel_values_videos", "video_grid_thw"),
        ):
            features, taps = model.model.visual(tensors[pixels], grid_thw=tensors[grid])
            arrays[f"{prefix}features"] = features
            arrays |= {f"{prefix}taps.{k}": tap for k, tap in enumerate(taps)}
        arrays["position_ids"], arrays["rope_deltas"] = model.model.get_rope_index(
            tensors["input_ids"],
            tensors["image_grid_thw"],
            tensors["video_grid_thw"],
            attention_mask=tensors["attention_mask"],
        )
        out = model(**tensors, output_hidden_states=True, output_attentions=True, use_cache=False)
        model.generation_config.eos_token_id = None
        answer = model.generate(
            **tensors,
            do_sample=False,
            max_new_tokens=STEPS,
            pad_token_id=tiny.PAD,
            eos_token_id=None,
        )
    arrays["hidden_states"] = torch.stack(out.hidden_states)
    arrays["attentions"] = torch.stack(out.attentions)
    arrays["logits"] = out.logits
    arrays["greedy"] = answer[:, inputs["input_ids"].shape[1] :]
    return {
        **{name: np.asarray(array) for name, array in arrays.items()},
        "config": np.asarray(json.dumps(config)),
        "seed": np.asarray(golden_io.SEED),
        "weights_crc32": np.asarray(golden_io.checksum(tiny.weights(config, golden_io.SEED))),
    }


def prompts() -> dict[str, np.ndarray]:
    """Every array of prompts.npz."""
    from transformers import Qwen3VLConfig, Qwen3VLModel

    processor, config = _processor(), Qwen3VLConfig(**toy.config())
    arrays: dict[str, Any] = {"tokenizer_crc32": golden_io.tokenizer_checksum()}
    for name, chat in chats.FILMED.items():
        rendered = processor.apply_chat_template(
            chat, tools=chats.tools_of(name), add_generation_prompt=True
        )
        found = processor(text=[rendered], return_tensors="pt", **chats.media(chat))
        kept = {k: found[k] for k in golden_io.PROMPT_KEYS if k in found}
        ids, images, films = (kept.get(k) for k in golden_io.PROMPT_KEYS)
        kept["position_ids"], kept["rope_deltas"] = Qwen3VLModel.get_rope_index(
            SimpleNamespace(config=config), ids, images, films
        )
        arrays |= {f"{name}.{key}": array for key, array in kept.items()}
    return {name: np.asarray(array) for name, array in arrays.items()}


def _processor() -> Any:
    """Qwen3VLProcessor with the toy tokenizer, template and patch size, and the released limits."""
    from transformers import (
        Qwen2TokenizerFast,
        Qwen2VLImageProcessorFast,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    limits = {"shortest_edge": 4096, "longest_edge": 25165824}
    with tempfile.TemporaryDirectory() as folder:
        toy.save(Path(folder))
        return Qwen3VLProcessor(
            image_processor=Qwen2VLImageProcessorFast.from_pretrained(folder),
            tokenizer=Qwen2TokenizerFast.from_pretrained(folder),
            video_processor=Qwen3VLVideoProcessor(size=limits, patch_size=toy.IMAGES["patch_size"]),
            chat_template=toy.TEMPLATE,
        )


# tie_word_embeddings at the top and in text_config, as files have them; the first two are tied.
TIES = ((True, None), (False, True), (False, False), (False, True))


def heads() -> list[str]:
    """What is wrong with the heads of checkpoints that are read with config files of our writing.

    They are written as save_params does, and as what copies a checkpoint's files does.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from qwen3vl_jax.checkpoint.config_files import copy_files, write_config
    from qwen3vl_jax.config import Config
    from qwen3vl_jax.storage.atomic_dir import CONFIG

    faults = []
    for moe, (i, (top, text)) in itertools.product((False, True), enumerate(TIES)):
        raw: dict[str, Any] = tiny.config_dict("golden", moe) | {"tie_word_embeddings": i < 2}
        tensors = {n: torch.from_numpy(a) for n, a in tiny.weights(raw, golden_io.SEED).items()}
        raw["tie_word_embeddings"] = top
        raw["text_config"]["tie_word_embeddings"] = text
        with tempfile.TemporaryDirectory() as name:
            source, saved, copied = (Path(name) / kind for kind in ("source", "saved", "copied"))
            for folder in (source, saved, copied):
                folder.mkdir()
                save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            (source / CONFIG).write_text(json.dumps(raw))
            cfg = Config.from_hf(source)
            write_config(saved, cfg.to_hf(), cfg.tie_word_embeddings)
            copy_files(source, copied, names=[Path(CONFIG)])
            for folder in (saved, copied):
                faults += _head_faults(folder, tensors, moe, f"{folder.name}, {moe}, {top}, {text}")
    demo = HERE.parent.parent / "demo" / "checkpoint"
    return faults + _head_faults(demo, load_file(demo / "model.safetensors"), False, "demo")


def _head_faults(folder: Path, tensors: dict[str, Any], moe: bool, what: str) -> list[str]:
    """One line where the loaded model's logits are not those of the stored tensors."""
    import torch
    import transformers

    kind = getattr(transformers, f"Qwen3VL{'Moe' if moe else ''}ForConditionalGeneration")
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    embed = "model.language_model.embed_tokens.weight"
    head = tensors.get("lm_head.weight", tensors[embed]).float()
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state
        off = (model(input_ids=ids).logits - hidden @ head.T).abs().max()
    if not (model.get_input_embeddings().weight == tensors[embed].float()).all() or off > TOLERANCE:
        return [f"{what}: logits off by {off:.2e}"]
    return []


def differences(found: dict[str, np.ndarray], kept: dict[str, np.ndarray]) -> list[str]:
    """One line for each array that is missing, of another shape, or further off than TOLERANCE."""
    lines = [f"{name}: only on one side" for name in sorted(found.keys() ^ kept.keys())]
    for name in sorted(found.keys() & kept.keys()):
        new, old = found[name], kept[name]
        if new.shape != old.shape:
            lines.append(f"{name}: shape {new.shape}, kept {old.shape}")
        elif new.dtype.kind != "f":
            if not np.array_equal(new, old):
                lines.append(f"{name}: values differ")
        elif np.abs(new - old).max() > TOLERANCE * np.abs(old).max():
            lines.append(f"{name}: off by {np.abs(new - old).max():.2e}")
    return lines


def main() -> int:
    """Writes the golden files, or compares with them; returns 1 where they differ."""
    parser = argparse.ArgumentParser(description="Make or check tests/golden/*.npz.")
    parser.add_argument(
        "--check", action="store_true", help="compare with the files, write nothing"
    )
    check = parser.parse_args().check
    import transformers

    if transformers.__version__ != "4.57.1":
        sys.exit(f"make.py needs transformers 4.57.1, found {transformers.__version__}")
    makers = {name: functools.partial(outputs, moe) for name, moe in golden_io.FILES.items()}
    faults = []
    for name, maker in {**makers, "prompts": prompts}.items():
        path, arrays = HERE / f"{name}.npz", maker()
        if check:
            with np.load(path) as kept:
                lines = differences(arrays, dict(kept))
            faults += [f"{path.name}: {line}" for line in lines]
            print(f"{path.name}: {len(arrays)} arrays compared, {len(lines)} differ")
        else:
            np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]
            print(f"{path.name}: {path.stat().st_size:,} bytes")
    if check:
        lines = heads()
        faults += lines
        print(f"heads: {len(lines)} checkpoints read wrongly")
    print("\n".join(faults), end="\n" if faults else "")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
