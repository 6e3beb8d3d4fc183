"""The reference: tiny random transformers Qwen3-VL models, and what they answer, as plain numpy.

Every model is built from tests/tiny.py, so the same (variant, moe, rope, seed) names the same
weights on our side: `Config.from_hf(ref.config)` and `ref.weights` (released names, released axis
order).
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
import torchvision_shim  # noqa: F401
from safetensors.numpy import save_file
from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

Arrays = dict[str, np.ndarray]
MODEL_CLASSES = {False: Qwen3VLForConditionalGeneration, True: Qwen3VLMoeForConditionalGeneration}

# Seeds whose greedy answers meet the conditions of check_greedy on every row of GREEDY_ROWS.
SEEDS: dict[tuple[str, bool], int] = {("golden", False): 1}  # 0 for every other
GREEDY_ROWS = ("one_picture", "three_pictures", "text", "clip")


@dataclasses.dataclass(frozen=True)
class Reference:
    """One model: its config.json as a dict, its weights as released, and its torch modules."""

    config: dict[str, Any]
    weights: Arrays
    seed: int
    moe: bool

    def model(self, dtype: str = "float32") -> Any:
        """A transformers model, eval, eager attention; a new one for rope types with state."""
        if self.config["text_config"]["rope_scaling"]["rope_type"] in ("dynamic", "longrope"):
            return _torch_model(self, dtype)
        return _kept_model(self, dtype)

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


@functools.cache
def build(
    variant: str = "base", moe: bool = False, rope: str = "default", seed: int | None = None
) -> Reference:
    """The reference of a variant (tiny.VARIANTS) and rope (tiny.ROPES); seed None takes SEEDS."""
    config = tiny.config_dict(variant, moe, rope)
    seed = SEEDS.get((variant, moe), 0) if seed is None else seed
    return Reference(config, tiny.weights(config, seed), seed, moe)


@functools.lru_cache(maxsize=8)
def _kept_model(ref: Reference, dtype: str) -> Any:
    return _torch_model(ref, dtype)


def _torch_model(ref: Reference, dtype: str) -> Any:
    config_class: Any = Qwen3VLMoeConfig if ref.moe else Qwen3VLConfig
    model_class: Any = MODEL_CLASSES[ref.moe]
    config = config_class(**{k: v for k, v in ref.config.items() if k != "architectures"})
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = model_class(config)
    state = {k: torch.from_numpy(v) for k, v in weights_v5(ref).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    # Parameters only: rotary frequencies stay float32, as from_pretrained(dtype=...) leaves them.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
        parameter.requires_grad_(False)
    return model.eval()


def weights_v5(ref: Reference) -> Arrays:
    """The weights in transformers 5's memory layout: experts [E, 2M, H] and [E, H, M]."""
    return {
        name: np.ascontiguousarray(a.swapaxes(1, 2)) if ".experts." in name else a
        for name, a in ref.weights.items()
    }


def config_v5(ref: Reference) -> dict[str, Any]:
    """The config as transformers 5 writes it (rope_parameters, num_local_experts, defaults)."""
    return ref.model().config.to_dict()


def save(ref: Reference, path: str | Path, layout: str = "released") -> Path:
    """Writes a Hugging Face directory: layout "released", or "v5" as save_pretrained does."""
    path = Path(path)
    if layout == "v5":
        ref.model().save_pretrained(path)
        return path
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(ref.config, indent=2))
    save_file(ref.weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def open_hf(path: str | Path, moe: bool, dtype: str = "float32") -> Any:
    """The model of a Hugging Face directory as transformers loads it, eval, eager everywhere."""
    model, report = MODEL_CLASSES[moe].from_pretrained(
        path,
        dtype=getattr(torch, dtype),
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    faults = {key: value for key, value in report.items() if value}
    assert not faults, faults
    return model.eval()


def _tensors(inputs: Arrays) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in inputs.items()}


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    floating = tensor.is_floating_point()
    return (tensor.float() if floating else tensor).detach().cpu().numpy()


@torch.no_grad()
def features(ref: Reference, inputs: Arrays, dtype: str = "float32", kind: str = "image"):
    """Vision features [N/merge^2, out] and DeepStack taps (same shape), of "image" or "video"."""
    model, t = ref.model(dtype), _tensors(inputs)
    pixels = t["pixel_values" if kind == "image" else "pixel_values_videos"]
    out = model.model.visual(
        pixels.to(getattr(torch, dtype)), grid_thw=t[f"{kind}_grid_thw"], return_dict=True
    )
    return _numpy(out.pooler_output), [_numpy(tap) for tap in out.deepstack_features]


@torch.no_grad()
def positions(ref: Reference, inputs: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """MRoPE ids [3, B, T] (0 where padded) and delta [B, 1] = max + 1 - attended length."""
    t = _tensors(inputs)
    ids, delta = ref.model().model.get_rope_index(
        t["input_ids"],
        mm_token_type_ids=t["mm_token_type_ids"],
        image_grid_thw=t.get("image_grid_thw"),
        video_grid_thw=t.get("video_grid_thw"),
        attention_mask=t["attention_mask"],
    )
    return _numpy(ids), _numpy(delta)


@torch.no_grad()
def logits(ref: Reference, inputs: Arrays, dtype: str = "float32") -> np.ndarray:
    """Logits [B, T, V] float32 of the whole prompt; meaningless where attention_mask is 0."""
    ids = torch.from_numpy(positions(ref, inputs)[0])
    model = ref.model(dtype)
    return _numpy(model(**_tensors(inputs), position_ids=ids, use_cache=False).logits)


@torch.no_grad()
def last_hidden(ref: Reference, inputs: Arrays) -> np.ndarray:
    """The state after the final norm [B, T, D] float32; meaningless where attention_mask is 0."""
    ids = torch.from_numpy(positions(ref, inputs)[0])
    out = ref.model().model(**_tensors(inputs), position_ids=ids, use_cache=False)
    return _numpy(out.last_hidden_state)


@torch.no_grad()
def greedy(
    ref: Reference, inputs: Arrays, steps: int = 64, dtype: str = "float32"
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens [B, steps] and the logits [B, steps, V] they come from; end tokens are off.

    Rows must be unpadded or padded on the left. Positions are passed at each step, so nothing
    depends on what the model object remembers of an earlier call.
    """
    model, t = ref.model(dtype), _tensors(inputs)
    assert bool(t["attention_mask"][:, -1].all()), (
        "pad on the left: the last column is generated from"
    )
    ids, delta = (torch.from_numpy(a) for a in positions(ref, inputs))
    mask = t["attention_mask"]
    out = model(**t, position_ids=ids, use_cache=True)
    tokens, chosen = [], []
    for _ in range(steps):
        last = out.logits[:, -1]
        token = last.argmax(-1, keepdim=True)
        chosen.append(last)
        tokens.append(token)
        step_ids = (mask.sum(-1, keepdim=True) + delta)[None].expand(3, -1, -1)
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        out = model(
            input_ids=token,
            attention_mask=mask,
            position_ids=step_ids,
            past_key_values=out.past_key_values,
            use_cache=True,
        )
    return _numpy(torch.cat(tokens, 1)), _numpy(torch.stack(chosen, 1))


@functools.cache
def answer(ref: Reference, row: str, steps: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """What `greedy` gives for a row of tiny.ROWS, computed once a process."""
    return greedy(ref, tiny.inputs(ref.config, row), steps)


def greedy_faults(
    ref: Reference, rows: tuple[str, ...] = GREEDY_ROWS, steps: int = 64
) -> list[str]:
    """What makes this model unfit for greedy comparisons; an empty list is what a test asserts.

    Asked for: at least 12 distinct tokens in an answer, top-two logits 1e-4 apart at each step,
    another answer within 16 tokens once the picture is blank.
    """
    faults = []
    for row in rows:
        prompt = tiny.inputs(ref.config, row)
        tokens, chosen = answer(ref, row, steps)
        top = np.sort(chosen, -1)
        if len(set(tokens[0].tolist())) < 12:
            faults.append(f"{row}: {len(set(tokens[0].tolist()))} distinct tokens")
        if (top[..., -1] - top[..., -2]).min() < 1e-4:
            faults.append(f"{row}: top two logits {(top[..., -1] - top[..., -2]).min():.1e} apart")
        if any(key.startswith("pixel") for key in prompt) and np.array_equal(
            tokens[:, :16], greedy(ref, tiny.blank(prompt), 16)[0]
        ):
            faults.append(f"{row}: the same answer with a blank picture")
    return faults


def mixed(ref: Reference, side: str = "left", rows: tuple[str, ...] = GREEDY_ROWS) -> Arrays:
    """Several prompts padded on one side; row i alone is tiny.inputs(config, rows[i])."""
    return tiny.pad_batch([tiny.inputs(ref.config, row) for row in rows], side)
