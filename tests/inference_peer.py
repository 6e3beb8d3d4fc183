"""transformers' Qwen3-VL with random weights, timed on the works of benchmarks.work: a line of JSON each.

A process of its own, run by benchmarks.inference. Attention is torch's sdpa, generation its own loop.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import torchvision_shim  # noqa: F401
import transformers

from benchmarks.requests import mixed_requests
from benchmarks.scaling_cases import config
from benchmarks.work import Figure, Work, prompt_arrays
from qwen3vl_jax.config import Config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHORT, LONG = 8, 40  # tokens of the two answers whose difference gives the time of a step
BATCH = 16  # requests that generate answers together


def build(cfg: Config) -> Any:
    """The model in bf16 on the device, with random weights."""
    kind = "Qwen3VLMoe" if cfg.text.num_experts else "Qwen3VL"
    hf = getattr(transformers, f"{kind}Config")(**cfg.to_hf())
    hf._attn_implementation = "sdpa"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(hf)
    torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    return model.to(torch.bfloat16).eval()


def tensors(cfg: Config, arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """A processor's arrays as the model takes them."""
    found = {name: torch.from_numpy(x).to(DEVICE) for name, x in arrays.items()}
    if "pixel_values" in found:
        found["pixel_values"] = found["pixel_values"].to(torch.bfloat16)
    ids = found["input_ids"]
    kinds = (ids == cfg.image_token_id).to(torch.int64)
    return found | {"mm_token_type_ids": kinds, "attention_mask": torch.ones_like(ids)}


def synchronize() -> None:
    """Waits for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def timed(call: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each call."""
    seconds = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(model: Any, cfg: Config, work: Work) -> Figure:
    """The seconds of one work; of a decode, those of a step."""
    if work.kind == "decode":
        return _decode(model, cfg, work)
    found = tensors(cfg, prompt_arrays(cfg, work))

    def call():
        if work.kind == "vision":
            return model.model.visual(found["pixel_values"], grid_thw=found["image_grid_thw"])
        return model(**found, logits_to_keep=1)

    first, *seconds = timed(call, 7)
    return Figure(work.name, seconds[1:], first, _peak())


def _decode(model: Any, cfg: Config, work: Work) -> Figure:
    """Greedy steps of generate behind a prompt of text: a long answer less a short one."""
    prompt = Work("prompt", "prefill", work.rows, work.filled - 8)
    found = tensors(cfg, prompt_arrays(cfg, prompt))

    def answer(count: int) -> float:
        given = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        return timed(lambda: model.generate(**found, **given, pad_token_id=0), 1)[0]

    first = answer(SHORT)
    pairs = [(answer(SHORT), answer(LONG)) for _ in range(3)]
    seconds = [(long - short) / (LONG - SHORT) for short, long in pairs]
    return Figure(work.name, seconds, first, _peak())


def _peak() -> float:
    return float(torch.cuda.max_memory_allocated()) if DEVICE == "cuda" else 0.0


def run(cfg: Config, works: Sequence[Work]) -> None:
    """Prints the versions, then a line for each work."""
    model = build(cfg)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(json.dumps({"device": device, "versions": versions}), flush=True)
    for work in works:
        try:
            with torch.inference_mode():
                found = measure(model, cfg, work)
        except (RuntimeError, ValueError) as e:
            found = Figure(work.name, [], error=f"{type(e).__name__}: {e}"[:400])
        print(json.dumps(found.to_json()), flush=True)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def answer_requests(cfg: Config, count: int, began: float) -> None:
    """Seconds of a process that answers the mixed requests by generate, BATCH at a time."""
    start = time.perf_counter()
    model = build(cfg)
    synchronize()
    making = time.perf_counter() - start
    requests = list(mixed_requests(cfg, count))
    for at in range(0, count, BATCH):
        _answer_batch(model, cfg, requests[at : at + BATCH])
    synchronize()
    tokens = sum(answer for _, answer in requests)
    found = {"seconds": time.time() - began - making, "tokens": tokens, "answers": count}
    print(json.dumps(found), flush=True)


def _answer_batch(model: Any, cfg: Config, requests: Sequence[tuple[dict, int]]) -> None:
    """Padded on the left, until the longest answer of the batch ends."""
    width = max(arrays["input_ids"].shape[1] for arrays, _ in requests)
    rows = [
        np.pad(arrays["input_ids"][0], (width - arrays["input_ids"].shape[1], 0))
        for arrays, _ in requests
    ]
    given = {"input_ids": np.stack(rows)}
    for name in ("pixel_values", "image_grid_thw"):
        if found := [arrays[name] for arrays, _ in requests if name in arrays]:
            given[name] = np.concatenate(found)
    inputs = tensors(cfg, given)
    inputs["attention_mask"] = (inputs["input_ids"] > 0).to(torch.int64)
    most = max(answer for _, answer in requests)
    with torch.inference_mode():
        model.generate(
            **inputs, max_new_tokens=most, min_new_tokens=most, do_sample=False, pad_token_id=0
        )


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    if asked["what"] == "works":
        run(config(asked["size"]), [Work(**work) for work in asked["works"]])
    else:
        answer_requests(config(asked["size"]), asked["count"], asked["began"])
