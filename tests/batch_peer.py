"""transformers' generate in batches, for benchmarks/batch.py."""

import numpy as np
import torch
import torchvision_shim  # noqa: F401
import transformers
from released import to_hf
from tiny import pad_batch


def build(raw, cfg, params):
    """The model of a config.json's dict with our weights, float32, that never stops by itself."""
    model = transformers.Qwen3VLForConditionalGeneration(transformers.Qwen3VLConfig(**raw)).float()
    tensors = {name: torch.tensor(np.asarray(x)) for name, x in to_hf(cfg, params).items()}
    model.load_state_dict(tensors, strict=False)
    model.generation_config.eos_token_id = None
    return model.eval()


def answers(model, arrays, counts, rows: int, pad_id: int) -> list[list[int]]:
    """Greedy tokens, `rows` prompts at a time padded on the left, each batch to its longest answer."""
    found = []
    for start in range(0, len(arrays), rows):
        wanted = counts[start : start + rows]
        batch = pad_batch(arrays[start : start + rows])
        width, most = batch["input_ids"].shape[1], max(wanted)
        batch = {name: torch.from_numpy(x) for name, x in batch.items()}
        with torch.no_grad():
            out = model.generate(
                **batch,
                do_sample=False,
                max_new_tokens=most,
                min_new_tokens=most,
                pad_token_id=pad_id,
            )
        found += [row[width : width + n].tolist() for row, n in zip(out, wanted, strict=True)]
    return found
