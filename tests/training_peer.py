"""transformers' training step with random weights, for benchmarks.training: a line of JSON each.

Gradient checkpointing, fused AdamW, bf16 weights, sdpa attention; peft for LoRA.
"""

import json
import sys
from typing import Any

import torch
import transformers

from benchmarks.scaling_cases import config
from benchmarks.training import Run
from benchmarks.work import Work, prompt_arrays
from qwen3vl_jax.config import IGNORE_INDEX, Config
from tests.inference_peer import DEVICE, build, tensors, timed

# The decoder's matrices, which our recipe's target "text" names too.
TARGETS = r".*language_model.*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def measure(cfg: Config, run: Run) -> dict[str, Any]:
    """Seconds of a step, and what it trained on."""
    model = build(cfg)
    trained = model
    if run.lora:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=run.lora, lora_alpha=2 * run.lora, target_modules=TARGETS)
        trained = get_peft_model(model, lora)
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained.train()
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=DEVICE == "cuda")
    # A third of a row is an image, as in the packed samples beside it.
    side = 2 * int((run.length / 3) ** 0.5)
    grids = ((1, side, side),) if run.packed else ()
    text = run.length - 8 - sum(h * w // 4 + 2 for _, h, w in grids)
    found = tensors(cfg, prompt_arrays(cfg, Work(run.name, "prefill", run.rows, text, grids)))
    labels = found["input_ids"].clone()
    labels[found["mm_token_type_ids"] > 0] = IGNORE_INDEX

    def step() -> None:
        trained(**found, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = timed(step, 6)[2:]
    peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
    tokens = found["input_ids"].numel()
    return {"run": run.name, "seconds": sorted(seconds)[2], "tokens": tokens, "peak": peak}


def main() -> None:
    """A line for the versions, then one for each run."""
    asked = json.loads(sys.argv[1])
    cfg = config(asked["size"])
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(json.dumps({"versions": versions}), flush=True)
    for given in asked["works"]:
        run = Run(**given)
        try:
            found = measure(cfg, run)
        except (RuntimeError, ValueError) as e:
            found = {"run": run.name, "error": f"{type(e).__name__}: {e}"[:400]}
        print(json.dumps(found), flush=True)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
